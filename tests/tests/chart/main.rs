//! The Helm chart: what it renders is valid, as narrow as it says, and accepted by the programs that it starts.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

mod chart;
mod cluster;
mod configurations;
mod containers;
mod monitoring;
mod running;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use chancery_tests::lab::Lab;
use chancery_tests::tools;
use serde_json::{Value, json};

use chart::{COMBINATIONS, Chart, EXAMPLES, NAMESPACE, documents, find, kinds, pod, said};

#[test]
fn the_chart_passes_its_linters_with_every_combination_of_values() {
    let lab = Lab::new().unwrap();
    let (Some(chart), Some(yamllint)) = (Chart::new(&lab), tools::chart("yamllint")) else { return };
    for (name, values) in COMBINATIONS {
        let output = chart.helm(&["lint", "--strict"], values);
        assert!(output.status.success(), "{name}: {}", said(&output));
    }
    let deploy = tools::source().join("deploy");
    let mut lint = Command::new(yamllint);
    lint.current_dir(&deploy).args(["--strict", "--config-file", ".yamllint", "examples", "helm/chancery/values.yaml"]);
    let output = lint.args(["helm/chancery/Chart.yaml", "helm/chancery/files"]).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
}

#[test]
fn what_is_rendered_and_the_examples_are_strictly_valid_kubernetes() {
    let lab = Lab::new().unwrap();
    let (Some(chart), Some(validate)) = (Chart::new(&lab), tools::chart("kubernetes-validate")) else { return };
    let mut files: Vec<_> = EXAMPLES.iter().map(|(name, _)| tools::source().join("deploy/examples").join(name)).collect();
    for (name, values) in COMBINATIONS {
        let rendered = chart.render(values);
        // Kinds of the Prometheus operator are not Kubernetes' own.
        let own = rendered.iter().filter(|object| object["apiVersion"] != "monitoring.coreos.com/v1");
        let text = documents(own);
        files.push(lab.at(&format!("{}.yaml", name.replace(' ', "-"))));
        std::fs::write(files.last().unwrap(), text).unwrap();
    }
    let output = Command::new(&validate).arg("--strict").args(&files).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    // It does find what is wrong.
    let defaults = &files[EXAMPLES.len()];
    let spoiled = std::fs::read_to_string(defaults).unwrap().replacen("\"serviceName\"", "\"serviceNames\"", 1);
    std::fs::write(defaults, spoiled).unwrap();
    assert!(!Command::new(&validate).arg("--strict").arg(defaults).output().unwrap().status.success());
}

/// The security linter's findings, as (kind, number of the check).
fn findings(checkov: &Path, lab: &Lab, rendered: &[Value]) -> BTreeSet<(String, String)> {
    let path = lab.at("rendered.yaml");
    std::fs::write(&path, documents(rendered)).unwrap();
    let mut command = Command::new(checkov);
    command.args(["--framework", "kubernetes", "--compact", "--quiet", "--skip-download", "--output", "json", "--file"]);
    let output = command.arg(&path).output().unwrap();
    let found: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", said(&output)));
    let failed = found["results"]["failed_checks"].as_array().unwrap_or_else(|| panic!("{found}"));
    let of = |check: &Value| {
        let kind = check["resource"].as_str().unwrap().split('.').next().unwrap();
        (kind.to_owned(), check["check_id"].as_str().unwrap().to_owned())
    };
    failed.iter().map(of).collect()
}

#[test]
fn the_security_linter_finds_what_the_chart_explains_and_nothing_else() {
    let lab = Lab::new().unwrap();
    let (Some(chart), Some(checkov)) = (Chart::new(&lab), tools::chart("checkov")) else { return };
    for (name, values) in COMBINATIONS.iter().take(2) {
        assert_eq!(findings(&checkov, &lab, &chart.render(values)), BTreeSet::new(), "{name}");
    }
    let mut rendered = chart.render("");
    let mut explained = BTreeSet::new();
    for object in &mut rendered {
        let annotations = object["metadata"].as_object_mut().unwrap().remove("annotations").unwrap_or_default();
        let skips = annotations.as_object().into_iter().flatten().filter(|(name, _)| name.starts_with("checkov.io/skip"));
        for (_, skip) in skips {
            let (check, reason) = skip.as_str().unwrap().split_once('=').unwrap();
            assert!(reason.len() > 20, "{reason}");
            explained.insert((object["kind"].as_str().unwrap().to_owned(), check.to_owned()));
        }
    }
    assert_eq!(findings(&checkov, &lab, &rendered), explained);
}

#[test]
fn an_unknown_or_impossible_value_is_refused() {
    let lab = Lab::new().unwrap();
    let Some(chart) = Chart::new(&lab) else { return };
    let cases = [
        ("colour: blue", "colour"),
        ("ca: {replica: 1}", "replica"),
        ("ca: {config: {policy: {lifetimes: {defualt: 1h}}}}", "defualt"),
        ("agent: {config: {limits: {batch: 513}}}", "batch"),
        ("ca: {replicas: 2}", "replicas"),
        ("csi: {tokenSeconds: 60}", "tokenSeconds"),
        ("trustDomain: \"Mesh Example\"", "trustDomain"),
        ("cluster: {serviceAccounts: [\"shop\"]}", "serviceAccounts"),
        ("ca: {enabled: false}", "agent.caAddress"),
        ("ca: {seal: {kind: identity}}", "ca.seal.existingSecret"),
        ("ca: {clusters: [{name: west-, issuer: i, serviceAccounts: [\"*\"], kubeconfigSecret: west}]}", "name"),
        ("agent: {maxUnavailable: \"0%\"}", "maxUnavailable"),
        ("monitoring: {serviceMonitor: {interval: \"30 s\"}}", "interval"),
        ("trustBundle: {namespaces: [\"a.b\"]}", "namespaces"),
    ];
    for (values, named) in cases {
        let output = chart.helm(&["template"], values);
        assert!(!output.status.success(), "{values} was accepted");
        assert!(said(&output).contains(named), "{values}: {}", said(&output));
    }
}

/// Numbers, booleans and nothing to YAML, names to Kubernetes.
#[test]
fn names_that_look_like_something_else_stay_names() {
    let lab = Lab::new().unwrap();
    let Some(chart) = Chart::new(&lab) else { return };
    for name in ["123", "on", "null", "1e3"] {
        let values = format!(
            "image: {{pullSecrets: [\"{name}\"]}}\ntrustBundle: {{namespaces: [\"{name}\"]}}\nca:\n  seal: {{nextSecret: \"{name}\", key: \"{name}\"}}\n  \
             persistence: {{backupClaim: \"{name}\", storageClass: \"{name}\"}}\n  clusters: [{{name: \"{name}\", issuer: i, serviceAccounts: \
             [\"*\"], kubeconfigSecret: \"{name}\", kubeconfigKey: \"{name}\"}}]\n"
        );
        let rendered = chart.render_as(name, name, &values);
        let mut found = 0;
        for object in &rendered {
            names(object, &mut |key, value| {
                assert!(value.is_string(), "{name}: {} has {key}: {value}", object["kind"]);
                found += usize::from(value == name);
            });
        }
        assert!(find(&rendered, "Secret", "chancery-ca-seal")["data"][name].is_string());
        assert!(found > 40, "{found}");
        let given = chart.render_as(name, name, &format!("ca: {{seal: {{existingSecret: \"{name}\"}}}}"));
        let volumes = pod(find(&given, "StatefulSet", "chancery-ca"))["volumes"].as_array().unwrap();
        assert!(volumes.iter().any(|volume| volume["secret"]["secretName"] == name));
    }
}

/// Whatever is a name by its key, in all of an object.
fn names(value: &Value, each: &mut impl FnMut(&str, &Value)) {
    const KEYS: [&str; 9] = [
        "name",
        "namespace",
        "secretName",
        "claimName",
        "storageClassName",
        "serviceAccountName",
        "key",
        "path",
        "app.kubernetes.io/instance",
    ];
    for (key, value) in value.as_object().into_iter().flatten() {
        if KEYS.contains(&key.as_str()) {
            each(key, value);
        }
        names(value, each);
    }
    value.as_array().into_iter().flatten().for_each(|value| names(value, each));
}

#[test]
fn every_value_is_explained_and_known_to_the_schema() {
    let text = std::fs::read_to_string(Chart::directory().join("values.yaml")).unwrap();
    let values: Value = serde_yaml_ng::from_str(&text).unwrap();
    let schema: Value = serde_json::from_slice(&std::fs::read(Chart::directory().join("values.schema.json")).unwrap()).unwrap();
    compare("", &values, &schema);
    // The list is empty, and its one example a comment.
    let example = text.lines().skip_while(|line| !line.starts_with("  # - name: ")).map_while(|line| line.strip_prefix("  # "));
    let example: Value = serde_yaml_ng::from_str(&example.collect::<Vec<_>>().join("\n")).unwrap();
    compare(".ca.clusters", &example[0], &schema["properties"]["ca"]["properties"]["clusters"]["items"]);
}

/// Everything in the values is a property in the schema, and the other way round where the values have a map that is not free.
fn compare(path: &str, values: &Value, schema: &Value) {
    let (Some(values), Some(properties)) = (values.as_object(), schema["properties"].as_object()) else { return };
    assert_eq!(schema["additionalProperties"], false, "{path} takes unknown values");
    for (name, value) in values {
        assert!(properties.contains_key(name), "{path}.{name} is not in the schema");
        compare(&format!("{path}.{name}"), value, &properties[name]);
    }
    // Below `config` stands what the programs' own examples explain.
    if !path.contains("config") && !path.ends_with(".resources") {
        let missing: Vec<_> = properties.keys().filter(|name| *name != "global" && !values.contains_key(*name)).collect();
        assert!(missing.is_empty(), "{path}: {missing:?} are not in values.yaml");
    }
}

#[test]
fn a_disruption_budget_comes_with_a_second_replica_only() {
    let lab = Lab::new().unwrap();
    let Some(chart) = Chart::new(&lab) else { return };
    for (name, values) in COMBINATIONS {
        assert!(!kinds(&chart.render(values)).contains(&"PodDisruptionBudget"), "{name}: it would block every drain");
    }
    // Not accepted yet; when it is, the budget must be there.
    let output = chart.helm(&["template", "--skip-schema-validation"], "ca: {replicas: 2}");
    let rendered = chart::parse(&output);
    assert_eq!(find(&rendered, "PodDisruptionBudget", "chancery-ca")["spec"]["maxUnavailable"], 1);
}

#[test]
fn the_kubelet_brings_the_plugin_what_it_needs() {
    let lab = Lab::new().unwrap();
    let Some(chart) = Chart::new(&lab) else { return };
    let rendered = chart.render("csi: {tokenSeconds: 900}");
    let config = find(&rendered, "ConfigMap", "chancery-agent")["data"]["agent.toml"].as_str().unwrap();
    let csi = &config.parse::<toml::Table>().unwrap()["csi"];
    let expected = json!({
        "attachRequired": false,
        "podInfoOnMount": true,
        "fsGroupPolicy": "None",
        "volumeLifecycleModes": ["Ephemeral"],
        "requiresRepublish": true,
        "serviceAccountTokenInSecrets": true,
        "tokenRequests": [{"audience": csi["audience"].as_str().unwrap(), "expirationSeconds": 900}],
    });
    assert_eq!(find(&rendered, "CSIDriver", csi["driver"].as_str().unwrap())["spec"], expected);
}

#[test]
fn the_agent_can_mount_into_pods_which_keep_their_sockets_when_it_is_replaced() {
    let lab = Lab::new().unwrap();
    let Some(chart) = Chart::new(&lab) else { return };
    let rendered = chart.render("");
    let agent = pod(find(&rendered, "DaemonSet", "chancery-agent"));
    let container = &agent["containers"][0];
    let context = &container["securityContext"];
    assert_eq!((&context["privileged"], &context["readOnlyRootFilesystem"]), (&json!(true), &json!(true)));
    assert_eq!(context["capabilities"], json!({"drop": ["ALL"]}));
    assert!(container["env"].as_array().unwrap().iter().any(|variable| variable["name"] == "NODE_NAME"));
    let find = |all: &Value, name: &str| all.as_array().unwrap().iter().find(|found| found["name"] == name).unwrap().clone();
    for (name, path) in [
        ("run", "/run/chancery"),
        ("plugin", "/var/lib/kubelet/plugins/csi.chancery.dev"),
        ("registry", "/var/lib/kubelet/plugins_registry"),
        ("pods", "/var/lib/kubelet/pods"),
    ] {
        assert_eq!(find(&agent["volumes"], name)["hostPath"]["path"], path);
        let mount = find(&container["volumeMounts"], name);
        assert_eq!(mount["mountPath"], path, "paths are the kubelet's own");
        assert_eq!(mount["mountPropagation"], if name == "pods" { json!("Bidirectional") } else { Value::Null }, "{name}");
    }
}

/// Whether a selector's `matchLabels` are all on these pods.
fn selects(selector: &Value, labels: &Value) -> bool {
    let wanted = selector.as_object().unwrap();
    !wanted.is_empty() && wanted.iter().all(|(name, value)| labels[name] == *value)
}

#[test]
fn services_and_policies_are_about_the_pods_and_ports_that_there_are() {
    let lab = Lab::new().unwrap();
    let Some(chart) = Chart::new(&lab) else { return };
    let rendered = chart.render("");
    let labels = |kind: &str, name: &str| &find(&rendered, kind, name)["spec"]["template"]["metadata"]["labels"];
    let (ca, agent) = (labels("StatefulSet", "chancery-ca"), labels("DaemonSet", "chancery-agent"));
    let ports = json!([{"name": "tls", "containerPort": 8443}, {"name": "metrics", "containerPort": 9464}]);
    assert_eq!(pod(find(&rendered, "StatefulSet", "chancery-ca"))["containers"][0]["ports"], ports);
    let config = find(&rendered, "ConfigMap", "chancery-ca")["data"]["ca.toml"].as_str().unwrap();
    assert!(config.contains("\nlisten = \"0.0.0.0:8443\"\nhttp_listen = \"0.0.0.0:9464\"\n"), "{config}");
    for (name, port, target) in [("chancery-ca", 8443, "tls"), ("chancery-ca-metrics", 9464, "metrics")] {
        let service = &find(&rendered, "Service", name)["spec"];
        assert!(selects(&service["selector"], ca) && !selects(&service["selector"], agent), "{name}");
        assert_eq!((&service["ports"][0]["port"], &service["ports"][0]["targetPort"]), (&json!(port), &json!(target)), "{name}");
    }
    for (name, own, other) in [("chancery-ca", ca, agent), ("chancery-agent", agent, ca)] {
        let policy = &find(&rendered, "NetworkPolicy", name)["spec"];
        let selected = &policy["podSelector"]["matchLabels"];
        assert!(selects(selected, own) && !selects(selected, other), "{name}");
        // What is not listed is forbidden.
        assert_eq!(policy["policyTypes"], json!(["Ingress", "Egress"]), "{name}");
    }
    let policy = &find(&rendered, "NetworkPolicy", "chancery-ca")["spec"];
    let [tls, metrics] = &policy["ingress"].as_array().unwrap()[..] else { panic!("{policy}") };
    assert_eq!((&tls["ports"], &metrics["ports"]), (&json!([{"port": "tls"}]), &json!([{"port": "metrics"}])));
    assert!(tls["from"].as_array().unwrap().len() == 1 && selects(&tls["from"][0]["podSelector"]["matchLabels"], agent), "{tls}");

    let policy = &find(&rendered, "NetworkPolicy", "chancery-agent")["spec"];
    assert_eq!(
        policy["ingress"].as_array().unwrap().iter().map(|rule| &rule["ports"]).collect::<Vec<_>>(),
        [&json!([{"port": "metrics"}])]
    );
    let [_dns, to_ca] = &policy["egress"].as_array().unwrap()[..] else { panic!("{policy}") };
    assert!(selects(&to_ca["to"][0]["podSelector"]["matchLabels"], ca) && to_ca["ports"][0]["port"] == 8443, "{to_ca}");
}

#[test]
fn the_ledgers_volume_outlives_an_uninstall() {
    let lab = Lab::new().unwrap();
    let Some(chart) = Chart::new(&lab) else { return };
    let rendered = chart.render("");
    let spec = &find(&rendered, "StatefulSet", "chancery-ca")["spec"];
    assert_eq!(spec["persistentVolumeClaimRetentionPolicy"], json!({"whenDeleted": "Retain", "whenScaled": "Retain"}));
    let data = &spec["volumeClaimTemplates"][0]["metadata"]["name"];
    let mounts = pod(find(&rendered, "StatefulSet", "chancery-ca"))["containers"][0]["volumeMounts"].as_array().unwrap();
    assert!(mounts.iter().any(|mount| mount["name"] == *data && mount["mountPath"] == "/var/lib/chancery"));
}

#[test]
fn the_keys_are_sealed_with_a_secret_that_is_made_once() {
    let lab = Lab::new().unwrap();
    let Some(chart) = Chart::new(&lab) else { return };
    let passphrase = || {
        let rendered = chart.render("");
        let secret = find(&rendered, "Secret", "chancery-ca-seal");
        assert_eq!(secret["metadata"]["annotations"]["helm.sh/resource-policy"], "keep", "an uninstall would lose the CA's keys");
        assert_eq!(secret["immutable"], true, "another passphrase would lock the CA out");
        secret["data"]["passphrase"].as_str().unwrap().to_owned()
    };
    let (one, another) = (passphrase(), passphrase());
    // Base64 of 48 characters.
    assert!(one.len() == 64 && one != another, "{one} {another}");

    let rendered = chart.render("ca: {seal: {existingSecret: mine}}");
    assert!(!kinds(&rendered).contains(&"Secret"));
    let volumes = pod(find(&rendered, "StatefulSet", "chancery-ca"))["volumes"].as_array().unwrap();
    let seal = volumes.iter().find(|volume| volume["name"] == "seal").unwrap();
    assert_eq!(seal["secret"]["secretName"], "mine");
    // With the pod's group the kubelet makes 0440 of it, which is what the CA accepts of root.
    assert_eq!(seal["secret"]["defaultMode"], 0o400);
}

#[test]
fn nothing_is_granted_to_agents_and_only_the_ca_gets_a_token_for_the_api_server() {
    let lab = Lab::new().unwrap();
    let Some(chart) = Chart::new(&lab) else { return };
    for (name, values) in COMBINATIONS {
        let rendered = chart.render(values);
        for object in rendered.iter().filter(|object| object["kind"].as_str().unwrap().ends_with("Binding")) {
            assert_eq!(object["subjects"], json!([{"kind": "ServiceAccount", "name": "chancery-ca", "namespace": NAMESPACE}]), "{name}");
        }
        for object in rendered.iter().filter(|object| object["kind"] == "ServiceAccount") {
            assert_eq!(object["automountServiceAccountToken"], false, "{name}");
        }
        let agent = pod(find(&rendered, "DaemonSet", "chancery-agent"));
        assert_eq!(agent["automountServiceAccountToken"], false);
        let volumes = agent["volumes"].as_array().unwrap();
        let tokens: Vec<&Value> = volumes.iter().filter_map(|volume| volume["projected"]["sources"].as_array()).flatten().collect();
        assert_eq!(tokens.len(), 1, "{name}");
        assert_eq!(tokens[0]["serviceAccountToken"]["audience"], "chancery-agent", "{name}");
    }
}

#[test]
fn an_older_cluster_is_not_asked_for_what_it_does_not_know() {
    let lab = Lab::new().unwrap();
    let Some(chart) = Chart::new(&lab) else { return };
    for (version, in_secrets) in [("1.34.9", Value::Null), ("1.35.0", json!(true)), ("1.37.1-gke.100", json!(true))] {
        let rendered = chart::parse(&chart.helm(&["template", "--kube-version", version], ""));
        assert_eq!(find(&rendered, "CSIDriver", "csi.chancery.dev")["spec"]["serviceAccountTokenInSecrets"], in_secrets, "{version}");
    }
    // Without the API, a CA that tried to publish there would report that for ever.
    for (version, values, published) in [("1.36.2", "", false), ("1.37.0", "", true), ("1.37.0", "trustBundle: {signerName: \"\"}", false)]
    {
        let rendered = chart::parse(&chart.helm(&["template", "--kube-version", version], values));
        let config = find(&rendered, "ConfigMap", "chancery-ca")["data"]["ca.toml"].as_str().unwrap();
        assert_eq!(config.contains("signer_name = \"chancery.dev/mesh\""), published, "{version}");
        let rules = find(&rendered, "ClusterRole", "chancery-ca")["rules"].to_string();
        assert_eq!(rules.contains("clustertrustbundles"), published, "{version}");
    }
    let output = chart.helm(&["template", "--kube-version", "1.31.9"], "");
    assert!(!output.status.success() && said(&output).contains("1.32"), "{}", said(&output));
}

#[test]
fn a_change_that_a_running_ca_takes_over_does_not_restart_it() {
    let lab = Lab::new().unwrap();
    let Some(chart) = Chart::new(&lab) else { return };
    let template = |kind: &str, name: &str, values: &str| {
        let rendered = chart.render(values);
        find(&rendered, kind, name)["spec"]["template"].clone()
    };
    let ca = |values: &str| template("StatefulSet", "chancery-ca", values);
    let before = ca("");
    for taken_over in
        ["policy: {lifetimes: {default: 2h}}", "log: {level: debug}", "roles: {auditor: [\"spiffe://cluster.local/ns/a/sa/b\"]}"]
    {
        assert_eq!(ca(&format!("ca: {{config: {{{taken_over}}}}}")), before, "{taken_over}");
    }
    for needs_restart in ["limits: {joins_per_second: 5}", "log: {format: text}"] {
        assert_ne!(ca(&format!("ca: {{config: {{{needs_restart}}}}}")), before, "{needs_restart}");
    }
    let agent = |values: &str| template("DaemonSet", "chancery-agent", values);
    assert_ne!(agent("agent: {config: {renewal: {from: 0.6}}}"), agent(""));
}
