//! Who holds which secrets of ours, connected or not: what the CA is told before it goes on with a trust root.
//!
//! A holder is a proxy of a pod, by its node ID. It counts from its first request until the last certificate of its pod has expired; when a
//! stream ends, what its proxy held last is kept as *away*, until a stream of the same proxy asks for the same name again. Several
//! streams with one node ID are several uses of one holder, which is as far as the one that is furthest behind.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use time::OffsetDateTime;
use uuid::Uuid;

use super::secret::Version;
use super::stream::{StreamState, Use};
use crate::svids::accounts::{Account, Taken};
use crate::svids::{ProxyLag, ProxySummary};

/// Proxies named in a summary.
const MAX_LAGGING: usize = 100;
/// Bundles whose sequence is remembered.
const MAX_BUNDLES: usize = 64;
/// Certificates of a pod whose entry is remembered.
const MAX_CERTIFICATES: usize = 8;
/// Uses of a pod's proxies that are away and remembered one by one.
const MAX_AWAY: usize = 64;

/// Which content is how new.
#[derive(Debug, Default)]
pub(super) struct Ages {
    /// The bundle being served is the last; each with the newest sequence that it was served under.
    bundles: Vec<(Version, u64)>,
    /// By pod, the newest last; each with its ledger entry.
    certificates: HashMap<Uuid, Vec<(Version, u64)>>,
}

/// What a proxy held when its stream ended.
#[derive(Clone, Debug)]
pub(super) struct Away {
    pub(super) proxy: Box<str>,
    pub(super) used: Use,
    pub(super) nack: Option<Box<str>>,
    pub(super) since: OffsetDateTime,
}

/// What is away, by pod.
pub(super) type AwayByPod = HashMap<Uuid, Vec<Away>>;

impl Ages {
    /// A bundle is served from now on, under this sequence; tells whether that is news.
    pub(super) fn note_bundle(&mut self, version: Version, sequence: u64) -> bool {
        if self.bundles.last() == Some(&(version, sequence)) {
            return false;
        }
        self.bundles.retain(|(known, _)| *known != version);
        if self.bundles.len() == MAX_BUNDLES {
            self.bundles.remove(0);
        }
        self.bundles.push((version, sequence));
        true
    }

    /// A pod's certificate is served from now on.
    pub(super) fn note_certificate(&mut self, pod_uid: Uuid, version: Version, entry: u64) {
        let known = self.certificates.entry(pod_uid).or_default();
        if known.iter().any(|(known, _)| *known == version) {
            return;
        }
        if known.len() == MAX_CERTIFICATES {
            known.remove(0);
        }
        known.push((version, entry));
    }

    /// The sequence of the bundle being served; 0 while there is none.
    pub(super) fn current(&self) -> u64 {
        self.bundles.last().map_or(0, |(_, sequence)| *sequence)
    }

    /// The trust state that the holder of a bundle has; 0 if it is none that is remembered.
    pub(super) fn sequence_of(&self, held: Option<Version>) -> u64 {
        find(&self.bundles, held)
    }

    /// The ledger's entry of the certificate that a pod's proxy has; likewise.
    pub(super) fn entry_of(&self, pod_uid: Uuid, held: Option<Version>) -> u64 {
        self.certificates.get(&pod_uid).map_or(0, |known| find(known, held))
    }

    fn forget_pods(&mut self, keep: impl Fn(&Uuid) -> bool) {
        self.certificates.retain(|pod, _| keep(pod));
    }
}

fn find(known: &[(Version, u64)], held: Option<Version>) -> u64 {
    known.iter().find(|(version, _)| Some(*version) == held).map_or(0, |(_, number)| *number)
}

/// Remembers what a proxy of this pod held.
pub(super) fn leave(away: &mut AwayByPod, pod_uid: Uuid, left: Away) {
    let of_pod = away.entry(pod_uid).or_default();
    if of_pod.len() < MAX_AWAY {
        of_pod.push(left);
    } else if let Some(last) = of_pod.last_mut() {
        // Somebody opens and drops streams under ever new names: the last one stands for all the others, and is behind.
        last.used.held = None;
    }
}

/// A stream of this proxy asks for this name: one use that was away is back.
pub(super) fn come_back(away: &mut AwayByPod, pod_uid: Uuid, proxy: &str, name: &str) {
    if let Some(of_pod) = away.get_mut(&pod_uid)
        && let Some(place) = of_pod.iter().position(|left| *left.proxy == *proxy && *left.used.name == *name)
    {
        of_pod.swap_remove(place);
        if of_pod.is_empty() {
            away.remove(&pod_uid);
        }
    }
}

/// One holder, summed up over its uses.
#[derive(Debug, Default)]
struct Holder {
    pod: Option<Arc<str>>,
    /// The oldest trust state that one of its validation contexts is of; none if it has no validation context.
    trust: Option<u64>,
    /// The oldest certificate that it may use, by ledger entry.
    certificate: Option<u64>,
    away_since: Option<OffsetDateTime>,
    not_back: bool,
    nack: Option<Box<str>>,
}

/// Adds up who holds what.
#[derive(Debug)]
pub(super) struct Sum<'a> {
    ages: &'a Ages,
    accounts: &'a HashMap<Uuid, Account>,
    holders: BTreeMap<(Uuid, Box<str>), Holder>,
}

impl<'a> Sum<'a> {
    /// Of nobody yet but those who have not come back since the agent started.
    pub(super) fn new(ages: &'a Ages, accounts: &'a HashMap<Uuid, Account>) -> Self {
        let mut sum = Self { ages, accounts, holders: BTreeMap::new() };
        for (pod_uid, account) in accounts {
            for taker in &account.takers {
                let Taken { bundle, certificate } = taker.took.without(taker.back);
                if bundle || certificate {
                    let holder = sum.holder(*pod_uid, &taker.proxy, &account.pod);
                    holder.not_back = true;
                    holder.trust = bundle.then_some(0);
                    holder.certificate = certificate.then_some(0);
                }
            }
        }
        sum
    }

    /// Adds what an open stream's proxy may be using.
    pub(super) fn open(&mut self, pod_uid: Uuid, pod: &Arc<str>, stream: &StreamState) {
        for used in stream.uses() {
            self.add(pod_uid, stream.node(), pod, &used, stream.nack());
        }
    }

    /// Adds a use that is away, if its pod still counts.
    pub(super) fn away(&mut self, pod_uid: Uuid, left: &Away) {
        let Some(account) = self.accounts.get(&pod_uid) else { return };
        let holder = self.add(pod_uid, &left.proxy, &account.pod, &left.used, left.nack.as_deref());
        holder.away_since = Some(holder.away_since.map_or(left.since, |since| since.min(left.since)));
    }

    fn add(&mut self, pod_uid: Uuid, proxy: &str, pod: &Arc<str>, used: &Use, nack: Option<&str>) -> &mut Holder {
        let (trust, certificate) = if used.is_certificate {
            // A pod that was never issued a certificate, or whose last one has expired, has none to use.
            (None, self.accounts.contains_key(&pod_uid).then(|| self.ages.entry_of(pod_uid, used.held)))
        } else {
            (Some(self.ages.sequence_of(used.held)), None)
        };
        let holder = self.holder(pod_uid, proxy, pod);
        holder.trust = [holder.trust, trust].into_iter().flatten().min();
        holder.certificate = [holder.certificate, certificate].into_iter().flatten().min();
        if let Some(words) = nack {
            holder.nack = Some(words.into());
        }
        holder
    }

    fn holder(&mut self, pod_uid: Uuid, proxy: &str, pod: &Arc<str>) -> &mut Holder {
        let holder = self.holders.entry((pod_uid, proxy.into())).or_default();
        holder.pod.get_or_insert_with(|| pod.clone());
        holder
    }

    /// The sum, for the CA.
    pub(super) fn finish(self, summary: &mut ProxySummary) {
        let current = self.ages.current();
        summary.trust_sequence = current;
        summary.certificate_entry = u64::MAX;
        let (mut behind, mut outdated) = (Vec::new(), Vec::new());
        for ((pod_uid, proxy), holder) in self.holders {
            let Holder { trust, certificate, .. } = holder;
            if trust.is_none() && certificate.is_none() {
                continue;
            }
            summary.holders += 1;
            summary.trust_sequence = summary.trust_sequence.min(trust.unwrap_or(u64::MAX));
            summary.certificate_entry = summary.certificate_entry.min(certificate.unwrap_or(u64::MAX));
            let newest = self.accounts.get(&pod_uid).map_or(0, |account| account.newest);
            let is_behind = trust.is_some_and(|trust| trust < current);
            let is_outdated = certificate.is_some_and(|entry| entry < newest);
            let is_unproven = trust.is_none();
            summary.lagging_total += u32::from(is_behind);
            summary.outdated_total += u32::from(is_outdated);
            summary.unproven_total += u32::from(is_unproven);
            let lag = holder.lag(pod_uid, proxy);
            if is_unproven && summary.unproven.len() < MAX_LAGGING {
                summary.unproven.push(lag.clone());
            }
            match (is_behind, is_outdated) {
                (true, _) if behind.len() < MAX_LAGGING => behind.push(lag),
                (false, true) if outdated.len() < MAX_LAGGING => outdated.push(lag),
                _ => {}
            }
        }
        behind.extend(outdated);
        behind.truncate(MAX_LAGGING);
        summary.lagging = behind;
    }
}

impl Holder {
    fn lag(self, pod_uid: Uuid, proxy: Box<str>) -> ProxyLag {
        ProxyLag {
            proxy: proxy.into(),
            pod_uid,
            pod: self.pod.as_deref().unwrap_or_default().to_owned(),
            trust_sequence: self.trust.unwrap_or_default(),
            nack: self.nack.map(String::from).unwrap_or_default(),
            certificate_entry: self.certificate.unwrap_or(u64::MAX),
            away_since: self.away_since,
            not_back: self.not_back,
        }
    }
}

/// Forgets pods that no longer count and have no stream.
pub(super) fn forget(ages: &mut Ages, away: &mut AwayByPod, keep: impl Fn(&Uuid) -> bool) {
    away.retain(|pod, _| keep(pod));
    ages.forget_pods(keep);
}
