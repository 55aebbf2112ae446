//! What may happen; what must never come of it is in [`checks`].

mod checks;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use chancery_identity::{Clock, Fingerprint};
use time::{Duration as Span, OffsetDateTime};
use uuid::Uuid;
use x509_parser::asn1_rs::FromDer;
use x509_parser::certificate::X509Certificate;

use self::checks::Issuing;
use super::mesh::{Agent, Bundle, Pod, Proxy, is_alive};
use crate::authority::testing::{Commits, MemoryStore, TestCa};
use crate::keys::{FileKeyManager, KeyManager};
use crate::ledger::acts::{Change, Overrides, RootState, Subject};
use crate::rotation::tests::world::{Certificate, Signed, WHY, World};
use crate::rotation::{Gate, Order, Settings};

/// As many agents.
const AGENTS: u128 = 2;
/// So many pods of an agent, and proxies of a pod.
const MOST: usize = 3;
/// How long a proxy that has its bundle from elsewhere may wait for the newest.
const ELSEWHERE: Span = Span::minutes(10);
/// A deadline that does not come.
const FOR_EVER: Duration = Duration::from_secs(3650 * 24 * 3600);
/// How far a wrong clock is ahead.
const AHEAD: Span = Span::DAY;
/// No certificate lives longer; agents' own do so long.
const LONGEST: Span = Span::DAY;

/// Something that happens. Numbers are taken modulo what there is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Op {
    /// The next transition of a rotation is asked for.
    Step(Fault),
    /// The active root is distrusted, with all the time in the world.
    Distrust,
    /// The CA looks what is due.
    WalkOn(Fault),
    /// The CA is killed, and starts again.
    Kill,
    /// It is restored from a backup that has all but what was recorded behind the newest act.
    Restore,
    /// For a while there is room on the CA's disk for acts alone.
    DiskFull(bool),
    /// The keys of a root that is published are gone.
    LoseKeys,
    /// An agent goes away, and comes back.
    Connect(usize, bool),
    /// A connected agent takes over the newest trust state.
    Sync(usize),
    /// An agent asks for a certificate for itself or one of its pods; the answer may be lost.
    Issue(usize, Option<usize>, bool),
    /// The same for a pod, but that the record is made later, and then the answer goes its way.
    Sign(usize, usize),
    Record,
    /// A proxy is given what its agent has.
    Give(usize, usize, usize),
    /// Its agent hears what it has.
    Hear(usize, usize, usize),
    Report(usize),
    /// Everything of an agent's, in the order in which it should come.
    Settle(usize),
    SettleAll,
    RestartAgent(usize),
    LoseState(usize),
    NewPod(usize),
    DeletePod(usize, usize),
    /// What a pod holds is revoked.
    Revoke(usize, usize),
    /// It may have its bundle from elsewhere.
    NewProxy(usize, usize, bool),
    Nack(usize, usize, usize, bool),
    Pass(Span),
    /// The CA's clock is set a day ahead, or right.
    Clock(bool),
}

/// What else happens in the midst of it, with the CA's next commits but so many.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fault {
    None,
    Kill(usize),
    Full(usize),
}

/// What is taken out, to see what it is there for.
#[derive(Clone, Copy)]
pub(super) struct Without {
    /// Of the gates.
    pub(super) obstacles: fn(&mut Gate),
    /// The ledger's gate: certificates that were signed under an older epoch are recorded all the same.
    pub(super) epoch: bool,
    /// The wait of issuing certificates until their CRLs are with everybody.
    pub(super) crls: bool,
}

impl Without {
    pub(super) const NOTHING: Self = Self { obstacles: |_| (), epoch: false, crls: false };
}

/// How far a game has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Reached {
    pub(super) activated: usize,
    pub(super) retired: usize,
    pub(super) distrusted: usize,
    pub(super) refused: usize,
}

pub(super) struct Play {
    world: Option<World>,
    agents: Vec<Agent>,
    /// How far the CA's clock is ahead.
    ahead: Span,
    signed: Option<(usize, usize, Signed)>,
    /// What the CA has published, and when.
    published: Vec<(OffsetDateTime, Bundle)>,
    without: Without,
    /// Those that have signed, the last one by its ID, and what is known of each.
    issuing: (Option<[u8; 16]>, BTreeMap<[u8; 16], Issuing>),
    /// Roots whose distrust has begun.
    begun: BTreeSet<Fingerprint>,
    /// A root was distrusted: since then others are active that not everybody has.
    distrusting: bool,
    pods_ever: u128,
    pub(super) reached: Reached,
}

impl Play {
    pub(super) async fn new(without: Without) -> Self {
        let world = World::of(TestCa::in_memory()).await;
        let agents = (1..=AGENTS).map(Agent::new).collect();
        let mut play = Self {
            world: Some(world),
            agents,
            ahead: Span::ZERO,
            signed: None,
            published: Vec::new(),
            without,
            issuing: (None, BTreeMap::new()),
            begun: BTreeSet::new(),
            distrusting: false,
            pods_ever: 1000,
            reached: Reached::default(),
        };
        play.prepare();
        play.note_published();
        play.settle_all().await;
        play
    }

    /// One after the other, until something is wrong.
    pub(super) async fn all(&mut self, ops: &[Op]) -> Result<(), String> {
        for (number, op) in ops.iter().enumerate() {
            let after = |wrong| format!("after {op:?}, number {number}: {wrong}");
            self.one(*op).await.map_err(after)?;
            self.note_published();
            self.note_issuing();
            self.check_distrusts().map_err(after)?;
            self.check().await.map_err(after)?;
        }
        self.reached.distrusted = self.world().run.ledger.current_state().distrusted().count();
        Ok(())
    }

    async fn one(&mut self, op: Op) -> Result<(), String> {
        match op {
            Op::Step(fault) => self.step(fault).await?,
            Op::Distrust => {
                let world = self.world();
                let active = world.run.authority.root_fingerprint().to_string();
                let order = Order { actor: "local:uid=0", why: WHY, overrides: &Overrides::default() };
                // With no room on the disk it does not even begin.
                drop(world.rotation.distrust(&active, FOR_EVER, order).await);
                self.distrusting = true;
            }
            Op::WalkOn(fault) => {
                self.with_fault(fault, async |world| drop(world.rotation.walk_on().await)).await?;
            }
            Op::Kill => self.kill().await?,
            Op::Restore => self.restore().await?,
            Op::DiskFull(full) => self.world().ca.store.set_commits(if full { Commits::ActsOnly } else { Commits::Work }),
            Op::LoseKeys => self.lose_keys().await?,
            Op::Connect(agent, back) => {
                let agent = agent % self.agents.len();
                if back { self.connect(agent) } else { self.disconnect(agent) }
            }
            Op::Sync(agent) => self.sync(agent % self.agents.len()),
            Op::Issue(agent, pod, lost) => {
                let agent = agent % self.agents.len();
                let pod = pod.map(|pod| pod % self.agents[agent].pods.len());
                self.issue(agent, pod, lost).await;
            }
            Op::Sign(agent, pod) => {
                let (agent, pod, _) = self.find(agent, pod, 0);
                let signed = self.sign(agent, Some(pod)).await;
                self.signed = signed.map(|signed| (agent, pod, signed));
            }
            Op::Record => {
                if let Some((agent, pod, signed)) = self.signed.take() {
                    self.record(agent, Some(pod), signed, false).await;
                    self.hand_on(agent, pod);
                    self.report(agent);
                }
            }
            Op::Give(agent, pod, proxy) => {
                let (agent, pod, proxy) = self.find(agent, pod, proxy);
                let now = self.now();
                self.agents[agent].give(pod, proxy, now);
            }
            Op::Hear(agent, pod, proxy) => {
                let (agent, pod, proxy) = self.find(agent, pod, proxy);
                self.agents[agent].hear(pod, proxy);
            }
            Op::Report(agent) => self.report(agent % self.agents.len()),
            Op::Settle(agent) => self.settle(agent % self.agents.len()).await,
            Op::SettleAll => self.settle_all().await,
            Op::RestartAgent(agent) => {
                let agent = agent % self.agents.len();
                self.disconnect(agent);
                self.agents[agent].restart();
            }
            Op::LoseState(agent) => {
                let agent = agent % self.agents.len();
                self.disconnect(agent);
                self.agents[agent].lose_state();
            }
            Op::NewPod(agent) => {
                let agent = agent % self.agents.len();
                if self.agents[agent].pods.len() < MOST {
                    self.pods_ever += 1;
                    self.agents[agent].pods.push(Pod::new(self.pods_ever));
                }
            }
            Op::DeletePod(agent, pod) => {
                let (agent, pod, _) = self.find(agent, pod, 0);
                self.agents[agent].pods[pod].deleted = true;
            }
            Op::Revoke(agent, pod) => {
                let (agent, pod, _) = self.find(agent, pod, 0);
                let subject = Subject::Pod(Uuid::from_u128(self.agents[agent].pods[pod].number));
                // With no room on the disk it is not revoked.
                drop(self.world().run.authority.revoke("local:uid=0", subject, WHY).await);
            }
            Op::NewProxy(agent, pod, elsewhere) => {
                let (agent, pod, _) = self.find(agent, pod, 0);
                let bundle = if elsewhere { self.trusted().without_crl() } else { Bundle::default() };
                let proxies = &mut self.agents[agent].pods[pod].proxies;
                if proxies.len() < MOST {
                    proxies.push(Proxy { bundle, elsewhere, ..Proxy::default() });
                }
            }
            Op::Nack(agent, pod, proxy, nacks) => {
                let (agent, pod, proxy) = self.find(agent, pod, proxy);
                self.agents[agent].pods[pod].proxies[proxy].nacks = nacks;
            }
            Op::Pass(time) => self.pass(time).await,
            Op::Clock(ahead) => {
                let ahead = if ahead { AHEAD } else { Span::ZERO };
                self.world().ca.clock.advance(ahead - self.ahead);
                self.ahead = ahead;
            }
        }
        Ok(())
    }

    async fn step(&mut self, fault: Fault) -> Result<(), String> {
        let state = self.world().run.ledger.current_state();
        let is = |to: RootState| state.roots.values().any(|root| root.state == to);
        let to = match () {
            () if is(RootState::Draining) => RootState::Retired,
            () if is(RootState::Published) => RootState::Active,
            () if is(RootState::Prepared) => RootState::Published,
            () => RootState::Prepared,
        };
        self.with_fault(fault, async |world| drop(world.go(to).await)).await?;
        let after = self.world().run.ledger.current_state();
        match to {
            _ if after.roots == state.roots => self.reached.refused += 1,
            RootState::Active => self.reached.activated += 1,
            RootState::Retired => self.reached.retired += 1,
            _ => {}
        }
        Ok(())
    }

    /// Does something, during which the CA may be killed, or its disk be full for a moment.
    async fn with_fault(&mut self, fault: Fault, does: impl AsyncFn(&World)) -> Result<(), String> {
        let world = self.world();
        let store = &world.ca.store;
        match fault {
            Fault::None => {
                does(world).await;
                return Ok(());
            }
            Fault::Kill(next) => store.set_commits_after(next, Commits::Hang),
            Fault::Full(next) => store.set_commits_after(next, Commits::Full),
        }
        tokio::select! {
            () = store.hangs() => {}
            () = does(world) => {}
        }
        if let Fault::Kill(_) = fault {
            return self.kill().await;
        }
        self.world().ca.store.set_commits(Commits::Work);
        Ok(())
    }

    async fn kill(&mut self) -> Result<(), String> {
        self.kill_and(|_| ()).await
    }

    async fn restore(&mut self) -> Result<(), String> {
        self.kill_and(MemoryStore::cut_behind_acts).await?;
        self.excuse_all();
        let world = self.world();
        let restored = Change::Restored {
            entries: world.ca.store.len() as u64,
            roots_kept_until: world.ca.clock.now() + LONGEST,
            trust_floor: world.run.ledger.current_state().trust_floor() + 1000,
            epoch: world.run.ledger.epoch(),
        };
        world.run.ledger.act("local:uid=0", restored, WHY).await.map(drop).map_err(|error| error.to_string())
    }

    /// Between its end and its next start something happens to what it has recorded.
    async fn kill_and(&mut self, happens: impl FnOnce(&MemoryStore)) -> Result<(), String> {
        let world = self.world.take().unwrap();
        world.ca.store.set_commits(Commits::Hang);
        // Whatever is under way comes as far as its next commit.
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        world.ca.store.set_commits(Commits::Work);
        happens(&world.ca.store);
        self.world = Some(world.try_restart().await.map_err(|error| format!("nothing can be issued: {error}"))?);
        self.prepare();
        self.signed = None;
        for agent in &mut self.agents {
            agent.connected = false;
        }
        Ok(())
    }

    /// But for the active root's.
    async fn lose_keys(&mut self) -> Result<(), String> {
        let run = &self.world().run;
        if !run.ledger.current_state().roots.values().any(|root| root.state == RootState::Published) {
            return Ok(());
        }
        let issuer = run.authority.issuer();
        let kept = [issuer.root(), issuer.certificate()].map(|of| X509Certificate::from_der(of).unwrap().1.public_key().raw.to_vec());
        let keys = FileKeyManager::open(run.directory.keys()).unwrap();
        for name in keys.list().await.unwrap() {
            if !kept.contains(&keys.public_key(&name).await.unwrap().spki) {
                keys.destroy(&name).await.unwrap();
            }
        }
        self.kill().await?;
        self.excuse_all();
        Ok(())
    }

    fn connect(&mut self, agent: usize) {
        let now = self.now();
        let (newest, agent) = (self.trusted(), &mut self.agents[agent]);
        // It comes back from a newer bundle file, and joins anew.
        if agent.certificate.is_none_or(|own| !is_alive(&own, now)) && newest.sequence > agent.bundle.sequence {
            agent.bundle = newest;
        }
        agent.connected = true;
    }

    fn disconnect(&mut self, agent: usize) {
        let number = self.agents[agent].number;
        self.agents[agent].connected = false;
        self.world_mut().sessions.remove(&number);
    }

    fn sync(&mut self, agent: usize) {
        let newest = self.trusted();
        let agent = &mut self.agents[agent];
        if agent.connected && newest.sequence > agent.bundle.sequence {
            agent.bundle = newest;
        }
    }

    fn report(&mut self, agent: usize) {
        let now = self.now();
        let (number, connected, report) = (self.agents[agent].number, self.agents[agent].connected, self.agents[agent].report(now));
        if connected {
            self.world_mut().attach(number, report);
        }
    }

    async fn issue(&mut self, agent: usize, pod: Option<usize>, lost: bool) {
        if let Some(signed) = self.sign(agent, pod).await {
            self.record(agent, pod, signed, lost).await;
        }
    }

    /// A pod's, only if the agent has one itself.
    async fn sign(&self, agent: usize, pod: Option<usize>) -> Option<Signed> {
        let of = &self.agents[agent];
        let may = of.connected && (pod.is_none() || of.certificate.is_some_and(|own| is_alive(&own, self.now())));
        let number = pod.map(|pod| &of.pods[pod]).map(|pod| (!pod.deleted).then_some(pod.number));
        if !may || number == Some(None) {
            return None;
        }
        self.world().sign(of.number, number.flatten()).await.ok()
    }

    async fn record(&mut self, agent: usize, pod: Option<usize>, mut signed: Signed, lost: bool) {
        self.note_issuing();
        if self.without.epoch {
            signed.epoch = self.world().run.ledger.epoch();
        }
        let now = self.now();
        if let Ok(certificate) = self.world().record(signed).await
            && !lost
        {
            self.agents[agent].take(pod, certificate, now);
        }
    }

    async fn settle(&mut self, agent: usize) {
        self.connect(agent);
        self.sync(agent);
        let now = self.now();
        let active = self.world().run.ledger.current_state().active_root();
        // Due from half of its life on, and while a root drains.
        let is_due = |held: Option<Certificate>| {
            held.is_none_or(|held| held.from + (held.until - held.from) / 2 <= now || Some(held.root) != active)
        };
        if is_due(self.agents[agent].certificate) {
            self.issue(agent, None, false).await;
        }
        for pod in 0..self.agents[agent].pods.len() {
            if is_due(self.agents[agent].pods[pod].certificate) {
                self.issue(agent, Some(pod), false).await;
            }
            self.hand_on(agent, pod);
        }
        self.report(agent);
    }

    /// The proxies of a pod take what there is.
    fn hand_on(&mut self, agent: usize, pod: usize) {
        let now = self.now();
        for proxy in 0..self.agents[agent].pods[pod].proxies.len() {
            self.agents[agent].give(pod, proxy, now);
            self.agents[agent].hear(pod, proxy);
        }
    }

    async fn settle_all(&mut self) {
        for agent in 0..self.agents.len() {
            self.settle(agent).await;
        }
    }

    async fn pass(&mut self, time: Span) {
        self.world().pass(time).await;
        let elsewhere = self.now() - ELSEWHERE;
        let arrived = self.published.iter().rev().find(|(since, _)| *since <= elsewhere);
        if let Some((_, bundle)) = arrived {
            let proxies = self.agents.iter_mut().flat_map(|agent| &mut agent.pods).flat_map(|pod| &mut pod.proxies);
            for proxy in proxies.filter(|proxy| proxy.elsewhere && proxy.bundle.sequence < bundle.sequence) {
                proxy.bundle = bundle.clone().without_crl();
            }
        }
    }

    fn note_published(&mut self) {
        let (now, newest) = (self.now(), self.trusted());
        if self.published.last().is_none_or(|(_, known)| *known != newest) {
            self.published.push((now, newest));
        }
    }

    /// Of a new run.
    fn prepare(&mut self) {
        let Without { obstacles, crls, .. } = self.without;
        let world = self.world_mut();
        (world.rotation.omit, world.rotation.without_crls) = (obstacles, crls);
        world.rotation.configure(Settings { keep_replacement: Some(true), ..Settings::default() });
    }

    fn trusted(&self) -> Bundle {
        let trust = self.world().run.authority.trust().borrow().clone();
        let roots = trust.own().x509_authorities().iter().map(Fingerprint::of).collect();
        Bundle { sequence: trust.sequence, roots, crl: trust.crl.clone() }
    }

    fn find(&self, agent: usize, pod: usize, proxy: usize) -> (usize, usize, usize) {
        let agent = agent % self.agents.len();
        let pod = pod % self.agents[agent].pods.len();
        (agent, pod, proxy % self.agents[agent].pods[pod].proxies.len())
    }

    /// By a clock that is right.
    fn now(&self) -> OffsetDateTime {
        self.world().ca.clock.now() - self.ahead
    }

    fn world(&self) -> &World {
        self.world.as_ref().unwrap()
    }

    fn world_mut(&mut self) -> &mut World {
        self.world.as_mut().unwrap()
    }
}
