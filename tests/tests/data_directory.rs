//! What the running CA makes of its data directory: shared, closed, of another kind, damaged, full.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::fs::{self, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use chancery_proto::chancery::v1::WorkloadRequest;
use chancery_proto::chancery::v1::workload_result::Outcome;
use chancery_tests::agent::Agent;
use chancery_tests::ca::Ca;
use chancery_tests::caller::Caller;
use chancery_tests::lab::{Lab, free_address};
use chancery_tests::mesh::NODE;
use chancery_tests::process::Process;
use chancery_tests::{http, tools, wait};
use serde_json::Value;

const HOUR: Duration = Duration::from_secs(3600);

/// Another CA for the same data directory, with ports and files of its own.
fn another(data: &Path) -> (Lab, Ca) {
    let lab = Lab::new().unwrap();
    let ca = Ca::configure(&lab, data, HOUR, "").unwrap();
    (lab, ca)
}

/// What `chancery-ca serve` without `--dev` says about a directory that it has to refuse.
async fn production_refusal(lab: &Lab, data: &Path) -> String {
    Process::refused("the CA", &mut production(lab, data), &lab.at("refused.log")).await.unwrap()
}

fn production(lab: &Lab, data: &Path) -> Command {
    let config = lab.at("production.toml");
    let text = format!(
        "trust_domain = \"mesh.test\"\ndata_dir = \"{}\"\nlisten = \"{}\"\nhttp_listen = \"{}\"\nadmin_socket = \"{}\"\n",
        data.display(),
        free_address().unwrap(),
        free_address().unwrap(),
        lab.at("production.sock").display()
    );
    fs::write(&config, text).unwrap();
    let mut command = lab.command(&tools::chancery("chancery-ca").unwrap());
    command.args(["serve", "--config"]).arg(&config);
    command
}

/// What was issued to agents and workloads. The CA's own certificate, new with every start, does not count.
fn identities(ca: &Ca) -> Vec<Value> {
    let mut all = ca.ask(&["identity", "list", "--limit", "100000"]).unwrap().as_array().unwrap().clone();
    all.retain(|identity| identity["spiffe_id"] != "spiffe://mesh.test/chancery/ca");
    all
}

async fn issue(caller: &Caller, count: usize) {
    caller.connected().await.unwrap();
    for _ in 0..count {
        // After a restart of the CA the caller may not know yet that its connection has ended.
        let answer = wait::until("the CA answers", Duration::from_secs(20), async || caller.issue(caller.request().unwrap()).await);
        answer.await.unwrap().unwrap();
    }
}

/// A stopped CA that has issued, one after the other, and what it had issued then.
async fn stopped(lab: &Lab) -> (Ca, Caller, Vec<Value>) {
    let mut ca = Ca::start(lab, HOUR).await.unwrap();
    let caller = Caller::join(lab, &ca, NODE).await.unwrap();
    issue(&caller, 9).await;
    let issued = identities(&ca);
    assert_eq!(issued.len(), 10, "with the agent's own");
    ca.kill().unwrap();
    (ca, caller, issued)
}

/// Starts the CA again: it must know everything that it issued, and issue more.
async fn goes_on(lab: &Lab, ca: &mut Ca, caller: &Caller, issued: &[Value]) {
    ca.run(lab).await.unwrap();
    assert_eq!(identities(ca), issued);
    let again = Caller::join(lab, ca, "node-b").await.unwrap();
    issue(&again, 1).await;
    issue(caller, 1).await;
    assert_eq!(identities(ca).len(), issued.len() + 3);
}

#[tokio::test]
async fn a_second_process_on_the_same_directory_is_refused() {
    let lab = Lab::new().unwrap();
    let ca = Ca::start(&lab, HOUR).await.unwrap();
    let caller = Caller::join(&lab, &ca, NODE).await.unwrap();
    let (own, second) = another(ca.data());
    let said = second.refused(&own).await.unwrap();
    assert!(said.contains("another chancery-ca is using it") && said.contains(&ca.data().display().to_string()), "{said}");
    issue(&caller, 1).await;
    assert_eq!(identities(&ca).len(), 2, "the first one goes on, and its operators reach it");
}

#[tokio::test]
async fn a_port_in_use_is_named_and_leaves_no_trace() {
    let lab = Lab::new().unwrap();
    let ca = Ca::configure(&lab, &lab.at("ca"), HOUR, "").unwrap();
    for address in [ca.address, ca.http] {
        let _taken = std::net::TcpListener::bind(address).unwrap();
        let said = ca.refused(&lab).await.unwrap();
        assert!(said.contains(&format!("cannot listen on {address}")) && said.contains("Address already in use"), "{said}");
        assert!(!ca.data().exists(), "nothing was written");
    }
}

#[tokio::test]
async fn a_port_in_use_is_named_by_the_agent() {
    let lab = Lab::new().unwrap();
    let ca = Ca::start(&lab, HOUR).await.unwrap();
    let agent = Agent::configure(&lab, &ca, NODE).unwrap();
    let _taken = std::net::TcpListener::bind(agent.http).unwrap();
    let mut command = lab.command(&tools::chancery("chancery-agent").unwrap());
    command.args(["run", "--config"]).arg(agent.config());
    let said = Process::refused("the agent", &mut command, &lab.at("refused.log")).await.unwrap();
    assert!(said.contains(&format!("cannot listen on {}", agent.http)) && said.contains("Address already in use"), "{said}");
    assert!(identities(&ca).is_empty(), "it did not join");
}

/// This command, but bound by the permissions of files also when the tests run as root. Nothing, where that cannot be done.
fn without_override(command: &Command) -> Option<Command> {
    if !rustix::process::geteuid().is_root() {
        let mut same = Command::new(command.get_program());
        same.args(command.get_args());
        return Some(same);
    }
    let mut bound = Command::new("setpriv");
    bound.args(["--bounding-set", "-dac_override,-dac_read_search,-fowner", "--"]);
    let works = Command::new("setpriv").args(bound.get_args()).arg("true").status().is_ok_and(|status| status.success());
    if !works {
        tools::skip("root cannot give up its right to override permissions (setpriv of util-linux)");
        return None;
    }
    bound.arg(command.get_program()).args(command.get_args());
    Some(bound)
}

#[tokio::test]
async fn a_directory_that_cannot_be_read_or_written_is_refused_by_name() {
    let lab = Lab::new().unwrap();
    let (ca, ..) = stopped(&lab).await;
    let Some(mut command) = without_override(&ca.command(&lab).unwrap()) else { return };
    let parent = lab.at("closed");
    fs::create_dir(&parent).unwrap();
    for (case, directory, mode) in
        [("unreadable", ca.data(), 0o000), ("read-only", ca.data(), 0o500), ("nowhere to create it", parent.as_path(), 0o500)]
    {
        fs::set_permissions(directory, Permissions::from_mode(mode)).unwrap();
        let said = if directory == parent {
            let new = Ca::configure(&lab, &parent.join("ca"), HOUR, "").unwrap();
            let mut command = without_override(&new.command(&lab).unwrap()).unwrap();
            Process::refused(case, &mut command, &lab.at("refused.log")).await
        } else {
            Process::refused(case, &mut command, &lab.at("refused.log")).await
        };
        fs::set_permissions(directory, Permissions::from_mode(0o700)).unwrap();
        let said = said.unwrap();
        let names_it = said.contains(&directory.display().to_string());
        assert!(names_it && said.contains("Permission denied"), "{case}: {said}");
    }
}

#[tokio::test]
async fn neither_kind_of_ca_opens_the_others_directory() {
    let lab = Lab::new().unwrap();
    let (mut ca, caller, issued) = stopped(&lab).await;
    let said = production_refusal(&lab, ca.data()).await;
    assert!(said.contains("belongs to a development CA") && said.contains("production"), "{said}");
    goes_on(&lab, &mut ca, &caller, &issued).await;

    let data = lab.at("production");
    let running = Process::start("the CA", &mut production(&lab, &data), &lab.at("production.log")).unwrap();
    wait::until("the directory is made", Duration::from_secs(10), async || {
        if data.join("bundle.pem").exists() { Ok(()) } else { Err("no bundle yet") }
    })
    .await
    .unwrap();
    assert!(running.stop().await.unwrap().success());
    let (own, development) = another(&data);
    let said = development.refused(&own).await.unwrap();
    assert!(said.contains("belongs to a production CA") && said.contains("development"), "{said}");
}

#[tokio::test]
async fn a_directory_of_a_newer_version_is_refused_with_what_reads_it() {
    let lab = Lab::new().unwrap();
    let (mut ca, caller, issued) = stopped(&lab).await;
    for (file, newer, says) in [
        ("version", "7\n", "layout version 7"),
        ("ledger/version", "chancery-ledger 2\nreader Chancery 3.1 or later\n", "use Chancery 3.1 or later"),
    ] {
        let path = ca.data().join(file);
        let known = fs::read(&path).unwrap();
        fs::write(&path, newer).unwrap();
        let said = ca.refused(&lab).await.unwrap();
        assert!(said.contains(says) && said.contains(&ca.data().display().to_string()), "{said}");
        fs::write(&path, known).unwrap();
    }
    goes_on(&lab, &mut ca, &caller, &issued).await;
}

#[tokio::test]
async fn a_directory_or_a_key_that_others_may_read_is_refused_with_the_remedy() {
    let lab = Lab::new().unwrap();
    let (mut ca, caller, issued) = stopped(&lab).await;
    let key = files_in(&ca.data().join("keys")).into_iter().find(|path| path.extension().is_some_and(|it| it == "pem")).unwrap();
    assert_eq!(fs::metadata(ca.data()).unwrap().permissions().mode() & 0o7777, 0o700);
    assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o7777, 0o600);
    for (path, wide, right) in [(ca.data().to_owned(), 0o750, 0o700), (ca.data().join("keys"), 0o755, 0o700), (key, 0o640, 0o600)] {
        fs::set_permissions(&path, Permissions::from_mode(wide)).unwrap();
        let said = ca.refused(&lab).await.unwrap();
        assert!(said.contains(&format!("{}: mode {wide:04o}", path.display())), "{said}");
        assert!(said.contains(&format!("chmod {right:04o} {}", path.display())), "{said}");
        fs::set_permissions(&path, Permissions::from_mode(right)).unwrap();
    }
    goes_on(&lab, &mut ca, &caller, &issued).await;
}

fn files_in(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files.extend(files_in(&path)) } else { files.push(path) }
    }
    files
}

/// The one segment of the log, and where its data end.
fn segment(ca: &Ca) -> (PathBuf, u64) {
    let log = ca.data().join("ledger/log");
    let path = files_in(&log).into_iter().find(|path| path.file_name().unwrap() != "spare").unwrap();
    let bytes = fs::read(&path).unwrap();
    let end = bytes.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    (path, end as u64)
}

#[tokio::test]
async fn a_torn_log_tail_is_cut_with_a_warning_and_nothing_is_lost() {
    let lab = Lab::new().unwrap();
    let (mut ca, caller, issued) = stopped(&lab).await;
    let (path, end) = segment(&ca);
    let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    // The beginning of one more group, as a power cut leaves it.
    let mut torn = vec![0; 300];
    file.read_exact_at(&mut torn, end - 900).unwrap();
    file.write_all_at(&torn, end).unwrap();
    goes_on(&lab, &mut ca, &caller, &issued).await;
    let log = ca.log().unwrap();
    assert!(log.contains("a write that was cut off was removed from") && log.contains(&path.display().to_string()), "{log}");
}

#[tokio::test]
async fn a_flipped_byte_in_the_middle_of_the_log_stops_the_ca_with_the_place() {
    let lab = Lab::new().unwrap();
    let (mut ca, caller, issued) = stopped(&lab).await;
    let (path, end) = segment(&ca);
    let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let flip = || {
        let mut byte = [0];
        file.read_exact_at(&mut byte, end / 2).unwrap();
        file.write_all_at(&[byte[0] ^ 0x20], end / 2).unwrap();
    };
    flip();
    let damaged = fs::read(&path).unwrap();
    let said = ca.refused(&lab).await.unwrap();
    assert!(said.contains(&format!("the ledger is damaged at {}, offset ", path.display())), "{said}");
    assert!(fs::read(&path).unwrap() == damaged, "what is left of the evidence is not touched");
    flip();
    goes_on(&lab, &mut ca, &caller, &issued).await;
}

#[tokio::test]
async fn a_deleted_index_is_built_again() {
    let lab = Lab::new().unwrap();
    let (mut ca, caller, issued) = stopped(&lab).await;
    fs::remove_dir_all(ca.data().join("ledger/index")).unwrap();
    goes_on(&lab, &mut ca, &caller, &issued).await;
}

#[tokio::test]
async fn a_corrupted_index_is_built_again() {
    let lab = Lab::new().unwrap();
    let (mut ca, caller, issued) = stopped(&lab).await;
    let files = files_in(&ca.data().join("ledger/index"));
    assert!(!files.is_empty());
    for path in files {
        let length = fs::metadata(&path).unwrap().len().min(1 << 16);
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&vec![0xa5; usize::try_from(length).unwrap()], 0).unwrap();
    }
    goes_on(&lab, &mut ca, &caller, &issued).await;
}

/// Names the small file system, in the process that has one.
const SMALL_DISK: &str = "CHANCERY_TEST_SMALL_DISK";
/// Room for the first segment of the log with all that is beside it, but not for a second one.
const SMALL: &str = "size=28m";
const LARGE: &str = "size=80m";

#[test]
fn on_a_full_disk_issuance_stops_with_a_clear_error_and_goes_on_once_there_is_room() {
    if let Some(disk) = std::env::var_os(SMALL_DISK) {
        return tokio::runtime::Runtime::new().unwrap().block_on(fill(Path::new(&disk)));
    }
    let lab = Lab::new().unwrap();
    let disk = lab.at("disk");
    fs::create_dir(&disk).unwrap();
    // The file system exists for these processes alone, and ends with them.
    let unshare = || {
        let mut command = Command::new("unshare");
        command.args(if rustix::process::geteuid().is_root() { &["-m"][..] } else { &["-m", "-r"] });
        let mount = "mount -t tmpfs -o \"$1,mode=0700\" small \"$2\" && shift 2 && exec \"$@\"";
        command.args(["sh", "-c", mount, "sh", SMALL]).arg(&disk);
        command
    };
    if !unshare().arg("true").output().is_ok_and(|output| output.status.success()) {
        return tools::skip("a file system cannot be mounted in a namespace of one's own (unshare -m)");
    }
    let this = std::thread::current().name().expect("tests have names").to_owned();
    let mut again = unshare();
    again.arg(std::env::current_exe().unwrap()).args([&this, "--exact", "--nocapture"]).env(SMALL_DISK, &disk);
    let output = again.output().unwrap();
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).join("\n");
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

/// Names that make an entry of the ledger so large that the log fills up soon.
fn many_names() -> String {
    let label = "x".repeat(60);
    let names: Vec<String> = (0..150).map(|number| format!("\"n{number}.{label}.{label}.{label}.example\"")).collect();
    format!("\n[[policy.dns_names]]\nservice_accounts = [\"*\"]\nnames = [{}]\n", names.join(", "))
}

/// Issues until the disk is full, and then makes room.
async fn fill(disk: &Path) {
    let lab = Lab::new().unwrap();
    let mut ca = Ca::start_in(&lab, &disk.join("ca"), HOUR, &many_names()).await.unwrap();
    let caller = Caller::join(&lab, &ca, NODE).await.unwrap();

    let mut issued = 0;
    let refusal = loop {
        let requests: Vec<WorkloadRequest> = (0..32).map(|_| caller.request().unwrap()).collect();
        let outcomes = caller.call(requests).await.unwrap().into_iter().filter_map(|result| result.outcome);
        let (granted, mut refused): (Vec<_>, Vec<_>) = outcomes.partition(|outcome| matches!(outcome, Outcome::Svid(_)));
        issued += granted.len();
        if let Some(Outcome::Refusal(refusal)) = refused.pop() {
            break refusal;
        }
        assert!(issued < 5000, "the disk never gets full");
    };
    assert_eq!((refusal.reason.as_str(), refusal.retryable), ("ledger_full", true), "{}", refusal.message);
    assert!(refusal.message.contains("no space left for the ledger in") && refusal.message.contains("bytes needed"), "{}", refusal.message);
    let recorded = identities(&ca);
    assert_eq!(recorded.len(), issued + 1, "what was issued is recorded, and nothing else");
    let listed = ca.ask(&["identity", "refusals", "--limit", "1"]).unwrap();
    assert_eq!(listed[0]["reason"], "ledger_full", "{listed}");
    let (code, readiness) = http::get(ca.http, "/readyz").await.unwrap();
    assert!(code == 503 && readiness.contains("no space left for the ledger"), "{code} {readiness}");
    assert_eq!(http::get(ca.http, "/livez").await.unwrap().0, 200, "the process stays");
    // The room that is kept for what cannot wait.
    let stolen = caller.spiffe_id().unwrap();
    for (act, why) in [("ban", "its disk was stolen"), ("unban", "it was found")] {
        ca.chancery(&["agent", act, &stolen, "--reason", why]).unwrap();
    }
    assert_eq!(ca.ask(&["log", "acts"]).unwrap()[0]["why"], "it was found");

    let grown = Command::new("mount").args(["-o", &format!("remount,{LARGE}")]).arg(disk).status().unwrap();
    assert!(grown.success());
    // Nobody asks for anything meanwhile, as behind a load balancer that keeps requests from a CA that is not ready.
    wait::until("ready again", Duration::from_secs(10), async || match http::get(ca.http, "/readyz").await.unwrap() {
        (200, _) => Ok(()),
        (code, said) => Err(format!("{code} {said}")),
    })
    .await
    .unwrap();
    // The ban has revoked its certificate: it joins again by itself.
    issue(&caller, 1).await;
    assert_eq!(identities(&ca).len(), issued + 3);
    ca.stop().await.unwrap();
    ca.run(&lab).await.unwrap();
    assert_eq!(identities(&ca).len(), issued + 3);
}
