//! Signing certificates: rcgen writes what is to be signed, a key manager signs it, and the result is held against the rules before
//! anybody gets it.
//!
//! rcgen signs through a synchronous trait, key managers sign asynchronously. So rcgen is given a key that signs nothing, which yields the
//! complete certificate but for its signature, and the real signature is put in.

use std::sync::Arc;
use std::time::Duration;

use chancery_identity::csr::KeyType;
use chancery_identity::profile::{self, LeafFacts};
use chancery_identity::{Fingerprint, Serial, SpiffeId, SvidError};
use rcgen::{CertificateParams, CertificateRevocationListParams, KeyIdMethod, PublicKeyData, SignatureAlgorithm, SigningKey};
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use x509_parser::asn1_rs::{FromDer, Header};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::ParsedExtension;

use super::crl::Listed;
use super::profiles;
use crate::keys::{KeyError, KeyManager, PublicKey};

/// How far certificates reach back, for peers whose clocks are behind.
pub(super) const BACKDATE: Duration = Duration::from_secs(30);

/// Why a certificate was not issued.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IssuerError {
    /// The key manager did not sign.
    #[error("the issuing key did not sign: {0}")]
    Key(#[from] KeyError),
    /// This machine's clock is before the issuing certificate's validity, or after it.
    #[error("the issuing certificate is valid from {not_before} to {not_after}, and this machine's clock says {now}: is it wrong?")]
    Clock {
        /// Its validity begins.
        not_before: OffsetDateTime,
        /// Its validity ends.
        not_after: OffsetDateTime,
        /// By the clock.
        now: OffsetDateTime,
    },
    /// A value that cannot stand in a certificate, or a type of key that cannot.
    #[error("the certificate cannot be written: {0}")]
    Encoding(String),
    /// The certificate that was built is not as it should be. It is never released.
    #[error("the certificate of {id} does not pass its own check and is not released: {problem}")]
    Check {
        /// Whose.
        id: SpiffeId,
        /// What is wrong with it.
        problem: String,
    },
    /// The random number generator failed.
    #[error(transparent)]
    Random(#[from] SvidError),
}

/// What a leaf shall say. Nothing of a CSR is in it but the public key.
#[derive(Clone, Copy, Debug)]
pub struct LeafRequest<'a> {
    /// Its SPIFFE ID.
    pub id: &'a SpiffeId,
    /// Its DNS names.
    pub dns_names: &'a [String],
    /// `SubjectPublicKeyInfo`, DER.
    pub public_key: &'a [u8],
    /// What kind of key that is.
    pub key_type: KeyType,
    /// From now on; cut at the issuer's end.
    pub lifetime: Duration,
}

/// A leaf that was built and checked, and not yet recorded: whoever has it must record it before handing it on.
#[derive(Clone, Debug)]
pub struct UnrecordedLeaf {
    /// The certificate.
    pub certificate: CertificateDer<'static>,
    /// What it says.
    pub facts: LeafFacts,
}

/// An issuing certificate with its key, ready to sign.
pub struct Issuer {
    certificate: CertificateDer<'static>,
    root: CertificateDer<'static>,
    root_fingerprint: Fingerprint,
    not_before: OffsetDateTime,
    not_after: OffsetDateTime,
    signer: Signer,
}

impl Issuer {
    /// # Errors
    /// If the certificate cannot be read.
    pub(super) fn new(certificate: CertificateDer<'static>, root: CertificateDer<'static>, signer: Signer) -> Result<Self, IssuerError> {
        let facts = profile::check_authority(&certificate)?;
        let root_fingerprint = Fingerprint::of(&root);
        Ok(Self { certificate, root, root_fingerprint, not_before: facts.not_before, not_after: facts.not_after, signer })
    }

    /// Builds, signs and checks a leaf.
    ///
    /// # Errors
    /// If the clock is outside of the issuer's validity, the key does not sign, or the result breaks a rule.
    pub async fn issue(&self, leaf: &LeafRequest<'_>, now: OffsetDateTime) -> Result<UnrecordedLeaf, IssuerError> {
        let Self { not_before, not_after, .. } = *self;
        if !(not_before..not_after).contains(&now) {
            return Err(IssuerError::Clock { not_before, not_after, now });
        }
        let serial = Serial::generate()?;
        let validity = validity(now, leaf.lifetime, (not_before, not_after));
        let params = profiles::leaf(leaf, serial, validity)?;
        let certificate = self.signer.sign(&params, &SubjectKey::read(leaf.public_key, leaf.key_type)?).await?;
        let facts = check(&certificate, leaf, serial, validity).map_err(|problem| IssuerError::Check { id: leaf.id.clone(), problem })?;
        Ok(UnrecordedLeaf { certificate, facts })
    }

    /// A CRL of these certificates, DER. Whoever's clock accepts the issuing certificate accepts it, from its beginning to its end.
    pub(super) async fn sign_crl<'l>(
        &self,
        number: u64,
        revoked: impl IntoIterator<Item = (&'l Serial, &'l Listed)>,
        now: OffsetDateTime,
    ) -> Result<Vec<u8>, IssuerError> {
        let mut params = profiles::crl(number, revoked, now, self.not_before, self.not_after);
        // Verifiers find the issuer by it.
        params.key_identifier_method = KeyIdMethod::PreSpecified(key_identifier_of(&self.certificate)?);
        self.signer.sign_crl(&params).await
    }

    /// The issuing certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The trust root that signed it.
    pub fn root(&self) -> &CertificateDer<'static> {
        &self.root
    }

    /// Of the trust root.
    pub fn root_fingerprint(&self) -> Fingerprint {
        self.root_fingerprint
    }

    /// The issuing certificate's validity begins.
    pub fn not_before(&self) -> OffsetDateTime {
        self.not_before
    }

    /// The issuing certificate's validity ends.
    pub fn not_after(&self) -> OffsetDateTime {
        self.not_after
    }

    /// How the ledger names the issuing certificate.
    pub fn certificate_id(&self) -> [u8; 16] {
        short_id(&self.certificate)
    }

    /// How the ledger names the trust root.
    pub fn root_id(&self) -> [u8; 16] {
        short_id(&self.root)
    }

    /// The name of the issuing key.
    pub(super) fn key_name(&self) -> &str {
        &self.signer.key
    }
}

/// A key in a key manager, with the name that its signatures are made in.
pub(super) struct Signer {
    keys: Arc<dyn KeyManager>,
    key: String,
    unsigned: rcgen::Issuer<'static, Unsigned>,
}

impl Signer {
    /// The signer of a certificate that exists.
    pub(super) fn of(
        certificate: &CertificateDer<'_>,
        keys: Arc<dyn KeyManager>,
        key: &str,
        public: &PublicKey,
    ) -> Result<Self, IssuerError> {
        let unsigned = rcgen::Issuer::from_ca_cert_der(certificate, Unsigned::new(public)?).map_err(encoding)?;
        Ok(Self { keys, key: key.to_owned(), unsigned })
    }

    /// The signer of a certificate that it will sign itself.
    pub(super) fn of_self(
        params: &CertificateParams,
        keys: Arc<dyn KeyManager>,
        key: &str,
        public: &PublicKey,
    ) -> Result<Self, IssuerError> {
        Ok(Self { keys, key: key.to_owned(), unsigned: rcgen::Issuer::new(params.clone(), Unsigned::new(public)?) })
    }

    pub(super) async fn sign(&self, params: &CertificateParams, subject: &SubjectKey<'_>) -> Result<CertificateDer<'static>, IssuerError> {
        let unsigned = params.signed_by(subject, &self.unsigned).map_err(encoding)?;
        Ok(self.put_signature_in(unsigned.der()).await?.into())
    }

    async fn sign_crl(&self, params: &CertificateRevocationListParams) -> Result<Vec<u8>, IssuerError> {
        let unsigned = params.signed_by(&self.unsigned).map_err(encoding)?;
        self.put_signature_in(unsigned.der()).await
    }

    async fn put_signature_in(&self, unsigned: &[u8]) -> Result<Vec<u8>, IssuerError> {
        let parts = UnsignedParts::of(unsigned).ok_or_else(|| IssuerError::Encoding("rcgen wrote an unknown form".into()))?;
        let signature = self.keys.sign(&self.key, parts.to_be_signed).await?;
        Ok(parts.assemble(&signature))
    }
}

/// A request for a certificate of one's own key (PKCS #10), DER.
pub(super) async fn request(
    params: &CertificateParams,
    keys: &dyn KeyManager,
    key: &str,
    public: &PublicKey,
) -> Result<Vec<u8>, IssuerError> {
    let unsigned = params.serialize_request(&Unsigned::new(public)?).map_err(encoding)?;
    let parts = UnsignedParts::of(unsigned.der()).ok_or_else(|| IssuerError::Encoding("rcgen wrote an unknown form".into()))?;
    let signature = keys.sign(key, parts.to_be_signed).await?;
    Ok(parts.assemble(&signature))
}

/// Whether what is signed with the key of `authority` names it byte for byte, without which no verifier finds it (RFC 5280 §6.1.3):
/// rcgen writes names anew.
pub(super) fn is_named_exactly(authority: &CertificateDer<'_>, public: &PublicKey) -> Result<bool, IssuerError> {
    let subject = SubjectKey::read(&public.spki, public.key_type)?;
    let issuer = rcgen::Issuer::from_ca_cert_der(authority, Unsigned::new(public)?).map_err(encoding)?;
    let signed = CertificateParams::default().signed_by(&subject, &issuer).map_err(encoding)?;
    let (_, signed) = X509Certificate::from_der(signed.der()).map_err(encoding)?;
    let (_, authority) = X509Certificate::from_der(authority).map_err(encoding)?;
    Ok(signed.issuer().as_raw() == authority.subject().as_raw())
}

/// A certificate, a CRL or a request whose signature is empty: `SEQUENCE { to be signed, signatureAlgorithm, BIT STRING }` (RFC 5280 §4.1 and
/// §5.1, RFC 2986 §4.2).
struct UnsignedParts<'a> {
    to_be_signed: &'a [u8],
    algorithm: &'a [u8],
}

impl<'a> UnsignedParts<'a> {
    /// A BIT STRING of no bits.
    const NO_SIGNATURE: &'static [u8] = &[0x03, 0x01, 0x00];

    fn of(der: &'a [u8]) -> Option<Self> {
        let (content, _) = Header::from_der(der).ok()?;
        let (after_header, to_be_signed) = Header::from_der(content).ok()?;
        let length = content.len() - after_header.len() + to_be_signed.length().definite().ok()?;
        let (to_be_signed, rest) = content.split_at_checked(length)?;
        Some(Self { to_be_signed, algorithm: rest.strip_suffix(Self::NO_SIGNATURE)? })
    }

    fn assemble(&self, signature: &[u8]) -> Vec<u8> {
        let mut bits = Vec::with_capacity(signature.len() + 8);
        push_header(&mut bits, 0x03, signature.len() + 1);
        bits.push(0);
        bits.extend_from_slice(signature);
        let length = self.to_be_signed.len() + self.algorithm.len() + bits.len();
        let mut der = Vec::with_capacity(length + 8);
        push_header(&mut der, 0x30, length);
        der.extend_from_slice(self.to_be_signed);
        der.extend_from_slice(self.algorithm);
        der.extend_from_slice(&bits);
        der
    }
}

/// A DER tag and length (X.690 §10.1: in the fewest bytes).
fn push_header(der: &mut Vec<u8>, tag: u8, length: usize) {
    der.push(tag);
    let bytes = length.to_be_bytes();
    let used = &bytes[bytes.iter().take_while(|byte| **byte == 0).count()..];
    match used {
        [] => der.push(0),
        [short @ 0..=0x7f] => der.push(*short),
        long => {
            // At most 8 bytes of length, so the sum fits.
            der.push(0x80 | u8::try_from(long.len()).unwrap_or(8));
            der.extend_from_slice(long);
        }
    }
}

/// A key that rcgen may name as the signer's, and that signs nothing.
struct Unsigned {
    algorithm: &'static SignatureAlgorithm,
    public: Vec<u8>,
}

impl Unsigned {
    fn new(public: &PublicKey) -> Result<Self, IssuerError> {
        let SubjectKey { algorithm, public } = SubjectKey::read(&public.spki, public.key_type)?;
        Ok(Self { algorithm, public: public.to_vec() })
    }
}

impl PublicKeyData for Unsigned {
    fn der_bytes(&self) -> &[u8] {
        &self.public
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        self.algorithm
    }
}

impl SigningKey for Unsigned {
    fn sign(&self, _: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        Ok(Vec::new())
    }
}

/// A public key that a certificate is issued for.
pub(super) struct SubjectKey<'a> {
    algorithm: &'static SignatureAlgorithm,
    /// The content of the `SubjectPublicKeyInfo`'s bit string.
    public: &'a [u8],
}

impl<'a> SubjectKey<'a> {
    pub(super) fn read(spki: &'a [u8], key_type: KeyType) -> Result<Self, IssuerError> {
        // rcgen names a key by the algorithm of its signatures; of RSA's, each writes the same rsaEncryption.
        let algorithm = match key_type {
            KeyType::EcdsaP256 => &rcgen::PKCS_ECDSA_P256_SHA256,
            KeyType::EcdsaP384 => &rcgen::PKCS_ECDSA_P384_SHA384,
            KeyType::Ed25519 => &rcgen::PKCS_ED25519,
            KeyType::Rsa2048 | KeyType::Rsa3072 | KeyType::Rsa4096 => &rcgen::PKCS_RSA_SHA256,
            other => return Err(IssuerError::Encoding(format!("keys of type {other} are not supported"))),
        };
        let (_, parsed) =
            x509_parser::x509::SubjectPublicKeyInfo::from_der(spki).map_err(|error| IssuerError::Encoding(error.to_string()))?;
        // Copied from `spki` only as a reference: the parser keeps the bits where they lie.
        let public = match parsed.subject_public_key.data {
            std::borrow::Cow::Borrowed(bits) => bits,
            std::borrow::Cow::Owned(_) => return Err(IssuerError::Encoding("the public key lies elsewhere".into())),
        };
        Ok(Self { algorithm, public })
    }
}

impl PublicKeyData for SubjectKey<'_> {
    fn der_bytes(&self) -> &[u8] {
        self.public
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        self.algorithm
    }
}

/// From [`BACKDATE`] before `now` to `lifetime` after it, in whole seconds, within `bounds`.
pub(super) fn validity(
    now: OffsetDateTime,
    lifetime: Duration,
    bounds: (OffsetDateTime, OffsetDateTime),
) -> (OffsetDateTime, OffsetDateTime) {
    let now = now.replace_nanosecond(0).unwrap_or(now);
    let after = time::Duration::try_from(lifetime).ok().and_then(|lifetime| now.checked_add(lifetime));
    let before = now.checked_sub(time::Duration::seconds_f64(BACKDATE.as_secs_f64()));
    (before.map_or(bounds.0, |before| before.max(bounds.0)), after.map_or(bounds.1, |after| after.min(bounds.1)))
}

/// Whether the certificate says what was asked for, and nothing that the standard forbids.
fn check(
    certificate: &CertificateDer<'_>,
    leaf: &LeafRequest<'_>,
    serial: Serial,
    (not_before, not_after): (OffsetDateTime, OffsetDateTime),
) -> Result<LeafFacts, String> {
    let facts = profile::check_leaf_of(certificate, leaf.public_key).map_err(|error| error.to_string())?;
    let said = facts.id == *leaf.id && facts.serial == serial && facts.dns_names == leaf.dns_names;
    if said && (facts.not_before, facts.not_after) == (not_before, not_after) {
        return Ok(facts);
    }
    let wanted = LeafFacts { id: leaf.id.clone(), serial, not_before, not_after, dns_names: leaf.dns_names.to_vec() };
    Err(format!("it says {facts:?} instead of {wanted:?}"))
}

/// The first half of a certificate's fingerprint.
pub fn short_id(certificate: &CertificateDer<'_>) -> [u8; 16] {
    let Fingerprint(whole) = Fingerprint::of(certificate);
    let mut half = [0; 16];
    half.copy_from_slice(&whole[..16]);
    half
}

/// The public key of a certificate, DER.
pub(super) fn public_key_of(certificate: &CertificateDer<'_>) -> Result<Vec<u8>, String> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|error| error.to_string())?;
    Ok(parsed.public_key().raw.to_vec())
}

/// The subject key identifier of a certificate.
fn key_identifier_of(certificate: &CertificateDer<'_>) -> Result<Vec<u8>, IssuerError> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(encoding)?;
    let found = parsed.iter_extensions().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::SubjectKeyIdentifier(identifier) => Some(identifier.0.to_vec()),
        _ => None,
    });
    found.ok_or_else(|| IssuerError::Encoding("the issuing certificate has no subject key identifier".into()))
}

/// The common name of a certificate's subject; empty if it has none.
pub(super) fn common_name_of(certificate: &CertificateDer<'_>) -> String {
    let Ok((_, parsed)) = X509Certificate::from_der(certificate) else { return String::new() };
    let name = parsed.subject().iter_common_name().next();
    name.and_then(|name| name.as_str().ok()).unwrap_or_default().to_owned()
}

fn encoding(error: impl std::fmt::Display) -> IssuerError {
    IssuerError::Encoding(error.to_string())
}

impl std::fmt::Debug for Issuer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Issuer").field("key", &self.signer.key).field("not_after", &self.not_after).finish_non_exhaustive()
    }
}
