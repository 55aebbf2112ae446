//! What tests of the authority and of issuance stand on: a clock that is set, a store in memory that can be made to fail, a data directory.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use chancery_identity::{Clock, checkpoint};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose,
    SerialNumber,
};
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use tokio::sync::Notify;

use super::{Authority, AuthorityError, DataDirectory, Kind, Settings};
use crate::keys::{FileKeyManager, KeyManager};
use crate::ledger::{EntryTerms, Ledger, LedgerOptions};
use crate::store::{Group, Head, Lease, Store, StoreError, Term, Terms};

#[derive(Debug)]
pub(crate) struct TestClock(Mutex<OffsetDateTime>);

impl TestClock {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(OffsetDateTime::from_unix_timestamp(1_800_000_000).unwrap())))
    }

    pub(crate) fn advance(&self, by: time::Duration) {
        *self.0.lock().unwrap() += by;
    }
}

impl Clock for TestClock {
    fn now(&self) -> OffsetDateTime {
        *self.0.lock().unwrap()
    }
}

/// What the next commits do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Commits {
    #[default]
    Work,
    /// There is no room.
    Full,
    /// There is room for acts alone, as on a disk with nothing left but what is reserved for them.
    ActsOnly,
    /// They never come back, as in a process that was killed.
    Hang,
}

/// A store whose entries survive the ledgers that are opened over it.
#[derive(Debug, Default)]
pub(crate) struct MemoryStore {
    entries: Mutex<Vec<Bytes>>,
    epoch: Mutex<u64>,
    /// How many there were when the newest act was among them.
    up_to_acts: Mutex<usize>,
    cells: Mutex<BTreeMap<String, Bytes>>,
    commits: Mutex<Commits>,
    /// After so many more commits they do that.
    later: Mutex<Option<(usize, Commits)>>,
    hanging: Notify,
}

impl MemoryStore {
    pub(crate) fn set_commits(&self, commits: Commits) {
        *self.commits.lock().unwrap() = commits;
        *self.later.lock().unwrap() = None;
    }

    /// Has commits do something else after the next few.
    pub(crate) fn set_commits_after(&self, next: usize, commits: Commits) {
        *self.later.lock().unwrap() = Some((next, commits));
    }

    /// Comes back when a commit hangs.
    pub(crate) async fn hangs(&self) {
        self.hanging.notified().await;
    }

    fn next_commit(&self) -> Commits {
        let mut later = self.later.lock().unwrap();
        match &mut *later {
            Some((0, commits)) => {
                *self.commits.lock().unwrap() = *commits;
                *later = None;
            }
            Some((next, _)) => *next -= 1,
            None => {}
        }
        *self.commits.lock().unwrap()
    }

    /// Forgets everything but the first entries, among which is no act.
    pub(crate) fn cut(&self, entries: usize) {
        self.entries.lock().unwrap().truncate(entries);
        *self.epoch.lock().unwrap() = 0;
    }

    /// Forgets what was recorded behind the newest act.
    pub(crate) fn cut_behind_acts(&self) {
        self.entries.lock().unwrap().truncate(*self.up_to_acts.lock().unwrap());
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.lock().unwrap().len()
    }
}

#[async_trait]
impl Store for MemoryStore {
    fn log_id(&self) -> [u8; 16] {
        [7; 16]
    }

    fn sealed(&self) -> u64 {
        0
    }

    async fn head(&self) -> Result<Head, StoreError> {
        let entries = self.len() as u64;
        Ok(Head { entries, epoch: *self.epoch.lock().unwrap(), frame: [0; 32] })
    }

    async fn commit(&self, expected: Head, group: Group) -> Result<Head, StoreError> {
        match self.next_commit() {
            Commits::Work => {}
            Commits::ActsOnly if group.raises_epoch => {}
            Commits::Full | Commits::ActsOnly => {
                return Err(StoreError::Full { place: "memory".into(), detail: "by order of the test".into() });
            }
            Commits::Hang => {
                self.hanging.notify_one();
                std::future::pending::<()>().await;
            }
        }
        let head = self.head().await?;
        if head != expected {
            return Err(StoreError::HeadMoved(head));
        }
        self.entries.lock().unwrap().extend(group.entries);
        if group.raises_epoch {
            *self.up_to_acts.lock().unwrap() = self.len();
        }
        *self.epoch.lock().unwrap() += u64::from(group.raises_epoch);
        self.head().await
    }

    async fn make_room(&self) -> Result<(), StoreError> {
        match *self.commits.lock().unwrap() {
            Commits::Full | Commits::ActsOnly => Err(StoreError::Full { place: "memory".into(), detail: "by order of the test".into() }),
            Commits::Work | Commits::Hang => Ok(()),
        }
    }

    async fn publish_checkpoint(&self, _: Head) -> Result<(), StoreError> {
        Ok(())
    }

    async fn read(&self, range: Range<u64>, _: usize) -> Result<Vec<Bytes>, StoreError> {
        let entries = self.entries.lock().unwrap();
        let at = |index: u64| usize::try_from(index).unwrap().min(entries.len());
        Ok(entries[at(range.start)..at(range.end)].to_vec())
    }

    async fn look_up(&self, term: &Term, before: u64, limit: usize) -> Result<Vec<u64>, StoreError> {
        let entries = self.entries.lock().unwrap();
        let found = (0u64..).zip(entries.iter()).filter(|(index, entry)| *index < before && EntryTerms.terms(entry).contains(term));
        let mut found: Vec<u64> = found.map(|(index, _)| index).collect();
        found.reverse();
        found.truncate(limit);
        Ok(found)
    }

    async fn values(&self, _: u8, _: &[u8], _: Option<&[u8]>, _: usize) -> Result<Vec<Bytes>, StoreError> {
        Ok(Vec::new())
    }

    async fn hashes(&self, level: u8, range: Range<u64>) -> Result<Vec<[u8; 32]>, StoreError> {
        let entries = self.entries.lock().unwrap();
        let leaves: Vec<_> = entries.iter().map(|entry| checkpoint::leaf_hash(entry)).collect();
        let subtrees = leaves.chunks_exact(1 << (8 * u32::from(level))).map(checkpoint::root_of);
        let place = |index: u64| usize::try_from(index).unwrap();
        Ok(subtrees.skip(place(range.start)).take(place(range.end - range.start)).collect())
    }

    async fn cell(&self, name: &str) -> Result<Option<Bytes>, StoreError> {
        Ok(self.cells.lock().unwrap().get(name).cloned())
    }

    async fn compare_and_swap(&self, name: &str, expected: Option<&[u8]>, new: Option<Bytes>) -> Result<bool, StoreError> {
        let mut cells = self.cells.lock().unwrap();
        if cells.get(name).map(|value| &value[..]) != expected {
            return Ok(false);
        }
        match new {
            Some(new) => cells.insert(name.to_owned(), new),
            None => cells.remove(name),
        };
        Ok(true)
    }

    async fn lease(&self, name: &str, _: &str, _: Duration) -> Result<Option<Lease>, StoreError> {
        Ok(Some(Lease { name: name.to_owned(), epoch: 1 }))
    }

    async fn scrub(&self, _: u64) -> Result<u64, StoreError> {
        Ok(0)
    }

    async fn failed(&self) -> StoreError {
        std::future::pending().await
    }

    async fn close(&self) -> Result<(), StoreError> {
        Ok(())
    }
}

/// A CA's data directory with its store and clock; it can be started again and again.
pub(crate) struct TestCa {
    pub(crate) parent: tempfile::TempDir,
    pub(crate) store: Arc<MemoryStore>,
    pub(crate) clock: Arc<TestClock>,
    pub(crate) settings: Settings,
}

/// One run of it.
pub(crate) struct Run {
    pub(crate) authority: Arc<Authority>,
    pub(crate) ledger: Ledger,
    pub(crate) directory: DataDirectory,
}

impl TestCa {
    pub(crate) fn new() -> Self {
        Self::in_directory(tempfile::tempdir().unwrap())
    }

    /// In memory where there is such a file system: nothing of it has to outlive the test.
    pub(crate) fn in_memory() -> Self {
        Self::in_directory(tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap())
    }

    fn in_directory(parent: tempfile::TempDir) -> Self {
        Self { parent, store: Arc::default(), clock: TestClock::new(), settings: Settings::default() }
    }

    pub(crate) fn data(&self) -> std::path::PathBuf {
        self.parent.path().join("data")
    }

    pub(crate) async fn ledger(&self) -> Ledger {
        let keys = Arc::new(FileKeyManager::open(self.parent.path().join("ledger-keys")).unwrap());
        let options = LedgerOptions::new("example.org".parse().unwrap(), keys);
        Ledger::open(self.store.clone(), self.clock.clone(), options).await.unwrap()
    }

    pub(crate) async fn start(&self) -> Run {
        self.try_start(|keys| keys).await.unwrap()
    }

    /// Starts with `decorate` around the key manager.
    pub(crate) async fn try_start(&self, decorate: impl FnOnce(Arc<dyn KeyManager>) -> Arc<dyn KeyManager>) -> Result<Run, AuthorityError> {
        let directory = DataDirectory::open(&self.data(), Kind::Development).unwrap();
        let ledger = self.ledger().await;
        let keys = decorate(Arc::new(FileKeyManager::open(directory.keys()).unwrap()));
        let trust_domain = "example.org".parse().unwrap();
        let authority = Authority::open(trust_domain, self.settings.clone(), &directory, keys, ledger.clone(), self.clock.clone()).await?;
        Ok(Run { authority, ledger, directory })
    }
}

/// A company's root and the CA below it that signs requests.
pub(crate) struct Corporate {
    pub(crate) root: CertifiedIssuer<'static, KeyPair>,
    pub(crate) signing: CertifiedIssuer<'static, KeyPair>,
}

impl Corporate {
    pub(crate) fn new() -> Self {
        let authority = |name: &str| {
            let mut params = CertificateParams::default();
            params.distinguished_name.push(DnType::CommonName, name);
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
            params
        };
        let key = || KeyPair::generate().unwrap();
        let root = CertifiedIssuer::self_signed(authority("Corporate root"), key()).unwrap();
        let signing = CertifiedIssuer::signed_by(authority("Corporate signing CA"), key(), &root).unwrap();
        Self { root, signing }
    }

    /// As requested, for two years from `now` on, after `change`.
    pub(crate) fn sign(&self, csr: &[u8], now: OffsetDateTime, change: impl FnOnce(&mut CertificateParams)) -> CertificateDer<'static> {
        let mut request = CertificateSigningRequestParams::from_der(&csr.into()).unwrap();
        let params = &mut request.params;
        params.serial_number = Some(SerialNumber::from_slice(&[7; 8]));
        (params.not_before, params.not_after) = (now - time::Duration::HOUR, now + time::Duration::days(730));
        params.use_authority_key_identifier_extension = true;
        change(params);
        request.signed_by(&self.signing).unwrap().der().clone()
    }
}
