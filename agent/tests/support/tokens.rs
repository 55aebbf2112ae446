//! A cluster's signing key.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chancery_proto::chancery::v1 as wire;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use rcgen::{KeyPair, PublicKeyData};
use serde_json::json;
use time::OffsetDateTime;
use uuid::Uuid;

use super::{CLUSTER, node_uid};

pub const ISSUER: &str = "https://kubernetes.default.svc";
pub const AUDIENCE: &str = "chancery";
pub const JOIN_AUDIENCE: &str = "chancery-agent";

/// What a token says.
#[derive(Clone, Debug)]
pub struct TokenPlan {
    pub audience: &'static str,
    pub namespace: String,
    pub service_account: String,
    pub pod: Uuid,
    pub node: Uuid,
    pub life: Duration,
}

impl TokenPlan {
    /// The agent's own.
    pub fn agent() -> Self {
        Self { audience: JOIN_AUDIENCE, ..Self::pod(1, "chancery-system", "agent") }
    }

    /// A workload's.
    pub fn pod(number: u128, namespace: &str, service_account: &str) -> Self {
        Self {
            audience: AUDIENCE,
            namespace: namespace.to_owned(),
            service_account: service_account.to_owned(),
            pod: Uuid::from_u128(number),
            node: node_uid(),
            life: Duration::from_secs(365 * 86_400),
        }
    }
}

pub struct Signer {
    kid: String,
    private: EncodingKey,
    jwks: String,
}

impl Signer {
    pub fn new(kid: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let (x, y) = key.der_bytes()[1..].split_at(32);
        let encode = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        let jwks =
            json!({"keys": [{"kty": "EC", "crv": "P-256", "kid": kid, "use": "sig", "alg": "ES256", "x": encode(x), "y": encode(y)}]});
        Self { kid: kid.to_owned(), private: EncodingKey::from_ec_der(&key.serialize_der()), jwks: jwks.to_string() }
    }

    pub fn token(&self, plan: &TokenPlan, now: OffsetDateTime) -> String {
        let mut header = Header::new(Algorithm::ES256);
        header.kid = Some(self.kid.clone());
        let now = now.unix_timestamp();
        let claims = json!({
            "iss": ISSUER, "sub": format!("system:serviceaccount:{}:{}", plan.namespace, plan.service_account), "aud": [plan.audience],
            "exp": now + i64::try_from(plan.life.as_secs()).unwrap(), "nbf": now, "iat": now, "jti": Uuid::new_v4(),
            "kubernetes.io": {
                "namespace": plan.namespace,
                "serviceaccount": {"name": plan.service_account, "uid": Uuid::from_u128(99)},
                "pod": {"name": format!("{}-0", plan.service_account), "uid": plan.pod},
                "node": {"name": "node-1", "uid": plan.node},
            },
        });
        jsonwebtoken::encode(&header, &claims, &self.private).unwrap()
    }

    pub fn keys(&self) -> wire::ClusterKeys {
        wire::ClusterKeys {
            cluster: CLUSTER.to_owned(),
            issuer: ISSUER.to_owned(),
            audiences: vec![AUDIENCE.to_owned()],
            jwks: self.jwks.clone(),
        }
    }
}
