//! The CA as a whole, as agents and operators meet it: real ports, real TLS, a real ledger on disk.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail wherever it likes")]

mod backup;
mod checkpoints;
mod ledger;
mod loss;
mod reload;
mod revocation;
mod roles;
mod roots;
mod serving;
mod standing;
mod starting;
mod support;
