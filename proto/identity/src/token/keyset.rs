//! A cluster's public keys: a JWKS (RFC 7517), read once and kept ready for verification.
//!
//! aws-lc-rs verifies directly rather than through `jsonwebtoken`: keys stay parsed between tokens (16 µs instead of 19 µs for RSA-2048), and
//! ES512, which Kubernetes issues, is known.

use std::fmt;

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ECDSA_P521_SHA512_FIXED, ParsedPublicKey, RSA_PKCS1_2048_8192_SHA256,
    RsaPublicKeyComponents, VerificationAlgorithm,
};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;

use crate::token::TokenError;

/// The longest JWKS that is read, in bytes.
const MAX_JWKS_BYTES: usize = 256 * 1024;
/// How many keys are read. A rotation needs two or three.
const MAX_KEYS: usize = 100;

/// What a Kubernetes API server signs with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Algorithm {
    Rs256,
    Es256,
    Es384,
    Es512,
}

/// One key. Its kind decides the algorithm, never the token: an HMAC keyed with the public key, say, cannot be asked for.
struct Key {
    kid: Option<String>,
    algorithm: Algorithm,
    public: ParsedPublicKey,
}

pub(super) struct Keyset {
    keys: Vec<Key>,
}

/// Why no key of a set verified a signature.
pub(super) enum NotVerified {
    /// None has the `kid`, or there is none and several could fit.
    UnknownKey,
    /// Those of that `kid` are for another algorithm.
    OtherAlgorithm,
    /// The signature is wrong.
    Signature,
}

#[derive(Deserialize)]
struct Jwks {
    keys: Vec<serde_json::Value>,
}

#[derive(Deserialize)]
struct Jwk {
    kty: String,
    kid: Option<String>,
    #[serde(rename = "use")]
    purpose: Option<String>,
    key_ops: Option<Vec<String>>,
    alg: Option<String>,
    crv: Option<String>,
    n: Option<String>,
    e: Option<String>,
    x: Option<String>,
    y: Option<String>,
}

impl Algorithm {
    /// From a header's `alg` or a key's.
    pub(super) fn from_name(name: &str) -> Option<Self> {
        match name {
            "RS256" => Some(Self::Rs256),
            "ES256" => Some(Self::Es256),
            "ES384" => Some(Self::Es384),
            "ES512" => Some(Self::Es512),
            _ => None,
        }
    }
}

impl Keyset {
    /// Reads a JWKS. Keys that this module cannot use are passed over (RFC 7517 §5).
    pub(super) fn read(jwks: &str) -> Result<Self, TokenError> {
        if jwks.len() > MAX_JWKS_BYTES {
            return Err(TokenError::Malformed(format!("the JWKS has {} bytes; at most {MAX_JWKS_BYTES} are read", jwks.len())));
        }
        let Jwks { keys } = serde_json::from_str(jwks).map_err(|error| TokenError::Malformed(format!("the keys are no JWKS: {error}")))?;
        if keys.len() > MAX_KEYS {
            return Err(TokenError::Malformed(format!("the JWKS has {} keys; at most {MAX_KEYS} are read", keys.len())));
        }
        let keys: Vec<Key> = keys.into_iter().filter_map(|key| serde_json::from_value::<Jwk>(key).ok().and_then(Jwk::usable)).collect();
        if keys.is_empty() {
            return Err(TokenError::Malformed("the JWKS has no key for RS256, ES256, ES384 or ES512".into()));
        }
        Ok(Self { keys })
    }

    pub(super) fn len(&self) -> usize {
        self.keys.len()
    }

    /// Verifies with the key named by `kid`. Without a `kid`, exactly one key must fit the algorithm: trying several would let a token choose.
    pub(super) fn verify(&self, kid: Option<&str>, algorithm: Algorithm, message: &[u8], signature: &[u8]) -> Result<(), NotVerified> {
        let mut candidates = self.keys.iter().filter(|key| kid.is_none() || key.kid.as_deref() == kid).peekable();
        candidates.peek().ok_or(NotVerified::UnknownKey)?;
        let mut fitting = candidates.filter(|key| key.algorithm == algorithm);
        let key = fitting.next().ok_or(NotVerified::OtherAlgorithm)?;
        if kid.is_none() && fitting.next().is_some() {
            return Err(NotVerified::UnknownKey);
        }
        key.public.verify_sig(message, signature).map_err(|_| NotVerified::Signature)
    }
}

impl Jwk {
    fn usable(self) -> Option<Key> {
        let may_verify = self.purpose.as_deref().is_none_or(|purpose| purpose == "sig")
            && self.key_ops.as_ref().is_none_or(|operations| operations.iter().any(|operation| operation == "verify"));
        if !may_verify {
            return None;
        }
        let (algorithm, public) = match (self.kty.as_str(), self.crv.as_deref()) {
            ("RSA", _) => (Algorithm::Rs256, self.rsa()?),
            ("EC", Some("P-256")) => (Algorithm::Es256, self.point(&ECDSA_P256_SHA256_FIXED, 32)?),
            ("EC", Some("P-384")) => (Algorithm::Es384, self.point(&ECDSA_P384_SHA384_FIXED, 48)?),
            ("EC", Some("P-521")) => (Algorithm::Es512, self.point(&ECDSA_P521_SHA512_FIXED, 66)?),
            _ => return None,
        };
        if self.alg.is_some_and(|name| Algorithm::from_name(&name) != Some(algorithm)) {
            return None;
        }
        Some(Key { kid: self.kid, algorithm, public })
    }

    fn rsa(&self) -> Option<ParsedPublicKey> {
        let [n, e] = [decode(self.n.as_deref())?, decode(self.e.as_deref())?];
        // Some encoders prepend the sign byte of an ASN.1 integer.
        let [n, e] = [&n, &e].map(|number| number.strip_prefix(&[0]).unwrap_or(number));
        if !(2048 / 8..=8192 / 8).contains(&n.len()) {
            return None;
        }
        RsaPublicKeyComponents { n, e }.to_parsed_public_key(&RSA_PKCS1_2048_8192_SHA256).ok()
    }

    fn point(&self, algorithm: &'static dyn VerificationAlgorithm, coordinate: usize) -> Option<ParsedPublicKey> {
        let [x, y] = [decode(self.x.as_deref())?, decode(self.y.as_deref())?];
        if x.len() != coordinate || y.len() != coordinate {
            return None;
        }
        ParsedPublicKey::new(algorithm, [&[4], x.as_slice(), &y].concat()).ok()
    }
}

impl fmt::Debug for Keyset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.keys.iter().map(|key| (&key.kid, key.algorithm))).finish()
    }
}

fn decode(field: Option<&str>) -> Option<Vec<u8>> {
    URL_SAFE_NO_PAD.decode(field?).ok()
}
