//! What agents and proxies hold in reality, and what agents know and report of it.

use chancery_identity::{Crl, Fingerprint};
use chancery_proto::chancery::v1::{Convergence, ProxyLag, Report};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::rotation::tests::world::Certificate;

/// The trust roots of a trust state, and its CRLs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Bundle {
    pub(super) sequence: u64,
    pub(super) roots: Vec<Fingerprint>,
    pub(super) crl: Option<Crl>,
}

/// A proxy. It counts while it presents a certificate that has not expired.
#[derive(Clone, Debug, Default)]
pub(super) struct Proxy {
    pub(super) bundle: Bundle,
    pub(super) certificate: Option<Certificate>,
    /// It refuses bundles.
    pub(super) nacks: bool,
    /// It has its bundle from elsewhere, where each arrives after the fixed time at the latest.
    pub(super) elsewhere: bool,
    /// What it has acknowledged, as far as its agent knows.
    pub(super) acked: (Bundle, u64),
}

#[derive(Clone, Debug)]
pub(super) struct Pod {
    pub(super) number: u128,
    /// Its newest certificate, with the agent.
    pub(super) certificate: Option<Certificate>,
    /// When the last of its certificates expires.
    until: Option<OffsetDateTime>,
    /// The agent has not lost its state since.
    known: bool,
    /// Deleted, with its proxies; the agent learns nothing of it.
    pub(super) deleted: bool,
    pub(super) proxies: Vec<Proxy>,
}

#[derive(Clone, Debug)]
pub(super) struct Agent {
    pub(super) number: u128,
    pub(super) bundle: Bundle,
    pub(super) certificate: Option<Certificate>,
    pub(super) pods: Vec<Pod>,
    pub(super) connected: bool,
    /// How often its set of pods has changed.
    version: u64,
}

impl Bundle {
    pub(super) fn has(&self, root: Fingerprint) -> bool {
        self.roots.contains(&root)
    }

    /// As whoever has it from elsewhere has it.
    pub(super) fn without_crl(self) -> Self {
        Self { crl: None, ..self }
    }
}

pub(super) fn is_alive(certificate: &Certificate, now: OffsetDateTime) -> bool {
    (certificate.from..=certificate.until).contains(&now)
}

impl Proxy {
    /// Its live certificate.
    pub(super) fn presents(&self, now: OffsetDateTime) -> Option<Certificate> {
        self.certificate.filter(|certificate| is_alive(certificate, now))
    }
}

impl Pod {
    pub(super) fn new(number: u128) -> Self {
        Self { number, certificate: None, until: None, known: false, deleted: false, proxies: vec![Proxy::default()] }
    }
}

impl Agent {
    pub(super) fn new(number: u128) -> Self {
        let pods = vec![Pod::new(number * 100)];
        Self { number, bundle: Bundle::default(), certificate: None, pods, connected: false, version: 1 }
    }

    /// Takes over a certificate for itself or one of its pods, if it can be used.
    pub(super) fn take(&mut self, pod: Option<usize>, certificate: Certificate, now: OffsetDateTime) {
        if !self.bundle.has(certificate.root) || !is_alive(&certificate, now) {
            return;
        }
        let Some(pod) = pod else {
            self.certificate = Some(certificate);
            return;
        };
        let pod = &mut self.pods[pod];
        pod.certificate = Some(certificate);
        pod.until = pod.until.max(Some(certificate.until));
        pod.known = true;
        self.version += 1;
    }

    /// A proxy is given what its agent has: the bundle, then the certificate.
    pub(super) fn give(&mut self, pod: usize, proxy: usize, now: OffsetDateTime) {
        let pod = &mut self.pods[pod];
        let Some(certificate) = pod.certificate.filter(|certificate| is_alive(certificate, now) && pod.known && !pod.deleted) else {
            return;
        };
        let proxy = &mut pod.proxies[proxy];
        if !proxy.nacks && !proxy.elsewhere {
            proxy.bundle.clone_from(&self.bundle);
        }
        // One that begins, perhaps anew after a long time away, begins with the bundle.
        if proxy.presents(now).is_some() || proxy.bundle.sequence == self.bundle.sequence {
            proxy.certificate = Some(certificate);
        }
    }

    /// The agent hears what a proxy has, as an acknowledgement or when it comes back.
    pub(super) fn hear(&mut self, pod: usize, proxy: usize) {
        let pod = &mut self.pods[pod];
        if pod.deleted || !pod.known {
            return;
        }
        let proxy = &mut pod.proxies[proxy];
        let bundle = if proxy.elsewhere { Bundle::default() } else { proxy.bundle.clone() };
        proxy.acked = (bundle, proxy.certificate.map_or(0, |certificate| certificate.entry));
    }

    /// It restarts; what it knows of its proxies it knows no more.
    pub(super) fn restart(&mut self) {
        self.connected = false;
        for proxy in self.pods.iter_mut().flat_map(|pod| &mut pod.proxies) {
            proxy.acked = Default::default();
        }
    }

    /// It restarts, and its state is gone.
    pub(super) fn lose_state(&mut self) {
        self.restart();
        (self.bundle, self.certificate) = (Bundle::default(), None);
        self.version += 1;
        for pod in &mut self.pods {
            (pod.known, pod.certificate, pod.until) = (false, None, None);
        }
    }

    /// Whoever presents what, with what they trust.
    pub(super) fn holders(&self, now: OffsetDateTime) -> impl Iterator<Item = (String, Certificate, &Bundle)> {
        let own = self.certificate.filter(|own| is_alive(own, now));
        let own = own.map(|own| (format!("agent {}", self.number), own, &self.bundle));
        let pods = self.pods.iter().filter(|pod| !pod.deleted);
        let proxies = pods.flat_map(move |pod| {
            let proxies = pod.proxies.iter().enumerate();
            proxies.filter_map(move |(index, proxy)| {
                Some((format!("proxy {index} of pod {}", pod.number), proxy.presents(now)?, &proxy.bundle))
            })
        });
        own.into_iter().chain(proxies)
    }

    /// What the agent says of itself, as agent.proto describes it.
    pub(super) fn report(&self, now: OffsetDateTime) -> Report {
        let pods: Vec<_> = self.pods.iter().filter(|pod| pod.known && pod.until.is_some_and(|until| until > now)).collect();
        let holders = || pods.iter().flat_map(|pod| &pod.proxies);
        // The same roots and CRLs under another sequence are no other bundle to a proxy.
        let is_same = |bundle: &Bundle| bundle.roots == self.bundle.roots && bundle.crl == self.bundle.crl;
        let sequence = |bundle: &Bundle| if is_same(bundle) { self.bundle.sequence } else { bundle.sequence };
        let proven = holders().filter(|proxy| !proxy.elsewhere).map(|proxy| sequence(&proxy.acked.0));
        let unproven_total = u32::try_from(holders().filter(|proxy| proxy.elsewhere).count()).unwrap();
        let convergence = Convergence {
            trust_sequence: proven.chain([self.bundle.sequence]).min().unwrap(),
            certificate_entry: holders().map(|proxy| proxy.acked.1).min().unwrap_or(u64::MAX),
            holders: u32::try_from(holders().count()).unwrap(),
            pods: pods.iter().map(|pod| Uuid::from_u128(pod.number).into_bytes().to_vec()).collect(),
            pods_version: self.version,
            svid_entry: self.certificate.map_or(0, |own| own.entry),
            unproven: vec![ProxyLag::default(); unproven_total as usize],
            unproven_total,
            ..Convergence::default()
        };
        let clock_ms = i64::try_from(now.unix_timestamp_nanos() / 1_000_000).unwrap();
        Report { clock_ms, trust_sequence: self.bundle.sequence, convergence: Some(convergence), ..Report::default() }
    }
}
