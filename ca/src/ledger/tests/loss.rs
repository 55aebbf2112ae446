//! Logs that continue one which was lost in part.

use chancery_identity::Fingerprint;

use super::acts::verifier;
use super::*;
use crate::ledger::acts::{Fold, Overrides, RootState, State, Subject};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

fn loss() -> Change {
    Change::AcceptedLoss {
        origin: "example.org/chancery/0123".into(),
        checkpoint: "note".into(),
        missing: 100..120,
        trust_floor: 1000,
        roots_kept_until: START + DAY,
        epoch: 3,
    }
}

fn root(number: u8, to: RootState) -> Change {
    Change::Root { root: Fingerprint([number; 32]), to, overrides: Overrides::default() }
}

fn agent(number: u64) -> chancery_identity::SpiffeId {
    format!("spiffe://example.org/chancery/agent/east/{}", uuid(number)).parse().unwrap()
}

/// What the acts of a log led to, of which the end is lost; larger than an entry.
async fn old_state() -> State {
    let place = Place::new();
    let old = place.ledger().await;
    let mut changes =
        vec![root(1, RootState::Active), root(2, RootState::Prepared), root(2, RootState::Published), root(2, RootState::Active)];
    changes.push(Change::Revoke { subject: Subject::Pod(uuid(7)), until: START + DAY });
    changes.push(Change::CheckpointKey([9; 32]));
    changes.extend((0..1000).map(|number| Change::Ban { agent: agent(number), until: START }));
    for change in changes {
        old.act("alice", change, "because").await.unwrap();
    }
    State::clone(&old.current_state())
}

/// A log that continues it.
async fn continued(place: &Place) -> (Ledger, State) {
    let (ledger, carried) = (place.ledger().await, old_state().await);
    ledger.accept_loss("local:uid=0", loss(), "the disk is gone", |_| carried.clone()).await.unwrap();
    (ledger, carried)
}

#[tokio::test]
async fn a_log_that_continues_a_lost_one_says_so_first_and_goes_on_from_its_state() {
    let place = Place::new();
    let (ledger, carried) = continued(&place).await;
    let act = ledger.list_acts(&super::super::acts::ActFilter::default(), 10, None).await.unwrap().acts.pop().unwrap();
    assert_eq!((act.index, &*act.act.action, &*act.act.why), (0, "log.accept-loss", "the disk is gone"));
    assert!(act.act.target.ends_with("0123: entries 100 to 119"), "{}", act.act.target);
    assert!(ledger.entries() > 2, "the state has parts");
    ledger.act("alice", Change::Unban(agent(1)), "it is back").await.unwrap();
    let state = ledger.current_state();
    assert_eq!(
        (&state.roots, &state.revocations, &state.checkpoint_keys),
        (&carried.roots, &carried.revocations, &carried.checkpoint_keys)
    );
    assert_eq!((state.bans.len(), state.epoch, state.trust_floor()), (999, 2, 1000));
    ledger.close().await.unwrap();
    drop(ledger);

    let ledger = place.ledger().await;
    assert_eq!(*ledger.current_state(), *state, "a restart finds the same");
    let mut fold = Fold::genesis(verifier(&place, &ledger).await);
    for index in 0..ledger.entries() {
        let entry = ledger.entry(index).await.unwrap().unwrap();
        match entry.body {
            Body::State(_) => fold.check_state(index, entry.bytes()).unwrap(),
            _ => fold.act(index, entry.bytes()).unwrap(),
        }
    }
    assert_eq!(*fold.state(), *state, "and so does whoever folds it from the beginning");
}

#[tokio::test]
async fn a_state_is_carried_over_directly_behind_an_accepted_loss_alone_and_not_left_out() {
    let place = Place::new();
    let (ledger, _) = continued(&place).await;
    ledger.act("alice", Change::Unban(agent(1)), "it is back").await.unwrap();
    let end = ledger.entries();
    let mut entries = Vec::new();
    for index in 0..end {
        entries.push(ledger.entry(index).await.unwrap().unwrap().bytes().clone());
    }
    let genesis = Fold::genesis(verifier(&place, &ledger).await);
    let after_the_loss = || {
        let mut fold = genesis.clone();
        fold.act(0, &entries[0]).unwrap();
        fold
    };
    assert!(after_the_loss().act(1, entries.last().unwrap()).is_err(), "the state is left out");
    assert!(after_the_loss().check_state(2, &entries[1]).is_err(), "something stands between");
    assert!(after_the_loss().check_state(1, &entries[2]).is_err(), "its first part is left out");
    assert!(genesis.clone().check_state(0, &entries[1]).is_err(), "the loss is left out");
    let mut behind_another_entry = genesis.clone();
    assert!(behind_another_entry.act(1, &entries[0]).is_err());
}

#[tokio::test]
async fn a_running_log_accepts_no_loss() {
    let place = Place::new();
    let ledger = place.ledger().await;
    let error = ledger.act("alice", loss(), "why not").await.unwrap_err().to_string();
    assert!(error.contains("chancery-ca restore --accept-loss"), "{error}");
    ledger.append(start("1")).await.unwrap();
    let refused = ledger.accept_loss("alice", loss(), "why not", |_| State::default()).await;
    assert!(matches!(refused, Err(LedgerError::Impossible(_))));
    assert_eq!(ledger.entries(), 1);
}

#[tokio::test]
async fn no_root_is_retired_while_certificates_may_be_valid_that_the_log_lacks() {
    let place = Place::new();
    let (ledger, _) = continued(&place).await;
    let retire = || ledger.act("alice", root(1, RootState::Retired), "it is old");
    place.clock.set(START + DAY - Duration::from_millis(1));
    let error = retire().await.unwrap_err().to_string();
    assert!(error.contains("no root is retired before 2026-03-02 12:00"), "{error}");
    ledger.act("alice", root(3, RootState::Distrusted), "it is stolen").await.unwrap();
    place.clock.set(START + DAY);
    retire().await.unwrap();
}

#[tokio::test]
async fn who_was_kept_from_certificates_by_lost_acts_is_so_again_on_the_proof_of_their_signatures() {
    let place = Place::new();
    let old = place.ledger().await;
    let ban = |number| Change::Ban { agent: agent(number), until: START };
    let revoke = |subject| Change::Revoke { subject, until: START + DAY };
    let (pod, serial, allowed) = (Subject::Pod(uuid(7)), Subject::Serial(chancery_identity::Serial([7; 16])), Subject::SpiffeId(agent(8)));
    // The first two are in the backup, and the second is taken back after the loss.
    let changes = [ban(1), ban(2), ban(3), revoke(pod.clone()), revoke(serial.clone()), revoke(allowed.clone()), Change::Allow(allowed)];
    for change in changes {
        old.act("alice", change, "because").await.unwrap();
    }
    let (origin, told) = (old.origin().to_owned(), old.standing_acts().await.unwrap());
    assert_eq!(told.len(), 5, "but not what is allowed again");
    old.close().await.unwrap();

    let place = Place { dir: tempfile::tempdir().unwrap(), ..place };
    let ledger = place.ledger().await;
    let Change::AcceptedLoss { checkpoint, missing, trust_floor, roots_kept_until, .. } = loss() else { panic!() };
    let loss = Change::AcceptedLoss { origin: origin.clone(), checkpoint, missing, trust_floor, roots_kept_until, epoch: 2 };
    ledger.accept_loss("local:uid=0", loss, "the disk is gone", |_| State::default()).await.unwrap();
    let mut forged = told.iter().map(|entry| entry.to_vec()).collect::<Vec<_>>();
    for entry in &mut forged {
        *entry.iter_mut().rev().nth(80).unwrap() ^= 1;
    }
    let forged: Vec<_> = forged.into_iter().map(Bytes::from).collect();
    let stranger = Place::new();
    let strangers = stranger.ledger().await;
    strangers.act("mallory", ban(9), "because").await.unwrap();
    let foreign = strangers.standing_acts().await.unwrap();
    for (origin, entries) in [(&*origin, &forged), (&origin, &foreign), (strangers.origin(), &foreign), (ledger.origin(), &told)] {
        assert_eq!(ledger.recover_acts(origin, entries, "an agent").await.unwrap(), 0);
    }
    assert_eq!(ledger.current_state().epoch, 1);

    assert_eq!(ledger.recover_acts(&origin, &told, "an agent").await.unwrap(), 3);
    assert_eq!(ledger.recover_acts(&origin, &told, "another agent").await.unwrap(), 0, "each once");
    let state = ledger.current_state();
    assert_eq!(state.bans.keys().collect::<Vec<_>>(), [&agent(3)]);
    assert_eq!(state.revocations.contains_key(&pod), state.revocations.contains_key(&serial));
    assert!(state.revocations.contains_key(&pod));
    let act = ledger.list_acts(&super::super::acts::ActFilter::default(), 3, None).await.unwrap().acts.pop().unwrap();
    assert!(act.act.why.contains("by alice, brought by an agent"), "{}", act.act.why);

    ledger.act("alice", Change::Unban(agent(3)), "it was found").await.unwrap();
    assert_eq!(ledger.recover_acts(&origin, &told, "a third agent").await.unwrap(), 0, "an operator has let it go on");
}

/// A directory with what `from` has.
fn copied(from: &std::path::Path) -> TempDir {
    let to = tempfile::tempdir().unwrap();
    let copied = std::process::Command::new("cp").arg("-a").arg(from.join(".")).arg(to.path()).status().unwrap();
    assert!(copied.success(), "{copied}");
    to
}

/// The ledger of `place` on the machine's own disk.
async fn opened(place: &Place) -> Ledger {
    let options =
        Options { dictionary_dimensions: DICTIONARY_DIMENSIONS.to_vec(), ..Options::new(Arc::new(EntryTerms), place.clock.clone()) };
    let store: SharedStore = Arc::new(EmbeddedStore::open(place.dir.path(), options).await.unwrap().store);
    Ledger::open(store, place.clock.clone(), place.options()).await.unwrap()
}

#[tokio::test]
async fn a_log_that_was_restored_takes_its_own_lost_acts_back_while_that_is_in_force() {
    let place = Place::new();
    let ban = |number| Change::Ban { agent: agent(number), until: START };
    let old = opened(&place).await;
    for change in [ban(1), ban(2)] {
        old.act("alice", change, "because").await.unwrap();
    }
    old.close().await.unwrap();
    drop(old);
    let backup = copied(place.dir.path());
    let old = opened(&place).await;
    old.act("alice", ban(3), "its disk was stolen").await.unwrap();
    let (origin, told) = (old.origin().to_owned(), old.standing_acts().await.unwrap());
    old.close().await.unwrap();

    let place = Place { dir: backup, ..place };
    let ledger = opened(&place).await;
    assert_eq!(ledger.recover_acts(&origin, &told, "an agent").await.unwrap(), 0, "nobody said that it was restored");
    ledger.act("alice", Change::Unban(agent(1)), "it was found").await.unwrap();
    let restored = Change::Restored { entries: 2, roots_kept_until: START + DAY, trust_floor: 1000, epoch: 2 };
    ledger.act("local:uid=0", restored, "the disk is gone").await.unwrap();
    assert_eq!(ledger.recover_acts(&origin, &told, "an agent").await.unwrap(), 1);
    let bans = || ledger.current_state().bans.keys().cloned().collect::<Vec<_>>();
    assert_eq!(bans(), [agent(2), agent(3)], "but not what was in the backup, and taken back since");

    // What this log itself says of somebody since counts.
    ledger.act("alice", ban(4), "because").await.unwrap();
    let own = ledger.standing_acts().await.unwrap();
    for number in [3, 4] {
        ledger.act("alice", Change::Unban(agent(number)), "it was found").await.unwrap();
    }
    for acts in [&told, &own] {
        assert_eq!(ledger.recover_acts(&origin, acts, "another agent").await.unwrap(), 0);
    }
    assert_eq!(bans(), [agent(2)]);
    ledger.act("alice", Change::Unban(agent(2)), "it was found").await.unwrap();
    place.clock.set(START + DAY);
    assert_eq!(ledger.recover_acts(&origin, &told, "an agent").await.unwrap(), 0, "whatever was lost has expired");
}
