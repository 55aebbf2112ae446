//! The CA's own keys and certificates, and the trust state that it publishes.

pub mod directory;
pub mod keys;
