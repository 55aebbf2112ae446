//! `chancery token`: tokens as a cluster would sign them, from the issuer that a development CA keeps in its data directory.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use chancery_ca::attestation::development::{self, DevelopmentIssuer, TokenRequest};
use chancery_ca::config::{DEVELOPMENT_DATA_DIR, development_issuer_dir};
use chancery_process::files;
use chancery_process::output::{Format, OutputError, fields};
use clap::{Args, Subcommand};
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use crate::client::CliError;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Sign a token for a pod (development only). The token is all that stands on standard output.
    Create(CreateArgs),
}

#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// The pod's namespace.
    #[arg(long)]
    namespace: String,
    /// The pod's service account.
    #[arg(long)]
    service_account: String,
    /// The pod's name.
    #[arg(long)]
    pod: String,
    /// The node's name.
    #[arg(long)]
    node: String,
    /// Whom the token is for: `chancery` for a workload, `chancery-agent` for a joining agent.
    #[arg(long, default_value = "chancery")]
    audience: String,
    /// How long it is valid.
    #[arg(long, default_value = "1h")]
    lifetime: humantime::Duration,
    /// The pod's UID, instead of one derived from its name.
    #[arg(long)]
    pod_uid: Option<Uuid>,
    /// The node's UID, instead of one derived from its name.
    #[arg(long)]
    node_uid: Option<Uuid>,
    /// The development CA's data directory.
    #[arg(long, value_name = "DIR", default_value = DEVELOPMENT_DATA_DIR)]
    data_dir: PathBuf,
    /// Write the token to this file (mode 0600, replaced as a whole) instead of standard output.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

#[derive(Serialize)]
struct Created<'a> {
    token: &'a str,
    expires_at: String,
    pod_uid: Uuid,
    node_uid: Uuid,
}

pub(crate) fn run(Command::Create(args): &Command, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    if !args.data_dir.is_dir() {
        let message =
            format!("{} is no data directory of a development CA; start one with `chancery-ca serve --dev`", args.data_dir.display());
        return Err(CliError::Failed(message));
    }
    let failed = |error: &dyn std::fmt::Display| CliError::Failed(error.to_string());
    let issuer = DevelopmentIssuer::open_or_create(&development_issuer_dir(&args.data_dir)).map_err(|error| failed(&error))?;
    let now = OffsetDateTime::now_utc();
    let request = args.request();
    let token = issuer.sign(&request, now).map_err(|error| failed(&error))?;
    if let Some(path) = &args.out {
        return files::write_private(path, token.as_bytes()).map_err(|error| failed(&error));
    }
    if format == Format::Table {
        return Ok(writeln!(out, "{}", *token).map_err(OutputError::Write)?);
    }
    let created = Created {
        token: &token,
        expires_at: (now + request.lifetime).format(&Rfc3339).unwrap_or_default(),
        pod_uid: request.pod_uid.unwrap_or_else(|| development::pod_uid(&args.namespace, &args.pod)),
        node_uid: request.node_uid.unwrap_or_else(|| development::node_uid(&args.node)),
    };
    Ok(fields(out, format, &created)?)
}

impl CreateArgs {
    fn request(&self) -> TokenRequest {
        TokenRequest {
            namespace: self.namespace.clone(),
            service_account: self.service_account.clone(),
            pod: self.pod.clone(),
            node: self.node.clone(),
            audience: self.audience.clone(),
            lifetime: Duration::from(self.lifetime),
            pod_uid: self.pod_uid,
            node_uid: self.node_uid,
        }
    }
}
