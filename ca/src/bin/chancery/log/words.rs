//! Whether the lines of an export say of their entries what these say themselves: people search and read the words, and only the bytes are signed.

use std::num::NonZero;
use std::thread;

use bytes::Bytes;
use serde_json::{Map, Value};

use super::examined::Finding;
use super::line::EntryLine;

/// So many lines are worth the start of threads.
const AT_ONCE: usize = 8192;

/// Lines that are to be looked at.
#[derive(Debug, Default)]
pub(super) struct Words {
    waiting: Vec<Line>,
}

#[derive(Debug)]
struct Line {
    number: u64,
    entry: u64,
    text: Vec<u8>,
    bytes: Bytes,
}

impl Words {
    /// The line of this number, with the entry whose bytes are in it; says what was found among the lines so far, if they were looked at now.
    pub(super) fn line(&mut self, number: u64, text: &[u8], entry: u64, bytes: &[u8]) -> Option<Finding> {
        self.waiting.push(Line { number, entry, text: text.to_owned(), bytes: Bytes::copy_from_slice(bytes) });
        if self.waiting.len() < AT_ONCE { None } else { self.check() }
    }

    /// Looks at all that wait; tells the first that says something else.
    pub(super) fn check(&mut self) -> Option<Finding> {
        let threads = thread::available_parallelism().map_or(1, NonZero::get);
        let lines = std::mem::take(&mut self.waiting);
        let share = lines.len().div_ceil(threads).max(1);
        thread::scope(|scope| {
            let checks: Vec<_> = lines.chunks(share).map(|lines| scope.spawn(|| lines.iter().find_map(Line::untruth))).collect();
            let missed = || Some(Finding::elsewhere("a thread that looked at the lines panicked".into()));
            checks.into_iter().find_map(|check| check.join().unwrap_or_else(|_| missed()))
        })
    }
}

impl Line {
    fn untruth(&self) -> Option<Finding> {
        let due = EntryLine::of(self.entry, &self.bytes);
        if serde_json::to_vec(&due).is_ok_and(|due| due == self.text) {
            return None;
        }
        let due: Map<String, Value> = serde_json::to_value(&due).and_then(serde_json::from_value).unwrap_or_default();
        let found: Map<String, Value> = serde_json::from_slice(&self.text).unwrap_or_default();
        let differing = due.keys().chain(found.keys()).find(|key| due.get(*key) != found.get(*key))?;
        let problem = format!("line {} does not say in `{differing}` what its bytes say", self.number);
        Some(Finding::at(self.entry, problem))
    }
}
