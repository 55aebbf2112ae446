//! `chancery doctor`: everything that somebody should look at, worst first, each with the next step.
//!
//! Judges what the other parts tell of themselves; holds nothing and changes nothing.

use std::collections::BTreeMap;
use std::sync::Arc;

use chancery_process::moment::moment;
use chancery_proto::chancery::v1::{AgentRecord, Finding};
use time::{Duration, OffsetDateTime};

use crate::authority::{CertificateStatus, RENEWAL, RootStatus, is_renewal_due};
use crate::fleet::Level;
use crate::ledger::Refusal;
use crate::ledger::acts::RootState;
use crate::server::problem::{MAKE_ROOM, Problem};

/// A trust root has to be rotated in time: everybody must get the next one first.
const ROOT_ENDS_SOON: Duration = Duration::days(30);
const ROOT_ENDS_NOW: Duration = Duration::days(7);
/// How long the certificates under a draining root take to be replaced where everybody is there: they live an hour, agents' own a day.
const DRAINS_WITHIN: Duration = Duration::hours(36);
/// How long an agent may be away without a word: a restart, a drained connection.
const AWAY: Duration = Duration::minutes(2);
/// Clocks that differ by more make certificates look not yet valid or expired.
const MAX_CLOCK_OFFSET: Duration = Duration::seconds(30);
/// What was refused longer ago has been mended, or asked for again.
const RECENT: Duration = Duration::minutes(10);
/// A change of the trust state reaches everybody sooner, where nothing is wrong.
const TRUST_SETTLES: Duration = Duration::seconds(10);
/// What was issued since the newest backup is lost with the machine.
const BACKUP_EVERY: Duration = Duration::DAY;
/// A disk that is full sooner should be looked at: new ones take days to get …
const DISK_ENDS_SOON_DAYS: f64 = 14.0;
/// … and now.
const DISK_ENDS_NOW_DAYS: f64 = 2.0;
/// How many of a kind are named.
const NAMED: usize = 5;

/// What the parts tell.
pub(super) struct Facts {
    pub(super) now: OffsetDateTime,
    /// What keeps the CA from issuing.
    pub(super) obstacles: Vec<Problem>,
    /// What it issues in spite of.
    pub(super) flaws: Vec<Problem>,
    pub(super) certificates: Vec<CertificateStatus>,
    /// All that acts have named.
    pub(super) roots: Arc<Vec<RootStatus>>,
    pub(super) agents: Vec<AgentRecord>,
    /// The newest trust state.
    pub(super) trust_sequence: u64,
    /// Since when it is.
    pub(super) trust_changed_at: Option<OffsetDateTime>,
    /// Newest first.
    pub(super) refusals: Vec<Refusal>,
    /// Nobody has to keep what it issues.
    pub(super) development: bool,
    /// When the newest backup was made.
    pub(super) last_backup: Option<OffsetDateTime>,
    /// Until the ledger's disk is full, if that can be told.
    pub(super) disk_days_left: Option<f64>,
    /// The ledger was restored, and roots stay where they are until then.
    pub(super) roots_kept_until: Option<OffsetDateTime>,
    /// Whether whoever has the disk lacks something to use the CA's keys.
    pub(super) keys_are_sealed: bool,
}

impl Facts {
    /// Worst first.
    pub(super) fn judge(&self) -> Vec<Finding> {
        let mut findings: Vec<(Level, String, &str)> = Vec::new();
        findings.extend(
            self.obstacles.iter().map(|Problem { text, next_step }| (Level::Bad, format!("nothing is issued: {text}"), *next_step)),
        );
        findings.extend(self.flaws.iter().map(|Problem { text, next_step }| (Level::Warn, text.clone(), *next_step)));
        findings.extend(self.certificates.iter().filter_map(|certificate| self.on_certificate(certificate)));
        findings.extend(self.on_roots());
        findings.extend(self.on_agents());
        findings.extend(self.on_refusals());
        findings.extend(self.on_backup());
        findings.extend(self.on_disk());
        findings.extend(self.on_restoration());
        findings.extend(self.on_keys());
        findings.sort_by_key(|(level, ..)| *level != Level::Bad);
        findings.into_iter().map(|(level, text, next)| Finding { level: level.to_string(), text, next_step: next.into() }).collect()
    }

    fn on_certificate(&self, certificate: &CertificateStatus) -> Option<(Level, String, &'static str)> {
        let CertificateStatus { root, state, fingerprint, subject, not_before, not_after } = certificate;
        if *state == Some(RootState::Draining) {
            return None;
        }
        let left = *not_after - self.now;
        let ends = format!("{subject} ends at {}", moment(*not_after));
        let of_roots = self.roots.iter().find(|one| *root && one.fingerprint == *fingerprint);
        let is_to_be_asked_for = of_roots.is_some_and(|root| is_renewal_due(root, &self.roots, self.now));
        match (root, left) {
            (true, left) if is_to_be_asked_for => {
                let level = if left < ROOT_ENDS_SOON { Level::Bad } else { Level::Warn };
                Some((level, ends, RENEWAL))
            }
            (true, left) if left < ROOT_ENDS_NOW => {
                Some((Level::Bad, ends, "`chancery root rotate` now, before anything that it signed ends with it"))
            }
            (true, left) if left < ROOT_ENDS_SOON => Some((Level::Warn, ends, "`chancery root rotate` brings in the next one")),
            (false, left) if left < (*not_after - *not_before) / 4 && self.awaits_crl() => Some((
                Level::Warn,
                format!("{ends}, and the next one waits until everybody has its CRL"),
                "`chancery agent list` shows who has not; with an eighth of its life left it waits for nobody",
            )),
            (false, left) if left < (*not_after - *not_before) / 4 => Some((
                Level::Bad,
                format!("{ends}, and was not renewed from half of its life on"),
                "the CA's log says why it could not be renewed",
            )),
            _ => None,
        }
    }

    /// Whether the next issuing certificate is there, and must not sign yet.
    fn awaits_crl(&self) -> bool {
        self.roots.iter().any(|root| root.state == RootState::Active && root.awaited.is_some())
    }

    /// A rotation that is stuck, a distrust that has not ended, a replacement that is missing.
    fn on_roots(&self) -> Vec<(Level, String, &'static str)> {
        let mut findings = Vec::new();
        let draining = || self.roots.iter().filter(|root| root.state == RootState::Draining);
        for root in draining() {
            let RootStatus { fingerprint, since, leave_by, .. } = root;
            if leave_by.is_some_and(|deadline| deadline.since > self.now) {
                let text = format!("the distrust of the root {fingerprint} began at a later time than it is now: the clock was set back");
                let next_step = "it leaves when as much time has passed as was ordered; `chancery root distrust --now` does not wait";
                findings.push((Level::Warn, text, next_step));
            } else if leave_by.is_some_and(|deadline| deadline.at < self.now) {
                let text = format!("the distrusted root {fingerprint} is still in the bundles");
                findings.push((Level::Bad, text, "the CA's log says what keeps it there"));
            } else if self.now - *since > DRAINS_WITHIN {
                let text = format!("the root {fingerprint} is draining since {}: the rotation is stuck", moment(*since));
                findings.push((Level::Warn, text, "`chancery root retire --dry-run` says who is missing"));
            }
        }
        let has_replacement = self.roots.iter().any(|root| root.state == RootState::Published && root.issuing_until.is_some());
        if !has_replacement && draining().next().is_none() && !self.development {
            let text = "no replacement for the trust root is published: distrusting it would cost connections".to_owned();
            let is_corporate = self.roots.iter().any(|root| root.state == RootState::Active && root.signed_by.is_some());
            let own = "set `keep_replacement` under [rotation], or `chancery root prepare` and `publish`";
            findings.push((Level::Warn, text, if is_corporate { RENEWAL } else { own }));
        }
        findings
    }

    fn on_agents(&self) -> Vec<(Level, String, &'static str)> {
        let millis = Duration::milliseconds;
        let now_ms = i64::try_from(self.now.unix_timestamp_nanos() / 1_000_000).unwrap_or(i64::MAX);
        let settled = self.trust_changed_at.is_none_or(|at| (self.now - at).abs() > TRUST_SETTLES);
        let mut findings = Vec::new();
        let mut find = |level, concerns: &dyn Fn(&AgentRecord) -> bool, what, next_step| {
            let names: Vec<_> = self.agents.iter().filter(|agent| concerns(agent)).map(name).collect();
            if !names.is_empty() {
                findings.push((level, format!("{} {what}: {}", count(names.len(), "agent"), listed(&names)), next_step));
            }
        };
        find(
            Level::Bad,
            &|agent| !agent.ledger_alarm.is_empty(),
            "shown a ledger that does not belong to this one: a backup was restored, entries were lost or changed, or there are two histories",
            "keep a copy of the data directory; `chancery agent list` says what each knows, `chancery-agent status` on its node has both checkpoints",
        );
        find(
            Level::Warn,
            &|agent| agent.banned_by != 0 && agent.svid_not_after_ms > now_ms,
            "banned by an operator: nothing is renewed on its node",
            "`chancery agent unban`, if that was in error; `chancery log acts` says who and why",
        );
        find(
            Level::Bad,
            &|agent| {
                agent.banned_by == 0 && !agent.connected && millis(now_ms - agent.last_seen_ms) > AWAY && agent.svid_not_after_ms > now_ms
            },
            "away although its certificate is good: nothing is renewed on its node",
            "see its log, or whether its node is gone",
        );
        find(
            Level::Bad,
            &|agent| agent.connected && agent.svid_not_after_ms <= now_ms,
            "connected with a certificate that has expired",
            "see its log for why it was not renewed",
        );
        find(
            Level::Warn,
            &|agent| settled && agent.connected && agent.trust_sequence < self.trust_sequence,
            "without the newest trust state",
            "see its log: it refused it, or hangs",
        );
        find(
            Level::Warn,
            &|agent| agent.banned_by == 0 && !agent.connected && (1..self.trust_sequence).contains(&agent.trust_sequence),
            "away that missed a change of the trust roots or CRLs",
            "it comes back by itself if its bundle file is kept up to date (`bundle.pem` of the data directory); else give it the newest one, or `chancery-agent reset`",
        );
        find(
            Level::Warn,
            &|agent| settled && agent.connected && agent.lagging > 0,
            "with proxies that have not acknowledged the newest trust bundle",
            "`chancery-agent status` on its node names them and their reasons",
        );
        find(
            Level::Bad,
            &|agent| agent.connected && millis(agent.clock_offset_ms).abs() > MAX_CLOCK_OFFSET,
            "whose clock differs from the CA's by more than 30 s",
            "set the clocks right: certificates look expired or not yet valid",
        );
        findings
    }

    fn on_backup(&self) -> Option<(Level, String, &'static str)> {
        let text = match self.last_backup {
            _ if self.development => return None,
            Some(made_at) if self.now - made_at <= BACKUP_EVERY => return None,
            Some(made_at) => format!("the newest backup is older than a day: it was made at {}", moment(made_at)),
            None => "there is no backup: with this machine, the ledger would be lost".to_owned(),
        };
        Some((Level::Warn, text, "`chancery-ca backup --config FILE --to FILE.tar`, every hour, and keep the file on another machine"))
    }

    fn on_disk(&self) -> Option<(Level, String, &'static str)> {
        let days = self.disk_days_left.filter(|days| *days < DISK_ENDS_SOON_DAYS)?;
        let level = if days < DISK_ENDS_NOW_DAYS { Level::Bad } else { Level::Warn };
        if days == 0.0 {
            let text = "the ledger's disk is full: nothing is issued once the newest segment is".to_owned();
            return Some((Level::Bad, text, MAKE_ROOM));
        }
        let text =
            format!("the ledger's disk is full in {days:.1} days, if the ledger grows as within the last day; then nothing is issued");
        Some((level, text, MAKE_ROOM))
    }

    fn on_restoration(&self) -> Option<(Level, String, &'static str)> {
        let until = self.roots_kept_until.filter(|until| self.now < *until)?;
        let text = format!(
            "the ledger was restored from a backup and may lack certificates: until {} no root is activated or retired",
            moment(until)
        );
        Some((Level::Warn, text, "if the old machine may be in somebody's hands, `chancery root distrust` the active root: that goes on"))
    }

    fn on_keys(&self) -> Option<(Level, String, &'static str)> {
        let text = "the CA's keys are not sealed: whoever can read the data directory can issue any identity".to_owned();
        let next_step = "set `passphrase_file` (or `identity_file`) under [keys] and restart the CA, which seals them";
        (!self.keys_are_sealed && !self.development).then_some((Level::Warn, text, next_step))
    }

    fn on_refusals(&self) -> Option<(Level, String, &'static str)> {
        let mut by_reason: BTreeMap<&str, usize> = BTreeMap::new();
        for refusal in self.refusals.iter().take_while(|refusal| self.now - refusal.time < RECENT) {
            *by_reason.entry(&refusal.reason).or_default() += 1;
        }
        let reasons: Vec<_> = by_reason.iter().map(|(reason, times)| format!("{reason} ({times})")).collect();
        let total = by_reason.values().sum();
        (total > 0).then(|| {
            let text = format!("{} refused within {} min: {}", count(total, "certificate"), RECENT.whole_minutes(), listed(&reasons));
            (Level::Warn, text, "`chancery identity refusals` says to whom and why")
        })
    }
}

fn name(agent: &AgentRecord) -> String {
    if agent.node.is_empty() { agent.spiffe_id.clone() } else { format!("{}/{}", agent.cluster, agent.node) }
}

fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

fn listed(names: &[String]) -> String {
    let shown = names.iter().take(NAMED).map(String::as_str).collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(NAMED) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use chancery_identity::Fingerprint;

    use super::*;
    use crate::ledger::acts::Deadline;

    const NOW: OffsetDateTime = time::macros::datetime!(2026-03-01 12:00 UTC);

    fn well() -> Facts {
        let agent = AgentRecord {
            cluster: "east".into(),
            node: "node-1".into(),
            connected: true,
            last_seen_ms: millis(NOW),
            trust_sequence: 7,
            svid_not_after_ms: millis(NOW + Duration::DAY),
            ..AgentRecord::default()
        };
        Facts {
            now: NOW,
            obstacles: Vec::new(),
            flaws: Vec::new(),
            certificates: vec![certificate(true, Duration::days(300)), certificate(false, Duration::days(6))],
            roots: Arc::new(vec![root(RootState::Active), root(RootState::Published)]),
            agents: vec![agent],
            trust_sequence: 7,
            trust_changed_at: Some(NOW - Duration::MINUTE),
            refusals: Vec::new(),
            development: false,
            last_backup: Some(NOW - Duration::hours(23)),
            disk_days_left: Some(14.0),
            roots_kept_until: Some(NOW),
            keys_are_sealed: true,
        }
    }

    fn millis(time: OffsetDateTime) -> i64 {
        time.unix_timestamp() * 1000
    }

    fn certificate(root: bool, left: Duration) -> CertificateStatus {
        let not_before = NOW - Duration::DAY;
        let (fingerprint, state) = (Fingerprint([1; 32]), root.then_some(RootState::Active));
        CertificateStatus { root, state, fingerprint, subject: "a certificate".into(), not_before, not_after: NOW + left }
    }

    fn root(state: RootState) -> RootStatus {
        RootStatus {
            fingerprint: Fingerprint([1; 32]),
            certificate: Vec::new().into(),
            subject: "a root".into(),
            signed_by: None,
            not_before: NOW - Duration::DAY,
            not_after: NOW + Duration::days(300),
            state,
            since: NOW - Duration::HOUR,
            entry: 1,
            leave_by: None,
            has_key: true,
            issuing_until: Some(NOW + Duration::DAY),
            awaited: None,
        }
    }

    #[test]
    fn a_rotation_that_does_not_go_on_is_named() {
        let roots = |changed: RootStatus| Arc::new(vec![changed, root(RootState::Active)]);
        finds("warn", "no replacement", |facts| facts.roots = Arc::new(vec![root(RootState::Active)]));
        let mut facts = well();
        facts.roots = roots(root(RootState::Draining));
        assert_eq!(facts.judge(), [], "it takes its time");
        let since = NOW - Duration::hours(37);
        finds("warn", "is stuck", |facts| facts.roots = roots(RootStatus { since, ..root(RootState::Draining) }));
        let leave_by = Some(Deadline { at: NOW - Duration::SECOND, since: NOW - Duration::MINUTE });
        finds("bad", "distrusted root", |facts| facts.roots = roots(RootStatus { leave_by, ..root(RootState::Draining) }));
        let leave_by = Some(Deadline { at: NOW + Duration::DAY + Duration::MINUTE, since: NOW + Duration::DAY });
        finds("warn", "clock was set back", |facts| facts.roots = roots(RootStatus { leave_by, ..root(RootState::Draining) }));
    }

    #[test]
    fn an_issuing_certificate_that_waits_for_its_crl_is_named_when_the_one_before_nears_its_end() {
        let waiting = RootStatus { awaited: Some(7), ..root(RootState::Active) };
        let roots = Arc::new(vec![waiting, root(RootState::Published)]);
        finds("warn", "waits until everybody has its CRL", |facts| {
            facts.certificates.push(certificate(false, Duration::hours(5)));
            facts.roots = Arc::clone(&roots);
        });
        finds("bad", "was not renewed", |facts| facts.certificates.push(certificate(false, Duration::hours(5))));
    }

    #[test]
    fn a_corporate_root_is_to_be_asked_for_anew_in_time_since_no_replacement_is_made_by_itself() {
        let signed_by = || Some("CN=Corporate".to_owned());
        let corporate = |state, left| RootStatus {
            signed_by: signed_by(),
            not_before: NOW - Duration::days(300),
            not_after: NOW + left,
            ..root(state)
        };
        let at = |days| {
            let (active, next) =
                (corporate(RootState::Active, Duration::days(days)), corporate(RootState::Published, Duration::days(days)));
            Facts { certificates: vec![certificate(true, Duration::days(days))], roots: Arc::new(vec![active, next]), ..well() }
        };
        assert_eq!(at(91).judge(), []);
        for (days, level) in [(89, "warn"), (29, "bad")] {
            let findings = at(days).judge();
            assert_eq!((findings.len(), findings[0].level.as_str()), (1, level), "{findings:?}");
            assert!(findings[0].next_step.contains("chancery root prepare --csr"), "{findings:?}");
        }
        let mut facts = at(89);
        Arc::make_mut(&mut facts.roots).push(corporate(RootState::Published, Duration::days(300)));
        assert_eq!(facts.judge(), [], "the next one is there");
        let mut facts = at(300);
        Arc::make_mut(&mut facts.roots).truncate(1);
        assert!(facts.judge()[0].next_step.contains("--csr"), "no replacement, and only the corporate CA can sign one");
    }

    /// What is found after `spoil`: one finding that says `words`.
    fn finds(level: &str, words: &str, spoil: impl FnOnce(&mut Facts)) {
        let mut facts = well();
        spoil(&mut facts);
        let findings = facts.judge();
        assert_eq!(findings.len(), 1, "{findings:?}");
        assert_eq!(findings[0].level, level);
        assert!(findings[0].text.contains(words), "{findings:?}");
    }

    #[test]
    fn a_ca_that_is_well_has_nothing_to_look_at() {
        assert_eq!(well().judge(), []);
    }

    #[test]
    fn what_keeps_it_from_issuing_comes_first() {
        let problem = |text: &str| Problem::new(text.into(), "mend it");
        let facts = Facts { obstacles: vec![problem("the disk is full")], flaws: vec![problem("a flaw")], ..well() };
        assert!(facts.judge().iter().all(|finding| finding.next_step == "mend it"));
        let levels: Vec<_> = facts.judge().into_iter().map(|finding| finding.level).collect();
        assert_eq!(levels, ["bad", "warn"]);
    }

    #[test]
    fn a_certificate_that_ends_soon_is_named() {
        finds("warn", "a certificate ends at", |facts| facts.certificates = vec![certificate(true, Duration::days(29))]);
        finds("bad", "a certificate ends at", |facts| facts.certificates = vec![certificate(true, Duration::days(6))]);
        finds("bad", "was not renewed", |facts| facts.certificates = vec![certificate(false, Duration::hours(1))]);
    }

    #[test]
    fn an_agent_that_is_not_as_it_should_be_is_named_by_its_node() {
        finds("bad", "1 agent away although its certificate is good: nothing is renewed on its node: east/node-1", |facts| {
            facts.agents[0].connected = false;
            facts.agents[0].last_seen_ms -= 180_000;
        });
        finds("warn", "1 agent banned by an operator: nothing is renewed on its node: east/node-1", |facts| {
            facts.agents[0].connected = false;
            facts.agents[0].last_seen_ms -= 180_000;
            facts.agents[0].trust_sequence = 6;
            facts.agents[0].banned_by = 9;
        });
        finds("bad", "expired", |facts| facts.agents[0].svid_not_after_ms = millis(NOW));
        finds("warn", "newest trust state", |facts| facts.agents[0].trust_sequence = 6);
        finds("warn", "missed a change of the trust roots", |facts| {
            facts.agents[0].connected = false;
            facts.agents[0].trust_sequence = 6;
        });
        finds("warn", "newest trust bundle", |facts| facts.agents[0].lagging = 1);
        let mut just_changed = Facts { trust_sequence: 8, trust_changed_at: Some(NOW), ..well() };
        just_changed.agents[0].lagging = 1;
        assert_eq!(just_changed.judge(), [], "it is on its way");
        finds("bad", "does not belong to this one", |facts| facts.agents[0].ledger_alarm = "forked: other entries".into());
        finds("bad", "clock", |facts| facts.agents[0].clock_offset_ms = -31_000);
    }

    #[test]
    fn a_ca_without_a_backup_of_the_last_day_is_told_so_unless_it_is_for_development() {
        finds("warn", "older than a day", |facts| facts.last_backup = Some(NOW - Duration::hours(25)));
        finds("warn", "there is no backup", |facts| facts.last_backup = None);
        assert_eq!(Facts { last_backup: None, development: true, ..well() }.judge(), []);
    }

    #[test]
    fn a_restored_ledger_and_keys_that_are_not_sealed_are_named() {
        finds("warn", "restored from a backup", |facts| facts.roots_kept_until = Some(NOW + Duration::HOUR));
        finds("warn", "not sealed", |facts| facts.keys_are_sealed = false);
        assert_eq!(Facts { keys_are_sealed: false, development: true, ..well() }.judge(), []);
    }

    #[test]
    fn a_disk_that_is_full_within_two_weeks_is_named() {
        finds("warn", "full in 13.9 days", |facts| facts.disk_days_left = Some(13.9));
        finds("bad", "full in 1.9 days", |facts| facts.disk_days_left = Some(1.9));
        finds("bad", "disk is full: nothing", |facts| facts.disk_days_left = Some(0.0));
        assert_eq!(Facts { disk_days_left: None, ..well() }.judge(), []);
    }

    #[test]
    fn only_so_many_are_named() {
        finds(
            "warn",
            "7 agents without the newest trust state: east/node-1, east/node-1, east/node-1, east/node-1, east/node-1 and 2 more",
            |facts| {
                facts.agents = vec![AgentRecord { trust_sequence: 6, ..facts.agents[0].clone() }; 7];
            },
        );
    }

    #[test]
    fn recent_refusals_are_counted_by_reason() {
        let refusal = |reason: &str, ago| Refusal {
            time: NOW - Duration::minutes(ago),
            agent: String::new(),
            reason: reason.into(),
            message: String::new(),
            namespace: String::new(),
            service_account: String::new(),
            pod: String::new(),
            pod_uid: None,
            request_id: String::new(),
        };
        finds("warn", "3 certificates refused within 10 min: csr_signature (1), token_expired (2)", |facts| {
            facts.refusals = vec![refusal("token_expired", 1), refusal("csr_signature", 2), refusal("token_expired", 9), refusal("x", 11)];
        });
    }
}
