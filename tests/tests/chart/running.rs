//! What the chart installs, running: both programs with their rendered configurations, in a real API server's cluster, with the rights and tokens
//! of their own service accounts. Only the containers are missing, and so the paths and ports are this machine's.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use chancery_tests::lab::{Lab, free_address};
use chancery_tests::process::Process;
use chancery_tests::{http, kubernetes, secrets, tools, wait};

use crate::chart::{Chart, NAMESPACE};
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

#[tokio::test]
async fn what_is_installed_gives_a_pod_its_certificate_with_the_rights_of_the_chart() {
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

    cluster.admin.delete_pod(&agents_pod).await.unwrap();
    cluster.uninstall(&chart);
    // It cannot be made again by anybody but the CA.
    assert!(cluster.done(&get, None).contains("BEGIN CERTIFICATE"));
}
