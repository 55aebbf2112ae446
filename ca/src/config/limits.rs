//! The `[limits]` of the configuration: how much of the CA one peer, or all of them, may take.

use std::num::NonZeroU32;
use std::time::Duration;

use serde::Deserialize;

use crate::api::Limits;

/// As configured; everything has a default.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitSettings {
    /// Connections at the same time, of all peers.
    pub max_connections: NonZeroU32,
    /// A connection older than this is drained, so that its peer is verified anew.
    #[serde(with = "chancery_process::config::duration")]
    pub max_connection_age: Duration,
    /// A TLS handshake that takes longer is given up.
    #[serde(with = "chancery_process::config::duration")]
    pub handshake_timeout: Duration,
    /// Certificates a second that one agent may ask for, over time.
    pub requests_per_second: NonZeroU32,
    /// Certificates that one agent may ask for at once.
    pub request_burst: NonZeroU32,
    /// Calls of one agent that are worked on at the same time.
    pub concurrent_calls: NonZeroU32,
    /// Joins a second from one address.
    pub joins_per_second: NonZeroU32,
}

impl Default for LimitSettings {
    fn default() -> Self {
        const fn number(number: u32) -> NonZeroU32 {
            NonZeroU32::MIN.saturating_add(number - 1)
        }
        Self {
            max_connections: number(4096),
            max_connection_age: Duration::from_secs(30 * 60),
            handshake_timeout: Duration::from_secs(10),
            requests_per_second: number(2000),
            request_burst: number(4000),
            concurrent_calls: number(64),
            joins_per_second: number(20),
        }
    }
}

impl LimitSettings {
    /// The key that has an impossible value, and why.
    pub(super) fn problem(&self) -> Option<(&'static str, &'static str)> {
        if self.max_connection_age < Duration::from_secs(1) {
            Some(("max_connection_age", "shorter than a second, so that no call could end in time"))
        } else if self.handshake_timeout < Duration::from_millis(100) {
            Some(("handshake_timeout", "shorter than 100 ms, which few networks keep to"))
        } else {
            None
        }
    }

    /// What each peer is held to.
    pub(crate) fn per_peer(&self) -> Limits {
        Limits {
            requests_per_second: self.requests_per_second,
            burst: self.request_burst,
            concurrent_calls: usize::try_from(self.concurrent_calls.get()).unwrap_or(usize::MAX),
            joins_per_second: self.joins_per_second,
        }
    }
}
