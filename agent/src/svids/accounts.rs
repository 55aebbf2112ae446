//! Whom this agent answers for: the pods that certificates were issued to, until the last of them has expired, and the proxies there that
//! took something.
//!
//! The CA goes by this when it asks whether everybody has a bundle or has let go of a certificate, so it outlives the workload (which is let
//! go soon after its last stream) and, through the state file, the process: a proxy from before a restart is waited for until it is back.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use time::OffsetDateTime;
use tokio::sync::Notify;
use uuid::Uuid;

use super::WorkloadKey;
use crate::ca_client::Held;

/// So many pods are answered for; the CA takes what is issued to others for unproven until it expires.
pub const MAX_PODS: usize = 4096;
/// So many proxies of a pod are remembered by name.
const MAX_TAKERS: usize = 16;
/// Stands for the proxies of a pod over [`MAX_TAKERS`]. None of these is ever taken to be back.
const MORE: &str = "(more proxies than are remembered)";

/// The pods. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Accounts(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    inner: Mutex<Inner>,
    /// Something to keep has changed.
    changed: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    /// Grows with every change of who is in `pods`.
    version: u64,
    pods: HashMap<Uuid, Account>,
}

/// One pod.
#[derive(Clone, Debug)]
pub struct Account {
    /// `namespace/name`.
    pub pod: Arc<str>,
    /// When the last of its certificates expires.
    pub until: OffsetDateTime,
    /// The ledger's entry of its newest certificate.
    pub newest: u64,
    /// The proxies that took something.
    pub takers: Vec<Taker>,
}

/// A proxy that took something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Taker {
    /// Its node ID; empty for whoever it was.
    pub proxy: Box<str>,
    /// What it took.
    pub took: Taken,
    /// What it has asked for since the agent started.
    pub back: Taken,
}

/// What a proxy takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// A validation context.
    pub bundle: bool,
    /// A certificate.
    pub certificate: bool,
}

impl Accounts {
    /// A certificate was issued to a workload.
    pub fn issued(&self, workload: &WorkloadKey, pod_name: &str, held: &Held) {
        self.lock().issued(workload, pod_name, held);
    }

    /// A workload from before the restart, with the proxies that were there.
    pub fn restored(&self, workload: &WorkloadKey, pod_name: &str, held: &Held, proxies: &[(String, Taken)]) {
        let mut inner = self.lock();
        inner.issued(workload, pod_name, held);
        let Some(account) = inner.pods.get_mut(&workload.pod_uid) else { return };
        let both = Taken { bundle: true, certificate: true };
        let unknown = [(String::new(), both)];
        // A state without names is of an older agent, or was written before the first proxy asked.
        let proxies = if proxies.is_empty() { &unknown[..] } else { proxies };
        let takers = proxies.iter().take(MAX_TAKERS);
        account.takers = takers.map(|(proxy, took)| Taker { proxy: (**proxy).into(), took: *took, back: Taken::default() }).collect();
    }

    /// A proxy of a pod has asked for something. Tells whether that pod is answered for.
    pub fn asked(&self, pod_uid: Uuid, proxy: &str, asked: Taken) -> bool {
        let changed = self.lock().pods.get_mut(&pod_uid).map(|account| account.asked(proxy, asked));
        if changed == Some(true) {
            self.0.changed.notify_one();
        }
        changed.is_some()
    }

    /// What to keep of a pod's proxies.
    pub(super) fn proxies(&self, pod_uid: Uuid) -> Vec<(String, Taken)> {
        let inner = self.lock();
        let takers = inner.pods.get(&pod_uid).map(|account| &account.takers[..]).unwrap_or_default();
        takers.iter().map(|taker| (taker.proxy.to_string(), taker.took)).collect()
    }

    /// Comes back when something to keep has changed.
    pub(super) async fn changed(&self) {
        self.0.changed.notified().await;
    }

    /// All pods whose certificates have not all expired at `now`, and the version of that set.
    pub fn alive(&self, now: OffsetDateTime) -> (HashMap<Uuid, Account>, u64) {
        let mut inner = self.lock();
        let before = inner.pods.len();
        inner.pods.retain(|_, account| account.until > now);
        if inner.pods.len() < before {
            inner.version += 1;
        }
        // 0 says that nothing is known yet.
        (inner.pods.clone(), inner.version + 1)
    }

    /// Nothing that is done under this lock can panic halfway.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn issued(&mut self, workload: &WorkloadKey, pod_name: &str, held: &Held) {
        let until = held.svid.not_after();
        if let Some(account) = self.pods.get_mut(&workload.pod_uid) {
            account.until = account.until.max(until);
            account.newest = held.entry;
        } else if self.pods.len() < MAX_PODS {
            let pod = format!("{}/{pod_name}", workload.namespace).into();
            self.pods.insert(workload.pod_uid, Account { pod, until, newest: held.entry, takers: Vec::new() });
            self.version += 1;
        }
    }
}

impl Account {
    /// Tells whether there is something new to keep.
    fn asked(&mut self, proxy: &str, asked: Taken) -> bool {
        // Whoever it was may have been this one.
        for unnamed in self.takers.iter_mut().filter(|taker| taker.proxy.is_empty()) {
            unnamed.back = unnamed.back.and(asked);
        }
        if let Some(taker) = self.takers.iter_mut().find(|taker| *taker.proxy == *proxy) {
            let before = taker.took;
            (taker.took, taker.back) = (taker.took.and(asked), taker.back.and(asked));
            return taker.took != before;
        }
        if self.takers.len() < MAX_TAKERS {
            self.takers.push(Taker { proxy: proxy.into(), took: asked, back: asked });
            return true;
        }
        let both = Taken { bundle: true, certificate: true };
        match self.takers.last_mut() {
            Some(last) if *last.proxy != *MORE => {
                *last = Taker { proxy: MORE.into(), took: both, back: both };
                true
            }
            _ => false,
        }
    }
}

impl Taken {
    /// Both together.
    #[must_use]
    pub fn and(self, more: Self) -> Self {
        Self { bundle: self.bundle || more.bundle, certificate: self.certificate || more.certificate }
    }

    /// What of this is not in `other`.
    #[must_use]
    pub fn without(self, other: Self) -> Self {
        Self { bundle: self.bundle && !other.bundle, certificate: self.certificate && !other.certificate }
    }

    /// Whether it is anything.
    pub fn is_something(self) -> bool {
        self.bundle || self.certificate
    }
}
