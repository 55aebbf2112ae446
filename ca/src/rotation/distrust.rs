//! The emergency: a root that must go, at full speed, in an order that keeps the mesh alive.
//!
//! The beginning is an act of its own, which names the deadline; from then on the CA finishes it by itself, whoever goes away, after a kill
//! as well: the replacement is activated, everything is issued anew at once, and the root leaves the bundles when nothing alive chains to it
//! any more, or at the deadline.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use chancery_identity::Fingerprint;
use time::OffsetDateTime;
use tokio::time::Instant;

use super::{Attempt, Done, MAX_ATTEMPTS, Order, Rotation, RotationError, unknown};
use crate::ledger::LedgerError;
use crate::ledger::acts::{CA_ACTOR, Change, Deadline, Overrides, Root, RootState};

/// As finely as the ledger tells the time.
const EARLIER: time::Duration = time::Duration::MILLISECOND;

/// When the roots leave that are being distrusted, by the time that passes, since this machine's clock may be set meanwhile.
#[derive(Debug, Default)]
pub(super) struct Deadlines(Mutex<BTreeMap<Fingerprint, (Deadline, Instant)>>);

impl Deadlines {
    /// How long it is until `deadline`, which this CA was told just now, or before it started. Then its clock counts, which says `now`, but for
    /// longer than was ordered no root stays.
    fn left(&self, root: Fingerprint, deadline: Deadline, now: OffsetDateTime) -> Duration {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let at = match known.get(&root) {
            Some((of, at)) if *of == deadline => *at,
            _ => {
                let left = (deadline.at - now).min(deadline.at - deadline.since);
                let at = Instant::now() + left.try_into().unwrap_or(Duration::ZERO);
                known.insert(root, (deadline, at));
                at
            }
        };
        at.saturating_duration_since(Instant::now())
    }
}

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
            let now = self.now();
            let change = match (there.state, there.leave_by) {
                (RootState::Distrusted, _) => return Ok(Done { root, now: there, changed: false }),
                (RootState::Active | RootState::Draining, Some(before)) => {
                    if self.stays(root, before) <= deadline {
                        return Ok(Done { root, now: there, changed: false });
                    }
                    // By a clock that was set meanwhile it may be later.
                    Change::BeginDistrust { root, leave_by: (now + deadline).min(before.at - EARLIER) }
                }
                (RootState::Active | RootState::Draining, None) => Change::BeginDistrust { root, leave_by: now + deadline },
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

    /// Takes every distrust that has begun as far as it goes now, the active root's first. None waits for another; the first failure is told.
    pub(super) async fn finish_distrusts(&self) -> Result<(), RotationError> {
        let state = self.ledger.current_state();
        let begun = state.roots.iter().filter_map(|(root, there)| Some((there.state != RootState::Active, there.leave_by?.at, *root)));
        let mut begun: Vec<_> = begun.collect();
        begun.sort_unstable();
        let mut finished = Ok(());
        for (_, _, root) in begun {
            finished = finished.and(self.finish_distrust(root).await);
        }
        finished
    }

    async fn finish_distrust(&self, root: Fingerprint) -> Result<(), RotationError> {
        let there = |state| self.ledger.current_state().roots.get(&root).copied().filter(|there: &Root| there.state == state);
        if there(RootState::Active).is_some() {
            self.replace(root).await?;
        }
        let Some(from @ Root { leave_by: Some(deadline), .. }) = there(RootState::Draining) else { return Ok(()) };
        let stays = self.stays(root, deadline);
        let gate = self.before_leaving(&self.ledger.current_state(), root, &from).await?;
        if !gate.is_open() && !stays.is_zero() {
            return Ok(());
        }
        let why = match gate.missing.total() {
            0 => "nothing alive chains to it any more".to_owned(),
            total => format!("the deadline has come, with {total} missing"),
        };
        let overrides = Overrides { force: !gate.missing.is_empty(), ..Overrides::default() };
        self.go(root, RootState::Distrusted, Order { actor: CA_ACTOR, why: &why, overrides: &overrides }).await?;
        Ok(())
    }

    /// How long a root that is being distrusted stays in the bundles at most, whatever this machine's clock is set to.
    pub fn stays(&self, root: Fingerprint, deadline: Deadline) -> Duration {
        self.deadlines.left(root, deadline, self.now())
    }

    /// Whether the distrust of a root has begun and not ended.
    pub(super) fn is_distrusting(&self) -> bool {
        self.ledger.current_state().roots.values().any(|root| root.leave_by.is_some())
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
