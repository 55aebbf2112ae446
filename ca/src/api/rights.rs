//! What each operators' call needs in the RBAC of whoever comes with a Kubernetes token. The one place where it is chosen; `docs/kubernetes.md`
//! repeats it.

use crate::api::error::ApiError;
use crate::attestation::{Resource, Right, Verb};

use Resource::{Agents, Identities, Log, TrustRoots};
use Verb::{Get, Update};

const RIGHTS: &[(Verb, Resource, &[&str])] = &[
    (Get, TrustRoots, &["Status", "Diagnose", "ListRoots", "CheckGate"]),
    (Update, TrustRoots, &["PrepareRoot", "RequestRoot", "AnswerRoot", "MoveRoot", "DistrustRoot"]),
    (Get, Identities, &["ListIdentities", "WatchIdentities", "ShowIdentity", "ListRefusals", "Explain", "TestPolicy", "CheckReach"]),
    (Update, Identities, &["Revoke", "Allow"]),
    (Get, Agents, &["ListAgents"]),
    (Update, Agents, &["Ban", "Unban"]),
    (Get, Log, &["GetCheckpoint", "GetTile", "ProveInclusion", "ProveConsistency", "ReadEntries", "ListActs"]),
    (Update, Log, &["RotateCheckpointKey"]),
];

/// The right that a call of `method` needs.
pub(super) fn right_for(method: &str) -> Result<Right, ApiError> {
    let found = RIGHTS.iter().find(|(_, _, methods)| methods.contains(&method));
    let (verb, resource, _) = found.ok_or_else(|| ApiError::NotFound(format!("no right allows {method}")))?;
    Ok(Right { verb: *verb, resource: *resource })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_call_of_the_operators_services_needs_one_right() {
        let mut calls = Vec::new();
        for service in ["operator", "root", "revocation", "log"] {
            let path = format!("{}/../proto/protos/chancery/v1/{service}.proto", env!("CARGO_MANIFEST_DIR"));
            let text = std::fs::read_to_string(path).unwrap();
            let named = text.lines().filter_map(|line| line.trim().strip_prefix("rpc ")?.split_once('(').map(|(name, _)| name.to_owned()));
            calls.extend(named);
        }
        let mut known: Vec<_> = RIGHTS.iter().flat_map(|(_, _, methods)| methods.iter().map(|method| (*method).to_owned())).collect();
        calls.sort();
        known.sort();
        assert_eq!(known, calls);
        assert!(right_for("Shutdown").is_err());
    }
}
