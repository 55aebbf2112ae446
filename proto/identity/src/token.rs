//! Offline verification of Kubernetes service-account tokens: signature, issuer, audience, times and the claims of a bound token.
//!
//! A [`VerifiedToken`] can only come out of [`TokenKeys::verify`]; whatever needs an attested caller takes one. The token's own text is
//! not in it.

use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::token::bound::Expected;
use crate::token::claims::Claims;
use crate::token::keyset::{Algorithm, Keyset, NotVerified};

mod bound;
pub mod claims;
mod keyset;

/// The longest token that is read, in bytes.
pub const MAX_TOKEN_BYTES: usize = 16 * 1024;
/// How far the issuer's clock may be ahead of ours: how much earlier than `nbf` and `iat` a token is accepted. `exp` has no leeway.
pub const LEEWAY: time::Duration = time::Duration::seconds(10);

/// Why a token was refused. Each has a stable word, [`TokenError::reason`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TokenError {
    /// Over [`MAX_TOKEN_BYTES`].
    #[error("the token has {0} bytes; at most {MAX_TOKEN_BYTES} are read")]
    TooLarge(usize),
    /// No JWT.
    #[error("the token cannot be read: {0}")]
    Malformed(String),
    /// `alg` is none of RS256, ES256, ES384, ES512, or not its key's.
    #[error("the token's algorithm {0} is not allowed")]
    Algorithm(String),
    /// No key of that `kid`: it may be new, so a refetch of the keys may mend it.
    #[error("no key {kid:?} among the keys of cluster {cluster}")]
    UnknownKey {
        /// Whose keys were asked.
        cluster: String,
        /// As in the token's header; empty if it has none.
        kid: String,
    },
    /// The signature does not verify.
    #[error("the token's signature does not verify with the keys of cluster {0}")]
    Signature(String),
    /// Of another issuer.
    #[error("the token was issued by {found:?}, not by {expected:?}")]
    Issuer {
        /// In the token.
        found: String,
        /// In the cluster's configuration.
        expected: String,
    },
    /// For another audience.
    #[error("the token is for the audience {found:?}; one of {expected:?} is required")]
    Audience {
        /// In the token.
        found: Vec<String>,
        /// Accepted.
        expected: Vec<String>,
    },
    /// Past `exp`.
    #[error("the token expired at {0}")]
    Expired(OffsetDateTime),
    /// Before `nbf` or `iat`.
    #[error("the token is not valid before {0}: is a clock wrong?")]
    NotYetValid(OffsetDateTime),
    /// A claim of a bound token is missing.
    #[error("the token has no claim {0}: it must be bound to a pod on a node")]
    MissingClaim(&'static str),
    /// Claims that contradict each other or have an impossible value.
    #[error("the token's claim {claim}: {problem}")]
    Claim {
        /// Which.
        claim: &'static str,
        /// What is wrong with it.
        problem: String,
    },
}

/// Why a JWKS holds no keys for tokens.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the keys cannot be used: {0}")]
pub struct JwksError(String);

/// An object's name and UID.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ObjectRef {
    /// Kubernetes name.
    pub name: String,
    /// Kubernetes UID.
    pub uid: Uuid,
}

/// The claims of a bound service-account token whose signature, issuer, audience and times were verified.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct VerifiedToken {
    /// By whose keys.
    pub cluster: String,
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's service account.
    pub service_account: ObjectRef,
    /// The pod.
    pub pod: ObjectRef,
    /// The pod's node. Kubernetes may leave its UID out; such a token is refused, since an agent's identity is its node's UID.
    pub node: ObjectRef,
    /// `jti`: names the token in the ledger.
    pub token_id: String,
    /// `iat`.
    pub issued_at: OffsetDateTime,
    /// `exp`.
    pub expires_at: OffsetDateTime,
}

/// One cluster's public keys, with what its tokens must say.
#[derive(Clone, Debug)]
pub struct TokenKeys {
    cluster: String,
    issuer: String,
    jwks: Arc<str>,
    keyset: Arc<Keyset>,
}

/// What is read of a JOSE header (RFC 7515 §4.1).
#[derive(Deserialize)]
struct Header {
    alg: String,
    kid: Option<String>,
    crit: Option<serde_json::Value>,
}

impl TokenKeys {
    /// Reads a JWKS (RFC 7517). Keys of an unknown kind or use are passed over (§5).
    ///
    /// # Errors
    /// If it is no JWKS, or has no usable key.
    pub fn from_jwks(cluster: &str, issuer: &str, jwks: &str) -> Result<Self, JwksError> {
        let keyset = Arc::new(Keyset::read(jwks)?);
        Ok(Self { cluster: cluster.to_owned(), issuer: issuer.to_owned(), jwks: jwks.into(), keyset })
    }

    /// Verifies `token` at `now`. It must be for one of `audiences`.
    ///
    /// # Errors
    /// The first rule that it breaks, signature before claims: a token whose signature was not verified tells nothing.
    pub fn verify(&self, token: &str, audiences: &[String], now: OffsetDateTime) -> Result<VerifiedToken, TokenError> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(TokenError::TooLarge(token.len()));
        }
        let payload = self.verify_signature(token)?;
        let claims: Claims = serde_json::from_slice(&decode(payload)?).map_err(|error| {
            // The error's own text may quote the token.
            TokenError::Malformed(format!("its claims are not those of a service-account token, from column {} on", error.column()))
        })?;
        bound::check(claims, &Expected { cluster: &self.cluster, issuer: &self.issuer, audiences, now })
    }

    /// Whether these keys' owner signed `token`, whatever it says.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check_signature(&self, token: &str) -> Result<(), TokenError> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(TokenError::TooLarge(token.len()));
        }
        self.verify_signature(token).map(drop)
    }

    /// Returns the payload, still encoded, of a token in the compact form (RFC 7515 §7.1).
    fn verify_signature<'a>(&self, token: &'a str) -> Result<&'a str, TokenError> {
        let not_three_parts = || TokenError::Malformed("it is not three parts with dots between".into());
        let (message, signature) = token.rsplit_once('.').ok_or_else(not_three_parts)?;
        let (header, payload) = message.split_once('.').filter(|(_, payload)| !payload.contains('.')).ok_or_else(not_three_parts)?;
        let header: Header =
            serde_json::from_slice(&decode(header)?).map_err(|_| TokenError::Malformed("its header is no JOSE header".into()))?;
        let not_allowed = || TokenError::Algorithm(shortened(&header.alg));
        let algorithm = Algorithm::from_name(&header.alg).ok_or_else(not_allowed)?;
        if header.crit.is_some() {
            return Err(TokenError::Malformed("its header demands extensions (`crit`)".into()));
        }
        self.keyset.verify(header.kid.as_deref(), algorithm, message.as_bytes(), &decode(signature)?).map_err(|reason| match reason {
            NotVerified::UnknownKey => {
                TokenError::UnknownKey { cluster: self.cluster.clone(), kid: header.kid.as_deref().map(shortened).unwrap_or_default() }
            }
            NotVerified::OtherAlgorithm => not_allowed(),
            NotVerified::Signature => TokenError::Signature(self.cluster.clone()),
        })?;
        Ok(payload)
    }

    /// Whose keys.
    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    /// What `iss` must be.
    pub fn issuer(&self) -> &str {
        &self.issuer
    }

    /// The JWKS as it was read, to hand on.
    pub fn jwks(&self) -> &str {
        &self.jwks
    }

    /// A sentence for each key that was passed over although its kind and use are known: it is not what it says it is.
    pub fn broken(&self) -> &[String] {
        self.keyset.broken()
    }

    /// How many usable keys.
    pub fn len(&self) -> usize {
        self.keyset.len()
    }

    /// Never: a value that exists has a key.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn decode(part: &str) -> Result<Vec<u8>, TokenError> {
    URL_SAFE_NO_PAD.decode(part).map_err(|_| TokenError::Malformed("a part of it is not base64url".into()))
}

/// As much of a stranger's text as belongs into an error.
fn shortened(text: &str) -> String {
    const MOST: usize = 128;
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

impl TokenError {
    /// A stable word for metrics and refusals.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::TooLarge(_) => "token_too_large",
            Self::Malformed(_) => "token_malformed",
            Self::Algorithm(_) => "token_algorithm",
            Self::UnknownKey { .. } => "token_unknown_key",
            Self::Signature(_) => "token_signature",
            Self::Issuer { .. } => "token_issuer",
            Self::Audience { .. } => "token_audience",
            Self::Expired(_) => "token_expired",
            Self::NotYetValid(_) => "token_not_yet_valid",
            Self::MissingClaim(_) => "token_missing_claim",
            Self::Claim { .. } => "token_claim",
        }
    }
}
