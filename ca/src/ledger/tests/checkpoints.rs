//! Published checkpoints: each one continues the one before, whatever happens to the process, the disk and the log.

use std::path::Path;

use chancery_identity::checkpoint::{Checkpoint, CheckpointError, GrowingTree, leaf_hash, verify, verify_consistency};

use super::*;
use crate::keys::KeyManager as _;
use crate::ledger::checkpoints;
use crate::store::embedded::files::{self, LogFiles, SystemFiles};

const FILE: &str = "/data/checkpoint";

impl Place {
    fn ledger_keys(&self) -> Arc<FileKeyManager> {
        Arc::new(FileKeyManager::open(self.keys.path().join("ledger-keys")).unwrap())
    }

    async fn checkpoints(&self, ledger: &Ledger) -> Checkpoints {
        self.try_checkpoints(ledger).await.unwrap()
    }

    async fn try_checkpoints(&self, ledger: &Ledger) -> Result<Checkpoints, PublishError> {
        Checkpoints::open(ledger.clone(), self.ledger_keys(), Arc::new(self.files.clone()), FILE.into(), self.clock.clone()).await
    }
}

/// The root of the first `size` entries of `ledger`, made of the entries themselves.
async fn root(ledger: &Ledger, size: u64) -> [u8; 32] {
    let mut tree = GrowingTree::default();
    for entry in ledger.store().read(0..size, usize::MAX).await.unwrap() {
        tree.push(leaf_hash(&entry));
    }
    tree.root()
}

#[tokio::test]
async fn each_checkpoint_is_signed_and_continues_the_one_before() {
    let place = Place::new();
    let ledger = place.ledger().await;
    let checkpoints = place.checkpoints(&ledger).await;
    let mut last = checkpoints.newest();
    assert_eq!((last.checkpoint.size, last.checkpoint.origin.as_str()), (0, ledger.origin()));
    for number in 1..5 {
        ledger.append_all(vec![start("1"); 100]).await.unwrap();
        let next = checkpoints.publish().await.unwrap();
        assert_eq!(next.checkpoint.size, number * 100);
        assert_eq!(next.checkpoint.root, root(&ledger, number * 100).await);
        assert_eq!(verify(&next.note, &checkpoints.verifiers()).unwrap(), next.checkpoint);
        let proof = ledger.consistency_proof(last.checkpoint.size, next.checkpoint.size).await.unwrap();
        verify_consistency(&last.checkpoint, &next.checkpoint, &proof).unwrap();
        assert_eq!(place.files.content(Path::new(FILE)).unwrap(), next.note.as_bytes());
        last = next;
    }
    assert_eq!(checkpoints.publish().await.unwrap().note, last.note, "nothing new");
}

#[tokio::test]
async fn a_restarted_ca_goes_on_from_its_checkpoint() {
    let place = Place::new();
    let ledger = place.ledger().await;
    let checkpoints = place.checkpoints(&ledger).await;
    ledger.append_all(vec![start("1"); 3]).await.unwrap();
    let published = checkpoints.publish().await.unwrap();
    let key = checkpoints.verifiers();
    ledger.append(start("2")).await.unwrap();
    ledger.close().await.unwrap();
    drop((checkpoints, ledger));
    let ledger = place.ledger().await;
    let checkpoints = place.checkpoints(&ledger).await;
    assert_eq!(checkpoints.verifiers(), key);
    let next = checkpoints.newest();
    assert_eq!(next.checkpoint.size, 4, "opening publishes what is new");
    let proof = ledger.consistency_proof(3, 4).await.unwrap();
    verify_consistency(&published.checkpoint, &next.checkpoint, &proof).unwrap();
}

#[tokio::test]
async fn new_entries_are_published_within_a_second_and_word_is_given() {
    let place = Place::new();
    let ledger = place.ledger().await;
    let checkpoints = Arc::new(place.checkpoints(&ledger).await);
    let mut newest = checkpoints.watch();
    let stop = tokio_util::sync::CancellationToken::new();
    let running = tokio::spawn({
        let (checkpoints, stop) = (checkpoints.clone(), stop.clone());
        async move { checkpoints.run(stop).await }
    });
    ledger.append(start("1")).await.unwrap();
    newest.wait_for(|newest| newest.checkpoint.size == 1).await.unwrap();
    ledger.append(start("2")).await.unwrap();
    stop.cancel();
    running.await.unwrap();
    assert_eq!(checkpoints.newest().checkpoint.size, 2, "the last ones are published at the end");
    assert_eq!(checkpoints.problem(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_who_come_together_share_a_checkpoint() {
    let place = Place::new();
    let ledger = place.ledger().await;
    let checkpoints = Arc::new(place.checkpoints(&ledger).await);
    ledger.append(start("1")).await.unwrap();
    // The tree has its first file then.
    ledger.tree_root(1).await.unwrap();
    place.files.delay_syncs(Duration::from_millis(5));
    let before = place.files.syncs();
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..50 {
        let checkpoints = checkpoints.clone();
        callers.spawn(async move { checkpoints.publish().await.unwrap().checkpoint.size });
    }
    assert_eq!(callers.join_all().await, [1; 50]);
    // The floor and the note: file and directory each.
    assert_eq!(place.files.syncs() - before, 4);
}

/// A ledger in `dir` of the machine's own disk, with the keys of `place`.
async fn on_disk(place: &Place, dir: &Path) -> Ledger {
    let options = Options {
        dictionary_dimensions: DICTIONARY_DIMENSIONS.to_vec(),
        segment_bytes: 1 << 20,
        ..Options::new(Arc::new(EntryTerms), place.clock.clone())
    };
    let store: SharedStore = Arc::new(EmbeddedStore::open(dir, options).await.unwrap().store);
    Ledger::open(store, place.clock.clone(), place.options()).await.unwrap()
}

#[tokio::test]
async fn an_old_backup_and_another_history_are_refused_by_name() {
    let place = Place::new();
    let (data, backup) = (place.dir.path().join("data"), place.dir.path().join("backup"));
    let ledger = on_disk(&place, &data).await;
    let published = place.checkpoints(&ledger).await;
    ledger.append_all(vec![start("1"); 3]).await.unwrap();
    ledger.close().await.unwrap();
    let copied = std::process::Command::new("cp").arg("-a").args([&data, &backup]).status().unwrap();
    assert!(copied.success(), "{copied}");
    drop((published, ledger));
    let ledger = on_disk(&place, &data).await;
    ledger.append_all(vec![start("2"); 2]).await.unwrap();
    let published = place.checkpoints(&ledger).await;
    assert_eq!(published.newest().checkpoint.size, 5);

    let restored = on_disk(&place, &backup).await;
    let refused = place.try_checkpoints(&restored).await.unwrap_err();
    assert!(matches!(refused, PublishError::EntriesMissing { entries: 3, published: 5, .. }), "{refused}");
    assert!(refused.to_string().contains("chancery-ca restore") && refused.to_string().contains(FILE), "{refused}");
    restored.append_all(vec![start("3"); 2]).await.unwrap();
    for _ in 0..2 {
        let refused = place.try_checkpoints(&restored).await.unwrap_err();
        assert!(matches!(refused, PublishError::OtherHistory { size: 5, .. }), "{refused}");
        restored.append(start("4")).await.unwrap();
    }
    assert_eq!(place.files.content(Path::new(FILE)).unwrap(), published.newest().note.as_bytes(), "nothing was signed over it");
}

/// The note of `checkpoint`, with the key that signs those of `of`.
async fn signed(place: &Place, of: &Checkpoints, checkpoint: Checkpoint) -> String {
    let bytes = place.ledger_keys().sign("checkpoint", checkpoint.to_string().as_bytes()).await.unwrap();
    let signature = chancery_identity::checkpoint::Signature { key: of.verifiers()[0].clone(), bytes };
    chancery_identity::checkpoint::assemble(&checkpoint, &[signature]).unwrap()
}

#[tokio::test]
async fn a_log_that_ends_behind_a_seal_and_is_refused_for_its_checkpoint_is_left_as_it_is() {
    let place = Place { segment_bytes: 32 << 10, ..Place::new() };
    let ledger = place.ledger().await;
    act(&ledger).await.unwrap();
    while ledger.store().sealed() == 0 {
        ledger.append(start(&"x".repeat(1000))).await.unwrap();
    }
    let checkpoints = place.checkpoints(&ledger).await;
    let newest = checkpoints.newest().checkpoint.clone();
    let note = signed(&place, &checkpoints, Checkpoint { size: newest.size + 1, ..newest.clone() }).await;
    files::replace(&place.files, Path::new(FILE), note.as_bytes()).unwrap();
    ledger.close().await.unwrap();
    drop((checkpoints, ledger));

    let ledger = place.ledger().await;
    let refused = place.try_checkpoints(&ledger).await.unwrap_err();
    assert!(matches!(refused, PublishError::EntriesMissing { .. }), "{refused}");
    // Whatever was begun when it was opened has time to be done.
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(ledger.store().head().await.unwrap().entries, newest.size, "no state was signed behind its end");
}

#[tokio::test]
async fn what_an_agent_has_proven_ends_the_ledger_and_keeps_it_from_being_opened_again() {
    const CONFLICT: &str = "/data/checkpoint.conflict";
    // More entries, and as many but others.
    for (more, root) in [(5, [9; 32]), (0, [9; 32])] {
        let place = Place::new();
        let ledger = place.ledger().await;
        let checkpoints = place.checkpoints(&ledger).await;
        ledger.append_all(vec![start("1"); 3]).await.unwrap();
        let published = checkpoints.publish().await.unwrap();
        let theirs = Checkpoint { size: 3 + more, root, ..published.checkpoint.clone() };
        let note = signed(&place, &checkpoints, theirs).await;
        ledger.contradicted(Contradiction { shown_by: "an agent".into(), note: note.clone(), size: 3 + more, entries: 3 });

        let refusals = [ledger.append(start("2")).await.unwrap_err(), act(&ledger).await.unwrap_err()];
        for refusal in refusals {
            assert!(matches!(refusal, LedgerError::Contradicted(_)) && refusal.is_retryable(), "{refusal}");
            for said in ["an agent showed", &format!("{} entries", 3 + more), "--accept-loss", "checkpoint.conflict"] {
                assert!(refusal.to_string().contains(said), "{said}: {refusal}");
            }
        }
        assert!(matches!(&*ledger.health().borrow(), LedgerHealth::Contradicted(_)));
        checkpoints.rotate_key("local:uid=0", "why not").await.unwrap_err();
        run_once(&checkpoints).await;
        assert_eq!(place.files.content(Path::new(CONFLICT)).unwrap(), note.as_bytes());
        assert_eq!(place.files.content(Path::new(FILE)).unwrap(), published.note.as_bytes(), "both are kept");
        ledger.close().await.unwrap();
        drop((checkpoints, ledger));

        let ledger = place.ledger().await;
        let refused = place.try_checkpoints(&ledger).await.unwrap_err().to_string();
        assert!(refused.contains(CONFLICT) && refused.contains("--accept-loss"), "{refused}");
        assert_eq!(ledger.entries(), 3);

        // Should the ledger turn out to be the one that the agent was shown, after all.
        files::replace(&place.files, Path::new(CONFLICT), published.note.as_bytes()).unwrap();
        place.checkpoints(&ledger).await;
        assert_eq!(place.files.content(Path::new(CONFLICT)), None);
    }
}

#[tokio::test]
async fn a_ledger_that_forks_while_it_is_open_is_not_published() {
    let place = Place::new();
    let ledger = place.ledger().await;
    let checkpoints = place.checkpoints(&ledger).await;
    ledger.append(start("1")).await.unwrap();
    let published = checkpoints.publish().await.unwrap();
    // What another CA with the same keys would have published, over another entry.
    let note = signed(&place, &checkpoints, Checkpoint { root: [9; 32], ..published.checkpoint.clone() }).await;
    files::replace(&place.files, Path::new(FILE), note.as_bytes()).unwrap();
    ledger.append(start("2")).await.unwrap();
    let refused = checkpoints.publish().await.unwrap_err();
    assert!(matches!(refused, PublishError::OtherHistory { .. }), "{refused}");
    assert_eq!(place.files.content(Path::new(FILE)).unwrap(), note.as_bytes());
}

#[tokio::test]
async fn a_checkpoint_that_this_ca_has_not_signed_is_refused() {
    let place = Place::new();
    let ledger = place.ledger().await;
    drop(place.checkpoints(&ledger).await);
    let note = place.files.content(Path::new(FILE)).unwrap();
    for at in [0, 60, note.len() / 2, note.len() - 2] {
        place.files.tamper(Path::new(FILE), |content| content[at] ^= 1);
        let refused = place.try_checkpoints(&ledger).await.unwrap_err();
        assert!(matches!(refused, PublishError::Unreadable { .. }), "byte {at}: {refused}");
        assert!(refused.to_string().contains("from the same backup"), "{refused}");
        place.files.tamper(Path::new(FILE), |content| content[at] ^= 1);
    }
    place.ledger_keys().destroy("checkpoint").await.unwrap();
    let refused = place.try_checkpoints(&ledger).await.unwrap_err();
    assert!(matches!(refused, PublishError::Unreadable { problem: CheckpointError::NotSigned(_), .. }), "{refused}");
    assert_eq!(place.ledger_keys().list().await.unwrap().iter().filter(|name| name.starts_with("checkpoint")).count(), 0);

    let another = Place::new();
    let ledger = another.ledger().await;
    another.files.create(Path::new(FILE)).unwrap().write_at(&note, 0).unwrap();
    let refused = another.try_checkpoints(&ledger).await.unwrap_err();
    assert!(matches!(refused, PublishError::Unreadable { problem: CheckpointError::OtherOrigin { .. }, .. }), "{refused}");
}

#[tokio::test]
async fn a_rotated_key_is_an_entry_and_signs_beside_the_old_one_for_a_while() {
    let place = Place::new();
    let ledger = place.ledger().await;
    let checkpoints = place.checkpoints(&ledger).await;
    checkpoints.record_keys().await.unwrap();
    let old = checkpoints.verifiers().remove(0);
    let new = checkpoints.rotate_key("local:uid=0", "once a year").await.unwrap();
    let recorded: Vec<_> = ledger.state().borrow().checkpoint_keys.iter().map(|known| known.key).collect();
    assert_eq!(recorded, [*old.public_key(), *new.public_key()]);
    let both = checkpoints.newest();
    assert_eq!((both.checkpoint.size, &both.verifier), (2, &new));
    assert_eq!(both.signed_by, [old.clone(), new.clone()], "the old one first");
    assert!(old.verify(&both.note).is_ok() && new.verify(&both.note).is_ok());

    // A restart changes nothing meanwhile, and another call is refused.
    let second = Duration::from_secs(1);
    place.clock.advance(checkpoints::OVERLAP.saturating_sub(second));
    let checkpoints = place.checkpoints(&ledger).await;
    checkpoints.record_keys().await.unwrap();
    let refused = checkpoints.rotate_key("local:uid=0", "again").await.unwrap_err();
    assert!(refused.to_string().contains("for 30 days"), "{refused}");
    run_once(&checkpoints).await;
    assert_eq!((ledger.entries(), &checkpoints.newest().note), (2, &both.note));

    place.clock.advance(second);
    run_once(&checkpoints).await;
    let last = checkpoints.newest();
    assert!(old.verify(&last.note).is_err() && new.verify(&last.note).is_ok());
    assert!(!place.ledger_keys().list().await.unwrap().contains(&"checkpoint".to_owned()), "it is destroyed");
    assert_eq!(place.checkpoints(&ledger).await.verifiers(), [new]);
}

#[tokio::test]
async fn a_key_that_could_not_be_recorded_signs_nothing_until_it_is() {
    let place = Place::new();
    let ledger = place.ledger().await;
    let checkpoints = place.checkpoints(&ledger).await;
    let keys = checkpoints.verifiers();
    place.files.fail_sync_after(0);
    checkpoints.rotate_key("local:uid=0", "once a year").await.unwrap_err();
    assert_eq!(checkpoints.verifiers(), keys);
    ledger.close().await.ok();
    drop((checkpoints, ledger));
    let ledger = place.ledger().await;
    let checkpoints = place.checkpoints(&ledger).await;
    checkpoints.record_keys().await.unwrap();
    assert_eq!(checkpoints.verifiers().len(), 2);
    assert_eq!(ledger.state().borrow().checkpoint_keys.len(), 2);
}

/// What it does at least once before it ends.
async fn run_once(checkpoints: &Checkpoints) {
    let stop = tokio_util::sync::CancellationToken::new();
    stop.cancel();
    checkpoints.run(stop).await;
    assert_eq!(checkpoints.problem(), None);
}

/// What one process shows before it ends, with the error that ended it.
async fn live(place: &Place, shown: &mut Vec<Arc<Published>>) -> Result<(), PublishError> {
    let store = loop {
        match place.try_store().await {
            // The process before is still ending.
            Err(StoreError::InUse(_)) => tokio::time::sleep(Duration::from_millis(1)).await,
            opened => break opened.map_err(LedgerError::from)?,
        }
    };
    let lived = async {
        let ledger = Ledger::open(Arc::clone(&store), place.clock.clone(), place.options()).await?;
        let checkpoints = place.try_checkpoints(&ledger).await?;
        shown.push(checkpoints.newest());
        for _ in 0..4 {
            ledger.append_all(vec![start("1"); 5]).await?;
            shown.push(checkpoints.publish().await?);
        }
        Ok(())
    };
    let lived = lived.await;
    store.close().await.ok();
    lived
}

/// Publishes under `fault` and goes on after it; every checkpoint that was shown must be the beginning of what follows. Tells how many
/// changes and syncs, and how many syncs, were within its reach.
async fn survives(seed: u64, fault: impl Fn(&FaultyFiles)) -> (u64, u64) {
    let place = Place { files: FaultyFiles::new(seed), segment_bytes: 4096, ..Place::new() };
    fault(&place.files);
    let mut shown = Vec::new();
    for _ in 0..3 {
        if place.files.is_off() {
            place.files.power_on();
        }
        match live(&place, &mut shown).await {
            Ok(())
            | Err(
                PublishError::File { .. }
                | PublishError::Ledger(LedgerError::Store(_) | LedgerError::Failed(StoreError::NotDurable { .. })),
            ) => {}
            Err(error) => panic!("seed {seed}: {error}"),
        }
    }
    let reach = (place.files.operations(), place.files.syncs());
    place.files.no_more_faults();
    if place.files.is_off() {
        place.files.power_on();
    }
    live(&place, &mut shown).await.unwrap();
    let store = loop {
        match place.try_store().await {
            Err(StoreError::InUse(_)) => tokio::time::sleep(Duration::from_millis(1)).await,
            opened => break opened.unwrap(),
        }
    };
    let ledger = Ledger::open(store, place.clock.clone(), place.options()).await.unwrap();
    let newest = shown.last().unwrap().checkpoint.clone();
    for shown in &shown {
        let size = shown.checkpoint.size;
        assert_eq!(root(&ledger, size).await, shown.checkpoint.root, "seed {seed}: the checkpoint with {size} entries");
        let proof = ledger.consistency_proof(size, newest.size).await.unwrap();
        verify_consistency(&shown.checkpoint, &newest, &proof).unwrap();
    }
    reach
}

#[tokio::test(flavor = "multi_thread")]
async fn every_checkpoint_shown_is_the_beginning_of_what_follows_a_power_cut() {
    for place in 0..survives(0, |_| ()).await.0 {
        survives(place, |files| files.cut_power_after(place)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_checkpoint_shown_is_the_beginning_of_what_follows_a_failed_sync() {
    for place in 0..survives(0, |_| ()).await.1 {
        survives(place, |files| files.fail_sync_after(place)).await;
    }
}

#[test]
fn the_file_is_for_its_owner_alone() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("checkpoint");
    files::replace(&SystemFiles, &path, b"note").unwrap();
    assert_eq!(std::fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600);
}
