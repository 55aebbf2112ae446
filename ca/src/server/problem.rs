//! What is not as it should be, and what somebody can do.

/// Where the disk is full, or will be.
pub(super) const MAKE_ROOM: &str =
    "make the file system under the data directory larger, or move what else is on it: the CA goes on by itself";

/// Where the ledger is damaged.
pub(super) const KEEP_AND_RESTORE: &str = "keep the data directory as it is, and restore the newest backup (`chancery-ca restore`)";

/// Told by `/readyz`, `status` and `doctor`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Problem {
    /// A sentence.
    pub(super) text: String,
    /// What to do.
    pub(super) next_step: &'static str,
}

impl Problem {
    pub(super) fn new(text: String, next_step: &'static str) -> Self {
        Self { text, next_step }
    }
}

/// The sentences alone.
pub(super) fn texts(problems: Vec<Problem>) -> Vec<String> {
    problems.into_iter().map(|problem| problem.text).collect()
}
