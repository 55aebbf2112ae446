//! `chancery-ca`: the certificate authority's server, the backups of it, and what its keys are sealed with.
//!
//! Exit status: 0 ended on request, 1 failed with the reason on standard error, 2 wrong usage.

mod backup;
mod keys;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use chancery_ca::config::{self, Config, Mode};
use chancery_ca::server;
use clap::{ArgGroup, Args, CommandFactory, Parser, Subcommand};

/// The Chancery certificate authority.
#[derive(Debug, Parser)]
#[command(name = "chancery-ca", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the CA, with a configuration or for development (or both: a configuration for development).
    Serve(Start),
    /// Say what is wrong with a configuration, and where. Starts nothing, writes nothing.
    Check(Start),
    /// Back up a CA, which may be running, into one file, and read that back.
    Backup(backup::BackupArgs),
    /// Make a data directory from a backup.
    Restore(backup::RestoreArgs),
    /// About the CA's private keys.
    #[command(subcommand)]
    Keys(keys::Command),
    /// About the configuration.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Print completions for a shell.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("kind").required(true).multiple(true).args(["config", "dev"]))]
struct Start {
    /// The configuration (TOML); `chancery-ca config example` prints one.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// For development: loopback only, everything has a default, an issuer of tokens is included.
    #[arg(long)]
    dev: bool,
    /// Where a development CA keeps its data.
    #[arg(long, value_name = "DIR", requires = "dev")]
    data_dir: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Print every key with its default and meaning.
    Example,
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // A closed standard error leaves nobody to tell.
            let _closed = writeln!(io::stderr(), "chancery-ca: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<(), Box<dyn std::error::Error>> {
    match command {
        Command::Serve(start) => serve(start),
        Command::Check(start) => {
            let (path, mode) = start.split();
            Config::load(path.as_deref(), &mode)?.check_keys()?;
            Ok(writeln!(io::stdout(), "the configuration is valid")?)
        }
        Command::Backup(args) => backup::create(&args),
        Command::Restore(args) => backup::restore(&args),
        Command::Keys(command) => keys::run(command),
        Command::Config(ConfigCommand::Example) => Ok(io::stdout().write_all(config::EXAMPLE.as_bytes())?),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "chancery-ca", &mut io::stdout());
            Ok(())
        }
    }
}

fn serve(start: Start) -> Result<(), Box<dyn std::error::Error>> {
    chancery_process::hardening::harden()?;
    let (path, mode) = start.split();
    let config = Config::load(path.as_deref(), &mode)?;
    let log = chancery_process::logging::init(&config.log)?;
    let workers = std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 4);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(workers).enable_all().build()?;
    runtime.block_on(async {
        let shutdown = chancery_process::shutdown::on_signal()?;
        let running = server::start(server::Options::new(config, mode, shutdown).with_log(log)).await?;
        Ok(running.finished().await?)
    })
}

impl Start {
    fn split(self) -> (Option<PathBuf>, Mode) {
        let mode = if self.dev { Mode::Development { data_dir: self.data_dir } } else { Mode::Production };
        (self.config, mode)
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
    fn serving_needs_a_configuration_or_development() {
        let code = |arguments: &[&str]| Cli::try_parse_from(arguments).map_or_else(|error| error.exit_code(), |_| 0);
        assert_eq!(code(&["chancery-ca", "serve"]), 2);
        assert_eq!(code(&["chancery-ca", "serve", "--dev"]), 0);
        assert_eq!(code(&["chancery-ca", "serve", "--config", "ca.toml"]), 0);
        assert_eq!(code(&["chancery-ca", "serve", "--dev", "--config", "ca.toml", "--data-dir", "d"]), 0);
        assert_eq!(code(&["chancery-ca", "serve", "--config", "ca.toml", "--data-dir", "d"]), 2);
    }
}
