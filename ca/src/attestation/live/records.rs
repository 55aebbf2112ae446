//! What is remembered of a cluster's pods and service accounts: as little as a decision needs, since there may be a hundred thousand.
//!
//! A pod is found by its UID, which never comes back; a service account by its name, whose UID tells whether it is still the same.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use chancery_identity::token::VerifiedToken;
use time::OffsetDateTime;
use uuid::Uuid;

use super::verdict::{Mismatch, judge_account, judge_pod};
use crate::kubernetes::{ServiceAccountObject, WorkloadPod};

/// How many pods that are gone are remembered as such.
const MAX_GONE: usize = 16_384;
/// Shared names are looked through for unused ones when there are so many more than after the last time.
const NAMES_SLACK: usize = 1024;

/// What a watch fills.
pub(super) trait Table: Default + Send + Sync + 'static {
    /// What it is told of.
    type Object: Send;

    /// There is this object, or it is so now.
    fn apply(&mut self, object: &Self::Object);
    /// The object is no more.
    fn remove(&mut self, object: &Self::Object);
    /// This one, which was filled anew, takes the place of `before`.
    fn succeed(&mut self, before: Self);
    /// How many objects there are.
    fn len(&self) -> usize;
}

/// Whether what is remembered bears out what a token says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Known {
    /// It does.
    Fits,
    /// It contradicts it, and will not come to fit.
    Contradicts(Mismatch),
    /// It cannot tell.
    Unknown,
}

/// A pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pod {
    /// `namespace/name` of its service account.
    pub(super) account: Arc<str>,
    /// None before it is scheduled.
    pub(super) node: Option<Arc<str>>,
    pub(super) finished: bool,
    pub(super) deleted_at: Option<OffsetDateTime>,
}

/// A service account.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Account {
    pub(super) uid: Uuid,
    pub(super) deleted_at: Option<OffsetDateTime>,
}

/// All pods of a cluster.
#[derive(Debug, Default)]
pub(super) struct Pods {
    by_uid: HashMap<Uuid, Pod>,
    names: Names,
    gone: Gone,
}

/// All service accounts of a cluster, by `namespace/name`.
#[derive(Debug, Default)]
pub(super) struct Accounts(HashMap<Box<str>, Account>);

/// Texts that many pods have in common, once each.
#[derive(Debug, Default)]
struct Names {
    all: HashSet<Arc<str>>,
    after_sweep: usize,
}

/// The newest [`MAX_GONE`] pods that are known to be gone.
#[derive(Debug, Default)]
struct Gone {
    all: HashSet<Uuid>,
    oldest_first: VecDeque<Uuid>,
}

impl Pods {
    /// What is remembered of the token's pod.
    pub(super) fn look(&self, token: &VerifiedToken, now: OffsetDateTime) -> Known {
        if self.is_gone(token.pod.uid) {
            return Known::Contradicts(Mismatch::PodGone);
        }
        match self.get(token.pod.uid) {
            // Its token names a node, so it is scheduled, and what is remembered is not the newest.
            None | Some(Pod { node: None, .. }) => Known::Unknown,
            Some(pod) => judge_pod(pod, token, now).map_or_else(Known::Contradicts, |()| Known::Fits),
        }
    }

    pub(super) fn get(&self, uid: Uuid) -> Option<&Pod> {
        self.by_uid.get(&uid)
    }

    /// Whether it was there and is no more.
    pub(super) fn is_gone(&self, uid: Uuid) -> bool {
        self.gone.all.contains(&uid)
    }
}

impl Accounts {
    /// What is remembered of the token's service account. Another one of the same name may be older or newer than it, so nothing contradicts.
    pub(super) fn look(&self, token: &VerifiedToken, now: OffsetDateTime) -> Known {
        let account = self.0.get(account_name(&token.namespace, &token.service_account.name).as_str());
        if judge_account(account, token, now).is_ok() { Known::Fits } else { Known::Unknown }
    }
}

impl Pod {
    pub(super) fn of(object: &WorkloadPod) -> Self {
        Self::read(object, &mut Names::default())
    }

    fn read(object: &WorkloadPod, names: &mut Names) -> Self {
        Self {
            account: names.shared(&account_name(object.namespace(), object.service_account())),
            node: object.node().map(|node| names.shared(node)),
            finished: object.is_finished(),
            deleted_at: object.deleted_at(),
        }
    }
}

impl Account {
    pub(super) fn of(object: &ServiceAccountObject) -> Option<Self> {
        Some(Self { uid: object.uid()?, deleted_at: object.deleted_at() })
    }
}

impl Table for Pods {
    type Object = WorkloadPod;

    fn apply(&mut self, object: &WorkloadPod) {
        if let Some(uid) = object.uid() {
            self.by_uid.insert(uid, Pod::read(object, &mut self.names));
        }
    }

    fn remove(&mut self, object: &WorkloadPod) {
        if let Some(uid) = object.uid() {
            self.by_uid.remove(&uid);
            self.gone.add(uid);
        }
    }

    fn succeed(&mut self, before: Self) {
        self.gone = before.gone;
        for uid in before.by_uid.into_keys() {
            if !self.by_uid.contains_key(&uid) {
                self.gone.add(uid);
            }
        }
    }

    fn len(&self) -> usize {
        self.by_uid.len()
    }
}

impl Table for Accounts {
    type Object = ServiceAccountObject;

    fn apply(&mut self, object: &ServiceAccountObject) {
        if let Some(account) = Account::of(object) {
            self.0.insert(account_name(object.namespace(), object.name()).into(), account);
        }
    }

    fn remove(&mut self, object: &ServiceAccountObject) {
        self.0.remove(account_name(object.namespace(), object.name()).as_str());
    }

    fn succeed(&mut self, _: Self) {}

    fn len(&self) -> usize {
        self.0.len()
    }
}

impl Names {
    fn shared(&mut self, name: &str) -> Arc<str> {
        if let Some(known) = self.all.get(name) {
            return Arc::clone(known);
        }
        if self.all.len() >= self.after_sweep + NAMES_SLACK {
            self.all.retain(|name| Arc::strong_count(name) > 1);
            self.after_sweep = self.all.len();
        }
        let new: Arc<str> = name.into();
        self.all.insert(Arc::clone(&new));
        new
    }
}

impl Gone {
    fn add(&mut self, uid: Uuid) {
        if self.all.insert(uid) {
            self.oldest_first.push_back(uid);
        }
        if self.oldest_first.len() > MAX_GONE
            && let Some(oldest) = self.oldest_first.pop_front()
        {
            self.all.remove(&oldest);
        }
    }
}

/// `namespace/name`
pub(super) fn account_name(namespace: &str, name: &str) -> String {
    format!("{namespace}/{name}")
}
