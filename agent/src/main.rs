//! `chancery-agent`: the node agent's command line.

mod run;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use chancery_agent::admin::{self, AdminError};
use chancery_agent::ca_client::LedgerFile;
use chancery_agent::config::{self, Config};
use chancery_agent::svids::StateFile;
use chancery_process::output::{Format, OutputError};
use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

const DEFAULT_CONFIG: &str = "/etc/chancery/agent.toml";

/// Attests the workloads on its node and keeps their certificates fresh, over Envoy's SDS.
#[derive(Debug, Parser)]
#[command(name = "chancery-agent", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent.
    Run(ConfigArgument),
    /// Say whether a configuration can be used, and if not, why and where.
    Check(ConfigArgument),
    /// About configurations.
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// What the running agent holds.
    Status(AskArguments),
    /// The proxies' streams: what each was sent, and what it said.
    Streams(AskArguments),
    /// Forget the kept state of a stopped agent: trust, its identity, and the workloads' certificates.
    Reset(ResetArguments),
    /// Print completions for a shell.
    Completions {
        /// Which shell.
        shell: Shell,
    },
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Print every key with its default and meaning.
    Example,
}

#[derive(Debug, clap::Args)]
struct ConfigArgument {
    /// The configuration file.
    #[arg(long, value_name = "FILE", env = "CHANCERY_AGENT_CONFIG", default_value = DEFAULT_CONFIG)]
    config: PathBuf,
}

#[derive(Debug, clap::Args)]
struct ResetArguments {
    #[command(flatten)]
    config: ConfigArgument,
    /// Forget instead what the agent has seen of the CA's ledger, and the alarm about it: the next checkpoint is taken as the first.
    #[arg(long)]
    ledger: bool,
}

#[derive(Debug, clap::Args)]
struct AskArguments {
    #[command(flatten)]
    config: ConfigArgument,
    /// The agent's admin socket; instead of the configuration's.
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// How to print the answer.
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
}

type Outcome = Result<(), Box<dyn std::error::Error + Send + Sync>>;

fn main() -> ExitCode {
    match execute(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        // The reader of a pipe has seen enough.
        Err(error) if is_broken_pipe(&*error) => ExitCode::SUCCESS,
        Err(error) => {
            remark(&*error);
            ExitCode::FAILURE
        }
    }
}

/// Nothing is left to do if even standard error is gone.
fn remark(remark: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr(), "chancery-agent: {remark}");
}

fn is_broken_pipe(error: &(dyn std::error::Error + 'static)) -> bool {
    match error.downcast_ref::<OutputError>() {
        Some(error) => error.is_broken_pipe(),
        None => matches!(error.downcast_ref::<AdminError>(), Some(AdminError::Output(error)) if error.is_broken_pipe()),
    }
}

fn execute(command: Command) -> Outcome {
    match command {
        Command::Run(argument) => run::run(&argument.config),
        Command::Check(argument) => check(&argument.config),
        Command::Config { command: ConfigCommand::Example } => say(config::EXAMPLE),
        Command::Status(arguments) => {
            let socket = arguments.socket()?;
            wait_for(admin::print_status(&mut std::io::stdout(), &socket, arguments.output))
        }
        Command::Streams(arguments) => {
            let socket = arguments.socket()?;
            wait_for(admin::print_streams(&mut std::io::stdout(), &socket, arguments.output))
        }
        Command::Reset(arguments) => reset(&arguments.config.config, arguments.ledger),
        Command::Completions { shell } => {
            // Not written by itself: it panics where it cannot.
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "chancery-agent", &mut script);
            say(&String::from_utf8(script)?)
        }
    }
}

fn check(path: &Path) -> Outcome {
    let text = chancery_process::config::read(path)?;
    let config: Config = chancery_process::config::parse(path, &text)?;
    let problems = config.problems(path, &text);
    if !problems.is_empty() {
        return Err(problems.join("\n").into());
    }
    say(&format!("{}: good\n", path.display()))?;
    // Whether an agent runs here is no part of the question; but one that does may have refused this file.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match runtime.block_on(admin::status(&config.admin_socket)) {
        Ok(status) if !status.configuration_error.is_empty() => {
            say(&format!("the running agent has not taken it over: {}\n", status.configuration_error))
        }
        _ => Ok(()),
    }
}

fn say(text: &str) -> Outcome {
    Ok(std::io::stdout().write_all(text.as_bytes()).map_err(OutputError::from)?)
}

impl AskArguments {
    /// A configuration that was broken while the agent runs must not keep anybody from asking it.
    fn socket(&self) -> Result<PathBuf, String> {
        if let Some(socket) = &self.socket {
            return Ok(socket.clone());
        }
        Config::load(&self.config.config).map(|config| config.admin_socket).or_else(|error| {
            let socket = config::default_admin_socket();
            if !socket.exists() {
                return Err(format!("{error} (--socket PATH asks the running agent without it)"));
            }
            remark(format_args!("{error}; asking at the default admin socket, {}", socket.display()));
            Ok(socket)
        })
    }
}

fn wait_for(answer: impl Future<Output = Result<(), AdminError>>) -> Outcome {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(answer)?)
}

fn reset(path: &Path, ledger: bool) -> Outcome {
    let config = Config::load(path)?;
    if std::os::unix::net::UnixStream::connect(&config.admin_socket).is_ok() {
        return Err("the agent is running and would write its state again; stop it first".into());
    }
    let state = StateFile::path_in(&config.state_dir);
    let file = if ledger { LedgerFile::in_directory(&config.state_dir).path().to_owned() } else { state };
    match std::fs::remove_file(&file) {
        Ok(()) => say(&format!("{}: forgotten\n", file.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => say(&format!("{}: there is none\n", file.display())),
        Err(error) => Err(format!("{}: cannot remove: {error}", file.display()).into()),
    }
}
