//! Walks trust roots through their lives: the only place that knows both the roots and the fleet.
//!
//! ```text
//! prepared --publish--> published --activate--> active --(next root activated)--> draining --retire--> retired
//!                                                  any --distrust--> distrusted
//! ```
//!
//! Every transition is an act in the ledger, with its [gate](gate) evaluated under the epoch that the act is recorded under: should another
//! act come between, it is evaluated again. A transition that has happened already is done. Nothing else is remembered: the ledger's state says
//! where everything is, so a killed CA goes on from there. What goes on by itself ([`Rotation::run`]: re-issuing while a root drains,
//! finishing a distrust that has begun, keeping a replacement published, new issuing certificates) is derived from that state too.

mod clocks;
mod corporate;
mod distrust;
mod gate;
mod reissue;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use chancery_identity::{Clock, Fingerprint};
use serde::Deserialize;
use time::OffsetDateTime;
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use crate::authority::{Authority, AuthorityError};
use crate::fleet::{AmbiguousName, Fleet, Goal, Missing, missing};
use crate::ledger::acts::{CA_ACTOR, Change, Overrides, Root, RootState, State};
use crate::ledger::{Ledger, LedgerError};

use clocks::ClockWatch;
use distrust::Deadlines;
pub use gate::{Gate, Obstacle};
use reissue::Reissues;

/// How often a gate is evaluated anew because an act came between.
const MAX_ATTEMPTS: usize = 16;
/// How often [`Rotation::run`] looks what is due.
const TICK: Duration = Duration::from_secs(1);
/// How often while a root is being distrusted: it leaves the moment that nothing needs it any more.
const HASTE: Duration = Duration::from_millis(100);
/// A clock that is right is believed for so long.
const CLOCK_BELIEVED: Duration = Duration::from_secs(10);
/// So much of a fingerprint, in hexadecimal digits, names a root.
const SHORTEST_NAME: usize = 8;

/// The `[rotation]` of the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// How long an activation waits after the publication for those that cannot prove that they have the new root.
    #[serde(with = "chancery_process::config::duration")]
    pub unproven_wait: Duration,
    /// When a root that is being distrusted leaves the bundles at the latest.
    #[serde(with = "chancery_process::config::duration")]
    pub distrust_deadline: Duration,
    /// How many certificates a second are issued anew while a root drains.
    pub reissue_per_second: u32,
    /// Whether a replacement is prepared and published whenever there is none; if nothing is said, it is, but in development.
    pub keep_replacement: Option<bool>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            unproven_wait: Duration::from_secs(600),
            distrust_deadline: Duration::from_secs(30),
            reissue_per_second: 500,
            keep_replacement: None,
        }
    }
}

/// Why a root stays where it is.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RotationError {
    /// The gate is not open.
    #[error("{0}")]
    Gate(Box<Gate>),
    /// No root of that name.
    #[error("{0}")]
    Unknown(String),
    /// No root is where it would have to be.
    #[error("{0}")]
    NotDue(String),
    /// The act was recorded, and what follows from it could not be done yet.
    #[error("it is recorded (ledger entry {entry}), and the CA could not follow it yet; it tries again by itself: {error}")]
    NotFollowed {
        /// The act's.
        entry: u64,
        /// Why.
        error: AuthorityError,
    },
    /// Who is to be left out of the count is not clear.
    #[error(transparent)]
    Except(#[from] AmbiguousName),
    /// A root could not be made.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// The ledger.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

/// Where a root is after a transition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// Which.
    pub root: Fingerprint,
    /// Where it is, by which entry, since when.
    pub now: Root,
    /// Whether this call brought it there; it was there already if not.
    pub changed: bool,
}

/// Who wants it, why, and what of the gate does not count.
#[derive(Clone, Copy, Debug)]
pub struct Order<'a> {
    /// As the ledger names people.
    pub actor: &'a str,
    /// In that person's words.
    pub why: &'a str,
    /// Recorded with the act.
    pub overrides: &'a Overrides,
}

/// Walks roots through their lives.
#[derive(Debug)]
pub struct Rotation {
    ledger: Ledger,
    authority: Arc<Authority>,
    fleet: Arc<Fleet>,
    clock: Arc<dyn Clock>,
    clocks: ClockWatch,
    deadlines: Deadlines,
    settings: ArcSwap<Settings>,
    /// Locked while what has begun is finished, so that nothing is done twice at once.
    reissues: Mutex<Reissues>,
    /// Takes an obstacle out of every gate, to show what it is there for.
    #[cfg(test)]
    omit: fn(&mut Gate),
    /// Has issuing certificates sign whoever has their CRLs, likewise.
    #[cfg(test)]
    without_crls: bool,
}

/// Why an act was not recorded.
enum Attempt {
    /// Another act came first.
    Moved,
    Ledger(LedgerError),
}

impl From<LedgerError> for Attempt {
    fn from(error: LedgerError) -> Self {
        Self::Ledger(error)
    }
}

impl Rotation {
    /// Puts the parts together.
    pub fn new(ledger: Ledger, authority: Arc<Authority>, fleet: Arc<Fleet>, settings: Settings, clock: Arc<dyn Clock>) -> Self {
        let clocks = ClockWatch::new(clock.now());
        let settings = ArcSwap::from_pointee(settings);
        Self {
            ledger,
            authority,
            fleet,
            clock,
            clocks,
            deadlines: Deadlines::default(),
            settings,
            reissues: Mutex::default(),
            #[cfg(test)]
            omit: |_| (),
            #[cfg(test)]
            without_crls: false,
        }
    }

    /// These count from now on.
    pub fn configure(&self, settings: Settings) {
        self.settings.store(Arc::new(settings));
    }

    /// The settings in force.
    pub fn settings(&self) -> Arc<Settings> {
        self.settings.load_full()
    }

    /// Makes the root that is to follow the active one; if one is prepared or published, it is that one.
    ///
    /// # Errors
    /// If it cannot be made or recorded.
    pub async fn prepare(&self, actor: &str, why: &str) -> Result<Done, RotationError> {
        let before = self.ledger.epoch();
        self.prepared(self.authority.prepare_root(actor, why).await?, before)
    }

    /// Puts a prepared root into every bundle.
    ///
    /// # Errors
    /// If none is prepared, or it cannot be recorded.
    pub async fn publish(&self, root: Option<&str>, order: Order<'_>) -> Result<Done, RotationError> {
        self.go(self.find(root, &[RootState::Prepared, RootState::Published])?, RootState::Published, order).await
    }

    /// Has everything signed under a published root from now on; the active one before it drains.
    ///
    /// # Errors
    /// [`RotationError::Gate`] while somebody who counts has not proven to have it. If none is published, or it cannot be recorded.
    pub async fn activate(&self, root: Option<&str>, order: Order<'_>) -> Result<Done, RotationError> {
        self.go(self.find(root, &[RootState::Published])?, RootState::Active, order).await
    }

    /// Takes a draining root, or one that is given up before its activation, out of every bundle.
    ///
    /// # Errors
    /// [`RotationError::Gate`] while something alive chains to it. If none is draining, or it cannot be recorded.
    pub async fn retire(&self, root: Option<&str>, order: Order<'_>) -> Result<Done, RotationError> {
        self.go(self.find(root, &[RootState::Draining])?, RootState::Retired, order).await
    }

    /// What a transition would meet now, without making it: nothing if the root is there already.
    ///
    /// # Errors
    /// If there is no such root, or the ledger cannot be read.
    pub async fn gate(&self, root: Option<&str>, to: RootState, overrides: &Overrides) -> Result<Gate, RotationError> {
        let from: &[_] = match to {
            RootState::Published => &[RootState::Prepared],
            RootState::Active => &[RootState::Published],
            _ => &[RootState::Draining],
        };
        let root = self.find(root, from)?;
        let state = self.ledger.current_state();
        if state.roots.get(&root).is_some_and(|there| there.state == to) {
            return Ok(Gate { root, to, obstacles: Vec::new(), missing: Missing::default() });
        }
        self.evaluate(&state, root, to, overrides).await
    }

    /// Does what is due, every second (more often in an emergency) and with every act, until `shutdown`.
    pub async fn run(&self, shutdown: CancellationToken) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut acts = self.ledger.state();
        let walk = async {
            loop {
                let urgent = self.is_distrusting();
                tokio::select! {
                    _ = ticks.tick() => {}
                    () = tokio::time::sleep(HASTE), if urgent => {}
                    Ok(()) = acts.changed() => {}
                }
                if let Err(error) = self.walk_on().await {
                    tracing::error!(%error, "a rotation of trust roots could not go on; trying again");
                    // Not at once: an act that fails may be what woke it.
                    ticks.tick().await;
                }
            }
        };
        shutdown.run_until_cancelled(walk).await;
    }

    /// Does what is due now: finishes distrusts, keeps a replacement published, has new issuing certificates sign once their CRLs are
    /// everywhere, and certificates issued anew while a root drains.
    ///
    /// # Errors
    /// The first that could not be done; the others are, and it is tried again.
    pub async fn walk_on(&self) -> Result<(), RotationError> {
        let mut reissues = self.reissues.lock().await;
        let distrusted = self.finish_distrusts().await;
        let kept = if self.settings().keep_replacement == Some(true) { self.keep_replacement().await } else { Ok(()) };
        let given_up = self.give_up_superseded().await;
        let served = self.serve_crls().await;
        let reissued = self.reissue(&mut reissues).await;
        distrusted.and(kept).and(given_up).and(served).and(reissued)
    }

    /// Has issuing certificates sign whose CRLs are with everybody who counts, and what has expired leave the CRLs while the clock is believed.
    async fn serve_crls(&self) -> Result<(), RotationError> {
        let now = self.now();
        if self.clocks.problem(now, self.fleet.median_clock_offset()).is_none() && self.clocks.is_confirmed() {
            self.authority.believe_clock(now + CLOCK_BELIEVED);
        }
        let Some(sequence) = self.authority.roots().iter().filter_map(|root| root.awaited).max() else { return Ok(()) };
        let missing = missing(&self.ledger, &self.fleet, Goal::Trust(sequence)).await?;
        // By a clock that is wrong, whoever is missing may seem to have expired.
        let is_proven = missing.is_empty() && self.clock_problem().await?.is_none();
        #[cfg(test)]
        let is_proven = is_proven || self.without_crls;
        if is_proven {
            self.authority.proven(sequence).await?;
        }
        Ok(())
    }

    async fn keep_replacement(&self) -> Result<(), RotationError> {
        // Not while one drains: a bundle has two roots, not three.
        if self.ledger.current_state().roots.values().any(|root| root.state == RootState::Draining) {
            return Ok(());
        }
        let why = "a replacement is always kept published";
        let next = match self.prepare(CA_ACTOR, why).await {
            // `doctor` says that an operator has to bring one.
            Err(RotationError::Authority(AuthorityError::Corporate { .. })) => return Ok(()),
            next => next?,
        };
        if next.now.state == RootState::Prepared {
            let order = Order { actor: CA_ACTOR, why, overrides: &Overrides::default() };
            self.publish(Some(&next.root.to_string()), order).await?;
        }
        Ok(())
    }

    /// Gives up replacements that another one was published after: they aged while they waited.
    async fn give_up_superseded(&self) -> Result<(), RotationError> {
        let state = self.ledger.current_state();
        if self.kept_until(&state).is_some() {
            // What the ledger knows as published may have been active.
            return Ok(());
        }
        let published = || state.roots.iter().filter(|(_, root)| root.state == RootState::Published);
        let newest = published().map(|(_, root)| root.entry).max();
        for (root, _) in published().filter(|(_, root)| Some(root.entry) != newest) {
            let order = Order { actor: CA_ACTOR, why: "a newer replacement is published", overrides: &Overrides::default() };
            self.go(*root, RootState::Retired, order).await?;
        }
        Ok(())
    }

    /// Brings `root` there, if the gate is open for it.
    async fn go(&self, root: Fingerprint, to: RootState, order: Order<'_>) -> Result<Done, RotationError> {
        // What is due by now is made before the gate looks, and not after the act: an issuing certificate whose CRL nobody has could sign.
        if to == RootState::Active
            && let Err(error) = self.authority.apply().await
        {
            tracing::warn!(%error, "what is due before a root's activation could not be made; the gate goes by what is there");
        }
        for _ in 0..MAX_ATTEMPTS {
            let state = self.ledger.current_state();
            let there = state.roots.get(&root).ok_or_else(|| unknown(&root.to_string(), &state))?;
            if there.state == to {
                self.authority.apply().await.map_err(|error| RotationError::NotFollowed { entry: there.entry, error })?;
                return Ok(Done { root, now: *there, changed: false });
            }
            let gate = self.evaluate(&state, root, to, order.overrides).await?;
            if let Some(why) = gate.impossible() {
                return Err(LedgerError::Impossible(why.to_owned()).into());
            }
            if !gate.is_open() {
                return Err(RotationError::Gate(Box::new(gate)));
            }
            let change = Change::Root { root, to, overrides: order.overrides.clone() };
            match self.act_at(state.epoch, order, change).await {
                Ok(entry) => {
                    if order.overrides.confirm_clock {
                        self.clocks.confirm(self.clock.now());
                    }
                    self.authority.apply().await.map_err(|error| RotationError::NotFollowed { entry, error })?;
                    let now = self.ledger.current_state().roots.get(&root).copied().unwrap_or(*there);
                    return Ok(Done { root, now, changed: true });
                }
                Err(Attempt::Moved) => {}
                Err(Attempt::Ledger(error)) => return Err(error.into()),
            }
        }
        Err(LedgerError::Busy.into())
    }

    /// Records a change that was decided on under `epoch`.
    async fn act_at(&self, epoch: u64, order: Order<'_>, change: Change) -> Result<u64, Attempt> {
        let gate = move |state: &State| if state.epoch == epoch { Ok(()) } else { Err(Attempt::Moved) };
        self.ledger.act_when(order.actor, change, order.why, gate).await
    }

    /// The root that `name` begins the fingerprint of; without a name, the one that came last into the first of the states `from` in which any
    /// is; of those that drain, the first.
    fn find(&self, name: Option<&str>, from: &[RootState]) -> Result<Fingerprint, RotationError> {
        let state = self.ledger.current_state();
        let Some(name) = name else {
            let due = |to: &RootState| {
                let mut there: Vec<_> = state.roots.iter().filter(|(_, root)| root.state == *to).collect();
                there.sort_by_key(|(_, root)| root.entry);
                let due = if *to == RootState::Draining { there.first() } else { there.last() };
                due.map(|(fingerprint, _)| **fingerprint)
            };
            let words: Vec<_> = from.iter().map(ToString::to_string).collect();
            return from.iter().find_map(due).ok_or_else(|| {
                RotationError::NotDue(format!("no root is {}; `chancery root list` shows where each is", words.join(" or ")))
            });
        };
        let name = name.replace(':', "").to_ascii_lowercase();
        let mut found = state.roots.keys().filter(|root| name.len() >= SHORTEST_NAME && root.to_string().starts_with(&name));
        match (found.next(), found.next()) {
            (Some(root), None) => Ok(*root),
            _ => Err(unknown(&name, &state)),
        }
    }

    fn now(&self) -> OffsetDateTime {
        self.clock.now()
    }
}

fn unknown(name: &str, state: &State) -> RotationError {
    let known: Vec<_> = state.roots.iter().map(|(root, at)| format!("{root} ({})", at.state)).collect();
    RotationError::Unknown(format!(
        "{name:?} does not name one root: give at least {SHORTEST_NAME} digits of a fingerprint of {}",
        known.join(", ")
    ))
}
