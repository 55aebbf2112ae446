//! What the policy would say, for `chancery policy test`.

use std::time::Duration;

use chancery_identity::csr::KeyType;
use chancery_proto::chancery::v1::{TestPolicyRequest, TestPolicyResponse};
use serde::Deserialize;
use serde::de::value::{Error as ValueError, StrDeserializer};
use serde::de::{Error as _, IntoDeserializer};

use crate::api::error::ApiError;
use crate::attestation::ClusterSettings;
use crate::issuance::policy::{Asked, Policy, Workload};

/// Evaluates `policy` as it would be for a token of one of `clusters`. Nothing is issued.
///
/// # Errors
/// If the question itself cannot be understood; a refusal by the policy is an answer.
pub fn test_policy(policy: &Policy, clusters: &[ClusterSettings], request: &TestPolicyRequest) -> Result<TestPolicyResponse, ApiError> {
    let cluster = cluster_of(clusters, &request.cluster)?;
    let TestPolicyRequest { namespace, service_account, dns_names, .. } = request;
    if !cluster.service_accounts.iter().any(|account| account.matches(namespace, service_account)) {
        let rule = format!("cluster {} may not speak for {namespace}/{service_account}; see its `service_accounts`", cluster.name);
        return Ok(TestPolicyResponse { rule, ..TestPolicyResponse::default() });
    }
    let key_type = if request.key_type.is_empty() { KeyType::EcdsaP256 } else { key_type(&request.key_type)? };
    let lifetime = (request.lifetime_seconds > 0).then(|| Duration::from_secs(request.lifetime_seconds.unsigned_abs()));
    let workload = Workload { cluster: &cluster.name, namespace, service_account };
    let asked = Asked { key_type, spiffe_id: None, dns_names, lifetime };
    Ok(match policy.evaluate(workload, &asked) {
        Ok(decision) => TestPolicyResponse {
            allowed: true,
            spiffe_id: decision.spiffe_id.to_string(),
            lifetime_seconds: i64::try_from(decision.lifetime.as_secs()).unwrap_or(i64::MAX),
            rule: "policy.id_template".into(),
        },
        Err(refusal) => TestPolicyResponse { rule: refusal.to_string(), ..TestPolicyResponse::default() },
    })
}

fn cluster_of<'a>(clusters: &'a [ClusterSettings], name: &str) -> Result<&'a ClusterSettings, ApiError> {
    match clusters {
        [only] if name.is_empty() => Ok(only),
        _ => clusters.iter().find(|cluster| cluster.name == name).ok_or_else(|| {
            let names: Vec<&str> = clusters.iter().map(|cluster| cluster.name.as_str()).collect();
            ApiError::NotFound(format!("there is no cluster {name:?}; the configuration has: {}", names.join(", ")))
        }),
    }
}

fn key_type(text: &str) -> Result<KeyType, ApiError> {
    let deserializer: StrDeserializer<'_, ValueError> = text.into_deserializer();
    KeyType::deserialize(deserializer).map_err(|error| ApiError::Invalid(ValueError::custom(error).to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::issuance::policy::PolicySettings;

    fn cluster() -> ClusterSettings {
        toml::from_str("name = \"east\"\nissuer = \"https://k\"\nservice_accounts = [\"shop/*\"]\njwks = { file = \"k\" }").unwrap()
    }

    fn ask(change: impl FnOnce(&mut TestPolicyRequest)) -> Result<TestPolicyResponse, ApiError> {
        let clusters = [cluster()];
        let policy = Policy::new("example.org".parse().unwrap(), PolicySettings::default(), &clusters).unwrap();
        let mut request = TestPolicyRequest { namespace: "shop".into(), service_account: "cart".into(), ..TestPolicyRequest::default() };
        change(&mut request);
        test_policy(&policy, &clusters, &request)
    }

    #[test]
    fn the_policy_says_what_a_service_account_would_get() {
        let response = ask(|_| ()).unwrap();
        assert!(response.allowed);
        assert_eq!((response.spiffe_id.as_str(), response.lifetime_seconds), ("spiffe://example.org/ns/shop/sa/cart", 3600));
    }

    #[test]
    fn what_would_be_refused_names_the_rule() {
        assert!(ask(|r| r.namespace = "bank".into()).unwrap().rule.contains("service_accounts"));
        assert!(ask(|r| r.lifetime_seconds = 1).unwrap().rule.contains("policy.lifetimes"));
        assert!(ask(|r| r.key_type = "rsa-2048".into()).unwrap().rule.contains("policy.key_types"));
        assert!(ask(|r| r.dns_names = vec!["cart.example.org".into()]).unwrap().rule.contains("policy.dns_names"));
    }

    #[test]
    fn a_question_that_makes_no_sense_is_refused() {
        assert!(ask(|r| r.key_type = "dsa".into()).unwrap_err().to_string().contains("ecdsa-p256"));
        assert!(ask(|r| r.cluster = "west".into()).unwrap_err().to_string().contains("east"));
    }
}
