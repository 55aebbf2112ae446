//! What holds a rotation, and how the command line says so: proxies that refuse, have not answered or have not come back, a deadline, Ctrl-C.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use chancery_proto::envoy::service::discovery::v3::DiscoveryRequest;
use chancery_tests::agent::Agent;
use chancery_tests::ca::Ca;
use chancery_tests::lab::Lab;
use chancery_tests::mesh::{NODE, token_request};
use chancery_tests::secrets::{self, Stream};
use chancery_tests::{tools, wait};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use time::OffsetDateTime;

const HOUR: Duration = Duration::from_secs(3600);
const SOON: Duration = Duration::from_secs(20);

/// A CA with one agent, whose proxies the test plays.
struct Node {
    ca: Ca,
    agent: Agent,
    lab: Lab,
}

impl Node {
    async fn start() -> Self {
        let lab = Lab::new().unwrap();
        let ca = Ca::start(&lab, HOUR).await.unwrap();
        let agent = Agent::start(&lab, &ca, NODE).await.unwrap();
        Self { ca, agent, lab }
    }

    /// A proxy of `shop/<account>-0` that accepts its first secrets, or refuses them with these words.
    async fn proxy(&self, account: &str, refuse: Option<&str>) -> Stream {
        secrets::hold(&self.agent.sds_socket, Some(&self.token(account)), refuse, SOON).await.unwrap()
    }

    /// One stream of such a proxy, which begins with this.
    async fn stream(&self, account: &str, ask: DiscoveryRequest) -> Stream {
        secrets::open(&self.agent.sds_socket, Some(&self.token(account)), ask).await.unwrap()
    }

    fn token(&self, account: &str) -> String {
        self.ca.issuer().unwrap().sign(&token_request(account, HOUR), OffsetDateTime::now_utc()).unwrap().to_string()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(tools::chancery("chancery").unwrap());
        command.arg("--socket").arg(self.ca.admin_socket()).args(arguments);
        command
    }

    /// The exit status, and what was said.
    fn root(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let Output { status, stdout, stderr } = self.command(&[&["root"], arguments].concat()).output().unwrap();
        (status.code(), String::from_utf8(stdout).unwrap() + &String::from_utf8(stderr).unwrap())
    }

    fn publish(&self) {
        for step in ["prepare", "publish"] {
            let (code, said) = self.root(&[step, "--reason", "a test"]);
            assert_eq!(code, Some(0), "{said}");
        }
    }

    fn states(&self) -> Vec<String> {
        let roots = self.ca.ask(&["root", "list"]).unwrap();
        roots.as_array().unwrap().iter().map(|root| root["state"].as_str().unwrap().to_owned()).collect()
    }

    /// Waits until an activation is refused with these words.
    async fn until_held_by(&self, words: &str) {
        wait::until(&format!("{words:?} holds the activation"), SOON, async || match self.root(&["activate", "--dry-run"]) {
            (Some(1), said) if said.contains(words) => Ok(()),
            other => Err(format!("{other:?}")),
        })
        .await
        .unwrap();
        let (code, said) = self.root(&["activate", "--reason", "a test"]);
        assert!(code == Some(1) && said.contains(words), "{code:?} {said}");
    }

    async fn until_open(&self) {
        wait::until("the gate is open", SOON, async || match self.root(&["activate", "--dry-run"]) {
            (Some(0), _) => Ok(()),
            other => Err(format!("{other:?}")),
        })
        .await
        .unwrap();
    }
}

#[tokio::test]
async fn a_proxy_that_has_not_acknowledged_or_has_refused_holds_the_activation_by_name() {
    let node = Node::start().await;
    let mut cart = node.proxy("cart", None).await;
    node.publish();
    // It was sent the new bundle, and says nothing.
    node.until_held_by("shop/cart-0").await;
    cart.answer(Some("no room for another root"), SOON).await.unwrap();
    node.until_held_by("no room for another root").await;
    let _checkout = node.proxy("checkout", None).await;
    let cart_alone = async || match node.root(&["activate", "--dry-run", "--except", "shop/cart-0"]) {
        (Some(0), _) => Ok(()),
        other => Err(format!("{other:?}")),
    };
    wait::until("nobody else is missing", SOON, cart_alone).await.unwrap();
    node.until_held_by("shop/cart-0").await;
    let (code, said) = node.root(&["activate", "--reason", "cart is being repaired", "--except", "shop/cart-0"]);
    assert_eq!((code, node.states()), (Some(0), vec!["draining".to_owned(), "active".into()]), "{said}");
}

#[tokio::test]
async fn after_a_restart_of_the_agent_a_proxy_that_is_still_waiting_to_come_back_holds_the_activation() {
    let mut node = Node::start().await;
    let mut cart = node.proxy("cart", None).await;
    node.agent.kept("spiffe://mesh.test/ns/shop/sa/cart").await.unwrap();
    node.publish();
    cart.answer(None, SOON).await.unwrap();
    node.until_open().await;
    node.agent.kill().unwrap();
    node.agent.run(&node.lab).await.unwrap();
    node.until_held_by("has not come back since its agent restarted").await;
    let _back = node.proxy("cart", None).await;
    node.until_open().await;
    let (code, said) = node.root(&["activate", "--reason", "a test"]);
    assert_eq!(code, Some(0), "{said}");
}

#[tokio::test]
async fn a_proxy_whose_stream_ended_holds_the_activation_until_it_is_back_and_has_the_next_root() {
    let node = Node::start().await;
    // As an Envoy has: a stream for each secret, of which one can be in its back-off while the other goes on.
    let mut bundle = node.stream("cart", secrets::ask(&["ROOTCA"])).await;
    bundle.answer(None, SOON).await.unwrap();
    let mut certificate = node.stream("cart", secrets::ask(&["default"])).await;
    certificate.answer(None, SOON).await.unwrap();
    let comes_back_with = bundle.end();
    node.publish();
    node.until_held_by("away since").await;
    let (code, said) = node.root(&["activate", "--dry-run"]);
    assert!(code == Some(1) && said.contains("shop/cart-0"), "{code:?} {said}");

    // Back, it names what it had, which does not count for more.
    let mut bundle = node.stream("cart", comes_back_with).await;
    wait::until("it is no longer away", SOON, async || match node.root(&["activate", "--dry-run"]) {
        (Some(1), said) if said.contains("shop/cart-0") && !said.contains("away since") => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await
    .unwrap();
    bundle.answer(None, SOON).await.unwrap();
    node.until_open().await;
    let (code, said) = node.root(&["activate", "--reason", "a test"]);
    assert_eq!((code, node.states()), (Some(0), vec!["draining".to_owned(), "active".into()]), "{said}");
}

#[tokio::test]
async fn a_dry_run_says_which_steps_are_left_and_what_is_in_the_way_and_changes_nothing() {
    let node = Node::start().await;
    let (code, said) = node.root(&["rotate", "--dry-run"]);
    assert!(code == Some(0) && said.contains("steps that are left: prepare, publish, activate, retire"), "{said}");
    let (code, said) = node.root(&["rotate", "--dry-run", "-o", "json"]);
    let said: Value = serde_json::from_str(&said).unwrap();
    assert!(code == Some(0) && said["steps"].as_array().unwrap().len() == 4 && said["gate"].is_null(), "{said}");
    assert_eq!(node.states(), ["active"]);
    let _silent = node.proxy("cart", None).await;
    node.publish();
    node.until_held_by("shop/cart-0").await;
    let (code, said) = node.root(&["rotate", "--dry-run"]);
    assert!(code == Some(0) && said.contains("steps that are left: activate, retire") && said.contains("shop/cart-0"), "{code:?} {said}");
    assert_eq!(node.states(), ["active", "published"]);
    assert_eq!(node.root(&["rotate"]).0, Some(2), "a reason is asked for");
}

#[tokio::test]
async fn a_rotation_that_meets_its_deadline_fails_with_who_is_missing_and_the_next_one_goes_on() {
    let node = Node::start().await;
    let _silent = node.proxy("cart", None).await;
    let (code, said) = node.root(&["rotate", "--reason", "a test", "--deadline", "3s", "-o", "json"]);
    assert!(code == Some(1) && said.contains("the deadline has come"), "{code:?} {said}");
    assert!(said.contains("missing: shop/cart-0"), "{said}");
    let events: Vec<Value> = said.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let told: Vec<_> = events.iter().map(|event| (event["phase"].as_str().unwrap(), event["outcome"].as_str().unwrap())).collect();
    assert!(told.starts_with(&[("prepared", "done"), ("published", "done"), ("active", "waiting")]), "{told:?}");
    assert!(events.iter().any(|event| event["missing"].as_u64() > Some(0)), "{said}");
    assert_eq!(node.states(), ["active", "published"]);
    let (code, said) = node.root(&["rotate", "--reason", "cart is broken", "--except", "shop/cart-0", "--deadline", "60s"]);
    assert_eq!((code, node.states()), (Some(0), vec!["retired".to_owned(), "active".into()]), "{said}");
}

#[tokio::test]
async fn a_rotation_that_is_interrupted_stays_where_it_is_and_can_be_forced_on() {
    let node = Node::start().await;
    let _silent = node.proxy("cart", None).await;
    let rotate = node.command(&["root", "rotate", "--reason", "a test"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let mut rotate: Child = rotate.unwrap();
    let waits = async || if node.states() == ["active", "published"] { Ok(()) } else { Err(format!("{:?}", node.states())) };
    wait::until("the next root is published", SOON, waits).await.unwrap();
    kill_process(Pid::from_child(&rotate), Signal::INT).unwrap();
    assert!(!rotate.wait().unwrap().success());
    assert_eq!(node.states(), ["active", "published"]);
    let (code, said) = node.root(&["rotate", "--reason", "there is no time", "--force", "--deadline", "60s"]);
    assert_eq!((code, node.states()), (Some(0), vec!["retired".to_owned(), "active".into()]), "{said}");
    let acts = node.ca.ask(&["log", "acts", "--action", "root.activate"]).unwrap().to_string();
    assert!(acts.contains("there is no time"), "{acts}");
}
