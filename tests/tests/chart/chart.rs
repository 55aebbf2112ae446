//! Renders the chart with helm.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use chancery_tests::lab::Lab;
use chancery_tests::tools;
use serde::Deserialize;
use serde_json::Value;

pub(crate) const NAMESPACE: &str = "chancery-system";

/// What the chart is rendered with where everything it renders has to be right.
pub(crate) const COMBINATIONS: [(&str, &str); 4] = [
    ("defaults", ""),
    ("everything", include_str!("everything.yaml")),
    (
        "agents alone",
        "{ca: {enabled: false}, agent: {caAddress: \"ca.example:443\", rootFingerprint: \
         abababababababababababababababababababababababababababababababab}}",
    ),
    ("least", "{networkPolicy: {enabled: false}, roles: {create: false}, ca: {priorityClassName: \"\"}}"),
];

/// The examples that are whole workloads, each with what it is called.
pub(crate) const EXAMPLES: [(&str, &str); 2] = [("workload.yaml", "cart"), ("sidecar.yaml", "till")];

/// What is in an example.
pub(crate) fn example(name: &str) -> Vec<Value> {
    objects(&std::fs::read_to_string(tools::source().join("deploy/examples").join(name)).unwrap())
}

/// The chart, and the helm that renders it.
pub(crate) struct Chart<'a> {
    helm: PathBuf,
    lab: &'a Lab,
}

impl<'a> Chart<'a> {
    /// Nothing where there is no helm: then the test is counted as skipped.
    pub(crate) fn new(lab: &'a Lab) -> Option<Self> {
        Some(Self { helm: tools::chart("helm")?, lab })
    }

    /// Where it lies.
    pub(crate) fn directory() -> PathBuf {
        tools::source().join("deploy/helm/chancery")
    }

    /// Runs helm on the chart with these values (YAML).
    pub(crate) fn helm(&self, arguments: &[&str], values: &str) -> Output {
        // Never the cluster that the person who runs the tests is connected to.
        self.helm_in(Path::new("/dev/null"), arguments, values)
    }

    /// The same in the cluster of this kubeconfig. Arguments that need no chart get none.
    pub(crate) fn helm_in(&self, kubeconfig: &Path, arguments: &[&str], values: &str) -> Output {
        let mut command = self.command(kubeconfig);
        command.args(arguments).args(["--namespace", NAMESPACE]);
        if arguments[0] == "template" {
            command.arg("chancery");
        }
        if arguments[0] != "uninstall" {
            command.arg(Self::directory()).arg("--values").arg(self.values(values));
        }
        command.output().unwrap()
    }

    /// Everything that is rendered with these values.
    pub(crate) fn render(&self, values: &str) -> Vec<Value> {
        parse(&self.helm(&["template", "--kube-version", "1.37.0"], values))
    }

    /// The same under this release name, in this namespace.
    pub(crate) fn render_as(&self, release: &str, namespace: &str, values: &str) -> Vec<Value> {
        let mut command = self.command(Path::new("/dev/null"));
        command.args(["template", "--kube-version", "1.37.0", "--namespace", namespace, release]);
        parse(&command.arg(Self::directory()).arg("--values").arg(self.values(values)).output().unwrap())
    }

    fn command(&self, kubeconfig: &Path) -> Command {
        let mut command = Command::new(&self.helm);
        command.env("KUBECONFIG", kubeconfig).env("HELM_CACHE_HOME", self.lab.at("helm"));
        command
    }

    /// As a file.
    fn values(&self, text: &str) -> PathBuf {
        let path = self.lab.at("values.yaml");
        std::fs::write(&path, text).unwrap();
        path
    }
}

/// The objects that helm has printed.
pub(crate) fn parse(output: &Output) -> Vec<Value> {
    assert!(output.status.success(), "{}", said(output));
    objects(&String::from_utf8(output.stdout.clone()).unwrap())
}

/// The objects in a file.
pub(crate) fn objects(text: &str) -> Vec<Value> {
    let documents = serde_yaml_ng::Deserializer::from_str(text).map(|document| Value::deserialize(document).unwrap());
    documents.filter(|object| !object.is_null()).collect()
}

/// These objects as one file.
pub(crate) fn documents<'a>(objects: impl IntoIterator<Item = &'a Value>) -> String {
    objects.into_iter().map(Value::to_string).collect::<Vec<_>>().join("\n---\n")
}

/// What a program has said.
pub(crate) fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// The object of this kind and name.
pub(crate) fn find<'a>(rendered: &'a [Value], kind: &str, name: &str) -> &'a Value {
    let found = rendered.iter().find(|object| object["kind"] == kind && object["metadata"]["name"] == name);
    found.unwrap_or_else(|| panic!("no {kind} {name} is rendered"))
}

/// Every kind that occurs.
pub(crate) fn kinds(rendered: &[Value]) -> Vec<&str> {
    rendered.iter().map(|object| object["kind"].as_str().unwrap()).collect()
}

/// The spec of a workload's pods.
pub(crate) fn pod(workload: &Value) -> &Value {
    &workload["spec"]["template"]["spec"]
}
