//! One cluster's public keys: read from a file, or fetched over TLS from an address or its API server; kept when a later attempt fails, also
//! over a restart.

use std::num::NonZeroU32;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use chancery_identity::Clock;
use chancery_identity::token::TokenKeys;
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use http::{Request, StatusCode, Uri};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use time::OffsetDateTime;

use super::kept::KeptKeys;
use super::live::{Live, LiveStatus};
use super::{ClusterSettings, JwksSource};
use crate::kubernetes::{self, KubernetesSettings, with_causes};

/// A JWKS larger than this is refused.
const MAX_JWKS_BYTES: usize = 1 << 20;
const FETCH_TIMEOUT: Duration = Duration::from_secs(10);
/// How often the keys are fetched while all is well: for so long one that the cluster has withdrawn still counts.
const REFRESH: Duration = Duration::from_secs(60);
/// How often they are fetched again after a failure, or at most when a token names an unknown key.
pub(super) const RETRY: Duration = Duration::from_secs(10);

/// A cluster with the keys that it has now.
#[derive(Debug)]
pub(super) struct Cluster {
    pub(super) settings: ClusterSettings,
    keys: ArcSwapOption<TokenKeys>,
    kept: Option<KeptKeys>,
    load: Mutex<LoadState>,
    on_demand: DefaultDirectRateLimiter,
    /// Held while loading, so that many who miss the same key cause one fetch.
    loading: tokio::sync::Mutex<()>,
    /// Where its API server is known.
    pub(super) live: Option<Arc<Live>>,
}

#[derive(Clone, Debug, Default)]
struct LoadState {
    loaded_at: Option<OffsetDateTime>,
    attempted: Option<Instant>,
    error: Option<String>,
}

/// How a cluster's keys stand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterStatus {
    /// The cluster's.
    pub name: String,
    /// How many usable keys are loaded; with none, nobody of this cluster can be attested.
    pub keys: usize,
    /// Why the last attempt to load them failed.
    pub error: Option<String>,
    /// When they were loaded last.
    pub loaded_at: Option<OffsetDateTime>,
    /// How the watch of its pods stands, where its API server is known.
    pub live: Option<LiveStatus>,
}

impl Cluster {
    /// Takes over what `before`, of the same name, has that is still this cluster's. Keys that it fetches are kept in `directory`.
    pub(super) fn new(settings: ClusterSettings, before: Option<&Self>, clock: &Arc<dyn Clock>, directory: Option<&Path>) -> Self {
        let quota = Quota::with_period(RETRY).unwrap_or(Quota::per_minute(NonZeroU32::MIN));
        let live = settings.kubernetes.as_ref().map(|wanted| {
            let known = before.and_then(|before| before.live.as_ref()).filter(|live| live.settings() == wanted);
            known.cloned().unwrap_or_else(|| Live::new(&settings.name, wanted.clone(), Arc::clone(clock)))
        });
        let cluster = Self {
            live,
            kept: directory.and_then(|directory| KeptKeys::of(&settings, directory)),
            settings,
            keys: ArcSwapOption::empty(),
            load: Mutex::default(),
            on_demand: RateLimiter::direct(quota),
            loading: tokio::sync::Mutex::default(),
        };
        if let Some(before) = before.filter(|before| before.key_source() == cluster.key_source()) {
            cluster.keys.store(before.keys.load_full());
            *cluster.state() = before.state().clone();
        }
        cluster
    }

    /// What decides which keys it has.
    fn key_source(&self) -> (&str, &JwksSource, Option<&KubernetesSettings>) {
        let ClusterSettings { issuer, jwks, kubernetes, .. } = &self.settings;
        (issuer, jwks, kubernetes.as_ref().filter(|_| *jwks == JwksSource::ApiServer))
    }

    pub(super) fn keys(&self) -> Option<Arc<TokenKeys>> {
        self.keys.load_full()
    }

    pub(super) fn last_error(&self) -> Option<String> {
        self.state().error.clone()
    }

    pub(super) fn status(&self) -> ClusterStatus {
        let state = self.state().clone();
        let keys = self.keys().map_or(0, |keys| keys.len());
        let live = self.live.as_ref().map(|live| live.status());
        ClusterStatus { name: self.settings.name.clone(), keys, error: state.error, loaded_at: state.loaded_at, live }
    }

    /// Whether it is time to fetch; never for a file, which is watched.
    pub(super) fn is_due(&self) -> bool {
        let state = self.state();
        let pause = if state.error.is_some() { RETRY } else { REFRESH };
        let is_fetched = !matches!(self.settings.jwks, JwksSource::File(_));
        is_fetched && state.attempted.is_none_or(|attempted| attempted.elapsed() >= pause)
    }

    /// Loads because a token named a key that is not here; at most once per [`RETRY`]. Returns whether the keys are others now.
    pub(super) async fn load_on_demand(&self, now: OffsetDateTime) -> bool {
        if self.on_demand.check().is_ok() {
            return self.load(now).await;
        }
        // Somebody else may be loading what this caller needs.
        let before = self.keys();
        drop(self.loading.lock().await);
        self.keys().map(|keys| Arc::as_ptr(&keys)) != before.map(|keys| Arc::as_ptr(&keys))
    }

    /// Loads the keys. On failure the last good ones stay, and the error is in the status. Returns whether the keys are others now.
    pub(super) async fn load(&self, now: OffsetDateTime) -> bool {
        let _one_at_a_time = self.loading.lock().await;
        let jwks = match &self.settings.jwks {
            JwksSource::File(path) => read_file(path),
            JwksSource::Url { url, ca_file } => tokio::time::timeout(FETCH_TIMEOUT, fetch(url, ca_file.as_deref()))
                .await
                .unwrap_or_else(|_| Err(format!("no answer within {} s", FETCH_TIMEOUT.as_secs()))),
            JwksSource::ApiServer => match &self.live {
                Some(live) => live.jwks().await,
                None => Err("`kubernetes` does not say where the API server is".to_owned()),
            },
        };
        self.take(jwks, now)
    }

    /// Reads a file's keys at once; does nothing where they are fetched.
    pub(super) fn load_file(&self, now: OffsetDateTime) -> Result<(), String> {
        let JwksSource::File(path) = &self.settings.jwks else { return Ok(()) };
        self.take(read_file(path), now);
        self.last_error().map_or(Ok(()), Err)
    }

    fn take(&self, jwks: Result<String, String>, now: OffsetDateTime) -> bool {
        let name = &self.settings.name;
        let loaded = jwks.and_then(|jwks| self.read(&jwks)).map_err(|error| format!("{}: {error}", self.settings.jwks));
        let mut state = self.state();
        state.attempted = Some(Instant::now());
        match loaded {
            Ok(keys) => {
                state.error = None;
                state.loaded_at = Some(now);
                let changed = self.keys().is_none_or(|before| before.jwks() != keys.jwks());
                if changed {
                    tracing::info!(cluster = name, keys = keys.len(), "the cluster's public keys were loaded");
                    for problem in keys.broken() {
                        tracing::warn!(cluster = name, source = %self.settings.jwks, problem, "a public key was passed over");
                    }
                    if let Some(Err(error)) = self.kept.as_ref().map(|kept| kept.write(keys.jwks())) {
                        tracing::warn!(cluster = name, %error, "the cluster's public keys cannot be kept for the next start");
                    }
                    self.keys.store(Some(Arc::new(keys)));
                }
                changed
            }
            Err(error) => {
                let kept = if self.keys().is_some() { "the last good ones stay" } else { "there are none yet" };
                tracing::warn!(cluster = name, error, "the cluster's public keys could not be loaded; {kept}");
                state.error = Some(error);
                self.take_kept()
            }
        }
    }

    /// Goes on with the keys that were fetched before the start, where there are none since. Returns whether there were any.
    fn take_kept(&self) -> bool {
        let kept = self.kept.as_ref().filter(|_| self.keys().is_none());
        let Some(keys) = kept.and_then(KeptKeys::read).and_then(|jwks| self.read(&jwks).ok()) else { return false };
        tracing::info!(cluster = self.settings.name, keys = keys.len(), "the cluster's public keys are those that were fetched last");
        self.keys.store(Some(Arc::new(keys)));
        true
    }

    fn read(&self, jwks: &str) -> Result<TokenKeys, String> {
        let ClusterSettings { name, issuer, .. } = &self.settings;
        TokenKeys::from_jwks(name, issuer, jwks).map_err(|error| error.to_string())
    }

    fn state(&self) -> std::sync::MutexGuard<'_, LoadState> {
        self.load.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Looks at what a running CA would need to load the keys of `settings`, without asking anybody over the network: each key of a file, the
/// authorities that an address is trusted by, the way to the API server.
///
/// # Errors
/// What is wrong, with the file and the key's place in it.
pub fn check_keys(settings: &ClusterSettings) -> Result<(), String> {
    if let Some(connection) = &settings.kubernetes {
        kubernetes::check(connection)?;
    }
    match &settings.jwks {
        JwksSource::ApiServer => Ok(()),
        JwksSource::Url { ca_file, .. } => tls(ca_file.as_deref()).map(drop),
        JwksSource::File(path) => {
            let read = |jwks: String| TokenKeys::from_jwks(&settings.name, &settings.issuer, &jwks).map_err(|error| error.to_string());
            let loaded = read_file(path).and_then(read).map_err(|error| format!("{}: {error}", path.display()))?;
            match loaded.broken() {
                [] => Ok(()),
                broken => Err(format!("{}: {}", path.display(), broken.join("; "))),
            }
        }
    }
}

fn read_file(path: &Path) -> Result<String, String> {
    let length = std::fs::metadata(path).map_err(|error| error.to_string())?.len();
    if length > MAX_JWKS_BYTES as u64 {
        return Err("larger than 1 MiB; is this a JWKS?".to_owned());
    }
    std::fs::read_to_string(path).map_err(|error| error.to_string())
}

async fn fetch(url: &Uri, ca_file: Option<&Path>) -> Result<String, String> {
    // Built for each fetch, so that a replaced CA file counts; fetches are minutes apart.
    let connector = HttpsConnectorBuilder::new().with_tls_config(tls(ca_file)?).https_only().enable_http1().build();
    let client = Client::builder(TokioExecutor::new()).build::<_, Empty<bytes::Bytes>>(connector);
    let request = Request::get(url).header(http::header::ACCEPT, "application/jwk-set+json, application/json").body(Empty::new());
    let response = client.request(request.map_err(|error| error.to_string())?).await.map_err(|error| with_causes(&error))?;
    if response.status() != StatusCode::OK {
        return Err(format!("answered {}", response.status()));
    }
    let body = Limited::new(response.into_body(), MAX_JWKS_BYTES).collect().await.map_err(|error| error.to_string())?;
    String::from_utf8(body.to_bytes().into()).map_err(|_| "the answer is not UTF-8".to_owned())
}

fn tls(ca_file: Option<&Path>) -> Result<ClientConfig, String> {
    let mut roots = RootCertStore::empty();
    match ca_file {
        Some(path) => {
            let error = |error: &dyn std::fmt::Display| format!("ca_file {}: {error}", path.display());
            for certificate in CertificateDer::pem_file_iter(path).map_err(|e| error(&e))? {
                roots.add(certificate.map_err(|e| error(&e))?).map_err(|e| error(&e))?;
            }
            if roots.is_empty() {
                return Err(error(&"no certificate in it"));
            }
        }
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()));
    let builder = builder.with_safe_default_protocol_versions().map_err(|error| error.to_string())?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}
