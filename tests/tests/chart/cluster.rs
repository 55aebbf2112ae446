//! The chart on a real API server: accepted, installed, upgraded and removed by helm; and what its service accounts may do there.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use chancery_tests::kubernetes::{Admin, ISSUER, SharedApiServer, shared};
use chancery_tests::lab::Lab;
use chancery_tests::{tools, wait};
use serde_json::{Value, json};
use tokio::sync::{Mutex, MutexGuard};

use crate::chart::{COMBINATIONS, Chart, EXAMPLES, NAMESPACE, documents, example, find, pod, said};

/// A cluster has room for one installation: it has objects that lie in no namespace.
static INSTALLATION: Mutex<()> = Mutex::const_new(());
const HOUR: Duration = Duration::from_secs(3600);
const SOON: Duration = Duration::from_secs(10);

/// An API server with the chart's namespace, for one test at a time.
pub(crate) struct Cluster {
    server: Arc<SharedApiServer>,
    pub(crate) admin: Admin,
    kubectl: PathBuf,
    kubeconfig: PathBuf,
    _alone: MutexGuard<'static, ()>,
}

impl Cluster {
    /// Nothing where there are no tools: then the test is counted as skipped.
    pub(crate) async fn start() -> Option<Self> {
        let kubectl = tools::chart("kubectl")?;
        let server = shared().await.unwrap()?;
        let alone = INSTALLATION.lock().await;
        let (admin, kubeconfig) = (server.admin().await.unwrap(), server.kubeconfig().unwrap());
        let cluster = Self { server, admin, kubectl, kubeconfig, _alone: alone };
        if !cluster.kubectl(&["get", "namespace", NAMESPACE], None).status.success() {
            cluster.done(&["create", "namespace", NAMESPACE], None);
        }
        // An uninstall leaves it, and another test's is none of this one's.
        cluster.done(&["--namespace", NAMESPACE, "delete", "secret", "chancery-ca-seal", "--ignore-not-found"], None);
        Some(cluster)
    }

    /// Runs kubectl as an administrator.
    fn kubectl(&self, arguments: &[&str], input: Option<&str>) -> Output {
        self.kubectl_as(&self.kubeconfig, arguments, input)
    }

    /// The same, which has to succeed; returns what it printed.
    pub(crate) fn done(&self, arguments: &[&str], input: Option<&str>) -> String {
        let output = self.kubectl(arguments, input);
        assert!(output.status.success(), "kubectl {arguments:?}: {}", said(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    fn kubectl_as(&self, kubeconfig: &Path, arguments: &[&str], input: Option<&str>) -> Output {
        let mut command = Command::new(&self.kubectl);
        command.env("KUBECONFIG", kubeconfig).env("KUBECACHEDIR", kubeconfig.with_extension("cache")).args(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        std::io::Write::write_all(&mut stdin, input.unwrap_or_default().as_bytes()).unwrap();
        drop(stdin);
        child.wait_with_output().unwrap()
    }

    /// Runs helm against this cluster, which has to succeed.
    pub(crate) fn helm(&self, chart: &Chart<'_>, arguments: &[&str], values: &str) {
        let output = chart.helm_in(&self.kubeconfig, arguments, values);
        assert!(output.status.success(), "helm {arguments:?}: {}", said(&output));
    }

    pub(crate) fn uninstall(&self, chart: &Chart<'_>) {
        self.helm(chart, &["uninstall", "chancery"], "");
    }

    /// The kubeconfig of one of the chart's service accounts.
    pub(crate) async fn account(&self, name: &str) -> PathBuf {
        let token = self.admin.unbound_token(NAMESPACE, name, ISSUER, HOUR).await.unwrap();
        self.server.kubeconfig_for_token(&token).unwrap()
    }

    /// The kubeconfig of somebody who may do what bindings of this name say.
    pub(crate) fn person(&self, name: &str) -> PathBuf {
        self.server.kubeconfig_for(name, None).unwrap()
    }

    pub(crate) fn passphrase(&self) -> String {
        self.done(&["--namespace", NAMESPACE, "get", "secret", "chancery-ca-seal", "--output", "jsonpath={.data.passphrase}"], None)
    }

    fn exists(&self, kind: &str, name: &str) -> bool {
        let output = self.kubectl(&["--namespace", NAMESPACE, "get", kind, name], None);
        assert!(output.status.success() || said(&output).contains("NotFound"), "{}", said(&output));
        output.status.success()
    }
}

#[tokio::test]
async fn the_api_server_accepts_what_is_rendered_with_every_combination_of_values() {
    let lab = Lab::new().unwrap();
    let Some(chart) = Chart::new(&lab) else { return };
    let Some(cluster) = Cluster::start().await else { return };
    for namespace in ["shop", "bank"] {
        // For the roles in them: a dry run makes none.
        cluster.kubectl(&["create", "namespace", namespace], None);
    }
    let dry_run = ["apply", "--server-side", "--dry-run=server", "--validate=strict", "--filename", "-"];
    for (name, values) in COMBINATIONS {
        let rendered = chart.render(values);
        let known = rendered.iter().filter(|object| object["apiVersion"] != "monitoring.coreos.com/v1");
        let printed = cluster.done(&dry_run, Some(&documents(known)));
        assert!(printed.contains("daemonset.apps/chancery-agent serverside-applied"), "{name}: {printed}");
    }
    for (name, _) in EXAMPLES {
        cluster.done(&dry_run, Some(&documents(&example(name))));
    }
}

#[tokio::test]
async fn an_upgrade_keeps_the_passphrase_and_so_does_an_uninstall() {
    let lab = Lab::new().unwrap();
    let Some(chart) = Chart::new(&lab) else { return };
    let Some(cluster) = Cluster::start().await else { return };
    cluster.helm(&chart, &["install", "chancery"], "");
    let passphrase = cluster.passphrase();
    cluster.helm(&chart, &["upgrade", "chancery"], "ca: {config: {log: {level: debug}}}");
    assert_eq!(cluster.passphrase(), passphrase);
    assert!(cluster.done(&["--namespace", NAMESPACE, "get", "configmap", "chancery-ca", "--output", "yaml"], None).contains("debug"));
    // Nobody changes it by mistake, either.
    let patch = ["--namespace", NAMESPACE, "patch", "secret", "chancery-ca-seal", "--patch", "{\"data\": {\"passphrase\": \"bmV3\"}}"];
    assert!(said(&cluster.kubectl(&patch, None)).contains("immutable"));

    cluster.uninstall(&chart);
    assert!(!cluster.exists("daemonset", "chancery-agent") && !cluster.exists("statefulset", "chancery-ca"));
    assert_eq!(cluster.passphrase(), passphrase);
    cluster.helm(&chart, &["install", "chancery"], "");
    assert_eq!(cluster.passphrase(), passphrase, "the CA's volume is still there");
    cluster.uninstall(&chart);
}

/// A call, and what is sent with it.
type Call = (&'static [&'static str], Option<Value>);

/// What the CA does in a cluster.
fn work_of_the_ca() -> Vec<Call> {
    let apply: &[&str] = &["apply", "--server-side", "--field-manager=chancery-ca", "--force-conflicts", "--filename", "-"];
    vec![
        (&["get", "pods", "--all-namespaces"], None),
        (&["get", "serviceaccounts", "--all-namespaces"], None),
        (&["get", "--raw", "/api/v1/pods?watch=true&timeoutSeconds=1"], None),
        (&["get", "--raw", "/api/v1/serviceaccounts?watch=true&timeoutSeconds=1"], None),
        (&["get", "--raw", "/openid/v1/jwks"], None),
        (
            &["create", "--validate=ignore", "--filename", "-"],
            Some(json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": "a"}})),
        ),
        (&["create", "--validate=ignore", "--filename", "-"], Some(access_review("somebody", "list", "identities"))),
        // Once to make it, once to change it.
        (apply, Some(config_map(NAMESPACE, "chancery-trust-bundle", "one"))),
        (apply, Some(config_map(NAMESPACE, "chancery-trust-bundle", "another"))),
        (apply, Some(trust_bundle("chancery.dev:mesh:trust-bundle", "chancery.dev/mesh"))),
        (apply, Some(trust_bundle("chancery.dev:mesh:trust-bundle", "chancery.dev/mesh"))),
    ]
}

/// What nobody here has any business with.
fn work_of_nobody() -> Vec<Call> {
    let apply: &[&str] = &["apply", "--server-side", "--field-manager=chancery-ca", "--force-conflicts", "--filename", "-"];
    vec![
        (&["get", "secrets", "--all-namespaces"], None),
        (&["--namespace", NAMESPACE, "get", "secret", "chancery-ca-seal"], None),
        (&["get", "configmaps", "--all-namespaces"], None),
        (&["get", "nodes"], None),
        (&["get", "namespaces"], None),
        (&["get", "clusterroles"], None),
        (&["--namespace", NAMESPACE, "delete", "pod", "somebody"], None),
        (&["--namespace", NAMESPACE, "create", "token", "default"], None),
        (&["--namespace", NAMESPACE, "create", "serviceaccount", "another"], None),
        (&["create", "clusterrolebinding", "mine", "--clusterrole=cluster-admin", "--user=me"], None),
        (&["--namespace", NAMESPACE, "delete", "configmap", "chancery-trust-bundle"], None),
        (apply, Some(config_map(NAMESPACE, "chancery-ca", "mine"))),
        (apply, Some(config_map("default", "chancery-trust-bundle", "mine"))),
        (apply, Some(trust_bundle("chancery.dev:mesh:another", "chancery.dev/mesh"))),
        (apply, Some(trust_bundle("example.com:mesh:trust-bundle", "example.com/mesh"))),
    ]
}

/// What the CA asks about somebody who wants to do this.
fn access_review(user: &str, verb: &str, resource: &str) -> Value {
    let attributes = json!({"group": "chancery.dev", "resource": resource, "verb": verb});
    let spec = json!({"user": user, "resourceAttributes": attributes});
    json!({"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec})
}

fn config_map(namespace: &str, name: &str, text: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"namespace": namespace, "name": name}, "data": {"trust-bundle.pem": text}})
}

fn trust_bundle(name: &str, signer: &str) -> Value {
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let root = params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().pem();
    let spec = json!({"signerName": signer, "trustBundle": root});
    json!({"apiVersion": "certificates.k8s.io/v1", "kind": "ClusterTrustBundle", "metadata": {"name": name}, "spec": spec})
}

#[tokio::test]
async fn each_service_account_can_do_its_work_and_is_refused_everything_else() {
    let lab = Lab::new().unwrap();
    let Some(chart) = Chart::new(&lab) else { return };
    let Some(cluster) = Cluster::start().await else { return };
    cluster.helm(&chart, &["install", "chancery"], "");
    let (ca, agent) = (cluster.account("chancery-ca").await, cluster.account("chancery-agent").await);
    let asked = |kubeconfig: &Path, (arguments, input): &Call| {
        let input = input.as_ref().map(Value::to_string);
        let output = cluster.kubectl_as(kubeconfig, arguments, input.as_deref());
        let said = said(&output);
        assert!(output.status.success() || said.contains("forbidden"), "kubectl {arguments:?}: {said}");
        (output.status.success(), said)
    };
    for call in work_of_the_ca() {
        // The API server learns of new roles a moment after it has stored them.
        let may = async || match asked(&ca, &call) {
            (true, _) => Ok(()),
            (false, said) => Err(said),
        };
        wait::until(&format!("the CA may {call:?}"), SOON, may).await.unwrap();
        // Every service account may read the public keys.
        let is_public = call.0.contains(&"/openid/v1/jwks");
        assert!(is_public || !asked(&agent, &call).0, "the agent may {call:?}");
    }
    for call in work_of_nobody() {
        for (who, kubeconfig) in [("the CA", &ca), ("the agent", &agent)] {
            assert!(!asked(kubeconfig, &call).0, "{who} may {call:?}");
        }
    }
    cluster.uninstall(&chart);
}

#[tokio::test]
async fn a_binding_makes_an_auditor_who_can_change_nothing() {
    let lab = Lab::new().unwrap();
    let Some(chart) = Chart::new(&lab) else { return };
    let Some(cluster) = Cluster::start().await else { return };
    cluster.helm(&chart, &["install", "chancery"], "");
    let allowed = |user: &str, verb: &str, resource: &str| {
        let review = access_review(user, verb, resource).to_string();
        cluster.done(&["create", "--filename", "-", "--output", "jsonpath={.status.allowed}"], Some(&review)) == "true"
    };
    for (role, may_act) in [("chancery-auditor", false), ("chancery-admin", true)] {
        assert!(!allowed(role, "list", "identities"));
        cluster.done(&["create", "clusterrolebinding", role, &format!("--clusterrole={role}"), &format!("--user={role}")], None);
        let counts = async || if allowed(role, "list", "identities") { Ok(()) } else { Err("not yet") };
        wait::until("the binding counts", SOON, counts).await.unwrap();
        for resource in ["trustroots", "identities", "agents", "log"] {
            let may = ["get", "list", "watch", "update", "delete"].map(|verb| allowed(role, verb, resource));
            assert_eq!(may, [true, true, true, may_act, false], "{role}: {resource}");
        }
        assert!(!allowed(role, "list", "secrets"));
        cluster.done(&["delete", "clusterrolebinding", role], None);
    }
    cluster.uninstall(&chart);
}

#[tokio::test]
async fn the_ca_and_the_examples_meet_the_strictest_pod_security() {
    let lab = Lab::new().unwrap();
    let Some(chart) = Chart::new(&lab) else { return };
    let Some(cluster) = Cluster::start().await else { return };
    let namespace = cluster.admin.namespace("restricted").await.unwrap();
    cluster.done(&["label", "namespace", &namespace, "pod-security.kubernetes.io/enforce=restricted"], None);
    let create = |workload: &Value| {
        let mut spec = pod(workload).clone();
        // As the controller would: the claim it has made, and an account that is there.
        spec["volumes"].as_array_mut().unwrap().push(json!({"name": "data", "persistentVolumeClaim": {"claimName": "data"}}));
        let account = spec["serviceAccountName"].as_str().unwrap();
        cluster.kubectl(&["--namespace", &namespace, "create", "serviceaccount", account], None);
        let object = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", "namespace": namespace}, "spec": spec});
        cluster.kubectl(&["create", "--dry-run=server", "--filename", "-"], Some(&object.to_string()))
    };
    for (name, values) in COMBINATIONS {
        let rendered = chart.render(values);
        let Some(ca) = rendered.iter().find(|object| object["kind"] == "StatefulSet") else { continue };
        let mut ca = ca.clone();
        // A class of the user's own is not there.
        ca["spec"]["template"]["spec"]["priorityClassName"] = "system-cluster-critical".into();
        let output = create(&ca);
        assert!(output.status.success(), "{name}: {}", said(&output));
    }
    for (name, workload) in EXAMPLES {
        let output = create(find(&example(name), "Deployment", workload));
        assert!(output.status.success(), "{name}: {}", said(&output));
    }
    // The rule is enforced: the agent, which mounts into pods, would not be let in.
    let output = create(find(&chart.render(""), "DaemonSet", "chancery-agent"));
    assert!(said(&output).contains("violates PodSecurity"), "{}", said(&output));
}
