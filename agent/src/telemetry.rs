//! What the agent counts and measures, as OpenMetrics.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

/// Labels that say why.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Reason {
    /// A stable word in `snake_case`, from a closed set or from the CA.
    pub reason: String,
}

/// Labels that say what came of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Outcome {
    /// A stable word in `snake_case`, from a closed set.
    pub outcome: &'static str,
}

/// Labels that say which call.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Rpc {
    /// The method of `AgentService`.
    pub method: &'static str,
    /// The gRPC code.
    pub code: String,
}

type Latencies = Family<Rpc, Histogram, fn() -> Histogram>;

/// Every metric of the agent. Clones share their values.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// Workloads that the agent keeps certificates for.
    pub workloads: Gauge,
    /// Open proxy streams.
    pub streams: Gauge,
    /// Acknowledgements of proxies.
    pub acks: Counter,
    /// Refusals of proxies.
    pub nacks: Counter,
    /// Names that proxies asked for and may not have.
    pub names_withheld: Counter,
    /// Streams that were not accepted.
    pub attach_refused: Family<Reason, Counter>,
    /// Certificates received, verified and published.
    pub issued: Counter,
    /// Requests that the CA refused.
    pub refused: Family<Reason, Counter>,
    /// Certificates from the CA that the agent did not accept.
    pub rejected: Counter,
    /// Issuances that failed while there was a certificate to renew.
    pub renewals_failed: Counter,
    /// Requests waiting to be sent.
    pub queue: Gauge,
    /// Seconds until the first workload's certificate expires; negative if it has; 0 if there is none.
    pub first_expiry: Gauge,
    /// Seconds until the agent's own certificate expires; 0 if there is none.
    pub own_expiry: Gauge,
    /// 1 while the CA can be reached.
    pub ca_reachable: Gauge,
    /// The trust state being served.
    pub trust_sequence: Gauge,
    /// Trust states that the agent did not accept.
    pub trust_refused: Family<Reason, Counter>,
    /// 1 while there is an alarm about the CA's ledger.
    pub ledger_alarm: Gauge,
    /// Entries of the ledger's newest checkpoint that was taken over.
    pub ledger_size: Gauge,
    /// Published CSI volumes.
    pub csi_volumes: Gauge,
    /// The kubelet's calls to publish a volume.
    pub csi_publishes: Family<Outcome, Counter>,
    /// Failed writes of the state file.
    pub state_failed: Counter,
    /// Configuration files that were not taken over.
    pub config_refused: Counter,
    /// 1 if the configuration on disk is in force, 0 if it was refused.
    pub config_reloaded: Gauge,
    /// Calls to the CA.
    pub rpc_latency: Latencies,
}

fn latency_buckets() -> Histogram {
    Histogram::new([0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.25, 1.0, 4.0])
}

impl Metrics {
    /// Registers all of them in `registry`, whose prefix they take.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            workloads: Gauge::default(),
            streams: Gauge::default(),
            acks: Counter::default(),
            nacks: Counter::default(),
            names_withheld: Counter::default(),
            attach_refused: Family::default(),
            issued: Counter::default(),
            refused: Family::default(),
            rejected: Counter::default(),
            renewals_failed: Counter::default(),
            queue: Gauge::default(),
            first_expiry: Gauge::default(),
            own_expiry: Gauge::default(),
            ca_reachable: Gauge::default(),
            trust_sequence: Gauge::default(),
            trust_refused: Family::default(),
            ledger_alarm: Gauge::default(),
            ledger_size: Gauge::default(),
            csi_volumes: Gauge::default(),
            csi_publishes: Family::default(),
            state_failed: Counter::default(),
            config_refused: Counter::default(),
            config_reloaded: Gauge::default(),
            rpc_latency: Latencies::new_with_constructor(latency_buckets),
        };
        let m = &metrics;
        registry.register("workloads", "Workloads that the agent keeps certificates for", m.workloads.clone());
        registry.register("streams", "Open proxy streams", m.streams.clone());
        registry.register("acks", "Acknowledgements of proxies", m.acks.clone());
        registry.register("nacks", "Refusals of proxies", m.nacks.clone());
        registry.register("names_withheld", "Names that proxies asked for and may not have", m.names_withheld.clone());
        registry.register("attach_refused", "Streams that were not accepted", m.attach_refused.clone());
        registry.register("issued", "Certificates received, verified and published", m.issued.clone());
        registry.register("refused", "Requests that the CA refused", m.refused.clone());
        registry.register("rejected", "Certificates from the CA that the agent did not accept", m.rejected.clone());
        registry.register("renewals_failed", "Failed renewals", m.renewals_failed.clone());
        registry.register("queue", "Requests waiting to be sent to the CA", m.queue.clone());
        let expiry = "Until the first workload's certificate expires if the CA stays away";
        registry.register_with_unit("first_expiry", expiry, Unit::Seconds, m.first_expiry.clone());
        registry.register_with_unit("own_expiry", "Until the agent's own certificate expires", Unit::Seconds, m.own_expiry.clone());
        registry.register("ca_reachable", "1 while the CA can be reached", m.ca_reachable.clone());
        registry.register("trust_sequence", "Sequence of the trust state being served", m.trust_sequence.clone());
        registry.register("trust_refused", "Trust states that the agent did not accept", m.trust_refused.clone());
        let alarm = "1 while the CA's ledger does not continue what the CA showed before, until an operator has looked at it";
        registry.register("ledger_alarm", alarm, m.ledger_alarm.clone());
        registry.register("ledger_size", "Entries of the ledger's newest checkpoint known here", m.ledger_size.clone());
        registry.register("csi_volumes", "Published CSI volumes: pods with a socket of their own", m.csi_volumes.clone());
        registry.register("csi_publishes", "Calls of the kubelet to publish a CSI volume", m.csi_publishes.clone());
        registry.register("state_failed", "Failed writes of the state file", m.state_failed.clone());
        registry.register("config_refused", "Configuration files that were not taken over", m.config_refused.clone());
        let reloaded = "1 if the configuration on disk is in force, 0 if it was refused";
        registry.register("config_last_reload_successful", reloaded, m.config_reloaded.clone());
        registry.register_with_unit("ca_rpc_latency", "Calls to the CA", Unit::Seconds, m.rpc_latency.clone());
        metrics
    }

    /// Records a call to the CA.
    pub fn rpc(&self, method: &'static str, code: tonic::Code, took: std::time::Duration) {
        self.rpc_latency.get_or_create(&Rpc { method, code: format!("{code:?}") }).observe(took.as_secs_f64());
    }

    /// Notes the trust state being served.
    pub fn trust_sequence(&self, sequence: u64) {
        self.trust_sequence.set(i64::try_from(sequence).unwrap_or(i64::MAX));
    }

    /// Notes what is known of the ledger.
    pub fn ledger(&self, known_size: u64, alarm: bool) {
        self.ledger_size.set(i64::try_from(known_size).unwrap_or(i64::MAX));
        self.ledger_alarm.set(i64::from(alarm));
    }

    /// Counts a trust state that was not taken over.
    pub fn trust_refused(&self, reason: &str) {
        self.trust_refused.get_or_create(&Reason { reason: reason.to_owned() }).inc();
    }
}
