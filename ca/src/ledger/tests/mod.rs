//! The ledger on the embedded store, whose log lies on a faulty disk in memory.

mod acts;
mod checkpoints;
mod commit;
mod entries;
mod follow;
mod loss;
mod pages;
mod queries;
mod refusals;
mod tree;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use chancery_identity::Clock;
use chancery_proto::chancery::v1::{IssueReason, Role, Start};
use rcgen::string::Ia5String;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType, SerialNumber};
use tempfile::TempDir;
use time::OffsetDateTime;
use time::macros::datetime;
use uuid::Uuid;

use super::acts::{Change, RefusedAct, Subject};
use super::*;
use crate::keys::FileKeyManager;
use crate::store::embedded::faulty::FaultyFiles;
use crate::store::embedded::{EmbeddedStore, Options};

const START: OffsetDateTime = datetime!(2026-03-01 12:00 UTC);

#[derive(Debug)]
struct TestClock(Mutex<OffsetDateTime>);

impl TestClock {
    fn set(&self, now: OffsetDateTime) {
        *self.0.lock().unwrap() = now;
    }

    fn advance(&self, by: Duration) {
        *self.0.lock().unwrap() += by;
    }
}

impl Clock for TestClock {
    fn now(&self) -> OffsetDateTime {
        *self.0.lock().unwrap()
    }
}

/// A store, its disk and a clock: what is left of a CA when it is restarted.
struct Place {
    dir: TempDir,
    keys: TempDir,
    files: FaultyFiles,
    clock: Arc<TestClock>,
    segment_bytes: u64,
}

impl Place {
    fn new() -> Self {
        let clock = Arc::new(TestClock(Mutex::new(START)));
        Self {
            dir: tempfile::tempdir().unwrap(),
            keys: tempfile::tempdir().unwrap(),
            files: FaultyFiles::new(1),
            clock,
            segment_bytes: 1 << 20,
        }
    }

    async fn store(&self) -> SharedStore {
        self.try_store().await.unwrap()
    }

    async fn try_store(&self) -> Result<SharedStore, StoreError> {
        let options = Options {
            dictionary_dimensions: DICTIONARY_DIMENSIONS.to_vec(),
            segment_bytes: self.segment_bytes,
            act_reserve_bytes: self.segment_bytes / 8,
            files: Arc::new(self.files.clone()),
            ..Options::new(Arc::new(EntryTerms), self.clock.clone())
        };
        Ok(Arc::new(EmbeddedStore::open(self.dir.path(), options).await?.store))
    }

    async fn ledger(&self) -> Ledger {
        Ledger::open(self.store().await, self.clock.clone(), self.options()).await.unwrap()
    }

    fn options(&self) -> LedgerOptions {
        let keys = FileKeyManager::open(self.keys.path().join("ledger-keys")).unwrap();
        LedgerOptions::new("example.org".parse().unwrap(), Arc::new(keys))
    }
}

/// An act that is always possible.
async fn act(ledger: &Ledger) -> Result<u64, LedgerError> {
    ledger.act("local:uid=0", refused_act("agent.ban"), "a test wants it").await
}

fn refused_act(action: &str) -> Change {
    let (action, reason) = (action.to_owned(), "role".to_owned());
    Change::Refused(RefusedAct { action, target: String::new(), reason, message: "no".into(), count: 1 })
}

fn start(version: &str) -> Body {
    Body::Start(Start { version: version.into(), ..Start::default() })
}

/// A certificate as a CA issues it; only the signature is its own key's.
fn certificate(spiffe_id: &str, serial: u128, not_before: OffsetDateTime, lifetime: Duration) -> Bytes {
    static KEY: std::sync::LazyLock<KeyPair> = std::sync::LazyLock::new(|| KeyPair::generate().unwrap());
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.serial_number = Some(SerialNumber::from_slice(&serial.to_be_bytes()));
    params.not_before = not_before;
    params.not_after = not_before + lifetime;
    params.subject_alt_names =
        vec![SanType::URI(Ia5String::try_from(spiffe_id).unwrap()), SanType::DnsName(Ia5String::try_from("cart.shop.svc").unwrap())];
    params.self_signed(&*KEY).unwrap().der().to_vec().into()
}

/// Serial numbers begin with a byte that is neither zero nor negative.
fn serial(number: u64) -> u128 {
    (1 << 120) | u128::from(number)
}

fn uuid(number: u64) -> Uuid {
    Uuid::from_u128(u128::from(number) << 64 | 1)
}

/// What an entry holds of a fingerprint.
fn first_half(whole: [u8; 32]) -> [u8; 16] {
    std::array::from_fn(|at| whole[at])
}

fn issuance(number: u64) -> Issuance {
    Issuance {
        certificate: certificate("spiffe://example.org/ns/shop/sa/cart", serial(number), START, Duration::from_secs(3600)),
        issuing_certificate: [1; 16],
        root: [2; 16],
        role: Role::Agent,
        reason: IssueReason::First,
        cluster: "east".into(),
        node: "node-1".into(),
        node_uid: Some(uuid(100)),
        namespace: "shop".into(),
        service_account: "cart".into(),
        service_account_uid: Some(uuid(200)),
        pod: format!("cart-{number}"),
        pod_uid: Some(uuid(number)),
        token_id: uuid(300 + number).to_string(),
        request_id: uuid(400 + number),
        trust_sequence: 7,
        sidecar_pod_uid: None,
        provenance: Provenance::Issued,
    }
}
