//! The way to an API server: by a kubeconfig, or by the pod's own service account. Only over verified TLS, and through no proxy.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use http::{HeaderValue, Request, Response, header};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::{Body, ConfigExt};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use tower::{BoxError, ServiceBuilder};

use super::error::{ConnectError, with_causes, words_of};
use super::{ApiError, KubernetesSettings};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Until the head of an answer is there; and all of it, where it is no watch.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// For a page of a long list, which the API server may have to read from its store.
const LIST_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the API server keeps one watch open.
pub(super) const WATCH: Duration = Duration::from_secs(290);
/// A watch may be silent for long, so the system is to find a connection that died: asked after so long, so often, and so many times.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(20), Duration::from_secs(5), 3);
const USER_AGENT: &str = concat!("chancery-ca/", env!("CARGO_PKG_VERSION"));

/// A cluster's API server. Cheap to clone.
#[derive(Clone)]
pub struct ApiServer {
    client: Client,
    address: String,
    calls: Arc<AtomicU64>,
}

impl ApiServer {
    /// Prepares the way; connections are made when something is asked. Every call is counted in `calls`. To be called within a runtime.
    ///
    /// # Errors
    /// If the settings lead nowhere, or to where nobody can be believed.
    pub async fn connect(settings: &KubernetesSettings, calls: Arc<AtomicU64>) -> Result<Self, ConnectError> {
        let failed = |problem: String| ConnectError { settings: settings.clone(), problem };
        let config = read(settings).await.map_err(failed)?;
        let address = config.cluster_url.to_string();
        let client = client(config, USER_AGENT).map_err(failed)?;
        Ok(Self { client, address, calls })
    }

    /// Where it is.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// A client whose calls are counted and bounded in time. `heard` is called whenever the API server grants one.
    pub fn client(&self, heard: impl Fn() + Clone + Send + 'static) -> Client {
        let server = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let (server, heard) = (server.clone(), heard.clone());
            async move {
                let response = server.send(request, LIST_TIMEOUT).await?;
                if response.status().is_success() {
                    heard();
                }
                Ok::<_, BoxError>(response)
            }
        });
        Client::new(service, self.client.default_namespace())
    }

    /// Counts a call and waits for the head of its answer.
    pub(super) async fn send(&self, request: Request<Body>, within: Duration) -> Result<Response<Body>, ApiError> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        match tokio::time::timeout(within, self.client.send(request)).await {
            Ok(answer) => answer.map_err(|error| match ApiError::from(error) {
                ApiError::Away(problem) => ApiError::Away(format!("{}: {problem}", self.address)),
                error => error,
            }),
            Err(_) => Err(self.too_slow(within)),
        }
    }

    pub(super) fn too_slow(&self, within: Duration) -> ApiError {
        ApiError::Away(format!("no answer from {} within {} s", self.address, within.as_secs()))
    }
}

impl fmt::Debug for ApiServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiServer").field("address", &self.address).finish_non_exhaustive()
    }
}

/// Runs the program that a kubeconfig's `exec` names, if it has one; it may take its time, and ask the person.
pub(super) fn client(config: Config, user_agent: &'static str) -> Result<Client, String> {
    let program = config.auth_info.exec.as_ref().and_then(|exec| exec.command.clone());
    build(config, user_agent).map_err(|error| match (program, &error) {
        (Some(program), kube::Error::Auth(_)) => format!("its user's token is to come from {program} (`exec`): {}", words_of(&error)),
        _ => words_of(&error),
    })
}

/// kube's own stack would try again by itself, log every failure, and not notice that a silent connection has died.
fn build(mut config: Config, user_agent: &'static str) -> Result<Client, kube::Error> {
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
    let (after, every, times) = KEEPALIVE;
    connector.set_keepalive(Some(after));
    connector.set_keepalive_interval(Some(every));
    connector.set_keepalive_retries(Some(times));
    config.headers.push((header::USER_AGENT, HeaderValue::from_static(user_agent)));
    let https = config.rustls_https_connector_with_connector(connector)?;
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(hyper_util::client::legacy::Client::builder(TokioExecutor::new()).build(https));
    Ok(Client::new(service, config.default_namespace))
}

/// Looks at what [`ApiServer::connect`] would need, without asking anybody. What a pod finds in its cluster is not looked at, since it is
/// there only.
///
/// # Errors
/// What is wrong, and what to do.
pub fn check(settings: &KubernetesSettings) -> Result<(), String> {
    match settings {
        KubernetesSettings::InCluster => Ok(()),
        KubernetesSettings::Kubeconfig { path, context } => {
            let kubeconfig = Kubeconfig::read_from(path).map_err(|error| with_causes(&error))?;
            let name = context.as_ref().or(kubeconfig.current_context.as_ref());
            let name = name.ok_or_else(|| format!("{} has no current context; name one in `context`", path.display()))?;
            if kubeconfig.contexts.iter().any(|named| named.name == *name) {
                Ok(())
            } else {
                Err(format!("{} has no context {name:?}", path.display()))
            }
        }
    }
}

async fn read(settings: &KubernetesSettings) -> Result<Config, String> {
    let config = match settings {
        KubernetesSettings::InCluster => Config::incluster().map_err(|error| with_causes(&error))?,
        KubernetesSettings::Kubeconfig { path, context } => {
            let kubeconfig = Kubeconfig::read_from(path).map_err(|error| with_causes(&error))?;
            described(kubeconfig, context.clone()).await?
        }
    };
    trustworthy(config)
}

/// What a kubeconfig says of its current context, or of this one.
pub(super) async fn described(kubeconfig: Kubeconfig, context: Option<String>) -> Result<Config, String> {
    let proxies: Vec<_> = kubeconfig.clusters.iter().filter_map(|named| named.cluster.as_ref()?.proxy_url.clone()).collect();
    let options = KubeConfigOptions { context, ..KubeConfigOptions::default() };
    let config = Config::from_custom_kubeconfig(kubeconfig, &options).await.map_err(|error| with_causes(&error))?;
    if config.proxy_url.as_ref().is_some_and(|url| proxies.iter().any(|proxy| proxy.parse().ok().as_ref() == Some(url))) {
        return Err("its cluster has a `proxy-url`, and API servers are only asked directly".into());
    }
    Ok(config)
}

/// Only if it leads to an API server that can be believed.
pub(super) fn trustworthy(mut config: Config) -> Result<Config, String> {
    // What the environment says of proxies is meant for other programs.
    config.proxy_url = None;
    if config.cluster_url.scheme_str() != Some("https") {
        return Err(format!("{} is no https address, so that anybody could answer", config.cluster_url));
    }
    if config.accept_invalid_certs {
        return Err("its cluster has `insecure-skip-tls-verify`, so that anybody could answer; give the `certificate-authority`".into());
    }
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KUBECONFIG: &str = "apiVersion: v1\nkind: Config\ncurrent-context: east\ncontexts:\n\
        - {name: east, context: {cluster: east, user: ca}}\n- {name: plain, context: {cluster: plain, user: ca}}\n\
        - {name: open, context: {cluster: open, user: ca}}\nclusters:\n- {name: east, cluster: {server: 'https://127.0.0.1:6443'}}\n\
        - {name: plain, cluster: {server: 'http://127.0.0.1:8080'}}\n\
        - {name: open, cluster: {server: 'https://127.0.0.1:6443', insecure-skip-tls-verify: true}}\n\
        users:\n- {name: ca, user: {token: secret}}\n";

    fn settings(directory: &tempfile::TempDir, context: Option<&str>) -> KubernetesSettings {
        let path = directory.path().join("kubeconfig");
        std::fs::write(&path, KUBECONFIG).unwrap();
        KubernetesSettings::Kubeconfig { path, context: context.map(str::to_owned) }
    }

    #[tokio::test]
    async fn an_api_server_that_nobody_vouches_for_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        for (context, problem) in [("plain", "no https address"), ("open", "insecure-skip-tls-verify")] {
            let error = ApiServer::connect(&settings(&directory, Some(context)), Arc::default()).await.unwrap_err().to_string();
            assert!(error.contains(problem) && error.contains(context), "{error}");
        }
        ApiServer::connect(&settings(&directory, None), Arc::default()).await.unwrap();
    }

    #[test]
    fn a_kubeconfig_without_the_context_is_found_before_a_start() {
        let directory = tempfile::tempdir().unwrap();
        assert!(check(&settings(&directory, None)).is_ok() && check(&settings(&directory, Some("open"))).is_ok());
        assert!(check(&settings(&directory, Some("west"))).unwrap_err().contains("no context \"west\""));
        let nowhere = KubernetesSettings::Kubeconfig { path: "/nonexistent/kubeconfig".into(), context: None };
        assert!(check(&nowhere).unwrap_err().contains("/nonexistent/kubeconfig"));
    }

    #[tokio::test]
    async fn an_api_server_that_does_not_answer_is_away_and_the_call_is_counted() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kubeconfig");
        // Nothing listens on port 1.
        std::fs::write(&path, KUBECONFIG.replace(":6443", ":1")).unwrap();
        let (calls, settings) = (Arc::<AtomicU64>::default(), KubernetesSettings::Kubeconfig { path, context: None });
        let server = ApiServer::connect(&settings, Arc::clone(&calls)).await.unwrap();
        let error = server.pod("shop", "cart-1").await.unwrap_err();
        assert!(matches!(&error, ApiError::Away(problem) if problem.contains("refused")), "{error:?}");
        assert_eq!(calls.load(Ordering::Relaxed), 1);
    }
}
