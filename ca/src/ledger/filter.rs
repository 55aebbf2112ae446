//! Which identities a question is about: typed, read from the wire, matched against what was recorded.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::RangeInclusive;

use chancery_identity::{Serial, SpiffeId};
use chancery_proto::chancery::v1 as wire;
use time::OffsetDateTime;
use uuid::Uuid;

use super::acts::State;
use super::entry::from_millis;
use super::query::Identity;
use super::revoked;

/// Which identities; every condition given must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct IdentityFilter {
    /// Exactly this SPIFFE ID.
    pub spiffe_id: Option<SpiffeId>,
    /// SPIFFE IDs that begin so, at a segment's edge or within it.
    pub spiffe_id_prefix: Option<String>,
    /// The certificate's serial number.
    pub serial: Option<Serial>,
    /// The pod.
    pub pod: Option<PodFilter>,
    /// The node.
    pub node: Option<NodeFilter>,
    /// The pod's namespace.
    pub namespace: Option<String>,
    /// The service account.
    pub service_account: Option<ServiceAccountFilter>,
    /// The agent or sidecar that asked.
    pub agent: Option<SpiffeId>,
    /// The token's `jti`.
    pub token_id: Option<String>,
    /// Recorded at or after.
    pub since: Option<OffsetDateTime>,
    /// Recorded before.
    pub until: Option<OffsetDateTime>,
    /// Certificates that have not expired yet.
    pub unexpired: bool,
    /// Certificates that a revocation in force is about.
    pub revoked: bool,
    /// The certificate that signed it.
    pub issuing_certificate: Option<FingerprintFilter>,
    /// The trust root above it.
    pub root: Option<FingerprintFilter>,
}

/// Which pod.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum PodFilter {
    /// The one pod with this UID.
    Uid(Uuid),
    /// Pods of this name, over time.
    Name {
        /// In this namespace only.
        namespace: Option<String>,
        /// The name.
        name: String,
    },
}

/// Which node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NodeFilter {
    /// In this cluster only.
    pub cluster: Option<String>,
    /// The name.
    pub name: String,
}

/// Which service account.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ServiceAccountFilter {
    /// In this namespace only.
    pub namespace: Option<String>,
    /// The name.
    pub name: String,
}

/// Which certificate of the CA's own: the beginning of its SHA-256 fingerprint, 4 to 32 bytes. Of more than 16 bytes the first 16 count,
/// which is what entries hold.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FingerprintFilter(Vec<u8>);

impl FingerprintFilter {
    /// How many bytes of a fingerprint entries hold.
    const HELD: usize = 16;
    const LENGTHS: RangeInclusive<usize> = 4..=32;

    /// What of it can be compared with an entry.
    pub(super) fn prefix(&self) -> &[u8] {
        &self.0[..self.0.len().min(Self::HELD)]
    }

    /// Whether it can fit only one certificate.
    pub(super) fn is_whole(&self) -> bool {
        self.0.len() >= Self::HELD
    }

    fn fits(&self, fingerprint: &[u8; Self::HELD]) -> bool {
        fingerprint.starts_with(self.prefix())
    }
}

impl From<[u8; 16]> for FingerprintFilter {
    /// As entries name certificates of the CA's own.
    fn from(held: [u8; Self::HELD]) -> Self {
        Self(held.to_vec())
    }
}

/// A filter that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} {problem}")]
pub struct FilterError {
    /// As in `operator.proto`.
    pub field: &'static str,
    /// What is wrong with it.
    pub problem: String,
}

impl IdentityFilter {
    /// Whether `identity` is one of those, at the time `now` and in the state `state`.
    pub(super) fn matches(&self, identity: &Identity, now: OffsetDateTime, state: &State) -> bool {
        let Identity { issuance, leaf, .. } = identity;
        holds(self.serial.as_ref(), |serial| *serial == leaf.serial)
            && holds(self.spiffe_id.as_ref(), |id| *id == leaf.spiffe_id)
            && holds(self.spiffe_id_prefix.as_ref(), |prefix| leaf.spiffe_id.as_str().starts_with(prefix.as_str()))
            && holds(self.pod.as_ref(), |pod| match pod {
                PodFilter::Uid(uid) => issuance.pod_uid == Some(*uid),
                PodFilter::Name { namespace, name } => {
                    issuance.pod == *name && holds(namespace.as_ref(), |namespace| issuance.namespace == *namespace)
                }
            })
            && holds(self.node.as_ref(), |node| {
                issuance.node == node.name && holds(node.cluster.as_ref(), |cluster| issuance.cluster == *cluster)
            })
            && holds(self.namespace.as_ref(), |namespace| issuance.namespace == *namespace)
            && holds(self.service_account.as_ref(), |account| {
                issuance.service_account == account.name && holds(account.namespace.as_ref(), |namespace| issuance.namespace == *namespace)
            })
            && holds(self.agent.as_ref(), |agent| identity.asker.as_ref() == Some(agent))
            && holds(self.token_id.as_ref(), |token_id| issuance.token_id == *token_id)
            && holds(self.since.as_ref(), |since| identity.time >= *since)
            && holds(self.until.as_ref(), |until| identity.time < *until)
            && holds(self.issuing_certificate.as_ref(), |certificate| certificate.fits(&issuance.issuing_certificate))
            && holds(self.root.as_ref(), |root| root.fits(&issuance.root))
            && (!self.unexpired || now <= leaf.not_after)
            && (!self.revoked || revoked::revocation(state, identity).is_some())
    }

    /// Tells filters apart, so that a page token serves only the filter that it was given for.
    pub(super) fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish()
    }
}

fn holds<T>(condition: Option<&T>, test: impl FnOnce(&T) -> bool) -> bool {
    condition.is_none_or(test)
}

impl TryFrom<&wire::IdentityFilter> for IdentityFilter {
    type Error = FilterError;

    fn try_from(filter: &wire::IdentityFilter) -> Result<Self, FilterError> {
        Ok(Self {
            spiffe_id: spiffe_id("spiffe_id", &filter.spiffe_id)?,
            spiffe_id_prefix: prefix(&filter.spiffe_id_prefix)?,
            serial: given(&filter.serial).map(serial).transpose()?,
            pod: given(&filter.pod).map(pod).transpose()?,
            node: given(&filter.node).map(node).transpose()?,
            namespace: given(&filter.namespace).map(str::to_owned),
            service_account: given(&filter.service_account).map(service_account).transpose()?,
            agent: spiffe_id("agent", &filter.agent)?,
            token_id: given(&filter.token_id).map(str::to_owned),
            since: (filter.since_ms != 0).then(|| from_millis(filter.since_ms)),
            until: (filter.until_ms != 0).then(|| from_millis(filter.until_ms)),
            unexpired: filter.unexpired,
            revoked: filter.revoked,
            issuing_certificate: fingerprint("issuing_certificate", &filter.issuing_certificate)?,
            root: fingerprint("root", &filter.root)?,
        })
    }
}

fn given(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}

fn spiffe_id(field: &'static str, text: &str) -> Result<Option<SpiffeId>, FilterError> {
    given(text).map(|text| text.parse().map_err(|error| problem(field, format!("{text:?} is no SPIFFE ID: {error}")))).transpose()
}

fn prefix(text: &str) -> Result<Option<String>, FilterError> {
    const SCHEME: &str = "spiffe://";
    match given(text) {
        Some(text) if !text.starts_with(SCHEME) => Err(problem("spiffe_id_prefix", format!("{text:?} does not begin with `{SCHEME}`"))),
        text => Ok(text.map(str::to_owned)),
    }
}

/// Hex, with colons as OpenSSL prints them or without.
fn serial(text: &str) -> Result<Serial, FilterError> {
    let mut bytes = [0; 16];
    hex::decode_to_slice(text.replace(':', ""), &mut bytes)
        .map_err(|_| problem("serial", format!("{text:?} is no serial number: 32 hexadecimal digits")))?;
    Ok(Serial(bytes))
}

/// Hex, with colons as OpenSSL prints them or without.
fn fingerprint(field: &'static str, text: &str) -> Result<Option<FingerprintFilter>, FilterError> {
    let read = |text: &str| match hex::decode(text.replace(':', "")) {
        Ok(bytes) if FingerprintFilter::LENGTHS.contains(&bytes.len()) => Ok(FingerprintFilter(bytes)),
        _ => Err(problem(field, format!("{text:?} is no beginning of a SHA-256 fingerprint: 8 to 64 hexadecimal digits, an even number"))),
    };
    given(text).map(read).transpose()
}

fn pod(text: &str) -> Result<PodFilter, FilterError> {
    if let Ok(uid) = Uuid::try_parse(text) {
        return Ok(PodFilter::Uid(uid));
    }
    let (namespace, name) = qualified("pod", "namespace", text)?;
    Ok(PodFilter::Name { namespace, name })
}

fn node(text: &str) -> Result<NodeFilter, FilterError> {
    let (cluster, name) = qualified("node", "cluster", text)?;
    Ok(NodeFilter { cluster, name })
}

fn service_account(text: &str) -> Result<ServiceAccountFilter, FilterError> {
    let (namespace, name) = qualified("service_account", "namespace", text)?;
    Ok(ServiceAccountFilter { namespace, name })
}

/// `name` or `<of>/name`.
fn qualified(field: &'static str, of: &str, text: &str) -> Result<(Option<String>, String), FilterError> {
    let (namespace, name) = match text.split_once('/') {
        Some((namespace, name)) => (Some(namespace), name),
        None => (None, text),
    };
    if name.is_empty() || name.contains('/') || namespace.is_some_and(str::is_empty) {
        return Err(problem(field, format!("{text:?} is neither a name nor {of}/name")));
    }
    Ok((namespace.map(str::to_owned), name.to_owned()))
}

fn problem(field: &'static str, problem: String) -> FilterError {
    FilterError { field, problem }
}
