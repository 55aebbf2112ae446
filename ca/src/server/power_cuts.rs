//! **A CA starts after a power cut in the middle of any call that it makes in its data directory, its first start included, and what was
//! acknowledged is in force.**

use std::path::PathBuf;
use std::sync::Arc;

use chancery_proto::chancery::v1::Start;

use super::parts::Parts;
use super::tests::try_opened;
use crate::ledger::Body;
use crate::ledger::acts::{Overrides, Subject};
use crate::rotation::Order;
use crate::store::embedded::faulty::FaultyFiles;
use crate::store::embedded::files::SystemFiles;
use crate::store::embedded::power_cuts::{say, trace, traced_dir};

const LIFE: &str = "server::power_cuts::a_process_lives_with_a_ca";
const ENTRIES: &str = "entries ";
const ACTIVE: &str = "active ";
/// A start takes a third of a second of a core.
const ONE_CALL_IN: usize = 3;

/// For the process that is traced; in any other it does nothing.
#[tokio::test]
async fn a_process_lives_with_a_ca() {
    let Some(dir) = traced_dir() else { return };
    for life in 0..3 {
        let parts = try_opened(&dir, Arc::new(SystemFiles)).await.unwrap();
        tell(&parts);
        let overrides = Overrides { force: true, ..Overrides::default() };
        let order = Order { actor: "local:uid=0", why: "a test", overrides: &overrides };
        parts.rotation.prepare(order.actor, order.why).await.unwrap();
        tell(&parts);
        parts.rotation.publish(None, order).await.unwrap();
        parts.checkpoints.publish().await.unwrap();
        tell(&parts);
        let subject = Subject::Node { cluster: "development".into(), node: format!("node-{life}") };
        parts.authority.revoke(order.actor, subject, order.why).await.unwrap();
        tell(&parts);
        parts.rotation.activate(None, order).await.unwrap();
        tell(&parts);
        if life == 0 {
            parts.checkpoints.rotate_key(order.actor, order.why).await.unwrap();
        }
        parts.rotation.retire(None, order).await.unwrap();
        tell(&parts);
        parts.ledger.close().await.unwrap();
    }
}

/// What is acknowledged.
fn tell(parts: &Parts) {
    say(&format!("{ENTRIES}{}", parts.ledger.entries()));
    say(&format!("{ACTIVE}{}", parts.authority.root_fingerprint()));
}

async fn check(dir: PathBuf, said: String) -> Result<(), String> {
    let last = |what: &str| said.lines().rev().find_map(|line| line.strip_prefix(what)).map(str::to_owned);
    let parts = try_opened(&dir, Arc::new(SystemFiles)).await.map_err(|error| format!("it does not start: {error}"))?;
    let (found, acknowledged) = (parts.ledger.entries(), last(ENTRIES).map_or(Ok(0), |entries| entries.parse::<u64>()));
    let acknowledged = acknowledged.map_err(|error| error.to_string())?;
    if found < acknowledged {
        return Err(format!("lost: {found} of {acknowledged} entries are there"));
    }
    let known = parts.authority.roots();
    if let Some(active) = last(ACTIVE).filter(|active| !known.iter().any(|root| root.fingerprint.to_string() == *active)) {
        return Err(format!("lost: the root {active}"));
    }
    parts.ledger.append(Body::Start(Start::default())).await.map_err(|error| error.to_string())?;
    parts.checkpoints.publish().await.map_err(|error| error.to_string())?;
    parts.ledger.close().await.map_err(|error| error.to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ca_starts_after_a_power_cut_in_the_middle_of_any_call() {
    let Some(traced) = trace(LIFE) else { return };
    traced.cut_everywhere(FaultyFiles::new(0), ONE_CALL_IN, check).await.unwrap();
}
