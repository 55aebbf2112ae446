//! The example configurations, and what the programs print about themselves, can be used as they are.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use chancery_tests::ca::Ca;
use chancery_tests::lab::Lab;
use chancery_tests::tokens::TokenVolume;
use chancery_tests::tools;

fn run(program: &Path, arguments: &[&str]) -> Output {
    Command::new(program).args(arguments).output().unwrap()
}

fn printed(program: &str, arguments: &[&str]) -> String {
    let output = run(&tools::chancery(program).unwrap(), arguments);
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn example(name: &str) -> String {
    std::fs::read_to_string(tools::source().join("deploy/examples").join(name)).unwrap()
}

/// Writes the text into the lab with each path replaced; one that does not occur would not be tested.
fn place(lab: &Lab, name: &str, text: &str, paths: &[(&str, PathBuf)]) -> String {
    let placed = paths.iter().fold(text.to_owned(), |text, (from, to)| {
        assert!(text.contains(from), "{name} does not name {from}");
        text.replace(from, to.to_str().unwrap())
    });
    std::fs::write(lab.at(name), placed).unwrap();
    lab.at(name).to_str().unwrap().to_owned()
}

#[tokio::test]
async fn the_configurations_of_the_agent_pass_its_check() {
    let lab = Lab::new().unwrap();
    let ca = Ca::start(&lab, Duration::from_secs(3600)).await.unwrap();
    let volume = TokenVolume::create(&lab.at("token")).unwrap();
    volume.replace("a token").unwrap();
    // The bundle must be of the trust domain that the file names.
    let texts = [
        ("printed.toml", printed("chancery-agent", &["config", "example"])),
        ("agent.toml", example("agent.toml")),
        ("agent-sidecar.toml", example("agent-sidecar.toml")),
    ];
    for (name, text) in texts {
        let text = text.replace("trust_domain = \"example.org\"", "trust_domain = \"mesh.test\"");
        let text = text.replace("trust_domain = \"mesh.example\"", "trust_domain = \"mesh.test\"");
        let paths = [
            ("/var/run/secrets/chancery/token", volume.token()),
            ("/etc/chancery/bundle.pem", ca.bundle()),
            ("/run/chancery/agent-state", lab.at("state")),
        ];
        let path = place(&lab, name, &text, &paths);
        assert!(printed("chancery-agent", &["check", "--config", &path]).ends_with(": good\n"), "{name}");
        let spoiled = place(&lab, "spoiled.toml", &format!("{text}\ncolour = 1\n"), &[]);
        let refused = run(&tools::chancery("chancery-agent").unwrap(), &["check", "--config", &spoiled]);
        assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("colour"), "{name}: {refused:?}");
    }
}

#[test]
fn the_configurations_of_the_ca_pass_its_check() {
    let lab = Lab::new().unwrap();
    let printed_example = printed("chancery-ca", &["config", "example"]);
    let path = place(&lab, "printed.toml", &printed_example, &[]);
    printed("chancery-ca", &["check", "--config", &path]);

    let path = place(&lab, "ca.toml", &example("ca.toml"), &[]);
    assert_eq!(printed("chancery-ca", &["check", "--config", &path]), "the configuration is valid\n");
}

#[test]
fn envoy_accepts_its_configuration() {
    let Some(envoy) = tools::envoy() else { return };
    let lab = Lab::new().unwrap();
    let volume = TokenVolume::create(&lab.at("tokens")).unwrap();
    volume.replace("a token").unwrap();
    let tokens = ("/var/run/secrets/tokens", volume.directory().to_owned());
    let token_secret = PathBuf::from(place(&lab, "token_sds.yaml", &example("token_sds.yaml"), std::slice::from_ref(&tokens)));
    let path = place(&lab, "envoy.yaml", &example("envoy.yaml"), &[tokens, ("/etc/envoy/token_sds.yaml", token_secret)]);
    let validated = run(&envoy, &["--mode", "validate", "--config-path", &path, "--disable-hot-restart"]);
    let said = String::from_utf8_lossy(&[validated.stdout, validated.stderr].concat()).into_owned();
    assert!(validated.status.success() && said.contains("OK"), "{said}");
}

#[test]
fn every_program_prints_completions_for_every_shell() {
    for program in ["chancery-ca", "chancery-agent", "chancery"] {
        for (shell, marker) in [("bash", "complete -F"), ("zsh", "#compdef"), ("fish", "complete -c")] {
            let script = printed(program, &["completions", shell]);
            assert!(script.contains(marker) && script.contains(program), "{program} {shell}: {script}");
        }
    }
}
