//! An old backup, and entries after it that are lost: the ledger that begins in its place.

use std::path::{Path, PathBuf};

use chancery_identity::X509Svid;
use chancery_identity::csr::{self, KeyType};
use chancery_proto::chancery::v1::act::Change;
use chancery_proto::chancery::v1::show_identity_request::By;
use chancery_proto::chancery::v1::{
    ActRecord, BanRequest, IdentityFilter, ListActsRequest, ListIdentitiesRequest, ShowIdentityRequest, UnbanRequest,
};
use serde_json::Value;

use crate::backup::{age_keys, is_refused, issue_some, published, succeeds, text};
use crate::roles::is_let_in;
use crate::support::{Ca, NODE, issue};

/// A backup, the checkpoint of the ledger that went on after it, and where to restore to.
struct Lost {
    place: tempfile::TempDir,
    old: tempfile::TempDir,
    /// Entries in the backup.
    entries: u64,
    /// The agent of [`NODE`]; another one was banned before the backup.
    agent: X509Svid,
    banned: X509Svid,
    trust_sequence: u64,
    known: PathBuf,
}

impl Lost {
    async fn some() -> Self {
        let ca = Ca::start().await;
        let (agent, banned) = (ca.join(NODE).await, ca.join("node-2").await);
        let ban = BanRequest { agent: banned.id().to_string(), reason: "its disk was stolen".into() };
        ca.operator().await.ban(ban).await.unwrap();
        issue_some(&ca, &agent).await;
        let (place, data) = (tempfile::tempdir().unwrap(), ca.data_dir());
        let (recipient, _) = age_keys(place.path());
        let to = place.path().join("ca.tar");
        let backup = ["backup", "--data-dir", text(&data), "--to", text(&to), "--with-keys", "--recipient", &recipient];
        let entries = succeeds(&backup).await["entries"].as_u64().unwrap();
        issue_some(&ca, &agent).await;
        let trust_sequence = ca.status().await.trust_sequence;
        let old = ca.stop().await;
        let known = old.path().join("data/checkpoint");
        Self { place, old, entries, agent, banned, trust_sequence, known }
    }

    fn restore(&self) -> Vec<String> {
        let at = |name: &str| self.place.path().join(name).display().to_string();
        let (data, key) = (at("data"), at("age.key"));
        [
            "restore".into(),
            at("ca.tar"),
            "--data-dir".into(),
            data,
            "--identity".into(),
            key,
            "--checkpoint".into(),
            text(&self.known).into(),
        ]
        .into()
    }

    /// A ledger in its place, and what was said about it.
    async fn accepted(self) -> (Ca, Value, Self) {
        let restore = self.restore();
        let accept = ["--accept-loss", "--reason", "the disk is gone"];
        let said = succeeds(&restore.iter().map(String::as_str).chain(accept).collect::<Vec<_>>()).await;
        let Self { place, old, entries, agent, banned, trust_sequence, known } = self;
        let ca = Ca::try_start(place, "").await.unwrap();
        (ca, said, Self { place: tempfile::tempdir().unwrap(), old, entries, agent, banned, trust_sequence, known })
    }
}

async fn acts(ca: &Ca) -> Vec<ActRecord> {
    ca.log().await.list_acts(ListActsRequest { page_size: 100, ..ListActsRequest::default() }).await.unwrap().into_inner().acts
}

/// What `chancery log verify` says of a data directory that is intact.
pub(crate) async fn verified(data: &Path) -> Value {
    let output = tokio::process::Command::new(env!("CARGO_BIN_EXE_chancery"))
        .args(["--output", "json", "log", "verify", "--certificates", "--data-dir", text(data)])
        .output()
        .await
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[tokio::test]
async fn the_new_ledger_says_what_is_missing_and_the_old_one_can_still_be_verified() {
    let lost = Lost::some().await;
    let restore = lost.restore();
    let refused = is_refused(&restore.iter().map(String::as_str).collect::<Vec<_>>()).await;
    assert!(refused.contains("--accept-loss --reason"), "{refused}");
    let (ca, said, lost) = lost.accepted().await;
    let known = std::fs::read_to_string(&lost.known).unwrap();
    let (origin, size) = (known.lines().next().unwrap(), published(&lost.known));

    let first = acts(&ca).await.pop().unwrap();
    let act = first.act.unwrap();
    assert_eq!((first.entry, &*act.action, &*act.why), (0, "log.accept-loss", "the disk is gone"));
    assert!(act.actor.starts_with("local:uid="), "{}", act.actor);
    let Some(Change::Loss(loss)) = act.change else { panic!("{:?}", act.change) };
    assert_eq!((&*loss.origin, loss.first, loss.end, loss.checkpoint), (origin, lost.entries, size, known.clone()));
    assert_eq!(
        (said["new_ledger"]["missing_from"].as_u64(), said["new_ledger"]["missing_until"].as_u64()),
        (Some(lost.entries), Some(size))
    );
    let new = std::fs::read_to_string(ca.data_dir().join("checkpoint")).unwrap();
    assert!(new.lines().next().unwrap() != origin && said["new_ledger"]["origin"] == new.lines().next().unwrap());

    let previous = PathBuf::from(said["new_ledger"]["previous"].as_str().unwrap());
    assert_eq!(verified(&previous).await["entries"], lost.entries);
    let data = ca.data_dir();
    let _kept = ca.stop().await;
    assert_eq!(verified(&data).await["verdict"], "intact");
}

#[tokio::test]
async fn what_was_in_force_in_the_backup_still_is_and_agents_go_on() {
    let (ca, _, lost) = Lost::some().await.accepted().await;
    let status = ca.status().await;
    assert!(status.trust_sequence > lost.trust_sequence, "{} {}", status.trust_sequence, lost.trust_sequence);
    let serial = lost.agent.serial().to_string();
    let shown = ca.operator().await.show_identity(ShowIdentityRequest { by: Some(By::Serial(serial)) }).await;
    let shown = shown.unwrap().into_inner();
    let issuance = shown.identity.unwrap().issuance.unwrap();
    assert!(issuance.carried_over.is_some() && !issuance.recovered, "{issuance:?}");
    assert!(shown.standing.unwrap().root.is_some(), "its root is in the ledger");
    let filter = Some(IdentityFilter { unexpired: true, namespace: "shop".into(), ..IdentityFilter::default() });
    let request = ListIdentitiesRequest { filter, page_size: 100, ..ListIdentitiesRequest::default() };
    assert_eq!(ca.operator().await.list_identities(request).await.unwrap().into_inner().identities.len(), 5);

    issue_some(&ca, &lost.agent).await;
    // What a ban revoked is revoked in the new ledger as well.
    assert!(!is_let_in(&ca, &lost.banned).await);
    let (csr, _) = csr::generate(KeyType::EcdsaP256, None).unwrap();
    let refused = ca.connect(None).await.join(Ca::join_request(ca.agent_token("node-2"), csr)).await.unwrap_err();
    assert!(refused.message().contains("was banned"), "{refused}");
    let unban = UnbanRequest { agent: lost.banned.id().to_string(), reason: "it was found".into() };
    ca.operator().await.unban(unban).await.unwrap();
    let token = ca.token(|request| request.node = "node-2".into());
    issue(&mut ca.connect(Some(&ca.join("node-2").await)).await, token).await.unwrap();
    drop(lost.old);
}

#[tokio::test]
async fn a_backup_of_the_new_ledger_has_the_old_one_too() {
    let (ca, said, _) = Lost::some().await.accepted().await;
    let (elsewhere, data) = (tempfile::tempdir().unwrap(), ca.data_dir());
    let (to, restored) = (elsewhere.path().join("ca.tar"), elsewhere.path().join("data"));
    succeeds(&["backup", "--data-dir", text(&data), "--to", text(&to)]).await;
    succeeds(&["restore", text(&to), "--data-dir", text(&restored)]).await;
    let previous = PathBuf::from(said["new_ledger"]["previous"].as_str().unwrap());
    let name = previous.file_name().unwrap();
    assert_eq!(verified(&restored.join("previous").join(name)).await["verdict"], "intact");
}

#[tokio::test]
async fn without_the_old_ledgers_keys_nothing_is_begun_and_they_are_taken_from_where_they_are() {
    let lost = Lost::some().await;
    let (from, data) = (lost.place.path().join("ca.tar"), lost.place.path().join("data"));
    let mut accept = vec!["restore", text(&from), "--data-dir", text(&data), "--accept-loss", "--reason", "the disk is gone"];
    let refused = is_refused(&accept).await;
    assert!(refused.contains("--ledger-keys") && !data.exists(), "{refused}");
    let keys = lost.old.path().join("data/ledger-keys");
    accept.extend(["--ledger-keys", text(&keys)]);
    let said = succeeds(&accept).await;
    assert_eq!(said["new_ledger"]["missing_from"], said["new_ledger"]["missing_until"], "nobody knows");
    assert!(said["next_steps"].to_string().contains("copy `keys` of the old data directory"), "{said}");
}
