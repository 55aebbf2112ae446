//! The PEM files beside the ledger: copies of the CA's own certificates for people, the bundle for agents, and the CRLs. Never read back, but
//! the CRLs, and the roots to find out that ledger and data directory do not belong together.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use chancery_identity::{Crl, Fingerprint, TrustBundle, TrustDomain, TrustState};
use chancery_process::files;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use super::crl::sha256;
use super::directory::DataDirectory;
use super::held::Root;
use super::{AuthorityError, Issuer, RootStatus};

/// Where the files lie.
#[derive(Debug)]
pub(super) struct Copies {
    certificates: PathBuf,
    bundle: PathBuf,
    crl: PathBuf,
    trust_domain: TrustDomain,
}

impl Copies {
    /// # Errors
    /// If there is a root among them that is not one of `roots`: the ledger was lost or exchanged.
    pub(super) fn open(directory: &DataDirectory, trust_domain: TrustDomain, roots: &[Root]) -> Result<Self, AuthorityError> {
        let certificates = directory.certificates();
        files::create_private_dir(&certificates)?;
        for entry in std::fs::read_dir(&certificates).map_err(|error| unreadable(&certificates, error))? {
            let path = entry.map_err(|error| unreadable(&certificates, error))?.path();
            let name = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".pem"));
            if !name.is_some_and(|name| name.starts_with("root-")) {
                continue;
            }
            let fingerprint = Fingerprint::of(&CertificateDer::from_pem_file(&path).map_err(|error| unreadable(&path, error))?);
            if !roots.iter().any(|root| root.fingerprint == fingerprint) {
                return Err(AuthorityError::UnknownRoot { path: path.display().to_string(), fingerprint });
            }
        }
        Ok(Self { certificates, bundle: directory.bundle(), crl: directory.crl(), trust_domain })
    }

    pub(super) fn write_roots(&self, roots: &[RootStatus]) -> Result<(), AuthorityError> {
        roots.iter().try_for_each(|root| self.write(&format!("root-{}", hex::encode(&root.fingerprint.0[..8])), &root.certificate))
    }

    pub(super) fn write_issuer(&self, issuer: &Issuer) -> Result<(), AuthorityError> {
        self.write("issuing", issuer.certificate())
    }

    /// With the sequence in front, by which an agent that missed a rotation tells that the file is newer than what it remembers.
    pub(super) fn write_bundle(&self, state: &TrustState) -> Result<(), AuthorityError> {
        let pem = format!("# sequence: {}\n{}", state.sequence, state.own().to_pem());
        write_public(&self.bundle, pem.as_bytes())
    }

    /// Keeps the CRLs, or that there are none.
    pub(super) fn write_crl(&self, crl: Option<&Crl>) -> Result<(), AuthorityError> {
        match crl {
            Some(crl) => write_public(&self.crl, crl.pem()),
            None => match std::fs::remove_file(&self.crl) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(unreadable(&self.crl, error)),
                _ => Ok(()),
            },
        }
    }

    /// The CRLs with this digest; a sentence if others are there, or none.
    pub(super) fn read_crl(&self, digest: [u8; 32]) -> Result<Crl, String> {
        let pem = std::fs::read(&self.crl).map_err(|error| format!("{}: {error}", self.crl.display()))?;
        if sha256(&pem) != digest {
            return Err(format!("{} has others than the ledger names", self.crl.display()));
        }
        Crl::from_pem(pem).map_err(|error| error.to_string())
    }

    fn write(&self, name: &str, certificate: &CertificateDer<'static>) -> Result<(), AuthorityError> {
        let alone = TrustBundle::new(self.trust_domain.clone(), vec![certificate.clone()])?;
        Ok(files::write_private(&self.certificates.join(format!("{name}.pem")), alone.to_pem().as_bytes())?)
    }
}

/// Readable by everybody who may enter the directory.
fn write_public(path: &Path, pem: &[u8]) -> Result<(), AuthorityError> {
    files::write_private(path, pem)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644)).map_err(|error| unreadable(path, error))
}

fn unreadable(path: &Path, problem: impl std::fmt::Display) -> AuthorityError {
    AuthorityError::Unreadable { place: path.display().to_string(), problem: problem.to_string() }
}
