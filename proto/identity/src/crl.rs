//! Certificate revocation lists (RFC 5280 §5): one for each issuing certificate, together as PEM, as Envoy takes them.
//!
//! They speak of leaves alone. What they do not speak of is not revoked: a list that is missing must not keep an agent from its CA.

use std::fmt;
use std::sync::Arc;

use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer};
use webpki::{
    BorrowedCertRevocationList, CertRevocationList, EndEntityCert, OwnedCertRevocationList, RevocationCheckDepth, RevocationOptions,
    RevocationOptionsBuilder, UnknownStatusPolicy,
};

use crate::{Serial, pem};

/// How large the lists may be together, in bytes of PEM.
pub const MAX_CRL_BYTES: usize = 2 << 20;
/// How many lists there may be. A CA renews its issuing certificate twice a week.
const MAX_LISTS: usize = 256;

/// Why lists are none that anybody should be given: a proxy would take them, and refuse everybody.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CrlError {
    /// Too many bytes.
    #[error("the CRLs have {0} bytes; at most {MAX_CRL_BYTES} are read")]
    TooLarge(usize),
    /// Too many lists.
    #[error("there are more than {MAX_LISTS} CRLs")]
    TooMany,
    /// No list, or something else.
    #[error("the CRLs cannot be read: {0}")]
    Malformed(String),
}

/// CRLs that can be read, at least one.
#[derive(Clone)]
pub struct Crl(Arc<Read>);

struct Read {
    pem: Vec<u8>,
    lists: Vec<CertRevocationList<'static>>,
    revoked: usize,
}

impl Crl {
    /// Reads PEM.
    ///
    /// # Errors
    /// If there is none in it, one that cannot be read, or more than the bounds allow.
    pub fn from_pem(pem: Vec<u8>) -> Result<Self, CrlError> {
        if pem.len() > MAX_CRL_BYTES {
            return Err(CrlError::TooLarge(pem.len()));
        }
        let malformed = |problem: String| CrlError::Malformed(problem);
        let (mut lists, mut revoked) = (Vec::new(), 0);
        for der in CertificateRevocationListDer::pem_slice_iter(&pem) {
            if lists.len() == MAX_LISTS {
                return Err(CrlError::TooMany);
            }
            let (list, entries) =
                read(&der.map_err(|error| malformed(error.to_string()))?).map_err(|error| malformed(error.to_string()))?;
            lists.push(list.into());
            revoked += entries;
        }
        if lists.is_empty() {
            return Err(malformed("there is no PEM block of a CRL".into()));
        }
        Ok(Self(Arc::new(Read { pem, lists, revoked })))
    }

    /// Writes lists (DER) as PEM, and reads that.
    ///
    /// # Errors
    /// As [`Crl::from_pem`].
    pub fn from_der<'a>(lists: impl IntoIterator<Item = &'a [u8]>) -> Result<Self, CrlError> {
        let mut text = String::new();
        for list in lists {
            pem::push(&mut text, "X509 CRL", list);
        }
        Self::from_pem(text.into_bytes())
    }

    /// As it was read.
    pub fn pem(&self) -> &[u8] {
        &self.0.pem
    }

    /// How many certificates are revoked.
    pub fn revoked(&self) -> usize {
        self.0.revoked
    }

    /// Whether the certificate with this serial number is revoked, whoever issued it: no two have the same.
    pub fn revokes(&self, serial: Serial) -> bool {
        self.0.lists.iter().any(|list| matches!(list.find_serial(&serial.0), Ok(Some(_))))
    }

    /// Whether one of the lists is this issuing certificate's, by its name: no two have the same.
    pub fn speaks_for(&self, issuing: &CertificateDer<'_>) -> bool {
        EndEntityCert::try_from(issuing).is_ok_and(|issuing| self.0.lists.iter().any(|list| list.issuer() == issuing.subject()))
    }

    /// Calls `verify` with what webpki looks revocations up in.
    pub(crate) fn with_options<T>(&self, verify: impl FnOnce(Option<RevocationOptions<'_>>) -> T) -> T {
        let lists: Vec<&CertRevocationList<'_>> = self.0.lists.iter().collect();
        let options = RevocationOptionsBuilder::new(&lists)
            .ok()
            .map(|options| options.with_depth(RevocationCheckDepth::EndEntity).with_status_policy(UnknownStatusPolicy::Allow).build());
        verify(options)
    }
}

/// A list, and how many it revokes.
fn read(der: &[u8]) -> Result<(OwnedCertRevocationList, usize), webpki::Error> {
    let list = BorrowedCertRevocationList::from_der(der)?;
    Ok((list.to_owned()?, list.into_iter().count()))
}

impl PartialEq for Crl {
    fn eq(&self, other: &Self) -> bool {
        self.0.pem == other.0.pem
    }
}

impl Eq for Crl {}

impl fmt::Debug for Crl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Crl").field("lists", &self.0.lists.len()).field("revoked", &self.0.revoked).finish_non_exhaustive()
    }
}
