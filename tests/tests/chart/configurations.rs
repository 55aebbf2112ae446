//! The configurations that the chart renders, given to the real programs.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use age::secrecy::ExposeSecret;
use chancery_tests::ca::Ca;
use chancery_tests::lab::Lab;
use chancery_tests::tools;
use serde_json::{Value, json};

use crate::chart::{self, COMBINATIONS, Chart, find, pod, said};

const KUBECONFIG: &str = "{apiVersion: v1, kind: Config, current-context: west, contexts: [{name: west, context: {cluster: west, user: ca}}, \
    {name: admin@west, context: {cluster: west, user: ca}}], clusters: [{name: west, cluster: {server: 'https://192.0.2.1'}}], \
    users: [{name: ca, user: {token: secret}}]}";

/// What the chart decides for the agent.
const AGENTS_OWN: [&str; 12] = [
    "trust_domain",
    "cluster",
    "ca_address",
    "mode",
    "token_file",
    "key_type",
    "state_dir",
    "allow_disk_state",
    "http_listen",
    "admin_socket",
    "trust",
    "sds",
];

/// With the trust domain of the bundles that the CAs of tests have.
fn render(chart: &Chart<'_>, values: &str) -> Vec<Value> {
    chart::parse(&chart.helm(&["template", "--kube-version", "1.37.0", "--set", "trustDomain=mesh.test"], values))
}

/// Runs `check` on a file of a `ConfigMap`, in which each path that occurs is replaced by one in the lab.
fn check(lab: &Lab, rendered: &[Value], component: &str, file: &str, paths: &[(&str, &Path)]) -> Output {
    let text = find(rendered, "ConfigMap", component)["data"][file].as_str().unwrap().to_owned();
    let placed = paths.iter().fold(text, |text, (from, to)| text.replace(from, to.to_str().unwrap()));
    std::fs::write(lab.at(file), placed).unwrap();
    Command::new(tools::chancery(component).unwrap()).args(["check", "--config"]).arg(lab.at(file)).output().unwrap()
}

fn write_private(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
}

#[test]
fn the_ca_accepts_its_rendered_configuration() {
    let lab = Lab::new().unwrap();
    let Some(chart) = Chart::new(&lab) else { return };
    write_private(&lab.at("seal/passphrase"), "a passphrase");
    write_private(&lab.at("seal/key.txt"), age::x25519::Identity::generate().to_string().expose_secret());
    for cluster in ["west", "north"] {
        write_private(&lab.at(&format!("clusters/{cluster}/kubeconfig")), KUBECONFIG);
    }
    let (seal, clusters) = (lab.at("seal"), lab.at("clusters"));
    let paths: [(&str, &Path); 2] = [("/etc/chancery/seal", &seal), ("/etc/chancery/clusters", &clusters)];
    for (name, values) in COMBINATIONS {
        let rendered = render(&chart, values);
        if !rendered.iter().any(|object| object["kind"] == "StatefulSet") {
            continue;
        }
        let output = check(&lab, &rendered, "chancery-ca", "ca.toml", &paths);
        assert!(output.status.success(), "{name}: {}", said(&output));
    }
    // It is the rendered file that was read.
    let rendered = render(&chart, "ca: {config: {log: {level: \"!\"}}}");
    assert!(!check(&lab, &rendered, "chancery-ca", "ca.toml", &paths).status.success());
}

/// The `[[cluster]]` tables of the CA's configuration.
fn clusters(rendered: &[Value]) -> Vec<toml::Value> {
    let text = find(rendered, "ConfigMap", "chancery-ca")["data"]["ca.toml"].as_str().unwrap();
    text.parse::<toml::Table>().unwrap()["cluster"].as_array().unwrap().clone()
}

#[test]
fn each_further_cluster_is_served_as_its_values_say() {
    let lab = Lab::new().unwrap();
    let Some(chart) = Chart::new(&lab) else { return };
    let expected: toml::Table = r#"
        [[cluster]]
        name = "west"
        issuer = "https://oidc.example/id/2"
        agent_accounts = ["chancery-system/chancery-agent"]
        service_accounts = ["*"]
        shared_identities = true
        kubernetes = { kubeconfig = "/etc/chancery/clusters/west/kubeconfig", context = "admin@west" }
        operators = true
        publish = { namespaces = ["mesh"], signer_name = "mesh.example/identities" }

        [[cluster]]
        name = "north"
        issuer = "https://oidc.example/id/3"
        agent_accounts = ["chancery-system/chancery-agent"]
        service_accounts = ["*"]
        shared_identities = false
        kubernetes = { kubeconfig = "/etc/chancery/clusters/north/kubeconfig" }
        operators = false
        publish = { namespaces = ["chancery-system"] }
    "#
    .parse()
    .unwrap();
    let everything = clusters(&chart.render(COMBINATIONS[1].1));
    assert_eq!(everything[1..], *expected["cluster"].as_array().unwrap());
    // The chart's own cluster has operators as long as it has the roles for them.
    assert_eq!(everything[0]["operators"].as_bool(), Some(true));
    assert_eq!(clusters(&chart.render("roles: {create: false}"))[0]["operators"].as_bool(), Some(false));
}

#[tokio::test]
async fn the_agent_accepts_its_rendered_configuration() {
    let lab = Lab::new().unwrap();
    let Some(chart) = Chart::new(&lab) else { return };
    let ca = Ca::start(&lab, Duration::from_secs(3600)).await.unwrap();
    std::fs::write(lab.at("token"), "a token").unwrap();
    let (token, state, bundle) = (lab.at("token"), lab.at("state"), ca.bundle());
    let paths: [(&str, &Path); 3] =
        [("/var/run/secrets/chancery/token", &token), ("/run/chancery/state", &state), ("/etc/chancery/trust/trust-bundle.pem", &bundle)];
    for (name, values) in COMBINATIONS {
        let output = check(&lab, &render(&chart, values), "chancery-agent", "agent.toml", &paths);
        assert!(output.status.success(), "{name}: {}", said(&output));
    }
    let rendered = render(&chart, "agent: {config: {log: {level: \"!\"}}}");
    assert!(!check(&lab, &rendered, "chancery-agent", "agent.toml", &paths).status.success());
}

#[test]
fn every_path_in_a_rendered_configuration_is_on_a_volume() {
    let lab = Lab::new().unwrap();
    let Some(chart) = Chart::new(&lab) else { return };
    for (name, values) in COMBINATIONS {
        let rendered = chart.render(values);
        for workload in rendered.iter().filter(|object| object["kind"] == "StatefulSet" || object["kind"] == "DaemonSet") {
            let component = workload["metadata"]["name"].as_str().unwrap();
            let files = find(&rendered, "ConfigMap", component)["data"].as_object().unwrap();
            let text = files.values().next().unwrap().as_str().unwrap();
            let mounts = pod(workload)["containers"][0]["volumeMounts"].as_array().unwrap();
            let mounted: Vec<&str> = mounts.iter().map(|mount| mount["mountPath"].as_str().unwrap()).collect();
            // What has a brace is the template of SPIFFE IDs.
            let paths: Vec<&str> = text.split('"').skip(1).step_by(2).filter(|text| text.starts_with('/') && !text.contains('{')).collect();
            assert!(paths.len() >= 3, "{component}");
            for path in paths {
                assert!(mounted.iter().any(|mount| Path::new(path).starts_with(mount)), "{name}: {component} finds {path} nowhere");
            }
            // Nothing is mounted from nowhere, and no volume is there for nothing.
            let volumes = pod(workload)["volumes"].as_array().unwrap().iter().map(|volume| volume["name"].as_str().unwrap());
            let claims = workload["spec"]["volumeClaimTemplates"].as_array().into_iter().flatten();
            let mut volumes: Vec<&str> = volumes.chain(claims.map(|claim| claim["metadata"]["name"].as_str().unwrap())).collect();
            let mut used: Vec<&str> = mounts.iter().map(|mount| mount["name"].as_str().unwrap()).collect();
            volumes.sort_unstable();
            used.sort_unstable();
            assert_eq!(volumes, used, "{name}: {component}");
        }
    }
}

#[test]
fn envoy_accepts_its_configuration_in_the_example() {
    let Some(envoy) = tools::envoy() else { return };
    let lab = Lab::new().unwrap();
    let example = std::fs::read_to_string(tools::source().join("deploy/examples/workload.yaml")).unwrap();
    let example = chart::objects(&example);
    let config = lab.at("envoy.yaml");
    std::fs::write(&config, find(&example, "ConfigMap", "cart-envoy")["data"]["envoy.yaml"].as_str().unwrap()).unwrap();
    let mut command = Command::new(envoy);
    let output = command.args(["--mode", "validate", "--disable-hot-restart", "--config-path"]).arg(config).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    // The socket that it connects to is in the volume, as the agent calls it by default.
    let volume = &pod(find(&example, "Deployment", "cart"))["volumes"][1];
    assert_eq!(*volume, json!({"name": "chancery", "csi": {"driver": "csi.chancery.dev", "readOnly": true}}));
}

/// The names of the keys that stand in the section of this name, below `config` in the chart's values, in its schema.
fn properties(schema: &Value, component: &str, section: &str) -> BTreeSet<String> {
    let properties = &schema["properties"][component]["properties"]["config"]["properties"][section]["properties"];
    properties.as_object().unwrap_or_else(|| panic!("{component} has no {section}")).keys().cloned().collect()
}

#[test]
fn every_key_of_the_programs_can_be_set() {
    let schema: Value = serde_json::from_slice(&std::fs::read(Chart::directory().join("values.schema.json")).unwrap()).unwrap();
    let programs = [
        ("chancery-ca", "ca", &["log", "policy", "authority", "rotation", "roles", "limits"][..]),
        ("chancery-agent", "agent", &["log", "renewal", "limits"]),
    ];
    for (program, component, sections) in programs {
        let output = Command::new(tools::chancery(program).unwrap()).args(["config", "example"]).output().unwrap();
        let example: toml::Table = String::from_utf8(output.stdout).unwrap().parse().unwrap();
        for section in sections {
            let keys: BTreeSet<String> = example[*section].as_table().unwrap().keys().cloned().collect();
            assert_eq!(properties(&schema, component, section), keys, "{program}: [{section}]");
        }
        // What the chart decides by itself, and nothing that it has not heard of.
        let others: BTreeSet<&str> = example.keys().map(String::as_str).filter(|key| !sections.contains(key)).collect();
        let decided: BTreeSet<&str> = match component {
            "ca" => ["trust_domain", "data_dir", "listen", "http_listen", "admin_socket", "keys"].into(),
            _ => AGENTS_OWN.into(),
        };
        assert_eq!(others, decided, "{program}");
    }
}

/// What every value may be is said with one that is not its default.
#[test]
fn the_fullest_values_set_everything_that_the_schema_knows() {
    let schema: Value = serde_json::from_slice(&std::fs::read(Chart::directory().join("values.schema.json")).unwrap()).unwrap();
    let fullest: Value = serde_yaml_ng::from_str(COMBINATIONS[1].1).unwrap();
    let mut missing = Vec::new();
    unset("", &schema, &fullest, &mut missing);
    // An agent that starts from a fingerprint has no bundle to start from, and one that has its CA elsewhere has none here.
    missing.retain(|path| {
        !["agent.rootFingerprint", "ca.enabled", "ca.replicas", "roles.create", "networkPolicy.enabled", "global"].contains(&&path[1..])
    });
    assert!(missing.is_empty(), "{missing:?}");
}

fn unset(path: &str, schema: &Value, values: &Value, missing: &mut Vec<String>) {
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        let path = format!("{path}.{name}");
        match &values[name] {
            Value::Null if name != "claims" => missing.push(path),
            Value::Array(items) => unset(&path, &property["items"], items.first().unwrap_or(&Value::Null), missing),
            value => unset(&path, property, value, missing),
        }
    }
}

#[test]
fn the_commands_that_people_are_told_to_run_exist() {
    let notes = std::fs::read_to_string(Chart::directory().join("templates/NOTES.txt")).unwrap();
    let guide = std::fs::read_to_string(tools::source().join("docs/kubernetes.md")).unwrap();
    let mut tried = 0;
    for line in notes.lines().chain(guide.lines()) {
        // In a pod, or as a line of its own.
        let in_pods = line.split(" -- ").skip(1).filter(|command| command.starts_with("chancery"));
        for command in in_pods.chain(line.starts_with("chancery ").then_some(line)) {
            let command = command.split(['`', '|']).next().unwrap();
            let words: Vec<&str> = command.split_whitespace().collect();
            // With --help everything is parsed and nothing is done.
            let output = Command::new(tools::chancery(words[0]).unwrap()).args(&words[1..]).arg("--help").output().unwrap();
            assert!(output.status.success(), "{command}: {}", said(&output));
            tried += 1;
        }
    }
    assert!(tried > 7, "{tried}");
}
