//! Harness for the end-to-end tests and the demo: the real binaries, the real Envoy, real connections.
//!
//! Everything here waits for what it can observe, with a deadline, and never for a fixed time. What is started is killed, by its id, when
//! its handle is dropped.

pub mod agent;
pub mod auditor;
pub mod ca;
pub mod caller;
pub mod envoy;
pub mod http;
pub mod kubelet;
pub mod kubernetes;
pub mod lab;
pub mod ledger;
pub mod load;
pub mod mesh;
pub mod node;
pub mod process;
pub mod proxies;
pub mod secrets;
pub mod tokens;
pub mod tools;
pub mod wait;

/// Whatever goes wrong is told to a person, and ends the test.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// How often to do what a test repeats: ten times as often in `make soak`.
pub fn soak(times: usize) -> usize {
    if std::env::var_os("SOAK").is_some() { times * 10 } else { times }
}

/// The result of a step of a test.
pub type Result<T, E = Error> = std::result::Result<T, E>;
