//! Certificates whose entries were lost, recorded again from what their holders say.
//!
//! A log that was restored from a backup, or continues a lost one, may lack what was issued after it. Until the last of these certificates has expired, agents and sidecars tell
//! what they hold. That a certificate is this CA's, its signatures prove; whose pod it is for is the caller's word, and the entry says so
//! ([`Provenance::Recovered`]).

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use chancery_identity::profile::LeafFacts;
use chancery_identity::{Serial, TrustBundle, TrustState, verify_chain};
use chancery_proto::chancery::v1::{AuthorityCertificate, IssueReason};
use rustls_pki_types::CertificateDer;
use uuid::Uuid;

use super::Issuance;
use crate::attestation::{Caller, Holder, RESERVED_SEGMENT};
use crate::authority::short_id;
use crate::ledger::acts::{Applicant, CA_ACTOR, Change, Subject};
use crate::ledger::{Body, Issuance as Entry, LedgerError, Provenance};

/// The most certificates in one call.
pub const MAX_RECOVERED: usize = 128;
/// Longer names are no Kubernetes names (RFC 1123, and `kubectl explain`).
const MAX_NAME: usize = 253;

/// A certificate with whose it is, by its holder's word.
#[derive(Clone, Debug)]
pub struct HeldCertificate {
    /// Leaf first, without the root.
    pub chain: Vec<CertificateDer<'static>>,
    /// The pod's namespace; empty, like what follows, for the holder's own.
    pub namespace: String,
    /// The pod's service account.
    pub service_account: String,
    /// The pod's name.
    pub pod: String,
    /// The pod's UID.
    pub pod_uid: Option<Uuid>,
}

/// The certificates that are being recorded by calls under way: whoever brings one of them meanwhile is passed over.
#[derive(Debug, Default)]
pub(super) struct Recovering(Mutex<HashSet<Serial>>);

/// Those of one call.
struct Taken<'a> {
    of: &'a Recovering,
    serials: Vec<Serial>,
}

/// What is to be recorded.
struct Recovered {
    facts: LeafFacts,
    entry: Entry,
    /// DER.
    issuing_certificate: Vec<u8>,
}

impl Issuance {
    /// Records those of `held` that this CA issued and its ledger lacks; tells how many. Nothing is recorded unless entries may have been lost. Those of
    /// somebody who is kept from certificates are revoked: their own revocation may be recorded already, and is of what was recorded before it.
    ///
    /// # Errors
    /// If the ledger cannot be read or written.
    pub async fn recover(&self, caller: &Caller, held: Vec<HeldCertificate>) -> Result<usize, LedgerError> {
        if self.ledger.current_state().roots_kept_until().is_none_or(|until| self.clock.now() >= until) {
            return Ok(0);
        }
        let authorities = self.ledger.authority_certificates().await?;
        let mut known: HashSet<_> = authorities.into_iter().map(|(_, authority)| authority.certificate).collect();
        let node = self.issued_before(caller).await.map(|before| before.issuance.node).unwrap_or_default();
        let mut taken = Taken { of: &self.recovering, serials: Vec::new() };
        let (mut bodies, mut revoked, mut recovered) = (Vec::new(), Vec::new(), 0);
        for held in held.into_iter().take(MAX_RECOVERED) {
            let Recovered { facts, entry, issuing_certificate } = match self.recovered(caller, &node, held, &mut taken).await? {
                Ok(recovered) => recovered,
                Err(problem) => {
                    tracing::info!(agent = %caller.id(), problem, "a certificate that an agent holds is not recovered");
                    continue;
                }
            };
            if known.insert(issuing_certificate.clone()) {
                bodies.push(Body::Authority(AuthorityCertificate { certificate: issuing_certificate, root: false }));
            }
            revoked.extend(self.kept_back(caller, &facts, &entry));
            bodies.push(Body::from(entry));
            recovered += 1;
        }
        if recovered > 0 {
            self.ledger.append_all(bodies).await?;
            tracing::warn!(agent = %caller.id(), recovered, "certificates that the restored ledger lacks are recorded again");
        }
        for (change, why) in revoked {
            self.ledger.act(CA_ACTOR, change, &why).await?;
        }
        Ok(recovered)
    }

    /// The revocation of a certificate that is to be recovered, if nothing would be issued to whom it is for; and why.
    fn kept_back(&self, caller: &Caller, facts: &LeafFacts, entry: &Entry) -> Option<(Change, String)> {
        let applicant =
            Applicant { spiffe_id: &facts.id, pod_uid: entry.pod_uid, cluster: caller.cluster(), node: &entry.node, agent: caller.id() };
        let obstacle = self.ledger.current_state().obstacle(&applicant)?;
        Some((Change::Revoke { subject: Subject::Serial(facts.serial), until: facts.not_after }, format!("recovered, and {obstacle}")))
    }

    /// What is to be recorded of what is held, or why nothing is.
    async fn recovered(
        &self,
        caller: &Caller,
        node: &str,
        held: HeldCertificate,
        taken: &mut Taken<'_>,
    ) -> Result<Result<Recovered, String>, LedgerError> {
        let HeldCertificate { chain, namespace, service_account, pod, pod_uid } = held;
        let [leaf, issuing] = &chain[..] else { return Ok(Err("its chain has not two certificates".into())) };
        let trust = self.authority.trust().borrow().clone();
        let now = self.clock.now();
        let found = each_root(&trust).find_map(|(root, alone)| Some((root, verify_chain(&chain, &alone, now).ok()?)));
        let Some((root, facts)) = found else { return Ok(Err("it does not lead to a trust root of this CA, or has expired".into())) };
        let own = facts.id == *caller.id();
        if !own && facts.id.segments().next() == Some(RESERVED_SEGMENT) {
            return Ok(Err(format!("{} is another's", facts.id)));
        }
        let (node_uid, sidecar_pod_uid) = match caller.holder() {
            Holder::Agent { node } => (Some(node), None),
            Holder::Sidecar { pod } => (None, Some(pod)),
        };
        if !own && sidecar_pod_uid.is_some() && pod_uid != sidecar_pod_uid {
            return Ok(Err("it is for another pod than the sidecar's".into()));
        }
        if [&namespace, &service_account, &pod].iter().any(|name| name.len() > MAX_NAME) {
            return Ok(Err(format!("a name has more than {MAX_NAME} bytes")));
        }
        if !taken.add(facts.serial) {
            return Ok(Err("it is being recorded already".into()));
        }
        if self.ledger.show(facts.serial).await?.is_some() {
            return Ok(Err("the ledger has it".into()));
        }
        let entry = Entry {
            certificate: Bytes::copy_from_slice(leaf),
            issuing_certificate: short_id(issuing),
            root: short_id(root),
            role: caller.role(),
            reason: IssueReason::Unspecified,
            cluster: caller.cluster().to_owned(),
            node: node.to_owned(),
            node_uid,
            namespace,
            service_account,
            service_account_uid: None,
            pod,
            pod_uid,
            token_id: String::new(),
            request_id: Uuid::nil(),
            trust_sequence: 0,
            sidecar_pod_uid,
            provenance: Provenance::Recovered,
        };
        Ok(Ok(Recovered { facts, entry, issuing_certificate: issuing.to_vec() }))
    }
}

impl Recovering {
    fn serials(&self) -> MutexGuard<'_, HashSet<Serial>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Taken<'_> {
    /// Whether nobody has it.
    fn add(&mut self, serial: Serial) -> bool {
        let is_free = self.of.serials().insert(serial);
        self.serials.extend(is_free.then_some(serial));
        is_free
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let mut serials = self.of.serials();
        for serial in &self.serials {
            serials.remove(serial);
        }
    }
}

/// Each root that is trusted, and a trust state of it alone: so that it is known which one a chain leads to.
fn each_root(trust: &TrustState) -> impl Iterator<Item = (&CertificateDer<'static>, TrustState)> {
    let own = trust.own();
    trust.anchors(own).filter_map(|root| {
        let bundle = TrustBundle::new(own.trust_domain().clone(), vec![root.clone()]).ok()?;
        Some((root, TrustState::new(trust.sequence, own.trust_domain().clone(), [bundle]).ok()?))
    })
}
