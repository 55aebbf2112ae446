//! `chancery log`: the ledger as anybody can verify it, and what operators did.

mod acts;

use std::io::Write;

use chancery_process::output::Format;
use clap::Subcommand;

use crate::client::{self, CliError, Way};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// What operators did and were refused, newest first. Every condition given must hold.
    Acts(acts::ActsArgs),
}

pub(crate) async fn run(way: &Way, command: Command, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    match command {
        Command::Acts(args) => acts::list(client::connect(way).await?, args, out, format).await,
    }
}
