//! What stands before a transition: who has not proven that it would harm nobody.

use std::fmt;

use chancery_identity::Fingerprint;
use time::OffsetDateTime;

use super::{Rotation, RotationError};
use crate::fleet::{Goal, Missing, has_served, missing};
use crate::ledger::acts::{Overrides, Root, RootState, State};

/// How many who are missing the message names.
const NAMED: usize = 10;

/// What a transition meets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gate {
    /// Whose transition.
    pub root: Fingerprint,
    /// Where to.
    pub to: RootState,
    /// What is in the way.
    pub obstacles: Vec<Obstacle>,
    /// Who is missing, without those that were taken out of the count, and who was counted.
    pub missing: Missing,
}

/// What is in the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// There is no such transition from where the root is, whatever anybody proves; that cannot be overridden.
    Impossible(String),
    /// Nothing could be signed under it; that cannot be overridden.
    NotReady(String),
    /// Somebody who counts has not proven it.
    Missing(u64),
    /// Some cannot prove it, and are waited for.
    Unproven {
        /// How many.
        total: u64,
        /// Until then.
        until: OffsetDateTime,
    },
    /// The clock is not believed.
    Clock(String),
    /// The ledger is restored from a backup: until then what it lacks may be alive. The ledger itself refuses a retirement.
    Restored(OffsetDateTime),
}

impl Gate {
    /// Whether nothing is in the way.
    pub fn is_open(&self) -> bool {
        self.obstacles.is_empty()
    }

    /// Why it would not open for anything; nothing if it may.
    pub fn impossible(&self) -> Option<&str> {
        self.obstacles.iter().find_map(|obstacle| match obstacle {
            Obstacle::Impossible(why) => Some(&**why),
            _ => None,
        })
    }
}

impl Rotation {
    pub(super) async fn evaluate(
        &self,
        state: &State,
        root: Fingerprint,
        to: RootState,
        overrides: &Overrides,
    ) -> Result<Gate, RotationError> {
        let mut gate = Gate { root, to, obstacles: Vec::new(), missing: Missing::default() };
        if let Some(why) = state.impossible(root, to) {
            gate.obstacles.push(Obstacle::Impossible(why));
            return Ok(gate);
        }
        match (state.roots.get(&root), to) {
            (Some(from), RootState::Active) if from.state == RootState::Published => {
                self.before_activation(&mut gate, state, from, overrides).await?;
            }
            (Some(from), RootState::Retired) if from.state == RootState::Draining => {
                self.before_retirement(&mut gate, from, overrides).await?;
            }
            // Nothing chains to it, as far as the ledger knows.
            (Some(_), RootState::Retired) if self.kept_until(state).is_some() => {}
            // Harms nobody.
            _ => return Ok(gate),
        }
        gate.obstacles.extend(self.kept_until(state).map(Obstacle::Restored));
        let clock = self.clock_problem().await?;
        gate.obstacles.extend(clock.filter(|_| !overrides.confirm_clock).map(Obstacle::Clock));
        if overrides.force {
            gate.obstacles.retain(|obstacle| match obstacle {
                Obstacle::Impossible(_) | Obstacle::NotReady(_) => true,
                Obstacle::Restored(_) => to == RootState::Retired,
                _ => false,
            });
        }
        #[cfg(test)]
        (self.omit)(&mut gate);
        Ok(gate)
    }

    /// What keeps a root that is being distrusted, and drains, in the bundles until its deadline.
    pub(super) async fn before_leaving(&self, state: &State, root: Fingerprint, from: &Root) -> Result<Gate, RotationError> {
        let mut gate = Gate { root, to: RootState::Distrusted, obstacles: Vec::new(), missing: Missing::default() };
        self.before_retirement(&mut gate, from, &Overrides::default()).await?;
        // A restored ledger may not know who is missing; and by a clock that is wrong, whoever is may seem to have expired.
        gate.obstacles.extend(self.kept_until(state).map(Obstacle::Restored));
        gate.obstacles.extend(self.clock_problem().await?.map(Obstacle::Clock));
        #[cfg(test)]
        (self.omit)(&mut gate);
        Ok(gate)
    }

    /// Until when certificates may be alive that the ledger lacks, since it was restored.
    pub(super) fn kept_until(&self, state: &State) -> Option<OffsetDateTime> {
        state.roots_kept_until().filter(|until| self.now() < *until)
    }

    /// Why no gate is to be opened by this machine's clock.
    pub(super) async fn clock_problem(&self) -> Result<Option<String>, RotationError> {
        let agents = self.fleet.median_clock_offset();
        let problem = self.clocks.problem(self.now(), agents);
        if problem.is_some() || agents.is_some() || self.clocks.is_confirmed() {
            return Ok(problem);
        }
        // A ledger that was restored may lack that it has served.
        let restored = self.ledger.current_state().roots_kept_until().is_some();
        if !restored && !has_served(&self.ledger).await? {
            return Ok(None);
        }
        Ok(Some("no agent has reported since the CA started, and so nothing confirms this machine's clock".to_owned()))
    }

    /// Everybody has the root.
    async fn before_activation(&self, gate: &mut Gate, state: &State, from: &Root, overrides: &Overrides) -> Result<(), RotationError> {
        let now = self.now();
        let root = self.authority.roots().iter().find(|root| root.fingerprint == gate.root).cloned();
        let awaited = root.as_ref().and_then(|root| root.awaited).unwrap_or_default();
        #[cfg(test)]
        let awaited = if self.without_crls { 0 } else { awaited };
        let problem = match root {
            Some(root) if root.not_before > now => {
                Some(format!("it is not valid before {}: made while a clock was wrong? Prepare another", root.not_before))
            }
            Some(root) if root.issuing_until.is_some_and(|until| until > now) => None,
            _ => Some("it has no issuing certificate that can sign; the CA's log says why".to_owned()),
        };
        gate.obstacles.extend(problem.map(Obstacle::NotReady));
        // The trust state that the publication made; while there are CRLs, with that of the issuing certificate.
        let published = state.trust_floor() + from.entry + 1;
        self.count(gate, Goal::Trust(published.max(awaited)), overrides).await?;
        let until = from.since + self.settings().unproven_wait;
        let total = gate.missing.unproven_total();
        if total > 0 && now < until && !overrides.accept_unproven {
            gate.obstacles.push(Obstacle::Unproven { total, until });
        }
        Ok(())
    }

    /// Nobody needs it any more.
    async fn before_retirement(&self, gate: &mut Gate, from: &Root, overrides: &Overrides) -> Result<(), RotationError> {
        // All that was signed under it has entries before the activation of the next one, by which it drains.
        self.count(gate, Goal::Certificates { after_entry: from.entry }, overrides).await
    }

    async fn count(&self, gate: &mut Gate, goal: Goal, overrides: &Overrides) -> Result<(), RotationError> {
        gate.missing = missing(&self.ledger, &self.fleet, goal).await?.without(&overrides.except)?;
        if !gate.missing.is_empty() {
            gate.obstacles.push(Obstacle::Missing(gate.missing.total()));
        }
        Ok(())
    }
}

impl fmt::Display for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the root {} cannot become {} yet: ", self.root, self.to)?;
        for (number, obstacle) in self.obstacles.iter().enumerate() {
            write!(f, "{}{obstacle}", if number == 0 { "" } else { "; " })?;
            if let Obstacle::Missing(total) = obstacle {
                for one in self.missing.who.iter().take(NAMED) {
                    write!(f, "\n  {one}")?;
                }
                let more = total.saturating_sub(self.missing.who.len().min(NAMED) as u64);
                if more > 0 {
                    write!(f, "\n  and {more} more")?;
                }
            }
        }
        Ok(())
    }
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Impossible(problem) | Self::NotReady(problem) => f.write_str(problem),
            Self::Missing(total) => {
                write!(f, "{total} who count are missing (`--except NAME` takes one out of the count, `--force` overrides)")
            }
            Self::Unproven { total, until } => {
                write!(
                    f,
                    "{total} proxies or copies of the bundle cannot prove what is trusted, and are waited for until {until} (`--accept-unproven` does not wait)"
                )
            }
            Self::Clock(problem) => write!(f, "{problem}: set it right, or confirm it (`--confirm-clock`)"),
            Self::Restored(until) => {
                write!(f, "the ledger was restored from a backup, and until {until} a certificate that it lacks may be alive")
            }
        }
    }
}
