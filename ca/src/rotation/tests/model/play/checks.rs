//! What must never come of what happens.

use chancery_identity::{Clock, Fingerprint};
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use x509_parser::asn1_rs::FromDer;
use x509_parser::certificate::X509Certificate;

use super::Play;
use crate::ledger::acts::{RootState, State};
use crate::rotation::tests::model::mesh::Bundle;
use crate::rotation::tests::world::Certificate;

/// An issuing certificate that has signed.
pub(super) struct Issuing {
    certificate: CertificateDer<'static>,
    until: (OffsetDateTime, OffsetDateTime),
    /// Its CRL is not to be asked for: it could not wait for it since the one before came to its end, or its key or its record was lost.
    excused: bool,
}

impl Issuing {
    /// As the CA looks at it.
    fn is_near_end(&self, now: OffsetDateTime) -> bool {
        let (from, until) = self.until;
        now >= until - (until - from) / 8 || now < from
    }
}

impl Play {
    /// What must hold at any time.
    pub(super) async fn check(&self) -> Result<(), String> {
        let world = self.world();
        let now = self.now();
        let holders: Vec<_> = self.agents.iter().flat_map(|agent| agent.holders(now)).collect();
        let live = holders.iter().map(|(who, certificate, _)| (&**who, certificate.root));
        let live = live.chain(self.presented_by_the_ca(now).map(|root| ("the CA", root)));
        let ca = ("the CA".to_owned(), self.trusted());
        let counted = || holders.iter().map(|(who, _, bundle)| (who, *bundle)).chain([(&ca.0, &ca.1)]);
        let state = world.run.ledger.current_state();
        self.check_crls(&holders)?;
        for (whose, root) in live {
            let gone = [RootState::Retired, RootState::Distrusted];
            if state.roots.get(&root).is_some_and(|root| gone.contains(&root.state)) {
                return Err(format!("{whose} presents a certificate under {root}, which is gone"));
            }
            if self.distrusting {
                continue;
            }
            if let Some((who, bundle)) = counted().find(|(_, bundle)| !bundle.has(root)) {
                return Err(format!("{whose} presents a certificate under {root}, and {who} trusts {bundle:?}"));
            }
        }
        match world.run.authority.issuer_in(&state).await {
            Ok(issuer) if Some(issuer.root_fingerprint()) == state.active_root() => Ok(()),
            Ok(_) => Err("the active root signs nothing".to_owned()),
            // The next tick makes what the disk had no room for.
            Err(error) if error.to_string().contains("by order of the test") => Ok(()),
            Err(error) => Err(format!("nothing can be issued: {error}")),
        }
    }

    /// Whoever has CRLs refuses whoever's issuing certificate they do not speak for.
    fn check_crls(&self, holders: &[(String, Certificate, &Bundle)]) -> Result<(), String> {
        if self.distrusting {
            return Ok(());
        }
        for (whose, certificate, _) in holders {
            let Some(issuing) = self.issuing.1.get(&certificate.issuer).filter(|issuing| !issuing.excused) else { continue };
            let refuses = |bundle: &Bundle| bundle.crl.as_ref().is_some_and(|crl| !crl.speaks_for(&issuing.certificate));
            if let Some((who, ..)) = holders.iter().find(|(_, _, bundle)| refuses(bundle)) {
                return Err(format!("the CRLs of {who} do not speak for what issued the certificate of {whose}"));
            }
        }
        Ok(())
    }

    /// A distrust that has begun ends in no other way.
    pub(super) fn check_distrusts(&mut self) -> Result<(), String> {
        let state: std::sync::Arc<State> = self.world().run.ledger.current_state();
        self.begun.extend(state.roots.iter().filter(|(_, root)| root.leave_by.is_some()).map(|(root, _)| *root));
        let is_so =
            |root: &&Fingerprint| state.roots.get(root).is_some_and(|at| at.leave_by.is_some() || at.state == RootState::Distrusted);
        match self.begun.iter().find(|root| !is_so(root)) {
            Some(root) => Err(format!("the distrust of {root} has begun, and it is {:?}", state.roots.get(root))),
            None => Ok(()),
        }
    }

    /// What signs now, if it is another than before.
    pub(super) fn note_issuing(&mut self) {
        let issuer = self.world().run.authority.issuer();
        let (id, until) = (issuer.certificate_id(), (issuer.not_before(), issuer.not_after()));
        let now = self.world().ca.clock.now();
        let before = self.issuing.0.replace(id).and_then(|before| self.issuing.1.get(&before));
        let excused = before.is_some_and(|before| before.is_near_end(now));
        self.issuing.1.entry(id).or_insert(Issuing { certificate: issuer.certificate().clone(), until, excused });
    }

    /// Any may be lost, and what signs now may have had to at once.
    pub(super) fn excuse_all(&mut self) {
        self.note_issuing();
        for issuing in self.issuing.1.values_mut() {
            issuing.excused = true;
        }
    }

    /// The root of the CA's own server certificate, if that is alive.
    fn presented_by_the_ca(&self, now: OffsetDateTime) -> Option<Fingerprint> {
        let server = self.world().run.authority.server_certificate().load_full();
        let (_, leaf) = X509Certificate::from_der(server.cert.first()?).unwrap();
        (leaf.validity().not_after.to_datetime() > now).then(|| server.cert.last().map(Fingerprint::of))?
    }
}
