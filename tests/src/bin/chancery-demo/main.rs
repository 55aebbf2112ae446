//! `make demo`: the main job in front of one's eyes.
//!
//! A CA, an agent, and two workloads with a real Envoy each. Requests go from one to the other through mutual TLS all the time, each on a new
//! connection, while certificates of one minute are rotated, and the CA and the agent are killed and started again. Exit status 1 if a single
//! request failed, or if what was shown cannot be true.

mod display;
mod summary;

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use chancery_tests::envoy::{Protocol, ServedCertificate};
use chancery_tests::lab::Lab;
use chancery_tests::load::Load;
use chancery_tests::mesh::{Mesh, Settings, Workload};
use chancery_tests::{Result, tools};
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};

use display::Display;
use summary::Summary;

const LIFETIME: Duration = Duration::from_secs(60);
const TOKEN_LIFETIME: Duration = Duration::from_secs(60);
/// A mesh that is left running has no kubelet to replace its tokens.
const KEPT_TOKEN_LIFETIME: Duration = Duration::from_secs(7 * 24 * 3600);
const RUN: Duration = Duration::from_secs(130);
const TICK: Duration = Duration::from_millis(500);
const PER_SECOND: u32 = 80;

/// What happens on the way, and when.
const ACTS: [(Duration, Act); 4] = [
    (Duration::from_secs(25), Act::KillCa),
    (Duration::from_secs(40), Act::StartCa),
    (Duration::from_secs(75), Act::KillAgent),
    (Duration::from_secs(80), Act::StartAgent),
];

#[derive(Clone, Copy)]
enum Act {
    KillCa,
    StartCa,
    KillAgent,
    StartAgent,
}

/// Shows a small mesh at work.
#[derive(Parser)]
struct Arguments {
    /// Leave everything running, and print commands to look around with.
    #[arg(long)]
    keep: bool,
}

fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    match runtime.map_err(Into::into).and_then(|runtime| runtime.block_on(demo(&Arguments::parse()))) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            let _ = writeln!(io::stderr(), "demo: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn demo(arguments: &Arguments) -> Result<bool> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        outcome = show(arguments) => outcome,
        _ = tokio::signal::ctrl_c() => Err("interrupted; everything it started has been ended".into()),
        _ = terminate.recv() => Err("terminated; everything it started has been ended".into()),
    }
}

async fn show(arguments: &Arguments) -> Result<bool> {
    let envoy = tools::envoy().ok_or("needs Envoy; run it through `make demo`")?;
    let lab = if arguments.keep { Lab::surviving()? } else { Lab::new()? };
    let mut display = Display::new();
    display.say("starting a CA with a development issuer, and an agent");
    let settings = Settings { envoy, lifetime: LIFETIME, token_lifetime: TOKEN_LIFETIME, protocol: Protocol::Stream };
    let mut mesh = Mesh::start(lab, settings).await?;
    display.say("starting shop/checkout and shop/cart, with an Envoy each");
    let checkout = mesh.workload("checkout", None).await?;
    let cart = mesh.workload("cart", Some(checkout.envoy.at.inbound)).await?;
    let mut watched = [Watched::new(cart).await?, Watched::new(checkout).await?];
    display.say("sending requests from cart to checkout, each on a new connection; certificates live one minute");

    let load = Load::start(watched[0].workload.envoy.at.outbound, PER_SECOND);
    let start = Instant::now();
    let mut acts = ACTS.iter().peekable();
    while start.elapsed() < RUN {
        if let Some((_, act)) = acts.next_if(|(at, _)| start.elapsed() >= *at) {
            perform(*act, &mut mesh, &mut display).await?;
        }
        for one in &mut watched {
            one.look().await?;
        }
        display.show(&mesh, &watched, &load.counts());
        tokio::time::sleep(TICK).await;
    }
    let counts = load.finish().await;
    display.end();

    let summary = Summary::gather(&mesh, &watched, &counts).await?;
    summary.print(&mut io::stdout())?;
    if arguments.keep {
        keep(mesh, watched)?;
    }
    Ok(summary.good())
}

async fn perform(act: Act, mesh: &mut Mesh, display: &mut Display) -> Result<()> {
    match act {
        Act::KillCa => {
            display.say("killing the CA (SIGKILL)");
            mesh.ca.kill()
        }
        Act::StartCa => {
            display.say("starting the CA again");
            mesh.ca.run(&mesh.lab).await
        }
        Act::KillAgent => {
            display.say("killing the agent (SIGKILL)");
            mesh.agent.kill()
        }
        Act::StartAgent => {
            display.say("starting the agent again");
            mesh.agent.run(&mesh.lab).await
        }
    }
}

/// A workload, and what its Envoy was seen to serve.
struct Watched {
    workload: Workload,
    certificate: ServedCertificate,
    rotations: u32,
}

impl Watched {
    async fn new(workload: Workload) -> Result<Self> {
        let certificate = workload.envoy.certificate().await?;
        Ok(Self { workload, certificate, rotations: 0 })
    }

    async fn look(&mut self) -> Result<()> {
        let now = self.workload.envoy.certificate().await?;
        if now.serial != self.certificate.serial {
            self.rotations += 1;
            self.certificate = now;
        }
        Ok(())
    }
}

fn keep(mut mesh: Mesh, watched: [Watched; 2]) -> Result<()> {
    let mut out = io::stdout();
    let mut ids = Vec::new();
    let [cart, checkout] = watched;
    writeln!(out, "\nEverything is left running:\n")?;
    writeln!(out, "  curl http://{}/                     # a request through mutual TLS", cart.workload.envoy.at.outbound)?;
    for Watched { workload, .. } in [cart, checkout] {
        writeln!(out, "  curl http://{}/certs                # what {}'s Envoy holds", workload.envoy.at.admin, workload.name())?;
        ids.push(workload.detach(&mesh, KEPT_TOKEN_LIFETIME)?);
    }
    let (ca, agent) = (tools::chancery("chancery")?, tools::chancery("chancery-agent")?);
    let socket = mesh.ca.admin_socket();
    for question in ["status", "identity list", "identity refusals", "explain shop/cart-0", "agent list"] {
        writeln!(out, "  {} --socket {} {question}", ca.display(), socket.display())?;
    }
    for question in ["status", "streams"] {
        writeln!(out, "  {} {question} --config {}", agent.display(), mesh.agent.config().display())?;
    }
    writeln!(out, "  curl http://{}/metrics              # of the CA", mesh.ca.http)?;
    writeln!(out, "  curl http://{}/metrics              # of the agent", mesh.agent.http)?;
    mesh.lab.keep();
    let directory = mesh.lab.path().to_owned();
    ids.extend(mesh.agent.detach());
    ids.extend(mesh.ca.detach());
    let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
    writeln!(out, "\nEnd it with:\n\n  kill {}; rm -r {}", ids.join(" "), directory.display())?;
    Ok(())
}
