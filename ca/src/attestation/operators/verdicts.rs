//! What was said about operators a moment ago, and how many are asked about at once.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aws_lc_rs::digest::{Context, SHA256};
use time::OffsetDateTime;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::{Operator, Right};

/// How many tokens are asked about at the same time.
const AT_ONCE: usize = 4;
/// How long one waits for its turn.
const PATIENCE: Duration = Duration::from_secs(2);
/// So long a binding that was taken away may still count.
const REMEMBERED: time::Duration = time::Duration::seconds(10);
const MAX_REMEMBERED: usize = 1024;

/// The verdicts on operators of all clusters.
#[derive(Debug)]
pub(in crate::attestation) struct Verdicts {
    permits: Semaphore,
    said: Mutex<HashMap<Key, Said>>,
}

/// The hash of a token and what was asked about it.
pub(super) type Key = [u8; 32];

#[derive(Debug)]
struct Said {
    at: OffsetDateTime,
    operator: Operator,
}

impl Verdicts {
    pub(in crate::attestation) fn new() -> Self {
        Self { permits: Semaphore::new(AT_ONCE), said: Mutex::default() }
    }

    /// Waits a little for a turn; nothing if there is none.
    pub(super) async fn turn(&self) -> Option<SemaphorePermit<'_>> {
        tokio::time::timeout(PATIENCE, self.permits.acquire()).await.ok()?.ok()
    }

    pub(super) fn recall(&self, key: &Key, now: OffsetDateTime) -> Option<Operator> {
        self.said().get(key).filter(|said| is_fresh(said.at, now)).map(|said| said.operator.clone())
    }

    /// What does not fit is only asked again.
    pub(super) fn remember(&self, key: Key, operator: Operator, at: OffsetDateTime) {
        let mut said = self.said();
        if said.len() >= MAX_REMEMBERED {
            said.retain(|_, said| is_fresh(said.at, at));
        }
        if said.len() < MAX_REMEMBERED {
            said.insert(key, Said { at, operator });
        }
    }

    fn said(&self) -> MutexGuard<'_, HashMap<Key, Said>> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) fn key(cluster: &str, token: &str, right: Right) -> Key {
    let mut context = Context::new(&SHA256);
    for part in [cluster, right.verb.name(), right.resource.name(), token] {
        context.update(&part.len().to_be_bytes());
        context.update(part.as_bytes());
    }
    let mut key = [0; 32];
    key.copy_from_slice(context.finish().as_ref());
    key
}

/// A clock that went back makes nothing fresh for longer.
fn is_fresh(at: OffsetDateTime, now: OffsetDateTime) -> bool {
    (time::Duration::ZERO..REMEMBERED).contains(&(now - at))
}

#[cfg(test)]
mod tests {
    use super::super::{Resource, Verb};
    use super::*;

    const READ: Right = Right { verb: Verb::Get, resource: Resource::Log };

    fn operator(allowed: bool) -> Operator {
        Operator { cluster: "east".into(), username: "system:serviceaccount:ops:audit".into(), uid: String::new(), allowed }
    }

    #[test]
    fn what_was_said_counts_for_ten_seconds_and_for_what_was_asked_alone() {
        let (verdicts, now) = (Verdicts::new(), OffsetDateTime::UNIX_EPOCH);
        let said = key("east", "token", READ);
        verdicts.remember(said, operator(true), now);
        assert_eq!(verdicts.recall(&said, now + time::Duration::seconds(9)), Some(operator(true)));
        for then in [now + REMEMBERED, now - time::Duration::SECOND] {
            assert_eq!(verdicts.recall(&said, then), None);
        }
        let others = [
            key("west", "token", READ),
            key("east", "other", READ),
            key("east", "token", Right { verb: Verb::Update, ..READ }),
            key("east", "token", Right { resource: Resource::Agents, ..READ }),
        ];
        assert!(others.iter().all(|other| verdicts.recall(other, now).is_none()));
    }

    #[test]
    fn no_more_is_remembered_than_fits() {
        let (verdicts, now) = (Verdicts::new(), OffsetDateTime::UNIX_EPOCH);
        let token = |number: usize| key("east", &number.to_string(), READ);
        for number in 0..=MAX_REMEMBERED {
            verdicts.remember(token(number), operator(true), now);
        }
        assert_eq!(verdicts.said().len(), MAX_REMEMBERED);
        let later = now + REMEMBERED;
        verdicts.remember(token(MAX_REMEMBERED), operator(false), later);
        assert_eq!(verdicts.said().len(), 1);
        assert_eq!(verdicts.recall(&token(MAX_REMEMBERED), later), Some(operator(false)));
    }
}
