//! Local questions, asked over the real socket.

#![allow(clippy::unwrap_used, reason = "a test may fail wherever it likes")]

mod sds_support;

use axum::routing::get;
use axum::{Json, Router};
use chancery_agent::admin::{self, AdminError};
use chancery_process::files::bind_socket;
use chancery_process::http::serve_unix;
use chancery_process::output::Format;
use sds_support::Serving;
use tokio_util::sync::CancellationToken;

/// Serves the streams of `serving` as the agent does.
fn answer(serving: &Serving) -> std::path::PathBuf {
    let path = serving.directory.path().join("admin.sock");
    let listener = bind_socket(&path, admin::SOCKET_MODE).unwrap();
    let registry = serving.registry.clone();
    let router = Router::new().route("/streams", get(move || async move { Json(registry.list()) }));
    tokio::spawn(serve_unix(listener, router, serving.shutdown.clone()));
    path
}

#[tokio::test]
async fn streams_are_shown_as_table_json_and_csv() {
    let serving = Serving::ready();
    let path = answer(&serving);
    let mut proxy = serving.proxy().await;
    let (mut bundle, _foreign) = (proxy.world(&["ROOTCA"]).await, proxy.delta(&["foreign"], &[]).await);
    let held = bundle.accept(&["ROOTCA"]).await.version_info;
    serving.acknowledged(1).await;
    sds_support::eventually("the foreign name is known", || serving.registry.list().len() == 2 && !serving.registry.problems().is_empty())
        .await;

    let mut json = Vec::new();
    admin::print_streams(&mut json, &path, Format::Json).await.unwrap();
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert_eq!(json[0]["names"][0]["held"], held);
    assert_eq!(json[0]["trust_sequence"], 1);
    assert_eq!(json[1]["names"][0]["standing"], "withheld");

    let mut csv = Vec::new();
    admin::print_streams(&mut csv, &path, Format::Csv).await.unwrap();
    let csv = String::from_utf8(csv).unwrap();
    let lines: Vec<_> = csv.lines().collect();
    assert!(lines[0].starts_with("stream,connection,protocol,proxy,"), "{csv}");
    assert!(lines[1].contains(&format!("cart-envoy,shop,cart-0,false,ROOTCA,{held},,1,,false,")), "{csv}");
    assert!(lines[2].contains("foreign: withheld"), "{csv}");

    let mut table = Vec::new();
    admin::print_streams(&mut table, &path, Format::Table).await.unwrap();
    assert_eq!(String::from_utf8(table).unwrap().lines().count(), 3);
}

#[tokio::test]
async fn an_agent_that_is_not_there_or_is_another_program_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("admin.sock");
    let error = admin::streams(&path).await.unwrap_err();
    assert!(matches!(error, AdminError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains("is it running"), "{error}");

    let listener = bind_socket(&path, admin::SOCKET_MODE).unwrap();
    let router = Router::new().route("/streams", get(|| async { "no JSON" }));
    let stop = CancellationToken::new();
    tokio::spawn(serve_unix(listener, router, stop.clone()));
    assert!(matches!(admin::streams(&path).await.unwrap_err(), AdminError::Unreadable { .. }));
    assert!(matches!(admin::status(&path).await.unwrap_err(), AdminError::Refused { .. }));
    stop.cancel();
}
