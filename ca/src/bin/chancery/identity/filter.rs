//! Which identities: the conditions that `list`, `watch` and `log export` share.

use std::time::Duration;

use chancery_proto::chancery::v1::IdentityFilter;
use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::client::CliError;

// No doc comment: clap would make it the command's own.
#[derive(Debug, Args)]
#[command(next_help_heading = "Conditions")]
pub(crate) struct FilterArgs {
    /// Exactly this SPIFFE ID.
    #[arg(long, value_name = "SPIFFE_ID", conflicts_with = "prefix", value_parser = given())]
    id: Option<String>,
    /// SPIFFE IDs that begin so.
    #[arg(long, value_name = "SPIFFE_ID_PREFIX", value_parser = given())]
    prefix: Option<String>,
    /// Serial number, hexadecimal.
    #[arg(long, value_parser = given())]
    serial: Option<String>,
    /// Pod: name, namespace/name, or UID.
    #[arg(long, value_parser = given())]
    pod: Option<String>,
    /// Node: name, or cluster/name.
    #[arg(long, value_parser = given())]
    node: Option<String>,
    /// Namespace.
    #[arg(long, value_parser = given())]
    namespace: Option<String>,
    /// Service account: name, or namespace/name.
    #[arg(long, value_parser = given())]
    service_account: Option<String>,
    /// SPIFFE ID of the agent that asked.
    #[arg(long, value_parser = given())]
    agent: Option<String>,
    /// The token's ID (`jti`).
    #[arg(long, value_name = "JTI", value_parser = given())]
    token_id: Option<String>,
    /// Issued at or after this time, or within this long (`2026-11-01T12:00:00Z`, `1h`).
    #[arg(long, value_parser = moment_or_ago, value_name = "TIME")]
    since: Option<i64>,
    /// Signed by this issuing certificate: its SHA-256 fingerprint, or 8 digits of it and more.
    #[arg(long, value_name = "FINGERPRINT", value_parser = given())]
    issuing_certificate: Option<String>,
    /// Under this trust root: its SHA-256 fingerprint, or 8 digits of it and more.
    #[arg(long, value_name = "FINGERPRINT", value_parser = given())]
    root: Option<String>,
    /// Only those that have not expired.
    #[arg(long)]
    unexpired: bool,
}

/// A condition with nothing in it would hold for everything, as where a script's variable is not set.
fn given() -> NonEmptyStringValueParser {
    NonEmptyStringValueParser::new()
}

impl FilterArgs {
    /// As the CA is asked.
    pub(crate) fn read(self) -> Result<IdentityFilter, CliError> {
        let filter = IdentityFilter {
            spiffe_id: self.id.unwrap_or_default(),
            spiffe_id_prefix: self.prefix.unwrap_or_default(),
            serial: self.serial.unwrap_or_default(),
            pod: self.pod.unwrap_or_default(),
            node: self.node.unwrap_or_default(),
            namespace: self.namespace.unwrap_or_default(),
            service_account: self.service_account.unwrap_or_default(),
            agent: self.agent.unwrap_or_default(),
            token_id: self.token_id.unwrap_or_default(),
            since_ms: self.since.unwrap_or_default(),
            unexpired: self.unexpired,
            issuing_certificate: self.issuing_certificate.unwrap_or_default(),
            root: self.root.unwrap_or_default(),
            ..IdentityFilter::default()
        };
        check(&filter)?;
        Ok(filter)
    }
}

/// Refuses what the CA could not read: that is wrong usage.
pub(crate) fn check(filter: &IdentityFilter) -> Result<(), CliError> {
    let read = chancery_ca::ledger::IdentityFilter::try_from(filter);
    read.map(drop).map_err(|error| CliError::Usage(error.to_string()))
}

/// Unix milliseconds of a time in RFC 3339, or of as long ago as a duration says.
pub(crate) fn moment_or_ago(text: &str) -> Result<i64, String> {
    let time = match text.parse::<humantime::Duration>() {
        Ok(ago) => OffsetDateTime::now_utc() - Duration::from(ago),
        Err(_) => OffsetDateTime::parse(text, &Rfc3339)
            .map_err(|_| "expected a time such as 2026-11-01T12:00:00Z, or how long ago, such as 1h".to_owned())?,
    };
    i64::try_from(time.unix_timestamp_nanos() / 1_000_000).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_absolute_or_ago() {
        assert_eq!(moment_or_ago("2023-11-14T22:13:20Z"), Ok(1_700_000_000_000));
        assert!(moment_or_ago("2h").unwrap() < moment_or_ago("1m").unwrap());
        assert!(moment_or_ago("yesterday").is_err());
    }
}
