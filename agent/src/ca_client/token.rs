//! A service-account token on its way from a workload to the CA.

use std::fmt;
use std::sync::Arc;

use zeroize::Zeroizing;

/// The text of a service-account token. Zeroized when the last clone is dropped; `Debug` shows nothing of it; never written to disk.
#[derive(Clone)]
pub struct Token(Arc<Zeroizing<String>>);

impl Token {
    /// Takes the text over; white space around it (token files may end in a newline) is dropped.
    pub fn new(text: Zeroizing<String>) -> Self {
        let trimmed = text.trim();
        if trimmed.len() == text.len() {
            return Self(Arc::new(text));
        }
        Self(Arc::new(Zeroizing::new(trimmed.to_owned())))
    }

    /// The text. The caller keeps it from logs and files.
    pub fn secret(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}
