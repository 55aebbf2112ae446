//! The agent's own certificate: the first one by its service-account token, the next by the one before.

use chancery_identity::{PrivateKey, TrustState, csr, tls};
use chancery_proto::chancery::v1 as wire;
use chancery_proto::chancery::v1::agent_service_client::AgentServiceClient;
use tonic::transport::Channel;
use uuid::Uuid;
use zeroize::Zeroizing;

use super::{CaClient, CaError, ClusterKeys, Held, Role, Token, channel, trust};

/// Larger files are no tokens.
const MAX_TOKEN_FILE_BYTES: u64 = 64 * 1024;
pub(super) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// What joining brings: an identity, and all that goes with it.
pub(super) struct Joined {
    pub(super) own: Held,
    pub(super) trust: Option<TrustState>,
    pub(super) cluster_keys: ClusterKeys,
}

impl CaClient {
    /// Reads the configured token file, as it is now.
    ///
    /// # Errors
    /// If it cannot be read or holds no text.
    pub fn read_token(&self) -> Result<Token, CaError> {
        let path = &self.settings.token_file;
        let refuse = |problem: String| CaError::File { path: path.clone(), problem };
        let length = std::fs::metadata(path).map_err(|e| refuse(e.to_string()))?.len();
        if length > MAX_TOKEN_FILE_BYTES {
            return Err(refuse(format!("{length} bytes are too many for a token")));
        }
        let text = Zeroizing::new(std::fs::read_to_string(path).map_err(|e| refuse(e.to_string()))?);
        let token = Token::new(text);
        if token.secret().is_empty() { Err(refuse("it is empty".into())) } else { Ok(token) }
    }

    /// Exchanges the token for an identity, on a connection without a client certificate.
    pub(super) async fn join(&self, server: tls::ServerTrust) -> Result<Joined, CaError> {
        let token = self.read_token()?;
        let tls = tls::client_config(server, self.server_id()?, None, self.clock.clone())
            .map_err(|e| CaError::Local(format!("no TLS configuration: {e}")))?;
        let channel = channel::connect(&self.settings.address, tls).await?;
        let (csr, key) = self.new_key()?;
        let request_id = Uuid::new_v4().to_string();
        tracing::info!(%request_id, cluster = self.settings.cluster, "joining");
        let role = match self.settings.role {
            Role::Agent => wire::Role::Agent,
            Role::Sidecar => wire::Role::Sidecar,
        };
        let request = wire::JoinRequest {
            role: role.into(),
            cluster: self.settings.cluster.clone(),
            token: token.secret().to_owned(),
            csr,
            version: VERSION.to_owned(),
            capabilities: Vec::new(),
            request_id,
        };
        let answer = self.timed("Join", AgentServiceClient::new(channel).join(request)).await?;
        let cluster_keys = answer.cluster_keys.ok_or_else(|| CaError::Answer("it sent no cluster keys".into()))?;
        let cluster_keys = ClusterKeys::from_wire(&cluster_keys, &self.settings.cluster)?;
        let offered = answer.trust.ok_or_else(|| CaError::Answer("it sent no trust state".into()))?;
        let accepted = self.accept_trust(offered)?;
        let known = self.published.trust.borrow().clone();
        let trust = accepted.as_ref().or(known.as_deref()).ok_or_else(|| CaError::Answer("it sent no trust state".into()))?;
        let own = self.check_own(answer.svid, key, trust)?;
        Ok(Joined { own, trust: accepted, cluster_keys })
    }

    /// A new certificate with a new key, on the strength of the one that `channel` was made with.
    pub(super) async fn renew(&self, channel: Channel) -> Result<Held, CaError> {
        let (csr, key) = self.new_key()?;
        let request_id = Uuid::new_v4().to_string();
        tracing::info!(%request_id, "renewing the agent's own certificate");
        let answer = self.timed("Renew", AgentServiceClient::new(channel).renew(wire::RenewRequest { csr, request_id })).await?;
        let trust = self.published.trust.borrow().clone().ok_or_else(|| CaError::Local("no trust state yet".into()))?;
        self.check_own(answer.svid, key, &trust)
    }

    /// Decides on a trust state that the CA offers: the one to hold from now on, or `None` if it is the one already held.
    pub(super) fn accept_trust(&self, offered: wire::TrustState) -> Result<Option<TrustState>, CaError> {
        let known = self.published.trust.borrow().clone();
        trust::accept(known.as_deref(), trust::from_wire(offered)?, &self.settings.trust_domain).map_err(|refusal| {
            self.metrics.trust_refused(refusal.reason());
            CaError::Answer(format!("its trust state is refused: {refusal}"))
        })
    }

    fn new_key(&self) -> Result<(Vec<u8>, PrivateKey), CaError> {
        csr::generate(self.settings.key_type, None).map_err(|e| CaError::Local(format!("no key: {e}")))
    }

    /// A certificate for the agent must be one for an agent of this cluster, and as good as a workload's.
    fn check_own(&self, issued: Option<wire::IssuedSvid>, key: PrivateKey, trust: &TrustState) -> Result<Held, CaError> {
        let issued = issued.ok_or_else(|| CaError::Answer("it sent no certificate".into()))?;
        let held = Held::accept(&issued, key, trust, self.clock.now())?;
        let kind = match self.settings.role {
            Role::Agent => "agent",
            Role::Sidecar => "sidecar",
        };
        let id = held.svid.id();
        let segments: Vec<&str> = id.segments().collect();
        if id.trust_domain() != &self.settings.trust_domain
            || segments.len() != 4
            || segments[..3] != ["chancery", kind, self.settings.cluster.as_str()]
        {
            return Err(CaError::Answer(format!("{id} is no identity of the {kind} in the cluster {:?}", self.settings.cluster)));
        }
        Ok(held)
    }
}
