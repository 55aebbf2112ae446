//! `chancery log serve-local`: checkpoint and tiles over HTTP on this machine, for tools that know tlog-tiles and nothing of Chancery.

use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use chancery_ca::api::{LEDGER_PREFIX, TileName, TileSource, ledger_routes};
use chancery_process::output::OutputError;
use chancery_process::{http, shutdown};
use chancery_proto::chancery::v1::{GetCheckpointRequest, GetTileRequest};
use clap::Args;
use tonic::Status;

use crate::client::{CliError, Log};

#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// Where to listen; loopback only, port 0 for any free one.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:8444", value_parser = loopback)]
    listen: SocketAddr,
}

/// The CA that is asked for each file.
struct Remote(Log);

#[tonic::async_trait]
impl TileSource for Remote {
    async fn checkpoint(&self) -> Result<String, Status> {
        Ok(self.0.clone().get_checkpoint(GetCheckpointRequest {}).await?.into_inner().note)
    }

    async fn tile(&self, name: TileName) -> Result<Bytes, Status> {
        let request = GetTileRequest { level: name.level.map(u32::from), index: name.index, width: name.width.into() };
        Ok(self.0.clone().get_tile(request).await?.into_inner().tile)
    }
}

/// Serves until it is asked to end.
pub(super) async fn run(mut log: Log, args: ServeArgs, out: &mut impl Write) -> Result<(), CliError> {
    let failed = |error: &dyn std::fmt::Display| CliError::Failed(error.to_string());
    let key = log.get_checkpoint(GetCheckpointRequest {}).await?.into_inner().verifier_keys.pop().unwrap_or_default();
    let listener = http::bind(args.listen).await.map_err(|error| failed(&error))?;
    let address = listener.local_addr().map_err(|error| failed(&error))?;
    let ending = shutdown::on_signal().map_err(|error| failed(&error))?;
    writeln!(out, "http://{address}{LEDGER_PREFIX}\n{key}").and_then(|()| out.flush()).map_err(OutputError::Write)?;
    http::serve_tcp(listener, ledger_routes(Arc::new(Remote(log))), ending).await;
    Ok(())
}

/// Who may read the ledger was decided at the socket: nobody else may read it through this.
fn loopback(text: &str) -> Result<SocketAddr, String> {
    match text.parse::<SocketAddr>() {
        Ok(address) if address.ip().is_loopback() => Ok(address),
        Ok(address) => Err(format!("{} is no loopback address; entries name pods and nodes, and are for this machine alone", address.ip())),
        Err(_) => Err("expected an address such as 127.0.0.1:8444".into()),
    }
}
