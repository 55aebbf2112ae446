//! A whole small mesh: a CA, an agent, and workloads with an Envoy each.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use chancery_ca::attestation::development::{DevelopmentIssuer, TokenRequest};
use serde_json::Value;
use time::OffsetDateTime;

use crate::Result;
use crate::agent::Agent;
use crate::ca::{Ca, TRUST_DOMAIN};
use crate::envoy::{Envoy, Plan, Protocol};
use crate::lab::Lab;
use crate::tokens::{TokenKeeper, TokenVolume};

/// The node that everything runs on.
pub const NODE: &str = "node-1";
/// The namespace of all workloads.
pub const NAMESPACE: &str = "shop";

/// How a mesh differs from others.
#[derive(Clone)]
pub struct Settings {
    /// The Envoy to run.
    pub envoy: PathBuf,
    /// Of workloads' certificates.
    pub lifetime: Duration,
    /// Of workloads' tokens.
    pub token_lifetime: Duration,
    /// How the Envoys ask.
    pub protocol: Protocol,
}

impl Settings {
    /// Certificates and tokens that outlive the test.
    pub fn lasting(envoy: PathBuf) -> Self {
        let hour = Duration::from_secs(3600);
        Self { envoy, lifetime: hour, token_lifetime: hour, protocol: Protocol::Stream }
    }
}

/// CA and agent, and where their files are.
pub struct Mesh {
    /// The running CA.
    pub ca: Ca,
    /// The running agent.
    pub agent: Agent,
    settings: Settings,
    issuer: Arc<DevelopmentIssuer>,
    /// Last, so that it is removed when everything has ended.
    pub lab: Lab,
}

/// A pod with its Envoy and a fresh token.
pub struct Workload {
    /// The running Envoy.
    pub envoy: Envoy,
    /// Its projected volume.
    pub volume: TokenVolume,
    account: String,
    keeper: TokenKeeper,
}

impl Mesh {
    /// Starts CA and agent.
    pub async fn start(lab: Lab, settings: Settings) -> Result<Self> {
        let ca = Ca::start(&lab, settings.lifetime).await?;
        let agent = Agent::start(&lab, &ca, NODE).await?;
        Self::around(ca, agent, lab, settings)
    }

    /// Around a CA and an agent that run already, in the same lab.
    pub fn around(ca: Ca, agent: Agent, lab: Lab, settings: Settings) -> Result<Self> {
        let issuer = Arc::new(ca.issuer()?);
        Ok(Self { ca, agent, settings, issuer, lab })
    }

    /// Starts a workload of a service account and waits until its Envoy has its certificate.
    pub async fn workload(&self, account: &str, upstream: Option<SocketAddr>) -> Result<Workload> {
        let mut workload = self.changed_workload(account, upstream, |_| {}).await?;
        workload.envoy.ready().await?;
        Ok(workload)
    }

    /// Starts one whose Envoy has something else in its configuration, and does not wait for it.
    pub async fn changed_workload(&self, account: &str, upstream: Option<SocketAddr>, change: impl FnOnce(&mut Value)) -> Result<Workload> {
        let (volume, keeper) = self.fresh_volume(account).await?;
        let envoy = Envoy::start_changed(&self.lab, &self.settings.envoy, &self.plan(account, &volume, upstream), change)?;
        Ok(Workload { envoy, volume, account: account.to_owned(), keeper })
    }

    /// Starts the workloads `cart` and `checkout`, of which the first calls the second.
    pub async fn pair(&self) -> Result<(Workload, Workload)> {
        let checkout = self.workload("checkout", None).await?;
        let cart = self.workload("cart", Some(checkout.envoy.at.inbound)).await?;
        Ok((cart, checkout))
    }

    /// Runs `chancery` without holding up a load on the same threads.
    pub fn chancery(&self, arguments: &[&str]) -> std::result::Result<String, String> {
        tokio::task::block_in_place(|| self.ca.chancery(arguments)).map_err(|error| error.to_string())
    }

    /// What the Envoy of a service account's pod does.
    pub fn plan(&self, account: &str, volume: &TokenVolume, upstream: Option<SocketAddr>) -> Plan {
        Plan {
            name: account.to_owned(),
            sds_socket: self.agent.sds_socket.clone(),
            protocol: self.settings.protocol,
            token: Some(volume.clone()),
            peer_prefix: format!("spiffe://{TRUST_DOMAIN}/"),
            upstream,
        }
    }

    /// A volume whose token is replaced in time, until the keeper is dropped.
    pub async fn fresh_volume(&self, account: &str) -> Result<(TokenVolume, TokenKeeper)> {
        let volume = TokenVolume::create(&self.lab.at(&format!("{account}-token")))?;
        let lifetime = self.settings.token_lifetime;
        let mint = self.mint(account, lifetime);
        let keeper = TokenKeeper::start(volume.clone(), lifetime, move || std::future::ready(mint())).await?;
        Ok((volume, keeper))
    }

    /// A volume with one token for a pod of this service account; nobody replaces it.
    pub fn volume(&self, account: &str) -> Result<TokenVolume> {
        let volume = TokenVolume::create(&self.lab.at(&format!("{account}-token")))?;
        volume.replace(&self.mint(account, self.settings.token_lifetime)()?)?;
        Ok(volume)
    }

    /// What the kubelet does for a pod of this service account: ask the API server for a token.
    fn mint(&self, account: &str, lifetime: Duration) -> impl Fn() -> Result<String> + Send + 'static {
        let (issuer, request) = (self.issuer.clone(), token_request(account, lifetime));
        move || Ok(issuer.sign(&request, OffsetDateTime::now_utc())?.to_string())
    }
}

/// What a pod of this service account presents.
pub fn token_request(account: &str, lifetime: Duration) -> TokenRequest {
    TokenRequest {
        namespace: NAMESPACE.into(),
        service_account: account.to_owned(),
        pod: format!("{account}-0"),
        node: NODE.into(),
        audience: "chancery".into(),
        lifetime,
        pod_uid: None,
        node_uid: None,
    }
}

impl Workload {
    /// `shop/cart`.
    pub fn name(&self) -> String {
        format!("{NAMESPACE}/{}", self.account)
    }

    /// What its certificate must say.
    pub fn spiffe_id(&self) -> String {
        format!("spiffe://{TRUST_DOMAIN}/ns/{NAMESPACE}/sa/{}", self.account)
    }

    /// Leaves the Envoy running after this process, with a token of this lifetime, since nobody will replace it.
    pub fn detach(self, mesh: &Mesh, token_lifetime: Duration) -> Result<u32> {
        drop(self.keeper);
        self.volume.replace(&mesh.mint(&self.account, token_lifetime)()?)?;
        Ok(self.envoy.detach())
    }
}
