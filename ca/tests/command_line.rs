//! The two programs as they are typed: what they print, what they exit with, what they leave behind.
#![allow(clippy::unwrap_used, reason = "a test may fail wherever it likes")]

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

const SERVER: &str = env!("CARGO_BIN_EXE_chancery-ca");
const OPERATOR: &str = env!("CARGO_BIN_EXE_chancery");

fn run(program: &str, directory: &Path, arguments: &[&str]) -> Output {
    Command::new(program).current_dir(directory).env_remove("CHANCERY_ADMIN_SOCKET").args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// A development CA in the background; killed when dropped.
struct Serving(Child);

impl Serving {
    /// Returns when it serves.
    fn start(directory: &Path) -> Self {
        let config = directory.join("ca.toml");
        std::fs::write(&config, "listen = \"127.0.0.1:0\"\nhttp_listen = \"127.0.0.1:0\"\n[log]\nformat = \"json\"\n").unwrap();
        let arguments = ["serve", "--dev", "--config", "ca.toml"];
        let mut child = Command::new(SERVER).current_dir(directory).args(arguments).stderr(Stdio::piped()).spawn().unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        let mut lines = log.lines().map(Result::unwrap);
        assert!(lines.any(|line| line.contains("\"message\":\"serving\"")), "it ended before it served");
        // Read on, so that it never waits for room in the pipe.
        std::thread::spawn(move || lines.for_each(drop));
        Self(child)
    }

    fn end(mut self) -> Option<i32> {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        self.0.wait().unwrap().code()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ended = self.0.kill();
        let _reaped = self.0.wait();
    }
}

#[test]
fn serving_without_a_configuration_or_dev_is_wrong_usage() {
    let directory = tempfile::tempdir().unwrap();
    let output = run(SERVER, directory.path(), &["serve"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("--dev"), "{}", text(&output.stderr));
}

#[test]
fn check_says_what_is_wrong_and_where() {
    let directory = tempfile::tempdir().unwrap();
    for (config, expected) in [
        ("trust_domain = \"example.org\"\ndata_dir = \"d\"\ncolour = 1\n", "bad.toml:3:1: unknown field `colour`"),
        ("trust_domain = \"exam ple\"\ndata_dir = \"d\"\n", "bad.toml:1:"),
        ("data_dir = \"d\"\n", "trust_domain: missing"),
    ] {
        std::fs::write(directory.path().join("bad.toml"), config).unwrap();
        let output = run(SERVER, directory.path(), &["check", "--config", "bad.toml"]);
        assert_eq!(output.status.code(), Some(1));
        assert!(text(&output.stderr).contains(expected), "{}", text(&output.stderr));
    }
    let output = run(SERVER, directory.path(), &["check", "--config", "missing.toml"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("missing.toml"), "{}", text(&output.stderr));
}

#[test]
fn check_names_the_file_and_the_key_that_cannot_be_used() {
    let directory = tempfile::tempdir().unwrap();
    let good = r#"{"kty": "EC", "crv": "P-256", "kid": "good",
        "x": "MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4", "y": "4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM"}"#;
    let off_the_curve = good.replace("\"MKBC", "\"NKBC").replace("good", "bad");
    let check = |name: &str, content: &str, jwks: &str| {
        std::fs::write(directory.path().join(name), content).unwrap();
        let config = format!(
            "trust_domain = \"example.org\"\ndata_dir = \"d\"\n[[cluster]]\nname = \"east\"\nissuer = \"https://k\"\n\
             service_accounts = [\"*\"]\njwks = {{ {jwks} }}\n"
        );
        std::fs::write(directory.path().join("ca.toml"), config).unwrap();
        let output = run(SERVER, directory.path(), &["check", "--config", "ca.toml"]);
        (output.status.code(), text(&output.stderr))
    };
    for (name, content, jwks, expected) in [
        ("no.json", "keys".to_owned(), "file = \"no.json\"", "no.json: the keys cannot be used: they are no JWKS"),
        (
            "bad.json",
            format!("{{\"keys\": [{good}, {off_the_curve}]}}"),
            "file = \"bad.json\"",
            "bad.json: key 2 (kid \"bad\"): its `x` and `y`",
        ),
        ("none.json", format!("{{\"keys\": [{off_the_curve}]}}"), "file = \"none.json\"", "key 1 (kid \"bad\"): its `x` and `y`"),
        ("ca.pem", "nothing".to_owned(), "url = \"https://k/jwks\", ca_file = \"ca.pem\"", "ca_file ca.pem: no certificate in it"),
    ] {
        let (code, said) = check(name, &content, jwks);
        assert_eq!(code, Some(1), "{name}");
        assert!(said.contains("ca.toml:7: cluster.0.jwks: ") && said.contains(expected), "{name}: {said}");
    }
    let encryption = r#"{"kty": "RSA", "use": "enc", "n": "AQAB", "e": "AQAB"}"#;
    assert_eq!(check("good.json", &format!("{{\"keys\": [{good}, {encryption}]}}"), "file = \"good.json\"").0, Some(0));
}

#[test]
fn the_printed_example_is_a_valid_configuration() {
    let directory = tempfile::tempdir().unwrap();
    let example = run(SERVER, directory.path(), &["config", "example"]);
    std::fs::write(directory.path().join("ca.toml"), example.stdout).unwrap();
    let output = run(SERVER, directory.path(), &["check", "--config", "ca.toml"]);
    assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(0), "the configuration is valid\n"));
}

#[test]
fn both_programs_print_completions_and_their_version() {
    let directory = tempfile::tempdir().unwrap();
    for program in [SERVER, OPERATOR] {
        assert!(text(&run(program, directory.path(), &["completions", "bash"]).stdout).contains("complete -F"));
        assert!(text(&run(program, directory.path(), &["--version"]).stdout).contains(env!("CARGO_PKG_VERSION")));
    }
}

#[test]
fn an_operator_without_a_ca_is_told_the_next_step() {
    let directory = tempfile::tempdir().unwrap();
    let output = run(OPERATOR, directory.path(), &["status", "--socket", "missing.sock"]);
    assert_eq!(output.status.code(), Some(1));
    let error = text(&output.stderr);
    assert!(error.contains("missing.sock") && error.contains("--socket"), "{error}");
}

#[test]
fn an_operator_asks_a_development_ca_in_the_same_directory() {
    let directory = tempfile::tempdir().unwrap();
    let ca = Serving::start(directory.path());
    let operator = |arguments: &[&str]| run(OPERATOR, directory.path(), arguments);

    let status = operator(&["status", "--output", "json"]);
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!((&status["ready"], &status["development"]), (&true.into(), &true.into()));
    let listed = text(&operator(&["identity", "list", "-o", "csv"]).stdout);
    assert!(listed.starts_with("entry,time,spiffe_id,serial,") && listed.contains("spiffe://dev.chancery/chancery/ca"), "{listed}");
    let missing = operator(&["identity", "show", "00000000000000000000000000000000"]);
    assert_eq!((missing.status.code(), text(&missing.stderr).contains("no certificate with the serial")), (Some(1), true));
    assert!(text(&operator(&["explain", "shop/cart-0"]).stdout).starts_with("never asked\n"));
    let refused = operator(&["policy", "test", "--namespace", "shop", "--service-account", "cart", "--lifetime", "48h"]);
    assert_eq!((refused.status.code(), text(&refused.stderr).contains("policy.lifetimes")), (Some(1), true));
    assert_eq!(ca.end(), Some(0));
}

#[test]
fn a_policy_is_tested_before_it_is_in_force() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("ca.toml"), "[policy]\nid_template = \"/{cluster}/{namespace}/{service_account}\"\n").unwrap();
    let arguments = ["policy", "test", "--config", "ca.toml", "--dev", "--namespace", "shop", "--service-account", "cart", "-o", "json"];
    let output = run(OPERATOR, directory.path(), &arguments);
    let verdict: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(verdict["spiffe_id"], "spiffe://dev.chancery/dev/shop/cart");
}

#[test]
fn tokens_are_signed_by_a_development_ca_alone_and_written_for_their_owner() {
    let directory = tempfile::tempdir().unwrap();
    let pod = ["--namespace", "shop", "--service-account", "cart", "--pod", "cart-0", "--node", "node-1"];
    let create = |more: &[&str]| run(OPERATOR, directory.path(), &[&["token", "create"], &pod[..], more].concat());
    let refused = create(&[]);
    assert_eq!((refused.status.code(), text(&refused.stderr).contains("serve --dev")), (Some(1), true));

    let ca = Serving::start(directory.path());
    assert_eq!(text(&create(&[]).stdout).matches('.').count(), 2);
    let json: serde_json::Value = serde_json::from_slice(&create(&["-o", "json", "--lifetime", "10s"]).stdout).unwrap();
    assert!(json["token"].is_string() && json["expires_at"].is_string());
    assert!(create(&["--out", "token"]).stdout.is_empty());
    let mode = std::fs::metadata(directory.path().join("token")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    drop(ca);
}
