//! Clocks that are wrong, by libfaketime: the CA's set back, the CA's a day ahead, and three days in which nothing ran.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use chancery_ca::attestation::development::DevelopmentIssuer;
use chancery_identity::Fingerprint;
use chancery_proto::chancery::v1::WorkloadRequest;
use chancery_tests::agent::{Agent, join_token};
use chancery_tests::ca::Ca;
use chancery_tests::caller::Caller;
use chancery_tests::lab::Lab;
use chancery_tests::mesh::{NODE, token_request};
use chancery_tests::secrets::Secrets;
use chancery_tests::tokens::TokenVolume;
use chancery_tests::{http, secrets, tools, wait};
use serde_json::Value;
use time::OffsetDateTime;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);
const NOTICED_WITHIN: Duration = Duration::from_secs(15);
/// An agent that was refused asks again within so long.
const SOON: Duration = Duration::from_secs(45);

/// A clock that is off by what it is told, for the programs that are given it.
struct FakeClock {
    library: PathBuf,
    file: PathBuf,
}

impl FakeClock {
    /// Nothing, where there is no libfaketime.
    fn new(lab: &Lab, offset: &str) -> Option<Self> {
        let clock = Self { library: tools::faketime()?, file: lab.at("clock") };
        clock.set(offset);
        Some(clock)
    }

    /// `+1d`, `-1h`, `+0`.
    fn set(&self, offset: &str) {
        std::fs::write(&self.file, offset).unwrap();
    }

    fn environment(&self) -> [(&'static str, String); 4] {
        [
            ("LD_PRELOAD", self.library.display().to_string()),
            ("FAKETIME_TIMESTAMP_FILE", self.file.display().to_string()),
            // Seconds until a change of the file is noticed.
            ("FAKETIME_CACHE_DURATION", "1".into()),
            // Waiting takes as long as it does.
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".into()),
        ]
    }
}

/// Starts a CA with this clock and `more` about its lifetimes.
async fn start(lab: &Lab, clock: &FakeClock, lifetime: Duration, more: &str) -> Ca {
    let mut ca = Ca::configure(lab, &lab.at("ca"), lifetime, more).unwrap();
    for (name, value) in clock.environment() {
        ca.set_environment(name, &value);
    }
    ca.run(lab).await.unwrap();
    ca
}

/// A token of `shop/cart` on this node that was signed at `time` and lives three days.
fn token_of(issuer: &DevelopmentIssuer, node: &str, time: OffsetDateTime) -> String {
    let mut request = token_request("cart", 3 * DAY);
    request.node = node.into();
    issuer.sign(&request, time).unwrap().to_string()
}

/// What was issued to agents and workloads. The CA's own certificate, new with every start, does not count.
fn identities(ca: &Ca) -> Vec<Value> {
    let mut all = ca.ask(&["identity", "list"]).unwrap().as_array().unwrap().clone();
    all.retain(|identity| identity["spiffe_id"] != "spiffe://mesh.test/chancery/ca");
    all
}

async fn readiness(ca: &Ca, expected: u16) -> String {
    wait::until("readiness", NOTICED_WITHIN, async || match http::get(ca.http, "/readyz").await.unwrap() {
        (code, said) if code == expected => Ok(said),
        (code, said) => Err(format!("{code} {said}")),
    })
    .await
    .unwrap()
}

#[tokio::test]
async fn a_ca_whose_clock_is_set_back_says_so_and_issues_nothing_until_it_is_right() {
    let lab = Lab::new().unwrap();
    let Some(clock) = FakeClock::new(&lab, "+0") else { return };
    let ca = start(&lab, &clock, HOUR, "").await;
    let caller = Caller::join(&lab, &ca, NODE).await.unwrap();
    caller.issue(caller.request().unwrap()).await.unwrap().unwrap();
    let before = identities(&ca);

    clock.set("-1h");
    let said = readiness(&ca, 503).await;
    assert!(said.contains("the issuing certificate is valid from") && said.contains("the clock says"), "{said}");
    let refusal = caller.issue(caller.request().unwrap()).await.unwrap().unwrap_err();
    assert_eq!((refusal.reason.as_str(), refusal.retryable), ("token_not_yet_valid", true), "{}", refusal.message);
    assert!(refusal.message.contains("is a clock wrong?"), "{}", refusal.message);
    // An older token is good by that clock too, but the CA's own certificate is not.
    let token = token_of(&ca.issuer().unwrap(), NODE, OffsetDateTime::now_utc() - 2 * HOUR);
    let request = || WorkloadRequest { token: token.clone(), ..caller.request().unwrap() };
    let refusal = caller.issue(request()).await.unwrap().unwrap_err();
    assert_eq!((refusal.reason.as_str(), refusal.retryable), ("ca_clock", true), "{}", refusal.message);
    assert_eq!(identities(&ca), before, "nothing is recorded as issued");
    assert_eq!(ca.ask(&["identity", "refusals"]).unwrap()[0]["reason"], "ca_clock");

    clock.set("+0");
    readiness(&ca, 200).await;
    caller.issue(request()).await.unwrap().unwrap();
    assert_eq!(identities(&ca).len(), before.len() + 1);
}

#[tokio::test]
async fn while_the_cas_clock_is_a_day_ahead_the_agent_keeps_the_last_good_certificate() {
    let lab = Lab::new().unwrap();
    let Some(clock) = FakeClock::new(&lab, "+0") else { return };
    let lifetime = Duration::from_secs(20);
    // So that tomorrow, as the CA sees it, the agent itself is still welcome.
    let ca = start(&lab, &clock, lifetime, "agent = \"72h\"\n").await;
    let agent = Agent::start(&lab, &ca, NODE).await.unwrap();
    let token = token_of(&ca.issuer().unwrap(), NODE, OffsetDateTime::now_utc());
    let serial = async || {
        let secrets = secrets::fetch(&agent.sds_socket, Some(&token), Duration::from_secs(5)).await.unwrap();
        assert!(secrets.svid.not_after() > OffsetDateTime::now_utc());
        secrets.svid.serial().to_string()
    };
    let good = serial().await;

    clock.set("+1d");
    let problem = wait::until("the agent refuses what comes from tomorrow", lifetime, async || {
        let status = agent.ask(&["status"]).unwrap();
        match status["workloads"][0]["problem"].as_str() {
            Some(problem) if !problem.is_empty() => Ok(problem.to_owned()),
            _ => Err(status.to_string()),
        }
    });
    let problem = problem.await.unwrap();
    assert!(problem.contains("not valid before"), "{problem}");
    assert_eq!(serial().await, good);
    let counted = http::get(agent.http, "/metrics").await.unwrap().1;
    assert!(counted.lines().any(|line| line.starts_with("chancery_agent_rejected_total ") && !line.ends_with(" 0")), "{counted}");
    wait::until("the CA sees how far the clocks are apart", NOTICED_WITHIN, async || {
        let offset = ca.ask(&["agent", "list"]).unwrap()[0]["clock_offset_ms"].as_i64().unwrap();
        if (-86_430_000..-86_370_000).contains(&offset) { Ok(()) } else { Err(offset) }
    })
    .await
    .unwrap();

    clock.set("+0");
    wait::until("a new certificate", lifetime, async || {
        let now = serial().await;
        if now == good { Err("still the old one") } else { Ok(()) }
    })
    .await
    .unwrap();
    // Whoever connects now must not meet a server certificate from tomorrow.
    Caller::join(&lab, &ca, "node-b").await.unwrap();
}

#[tokio::test]
async fn while_the_cas_clock_is_a_day_ahead_no_root_moves_unless_the_operator_confirms_it() {
    let lab = Lab::new().unwrap();
    let Some(clock) = FakeClock::new(&lab, "+0") else { return };
    let ca = start(&lab, &clock, HOUR, "agent = \"72h\"\n").await;
    let agent = Agent::start(&lab, &ca, NODE).await.unwrap();
    let token = token_of(&ca.issuer().unwrap(), NODE, OffsetDateTime::now_utc());
    let good = secrets::fetch(&agent.sds_socket, Some(&token), Duration::from_secs(5)).await.unwrap();
    for step in ["prepare", "publish"] {
        ca.chancery(&["root", step, "--reason", "a test"]).unwrap();
    }

    clock.set("+1d");
    // Not even with whoever is missing left out.
    let ahead = async || match ca.chancery(&["root", "activate", "--dry-run", "--except", NODE]) {
        Err(refused) if refused.to_string().contains("in the way") => Ok(()),
        other => Err(format!("{other:?}")),
    };
    wait::until("the activation is held", NOTICED_WITHIN, ahead).await.unwrap();
    let refused = ca.chancery(&["root", "activate", "--reason", "a test", "--except", NODE]).unwrap_err().to_string();
    assert!(refused.contains("ahead of the median of the agents' clocks"), "{refused}");
    let again = secrets::fetch(&agent.sds_socket, Some(&token), Duration::from_secs(5)).await.unwrap();
    assert_eq!(again.svid.serial(), good.svid.serial(), "nobody loses a certificate");
    let confirmed = ["root", "activate", "--reason", "a test", "--except", NODE, "--confirm-clock"];
    ca.chancery(&confirmed).unwrap();
    let states = ca.ask(&["root", "list"]).unwrap();
    assert_eq!((&states[0]["state"], &states[1]["state"]), (&"draining".into(), &"active".into()), "{states}");
}

/// A CA whose next root everybody has, whose one agent went away, and whose clock then went two days ahead: by it, nothing lives that was issued.
struct Ahead {
    ca: Ca,
    agent: Agent,
    clock: FakeClock,
    lab: Lab,
    /// Of a pod that has a certificate under the old root, good for most of an hour.
    token: String,
}

impl Ahead {
    /// `activate`: the next root became the active one before.
    async fn start(activate: bool) -> Option<Self> {
        let lab = Lab::new().unwrap();
        let clock = FakeClock::new(&lab, "+0")?;
        let ca = start(&lab, &clock, HOUR, "").await;
        let mut agent = Agent::start(&lab, &ca, NODE).await.unwrap();
        let token = token_of(&ca.issuer().unwrap(), NODE, OffsetDateTime::now_utc());
        let mut cart = secrets::hold(&agent.sds_socket, Some(&token), None, SOON).await.unwrap();
        agent.kept("spiffe://mesh.test/ns/shop/sa/cart").await.unwrap();
        for step in ["prepare", "publish"] {
            ca.chancery(&["root", step, "--reason", "a test"]).unwrap();
        }
        cart.answer(None, SOON).await.unwrap();
        let open = async || ca.chancery(&["root", "activate", "--dry-run"]).map(drop);
        wait::until("the gate is open", SOON, open).await.unwrap();
        if activate {
            ca.chancery(&["root", "activate", "--reason", "a test"]).unwrap();
        }
        agent.kill().unwrap();
        let next = if activate { "retire" } else { "activate" };
        let without_the_agent = || ca.chancery(&["root", next, "--dry-run", "--except", NODE]);
        wait::until("the agent alone is in the way", SOON, async || without_the_agent().map(drop)).await.unwrap();
        clock.set("+2d");
        let ahead = async || without_the_agent().map_or(Ok(()), Err);
        wait::until("the CA's clock is ahead", NOTICED_WITHIN, ahead).await.unwrap();
        Some(Self { ca, agent, clock, lab, token })
    }

    fn states(&self) -> Vec<String> {
        let roots = self.ca.ask(&["root", "list"]).unwrap();
        roots.as_array().unwrap().iter().map(|root| root["state"].as_str().unwrap().to_owned()).collect()
    }

    /// The clock is right and the agent there; its proxy is served at once, and takes whatever comes from then on.
    async fn comes_back(&mut self) -> (Secrets, AbortOnDropHandle<()>) {
        self.clock.set("+0");
        self.agent.run(&self.lab).await.unwrap();
        let both = secrets::ask(&["default", "ROOTCA"]);
        let mut cart = secrets::open(&self.agent.sds_socket, Some(&self.token), both).await.unwrap();
        let served = timeout(SOON, cart.answer_all(None)).await.expect("the pod is served").unwrap();
        assert!(served.svid.not_after() > OffsetDateTime::now_utc(), "nobody loses a certificate");
        let accepts = tokio::spawn(async move { while cart.answer(None, HOUR).await.is_ok() {} });
        (served, AbortOnDropHandle::new(accepts))
    }

    /// The roots that the pod's proxies are to trust by now.
    async fn trusted(&self) -> Vec<String> {
        let secrets = secrets::fetch(&self.agent.sds_socket, Some(&self.token), SOON).await.unwrap();
        secrets.bundle.x509_authorities().iter().map(|root| Fingerprint::of(root).to_string()).collect()
    }
}

#[tokio::test]
async fn a_root_that_drains_is_not_retired_by_a_clock_that_is_ahead() {
    let Some(mut ahead) = Ahead::start(true).await else { return };
    let retire = ["root", "retire", "--reason", "a test"];
    let refused = ahead.ca.chancery(&retire).unwrap_err().to_string();
    assert!(refused.contains("this machine's clock was set by") && !refused.contains("missing"), "the clock alone holds it: {refused}");
    assert_eq!(ahead.states(), ["draining", "active"]);
    let (served, _cart) = ahead.comes_back().await;
    assert_eq!(served.bundle.x509_authorities().len(), 2, "the old root is still trusted");
    wait::until("the old root is retired", SOON, async || ahead.ca.chancery(&retire).map(drop)).await.unwrap();
    assert_eq!(ahead.states(), ["retired", "active"]);
}

#[tokio::test]
async fn a_root_that_is_distrusted_by_a_clock_that_is_ahead_stays_until_its_pods_have_let_go_of_it() {
    let Some(mut ahead) = Ahead::start(false).await else { return };
    let old = ahead.ca.ask(&["root", "list"]).unwrap()[0]["fingerprint"].as_str().unwrap().to_owned();
    let mut distrust = Command::new(tools::chancery("chancery").unwrap());
    distrust.arg("--socket").arg(ahead.ca.admin_socket()).args(["root", "distrust", &old, "--reason", "a test", "--deadline", "10m"]);
    let mut distrust = distrust.stdout(Stdio::null()).spawn().unwrap();
    let replaced = async || if ahead.states() == ["draining", "active"] { Ok(()) } else { Err(format!("{:?}", ahead.states())) };
    wait::until("the replacement is active", SOON, replaced).await.unwrap();
    let (served, _cart) = ahead.comes_back().await;
    assert_eq!(served.bundle.x509_authorities().len(), 2, "the old root is still trusted");
    let ended = async || match distrust.try_wait() {
        Ok(Some(status)) if status.success() => Ok(()),
        other => Err(format!("{other:?}, {:?}", ahead.states())),
    };
    wait::until("the old root is gone", SOON, ended).await.unwrap();
    assert_eq!(ahead.states(), ["distrusted", "active"]);
    let acts = ahead.ca.ask(&["log", "acts", "--action", "root.distrust"]).unwrap();
    assert!(acts.to_string().contains("nothing alive chains to it any more"), "{acts}");
    let without = async || if ahead.trusted().await.contains(&old) { Err("it is in the bundle") } else { Ok(()) };
    wait::until("nobody trusts it", SOON, without).await.unwrap();
}

#[tokio::test]
async fn a_ca_that_was_off_for_three_days_starts_and_issues() {
    let lab = Lab::new().unwrap();
    let Some(clock) = FakeClock::new(&lab, "-3d") else { return };
    let mut ca = start(&lab, &clock, HOUR, "").await;
    let issuer = ca.issuer().unwrap();
    let mut agent = Agent::configure(&lab, &ca, NODE).unwrap();
    for (name, value) in clock.environment() {
        agent.set_environment(name, &value);
    }
    let join = TokenVolume::create(&lab.at("agent-token")).unwrap();
    let then = OffsetDateTime::now_utc() - 3 * DAY;
    join.replace(&issuer.sign(&join_token(NODE), then).unwrap()).unwrap();
    agent.run(&lab).await.unwrap();
    let within = Duration::from_secs(10);
    let old = secrets::fetch(&agent.sds_socket, Some(&token_of(&issuer, NODE, then)), within).await.unwrap();
    let before = identities(&ca);
    agent.kill().unwrap();
    ca.stop().await.unwrap();

    clock.set("+0");
    join.replace(&issuer.sign(&join_token(NODE), OffsetDateTime::now_utc()).unwrap()).unwrap();
    ca.run(&lab).await.unwrap();
    agent.run(&lab).await.unwrap();
    let new = secrets::fetch(&agent.sds_socket, Some(&token_of(&issuer, NODE, OffsetDateTime::now_utc())), within).await.unwrap();
    assert_ne!(new.svid.serial(), old.svid.serial());
    assert!(new.svid.not_after() > OffsetDateTime::now_utc());
    assert_eq!(new.bundle, old.bundle, "the trust root is the same");
    assert_eq!(identities(&ca).len(), before.len() + 2, "the agent's own and the workload's");
}
