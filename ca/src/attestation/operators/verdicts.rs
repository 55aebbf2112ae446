//! What was said about operators a moment ago, and how many are asked about at once.

use time::OffsetDateTime;
use tokio::sync::SemaphorePermit;

use super::{Operator, Right};
use crate::attestation::answers::{self, Key, Recent, Turns};

/// How many tokens are asked about at the same time.
const AT_ONCE: usize = 4;
const MAX_REMEMBERED: usize = 1024;

/// The verdicts on a cluster's operators. As long as they are remembered, a binding that was taken away may still count.
#[derive(Debug)]
pub(in crate::attestation) struct Verdicts {
    turns: Turns,
    said: Recent<Operator>,
}

impl Verdicts {
    pub(in crate::attestation) fn new() -> Self {
        Self { turns: Turns::new(AT_ONCE), said: Recent::new(MAX_REMEMBERED) }
    }

    /// Waits a little for a turn; nothing if there is none.
    pub(super) async fn turn(&self) -> Option<SemaphorePermit<'_>> {
        self.turns.take().await
    }

    pub(super) fn recall(&self, key: &Key, now: OffsetDateTime) -> Option<Operator> {
        self.said.recall(key, now)
    }

    pub(super) fn remember(&self, key: Key, operator: Operator, at: OffsetDateTime) {
        self.said.remember(key, operator, at);
    }
}

/// Of a token and what is asked about it.
pub(super) fn key(token: &str, right: Right) -> Key {
    answers::key([right.verb.name(), right.resource.name(), token])
}

#[cfg(test)]
mod tests {
    use super::super::{Resource, Verb};
    use super::*;
    use crate::attestation::answers::REMEMBERED;

    const READ: Right = Right { verb: Verb::Get, resource: Resource::Log };

    fn operator(allowed: bool) -> Operator {
        Operator { cluster: "east".into(), username: "system:serviceaccount:ops:audit".into(), uid: String::new(), allowed }
    }

    #[test]
    fn what_was_said_counts_for_ten_seconds_and_for_what_was_asked_alone() {
        let (verdicts, now) = (Verdicts::new(), OffsetDateTime::UNIX_EPOCH);
        let said = key("token", READ);
        verdicts.remember(said, operator(true), now);
        assert_eq!(verdicts.recall(&said, now + time::Duration::seconds(9)), Some(operator(true)));
        for then in [now + REMEMBERED, now - time::Duration::SECOND] {
            assert_eq!(verdicts.recall(&said, then), None);
        }
        let others = [
            key("other", READ),
            key("token", Right { verb: Verb::Update, ..READ }),
            key("token", Right { resource: Resource::Agents, ..READ }),
        ];
        assert!(others.iter().all(|other| verdicts.recall(other, now).is_none()));
    }

    #[test]
    fn no_more_is_remembered_than_fits() {
        let (verdicts, now) = (Verdicts::new(), OffsetDateTime::UNIX_EPOCH);
        let token = |number: usize| key(&number.to_string(), READ);
        for number in 0..=MAX_REMEMBERED {
            verdicts.remember(token(number), operator(true), now);
        }
        assert_eq!(verdicts.said.len(), MAX_REMEMBERED);
        let later = now + REMEMBERED;
        verdicts.remember(token(MAX_REMEMBERED), operator(false), later);
        assert_eq!(verdicts.said.len(), 1);
        assert_eq!(verdicts.recall(&token(MAX_REMEMBERED), later), Some(operator(false)));
    }
}
