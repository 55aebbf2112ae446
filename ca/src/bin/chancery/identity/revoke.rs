//! `chancery identity revoke`: revokes what was issued until now, and waits until proxies refuse it.

use std::io::Write;

use chancery_process::output::Format;
use chancery_proto::chancery::v1::revocation_subject::Of;
use chancery_proto::chancery::v1::{RevocationSubject, RevokeRequest};
use clap::Args;

use crate::client::{CliError, Way};
use crate::revocation::{self, Recorded, WaitArgs};

pub(super) const EXAMPLES: &str = "\
Examples:
  chancery identity revoke --serial 2f7c91d05b3e4a86a1c40e97d2f86b15 --reason 'its key was in a core dump'
  chancery identity revoke --pod shop/cart-0 --reason 'INC-311: a shell was opened in it'
  chancery identity revoke --node east/node-7 --reason 'the machine was stolen' --output json

By serial number, one certificate is revoked, and its holder gets another. By anything else nothing more is issued either, until
`chancery identity allow`. A revoked certificate is refused in new handshakes; open connections live on.";

/// Whose certificates.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(super) struct SubjectArgs {
    /// The certificate with this serial number, hexadecimal.
    #[arg(long)]
    serial: Option<String>,
    /// All of this SPIFFE ID.
    #[arg(long, value_name = "SPIFFE_ID")]
    id: Option<String>,
    /// All of this pod.
    #[arg(long, value_name = "UID|NAMESPACE/POD")]
    pod: Option<String>,
    /// All of the pods on this node, and of its agent. The cluster may be left out where there is one.
    #[arg(long, value_name = "CLUSTER/NODE")]
    node: Option<String>,
    /// All that this agent or sidecar obtained, and its own.
    #[arg(long, value_name = "SPIFFE_ID")]
    agent: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct RevokeArgs {
    #[command(flatten)]
    subject: SubjectArgs,
    /// Why: recorded with the act.
    #[arg(long)]
    reason: String,
    #[command(flatten)]
    wait: WaitArgs,
}

pub(super) async fn run(way: &Way, args: RevokeArgs, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let mut ca = revocation::connect(way).await?;
    let request = RevokeRequest { subject: Some(args.subject.into_wire()), reason: args.reason };
    let done = ca.revoke(request).await?.into_inner();
    let recorded = Recorded {
        subject: done.subject,
        entry: done.entry,
        certificates: done.certificates,
        trust_sequence: done.trust_sequence,
        issuance: if done.issuance_refused { "refused until `chancery identity allow`" } else { "goes on: its holder gets another" },
        cut_off: if done.issuance_refused { done.agents } else { Vec::new() },
        problem: done.problem,
    };
    revocation::finish(&mut ca, recorded, &args.wait, out, format).await
}

impl SubjectArgs {
    pub(super) fn into_wire(self) -> RevocationSubject {
        let Self { serial, id, pod, node, agent } = self;
        let of = [serial.map(Of::Serial), id.map(Of::SpiffeId), pod.map(Of::Pod), node.map(Of::Node), agent.map(Of::Agent)];
        RevocationSubject { of: of.into_iter().flatten().next() }
    }
}
