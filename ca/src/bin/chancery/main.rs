//! `chancery`: the command line of those who run and audit a CA. It asks a running CA, over its local admin socket or over its TLS port.
//!
//! Exit status: 0 done, 1 refused or failed with the reason on standard error, 2 wrong usage.

mod agents;
mod client;
mod doctor;
mod explain;
mod identity;
mod log;
mod output;
mod pages;
mod policy;
mod revocation;
mod root;
mod status;
mod token;

use std::io;
use std::process::ExitCode;

use chancery_process::output::Format;
use clap::{CommandFactory, Parser, Subcommand};

use client::CliError;

/// Look into a Chancery CA: what it issued, to whom, what it refused and why.
#[derive(Debug, Parser)]
#[command(name = "chancery", version, max_term_width = 100)]
struct Cli {
    /// How to print the answer.
    #[arg(long, short, global = true, value_enum, default_value_t)]
    output: Format,
    // Behind it: what follows a heading stands below that.
    #[command(flatten)]
    way: client::Way,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// How the CA stands: ready or why not, its certificates, clusters, ledger.
    Status,
    /// Everything that somebody should look at, worst first, with the next step; exit status 1 if something is bad.
    Doctor,
    /// The identities that were issued, those that were refused, and those that are to be revoked.
    #[command(subcommand)]
    Identity(identity::Command),
    /// Why has this pod no certificate? Or: it has one, and here it is.
    Explain {
        /// The pod.
        #[arg(value_name = "NAMESPACE/POD", value_parser = explain::pod_name)]
        pod: explain::PodName,
    },
    /// The ledger as anybody can verify it.
    #[command(subcommand)]
    Log(log::Command),
    /// The trust roots: where each is in its life, and the way to the next one.
    #[command(subcommand)]
    Root(root::Command),
    /// The node agents.
    #[command(subcommand)]
    Agent(agents::Command),
    /// The rules by which identities are issued.
    #[command(subcommand)]
    Policy(policy::Command),
    /// Tokens of the development issuer.
    #[command(subcommand)]
    Token(token::Command),
    /// Print completions for a shell.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli).await {
        Ok(()) => ExitCode::SUCCESS,
        // The reader of a pipe has seen enough.
        Err(error) if error.is_broken_pipe() => ExitCode::SUCCESS,
        Err(error) => {
            output::remark(&error);
            error.exit_code()
        }
    }
}

async fn run(cli: Cli) -> Result<(), CliError> {
    let out = &mut io::stdout().lock();
    let format = cli.output;
    let connect = || client::connect(&cli.way);
    match cli.command {
        Command::Status => status::run(connect().await?, out, format).await,
        Command::Doctor => doctor::run(connect().await?, out, format).await,
        Command::Identity(command) => identity::run(&cli.way, command, out, format).await,
        Command::Explain { pod } => explain::run(connect().await?, pod, out, format).await,
        Command::Agent(command) => agents::run(&cli.way, command, out, format).await,
        Command::Log(command) => log::run(&cli.way, command, out, format).await,
        Command::Root(command) => root::run(&cli.way, command, out, format).await,
        Command::Policy(command) => policy::run(&cli.way, command, out, format).await,
        Command::Token(command) => token::run(&command, out, format),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "chancery", out);
            Ok(())
        }
    }
}

impl CliError {
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::Usage(_) => ExitCode::from(2),
            Self::Refused(status) if status.code() == tonic::Code::InvalidArgument => ExitCode::from(2),
            _ => ExitCode::FAILURE,
        }
    }

    fn is_broken_pipe(&self) -> bool {
        matches!(self, Self::Output(error) if error.is_broken_pipe())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_pod_without_a_namespace_is_wrong_usage() {
        let error = Cli::try_parse_from(["chancery", "explain", "cart-0"]).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("namespace/pod"), "{error}");
    }
}
