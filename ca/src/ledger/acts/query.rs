//! Answers questions about acts: newest first, in pages that stay stable while acts arrive. There are few, so they are looked at one by one.

use std::hash::{DefaultHasher, Hash, Hasher};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chancery_proto::chancery::v1 as wire;
use time::OffsetDateTime;

use crate::ledger::entry::{Body, Entry, from_millis, to_millis};
use crate::ledger::{Ledger, LedgerError, MAX_PAGE_SIZE, terms};

/// A page ends after this many acts were looked at.
const MAX_EXAMINED: usize = 10_000;
/// Indexes looked up at once.
const LOOK_UP: usize = 256;

/// Which acts; every condition given must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct ActFilter {
    /// Exactly this person.
    pub actor: Option<String>,
    /// This action, or all of a kind: `agent` stands for `agent.ban` and `agent.unban`. Refused acts are found by `act.refused` and by what
    /// was wanted.
    pub action: Option<String>,
    /// About this, as acts name it; its last words will do: `pod UID` is found by the UID.
    pub target: Option<String>,
    /// Recorded at or after.
    pub since: Option<OffsetDateTime>,
    /// Recorded before.
    pub until: Option<OffsetDateTime>,
}

/// An act as it was recorded.
#[derive(Clone, Debug, PartialEq)]
pub struct RecordedAct {
    /// Index of its entry.
    pub index: u64,
    /// When it was recorded.
    pub time: OffsetDateTime,
    /// What it says.
    pub act: wire::Act,
}

/// A part of an answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ActsPage {
    /// Newest first. May be fewer than asked for, or none, although more follow.
    pub acts: Vec<RecordedAct>,
    /// To be handed in for the next page; none on the last.
    pub next: Option<String>,
}

impl Ledger {
    /// The acts that match `filter`, newest first: at most `page_size` of them, from where the page that gave `page_token` ended.
    ///
    /// # Errors
    /// [`LedgerError::PageSize`] and [`LedgerError::PageToken`] on the caller's account; others on the store's.
    pub async fn list_acts(&self, filter: &ActFilter, page_size: usize, page_token: Option<&str>) -> Result<ActsPage, LedgerError> {
        if !(1..=MAX_PAGE_SIZE).contains(&page_size) {
            return Err(LedgerError::PageSize(page_size));
        }
        let mut before = page_token.map_or(Ok(u64::MAX), |token| filter.read_token(token))?;
        let (mut page, mut examined) = (ActsPage::default(), 0);
        loop {
            let indexes = self.store().look_up(&terms::kind("act"), before, LOOK_UP).await?;
            if indexes.is_empty() {
                return Ok(page);
            }
            for index in indexes {
                if page.acts.len() == page_size || examined == MAX_EXAMINED {
                    page.next = Some(filter.write_token(before));
                    return Ok(page);
                }
                let Some(entry) = self.entry(index).await? else { continue };
                if filter.since.is_some_and(|since| entry.time() < since) {
                    // Times never decrease.
                    return Ok(page);
                }
                page.acts.extend(RecordedAct::of(index, entry).filter(|act| filter.matches(act)));
                (before, examined) = (index, examined + 1);
            }
        }
    }
}

impl RecordedAct {
    fn of(index: u64, entry: Entry) -> Option<Self> {
        let time = entry.time();
        let Body::Act(act) = entry.body else { return None };
        Some(Self { index, time, act })
    }
}

impl ActFilter {
    fn matches(&self, act: &RecordedAct) -> bool {
        let RecordedAct { time, act, .. } = act;
        let wanted = match &act.change {
            Some(wire::act::Change::Refused(refused)) => refused.action.as_str(),
            _ => "",
        };
        self.actor.as_ref().is_none_or(|actor| act.actor == *actor)
            && self.action.as_ref().is_none_or(|action| is_kind_of(&act.action, action) || is_kind_of(wanted, action))
            && self.target.as_ref().is_none_or(|target| ends_with_words(&act.target, target))
            && self.since.is_none_or(|since| *time >= since)
            && self.until.is_none_or(|until| *time < until)
    }

    /// The index below which the next page begins, and which filter it is of.
    fn write_token(&self, before: u64) -> String {
        URL_SAFE_NO_PAD.encode([before.to_be_bytes(), self.fingerprint()].concat())
    }

    fn read_token(&self, token: &str) -> Result<u64, LedgerError> {
        let bytes = URL_SAFE_NO_PAD.decode(token).map_err(|_| LedgerError::PageToken("cannot be read"))?;
        let (before, fingerprint) = bytes.split_first_chunk::<8>().ok_or(LedgerError::PageToken("cannot be read"))?;
        if fingerprint != self.fingerprint() {
            return Err(LedgerError::PageToken("was given for another filter"));
        }
        Ok(u64::from_be_bytes(*before))
    }

    fn fingerprint(&self) -> [u8; 8] {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish().to_be_bytes()
    }
}

/// `agent.ban` is of the kinds `agent.ban` and `agent`.
fn is_kind_of(action: &str, kind: &str) -> bool {
    action.strip_prefix(kind).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// Whether `text` is these words, or ends with them.
fn ends_with_words(text: &str, words: &str) -> bool {
    text.strip_suffix(words).is_some_and(|before| before.is_empty() || before.ends_with(' '))
}

impl From<wire::ActFilter> for ActFilter {
    fn from(filter: wire::ActFilter) -> Self {
        let given = |text: String| (!text.is_empty()).then_some(text);
        let moment = |millis: i64| (millis != 0).then(|| from_millis(millis));
        Self {
            actor: given(filter.actor),
            action: given(filter.action),
            target: given(filter.target),
            since: moment(filter.since_ms),
            until: moment(filter.until_ms),
        }
    }
}

impl From<RecordedAct> for wire::ActRecord {
    fn from(act: RecordedAct) -> Self {
        Self { entry: act.index, time_ms: to_millis(act.time), act: Some(act.act) }
    }
}
