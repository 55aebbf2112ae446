//! What an attested workload may get: its SPIFFE ID, its DNS names, its lifetime, the types of its key.
//!
//! The ID and the names come from the policy and the verified token alone; what a CSR asks for is only held against them. Nothing here
//! needs a token or a key, so `chancery policy test` asks the same code.

mod template;
#[cfg(test)]
mod tests;

use std::time::Duration;

use chancery_identity::csr::KeyType;
use chancery_identity::{SpiffeId, TrustDomain};
use serde::{Deserialize, Serialize};

use crate::attestation::{AccountPattern, ClusterSettings, RESERVED_SEGMENT};

pub use template::TemplateError;
use template::{Template, fill_name};

/// The `[policy]` of the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PolicySettings {
    /// The path of a workload's SPIFFE ID. `{cluster}`, `{namespace}` and `{service_account}` stand for one segment each; the latter two
    /// must occur.
    pub id_template: String,
    /// How long certificates live.
    pub lifetimes: Lifetimes,
    /// The types of keys that are certified.
    pub key_types: Vec<KeyType>,
    /// Which DNS names service accounts carry, beside their SPIFFE IDs.
    pub dns_names: Vec<DnsRule>,
}

/// How long certificates live.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Lifetimes {
    /// The shortest that may be asked for.
    #[serde(with = "chancery_process::config::duration")]
    pub min: Duration,
    /// Of a workload that asks for none.
    #[serde(with = "chancery_process::config::duration")]
    pub default: Duration,
    /// The longest that may be asked for.
    #[serde(with = "chancery_process::config::duration")]
    pub max: Duration,
    /// Of an agent's or a sidecar's own SVID.
    #[serde(with = "chancery_process::config::duration")]
    pub agent: Duration,
}

/// DNS names for service accounts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DnsRule {
    /// For whom: `*`, `namespace/*`, `namespace/name`.
    pub service_accounts: Vec<AccountPattern>,
    /// The names; `{cluster}`, `{namespace}` and `{service_account}` may stand in them.
    pub names: Vec<String>,
}

/// A rule that the policy itself breaks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyError {
    /// The template.
    #[error("policy.id_template: {0}")]
    Template(#[from] TemplateError),
    /// The lifetimes.
    #[error("policy.lifetimes: {0}")]
    Lifetimes(&'static str),
    /// No key type.
    #[error("policy.key_types is empty, so nothing could be certified; the default is [\"ecdsa-p256\", \"ecdsa-p384\"]")]
    KeyTypes,
    /// A DNS name.
    #[error("policy.dns_names: {0}")]
    DnsName(String),
    /// Two clusters could produce the same ID.
    #[error(
        "clusters {one:?} and {other:?} could both produce the SPIFFE IDs of {accounts}: give them different `service_accounts`, put \
         {{cluster}} into policy.id_template, or set `shared_identities = true` in both"
    )]
    SharedIdentities {
        /// A cluster.
        one: String,
        /// Another.
        other: String,
        /// The accounts that both may speak for.
        accounts: String,
    },
}

/// The facts that decide.
#[derive(Clone, Copy, Debug)]
pub struct Workload<'a> {
    /// The cluster whose keys verified the token.
    pub cluster: &'a str,
    /// The pod's namespace.
    pub namespace: &'a str,
    /// The pod's service account.
    pub service_account: &'a str,
}

/// What is asked for, to be held against what is granted.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// The key's.
    pub key_type: KeyType,
    /// If the CSR names one.
    pub spiffe_id: Option<&'a SpiffeId>,
    /// The CSR's.
    pub dns_names: &'a [String],
    /// Nothing: the default.
    pub lifetime: Option<Duration>,
}

/// What is granted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Derived, never asked for.
    pub spiffe_id: SpiffeId,
    /// Every name that the policy has for the service account, whether it was asked for or not.
    pub dns_names: Vec<String>,
    /// From now on.
    pub lifetime: Duration,
}

/// Why the policy refuses. `rule` names the setting that decided.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message} (rule: {rule})")]
pub struct PolicyRefusal {
    /// A stable word for metrics and refusals.
    pub reason: &'static str,
    /// What was refused, and what would be granted.
    pub message: String,
    /// The setting.
    pub rule: &'static str,
}

/// The policy in force. A value that exists is consistent with itself and with the clusters.
#[derive(Clone, Debug)]
pub struct Policy {
    trust_domain: TrustDomain,
    template: Template,
    settings: PolicySettings,
}

impl Policy {
    /// Checks the settings, by themselves and against the clusters.
    ///
    /// # Errors
    /// The first rule that they break.
    pub fn new(trust_domain: TrustDomain, settings: PolicySettings, clusters: &[ClusterSettings]) -> Result<Self, PolicyError> {
        let template: Template = settings.id_template.parse()?;
        settings.lifetimes.check()?;
        if settings.key_types.is_empty() {
            return Err(PolicyError::KeyTypes);
        }
        let sample = Workload { cluster: "cluster", namespace: "namespace", service_account: "account" };
        for name in settings.dns_names.iter().flat_map(|rule| &rule.names) {
            fill_name(name, sample).map_err(PolicyError::DnsName)?;
        }
        check_shared_identities(&template, clusters)?;
        Ok(Self { trust_domain, template, settings })
    }

    /// Decides about one certificate.
    ///
    /// # Errors
    /// The first rule that refuses it.
    pub fn evaluate(&self, workload: Workload<'_>, asked: &Asked<'_>) -> Result<Decision, PolicyRefusal> {
        let spiffe_id = self.spiffe_id(workload)?;
        self.check_key_type(asked.key_type)?;
        check_asked_id(&spiffe_id, asked.spiffe_id)?;
        let dns_names = self.dns_names(workload)?;
        if let Some(name) = asked.dns_names.iter().find(|name| !dns_names.iter().any(|granted| granted.eq_ignore_ascii_case(name))) {
            let message = format!("the CSR asks for the DNS name {name:?}, which the policy does not grant to {spiffe_id}");
            return Err(PolicyRefusal { reason: "dns_name_not_allowed", message, rule: "policy.dns_names" });
        }
        Ok(Decision { spiffe_id, dns_names, lifetime: self.lifetime(asked.lifetime)? })
    }

    /// Decides about an agent's or a sidecar's own SVID, whose ID is given.
    ///
    /// # Errors
    /// If the CSR asks for anything but that ID, or the key's type is not allowed.
    pub fn evaluate_agent(&self, id: &SpiffeId, asked: &Asked<'_>) -> Result<Decision, PolicyRefusal> {
        self.check_key_type(asked.key_type)?;
        check_asked_id(id, asked.spiffe_id)?;
        if let Some(name) = asked.dns_names.first() {
            let message = format!("the CSR asks for the DNS name {name:?}; agents and sidecars carry none");
            return Err(PolicyRefusal { reason: "dns_name_not_allowed", message, rule: "policy.dns_names" });
        }
        Ok(Decision { spiffe_id: id.clone(), dns_names: Vec::new(), lifetime: self.settings.lifetimes.agent })
    }

    /// As they are in force.
    pub fn settings(&self) -> &PolicySettings {
        &self.settings
    }

    /// Whose IDs it gives.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    fn spiffe_id(&self, workload: Workload<'_>) -> Result<SpiffeId, PolicyRefusal> {
        let refused = |message| PolicyRefusal { reason: "id_impossible", message, rule: "policy.id_template" };
        let Workload { namespace, service_account, .. } = workload;
        let id = self
            .trust_domain
            .member(self.template.fill(workload))
            .map_err(|error| refused(format!("no SPIFFE ID can be made of {namespace:?} and {service_account:?}: {error}")))?;
        if id.segments().next() == Some(RESERVED_SEGMENT) {
            return Err(refused(format!("{id} is reserved: no workload gets an ID under /{RESERVED_SEGMENT}/")));
        }
        Ok(id)
    }

    fn dns_names(&self, workload: Workload<'_>) -> Result<Vec<String>, PolicyRefusal> {
        let mut names: Vec<String> = Vec::new();
        for rule in &self.settings.dns_names {
            if !rule.service_accounts.iter().any(|account| account.matches(workload.namespace, workload.service_account)) {
                continue;
            }
            for name in &rule.names {
                let name = fill_name(name, workload).map_err(|message| PolicyRefusal {
                    reason: "dns_name_impossible",
                    message,
                    rule: "policy.dns_names",
                })?;
                if !names.contains(&name) {
                    names.push(name);
                }
            }
        }
        Ok(names)
    }

    fn lifetime(&self, asked: Option<Duration>) -> Result<Duration, PolicyRefusal> {
        let Lifetimes { min, default, max, .. } = self.settings.lifetimes;
        let lifetime = asked.unwrap_or(default);
        if (min..=max).contains(&lifetime) {
            return Ok(lifetime);
        }
        let message = format!(
            "a lifetime of {} is not between {} and {}",
            humantime::format_duration(lifetime),
            humantime::format_duration(min),
            humantime::format_duration(max)
        );
        Err(PolicyRefusal { reason: "lifetime_not_allowed", message, rule: "policy.lifetimes" })
    }

    fn check_key_type(&self, key_type: KeyType) -> Result<(), PolicyRefusal> {
        if self.settings.key_types.contains(&key_type) {
            return Ok(());
        }
        let allowed: Vec<_> = self.settings.key_types.iter().map(|allowed| allowed.as_str()).collect();
        let message = format!("keys of type {key_type} are not certified here; use {}", allowed.join(" or "));
        Err(PolicyRefusal { reason: "key_type_not_allowed", message, rule: "policy.key_types" })
    }
}

fn check_asked_id(granted: &SpiffeId, asked: Option<&SpiffeId>) -> Result<(), PolicyRefusal> {
    match asked {
        Some(asked) if asked != granted => {
            let message = format!("the CSR asks for {asked}, but the token is {granted}'s");
            Err(PolicyRefusal { reason: "csr_other_id", message, rule: "policy.id_template" })
        }
        _ => Ok(()),
    }
}

fn check_shared_identities(template: &Template, clusters: &[ClusterSettings]) -> Result<(), PolicyError> {
    if template.has_cluster() {
        return Ok(());
    }
    for (number, one) in clusters.iter().enumerate() {
        for other in &clusters[number + 1..] {
            if one.shared_identities && other.shared_identities {
                continue;
            }
            let meet = |account: &&AccountPattern| other.service_accounts.iter().any(|another| account.overlaps(another));
            if let Some(account) = one.service_accounts.iter().find(meet) {
                let accounts = account.to_string();
                return Err(PolicyError::SharedIdentities { one: one.name.clone(), other: other.name.clone(), accounts });
            }
        }
    }
    Ok(())
}

impl Lifetimes {
    fn check(&self) -> Result<(), PolicyError> {
        let Self { min, default, max, agent } = *self;
        if min < Duration::from_secs(1) || agent < Duration::from_secs(1) {
            Err(PolicyError::Lifetimes("`min` and `agent` are at least one second, the resolution of certificates"))
        } else if !(min <= default && default <= max) {
            Err(PolicyError::Lifetimes("`min`, `default` and `max` must be in this order"))
        } else {
            Ok(())
        }
    }
}

impl Default for PolicySettings {
    fn default() -> Self {
        Self {
            id_template: "/ns/{namespace}/sa/{service_account}".into(),
            lifetimes: Lifetimes::default(),
            key_types: vec![KeyType::EcdsaP256, KeyType::EcdsaP384],
            dns_names: Vec::new(),
        }
    }
}

impl Default for Lifetimes {
    fn default() -> Self {
        let hours = |hours: u64| Duration::from_secs(hours * 3600);
        Self { min: Duration::from_secs(300), default: hours(1), max: hours(24), agent: hours(24) }
    }
}
