//! HTTP to a local port, each request on a connection of its own.

use std::net::SocketAddr;
use std::time::Duration;

use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::Result;

const TIMEOUT: Duration = Duration::from_secs(10);

/// GET: status and body.
pub async fn get(address: SocketAddr, path: &str) -> Result<(u16, String)> {
    tokio::time::timeout(TIMEOUT, exchange(address, path)).await.map_err(|_| format!("no answer from {address} within {TIMEOUT:?}"))?
}

/// GET of the root, with as little work as it takes, for those who do it all the time: status, and the answer as it came.
pub async fn knock(address: SocketAddr) -> Result<(u16, String)> {
    let exchange = async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok()).ok_or("no HTTP answer")?;
        Ok((status, answer))
    };
    tokio::time::timeout(TIMEOUT, exchange).await.map_err(|_| format!("no answer from {address} within {TIMEOUT:?}"))?
}

async fn exchange(address: SocketAddr, path: &str) -> Result<(u16, String)> {
    let stream = TcpStream::connect(address).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let driver = tokio::spawn(connection);
    let request = hyper::Request::get(path).header("host", "localhost").header("connection", "close").body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await?;
    let status = response.status().as_u16();
    let body = response.into_body().collect().await?.to_bytes();
    driver.abort();
    Ok((status, String::from_utf8_lossy(&body).into_owned()))
}
