//! The default engine: append-only segments, an index behind the commit, and sled for what is small and can be rebuilt.

use std::path::Path;
use std::sync::Arc;

use chancery_identity::Clock;

use super::{StoreError, Terms};

#[allow(dead_code, clippy::unnecessary_wraps, clippy::unused_self, reason = "the engine that drives it follows")]
mod index;

/// How an [`EmbeddedStore`] is laid out and what it is told about the entries.
#[derive(Clone, Debug)]
pub struct Options {
    /// Tells an entry's terms, so that it can be found.
    pub terms: Arc<dyn Terms>,
    /// The dimensions whose distinct values can be listed.
    pub dictionary_dimensions: Vec<u8>,
    /// Size of a segment in bytes, allocated in advance.
    pub segment_bytes: u64,
    /// How much at the end of a segment only a group with an act may fill while there is no room for another segment, in bytes.
    pub act_reserve_bytes: u64,
    /// Tells when leases end.
    pub clock: Arc<dyn Clock>,
}

impl Options {
    /// Segments of 16 MiB, 256 KiB of which are reserved for acts.
    pub fn new(terms: Arc<dyn Terms>, clock: Arc<dyn Clock>) -> Self {
        Self { terms, dictionary_dimensions: Vec::new(), segment_bytes: 16 << 20, act_reserve_bytes: 256 << 10, clock }
    }
}

/// A store that was opened.
#[derive(Debug)]
pub struct Opened {
    /// The store, which can be used at once; its index may still catch up.
    pub store: EmbeddedStore,
    /// What had to be repaired, one sentence each; also logged as warnings.
    pub repairs: Vec<String>,
}

/// The ledger's entries in a directory of this machine.
#[derive(Debug)]
pub struct EmbeddedStore {}

impl EmbeddedStore {
    /// Opens the store in `dir`, creating it if there is none.
    #[allow(clippy::unused_async, reason = "the engine follows")]
    pub async fn open(dir: &Path, _options: Options) -> Result<Opened, StoreError> {
        Err(StoreError::Io { place: dir.display().to_string(), detail: "the engine is not built in yet".into() })
    }
}
