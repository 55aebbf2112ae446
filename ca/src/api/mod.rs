//! gRPC services, one file each: translate, authorize, call inward. No logic of their own.

mod agent;
mod certificate_text;
mod error;
mod exports;
mod log;
mod metrics;
mod operator;
mod peer;
mod people;
mod policy;
mod revocation;
mod rights;
mod root;
mod tiles;
mod unread;
mod watch;

pub use agent::AgentApi;
pub use error::{ApiError, REASON_KEY};
pub use exports::Exports;
pub use log::{LogApi, auditors_ledger_routes};
pub use metrics::CallMetrics;
pub use operator::{Diagnosis, OperatorApi, Standing};
pub use peer::{Limits, Peer, PeerSvid, Peers};
pub use people::{People, Person, RoleSettings};
pub use policy::test_policy;
pub use revocation::RevocationApi;
pub use root::RootApi;
pub use tiles::{LEDGER_PREFIX, NoTile, TileName, TileSource, ledger_routes};
pub use unread::NoteUnread;
pub use watch::Watches;
