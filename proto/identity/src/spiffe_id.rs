//! SPIFFE IDs and trust domains, as the SPIFFE-ID standard has them.

use std::borrow::Borrow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// The longest SPIFFE ID that must be supported, in bytes (SPIFFE-ID §2.3); longer ones are refused.
const MAX_ID_BYTES: usize = 2048;
/// The longest trust domain name, in bytes (SPIFFE-ID §2.1).
const MAX_TRUST_DOMAIN_BYTES: usize = 255;
const SCHEME: &str = "spiffe://";

/// Why a text is no SPIFFE ID or trust domain.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SpiffeIdError {
    /// The scheme is not `spiffe` (SPIFFE-ID §2).
    #[error("a SPIFFE ID begins with `spiffe://`")]
    Scheme,
    /// The trust domain is empty (SPIFFE-ID §2.1).
    #[error("the trust domain is empty")]
    EmptyTrustDomain,
    /// The trust domain has a character that it may not have: userinfo, port and percent-encoding included (SPIFFE-ID §2.1).
    #[error("the trust domain has the character {0:?}; only a-z, 0-9, `.`, `-` and `_` are allowed")]
    TrustDomainCharacter(char),
    /// The trust domain is too long (SPIFFE-ID §2.1).
    #[error("the trust domain is longer than {MAX_TRUST_DOMAIN_BYTES} bytes")]
    TrustDomainTooLong,
    /// A path segment has a character that it may not have: query, fragment and percent-encoding included (SPIFFE-ID §2.2).
    #[error("the path has the character {0:?}; only a-z, A-Z, 0-9, `.`, `-` and `_` are allowed in a segment")]
    PathCharacter(char),
    /// A path segment is empty, or the path ends in `/` (SPIFFE-ID §2.2).
    #[error("the path has an empty segment or ends in `/`")]
    EmptySegment,
    /// A path segment is `.` or `..` (SPIFFE-ID §2.2).
    #[error("the path has the segment `.` or `..`")]
    DotSegment,
    /// The whole is too long (SPIFFE-ID §2.3).
    #[error("longer than {MAX_ID_BYTES} bytes")]
    TooLong,
}

/// The name of a trust domain (SPIFFE-ID §2.1), in lower case.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// The name, without the scheme.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The trust domain's own ID: without a path. Names the domain, never a workload.
    pub fn id(&self) -> SpiffeId {
        SpiffeId { text: format!("{SCHEME}{}", self.0).into(), trust_domain: self.clone() }
    }

    /// The ID of a member: `segments` become the path, one each.
    ///
    /// # Errors
    /// If a segment is empty, `.`, `..` or has a character that it may not have, a `/` included; or if the whole is too long.
    pub fn member<S: AsRef<str>>(&self, segments: impl IntoIterator<Item = S>) -> Result<SpiffeId, SpiffeIdError> {
        let mut text = format!("{SCHEME}{}", self.0);
        for segment in segments {
            check_segment(segment.as_ref())?;
            text.push('/');
            text.push_str(segment.as_ref());
        }
        if text.len() > MAX_ID_BYTES {
            return Err(SpiffeIdError::TooLong);
        }
        Ok(SpiffeId { text: text.into(), trust_domain: self.clone() })
    }
}

impl FromStr for TrustDomain {
    type Err = SpiffeIdError;

    /// Parses a name (`example.org`) or the trust domain's ID (`spiffe://example.org`). Upper case is accepted and lowered (SPIFFE-ID §2.4).
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let name = strip_scheme(text).unwrap_or(text).to_ascii_lowercase();
        if name.is_empty() {
            return Err(SpiffeIdError::EmptyTrustDomain);
        }
        if name.len() > MAX_TRUST_DOMAIN_BYTES {
            return Err(SpiffeIdError::TrustDomainTooLong);
        }
        match name.chars().find(|c| !matches!(c, 'a'..='z' | '0'..='9' | '.' | '-' | '_')) {
            Some(c) => Err(SpiffeIdError::TrustDomainCharacter(c)),
            None => Ok(Self(name.into())),
        }
    }
}

/// A SPIFFE ID (SPIFFE-ID §2): a trust domain and a path, which may be empty.
///
/// Scheme and trust domain compare in lower case, the path as it is (§2.4).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpiffeId {
    text: Arc<str>,
    trust_domain: TrustDomain,
}

impl SpiffeId {
    /// The whole ID as text.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The trust domain it belongs to.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The path with its leading `/`, or nothing.
    pub fn path(&self) -> &str {
        &self.text[SCHEME.len() + self.trust_domain.0.len()..]
    }

    /// The path's segments, in order.
    pub fn segments(&self) -> impl Iterator<Item = &str> {
        self.path().split('/').skip(1)
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() > MAX_ID_BYTES {
            return Err(SpiffeIdError::TooLong);
        }
        let rest = strip_scheme(text).ok_or(SpiffeIdError::Scheme)?;
        let (domain, path) = match rest.find('/') {
            Some(at) => (&rest[..at], Some(&rest[at + 1..])),
            None => (rest, None),
        };
        let trust_domain: TrustDomain = domain.parse()?;
        match path {
            Some(path) => trust_domain.member(path.split('/')),
            None => Ok(trust_domain.id()),
        }
    }
}

fn strip_scheme(text: &str) -> Option<&str> {
    let (scheme, rest) = text.split_at_checked(SCHEME.len())?;
    scheme.eq_ignore_ascii_case(SCHEME).then_some(rest)
}

fn check_segment(segment: &str) -> Result<(), SpiffeIdError> {
    match segment {
        "" => return Err(SpiffeIdError::EmptySegment),
        "." | ".." => return Err(SpiffeIdError::DotSegment),
        _ => {}
    }
    match segment.chars().find(|c| !matches!(c, 'a'..='z' | 'A'..='Z' | '0'..='9' | '.' | '-' | '_')) {
        Some(c) => Err(SpiffeIdError::PathCharacter(c)),
        None => Ok(()),
    }
}

macro_rules! text_value {
    ($type:ident) => {
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
            }
        }
    };
}
text_value!(TrustDomain);
text_value!(SpiffeId);

impl Borrow<str> for TrustDomain {
    fn borrow(&self) -> &str {
        self.as_str()
    }
}
