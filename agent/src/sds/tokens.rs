//! When to end a stream so that its proxy comes back with a fresh token.
//!
//! Envoy reads its token only when it opens a stream. So a stream is ended once near 90 % of its token's life, when the kubelet has
//! refreshed the file (at 80 %): just after the proxy has taken a push, if one comes from 85 % on, else at a moment of its own between 88
//! and 92 %. A proxy that comes back with the same token is not ended again.

use std::collections::HashMap;
use std::sync::Mutex;

use time::{Duration, OffsetDateTime};

use super::lock;
use crate::svids::TokenInfo;

const AFTER_A_PUSH: f64 = 0.85;
const EARLIEST: f64 = 0.88;
const LATEST: f64 = 0.92;
/// Tokens remembered; over this, streams of further tokens are left alone.
const MAX_REMEMBERED: usize = 20_000;

/// The two moments at which a stream may be ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndPlan {
    after_a_push: OffsetDateTime,
    at_last: OffsetDateTime,
    spread: Duration,
}

/// The tokens that a stream was ended for, until they expire.
#[derive(Debug, Default)]
pub struct EndedTokens(Mutex<HashMap<String, Ended>>);

#[derive(Debug)]
struct Ended {
    expires_at: OffsetDateTime,
    /// A stream came back with it.
    returned: bool,
}

impl EndPlan {
    /// `jitter` is from 0 to 1 and spreads the streams that were opened together.
    pub fn new(token: &TokenInfo, jitter: f64) -> Self {
        let life = token.expires_at - token.issued_at;
        let at = |fraction: f64| token.issued_at + Duration::seconds_f64(life.as_seconds_f64() * fraction);
        let spread = Duration::seconds_f64(life.as_seconds_f64() * (LATEST - EARLIEST) * jitter);
        Self { after_a_push: at(AFTER_A_PUSH), at_last: at(EARLIEST) + spread, spread }
    }

    /// The CA went or came: streams that were kept only because it was away must not all end at this moment.
    pub fn spread_from(&mut self, now: OffsetDateTime) {
        self.at_last = self.at_last.max(now + self.spread);
    }

    /// How long until the stream may be ended in any case; `None` when that is past.
    pub fn wait(&self, now: OffsetDateTime) -> Option<std::time::Duration> {
        (self.at_last - now).try_into().ok().filter(|wait: &std::time::Duration| !wait.is_zero())
    }

    /// Whether to end the stream now; `pushed` says whether the proxy has just taken a push.
    pub fn is_due(&self, now: OffsetDateTime, pushed: bool) -> bool {
        now >= if pushed { self.after_a_push } else { self.at_last }
    }
}

impl EndedTokens {
    /// A stream opens: is its token one that a stream was ended for already?
    pub fn comes_back(&self, token: &TokenInfo) -> bool {
        lock(&self.0).get_mut(&token.id).is_some_and(|ended| {
            ended.returned = true;
            true
        })
    }

    /// Whether a proxy has come back with this very token: then ending another stream would bring no fresh one either.
    pub fn came_back(&self, token: &TokenInfo) -> bool {
        lock(&self.0).get(&token.id).is_some_and(|ended| ended.returned)
    }

    /// Remembers that a stream is being ended for this token. `false` if no more can be remembered: then it must not be ended.
    pub fn end(&self, token: &TokenInfo, now: OffsetDateTime) -> bool {
        let mut ended = lock(&self.0);
        if ended.len() >= MAX_REMEMBERED {
            ended.retain(|_, ended| ended.expires_at > now);
        }
        if ended.len() >= MAX_REMEMBERED && !ended.contains_key(&token.id) {
            return false;
        }
        ended.entry(token.id.clone()).or_insert(Ended { expires_at: token.expires_at, returned: false });
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(id: &str) -> TokenInfo {
        let issued_at = OffsetDateTime::from_unix_timestamp(1_800_000_000).unwrap();
        TokenInfo { id: id.into(), issued_at, expires_at: issued_at + Duration::seconds(1000) }
    }

    #[test]
    fn a_stream_ends_near_nine_tenths_of_its_token_and_earlier_after_a_push() {
        let token = token("a");
        let at = |seconds| token.issued_at + Duration::seconds(seconds);
        for jitter in [0.0, 0.5, 1.0] {
            let plan = EndPlan::new(&token, jitter);
            assert!(!plan.is_due(at(879), false));
            assert!(plan.is_due(at(920), false));
            assert!(!plan.is_due(at(849), true));
            assert!(plan.is_due(at(850), true));
        }
        assert_ne!(EndPlan::new(&token, 0.0), EndPlan::new(&token, 1.0));
    }

    #[test]
    fn the_same_token_is_known_when_it_comes_back() {
        let (ended, old, fresh) = (EndedTokens::default(), token("old"), token("fresh"));
        assert!(!ended.comes_back(&old));
        assert!(ended.end(&old, old.issued_at));
        assert!(!ended.came_back(&old));
        assert!(!ended.comes_back(&fresh));
        assert!(ended.comes_back(&old));
        assert!(ended.came_back(&old));
    }

    #[test]
    fn a_full_memory_forgets_expired_tokens_first_and_ends_nothing_else() {
        let ended = EndedTokens::default();
        let now = token("").issued_at;
        for number in 0..MAX_REMEMBERED {
            assert!(ended.end(&token(&number.to_string()), now));
        }
        assert!(!ended.end(&token("one more"), now));
        assert!(ended.end(&token("one more"), now + Duration::seconds(1000)));
    }
}
