//! The task that keeps the connection: joins, connects, serves the session, renews the agent's own certificate, and starts over.

use std::time::Duration;

use chancery_identity::tls;
use chancery_proto::chancery::v1 as wire;
use chancery_proto::chancery::v1::ca_message::Message as Down;
use time::OffsetDateTime;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::ledger::Shown;
use super::session::Session;
use super::{Backoff, CaClient, CaError, ClusterKeys, Held, Holdings, LedgerMemory, ProxySummary, channel, trust};
use chancery_process::moment::moment;

const FIRST_DELAY: Duration = Duration::from_millis(50);
const MOST_DELAY: Duration = Duration::from_secs(2);
/// A refusal is mended by people or by a new token; little is gained by asking often.
const REFUSED_DELAY: Duration = Duration::from_secs(5);
/// A session that ends sooner counts as a failure: two agents with one identity, say, would otherwise end each other's without a pause.
const SHORT_SESSION: Duration = Duration::from_secs(1);
/// A change is reported after so long, with what changes together with it,
const REPORT_SETTLE: Duration = Duration::from_millis(5);
/// but not sooner after the last report than this.
const REPORT_GATHER: Duration = Duration::from_millis(100);
/// A report is sent at least as often as this.
const REPORT_EVERY: Duration = Duration::from_secs(10);
/// Between two attempts to renew the agent's own certificate.
const MOST_RENEWAL_DELAY: Duration = Duration::from_secs(60);
/// Clocks that differ by more are named.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(30);

/// How a session ended.
enum End {
    /// The CA closed it, as it does with old connections.
    Closed,
    /// The agent has a new certificate, or trusts less than before: what was verified must be verified again.
    Outdated,
    /// It broke.
    Broken(CaError),
}

/// What is reported whenever it changes.
struct News {
    holdings: watch::Receiver<Holdings>,
    proxies: watch::Receiver<ProxySummary>,
    ledger: watch::Receiver<LedgerMemory>,
}

impl News {
    /// Whatever changes after this. Taken before the first report of a session is made, or a change during its opening would go unreported.
    fn since_now(client: &CaClient) -> Self {
        Self { holdings: client.published.holdings.subscribe(), proxies: client.published.proxies.subscribe(), ledger: client.ledger() }
    }

    /// Comes back with the next change. Safe to cancel.
    async fn come(&mut self) {
        tokio::select! {
            Ok(()) = self.holdings.changed() => {}
            Ok(()) = self.proxies.changed() => {}
            Ok(()) = self.ledger.changed() => {}
            else => std::future::pending().await,
        }
    }
}

/// Owns the connection.
pub(super) struct Keeper {
    client: CaClient,
    shutdown: CancellationToken,
    started_at: OffsetDateTime,
    /// When to renew the agent's own certificate.
    renew_at: Option<OffsetDateTime>,
    renewal: Backoff,
    /// The CA did not accept the agent's certificate: the token may still do.
    rejoin: bool,
}

impl Keeper {
    pub(super) fn new(client: CaClient, shutdown: CancellationToken) -> Self {
        let started_at = client.clock.now();
        let renew_at = client.published.own.borrow().as_ref().map(|own| own.renewal(client.settings.renew_from));
        Self { client, shutdown, started_at, renew_at, renewal: Backoff::new(FIRST_DELAY), rejoin: false }
    }

    pub(super) async fn run(mut self) {
        let shutdown = self.shutdown.clone();
        shutdown.run_until_cancelled(Box::pin(self.keep())).await;
        self.publish_channel(None, "no session with the CA: the agent is shutting down");
    }

    async fn keep(&mut self) {
        let mut backoff = Backoff::new(FIRST_DELAY);
        // Held while the next one is made, so that calls under way can end.
        let mut last: Option<Session> = None;
        loop {
            let mut news = News::since_now(&self.client);
            let connected = self.connect().await;
            drop(last.take());
            match connected {
                Ok(mut session) => {
                    let since = Instant::now();
                    match self.serve(&mut session, &mut news).await {
                        End::Closed => tracing::info!("the CA closed the session; connecting again"),
                        End::Outdated => tracing::debug!("connecting again with the new certificate or trust"),
                        End::Broken(error) => {
                            tracing::warn!(%error, "the session with the CA broke; connecting again");
                            self.publish_channel(None, &error.no_session());
                        }
                    }
                    last = Some(session);
                    if since.elapsed() < SHORT_SESSION {
                        tokio::time::sleep(backoff.next(MOST_DELAY)).await;
                    } else {
                        backoff.reset();
                    }
                }
                Err(error) => {
                    let mut delay = backoff.next(MOST_DELAY);
                    if matches!(error, CaError::Refused { .. } | CaError::Answer(_)) {
                        delay = delay.max(REFUSED_DELAY.mul_f64(0.5 + rand::random::<f64>() / 2.0));
                    }
                    if backoff.failures().is_power_of_two() {
                        tracing::warn!(attempts = backoff.failures(), "{}", error.no_session());
                    }
                    self.publish_channel(None, &error.no_session());
                    tokio::time::sleep(delay).await;
                }
            }
        }
    }

    /// An identity, a connection made with it, an open session on that.
    async fn connect(&mut self) -> Result<Session, CaError> {
        let own = self.identity().await?;
        let tls = tls::client_config(self.server_trust()?, self.client.server_id()?, Some(&own.svid), self.client.clock.clone())
            .map_err(|e| CaError::Local(format!("no TLS configuration: {e}")))?;
        let channel = channel::connect(&self.client.settings.address, tls).await?;
        let (session, first) = Session::open(&self.client, channel.clone(), self.started_at).await.inspect_err(|_| {
            // In TLS 1.3 a refused client certificate shows only now.
            self.rejoin = true;
        })?;
        if let Some(first) = first {
            self.take_or_alarm(first);
        }
        let id = own.svid.id();
        tracing::info!(%id, address = self.client.settings.address, "connected to the CA");
        self.client.published.channel.send_replace(Some(channel));
        self.client.published.problem.send_replace(String::new());
        self.client.published.reachable.send_if_modified(|known| !std::mem::replace(known, true));
        self.client.metrics.ca_reachable.set(1);
        Ok(session)
    }

    /// The certificate to connect with: the one that is there, or a new one by token.
    async fn identity(&mut self) -> Result<Held, CaError> {
        let now = self.client.clock.now();
        let known = self.client.published.own.borrow().clone().filter(|own| !own.is_expired(now));
        let keys_known = self.client.published.cluster_keys.borrow().is_some();
        match known {
            Some(own) if keys_known && !self.rejoin => return Ok(own),
            _ => self.rejoin = false,
        }
        let own = self.join().await?;
        self.publish_own(own.clone());
        Ok(own)
    }

    async fn join(&self) -> Result<Held, CaError> {
        let joined = self.client.join(self.server_trust()?).await?;
        if let Some(trust) = joined.trust {
            self.publish_trust(trust);
        }
        self.client.published.cluster_keys.send_replace(Some(joined.cluster_keys.into()));
        Ok(joined.own)
    }

    fn server_trust(&self) -> Result<tls::ServerTrust, CaError> {
        let known = self.client.published.trust.borrow().clone();
        trust::server_trust(known.as_deref(), &self.client.settings.anchor, &self.client.settings.trust_domain)
    }

    async fn serve(&mut self, session: &mut Session, news: &mut News) -> End {
        let mut tick = tokio::time::interval(self.client.settings.tick);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut reported_at = Instant::now();
        let mut report_at = reported_at + REPORT_EVERY;
        let mut gathering = false;
        loop {
            let mut changed = false;
            tokio::select! {
                message = session.next() => match message {
                    Ok(Some(message)) => match self.take_or_alarm(message) {
                        Taken::Nothing => {}
                        Taken::Trust => changed = true,
                        Taken::LessTrust => return End::Outdated,
                    },
                    Ok(None) => return End::Closed,
                    Err(error) => return End::Broken(error),
                },
                () = news.come() => changed = true,
                () = tokio::time::sleep_until(report_at) => {
                    gathering = !session.report(&self.client);
                    reported_at = Instant::now();
                    report_at = reported_at + if gathering { REPORT_GATHER } else { REPORT_EVERY };
                }
                _ = tick.tick() => if self.renew_when_due(session).await {
                    return End::Outdated;
                },
            }
            if changed && !gathering {
                gathering = true;
                report_at = (Instant::now() + REPORT_SETTLE).max(reported_at + REPORT_GATHER);
            }
        }
    }

    /// A message that breaks a rule changes nothing, and is no reason to give the connection up.
    fn take_or_alarm(&mut self, message: Down) -> Taken {
        self.take(message).unwrap_or_else(|error| {
            tracing::error!(%error, "a message of the CA was not taken over");
            Taken::Nothing
        })
    }

    fn take(&mut self, message: Down) -> Result<Taken, CaError> {
        match message {
            Down::Welcome(welcome) => {
                let here = self.client.clock.now();
                let there = OffsetDateTime::from_unix_timestamp_nanos(i128::from(welcome.clock_ms) * 1_000_000).unwrap_or(here);
                let apart = (there - here).unsigned_abs();
                if welcome.clock_ms != 0 && apart > CLOCK_TOLERANCE {
                    tracing::error!(?apart, "this machine's clock and the CA's are apart; certificates may be refused");
                }
            }
            Down::Trust(offered) => {
                if let Some(trust) = self.client.accept_trust(offered)? {
                    return Ok(self.publish_trust(trust));
                }
            }
            Down::ClusterKeys(keys) => {
                let keys = ClusterKeys::from_wire(&keys, &self.client.settings.cluster)?;
                self.client.published.cluster_keys.send_replace(Some(keys.into()));
            }
            Down::Order(wire::Order { order: Some(wire::order::Order::ReissueAll(_)) }) => {
                tracing::warn!("the CA orders every certificate to be issued anew");
                self.client.published.reissue.send_modify(|orders| *orders += 1);
            }
            Down::Order(wire::Order { order: Some(wire::order::Order::RenewAgent(_)) }) => {
                tracing::warn!("the CA orders the agent's own certificate to be renewed");
                self.renew_at = Some(self.client.clock.now());
            }
            Down::Order(wire::Order { order: Some(wire::order::Order::TellCertificates(_)) }) => {
                tracing::warn!("the CA lost entries of its ledger, and is told which certificates there are");
                self.client.published.tell.send_modify(|orders| *orders += 1);
            }
            Down::LedgerCheckpoint(checkpoint) => self.client.published.ledger.offer(Shown::Checkpoint(checkpoint)),
            Down::StandingActs(acts) => self.client.published.ledger.offer(Shown::Acts(acts)),
            Down::Order(wire::Order { order: None }) => tracing::warn!("the CA sent an order that this version does not know"),
        }
        Ok(Taken::Nothing)
    }

    /// Tells whether there is a new certificate.
    async fn renew_when_due(&mut self, session: &Session) -> bool {
        let now = self.client.clock.now();
        let expires_at = self.client.published.own.borrow().as_ref().map(|own| own.svid.not_after());
        match expires_at {
            None => return false,
            // Past its end, only the token helps: connecting again joins.
            Some(at) if at <= now => return true,
            Some(_) if self.renew_at.is_none_or(|at| now < at) => return false,
            Some(_) => {}
        }
        match self.renewed(session).await {
            Ok(own) => {
                self.renewal.reset();
                self.publish_own(own);
                true
            }
            Err(error) => {
                let remaining = expires_at.map_or(Duration::ZERO, |at| (at - now).unsigned_abs());
                let delay = self.renewal.next((remaining / 8).clamp(FIRST_DELAY, MOST_RENEWAL_DELAY));
                tracing::error!(%error, "the agent's own certificate could not be renewed; the last one is kept");
                self.renew_at = Some(now + delay);
                false
            }
        }
    }

    /// By the certificate, or, where that is refused, by the token: whoever runs in another pod than the one that it joined with has to.
    async fn renewed(&self, session: &Session) -> Result<Held, CaError> {
        let refused = match self.client.renew(session.channel.clone()).await {
            Err(error @ CaError::Refused { .. }) => error,
            other => return other,
        };
        tracing::warn!(error = %refused, "the agent's certificate is not renewed; joining anew by its token");
        self.join().await
    }

    fn publish_own(&mut self, own: Held) {
        self.renew_at = Some(own.renewal(self.client.settings.renew_from));
        tracing::info!(id = %own.svid.id(), serial = %own.svid.serial(), expires_at = %moment(own.svid.not_after()), "the agent has a certificate");
        self.client.published.own.send_replace(Some(own));
    }

    fn publish_trust(&self, trust: chancery_identity::TrustState) -> Taken {
        let known = self.client.published.trust.borrow().clone();
        let less = known.is_some_and(|known| trust::drops_a_root(&known, &trust));
        tracing::info!(sequence = trust.sequence, authorities = trust.own().x509_authorities().len(), "a new trust state");
        self.client.metrics.trust_sequence(trust.sequence);
        self.client.published.trust.send_replace(Some(trust.into()));
        if less { Taken::LessTrust } else { Taken::Trust }
    }

    fn publish_channel(&self, channel: Option<tonic::transport::Channel>, problem: &str) {
        self.client.published.channel.send_replace(channel);
        self.client.published.problem.send_replace(problem.to_owned());
        self.client.published.reachable.send_if_modified(|known| std::mem::replace(known, false));
        self.client.metrics.ca_reachable.set(0);
    }
}

/// What a message changed.
enum Taken {
    Nothing,
    Trust,
    /// A root has gone, so the connection itself may rest on it.
    LessTrust,
}
