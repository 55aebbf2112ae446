//! What one SDS stream knows, and what it should send next: the protocol without I/O and without time.
//!
//! State of the world ([`Variant::World`]) and delta share the whole of it. Requests go in through [`StreamState::on_world`] and
//! [`StreamState::on_delta`], the secrets that exist through [`StreamState::poll`], and what comes out is at most one response. Promises:
//! - a version that the proxy has is not sent to it again, not after a reconnect (the proxy names what it has) nor after a refusal;
//! - a refused version is not offered again until the content has changed, and the proxy is taken to hold what it accepted before;
//! - a name whose secret does not exist yet, or that the workload may not have, is held back without an answer: an empty response or a
//!   removal would end Envoy's wait for it;
//! - only the answer to the newest response that carried a name counts for that name.

mod name;

use std::sync::Arc;

use chancery_process::text::cut;
use chancery_proto::envoy::config::core::v3::Node;
use chancery_proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest};
use chancery_proto::google::rpc::Status as Refusal;

pub use name::{NameView, Standing, Use};

use super::secret::{SECRET_TYPE_URL, Secret, Version};
use name::{MAX_NAME_BYTES, Name};

/// As many names as one stream may ask for. Envoy opens a stream for each.
pub const MAX_NAMES: usize = 32;
/// How much is kept of what a proxy says of itself and of the reason it refused something.
const MAX_TEXT_BYTES: usize = 512;

/// Which of the two protocols a stream speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// `StreamSecrets`: every response carries all that the stream asked for, under one version.
    World,
    /// `DeltaSecrets`: a response carries what changed, each resource under its own version.
    Delta,
}

/// A request that breaks the protocol or a limit. The stream ends with it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// Something else than secrets.
    #[error("this service delivers {SECRET_TYPE_URL} only, not {0:?}")]
    TypeUrl(String),
    /// Over [`MAX_NAMES`].
    #[error("a stream may ask for {MAX_NAMES} names; open another stream for more")]
    TooManyNames,
    /// Longer than any SPIFFE ID.
    #[error("a name has {0} bytes; at most {MAX_NAME_BYTES} are allowed")]
    NameTooLong(usize),
}

/// The secrets that exist at this moment.
#[derive(Clone, Copy, Debug)]
pub struct Offer<'s> {
    /// The workload's.
    pub certificate: Option<&'s Arc<Secret>>,
    /// Its trust domain's.
    pub bundle: Option<&'s Arc<Secret>>,
    /// `false` while the proxy has yet to acknowledge the bundle that a new certificate may depend on. A first certificate does not wait.
    pub certificate_may_change: bool,
}

/// One response.
#[derive(Debug)]
pub struct Push {
    /// Answers carry it.
    pub nonce: u64,
    /// Of all the resources together.
    pub version: Version,
    /// By name.
    pub resources: Vec<(String, Arc<Secret>)>,
}

/// What a look at the secrets led to.
#[derive(Debug, Default)]
pub struct Step {
    /// To send now.
    pub push: Option<Push>,
    /// A changed certificate waits for [`Offer::certificate_may_change`].
    pub waits_for_bundle: bool,
    /// Names that turned out to be none that the workload may have; each is told once.
    pub withheld: Vec<String>,
}

/// What a request said about an earlier response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Nothing, or something about a response that a newer one has replaced.
    None,
    /// It was accepted.
    Ack,
    /// It was refused, with the proxy's words; the proxy keeps what it had.
    Nack(String),
}

/// The state of one stream.
#[derive(Debug)]
pub struct StreamState {
    variant: Variant,
    started: bool,
    node: Box<str>,
    names: Vec<Name>,
    /// What a proxy that asked for several names at once says it has of all of them together; until it accepts something else.
    claimed_set: Option<Version>,
    /// Of the last response; 0 before the first.
    nonce: u64,
    /// Of the last response.
    version: Option<Version>,
    nack: Option<Box<str>>,
}

impl StreamState {
    /// A stream that has said nothing yet.
    pub fn new(variant: Variant) -> Self {
        Self { variant, started: false, node: Box::default(), names: Vec::new(), claimed_set: None, nonce: 0, version: None, nack: None }
    }

    /// Takes a request of `StreamSecrets` in.
    ///
    /// # Errors
    /// If it asks for something else than secrets, or for too much.
    pub fn on_world(&mut self, request: DiscoveryRequest) -> Result<Answer, ProtocolError> {
        check_type(&request.type_url)?;
        self.remember_node(request.node);
        let first = !std::mem::replace(&mut self.started, true);
        if !first && !request.response_nonce.is_empty() && request.response_nonce != self.nonce.to_string() {
            // Sent before the proxy saw our newest response: it will speak again, with all of its names.
            return Ok(Answer::None);
        }
        self.replace_names(request.resource_names)?;
        if first {
            self.take_claim(&request.version_info);
            return Ok(Answer::None);
        }
        // A request that only changes the names repeats the nonce, with the version that the proxy holds, accepted or not.
        let accepts = self.version.is_some_and(|version| version.to_string() == request.version_info);
        match request.error_detail {
            None if !accepts => Ok(Answer::None),
            error => Ok(self.answered(&request.response_nonce, error)),
        }
    }

    /// Takes a request of `DeltaSecrets` in.
    ///
    /// # Errors
    /// If it asks for something else than secrets, or for too much.
    pub fn on_delta(&mut self, request: DeltaDiscoveryRequest) -> Result<Answer, ProtocolError> {
        check_type(&request.type_url)?;
        self.remember_node(request.node);
        let first = !std::mem::replace(&mut self.started, true);
        self.names.retain(|known| !request.resource_names_unsubscribe.iter().any(|name| **name == *known.text));
        for name in request.resource_names_subscribe {
            let claim = if first { request.initial_resource_versions.get(&name) } else { None };
            let mut subscribed = Name::new(&name)?;
            if let Some(version) = claim {
                subscribed.came_with(version);
            }
            // Asking again for a name means that the proxy has lost it, whatever we know (xDS: "the server must still provide those").
            self.names.retain(|known| *known.text != *name);
            self.names.push(subscribed);
            if self.names.len() > MAX_NAMES {
                return Err(ProtocolError::TooManyNames);
            }
        }
        Ok(if first { Answer::None } else { self.answered(&request.response_nonce, request.error_detail) })
    }

    /// Looks at the secrets that exist, and says what to send.
    pub fn poll(&mut self, offer: &Offer<'_>) -> Step {
        let mut step = Step::default();
        let mut set = Vec::with_capacity(self.names.len());
        for (index, name) in self.names.iter_mut().enumerate() {
            let secret = name.find(offer, &mut step.withheld);
            let Some(mut secret) = secret else { continue };
            if secret.is_certificate() && !offer.certificate_may_change && name.would_change(secret.version()) {
                step.waits_for_bundle = true;
                match &name.sent {
                    Some(sent) => secret = sent,
                    None => continue,
                }
            }
            set.push((index, secret.clone()));
        }
        self.compare_with_claim(&set);
        match self.variant {
            Variant::World if !self.is_news(&set) => set.clear(),
            Variant::World => {}
            Variant::Delta => set.retain(|(index, secret)| self.names[*index].lacks(secret.version())),
        }
        if !set.is_empty() {
            step.push = Some(self.push(set));
        }
        step
    }

    /// The proxy, as it named itself; empty before its first request.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Every name that the stream asked for.
    pub fn names(&self) -> impl Iterator<Item = NameView<'_>> {
        self.names.iter().map(Name::view)
    }

    /// Why the proxy refused the last response; nothing once it has accepted another.
    pub fn nack(&self) -> Option<&str> {
        self.nack.as_deref()
    }

    /// For a stream that asked for a bundle: the version that its proxy holds, if any.
    pub fn bundle_held(&self) -> Option<Option<Version>> {
        self.names.iter().find(|name| name.is_bundle()).map(|name| name.held)
    }

    /// What the proxy may be using, by name. A name counts from the moment that the proxy asks for it.
    pub fn uses(&self) -> impl Iterator<Item = Use> {
        self.names.iter().filter_map(Name::used)
    }

    /// The uses that this has not told before.
    pub fn asked_anew(&mut self) -> Vec<Use> {
        let anew = self.names.iter().filter(|name| !name.told).filter_map(Name::used).collect();
        self.names.iter_mut().for_each(|name| name.told = true);
        anew
    }

    /// Whether a response has not been answered yet.
    pub fn awaits_answer(&self) -> bool {
        self.names.iter().any(Name::awaits_answer)
    }

    fn remember_node(&mut self, node: Option<Node>) {
        if let Some(node) = node
            && self.node.is_empty()
        {
            self.node = shortened(node.id).into();
        }
    }

    fn replace_names(&mut self, wanted: Vec<String>) -> Result<(), ProtocolError> {
        if wanted.len() > MAX_NAMES {
            return Err(ProtocolError::TooManyNames);
        }
        let before = self.names.len();
        self.names.retain(|known| wanted.iter().any(|name| **name == *known.text));
        if self.names.len() < before {
            // A proxy that asks for a dropped name later has lost what it had.
            self.claimed_set = None;
        }
        for name in wanted {
            if !self.names.iter().any(|known| *known.text == *name) {
                self.names.push(Name::new(&name)?);
            }
        }
        Ok(())
    }

    fn take_claim(&mut self, version_info: &str) {
        match &mut self.names[..] {
            _ if version_info.is_empty() => {}
            [] => {}
            [name] => name.came_with(version_info),
            _ => self.claimed_set = version_info.parse().ok(),
        }
    }

    fn compare_with_claim(&mut self, set: &[(usize, Arc<Secret>)]) {
        let Some(claimed) = self.claimed_set else { return };
        if self.version_of(set) == claimed {
            for (index, secret) in set {
                self.names[*index].held = Some(secret.version());
            }
        }
    }

    fn version_of(&self, set: &[(usize, Arc<Secret>)]) -> Version {
        match set {
            // As Envoy asks: then the version tells the content by itself, whatever this agent knew before.
            [(_, only)] if self.names.len() == 1 => only.version(),
            set => Version::of_set(set.iter().map(|(index, secret)| (&*self.names[*index].text, secret.version()))),
        }
    }

    /// Whether the proxy lacks something of this set, and has not been offered just this set before. Which of a refused set's resources was
    /// the bad one is not known, so the set is what is not offered again.
    fn is_news(&self, set: &[(usize, Arc<Secret>)]) -> bool {
        let offered = self.version == Some(self.version_of(set));
        set.iter().any(|(index, secret)| {
            let name = &self.names[*index];
            !name.has(secret.version()) && (name.sent.is_none() || !offered)
        })
    }

    fn push(&mut self, set: Vec<(usize, Arc<Secret>)>) -> Push {
        self.nonce += 1;
        let version = self.version_of(&set);
        self.version = Some(version);
        let mut resources = Vec::with_capacity(set.len());
        for (index, secret) in set {
            let name = &mut self.names[index];
            if name.awaits_answer() {
                self.claimed_set = None;
            }
            name.send(self.nonce, secret.clone());
            resources.push((name.text.to_string(), secret));
        }
        Push { nonce: self.nonce, version, resources }
    }

    fn answered(&mut self, nonce: &str, error: Option<Refusal>) -> Answer {
        let Ok(nonce) = nonce.parse::<u64>() else { return Answer::None };
        let mut counts = false;
        for name in &mut self.names {
            counts |= name.answered(nonce, error.is_none());
        }
        match error {
            _ if !counts => Answer::None,
            None => {
                self.nack = None;
                self.claimed_set = None;
                Answer::Ack
            }
            Some(error) => {
                let words = shortened(error.message);
                self.nack = Some(words.clone().into());
                Answer::Nack(words)
            }
        }
    }
}

fn check_type(type_url: &str) -> Result<(), ProtocolError> {
    // On a service for one type, naming it is optional.
    if type_url.is_empty() || type_url == SECRET_TYPE_URL {
        return Ok(());
    }
    Err(ProtocolError::TypeUrl(shortened(type_url.to_owned())))
}

fn shortened(mut text: String) -> String {
    cut(&mut text, MAX_TEXT_BYTES);
    text
}
