//! What every Chancery process does at its edge: configuration, logs, health, files, shutdown.
//!
//! The CA and the agent both build on this crate, so that they behave alike towards the people who run them; they never know each
//! other. Nothing here knows about certificates.

pub mod config;
pub mod files;
pub mod hardening;
pub mod http;
pub mod logging;
pub mod moment;
pub mod output;
pub mod shutdown;
pub mod text;
pub mod watch;
