//! The CA's own keys and certificates, and the trust state that it publishes.
//!
//! ```text
//! trust root (1 y)  →  issuing certificate (7 d)  →  leaves, and the CA's own server certificate (1 d)
//! ```
//!
//! Which roots there are and where each is in its life says the ledger's state, which acts alone change; the authority follows it
//! ([`Authority::apply`]). Published, active and draining roots are in the bundle; the active one's issuing certificate signs, and a published
//! one has its own ready. The first start makes the first root and records its activation. The issuing certificates and the server's are renewed
//! from half of their lives on ([`Authority::tick`]), never outliving what signed them; superseded issuing keys stay until all that they
//! signed has expired, or their root's life has ended, since CRLs are signed with them ([`crl`]). A root may also be one that a corporate CA
//! signed ([`prepare`]). The ledger is the source of truth: every certificate is recorded there before
//! it is used, and opening reads them from there and finds each one's key in the key manager by the public key. The PEM files under
//! `authority/` are copies for people; a root among them that the ledger does not know means that the two do not belong together, and stops
//! the CA. The trust state's sequence is the index of the ledger's entry that changed it last, plus one, above the floor of an accepted loss:
//! it grows with every change, is the same after a restart, and needs no place of its own.

mod copies;
mod corporate;
mod crl;
pub mod directory;
mod follow;
mod held;
mod issuer;
mod make;
mod open;
mod prepare;
mod profiles;
mod revoke;
mod server;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use chancery_identity::tls::SharedTrust;
use chancery_identity::{BundleError, Clock, CrlError, Fingerprint, SpiffeId, SpiffeIdError, SvidError, TrustDomain, TrustState};
use chancery_process::files::FileError;
use rustls::sign::CertifiedKey;
use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::keys::KeyError;
use crate::ledger::LedgerError;
use crate::ledger::acts::{Deadline, RootState};

use copies::Copies;
pub use corporate::{RENEWAL, is_renewal_due};
use crl::Crls;
pub use crl::MAX_REVOKED;
pub use directory::{DataDirectory, DirectoryError, Kind};
use held::Held;
pub use issuer::{Issuer, IssuerError, LeafRequest, UnrecordedLeaf, short_id};
use make::Maker;
pub use revoke::{CrlStanding, Revoked};
use server::ServerCertificate;

/// How often [`Authority::run`] looks whether something is to be renewed. Short against every lifetime, so that a machine that slept
/// renews at once.
const TICK: Duration = Duration::from_secs(5);

/// How long the authority's certificates live, and what the server's says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// A trust root's life.
    #[serde(with = "chancery_process::config::duration")]
    pub root_lifetime: Duration,
    /// An issuing certificate's life.
    #[serde(with = "chancery_process::config::duration")]
    pub issuing_lifetime: Duration,
    /// The CA's server certificate's life.
    #[serde(with = "chancery_process::config::duration")]
    pub server_lifetime: Duration,
    /// DNS names in the CA's server certificate, beside its SPIFFE ID.
    pub dns_names: Vec<String>,
}

impl Default for Settings {
    fn default() -> Self {
        let days = |days: u64| Duration::from_secs(days * 24 * 3600);
        Self { root_lifetime: days(365), issuing_lifetime: days(7), server_lifetime: days(1), dns_names: Vec::new() }
    }
}

/// Why the authority cannot do its work.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AuthorityError {
    /// A key.
    #[error("the CA's keys: {0}")]
    Key(#[from] KeyError),
    /// A certificate was not issued.
    #[error(transparent)]
    Issuer(#[from] IssuerError),
    /// The ledger did not record it, so it is not used.
    #[error("a certificate of the CA's own could not be recorded, so it is not used: {0}")]
    Ledger(#[from] LedgerError),
    /// A file in the data directory.
    #[error(transparent)]
    File(#[from] FileError),
    /// An act names a root that has no entry.
    #[error(
        "the ledger's acts name the trust root {fingerprint}, and no entry holds its certificate: the ledger is not whole; restore the newest backup"
    )]
    Unrecorded {
        /// Of the root.
        fingerprint: Fingerprint,
    },
    /// Every root was given up.
    #[error(
        "no trust root is active, and nothing can be issued: the last one was distrusted without another; restore a backup from before that"
    )]
    NoActiveRoot,
    /// The root's key is gone.
    #[error(
        "the key of the trust root {fingerprint} is not in the key manager; restore it from a backup (a new root would cut off every agent)"
    )]
    RootKeyMissing {
        /// Of the root.
        fingerprint: Fingerprint,
    },
    /// A root in the files that the ledger does not know.
    #[error(
        "{path} holds the trust root {fingerprint}, which the ledger has no entry of: ledger and data directory do not belong together; \
         restore both from the same backup"
    )]
    UnknownRoot {
        /// The file.
        path: String,
        /// Of the root.
        fingerprint: Fingerprint,
    },
    /// The next root is a corporate CA's to sign.
    #[error(
        "the active trust root was signed by {signed_by}, and no other is prepared: `chancery root prepare --csr FILE` writes a request for \
         the next one, `chancery root prepare --certificate FILE` brings the answer; or `chancery root prepare --self-signed` makes one that no corporate CA stands above"
    )]
    Corporate {
        /// Its name.
        signed_by: String,
    },
    /// No request has the key of a certificate that was brought.
    #[error(
        "no open request has the key of this certificate: `chancery root prepare --csr FILE` writes the open request, or a new one once it was answered"
    )]
    NotRequested,
    /// The answer to a request breaks a rule.
    #[error("the certificate cannot be a trust root here, and nothing was changed: {0}")]
    Answer(String),
    /// The root's life has ended.
    #[error("the trust root {fingerprint} expired at {not_after}; nothing can be issued under it")]
    RootExpired {
        /// Of the root.
        fingerprint: Fingerprint,
        /// Then.
        not_after: OffsetDateTime,
    },
    /// The root is another trust domain's.
    #[error("the data directory is the trust domain {found}'s, and the configuration says {wanted}; give each its own directory")]
    OtherTrustDomain {
        /// In the root.
        found: String,
        /// In the configuration.
        wanted: TrustDomain,
    },
    /// What the ledger or a file holds is no certificate.
    #[error("{place}: {problem}")]
    Unreadable {
        /// Which entry or file.
        place: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The bundle.
    #[error("the trust bundle: {0}")]
    Bundle(#[from] BundleError),
    /// CRLs that were signed cannot be read.
    #[error("the CRLs: {0}")]
    Crl(#[from] CrlError),
    /// There are CRLs that are not to be had at the moment.
    #[error("the CRLs of ledger entry {entry} are not there yet; the CA's log says why")]
    CrlMissing {
        /// The act's.
        entry: u64,
    },
    /// More would be revoked than proxies are given.
    #[error(
        "{found} unexpired certificates would be revoked, and at most {MAX_REVOKED} are; revoke less, or distrust the root of all of them (`chancery root distrust`)"
    )]
    TooManyRevoked {
        /// So many, or more.
        found: usize,
    },
    /// What must not be revoked.
    #[error("{0}")]
    NotRevocable(String),
    /// The server's certificate.
    #[error("the CA's server certificate: {0}")]
    Server(#[from] SvidError),
    /// rustls does not take it.
    #[error("the CA's server certificate: {0}")]
    Tls(#[from] rustls::Error),
    /// The trust domain is too long for the CA's own ID.
    #[error("the CA's own SPIFFE ID: {0}")]
    Id(#[from] SpiffeIdError),
}

/// One of the CA's own certificates, for `status`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateStatus {
    /// A trust root, or an issuing certificate.
    pub root: bool,
    /// Where a root is in its life.
    pub state: Option<RootState>,
    /// Of the certificate.
    pub fingerprint: Fingerprint,
    /// Its common name.
    pub subject: String,
    /// Its validity begins.
    pub not_before: OffsetDateTime,
    /// Its validity ends.
    pub not_after: OffsetDateTime,
}

/// A trust root, as the ledger's state has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootStatus {
    /// Of its certificate.
    pub fingerprint: Fingerprint,
    /// DER.
    pub certificate: CertificateDer<'static>,
    /// Its common name.
    pub subject: String,
    /// The corporate CA that signed it; none for one that was made here.
    pub signed_by: Option<String>,
    /// Its validity begins.
    pub not_before: OffsetDateTime,
    /// Its validity ends.
    pub not_after: OffsetDateTime,
    /// Where it is in its life.
    pub state: RootState,
    /// Since when.
    pub since: OffsetDateTime,
    /// The entry of the act that brought it there.
    pub entry: u64,
    /// It is being distrusted, and leaves the bundles by then.
    pub leave_by: Option<Deadline>,
    /// Whether its key is there.
    pub has_key: bool,
    /// When its newest issuing certificate ends; none if none can sign.
    pub issuing_until: Option<OffsetDateTime>,
    /// The trust state that everybody who counts must hold before that may sign, since its CRL is in there; none if it may.
    pub awaited: Option<u64>,
}

/// The CA's keys and certificates, ready to sign.
#[derive(Debug)]
pub struct Authority {
    server_id: SpiffeId,
    settings: ArcSwap<Settings>,
    maker: Maker,
    copies: Copies,
    clock: Arc<dyn Clock>,
    roots: ArcSwap<Vec<RootStatus>>,
    issuer: ArcSwap<Issuer>,
    server: ServerCertificate,
    trust: watch::Sender<Arc<TrustState>>,
    shared_trust: SharedTrust,
    /// Locked while anything is made or changed, so that nothing is made twice.
    held: tokio::sync::Mutex<Held>,
    /// Locked while `held` is.
    crls: tokio::sync::Mutex<Crls>,
    crl_standing: ArcSwap<CrlStanding>,
    /// Unix seconds.
    clock_believed_until: AtomicI64,
    failed_renewals: AtomicU64,
}

impl Authority {
    /// The trust domain that it issues for.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.maker.trust_domain
    }

    /// Whether this is a development CA.
    pub fn is_development(&self) -> bool {
        self.maker.development
    }

    /// `spiffe://<trust domain>/chancery/ca`.
    pub fn server_id(&self) -> &SpiffeId {
        &self.server_id
    }

    /// By its clock.
    pub(crate) fn now(&self) -> OffsetDateTime {
        self.clock.now()
    }

    /// The trust state, and word of every change.
    pub fn trust(&self) -> watch::Receiver<Arc<TrustState>> {
        self.trust.subscribe()
    }

    /// The trust state as connections are verified with it.
    pub fn shared_trust(&self) -> SharedTrust {
        Arc::clone(&self.shared_trust)
    }

    /// The server's certificate with its key, replaced while running. The root follows the chain, for agents that hold its fingerprint.
    pub fn server_certificate(&self) -> Arc<ArcSwap<CertifiedKey>> {
        self.server.current()
    }

    /// What signs leaves now.
    pub fn issuer(&self) -> Arc<Issuer> {
        self.issuer.load_full()
    }

    /// The fingerprint of the active trust root, as agents pin it.
    pub fn root_fingerprint(&self) -> Fingerprint {
        self.issuer.load().root_fingerprint()
    }

    /// Every root that an act has named, in the order in which they were made.
    pub fn roots(&self) -> Arc<Vec<RootStatus>> {
        self.roots.load_full()
    }

    /// Lifetimes and names from now on. Other DNS names make a new server certificate at the next tick.
    pub fn configure(&self, settings: Settings) {
        if settings.dns_names != self.settings.load().dns_names {
            self.server.expire();
        }
        self.settings.store(Arc::new(settings));
    }

    /// The roots in the bundle and the issuing certificate in use.
    pub fn status(&self) -> Vec<CertificateStatus> {
        let issuer = self.issuer();
        let roots = self.roots();
        let trusted = roots.iter().filter(|root| matches!(root.state, RootState::Published | RootState::Active | RootState::Draining));
        let roots = trusted.map(|root| CertificateStatus {
            root: true,
            state: Some(root.state),
            fingerprint: root.fingerprint,
            subject: root.subject.clone(),
            not_before: root.not_before,
            not_after: root.not_after,
        });
        let issuing = CertificateStatus {
            root: false,
            state: None,
            fingerprint: Fingerprint::of(issuer.certificate()),
            subject: issuer::common_name_of(issuer.certificate()),
            not_before: issuer.not_before(),
            not_after: issuer.not_after(),
        };
        roots.chain([issuing]).collect()
    }

    /// Why the CA cannot issue at `now`; nothing while it can.
    pub fn problem(&self, now: OffsetDateTime) -> Option<String> {
        let issuer = self.issuer();
        let (from, to) = (issuer.not_before(), issuer.not_after());
        (!(from..to).contains(&now)).then(|| format!("the issuing certificate is valid from {from} to {to}, and the clock says {now}"))
    }

    /// How often [`Authority::run`] could not renew something.
    pub fn failed_renewals(&self) -> u64 {
        self.failed_renewals.load(Ordering::Relaxed)
    }

    /// Renews what is past half of its life at `now`, or not yet valid, follows the ledger's state, and destroys keys that are of no more use.
    ///
    /// # Errors
    /// If something could not be renewed; what is there stays in use, and the next tick tries again.
    pub async fn tick(&self, now: OffsetDateTime) -> Result<(), AuthorityError> {
        let mut held = self.held.lock().await;
        self.follow(&mut held, now).await?;
        self.destroy_dead_keys(&mut held, now).await
    }

    /// Ticks until `shutdown`, and with every act. Failures are logged and tried again.
    pub async fn run(&self, shutdown: CancellationToken) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut acts = self.maker.ledger.state();
        let renew = async {
            loop {
                tokio::select! {
                    _ = ticks.tick() => {}
                    Ok(()) = acts.changed() => {}
                }
                if let Err(error) = self.tick(self.clock.now()).await {
                    self.failed_renewals.fetch_add(1, Ordering::Relaxed);
                    tracing::error!(%error, "the CA's own certificates could not be renewed; trying again");
                }
            }
        };
        shutdown.run_until_cancelled(renew).await;
    }
}

/// A clock before `not_before` is no reason to renew.
fn is_past_half(now: OffsetDateTime, not_before: OffsetDateTime, not_after: OffsetDateTime) -> bool {
    now >= not_before + (not_after - not_before) / 2
}
