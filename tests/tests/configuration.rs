//! Configurations that cannot be used, given to the real programs: said with file and line, by `check` and at the start alike; and a running
//! program keeps the one that it has.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use chancery_tests::agent::Agent;
use chancery_tests::ca::Ca;
use chancery_tests::caller::Caller;
use chancery_tests::lab::{Lab, free_address};
use chancery_tests::mesh::NODE;
use chancery_tests::process::Process;
use chancery_tests::{http, tools, wait};

const HOUR: Duration = Duration::from_secs(3600);
const RELOADED_WITHIN: Duration = Duration::from_secs(10);

/// What a program says about its configuration, which it has to refuse.
async fn refusal(lab: &Lab, program: &str, verb: &str, config: &Path) -> String {
    let mut command = lab.command(&tools::chancery(program).unwrap());
    command.args([verb, "--config"]).arg(config);
    Process::refused(&format!("{program} {verb}"), &mut command, &lab.at("refused.log")).await.unwrap()
}

/// A good configuration of the CA, whose cluster's keys are in a file.
fn ca_config(lab: &Lab) -> String {
    let jwks = lab.at("jwks.json");
    std::fs::write(&jwks, "{}").unwrap();
    format!(
        "trust_domain = \"mesh.test\"\ndata_dir = \"{}\"\nlisten = \"{}\"\nhttp_listen = \"{}\"\nadmin_socket = \"{}\"\n\n[[cluster]]\n\
         name = \"east\"\nissuer = \"https://kubernetes\"\nservice_accounts = [\"*\"]\njwks = {{ file = \"{}\" }}\n",
        lab.at("data").display(),
        free_address().unwrap(),
        free_address().unwrap(),
        lab.at("admin.sock").display(),
        jwks.display()
    )
}

fn agent_config(lab: &Lab) -> String {
    let token = lab.at("token");
    std::fs::write(&token, "token").unwrap();
    format!(
        "trust_domain = \"mesh.test\"\ncluster = \"east\"\nca_address = \"127.0.0.1:1\"\ntoken_file = \"{}\"\nstate_dir = \"{}\"\n\
         http_listen = \"{}\"\nadmin_socket = \"{}\"\n\n[trust]\nroot_fingerprint = \"{}\"\n\n[sds]\nsocket = \"{}\"\n",
        token.display(),
        lab.at("state").display(),
        free_address().unwrap(),
        lab.at("agent-admin.sock").display(),
        "ab".repeat(32),
        lab.at("sds.sock").display()
    )
}

/// The programs, what makes each refuse, and the good configuration that each case spoils.
fn programs(lab: &Lab) -> [(&'static str, [&'static str; 2], String); 2] {
    [("chancery-ca", ["check", "serve"], ca_config(lab)), ("chancery-agent", ["check", "run"], agent_config(lab))]
}

fn write(lab: &Lab, text: &str) -> PathBuf {
    let path = lab.at("config.toml");
    std::fs::write(&path, text).unwrap();
    path
}

#[tokio::test]
async fn an_unknown_key_is_refused_with_its_line_by_both_programs() {
    let lab = Lab::new().unwrap();
    for (program, verbs, good) in programs(&lab) {
        let config = write(&lab, &good.replacen('\n', "\ncolour = \"blue\"\n", 1));
        for verb in verbs {
            let said = refusal(&lab, program, verb, &config).await;
            assert!(said.contains(&format!("{}:2:1: unknown field `colour`", config.display())), "{program} {verb}: {said}");
        }
    }
    assert!(!lab.at("data").exists() && !lab.at("state").exists(), "nothing was written");
}

#[tokio::test]
async fn a_bad_trust_domain_is_refused_with_its_line_by_both_programs() {
    let lab = Lab::new().unwrap();
    for (program, verbs, good) in programs(&lab) {
        let config = write(&lab, &good.replacen("mesh.test", "Mesh.test:8443", 1));
        for verb in verbs {
            let said = refusal(&lab, program, verb, &config).await;
            assert!(said.contains(&format!("{}:1:", config.display())) && said.contains("trust domain"), "{program} {verb}: {said}");
        }
    }
    assert!(!lab.at("data").exists() && !lab.at("state").exists(), "nothing was written");
}

#[tokio::test]
async fn a_missing_configuration_is_named_by_both_programs() {
    let lab = Lab::new().unwrap();
    let missing = lab.at("nowhere.toml");
    for (program, verbs, _) in programs(&lab) {
        for verb in verbs {
            let said = refusal(&lab, program, verb, &missing).await;
            assert!(said.contains(&format!("{}: No such file", missing.display())), "{program} {verb}: {said}");
        }
    }
}

#[tokio::test]
async fn a_file_that_the_cas_configuration_names_and_that_is_missing_is_refused_with_the_line() {
    let lab = Lab::new().unwrap();
    let config = write(&lab, &ca_config(&lab));
    std::fs::remove_file(lab.at("jwks.json")).unwrap();
    for verb in ["check", "serve"] {
        let said = refusal(&lab, "chancery-ca", verb, &config).await;
        let place = format!("{}:11: cluster.0.jwks: {}: No such file", config.display(), lab.at("jwks.json").display());
        assert!(said.contains(&place), "{verb}: {said}");
    }
    assert!(!lab.at("data").exists(), "nothing was written");
}

#[tokio::test]
async fn files_that_the_agents_configuration_names_and_that_are_missing_are_named_by_check() {
    let lab = Lab::new().unwrap();
    let trust = format!("bundle_file = \"{}\"", lab.at("bundle.pem").display());
    let config = write(&lab, &agent_config(&lab).replace(&format!("root_fingerprint = \"{}\"", "ab".repeat(32)), &trust));
    std::fs::remove_file(lab.at("token")).unwrap();
    let said = refusal(&lab, "chancery-agent", "check", &config).await;
    assert!(said.contains(&format!("token_file: {}: No such file", lab.at("token").display())), "{said}");
    assert!(said.contains(&format!("trust.bundle_file: {}: No such file", lab.at("bundle.pem").display())), "{said}");
}

#[tokio::test]
async fn a_bad_reload_of_the_ca_changes_nothing_and_is_seen_in_status_and_metrics() {
    let lab = Lab::new().unwrap();
    let ca = Ca::start(&lab, HOUR).await.unwrap();
    let caller = Caller::join(&lab, &ca, NODE).await.unwrap();
    let good = std::fs::read_to_string(ca.config()).unwrap();
    let shorter = good.replace("default = \"3600s\"", "default = \"60s\"");

    // A whole file of good changes with one unknown key.
    std::fs::write(ca.config(), format!("{shorter}colour = \"blue\"\n")).unwrap();
    let status = wait::until("the status tells", RELOADED_WITHIN, async || {
        let status = ca.ask(&["status"]).unwrap();
        if status["configuration_error"] == "" { Err(status.to_string()) } else { Ok::<_, String>(status) }
    });
    let status = status.await.unwrap();
    assert!(status["configuration_error"].as_str().unwrap().contains("unknown field `colour`"), "{status}");
    assert_eq!(status["ready"], true, "{status}");
    assert_eq!(reload_metric(&ca).await, "0");
    let (code, readiness) = http::get(ca.http, "/readyz").await.unwrap();
    assert!(code == 200 && readiness.starts_with("degraded") && readiness.contains("colour"), "{code} {readiness}");
    assert_eq!(issued_lifetime(&ca, &caller).await, 3600, "whole or not at all");

    // What needs a restart is no change either, as long as there is none.
    std::fs::write(ca.config(), shorter.replace("mesh.test", "other.test")).unwrap();
    wait::until("the status tells", RELOADED_WITHIN, async || {
        let status = ca.ask(&["status"]).unwrap();
        let error = status["configuration_error"].as_str().unwrap().to_owned();
        if error.contains("restart") && error.contains("trust_domain") { Ok(()) } else { Err(error) }
    })
    .await
    .unwrap();
    assert_eq!(issued_lifetime(&ca, &caller).await, 3600);

    std::fs::write(ca.config(), shorter).unwrap();
    wait::until("the good configuration is in force", RELOADED_WITHIN, async || {
        let status = ca.ask(&["status"]).unwrap();
        if status["configuration_error"] == "" { Ok(()) } else { Err(status.to_string()) }
    })
    .await
    .unwrap();
    assert_eq!(reload_metric(&ca).await, "1");
    assert_eq!(issued_lifetime(&ca, &caller).await, 60);
}

#[tokio::test]
async fn a_bad_reload_of_the_agent_changes_nothing_and_is_counted() {
    let lab = Lab::new().unwrap();
    let ca = Ca::start(&lab, HOUR).await.unwrap();
    let agent = Agent::start(&lab, &ca, NODE).await.unwrap();
    let good = std::fs::read_to_string(agent.config()).unwrap();
    std::fs::write(agent.config(), format!("colour = \"blue\"\n{good}")).unwrap();
    wait::until("the refused configuration is counted", RELOADED_WITHIN, async || {
        let metrics = http::get(agent.http, "/metrics").await.unwrap().1;
        let counted = metrics.lines().find(|line| line.contains("config_refused_total")).unwrap_or_default().to_owned();
        if counted.ends_with(" 1") { Ok(()) } else { Err(counted) }
    })
    .await
    .unwrap();
    assert_eq!(http::get(agent.http, "/readyz").await.unwrap(), (200, "ready\n".to_owned()));
}

async fn reload_metric(ca: &Ca) -> String {
    let metrics = http::get(ca.http, "/metrics").await.unwrap().1;
    let line = metrics.lines().find(|line| line.starts_with("chancery_config_last_reload_successful "));
    line.unwrap().split_whitespace().last().unwrap().to_owned()
}

/// In seconds from now, of a certificate that is issued now.
async fn issued_lifetime(ca: &Ca, caller: &Caller) -> i64 {
    use time::OffsetDateTime;
    use time::format_description::well_known::Rfc3339;

    let issued = caller.issue(caller.request().unwrap()).await.unwrap().unwrap();
    let shown = ca.ask(&["identity", "show", "--entry", &issued.entry.to_string()]).unwrap();
    let moment = |name: &str| OffsetDateTime::parse(shown[name].as_str().unwrap(), &Rfc3339).unwrap();
    let seconds = (moment("not_after") - moment("time")).as_seconds_f64();
    // Certificates have whole seconds.
    if (seconds - 3600.0).abs() < 2.0 {
        3600
    } else if (seconds - 60.0).abs() < 2.0 {
        60
    } else {
        panic!("{shown}")
    }
}
