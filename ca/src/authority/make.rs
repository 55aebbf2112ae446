//! Makes trust roots and issuing certificates: a key, a certificate, its entry in the ledger, in this order. What is not recorded is not used.

use std::sync::Arc;
use std::time::Duration;

use chancery_identity::csr::KeyType;
use chancery_identity::{Fingerprint, Serial, TrustDomain};
use chancery_proto::chancery::v1::AuthorityCertificate;
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;

use super::held::{ISSUING_KEY, ROOT_KEY, Root};
use super::issuer::{Issuer, IssuerError, Signer, SubjectKey, request, validity};
use super::{AuthorityError, Settings, profiles};
use crate::keys::{KeyManager, PublicKey};
use crate::ledger::{Body, Ledger};

/// What the CA's own certificates are signed with.
const KEY_TYPE: KeyType = KeyType::EcdsaP256;
/// So far a root reaches back, or by an eighth of its life: one that is made in an emergency while the clock is ahead signs all the same once the
/// clock is right again.
const ROOT_BACKDATE: Duration = Duration::from_secs(7 * 24 * 3600);

/// What the CA's own certificates are made with.
#[derive(Debug)]
pub(super) struct Maker {
    pub(super) trust_domain: TrustDomain,
    pub(super) development: bool,
    pub(super) keys: Arc<dyn KeyManager>,
    pub(super) ledger: Ledger,
}

impl Maker {
    pub(super) async fn root(&self, settings: &Settings, now: OffsetDateTime) -> Result<Root, AuthorityError> {
        let (key, public) = self.generate(ROOT_KEY).await?;
        let (not_before, not_after) = validity(now, settings.root_lifetime, (OffsetDateTime::UNIX_EPOCH, now + settings.root_lifetime));
        let validity = (not_before - ROOT_BACKDATE.min(settings.root_lifetime / 8), not_after);
        let params = profiles::root(&self.trust_domain, self.development, Serial::generate()?, validity)?;
        let signer = Signer::of_self(&params, Arc::clone(&self.keys), &key, &public)?;
        let certificate = signer.sign(&params, &SubjectKey::read(&public.spki, public.key_type)?).await?;
        self.record(&certificate, true).await?;
        tracing::info!(fingerprint = %Fingerprint::of(&certificate), "a new trust root was made");
        Root::new(certificate, Some(key))
    }

    /// A new key, and a request (PKCS #10, DER) to a corporate CA that says what a root of this CA says.
    pub(super) async fn request(&self, now: OffsetDateTime) -> Result<Vec<u8>, AuthorityError> {
        let (key, public) = self.generate(ROOT_KEY).await?;
        let mut params = profiles::root(&self.trust_domain, self.development, Serial::generate()?, (now, now))?;
        // The corporate CA chooses it.
        params.serial_number = None;
        Ok(request(&params, &*self.keys, &key, &public).await?)
    }

    pub(super) async fn issuing(&self, root: &Root, settings: &Settings, now: OffsetDateTime) -> Result<Issuer, AuthorityError> {
        if !(root.not_before..root.not_after).contains(&now) {
            return Err(IssuerError::Clock { not_before: root.not_before, not_after: root.not_after, now }.into());
        }
        let root_key = root.key.as_ref().ok_or(AuthorityError::RootKeyMissing { fingerprint: root.fingerprint })?;
        let root_public = self.keys.public_key(root_key).await?;
        let root_signer = Signer::of(&root.certificate, Arc::clone(&self.keys), root_key, &root_public)?;
        let (key, public) = self.generate(ISSUING_KEY).await?;
        let validity = validity(now, settings.issuing_lifetime, (root.not_before, root.not_after));
        let params = profiles::issuing(&self.trust_domain, Serial::generate()?, validity)?;
        let certificate = root_signer.sign(&params, &SubjectKey::read(&public.spki, public.key_type)?).await?;
        let signer = Signer::of(&certificate, Arc::clone(&self.keys), &key, &public)?;
        let issuer = Issuer::new(certificate, root.certificate.clone(), signer)?;
        self.record(issuer.certificate(), false).await?;
        tracing::info!(root = %root.fingerprint, not_after = %issuer.not_after(), "a new issuing certificate was made");
        Ok(issuer)
    }

    /// A key with a name of its own.
    async fn generate(&self, purpose: &str) -> Result<(String, PublicKey), AuthorityError> {
        let Serial(random) = Serial::generate()?;
        let name = format!("{purpose}-{}", hex::encode(&random[..8]));
        let public = self.keys.generate(&name, KEY_TYPE).await?;
        Ok((name, public))
    }

    pub(super) async fn record(&self, certificate: &CertificateDer<'_>, root: bool) -> Result<(), AuthorityError> {
        let certificate = certificate.to_vec();
        self.ledger.append(Body::Authority(AuthorityCertificate { certificate, root })).await?;
        Ok(())
    }
}
