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

use crate::token::JwksError;

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
    broken: Vec<String>,
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
    /// Reads a JWKS. Keys that this module cannot use are passed over (RFC 7517 §5); those of a kind and use that it could are told by
    /// [`Keyset::broken`].
    pub(super) fn read(jwks: &str) -> Result<Self, JwksError> {
        if jwks.len() > MAX_JWKS_BYTES {
            return Err(JwksError(format!("the JWKS has {} bytes; at most {MAX_JWKS_BYTES} are read", jwks.len())));
        }
        let Jwks { keys } = serde_json::from_str(jwks).map_err(|error| JwksError(format!("they are no JWKS: {error}")))?;
        if keys.len() > MAX_KEYS {
            return Err(JwksError(format!("the JWKS has {} keys; at most {MAX_KEYS} are read", keys.len())));
        }
        let (mut usable, mut broken) = (Vec::new(), Vec::new());
        for (number, key) in keys.into_iter().enumerate() {
            let kid = key.get("kid").and_then(serde_json::Value::as_str).map(|kid| format!(" (kid {kid:?})")).unwrap_or_default();
            let read = serde_json::from_value::<Jwk>(key).map_err(|error| format!("it is no JWK: {error}"));
            match read.and_then(Jwk::usable) {
                Ok(key) => usable.extend(key),
                Err(problem) => broken.push(format!("key {}{kid}: {problem}", number + 1)),
            }
        }
        if usable.is_empty() {
            let mut problem = "the JWKS has no usable key for RS256, ES256, ES384 or ES512".to_owned();
            for broken in broken {
                problem = format!("{problem}; {broken}");
            }
            return Err(JwksError(problem));
        }
        Ok(Self { keys: usable, broken })
    }

    /// A sentence for each key that cannot be what it says it is.
    pub(super) fn broken(&self) -> &[String] {
        &self.broken
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
    /// Nothing for a key of another kind or use.
    fn usable(self) -> Result<Option<Key>, String> {
        let may_verify = self.purpose.as_deref().is_none_or(|purpose| purpose == "sig")
            && self.key_ops.as_ref().is_none_or(|operations| operations.iter().any(|operation| operation == "verify"));
        let algorithm = match (self.kty.as_str(), self.crv.as_deref()) {
            ("RSA", _) => Algorithm::Rs256,
            ("EC", Some("P-256")) => Algorithm::Es256,
            ("EC", Some("P-384")) => Algorithm::Es384,
            ("EC", Some("P-521")) => Algorithm::Es512,
            _ => return Ok(None),
        };
        if !may_verify || self.alg.as_deref().is_some_and(|name| Algorithm::from_name(name) != Some(algorithm)) {
            return Ok(None);
        }
        let public = match algorithm {
            Algorithm::Rs256 => self.rsa()?,
            Algorithm::Es256 => self.point(&ECDSA_P256_SHA256_FIXED, 32)?,
            Algorithm::Es384 => self.point(&ECDSA_P384_SHA384_FIXED, 48)?,
            Algorithm::Es512 => self.point(&ECDSA_P521_SHA512_FIXED, 66)?,
        };
        Ok(Some(Key { kid: self.kid, algorithm, public }))
    }

    fn rsa(&self) -> Result<ParsedPublicKey, String> {
        let [n, e] = [decode("n", self.n.as_deref())?, decode("e", self.e.as_deref())?];
        // Some encoders prepend the sign byte of an ASN.1 integer.
        let [n, e] = [&n, &e].map(|number| number.strip_prefix(&[0]).unwrap_or(number));
        if !(2048 / 8..=8192 / 8).contains(&n.len()) {
            return Err(format!("an RSA key of {} bits; 2048 to 8192 are accepted", n.len() * 8));
        }
        let key = RsaPublicKeyComponents { n, e }.to_parsed_public_key(&RSA_PKCS1_2048_8192_SHA256);
        key.map_err(|_| "its `n` and `e` are no RSA key".to_owned())
    }

    fn point(&self, algorithm: &'static dyn VerificationAlgorithm, coordinate: usize) -> Result<ParsedPublicKey, String> {
        let [x, y] = [decode("x", self.x.as_deref())?, decode("y", self.y.as_deref())?];
        if x.len() != coordinate || y.len() != coordinate {
            return Err(format!("`x` and `y` have {} and {} bytes; on its curve they have {coordinate}", x.len(), y.len()));
        }
        let key = ParsedPublicKey::new(algorithm, [&[4], x.as_slice(), &y].concat());
        key.map_err(|_| "its `x` and `y` are no point on its curve".to_owned())
    }
}

impl fmt::Debug for Keyset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.keys.iter().map(|key| (&key.kid, key.algorithm))).finish()
    }
}

fn decode(name: &str, field: Option<&str>) -> Result<Vec<u8>, String> {
    let field = field.ok_or_else(|| format!("`{name}` is missing"))?;
    URL_SAFE_NO_PAD.decode(field).map_err(|error| format!("`{name}` is no base64url: {error}"))
}
