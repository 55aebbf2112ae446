//! The agent's own identity and its one connection to the CA.

mod token;

pub use token::Token;

/// A proxy whose validation context is older than the agent's trust state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProxyLag {
    /// The proxy's node ID, as it named itself.
    pub proxy: String,
    /// Its pod's name.
    pub pod: String,
    /// What it acknowledged last; 0 if nothing.
    pub trust_sequence: u64,
    /// Its words when it refused the newer one; empty if it has just not answered.
    pub nack: String,
}

/// What the proxies on this agent's socket hold and said, summed up for the CA.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProxySummary {
    /// Open streams.
    pub streams: u32,
    /// Acknowledgements since the agent's start.
    pub acks: u64,
    /// Refusals since the agent's start.
    pub nacks: u64,
    /// Proxies that hold an older validation context; the first 100.
    pub lagging: Vec<ProxyLag>,
    /// How many they are in all.
    pub lagging_total: u32,
}
