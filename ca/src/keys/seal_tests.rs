//! Sealed keys: what lies on the disk, what opens it, and what is left where that was interrupted.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use chancery_identity::csr::KeyType;
use chancery_process::files;
use rustls_pki_types::PrivatePkcs8KeyDer;
use rustls_pki_types::pem::PemObject;

use super::{FileKeyManager, KeyError, KeyManager, Secret, contract, reseal};

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn keys(&self) -> PathBuf {
        self.0.path().join("keys")
    }

    fn passphrase(&self, words: &str) -> Secret {
        let path = self.0.path().join("passphrase");
        files::write_private(&path, words.as_bytes()).unwrap();
        Secret::passphrase(&path).unwrap()
    }

    fn open(&self, words: &str) -> Result<FileKeyManager, KeyError> {
        FileKeyManager::open_sealed(self.keys(), &self.passphrase(words))
    }

    /// A directory with a key in clear, and the key's file.
    async fn with_plain_key() -> (Self, Vec<u8>) {
        let place = Self::new();
        FileKeyManager::open(place.keys()).unwrap().generate("root-1", KeyType::EcdsaP256).await.unwrap();
        let pem = std::fs::read(place.keys().join("root-1.pem")).unwrap();
        (place, pem)
    }

    fn files(&self) -> Vec<String> {
        let mut names: Vec<_> =
            std::fs::read_dir(self.keys()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// Whether any file below holds the private key of `pem`, as text or as bytes.
fn holds_key(directory: &Path, pem: &[u8]) -> bool {
    let der = PrivatePkcs8KeyDer::from_pem_slice(pem).unwrap();
    let text = std::str::from_utf8(pem).unwrap().lines().nth(1).unwrap().to_owned();
    // The private scalar of a P-256 key lies behind 36 bytes of PKCS#8 and SEC1 headers.
    let scalar = &der.secret_pkcs8_der()[36..68];
    std::fs::read_dir(directory).unwrap().any(|entry| {
        let bytes = std::fs::read(entry.unwrap().path()).unwrap();
        bytes.windows(32).any(|window| window == scalar) || bytes.windows(text.len()).any(|window| window == text.as_bytes())
    })
}

#[tokio::test]
async fn sealed_keys_keep_the_contract() {
    contract::check(&Place::new().open("open sesame").unwrap()).await;
}

#[tokio::test]
async fn a_key_in_clear_is_sealed_at_the_next_opening_and_nothing_of_it_is_left_on_the_disk() {
    let (place, pem) = Place::with_plain_key().await;
    let public = FileKeyManager::open(place.keys()).unwrap().public_key("root-1").await.unwrap();
    assert!(holds_key(&place.keys(), &pem));

    let sealed = place.open("open sesame\n").unwrap();
    assert_eq!(sealed.public_key("root-1").await.unwrap(), public);
    sealed.generate("issuing-1", KeyType::EcdsaP256).await.unwrap();
    assert!(!holds_key(&place.keys(), &pem));
    assert_eq!(place.files(), ["issuing-1.pem.age", "root-1.pem.age", "sealing-key.age"]);
    for file in place.files() {
        let bytes = std::fs::read(place.keys().join(&file)).unwrap();
        assert!(bytes.starts_with(b"age-encryption.org/v1"), "{file}");
        assert_eq!(std::fs::metadata(place.keys().join(&file)).unwrap().permissions().mode() & 0o777, 0o600, "{file}");
    }

    let again = place.open("open sesame").unwrap();
    assert_eq!(again.public_key("root-1").await.unwrap(), public);
    assert_eq!(again.list().await.unwrap(), ["issuing-1", "root-1"]);
}

#[tokio::test]
async fn what_an_interruption_between_sealing_and_removing_left_in_clear_is_removed() {
    let (place, pem) = Place::with_plain_key().await;
    drop(place.open("open sesame").unwrap());
    files::write_private(&place.keys().join("root-1.pem"), &pem).unwrap();
    drop(place.open("open sesame").unwrap());
    assert_eq!(place.files(), ["root-1.pem.age", "sealing-key.age"]);

    let (other, _) = Place::with_plain_key().await;
    std::fs::copy(other.keys().join("root-1.pem"), place.keys().join("root-1.pem")).unwrap();
    let error = place.open("open sesame").unwrap_err().to_string();
    assert!(error.contains("another key than the sealed one"), "{error}");
    assert!(place.keys().join("root-1.pem").exists());
}

#[tokio::test]
async fn without_the_right_secret_nothing_opens_and_nothing_is_changed() {
    let (place, _) = Place::with_plain_key().await;
    drop(place.open("open sesame").unwrap());
    let before = place.files();

    let error = place.open("open barley").unwrap_err().to_string();
    assert!(error.contains("passphrase does not open it") && error.contains("[keys]") && !error.contains("barley"), "{error}");
    let error = FileKeyManager::open(place.keys()).unwrap_err().to_string();
    assert!(error.contains("set `passphrase_file` or `identity_file` under [keys]"), "{error}");
    assert_eq!(place.files(), before);

    std::fs::remove_file(place.keys().join("sealing-key.age")).unwrap();
    let error = FileKeyManager::open(place.keys()).unwrap_err().to_string();
    assert!(error.contains("sealing key is missing"), "{error}");
}

#[tokio::test]
async fn keys_are_sealed_anew_with_an_identity_and_the_old_passphrase_opens_nothing_any_more() {
    let (place, _) = Place::with_plain_key().await;
    let old = place.passphrase("open sesame");
    let path = place.0.path().join("identity");
    let error = reseal(&place.keys(), &old, &old).unwrap_err().to_string();
    assert!(error.contains("sealed when the CA starts"), "{error}");
    drop(FileKeyManager::open_sealed(place.keys(), &old).unwrap());

    files::write_private(&path, b"# public key: none\n").unwrap();
    assert!(Secret::identity(&path).unwrap_err().to_string().contains("does not hold one age identity"));
    let identity = age::x25519::Identity::generate().to_string();
    files::write_private(&path, format!("# a comment\n{}\n", age::secrecy::ExposeSecret::expose_secret(&identity)).as_bytes()).unwrap();
    let new = Secret::identity(&path).unwrap();
    reseal(&place.keys(), &old, &new).unwrap();
    assert!(matches!(FileKeyManager::open_sealed(place.keys(), &old), Err(KeyError::Sealed { .. })));
    assert_eq!(FileKeyManager::open_sealed(place.keys(), &new).unwrap().list().await.unwrap(), ["root-1"]);
    assert!(matches!(reseal(&place.keys(), &old, &new), Err(KeyError::Sealed { .. })));
}

#[tokio::test]
async fn debug_shows_neither_secret_nor_key() {
    let place = Place::new();
    let secret = place.passphrase("open sesame");
    let keys = place.open("open sesame").unwrap();
    let shown = format!("{secret:?} {keys:?}");
    assert!(!shown.contains("sesame") && !shown.contains("AGE-SECRET"), "{shown}");
}
