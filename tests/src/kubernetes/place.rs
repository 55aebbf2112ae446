//! A cluster with a node, and a CA that watches it with the rights of a service account of that cluster.

use std::path::{Path, PathBuf};
use std::time::Duration;

use chancery_proto::chancery::v1::{Refusal, WorkloadRequest};
use serde_json::json;

use crate::agent::Agent;
use crate::ca::{CLUSTER, Ca};
use crate::caller::Caller;
use crate::kubernetes::{Admin, ApiServer, Call, ISSUER, Node, Pod};
use crate::lab::Lab;
use crate::tokens::TokenVolume;
use crate::{Result, wait};

const HOUR: Duration = Duration::from_secs(3600);
const SOON: Duration = Duration::from_secs(30);
const WORKLOADS: &str = "chancery";
const AGENTS: &str = "chancery-agent";

/// The cluster's side: namespaces and a node of a test's own.
pub struct Territory {
    /// May do everything.
    pub admin: Admin,
    /// The namespace of the accounts `ca` and `agent`.
    pub system: String,
    /// The namespace of the account `cart`.
    pub shop: String,
    /// A node.
    pub node: Node,
}

/// The same, with a CA.
pub struct Place {
    /// The cluster's side.
    pub of: Territory,
    /// Its cluster is called [`CLUSTER`].
    pub ca: Ca,
    /// How the CA reaches the API server.
    pub kubeconfig: PathBuf,
    /// Where its files are.
    pub lab: Lab,
}

impl Territory {
    /// Makes it, with the rights that the account `ca` needs to attest.
    pub async fn new(server: &ApiServer) -> Result<Self> {
        let admin = server.admin().await?;
        let (system, shop) = (admin.namespace("system").await?, admin.namespace("shop").await?);
        let node = admin.node("node").await?;
        for (namespace, account) in [(&system, "ca"), (&system, "agent"), (&shop, "cart")] {
            admin.account(namespace, account).await?;
        }
        let territory = Self { admin, system, shop, node };
        territory.allow_ca(&["get", "list", "watch"]).await?;
        Ok(territory)
    }

    /// Allows the account `ca` these verbs for pods and service accounts, and to ask about tokens.
    pub async fn allow_ca(&self, verbs: &[&str]) -> Result<()> {
        let rules = json!([
            {"apiGroups": [""], "resources": ["pods", "serviceaccounts"], "verbs": verbs},
            {"apiGroups": ["authentication.k8s.io"], "resources": ["tokenreviews"], "verbs": ["create"]},
        ]);
        self.admin.allow(&self.system, "ca", &rules).await
    }

    /// A token of the account `ca`, for the API server.
    pub async fn ca_token(&self) -> Result<String> {
        self.admin.unbound_token(&self.system, "ca", ISSUER, HOUR).await
    }

    /// The kubeconfig of the account `ca`.
    pub async fn ca_kubeconfig(&self, server: &ApiServer) -> Result<PathBuf> {
        server.kubeconfig_for_token(&self.ca_token().await?)
    }

    /// The `[[cluster]]` of a CA that reaches this one so, and lets it speak for these accounts.
    pub fn section(&self, name: &str, kubernetes: &str, accounts: &str) -> String {
        format!(
            "\n[[cluster]]\nname = \"{name}\"\nissuer = \"{ISSUER}\"\nagent_accounts = [\"{}/agent\"]\nservice_accounts = [\"{accounts}\"]\n\
             kubernetes = {kubernetes}\n",
            self.system
        )
    }

    /// A pod of the account `cart` on the node.
    pub async fn pod(&self, name: &str) -> Result<Pod> {
        self.admin.pod(&self.shop, name, "cart", &self.node.name).await
    }

    /// A workload's token as the kubelet gets it.
    pub async fn token(&self, pod: &Pod) -> Result<String> {
        self.admin.token(pod, WORKLOADS, HOUR).await
    }

    /// The pod of a node's agent.
    pub async fn agent_pod(&self, node: &Node) -> Result<Pod> {
        self.admin.pod(&self.system, &format!("agent-{}", node.name), "agent", &node.name).await
    }

    /// What an agent's pod joins with.
    pub async fn join_token(&self, agent: &Pod) -> Result<String> {
        self.admin.token(agent, AGENTS, HOUR).await
    }
}

impl Place {
    /// A CA that issues for `lifetime` and reaches the API server by a kubeconfig.
    pub async fn new(server: &ApiServer, lifetime: Duration) -> Result<Self> {
        Self::with(server, Territory::new(server).await?, lifetime, "").await
    }

    /// The same, with these lines at the end of the cluster's section.
    pub async fn with(server: &ApiServer, of: Territory, lifetime: Duration, more: &str) -> Result<Self> {
        Self::between(server, of, lifetime, "", more).await
    }

    /// A CA whose agents' own certificates are good for `lifetime`.
    pub async fn for_agents(server: &ApiServer, lifetime: Duration) -> Result<Self> {
        let of_agents = format!("agent = \"{}s\"\n", lifetime.as_secs());
        Self::between(server, Territory::new(server).await?, HOUR, &of_agents, "").await
    }

    /// With these lines before and after the cluster's section.
    async fn between(server: &ApiServer, of: Territory, lifetime: Duration, before: &str, after: &str) -> Result<Self> {
        let kubeconfig = of.ca_kubeconfig(server).await?;
        let lab = Lab::new()?;
        let section = of.section(CLUSTER, &by_kubeconfig(&kubeconfig), "*");
        let ca = Ca::start_in(&lab, &lab.at("ca"), lifetime, &format!("{before}{section}{after}")).await?;
        Ok(Self { of, ca, kubeconfig, lab })
    }

    /// Gives the CA a new token for the API server, as the kubelet would in time; it connects anew.
    pub async fn renew_kubeconfig(&self, server: &ApiServer) -> Result<()> {
        std::fs::copy(self.of.ca_kubeconfig(server).await?, &self.kubeconfig)?;
        Ok(())
    }

    /// Waits until the CA says this of itself.
    pub async fn says(&self, words: &str) -> Result<()> {
        wait::until(&format!("the status says {words:?}"), SOON, async || {
            let status = self.ca.chancery(&["status"]).unwrap_or_else(|error| error.to_string());
            if status.contains(words) { Ok(()) } else { Err(status) }
        })
        .await
    }

    /// The node's agent, running, with these lines in its configuration.
    pub async fn agent(&self, more: &str) -> Result<Agent> {
        let volume = TokenVolume::create(&self.lab.at("agent-token"))?;
        volume.replace(&self.of.join_token(&self.of.agent_pod(&self.of.node).await?).await?)?;
        let mut agent = Agent::configure_with_token(&self.lab, &self.ca, &volume)?;
        agent.append(more)?;
        agent.run(&self.lab).await?;
        Ok(agent)
    }

    /// Somebody who has the identity of a node's agent and sends what a test makes up.
    pub async fn caller(&self, node: &Node) -> Result<Caller> {
        let token = self.of.join_token(&self.of.agent_pod(node).await?).await?;
        Caller::join_with_token(&self.lab, &self.ca, &node.name, &token).await
    }

    /// How often the ledger has certificates for this pod.
    pub fn issued(&self, pod: &Pod) -> Result<usize> {
        let name = format!("{}/{}", pod.namespace, pod.name);
        let identities = self.ca.ask(&["identity", "list", "--pod", &name])?;
        Ok(identities.as_array().map_or(0, Vec::len))
    }

    /// The CA's calls of the API server.
    pub fn calls(&self, server: &ApiServer) -> Result<Vec<Call>> {
        let own = format!("system:serviceaccount:{}:ca", self.of.system);
        Ok(server.calls()?.into_iter().filter(|call| call.user == own).collect())
    }
}

/// How a CA reaches an API server, in its configuration.
pub fn by_kubeconfig(file: &Path) -> String {
    format!("{{ kubeconfig = \"{}\" }}", file.display())
}

/// Asks for a certificate by this token: where the ledger has it, or why there is none.
pub async fn ask(caller: &Caller, token: &str) -> Result<Result<u64, Refusal>> {
    let request = WorkloadRequest { token: token.to_owned(), ..caller.request()? };
    Ok(caller.issue(request).await?.map(|issued| issued.entry))
}

/// Waits until there is one.
pub async fn granted(caller: &Caller, token: &str) -> Result<()> {
    wait::until("granted", SOON, async || match ask(caller, token).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(refusal)) => Err(refusal.message),
        Err(error) => Err(error.to_string()),
    })
    .await
}

/// Waits until it is refused for good, for this reason.
pub async fn refused(caller: &Caller, token: &str, reason: &str, within: Duration) -> Result<()> {
    wait::until(&format!("refused as {reason}"), within, async || match ask(caller, token).await {
        Ok(Err(refusal)) if refusal.reason == reason => Ok(()),
        Ok(outcome) => Err(format!("{outcome:?}")),
        Err(error) => Err(error.to_string()),
    })
    .await
}
