//! The CSI plugin on a node of its own, with a kubelet that is played: real registration, real calls, real bind mounts, a real Envoy.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use chancery_tests::agent::Agent;
use chancery_tests::ca::{Ca, TRUST_DOMAIN};
use chancery_tests::envoy::{Envoy, Plan, Protocol};
use chancery_tests::kubelet::{DRIVER, Handing, Kubelet, Pod, Started};
use chancery_tests::lab::Lab;
use chancery_tests::mesh::NODE;
use chancery_tests::node::{Container, Node};
use chancery_tests::{http, secrets, soak, tools, wait};
use rustix::fs::XattrFlags;
use serde_json::Value;
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;
use tonic::Code;

const HOUR: Duration = Duration::from_secs(3600);
const SOON: Duration = Duration::from_secs(10);
const CART: &str = "spiffe://mesh.test/ns/shop/sa/cart";
const PODS: usize = 250;
const SELINUX: &str = "security.selinux";

/// A CA, a node with an agent that is a registered plugin, and its kubelet.
struct Cluster {
    node: Option<Node>,
    agent: Agent,
    kubelet: Arc<Kubelet>,
    ca: Ca,
    lab: Lab,
}

impl Cluster {
    async fn start(lifetime: Duration) -> Option<Self> {
        Self::start_with(lifetime, "").await
    }

    /// With more sections in the agent's configuration.
    async fn start_with(lifetime: Duration, more: &str) -> Option<Self> {
        let cluster = Self::unregistered(lifetime, more).await?;
        cluster.kubelet.register().await.unwrap();
        Some(cluster)
    }

    async fn unregistered(lifetime: Duration, more: &str) -> Option<Self> {
        let lab = Lab::new().unwrap();
        let ca = Ca::start(&lab, lifetime).await.unwrap();
        let node = Node::boot(&lab).await.unwrap()?;
        let kubelet = Kubelet::new(&lab, ca.issuer().unwrap()).unwrap();
        let mut agent = Agent::configure(&lab, &ca, NODE).unwrap();
        agent.append(&(kubelet.section(&lab) + more)).unwrap();
        agent.run(&lab).await.unwrap();
        Some(Self { node: Some(node), agent, kubelet: Arc::new(kubelet), ca, lab })
    }

    fn node(&self) -> &Node {
        self.node.as_ref().unwrap()
    }

    /// What a container of the pod sees.
    fn container(&self, pod: &Pod) -> Container {
        self.node().container(&self.kubelet.target(pod)).unwrap()
    }

    fn mounts(&self, pod: &Pod) -> usize {
        self.node().mounts(&self.kubelet.target(pod)).unwrap()
    }

    fn status(&self) -> Value {
        self.agent.ask(&["status"]).unwrap()
    }

    /// The plugin ends without a word, and comes back.
    async fn restart_plugin(&mut self) {
        self.agent.kill().unwrap();
        self.agent.run(&self.lab).await.unwrap();
    }

    /// The pods' directories as the node's own file system has them.
    fn directories(&self) -> usize {
        std::fs::read_dir(self.kubelet.socket_root(&self.lab)).map_or(0, Iterator::count)
    }
}

/// With a token that lives for this long.
async fn publish(kubelet: &Kubelet, pod: &Pod, lifetime: Duration) {
    let token = kubelet.token(pod, lifetime).unwrap();
    kubelet.publish_with(pod, &Handing::InSecrets(token)).await.unwrap();
}

async fn fetch(container: &Container, socket: &str) -> chancery_tests::Result<String> {
    let secrets = secrets::fetch(&container.at(socket), None, SOON).await?;
    Ok(secrets.svid.id().to_string())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_envoy_on_its_pods_socket_renews_with_the_kubelets_tokens_through_a_restart_of_the_plugin() {
    let Some(binary) = tools::envoy() else { return };
    let (lifetime, token_lifetime) = (Duration::from_secs(10), Duration::from_secs(6));
    let Some(mut cluster) = Cluster::start(lifetime).await else { return };
    let pod = Pod::new("cart", 0);
    let kubelet = cluster.kubelet.clone();
    publish(&kubelet, &pod, token_lifetime).await;

    // As a container runtime does: the volume's directory is mounted where the pod asks for it.
    let volume = cluster.lab.at("cart");
    std::fs::create_dir(&volume).unwrap();
    cluster.node().run("mount", &["--rbind".as_ref(), &kubelet.target(&pod), &volume]).unwrap();
    let plan = Plan {
        name: "cart".into(),
        sds_socket: volume.join("sds.sock"),
        protocol: Protocol::Delta,
        token: None,
        peer_prefix: format!("spiffe://{TRUST_DOMAIN}/"),
        upstream: None,
    };
    let mut envoy = Envoy::start(&cluster.lab, &binary, &plan).unwrap();
    envoy.ready().await.unwrap();
    let first = envoy.certificate().await.unwrap();
    assert_eq!(first.spiffe_id, CART);
    let streams = || {
        let streams = cluster.agent.ask(&["streams"]).unwrap();
        streams.as_array().unwrap().iter().map(|stream| (stream["own_socket"].clone(), stream["stream"].clone())).collect::<Vec<_>>()
    };
    let opened = streams();
    assert!(opened.len() == 2 && opened.iter().all(|(own, _)| own == true), "{opened:?}");

    // The kubelet asks again and again, and refreshes its token at 80 % of that one's life.
    let republishing = {
        let (kubelet, pod) = (kubelet.clone(), pod.clone());
        AbortOnDropHandle::new(tokio::spawn(async move {
            loop {
                publish(&kubelet, &pod, token_lifetime).await;
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }))
    };
    let second = envoy.next_certificate(&first, lifetime).await.unwrap();
    let third = envoy.next_certificate(&second, lifetime).await.unwrap();
    assert_eq!(streams(), opened, "no stream was ended for a fresh token");
    republishing.abort();

    let (_, metrics) = http::get(cluster.agent.http, "/metrics").await.unwrap();
    assert!(metrics.contains("chancery_agent_csi_volumes 1\n"), "{metrics}");
    assert!(metrics.contains("chancery_agent_csi_publishes_total{outcome=\"published\"} 1\n"), "{metrics}");
    assert_eq!(cluster.mounts(&pod), 1);

    cluster.restart_plugin().await;
    wait::until("Envoy is back on the socket", SOON, async || {
        let count = cluster.agent.ask(&["streams"]).unwrap().as_array().unwrap().len();
        if count == 2 { Ok(()) } else { Err(count) }
    })
    .await
    .unwrap();
    assert_eq!(envoy.certificate().await.unwrap().spiffe_id, CART);
    cluster.kubelet.register().await.unwrap();
    publish(&cluster.kubelet, &pod, token_lifetime).await;
    envoy.next_certificate(&third, lifetime).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_of_250_pods_lives_through_storms_of_calls_a_killed_plugin_and_a_reboot() {
    let Some(mut cluster) = Cluster::start(HOUR).await else { return };
    let pods: Vec<_> = (0..PODS).map(|number| Pod::new("cart", number)).collect();
    let before = (cluster.node().all_mounts().unwrap(), cluster.agent.resident_kib().unwrap());

    let Started { since_called, since_published, streams } = cluster.kubelet.start_pods(cluster.node(), &pods).await.unwrap();
    // In a debug build, on a machine that does other things. `make bench` holds it to one second.
    assert!(since_published < 5 * Duration::from_secs(1), "{since_published:?}, {since_called:?} with the calls");
    let each = (cluster.agent.resident_kib().unwrap() - before.1) / PODS;
    assert!(each < 128, "{each} KiB");
    assert_eq!(cluster.node().all_mounts().unwrap(), before.0 + PODS);
    assert_eq!(cluster.status()["volumes"].as_array().unwrap().len(), PODS);

    // A storm: every volume at once, several times.
    for _ in 0..soak(3) {
        republish(&cluster, &pods).await;
    }
    assert_eq!(cluster.node().all_mounts().unwrap(), before.0 + PODS, "nothing is mounted twice");
    assert_eq!(cluster.status()["streams"], PODS, "and no stream is lost");
    drop(streams);

    // Killed, together with the CA: whoever was served before is served again, before the kubelet has said anything.
    let containers: Vec<_> = pods.iter().map(|pod| cluster.container(pod)).collect();
    cluster.ca.kill().unwrap();
    cluster.restart_plugin().await;
    let mut fetching = JoinSet::new();
    for container in containers {
        fetching.spawn(async move { fetch(&container, "sds.sock").await.unwrap() });
    }
    assert!(fetching.join_all().await.iter().all(|id| id == CART));
    cluster.ca.run(&cluster.lab).await.unwrap();
    cluster.kubelet.register().await.unwrap();
    republish(&cluster, &pods).await;
    assert_eq!(cluster.node().all_mounts().unwrap(), before.0 + PODS);

    // The node goes down: mounts, sockets and the agent's state are gone, the kubelet's directories are not.
    cluster.agent.kill().unwrap();
    cluster.node.take().unwrap().crash().unwrap();
    std::fs::remove_dir_all(cluster.kubelet.socket_root(&cluster.lab)).unwrap();
    std::fs::remove_dir_all(cluster.lab.at("agent-state")).unwrap();
    cluster.node = Node::boot(&cluster.lab).await.unwrap();
    cluster.agent.run(&cluster.lab).await.unwrap();
    cluster.kubelet.register().await.unwrap();
    cluster.kubelet.start_pods(cluster.node(), &pods).await.unwrap();
    assert_eq!(cluster.node().all_mounts().unwrap(), before.0 + PODS);

    let mut unpublishing = JoinSet::new();
    for pod in pods {
        let kubelet = cluster.kubelet.clone();
        unpublishing.spawn(async move { kubelet.unpublish(&pod).await.unwrap() });
    }
    unpublishing.join_all().await;
    assert_eq!((cluster.node().all_mounts().unwrap(), cluster.directories()), (before.0, 0));
    assert!(cluster.status()["volumes"].as_array().unwrap().is_empty());
}

async fn republish(cluster: &Cluster, pods: &[Pod]) {
    let mut calls = JoinSet::new();
    for pod in pods {
        let (kubelet, pod) = (cluster.kubelet.clone(), pod.clone());
        calls.spawn(async move { kubelet.publish(&pod).await.unwrap() });
    }
    calls.join_all().await;
}

/// Publishes as the kubelet does; what the plugin answers.
async fn code(kubelet: &Kubelet, pod: &Pod, handing: Handing) -> Result<(), Code> {
    kubelet.publish_with(pod, &handing).await.map_err(|status| status.code())
}

/// A good token of the pod's.
fn good(kubelet: &Kubelet, pod: &Pod) -> Handing {
    Handing::InSecrets(kubelet.token(pod, HOUR).unwrap())
}

/// What is no token of the pod's.
fn bad(kubelet: &Kubelet) -> [Handing; 3] {
    [Handing::None, Handing::InSecrets("no.token.at.all".into()), good(kubelet, &Pod::new("checkout", 0))]
}

/// With a volume that may be written to.
async fn code_of_writable(kubelet: &Kubelet, pod: &Pod) -> Code {
    let mut writable = kubelet.request(pod, &good(kubelet, pod));
    writable.readonly = false;
    kubelet.call_publish(writable).await.unwrap_err().code()
}

/// With a socket that is called as Istio's.
fn istio(number: usize) -> Pod {
    Pod { attributes: [("socketName".to_owned(), "socket".to_owned())].into(), ..Pod::new("cart", number) }
}

const TRACE: &str = "\n[log]\nlevel = \"trace\"\n";

/// The log holds everything, and no token.
fn no_token_is_logged(cluster: &Cluster) {
    let log = cluster.agent.log().unwrap();
    assert!(log.contains("a volume was published") && log.contains("TRACE") && !log.contains("eyJ"), "a token begins like this");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_that_cannot_be_is_refused_and_one_that_is_there_is_never_refused_for_good() {
    let Some(cluster) = Cluster::start_with(HOUR, &format!("\n[limits]\nworkloads = 2\n{TRACE}")).await else { return };
    let kubelet = &cluster.kubelet;
    let (cart, other) = (Pod::new("cart", 0), Pod::new("checkout", 0));

    // Before the first success: what only people can mend is said for good, what time mends is not.
    let refused = [Code::Unavailable, Code::Unauthenticated, Code::PermissionDenied];
    for (handing, refused) in bad(kubelet).into_iter().zip(refused) {
        assert_eq!(code(kubelet, &cart, handing).await, Err(refused));
    }
    assert_eq!(code_of_writable(kubelet, &cart).await, Code::InvalidArgument);
    assert_eq!((cluster.mounts(&cart), cluster.directories()), (0, 0), "nothing is left of what was refused");
    let (_, reasons) = http::get(cluster.agent.http, "/readyz").await.unwrap();
    assert!(!reasons.contains("registered"), "{reasons}");

    // As before Kubernetes 1.35.
    let in_context = Handing::InContext(kubelet.token(&cart, HOUR).unwrap());
    assert_eq!(code(kubelet, &cart, in_context).await, Ok(()));
    let in_cart = cluster.container(&cart);
    assert_eq!(fetch(&in_cart, "sds.sock").await.unwrap(), CART);
    let second = Pod::new("cart", 2);
    assert_eq!(code(kubelet, &second, good(kubelet, &second)).await, Ok(()));
    assert_eq!(code(kubelet, &other, good(kubelet, &other)).await, Err(Code::ResourceExhausted), "as many as it may have");
    kubelet.unpublish(&second).await.unwrap();

    assert_eq!(code_of_writable(kubelet, &cart).await, Code::Unavailable);
    for handing in bad(kubelet) {
        assert_eq!(code(kubelet, &cart, handing.clone()).await, Err(Code::Unavailable), "{handing:?}");
    }
    let problems = cluster.status()["problems"].to_string();
    assert!(problems.contains("shop/cart-0: its volume: the kubelet says"), "{problems}");
    assert_eq!(fetch(&in_cart, "sds.sock").await.unwrap(), CART);
    assert_eq!(code(kubelet, &cart, good(kubelet, &cart)).await, Ok(()));
    assert!(!cluster.status()["problems"].to_string().contains("its volume"));
    let mut at_once = JoinSet::new();
    for handing in (0..8).map(|_| good(kubelet, &cart)) {
        let (kubelet, cart) = (kubelet.clone(), cart.clone());
        at_once.spawn(async move { code(&kubelet, &cart, handing).await });
    }
    let at_once = at_once.join_all().await;
    assert!(at_once.iter().all(|code| matches!(code, Ok(()) | Err(Code::Aborted))) && at_once.contains(&Ok(())), "{at_once:?}");
    assert_eq!(cluster.mounts(&cart), 1);
    no_token_is_logged(&cluster);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pods_socket_is_for_that_pod_alone_which_can_write_nothing_and_take_nothing_from_another() {
    let Some(cluster) = Cluster::start(HOUR).await else { return };
    let kubelet = &cluster.kubelet;
    let (cart, istio) = (Pod::new("cart", 0), istio(1));
    for pod in [&cart, &istio] {
        assert_eq!(code(kubelet, pod, good(kubelet, pod)).await, Ok(()));
    }
    let (in_cart, in_istio) = (cluster.container(&cart), cluster.container(&istio));
    assert_eq!(fetch(&in_cart, "sds.sock").await.unwrap(), CART);
    assert_eq!(fetch(&in_istio, "socket").await.unwrap(), CART);
    assert!(std::fs::write(in_cart.at("file"), "").is_err());
    let flags = ["ro", "nosuid", "nodev", "noexec"];
    assert!(cluster.node().has_flags(&kubelet.target(&cart), &flags).unwrap(), "on the node, too, not in the agent's namespace alone");

    // On the node, nobody else reaches it.
    let socket = PathBuf::from(cluster.status()["volumes"][0]["socket"].as_str().unwrap());
    let modes = socket.ancestors().take(4).map(|path| path.metadata().unwrap().permissions().mode() & 0o777);
    assert_eq!(modes.collect::<Vec<_>>(), [0o666, 0o755, 0o700, 0o700], "{}", socket.display());

    // Each socket has a limit of its own.
    let mut held = Vec::new();
    let full = loop {
        match secrets::hold(&in_cart.at("sds.sock"), None, None, SOON).await {
            Ok(stream) => held.push(stream),
            Err(error) => break error.to_string(),
        }
    };
    assert!(held.len() == 16 && full.contains("16 connections"), "{} {full}", held.len());
    assert_eq!(fetch(&in_istio, "socket").await.unwrap(), CART);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_somebody_removed_is_made_again_and_what_is_taken_away_ends_for_its_pod_alone() {
    let Some(cluster) = Cluster::start_with(HOUR, TRACE).await else { return };
    let kubelet = &cluster.kubelet;
    let (cart, istio) = (Pod::new("cart", 0), istio(1));
    for pod in [&cart, &istio] {
        assert_eq!(code(kubelet, pod, good(kubelet, pod)).await, Ok(()));
    }
    let (in_cart, in_istio) = (cluster.container(&cart), cluster.container(&istio));
    // A kubelet that was restarted finds the plugin, too.
    kubelet.register().await.unwrap();

    // The containers that are there see it.
    let socket = PathBuf::from(cluster.status()["volumes"][0]["socket"].as_str().unwrap());
    std::fs::remove_file(&socket).unwrap();
    assert_eq!(code(kubelet, &cart, good(kubelet, &cart)).await, Ok(()));
    assert_eq!(fetch(&in_cart, "sds.sock").await.unwrap(), CART);
    cluster.node().run("umount", &["--lazy".as_ref(), &kubelet.target(&cart)]).unwrap();
    assert_eq!(code(kubelet, &cart, good(kubelet, &cart)).await, Ok(()));
    assert_eq!(cluster.mounts(&cart), 1);

    // Gone, and gone again. The other pod of the same service account is not concerned.
    let mut stream = secrets::hold(&in_cart.at("sds.sock"), None, None, SOON).await.unwrap();
    let channel = secrets::connect(&in_cart.at("sds.sock")).await.unwrap();
    secrets::fetch_over(channel.clone(), None, SOON).await.unwrap();
    kubelet.unpublish(&cart).await.unwrap();
    kubelet.unpublish(&cart).await.unwrap();
    assert!(stream.answer(None, SOON).await.is_err(), "the pod's streams end");
    assert!(fetch(&in_cart, "sds.sock").await.is_err());
    assert!(secrets::fetch_over(channel, None, SOON).await.is_err(), "nor does a connection that was open get any more");
    assert_eq!(fetch(&in_istio, "socket").await.unwrap(), CART);
    assert_eq!((cluster.mounts(&cart), cluster.mounts(&istio), cluster.directories()), (0, 1, 1));
    no_token_is_logged(&cluster);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plugin_that_was_away_goes_by_what_is_mounted_whatever_it_remembers() {
    let Some(mut cluster) = Cluster::start(HOUR).await else { return };
    let kubelet = &cluster.kubelet.clone();
    let istio = istio(1);
    assert_eq!(code(kubelet, &istio, good(kubelet, &istio)).await, Ok(()));

    // A volume whose mount went while the plugin was away is forgotten; the kubelet will ask for it if its pod is still there.
    cluster.agent.kill().unwrap();
    cluster.node().run("umount", &["--lazy".as_ref(), &kubelet.target(&istio)]).unwrap();
    cluster.agent.run(&cluster.lab).await.unwrap();
    assert_eq!((cluster.status()["volumes"].as_array().unwrap().len(), cluster.directories()), (0, 0));
    assert_eq!(code(kubelet, &istio, good(kubelet, &istio)).await, Ok(()));
    assert_eq!(fetch(&cluster.container(&istio), "socket").await.unwrap(), CART);

    // A plugin that has lost its memory goes by what is mounted: it refuses nobody there for good, and takes nothing away.
    cluster.agent.kill().unwrap();
    std::fs::remove_dir_all(cluster.lab.at("agent-state/volumes")).unwrap();
    cluster.agent.run(&cluster.lab).await.unwrap();
    assert!(cluster.status()["volumes"].as_array().unwrap().is_empty());
    for handing in bad(kubelet) {
        assert_eq!(code(kubelet, &istio, handing.clone()).await, Err(Code::Unavailable), "{handing:?}");
    }
    assert_eq!((cluster.mounts(&istio), cluster.directories()), (1, 1));
    assert_eq!(code(kubelet, &istio, good(kubelet, &istio)).await, Ok(()));
    assert_eq!(fetch(&cluster.container(&istio), "socket").await.unwrap(), CART);

    // It tolerates that all is gone, its own memory, too.
    cluster.agent.kill().unwrap();
    std::fs::remove_dir_all(cluster.lab.at("agent-state/volumes")).unwrap();
    cluster.node().run("umount", &["--lazy".as_ref(), &kubelet.target(&istio)]).unwrap();
    std::fs::remove_dir_all(kubelet.socket_root(&cluster.lab)).unwrap();
    cluster.agent.run(&cluster.lab).await.unwrap();
    kubelet.unpublish(&istio).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plugin_that_the_kubelet_refuses_ends_and_says_why() {
    let Some(mut cluster) = Cluster::unregistered(HOUR, "").await else { return };
    let (code, reasons) = http::get(cluster.agent.http, "/readyz").await.unwrap();
    assert!(code == 200 && reasons.contains(DRIVER) && reasons.contains("not registered"), "{reasons}");
    cluster.kubelet.refuse("no such driver").await.unwrap();
    let ended = cluster.agent.ended(SOON).await.unwrap();
    assert_eq!(ended.code(), Some(1));
    assert!(!cluster.kubelet.registration().exists(), "the kubelet forgets it");
    let log = cluster.agent.log().unwrap();
    assert!(log.contains(DRIVER) && log.contains("no such driver"), "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_socket_of_the_plugins_that_somebody_removed_is_made_again_and_pods_do_not_notice() {
    let Some(cluster) = Cluster::start(HOUR).await else { return };
    let (kubelet, pod) = (&cluster.kubelet, Pod::new("cart", 0));
    kubelet.publish(&pod).await.unwrap();
    let container = cluster.container(&pod);
    let mut stream = secrets::hold(&container.at("sds.sock"), None, None, SOON).await.unwrap();
    for socket in [kubelet.endpoint().to_owned(), kubelet.registration()] {
        let away = socket.with_extension("away");
        std::fs::rename(&socket, &away).unwrap();
        // Where it cannot be made again, that is said; and nobody else's is taken away.
        let other = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        wait::until("the agent says so", SOON, async || match http::get(cluster.agent.http, "/readyz").await.unwrap() {
            (503, reasons) if reasons.contains("removed or replaced; it cannot be made again") => Ok(()),
            (code, reasons) => Err(format!("{code} {reasons}")),
        })
        .await
        .unwrap();
        drop(other);
        wait::until("the agent is ready", SOON, async || match http::get(cluster.agent.http, "/readyz").await.unwrap() {
            (200, _) => Ok(()),
            (code, reasons) => Err(format!("{code} {reasons}")),
        })
        .await
        .unwrap();
        // As the kubelet does when there is an announcement that it does not know; and as it goes on.
        kubelet.register().await.unwrap();
        kubelet.publish(&pod).await.unwrap();
    }
    let (_, reasons) = http::get(cluster.agent.http, "/readyz").await.unwrap();
    assert!(!reasons.contains("registered"), "{reasons}");
    assert!(stream.answer(None, Duration::from_millis(200)).await.is_err_and(|error| error.to_string().contains("within")), "it goes on");
    assert_eq!(fetch(&container, "sds.sock").await.unwrap(), CART);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mount_that_cannot_be_made_anew_stays_as_it_is() {
    let Some(cluster) = Cluster::start(HOUR).await else { return };
    let (kubelet, pod) = (&cluster.kubelet, Pod::new("cart", 0));
    kubelet.publish(&pod).await.unwrap();
    // The mount calls for a repair, and what it would be made of cannot be used.
    let (root, target) = (kubelet.socket_root(&cluster.lab), kubelet.target(&pod));
    cluster.node().run("mount", &["--bind".as_ref(), &target, &target]).unwrap();
    assert_eq!(cluster.mounts(&pod), 2);
    let open_to = |mode| std::fs::set_permissions(&root, std::fs::Permissions::from_mode(mode)).unwrap();
    open_to(0o755);
    let token = Handing::InSecrets(kubelet.token(&pod, HOUR).unwrap());
    assert_eq!(kubelet.publish_with(&pod, &token).await.map_err(|status| status.code()), Err(Code::Unavailable));
    assert_eq!(cluster.mounts(&pod), 2, "nothing was taken away");
    assert_eq!(fetch(&cluster.container(&pod), "sds.sock").await.unwrap(), CART);

    open_to(0o700);
    kubelet.publish(&pod).await.unwrap();
    assert_eq!(cluster.mounts(&pod), 1);
    assert_eq!(fetch(&cluster.container(&pod), "sds.sock").await.unwrap(), CART);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_a_node_has_selinux_the_pods_directories_get_the_label_of_containers_files() {
    let Some(mut cluster) = Cluster::unregistered(HOUR, "").await else { return };
    let root = cluster.kubelet.socket_root(&cluster.lab);
    let label = || {
        let mut label = [0; 64];
        let length = rustix::fs::getxattr(&root, SELINUX, &mut label)?;
        std::io::Result::Ok(String::from_utf8_lossy(&label[..length]).into_owned())
    };
    if label().is_err() {
        // This machine has none, and so the directory got no label. Now it looks as if it had.
        cluster.agent.kill().unwrap();
        rustix::fs::setxattr(&root, SELINUX, b"system_u:object_r:var_run_t:s0", XattrFlags::empty()).unwrap();
        cluster.agent.run(&cluster.lab).await.unwrap();
    }
    assert!(label().unwrap().starts_with("system_u:object_r:container_file_t:s0"));
}
