//! The parts of a running CA, and how they stand together: ready or not, `status`, the gauges of `/metrics`.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use chancery_identity::Clock;
use chancery_process::http::Readiness;
use chancery_proto::chancery::v1::{AuthorityStatus, ClusterStatus, Finding, StatusResponse};
use time::{Duration, OffsetDateTime};

use crate::api::People;
use crate::attestation::Clusters;
use crate::authority::{Authority, DataDirectory};
use crate::backup::last_backup;
use crate::config::Config;
use crate::fleet::{Fleet, note_bans};
use crate::issuance::Issuance;
use crate::keys::SealSettings;
use crate::ledger::acts::RootState;
use crate::ledger::{Checkpoints, Ledger, LedgerHealth, RefusalFilter, Refusals};
use crate::publication::Publication;
use crate::rotation::Rotation;
use crate::server::clusters;
use crate::server::doctor::Facts;
use crate::server::growth::Growth;
use crate::server::problem::{KEEP_AND_RESTORE, MAKE_ROOM, Problem, texts};
use crate::server::scrub::Scrubs;
use crate::telemetry::Reading;

/// How many of the newest refusals the diagnosis counts.
const JUDGED_REFUSALS: usize = 1000;
/// An issuance waits for a durable write, which takes a disk a millisecond or two.
const SLOW_WRITE: std::time::Duration = std::time::Duration::from_secs(1);
const LOOK_AT_DISK: &str = "see what the CA's log and the system's (`dmesg`) say of the disk";
const RESTORE: &str =
    "keep a copy of the data directory, and restore the newest backup (`chancery-ca restore`; docs/rotation.md tells how)";
const FIRST_EXPIRY: &str = "Until the first certificate that a connected agent holds expires if this CA goes away";

/// Everything that answers questions.
pub(super) struct Parts {
    pub(super) clock: Arc<dyn Clock>,
    pub(super) started_at: OffsetDateTime,
    pub(super) config: ArcSwap<Config>,
    pub(super) ledger: Ledger,
    pub(super) checkpoints: Arc<Checkpoints>,
    pub(super) refusals: Arc<Refusals>,
    pub(super) authority: Arc<Authority>,
    pub(super) clusters: Arc<Clusters>,
    pub(super) publication: Arc<Publication>,
    pub(super) issuance: Arc<Issuance>,
    pub(super) fleet: Arc<Fleet>,
    pub(super) rotation: Arc<Rotation>,
    pub(super) people: Arc<People>,
    pub(super) scrubs: Scrubs,
    pub(super) growth: Growth,
    /// Locked as long as this exists.
    pub(super) directory: DataDirectory,
    /// Why the configuration on disk is not the one in force.
    pub(super) configuration_error: Mutex<Option<String>>,
}

impl Parts {
    /// Whether this CA can issue, as `/readyz` tells it.
    pub(super) fn readiness(&self) -> Readiness {
        let obstacles = self.obstacles();
        if !obstacles.is_empty() {
            return Readiness::NotReady(texts(obstacles));
        }
        let flaws = self.flaws_and_alarms();
        if flaws.is_empty() { Readiness::Ready } else { Readiness::Degraded(flaws) }
    }

    /// What keeps it from issuing.
    fn obstacles(&self) -> Vec<Problem> {
        let of_ledger = match &*self.ledger.health().borrow() {
            LedgerHealth::Ok => None,
            LedgerHealth::Full(error) => Some(Problem::new(error.to_string(), MAKE_ROOM)),
            LedgerHealth::Unavailable(error) | LedgerHealth::Failed(error) => Some(Problem::new(error.to_string(), LOOK_AT_DISK)),
            LedgerHealth::Contradicted(proof) => Some(Problem::new(proof.to_string(), RESTORE)),
        };
        let mut obstacles = Vec::from_iter(of_ledger);
        let of_authority = self.authority.problem(self.clock.now());
        obstacles.extend(of_authority.map(|problem| Problem::new(problem, "the CA's log says why it could not be renewed")));
        obstacles.extend(clusters::obstacles(&self.clusters.status()));
        obstacles
    }

    /// What somebody should look at although it issues.
    fn flaws(&self) -> Vec<Problem> {
        let mut flaws = clusters::flaws(&self.clusters.status(), &self.publication.status());
        flaws.extend(self.configuration_error().map(|error| {
            let text = format!("the configuration on disk is not in force: {error}");
            Problem::new(text, "mend the file, or put the old one back; `chancery-ca check --config FILE` says what is wrong, and where")
        }));
        flaws.extend(
            self.checkpoints
                .problem()
                .map(|problem| Problem::new(format!("no newer checkpoint of the ledger is published: {problem}"), LOOK_AT_DISK)),
        );
        flaws.extend(self.scrubs.standing().damage.map(|damage| Problem::new(damage, KEEP_AND_RESTORE)));
        let latency = self.ledger.stats().commit_latency;
        flaws.extend((latency >= SLOW_WRITE).then(|| {
            let took = latency.as_secs_f64();
            let text = format!("issuance is slow, because the ledger's disk is: the newest durable write has taken {took:.1} s");
            Problem::new(text, "see what else uses the disk, or whether it fails")
        }));
        flaws
    }

    /// The same, with what agents say about the ledger. The doctor judges each agent by itself.
    fn flaws_and_alarms(&self) -> Vec<String> {
        self.fleet.ledger_problems().into_iter().chain(texts(self.flaws())).collect()
    }

    pub(super) fn configuration_error(&self) -> Option<String> {
        self.configuration_error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_configuration_error(&self, error: Option<String>) {
        *self.configuration_error.lock().unwrap_or_else(PoisonError::into_inner) = error;
    }

    /// What `chancery doctor` shows.
    pub(super) fn diagnose(&self) -> Vec<Finding> {
        let config = self.config.load();
        let mut agents = self.fleet.agents();
        note_bans(&mut agents, &self.ledger.current_state());
        let facts = Facts {
            now: self.clock.now(),
            obstacles: self.obstacles(),
            flaws: self.flaws(),
            certificates: self.authority.status(),
            roots: self.authority.roots(),
            agents,
            trust_sequence: self.trust_sequence(),
            trust_changed_at: self.ledger.current_state().trust_changed_at(),
            refusals: self.refusals.list_newest(&RefusalFilter::default(), JUDGED_REFUSALS),
            development: config.development,
            last_backup: last_backup(&config.data_dir).map(|last| last.made_at),
            disk_days_left: self.growth.days_left(),
            roots_kept_until: self.ledger.current_state().roots_kept_until(),
            keys_are_sealed: config.keys != SealSettings::default(),
        };
        facts.judge()
    }

    /// What `chancery status` shows.
    pub(super) fn status(&self) -> StatusResponse {
        let config = self.config.load();
        let obstacles = self.obstacles();
        let sequence = self.trust_sequence();
        StatusResponse {
            version: env!("CARGO_PKG_VERSION").into(),
            trust_domain: config.trust_domain.to_string(),
            development: config.development,
            ready: obstacles.is_empty(),
            problems: texts(obstacles).into_iter().chain(self.flaws_and_alarms()).collect(),
            ledger_entries: self.ledger.entries(),
            trust_sequence: sequence,
            authorities: self.authorities(),
            agents: u32::try_from(self.fleet.totals(sequence).connected).unwrap_or(u32::MAX),
            started_at_ms: millis(self.started_at),
            clusters: self.cluster_statuses(),
            configuration_error: self.configuration_error().unwrap_or_default(),
            data_directory: std::path::absolute(&config.data_dir).unwrap_or_else(|_| config.data_dir.clone()).display().to_string(),
        }
    }

    fn trust_sequence(&self) -> u64 {
        self.authority.trust().borrow().sequence
    }

    fn authorities(&self) -> Vec<AuthorityStatus> {
        let of = |one: crate::authority::CertificateStatus| AuthorityStatus {
            root: one.root,
            fingerprint: one.fingerprint.to_string(),
            subject: one.subject,
            not_before_ms: millis(one.not_before),
            not_after_ms: millis(one.not_after),
            state: one.state.map(|state| state.to_string()).unwrap_or_default(),
        };
        self.authority.status().into_iter().map(of).collect()
    }

    fn cluster_statuses(&self) -> Vec<ClusterStatus> {
        let of = |one: crate::attestation::ClusterStatus| ClusterStatus {
            name: one.name,
            keys: u32::try_from(one.keys).unwrap_or(u32::MAX),
            error: one.error.unwrap_or_default(),
            loaded_at_ms: one.loaded_at.map_or(0, millis),
        };
        self.clusters.status().into_iter().map(of).collect()
    }

    /// The gauges, read when somebody asks for the metrics.
    pub(super) fn readings(&self) -> Vec<Reading> {
        let now = self.clock.now();
        // One of a name: of several roots in the same state the one that ends first.
        let mut expiries: BTreeMap<String, f64> = BTreeMap::new();
        for one in self.authority.status() {
            let name = match one.state {
                None => "issuing".to_owned(),
                Some(RootState::Active) => "root".to_owned(),
                Some(state) => format!("root_{state}"),
            };
            let left = (one.not_after - now).as_seconds_f64();
            expiries.entry(name).and_modify(|known| *known = known.min(left)).or_insert(left);
        }
        let fleet = self.fleet.totals(self.trust_sequence());
        let ledger = self.ledger.stats();
        let checkpoint = self.checkpoints.newest();
        let scrub = self.scrubs.standing();
        let crl = self.authority.crl_standing();
        let crl_age = crl.since.map_or(0.0, |since| (now - since).as_seconds_f64());
        // As the agents say it: 0 if there is none.
        let first_expiry = fleet.first_expiry_ms.map_or(0.0, |expiry| Duration::milliseconds(expiry - millis(now)).as_seconds_f64());
        // Infinite if there is none, so that whoever watches for an old one is told.
        let backup_age = last_backup(&self.config.load().data_dir).map_or(f64::INFINITY, |last| (now - last.made_at).as_seconds_f64());
        // Infinite likewise: nobody is alarmed by a ledger that does not grow.
        let disk_days = self.growth.days_left().unwrap_or(f64::INFINITY);
        let is = |condition: bool| if condition { 1.0 } else { 0.0 };
        let state = self.ledger.health().borrow().name();
        let recording = LedgerHealth::NAMES.iter().map(|name| ((*name).to_owned(), is(*name == state)));
        let mut readings = vec![
            Reading::one("chancery_development", "1 if this is a development CA", is(self.config.load().development)),
            Reading::one("chancery_ready", "1 if this CA can issue", is(self.obstacles().is_empty())),
            Reading::each("chancery_expiry_seconds", "Until the certificate expires", "certificate", expiries.into_iter().collect()),
            Reading::one("chancery_agents_connected", "Agents with an open session", count(fleet.connected)),
            Reading::one("chancery_agents_behind", "Connected agents without the newest trust state", count(fleet.behind)),
            Reading::one("chancery_agent_workloads", "Certificates that connected agents hold", count(fleet.workloads)),
            Reading::one("chancery_agent_streams", "Proxy streams at connected agents", count(fleet.streams)),
            Reading::one("chancery_agent_acks", "Acknowledgements of proxies since their connected agents started", count(fleet.acks)),
            Reading::one("chancery_agent_nacks", "Refusals of proxies since their connected agents started", count(fleet.nacks)),
            Reading::one("chancery_agent_first_expiry_seconds", FIRST_EXPIRY, first_expiry),
            Reading::one(
                "chancery_renewals_failed",
                "Failed renewals of the CA's own certificates",
                count(self.authority.failed_renewals()),
            ),
            Reading::one("chancery_revoked_certificates", "Certificates that are revoked and have not expired", count(crl.revoked)),
            Reading::one("chancery_crl_number", "The number of the CRLs in force; 0 while there are none", count(crl.number)),
            Reading::one("chancery_crl_age_seconds", "Since the CRLs in force were signed; 0 while there are none", crl_age),
            Reading::one("chancery_proxies_lagging", "Proxies without the newest trust bundle", count(fleet.lagging)),
            Reading::one(
                "chancery_proxies_outdated",
                "Proxies that may use an older certificate than their pod's newest",
                count(fleet.outdated),
            ),
            Reading::one("chancery_proxies_holding", "Proxies that hold secrets, connected or not", count(fleet.holders)),
            Reading::one("chancery_proxies_unproven", "Proxies without a validation context of ours", count(fleet.unproven)),
            Reading::one("chancery_agents_silent", "Agents that have not said what their proxies hold", count(fleet.silent)),
            Reading::one("chancery_ledger_agent_alarms", "Agents whose checkpoint contradicts the ledger", count(fleet.ledger_alarms)),
            Reading::one("chancery_ledger_entries", "Entries in the ledger", count(self.ledger.entries())),
            Reading::one(
                "chancery_ledger_checkpoint_entries",
                "Entries in the newest published checkpoint",
                count(checkpoint.checkpoint.size),
            ),
            Reading::one(
                "chancery_ledger_checkpoint_age_seconds",
                "Since the newest checkpoint was published; it grows while there are no new entries",
                (now - checkpoint.time).as_seconds_f64(),
            ),
            Reading::one("chancery_ledger_groups", "Durable writes since the start", count(ledger.groups)),
            Reading::one("chancery_ledger_commit_seconds", "Time spent in durable writes", ledger.commit_time.as_secs_f64()),
            Reading::one(
                "chancery_ledger_commit_latency_seconds",
                "What the last durable write took, or the one under way has taken so far if that is longer",
                ledger.commit_latency.as_secs_f64(),
            ),
            Reading::each("chancery_ledger_recording", "1 for how the ledger stands: it records if it is ok", "state", recording.collect()),
            Reading::one(
                "chancery_ledger_refused_busy",
                "Requests refused since the start because the queue was full",
                count(ledger.refused_busy),
            ),
            Reading::one(
                "chancery_ledger_disk_days_left",
                "Until the ledger's disk is full at the rate of the last day; infinite if it does not grow, or within an hour of the start",
                disk_days,
            ),
            Reading::one(
                "chancery_ledger_scrub_finished_timestamp_seconds",
                "When the whole ledger was last read and found intact, in Unix time; 0 if it was not yet",
                scrub.finished.map_or(0.0, |time| count(time.unix_timestamp())),
            ),
            Reading::one("chancery_ledger_scrub_bytes", "What was read then", count(scrub.bytes)),
            Reading::one("chancery_ledger_damaged", "1 if the stored ledger was found damaged", is(scrub.damage.is_some())),
            Reading::one("chancery_backup_age_seconds", "Since the newest backup was made; infinite if there is none", backup_age),
            Reading::one("chancery_ledger_queue", "Requests that wait for a durable write", count(ledger.queued_requests)),
        ];
        readings.extend(clusters::readings(&self.clusters.status(), &self.publication.status(), now));
        readings
    }
}

/// As a gauge has it; what is lost above 2^53 nobody sees in a graph.
#[allow(clippy::cast_precision_loss)]
fn count(number: impl TryInto<u64>) -> f64 {
    number.try_into().unwrap_or(u64::MAX) as f64
}

fn millis(time: OffsetDateTime) -> i64 {
    i64::try_from(time.unix_timestamp_nanos() / 1_000_000).unwrap_or(i64::MAX)
}
