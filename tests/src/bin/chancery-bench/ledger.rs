//! A ledger of millions of entries: what a question, a proof, an append and an opening cost, what it takes of disk and memory, and how fast it
//! is verified without its CA.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use chancery_proto::chancery::v1::log_service_client::LogServiceClient;
use chancery_proto::chancery::v1::operator_service_client::OperatorServiceClient;
use chancery_proto::chancery::v1::prove_inclusion_request::Of;
use chancery_proto::chancery::v1::{IdentityFilter, ListIdentitiesRequest, ProveInclusionRequest};
use chancery_tests::ca::Ca;
use chancery_tests::lab::Lab;
use chancery_tests::ledger::{Filler, Pod, Took};
use chancery_tests::{Result, secrets, tools};
use serde_json::Value;
use tonic::transport::Channel;

use crate::report::{Limit, Report, remark};
use crate::{issue, memory};

const LIFETIME: Duration = Duration::from_secs(3600);
/// What an entry and its share of the index take at most while tables are merged.
const ROOM_PER_ENTRY: u64 = 2048;
const ROOM_BESIDE: u64 = 2 << 30;
/// Appends are timed in so many rounds …
const ROUNDS: u64 = 20;
/// … of so many entries; at full size of more, since the index is written out every few rounds.
const ROUND: u64 = 10_000;
const FULL_ROUND: u64 = 50_000;
/// Of each kind of question.
const QUESTIONS: u64 = 1000;
/// Issued for real before the CA is killed, so that the index lacks what the log holds.
const BEFORE_THE_KILL: usize = 20_000;
const MAX_ANSWER_BYTES: usize = 64 << 20;

/// With `entries` entries.
pub(crate) async fn measure(directory: &Path, entries: u64, report: &mut Report) -> Result<()> {
    check_room(directory, entries)?;
    let lab = Lab::new()?;
    let place = tempfile::tempdir_in(directory)?;
    let (data, empty) = (place.path().join("ca"), place.path().join("empty"));
    Ca::start_in(&lab, &empty, LIFETIME, issue::LIMITS).await?.stop().await?;
    let mut ca = Ca::start_in(&lab, &data, LIFETIME, issue::LIMITS).await?;
    ca.stop().await?;
    let serials = fill(&data, &empty, entries, report).await?;

    let opened = open(&mut ca, &lab).await?;
    report.line("ledger_open_clean", opened.as_secs_f64(), "s", Limit::AtMost(1.0))?;
    remark(&format!("at {entries} entries; until a question is answered"))?;
    ask(&ca, entries, &serials, report).await?;
    prove(&ca, entries, &serials, report).await?;
    report.line("ledger_rss", memory::resident_mib(ca.id()?)?, "MiB", Limit::AtMost(200.0))?;
    remark(&format!("at {entries} entries; after the questions and proofs"))?;

    let (client, requests) = issue::client(&lab, &ca).await?;
    issue::drive(&client, &requests, BEFORE_THE_KILL, issue::BATCH).await?;
    ca.kill()?;
    let opened = open(&mut ca, &lab).await?;
    report.line("ledger_open_killed", opened.as_secs_f64(), "s", Limit::AtMost(5.0))?;
    remark(&format!("at {entries} entries, and {BEFORE_THE_KILL} issued just before the kill; until a question is answered"))?;
    ca.stop().await?;
    verify(&data, report)
}

fn check_room(directory: &Path, entries: u64) -> Result<()> {
    let disk = rustix::fs::statvfs(directory)?;
    let (free, needed) = (disk.f_bavail * disk.f_frsize, ROOM_BESIDE + entries * ROOM_PER_ENTRY);
    if free < needed {
        let (free, needed) = (free >> 20, needed >> 20);
        return Err(format!("{} has {free} MiB free, and a ledger of {entries} entries needs up to {needed}", directory.display()).into());
    }
    Ok(())
}

/// Fills the ledger in `data`, and returns the serials for questions. The one in `empty` has no entries yet.
async fn fill(data: &Path, empty: &Path, entries: u64, report: &mut Report) -> Result<Vec<String>> {
    let filler = Filler::open(data).await?;
    let round = if entries > ROUNDS * FULL_ROUND { FULL_ROUND } else { ROUND };
    filler.fill(entries.saturating_sub(ROUNDS * round)).await?;
    append(&filler, empty, round, entries, report).await?;
    let mut serials = Vec::new();
    for question in 0..QUESTIONS {
        serials.extend(filler.serial(spread(question, entries)).await?.map(|serial| serial.to_string()));
    }
    let certificates = filler.certificate_bytes();
    filler.close().await?;
    let used = disk_bytes(&data.join("ledger"))?;
    #[allow(clippy::cast_precision_loss, reason = "bytes of files are far below 2^52")]
    let ratio = used as f64 / certificates as f64;
    report.line("ledger_disk_ratio", ratio, "ratio", Limit::AtMost(1.8))?;
    remark(&format!("at {entries} entries; {} bytes each, certificates {}", used / entries, certificates / entries))?;
    Ok(serials)
}

/// Appends to both ledgers in turn: a disk that has been written to for minutes is slower than before, for either.
async fn append(filler: &Filler, empty: &Path, round: u64, entries: u64, report: &mut Report) -> Result<()> {
    let empty = Filler::open(empty).await?;
    let (mut at_none, mut at_all) = (Took::default(), Took::default());
    for _ in 0..ROUNDS {
        at_none += empty.time(round).await?;
        at_all += filler.time(round).await?;
    }
    empty.close().await?;
    let ratio = |all: Duration, none: Duration| none.as_secs_f64() / all.as_secs_f64();
    let (durable, found) = (ratio(at_all.durable, at_none.durable), ratio(at_all.found, at_none.found));
    report.line("ledger_append_ratio", durable.min(found), "ratio", Limit::AtLeast(0.9))?;
    #[allow(clippy::cast_precision_loss, reason = "counts of entries are far below 2^52")]
    let rate = |took: Duration| (ROUNDS * round) as f64 / took.as_secs_f64();
    remark(&format!("at {entries} entries; durable per second: {:.0}, and {:.0} at none", rate(at_all.durable), rate(at_none.durable)))?;
    remark(&format!("durable, and found, per second: {:.0}, and {:.0} at none", rate(at_all.found), rate(at_none.found)))
}

/// Numbers below `end` that are far from each other.
fn spread(question: u64, end: u64) -> u64 {
    question.wrapping_mul(0x9E37_79B9_7F4A_7C15) % end
}

/// What is allocated for the files below `directory`.
fn disk_bytes(directory: &Path) -> Result<u64> {
    let mut bytes = 0;
    for file in std::fs::read_dir(directory)? {
        let file = file?;
        let metadata = file.metadata()?;
        bytes += if metadata.is_dir() { disk_bytes(&file.path())? } else { metadata.blocks() * 512 };
    }
    Ok(bytes)
}

/// Starts the CA, and tells how long it took until a question was answered.
async fn open(ca: &mut Ca, lab: &Lab) -> Result<Duration> {
    let started = Instant::now();
    ca.run(lab).await?;
    let mut operator = operator(ca).await?;
    let nobody = IdentityFilter { token_id: "nobody".into(), ..IdentityFilter::default() };
    question(&mut operator, nobody).await?;
    Ok(started.elapsed())
}

/// Questions as operators ask them; the line is the worst kind's.
async fn ask(ca: &Ca, entries: u64, serials: &[String], report: &mut Report) -> Result<()> {
    let mut operator = operator(ca).await?;
    let pod = |question| Pod::of(spread(question, entries));
    let mut by_spiffe_id = Vec::new();
    let mut by_pod = Vec::new();
    for question in 0..QUESTIONS {
        let spiffe_id = pod(question).spiffe_id()?.to_string();
        by_spiffe_id.push(IdentityFilter { spiffe_id, ..IdentityFilter::default() });
        let Pod { namespace, name, uid, .. } = pod(question);
        let pod = if question % 2 == 0 { uid.to_string() } else { format!("{namespace}/{name}") };
        by_pod.push(IdentityFilter { pod, ..IdentityFilter::default() });
    }
    let by_serial = serials.iter().map(|serial| IdentityFilter { serial: serial.clone(), ..IdentityFilter::default() }).collect();
    let mut worst = Duration::ZERO;
    let mut said = format!("at {entries} entries; p50 and p99");
    for (kind, filters) in [("SPIFFE ID", by_spiffe_id), ("serial", by_serial), ("pod", by_pod)] {
        let mut took = Vec::new();
        for filter in filters {
            took.push(question(&mut operator, filter).await?);
        }
        took.sort_unstable();
        let (p50, p99) = (took[took.len() / 2], took[took.len() * 99 / 100]);
        worst = worst.max(p99);
        said = format!("{said} by {kind} {p50:.1?}, {p99:.1?};");
    }
    report.latency("ledger_query_p99", worst.as_secs_f64() * 1e3, "ms", Limit::AtMost(5.0))?;
    remark(said.trim_end_matches(';'))
}

/// Inclusion proofs as auditors ask for them: of entries by their numbers, and of certificates by their serial numbers.
async fn prove(ca: &Ca, entries: u64, serials: &[String], report: &mut Report) -> Result<()> {
    let mut log = LogServiceClient::new(secrets::connect(&ca.admin_socket()).await?);
    let by_entry = (0..QUESTIONS).map(|question| Of::Entry(spread(question, entries)));
    let by_serial = serials.iter().map(|serial| Of::Serial(serial.clone()));
    let mut took = Vec::new();
    for of in by_entry.chain(by_serial) {
        let request = ProveInclusionRequest { of: Some(of) };
        let started = Instant::now();
        log.prove_inclusion(request).await?;
        took.push(started.elapsed());
    }
    took.sort_unstable();
    let (p50, p99) = (took[took.len() / 2], took[took.len() * 99 / 100]);
    report.latency("ledger_proof_p99", p99.as_secs_f64() * 1e3, "ms", Limit::AtMost(5.0))?;
    remark(&format!("at {entries} entries; p50 {p50:.1?}, with the entry itself"))
}

/// `chancery log verify` over the data directory of a CA that does not run: frames, entries, tree, tiles and checkpoint.
fn verify(data: &Path, report: &mut Report) -> Result<()> {
    let mut command = Command::new(tools::chancery("chancery")?);
    command.args(["--output", "json", "log", "verify", "--data-dir"]).arg(data);
    let started = Instant::now();
    let output = command.output()?;
    let took = started.elapsed();
    if !output.status.success() {
        return Err(format!("`chancery log verify` ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr)).into());
    }
    let verified: Value = serde_json::from_slice(&output.stdout)?;
    let entries = verified["entries"].as_f64().ok_or("`chancery log verify` does not say how many entries there were")?;
    report.line("ledger_verify_rate", entries / took.as_secs_f64(), "/s", Limit::AtLeast(300_000.0))?;
    remark(&format!("{entries} entries in {took:.2?}"))
}

async fn operator(ca: &Ca) -> Result<OperatorServiceClient<Channel>> {
    let channel = secrets::connect(&ca.admin_socket()).await?;
    Ok(OperatorServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES))
}

/// How long the first page takes.
async fn question(operator: &mut OperatorServiceClient<Channel>, filter: IdentityFilter) -> Result<Duration> {
    let request = ListIdentitiesRequest { filter: Some(filter), ..ListIdentitiesRequest::default() };
    let started = Instant::now();
    operator.list_identities(request).await?;
    Ok(started.elapsed())
}
