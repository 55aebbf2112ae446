//! What the fleet is told, as messages.

use chancery_identity::{TrustBundle, TrustState};
use chancery_proto::chancery::v1;
use time::OffsetDateTime;

/// The trust state as agents are told it.
pub fn trust_message(trust: &TrustState) -> v1::TrustState {
    v1::TrustState {
        sequence: trust.sequence,
        trust_domain: trust.trust_domain.to_string(),
        bundles: trust.bundles().map(bundle_message).collect(),
        crl: trust.crl.as_ref().map(|crl| crl.pem().to_vec()).unwrap_or_default(),
        distrusted: trust.distrusted.iter().map(|fingerprint| fingerprint.0.to_vec()).collect(),
    }
}

fn bundle_message(bundle: &TrustBundle) -> v1::TrustBundle {
    v1::TrustBundle {
        trust_domain: bundle.trust_domain().to_string(),
        x509_authorities: bundle.x509_authorities().iter().map(|der| der.to_vec()).collect(),
        jwt_authorities: bundle.jwt_authorities().to_vec(),
        refresh_hint_seconds: bundle.refresh_hint().map_or(0, |hint| u32::try_from(hint.as_secs()).unwrap_or(u32::MAX)),
    }
}

/// Unix milliseconds.
pub(super) fn millis(time: OffsetDateTime) -> i64 {
    i64::try_from(time.unix_timestamp_nanos() / 1_000_000).unwrap_or(i64::MAX)
}
