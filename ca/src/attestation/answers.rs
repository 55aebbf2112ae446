//! What API servers say of tokens: how many questions there are at once, how long an answer is remembered, and whether it speaks for a token.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aws_lc_rs::digest::{Context, SHA256};
use time::OffsetDateTime;
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::kubernetes::TokenReviewStatus;

/// How long an answer is remembered: as long as the API server itself would not look again.
pub(super) const REMEMBERED: time::Duration = time::Duration::seconds(10);
/// How long one waits for its turn.
const PATIENCE: Duration = Duration::from_secs(2);
/// How much of the API server's words is repeated, in characters.
const MAX_WORDS: usize = 200;

/// The hash of a question.
pub(super) type Key = [u8; 32];

/// The hash of a question's `parts`: none passes for another, wherever one ends.
pub(super) fn key<'a>(parts: impl IntoIterator<Item = &'a str>) -> Key {
    let mut context = Context::new(&SHA256);
    for part in parts {
        context.update(&part.len().to_be_bytes());
        context.update(part.as_bytes());
    }
    let mut key = [0; 32];
    key.copy_from_slice(context.finish().as_ref());
    key
}

/// So many questions at once.
#[derive(Debug)]
pub(super) struct Turns(Semaphore);

impl Turns {
    pub(super) fn new(at_once: usize) -> Self {
        Self(Semaphore::new(at_once))
    }

    /// Waits a little for a turn; nothing if there is none.
    pub(super) async fn take(&self) -> Option<SemaphorePermit<'_>> {
        tokio::time::timeout(PATIENCE, self.0.acquire()).await.ok()?.ok()
    }
}

/// The newest answers, at most so many.
#[derive(Debug)]
pub(super) struct Recent<T> {
    most: usize,
    said: Mutex<HashMap<Key, (OffsetDateTime, T)>>,
}

impl<T: Clone> Recent<T> {
    pub(super) fn new(most: usize) -> Self {
        Self { most, said: Mutex::default() }
    }

    pub(super) fn recall(&self, key: &Key, now: OffsetDateTime) -> Option<T> {
        self.said().get(key).filter(|(at, _)| is_fresh(*at, now)).map(|(_, answer)| answer.clone())
    }

    /// What does not fit is only asked again.
    pub(super) fn remember(&self, key: Key, answer: T, at: OffsetDateTime) {
        let mut said = self.said();
        if said.len() >= self.most {
            said.retain(|_, (before, _)| is_fresh(*before, at));
        }
        if said.len() < self.most {
            said.insert(key, (at, answer));
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.said().len()
    }

    fn said(&self) -> MutexGuard<'_, HashMap<Key, (OffsetDateTime, T)>> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A clock that went back makes nothing fresh for longer.
fn is_fresh(at: OffsetDateTime, now: OffsetDateTime) -> bool {
    (time::Duration::ZERO..REMEMBERED).contains(&(now - at))
}

/// Whether the token is authenticated, or why not. For whom is another question: [`is_for`].
pub(super) fn check_authenticated(review: &TokenReviewStatus) -> Result<(), String> {
    if review.authenticated == Some(true) {
        return Ok(());
    }
    let error = review.error.as_deref().unwrap_or_default();
    Err(if error.is_empty() { "it is not authenticated".to_owned() } else { error.chars().take(MAX_WORDS).collect() })
}

/// Whether the token is for one of `audiences`. An API server that does not know about audiences answers with none, and has not looked at them.
pub(super) fn is_for(review: &TokenReviewStatus, audiences: &[impl AsRef<str>]) -> bool {
    review.audiences.iter().flatten().any(|audience| audiences.iter().any(|ours| ours.as_ref() == audience))
}
