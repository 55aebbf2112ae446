//! Secrets as they travel: encoded once for each content and name, shared by every stream that sends them.
//!
//! A [`Secret`] that exists has content: there is no empty validation context, which Envoy would take for "let everybody in". Its version
//! is a hash of that content, so equal content has an equal version in every process.
//!
//! Private keys: the PEM and the encoded message are zeroized when the last holder drops them. What tonic and h2 copy into their send
//! buffers is beyond our reach; it is freed, not zeroized, when the proxy has read it.

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, OnceLock, Weak};

use aws_lc_rs::digest::{Context, SHA256};
use bytes::Bytes;
use chancery_identity::{Crl, SpiffeId, TrustState, X509Svid};
use chancery_proto::any::Any;
use chancery_proto::envoy::config::core::v3::{DataSource, data_source::Specifier};
use chancery_proto::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, Secret as Message, TlsCertificate, secret,
};
use prost::Message as _;
use zeroize::Zeroizing;

use super::lock;
use crate::svids::WorkloadKey;

/// The one resource type of SDS.
pub const SECRET_TYPE_URL: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";
/// The name by which every workload finds its own certificate.
pub const DEFAULT_NAME: &str = "default";
/// The name by which every workload finds the bundle of its trust domain.
pub const ROOT_CA_NAME: &str = "ROOTCA";

/// The hash of a secret's content: half a SHA-256, 32 hexadecimal digits on the wire.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version([u8; 16]);

/// Content that can be sent under two names: a well-known one and the SPIFFE ID that it belongs to.
pub struct Secret {
    version: Version,
    content: Content,
    spiffe_id: SpiffeId,
    /// The encoded message under the well-known name, and under the SPIFFE ID; each made when it is first asked for.
    encoded: [OnceLock<Bytes>; 2],
}

enum Content {
    Certificate(Arc<X509Svid>),
    Bundle(Arc<TrustState>),
}

impl Secret {
    /// The workload's chain and key.
    pub fn certificate(svid: Arc<X509Svid>) -> Self {
        let parts = svid.chain().iter().map(AsRef::as_ref).chain([svid.key().secret_pkcs8()]);
        Self {
            version: Version::of(DEFAULT_NAME, parts),
            spiffe_id: svid.id().clone(),
            content: Content::Certificate(svid),
            encoded: Default::default(),
        }
    }

    /// The own trust domain's bundle, with the CRL if there is one.
    pub fn bundle(trust: Arc<TrustState>) -> Self {
        let authorities = trust.own().x509_authorities().iter().map(AsRef::as_ref);
        let parts = [trust.crl.as_ref().map(Crl::pem).unwrap_or_default()].into_iter().chain(authorities);
        Self {
            version: Version::of(ROOT_CA_NAME, parts),
            spiffe_id: trust.trust_domain.id(),
            content: Content::Bundle(trust),
            encoded: Default::default(),
        }
    }

    /// A hash of the content.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Whether this is a certificate, not a bundle.
    pub fn is_certificate(&self) -> bool {
        matches!(self.content, Content::Certificate(_))
    }

    /// Whether `name` is one of the content's names.
    pub fn is_named(&self, name: &str) -> bool {
        name == self.well_known_name() || name == self.spiffe_id.as_str()
    }

    /// The resource under `name`, which [`Secret::is_named`] accepts.
    pub fn resource(&self, name: &str) -> Any {
        let encoded = &self.encoded[usize::from(name != self.well_known_name())];
        let value = encoded.get_or_init(|| encode(name, self.content.message())).clone();
        Any { type_url: SECRET_TYPE_URL.to_owned(), value }
    }

    fn well_known_name(&self) -> &'static str {
        match self.content {
            Content::Certificate(_) => DEFAULT_NAME,
            Content::Bundle(_) => ROOT_CA_NAME,
        }
    }
}

impl Content {
    fn message(&self) -> secret::Type {
        match self {
            Self::Certificate(svid) => secret::Type::TlsCertificate(TlsCertificate {
                certificate_chain: Some(inline(svid.chain_pem().into())),
                private_key: Some(inline(Bytes::from_owner(SecretText(svid.key().secret_pem())))),
            }),
            Self::Bundle(trust) => {
                let crl = trust.crl.as_ref().map(|crl| Bytes::copy_from_slice(crl.pem()));
                secret::Type::ValidationContext(CertificateValidationContext {
                    trusted_ca: Some(inline(trust.own().to_pem().into())),
                    // Our CRLs speak of leaves. Without this Envoy would want one of every issuer up to the root, and refuse everybody.
                    only_verify_leaf_cert_crl: crl.is_some(),
                    crl: crl.map(inline),
                })
            }
        }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secret").field("spiffe_id", &self.spiffe_id).field("version", &self.version).finish_non_exhaustive()
    }
}

/// PEM of a private key as the owner of a `Bytes`.
struct SecretText(Zeroizing<String>);

impl AsRef<[u8]> for SecretText {
    fn as_ref(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

fn inline(bytes: Bytes) -> DataSource {
    DataSource { specifier: Some(Specifier::InlineBytes(bytes)) }
}

fn encode(name: &str, content: secret::Type) -> Bytes {
    let message = Message { name: name.to_owned(), r#type: Some(content) };
    // Sized before it is filled: growing would leave copies behind that nobody zeroizes.
    let mut encoded = Zeroizing::new(Vec::with_capacity(message.encoded_len()));
    message.encode_raw(&mut *encoded);
    Bytes::from_owner(encoded)
}

impl Version {
    /// Of content made of these parts, in this order.
    pub fn of<'p>(kind: &'static str, parts: impl IntoIterator<Item = &'p [u8]>) -> Self {
        let mut digest = Context::new(&SHA256);
        for part in [kind.as_bytes()].into_iter().chain(parts) {
            // The length first, so that no two lists of parts run together into the same bytes.
            digest.update(&(part.len() as u64).to_be_bytes());
            digest.update(part);
        }
        let mut half = [0; 16];
        half.copy_from_slice(&digest.finish().as_ref()[..16]);
        Self(half)
    }

    /// Of a set of named contents, in this order.
    pub fn of_set<'n>(set: impl IntoIterator<Item = (&'n str, Version)>) -> Self {
        let parts: Vec<_> = set.into_iter().flat_map(|(name, version)| [name.as_bytes().to_vec(), version.0.to_vec()]).collect();
        Self::of("set", parts.iter().map(Vec::as_slice))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a proxy names may come from any server that it knew before: such a version is no error, just none of ours.
#[derive(Debug)]
pub struct ForeignVersion;

impl FromStr for Version {
    type Err = ForeignVersion;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut bytes = [0; 16];
        hex::decode_to_slice(text, &mut bytes).map_err(|_| ForeignVersion)?;
        Ok(Self(bytes))
    }
}

/// The encoded secrets that streams hold now: the bundle, and one certificate for each workload.
#[derive(Debug, Default)]
pub struct Secrets {
    bundle: Mutex<Option<Arc<Secret>>>,
    /// Weak: with a workload's last stream its encoded key goes too.
    certificates: Mutex<HashMap<WorkloadKey, Weak<Secret>>>,
}

impl Secrets {
    /// The bundle of this trust state.
    pub fn bundle(&self, trust: &Arc<TrustState>) -> Arc<Secret> {
        let mut cached = lock(&self.bundle);
        match &*cached {
            Some(secret) if matches!(&secret.content, Content::Bundle(of) if Arc::ptr_eq(of, trust)) => secret.clone(),
            _ => cached.insert(Arc::new(Secret::bundle(trust.clone()))).clone(),
        }
    }

    /// The workload's certificate.
    pub fn certificate(&self, workload: &WorkloadKey, svid: &Arc<X509Svid>) -> Arc<Secret> {
        let mut cached = lock(&self.certificates);
        if let Some(secret) = cached.get(workload).and_then(Weak::upgrade)
            && matches!(&secret.content, Content::Certificate(of) if Arc::ptr_eq(of, svid))
        {
            return secret;
        }
        // A new certificate is rare, so that is when the entries of workloads that have gone are swept out.
        cached.retain(|_, secret| secret.strong_count() > 0);
        let secret = Arc::new(Secret::certificate(svid.clone()));
        cached.insert(workload.clone(), Arc::downgrade(&secret));
        secret
    }
}
