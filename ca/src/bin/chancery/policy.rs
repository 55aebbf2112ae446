//! `chancery policy test`: what the policy would say, of a running CA or of a configuration that is not in force yet. Nothing is issued.

use std::io::Write;
use std::path::PathBuf;

use chancery_ca::api::test_policy;
use chancery_ca::config::{Config, Mode};
use chancery_ca::issuance::policy::Policy;
use chancery_process::output::{Format, fields};
use chancery_proto::chancery::v1::{TestPolicyRequest, TestPolicyResponse};
use clap::{Args, Subcommand};
use serde::Serialize;

use crate::client::{self, CliError, Way};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Ask what a service account would get.
    Test(TestArgs),
}

#[derive(Debug, Args)]
pub(crate) struct TestArgs {
    /// The cluster's name; without it, the only one there is.
    #[arg(long)]
    cluster: Option<String>,
    /// The pod's namespace.
    #[arg(long)]
    namespace: String,
    /// The pod's service account.
    #[arg(long)]
    service_account: String,
    /// A DNS name that it would ask for; may be repeated.
    #[arg(long = "dns", value_name = "NAME")]
    dns_names: Vec<String>,
    /// The lifetime that it would ask for; without it, the default.
    #[arg(long)]
    lifetime: Option<humantime::Duration>,
    /// The type of its key.
    #[arg(long, default_value = "ecdsa-p256")]
    key_type: String,
    /// Ask this configuration instead of the running CA.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The configuration is a development CA's.
    #[arg(long, requires = "config")]
    dev: bool,
}

#[derive(Debug, Serialize)]
struct Verdict {
    allowed: bool,
    spiffe_id: String,
    lifetime: String,
    rule: String,
}

pub(crate) async fn run(way: &Way, Command::Test(args): Command, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let request = args.request();
    let response = match &args.config {
        Some(path) => offline(path, args.dev, &request)?,
        None => client::connect(way).await?.test_policy(request).await?.into_inner(),
    };
    let lifetime = std::time::Duration::from_secs(response.lifetime_seconds.unsigned_abs());
    let verdict = Verdict {
        allowed: response.allowed,
        spiffe_id: response.spiffe_id,
        lifetime: if response.allowed { humantime::format_duration(lifetime).to_string() } else { String::new() },
        rule: response.rule.clone(),
    };
    fields(out, format, &verdict)?;
    if response.allowed { Ok(()) } else { Err(CliError::Failed(format!("refused: {}", response.rule))) }
}

fn offline(path: &std::path::Path, dev: bool, request: &TestPolicyRequest) -> Result<TestPolicyResponse, CliError> {
    let failed = |error: &dyn std::fmt::Display| CliError::Failed(error.to_string());
    let mode = if dev { Mode::Development { data_dir: None } } else { Mode::Production };
    let config = Config::load(Some(path), &mode).map_err(|error| failed(&error))?;
    let policy = Policy::new(config.trust_domain, config.policy, &config.clusters).map_err(|error| failed(&error))?;
    test_policy(&policy, &config.clusters, request).map_err(|error| failed(&error))
}

impl TestArgs {
    fn request(&self) -> TestPolicyRequest {
        TestPolicyRequest {
            cluster: self.cluster.clone().unwrap_or_default(),
            namespace: self.namespace.clone(),
            service_account: self.service_account.clone(),
            dns_names: self.dns_names.clone(),
            lifetime_seconds: self.lifetime.map_or(0, |lifetime| i64::try_from(lifetime.as_secs()).unwrap_or(i64::MAX)),
            key_type: self.key_type.clone(),
        }
    }
}
