//! What the chart installs, running: both programs with their rendered configurations, in a real API server's cluster, with the rights and tokens
//! of their own service accounts. Only the containers are missing, and so the paths and ports are this machine's.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use chancery_tests::lab::{Lab, free_address};
use chancery_tests::process::Process;
use chancery_tests::{http, kubernetes, secrets, tools, wait};

use crate::chart::{Chart, NAMESPACE, said};
use crate::cluster::Cluster;

const HOUR: Duration = Duration::from_secs(3600);
const SOON: Duration = Duration::from_secs(30);

/// Starts a program with the file of this `ConfigMap` in the cluster, with whatever belongs to a container replaced.
fn start(lab: &Lab, cluster: &Cluster, program: &str, verb: &str, replaced: &[(&str, String)]) -> Process {
    let file = format!("{}.toml", program.trim_start_matches("chancery-"));
    let path = format!("jsonpath={{.data.{}}}", file.replace('.', "\\."));
    let text = cluster.done(&["--namespace", NAMESPACE, "get", "configmap", program, "--output", &path], None);
    let text = replaced.iter().fold(text, |text, (from, to)| {
        assert!(text.contains(from), "{file} does not name {from}:\n{text}");
        text.replace(from, to)
    });
    std::fs::write(lab.at(&file), text).unwrap();
    let mut command = lab.command(&tools::chancery(program).unwrap());
    command.args([verb, "--config"]).arg(lab.at(&file));
    Process::start(program, &mut command, &lab.log(program)).unwrap()
}

async fn ready(program: &mut Process, address: SocketAddr) {
    let answers = async || {
        program.check().map_err(|error| error.to_string())?;
        match http::get(address, "/readyz").await {
            Ok((200, _)) => Ok(()),
            Ok((_, reasons)) => Err(reasons),
            Err(error) => Err(error.to_string()),
        }
    };
    wait::until("it is ready", SOON, answers).await.unwrap();
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

fn write(path: &Path, content: &str) -> String {
    std::fs::write(path, content).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
    text(path)
}

/// The commands of the guide's chapter on auditors, as words; those that make one, and the one that this one runs.
fn commands_for_auditors() -> (Vec<Vec<String>>, Vec<String>) {
    let guide = std::fs::read_to_string(tools::source().join("docs/kubernetes.md")).unwrap();
    let (_, chapter) = guide.split_once("## Auditors and admins").unwrap();
    let blocks: Vec<&str> = chapter.split("```sh\n").skip(1).map(|block| block.split("```").next().unwrap()).collect();
    let words = |line: &str| line.split_whitespace().map(|word| word.replace("ALICE", "alice")).collect::<Vec<_>>();
    let own = blocks[1].lines().find(|line| line.starts_with("chancery ")).unwrap();
    (blocks[0].lines().map(words).collect(), words(own))
}

/// Does what the guide says to have an auditor, and is that auditor.
async fn be_an_auditor(lab: &Lab, cluster: &Cluster, ca: SocketAddr, bundle: &str) {
    let (makes, own) = commands_for_auditors();
    assert_eq!(makes.len(), 4, "{makes:?}");
    for command in makes {
        let (program, arguments) = command.split_first().unwrap();
        assert_eq!(program, "kubectl");
        cluster.done(&arguments.iter().map(String::as_str).collect::<Vec<_>>(), None);
    }
    let replaced = [
        ("localhost:8443", ca.to_string()),
        ("bundle.pem", write(&lab.at("auditors-bundle.pem"), bundle)),
        ("mesh.example", "mesh.test".into()),
    ];
    let asks = |instead: &[&str]| {
        let words = own[1..].iter().map(|word| replaced.iter().find(|(from, _)| from == word).map_or(word, |(_, to)| to).as_str());
        let way: Vec<&str> = words.take_while(|word| *word != "identity").collect();
        let mut command = Command::new(tools::chancery("chancery").unwrap());
        let output = command.env("KUBECONFIG", cluster.person("alice")).args(way).args(instead).output().unwrap();
        if output.status.success() { Ok(said(&output)) } else { Err(said(&output)) }
    };
    let listed = wait::until("the binding counts", SOON, async || asks(&["identity", "list"])).await.unwrap();
    assert!(listed.contains("spiffe://mesh.test/chancery/agent/"), "{listed}");
    let refused = asks(&["log", "rotate-key", "--reason", "I like to"]).unwrap_err();
    assert!(refused.contains("is an auditor"), "{refused}");
    cluster.done(&["delete", "clusterrolebinding", "chancery-audit"], None);
}

#[tokio::test]
async fn what_is_installed_gives_a_pod_its_certificate_and_a_person_a_look_with_the_rights_of_the_chart() {
    let lab = Lab::new().unwrap();
    let Some(chart) = Chart::new(&lab) else { return };
    let Some(cluster) = Cluster::start().await else { return };
    let values = format!("{{trustDomain: mesh.test, cluster: {{issuer: \"{}\"}}}}", kubernetes::ISSUER);
    cluster.helm(&chart, &["install", "chancery"], &values);
    let (tls, ca_http, agent_http) = (free_address().unwrap(), free_address().unwrap(), free_address().unwrap());

    let kubeconfig = cluster.account("chancery-ca").await;
    let template = "go-template={{.data.passphrase | base64decode}}";
    let passphrase = cluster.done(&["--namespace", NAMESPACE, "get", "secret", "chancery-ca-seal", "--output", template], None);
    let replaced = [
        ("/var/lib/chancery/data", text(&lab.at("data"))),
        ("0.0.0.0:8443", tls.to_string()),
        ("0.0.0.0:9464", ca_http.to_string()),
        ("/run/chancery/ca-admin.sock", text(&lab.at("ca-admin.sock"))),
        ("/etc/chancery/seal/passphrase", write(&lab.at("passphrase"), &passphrase)),
        ("in_cluster = true", format!("kubeconfig = \"{}\"", kubeconfig.display())),
    ];
    let mut ca = start(&lab, &cluster, "chancery-ca", "serve", &replaced);
    ready(&mut ca, ca_http).await;

    // As the kubelet brings it to the agents.
    let get = ["--namespace", NAMESPACE, "get", "configmap", "chancery-trust-bundle", "--output", "jsonpath={.data.trust-bundle\\.pem}"];
    let published = async || {
        let text = cluster.done(&[&get[..], &["--ignore-not-found"]].concat(), None);
        if text.contains("BEGIN CERTIFICATE") { Ok(text) } else { Err("not yet") }
    };
    let bundle = wait::until("the bundle is published", SOON, published).await.unwrap();

    let node = cluster.admin.node("node").await.unwrap();
    let agents_pod = cluster.admin.pod(NAMESPACE, "chancery-agent-0", "chancery-agent", &node.name).await.unwrap();
    let join = cluster.admin.token(&agents_pod, "chancery-agent", HOUR).await.unwrap();
    for directory in ["plugins", "plugins_registry", "pods"] {
        std::fs::create_dir_all(lab.at("kubelet").join(directory)).unwrap();
    }
    let replaced = [
        ("chancery-ca.chancery-system.svc:8443", tls.to_string()),
        ("/var/run/secrets/chancery/token", write(&lab.at("join-token"), &join)),
        ("/etc/chancery/trust/trust-bundle.pem", write(&lab.at("bundle.pem"), &bundle)),
        ("0.0.0.0:9465", agent_http.to_string()),
        ("/run/chancery", text(&lab.at("run"))),
        ("/var/lib/kubelet", text(&lab.at("kubelet"))),
    ];
    let mut agent = start(&lab, &cluster, "chancery-agent", "run", &replaced);
    ready(&mut agent, agent_http).await;

    // It made the directory, where proxies must be able to enter.
    assert_eq!(lab.at("run").metadata().unwrap().permissions().mode() & 0o777, 0o755);

    let shop = cluster.admin.namespace("shop").await.unwrap();
    cluster.admin.account(&shop, "cart").await.unwrap();
    let pod = cluster.admin.pod(&shop, "cart-0", "cart", &node.name).await.unwrap();
    let token = cluster.admin.token(&pod, "chancery", HOUR).await.unwrap();
    let secrets = secrets::fetch(&lab.at("run/sds.sock"), Some(&token), SOON).await.unwrap();
    assert_eq!(secrets.svid.id().to_string(), format!("spiffe://mesh.test/ns/{shop}/sa/cart"));

    be_an_auditor(&lab, &cluster, tls, &bundle).await;

    cluster.admin.delete_pod(&agents_pod).await.unwrap();
    cluster.uninstall(&chart);
    // It cannot be made again by anybody but the CA.
    assert!(cluster.done(&get, None).contains("BEGIN CERTIFICATE"));
}
