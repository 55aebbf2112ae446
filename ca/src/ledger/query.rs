//! Answers questions about issued identities: newest first, in pages that stay stable while entries arrive.
//!
//! A page costs what it shows plus what it skips: candidates come from the most selective term ([`candidates`](super::candidates)), the
//! other terms tell how far to skip where no candidate matches, a time range is cut out by binary search (times never decrease), and a page
//! that finds too little ends early with a token to go on.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use chancery_identity::{Serial, SpiffeId};
use chancery_proto::chancery::v1 as wire;
use time::OffsetDateTime;

use super::candidates::Candidates;
use super::entry::{Body, Entry, Issuance, to_millis};
use super::filter::{IdentityFilter, PodFilter};
use super::leaf::Leaf;
use super::{Ledger, LedgerError, MAX_ENTRY_BYTES, SharedStore, terms};

/// The most identities on a page.
pub const MAX_PAGE_SIZE: usize = 1000;
/// A page ends after this many entries were looked at, so that a rare match does not hold up other work.
const MAX_EXAMINED: usize = 50_000;
/// Candidates fetched at once.
const MAX_FETCHED: usize = 512;
/// An entry is recorded a moment after its certificate was signed, and the clock may have been set back a little in between.
const RECORDING_SLACK: time::Duration = time::Duration::minutes(5);
/// The cell that remembers the longest lifetime.
const LONGEST_LIFETIME_CELL: &str = "ledger/longest-lifetime-seconds";

/// An identity as it was recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Index of its entry.
    pub index: u64,
    /// When it was recorded.
    pub time: OffsetDateTime,
    /// What the certificate says.
    pub leaf: Leaf,
    /// The agent or sidecar that asked; none if the CA itself did.
    pub asker: Option<SpiffeId>,
    /// The rest.
    pub issuance: Issuance,
}

/// A part of an answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Page {
    /// Newest first. May be fewer than asked for, or none, although more follow.
    pub identities: Vec<Identity>,
    /// To be handed in for the next page; none on the last.
    pub next: Option<String>,
}

impl Ledger {
    /// The identities that match `filter`, newest first: at most `page_size` of them, from where the page that gave `page_token` ended.
    ///
    /// # Errors
    /// [`LedgerError::PageSize`] and [`LedgerError::PageToken`] on the caller's account; others on the store's.
    pub async fn list(&self, filter: &IdentityFilter, page_size: usize, page_token: Option<&str>) -> Result<Page, LedgerError> {
        if !(1..=MAX_PAGE_SIZE).contains(&page_size) {
            return Err(LedgerError::PageSize(page_size));
        }
        let (now, state) = (self.clock.now(), self.acts.current());
        let entries = self.store.head().await?.entries;
        let before = match page_token {
            Some(token) => read_token(token, filter)?.min(entries),
            None => entries,
        };
        let (floor, before) = self.time_bounds(filter, now, before).await?;
        let mut candidates = Candidates::find(&self.store, filter, &state, floor, before).await?;
        let mut page = Page::default();
        let (mut examined, mut last_examined) = (0, before);
        loop {
            let fetch = (page_size + 1 - page.identities.len()).max(16).saturating_mul(1 + examined / 64).min(MAX_FETCHED);
            let found = candidates.next(fetch).await?;
            if found.is_empty() {
                return Ok(page);
            }
            let matched = page.identities.len();
            for (index, entry) in found {
                if examined == MAX_EXAMINED {
                    page.next = Some(write_token(last_examined, filter));
                    return Ok(page);
                }
                examined += 1;
                let Some(identity) = identity(index, entry)?.filter(|identity| filter.matches(identity, now, &state)) else {
                    last_examined = index;
                    continue;
                };
                if page.identities.len() == page_size {
                    page.next = Some(write_token(last_examined, filter));
                    return Ok(page);
                }
                last_examined = index;
                page.identities.push(identity);
            }
            if page.identities.len() == matched {
                candidates.skip().await?;
            }
            // Decoding is work: let others have their turn.
            tokio::task::yield_now().await;
        }
    }

    /// The identity whose certificate has this serial number.
    pub async fn show(&self, serial: Serial) -> Result<Option<Identity>, LedgerError> {
        let filter = IdentityFilter { serial: Some(serial), ..IdentityFilter::default() };
        Ok(self.list(&filter, 1, None).await?.identities.pop())
    }

    /// The identity that the entry `index` records; none if it is no issuance or does not exist.
    pub async fn show_entry(&self, index: u64) -> Result<Option<Identity>, LedgerError> {
        match self.stored(index).await? {
            Some(bytes) => identity(index, bytes),
            None => Ok(None),
        }
    }

    /// The entry `index`; none if it does not exist.
    pub async fn entry(&self, index: u64) -> Result<Option<Entry>, LedgerError> {
        self.stored(index).await?.map(|bytes| decode(index, bytes)).transpose()
    }

    /// The newest identity of the pod of this name.
    pub async fn latest_for_pod(&self, namespace: &str, pod: &str) -> Result<Option<Identity>, LedgerError> {
        let pod = PodFilter::Name { namespace: Some(namespace.to_owned()), name: pod.to_owned() };
        let filter = IdentityFilter { pod: Some(pod), ..IdentityFilter::default() };
        Ok(self.list(&filter, 1, None).await?.identities.pop())
    }

    /// The CA's own roots and issuing certificates, each with its entry's index, newest first. There are as many as were ever made, which is
    /// a few a week.
    pub async fn authority_certificates(&self) -> Result<Vec<(u64, wire::AuthorityCertificate)>, LedgerError> {
        let mut found = Vec::new();
        let mut before = u64::MAX;
        loop {
            let indexes = self.store.look_up(&terms::kind("authority"), before, MAX_FETCHED).await?;
            let Some(&oldest) = indexes.last() else { return Ok(found) };
            before = oldest;
            for index in indexes {
                if let Some(Entry { body: Body::Authority(certificate), .. }) = self.entry(index).await? {
                    found.push((index, certificate));
                }
            }
        }
    }

    /// The first entry that may record a certificate that has not expired.
    pub async fn first_alive(&self) -> Result<u64, LedgerError> {
        self.first_alive_at(self.clock.now()).await
    }

    /// The first entry that may record a certificate that had not expired at `moment`.
    pub(super) async fn first_alive_at(&self, moment: OffsetDateTime) -> Result<u64, LedgerError> {
        let entries = self.store.head().await?.entries;
        self.first_since(moment - self.longest_lifetime.get() - RECORDING_SLACK, entries).await
    }

    /// When everything that is recorded by now has expired, at the latest.
    pub fn all_expired_by(&self) -> OffsetDateTime {
        self.clock.now() + self.longest_lifetime.get() + RECORDING_SLACK
    }

    pub(super) async fn stored(&self, index: u64) -> Result<Option<Bytes>, LedgerError> {
        if index >= self.store.head().await?.entries {
            return Ok(None);
        }
        Ok(self.store.read(index..index + 1, MAX_ENTRY_BYTES).await?.pop())
    }

    /// The range of entries whose times `filter` allows, below `before`.
    async fn time_bounds(&self, filter: &IdentityFilter, now: OffsetDateTime, before: u64) -> Result<(u64, u64), LedgerError> {
        let before = match filter.until {
            Some(until) => self.first_since(until, before).await?,
            None => before,
        };
        let alive_since = filter.unexpired.then(|| now - self.longest_lifetime.get() - RECORDING_SLACK);
        let floor = match filter.since.max(alive_since) {
            Some(since) => self.first_since(since, before).await?,
            None => 0,
        };
        Ok((floor, before))
    }

    /// The first entry below `end` that was recorded at or after `moment`, or `end`.
    pub(super) async fn first_since(&self, moment: OffsetDateTime, end: u64) -> Result<u64, LedgerError> {
        let (mut low, mut high) = (0, end);
        while low < high {
            let middle = low + (high - low) / 2;
            let entry = self.store.read(middle..middle + 1, MAX_ENTRY_BYTES).await?;
            let bytes = entry.first().map_or(&[][..], |entry| entry);
            let time_ms = Entry::decode_time(bytes).map_err(|problem| LedgerError::Unreadable { index: middle, problem })?;
            if super::entry::from_millis(time_ms) < moment { low = middle + 1 } else { high = middle }
        }
        Ok(low)
    }
}

impl From<Identity> for wire::Identity {
    fn from(identity: Identity) -> Self {
        let Identity { index, time, leaf, asker, issuance } = identity;
        Self {
            entry: index,
            time_ms: to_millis(time),
            spiffe_id: leaf.spiffe_id.to_string(),
            serial: leaf.serial.to_string(),
            not_before_ms: to_millis(leaf.not_before),
            not_after_ms: to_millis(leaf.not_after),
            dns_names: leaf.dns_names,
            issuance: Some(issuance.into()),
            agent: asker.map(|asker| asker.to_string()).unwrap_or_default(),
        }
    }
}

/// The longest lifetime that a certificate may ever have been issued with: what was recorded earlier than that ago has expired. Kept in a
/// cell, since the configuration may have allowed more once than it does now.
#[derive(Debug)]
pub(super) struct LongestLifetime(Mutex<Duration>);

impl LongestLifetime {
    /// Reads the cell, which is raised to `lifetime`.
    pub(super) async fn open(store: &SharedStore, lifetime: Duration) -> Result<Self, LedgerError> {
        let longest = Self(Mutex::new(Duration::ZERO));
        longest.raise(store, lifetime).await?;
        Ok(longest)
    }

    pub(super) async fn raise(&self, store: &SharedStore, lifetime: Duration) -> Result<(), LedgerError> {
        let seconds = lifetime.as_secs() + u64::from(lifetime.subsec_nanos() > 0);
        loop {
            let stored = store.cell(LONGEST_LIFETIME_CELL).await?;
            let known = stored.as_deref().and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_be_bytes);
            let longest = known.max(seconds);
            if longest != known {
                let new = Bytes::copy_from_slice(&longest.to_be_bytes());
                if !store.compare_and_swap(LONGEST_LIFETIME_CELL, stored.as_deref(), Some(new)).await? {
                    continue;
                }
            }
            let mut cached = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            *cached = cached.max(Duration::from_secs(longest));
            return Ok(());
        }
    }

    fn get(&self) -> Duration {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The identity that an entry records; none if it is no issuance.
pub(super) fn identity(index: u64, bytes: Bytes) -> Result<Option<Identity>, LedgerError> {
    let entry = decode(index, bytes)?;
    let time = entry.time();
    let Body::Issuance(issuance) = entry.body else { return Ok(None) };
    let leaf = issuance.leaf().map_err(|problem| LedgerError::Unreadable { index, problem })?;
    let asker = issuance.asker(leaf.spiffe_id.trust_domain());
    Ok(Some(Identity { index, time, leaf, asker, issuance: *issuance }))
}

fn decode(index: u64, bytes: Bytes) -> Result<Entry, LedgerError> {
    Entry::decode(bytes).map_err(|problem| LedgerError::Unreadable { index, problem })
}

/// A page token: the index below which the next page begins, and the filter's fingerprint.
fn write_token(before: u64, filter: &IdentityFilter) -> String {
    URL_SAFE_NO_PAD.encode([before.to_be_bytes(), filter.fingerprint().to_be_bytes()].concat())
}

fn read_token(token: &str, filter: &IdentityFilter) -> Result<u64, LedgerError> {
    let bytes = URL_SAFE_NO_PAD.decode(token).map_err(|_| LedgerError::PageToken("cannot be read"))?;
    let (before, fingerprint) = bytes.split_first_chunk::<8>().ok_or(LedgerError::PageToken("cannot be read"))?;
    if fingerprint != filter.fingerprint().to_be_bytes() {
        return Err(LedgerError::PageToken("was given for another filter"));
    }
    Ok(u64::from_be_bytes(*before))
}
