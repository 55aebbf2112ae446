//! What the API server was asked, from its own audit log.

use std::collections::HashSet;
use std::path::Path;

use serde::Deserialize;

use crate::Result;

/// One call of the API server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// Who: a user name, or `system:serviceaccount:<namespace>:<name>`.
    pub user: String,
    /// The program, as it calls itself.
    pub user_agent: String,
    /// `get`, `list`, `watch`, `create`, …
    pub verb: String,
    /// `pods`, or `serviceaccounts/token` with a subresource; empty where the path names no object.
    pub resource: String,
    /// The object's namespace; empty where it has none.
    pub namespace: String,
    /// Path and query.
    pub uri: String,
    /// HTTP status.
    pub code: u16,
}

/// An entry of the log, as far as it is read.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Event {
    #[serde(rename = "auditID")]
    audit_id: String,
    verb: String,
    #[serde(rename = "requestURI")]
    request_uri: String,
    user: User,
    #[serde(default)]
    user_agent: String,
    #[serde(default)]
    object_ref: Object,
    #[serde(default)]
    response_status: Status,
}

#[derive(Deserialize)]
struct User {
    #[serde(default)]
    username: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Object {
    resource: String,
    subresource: String,
    namespace: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Status {
    code: u16,
}

/// Each call once, although a watch is logged at its beginning and at its end.
pub(super) fn read(log: &Path) -> Result<Vec<Call>> {
    let text = std::fs::read_to_string(log)?;
    let mut seen = HashSet::new();
    let mut calls = Vec::new();
    // The server may be writing the last line.
    let complete = text.rsplit_once('\n').map_or("", |(complete, _)| complete);
    for line in complete.lines() {
        let event: Event = serde_json::from_str(line)?;
        if seen.insert(event.audit_id.clone()) {
            calls.push(event.into());
        }
    }
    Ok(calls)
}

impl From<Event> for Call {
    fn from(event: Event) -> Self {
        let Object { resource, subresource, namespace } = event.object_ref;
        Self {
            user: event.user.username,
            user_agent: event.user_agent,
            verb: event.verb,
            resource: if subresource.is_empty() { resource } else { format!("{resource}/{subresource}") },
            namespace,
            uri: event.request_uri,
            code: event.response_status.code,
        }
    }
}
