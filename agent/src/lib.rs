//! The Chancery node agent: attests the workloads on its node by their service-account tokens, keeps their certificates fresh, and
//! delivers them to local proxies over Envoy's SDS.
//!
//! Imports run one way:
//!
//! ```text
//! { sds, csi } -> svids -> ca_client        config, readiness, reload, admin, telemetry, accepted, occasionally: at the edge
//! ```

pub mod accepted;
pub mod admin;
pub mod ca_client;
pub mod config;
pub mod csi;
pub mod occasionally;
pub mod readiness;
pub mod reload;
pub mod sds;
pub mod svids;
pub mod telemetry;
