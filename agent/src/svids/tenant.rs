//! A pod that is known by its socket, not by what its streams bring: whoever reaches the socket is that pod.

use std::sync::Arc;

use super::owner::Command;
use super::workload::TokenSource;
use super::{AttachError, Refused, Subscription, Svids, Token, TokenInfo, WorkloadKey};
use crate::ca_client::Bearer;

/// Keeps a workload while it has no stream.
#[derive(Clone, Debug, Default)]
pub(super) struct Hold(Arc<()>);

impl Hold {
    /// How many there are of this one.
    pub(super) fn count(&self) -> usize {
        Arc::strong_count(&self.0)
    }
}

/// A pod whose token is good. Nothing has been done for it yet.
#[derive(Debug)]
pub struct Applicant {
    svids: Svids,
    workload: WorkloadKey,
    pod_name: String,
    token: TokenSource,
}

impl Applicant {
    /// Which workload.
    pub fn workload(&self) -> &WorkloadKey {
        &self.workload
    }

    /// The pod's name, for people.
    pub fn pod_name(&self) -> &str {
        &self.pod_name
    }

    /// Takes the pod on. A newer token of a pod that is there already replaces the one before.
    ///
    /// # Errors
    /// If a limit is reached, or the agent stops.
    pub async fn admit(self) -> Result<Tenant, AttachError> {
        self.svids.tenant(self.workload, self.pod_name, self.token).await
    }
}

/// A pod that has a socket of its own. Its certificate is asked for and renewed with the newest of its tokens, whether a stream is open or
/// not, until the last clone of this is dropped.
#[derive(Clone, Debug)]
pub struct Tenant {
    svids: Svids,
    workload: WorkloadKey,
    pod_name: String,
    _hold: Hold,
}

impl Tenant {
    /// Which workload.
    pub fn workload(&self) -> &WorkloadKey {
        &self.workload
    }

    /// The pod's name, for people.
    pub fn pod_name(&self) -> &str {
        &self.pod_name
    }

    /// Attaches a stream that came by the pod's own socket.
    ///
    /// # Errors
    /// If a limit is reached, or the agent stops.
    pub async fn attach(&self) -> Result<Subscription, AttachError> {
        let (key, pod_name) = (self.workload.clone(), self.pod_name.clone());
        let attached = self.svids.ask(|reply| Command::Attach { key, pod_name, token: TokenSource::Missing, reply }).await;
        attached.flatten().map_err(|error| {
            let WorkloadKey { namespace, service_account, .. } = self.workload.clone();
            let bearer = Bearer { namespace, pod: self.pod_name.clone(), service_account };
            self.svids.count(Refused { error, bearer: Some(Box::new(bearer)) })
        })
    }

    /// The pod is gone: its workload is let go as soon as no stream and no other tenant holds it, without the time for a restart.
    pub async fn leave(self) {
        // An agent that stops lets go of everything.
        let _ = self.svids.commands.send(Command::Leave { key: self.workload.clone() }).await;
    }
}

impl Svids {
    /// Verifies a pod's `token` offline. On an agent that has just started, waits some seconds for the cluster's keys.
    ///
    /// # Errors
    /// If the token does not verify or is for another node, or if the keys did not come in time.
    pub async fn recognise(&self, token: Token) -> Result<Applicant, AttachError> {
        let verified = self.verify_of_this_node(&token).await.map_err(|refused| refused.error)?;
        let (workload, info) = (WorkloadKey::of(&verified), TokenInfo::of(&verified));
        Ok(Applicant { svids: self.clone(), workload, pod_name: verified.pod.name, token: TokenSource::Brought(token, info) })
    }

    /// Takes a pod on again that was a tenant before the agent was restarted. It is served what the agent holds of it; anything
    /// new waits for its next token.
    ///
    /// # Errors
    /// If a limit is reached, or the agent stops.
    pub async fn readmit(&self, workload: WorkloadKey, pod_name: String) -> Result<Tenant, AttachError> {
        self.tenant(workload, pod_name, TokenSource::Missing).await
    }

    async fn tenant(&self, workload: WorkloadKey, pod_name: String, token: TokenSource) -> Result<Tenant, AttachError> {
        let (key, name) = (workload.clone(), pod_name.clone());
        let hold = self.ask(|reply| Command::Hold { key, pod_name: name, token, reply }).await??;
        Ok(Tenant { svids: self.clone(), workload, pod_name, _hold: hold })
    }
}
