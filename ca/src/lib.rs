//! The Chancery certificate authority.
//!
//! Each folder is one idea, and imports run one way (`tests/` fails on one against the arrows):
//!
//! ```text
//! api -> rotation -> { issuance, fleet, publication } -> { attestation, authority } -> ledger -> store        backup, config, keys, kubernetes, telemetry, server: at the edge
//! ```

pub mod api;
pub mod attestation;
pub mod authority;
pub mod backup;
pub mod config;
pub mod fleet;
pub mod issuance;
pub mod keys;
pub mod kubernetes;
pub mod ledger;
pub mod publication;
pub mod rotation;
pub mod server;
pub mod store;
pub mod telemetry;
