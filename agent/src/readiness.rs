//! Whether the agent can do its work.

use chancery_identity::Clock;
use chancery_process::http::Readiness;

use crate::ca_client::CaClient;
use crate::csi::{Health, Plugin};
use chancery_process::moment::moment;

/// Ready means an own certificate that has not expired and a trust bundle that is not empty. No session with the CA degrades the agent
/// but never takes it out of service: it goes on serving what it has; nor does an alarm about the ledger. (The proxies' socket is open before
/// this is asked.) With a CSI plugin the kubelet must find that, too; until it has registered it, the agent is degraded.
pub fn readiness(ca: &CaClient, plugin: Option<&Plugin>, clock: &dyn Clock) -> Readiness {
    let mut reasons = Vec::new();
    let plugin = plugin.map_or(Health::Good, Plugin::health);
    match &*ca.own().borrow() {
        None => reasons.push("the agent has no certificate of its own yet".to_owned()),
        Some(own) if own.is_expired(clock.now()) => {
            reasons.push(format!("the agent's own certificate expired at {}", moment(own.svid.not_after())));
        }
        Some(_) => {}
    }
    if ca.trust().borrow().is_none() {
        reasons.push("the agent has no trust bundle yet".to_owned());
    }
    if let Health::Unreachable(problem) = &plugin {
        reasons.push(problem.clone());
    }
    let unready = !reasons.is_empty();
    if let Health::Unregistered(problem) = plugin {
        reasons.push(problem);
    }
    if !*ca.reachable().borrow() {
        reasons.push(ca.problem());
    }
    reasons.extend(ca.ledger().borrow().alarm.as_ref().map(ToString::to_string));
    if unready {
        Readiness::NotReady(reasons)
    } else if reasons.is_empty() {
        Readiness::Ready
    } else {
        Readiness::Degraded(reasons)
    }
}
