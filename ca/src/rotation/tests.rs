//! Rotations over the real authority, ledger and fleet: what each gate is there for, and that a kill anywhere loses nothing.

mod corporate;
mod crls;
mod model;
mod world;

use chancery_proto::chancery::v1::{ProxyLag, Report};
use time::Duration as Span;

use self::world::{CERTIFICATE, WHY, World, id, lag, refused};
use super::*;
use crate::authority::testing::TestCa;

#[tokio::test(start_paused = true)]
async fn a_root_is_activated_only_when_everybody_who_counts_has_it() {
    let mut world = World::published(3).await;
    let before = world.run.authority.trust().borrow().sequence - 1;
    // An agent that has not taken it over.
    world.report_as(2, |report| report.trust_sequence = before);
    let words = refused(world.go(RootState::Active).await);
    assert!(words.contains(&id(2).to_string()) && words.contains("node-2"), "{words}");
    // A proxy that refused it.
    world.report_as(2, |report| {
        report.convergence.as_mut().unwrap().trust_sequence = before;
        lag(report, ProxyLag { trust_sequence: before, nack: "no such file".into(), ..ProxyLag::default() });
    });
    let words = refused(world.go(RootState::Active).await);
    assert!(words.contains("shop/cart-2") && words.contains("no such file"), "{words}");
    // A pod that nobody speaks for.
    world.report_as(2, |report| report.convergence.as_mut().unwrap().pods.clear());
    let words = refused(world.go(RootState::Active).await);
    assert!(words.contains("shop/cart-2"), "{words}");
    world.report(2);
    assert!(world.go(RootState::Active).await.unwrap().changed);
}

#[tokio::test(start_paused = true)]
async fn whoever_has_not_reported_since_the_ca_started_is_missing() {
    let mut world = World::published(2).await.restart().await;
    world.report(1);
    let words = refused(world.go(RootState::Active).await);
    assert!(words.contains(&id(2).to_string()) && words.contains("has not reported since the CA started"), "{words}");
    assert!(!words.contains(&id(1).to_string()), "{words}");
    world.report(2);
    world.go(RootState::Active).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_root_is_retired_only_when_nothing_alive_chains_to_it() {
    let mut world = World::activated(2).await;
    let old = world.rotation.find(None, &[RootState::Draining]).unwrap();
    let words = refused(world.go(RootState::Retired).await);
    assert!(words.contains(&id(1).to_string()) && words.contains("shop/cart-2"), "{words}");
    world.everybody_renews().await;
    // One proxy has not acknowledged its new certificate.
    world.report_as(2, |report| {
        report.convergence.as_mut().unwrap().certificate_entry = 1;
        lag(report, ProxyLag { trust_sequence: u64::MAX, certificate_entry: 1, ..ProxyLag::default() });
    });
    let words = refused(world.go(RootState::Retired).await);
    assert!(words.contains("shop/cart-2") && words.contains("new certificate"), "{words}");
    assert!(world.is_trusted(old));
    world.report(2);
    assert!(world.go(RootState::Retired).await.unwrap().changed);
    assert!(!world.is_trusted(old));
}

#[tokio::test(start_paused = true)]
async fn a_root_may_be_retired_once_the_last_certificate_under_it_has_expired() {
    let mut world = World::activated(2).await;
    world.everybody_renews().await;
    // An agent that was never heard of again, and whose certificates are old.
    let mut world = world.restart().await;
    refused(world.go(RootState::Retired).await);
    world.pass(CERTIFICATE + Span::minutes(1)).await;
    world.report(1);
    world.run.authority.tick(world.ca.clock.now()).await.unwrap();
    world.go(RootState::Retired).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_cannot_prove_anything_is_waited_for_and_named() {
    let mut world = World::published(1).await;
    let unproven = |report: &mut Report| {
        let convergence = report.convergence.as_mut().unwrap();
        convergence.unproven = vec![ProxyLag { pod: "shop/old-0".into(), proxy: "old~0".into(), ..ProxyLag::default() }];
        convergence.unproven_total = 1;
    };
    world.report_as(1, unproven);
    let words = refused(world.go(RootState::Active).await);
    assert!(words.contains("1 proxies or copies of the bundle cannot prove"), "{words}");
    let accepted = Overrides { accept_unproven: true, ..Overrides::default() };
    let gate = world.rotation.gate(None, RootState::Active, &accepted).await.unwrap();
    assert!(gate.is_open());
    assert_eq!(gate.missing.unproven[0].name, "shop/old-0");
    world.pass(Span::minutes(10)).await;
    world.report_as(1, unproven);
    world.go(RootState::Active).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_is_not_believed_opens_no_gate() {
    let mut world = World::published(3).await;
    let day = Span::DAY.whole_milliseconds();
    for agent in 1..=3 {
        world.report_as(agent, |report| report.clock_ms -= i64::try_from(day).unwrap());
    }
    let words = refused(world.go(RootState::Active).await);
    assert!(words.contains("ahead of the median of the agents' clocks"), "{words}");
    for agent in 2..=3 {
        world.report(agent);
    }
    assert!(world.rotation.gate(None, RootState::Active, &Overrides::default()).await.unwrap().is_open(), "one agent is no median");
    // Set while the CA ran.
    world.ca.clock.advance(Span::minutes(1));
    world.everybody_reports();
    let words = refused(world.go(RootState::Active).await);
    assert!(words.contains("was set by 60 s"), "{words}");
    let confirmed = Overrides { confirm_clock: true, ..Overrides::default() };
    world.go_with(RootState::Active, &confirmed).await.unwrap();
    world.everybody_renews().await;
    world.go(RootState::Retired).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn with_a_clock_a_day_ahead_nothing_is_retired_and_no_distrust_ends_early() {
    let mut world = World::activated(2).await;
    let old = world.rotation.find(None, &[RootState::Draining]).unwrap();
    let reports = |world: &mut World| {
        for agent in 1..=2 {
            world.report_as(agent, |report| report.clock_ms -= i64::try_from(Span::DAY.whole_milliseconds()).unwrap());
        }
    };
    // By this clock every certificate under the old root has expired, and nobody is missing.
    world.ca.clock.advance(Span::DAY);
    reports(&mut world);
    let words = refused(world.go(RootState::Retired).await);
    assert!(words.contains("ahead of the median") && !words.contains("missing"), "{words}");
    world.distrust(old, Duration::from_secs(30)).await;
    world.pass(Span::seconds(29)).await;
    reports(&mut world);
    world.rotation.walk_on().await.unwrap();
    assert!(world.is_trusted(old));
    // Right again: whoever is missing is missing.
    world.ca.clock.advance(-Span::DAY);
    world.everybody_reports();
    world.rotation.walk_on().await.unwrap();
    assert!(world.is_trusted(old));
    world.everybody_renews().await;
    world.rotation.walk_on().await.unwrap();
    assert_eq!(world.state_of(old), RootState::Distrusted);
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_no_agent_has_confirmed_since_the_start_opens_no_gate() {
    let world = World::activated(1).await;
    world.ca.clock.advance(Span::DAY);
    let mut world = world.restart().await;
    let words = refused(world.go(RootState::Retired).await);
    assert!(words.contains("nothing confirms this machine's clock"), "{words}");
    world.ca.clock.advance(-Span::DAY);
    world = world.restart().await;
    world.everybody_renews().await;
    world.go(RootState::Retired).await.unwrap();
    // A CA that has never had an agent has nobody to ask.
    let world = World::published(0).await;
    world.go(RootState::Active).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn one_that_is_left_out_or_a_gate_that_is_overridden_is_recorded() {
    let mut world = World::published(2).await;
    world.report_as(2, |report| report.trust_sequence = 0);
    let except = Overrides { except: vec!["node-2".into()], ..Overrides::default() };
    let done = world.go_with(RootState::Active, &except).await.unwrap();
    let force = Overrides { force: true, ..Overrides::default() };
    let retired = world.go_with(RootState::Retired, &force).await.unwrap();
    for (entry, overrides) in [(done.now.entry, except), (retired.now.entry, force)] {
        let crate::ledger::Body::Act(act) = world.run.ledger.entry(entry).await.unwrap().unwrap().body else { panic!() };
        let Some(chancery_proto::chancery::v1::act::Change::Root(root)) = act.change else { panic!() };
        assert_eq!((root.except, root.force, act.why.as_str()), (overrides.except, overrides.force, WHY));
    }
}

#[tokio::test(start_paused = true)]
async fn every_transition_is_done_once_and_may_be_asked_for_again_after_a_kill() {
    let mut world = World::new(2).await;
    let old = world.run.authority.root_fingerprint();
    let mut new = None;
    for to in [RootState::Prepared, RootState::Published, RootState::Active, RootState::Retired] {
        let root = if to == RootState::Retired { old } else { new.unwrap_or(old) };
        let order = Order { actor: "local:uid=0", why: WHY, overrides: &Overrides::default() };
        let done = world.go(to).await.unwrap();
        assert!(done.changed, "{to}");
        new = new.or(Some(done.root));
        for _ in 0..2 {
            let entries = world.run.ledger.epoch();
            let name = done.root.to_string();
            let again = match to {
                RootState::Prepared => world.rotation.prepare("local:uid=0", WHY).await,
                RootState::Published => world.rotation.publish(Some(&name), order).await,
                RootState::Active => world.rotation.activate(Some(&name), order).await,
                _ => world.rotation.retire(Some(&name), order).await,
            };
            assert_eq!(again.unwrap(), Done { changed: false, ..done }, "{to} of {root}");
            assert_eq!(world.run.ledger.epoch(), entries, "nothing is recorded twice");
            world = world.restart().await;
        }
        if to == RootState::Active {
            world.everybody_renews().await;
        }
        world.everybody_reports();
    }
    assert_eq!((world.state_of(old), world.run.authority.root_fingerprint()), (RootState::Retired, new.unwrap()));
}

#[tokio::test(start_paused = true)]
async fn no_step_is_left_out() {
    let world = World::new(0).await;
    let active = world.run.authority.root_fingerprint().to_string();
    for to in [RootState::Published, RootState::Active, RootState::Retired] {
        assert!(matches!(world.go(to).await.unwrap_err(), RotationError::NotDue(_)), "{to}");
    }
    let order = Order { actor: "local:uid=0", why: WHY, overrides: &Overrides { force: true, ..Overrides::default() } };
    let error = world.rotation.retire(Some(&active), order).await.unwrap_err();
    assert!(matches!(error, RotationError::Ledger(LedgerError::Impossible(_))), "{error}");
    let gate = world.rotation.gate(Some(&active), RootState::Retired, order.overrides).await.unwrap();
    assert!(gate.impossible().is_some_and(|why| why.contains("is active and cannot become retired")), "{gate}");
    let gate = world.rotation.gate(Some(&active), RootState::Active, order.overrides).await.unwrap();
    assert!(gate.is_open(), "it is there already: {gate}");
    assert!(matches!(world.rotation.retire(Some("abc"), order).await.unwrap_err(), RotationError::Unknown(_)));
    world.go(RootState::Prepared).await.unwrap();
    assert!(matches!(world.go(RootState::Active).await.unwrap_err(), RotationError::NotDue(_)), "it is not published");
}

#[tokio::test(start_paused = true)]
async fn a_distrusted_root_is_replaced_at_once_and_leaves_with_the_last_certificate() {
    let mut world = World::published(2).await;
    let old = world.run.authority.root_fingerprint();
    world.distrust(old, Duration::from_secs(30)).await;
    assert_ne!(world.run.authority.root_fingerprint(), old);
    assert!(world.is_trusted(old), "connections go on until the certificates are there");
    world.rotation.walk_on().await.unwrap();
    assert_eq!(world.state_of(old), RootState::Draining);
    world.everybody_renews().await;
    world.rotation.walk_on().await.unwrap();
    assert_eq!(world.state_of(old), RootState::Distrusted);
    assert!(!world.is_trusted(old) && world.run.authority.trust().borrow().distrusted == [old]);
}

#[tokio::test(start_paused = true)]
async fn a_distrusted_root_leaves_at_the_deadline_whoever_is_missing_and_at_once_with_none() {
    let world = World::published(2).await;
    let old = world.run.authority.root_fingerprint();
    world.distrust(old, Duration::from_secs(30)).await;
    world.pass(Span::seconds(29)).await;
    world.rotation.walk_on().await.unwrap();
    assert_eq!(world.state_of(old), RootState::Draining);
    world.pass(Span::seconds(1)).await;
    world.rotation.walk_on().await.unwrap();
    assert_eq!(world.state_of(old), RootState::Distrusted);

    // With no replacement at hand, and no time.
    let last = world.run.authority.root_fingerprint();
    assert!(world.distrust(last, Duration::from_secs(30)).await.now.leave_by.is_some());
    assert_eq!(world.distrust(last, Duration::ZERO).await.now.state, RootState::Distrusted, "a shorter deadline counts");
    assert!(!world.is_trusted(last));
    assert!(!world.distrust(last, Duration::ZERO).await.changed);
}

#[tokio::test(start_paused = true)]
async fn a_root_that_is_being_distrusted_is_not_retired_whoever_orders_it() {
    let mut world = World::published(2).await;
    let old = world.run.authority.root_fingerprint();
    world.distrust(old, Duration::from_secs(30)).await;
    let force = Overrides { force: true, ..Overrides::default() };
    for overrides in [Overrides::default(), Overrides { except: vec!["node-1".into(), "node-2".into()], ..Overrides::default() }, force] {
        let gate = world.rotation.gate(None, RootState::Retired, &overrides).await.unwrap();
        assert!(gate.impossible().is_some_and(|why| why.contains("is being distrusted")), "{gate}");
        let error = world.go_with(RootState::Retired, &overrides).await.unwrap_err();
        assert!(matches!(error, RotationError::Ledger(LedgerError::Impossible(_))), "{error}");
    }
    world.everybody_renews().await;
    assert!(world.go(RootState::Retired).await.is_err(), "nor when nothing needs it any more");
    world.rotation.walk_on().await.unwrap();
    assert_eq!(world.run.authority.trust().borrow().distrusted, [old], "agents remember it");
}

#[tokio::test(start_paused = true)]
async fn no_distrust_waits_for_another_ones_deadline() {
    let mut world = World::activated(2).await;
    let first = world.rotation.find(None, &[RootState::Draining]).unwrap();
    let second = world.run.authority.root_fingerprint();
    world.everybody_renews().await;
    for to in [RootState::Prepared, RootState::Published, RootState::Active] {
        world.go(to).await.unwrap();
        world.everybody_reports();
    }
    // What everybody has chains to the second one.
    world.distrust(second, Duration::from_secs(30)).await;
    world.distrust(first, Duration::from_secs(60)).await;
    assert_eq!([first, second].map(|root| world.state_of(root)), [RootState::Distrusted, RootState::Draining]);
}

#[tokio::test(start_paused = true)]
async fn a_root_that_is_being_distrusted_leaves_when_so_much_time_has_passed_however_the_clock_is_set_meanwhile() {
    for set in [-Span::DAY, Span::DAY] {
        let world = World::published(2).await;
        let old = world.run.authority.root_fingerprint();
        world.distrust(old, Duration::from_secs(30)).await;
        world.ca.clock.advance(set);
        world.pass(Span::seconds(29)).await;
        world.rotation.walk_on().await.unwrap();
        assert_eq!(world.state_of(old), RootState::Draining, "set by {set}");
        // A longer deadline than what is left changes nothing, whatever the clock says.
        assert!(!world.distrust(old, Duration::from_secs(5)).await.changed, "set by {set}");
        world.pass(Span::seconds(1)).await;
        world.rotation.walk_on().await.unwrap();
        assert_eq!(world.state_of(old), RootState::Distrusted, "set by {set}");
    }
    // Nor does a shorter one wait for the clock.
    let world = World::published(2).await;
    let old = world.run.authority.root_fingerprint();
    world.distrust(old, Duration::from_secs(30)).await;
    world.ca.clock.advance(Span::DAY);
    assert_eq!(world.distrust(old, Duration::ZERO).await.now.state, RootState::Distrusted);
}

#[tokio::test(start_paused = true)]
async fn after_a_start_a_distrusted_root_stays_no_longer_than_was_ordered() {
    let world = World::published(2).await;
    let old = world.run.authority.root_fingerprint();
    world.ca.clock.advance(Span::DAY);
    world.distrust(old, Duration::from_secs(30)).await;
    world.ca.clock.advance(-Span::DAY);
    let world = world.restart().await;
    world.rotation.walk_on().await.unwrap();
    world.pass(Span::seconds(29)).await;
    world.rotation.walk_on().await.unwrap();
    assert_eq!(world.state_of(old), RootState::Draining);
    world.pass(Span::seconds(1)).await;
    world.rotation.walk_on().await.unwrap();
    assert_eq!(world.state_of(old), RootState::Distrusted);
}

#[tokio::test(start_paused = true)]
async fn a_distrust_that_has_begun_is_finished_by_a_ca_that_was_killed() {
    let world = World::published(1).await;
    let old = world.run.authority.root_fingerprint();
    let change = Change::BeginDistrust { root: old, leave_by: world.ca.clock.now() + Span::seconds(30) };
    // The kill comes right after the first act.
    world.run.ledger.act("local:uid=0", change, WHY).await.unwrap();
    let world = world.restart().await;
    world.rotation.walk_on().await.unwrap();
    assert_eq!(world.state_of(old), RootState::Draining);
    let world = world.restart().await;
    world.pass(Span::seconds(30)).await;
    world.rotation.walk_on().await.unwrap();
    assert_eq!(world.state_of(old), RootState::Distrusted);
}

#[tokio::test(start_paused = true)]
async fn a_replacement_is_kept_published_where_it_is_wanted() {
    let world = World::new(0).await;
    world.rotation.walk_on().await.unwrap();
    assert_eq!(world.run.ledger.current_state().roots.len(), 1, "not in development");
    world.rotation.configure(Settings { keep_replacement: Some(true), ..Settings::default() });
    for _ in 0..2 {
        world.rotation.walk_on().await.unwrap();
        let state = world.run.ledger.current_state();
        let states: Vec<_> = state.roots.values().map(|root| root.state).collect();
        assert!(states.len() == 2 && states.contains(&RootState::Published), "{states:?}");
    }
}

/// A CA, and the replacement that it has kept for so long that it is to have another.
async fn with_an_aged_replacement() -> (World, Fingerprint) {
    let world = World::new(0).await;
    world.rotation.configure(Settings { keep_replacement: Some(true), ..Settings::default() });
    world.rotation.walk_on().await.unwrap();
    let first = world.rotation.find(None, &[RootState::Published]).unwrap();
    world.pass(Span::days(200)).await;
    world.run.authority.tick(world.ca.clock.now()).await.unwrap();
    (world, first)
}

#[tokio::test(start_paused = true)]
async fn a_replacement_that_aged_while_it_waited_makes_way_for_a_new_one() {
    let (world, first) = with_an_aged_replacement().await;
    world.rotation.walk_on().await.unwrap();
    let second = world.rotation.find(None, &[RootState::Published]).unwrap();
    assert_ne!(first, second);
    assert_eq!((world.state_of(first), world.is_trusted(second)), (RootState::Retired, true));
}

#[tokio::test(start_paused = true)]
async fn a_restored_ca_keeps_every_published_root_and_does_what_else_is_due() {
    let (world, first) = with_an_aged_replacement().await;
    let roots_kept_until = world.ca.clock.now() + Span::DAY;
    world.run.ledger.act("local:uid=0", Change::Restored { entries: 7, roots_kept_until, trust_floor: 0, epoch: 0 }, WHY).await.unwrap();
    // The backup may be older than an activation of the first one.
    world.rotation.walk_on().await.unwrap();
    let second = world.rotation.find(None, &[RootState::Published]).unwrap();
    assert_eq!([first, second].map(|root| world.state_of(root)), [RootState::Published; 2]);
    let gate = world.rotation.gate(Some(&first.to_string()), RootState::Retired, &Overrides::default()).await.unwrap();
    assert!(gate.to_string().contains("restored from a backup"), "{gate}");
    world.pass(Span::DAY).await;
    world.rotation.walk_on().await.unwrap();
    assert_eq!(world.state_of(first), RootState::Retired);
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_done_keeps_nothing_else_from_being_done() {
    let world = World::activated(2).await;
    for to in [RootState::Prepared, RootState::Published] {
        world.go(to).await.unwrap();
    }
    let leave_by = world.ca.clock.now() + Span::MINUTE;
    let change = Change::BeginDistrust { root: world.run.authority.root_fingerprint(), leave_by };
    world.run.ledger.act("local:uid=0", change, WHY).await.unwrap();
    world.ca.store.set_commits(crate::authority::testing::Commits::Full);
    assert!(world.rotation.walk_on().await.is_err(), "no other root can be activated");
    assert_eq!(world.rotation.reissues.lock().await.told().count(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_gate_is_evaluated_anew_when_another_act_came_first() {
    let world = World::published(1).await;
    let root = world.rotation.find(None, &[RootState::Published]).unwrap();
    let state = world.run.ledger.current_state();
    world.run.ledger.act("local:uid=0", Change::Ban { agent: id(7), until: OffsetDateTime::UNIX_EPOCH }, WHY).await.unwrap();
    let overrides = Overrides::default();
    let order = Order { actor: "local:uid=0", why: WHY, overrides: &overrides };
    let change = Change::Root { root, to: RootState::Active, overrides: overrides.clone() };
    assert!(matches!(world.rotation.act_at(state.epoch, order, change).await, Err(Attempt::Moved)));
    assert!(world.go(RootState::Active).await.unwrap().changed);
}

#[tokio::test(start_paused = true)]
async fn no_root_is_retired_while_a_certificate_may_be_alive_that_was_lost() {
    let ca = TestCa::new();
    let kept_until = ca.clock.now() + Span::hours(2);
    let loss = Change::AcceptedLoss {
        origin: "example.org/chancery/0123".into(),
        checkpoint: "note".into(),
        missing: 7..9,
        trust_floor: 1000,
        roots_kept_until: kept_until,
        epoch: 0,
    };
    ca.ledger().await.accept_loss("local:uid=0", loss, WHY, |_| State::default()).await.unwrap();
    let mut world = World::of(ca).await;
    assert!(world.run.authority.trust().borrow().sequence > 1000, "greater than any that agents were given before");
    roots_stay_for_two_hours(&mut world).await;
}

#[tokio::test(start_paused = true)]
async fn a_ledger_restored_from_a_backup_may_lack_certificates_and_roots_stay_where_they_are() {
    let ca = TestCa::new();
    let roots_kept_until = ca.clock.now() + Span::hours(2);
    let mut world = World::of(ca).await;
    world.run.ledger.act("local:uid=0", Change::Restored { entries: 7, roots_kept_until, trust_floor: 0, epoch: 0 }, WHY).await.unwrap();
    roots_stay_for_two_hours(&mut world).await;
}

/// An activation can be forced, a retirement cannot.
async fn roots_stay_for_two_hours(world: &mut World) {
    let force = Overrides { force: true, ..Overrides::default() };
    let is_refused = |refused: String| refused.contains("the ledger was restored from a backup");
    world.issue(1).await;
    for to in [RootState::Prepared, RootState::Published] {
        world.report(1);
        world.go(to).await.unwrap();
    }
    world.report(1);
    assert!(is_refused(refused(world.go(RootState::Active).await)));
    world.go_with(RootState::Active, &force).await.unwrap();
    world.everybody_renews().await;
    assert!(is_refused(refused(world.go_with(RootState::Retired, &force).await)));
    world.pass(Span::hours(2)).await;
    world.everybody_renews().await;
    world.go(RootState::Retired).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn certificates_are_issued_anew_so_many_a_second_and_all_at_once_in_an_emergency() {
    let mut world = World::activated(3).await;
    let old = world.rotation.find(None, &[RootState::Draining]).unwrap();
    // An agent that holds as many as are issued anew in two seconds, and expires before the others.
    for agent in 1..=3 {
        world.report_as(agent, |report| {
            report.first_expiry_ms = i64::from(agent != 2) + 1;
            report.workloads = if agent == 2 { 1000 } else { 1 };
        });
    }
    let told = async |world: &World| {
        world.rotation.walk_on().await.unwrap();
        let reissues = world.rotation.reissues.lock().await;
        reissues.told().cloned().collect::<Vec<_>>()
    };
    for _ in 0..10 {
        assert_eq!(told(&world).await, [id(2)], "the one that expires first, and then no more, however often it is asked");
    }
    world.pass(Span::seconds(1)).await;
    assert_eq!(told(&world).await, [id(2)]);
    world.pass(Span::seconds(2)).await;
    assert_eq!(told(&world).await.len(), 3);
    world.rotation = World::rotation(&world.ca, &world.run, &world.fleet);
    world.distrust(old, Duration::from_secs(30)).await;
    assert_eq!(told(&world).await.len(), 3);
}
