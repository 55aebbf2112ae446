//! Distrusted roots after a loss: what the lost entries said of them, agents still know.
//!
//! Until every certificate that was issued before the loss has expired, each agent that connects names the roots that were distrusted by what it
//! was told. A root that this ledger does not have as distrusted becomes so, for everybody. One agent's word is not enough where it would take
//! the trust from certificates in use: that is left to an operator, and said in the log.

use chancery_identity::{Fingerprint, SpiffeId};
use time::OffsetDateTime;

use crate::ledger::acts::{CA_ACTOR, Change, Overrides, RootState, State};
use crate::ledger::{Ledger, LedgerError};

/// An agent names no more than these (agent.proto).
const MAX_NAMED: usize = 64;
/// So many distrusted roots are taken from agents in all, whatever they name.
const MAX_DISTRUSTED: usize = 256;

/// Records what `agent` names and this ledger lacks.
pub(super) async fn keep(ledger: &Ledger, now: OffsetDateTime, agent: &SpiffeId, named: &[Vec<u8>]) {
    let roots = named.iter().take(MAX_NAMED).filter_map(|root| Some(Fingerprint(root.as_slice().try_into().ok()?)));
    for root in roots {
        let state = ledger.current_state();
        if state.roots_kept_until().is_none_or(|until| now >= until) {
            return;
        }
        match state.roots.get(&root).map(|root| root.state) {
            Some(RootState::Distrusted) => {}
            Some(in_use @ (RootState::Active | RootState::Draining)) => {
                tracing::error!(%agent, %root, "the agent was told that the root is distrusted, in an entry that is lost, and here it is {in_use}; see `chancery root distrust`");
            }
            _ => record(ledger, &state, agent, root).await,
        }
    }
}

async fn record(ledger: &Ledger, state: &State, agent: &SpiffeId, root: Fingerprint) {
    if state.distrusted().count() >= MAX_DISTRUSTED {
        tracing::error!(%agent, %root, "the agent names a distrusted root, and {MAX_DISTRUSTED} are recorded already: it is not");
        return;
    }
    let change = Change::Root { root, to: RootState::Distrusted, overrides: Overrides::default() };
    match ledger.act(CA_ACTOR, change, &format!("{agent} was told so before entries were lost")).await {
        Ok(entry) => tracing::warn!(%agent, %root, entry, "a root is distrusted again: the entry that said so is lost, and an agent knows"),
        // Another agent named it meanwhile.
        Err(LedgerError::Impossible(_)) => {}
        Err(error) => tracing::error!(%agent, %root, %error, "a root that was distrusted could not be recorded as that"),
    }
}
