//! `chancery log`: the ledger as anybody can verify it, while the CA runs and without it; and what operators did.

mod acts;
mod certificates;
mod checkpoint;
mod examined;
mod export;
mod follow;
mod frontier;
mod line;
mod prove;
mod serve;
mod since;
mod tiles;
mod verify;
mod words;

use std::io::Write;

use chancery_process::output::Format;
use clap::Subcommand;

use crate::client::{self, CliError, Way};

pub(crate) use prove::proof_of;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Print the newest checkpoint: how many entries there are, the root of their tree, the ledger's signature.
    Checkpoint,
    /// Print the key that verifies checkpoints, as other tlog tools read it.
    Key,
    /// Sign checkpoints with another key from now on, and with the one before as well for 30 days; prints the new verifier key. Refused
    /// while both still sign.
    RotateKey {
        /// Why: recorded with the act.
        #[arg(long)]
        reason: String,
    },
    /// Prove that an entry is in the ledger, or that the ledger begins with an older checkpoint. Each proof is verified before it is printed.
    Prove(prove::ProveArgs),
    /// Check a whole ledger offline (an export, a backup or a data directory), or that a running CA's ledger begins with a checkpoint kept earlier.
    Verify(verify::VerifyArgs),
    /// Write entries to a file: JSON Lines that can be verified, or CSV for spreadsheets (--output csv).
    Export(Box<export::ExportArgs>),
    /// What operators did and were refused, newest first, or as it is recorded (--follow). Every condition given must hold.
    Acts(Box<acts::ActsArgs>),
    /// Serve checkpoint and tiles over HTTP on this machine, for other tools (C2SP tlog-tiles).
    ServeLocal(serve::ServeArgs),
}

pub(crate) async fn run(way: &Way, command: Command, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let connect = async || client::connect_both(way).await.map(|(_, log)| log);
    match command {
        Command::Checkpoint => checkpoint::show(connect().await?, out, format).await,
        Command::Key => checkpoint::key(connect().await?, out, format).await,
        Command::RotateKey { reason } => checkpoint::rotate_key(connect().await?, reason, out, format).await,
        Command::Prove(args) => prove::run(connect().await?, args, out, format).await,
        Command::Verify(args) => match args.since() {
            Some(since) => since::run(connect().await?, since, out, format).await,
            None => verify::run(&args, out, format),
        },
        Command::Export(args) => export::run(connect().await?, *args, out, format).await,
        Command::Acts(args) => acts::list(connect().await?, *args, out, format).await,
        Command::ServeLocal(args) => serve::run(connect().await?, args, out).await,
    }
}
