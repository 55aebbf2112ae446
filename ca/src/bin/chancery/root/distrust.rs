//! `chancery root distrust`: begins it, and watches the CA finish it. Whoever stops watching stops nothing.

use std::io::Write;
use std::time::{Duration, Instant};

use chancery_process::output::{Format, fields};
use chancery_proto::chancery::v1::{
    CheckReachRequest, CheckReachResponse, DistrustRootRequest, ListRootsRequest, ListRootsResponse, MissingRecord, RootRecord, RootState,
};
use clap::Args;
use serde::Serialize;

use super::gate::MissingRow;
use super::patient::Patient;
use crate::client::{CliError, Way};
use crate::output::remark;

/// How often is looked how far it has come.
const LOOK: Duration = Duration::from_millis(100);
/// How long beyond its deadline a root may stay before the command gives up watching.
const PATIENCE: Duration = Duration::from_secs(60);
/// How many who are missing are named.
const NAMED: usize = 20;

#[derive(Debug, Args)]
pub(crate) struct DistrustArgs {
    /// The beginning of its fingerprint, at least 8 digits.
    root: String,
    /// Why: recorded with the act.
    #[arg(long)]
    reason: String,
    /// It leaves the bundles within so long, whoever still needs it; without it, as the configuration says (30 s).
    #[arg(long)]
    deadline: Option<humantime::Duration>,
    /// It leaves the bundles now, at the price of every handshake until the new certificates are there.
    #[arg(long, conflicts_with = "deadline")]
    now: bool,
    /// How long to watch, once it has left, until everybody has a bundle without it and certificates under another. `0s` does not watch.
    #[arg(long, default_value = "10s", value_name = "DURATION")]
    wait: humantime::Duration,
}

/// When each phase was over, counted from the command; nothing for what was not over when it stopped watching.
#[derive(Debug, Default, Serialize)]
struct Finished {
    root: String,
    /// The entry of the act that took it out.
    entry: u64,
    /// Another root was active, and the CA's own certificates under it.
    replaced_ms: Option<u128>,
    /// The last agent had its own certificate under it.
    agents_ms: Option<u128>,
    /// The last workload had one, and its proxies had acknowledged it.
    workloads_ms: Option<u128>,
    /// It was out of the CA's bundle.
    left_ms: Option<u128>,
    /// The last proxy had acknowledged a bundle without it.
    bundles_ms: Option<u128>,
    total_ms: u128,
    /// Who still used a certificate under it when it left.
    missing_total: u64,
    missing: Vec<String>,
    /// Who had not acknowledged a bundle without it at the end.
    behind_total: u64,
    behind: Vec<String>,
    /// Who cannot say what they trust.
    unproven_total: u64,
}

/// A distrust that is under way.
struct Watch {
    begun: Instant,
    /// Certificates up to this entry may be under the root; none if it never was active.
    replaced_by: Option<u64>,
    /// The first trust state without it.
    without: Option<u64>,
    finished: Finished,
}

pub(super) async fn run(way: &Way, args: DistrustArgs, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let mut ca = Patient::connect(way).await?;
    let before = ca.ca.roots.list_roots(ListRootsRequest {}).await?.into_inner();
    let deadline = if args.now { Some(Duration::ZERO) } else { args.deadline.map(Duration::from) };
    let deadline_ms = deadline.map(|deadline| u32::try_from(deadline.as_millis()).unwrap_or(u32::MAX));
    let begun = Instant::now();
    let request = DistrustRootRequest { root: args.root, reason: args.reason, deadline_ms };
    let moved = ca.ca.roots.distrust_root(request).await?.into_inner();
    let root = moved.root.ok_or_else(|| CliError::Failed("the CA did not say which root it is".into()))?;
    let mut watch = Watch { begun, replaced_by: None, without: None, finished: Finished::default() };
    watch.finished.root.clone_from(&root.fingerprint);
    watch.finished.replaced_ms = Some(watch.elapsed());
    if root.state() != RootState::Distrusted {
        remark("another root is active; the old one leaves when nothing needs it any more, or at the deadline");
    }
    watch.begin(&mut ca, &before).await?;
    watch.until_over(&mut ca, Duration::from_millis(root.stays_ms).saturating_add(PATIENCE), *args.wait).await?;
    watch.tell();
    Ok(fields(out, format, &watch.finished)?)
}

impl Watch {
    /// Finds out which certificates are to be replaced, from where the root was before.
    async fn begin(&mut self, ca: &mut Patient<'_>, before: &ListRootsResponse) -> Result<(), CliError> {
        let was = find(before, &self.finished.root)?;
        self.replaced_by = match was.state() {
            RootState::Active => {
                let after = ca.list(self.until(PATIENCE)).await?;
                after.roots.iter().find(|root| root.state() == RootState::Active).map(|root| root.entry)
            }
            RootState::Draining => Some(was.entry),
            _ => None,
        };
        Ok(())
    }

    /// Looks until everything is over, or the root has left and `wait` is over as well.
    async fn until_over(&mut self, ca: &mut Patient<'_>, patience: Duration, wait: Duration) -> Result<(), CliError> {
        let mut left_at = None;
        loop {
            let roots = ca.list(self.until(patience)).await?;
            let root = find(&roots, &self.finished.root)?;
            if root.state() == RootState::Distrusted && self.without.is_none() {
                left_at = Some(Instant::now());
                self.without = Some(roots.trust_sequence);
                self.finished.left_ms = Some(self.elapsed());
                self.finished.entry = root.entry;
            }
            let is_over = self.look(ca, patience).await?;
            if is_over || left_at.is_some_and(|left: Instant| left.elapsed() >= wait) {
                self.finished.total_ms = self.elapsed();
                return Ok(());
            }
            if left_at.is_none() && self.begun.elapsed() > patience {
                return Err(CliError::Failed("it is still in the bundles; `chancery status` and the CA's log say why".into()));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Whether everybody has let go of it.
    async fn look(&mut self, ca: &mut Patient<'_>, patience: Duration) -> Result<bool, CliError> {
        if let Some(entry) = self.replaced_by.filter(|_| self.finished.workloads_ms.is_none()) {
            let question = CheckReachRequest { certificate_entry: Some(entry), ..CheckReachRequest::default() };
            let reach = self.ask(ca, patience, question).await?;
            self.note_certificates(&reach);
        }
        let Some(trust_sequence) = self.without.filter(|_| self.finished.bundles_ms.is_none()) else {
            return Ok(self.without.is_some() && self.has_replaced());
        };
        let reach = self.ask(ca, patience, CheckReachRequest { trust_sequence, ..CheckReachRequest::default() }).await?;
        if reach.missing_total == 0 {
            self.finished.bundles_ms = Some(self.elapsed());
        }
        self.finished.behind_total = reach.missing_total;
        self.finished.unproven_total = reach.unproven_total;
        self.finished.behind = named(reach.missing);
        Ok(self.finished.bundles_ms.is_some() && self.has_replaced())
    }

    fn note_certificates(&mut self, reach: &CheckReachResponse) {
        let is_own = |one: &&MissingRecord| matches!(&*one.kind, "ca" | "agent");
        let all_named = reach.missing.len() as u64 == reach.missing_total;
        if all_named && self.finished.agents_ms.is_none() && !reach.missing.iter().any(|one| is_own(&one)) {
            self.finished.agents_ms = Some(self.elapsed());
        }
        if reach.missing_total == 0 {
            self.finished.workloads_ms = Some(self.elapsed());
        }
        // As of the first look after it has left.
        if self.without.is_some() && self.finished.missing.is_empty() {
            self.finished.missing_total = reach.missing_total;
            self.finished.missing = named(reach.missing.clone());
        }
    }

    /// On standard error: whom it has cost something, and who still trusts it.
    fn tell(&self) {
        let Finished { missing_total, missing, behind_total, behind, .. } = &self.finished;
        if *missing_total > 0 {
            remark(format!("{missing_total} still used a certificate under it when it left, and are refused until they have another"));
            for one in missing {
                remark(format!("missing: {one}"));
            }
        }
        if *behind_total > 0 {
            remark(format!("{behind_total} have not acknowledged a bundle without it: until they do, they trust it"));
            for one in behind {
                remark(format!("behind: {one}"));
            }
        }
    }

    async fn ask(&self, ca: &mut Patient<'_>, patience: Duration, question: CheckReachRequest) -> Result<CheckReachResponse, CliError> {
        ca.ask(self.until(patience), async |ca| Ok(ca.revocations.check_reach(question.clone()).await?.into_inner())).await
    }

    fn has_replaced(&self) -> bool {
        self.replaced_by.is_none() || self.finished.workloads_ms.is_some()
    }

    fn until(&self, patience: Duration) -> Option<Instant> {
        self.begun.checked_add(patience)
    }

    fn elapsed(&self) -> u128 {
        self.begun.elapsed().as_millis()
    }
}

fn find<'r>(roots: &'r ListRootsResponse, fingerprint: &str) -> Result<&'r RootRecord, CliError> {
    let found = roots.roots.iter().find(|root| root.fingerprint == fingerprint);
    found.ok_or_else(|| CliError::Failed("the CA does not know the root any more".into()))
}

fn named(missing: Vec<MissingRecord>) -> Vec<String> {
    missing.into_iter().take(NAMED).map(|one| MissingRow::from(one).told()).collect()
}
