//! The emergency: a root that must go, at full speed, in an order that keeps the mesh alive.
//!
//! The beginning is an act of its own, which names the deadline; from then on the CA finishes it by itself, whoever goes away, after a kill
//! as well: the replacement is activated, everything is issued anew at once, and the root leaves the bundles when nothing alive chains to it
//! any more, or at the deadline.

use std::time::Duration;

use chancery_identity::Fingerprint;

use super::{Attempt, Done, MAX_ATTEMPTS, Order, Rotation, RotationError, unknown};
use crate::fleet::{Goal, missing};
use crate::ledger::LedgerError;
use crate::ledger::acts::{CA_ACTOR, Change, Overrides, RootState, State};

impl Rotation {
    /// Begins to distrust a root, which then leaves the bundles within `deadline`, or at once if nothing can chain to it. A shorter deadline
    /// than before counts.
    ///
    /// # Errors
    /// If there is no such root, it cannot be recorded, or it is the active one and only a corporate CA could sign another.
    pub async fn distrust(&self, root: &str, deadline: Duration, order: Order<'_>) -> Result<Done, RotationError> {
        let root = self.find(Some(root), &[])?;
        for _ in 0..MAX_ATTEMPTS {
            let state = self.ledger.current_state();
            let there = *state.roots.get(&root).ok_or_else(|| unknown(&root.to_string(), &state))?;
            if there.state == RootState::Active {
                self.authority.check_replaceable().await?;
            }
            let leave_by = self.now() + deadline;
            let change = match there.state {
                RootState::Distrusted => return Ok(Done { root, now: there, changed: false }),
                RootState::Active | RootState::Draining if there.leave_by.is_some_and(|before| before <= leave_by) => {
                    return Ok(Done { root, now: there, changed: false });
                }
                RootState::Active | RootState::Draining => Change::BeginDistrust { root, leave_by },
                _ => Change::Root { root, to: RootState::Distrusted, overrides: order.overrides.clone() },
            };
            match self.act_at(state.epoch, order, change).await {
                Ok(entry) => {
                    // Goes on in the server's task if it cannot here.
                    let _alone = self.reissues.lock().await;
                    self.authority.apply().await.map_err(|error| RotationError::NotFollowed { entry, error })?;
                    self.finish_distrusts().await?;
                    let now = self.ledger.current_state().roots.get(&root).copied().unwrap_or(there);
                    return Ok(Done { root, now, changed: true });
                }
                Err(Attempt::Moved) => {}
                Err(Attempt::Ledger(error)) => return Err(error.into()),
            }
        }
        Err(LedgerError::Busy.into())
    }

    /// Takes every distrust that has begun as far as it goes now.
    pub(super) async fn finish_distrusts(&self) -> Result<(), RotationError> {
        while let Some((root, state)) = self.next_distrust() {
            let Some(there) = state.roots.get(&root) else { return Ok(()) };
            match (there.state, there.leave_by) {
                (RootState::Active, _) => self.replace(root).await?,
                (RootState::Draining, Some(leave_by)) => {
                    let missing = missing(&self.ledger, &self.fleet, Goal::Certificates { after_entry: there.entry }).await?;
                    // By a clock that is wrong, whoever is missing may seem to have expired; and a restored ledger may not know them.
                    let is_unsure = !missing.is_empty() || self.kept_until(&state).is_some() || self.clock_problem().await?.is_some();
                    if self.now() < leave_by && is_unsure {
                        return Ok(());
                    }
                    let why = match missing.total() {
                        0 => "nothing alive chains to it any more".to_owned(),
                        total => format!("the deadline has come, with {total} missing"),
                    };
                    let overrides = Overrides { force: !missing.is_empty(), ..Overrides::default() };
                    self.go(root, RootState::Distrusted, Order { actor: CA_ACTOR, why: &why, overrides: &overrides }).await?;
                }
                _ => return Ok(()),
            }
        }
        Ok(())
    }

    /// The root whose distrust has begun and comes first: the active one before those that drain already.
    pub(super) fn next_distrust(&self) -> Option<(Fingerprint, std::sync::Arc<State>)> {
        let state = self.ledger.current_state();
        let begun = state.roots.iter().filter(|(_, root)| root.leave_by.is_some());
        let first = begun.min_by_key(|(_, root)| (root.state != RootState::Active, root.leave_by));
        first.map(|(root, _)| *root).map(|root| (root, state))
    }

    /// Activates the replacement of the active root, whoever has it; without one, makes it.
    async fn replace(&self, root: Fingerprint) -> Result<(), RotationError> {
        let why = format!("the root {root} is being distrusted");
        let overrides = Overrides { force: true, ..Overrides::default() };
        let order = Order { actor: CA_ACTOR, why: &why, overrides: &overrides };
        let next = self.prepare(CA_ACTOR, &why).await?.root.to_string();
        self.publish(Some(&next), order).await?;
        self.activate(Some(&next), order).await?;
        Ok(())
    }
}
