//! `chancery root`: the trust roots, and their way from one to the next.

mod distrust;
mod gate;
mod list;
mod patient;
mod prepare;
mod rotate;
mod step;
mod waiting;

use std::io::Write;

use chancery_process::output::Format;
use chancery_proto::chancery::v1::RootState;
use chancery_proto::chancery::v1::root_service_client::RootServiceClient;
use clap::{Args, Subcommand};

use crate::client::{self, CliError, Way};

/// A CA whose roots are asked for.
type Roots = RootServiceClient<client::Channel>;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Every trust root, and where it is in its life.
    List,
    /// One trust root, with its certificate.
    Show {
        /// The beginning of its fingerprint.
        root: String,
    },
    /// Walk from the active root to the next one, each step when everybody is ready for it. Can be stopped, and started again, at any time.
    #[command(after_help = rotate::EXAMPLES)]
    Rotate(rotate::RotateArgs),
    /// Make the root that is to follow the active one. Nobody sees it yet.
    #[command(after_help = prepare::EXAMPLES)]
    Prepare(prepare::PrepareArgs),
    /// Put a prepared root into every bundle.
    Publish(step::StepArgs),
    /// Sign with a published root from now on, once everybody has it.
    Activate(step::StepArgs),
    /// Take a draining root out of every bundle, once nothing alive chains to it.
    Retire(step::StepArgs),
    /// The emergency: replace a root at once and take it out of every bundle, for good.
    Distrust(distrust::DistrustArgs),
}

/// What of a gate does not count; all of it is recorded.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Gates")]
pub(crate) struct OverrideArgs {
    /// Take one out of the count: an agent's SPIFFE ID, a node as `CLUSTER/NODE`, or a pod as `CLUSTER/NAMESPACE/POD`, without the cluster if
    /// there is only one; may be repeated. Recorded, as all of these.
    #[arg(long, value_name = "NAME")]
    except: Vec<String>,
    /// Override whatever is in the way. Whoever is missing may lose connections.
    #[arg(long)]
    force: bool,
    /// Do not wait for proxies that cannot prove what they trust.
    #[arg(long)]
    accept_unproven: bool,
    /// The CA's clock is right, although it looks as if it were not.
    #[arg(long)]
    confirm_clock: bool,
}

impl OverrideArgs {
    fn to_wire(&self) -> chancery_proto::chancery::v1::Overrides {
        let Self { except, force, accept_unproven, confirm_clock } = self.clone();
        chancery_proto::chancery::v1::Overrides { except, force, accept_unproven, confirm_clock }
    }
}

pub(crate) async fn run(way: &Way, command: Command, out: &mut impl Write, format: Format) -> Result<(), CliError> {
    match command {
        Command::Rotate(args) => rotate::run(way, &args, out, format).await,
        Command::Distrust(args) => distrust::run(way, args, out, format).await,
        command => {
            let ca = connect(way).await?;
            match command {
                Command::Show { root } => list::show(ca, &root, out, format).await,
                Command::Prepare(args) => prepare::run(ca, args, out, format).await,
                Command::Publish(args) => step::run(ca, RootState::Published, args, out, format).await,
                Command::Activate(args) => step::run(ca, RootState::Active, args, out, format).await,
                Command::Retire(args) => step::run(ca, RootState::Retired, args, out, format).await,
                Command::List | Command::Rotate(_) | Command::Distrust(_) => list::run(ca, out, format).await,
            }
        }
    }
}

async fn connect(way: &Way) -> Result<Roots, CliError> {
    Ok(RootServiceClient::new(client::channel(way).await?))
}
