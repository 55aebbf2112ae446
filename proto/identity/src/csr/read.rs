//! Reading a stranger's request: the DER, its key, its signature.

use rustls_pki_types::SignatureVerificationAlgorithm;
use webpki::aws_lc_rs as algorithms;
use x509_parser::asn1_rs::{BitString, Sequence, SerializeResult, Tag, ToDer};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer;
use x509_parser::public_key::PublicKey;
use x509_parser::x509::{AlgorithmIdentifier, SubjectPublicKeyInfo, X509Version};

use crate::csr::asks::asked_names;
use crate::csr::{CsrError, KeyType, MAX_CSR_BYTES, VerifiedCsr};

/// The pairs of key and signature algorithm that are accepted. A curve goes with its own hash only: certificates for a P-384 key that
/// signed with SHA-256 have come out with a broken key elsewhere.
static PAIRS: [&dyn SignatureVerificationAlgorithm; 6] = [
    algorithms::ECDSA_P256_SHA256,
    algorithms::ECDSA_P384_SHA384,
    algorithms::ED25519,
    algorithms::RSA_PKCS1_2048_8192_SHA256,
    algorithms::RSA_PKCS1_2048_8192_SHA384,
    algorithms::RSA_PKCS1_2048_8192_SHA512,
];

pub(super) fn verified(der: &[u8]) -> Result<VerifiedCsr, CsrError> {
    if der.len() > MAX_CSR_BYTES {
        return Err(CsrError::TooLarge(der.len()));
    }
    let (rest, request) = X509CertificationRequest::from_der(der).map_err(|error| CsrError::Malformed(error.to_string()))?;
    if !rest.is_empty() {
        return Err(CsrError::Malformed(format!("{} bytes after its end", rest.len())));
    }
    let info = &request.certification_request_info;
    if info.version != X509Version::V1 {
        return Err(CsrError::Malformed("its version is not 1 (RFC 2986 §4.1)".into()));
    }
    let (key_type, public_key) = accepted_key(&info.subject_pki)?;
    let signature_algorithm = encoded(&request.signature_algorithm);
    let pair = PAIRS
        .iter()
        .filter(|pair| is_canonical(pair, &info.subject_pki))
        .find(|pair| signature_algorithm.as_deref() == Some(pair.signature_alg_id().as_ref()))
        .ok_or_else(|| CsrError::Key(format!("its signature algorithm does not go with a key of type {key_type}")))?;
    let signature: &[u8] = &request.signature_value.data;
    if !enveloped(info.raw, pair.signature_alg_id().as_ref(), signature).is_ok_and(|canonical| canonical == der) {
        return Err(CsrError::Malformed("it is not in DER".into()));
    }
    pair.verify_signature(public_key, info.raw, signature).map_err(|_| CsrError::Signature)?;

    let names = asked_names(info)?;
    Ok(VerifiedCsr { public_key: info.subject_pki.raw.to_vec(), key_type, spiffe_id: names.spiffe_id, dns_names: names.dns_names })
}

/// The DER of a request. The parser tolerates other encodings of what the signature does not cover.
fn enveloped(info: &[u8], signature_algorithm: &[u8], signature: &[u8]) -> SerializeResult<Vec<u8>> {
    let algorithm = Sequence::new(signature_algorithm.into()).to_der_vec()?;
    let signature = BitString::new(0, signature).to_der_vec()?;
    Sequence::new([info, &algorithm, &signature].concat().into()).to_der_vec()
}

/// The key's type, and its `subjectPublicKey`.
fn accepted_key<'a>(key: &'a SubjectPublicKeyInfo<'_>) -> Result<(KeyType, &'a [u8]), CsrError> {
    if !PAIRS.iter().any(|pair| is_canonical(pair, key)) {
        return Err(CsrError::Key("it must be P-256, P-384, Ed25519, or RSA of 2048, 3072 or 4096 bits, in DER".into()));
    }
    let bits: &[u8] = &key.subject_public_key.data;
    let is_ec = key.algorithm.parameters.as_ref().is_some_and(|parameters| parameters.tag() == Tag::Oid);
    let key_type = match (bits.first(), bits.len()) {
        (Some(4), 65) if is_ec => KeyType::EcdsaP256,
        (Some(4), 97) if is_ec => KeyType::EcdsaP384,
        _ if is_ec => return Err(CsrError::Key("the point of an elliptic curve key must be uncompressed".into())),
        (_, 32) => KeyType::Ed25519,
        _ => rsa_type(key)?,
    };
    Ok((key_type, bits))
}

fn rsa_type(key: &SubjectPublicKeyInfo<'_>) -> Result<KeyType, CsrError> {
    let Ok(PublicKey::RSA(rsa)) = key.parsed() else {
        return Err(CsrError::Key("its RSA key cannot be read".into()));
    };
    // Everybody uses 65537; small exponents have been behind forgeries, large ones are slow on purpose.
    if rsa.try_exponent() != Ok(65537) {
        return Err(CsrError::Key("the public exponent of an RSA key must be 65537".into()));
    }
    let modulus = rsa.modulus.strip_prefix(&[0]).unwrap_or(rsa.modulus);
    let unused = modulus.first().map_or(0, |byte| byte.leading_zeros() as usize);
    match modulus.len() * 8 - unused {
        2048 => Ok(KeyType::Rsa2048),
        3072 => Ok(KeyType::Rsa3072),
        4096 => Ok(KeyType::Rsa4096),
        bits => Err(CsrError::Key(format!("an RSA key must have 2048, 3072 or 4096 bits; it has {bits}"))),
    }
}

/// Whether `key` is of the pair's kind and exactly its DER. The parser tolerates other encodings, which must not get into a certificate.
fn is_canonical(pair: &&dyn SignatureVerificationAlgorithm, key: &SubjectPublicKeyInfo<'_>) -> bool {
    let canonical = rustls::sign::public_key_to_spki(&pair.public_key_alg_id(), &key.subject_public_key.data);
    canonical.as_ref() == key.raw
}

/// The content of an `AlgorithmIdentifier` whose parameters are absent or NULL, as [`rustls_pki_types::AlgorithmIdentifier`] has it.
fn encoded(algorithm: &AlgorithmIdentifier<'_>) -> Option<Vec<u8>> {
    let oid = algorithm.algorithm.as_bytes();
    let mut der = vec![0x06, u8::try_from(oid.len()).ok().filter(|length| *length < 0x80)?];
    der.extend_from_slice(oid);
    match &algorithm.parameters {
        None => Some(der),
        Some(parameters) if parameters.tag() == Tag::Null && parameters.data.is_empty() => {
            der.extend_from_slice(&[0x05, 0x00]);
            Some(der)
        }
        Some(_) => None,
    }
}
