//! Whether a chain leads to a trust anchor: one place for what the agent checks before it serves a certificate and what TLS checks of a
//! peer, so that the two never differ.

use std::time::Duration;

use rustls_pki_types::{CertificateDer, UnixTime};
use time::OffsetDateTime;
use webpki::{EndEntityCert, KeyUsage, RevocationOptions};

use crate::profile::check_authority;
use crate::{Crl, SpiffeId, SvidError};

/// The longest chain that is looked at, leaf and root included.
pub(crate) const MAX_CHAIN: usize = 8;

/// Which end of a connection the leaf is for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Role {
    Server,
    Client,
}

/// Whether `now` lies within the validity of `id`'s certificate, both ends included.
pub(crate) fn check_dates(
    id: &SpiffeId,
    not_before: OffsetDateTime,
    not_after: OffsetDateTime,
    now: OffsetDateTime,
) -> Result<(), SvidError> {
    if now < not_before {
        return Err(SvidError::NotYetValid { id: id.clone(), not_before });
    }
    if now > not_after {
        return Err(SvidError::Expired { id: id.clone(), not_after });
    }
    Ok(())
}

/// Verifies the chain of `leaf` against `anchors` at `now`, and that `crl` does not revoke the leaf. The leaf must have passed [`crate::profile::check_leaf`].
///
/// # Errors
/// A sentence that says what is wrong.
pub(crate) fn verify<'a, 'b: 'a>(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    anchors: impl IntoIterator<Item = &'a CertificateDer<'b>>,
    crl: Option<&Crl>,
    now: OffsetDateTime,
    role: Role,
) -> Result<(), String> {
    if intermediates.len() >= MAX_CHAIN {
        return Err(format!("the chain has {} certificates; at most {MAX_CHAIN} are looked at", intermediates.len() + 1));
    }
    let anchors = anchors.into_iter().map(|authority| webpki::anchor_from_trusted_cert(authority));
    let anchors = anchors.collect::<Result<Vec<_>, _>>().map_err(describe)?;
    let leaf = EndEntityCert::try_from(leaf).map_err(describe)?;
    let now = u64::try_from(now.unix_timestamp()).map_err(|_| "the clock says a time before 1970")?;
    let usage = match role {
        Role::Server => KeyUsage::server_auth(),
        Role::Client => KeyUsage::client_auth(),
    };
    let now = UnixTime::since_unix_epoch(Duration::from_secs(now));
    let verify = |revocation: Option<RevocationOptions<'_>>| {
        let path = leaf
            .verify_for_usage(webpki::ALL_VERIFICATION_ALGS, &anchors, intermediates, now, usage, revocation, None)
            .map_err(describe)?;
        // webpki does not look at an intermediate's key usage.
        for intermediate in path.intermediate_certificates() {
            check_authority(&intermediate.der()).map_err(|error| format!("a certificate of the chain may not issue: {error}"))?;
        }
        Ok(())
    };
    match crl {
        Some(crl) => crl.with_options(verify),
        None => verify(None),
    }
}

fn describe(error: webpki::Error) -> String {
    match error {
        webpki::Error::UnknownIssuer => "none of the bundle's authorities has issued it".into(),
        webpki::Error::CertExpired { .. } => "a certificate of the chain has expired".into(),
        webpki::Error::CertNotValidYet { .. } => "a certificate of the chain is not valid yet".into(),
        webpki::Error::InvalidSignatureForPublicKey => "a signature of the chain does not verify".into(),
        webpki::Error::CertRevoked => "it was revoked".into(),
        other => other.to_string(),
    }
}
