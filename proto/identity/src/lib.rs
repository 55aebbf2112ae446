//! The identity rules that both ends of Chancery enforce: what a SPIFFE ID is, what a trust bundle holds, what makes an X509-SVID valid,
//! what a Kubernetes service-account token proves, and whom a TLS peer may be.
//!
//! No I/O here. Time, keys and bundles are parameters, so every rule is tested without waiting, disk or network.
//!
//! - [`SpiffeId`], [`TrustDomain`]: parsed names; a value that exists is valid.
//! - [`TrustBundle`], [`TrustState`]: which authorities speak for which trust domain.
//! - [`X509Svid`]: a certificate chain with its key, checked before anybody serves it.
//! - [`Crl`]: which certificates are revoked before they expire.
//! - [`profile`]: what a certificate must look like to be an X509-SVID.
//! - [`token`]: offline verification of service-account tokens.
//! - [`csr`]: making certificate signing requests, and reading strangers'.
//! - [`tls`]: the rustls configurations of both ends.
//! - [`checkpoint`]: signed checkpoints of the ledger, and proofs that lead to them.

mod bundle;
mod chain;
pub mod checkpoint;
pub mod clock;
mod crl;
pub mod csr;
mod pem;
pub mod profile;
mod spiffe_id;
mod svid;
pub mod tls;
pub mod token;

pub use bundle::{BundleError, Fingerprint, TrustBundle, TrustState};
pub use clock::{Clock, SystemClock};
pub use crl::{Crl, CrlError, MAX_CRL_BYTES};
pub use spiffe_id::{SpiffeId, SpiffeIdError, TrustDomain};
pub use svid::{PrivateKey, Serial, SvidError, X509Svid, verify_chain};
