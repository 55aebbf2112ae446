//! What one SDS stream knows, and what it should send next: the protocol without I/O and without time.
//!
//! State of the world ([`Variant::World`]) and delta share the whole of it. Requests go in through [`StreamState::on_world`] and
//! [`StreamState::on_delta`], the secrets that exist through [`StreamState::poll`], and what comes out is at most one response. Promises:
//! - a version that the proxy has is not sent to it again, not after a reconnect (the proxy names what it has) nor after a refusal;
//! - a refused version is not offered again until the content has changed, and the proxy is taken to hold what it accepted before;
//! - a name whose secret does not exist yet, or that the workload may not have, is held back without an answer: an empty response or a
//!   removal would end Envoy's wait for it;
//! - only the answer to the newest response that carried a name counts for that name.

use std::sync::Arc;

use chancery_proto::envoy::config::core::v3::Node;
use chancery_proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest};
use chancery_proto::google::rpc::Status as Refusal;

use super::secret::{DEFAULT_NAME, ROOT_CA_NAME, SECRET_TYPE_URL, Secret, Version};

/// As many names as one stream may ask for. Envoy opens a stream for each.
pub const MAX_NAMES: usize = 32;
/// As long as a name may be: a SPIFFE ID is at most that long.
const MAX_NAME_BYTES: usize = 2048;
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

/// Where a name stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Its secret does not exist yet.
    Waiting,
    /// Its secret is delivered.
    Served,
    /// The workload may not have it.
    Withheld,
}

/// One name of a stream, for people.
#[derive(Clone, Copy, Debug)]
pub struct NameView<'s> {
    /// As the proxy spelled it.
    pub name: &'s str,
    /// Where it stands.
    pub standing: Standing,
    /// What was sent last on this stream.
    pub sent: Option<Version>,
    /// What the proxy accepted last, on this stream or, by its own word, before.
    pub held: Option<Version>,
}

/// A name of a stream, for whoever asks what its proxy may be using.
#[derive(Clone, Debug)]
pub struct Use {
    /// As the proxy spelled it.
    pub name: Box<str>,
    /// A certificate, not a validation context.
    pub is_certificate: bool,
    /// The proxy has something: it came with it, or was sent it.
    pub given: bool,
    /// What it accepted last; nothing while that cannot be told.
    pub held: Option<Version>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reply {
    Awaited,
    Accepted,
    Refused,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Certificate,
    Bundle,
    Unknown,
}

#[derive(Debug)]
struct Name {
    /// As the proxy spelled it.
    text: Box<str>,
    standing: Standing,
    sent: Option<Arc<Secret>>,
    /// Of the response in which `sent` went out.
    nonce: u64,
    reply: Reply,
    held: Option<Version>,
    /// The proxy came with some secret under this name.
    came_with: bool,
    /// [`StreamState::asked_anew`] has told it.
    told: bool,
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
        let mut bundles = self.names.iter().filter(|name| name.kind() == Kind::Bundle && name.standing != Standing::Withheld);
        bundles.next().map(|name| name.held)
    }

    /// What the proxy may be using, by name. A name counts from the moment that the proxy asks for it.
    pub fn uses(&self) -> impl Iterator<Item = Use> {
        let allowed = |name: &&Name| name.standing != Standing::Withheld && name.kind() != Kind::Unknown;
        self.names.iter().filter(allowed).map(|name| Use {
            name: name.text.clone(),
            is_certificate: name.kind() == Kind::Certificate,
            given: name.sent.is_some() || name.came_with,
            held: name.held,
        })
    }

    /// The uses that this has not told before.
    pub fn asked_anew(&mut self) -> Vec<Use> {
        let new = |used: &Use| self.names.iter().any(|name| !name.told && name.text == used.name);
        let anew = self.uses().filter(new).collect();
        self.names.iter_mut().for_each(|name| name.told = true);
        anew
    }

    /// Whether a response has not been answered yet.
    pub fn awaits_answer(&self) -> bool {
        self.names.iter().any(|name| name.reply == Reply::Awaited)
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
            if name.reply == Reply::Awaited {
                // Whichever of the two it accepts, only the answer to the newer one will be heard.
                name.held = None;
                self.claimed_set = None;
            }
            name.nonce = self.nonce;
            name.reply = Reply::Awaited;
            name.sent = Some(secret.clone());
            resources.push((name.text.to_string(), secret));
        }
        Push { nonce: self.nonce, version, resources }
    }

    fn answered(&mut self, nonce: &str, error: Option<Refusal>) -> Answer {
        let Ok(nonce) = nonce.parse::<u64>() else { return Answer::None };
        let mut counts = false;
        for name in self.names.iter_mut().filter(|name| name.nonce == nonce && name.reply == Reply::Awaited) {
            counts = true;
            if error.is_some() {
                name.reply = Reply::Refused;
            } else {
                name.reply = Reply::Accepted;
                name.held = name.sent.as_ref().map(|sent| sent.version());
            }
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

impl Name {
    fn new(name: &str) -> Result<Self, ProtocolError> {
        if name.len() > MAX_NAME_BYTES {
            return Err(ProtocolError::NameTooLong(name.len()));
        }
        Ok(Self {
            text: name.into(),
            standing: Standing::Waiting,
            sent: None,
            nonce: 0,
            reply: Reply::Accepted,
            held: None,
            came_with: false,
            told: false,
        })
    }

    fn came_with(&mut self, version: &str) {
        self.came_with = true;
        self.held = version.parse().ok();
    }

    /// The secret of this name, if it exists and the workload may have it. A name whose owner is not known yet waits.
    fn find<'s>(&mut self, offer: &Offer<'s>, withheld: &mut Vec<String>) -> Option<&'s Arc<Secret>> {
        let secret = match self.kind() {
            Kind::Certificate => offer.certificate,
            Kind::Bundle => offer.bundle,
            Kind::Unknown => None,
        };
        let standing = match secret {
            Some(secret) if secret.is_named(&self.text) => Standing::Served,
            Some(_) => Standing::Withheld,
            None if self.kind() == Kind::Unknown => Standing::Withheld,
            None => Standing::Waiting,
        };
        if standing == Standing::Withheld && self.standing != Standing::Withheld {
            withheld.push(self.text.to_string());
        }
        self.standing = standing;
        secret.filter(|_| standing == Standing::Served)
    }

    fn kind(&self) -> Kind {
        match &*self.text {
            DEFAULT_NAME => Kind::Certificate,
            ROOT_CA_NAME => Kind::Bundle,
            name => match name.strip_prefix("spiffe://") {
                Some(rest) if rest.contains('/') => Kind::Certificate,
                Some(_) => Kind::Bundle,
                None => Kind::Unknown,
            },
        }
    }

    /// Whether the proxy has another version than this one, rather than none.
    fn would_change(&self, version: Version) -> bool {
        (self.sent.is_some() || self.came_with) && self.lacks(version)
    }

    /// Whether the proxy neither has this version nor was offered it last.
    fn lacks(&self, version: Version) -> bool {
        let offered = self.sent.as_ref().is_some_and(|sent| sent.version() == version);
        !offered && !self.has(version)
    }

    fn has(&self, version: Version) -> bool {
        // While an answer is awaited nobody knows what the proxy has.
        self.reply != Reply::Awaited && self.held == Some(version)
    }

    fn view(&self) -> NameView<'_> {
        let sent = self.sent.as_ref().map(|sent| sent.version());
        NameView { name: &self.text, standing: self.standing, sent, held: self.held }
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
    let mut end = text.len().min(MAX_TEXT_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text
}
