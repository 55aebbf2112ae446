//! What the agent trusts: which trust state it takes over, and what it starts from.
//!
//! Trust starts from a bundle file or a root's fingerprint, never from nothing. Once the CA's trust state is remembered, that alone counts,
//! and it only ever grows: a smaller sequence is refused, and so is a root that was distrusted once. A bundle file is heard again only
//! if it carries a larger sequence than what is remembered, in a line `# sequence: 17` before the certificates.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use chancery_identity::tls::ServerTrust;
use chancery_identity::{Crl, Fingerprint, TrustBundle, TrustDomain, TrustState};
use chancery_proto::chancery::v1 as wire;
use rustls_pki_types::CertificateDer;

use super::CaError;

/// What the first contact is verified with.
#[derive(Clone, Debug)]
pub enum Anchor {
    /// PEM certificates; read at each attempt to connect.
    BundleFile(PathBuf),
    /// The CA sends its root in the handshake.
    RootFingerprint(Fingerprint),
}

impl Anchor {
    /// Whether trust can start from it now.
    ///
    /// # Errors
    /// If the file cannot be read or is no bundle of `own`.
    pub fn check(&self, own: &TrustDomain) -> Result<(), CaError> {
        server_trust(None, self, own).map(|_| ())
    }
}

/// Why a trust state was not taken over; a stable word for metrics is [`Refusal::reason`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It is older than what the agent has.
    #[error(
        "its sequence {offered} is smaller than {known}, which the agent already has; if the CA was set back on purpose, run `chancery-agent reset`"
    )]
    Older {
        /// In the offer.
        offered: u64,
        /// In memory.
        known: u64,
    },
    /// Two states with one sequence.
    #[error("it differs from the one that the agent has although both have the sequence {0}")]
    Fork(u64),
    /// For another trust domain.
    #[error("it is for the trust domain {found}; this agent is of {expected}")]
    TrustDomain {
        /// In the offer.
        found: TrustDomain,
        /// Configured.
        expected: TrustDomain,
    },
    /// A root that must never come back.
    #[error("it contains the root {0}, which was distrusted")]
    Distrusted(Fingerprint),
}

impl Refusal {
    /// A stable word for metrics.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Older { .. } => "older",
            Self::Fork(_) => "fork",
            Self::TrustDomain { .. } => "trust_domain",
            Self::Distrusted(_) => "distrusted",
        }
    }
}

/// Decides on an offered trust state: the state to hold from now on, or `None` if it is the one already held.
pub(super) fn accept(known: Option<&TrustState>, mut offered: TrustState, own: &TrustDomain) -> Result<Option<TrustState>, Refusal> {
    if offered.trust_domain != *own {
        return Err(Refusal::TrustDomain { found: offered.trust_domain, expected: own.clone() });
    }
    if let Some(known) = known {
        // What was distrusted once stays so, whatever the offer says.
        let forgotten: Vec<Fingerprint> = known.distrusted.iter().filter(|root| !offered.distrusted.contains(root)).copied().collect();
        offered.distrusted.extend(forgotten);
        if offered.sequence < known.sequence {
            return Err(Refusal::Older { offered: offered.sequence, known: known.sequence });
        }
        if offered.sequence == known.sequence {
            return if offered == *known { Ok(None) } else { Err(Refusal::Fork(known.sequence)) };
        }
    }
    let returned = roots(&offered).find(|root| offered.distrusted.contains(root));
    returned.map_or(Ok(Some(offered)), |root| Err(Refusal::Distrusted(root)))
}

/// Whether `new` lacks an authority of its own trust domain that `old` has.
pub(super) fn drops_a_root(old: &TrustState, new: &TrustState) -> bool {
    old.own().x509_authorities().iter().any(|root| !new.own().x509_authorities().contains(root))
}

fn roots(state: &TrustState) -> impl Iterator<Item = Fingerprint> {
    state.bundles().flat_map(|bundle| bundle.x509_authorities().iter().map(Fingerprint::of))
}

/// What to verify the CA with now.
pub(super) fn server_trust(known: Option<&TrustState>, anchor: &Anchor, own: &TrustDomain) -> Result<ServerTrust, CaError> {
    let state = match (known, anchor) {
        (None, Anchor::RootFingerprint(root)) => {
            return Ok(ServerTrust::Fingerprint { root: *root, trust_domain: own.clone() });
        }
        (None, Anchor::BundleFile(path)) => read_bundle(path, own)?,
        (Some(known), Anchor::RootFingerprint(_)) => known.clone(),
        (Some(known), Anchor::BundleFile(path)) => match read_bundle(path, own) {
            Ok(file) if file.sequence > known.sequence && !roots(&file).any(|root| known.distrusted.contains(&root)) => file,
            Ok(_) => known.clone(),
            Err(error) => {
                tracing::warn!(%error, "the bundle file is not readable; what the agent remembers counts");
                known.clone()
            }
        },
    };
    Ok(ServerTrust::Bundle(Arc::new(ArcSwap::from_pointee(state))))
}

fn read_bundle(path: &Path, own: &TrustDomain) -> Result<TrustState, CaError> {
    let refuse = |problem: String| CaError::BundleFile { path: path.to_owned(), problem };
    let pem = std::fs::read(path).map_err(|e| refuse(e.to_string()))?;
    let bundle = TrustBundle::from_pem(own.clone(), &pem).map_err(|e| refuse(e.to_string()))?;
    TrustState::new(sequence_line(&pem), own.clone(), [bundle]).map_err(|e| refuse(e.to_string()))
}

/// The number in a line `# sequence: N`; 0 if there is none.
fn sequence_line(pem: &[u8]) -> u64 {
    String::from_utf8_lossy(pem)
        .lines()
        .find_map(|line| line.strip_prefix('#')?.trim().strip_prefix("sequence:")?.trim().parse().ok())
        .unwrap_or(0)
}

/// Reads a trust state as the CA sends it.
///
/// # Errors
/// If a bundle is empty, or a name or fingerprint is none.
pub fn from_wire(message: wire::TrustState) -> Result<TrustState, CaError> {
    let bundles = message.bundles.into_iter().map(bundle_from_wire).collect::<Result<Vec<_>, _>>()?;
    let mut state = TrustState::new(message.sequence, trust_domain(&message.trust_domain)?, bundles)?;
    // Checked here: a proxy would take CRLs that cannot be read, and refuse everybody.
    state.crl = if message.crl.is_empty() { None } else { Some(Crl::from_pem(message.crl)?) };
    state.distrusted = message
        .distrusted
        .iter()
        .map(|bytes| <[u8; 32]>::try_from(bytes.as_slice()).map(Fingerprint))
        .collect::<Result<_, _>>()
        .map_err(|_| CaError::Answer("a fingerprint of a distrusted root has not 32 bytes".into()))?;
    Ok(state)
}

/// A trust state as the CA sends it, for the state file.
pub fn to_wire(state: &TrustState) -> wire::TrustState {
    wire::TrustState {
        sequence: state.sequence,
        trust_domain: state.trust_domain.to_string(),
        bundles: state.bundles().map(bundle_to_wire).collect(),
        crl: state.crl.as_ref().map(|crl| crl.pem().to_vec()).unwrap_or_default(),
        distrusted: state.distrusted.iter().map(|root| root.0.to_vec()).collect(),
    }
}

fn bundle_from_wire(message: wire::TrustBundle) -> Result<TrustBundle, CaError> {
    let authorities = message.x509_authorities.into_iter().map(CertificateDer::from).collect();
    let hint = (message.refresh_hint_seconds > 0).then(|| Duration::from_secs(message.refresh_hint_seconds.into()));
    let bundle = TrustBundle::new(trust_domain(&message.trust_domain)?, authorities)?;
    Ok(bundle.with_jwt_authorities(message.jwt_authorities).with_refresh_hint(hint))
}

fn bundle_to_wire(bundle: &TrustBundle) -> wire::TrustBundle {
    wire::TrustBundle {
        trust_domain: bundle.trust_domain().to_string(),
        x509_authorities: bundle.x509_authorities().iter().map(|der| der.to_vec()).collect(),
        jwt_authorities: bundle.jwt_authorities().to_vec(),
        refresh_hint_seconds: bundle.refresh_hint().and_then(|hint| u32::try_from(hint.as_secs()).ok()).unwrap_or(0),
    }
}

fn trust_domain(name: &str) -> Result<TrustDomain, CaError> {
    name.parse().map_err(|e| CaError::Answer(format!("{name:?} is no trust domain: {e}")))
}
