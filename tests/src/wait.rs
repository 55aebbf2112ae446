//! Waiting for something to be observed, with a deadline.

use std::fmt::Display;
use std::time::{Duration, Instant};

use crate::Result;

const PAUSE: Duration = Duration::from_millis(20);

/// Asks until there is an answer; after `deadline`, fails with `what` and the last reason for there being none.
pub async fn until<T, E: Display>(what: &str, deadline: Duration, mut ask: impl AsyncFnMut() -> Result<T, E>) -> Result<T> {
    let start = Instant::now();
    loop {
        match ask().await {
            Ok(answer) => return Ok(answer),
            Err(reason) if start.elapsed() > deadline => return Err(format!("{what}: not within {deadline:?}: {reason}").into()),
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}
