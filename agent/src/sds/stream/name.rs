//! One name that a stream asks for: whether its proxy may have it, what was sent under it, and what the proxy holds.

use std::sync::Arc;

use super::{Offer, ProtocolError};
use crate::sds::secret::{DEFAULT_NAME, ROOT_CA_NAME, Secret, Version};

/// As long as a name may be: a SPIFFE ID is at most that long.
pub(super) const MAX_NAME_BYTES: usize = 2048;

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
pub(super) struct Name {
    /// As the proxy spelled it.
    pub(super) text: Box<str>,
    standing: Standing,
    pub(super) sent: Option<Arc<Secret>>,
    /// Of the response in which `sent` went out.
    nonce: u64,
    reply: Reply,
    pub(super) held: Option<Version>,
    /// The proxy came with some secret under this name.
    came_with: bool,
    /// The stream has told of it.
    pub(super) told: bool,
}

impl Name {
    pub(super) fn new(name: &str) -> Result<Self, ProtocolError> {
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

    pub(super) fn came_with(&mut self, version: &str) {
        self.came_with = true;
        self.held = version.parse().ok();
    }

    /// The secret of this name, if it exists and the workload may have it. A name whose owner is not known yet waits.
    pub(super) fn find<'s>(&mut self, offer: &Offer<'s>, withheld: &mut Vec<String>) -> Option<&'s Arc<Secret>> {
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
    pub(super) fn would_change(&self, version: Version) -> bool {
        (self.sent.is_some() || self.came_with) && self.lacks(version)
    }

    /// Whether the proxy neither has this version nor was offered it last.
    pub(super) fn lacks(&self, version: Version) -> bool {
        let offered = self.sent.as_ref().is_some_and(|sent| sent.version() == version);
        !offered && !self.has(version)
    }

    pub(super) fn has(&self, version: Version) -> bool {
        // While an answer is awaited nobody knows what the proxy has.
        !self.awaits_answer() && self.held == Some(version)
    }

    pub(super) fn is_bundle(&self) -> bool {
        self.kind() == Kind::Bundle && self.standing != Standing::Withheld
    }

    /// What the proxy may be using, if it may have it.
    pub(super) fn used(&self) -> Option<Use> {
        let allowed = self.standing != Standing::Withheld && self.kind() != Kind::Unknown;
        allowed.then(|| Use {
            name: self.text.clone(),
            is_certificate: self.kind() == Kind::Certificate,
            given: self.sent.is_some() || self.came_with,
            held: self.held,
        })
    }

    pub(super) fn awaits_answer(&self) -> bool {
        self.reply == Reply::Awaited
    }

    /// It goes out with this response.
    pub(super) fn send(&mut self, nonce: u64, secret: Arc<Secret>) {
        if self.awaits_answer() {
            // Whichever of the two it accepts, only the answer to the newer one will be heard.
            self.held = None;
        }
        self.nonce = nonce;
        self.reply = Reply::Awaited;
        self.sent = Some(secret);
    }

    /// Takes the answer to the response with this nonce; `false` if it says nothing about this name.
    pub(super) fn answered(&mut self, nonce: u64, accepted: bool) -> bool {
        if self.nonce != nonce || !self.awaits_answer() {
            return false;
        }
        if accepted {
            self.reply = Reply::Accepted;
            self.held = self.sent.as_ref().map(|sent| sent.version());
        } else {
            self.reply = Reply::Refused;
        }
        true
    }

    pub(super) fn view(&self) -> NameView<'_> {
        let sent = self.sent.as_ref().map(|sent| sent.version());
        NameView { name: &self.text, standing: self.standing, sent, held: self.held }
    }
}
