//! The public keys of the agent's own cluster, which the CA hands it.

use chancery_identity::token::{TokenError, TokenKeys, VerifiedToken};
use chancery_proto::chancery::v1 as wire;
use time::OffsetDateTime;

use super::{CaError, Token};

/// Verifies workloads' tokens offline.
#[derive(Clone, Debug)]
pub struct ClusterKeys {
    keys: TokenKeys,
    audiences: Vec<String>,
}

/// The pod that a token is of, for the log alone.
#[derive(Debug)]
pub struct Bearer {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub pod: String,
    /// Its service account.
    pub service_account: String,
}

impl From<&VerifiedToken> for Bearer {
    fn from(token: &VerifiedToken) -> Self {
        Self { namespace: token.namespace.clone(), pod: token.pod.name.clone(), service_account: token.service_account.name.clone() }
    }
}

impl ClusterKeys {
    /// Takes over what the CA sent for `cluster`.
    ///
    /// # Errors
    /// If it is for another cluster, or holds no usable key.
    pub fn from_wire(message: &wire::ClusterKeys, cluster: &str) -> Result<Self, CaError> {
        if message.cluster != cluster {
            return Err(CaError::Answer(format!("it sent the keys of the cluster {:?}; this agent is of {cluster:?}", message.cluster)));
        }
        if message.audiences.is_empty() {
            return Err(CaError::Answer("it sent no audience for workloads' tokens".into()));
        }
        let keys = TokenKeys::from_jwks(cluster, &message.issuer, &message.jwks)
            .map_err(|e| CaError::Answer(format!("it sent unusable keys of the cluster {cluster:?}: {e}")))?;
        Ok(Self { keys, audiences: message.audiences.clone() })
    }

    /// As the CA sends it, for the state file.
    pub fn to_wire(&self) -> wire::ClusterKeys {
        wire::ClusterKeys {
            cluster: self.keys.cluster().to_owned(),
            issuer: self.keys.issuer().to_owned(),
            audiences: self.audiences.clone(),
            jwks: self.keys.jwks().to_owned(),
        }
    }

    /// Verifies a workload's token at `now`.
    ///
    /// # Errors
    /// The first rule that it breaks.
    pub fn verify(&self, token: &Token, now: OffsetDateTime) -> Result<VerifiedToken, TokenError> {
        self.keys.verify(token.secret(), &self.audiences, now)
    }

    /// Whose a token is that was refused at `now` for its time or its audience alone: it verifies at a time of its life, and for its own
    /// audience.
    pub fn bearer(&self, token: &Token, refused: &TokenError, now: OffsetDateTime) -> Option<Bearer> {
        let (audiences, at) = match refused {
            TokenError::Expired(end) => (&self.audiences, end.saturating_sub(time::Duration::SECOND)),
            TokenError::NotYetValid(begin) => (&self.audiences, *begin),
            TokenError::Audience { found, .. } => (found, now),
            _ => return None,
        };
        self.keys.verify(token.secret(), audiences, at).ok().as_ref().map(Bearer::from)
    }
}
