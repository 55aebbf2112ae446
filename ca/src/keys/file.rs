//! Keys in files: PKCS#8 in `<directory>/<name>.pem`, mode 0600, in a directory of mode 0700. Wider permissions are refused. Where keys are
//! [sealed](super::seal), `<name>.pem.age` holds that file encrypted, and a plain one that is found is sealed and removed.
//!
//! The keys are read once, when the directory is opened, and signing is arithmetic in memory: no thread is changed for it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use async_trait::async_trait;
use aws_lc_rs::encoding::{AsDer, PublicKeyX509Der};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING, EcdsaKeyPair, EcdsaSigningAlgorithm, Ed25519KeyPair, KeyPair,
};
use chancery_identity::PrivateKey;
use chancery_identity::csr::KeyType;
use chancery_process::files;
use rustls_pki_types::PrivatePkcs8KeyDer;
use rustls_pki_types::pem::PemObject;
use zeroize::{Zeroize, Zeroizing};

use super::seal::{Seal, Secret, check_not_sealed};
use super::{KeyError, KeyManager, PublicKey, check_name};

const PLAIN: &str = ".pem";
const SEALED: &str = ".pem.age";

/// Keys in a directory of files.
#[derive(Debug)]
pub struct FileKeyManager {
    directory: PathBuf,
    /// None: the keys lie in clear.
    seal: Option<Seal>,
    keys: RwLock<BTreeMap<String, Arc<LoadedKey>>>,
}

struct LoadedKey {
    signer: Signer,
    public: PublicKey,
}

enum Signer {
    Ecdsa(EcdsaKeyPair),
    Ed25519(Ed25519KeyPair),
}

impl FileKeyManager {
    /// Opens a directory of keys that lie in clear, and makes it if it is missing.
    ///
    /// # Errors
    /// If it, or a key in it, is open to others, a key cannot be read, or the keys are sealed.
    pub fn open(directory: impl Into<PathBuf>) -> Result<Self, KeyError> {
        Self::read(&directory.into(), None)
    }

    /// Opens a directory of keys that are sealed with `secret`, and makes it if it is missing. Keys in it that lie in clear are sealed.
    ///
    /// # Errors
    /// If it, or a key in it, is open to others, a key cannot be read, or the keys are sealed with something else.
    pub fn open_sealed(directory: impl Into<PathBuf>, secret: &Secret) -> Result<Self, KeyError> {
        Self::read(&directory.into(), Some(secret))
    }

    fn read(directory: &Path, secret: Option<&Secret>) -> Result<Self, KeyError> {
        files::create_private_dir(directory)?;
        let names = |suffix: &str| names(directory, suffix);
        let seal = match secret {
            Some(secret) => Some(Seal::open_or_create(directory, secret)?),
            None => check_not_sealed(directory).map(|()| None)?,
        };
        let mut manager = Self { directory: directory.to_owned(), seal, keys: RwLock::default() };
        let mut keys = BTreeMap::new();
        for name in names(SEALED)? {
            keys.insert(name.clone(), Arc::new(manager.load(&name, SEALED)?));
        }
        for name in names(PLAIN)? {
            let key = manager.load(&name, PLAIN)?;
            let key = if manager.seal.is_some() { manager.seal_plain(&name, &key, keys.contains_key(&name))? } else { key };
            keys.insert(name, Arc::new(key));
        }
        manager.keys = RwLock::new(keys);
        Ok(manager)
    }

    /// Where a new key is written.
    fn path(&self, name: &str) -> PathBuf {
        self.file(name, if self.seal.is_some() { SEALED } else { PLAIN })
    }

    fn file(&self, name: &str, suffix: &str) -> PathBuf {
        self.directory.join(format!("{name}{suffix}"))
    }

    fn load(&self, name: &str, suffix: &str) -> Result<LoadedKey, KeyError> {
        let path = self.file(name, suffix);
        let damaged = |problem: String| KeyError::Damaged { name: name.to_owned(), place: path.display().to_string(), problem };
        let stored = files::read_private(&path)?;
        let pem = match (&self.seal, suffix) {
            (_, PLAIN) => stored,
            (Some(seal), _) => {
                seal.unseal(&stored).map_err(|error| damaged(format!("its seal does not open: {error}; restore it from a backup")))?
            }
            (None, _) => return Err(damaged("it is sealed, and the directory's sealing key is missing; restore it from a backup".into())),
        };
        let mut der =
            PrivatePkcs8KeyDer::from_pem_slice(&pem).map_err(|_| damaged("it is no PKCS#8 PEM; restore it from a backup".into()))?;
        let key = parse(der.secret_pkcs8_der());
        der.zeroize();
        key.ok_or_else(|| damaged("it is neither ECDSA P-256, P-384 nor Ed25519".into()))
    }

    /// Seals a key that lies in clear, unless that was done and only the removal was interrupted. What opens from the disk is used, and only
    /// then the plain file removed.
    fn seal_plain(&self, name: &str, plain: &LoadedKey, is_sealed: bool) -> Result<LoadedKey, KeyError> {
        let path = self.file(name, PLAIN);
        if !is_sealed {
            files::write_private(&self.path(name), &self.sealed(&files::read_private(&path)?)?)?;
        }
        let read_back = self.load(name, SEALED)?;
        if read_back.public != plain.public {
            let problem = "it is another key than the sealed one beside it; move the one that is not in use away".into();
            return Err(KeyError::Damaged { name: name.to_owned(), place: path.display().to_string(), problem });
        }
        std::fs::remove_file(&path).map_err(|error| io(&path, &error))?;
        files::sync_directory(&self.directory)?;
        tracing::info!(key = name, "a key that lay in clear is sealed, and the plain file removed");
        Ok(read_back)
    }

    /// As it is to lie on the disk.
    fn sealed(&self, pem: &[u8]) -> Result<Zeroizing<Vec<u8>>, KeyError> {
        match &self.seal {
            Some(seal) => Ok(Zeroizing::new(seal.seal(pem)?)),
            None => Ok(Zeroizing::new(pem.to_vec())),
        }
    }

    fn get(&self, name: &str) -> Result<Arc<LoadedKey>, KeyError> {
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        keys.get(name).cloned().ok_or_else(|| KeyError::Unknown(name.to_owned()))
    }
}

#[async_trait]
impl KeyManager for FileKeyManager {
    async fn generate(&self, name: &str, key_type: KeyType) -> Result<PublicKey, KeyError> {
        check_name(name)?;
        let (pkcs8, key) = generate(name, key_type)?;
        let public = key.public.clone();
        // Held over the write, so that two callers cannot both find the name free. Keys are made a few times a week.
        let mut keys = self.keys.write().unwrap_or_else(PoisonError::into_inner);
        if keys.contains_key(name) {
            return Err(KeyError::Exists(name.to_owned()));
        }
        files::write_private(&self.path(name), &self.sealed(pkcs8.secret_pem().as_bytes())?)?;
        keys.insert(name.to_owned(), Arc::new(key));
        Ok(public)
    }

    async fn public_key(&self, name: &str) -> Result<PublicKey, KeyError> {
        Ok(self.get(name)?.public.clone())
    }

    async fn sign(&self, name: &str, message: &[u8]) -> Result<Vec<u8>, KeyError> {
        match &self.get(name)?.signer {
            Signer::Ecdsa(pair) => pair
                .sign(&SystemRandom::new(), message)
                .map(|signature| signature.as_ref().to_vec())
                .map_err(|_| KeyError::Failed { name: name.to_owned(), problem: "signing failed".into() }),
            Signer::Ed25519(pair) => Ok(pair.sign(message).as_ref().to_vec()),
        }
    }

    async fn destroy(&self, name: &str) -> Result<(), KeyError> {
        let mut keys = self.keys.write().unwrap_or_else(PoisonError::into_inner);
        if !keys.contains_key(name) {
            return Err(KeyError::Unknown(name.to_owned()));
        }
        std::fs::remove_file(self.path(name)).map_err(|error| io(&self.path(name), &error))?;
        files::sync_directory(&self.directory)?;
        keys.remove(name);
        Ok(())
    }

    async fn list(&self) -> Result<Vec<String>, KeyError> {
        Ok(self.keys.read().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect())
    }
}

fn generate(name: &str, key_type: KeyType) -> Result<(PrivateKey, LoadedKey), KeyError> {
    let failed = |_| KeyError::Failed { name: name.to_owned(), problem: "the key could not be made".into() };
    let random = SystemRandom::new();
    let document = match key_type {
        KeyType::EcdsaP256 => EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &random).map_err(failed)?,
        KeyType::EcdsaP384 => EcdsaKeyPair::generate_pkcs8(&ECDSA_P384_SHA384_ASN1_SIGNING, &random).map_err(failed)?,
        KeyType::Ed25519 => Ed25519KeyPair::generate_pkcs8(&random).map_err(failed)?,
        other => return Err(KeyError::Unsupported(other)),
    };
    let key = parse(document.as_ref()).ok_or_else(|| failed(aws_lc_rs::error::Unspecified))?;
    Ok((PrivateKey::from_pkcs8(Zeroizing::new(document.as_ref().to_vec())), key))
}

/// The names of the keys in files that end so. Other files are what an interrupted write left behind, or somebody's own notes.
fn names(directory: &Path, suffix: &str) -> Result<Vec<String>, KeyError> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(|error| io(directory, &error))? {
        let file = entry.map_err(|error| io(directory, &error))?.file_name();
        let name = file.to_str().and_then(|file| file.strip_suffix(suffix)).filter(|name| check_name(name).is_ok());
        found.extend(name.map(str::to_owned));
    }
    Ok(found)
}

fn parse(pkcs8: &[u8]) -> Option<LoadedKey> {
    let ecdsa = |algorithm: &'static EcdsaSigningAlgorithm, key_type| {
        let pair = EcdsaKeyPair::from_pkcs8(algorithm, pkcs8).ok()?;
        let spki = AsDer::<PublicKeyX509Der<'_>>::as_der(pair.public_key()).ok()?.as_ref().to_vec();
        Some(LoadedKey { signer: Signer::Ecdsa(pair), public: PublicKey { key_type, spki } })
    };
    let ed25519 = || {
        let pair = Ed25519KeyPair::from_pkcs8(pkcs8).ok()?;
        let spki = AsDer::<PublicKeyX509Der<'_>>::as_der(pair.public_key()).ok()?.as_ref().to_vec();
        Some(LoadedKey { signer: Signer::Ed25519(pair), public: PublicKey { key_type: KeyType::Ed25519, spki } })
    };
    ecdsa(&ECDSA_P256_SHA256_ASN1_SIGNING, KeyType::EcdsaP256)
        .or_else(|| ecdsa(&ECDSA_P384_SHA384_ASN1_SIGNING, KeyType::EcdsaP384))
        .or_else(ed25519)
}

fn io(path: &Path, error: &std::io::Error) -> KeyError {
    KeyError::Failed { name: String::new(), problem: format!("{}: {error}", path.display()) }
}

impl std::fmt::Debug for LoadedKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LoadedKey").field("type", &self.public.key_type).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn open() -> (tempfile::TempDir, FileKeyManager) {
        let directory = tempfile::tempdir().unwrap();
        let keys = FileKeyManager::open(directory.path().join("keys")).unwrap();
        (directory, keys)
    }

    #[tokio::test]
    async fn it_keeps_the_contract_of_key_managers() {
        let (_directory, keys) = open();
        super::super::contract::check(&keys).await;
    }

    #[tokio::test]
    async fn a_key_is_there_again_after_a_restart() {
        let (directory, keys) = open();
        let public = keys.generate("root-1", KeyType::EcdsaP384).await.unwrap();
        drop(keys);
        let again = FileKeyManager::open(directory.path().join("keys")).unwrap();
        assert_eq!(again.list().await.unwrap(), ["root-1"]);
        assert_eq!(again.public_key("root-1").await.unwrap(), public);
    }

    #[tokio::test]
    async fn files_and_directory_are_private_and_wider_ones_are_refused() {
        let (directory, keys) = open();
        keys.generate("root-1", KeyType::EcdsaP256).await.unwrap();
        let (folder, file) = (directory.path().join("keys"), directory.path().join("keys/root-1.pem"));
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&folder), mode(&file)), (0o700, 0o600));

        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o640)).unwrap();
        let error = FileKeyManager::open(&folder).unwrap_err().to_string();
        assert!(error.contains("chmod 0600"), "{error}");
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o755)).unwrap();
        let error = FileKeyManager::open(&folder).unwrap_err().to_string();
        assert!(error.contains("chmod 0700"), "{error}");
    }

    #[tokio::test]
    async fn a_damaged_key_is_named_and_debug_shows_no_key() {
        let (directory, keys) = open();
        keys.generate("root-1", KeyType::EcdsaP256).await.unwrap();
        assert!(format!("{keys:?}").len() < 300);
        let file = directory.path().join("keys/root-1.pem");
        files::write_private(&file, b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n").unwrap();
        let error = FileKeyManager::open(directory.path().join("keys")).unwrap_err().to_string();
        assert!(error.contains("root-1.pem"), "{error}");
    }
}
