use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::path::Path;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// Dimension 1 has a dictionary, dimension 2 has none.
const DICTIONARY: [u8; 1] = [1];

/// An entry is a list of pairs: dimension, one letter.
#[derive(Debug)]
struct Pairs;

impl Terms for Pairs {
    fn terms(&self, entry: &Bytes) -> Vec<Term> {
        entry.chunks_exact(2).map(|pair| letter(pair[0], pair[1])).collect()
    }
}

fn letter(dimension: u8, letter: u8) -> Term {
    Term { dimension, value: Bytes::from(format!("value/{}", char::from(letter))) }
}

fn open(dir: &Path) -> Index {
    Index::open(dir, Arc::new(Pairs), &DICTIONARY).unwrap()
}

/// What an index of `entries` must answer.
fn expected(entries: &[Bytes], term: &Term, before: u64, limit: usize) -> Vec<u64> {
    let having = (0..before).zip(entries).filter(|(_, entry)| Pairs.terms(entry).contains(term)).map(|(index, _)| index);
    let mut having: Vec<_> = having.collect();
    having.reverse();
    having.truncate(limit);
    having
}

fn expected_values(entries: &[Bytes], after: Option<&[u8]>, limit: usize) -> Vec<Bytes> {
    let terms = entries.iter().flat_map(|entry| Pairs.terms(entry)).filter(|term| term.dimension == 1);
    let values: BTreeSet<_> = terms.map(|term| term.value).filter(|value| after.is_none_or(|after| value.as_ref() > after)).collect();
    values.into_iter().take(limit).collect()
}

/// Applies what is missing, as the log does, going on after failures.
fn catch_up(index: &Index, entries: &[Bytes]) {
    for _ in 0..20 {
        let next = index.applied();
        if index.apply(next, &entries[usize::try_from(next).unwrap()..]).is_ok() {
            return;
        }
    }
    panic!("the index does not catch up");
}

fn sample(count: usize) -> Vec<Bytes> {
    let pair = |index: usize| [1, b'a' + u8::try_from(index % 7).unwrap(), 2, b'a' + u8::try_from(index % 26).unwrap()];
    (0..count).map(|index| Bytes::copy_from_slice(&pair(index))).collect()
}

fn assert_complete(index: &Index, entries: &[Bytes]) {
    for dimension in [1, 2] {
        for value in b'a'..=b'z' {
            let term = letter(dimension, value);
            assert_eq!(index.look_up(&term, u64::MAX, usize::MAX).unwrap(), expected(entries, &term, u64::MAX, usize::MAX));
        }
    }
    assert_eq!(index.values(1, b"value/", None, usize::MAX).unwrap(), expected_values(entries, None, usize::MAX));
}

fn entries() -> impl Strategy<Value = Vec<Vec<Bytes>>> {
    let entry = vec((1..=2_u8, b'a'..=b'd'), 0..4).prop_map(|pairs| pairs.into_iter().flat_map(<[u8; 2]>::from).collect::<Bytes>());
    vec(vec(entry, 0..20), 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(ProptestConfig::default().cases / 8))]

    #[test]
    fn look_ups_find_what_a_scan_of_all_entries_finds(
        batches in entries(),
        questions in vec((1..=2_u8, b'a'..=b'd', 0..260_u64, 0..50_usize), 20),
        reopened_after in 0..12_usize,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut index = open(dir.path());
        let mut all = Vec::new();
        for (number, batch) in batches.into_iter().enumerate() {
            index.apply(all.len() as u64, &batch).unwrap();
            all.extend(batch);
            if number % 4 == 1 {
                index.flush().unwrap();
            }
            if number == reopened_after {
                drop(index);
                index = open(dir.path());
                catch_up(&index, &all);
            }
            prop_assert_eq!(index.applied(), all.len() as u64);
        }
        for (dimension, value, before, limit) in questions {
            let term = letter(dimension, value);
            prop_assert_eq!(index.look_up(&term, before, limit).unwrap(), expected(&all, &term, before, limit));
            let after = (limit % 2 == 0).then_some(&term.value[..]);
            prop_assert_eq!(index.values(1, b"value/", after, limit).unwrap(), expected_values(&all, after, limit));
        }
    }
}

#[test]
fn a_gap_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let index = open(dir.path());
    index.apply(0, &sample(3)).unwrap();
    assert!(matches!(index.apply(4, &sample(1)), Err(StoreError::Invalid(_))));
    assert!(matches!(index.apply(2, &sample(1)), Err(StoreError::Invalid(_))));
    index.apply(3, &sample(1)).unwrap();
}

#[test]
fn values_are_listed_only_of_dimensions_with_a_dictionary() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(open(dir.path()).values(2, b"", None, 1), Err(StoreError::Invalid(_))));
}

#[test]
fn an_index_that_is_open_already_is_in_use() {
    let dir = tempfile::tempdir().unwrap();
    let _first = open(dir.path());
    assert!(matches!(Index::open(dir.path(), Arc::new(Pairs), &DICTIONARY), Err(StoreError::InUse(_))));
}

#[test]
fn a_cleared_index_is_empty_also_after_opening_again() {
    let dir = tempfile::tempdir().unwrap();
    let index = open(dir.path());
    index.apply(0, &sample(100)).unwrap();
    index.clear().unwrap();
    assert_complete(&index, &[]);
    drop(index);
    let index = open(dir.path());
    assert_eq!(index.applied(), 0);
    // Values that were known before are written again.
    catch_up(&index, &sample(100));
    assert_complete(&index, &sample(100));
}

#[test]
fn a_deleted_index_is_built_anew() {
    let dir = tempfile::tempdir().unwrap();
    let entries = sample(100);
    catch_up(&open(dir.path()), &entries);
    fs::remove_dir_all(dir.path()).unwrap();
    let index = open(dir.path());
    assert_eq!(index.applied(), 0);
    catch_up(&index, &entries);
    assert_complete(&index, &entries);
}

/// More than are kept in memory, and common enough that their postings are split.
#[test]
fn many_entries_become_batches() {
    let dir = tempfile::tempdir().unwrap();
    let (index, entries) = (open(dir.path()), sample(200_000));
    for (first, batch) in (0..).step_by(7000).zip(entries.chunks(7000)) {
        index.apply(first, batch).unwrap();
        if first == 35_000 {
            index.flush().unwrap();
        }
    }
    let in_batches = index.with_opened(|opened| Ok(opened.tree.indexed())).unwrap();
    assert_eq!(in_batches, 175_000);
    for (before, limit) in [(u64::MAX, 30_000), (100_000, 5000), (70_001, 1), (10, 10)] {
        let term = letter(1, b'c');
        assert_eq!(index.look_up(&term, before, limit).unwrap(), expected(&entries, &term, before, limit));
    }
}

#[test]
fn questions_are_refused_while_an_index_that_failed_is_built_anew() {
    let dir = tempfile::tempdir().unwrap();
    let entries = sample(100);
    let index = open(dir.path());
    catch_up(&index, &entries);
    index.flush().unwrap();
    drop(index);
    let index = open(dir.path());
    assert!(index.with_opened(|_| Err::<(), _>(Failure::Damaged("as a test wants it".into()))).is_err());
    assert_eq!(index.applied(), 0);
    assert!(index.look_up(&letter(1, b'a'), u64::MAX, 1).is_err());
    index.apply(0, &entries[..50]).unwrap();
    assert!(index.values(1, b"", None, 1).is_err());
    catch_up(&index, &entries);
    assert_complete(&index, &entries);
}

/// A process that is killed leaves the files as they are, nothing closed.
#[test]
fn an_index_whose_process_was_killed_goes_on_at_its_last_table() {
    let dir = tempfile::tempdir().unwrap();
    let entries = sample(1000);
    let index = open(dir.path());
    index.apply(0, &entries[..600]).unwrap();
    index.flush().unwrap();
    index.apply(600, &entries[600..800]).unwrap();
    let copy = loop {
        let copy = tempfile::tempdir().unwrap();
        let before = list_files(dir.path());
        copy_dir(dir.path(), copy.path());
        // Background work must not have changed them while they were copied.
        if list_files(dir.path()) == before {
            break copy;
        }
    };
    let survivor = open(copy.path());
    assert_eq!(survivor.applied(), 600);
    catch_up(&survivor, &entries);
    assert_complete(&survivor, &entries);
}

/// Every file in turn is damaged in its middle, in its first byte, or cut short.
#[test]
fn a_corrupted_index_is_built_anew() {
    let dir = tempfile::tempdir().unwrap();
    let entries = sample(2000);
    {
        let index = open(dir.path());
        catch_up(&index, &entries[..1500]);
        index.flush().unwrap();
        catch_up(&index, &entries);
        index.flush().unwrap();
    }
    let damages: [fn(&mut Vec<u8>); 3] = [
        |bytes| {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 0x40;
        },
        |bytes| bytes[0] ^= 0xff,
        |bytes| bytes.truncate(bytes.len() / 2),
    ];
    let mut noticed = 0;
    for file in list_files(dir.path()) {
        for damage in damages {
            let copy = tempfile::tempdir().unwrap();
            copy_dir(dir.path(), copy.path());
            let target = copy.path().join(file.strip_prefix(dir.path()).unwrap());
            let mut content = read_content(&file);
            if content.is_empty() {
                continue;
            }
            damage(&mut content);
            fs::write(&target, content).unwrap();

            let index = open(copy.path());
            let opened_at = index.applied();
            // A question may be the one that finds the damage: it fails, and later ones are answered rightly.
            let failed = (0..3).take_while(|_| {
                catch_up(&index, &entries);
                (b'a'..=b'z').any(|value| index.look_up(&letter(2, value), u64::MAX, usize::MAX).is_err())
            });
            noticed += usize::from(failed.count() > 0 || opened_at < 1500);
            catch_up(&index, &entries);
            assert_complete(&index, &entries);
        }
    }
    assert!(noticed >= 5, "only {noticed} damages were noticed");
}

fn list_files(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = entries.flat_map(|path| if path.is_dir() { list_files(&path) } else { vec![path] }).collect();
    files.sort_unstable();
    files
}

/// Without the zeros behind it: the journal is allocated in advance, many times as large as what is in it.
fn read_content(file: &Path) -> Vec<u8> {
    let mut content = Vec::new();
    if let Ok(file) = fs::File::open(file) {
        file.take(1 << 20).read_to_end(&mut content).unwrap();
    }
    content.truncate(content.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1));
    content
}

fn copy_dir(from: &Path, to: &Path) {
    for file in list_files(from) {
        let target = to.join(file.strip_prefix(from).unwrap());
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        let Ok(metadata) = fs::metadata(&file) else { continue };
        let copy = fs::File::create(&target).unwrap();
        fs::write(&target, read_content(&file)).unwrap();
        copy.set_len(metadata.len()).unwrap();
    }
}
