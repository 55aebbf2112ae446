//! Kubeconfigs for the API server: who somebody is, and how the server is recognized.

use std::path::PathBuf;

use serde_json::json;
use uuid::Uuid;

use crate::Result;
use crate::kubernetes::ApiServer;
use crate::lab::Lab;

/// What somebody proves with who they are.
pub(super) enum Proof {
    /// A client certificate and its key, as files.
    Certificate { certificate: PathBuf, key: PathBuf },
    /// A bearer token.
    Token(String),
}

/// Writes one below the lab, under a name of its own. JSON is YAML.
pub(super) fn write(server: &ApiServer, lab: &Lab, proof: &Proof) -> Result<PathBuf> {
    let user = match proof {
        Proof::Certificate { certificate, key } => json!({"client-certificate": certificate, "client-key": key}),
        Proof::Token(token) => json!({"token": token}),
    };
    let kubeconfig = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": {"server": server.url(), "certificate-authority": server.ca_file()}}],
        "users": [{"name": "user", "user": user}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "user"}}],
        "current-context": "test",
    });
    let path = lab.at(&format!("kubeconfig-{}.yaml", Uuid::new_v4()));
    std::fs::write(&path, kubeconfig.to_string())?;
    Ok(path)
}
