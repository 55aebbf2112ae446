//! The file as it is written: every key, and its default where it has one.

use std::net::SocketAddr;
use std::path::PathBuf;

use chancery_identity::TrustDomain;
use chancery_process::logging::LogSettings;
use serde::Deserialize;

use crate::api::RoleSettings;
use crate::attestation::ClusterSettings;
use crate::authority::Settings as AuthoritySettings;
use crate::config::LimitSettings;
use crate::issuance::policy::PolicySettings;
use crate::keys::SealSettings;
use crate::rotation::Settings as RotationSettings;

/// What is left out depends on whether the CA is for development, so it is filled in later.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Settings {
    pub(super) trust_domain: Option<TrustDomain>,
    pub(super) data_dir: Option<PathBuf>,
    pub(super) listen: Option<SocketAddr>,
    pub(super) http_listen: Option<SocketAddr>,
    pub(super) admin_socket: Option<PathBuf>,
    pub(super) keys: SealSettings,
    pub(super) log: LogSettings,
    pub(super) policy: PolicySettings,
    pub(super) authority: AuthoritySettings,
    pub(super) rotation: RotationSettings,
    pub(super) limits: LimitSettings,
    pub(super) roles: RoleSettings,
    #[serde(rename = "cluster")]
    pub(super) clusters: Vec<ClusterSettings>,
}
