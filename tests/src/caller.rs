//! Somebody who joined the CA as the agent of a node or as a sidecar, and then sends it whatever a test makes up.

use std::path::PathBuf;
use std::time::Duration;

use chancery_agent::ca_client::{Anchor, CaClient, CaError, LedgerFile, Remembered, Role, Settings};
use chancery_agent::telemetry::Metrics;
use chancery_ca::attestation::development::DevelopmentIssuer;
use chancery_identity::SystemClock;
use chancery_identity::csr::{self, KeyType};
use chancery_proto::chancery::v1::workload_result::Outcome;
use chancery_proto::chancery::v1::{IssueReason, IssuedSvid, Refusal, WorkloadRequest, WorkloadResult};
use prometheus_client::registry::Registry;
use time::OffsetDateTime;
use tokio::io::AsyncReadExt;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::agent::join_token;
use crate::ca::{CLUSTER, Ca, TRUST_DOMAIN};
use crate::lab::Lab;
use crate::mesh::{NODE, token_request};
use crate::{Result, wait};

const JOINED_WITHIN: Duration = Duration::from_secs(60);
const TOKEN_LIFETIME: Duration = Duration::from_secs(3600);

/// An agent's certificate and connection, without an agent.
pub struct Caller {
    client: CaClient,
    issuer: DevelopmentIssuer,
    node: String,
    _connection: AbortOnDropHandle<()>,
}

impl Caller {
    /// Joins as the agent of a node that has no other.
    pub async fn join(lab: &Lab, ca: &Ca, node: &str) -> Result<Self> {
        let token = ca.issuer()?.sign(&join_token(node), OffsetDateTime::now_utc())?;
        Self::join_with_token(lab, ca, node, &token).await
    }

    /// Joins as the agent of the node that this token names.
    pub async fn join_with_token(lab: &Lab, ca: &Ca, node: &str, token: &str) -> Result<Self> {
        Self::join_cluster(lab, ca, CLUSTER, node, token).await
    }

    /// The same, of a cluster that the CA calls so.
    pub async fn join_cluster(lab: &Lab, ca: &Ca, cluster: &str, node: &str, token: &str) -> Result<Self> {
        let token_file = lab.at(&format!("{cluster}-{node}-token"));
        std::fs::write(&token_file, token)?;
        Self::join_as(Role::Agent, ca, cluster, node, token_file).await
    }

    /// Joins as the sidecar of the pod whose token is in this file.
    pub async fn join_sidecar(ca: &Ca, token_file: PathBuf) -> Result<Self> {
        Self::join_as(Role::Sidecar, ca, CLUSTER, NODE, token_file).await
    }

    async fn join_as(role: Role, ca: &Ca, cluster: &str, node: &str, token_file: PathBuf) -> Result<Self> {
        let own = token_file.with_extension("ledger");
        std::fs::create_dir_all(&own)?;
        let ledger = LedgerFile::in_directory(&own);
        let settings = Settings {
            trust_domain: TRUST_DOMAIN.parse()?,
            cluster: cluster.into(),
            address: ca.address.to_string(),
            role,
            token_file,
            anchor: Anchor::BundleFile(ca.bundle()),
            key_type: KeyType::EcdsaP256,
            call_timeout: Duration::from_secs(10),
            renew_from: 0.5,
            tick: Duration::from_secs(1),
        };
        let metrics = Metrics::new(&mut Registry::default());
        let clock = std::sync::Arc::new(SystemClock);
        let (client, task) = CaClient::start(settings, Remembered::default(), ledger, clock, metrics, CancellationToken::new());
        let caller = Self { client, issuer: ca.issuer()?, node: node.to_owned(), _connection: AbortOnDropHandle::new(task) };
        caller.connected().await?;
        Ok(caller)
    }

    /// Waits until there is a session with the CA.
    pub async fn connected(&self) -> Result<()> {
        wait::until("a session with the CA", JOINED_WITHIN, async || {
            if *self.client.reachable().borrow() { Ok(()) } else { Err(self.client.problem()) }
        })
        .await
    }

    /// Waits until there is none.
    pub async fn cut_off(&self, within: Duration) -> Result<()> {
        let cut_off = async || if *self.client.reachable().borrow() { Err("it has one") } else { Ok(()) };
        wait::until("no session with the CA", within, cut_off).await
    }

    /// Whose certificate it calls with.
    pub fn spiffe_id(&self) -> Result<String> {
        Ok(self.client.own().borrow().as_ref().ok_or("not joined")?.svid.id().to_string())
    }

    /// One more connection with the CA under its certificate, over which nothing is sent; the task ends when the CA has ended it.
    pub async fn open_connection(&self, ca: &Ca) -> Result<AbortOnDropHandle<()>> {
        let svid = self.client.own().borrow().as_ref().ok_or("not joined")?.svid.clone();
        let mut stream = ca.shake_hands(Some(&svid)).await?;
        let ended = async move {
            let mut received = [0; 1024];
            while matches!(stream.read(&mut received).await, Ok(1..)) {}
        };
        Ok(AbortOnDropHandle::new(tokio::spawn(ended)))
    }

    /// A good token of a pod of `shop/cart` on this node.
    pub fn token(&self) -> Result<Zeroizing<String>> {
        let mut request = token_request("cart", TOKEN_LIFETIME);
        request.node.clone_from(&self.node);
        Ok(self.issuer.sign(&request, OffsetDateTime::now_utc())?)
    }

    /// A request that the CA grants.
    pub fn request(&self) -> Result<WorkloadRequest> {
        let (csr, _) = csr::generate(KeyType::EcdsaP256, None)?;
        let token = self.token()?.to_string();
        Ok(WorkloadRequest { request_id: Uuid::new_v4().to_string(), csr, token, reason: IssueReason::First.into() })
    }

    /// One request in a call.
    pub async fn issue(&self, request: WorkloadRequest) -> Result<Result<IssuedSvid, Refusal>> {
        let result = self.call(vec![request]).await?.pop().ok_or("no result")?;
        match result.outcome {
            Some(Outcome::Svid(issued)) => Ok(Ok(issued)),
            Some(Outcome::Refusal(refusal)) => Ok(Err(refusal)),
            None => Err("neither a certificate nor a refusal".into()),
        }
    }

    /// Many requests in a call.
    pub async fn call(&self, requests: Vec<WorkloadRequest>) -> Result<Vec<WorkloadResult>, CaError> {
        self.client.issue(requests).await
    }
}
