//! Which entries may answer a question: found by the most selective term that the filter has, newest first.

use std::collections::VecDeque;

use bytes::Bytes;

use super::acts::State;
use super::filter::{FingerprintFilter, IdentityFilter, PodFilter};
use super::terms::{self, Dimension, term};
use super::{LedgerError, revoked};
use crate::store::{SharedStore, StoreError, Term};

/// A prefix with more distinct values than this is answered by reading every entry: so many values are common among them.
const MAX_MERGED_VALUES: usize = 256;
/// Enough of an answer for any range that is read at once.
const READ_BYTES: usize = 1 << 20;

/// Indexes of entries that may match, newest first. There may be some among them that do not.
#[derive(Debug)]
pub(super) struct Candidates {
    store: SharedStore,
    source: Source,
    /// The filter's other terms, which an entry must have as well.
    others: Vec<Term>,
    /// Only indexes from here on …
    floor: u64,
    /// … and before here, which moves down.
    before: u64,
}

#[derive(Debug)]
enum Source {
    /// Every entry.
    All,
    /// Those that have one of these terms.
    Terms(Vec<Postings>),
}

/// The indexes of the entries that have a term, as far as they were looked up.
#[derive(Debug)]
struct Postings {
    term: Term,
    ahead: VecDeque<u64>,
    /// Look up from here on, downwards; nothing is left below if none.
    next: Option<u64>,
}

impl Candidates {
    /// The candidates for `filter` in the range `floor..before`.
    pub(super) async fn find(
        store: &SharedStore,
        filter: &IdentityFilter,
        state: &State,
        floor: u64,
        before: u64,
    ) -> Result<Self, LedgerError> {
        let before = before.max(floor);
        let mut sets = term_sets(store, filter, state).await?.into_iter();
        let source = match sets.next() {
            None => Source::All,
            Some(terms) => {
                let postings = |term| Postings { term, ahead: VecDeque::new(), next: Some(before) };
                Source::Terms(terms.into_iter().map(postings).collect())
            }
        };
        let others: Vec<_> = sets.collect();
        // No entry has one of no terms.
        let floor = if others.iter().any(Vec::is_empty) { before } else { floor };
        Ok(Self { store: store.clone(), source, others: others.into_iter().flatten().collect(), floor, before })
    }

    /// Every entry in the range `floor..before`.
    pub(super) fn all(store: &SharedStore, floor: u64, before: u64) -> Self {
        Self { store: store.clone(), source: Source::All, others: Vec::new(), floor, before }
    }

    /// Goes down to the next entry that has the filter's other terms, too. Worth its look-ups where candidates were found that do not match.
    pub(super) async fn skip(&mut self) -> Result<(), StoreError> {
        for term in &self.others {
            let newest = self.store.look_up(term, self.before, 1).await?.first().copied();
            self.before = newest.map_or(self.floor, |newest| newest + 1);
        }
        if let Source::Terms(postings) = &mut self.source {
            for posting in postings {
                posting.skip_to(self.before);
            }
        }
        Ok(())
    }

    /// The next entries, at most `want`, newest first; none at the end.
    pub(super) async fn next(&mut self, want: usize) -> Result<Vec<(u64, Bytes)>, StoreError> {
        match &mut self.source {
            Source::All => {
                let start = self.before.saturating_sub(want as u64).max(self.floor);
                let entries = read_range(&self.store, start, self.before).await?;
                self.before = start;
                let mut entries: Vec<_> = (start..).zip(entries).collect();
                entries.reverse();
                Ok(entries)
            }
            Source::Terms(postings) => {
                let ahead = (want / postings.len().max(1)).max(4);
                let mut indexes = Vec::with_capacity(want);
                while indexes.len() < want {
                    let newest = newest(&self.store, postings, ahead).await?.filter(|newest| *newest >= self.floor);
                    let Some(index) = newest else { break };
                    self.before = index;
                    indexes.push(index);
                }
                let entries = self.store.read_each(indexes.clone()).await?;
                Ok(indexes.into_iter().zip(entries).collect())
            }
        }
    }
}

/// The terms of `filter`, the most selective first, in sets: an entry must have one term of each.
async fn term_sets(store: &SharedStore, filter: &IdentityFilter, state: &State) -> Result<Vec<Vec<Term>>, LedgerError> {
    let mut sets: Vec<_> = exact_terms(filter).map(|term| vec![term]).collect();
    if sets.is_empty() && filter.revoked {
        sets.extend(revoked_terms(state));
    }
    if sets.is_empty() {
        sets.extend(listed_terms(store, filter).await?);
    }
    // Entries of the same time share these, so they come last.
    let own =
        [("issuing_certificate", Dimension::IssuingCertificate, &filter.issuing_certificate), ("root", Dimension::Root, &filter.root)];
    for (field, dimension, fingerprint) in own {
        if let Some(fingerprint) = fingerprint {
            sets.push(fingerprint_terms(store, field, dimension, fingerprint).await?);
        }
    }
    Ok(sets)
}

/// The terms that follow from the filter alone, by how many entries usually have the same value, fewest first.
fn exact_terms(filter: &IdentityFilter) -> impl Iterator<Item = Term> {
    let pod = |pod: &PodFilter| match pod {
        PodFilter::Uid(uid) => term(Dimension::PodUid, uid.as_bytes()),
        PodFilter::Name { name, .. } => term(Dimension::PodName, name),
    };
    let service_account = filter
        .service_account
        .as_ref()
        .and_then(|account| Some(terms::service_account(&account.name, account.namespace.as_ref().or(filter.namespace.as_ref())?)));
    let terms = [
        filter.serial.map(|serial| term(Dimension::Serial, serial.0)),
        filter.token_id.as_ref().map(|id| term(Dimension::TokenId, id)),
        filter.pod.as_ref().map(pod),
        filter.spiffe_id.as_ref().map(|id| term(Dimension::SpiffeId, id.as_str())),
        service_account,
        filter.agent.as_ref().map(|agent| term(Dimension::Asker, agent.as_str())),
        filter.node.as_ref().map(|node| term(Dimension::Node, &node.name)),
        filter.namespace.as_ref().map(|namespace| term(Dimension::Namespace, namespace)),
    ];
    terms.into_iter().flatten()
}

/// The terms of what is revoked, of which an entry must have one; none if they are too many.
fn revoked_terms(state: &State) -> Option<Vec<Term>> {
    let terms: Vec<_> = state.revocations.keys().flat_map(revoked::terms).collect();
    (terms.len() <= MAX_MERGED_VALUES).then_some(terms)
}

/// The terms that a beginning stands for, of which an entry must have one; none if they are too many.
async fn listed_terms(store: &SharedStore, filter: &IdentityFilter) -> Result<Option<Vec<Term>>, StoreError> {
    let (dimension, prefix) = match (&filter.service_account, &filter.spiffe_id_prefix) {
        (Some(account), _) => (Dimension::ServiceAccount, format!("{}/", account.name)),
        (None, Some(prefix)) => (Dimension::SpiffeId, prefix.clone()),
        (None, None) => return Ok(None),
    };
    let values = store.values(dimension as u8, prefix.as_bytes(), None, MAX_MERGED_VALUES + 1).await?;
    let few = values.len() <= MAX_MERGED_VALUES;
    Ok(few.then(|| values.into_iter().map(|value| Term { dimension: dimension as u8, value }).collect()))
}

/// The term of the certificate that `fingerprint` fits; none if nothing was issued under such a one.
async fn fingerprint_terms(
    store: &SharedStore,
    field: &'static str,
    dimension: Dimension,
    fingerprint: &FingerprintFilter,
) -> Result<Vec<Term>, LedgerError> {
    let prefix = fingerprint.prefix();
    if fingerprint.is_whole() {
        return Ok(vec![term(dimension, prefix)]);
    }
    let values = store.values(dimension as u8, prefix, None, 3).await?;
    if values.len() > 1 {
        let found = values.iter().map(hex::encode).collect();
        return Err(LedgerError::Ambiguous { field, beginning: hex::encode(prefix), found });
    }
    Ok(values.into_iter().map(|value| Term { dimension: dimension as u8, value }).collect())
}

/// Takes the newest index off `postings`, which look up `ahead` indexes at once.
async fn newest(store: &SharedStore, postings: &mut [Postings], ahead: usize) -> Result<Option<u64>, StoreError> {
    let mut newest = None;
    for posting in postings.iter_mut() {
        newest = newest.max(posting.peek(store, ahead).await?);
    }
    for posting in postings {
        if posting.ahead.front().copied() == newest {
            posting.ahead.pop_front();
        }
    }
    Ok(newest)
}

impl Postings {
    /// Forgets what is not before `before`.
    fn skip_to(&mut self, before: u64) {
        self.ahead.retain(|index| *index < before);
        self.next = self.next.map(|next| next.min(before));
    }

    async fn peek(&mut self, store: &SharedStore, ahead: usize) -> Result<Option<u64>, StoreError> {
        if let (true, Some(before)) = (self.ahead.is_empty(), self.next) {
            self.ahead = store.look_up(&self.term, before, ahead).await?.into();
            let complete = self.ahead.len() < ahead;
            self.next = self.ahead.back().copied().filter(|_| !complete);
        }
        Ok(self.ahead.front().copied())
    }
}

/// All entries of `start..end`, which the store may hand over in parts.
async fn read_range(store: &SharedStore, start: u64, end: u64) -> Result<Vec<Bytes>, StoreError> {
    let mut entries = Vec::new();
    let mut next = start;
    while next < end {
        let part = store.read(next..end, READ_BYTES).await?;
        if part.is_empty() {
            return Err(StoreError::Damaged { place: format!("entry {next}"), detail: "the store has no such entry".into() });
        }
        next += part.len() as u64;
        entries.extend(part);
    }
    Ok(entries)
}
