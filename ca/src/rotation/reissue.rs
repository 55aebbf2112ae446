//! Has certificates issued anew while a root drains: those that expire first before the others, so many a second; all at once while a root is
//! being distrusted.

use std::collections::BTreeMap;
use std::time::Duration;

use chancery_identity::SpiffeId;
use chancery_proto::chancery::v1::{Order as Wire, ReissueAll, RenewAgent, order};
use tokio::time::Instant;

use super::{Rotation, RotationError};
use crate::fleet::{Goal, Missing, MissingKind, missing};
use crate::ledger::acts::RootState;

/// How long an agent has to do what it was told, before it is told again; twice as long after each time, up to [`LONGEST_PATIENCE`].
const PATIENCE: Duration = Duration::from_secs(10);
const LONGEST_PATIENCE: Duration = Duration::from_secs(600);

/// Whom has been told to issue anew, since the newest activation.
#[derive(Debug, Default)]
pub(super) struct Reissues {
    /// The entry of the activation.
    activation: u64,
    told: BTreeMap<SpiffeId, Told>,
    /// How many certificates more may be asked for now; below 0 after a large agent.
    credit: f64,
    /// As of then; none before the first.
    credited: Option<Instant>,
}

#[derive(Clone, Copy, Debug)]
struct Told {
    at: Instant,
    patience: Duration,
}

/// What an agent has to do.
#[derive(Clone, Copy, Debug, Default)]
struct Work {
    itself: bool,
    pods: bool,
}

impl Rotation {
    pub(super) async fn reissue(&self, reissues: &mut Reissues) -> Result<(), RotationError> {
        let state = self.ledger.current_state();
        let draining = state.roots.values().filter(|root| root.state == RootState::Draining);
        let Some(newest) = draining.clone().max_by_key(|root| root.entry) else {
            *reissues = Reissues::default();
            return Ok(());
        };
        if reissues.activation != newest.entry {
            *reissues = Reissues { activation: newest.entry, ..Reissues::default() };
        }
        let urgent = draining.clone().any(|root| root.leave_by.is_some());
        let missing = missing(&self.ledger, &self.fleet, Goal::Certificates { after_entry: newest.entry }).await?;
        reissues.credit(f64::from(self.settings().reissue_per_second));
        let mut work = work(&missing);
        for (agent, workloads) in self.fleet.by_expiry() {
            if !urgent && reissues.credit < 1.0 {
                break;
            }
            let Some(work) = work.remove(&agent).filter(|_| reissues.is_due(&agent)) else { continue };
            // It renews first, so that it can still ask for the others.
            let told = !work.itself || self.tell(&agent, order::Order::RenewAgent(RenewAgent {}));
            if told && (!work.pods || self.tell(&agent, order::Order::ReissueAll(ReissueAll {}))) {
                reissues.credit -= f64::from(u8::from(work.itself)) + if work.pods { f64::from(workloads) } else { 0.0 };
                reissues.note(agent);
            }
        }
        Ok(())
    }

    fn tell(&self, agent: &SpiffeId, order: order::Order) -> bool {
        let told = self.fleet.order(agent, Wire { order: Some(order) });
        told.inspect_err(|error| tracing::warn!(%error, "an agent could not be told to issue anew; it is told again")).is_ok()
    }
}

impl Reissues {
    /// Gives what the time since the last time is worth, and never more than a second's: every act asks, however many there are.
    fn credit(&mut self, per_second: f64) {
        let now = Instant::now();
        let passed = self.credited.replace(now).map_or(1.0, |before| now.duration_since(before).as_secs_f64());
        self.credit = (self.credit + passed * per_second).min(per_second.max(1.0));
    }

    fn is_due(&self, agent: &SpiffeId) -> bool {
        self.told.get(agent).is_none_or(|told| told.at.elapsed() >= told.patience)
    }

    /// Who was told.
    #[cfg(test)]
    pub(super) fn told(&self) -> impl Iterator<Item = &SpiffeId> {
        self.told.keys()
    }

    fn note(&mut self, agent: SpiffeId) {
        let patience = self.told.get(&agent).map_or(PATIENCE, |told| (told.patience * 2).min(LONGEST_PATIENCE));
        self.told.insert(agent, Told { at: Instant::now(), patience });
    }
}

/// Who has to do what. A proxy that has not acknowledged its new certificate has nobody to do anything for it.
fn work(missing: &Missing) -> BTreeMap<SpiffeId, Work> {
    let mut work: BTreeMap<SpiffeId, Work> = BTreeMap::new();
    let mut add = |agent: &str, itself: bool, pods: bool| {
        if let Ok(agent) = agent.parse() {
            let known = work.entry(agent).or_default();
            (known.itself, known.pods) = (known.itself || itself, known.pods || pods);
        }
    };
    for one in &missing.who {
        match one.kind {
            MissingKind::Agent => add(&one.agent, true, false),
            MissingKind::Pod => add(&one.agent, false, true),
            MissingKind::Ca | MissingKind::Proxy => {}
        }
    }
    for (agent, _) in missing.more.keys() {
        add(agent, missing.more_agents.contains(agent), true);
    }
    work
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_beyond_those_that_are_named_renews_its_own_certificate_as_well() {
        let agent = |number: u8| format!("spiffe://example.org/chancery/agent/east/{number}");
        let mut missing = Missing::default();
        for number in [1, 2] {
            missing.more.insert((agent(number), String::new()), 1);
        }
        missing.more_agents.insert(agent(1));
        let work = work(&missing);
        let of = |number| work[&agent(number).parse().unwrap()];
        assert!(of(1).itself && of(1).pods && !of(2).itself && of(2).pods);
    }
}
