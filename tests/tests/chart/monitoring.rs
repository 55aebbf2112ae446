//! Alerts and dashboard speak of metrics that exist.

use std::collections::BTreeSet;
use std::time::Duration;

use chancery_tests::agent::Agent;
use chancery_tests::ca::Ca;
use chancery_tests::lab::Lab;
use chancery_tests::mesh::{NODE, token_request};
use chancery_tests::{http, secrets};
use serde_json::Value;
use time::OffsetDateTime;

use crate::chart::{Chart, find};

const HOUR: Duration = Duration::from_secs(3600);

fn alerts() -> Value {
    serde_yaml_ng::from_str(&std::fs::read_to_string(Chart::directory().join("files/alerts.yaml")).unwrap()).unwrap()
}

fn rules(alerts: &Value) -> impl Iterator<Item = &Value> {
    alerts["groups"].as_array().unwrap().iter().flat_map(|group| group["rules"].as_array().unwrap())
}

/// The names of our metrics in an expression.
fn named(expression: &str) -> impl Iterator<Item = String> {
    let words = expression.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    words.filter(|word| word.starts_with("chancery_")).map(str::to_owned)
}

/// The series that a program exports, by the types that it declares.
async fn exported(address: std::net::SocketAddr) -> BTreeSet<String> {
    let (_, text) = http::get(address, "/metrics").await.unwrap();
    let declared = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    let series = declared.flat_map(|(name, kind)| match kind {
        "counter" => vec![format!("{name}_total")],
        "histogram" => ["bucket", "sum", "count"].map(|part| format!("{name}_{part}")).to_vec(),
        _ => vec![name.to_owned()],
    });
    series.collect()
}

#[tokio::test]
async fn every_metric_in_the_alerts_and_on_the_dashboard_is_exported() {
    let lab = Lab::new().unwrap();
    let ca = Ca::start_for(&lab, "bank/*").await.unwrap();
    let agent = Agent::start(&lab, &ca, NODE).await.unwrap();
    // What is counted by its reason is exported from the first time on: a refusal by the CA, and one by the agent.
    let token = ca.issuer().unwrap().sign(&token_request("cart", HOUR), OffsetDateTime::now_utc()).unwrap();
    for refused in [token.as_str(), "garbage"] {
        assert!(secrets::fetch(&agent.sds_socket, Some(refused), Duration::from_secs(2)).await.is_err());
    }
    let mut known = exported(ca.http).await;
    known.append(&mut exported(agent.http).await);

    let dashboard: Value = serde_json::from_slice(&std::fs::read(Chart::directory().join("files/dashboard.json")).unwrap()).unwrap();
    let panels = dashboard["panels"].as_array().unwrap().iter().flat_map(|panel| panel["targets"].as_array().cloned().unwrap_or_default());
    let mut expressions: Vec<String> = panels.map(|target| target["expr"].as_str().unwrap().to_owned()).collect();
    expressions.extend(rules(&alerts()).map(|rule| rule["expr"].as_str().unwrap().to_owned()));
    let unknown: Vec<String> = expressions.iter().flat_map(|expression| named(expression)).filter(|name| !known.contains(name)).collect();
    assert!(expressions.len() > 50 && unknown.is_empty(), "{} expressions, unknown: {unknown:?}", expressions.len());
}

#[test]
fn every_alert_says_how_bad_it_is_and_what_has_happened() {
    for rule in rules(&alerts()) {
        assert!(matches!(rule["labels"]["severity"].as_str(), Some("critical" | "warning")), "{rule}");
        assert!(!rule["annotations"]["summary"].as_str().unwrap().is_empty(), "{rule}");
    }
}

#[test]
fn monitors_alerts_and_dashboard_are_made_when_they_are_asked_for() {
    let lab = Lab::new().unwrap();
    let Some(chart) = Chart::new(&lab) else { return };
    let rendered = chart.render("");
    assert!(rendered.iter().all(|object| object["apiVersion"] != "monitoring.coreos.com/v1"), "a cluster without the operator refuses it");

    let rendered = chart.render("monitoring: {serviceMonitor: {enabled: true}, alerts: {enabled: true}, dashboard: {enabled: true}}");
    assert_eq!(find(&rendered, "PrometheusRule", "chancery")["spec"], alerts());
    let shown = find(&rendered, "ConfigMap", "chancery-dashboard")["data"]["chancery.json"].as_str().unwrap();
    assert_eq!(serde_json::from_str::<Value>(shown).unwrap()["uid"], "chancery");
    // What the alerts call the jobs is what the monitors make of these labels.
    let service = find(&rendered, "Service", "chancery-ca-metrics");
    let monitor = find(&rendered, "ServiceMonitor", "chancery-ca");
    assert_eq!(service["metadata"]["labels"][monitor["spec"]["jobLabel"].as_str().unwrap()], "chancery-ca");
    let agents = &find(&rendered, "DaemonSet", "chancery-agent")["spec"]["template"]["metadata"]["labels"];
    assert_eq!(agents[find(&rendered, "PodMonitor", "chancery-agent")["spec"]["jobLabel"].as_str().unwrap()], "chancery-agent");
}
