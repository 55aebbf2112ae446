//! Backups of a running CA, and the CAs that are made of them.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Output;

use age::secrecy::ExposeSecret;
use chancery_identity::X509Svid;
use chancery_proto::chancery::v1::root_service_client::RootServiceClient;
use chancery_proto::chancery::v1::show_identity_request::By;
use chancery_proto::chancery::v1::{
    DiagnoseRequest, HeldCertificate, ListActsRequest, PrepareRootRequest, RecoverRequest, ShowIdentityRequest,
};
use serde_json::Value;

use crate::loss::verified;
use crate::support::{Ca, NODE, issue};

pub(crate) async fn run(arguments: &[&str]) -> Output {
    tokio::process::Command::new(env!("CARGO_BIN_EXE_chancery-ca")).args(arguments).output().await.unwrap()
}

/// What it printed.
pub(crate) async fn succeeds(arguments: &[&str]) -> Value {
    let output = run(&[arguments, &["--output", "json"]].concat()).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Why it did not.
pub(crate) async fn is_refused(arguments: &[&str]) -> String {
    let output = run(arguments).await;
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8(output.stderr).unwrap()
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A CA with some entries, all of them published, and an agent of it.
pub(crate) async fn with_entries() -> (Ca, X509Svid) {
    let ca = Ca::start().await;
    let agent = ca.join(NODE).await;
    issue_some(&ca, &agent).await;
    (ca, agent)
}

pub(crate) async fn issue_some(ca: &Ca, agent: &X509Svid) {
    let mut client = ca.connect(Some(agent)).await;
    for _ in 0..5 {
        issue(&mut client, ca.token(|_| ())).await.unwrap();
    }
    let entries = ca.status().await.ledger_entries;
    ca.until_async("all of it is published", async || published(&ca.data_dir().join("checkpoint")) >= entries).await;
}

/// How many entries the checkpoint in a file has.
pub(crate) fn published(file: &Path) -> u64 {
    std::fs::read_to_string(file).unwrap().lines().nth(1).unwrap().parse().unwrap()
}

/// Keys of age: the public one, and the file of the other.
pub(crate) fn age_keys(directory: &Path) -> (String, PathBuf) {
    let identity = age::x25519::Identity::generate();
    let file = directory.join("age.key");
    std::fs::write(&file, identity.to_string().expose_secret()).unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    (identity.to_public().to_string(), file)
}

#[tokio::test]
async fn a_backup_of_a_running_ca_restores_to_one_that_has_every_entry_before_its_checkpoint_and_issues() {
    let (ca, agent) = with_entries().await;
    let before = ca.status().await.ledger_entries;
    let (elsewhere, data) = (tempfile::tempdir().unwrap(), ca.data_dir());
    let (recipient, identity) = age_keys(elsewhere.path());
    let (to, restored) = (elsewhere.path().join("ca.tar"), elsewhere.path().join("data"));

    let backup = ["backup", "--data-dir", text(&data), "--to", text(&to), "--with-keys", "--recipient", &recipient];
    let (written, ()) = tokio::join!(succeeds(&backup), issue_some(&ca, &agent));
    assert!(written["entries"].as_u64().unwrap() >= before, "{written}");
    assert_eq!(std::fs::metadata(&to).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(ca.get("/metrics").await.lines().any(|line| line.starts_with("chancery_backup_age_seconds ") && !line.contains("inf")));
    ca.stop().await;

    let said = succeeds(&["restore", text(&to), "--data-dir", text(&restored), "--identity", text(&identity)]).await;
    assert_eq!(said["entries"], written["entries"]);
    assert_eq!(std::fs::read_to_string(restored.join("checkpoint")).unwrap(), written["checkpoint"].as_str().unwrap());
    // It starts only if its entries lead to that checkpoint.
    let ca = Ca::try_start(elsewhere, "").await.unwrap();
    assert!(ca.status().await.ledger_entries > written["entries"].as_u64().unwrap());
    issue_some(&ca, &agent).await;
}

#[tokio::test]
async fn a_backup_made_right_after_a_new_root_restores_to_a_ca_that_starts() {
    let (ca, _) = with_entries().await;
    let (elsewhere, data) = (tempfile::tempdir().unwrap(), ca.data_dir());
    let (recipient, identity) = age_keys(elsewhere.path());
    let (to, restored) = (elsewhere.path().join("ca.tar"), elsewhere.path().join("data"));
    let prepare = PrepareRootRequest { reason: "yearly".into(), ..PrepareRootRequest::default() };
    assert!(RootServiceClient::new(ca.admin().await).prepare_root(prepare).await.unwrap().into_inner().changed);
    succeeds(&["backup", "--data-dir", text(&data), "--to", text(&to), "--with-keys", "--recipient", &recipient]).await;
    ca.stop().await;

    succeeds(&["restore", text(&to), "--data-dir", text(&restored), "--identity", text(&identity)]).await;
    Ca::try_start(elsewhere, "").await.unwrap();
}

#[tokio::test]
async fn a_restored_ca_records_that_it_is_one_and_what_agents_have_of_the_certificates_that_it_lacks() {
    let (ca, agent) = with_entries().await;
    let (elsewhere, data) = (tempfile::tempdir().unwrap(), ca.data_dir());
    let (recipient, identity) = age_keys(elsewhere.path());
    let (to, restored) = (elsewhere.path().join("ca.tar"), elsewhere.path().join("data"));
    succeeds(&["backup", "--data-dir", text(&data), "--to", text(&to), "--with-keys", "--recipient", &recipient]).await;
    // In no backup, and with a checkpoint that nobody has seen.
    let held = issue(&mut ca.connect(Some(&agent)).await, ca.token(|_| {})).await.unwrap();
    ca.stop().await;

    let said = succeeds(&["restore", text(&to), "--data-dir", text(&restored), "--identity", text(&identity)]).await;
    assert!(said["next_steps"].to_string().contains("No root is activated or retired before"), "{said}");
    let ca = Ca::try_start(elsewhere, "").await.unwrap();
    let acts = ca.log().await.list_acts(ListActsRequest { page_size: 100, ..ListActsRequest::default() }).await.unwrap().into_inner().acts;
    let act = acts.into_iter().find_map(|record| record.act.filter(|act| act.action == "log.restore")).unwrap();
    assert!(act.actor.starts_with("local:uid=") && act.why.contains("from the backup made at"), "{act:?}");
    assert!(!restored.join("restored").exists(), "it is recorded once");

    let chain = held.chain().iter().map(|certificate| certificate.to_vec()).collect();
    let certificate = HeldCertificate { chain, namespace: "shop".into(), ..HeldCertificate::default() };
    let told = RecoverRequest { certificates: vec![certificate], ..RecoverRequest::default() };
    assert_eq!(ca.connect(Some(&agent)).await.recover(told).await.unwrap().into_inner().recorded, 1);
    let by = Some(By::Serial(held.serial().to_string()));
    let shown = ca.operator().await.show_identity(ShowIdentityRequest { by }).await.unwrap().into_inner();
    assert!(shown.identity.unwrap().issuance.unwrap().recovered);
}

#[tokio::test]
async fn a_backup_is_verified_unpacked_and_any_byte_of_it_that_was_changed_keeps_it_from_being_restored() {
    let (ca, _) = with_entries().await;
    let (elsewhere, data) = (tempfile::tempdir().unwrap(), ca.data_dir());
    let (to, restored) = (elsewhere.path().join("ca.tar"), elsewhere.path().join("data"));
    let written = succeeds(&["backup", "--data-dir", text(&data), "--to", text(&to)]).await;
    let intact = std::fs::read(&to).unwrap();
    let unpacked = tempfile::tempdir().unwrap();
    tar::Archive::new(intact.as_slice()).unpack(unpacked.path()).unwrap();
    let verified = verified(unpacked.path()).await;
    assert_eq!((&verified["verdict"], &verified["entries"]), (&"intact".into(), &written["entries"]), "{verified}");
    let members: Vec<_> = tar::Archive::new(intact.as_slice())
        .entries()
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            (entry.path().unwrap().display().to_string(), entry.raw_file_position() + entry.size() / 2)
        })
        .collect();
    assert!(members.len() >= 8, "{members:?}");
    for (name, middle) in members {
        let mut flipped = intact.clone();
        flipped[usize::try_from(middle).unwrap()] ^= 1;
        std::fs::write(&to, flipped).unwrap();
        let refused = is_refused(&["restore", text(&to), "--data-dir", text(&restored)]).await;
        assert!(refused.contains("ca.tar"), "{name}: {refused}");
    }
    std::fs::write(&to, &intact[..intact.len() - 2048]).unwrap();
    assert!(is_refused(&["restore", text(&to), "--data-dir", text(&restored)]).await.contains("not intact"));
    assert_eq!(std::fs::read_dir(elsewhere.path()).unwrap().count(), 1, "nothing but the backup is there");
}

#[tokio::test]
async fn a_backup_has_no_key_unless_asked_to_and_then_none_that_can_be_read_and_what_is_missing_is_named() {
    let (ca, _) = with_entries().await;
    let (elsewhere, data) = (tempfile::tempdir().unwrap(), ca.data_dir());
    let (without, with) = (elsewhere.path().join("without.tar"), elsewhere.path().join("with.tar"));
    let (recipient, _) = age_keys(elsewhere.path());
    let to = |file| ["backup", "--data-dir", text(&data), "--to", file];
    for one_alone in [["--with-keys"].as_slice(), &["--recipient", &recipient]] {
        assert_eq!(run(&[&to(text(&without)), one_alone].concat()).await.status.code(), Some(2));
    }
    succeeds(&to(text(&without))).await;
    succeeds(&[to(text(&with)).as_slice(), &["--with-keys", "--recipient", &recipient]].concat()).await;
    for file in [&without, &with] {
        let bytes = std::fs::read(file).unwrap();
        assert!(!bytes.windows(11).any(|window| window == b"PRIVATE KEY"), "{}", file.display());
    }
    assert!(is_refused(&to(text(&with))).await.contains("is there already"));

    let restored = elsewhere.path().join("data");
    let said = succeeds(&["restore", text(&without), "--data-dir", text(&restored)]).await;
    assert!(said["next_steps"][0].as_str().unwrap().contains("`keys` and `ledger-keys`"), "{said}");
    assert!(Ca::try_start(elsewhere, "").await.is_err(), "it starts without its keys");
}

#[tokio::test]
async fn an_old_backup_is_refused_when_a_newer_checkpoint_is_known() {
    let (ca, agent) = with_entries().await;
    let (elsewhere, data) = (tempfile::tempdir().unwrap(), ca.data_dir());
    let (to, restored) = (elsewhere.path().join("ca.tar"), elsewhere.path().join("data"));
    let known = elsewhere.path().join("known");
    std::fs::copy(data.join("checkpoint"), &known).unwrap();
    succeeds(&["backup", "--data-dir", text(&data), "--to", text(&to)]).await;
    issue_some(&ca, &agent).await;
    let survived = data.join("checkpoint");
    let restore = |checkpoint| ["restore", text(&to), "--data-dir", text(&restored), "--checkpoint", checkpoint];
    let refused = is_refused(&restore(text(&survived))).await;
    assert!(refused.contains(&format!("has {}", published(&survived))) && refused.contains("would be lost"), "{refused}");
    assert!(!restored.exists());

    let forked = std::fs::read_to_string(&known).unwrap();
    let root = forked.lines().nth(2).unwrap();
    let other = elsewhere.path().join("other");
    std::fs::write(&other, forked.replace(root, "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=")).unwrap();
    assert!(is_refused(&restore(text(&other))).await.contains("the signature of the key"), "a checkpoint that nobody signed says nothing");
    succeeds(&restore(text(&known))).await;
    let again = is_refused(&restore(text(&known))).await;
    assert!(again.contains("is not empty"), "{again}");
}

#[tokio::test]
async fn a_development_ca_is_not_told_to_make_backups() {
    let ca = Ca::start().await;
    let findings = ca.operator().await.diagnose(DiagnoseRequest {}).await.unwrap().into_inner().findings;
    assert!(findings.iter().all(|finding| !finding.text.contains("backup")), "{findings:?}");
}
