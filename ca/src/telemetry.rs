//! What the CA counts and measures, as OpenMetrics.
