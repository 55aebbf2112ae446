//! A CA with its agents, whose reports are made by hand.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use bytes::Bytes;
use chancery_identity::SpiffeId;
use chancery_identity::csr::{self, KeyType, VerifiedCsr};
use chancery_proto::chancery::v1::{Convergence, Hello, ProxyLag, Report};
use time::Duration as Span;
use uuid::Uuid;

use crate::authority::testing::{Run, TestCa};
use crate::authority::{AuthorityError, LeafRequest};
use crate::fleet::{Member, Session};
use crate::ledger::Issuance;
use crate::ledger::entry::{IssueReason, Provenance, Role};
use crate::rotation::*;

pub(super) const WHY: &str = "a test";
pub(super) const CERTIFICATE: Span = Span::hours(1);

/// What every certificate is asked for with.
static REQUEST: LazyLock<VerifiedCsr> = LazyLock::new(|| {
    let (request, _) = csr::generate(KeyType::EcdsaP256, None).unwrap();
    VerifiedCsr::from_der(&request).unwrap()
});

/// A certificate that was recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Certificate {
    pub(super) entry: u64,
    pub(super) root: Fingerprint,
    /// That signed it.
    pub(super) issuer: [u8; 16],
    pub(super) from: OffsetDateTime,
    pub(super) until: OffsetDateTime,
}

/// One that is not recorded yet.
pub(super) struct Signed {
    /// That it was signed under.
    pub(super) epoch: u64,
    issuance: Issuance,
    certificate: Certificate,
}

/// A CA with agents, of which each speaks for one pod with one proxy.
pub(super) struct World {
    pub(super) ca: TestCa,
    pub(super) run: Run,
    pub(super) fleet: Arc<Fleet>,
    pub(super) rotation: Rotation,
    pub(super) sessions: BTreeMap<u128, Session>,
    /// The entries of each agent's own certificate, and of its pod's.
    pub(super) entries: BTreeMap<u128, (u64, u64)>,
}

impl World {
    pub(super) async fn new(agents: u128) -> Self {
        let mut world = Self::of(TestCa::new()).await;
        for agent in 1..=agents {
            world.issue(agent).await;
            world.report(agent);
        }
        world
    }

    /// Without agents.
    pub(super) async fn of(ca: TestCa) -> Self {
        let run = ca.start().await;
        let fleet = Fleet::new(ca.clock.clone());
        let rotation = Self::rotation(&ca, &run, &fleet);
        Self { ca, run, fleet, rotation, sessions: BTreeMap::new(), entries: BTreeMap::new() }
    }

    pub(super) fn rotation(ca: &TestCa, run: &Run, fleet: &Arc<Fleet>) -> Rotation {
        Rotation::new(run.ledger.clone(), Arc::clone(&run.authority), Arc::clone(fleet), Settings::default(), ca.clock.clone())
    }

    /// The CA is killed and started again; nobody has reported since.
    pub(super) async fn restart(self) -> Self {
        self.try_restart().await.unwrap()
    }

    pub(super) async fn try_restart(mut self) -> Result<Self, AuthorityError> {
        let World { ca, run, .. } = self;
        drop(run);
        drop(self.rotation);
        self.sessions.clear();
        let run = ca.try_start(|keys| keys).await?;
        let fleet = Fleet::new(ca.clock.clone());
        let rotation = Self::rotation(&ca, &run, &fleet);
        Ok(Self { ca, run, fleet, rotation, sessions: BTreeMap::new(), entries: self.entries })
    }

    /// Certificates of an agent and of its pod, as issuance records them.
    pub(super) async fn issue(&mut self, agent: u128) {
        let svid = self.leaf(agent, IssueReason::Join).await;
        let pod = self.leaf(agent, IssueReason::First).await;
        self.entries.insert(agent, (svid, pod));
    }

    pub(super) async fn leaf(&self, agent: u128, reason: IssueReason) -> u64 {
        let pod = (reason != IssueReason::Join).then_some(agent);
        self.record(self.sign(agent, pod).await.unwrap()).await.unwrap().entry
    }

    /// A certificate of an agent, or of a pod there, which is not recorded yet.
    pub(super) async fn sign(&self, agent: u128, pod: Option<u128>) -> Result<Signed, Box<dyn std::error::Error>> {
        let state = self.run.ledger.current_state();
        let issuer = self.run.authority.issuer_in(&state).await?;
        let id = if pod.is_none() { id(agent) } else { "spiffe://example.org/ns/shop/sa/cart".parse().unwrap() };
        let leaf = LeafRequest {
            id: &id,
            dns_names: &[],
            public_key: &REQUEST.public_key,
            key_type: REQUEST.key_type,
            lifetime: CERTIFICATE.unsigned_abs(),
        };
        let leaf = issuer.issue(&leaf, self.ca.clock.now()).await?;
        let issuance = Issuance {
            certificate: Bytes::copy_from_slice(&leaf.certificate),
            issuing_certificate: issuer.certificate_id(),
            root: issuer.root_id(),
            role: Role::Agent,
            reason: if pod.is_none() { IssueReason::Join } else { IssueReason::First },
            cluster: "east".into(),
            node: format!("node-{agent}"),
            node_uid: Some(Uuid::from_u128(agent)),
            namespace: "shop".into(),
            service_account: "cart".into(),
            service_account_uid: None,
            pod: format!("cart-{}", pod.unwrap_or(agent)),
            pod_uid: pod.map(Uuid::from_u128),
            token_id: String::new(),
            request_id: Uuid::new_v4(),
            trust_sequence: 0,
            sidecar_pod_uid: None,
            provenance: Provenance::Issued,
        };
        let (from, until) = (leaf.facts.not_before, leaf.facts.not_after);
        let certificate = Certificate { entry: 0, root: issuer.root_fingerprint(), issuer: issuer.certificate_id(), from, until };
        Ok(Signed { epoch: state.epoch, issuance, certificate })
    }

    /// Records it under the epoch that it was signed under.
    pub(super) async fn record(&self, signed: Signed) -> Result<Certificate, LedgerError> {
        let Signed { epoch, issuance, certificate } = signed;
        let entries = self.run.ledger.append_all_at(epoch, vec![issuance.into()]).await?;
        Ok(Certificate { entry: entries[0], ..certificate })
    }

    /// The agent and its proxy have everything that there is.
    pub(super) fn report(&mut self, agent: u128) {
        self.report_as(agent, |_| ());
    }

    pub(super) fn report_as(&mut self, agent: u128, spoil: impl FnOnce(&mut Report)) {
        let (svid_entry, certificate_entry) = self.entries[&agent];
        let sequence = self.run.authority.trust().borrow().sequence;
        let convergence = Convergence {
            trust_sequence: sequence,
            certificate_entry,
            holders: 1,
            pods: vec![Uuid::from_u128(agent).into_bytes().to_vec()],
            pods_version: 1,
            svid_entry,
            ..Convergence::default()
        };
        let clock_ms = i64::try_from(self.ca.clock.now().unix_timestamp_nanos() / 1_000_000).unwrap();
        let mut report = Report { clock_ms, trust_sequence: sequence, workloads: 1, convergence: Some(convergence), ..Report::default() };
        spoil(&mut report);
        self.attach(agent, report);
    }

    /// An agent connects, and says that of itself.
    pub(super) fn attach(&mut self, agent: u128, report: Report) {
        let member = Member {
            id: id(agent),
            cluster: "east".into(),
            node: format!("node-{agent}"),
            svid_not_after: self.ca.clock.now() + CERTIFICATE,
        };
        let session = self.fleet.attach(member, &Hello { report: Some(report), ..Hello::default() }).unwrap();
        self.sessions.insert(agent, session);
    }

    /// Everybody has everything, with new certificates.
    pub(super) async fn everybody_renews(&mut self) {
        for agent in self.entries.keys().copied().collect::<Vec<_>>() {
            self.issue(agent).await;
            self.report(agent);
        }
    }

    pub(super) fn everybody_reports(&mut self) {
        for agent in self.entries.keys().copied().collect::<Vec<_>>() {
            self.report(agent);
        }
    }

    pub(super) async fn go(&self, to: RootState) -> Result<Done, RotationError> {
        self.go_with(to, &Overrides::default()).await
    }

    pub(super) async fn go_with(&self, to: RootState, overrides: &Overrides) -> Result<Done, RotationError> {
        let order = Order { actor: "local:uid=0", why: WHY, overrides };
        match to {
            RootState::Prepared => self.rotation.prepare(order.actor, WHY).await,
            RootState::Published => self.rotation.publish(None, order).await,
            RootState::Active => self.rotation.activate(None, order).await,
            _ => self.rotation.retire(None, order).await,
        }
    }

    /// With a published root that everybody has.
    pub(super) async fn published(agents: u128) -> Self {
        let mut world = Self::new(agents).await;
        world.go(RootState::Prepared).await.unwrap();
        world.go(RootState::Published).await.unwrap();
        world.everybody_reports();
        world
    }

    /// With another active root than everybody's certificates chain to.
    pub(super) async fn activated(agents: u128) -> Self {
        let world = Self::published(agents).await;
        world.go(RootState::Active).await.unwrap();
        world
    }

    pub(super) async fn pass(&self, time: Span) {
        self.ca.clock.advance(time);
        tokio::time::advance(time.unsigned_abs()).await;
    }

    pub(super) fn state_of(&self, root: Fingerprint) -> RootState {
        self.run.ledger.current_state().roots[&root].state
    }

    pub(super) async fn distrust(&self, root: Fingerprint, deadline: Duration) -> Done {
        let order = Order { actor: "local:uid=0", why: WHY, overrides: &Overrides::default() };
        self.rotation.distrust(&root.to_string(), deadline, order).await.unwrap()
    }

    pub(super) fn is_trusted(&self, root: Fingerprint) -> bool {
        let trust = self.run.authority.trust().borrow().clone();
        trust.own().x509_authorities().iter().any(|authority| Fingerprint::of(authority) == root)
    }
}

pub(super) fn id(agent: u128) -> SpiffeId {
    format!("spiffe://example.org/chancery/agent/east/{}", Uuid::from_u128(agent)).parse().unwrap()
}

/// What the gate says, which is not open.
pub(super) fn refused(result: Result<Done, RotationError>) -> String {
    match result.unwrap_err() {
        RotationError::Gate(gate) => gate.to_string(),
        error => panic!("{error}"),
    }
}

pub(super) fn lag(report: &mut Report, lag: ProxyLag) {
    report.lagging = vec![ProxyLag { pod: "shop/cart-2".into(), proxy: "cart~2".into(), ..lag }];
    report.lagging_total = 1;
}
