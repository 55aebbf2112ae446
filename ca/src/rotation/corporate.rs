//! Roots that a corporate CA signs: asked for, and brought back, by operators. From then on they go the way of every other root.

use chancery_identity::Fingerprint;
use rustls_pki_types::CertificateDer;

use super::{Done, Rotation, RotationError, unknown};
use crate::ledger::acts::RootState;

impl Rotation {
    /// Makes a root that no corporate CA stands above, whoever signed the active one; if such a one is prepared or published, it is that one.
    ///
    /// # Errors
    /// If it cannot be made or recorded.
    pub async fn prepare_own(&self, actor: &str, why: &str) -> Result<Done, RotationError> {
        let before = self.ledger.epoch();
        self.prepared(self.authority.prepare_own_root(actor, why).await?, before)
    }

    /// The request that a corporate CA is to sign the next root for (PKCS #10, DER), and whether it is a new one.
    ///
    /// # Errors
    /// If it cannot be made or recorded.
    pub async fn request(&self, actor: &str, why: &str) -> Result<(Vec<u8>, bool), RotationError> {
        Ok(self.authority.request_root(actor, why).await?)
    }

    /// Prepares the root that a corporate CA answered with; if it is prepared already, or further, nothing changes.
    ///
    /// # Errors
    /// If none of `certificates` has the open request's key, it breaks a rule, or it cannot be recorded.
    pub async fn answer(&self, certificates: Vec<CertificateDer<'static>>, actor: &str, why: &str) -> Result<Done, RotationError> {
        let before = self.ledger.epoch();
        self.prepared(self.authority.answer_root(certificates, actor, why).await?, before)
    }

    /// What preparing `root` came to, if the epoch was `before` then.
    pub(super) fn prepared(&self, root: Fingerprint, before: u64) -> Result<Done, RotationError> {
        let state = self.ledger.current_state();
        let now = *state.roots.get(&root).ok_or_else(|| unknown(&root.to_string(), &state))?;
        Ok(Done { root, now, changed: state.epoch != before && now.state == RootState::Prepared })
    }
}
