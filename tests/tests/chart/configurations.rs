//! The configurations that the chart renders, given to the real programs.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use age::secrecy::ExposeSecret;
use chancery_ca::issuance::PolicySettings;
use chancery_tests::ca::Ca;
use chancery_tests::lab::Lab;
use chancery_tests::tools;
use serde_json::{Value, json};

use crate::chart::{self, COMBINATIONS, Chart, EXAMPLES, example, find, pod, said};

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
fn envoy_accepts_its_configuration_in_the_examples() {
    let Some(envoy) = tools::envoy() else { return };
    let lab = Lab::new().unwrap();
    for (name, workload) in EXAMPLES {
        let config = lab.at("envoy.yaml");
        let file = find(&example(name), "ConfigMap", &format!("{workload}-envoy"))["data"]["envoy.yaml"].clone();
        std::fs::write(&config, file.as_str().unwrap()).unwrap();
        let mut command = Command::new(&envoy);
        let output = command.args(["--mode", "validate", "--disable-hot-restart", "--config-path"]).arg(config).output().unwrap();
        assert!(output.status.success(), "{name}: {}", said(&output));
    }
    let example = example("workload.yaml");
    // The socket that it connects to is in the volume, as the agent calls it by default.
    let volume = &pod(find(&example, "Deployment", "cart"))["volumes"][1];
    assert_eq!(*volume, json!({"name": "chancery", "csi": {"driver": "csi.chancery.dev", "readOnly": true}}));
}

#[tokio::test]
async fn the_agent_accepts_its_configuration_as_a_sidecar_and_finds_what_it_names() {
    let lab = Lab::new().unwrap();
    let ca = Ca::start(&lab, Duration::from_secs(3600)).await.unwrap();
    let example = example("sidecar.yaml");
    let text = find(&example, "ConfigMap", "till-agent")["data"]["agent.toml"].as_str().unwrap();
    let spec = pod(find(&example, "Deployment", "till"));
    let (agent, envoy) = (&spec["initContainers"][0], &spec["containers"][0]);
    let mounts = |container: &Value| -> BTreeSet<(String, String)> {
        let mounts = container["volumeMounts"].as_array().unwrap().iter();
        mounts.map(|mount| (mount["name"].as_str().unwrap().to_owned(), mount["mountPath"].as_str().unwrap().to_owned())).collect()
    };
    let (of_agent, of_envoy) = (mounts(agent), mounts(envoy));
    for path in text.split('"').skip(1).step_by(2).filter(|text| text.starts_with('/')) {
        assert!(of_agent.iter().any(|(_, mount)| Path::new(path).starts_with(mount)), "{path} is nowhere");
    }
    let shared: Vec<_> = of_agent.intersection(&of_envoy).map(|(name, path)| (name.as_str(), path.as_str())).collect();
    assert_eq!(shared, [("chancery", "/run/chancery")], "the socket, and neither key nor token");
    let volumes = spec["volumes"].as_array().unwrap();
    assert!(volumes.iter().filter_map(|volume| volume.get("emptyDir")).all(|volume| volume["medium"] == "Memory"));

    let replaced = [
        ("\"cluster.local\"", "\"mesh.test\"".to_owned()),
        ("/var/run/secrets/chancery/token", write_token(&lab)),
        ("/etc/chancery/trust/trust-bundle.pem", ca.bundle().display().to_string()),
        ("/run/chancery-state", lab.at("state").display().to_string()),
    ];
    let text = replaced.iter().fold(text.to_owned(), |text, (from, to)| {
        assert!(text.contains(from), "{from} is not named: {text}");
        text.replace(from, to)
    });
    std::fs::write(lab.at("agent.toml"), text).unwrap();
    let mut command = Command::new(tools::chancery("chancery-agent").unwrap());
    let output = command.args(["check", "--config"]).arg(lab.at("agent.toml")).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
}

fn write_token(lab: &Lab) -> String {
    std::fs::write(lab.at("token"), "a token").unwrap();
    lab.at("token").display().to_string()
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

#[test]
fn a_command_of_the_guide_that_changes_a_value_keeps_all_others() {
    let docs = std::fs::read_dir(tools::source().join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let notes = Chart::directory().join("templates/NOTES.txt");
    let mut tried = 0;
    let others = ["README.md", "deploy/examples/sidecar.yaml"].map(|path| tools::source().join(path));
    for path in docs.chain(others).chain([notes]).filter(|path| path.is_file()) {
        let text = std::fs::read_to_string(&path).unwrap();
        for command in text.replace("\\\n", " ").split("helm upgrade").skip(1) {
            let command = command.split(['`', '\n']).next().unwrap();
            let Some((before, _)) = command.split_once("--set") else { continue };
            let wanted = ["chancery deploy/helm/chancery", "--namespace chancery-system", "--reuse-values"];
            assert!(wanted.iter().all(|wanted| before.contains(wanted)), "{}: helm upgrade{command}", path.display());
            tried += 1;
        }
    }
    assert!(tried > 3, "{tried}");
}

/// The part of a token's life after which the kubelet replaces it.
const REPLACED_AT: f64 = 0.8;
/// The part of a certificate's life by which its renewal may be later than `renewal.from`.
const SPREAD: f64 = 0.1;

#[test]
fn tokens_outlive_the_part_of_a_certificates_life_in_which_it_is_renewed_and_the_guide_says_how_long_an_outage_is_survived() {
    let values = std::fs::read_to_string(Chart::directory().join("values.yaml")).unwrap();
    let token = serde_yaml_ng::from_str::<Value>(&values).unwrap()["csi"]["tokenSeconds"].as_f64().unwrap();
    let output = Command::new(tools::chancery("chancery-agent").unwrap()).args(["config", "example"]).output().unwrap();
    let agent: toml::Table = String::from_utf8(output.stdout).unwrap().parse().unwrap();
    let lifetime = PolicySettings::default().lifetimes.default.as_secs_f64();
    let left = 1.0 - agent["renewal"]["from"].as_float().unwrap();
    assert!(token >= lifetime * left, "{token} s");
    // As long as the oldest token lives its pod renews; then its certificate is as old as one that is about to be renewed, at most.
    let survived = token * (1.0 - REPLACED_AT) + lifetime * (left - SPREAD);
    let guide = std::fs::read_to_string(tools::source().join("docs/kubernetes.md")).unwrap();
    for text in [values, guide] {
        assert!(text.contains(&format!("{:.0} minutes", survived / 60.0)), "{survived} s: {text}");
    }
}
