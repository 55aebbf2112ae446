//! What an act changes: typed, and read from and written to the wire.

use std::fmt;
use std::ops::Range;

use chancery_identity::{Fingerprint, Serial, SpiffeId};
use chancery_proto::chancery::v1 as wire;
use chancery_proto::chancery::v1::act::Change as WireChange;
use chancery_proto::chancery::v1::subject::Of;
use time::OffsetDateTime;
use uuid::Uuid;

use super::ActError;
use crate::ledger::entry::{from_millis, to_millis};

/// Where a trust root is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RootState {
    /// Made; nobody has seen it.
    Prepared,
    /// In every bundle; nothing chains to it.
    Published,
    /// Issuing certificates are signed with it. At most one root is.
    Active,
    /// In every bundle, until nothing live chains to it.
    Draining,
    /// Out of the bundles.
    Retired,
    /// Out of the bundles, in an emergency, for good.
    Distrusted,
}

/// Whose certificates are revoked.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Subject {
    /// One certificate.
    Serial(Serial),
    /// Every certificate of this ID.
    SpiffeId(SpiffeId),
    /// Every certificate of the pod with this UID.
    Pod(Uuid),
    /// Every certificate of pods on a node.
    Node {
        /// Node names are unique in their cluster alone.
        cluster: String,
        /// Its name.
        node: String,
    },
    /// Every certificate that this agent or sidecar obtained, and its own.
    Agent(SpiffeId),
}

/// Acts that an authenticated person was refused.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RefusedAct {
    /// What the person wanted: `agent.ban`, …
    pub action: String,
    /// To what.
    pub target: String,
    /// A stable word: `role`, `reason_missing`, …
    pub reason: String,
    /// What the person was told.
    pub message: String,
    /// How often since the last such entry.
    pub count: u64,
}

/// What of a gate did not count for a transition.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    /// Who was left out of the count, by name.
    pub except: Vec<String>,
    /// The gate was not met, and overridden.
    pub force: bool,
    /// Proxies that cannot prove what they trust were not waited for.
    pub accept_unproven: bool,
    /// The CA's clock was confirmed to be right.
    pub confirm_clock: bool,
}

/// CRLs, as an act names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Crls {
    /// Larger than that of any before.
    pub number: u64,
    /// Of them as PEM; none if there are none any more.
    pub sha256: Option<[u8; 32]>,
    /// How many certificates they revoke.
    pub certificates: u32,
}

/// What an act changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A trust root goes on to another state.
    Root {
        /// Which.
        root: Fingerprint,
        /// Where to.
        to: RootState,
        /// In spite of what.
        overrides: Overrides,
    },
    /// A root is to leave the bundles in an emergency: when nothing alive chains to it any more, or by a deadline.
    BeginDistrust {
        /// Which.
        root: Fingerprint,
        /// The deadline.
        leave_by: OffsetDateTime,
    },
    /// A corporate CA is asked to sign the next root.
    RequestRoot {
        /// PKCS #10, DER.
        csr: Vec<u8>,
    },
    /// Certificates issued until now are revoked. By anything but the serial, nothing more is issued either, until [`Change::Allow`].
    Revoke {
        /// Whose.
        subject: Subject,
        /// When the last of them expires: then they need not be remembered.
        until: OffsetDateTime,
    },
    /// Issuance goes on for a subject that was revoked.
    Allow(Subject),
    /// Nothing more is issued to this agent, nor on its behalf, and its own certificates issued until now are revoked.
    Ban {
        /// Which.
        agent: SpiffeId,
        /// When the last of its own certificates expires.
        until: OffsetDateTime,
    },
    /// Takes a ban back.
    Unban(SpiffeId),
    /// From now on the trust state has these CRLs, or none.
    Crl(Crls),
    /// From now on checkpoints are signed with this Ed25519 key.
    CheckpointKey([u8; 32]),
    /// Changes nothing.
    Refused(RefusedAct),
    /// This log continues one that was lost in part; its first entry alone can say so.
    AcceptedLoss {
        /// Of the old log.
        origin: String,
        /// The newest one of it that is known, a signed note.
        checkpoint: String,
        /// The entries that are not there; an empty range where nobody knows whether there were any.
        missing: Range<u64>,
        /// Added to the sequence of each trust state.
        trust_floor: u64,
        /// No root is retired before.
        roots_kept_until: OffsetDateTime,
        /// Of the old log, behind the last act that is not lost.
        epoch: u64,
    },
    /// The log goes on from a backup, and may lack what was recorded after its newest checkpoint.
    Restored {
        /// How many the backup had.
        entries: u64,
        /// No root is activated or retired before.
        roots_kept_until: OffsetDateTime,
        /// Added to the sequence of each trust state.
        trust_floor: u64,
        /// Behind the last act that the backup had.
        epoch: u64,
    },
}

impl Change {
    /// The kind of change in words: `agent.ban`, …
    pub fn action(&self) -> &'static str {
        match self {
            Self::Root { to, .. } => match to {
                RootState::Prepared => "root.prepare",
                RootState::Published => "root.publish",
                RootState::Active => "root.activate",
                RootState::Draining => "root.drain",
                RootState::Retired => "root.retire",
                RootState::Distrusted => "root.distrust",
            },
            Self::BeginDistrust { .. } => "root.begin-distrust",
            Self::RequestRoot { .. } => "root.request",
            Self::Revoke { .. } => "identity.revoke",
            Self::Allow(_) => "identity.allow",
            Self::Ban { .. } => "agent.ban",
            Self::Unban(_) => "agent.unban",
            Self::Crl(Crls { sha256: Some(_), .. }) => "crl.issue",
            Self::Crl(Crls { sha256: None, .. }) => "crl.withdraw",
            Self::CheckpointKey(_) => "log.checkpoint-key",
            Self::Refused(_) => "act.refused",
            Self::AcceptedLoss { .. } => "log.accept-loss",
            Self::Restored { .. } => "log.restore",
        }
    }

    /// What is changed, in words.
    pub fn target(&self) -> String {
        match self {
            Self::Root { root, .. } | Self::BeginDistrust { root, .. } => root.to_string(),
            Self::RequestRoot { .. } => "the next trust root".to_owned(),
            Self::Revoke { subject, .. } | Self::Allow(subject) => subject.to_string(),
            Self::Ban { agent, .. } | Self::Unban(agent) => agent.to_string(),
            Self::Crl(Crls { number, certificates, .. }) => format!("number {number}: {certificates} certificates"),
            Self::CheckpointKey(key) => hex::encode(key),
            Self::Refused(RefusedAct { action, target, .. }) => format!("{action} {target}").trim_end().to_owned(),
            Self::AcceptedLoss { origin, missing, .. } if missing.is_empty() => {
                format!("{origin}: whatever followed its {} entries", missing.start)
            }
            Self::AcceptedLoss { origin, missing, .. } => format!("{origin}: entries {} to {}", missing.start, missing.end - 1),
            Self::Restored { entries, .. } => format!("{entries} entries"),
        }
    }

    /// What became of it, in a word.
    pub(super) fn outcome(&self) -> &'static str {
        if matches!(self, Self::Refused(_)) { "refused" } else { "done" }
    }

    pub(super) fn into_wire(self) -> WireChange {
        match self {
            Self::Root { root, to, overrides: Overrides { except, force, accept_unproven, confirm_clock } } => {
                let (fingerprint, to) = (root.0.to_vec(), wire::RootState::from(to).into());
                WireChange::Root(wire::RootTransition { fingerprint, to, except, force, accept_unproven, confirm_clock })
            }
            Self::BeginDistrust { root, leave_by } => {
                WireChange::BeginDistrust(wire::BeginDistrust { fingerprint: root.0.to_vec(), leave_by_ms: to_millis(leave_by) })
            }
            Self::RequestRoot { csr } => WireChange::RequestRoot(wire::RequestRoot { csr }),
            Self::Revoke { subject, until } => {
                WireChange::Revoke(wire::Revoke { subject: Some(subject.into()), until_ms: to_millis(until) })
            }
            Self::Allow(subject) => WireChange::Allow(wire::Allow { subject: Some(subject.into()) }),
            Self::Ban { agent, until } => WireChange::Ban(wire::BanAgent { agent: agent.to_string(), until_ms: to_millis(until) }),
            Self::Unban(agent) => WireChange::Unban(wire::UnbanAgent { agent: agent.to_string() }),
            Self::Crl(Crls { number, sha256, certificates }) => {
                let sha256 = sha256.map(Vec::from).unwrap_or_default();
                WireChange::Crl(wire::IssueCrl { number, sha256, certificates })
            }
            Self::CheckpointKey(key) => WireChange::CheckpointKey(wire::CheckpointKey { public_key: key.to_vec() }),
            Self::Refused(RefusedAct { action, target, reason, message, count }) => {
                WireChange::Refused(wire::RefusedAct { action, target, reason, message, count })
            }
            Self::AcceptedLoss { origin, checkpoint, missing, trust_floor, roots_kept_until, epoch } => {
                WireChange::Loss(wire::AcceptedLoss {
                    origin,
                    checkpoint,
                    first: missing.start,
                    end: missing.end,
                    trust_floor,
                    roots_kept_until_ms: to_millis(roots_kept_until),
                    epoch,
                })
            }
            Self::Restored { entries, roots_kept_until, trust_floor, epoch } => {
                WireChange::Restored(wire::Restored { entries, roots_kept_until_ms: to_millis(roots_kept_until), trust_floor, epoch })
            }
        }
    }

    /// Reads a change; none, or one of a kind that this code does not know, is an error: the state cannot be told without it.
    pub(super) fn from_wire(change: Option<WireChange>) -> Result<Self, ActError> {
        Ok(match change.ok_or(ActError::UnknownChange)? {
            WireChange::Root(wire::RootTransition { fingerprint, to, except, force, accept_unproven, confirm_clock }) => {
                let to = wire::RootState::try_from(to).ok().and_then(|to| RootState::try_from(to).ok()).ok_or(ActError::UnknownChange)?;
                let overrides = Overrides { except, force, accept_unproven, confirm_clock };
                Self::Root { root: Fingerprint(array("root.fingerprint", &fingerprint)?), to, overrides }
            }
            WireChange::BeginDistrust(wire::BeginDistrust { fingerprint, leave_by_ms }) => {
                let root = Fingerprint(array("begin_distrust.fingerprint", &fingerprint)?);
                Self::BeginDistrust { root, leave_by: from_millis(leave_by_ms) }
            }
            WireChange::RequestRoot(wire::RequestRoot { csr }) => Self::RequestRoot { csr },
            WireChange::Revoke(wire::Revoke { subject, until_ms }) => {
                Self::Revoke { subject: Subject::from_wire(subject)?, until: from_millis(until_ms) }
            }
            WireChange::Allow(wire::Allow { subject }) => Self::Allow(Subject::from_wire(subject)?),
            WireChange::Ban(wire::BanAgent { agent, until_ms }) => {
                Self::Ban { agent: spiffe_id("ban.agent", &agent)?, until: from_millis(until_ms) }
            }
            WireChange::Unban(wire::UnbanAgent { agent }) => Self::Unban(spiffe_id("unban.agent", &agent)?),
            WireChange::Crl(wire::IssueCrl { number, sha256, certificates }) => {
                Self::Crl(Crls { number, sha256: digest("crl.sha256", &sha256)?, certificates })
            }
            WireChange::CheckpointKey(wire::CheckpointKey { public_key }) => {
                Self::CheckpointKey(array("checkpoint_key.public_key", &public_key)?)
            }
            WireChange::Refused(wire::RefusedAct { action, target, reason, message, count }) => {
                Self::Refused(RefusedAct { action, target, reason, message, count })
            }
            WireChange::Loss(wire::AcceptedLoss { origin, checkpoint, first, end, trust_floor, roots_kept_until_ms, epoch }) => {
                Self::AcceptedLoss {
                    origin,
                    checkpoint,
                    missing: first..end,
                    trust_floor,
                    roots_kept_until: from_millis(roots_kept_until_ms),
                    epoch,
                }
            }
            WireChange::Restored(wire::Restored { entries, roots_kept_until_ms, trust_floor, epoch }) => {
                Self::Restored { entries, roots_kept_until: from_millis(roots_kept_until_ms), trust_floor, epoch }
            }
        })
    }
}

impl Subject {
    pub(super) fn from_wire(subject: Option<wire::Subject>) -> Result<Self, ActError> {
        Ok(match subject.and_then(|subject| subject.of).ok_or(ActError::UnknownChange)? {
            Of::Serial(serial) => Self::Serial(Serial(array("subject.serial", &serial)?)),
            Of::SpiffeId(id) => Self::SpiffeId(spiffe_id("subject.spiffe_id", &id)?),
            Of::PodUid(uid) => Self::Pod(Uuid::from_bytes(array("subject.pod_uid", &uid)?)),
            Of::Node(node) => {
                let problem = || ActError::Field { field: "subject.node", problem: format!("is {node:?}, not cluster/node") };
                let (cluster, node) = node.split_once('/').ok_or_else(problem)?;
                Self::Node { cluster: cluster.to_owned(), node: node.to_owned() }
            }
            Of::Agent(id) => Self::Agent(spiffe_id("subject.agent", &id)?),
        })
    }
}

impl From<Subject> for wire::Subject {
    fn from(subject: Subject) -> Self {
        let of = match subject {
            Subject::Serial(Serial(serial)) => Of::Serial(serial.to_vec()),
            Subject::SpiffeId(id) => Of::SpiffeId(id.to_string()),
            Subject::Pod(uid) => Of::PodUid(uid.into_bytes().to_vec()),
            Subject::Node { cluster, node } => Of::Node(format!("{cluster}/{node}")),
            Subject::Agent(id) => Of::Agent(id.to_string()),
        };
        Self { of: Some(of) }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Serial(serial) => write!(f, "serial {serial}"),
            Self::SpiffeId(id) => write!(f, "{id}"),
            Self::Pod(uid) => write!(f, "pod {uid}"),
            Self::Node { cluster, node } => write!(f, "node {cluster}/{node}"),
            Self::Agent(id) => write!(f, "agent {id}"),
        }
    }
}

impl fmt::Display for RootState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Prepared => "prepared",
            Self::Published => "published",
            Self::Active => "active",
            Self::Draining => "draining",
            Self::Retired => "retired",
            Self::Distrusted => "distrusted",
        })
    }
}

impl From<RootState> for wire::RootState {
    fn from(state: RootState) -> Self {
        match state {
            RootState::Prepared => Self::Prepared,
            RootState::Published => Self::Published,
            RootState::Active => Self::Active,
            RootState::Draining => Self::Draining,
            RootState::Retired => Self::Retired,
            RootState::Distrusted => Self::Distrusted,
        }
    }
}

impl TryFrom<wire::RootState> for RootState {
    type Error = ActError;

    fn try_from(state: wire::RootState) -> Result<Self, ActError> {
        Ok(match state {
            wire::RootState::Unspecified => return Err(ActError::UnknownChange),
            wire::RootState::Prepared => Self::Prepared,
            wire::RootState::Published => Self::Published,
            wire::RootState::Active => Self::Active,
            wire::RootState::Draining => Self::Draining,
            wire::RootState::Retired => Self::Retired,
            wire::RootState::Distrusted => Self::Distrusted,
        })
    }
}

/// Empty stands for none.
pub(super) fn digest(field: &'static str, bytes: &[u8]) -> Result<Option<[u8; 32]>, ActError> {
    if bytes.is_empty() { Ok(None) } else { array(field, bytes).map(Some) }
}

pub(super) fn array<const N: usize>(field: &'static str, bytes: &[u8]) -> Result<[u8; N], ActError> {
    bytes.try_into().map_err(|_| ActError::Field { field, problem: format!("has {} bytes instead of {N}", bytes.len()) })
}

pub(super) fn spiffe_id(field: &'static str, text: &str) -> Result<SpiffeId, ActError> {
    text.parse().map_err(|error| ActError::Field { field, problem: format!("is {text:?}, no SPIFFE ID: {error}") })
}
