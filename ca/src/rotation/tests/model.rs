//! A check of the whole: whatever happens in whatever order, nobody who counts is left without the root of a certificate that is in use.
//!
//! Rotation, authority, fleet and ledger are the real ones. What the test adds is what agents and proxies [hold in reality](mesh), and
//! [what may happen](play): transitions, kills at any commit, restorations, a full disk, lost keys, agents that come, go and forget, proxies that
//! acknowledge late or never, pods that come and go, certificates that expire, a clock that is wrong. That the check is worth something show
//! the tests that take one obstacle out of the gates: for each, a sequence is found that does harm.

mod mesh;
mod play;

use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::collection::vec;
use proptest::prelude::{Just, Strategy, any, prop_oneof};
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};
use time::Duration as Span;

use self::play::{Fault, Op, Play, Reached, Without};
use crate::fleet::{Missing, MissingKind};
use crate::ledger::acts::RootState;
use crate::rotation::{Gate, Obstacle};

/// How many things happen at most.
const OPS: usize = 100;
/// How many sequences are tried until one is found that does harm.
const SEARCHED: u32 = 500;

fn fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        8 => Just(Fault::None),
        2 => (0..5_usize).prop_map(Fault::Kill),
        1 => (0..5_usize).prop_map(Fault::Full),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let at = || 0..6_usize;
    let time = prop_oneof![
        4 => Just(Span::minutes(1)),
        4 => Just(Span::minutes(11)),
        3 => Just(Span::minutes(31)),
        2 => Just(Span::minutes(61)),
        1 => Just(Span::days(4)),
    ];
    prop_oneof![
        30 => fault().prop_map(Op::Step),
        4 => fault().prop_map(Op::WalkOn),
        3 => Just(Op::Kill),
        1 => Just(Op::Restore),
        3 => any::<bool>().prop_map(Op::DiskFull),
        1 => Just(Op::LoseKeys),
        6 => (at(), any::<bool>()).prop_map(|(agent, back)| Op::Connect(agent, back)),
        4 => at().prop_map(Op::Sync),
        6 => (at(), proptest::option::of(at()), any::<bool>()).prop_map(|(agent, pod, lost)| Op::Issue(agent, pod, lost)),
        2 => (at(), at()).prop_map(|(agent, pod)| Op::Sign(agent, pod)),
        2 => Just(Op::Record),
        4 => (at(), at(), at()).prop_map(|(agent, pod, proxy)| Op::Give(agent, pod, proxy)),
        4 => (at(), at(), at()).prop_map(|(agent, pod, proxy)| Op::Hear(agent, pod, proxy)),
        4 => at().prop_map(Op::Report),
        14 => at().prop_map(Op::Settle),
        16 => Just(Op::SettleAll),
        2 => at().prop_map(Op::RestartAgent),
        1 => at().prop_map(Op::LoseState),
        2 => at().prop_map(Op::NewPod),
        1 => (at(), at()).prop_map(|(agent, pod)| Op::DeletePod(agent, pod)),
        1 => (at(), at()).prop_map(|(agent, pod)| Op::Revoke(agent, pod)),
        3 => (at(), at(), proptest::bool::weighted(0.3)).prop_map(|(agent, pod, elsewhere)| Op::NewProxy(agent, pod, elsewhere)),
        3 => (at(), at(), at(), any::<bool>()).prop_map(|(agent, pod, proxy, nacks)| Op::Nack(agent, pod, proxy, nacks)),
        6 => time.prop_map(Op::Pass),
        2 => any::<bool>().prop_map(Op::Clock),
    ]
}

/// Plays `ops`.
fn play(ops: &[Op], without: Without) -> Result<Reached, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let mut play = Play::new(without).await;
        play.all(ops).await.map(|()| play.reached)
    })
}

#[test]
fn whatever_happens_nobody_is_left_without_the_root_of_a_certificate_that_is_in_use() {
    let sum = [const { AtomicUsize::new(0) }; 3];
    let mut runner = TestRunner::new(Config { failure_persistence: None, ..Config::default() });
    let result = runner.run(&vec(op(), OPS / 4..OPS), |ops| {
        let Reached { activated, retired, refused, .. } = play(&ops, Without::NOTHING).map_err(TestCaseError::fail)?;
        for (sum, more) in sum.iter().zip([activated, retired, refused]) {
            sum.fetch_add(more, Ordering::Relaxed);
        }
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    let [activated, retired, refused] = sum.each_ref().map(|sum| sum.load(Ordering::Relaxed));
    let reached = format!("{activated} activations, {retired} retirements, {refused} refusals or failures");
    let cases = usize::try_from(runner.config().cases).unwrap();
    assert!(activated * 2 > cases && retired * 4 > cases && refused > cases, "{reached}: that is no check");
}

#[test]
fn a_distrusted_root_leaves_before_its_deadline_only_when_nothing_alive_chains_to_it() {
    let sum = AtomicUsize::new(0);
    let mut runner = TestRunner::new(Config { failure_persistence: None, ..Config::default() });
    let ops = prop_oneof![
        6 => op(),
        2 => Just(Op::SettleAll),
        2 => fault().prop_map(Op::WalkOn),
        1 => Just(Op::Distrust),
    ];
    let result = runner.run(&vec(ops, OPS / 4..OPS / 2), |ops| {
        let reached = play(&ops, Without::NOTHING).map_err(TestCaseError::fail)?;
        sum.fetch_add(reached.distrusted, Ordering::Relaxed);
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    let distrusted = sum.load(Ordering::Relaxed);
    assert!(distrusted * 4 > usize::try_from(runner.config().cases).unwrap(), "{distrusted} are no check");
}

/// Finds out whether it does harm that an obstacle is not there; `often` happens what leads there.
fn harm_without(obstacles: fn(&mut Gate), often: impl Strategy<Value = Op> + 'static) -> String {
    harm(Without { obstacles, ..Without::NOTHING }, often)
}

fn harm(without: Without, often: impl Strategy<Value = Op> + 'static) -> String {
    let config = Config { failure_persistence: None, cases: SEARCHED, max_shrink_iters: 0, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let ops = prop_oneof![op(), Just(Op::Step(Fault::None)), Just(Op::SettleAll), often,];
    match runner.run(&vec(ops, OPS), |ops| play(&ops, without).map(drop).map_err(TestCaseError::fail)) {
        Err(TestError::Fail(reason, _)) => reason.to_string(),
        other => panic!("no harm was found: {other:?}"),
    }
}

fn is_issuing(reason: &str) -> bool {
    reason.contains("nothing can be issued")
}

/// Those of a kind do not count.
fn nobody(gate: &mut Gate, kind: MissingKind) {
    let Missing { who, more, .. } = &mut gate.missing;
    who.retain(|one| one.kind != kind);
    if kind == MissingKind::Proxy {
        more.clear();
    }
    if gate.missing.is_empty() {
        gate.obstacles.retain(|obstacle| !matches!(obstacle, Obstacle::Missing(_)));
    }
}

/// Takes obstacles of a kind out of a gate.
macro_rules! without {
    ($pattern:pat) => {
        |gate: &mut Gate| gate.obstacles.retain(|obstacle| !matches!(obstacle, $pattern))
    };
}

#[test]
fn without_the_readiness_of_the_next_root_nothing_could_be_issued() {
    let harm = harm_without(without!(Obstacle::NotReady(_)), Just(Op::LoseKeys));
    assert!(is_issuing(&harm), "{harm}");
}

#[test]
fn without_the_count_of_agents_somebody_is_left_behind() {
    let harm = harm_without(|gate| nobody(gate, MissingKind::Agent), Just(Op::Kill));
    assert!(!is_issuing(&harm), "{harm}");
}

#[test]
fn without_the_count_of_proxies_somebody_is_left_behind() {
    let nack = (0..2_usize).prop_map(|agent| Op::Nack(agent, 0, 0, true));
    let harm = harm_without(|gate| nobody(gate, MissingKind::Proxy), nack);
    assert!(!is_issuing(&harm), "{harm}");
}

#[test]
fn without_the_count_of_pods_somebody_is_left_behind() {
    let agent_alone = (0..2_usize, any::<bool>());
    let agent_alone = agent_alone.prop_map(|(agent, report)| if report { Op::Report(agent) } else { Op::Issue(agent, None, false) });
    let harm = harm_without(|gate| nobody(gate, MissingKind::Pod), agent_alone);
    assert!(!is_issuing(&harm), "{harm}");
}

#[test]
fn without_the_count_of_the_cas_own_certificate_it_is_left_behind() {
    let harm = harm_without(|gate| nobody(gate, MissingKind::Ca), any::<bool>().prop_map(Op::DiskFull));
    assert!(!is_issuing(&harm), "{harm}");
}

#[test]
fn without_the_wait_for_those_that_prove_nothing_one_is_left_behind() {
    let elsewhere = (0..2_usize).prop_map(|agent| Op::NewProxy(agent, 0, true));
    let harm = harm_without(without!(Obstacle::Unproven { .. }), elsewhere);
    assert!(!is_issuing(&harm), "{harm}");
}

#[test]
fn without_the_doubt_about_the_clock_somebody_is_left_behind() {
    let harm = harm_without(without!(Obstacle::Clock(_)), any::<bool>().prop_map(Op::Clock));
    assert!(!is_issuing(&harm), "{harm}");
}

#[test]
fn without_the_wait_after_a_restoration_somebody_is_left_behind() {
    let lost = (0..2_usize, any::<bool>()).prop_map(|(agent, issues)| if issues { Op::Issue(agent, Some(0), false) } else { Op::Restore });
    let harm = harm_without(without!(Obstacle::Restored(_)), lost);
    assert!(!is_issuing(&harm), "{harm}");
}

#[test]
fn without_the_epoch_of_the_record_somebody_is_left_behind() {
    let late = (0..2_usize, any::<bool>()).prop_map(|(agent, begins)| if begins { Op::Sign(agent, 0) } else { Op::Record });
    let harm = harm(Without { epoch: true, ..Without::NOTHING }, late);
    assert!(!is_issuing(&harm), "{harm}");
}

#[test]
fn without_the_wait_for_the_crls_somebody_refuses_what_a_new_issuing_certificate_signs() {
    let revoke =
        (0..2_usize, any::<bool>()).prop_map(|(agent, nacks)| if nacks { Op::Nack(agent, 0, 0, true) } else { Op::Revoke(agent, 0) });
    let harm = harm(Without { crls: true, ..Without::NOTHING }, revoke);
    assert!(harm.contains("do not speak for"), "{harm}");
}

/// What leads to a distrust in the middle of everything else.
fn distrust(often: impl Strategy<Value = Op> + 'static) -> impl Strategy<Value = Op> {
    prop_oneof![Just(Op::Distrust), Just(Op::WalkOn(Fault::None)), often]
}

/// The same for the end of a distrust alone.
macro_rules! leaving_without {
    ($pattern:pat) => {
        |gate: &mut Gate| {
            if gate.to == RootState::Distrusted {
                gate.obstacles.retain(|obstacle| !matches!(obstacle, $pattern));
            }
        }
    };
}

#[test]
fn without_the_count_a_distrusted_root_leaves_while_somebody_needs_it() {
    let harm = harm_without(leaving_without!(Obstacle::Missing(_)), distrust(Just(Op::SettleAll)));
    assert!(harm.contains("which is gone"), "{harm}");
}

#[test]
fn without_the_doubt_about_the_clock_a_distrusted_root_leaves_while_somebody_needs_it() {
    let harm = harm_without(leaving_without!(Obstacle::Clock(_)), distrust(any::<bool>().prop_map(Op::Clock)));
    assert!(harm.contains("which is gone"), "{harm}");
}

#[test]
fn without_the_wait_after_a_restoration_a_distrusted_root_leaves_while_somebody_needs_it() {
    let lost = (0..2_usize, any::<bool>()).prop_map(|(agent, issues)| if issues { Op::Issue(agent, Some(0), false) } else { Op::Restore });
    let harm = harm_without(leaving_without!(Obstacle::Restored(_)), distrust(lost));
    assert!(harm.contains("which is gone"), "{harm}");
}

/// That of a published root is made anew at half of its life like any other, which may come just before the root is activated.
#[test]
fn an_issuing_certificate_that_is_due_with_the_activation_of_its_root_is_waited_for() {
    let ops = [
        Op::Step(Fault::None),
        Op::Revoke(0, 0),
        Op::Step(Fault::None),
        Op::Sync(1),
        Op::Pass(time::Duration::days(4)),
        Op::SettleAll,
        Op::Step(Fault::None),
        Op::Settle(0),
        Op::SettleAll,
        Op::Step(Fault::None),
    ];
    let reached = play(&ops, Without::NOTHING).unwrap();
    assert_eq!((reached.activated, reached.refused), (1, 1));
}
