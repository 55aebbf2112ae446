//! Requests from one workload to the other at a steady rate, each on a new connection, so that each is a new TLS handshake.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use tokio::sync::{Mutex as Turn, MutexGuard as TurnGuard};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::envoy::Envoy;
use crate::{Error, Result, http, wait};

/// What a test sends that claims to have been under load. More than [`CLAIMED`], which holds of the whole run.
pub const PER_SECOND: u32 = 250;
/// Connections that a load opens in every second, at least.
const CLAIMED: u128 = 200;
/// Before anything is done to the mesh, so many requests are answered.
const BEFORE: u64 = 200;
const BEGUN_WITHIN: Duration = Duration::from_secs(30);
/// For so long a load goes on after the last thing that is done.
const AFTERWARDS: Duration = Duration::from_secs(1);
const CAUGHT_UP_WITHIN: Duration = Duration::from_secs(20);
/// Requests under way at once, at most.
const SENDERS: u32 = 20;

/// Failures whose words are kept.
const KEPT_FAILURES: usize = 10;

/// What was sent so far.
pub struct Counts {
    begun: Instant,
    ended: OnceLock<Instant>,
    ok: AtomicU64,
    failed: AtomicU64,
    failures: Mutex<Vec<String>>,
}

impl Counts {
    fn new() -> Self {
        Self { begun: Instant::now(), ended: OnceLock::new(), ok: AtomicU64::new(0), failed: AtomicU64::new(0), failures: Mutex::default() }
    }

    /// Requests that were answered with 200.
    pub fn ok(&self) -> u64 {
        self.ok.load(Ordering::Relaxed)
    }

    /// All others.
    pub fn failed(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }

    /// Requests that were answered with 200 in a second, from the first one on until now or the end.
    pub fn per_second(&self) -> u128 {
        let until = self.ended.get().copied().unwrap_or_else(Instant::now);
        u128::from(self.ok()) * 1000 / until.duration_since(self.begun).as_millis().max(1)
    }

    /// The first failures, in words.
    pub fn failures(&self) -> Vec<String> {
        self.failures.lock().map(|failures| failures.clone()).unwrap_or_default()
    }

    fn count(&self, outcome: Result<(u16, String), Error>) {
        let failure = match outcome {
            Ok((200, _)) => {
                self.ok.fetch_add(1, Ordering::Relaxed);
                return;
            }
            Ok((status, body)) => format!("status {status}: {body}"),
            Err(error) => error.to_string(),
        };
        self.failed.fetch_add(1, Ordering::Relaxed);
        if let Ok(mut failures) = self.failures.lock()
            && failures.len() < KEPT_FAILURES
        {
            failures.push(failure);
        }
    }
}

/// A client that keeps sending.
pub struct Load {
    counts: Arc<Counts>,
    end: CancellationToken,
    senders: TaskTracker,
}

impl Load {
    /// Sends so many requests a second, and what it could not send in time as soon as it can.
    pub fn start(address: SocketAddr, per_second: u32) -> Self {
        let load = Self { counts: Arc::new(Counts::new()), end: CancellationToken::new(), senders: TaskTracker::new() };
        let period = Duration::from_secs(1) / per_second;
        for sender in 0..SENDERS {
            let (counts, end) = (load.counts.clone(), load.end.clone());
            load.senders.spawn(async move {
                let mut due = tokio::time::interval_at(tokio::time::Instant::now() + period * sender, period * SENDERS);
                due.set_missed_tick_behavior(MissedTickBehavior::Burst);
                while end.run_until_cancelled(due.tick()).await.is_some() {
                    counts.count(http::knock(address).await);
                }
            });
        }
        load
    }

    /// What was sent so far; readable also after the end.
    pub fn counts(&self) -> Arc<Counts> {
        self.counts.clone()
    }

    /// Sends no more, and waits for the answers to what is under way.
    pub async fn finish(self) -> Arc<Counts> {
        self.end.cancel();
        self.senders.close();
        self.senders.wait().await;
        let _ = self.counts.ended.set(Instant::now());
        self.counts.clone()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.end.cancel();
    }
}

/// The tests of a process run side by side, and would take each other's share of the machine.
static TURN: Turn<()> = Turn::const_new(());

/// Waits for the turn of a test that sends no load, and takes as much of the machine as one that does.
pub async fn turn() -> TurnGuard<'static, ()> {
    TURN.lock().await
}

/// A load from one Envoy to another, of which a test claims that it was one and that nothing failed. There is one at a time.
pub struct Steady {
    load: Load,
    handshakes_before: u64,
    _turn: TurnGuard<'static, ()>,
}

impl Steady {
    /// Begins to send when it is its turn, and comes back when it is under way.
    pub async fn begin(caller: &Envoy) -> Result<Self> {
        let turn = turn().await;
        let handshakes_before = handshakes(caller).await?;
        let load = Load::start(caller.at.outbound, PER_SECOND);
        let counts = load.counts();
        wait::until("a load is under way", BEGUN_WITHIN, async || match counts.ok() {
            BEFORE.. => Ok(()),
            ok => Err(format!("{ok} requests were answered, and {} failed: {:?}", counts.failed(), counts.failures())),
        })
        .await?;
        Ok(Self { load, handshakes_before, _turn: turn })
    }

    /// Goes on for a while, until on the whole there were as many as a load has, and ends.
    ///
    /// # Errors
    /// If a request failed, if there were fewer of them than a load has, or if one of them was not a new handshake between these two.
    pub async fn end(self, caller: &Envoy, called: &Envoy) -> Result<()> {
        tokio::time::sleep(AFTERWARDS).await;
        let counts = self.load.counts();
        // A machine that was busy with other things sends then what was due meanwhile.
        let rate = async || match counts.per_second() {
            CLAIMED.. => Ok(()),
            rate => Err(format!("{rate} requests a second are no load: {} in all, {} failed", counts.ok(), counts.failed())),
        };
        let held = wait::until("a load", CAUGHT_UP_WITHIN, rate).await;
        let counts = self.load.finish().await;
        if counts.failed() > 0 {
            return Err(format!("{} of {} requests failed: {:?}", counts.failed(), counts.ok() + counts.failed(), counts.failures()).into());
        }
        let handshakes = handshakes(caller).await? - self.handshakes_before;
        if handshakes != counts.ok() {
            return Err(format!("{} requests took {handshakes} handshakes", counts.ok()).into());
        }
        for (envoy, side) in [(caller, "cluster.outbound"), (called, "listener.inbound")] {
            let reused = envoy.stat(&format!("{side}.ssl.session_reused")).await?;
            if reused > 0 {
                return Err(format!("{reused} sessions of {} were resumed", envoy.name()).into());
            }
        }
        held
    }
}

async fn handshakes(caller: &Envoy) -> Result<u64> {
    caller.stat("cluster.outbound.ssl.handshake").await
}
