//! What the CA counts and measures, for `/metrics`.
//!
//! What happens at the edge is counted here, what the calls come to in [`crate::api::CallMetrics`]. How things stand (expiries, connected
//! agents, the ledger's length) is read when somebody asks, by [`Readings`].

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::registry::{Registry, Unit};

/// Why a connection was closed; one of a fixed set of words.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

/// The counters of the edge.
#[derive(Debug)]
pub struct Metrics {
    connections_refused: Family<Reason, Counter>,
    reload_successful: Gauge,
    reload_time: Gauge,
}

impl Metrics {
    /// Counters at zero, registered under `chancery_`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self { connections_refused: Family::default(), reload_successful: Gauge::default(), reload_time: Gauge::default() };
        let help = "Connections closed before the first call, by reason";
        registry.register("chancery_connections_refused", help, metrics.connections_refused.clone());
        let help = "1 if the configuration on disk is in force, 0 if it was refused";
        registry.register("chancery_config_last_reload_successful", help, metrics.reload_successful.clone());
        let help = "When the configuration in force was taken over, in Unix time";
        let time = metrics.reload_time.clone();
        registry.register_with_unit("chancery_config_last_reload_success_timestamp", help, Unit::Seconds, time);
        metrics
    }

    /// A connection was closed before its first call.
    pub fn connection_refused(&self, reason: &'static str) {
        self.connections_refused.get_or_create(&Reason { reason }).inc();
    }

    /// The configuration on disk is in force, since `unix_seconds`.
    pub fn configuration_applied(&self, unix_seconds: i64) {
        self.reload_successful.set(1);
        self.reload_time.set(unix_seconds);
    }

    /// The configuration on disk was refused; the one before stays in force.
    pub fn configuration_refused(&self) {
        self.reload_successful.set(0);
    }
}

/// One value that is read when somebody asks.
#[derive(Clone, Debug, PartialEq)]
pub struct Reading {
    /// With its unit, if it has one.
    pub name: &'static str,
    /// What it is.
    pub help: &'static str,
    /// What was read.
    pub values: Values,
}

/// One value, or one for each thing of a kind.
#[derive(Clone, Debug, PartialEq)]
pub enum Values {
    /// There is only one.
    One(f64),
    /// A label, and a value for each of its values.
    Each(&'static str, Vec<(String, f64)>),
}

impl Reading {
    /// A value without a label.
    pub fn one(name: &'static str, help: &'static str, value: f64) -> Self {
        Self { name, help, values: Values::One(value) }
    }

    /// A value for each of a label's.
    pub fn each(name: &'static str, help: &'static str, label: &'static str, values: Vec<(String, f64)>) -> Self {
        Self { name, help, values: Values::Each(label, values) }
    }
}

/// Reads how things stand, each time the metrics are asked for.
pub struct Readings<F>(pub F);

impl<F> fmt::Debug for Readings<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Readings")
    }
}

impl<F: Fn() -> Vec<Reading> + Send + Sync + 'static> Collector for Readings<F> {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for reading in (self.0)() {
            let gauge = ConstGauge::new(0.0_f64);
            let mut metric = encoder.encode_descriptor(reading.name, reading.help, None, gauge.metric_type())?;
            match reading.values {
                Values::One(value) => ConstGauge::new(value).encode(metric)?,
                Values::Each(label, values) => {
                    for (name, value) in values {
                        ConstGauge::new(value).encode(metric.encode_family(&[(label, name)])?)?;
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(registry: &Registry) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, registry).unwrap();
        text
    }

    #[test]
    fn a_refused_reload_shows() {
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry);
        metrics.configuration_applied(7);
        assert!(encoded(&registry).contains("chancery_config_last_reload_successful 1\n"));
        metrics.configuration_refused();
        let text = encoded(&registry);
        assert!(text.contains("chancery_config_last_reload_successful 0\n"), "{text}");
        assert!(text.contains("chancery_config_last_reload_success_timestamp_seconds 7\n"), "{text}");
    }

    #[test]
    fn readings_are_taken_when_asked_for() {
        let mut registry = Registry::default();
        let readings = || {
            let expiries = vec![("root".to_owned(), 5.5), ("issuing".to_owned(), 2.0)];
            vec![
                Reading::each("chancery_expiry_seconds", "Until expiry", "certificate", expiries),
                Reading::one("chancery_agents_connected", "Agents", 2.0),
            ]
        };
        registry.register_collector(Box::new(Readings(readings)));
        let text = encoded(&registry);
        assert!(text.contains("chancery_expiry_seconds{certificate=\"root\"} 5.5\n"), "{text}");
        assert!(text.contains("chancery_agents_connected 2.0\n"), "{text}");
    }
}
