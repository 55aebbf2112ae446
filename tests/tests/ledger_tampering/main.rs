//! Whoever changes a ledger that others rely on is found: in an export, in a backup, in a data directory, in the tiles beside it. Each time the first
//! thing that does not fit is named.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![allow(unreachable_pub, reason = "the modules of a test")]

mod forged;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use chancery_identity::checkpoint::leaf_hash;
use chancery_tests::ca::Ca;
use chancery_tests::caller::Caller;
use chancery_tests::lab::{Lab, copy_directory};
use chancery_tests::mesh::NODE;
use chancery_tests::tools;
use serde_json::Value;

const HOUR: Duration = Duration::from_secs(3600);
/// More than two tiles.
const ISSUED: usize = 600;

/// What somebody does to the lines of an export.
type Change = fn(&mut Vec<String>);
/// To entries as they are stored.
type Forgery = fn(&mut Vec<Vec<u8>>);
/// To a file.
type Tampering<'a> = &'a dyn Fn(&Path);

/// A CA that has issued and ended.
struct Place {
    lab: Lab,
    ca: Ca,
    key: String,
    /// Of all entries.
    checkpoint: PathBuf,
    /// From before anything was issued.
    early: PathBuf,
    early_entries: u64,
    export: String,
}

impl Place {
    async fn new() -> Self {
        let lab = Lab::new().unwrap();
        let mut ca = Ca::start(&lab, HOUR).await.unwrap();
        let caller = Caller::join(&lab, &ca, NODE).await.unwrap();
        let early = lab.at("early-checkpoint");
        fs::write(&early, ca.chancery(&["log", "checkpoint"]).unwrap()).unwrap();
        let early_entries = fs::read_to_string(&early).unwrap().lines().nth(1).unwrap().parse().unwrap();
        let requests: Vec<_> = (0..ISSUED).map(|_| caller.request().unwrap()).collect();
        for some in requests.chunks(64) {
            caller.call(some.to_vec()).await.unwrap();
        }
        let checkpoint = lab.at("checkpoint");
        fs::write(&checkpoint, ca.chancery(&["log", "checkpoint"]).unwrap()).unwrap();
        let key = ca.chancery(&["log", "key"]).unwrap().trim().to_owned();
        let export = ca.chancery(&["log", "export"]).unwrap();
        ca.stop().await.unwrap();
        Self { lab, ca, key, checkpoint, early, early_entries, export }
    }

    /// How many entries there are.
    fn entries(&self) -> usize {
        self.export.lines().count() - 1
    }

    /// An entry as it is stored.
    fn entry(&self, index: usize) -> Vec<u8> {
        STANDARD.decode(serde_json::from_str::<Value>(self.export.lines().nth(index).unwrap()).unwrap()["bytes"].as_str().unwrap()).unwrap()
    }

    /// An entry from `from` on that is as long as the one behind it.
    fn as_long_as_the_next(&self, from: usize) -> usize {
        (from..self.export.lines().count()).find(|index| self.entry(*index).len() == self.entry(*index + 1).len()).unwrap()
    }

    /// The only segment of the log in a data directory.
    fn segment(directory: &Path) -> PathBuf {
        let log = fs::read_dir(directory.join("ledger/log")).unwrap();
        log.map(|file| file.unwrap().path()).find(|path| path.extension().is_some_and(|extension| extension == "segment")).unwrap()
    }

    /// Runs `chancery log verify`: whether it succeeded, and what it said.
    fn verify(&self, what: &[&str]) -> (bool, String) {
        let mut command = Command::new(tools::chancery("chancery").unwrap());
        command.args(["log", "verify", "--verifier-key", &self.key, "--checkpoint"]).arg(&self.checkpoint).args(what);
        let output = command.output().unwrap();
        (output.status.success(), [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned()).concat())
    }

    /// What is said about an export of these lines.
    fn judge(&self, lines: &[String]) -> (bool, String) {
        let file = self.lab.at("tampered.jsonl");
        fs::write(&file, lines.concat()).unwrap();
        self.verify(&[file.to_str().unwrap(), "--certificates"])
    }

    fn lines(&self) -> Vec<String> {
        self.export.split_inclusive('\n').map(str::to_owned).collect()
    }

    /// A copy of the data directory.
    fn copy(&self) -> PathBuf {
        let copy = self.lab.at("copy");
        if copy.exists() {
            fs::remove_dir_all(&copy).unwrap();
        }
        copy_directory(self.ca.data(), &copy).unwrap();
        copy
    }

    fn judge_directory(&self, directory: &Path) -> (bool, String) {
        self.verify(&["--data-dir", directory.to_str().unwrap()])
    }
}

/// The line with another number, and whatever else somebody who knows the format would change.
fn renumbered(line: &str, entry: usize, change: impl FnOnce(&mut Vec<u8>)) -> String {
    let mut line: Value = serde_json::from_str(line).unwrap();
    let mut bytes = STANDARD.decode(line["bytes"].as_str().unwrap()).unwrap();
    change(&mut bytes);
    line["entry"] = entry.into();
    line["leaf_hash"] = hex(&leaf_hash(&bytes)).into();
    line["bytes"] = STANDARD.encode(&bytes).into();
    format!("{line}\n")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]).filter_map(|digit| char::from_digit(digit.into(), 16)).collect()
}

fn flip(path: &Path, place: u64) {
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, place).unwrap();
    file.write_all_at(&[byte[0] ^ 0x40], place).unwrap();
}

#[tokio::test]
async fn an_export_that_was_changed_is_found_and_the_entry_named() {
    let place = Place::new().await;
    let lines = place.lines();
    let (is_intact, said) = place.judge(&lines);
    assert!(is_intact && said.contains("intact"), "{said}");

    let flipped = |line: &String| line.replacen("\"bytes\":\"CAEQ", "\"bytes\":\"CAER", 1);
    let cases: [(&str, Change, &str); 7] = [
        ("dropped", |lines| drop(lines.remove(100)), "entry 100: missing"),
        ("swapped", |lines| lines.swap(100, 101), "entry 100: missing; entry 101 follows"),
        ("inserted", |lines| lines.insert(100, lines[50].clone()), "entry 50: it comes again"),
        ("truncated", |lines| lines.truncate(100), "entry 100: missing: there are 100 entries"),
        (
            "cut off",
            |lines| {
                lines.truncate(101);
                lines[100].truncate(40);
            },
            "line 101: the line is cut off",
        ),
        ("a foreign line", |lines| lines.insert(100, "{}\n".into()), "line 101: neither an entry nor a checkpoint"),
        ("emptied", Vec::clear, "entry 0: missing"),
    ];
    for (case, change, expected) in cases {
        let mut changed = lines.clone();
        change(&mut changed);
        let (is_intact, said) = place.judge(&changed);
        assert!(!is_intact && said.contains(expected), "{case}: {said}");
    }
    let mut changed = lines.clone();
    changed[100] = flipped(&lines[100]);
    assert_ne!(changed[100], lines[100]);
    let (is_intact, said) = place.judge(&changed);
    assert!(!is_intact && said.contains("entry 100: its bytes are not those"), "flipped: {said}");
}

/// People read and search these, and only the bytes are signed.
#[tokio::test]
async fn words_that_are_not_those_of_the_bytes_are_found_and_named() {
    let place = Place::new().await;
    let lines = place.lines();
    let line: Value = serde_json::from_str(&lines[100]).unwrap();
    let (pod, id) = (line["pod"].as_str().unwrap(), line["spiffe_id"].as_str().unwrap());
    let named = |key: &str| format!("entry 100: line 101 does not say in `{key}` what its bytes say; the entries lead to the checkpoint");
    let cases = [
        ("pod", lines[100].replacen(&format!("\"pod\":\"{pod}\""), "\"pod\":\"vault-0\"", 1)),
        ("spiffe_id", lines[100].replacen(id, "spiffe://mesh.test/ns/bank/sa/vault", 1)),
        ("time", lines[100].replacen("\"time\":\"20", "\"time\":\"19", 1)),
        ("kind", lines[100].replacen("\"kind\":\"issuance\"", "\"kind\":\"start\"", 1)),
        ("pod", lines[100].replacen(&format!("\"pod\":\"{pod}\","), "", 1)),
        ("added", lines[100].replacen("\"pod\":", "\"added\":1,\"pod\":", 1)),
    ];
    for (key, changed) in cases {
        assert_ne!(changed, lines[100], "{key}");
        let mut lines = lines.clone();
        lines[100] = changed;
        let (is_intact, said) = place.judge(&lines);
        assert!(!is_intact && said.contains(&named(key)), "{key}: {said}");
        let (is_intact, said) = place.verify(&[place.lab.at("tampered.jsonl").to_str().unwrap(), "--bytes-only"]);
        assert!(is_intact && said.contains("in words was not looked at"), "{key}: {said}");
    }
}

#[tokio::test]
async fn a_change_that_fits_itself_does_not_fit_the_signed_checkpoint() {
    let place = Place::new().await;
    let lines = place.lines();
    let last = lines.len() - 2;
    let same = |_: &mut Vec<u8>| ();
    let not_signed = format!("is not that of these entries: at least one of the entries 0 to {last} is not what was signed");

    let mut swapped = lines.clone();
    swapped[100] = renumbered(&lines[101], 100, same);
    swapped[101] = renumbered(&lines[100], 101, same);
    let (is_intact, said) = place.judge(&swapped);
    assert!(!is_intact && said.contains(&not_signed), "swapped: {said}");

    let mut dropped: Vec<String> = lines[..100].to_vec();
    dropped.extend((101..=last).map(|index| renumbered(&lines[index], index - 1, same)));
    let (is_intact, said) = place.judge(&dropped);
    assert!(!is_intact && said.contains(&format!("entry {last}: missing")), "dropped: {said}");

    // One more in the middle, and the last one gone.
    let mut inserted: Vec<String> = lines[..=100].to_vec();
    inserted.extend((100..last).map(|index| renumbered(&lines[index], index + 1, same)));
    let (is_intact, said) = place.judge(&inserted);
    assert!(!is_intact && said.contains(&not_signed), "inserted: {said}");

    // In an entry's certificate: also its signature tells, and so its number is known.
    let mut flipped = lines.clone();
    flipped[100] = renumbered(&lines[100], 100, |bytes| bytes[60] ^= 1);
    let (is_intact, said) = place.judge(&flipped);
    let expected = "tampered.jsonl: entry 100: the certificate's signature is not that of its issuing certificate";
    assert!(!is_intact && said.contains(expected), "flipped: {said}");
    // Something else is found before it was that certificate's turn.
    let mut shortened = flipped.clone();
    shortened.remove(200);
    let (is_intact, said) = place.judge(&shortened);
    assert!(!is_intact && said.contains(expected), "flipped, and another one dropped: {said}");
    flipped[100] = renumbered(&lines[100], 100, |bytes| *bytes.last_mut().unwrap() ^= 1);
    let (is_intact, said) = place.judge(&flipped);
    let named = said.contains("entry 100: line 101 does not say in") && said.contains("is not that of these entries");
    assert!(!is_intact && named, "flipped behind the certificate: {said}");

    // Somebody else's checkpoint at the end.
    let mut signed = lines.clone();
    let own = signed.pop().unwrap();
    signed.push(own.replace("\\n\\n", "\\nchanged\\n\\n"));
    let (is_intact, said) = place.judge(&signed);
    assert!(!is_intact && said.contains("signature"), "signed by nobody: {said}");
}

#[tokio::test]
async fn a_data_directory_that_was_changed_is_found_and_the_place_named() {
    let place = Place::new().await;
    let (is_intact, said) = place.judge_directory(&place.copy());
    assert!(is_intact && said.contains("intact"), "{said}");
    let entry = place.entry(300);
    let copy = place.copy();
    let segment = Place::segment(&copy);
    let content = fs::read(&segment).unwrap();
    let end = content.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    let at = content.windows(entry.len()).position(|window| window == entry).unwrap();
    let write = |content: &[u8]| fs::write(&segment, content).unwrap();
    let named = segment.display().to_string();

    let mut flipped = content.clone();
    flipped[at + entry.len() / 2] ^= 1;
    write(&flipped);
    let (is_intact, said) = place.judge_directory(&copy);
    assert!(!is_intact && said.contains(&named) && said.contains("entry 300 is not as it was written"), "flipped: {said}");

    let mut dropped = content.clone();
    dropped.drain(at..at + entry.len());
    write(&dropped);
    let (is_intact, said) = place.judge_directory(&copy);
    assert!(!is_intact && said.contains(&named), "dropped: {said}");

    let mut inserted = content.clone();
    inserted.splice(at..at, entry.iter().copied());
    write(&inserted);
    let (is_intact, said) = place.judge_directory(&copy);
    assert!(!is_intact && said.contains(&named), "inserted: {said}");

    let index = place.as_long_as_the_next(400);
    let (one, other) = (place.entry(index), place.entry(index + 1));
    let [at, next] = [&one, &other].map(|entry| content.windows(entry.len()).position(|window| window == entry).unwrap());
    let mut swapped = content.clone();
    swapped[at..at + one.len()].copy_from_slice(&other);
    swapped[next..next + one.len()].copy_from_slice(&one);
    write(&swapped);
    let (is_intact, said) = place.judge_directory(&copy);
    assert!(!is_intact && said.contains(&named) && said.contains(&format!("entry {index} is not as it was written")), "swapped: {said}");

    // As if the last groups had never been: the log fits itself, but not what was signed.
    write(&[&content[..end - 5000], &vec![0; content.len() - end + 5000]].concat());
    let (is_intact, said) = place.judge_directory(&copy);
    assert!(!is_intact && said.contains("missing: there are "), "truncated: {said}");

    fs::remove_file(&segment).unwrap();
    let (is_intact, said) = place.judge_directory(&copy);
    assert!(!is_intact && said.contains("there is no segment"), "removed: {said}");
}

/// As many entries as before, the hundredth another one.
const FORGERIES: [(&str, Forgery); 3] = [
    ("replaced", |entries| *entries[100].last_mut().unwrap() ^= 1),
    ("swapped", |entries| entries.swap(100, 101)),
    ("inserted", |entries| {
        entries.insert(100, entries[50].clone());
        entries.pop();
    }),
];

#[tokio::test]
async fn a_data_directory_that_fits_itself_does_not_fit_its_tiles_or_the_signed_checkpoint() {
    let place = Place::new().await;
    let last = place.entries() - 1;
    let range = format!("at least one of the entries 0 to {last} is not what was signed");
    for (case, forgery) in FORGERIES {
        let copy = place.copy();
        let segment = Place::segment(&copy);
        fs::write(&segment, forged::segment(&fs::read(&segment).unwrap(), forgery)).unwrap();
        let (is_intact, said) = place.judge_directory(&copy);
        let level = copy.join("ledger/tree/level-0");
        let expected = format!("entry 100: its hash in {}, at 3200, is another one; ", level.display());
        assert!(!is_intact && said.contains(&expected), "{case}: {said}");
        assert!(said.contains(&format!("is not that of these entries either: {range}")), "{case}: {said}");
        // Nothing but the checkpoint knows any more.
        fs::remove_dir_all(copy.join("ledger/tree")).unwrap();
        let (is_intact, said) = place.judge_directory(&copy);
        assert!(!is_intact && said.contains(&format!("is not that of these entries: {range}")), "{case}: {said}");
    }
    let copy = place.copy();
    let segment = Place::segment(&copy);
    let dropped = forged::segment(&fs::read(&segment).unwrap(), |entries| drop(entries.remove(100)));
    fs::write(&segment, dropped).unwrap();
    let (is_intact, said) = place.judge_directory(&copy);
    assert!(!is_intact && said.contains(&format!("entry {last}: missing: there are {last} entries")), "dropped: {said}");
}

#[tokio::test]
async fn a_backup_is_verified_as_it_lies_there_and_a_change_is_found_and_the_place_named() {
    let place = Place::new().await;
    let backup = place.lab.at("ca.tar");
    let mut command = Command::new(tools::chancery("chancery-ca").unwrap());
    command.args(["backup", "--data-dir"]).arg(place.ca.data()).arg("--to").arg(&backup);
    assert!(command.output().unwrap().status.success());
    let judge = || place.verify(&[backup.to_str().unwrap(), "--certificates"]);
    let (is_intact, said) = judge();
    assert!(is_intact && said.contains("intact") && said.contains("signatures          verified"), "{said}");

    let entry = place.entry(300);
    let content = fs::read(&backup).unwrap();
    let at = content.windows(entry.len()).position(|window| window == entry).unwrap();
    flip(&backup, (at + entry.len() / 2) as u64);
    let (is_intact, said) = judge();
    assert!(!is_intact && said.contains("ledger/log/") && said.contains("entry 300 is not as it was written"), "flipped: {said}");
    fs::write(&backup, &content[..content.len() / 2]).unwrap();
    let (is_intact, said) = judge();
    assert!(!is_intact && said.contains("is not intact"), "truncated: {said}");

    // All that is in it made to fit again: only the checkpoints know.
    let (entries, last) = (place.entries(), place.entries() - 1);
    for (case, forgery) in FORGERIES {
        fs::write(&backup, &content).unwrap();
        forged::backup(&backup, forgery);
        let (is_intact, said) = place.verify(&[backup.to_str().unwrap(), "--checkpoint", place.early.to_str().unwrap()]);
        let first = place.early_entries;
        let expected = format!("is not that of these entries: at least one of the entries {first} to {last} is not what was signed");
        assert!(!is_intact && said.contains("ca.tar") && said.contains(&expected), "{case}: {said}");
    }
    fs::write(&backup, &content).unwrap();
    forged::backup(&backup, |entries| entries[100][60] ^= 1);
    let (is_intact, said) = judge();
    assert!(!is_intact && said.contains("entry 100: the certificate's signature is not"), "replaced: {said}");
    fs::write(&backup, &content).unwrap();
    forged::backup(&backup, |entries| drop(entries.remove(100)));
    let (is_intact, said) = judge();
    let expected = format!("it has {last} entries, its checkpoint {entries}");
    assert!(!is_intact && said.contains(&expected), "dropped: {said}");
    fs::write(&backup, &content).unwrap();
    forged::backup(&backup, |entries| entries.insert(100, entries[50].clone()));
    let (is_intact, said) = judge();
    let expected = format!("is not that of these entries: at least one of the entries 0 to {last} is not what was signed");
    assert!(!is_intact && said.contains(&expected), "inserted: {said}");
}

/// A level's file, with its hashes changed.
fn rehash(path: &Path, change: impl FnOnce(&mut Vec<[u8; 32]>)) {
    let content = fs::read(path).unwrap();
    let mut hashes = content.as_chunks::<32>().0.to_vec();
    change(&mut hashes);
    fs::write(path, hashes.as_flattened()).unwrap();
}

/// A text file, with its lines changed.
fn rewrite(path: &Path, change: impl FnOnce(&mut Vec<String>)) {
    let mut lines: Vec<String> = fs::read_to_string(path).unwrap().lines().map(|line| format!("{line}\n")).collect();
    change(&mut lines);
    fs::write(path, lines.concat()).unwrap();
}

#[tokio::test]
async fn a_tree_that_was_changed_is_found_and_the_place_named() {
    let place = Place::new().await;
    let entries = place.entries();
    let tampered = |name: &str, case: &str, change: Tampering<'_>, expected: &str| {
        let copy = place.copy();
        let file = copy.join("ledger/tree").join(name);
        change(&file);
        let (is_intact, said) = place.judge_directory(&copy);
        let expected = expected.replace("FILE", file.to_str().unwrap());
        assert!(!is_intact && said.contains(&expected), "{name} {case}: {said}");
        assert!(said.contains("; the entries lead to the checkpoint, so it was changed there"), "{name} {case}: {said}");
    };
    // In a complete tile, and in the one that is not.
    for entry in [200, 550] {
        let at = entry * 32;
        let another = format!("entry {entry}: its hash in FILE, at {at}, is another one");
        tampered("level-0", "flipped", &|level| flip(level, at as u64 + 7), &another);
        tampered("level-0", "swapped", &|level| rehash(level, |hashes| hashes.swap(entry, entry + 1)), &another);
        tampered("level-0", "dropped", &|level| rehash(level, |hashes| _ = hashes.remove(entry)), &another);
        tampered("level-0", "inserted", &|level| rehash(level, |hashes| hashes.insert(entry, [7; 32])), &another);
        let missing = format!("entry {entry}: its hash in FILE, at {at}, is missing");
        tampered("level-0", "truncated", &|level| rehash(level, |hashes| hashes.truncate(entry)), &missing);
    }
    let another = "the entries 0 to 255: their hash in FILE, at 0, is another one";
    tampered("level-1", "flipped", &|level| flip(level, 31), another);
    tampered("level-1", "swapped", &|level| rehash(level, |hashes| hashes.swap(0, 1)), another);
    tampered("level-1", "dropped", &|level| rehash(level, |hashes| _ = hashes.remove(0)), another);
    tampered("level-1", "inserted", &|level| rehash(level, |hashes| hashes.insert(0, [7; 32])), another);
    let missing = "the entries 256 to 511: their hash in FILE, at 32, is missing";
    tampered("level-1", "truncated", &|level| rehash(level, |hashes| hashes.truncate(1)), missing);
    let unread = "the entries 0 to 255: their hash in FILE, at 0, cannot be read: No such file";
    tampered("level-1", "removed", &|level| fs::remove_file(level).unwrap(), unread);

    let root = |line: &mut String| *line = line.replace(|digit: char| digit.is_ascii_hexdigit(), "7");
    let another = format!("the first {entries} entries: their root in FILE is another one");
    tampered("hashed", "flipped", &|hashed| rewrite(hashed, |lines| root(&mut lines[3])), &another);
    let another = "the first 300 entries: their root in FILE is another one";
    tampered("hashed", "reduced", &|hashed| rewrite(hashed, |lines| lines[2] = "300\n".into()), another);
    let unwritten = "FILE is not as it was written";
    tampered("hashed", "swapped", &|hashed| rewrite(hashed, |lines| lines.swap(2, 3)), unwritten);
    tampered("hashed", "dropped", &|hashed| rewrite(hashed, |lines| drop(lines.remove(3))), unwritten);
    tampered("hashed", "inserted", &|hashed| rewrite(hashed, |lines| lines.insert(3, lines[2].clone())), unwritten);
    tampered("hashed", "truncated", &|hashed| fs::write(hashed, "").unwrap(), unwritten);
    tampered(
        "hashed",
        "another log",
        &|hashed| rewrite(hashed, |lines| root(&mut lines[1])),
        "FILE says that the hashes are of the log 777",
    );

    let copy = place.copy();
    rewrite(&copy.join("ledger/tree/hashed"), |lines| lines[2] = format!("{}\n", entries + 1));
    let (is_intact, said) = place.judge_directory(&copy);
    let expected = format!("entry {entries}: missing: ");
    assert!(!is_intact && said.contains(&expected) && said.contains(&format!("says that {} entries were hashed", entries + 1)), "{said}");
}

#[tokio::test]
async fn a_tree_that_is_behind_or_not_there_is_no_damage() {
    let place = Place::new().await;
    // As after a power cut, when the hashes that nothing counts yet are anything.
    let copy = place.copy();
    let tree = copy.join("ledger/tree");
    let first = fs::read(tree.join("level-1")).unwrap()[..32].to_vec();
    rewrite(&tree.join("hashed"), |lines| {
        lines[2] = "256\n".into();
        lines[3] = format!("{}\n", hex(&first));
    });
    flip(&tree.join("level-0"), 550 * 32);
    flip(&tree.join("level-0"), 256 * 32);
    flip(&tree.join("level-1"), 32);
    let (is_intact, said) = place.judge_directory(&copy);
    assert!(is_intact, "{said}");
    flip(&tree.join("level-0"), 255 * 32);
    let (is_intact, said) = place.judge_directory(&copy);
    assert!(!is_intact && said.contains("entry 255: its hash in"), "{said}");

    for gone in ["hashed", ""] {
        let copy = place.copy();
        let gone = copy.join("ledger/tree").join(gone);
        if gone.is_file() {
            fs::remove_file(gone).unwrap();
        } else {
            fs::remove_dir_all(gone).unwrap();
        }
        let (is_intact, said) = place.judge_directory(&copy);
        assert!(is_intact && said.contains("the tree's hashes are not there, and were not compared"), "{said}");
    }
}
