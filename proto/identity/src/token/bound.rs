//! From the claims of a token whose signature was verified to what they prove.

use time::OffsetDateTime;
use uuid::Uuid;

use crate::token::claims::{Claims, Object};
use crate::token::{LEEWAY, ObjectRef, TokenError, VerifiedToken, shortened};

/// The longest `jti`, in bytes. Kubernetes uses UUIDs; the ledger keeps it.
const MAX_TOKEN_ID_BYTES: usize = 128;
/// The longest object name (RFC 1123 subdomain), in bytes.
const MAX_NAME_BYTES: usize = 253;
/// The longest namespace (RFC 1123 label), in bytes.
const MAX_LABEL_BYTES: usize = 63;

/// What tokens of a cluster must say.
pub(super) struct Expected<'a> {
    pub(super) cluster: &'a str,
    pub(super) issuer: &'a str,
    pub(super) audiences: &'a [String],
    pub(super) now: OffsetDateTime,
}

pub(super) fn check(claims: Claims, expected: &Expected<'_>) -> Result<VerifiedToken, TokenError> {
    let issuer = claims.iss.ok_or(TokenError::MissingClaim("iss"))?;
    if issuer != expected.issuer {
        return Err(TokenError::Issuer { found: shortened(&issuer), expected: expected.issuer.to_owned() });
    }
    if !claims.aud.iter().any(|audience| expected.audiences.contains(audience)) {
        let found = claims.aud.iter().take(8).map(|audience| shortened(audience)).collect();
        return Err(TokenError::Audience { found, expected: expected.audiences.to_vec() });
    }
    let (issued_at, expires_at) = check_times(claims.exp, claims.nbf, claims.iat, expected.now)?;

    let kubernetes = claims.kubernetes.ok_or(TokenError::MissingClaim("kubernetes.io"))?;
    let namespace = kubernetes.namespace.ok_or(TokenError::MissingClaim("kubernetes.io.namespace"))?;
    check_namespace(&namespace)?;
    let service_account = object(kubernetes.serviceaccount, &SERVICE_ACCOUNT)?;
    let subject = claims.sub.ok_or(TokenError::MissingClaim("sub"))?;
    if subject != format!("system:serviceaccount:{namespace}:{}", service_account.name) {
        return Err(TokenError::Claim {
            claim: "sub",
            problem: format!("{:?} is not the service account it is bound to", shortened(&subject)),
        });
    }
    let pod = object(kubernetes.pod, &POD)?;
    let node = object(kubernetes.node, &NODE)?;
    let token_id = claims.jti.filter(|id| !id.is_empty()).ok_or(TokenError::MissingClaim("jti"))?;
    if token_id.len() > MAX_TOKEN_ID_BYTES || !token_id.bytes().all(|byte| byte.is_ascii_graphic()) {
        let problem =
            format!("{:?} is longer than {MAX_TOKEN_ID_BYTES} characters, or has others than printable ASCII", shortened(&token_id));
        return Err(TokenError::Claim { claim: "jti", problem });
    }
    Ok(VerifiedToken { cluster: expected.cluster.to_owned(), namespace, service_account, pod, node, token_id, issued_at, expires_at })
}

/// `exp` has no leeway: a token may be refused early, never accepted late.
fn check_times(
    exp: Option<i64>,
    nbf: Option<i64>,
    iat: Option<i64>,
    now: OffsetDateTime,
) -> Result<(OffsetDateTime, OffsetDateTime), TokenError> {
    let expires_at = moment("exp", exp.ok_or(TokenError::MissingClaim("exp"))?)?;
    let issued_at = moment("iat", iat.ok_or(TokenError::MissingClaim("iat"))?)?;
    let not_before = nbf.map(|seconds| moment("nbf", seconds)).transpose()?;
    if now >= expires_at {
        return Err(TokenError::Expired(expires_at));
    }
    let begins = not_before.map_or(issued_at, |not_before| not_before.max(issued_at));
    if now.saturating_add(LEEWAY) < begins {
        return Err(TokenError::NotYetValid(begins));
    }
    Ok((issued_at, expires_at))
}

fn moment(claim: &'static str, seconds: i64) -> Result<OffsetDateTime, TokenError> {
    OffsetDateTime::from_unix_timestamp(seconds)
        .map_err(|_| TokenError::Claim { claim, problem: format!("{seconds} seconds since 1970 is no time") })
}

/// How errors call the parts of a bound object.
struct ObjectClaims {
    whole: &'static str,
    name: &'static str,
    uid: &'static str,
}

const SERVICE_ACCOUNT: ObjectClaims = ObjectClaims {
    whole: "kubernetes.io.serviceaccount",
    name: "kubernetes.io.serviceaccount.name",
    uid: "kubernetes.io.serviceaccount.uid",
};
const POD: ObjectClaims = ObjectClaims { whole: "kubernetes.io.pod", name: "kubernetes.io.pod.name", uid: "kubernetes.io.pod.uid" };
const NODE: ObjectClaims = ObjectClaims { whole: "kubernetes.io.node", name: "kubernetes.io.node.name", uid: "kubernetes.io.node.uid" };

fn object(object: Option<Object>, claims: &ObjectClaims) -> Result<ObjectRef, TokenError> {
    let object = object.ok_or(TokenError::MissingClaim(claims.whole))?;
    let name = object.name.ok_or(TokenError::MissingClaim(claims.name))?;
    let uid = object.uid.ok_or(TokenError::MissingClaim(claims.uid))?;
    if name.len() > MAX_NAME_BYTES || !name.split('.').all(is_label) {
        let problem = format!("{:?} is no Kubernetes name (a DNS-1123 subdomain)", shortened(&name));
        return Err(TokenError::Claim { claim: claims.name, problem });
    }
    let uid =
        Uuid::parse_str(&uid).map_err(|_| TokenError::Claim { claim: claims.uid, problem: format!("{:?} is no UUID", shortened(&uid)) })?;
    Ok(ObjectRef { name, uid })
}

fn check_namespace(namespace: &str) -> Result<(), TokenError> {
    if namespace.len() > MAX_LABEL_BYTES || !is_label(namespace) {
        let problem = format!("{:?} is no namespace (a DNS-1123 label)", shortened(namespace));
        return Err(TokenError::Claim { claim: "kubernetes.io.namespace", problem });
    }
    Ok(())
}

/// Of RFC 1123, in lower case as Kubernetes has it. So no name can leave its segment of a SPIFFE ID.
fn is_label(text: &str) -> bool {
    !text.is_empty()
        && text.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'))
        && !text.starts_with('-')
        && !text.ends_with('-')
}
