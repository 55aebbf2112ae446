//! Whoever changes a ledger that others rely on is found: in an export, in a backup, in a data directory, in the tiles beside it. Each time the first
//! thing that does not fit is named.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

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

/// A CA that has issued and ended.
struct Place {
    lab: Lab,
    ca: Ca,
    key: String,
    checkpoint: PathBuf,
    export: String,
}

impl Place {
    async fn new() -> Self {
        let lab = Lab::new().unwrap();
        let mut ca = Ca::start(&lab, HOUR).await.unwrap();
        let caller = Caller::join(&lab, &ca, NODE).await.unwrap();
        let requests: Vec<_> = (0..ISSUED).map(|_| caller.request().unwrap()).collect();
        for some in requests.chunks(64) {
            caller.call(some.to_vec()).await.unwrap();
        }
        let checkpoint = lab.at("checkpoint");
        fs::write(&checkpoint, ca.chancery(&["log", "checkpoint"]).unwrap()).unwrap();
        let key = ca.chancery(&["log", "key"]).unwrap().trim().to_owned();
        let export = ca.chancery(&["log", "export"]).unwrap();
        ca.stop().await.unwrap();
        Self { lab, ca, key, checkpoint, export }
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

#[tokio::test]
async fn a_change_that_fits_itself_does_not_fit_the_signed_checkpoint() {
    let place = Place::new().await;
    let lines = place.lines();
    let last = lines.len() - 2;
    let same = |_: &mut Vec<u8>| ();
    let not_signed = "is not that of these entries";

    let mut swapped = lines.clone();
    swapped[100] = renumbered(&lines[101], 100, same);
    swapped[101] = renumbered(&lines[100], 101, same);
    let (is_intact, said) = place.judge(&swapped);
    assert!(!is_intact && said.contains(not_signed), "swapped: {said}");

    let mut dropped: Vec<String> = lines[..100].to_vec();
    dropped.extend((101..=last).map(|index| renumbered(&lines[index], index - 1, same)));
    let (is_intact, said) = place.judge(&dropped);
    assert!(!is_intact && said.contains(&format!("entry {last}: missing")), "dropped: {said}");

    // One more in the middle, and the last one gone.
    let mut inserted: Vec<String> = lines[..=100].to_vec();
    inserted.extend((100..last).map(|index| renumbered(&lines[index], index + 1, same)));
    let (is_intact, said) = place.judge(&inserted);
    assert!(!is_intact && said.contains(not_signed), "inserted: {said}");

    // In an entry's certificate: also its signature tells, and so its number is known.
    let mut flipped = lines.clone();
    flipped[100] = renumbered(&lines[100], 100, |bytes| bytes[60] ^= 1);
    let (is_intact, said) = place.judge(&flipped);
    assert!(!is_intact && (said.contains("entry 100") || said.contains(not_signed)), "flipped: {said}");
    flipped[100] = renumbered(&lines[100], 100, |bytes| {
        let place = bytes.len() - 20;
        bytes[place] ^= 1;
    });
    let (is_intact, said) = place.judge(&flipped);
    assert!(!is_intact, "flipped behind the certificate: {said}");

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
    let entry = STANDARD.decode(serde_json::from_str::<Value>(&place.lines()[300]).unwrap()["bytes"].as_str().unwrap()).unwrap();
    let copy = place.copy();
    let log = copy.join("ledger/log");
    let segment = fs::read_dir(&log).unwrap().map(|file| file.unwrap().path()).find(|path| !path.ends_with("spare")).unwrap();
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

    // As if the last groups had never been: the log fits itself, but not what was signed.
    write(&[&content[..end - 5000], &vec![0; content.len() - end + 5000]].concat());
    let (is_intact, said) = place.judge_directory(&copy);
    assert!(!is_intact && said.contains("missing: there are "), "truncated: {said}");

    fs::remove_file(&segment).unwrap();
    let (is_intact, said) = place.judge_directory(&copy);
    assert!(!is_intact && said.contains("there is no segment"), "removed: {said}");
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

    let entry = STANDARD.decode(serde_json::from_str::<Value>(&place.lines()[300]).unwrap()["bytes"].as_str().unwrap()).unwrap();
    let content = fs::read(&backup).unwrap();
    let at = content.windows(entry.len()).position(|window| window == entry).unwrap();
    flip(&backup, (at + entry.len() / 2) as u64);
    let (is_intact, said) = judge();
    assert!(!is_intact && said.contains("ledger/log/") && said.contains("entry 300 is not as it was written"), "flipped: {said}");
    fs::write(&backup, &content[..content.len() / 2]).unwrap();
    let (is_intact, said) = judge();
    assert!(!is_intact && said.contains("is not intact"), "truncated: {said}");
}

#[tokio::test]
async fn tiles_that_were_changed_are_found_and_the_entry_named() {
    let place = Place::new().await;
    let tampered = |change: &dyn Fn(&Path)| {
        let copy = place.copy();
        change(&copy.join("ledger/tree/level-0"));
        let (is_intact, said) = place.judge_directory(&copy);
        assert!(!is_intact && said.contains("level-0"), "{said}");
        said
    };
    let said = tampered(&|level| flip(level, 300 * 32 + 7));
    assert!(said.contains("entry 300: its hash in") && said.contains("so the tile was changed"), "flipped: {said}");
    let said = tampered(&|level| {
        let mut hashes = fs::read(level).unwrap();
        let (one, other) = hashes.split_at_mut(101 * 32);
        one[100 * 32..].swap_with_slice(&mut other[..32]);
        fs::write(level, hashes).unwrap();
    });
    assert!(said.contains("entry 100: its hash in"), "swapped: {said}");
    let said = tampered(&|level| {
        let mut hashes = fs::read(level).unwrap();
        hashes.drain(200 * 32..201 * 32);
        fs::write(level, hashes).unwrap();
    });
    assert!(said.contains("entry 200: its hash in"), "dropped: {said}");
    let said = tampered(&|level| {
        let mut hashes = fs::read(level).unwrap();
        hashes.splice(200 * 32..200 * 32, [7; 32]);
        fs::write(level, hashes).unwrap();
    });
    assert!(said.contains("entry 200: its hash in"), "inserted: {said}");
    let said = tampered(&|level| fs::OpenOptions::new().write(true).open(level).unwrap().set_len(256 * 32).unwrap());
    assert!(said.contains("entry 256: its hash in") && said.contains("is missing"), "truncated: {said}");
    // Nothing but the rest of a derived copy is missing: the next start makes it anew.
    let copy = place.copy();
    fs::remove_dir_all(copy.join("ledger/tree")).unwrap();
    let (is_intact, said) = place.judge_directory(&copy);
    assert!(is_intact, "{said}");
}
