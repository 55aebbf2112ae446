//! What the ledger records, as types and as the bytes of `chancery.v1.Entry`.
//!
//! Promises: an entry that was read keeps the very bytes that are stored, so that a hash over them never depends on this code; a version
//! that this code does not know is refused; nothing here is a secret. Reading does not judge a certificate by today's profile: what was
//! recorded under an older one stays readable.

use bytes::{Buf, Bytes};
use chancery_identity::{SpiffeId, TrustDomain};
use chancery_proto::chancery::v1 as wire;
use prost::Message;
use time::OffsetDateTime;
use uuid::Uuid;

use super::leaf::Leaf;

pub use chancery_proto::chancery::v1::{IssueReason, Role};

/// The encoding that this code writes and reads.
pub const ENTRY_VERSION: u32 = 1;

/// Version and time in front of the body take at most this many bytes.
pub(super) const MAX_PREFIX_BYTES: usize = 13;

/// Why bytes are no entry that this code can read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EntryError {
    /// No protobuf of `chancery.v1.Entry`.
    #[error("the entry cannot be decoded: {0}")]
    Malformed(String),
    /// A newer Chancery wrote it.
    #[error("the entry has version {0}, and this Chancery reads version {ENTRY_VERSION}; use the newer one that wrote it")]
    Version(u32),
    /// A field holds what it may not.
    #[error("the entry's field `{field}` {problem}")]
    Field {
        /// As in `ledger.proto`.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
}

/// An issued certificate and on whose behalf it was issued. Serial, SPIFFE ID, DNS names and validity are the certificate's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Issuance {
    /// DER.
    pub certificate: Bytes,
    /// First 16 bytes of the SHA-256 of the issuing certificate's DER.
    pub issuing_certificate: [u8; 16],
    /// First 16 bytes of the SHA-256 of the trust root's DER.
    pub root: [u8; 16],
    /// What the holder that asked is; unspecified if the CA itself asked.
    pub role: Role,
    /// Why it was issued.
    pub reason: IssueReason,
    /// Whose keys verified the token.
    pub cluster: String,
    /// The node's name.
    pub node: String,
    /// The node's UID.
    pub node_uid: Option<Uuid>,
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's service account.
    pub service_account: String,
    /// The service account's UID.
    pub service_account_uid: Option<Uuid>,
    /// The pod's name.
    pub pod: String,
    /// The pod's UID.
    pub pod_uid: Option<Uuid>,
    /// The token's `jti`; empty if there was no token (an agent that renews on the strength of its SVID).
    pub token_id: String,
    /// Found again in the logs of agent and CA.
    pub request_id: Uuid,
    /// The trust state that the agent was given last.
    pub trust_sequence: u64,
    /// The pod of the sidecar that asked; none for an agent.
    pub sidecar_pod_uid: Option<Uuid>,
    /// How it came into this log.
    pub provenance: Provenance,
}

/// How an issuance came into a log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Provenance {
    /// It was recorded before the certificate was released.
    #[default]
    Issued,
    /// It was copied from the log that this one continues, where it was this entry.
    CarriedOver(u64),
    /// An agent reported it after a loss.
    Recovered,
}

/// What an entry says. To record one, hand it to [`Ledger::append`](super::Ledger::append), which adds index and time.
#[derive(Clone, Debug, PartialEq)]
pub enum Body {
    /// A certificate was issued.
    Issuance(Box<Issuance>),
    /// An operator did something, or was refused. Raises the epoch.
    Act(wire::Act),
    /// The CA started.
    Start(wire::Start),
    /// The configuration was replaced while running.
    Configuration(wire::ConfigurationChange),
    /// A trust root or an issuing certificate came into being.
    Authority(wire::AuthorityCertificate),
    /// What the acts before it lead to, or a part of that.
    State(wire::State),
}

/// An entry as it was read.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Unix milliseconds; never smaller than the entry's before.
    pub time_ms: i64,
    /// What it says.
    pub body: Body,
    bytes: Bytes,
}

impl Entry {
    /// Reads an entry from the bytes that are stored.
    pub fn decode(bytes: Bytes) -> Result<Self, EntryError> {
        let entry = wire::Entry::decode(bytes.clone()).map_err(|e| EntryError::Malformed(e.to_string()))?;
        if entry.version != ENTRY_VERSION {
            return Err(EntryError::Version(entry.version));
        }
        let body = match entry.body {
            Some(wire::entry::Body::Issuance(issuance)) => Body::Issuance(Box::new(issuance.try_into()?)),
            Some(wire::entry::Body::Act(act)) => Body::Act(act),
            Some(wire::entry::Body::Start(start)) => Body::Start(start),
            Some(wire::entry::Body::Configuration(change)) => Body::Configuration(change),
            Some(wire::entry::Body::Authority(authority)) => Body::Authority(authority),
            Some(wire::entry::Body::State(state)) => Body::State(state),
            None => return Err(EntryError::Field { field: "body", problem: "is missing".into() }),
        };
        Ok(Self { time_ms: entry.time_ms, body, bytes })
    }

    /// The time alone, without reading the rest: version and time stand in front.
    pub(super) fn decode_time(bytes: &[u8]) -> Result<i64, EntryError> {
        let mut rest = &bytes[..bytes.len().min(MAX_PREFIX_BYTES)];
        let malformed = |e: prost::DecodeError| EntryError::Malformed(e.to_string());
        let mut next = || -> Result<Option<(u32, u64)>, EntryError> {
            if !rest.has_remaining() {
                return Ok(None);
            }
            let (tag, kind) = prost::encoding::decode_key(&mut rest).map_err(malformed)?;
            if kind != prost::encoding::WireType::Varint {
                return Ok(None);
            }
            Ok(Some((tag, prost::encoding::decode_varint(&mut rest).map_err(malformed)?)))
        };
        let mut time_ms = 0;
        while let Some((tag, value)) = next()? {
            match tag {
                1 if value != u64::from(ENTRY_VERSION) => return Err(EntryError::Version(u32::try_from(value).unwrap_or(u32::MAX))),
                2 => time_ms = value.cast_signed(),
                _ => {}
            }
        }
        Ok(time_ms)
    }

    /// The bytes as they are stored: what a Merkle tree's leaf is the hash of.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// When it was recorded.
    pub fn time(&self) -> OffsetDateTime {
        from_millis(self.time_ms)
    }
}

impl Body {
    /// Whether it raises the epoch.
    pub(super) fn is_act(&self) -> bool {
        matches!(self, Self::Act(_))
    }

    /// Appends the encoded body to `buffer`; [`encode_prefix`] goes in front of it. Concatenated they are one `chancery.v1.Entry`, its
    /// fields in order of their numbers.
    pub(super) fn encode_body(self, buffer: &mut Vec<u8>) {
        let body = match self {
            Self::Issuance(issuance) => wire::entry::Body::Issuance((*issuance).into()),
            Self::Act(act) => wire::entry::Body::Act(act),
            Self::Start(start) => wire::entry::Body::Start(start),
            Self::Configuration(change) => wire::entry::Body::Configuration(change),
            Self::Authority(authority) => wire::entry::Body::Authority(authority),
            Self::State(state) => wire::entry::Body::State(state),
        };
        body.encode(buffer);
    }
}

impl From<Issuance> for Body {
    fn from(issuance: Issuance) -> Self {
        Self::Issuance(Box::new(issuance))
    }
}

/// Version and time, the fields in front of the body.
pub(super) fn encode_prefix(time_ms: i64, buffer: &mut Vec<u8>) {
    prost::encoding::uint32::encode(1, &ENTRY_VERSION, buffer);
    if time_ms != 0 {
        prost::encoding::int64::encode(2, &time_ms, buffer);
    }
}

impl Issuance {
    /// What the certificate says: serial, SPIFFE ID, validity, DNS names.
    pub fn leaf(&self) -> Result<Leaf, EntryError> {
        Leaf::read(&self.certificate)
    }

    /// The SPIFFE ID of the agent or sidecar that asked, in the certificate's trust domain; none if the CA itself asked.
    pub fn asker(&self, trust_domain: &TrustDomain) -> Option<SpiffeId> {
        let (kind, uid) = match self.role {
            Role::Agent => ("agent", self.node_uid?),
            Role::Sidecar => ("sidecar", self.sidecar_pod_uid?),
            Role::Unspecified => return None,
        };
        trust_domain.member(["chancery", kind, &self.cluster, &uid.to_string()]).ok()
    }
}

impl From<Issuance> for wire::Issuance {
    fn from(issuance: Issuance) -> Self {
        Self {
            certificate: issuance.certificate,
            issuing_certificate: Bytes::copy_from_slice(&issuance.issuing_certificate),
            root: Bytes::copy_from_slice(&issuance.root),
            role: issuance.role.into(),
            reason: issuance.reason.into(),
            cluster: issuance.cluster,
            node: issuance.node,
            node_uid: uid_bytes(issuance.node_uid),
            namespace: issuance.namespace,
            service_account: issuance.service_account,
            service_account_uid: uid_bytes(issuance.service_account_uid),
            pod: issuance.pod,
            pod_uid: uid_bytes(issuance.pod_uid),
            token_id: token_id_bytes(issuance.token_id),
            request_id: uid_bytes(Some(issuance.request_id)),
            trust_sequence: issuance.trust_sequence,
            sidecar_pod_uid: uid_bytes(issuance.sidecar_pod_uid),
            carried_over: if let Provenance::CarriedOver(entry) = issuance.provenance { Some(entry) } else { None },
            recovered: issuance.provenance == Provenance::Recovered,
        }
    }
}

impl TryFrom<wire::Issuance> for Issuance {
    type Error = EntryError;

    fn try_from(issuance: wire::Issuance) -> Result<Self, EntryError> {
        Ok(Self {
            issuing_certificate: fingerprint("issuing_certificate", &issuance.issuing_certificate)?,
            root: fingerprint("root", &issuance.root)?,
            // Values that this code does not know come from a newer minor version.
            role: Role::try_from(issuance.role).unwrap_or_default(),
            reason: IssueReason::try_from(issuance.reason).unwrap_or_default(),
            node_uid: uid("node_uid", &issuance.node_uid)?,
            service_account_uid: uid("service_account_uid", &issuance.service_account_uid)?,
            pod_uid: uid("pod_uid", &issuance.pod_uid)?,
            token_id: token_id(&issuance.token_id)?,
            request_id: uid("request_id", &issuance.request_id)?
                .ok_or_else(|| EntryError::Field { field: "request_id", problem: "is missing".into() })?,
            sidecar_pod_uid: uid("sidecar_pod_uid", &issuance.sidecar_pod_uid)?,
            provenance: match issuance.carried_over {
                Some(entry) => Provenance::CarriedOver(entry),
                None if issuance.recovered => Provenance::Recovered,
                None => Provenance::Issued,
            },
            trust_sequence: issuance.trust_sequence,
            certificate: issuance.certificate,
            cluster: issuance.cluster,
            node: issuance.node,
            namespace: issuance.namespace,
            service_account: issuance.service_account,
            pod: issuance.pod,
        })
    }
}

/// The moment `millis` milliseconds after the beginning of 1970, or the end of time as far as the type reaches.
pub(super) fn from_millis(millis: i64) -> OffsetDateTime {
    let extreme = if millis < 0 { time::PrimitiveDateTime::MIN } else { time::PrimitiveDateTime::MAX };
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(millis) * 1_000_000).unwrap_or(extreme.assume_utc())
}

/// Unix milliseconds.
pub(super) fn to_millis(moment: OffsetDateTime) -> i64 {
    i64::try_from(moment.unix_timestamp_nanos().div_euclid(1_000_000)).unwrap_or(i64::MAX)
}

fn uid_bytes(uid: Option<Uuid>) -> Bytes {
    uid.map_or_else(Bytes::new, |uid| Bytes::copy_from_slice(uid.as_bytes()))
}

/// A UUID in its usual form takes 16 bytes; anything else stays text. The two cannot be confused: [`token_id`] reads 16 bytes as a UUID, and a
/// text of 16 bytes gets a zero byte behind it, which no `jti` from Kubernetes has.
fn token_id_bytes(token_id: String) -> Bytes {
    match Uuid::try_parse(&token_id) {
        Ok(uuid) if uuid.to_string() == token_id => Bytes::copy_from_slice(uuid.as_bytes()),
        _ if token_id.len() == 16 => [token_id.as_bytes(), &[0]].concat().into(),
        _ => token_id.into_bytes().into(),
    }
}

fn token_id(bytes: &[u8]) -> Result<String, EntryError> {
    if let Ok(uuid) = Uuid::from_slice(bytes) {
        return Ok(uuid.to_string());
    }
    let text = if bytes.len() == 17 { bytes.strip_suffix(&[0]).unwrap_or(bytes) } else { bytes };
    let text =
        std::str::from_utf8(text).map_err(|_| EntryError::Field { field: "token_id", problem: "is neither UUID nor text".into() })?;
    Ok(text.to_owned())
}

fn uid(field: &'static str, bytes: &[u8]) -> Result<Option<Uuid>, EntryError> {
    match bytes {
        [] => Ok(None),
        _ => Uuid::from_slice(bytes).map(Some).map_err(|_| EntryError::Field { field, problem: wrong_length(bytes) }),
    }
}

fn fingerprint(field: &'static str, bytes: &[u8]) -> Result<[u8; 16], EntryError> {
    bytes.try_into().map_err(|_| EntryError::Field { field, problem: wrong_length(bytes) })
}

fn wrong_length(bytes: &[u8]) -> String {
    format!("has {} bytes instead of 16", bytes.len())
}
