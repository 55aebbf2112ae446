//! Offline verification of Kubernetes service-account tokens: signature, issuer, audience, times and the claims of a bound token.
//!
//! A [`VerifiedToken`] can only come out of [`TokenKeys::verify`]; whatever needs an attested caller takes one. The token's own text is
//! not in it.

use time::OffsetDateTime;
use uuid::Uuid;

/// The longest token that is read, in bytes.
pub const MAX_TOKEN_BYTES: usize = 16 * 1024;
/// How far the issuer's clock may be ahead of ours.
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
    /// `alg` is none of RS256, ES256, ES384, ES512 (ES512 only where the provider can).
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
    jwks: String,
}

impl TokenKeys {
    /// Reads a JWKS (RFC 7517). Keys of an unknown kind or use are passed over (§5).
    ///
    /// # Errors
    /// If it is no JWKS, or has no usable key.
    pub fn from_jwks(_cluster: &str, _issuer: &str, _jwks: &str) -> Result<Self, TokenError> {
        unimplemented!()
    }

    /// Verifies `token` at `now`. It must be for one of `audiences`.
    ///
    /// # Errors
    /// The first rule that it breaks, signature before claims: a token whose signature was not verified tells nothing.
    pub fn verify(&self, _token: &str, _audiences: &[String], _now: OffsetDateTime) -> Result<VerifiedToken, TokenError> {
        unimplemented!()
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

    /// How many usable keys.
    pub fn len(&self) -> usize {
        unimplemented!()
    }

    /// Never: a value that exists has a key.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
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
