//! Envoy's secret discovery service: `StreamSecrets` and `DeltaSecrets`.
