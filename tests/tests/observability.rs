//! What CA and agent say of themselves: logs, metrics, streams. One request is found everywhere; a secret nowhere.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::time::Duration;

use chancery_ca::attestation::development::TokenRequest;
use chancery_tests::agent::Agent;
use chancery_tests::ca::Ca;
use chancery_tests::envoy::{Envoy, inbound_tls};
use chancery_tests::lab::Lab;
use chancery_tests::mesh::{Mesh, NODE, Settings, token_request};
use chancery_tests::{http, secrets, tools, wait};
use serde_json::Value;
use time::OffsetDateTime;

const HOUR: Duration = Duration::from_secs(3600);
const SOON: Duration = Duration::from_secs(10);
const EVERYTHING_AS_JSON: &str = "\n[log]\nformat = \"json\"\nlevel = \"trace\"\n";

async fn mesh(log: &str) -> Mesh {
    let lab = Lab::new().unwrap();
    let ca = Ca::start_in(&lab, &lab.at("ca"), HOUR, log).await.unwrap();
    let mut agent = Agent::configure(&lab, &ca, NODE).unwrap();
    agent.append(log).unwrap();
    agent.run(&lab).await.unwrap();
    let envoy = tools::envoy().unwrap_or_default();
    Mesh::around(ca, agent, lab, Settings::lasting(envoy)).unwrap()
}

fn sign(ca: &Ca, request: &TokenRequest) -> String {
    ca.issuer().unwrap().sign(request, OffsetDateTime::now_utc()).unwrap().to_string()
}

/// A certificate for the pod of this service account, over the raw protocol.
async fn issued(mesh: &Mesh, account: &str) -> secrets::Secrets {
    let token = sign(&mesh.ca, &token_request(account, HOUR));
    secrets::fetch(&mesh.agent.sds_socket, Some(&token), SOON).await.unwrap()
}

#[tokio::test]
async fn one_request_id_is_in_the_agents_log_the_cas_log_and_the_ledger() {
    let mesh = mesh("").await;
    let cart = issued(&mesh, "cart").await;
    let entry = mesh.ca.ask(&["identity", "show", &cart.svid.serial().to_string()]).unwrap();
    let request_id = entry["request_id"].as_str().unwrap();
    for log in [mesh.agent.log().unwrap(), mesh.ca.log().unwrap()] {
        let line = log.lines().find(|line| line.contains(request_id)).unwrap_or_else(|| panic!("{request_id} is not in {log}"));
        assert!(line.contains(cart.svid.id().as_str()), "{line}");
    }
}

/// Every line of a log in JSON, as it was parsed.
fn objects(log: &str) -> Vec<Value> {
    log.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
}

#[tokio::test]
async fn logs_in_json_parse_and_hold_no_token_and_no_key_even_at_trace() {
    let mesh = mesh(EVERYTHING_AS_JSON).await;
    let token = sign(&mesh.ca, &token_request("cart", HOUR));
    let cart = secrets::fetch(&mesh.agent.sds_socket, Some(&token), SOON).await.unwrap();
    // What is refused is more often written down than what is not.
    let strange = token_request("stranger", HOUR);
    let forged = format!("{}AAAA", sign(&mesh.ca, &TokenRequest { lifetime: HOUR * 2, ..strange.clone() }));
    let elsewhere = sign(&mesh.ca, &TokenRequest { node: "node-2".into(), ..strange });
    for refused in [&forged, &elsewhere] {
        assert!(secrets::fetch(&mesh.agent.sds_socket, Some(refused), Duration::from_secs(1)).await.is_err());
    }
    let joined_with = std::fs::read_to_string(mesh.lab.at("agent-token/token")).unwrap();

    let (agent, ca) = (mesh.agent.log().unwrap(), mesh.ca.log().unwrap());
    for log in [&agent, &ca] {
        let objects = objects(log);
        assert!(objects.iter().any(|object| object["level"] == "TRACE" || object["level"] == "DEBUG"), "the level is not in force");
        assert!(objects.iter().all(|object| object["timestamp"].is_string()), "{log}");
    }
    let key = cart.svid.key().secret_pem();
    let key: Vec<&str> = key.lines().filter(|line| !line.starts_with("-----")).collect();
    for (whose, log) in [("agent", agent), ("CA", ca)] {
        for token in [&token, &forged, &elsewhere, &joined_with] {
            // Neither whole nor as its signature, which alone is secret.
            let signature = token.rsplit('.').next().unwrap();
            assert!(!log.contains(&signature[..signature.len() - 4]), "the {whose}'s log holds a token's signature");
        }
        assert!(!log.contains("PRIVATE KEY"), "the {whose}'s log holds a private key");
        assert!(!key.iter().any(|line| log.contains(line)), "the {whose}'s log holds a private key's content");
    }
}

/// The value of a sample, by its name and labels as they are written.
fn sample(metrics: &str, name: &str) -> Option<f64> {
    let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
    line.parse().ok()
}

async fn metrics(address: std::net::SocketAddr) -> String {
    let (status, text) = http::get(address, "/metrics").await.unwrap();
    assert_eq!(status, 200);
    assert!(text.ends_with("\n# EOF\n"), "no OpenMetrics: {text}");
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (name, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("no sample: {line}"));
        assert!(name.starts_with("chancery_"), "{line}");
        assert!(value.parse::<f64>().is_ok(), "{line}");
    }
    text
}

#[tokio::test]
async fn the_metrics_of_both_hold_the_figures_to_watch() {
    let mesh = mesh("").await;
    issued(&mesh, "cart").await;
    // Held open, so that there is a stream to count.
    let token = sign(&mesh.ca, &token_request("checkout", HOUR));
    let _open = secrets::hold(&mesh.agent.sds_socket, Some(&token), None, SOON).await.unwrap();
    assert!(secrets::fetch(&mesh.agent.sds_socket, Some("garbage"), SOON).await.is_err());

    let present = |text: &str, names: &[&str]| -> Vec<String> {
        names.iter().filter(|name| !text.lines().any(|line| line.starts_with(**name))).map(|name| (*name).to_owned()).collect()
    };
    let agent_has = async || {
        let text = metrics(mesh.agent.http).await;
        let missing = present(
            &text,
            &[
                "chancery_agent_attach_refused_total{reason=",
                "chancery_agent_nacks_total ",
                "chancery_agent_queue ",
                "chancery_agent_renewals_failed_total ",
                "chancery_agent_ca_rpc_latency_seconds_bucket{",
            ],
        );
        let least = [
            ("issued_total", 2.0),
            ("streams", 1.0),
            ("acks_total", 2.0),
            ("first_expiry_seconds", 3000.0),
            ("own_expiry_seconds", 80_000.0),
        ];
        let low =
            least.into_iter().find(|(name, least)| sample(&text, &format!("chancery_agent_{name}")).is_none_or(|value| value < *least));
        if missing.is_empty() && low.is_none() { Ok(()) } else { Err(format!("missing {missing:?}, too low {low:?}:\n{text}")) }
    };
    wait::until("the agent's metrics hold everything", SOON, agent_has).await.unwrap();
    let ca_has = async || {
        let text = metrics(mesh.ca.http).await;
        let missing = present(
            &text,
            &[
                "chancery_renewals_failed ",
                "chancery_agent_nacks ",
                "chancery_ledger_queue ",
                "chancery_ledger_disk_days_left ",
                "chancery_ledger_commit_latency_seconds ",
                "chancery_ledger_recording{state=\"ok\"}",
                "chancery_expiry_seconds{certificate=\"root\"}",
                "chancery_expiry_seconds{certificate=\"issuing\"}",
                "chancery_rpc_duration_seconds_bucket{",
            ],
        );
        let least = [
            ("issued_total{reason=\"first\"}", 2.0),
            ("issued_total{reason=\"join\"}", 1.0),
            ("agents_connected", 1.0),
            ("agent_streams", 1.0),
            ("agent_acks", 2.0),
            ("agent_first_expiry_seconds", 3000.0),
            ("ledger_entries", 5.0),
        ];
        let low = least.into_iter().find(|(name, least)| sample(&text, &format!("chancery_{name}")).is_none_or(|value| value < *least));
        if missing.is_empty() && low.is_none() { Ok(()) } else { Err(format!("missing {missing:?}, too low {low:?}:\n{text}")) }
    };
    wait::until("the CA's metrics hold everything", SOON, ca_has).await.unwrap();
}

#[tokio::test]
async fn a_refusal_is_counted_under_its_reason_on_both_sides_and_found_by_its_request_id() {
    let lab = Lab::new().unwrap();
    let ca = Ca::start_for(&lab, "bank/*").await.unwrap();
    let agent = Agent::start(&lab, &ca, NODE).await.unwrap();
    let token = sign(&ca, &token_request("cart", HOUR));
    assert!(secrets::fetch(&agent.sds_socket, Some(&token), Duration::from_secs(2)).await.is_err());
    for (address, name) in [(agent.http, "chancery_agent_refused_total"), (ca.http, "chancery_refused_total")] {
        let counted = sample(&metrics(address).await, &format!("{name}{{reason=\"account_not_allowed\"}}"));
        assert!(counted.is_some_and(|count| count >= 1.0), "{name}: {counted:?}");
    }
    let listed = ca.ask(&["identity", "refusals", "--reason", "account_not_allowed"]).unwrap();
    let request_id = listed[0]["request_id"].as_str().unwrap();
    for log in [agent.log().unwrap(), ca.log().unwrap()] {
        assert!(log.lines().any(|line| line.contains(request_id)), "{request_id} is not in {log}");
    }
}

#[tokio::test]
async fn an_agent_says_how_long_the_ca_may_stay_away() {
    let lab = Lab::new().unwrap();
    let mut ca = Ca::start(&lab, HOUR).await.unwrap();
    let agent = Agent::start(&lab, &ca, NODE).await.unwrap();
    secrets::fetch(&agent.sds_socket, Some(&sign(&ca, &token_request("cart", HOUR))), SOON).await.unwrap();
    ca.kill().unwrap();
    let warned = async || {
        let text = metrics(agent.http).await;
        match (sample(&text, "chancery_agent_ca_reachable"), sample(&text, "chancery_agent_first_expiry_seconds")) {
            (Some(0.0), Some(left)) if left > 3000.0 => Ok(()),
            other => Err(format!("{other:?}")),
        }
    };
    wait::until("the agent's metrics say how long the CA may stay away", SOON, warned).await.unwrap();
    let said = async || {
        let log = agent.log().unwrap();
        if log.contains("the first certificate expires then if the CA stays away") { Ok(()) } else { Err(log) }
    };
    wait::until("the agent's log says it too", SOON, said).await.unwrap();
}

#[tokio::test]
async fn streams_show_what_a_real_envoy_acknowledged_and_why_it_refused() {
    let Some(binary) = tools::envoy() else { return };
    let mesh = mesh("").await;
    let cart = mesh.workload("cart", None).await.unwrap();
    let acknowledged = async || {
        let streams = mesh.agent.ask(&["streams"]).unwrap();
        let names = streams.as_array().unwrap().iter().flat_map(|stream| stream["names"].as_array().unwrap().clone());
        let names: Vec<Value> = names.collect();
        let good = names.len() == 2 && names.iter().all(|name| name["held"] == name["sent"] && name["held"] != "");
        if good { Ok(()) } else { Err(streams.to_string()) }
    };
    wait::until("both secrets are acknowledged", SOON, acknowledged).await.unwrap();
    let versions = cart.envoy.stats("^sds%5C..*%5C.update_success").await.unwrap();
    assert!(versions.values().all(|count| *count == 1), "{versions:?}");

    // An Envoy whose own revocation list is broken cannot use any bundle, and says so.
    let volume = mesh.volume("broken").unwrap();
    let crl = serde_json::json!({"inline_string": "-----BEGIN X509 CRL-----\nbm90aGluZw==\n-----END X509 CRL-----\n"});
    let broken = Envoy::start_changed(&mesh.lab, &binary, &mesh.plan("broken", &volume, None), |bootstrap| {
        inbound_tls(bootstrap)["common_tls_context"]["combined_validation_context"]["default_validation_context"]["crl"] = crl;
    });
    let _broken = broken.unwrap();
    let refused = async || {
        let streams = mesh.agent.ask(&["streams"]).unwrap();
        let words = streams.as_array().unwrap().iter().find(|stream| stream["nack"] != "").map(ToString::to_string);
        words.ok_or_else(|| streams.to_string())
    };
    let stream = wait::until("a refusal shows", SOON, refused).await.unwrap();
    assert!(stream.contains("CRL") && stream.contains("broken-0"), "{stream}");
    assert!(sample(&metrics(mesh.agent.http).await, "chancery_agent_nacks_total").unwrap() >= 1.0);
    let status = mesh.agent.ask(&["status"]).unwrap();
    assert!(status["problems"].to_string().contains("shop/broken-0: refused a secret"), "{status}");
}

#[tokio::test]
async fn a_refusal_shows_in_the_proxys_words() {
    let mesh = mesh("").await;
    let token = sign(&mesh.ca, &token_request("cart", HOUR));
    let words = "Failed to load trusted CA certificates from <inline>";
    let _open = secrets::hold(&mesh.agent.sds_socket, Some(&token), Some(words), SOON).await.unwrap();
    let shown = async || {
        let streams = mesh.agent.ask(&["streams"]).unwrap();
        if streams[0]["nack"] == words { Ok(()) } else { Err(streams.to_string()) }
    };
    wait::until("the words show", SOON, shown).await.unwrap();
}
