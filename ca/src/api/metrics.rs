//! What the calls come to, counted as they are answered.

use std::time::Duration;

use chancery_proto::chancery::v1::IssueReason;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use crate::issuance::IssuanceObserver;

/// Upper bounds of the latency histograms, in seconds: an issuance takes a millisecond or two, a slow disk a hundred.
const LATENCIES: [f64; 12] = [0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];

/// Why something was issued or refused; one of a fixed set of words.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Call {
    method: &'static str,
    outcome: &'static str,
}

type Latencies = Family<Call, Histogram, fn() -> Histogram>;

/// The counters of the services.
#[derive(Debug)]
pub struct CallMetrics {
    issued: Family<Reason, Counter>,
    refused: Family<Reason, Counter>,
    calls: Latencies,
}

impl CallMetrics {
    /// Counters at zero, registered under `chancery_`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            issued: Family::default(),
            refused: Family::default(),
            calls: Latencies::new_with_constructor(|| Histogram::new(LATENCIES)),
        };
        registry.register("chancery_issued", "Certificates issued, by reason", metrics.issued.clone());
        registry.register("chancery_refused", "Requests for certificates refused, by reason", metrics.refused.clone());
        let help = "Time to answer a call of an agent or operator";
        registry.register_with_unit("chancery_rpc_duration", help, Unit::Seconds, metrics.calls.clone());
        metrics
    }

    pub(super) fn answered(&self, method: &'static str, ok: bool, took: Duration) {
        let outcome = if ok { "ok" } else { "error" };
        self.calls.get_or_create(&Call { method, outcome }).observe(took.as_secs_f64());
    }
}

impl IssuanceObserver for CallMetrics {
    fn issued(&self, reason: IssueReason) {
        let reason = match reason {
            IssueReason::First => "first",
            IssueReason::Renewal => "renewal",
            IssueReason::Ordered => "ordered",
            IssueReason::Join => "join",
            IssueReason::AgentRenewal => "agent_renewal",
            IssueReason::Unspecified => "unspecified",
        };
        self.issued.get_or_create(&Reason { reason }).inc();
    }

    fn refused(&self, reason: &'static str) {
        self.refused.get_or_create(&Reason { reason }).inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happened_is_counted_under_its_reason() {
        let mut registry = Registry::default();
        let metrics = CallMetrics::register(&mut registry);
        metrics.issued(IssueReason::Renewal);
        metrics.issued(IssueReason::Renewal);
        metrics.refused("token_expired");
        metrics.answered("Issue", false, Duration::from_millis(2));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        assert!(text.contains("chancery_issued_total{reason=\"renewal\"} 2\n"), "{text}");
        assert!(text.contains("chancery_refused_total{reason=\"token_expired\"} 1\n"), "{text}");
        assert!(text.contains("chancery_rpc_duration_seconds_count{method=\"Issue\",outcome=\"error\"} 1\n"), "{text}");
    }
}
