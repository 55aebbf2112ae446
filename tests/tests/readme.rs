//! What the README tells people to write works as it stands there.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::process::Command;

use chancery_tests::envoy::{Addresses, Envoy, Plan};
use chancery_tests::lab::Lab;
use chancery_tests::mesh::{Mesh, Settings};
use chancery_tests::{http, tools};
use serde_json::Value;

/// The YAML block in the README that begins with this comment.
fn block(title: &str) -> String {
    let readme = std::fs::read_to_string(tools::source().join("README.md")).unwrap();
    let start = format!("```yaml\n# {title}\n");
    let (_, rest) = readme.split_once(&start).unwrap_or_else(|| panic!("the README has no block `{title}`"));
    rest.split("```").next().unwrap().to_owned()
}

#[tokio::test]
async fn an_envoy_configured_as_the_readme_says_gets_its_certificate_and_talks() {
    let Some(binary) = tools::envoy() else { return };
    let settings = Settings::lasting(binary.clone());
    let mesh = Mesh::start(Lab::new().unwrap(), settings).await.unwrap();
    let volume = mesh.volume("checkout").unwrap();

    let token_secret = mesh.lab.at("token_sds.yaml");
    let placed = |text: String| {
        text.replace("/run/chancery/sds.sock", mesh.agent.sds_socket.to_str().unwrap())
            .replace("/etc/envoy/token_sds.yaml", token_secret.to_str().unwrap())
            .replace("/var/run/secrets/tokens", volume.directory().to_str().unwrap())
    };
    let yaml = |title: &str| -> Value { serde_yaml_ng::from_str(&placed(block(title))).unwrap() };
    std::fs::write(&token_secret, placed(block("/etc/envoy/token_sds.yaml"))).unwrap();
    let plan = Plan { token: None, ..mesh.plan("checkout", &volume, None) };
    let at = Addresses::free().unwrap();
    let mut bootstrap = plan.bootstrap(at, &token_secret);
    bootstrap["static_resources"]["clusters"][0] = yaml("cluster");
    bootstrap["static_resources"]["listeners"][0]["filter_chains"][0]["transport_socket"] =
        yaml("transport_socket of a listener's filter chain");
    let mut envoy = Envoy::start_with(&mesh.lab, &binary, "checkout", at, &bootstrap).unwrap();
    envoy.ready().await.unwrap();
    assert_eq!(envoy.certificate().await.unwrap().spiffe_id, "spiffe://mesh.test/ns/shop/sa/checkout");

    let cart = mesh.workload("cart", Some(at.inbound)).await.unwrap();
    assert_eq!(http::get(cart.envoy.at.outbound, "/").await.unwrap().0, 200);
}

#[test]
fn the_commands_in_the_readme_exist() {
    let readme = std::fs::read_to_string(tools::source().join("README.md")).unwrap();
    let (_, block) = readme.split_once("## Ask\n\n```\n").unwrap();
    for line in block.split("```").next().unwrap().lines() {
        let words: Vec<&str> = line.split('#').next().unwrap().split_whitespace().collect();
        // With --help everything is parsed and nothing is done.
        let output = Command::new(tools::chancery(words[0]).unwrap()).args(&words[1..]).arg("--help").output().unwrap();
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    }
}
