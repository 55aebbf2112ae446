//! Why has this pod no certificate? What the ledger, the refusals and the agent of its node say, drawn together into a verdict.

use std::fmt;

use chancery_process::moment::moment;
use chancery_proto::chancery::v1::AgentRecord;
use time::OffsetDateTime;

use crate::fleet::{Fleet, note_bans};
use crate::ledger::{Identity, Ledger, LedgerError, PodFilter, Refusal, RefusalFilter, Refusals};

/// How many refusals are shown.
const MAX_REFUSALS: usize = 10;
/// Clocks that differ by more make certificates look not yet valid or expired.
const MAX_CLOCK_OFFSET_MS: i64 = 30_000;

/// How good or bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// As it should be.
    Ok,
    /// Worth a look.
    Warn,
    /// A cause.
    Bad,
}

/// Everything known about one pod's certificate.
#[derive(Clone, Debug)]
pub struct Explanation {
    /// One sentence.
    pub verdict: String,
    /// What to do; empty if nothing.
    pub next_step: String,
    /// What the verdict rests on.
    pub findings: Vec<(Level, String)>,
    /// The newest certificate.
    pub latest: Option<Identity>,
    /// Newest first.
    pub refusals: Vec<Refusal>,
}

/// The facts, before they are judged.
struct Facts {
    now: OffsetDateTime,
    latest: Option<Identity>,
    /// By what the newest certificate is revoked.
    revoked: Option<String>,
    refusals: Vec<Refusal>,
    agent: Option<AgentRecord>,
}

/// Where the certificate stands.
enum Standing {
    Valid,
    Revoked,
    Expired,
    Never,
}

impl Fleet {
    /// Explains the pod of this name.
    ///
    /// # Errors
    /// If the ledger cannot be read.
    pub async fn explain(&self, ledger: &Ledger, refusals: &Refusals, namespace: &str, pod: &str) -> Result<Explanation, LedgerError> {
        let latest = ledger.latest_for_pod(namespace, pod).await?;
        let filter = RefusalFilter {
            pod: Some(PodFilter::Name { namespace: Some(namespace.to_owned()), name: pod.to_owned() }),
            ..RefusalFilter::default()
        };
        let refusals = refusals.list_newest(&filter, MAX_REFUSALS);
        let revocation = latest.as_ref().and_then(|latest| ledger.revocation(latest));
        let revoked = revocation.map(|revocation| match ledger.act_of(&revocation) {
            Some(entry) => format!("revoked by ledger entry {entry}"),
            None => format!("revoked at {}, in the ledger that this one continues", moment(revocation.since)),
        });
        let mut agent = latest.as_ref().and_then(|latest| self.on_node(&latest.issuance.cluster, &latest.issuance.node));
        note_bans(agent.as_mut_slice(), &ledger.current_state());
        Ok(Facts { now: self.clock.now(), latest, revoked, refusals, agent }.judge())
    }
}

impl Facts {
    fn judge(self) -> Explanation {
        let (verdict, next_step) = self.verdict();
        let findings = [self.on_certificate(), self.on_refusals()].into_iter().chain(self.on_agent()).collect();
        Explanation { verdict, next_step, findings, latest: self.latest, refusals: self.refusals }
    }

    fn standing(&self) -> Standing {
        match (&self.latest, &self.revoked) {
            (Some(latest), _) if self.now > latest.leaf.not_after => Standing::Expired,
            (Some(_), Some(_)) => Standing::Revoked,
            (Some(_), None) => Standing::Valid,
            (None, _) => Standing::Never,
        }
    }

    /// The newest refusal, if nothing was issued since.
    fn pending_refusal(&self) -> Option<&Refusal> {
        let issued = self.latest.as_ref().map(|latest| latest.time);
        self.refusals.first().filter(|refusal| issued.is_none_or(|issued| refusal.time > issued))
    }

    fn verdict(&self) -> (String, String) {
        let revoked = self.revoked.as_deref().unwrap_or_default();
        let until = self.latest.as_ref().map(|latest| moment(latest.leaf.not_after)).unwrap_or_default();
        match (self.standing(), self.pending_refusal()) {
            (Standing::Valid, None) => (format!("certificate valid until {until}"), self.look_at_agent().unwrap_or_default()),
            (Standing::Valid, Some(refusal)) => {
                (format!("certificate valid until {until}, but a newer one was refused: {}", refusal.reason), mend(refusal))
            }
            (Standing::Revoked, None) => {
                let step = "`chancery log acts` says who revoked it, and why; `chancery identity allow` lets it have another one";
                (format!("{revoked}: proxies refuse the certificate"), step.into())
            }
            (Standing::Revoked, Some(refusal)) => (format!("{revoked}, and another one was refused: {}", refusal.reason), mend(refusal)),
            (Standing::Expired | Standing::Never, Some(refusal)) => (format!("refused: {}", refusal.reason), mend(refusal)),
            (Standing::Expired, None) => {
                let streams = "see on its node, with `chancery-agent streams`, whether its proxy is still connected";
                (format!("expired at {until}, and nobody asked for a new one"), self.look_at_agent().unwrap_or_else(|| streams.into()))
            }
            (Standing::Never, None) => {
                let step = "check that its node has an agent (`chancery agent list`), and that its proxy asks the agent's socket with its \
                            token; what the agent refuses by itself (a token that has expired, or is another node's) is in its log alone, \
                            as a stream that was not accepted; a token that could not be verified is listed by `chancery identity \
                            refusals` without a pod";
                ("never asked".into(), step.into())
            }
        }
    }

    fn look_at_agent(&self) -> Option<String> {
        let node = &self.latest.as_ref()?.issuance.node;
        if let Some(entry) = self.ban() {
            return Some(format!(
                "the agent of node {node} was banned by ledger entry {entry}, so nothing is renewed there: `chancery agent unban`, if it was in error"
            ));
        }
        let connected = self.agent.as_ref().is_some_and(|agent| agent.connected);
        (!connected).then(|| format!("the agent of node {node} is not connected, so nothing is renewed there: see its log"))
    }

    /// The entry of the agent's ban.
    fn ban(&self) -> Option<u64> {
        self.agent.as_ref().map(|agent| agent.banned_by).filter(|entry| *entry != 0)
    }

    fn on_certificate(&self) -> (Level, String) {
        let Some(latest) = &self.latest else { return (Level::Bad, "no certificate was ever issued to a pod of this name".into()) };
        let leaf = &latest.leaf;
        let described = format!("the newest certificate was issued at {}, serial {}", moment(latest.time), leaf.serial);
        let late = leaf.not_before + (leaf.not_after - leaf.not_before) * 3 / 4;
        match self.standing() {
            Standing::Valid if self.now < late => (Level::Ok, described),
            Standing::Valid => (Level::Warn, format!("{described}; three quarters of its life are over, and it was not renewed")),
            Standing::Revoked => (Level::Bad, format!("{described}; {}", self.revoked.as_deref().unwrap_or_default())),
            Standing::Expired | Standing::Never => (Level::Bad, format!("{described}; it has expired")),
        }
    }

    fn on_refusals(&self) -> (Level, String) {
        match self.pending_refusal() {
            Some(refusal) => (Level::Bad, format!("refused at {}: {}", moment(refusal.time), refusal.message)),
            None if self.refusals.is_empty() => (Level::Ok, "nothing was refused to it since the CA started".into()),
            None => (Level::Ok, "what was refused to it before, it has got since".into()),
        }
    }

    fn on_agent(&self) -> Vec<(Level, String)> {
        let Some(latest) = &self.latest else { return Vec::new() };
        let node = &latest.issuance.node;
        let Some(agent) = &self.agent else {
            return vec![(Level::Bad, format!("no agent of node {node} was seen since the CA started"))];
        };
        let heard = moment_ms(agent.last_seen_ms);
        if let Some(entry) = self.ban() {
            return vec![(Level::Bad, format!("the agent of node {node} was banned by ledger entry {entry}; last heard of at {heard}"))];
        }
        if !agent.connected {
            return vec![(Level::Bad, format!("the agent of node {node} is not connected; last heard of at {heard}"))];
        }
        let mut findings = vec![(Level::Ok, format!("the agent of node {node} is connected; last heard of at {heard}"))];
        if agent.lagging > 0 {
            findings.push((Level::Warn, format!("{} of its proxies have not acknowledged the newest trust bundle", agent.lagging)));
        }
        if agent.clock_offset_ms.abs() > MAX_CLOCK_OFFSET_MS {
            findings.push((Level::Warn, format!("its clock differs from the CA's by {} s", agent.clock_offset_ms / 1000)));
        }
        findings
    }
}

fn mend(refusal: &Refusal) -> String {
    let message = &refusal.message;
    match &*refusal.reason {
        "pod_gone" | "pod_finished" => format!("{message}. Nothing, unless the pod should be there: then see why it is not"),
        "cluster_syncing" | "api_server_away" | "api_server_busy" => format!("{message}. `chancery doctor` says how the cluster stands"),
        _ => format!("{message}. Once that is mended the agent tries again by itself"),
    }
}

pub(super) fn moment_ms(millis: i64) -> String {
    OffsetDateTime::from_unix_timestamp(millis.div_euclid(1000)).map(moment).unwrap_or_default()
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Bad => "bad",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_to_do_depends_on_whether_anything_can_be_mended() {
        let step = |reason: &str| {
            let refusal = Refusal {
                time: OffsetDateTime::UNIX_EPOCH,
                agent: String::new(),
                reason: reason.into(),
                message: "so it is".into(),
                namespace: String::new(),
                service_account: String::new(),
                pod: String::new(),
                pod_uid: None,
                request_id: String::new(),
            };
            mend(&refusal)
        };
        assert!(step("pod_gone").starts_with("so it is. Nothing"));
        assert!(step("api_server_away").contains("chancery doctor"));
        assert!(step("token_other_node").contains("Once that is mended"));
    }
}
