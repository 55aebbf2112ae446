//! `chancery identity`: what the ledger holds of issued identities, what was refused, and revoking what was issued.

mod allow;
mod filter;
mod list;
mod refusals;
mod revoke;
mod row;
mod show;
mod watch;

use std::io::Write;

use chancery_process::output::Format;
use clap::Subcommand;

use crate::client::{self, CliError, Way};

pub(crate) use self::filter::{FilterArgs, check, moment_or_ago};
pub(crate) use self::refusals::RefusalRow;
pub(crate) use self::row::{IdentityRow, columns};
pub(crate) use self::show::{pem, pem_block};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Issued identities, newest first. Every condition given must hold.
    #[command(after_help = list::EXAMPLES)]
    List(Box<list::ListArgs>),
    /// One identity: its certificate, for whom and by whom it was issued, and whether it still counts.
    #[command(after_help = show::EXAMPLES)]
    Show(show::ShowArgs),
    /// Identities as they are issued, oldest first. Every condition given must hold.
    #[command(after_help = watch::EXAMPLES)]
    Watch(Box<watch::WatchArgs>),
    /// The last refused requests, newest first.
    #[command(after_help = refusals::EXAMPLES)]
    Refusals(refusals::RefusalArgs),
    /// Revoke what was issued until now, and wait until proxies refuse it.
    #[command(after_help = revoke::EXAMPLES)]
    Revoke(revoke::RevokeArgs),
    /// Have issuance go on for what was revoked by anything but a serial number. What was revoked stays so.
    Allow(allow::AllowArgs),
}

pub(crate) async fn run(way: &Way, command: Command, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    let (ca, log) = client::connect_both(way).await?;
    match command {
        Command::Revoke(args) => revoke::run(way, args, out, format).await,
        Command::Allow(args) => allow::run(way, args, out, format).await,
        Command::List(args) => list::run(ca, *args, out, format).await,
        Command::Show(args) => show::run(ca, log, args, out, format).await,
        Command::Watch(args) => watch::run(ca, *args, out, format).await,
        Command::Refusals(args) => refusals::run(ca, args, out, format).await,
    }
}
