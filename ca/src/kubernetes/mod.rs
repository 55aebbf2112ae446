//! The API server of a Kubernetes cluster: how the CA reaches it, what it asks it, what it watches and what it publishes there.
//!
//! Every question has a time limit and its answer a size limit; an API server is only believed over verified TLS. No token is ever in an
//! error or a log line. What an answer means is left to whoever asked.

mod connection;
mod error;
mod objects;
mod person;
mod publish;
mod questions;
mod settings;

pub use connection::{ApiServer, check};
pub(crate) use error::with_causes;
pub use error::{ApiError, CLUSTER_ROLE, ConnectError};
pub use k8s_openapi::api::authentication::v1::{TokenReviewStatus, UserInfo};
pub use kube::runtime::watcher::Event;
pub use objects::{ServiceAccountObject, WorkloadPod};
pub use person::{OPERATOR_TOKEN_LIFETIME, OperatorToken, OperatorTokenError, request_operator_token};
pub use publish::{CONFIG_MAP, CONFIG_MAP_KEY, PublishSettings, TrustCopy};
pub use settings::KubernetesSettings;
