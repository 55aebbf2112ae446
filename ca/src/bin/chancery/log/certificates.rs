//! Whether each recorded certificate was signed by the issuing certificate that the ledger names, and that one by a recorded trust root.
//!
//! Signatures are most of the work, so they are checked on all processors, some thousand at a time.

use std::collections::HashMap;
use std::sync::Arc;
use std::thread;

use bytes::Bytes;
use chancery_ca::ledger::{Body, Entry};
use rustls_pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::examined::Finding;

/// Certificates that wait for being checked together.
const BATCH: usize = 4096;

/// The first half of a certificate's SHA-256, as entries name it.
type Fingerprint = [u8; 16];

/// Checks certificates as they are read.
#[derive(Debug, Default)]
pub(super) struct Certificates {
    authorities: HashMap<Fingerprint, Authority>,
    waiting: Vec<Waiting>,
    checked: u64,
}

#[derive(Clone, Debug)]
struct Authority {
    is_root: bool,
    certificate: Arc<CertificateDer<'static>>,
}

#[derive(Debug)]
struct Waiting {
    entry: u64,
    certificate: Bytes,
    issuer: Arc<CertificateDer<'static>>,
}

impl Certificates {
    /// Takes an entry in; checks some when there are enough.
    ///
    /// # Errors
    /// The first entry whose certificate does not fit.
    pub(super) fn entry(&mut self, index: u64, bytes: &[u8]) -> Result<(), Finding> {
        let entry = Entry::decode(Bytes::copy_from_slice(bytes)).map_err(|error| Finding::at(index, error.to_string()))?;
        match entry.body {
            Body::Authority(authority) => self.authority(index, authority.root, authority.certificate),
            Body::Issuance(issuance) => {
                let unknown = |what| Finding::at(index, format!("its {what} is not in the ledger before it"));
                let issuer = self.authorities.get(&issuance.issuing_certificate).ok_or_else(|| unknown("issuing certificate"))?;
                if !self.authorities.get(&issuance.root).is_some_and(|root| root.is_root) {
                    return Err(unknown("trust root"));
                }
                let issuer = Arc::clone(&issuer.certificate);
                self.waiting.push(Waiting { entry: index, certificate: issuance.certificate, issuer });
                if self.waiting.len() < BATCH { Ok(()) } else { self.check() }
            }
            _ => Ok(()),
        }
    }

    /// Checks the rest; tells how many certificates there were.
    ///
    /// # Errors
    /// See [`Certificates::entry`].
    pub(super) fn finish(mut self) -> Result<u64, Finding> {
        self.check()?;
        Ok(self.checked)
    }

    fn authority(&mut self, index: u64, is_root: bool, certificate: Vec<u8>) -> Result<(), Finding> {
        let certificate = Arc::new(CertificateDer::from(certificate));
        let is_signed = if is_root {
            // What a corporate CA signed is an anchor by the acts that made it one; whatever is above it is not in the ledger.
            is_signed_by(&certificate, &certificate) || is_of_another(&certificate)
        } else {
            self.authorities.values().any(|root| root.is_root && is_signed_by(&certificate, &root.certificate))
        };
        if !is_signed {
            return Err(Finding::at(index, "no recorded trust root has signed this certificate of the CA's own".into()));
        }
        let mut fingerprint = Fingerprint::default();
        fingerprint.copy_from_slice(&chancery_identity::Fingerprint::of(&certificate).0[..16]);
        self.authorities.insert(fingerprint, Authority { is_root, certificate });
        self.checked += 1;
        Ok(())
    }

    /// Checks those that wait.
    ///
    /// # Errors
    /// The first one whose signature is not its issuer's.
    pub(super) fn check(&mut self) -> Result<(), Finding> {
        let waiting = std::mem::take(&mut self.waiting);
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let share = waiting.len().div_ceil(threads).max(1);
        let bad = thread::scope(|scope| {
            let parts: Vec<_> = waiting.chunks(share).map(|part| scope.spawn(|| part.iter().find(|one| !one.is_signed()))).collect();
            // In order, so that the first one is named.
            parts.into_iter().find_map(|part| part.join().ok().flatten().map(|bad| bad.entry))
        });
        self.checked += waiting.len() as u64;
        match bad {
            Some(entry) => Err(Finding::earlier(entry, "the certificate's signature is not that of its issuing certificate".into())),
            None => Ok(()),
        }
    }
}

impl Waiting {
    fn is_signed(&self) -> bool {
        is_signed_by(&self.certificate, &self.issuer)
    }
}

/// Whether it names another issuer than itself.
fn is_of_another(certificate: &[u8]) -> bool {
    X509Certificate::from_der(certificate).is_ok_and(|(_, certificate)| certificate.issuer() != certificate.subject())
}

/// Whether the key in `issuer` made the signature of `certificate`.
fn is_signed_by(certificate: &[u8], issuer: &[u8]) -> bool {
    let (Ok((_, certificate)), Ok((_, issuer))) = (X509Certificate::from_der(certificate), X509Certificate::from_der(issuer)) else {
        return false;
    };
    certificate.verify_signature(Some(issuer.public_key())).is_ok()
}
