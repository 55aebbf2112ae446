//! One API server for the tests of a binary that run at the same time.

use std::sync::{Arc, Weak};

use tokio::sync::{Mutex, oneshot};

use crate::kubernetes::ApiServer;
use crate::{Error, Result, tools};

/// The last that was started. A static is never dropped, so it does not own.
static CURRENT: Mutex<Weak<SharedApiServer>> = Mutex::const_new(Weak::new());

/// An API server that several tests use. It ends with the last of them.
pub struct SharedApiServer {
    server: ApiServer,
    // The kernel ends a program with the thread that started it, and a test's thread ends with the test.
    _starter: oneshot::Sender<()>,
}

impl std::ops::Deref for SharedApiServer {
    type Target = ApiServer;

    fn deref(&self) -> &ApiServer {
        &self.server
    }
}

/// The API server that other tests of this process use now, or a new one; `None` as for [`ApiServer::start`].
pub async fn shared() -> Result<Option<Arc<SharedApiServer>>> {
    let Some(programs) = tools::kubernetes() else { return Ok(None) };
    let mut current = CURRENT.lock().await;
    if let Some(running) = current.upgrade() {
        return Ok(Some(running));
    }
    let (started, server) = oneshot::channel();
    let (starter, released) = oneshot::channel::<()>();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::spawn(move || {
        runtime.block_on(async {
            // The test may be gone by now, and the server goes with what it would have been sent through.
            let _ = started.send(ApiServer::start_from(&programs, "").await);
            let _ = released.await;
        });
    });
    let server: Result<ApiServer, Error> = server.await?;
    let server = Arc::new(SharedApiServer { server: server?, _starter: starter });
    *current = Arc::downgrade(&server);
    Ok(Some(server))
}
