//! Keys that are fetched: over real TLS from a real server on loopback.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicUsize, Ordering};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, KeyUsagePurpose};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

use super::*;

/// An HTTPS server that answers every request with the text it was given last.
struct Server {
    address: SocketAddr,
    answer: Arc<Mutex<String>>,
    requests: Arc<AtomicUsize>,
    ca_pem: String,
}

fn serve(answer: String) -> Server {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let leaf = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap().signed_by(&key, &authority).unwrap();
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![leaf.der().clone()], key)
        .unwrap();
    let (config, listener) = (Arc::new(config), TcpListener::bind("127.0.0.1:0").unwrap());
    let server = Server {
        address: listener.local_addr().unwrap(),
        answer: Arc::new(Mutex::new(answer)),
        requests: Arc::default(),
        ca_pem: authority.pem(),
    };
    let (answer, requests) = (server.answer.clone(), server.requests.clone());
    // Ends with the test's process.
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            let mut stream = StreamOwned::new(ServerConnection::new(config.clone()).unwrap(), connection.unwrap());
            if stream.read(&mut [0; 4096]).is_err() {
                continue;
            }
            requests.fetch_add(1, Ordering::SeqCst);
            let answer = answer.lock().unwrap().clone();
            let _ = stream.write_all(answer.as_bytes());
            stream.conn.send_close_notify();
            let _ = stream.flush();
        }
    });
    server
}

fn ok(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len())
}

/// A fixture whose cluster `far` has its keys at `server`.
fn at(server: &Server, with_ca: bool) -> Fixture {
    let f = fixture();
    let mut far = settings("far", PathBuf::new(), "*");
    let ca_file = f.directory.path().join("ca.pem");
    std::fs::write(&ca_file, &server.ca_pem).unwrap();
    let url = format!("https://{}/openid/v1/jwks", server.address).parse().unwrap();
    far.jwks = JwksSource::Url { url, ca_file: with_ca.then_some(ca_file) };
    f.clusters.replace(vec![far]).unwrap();
    f
}

#[tokio::test]
async fn keys_are_fetched_over_tls_and_again_for_an_unknown_key_but_not_for_every_one() {
    let keys = fixture();
    let server = serve(ok(&keys.west.jwks().unwrap()));
    let f = at(&server, true);
    let caller = f.agent("far", "node-a");
    let of_west = f.west.sign(&request("shop", "cart", "chancery"), f.clock.now()).unwrap();
    f.attest(&caller, &of_west).await.unwrap();
    assert_eq!(server.requests.load(Ordering::SeqCst), 1, "fetched when first needed");

    let of_east = f.token(&request("shop", "cart", "chancery"));
    for _ in 0..5 {
        assert_eq!(f.refusal(&caller, &of_east).await.reason(), "token_unknown_key");
    }
    assert_eq!(server.requests.load(Ordering::SeqCst), 1, "strangers cannot make the CA fetch again and again");
    *server.answer.lock().unwrap() = ok(&keys.east.jwks().unwrap());
    f.clusters.reload_keys("far").await.unwrap();
    f.attest(&caller, &of_east).await.unwrap();
}

#[tokio::test]
async fn a_bad_answer_keeps_the_last_good_keys_and_shows_in_the_status() {
    let keys = fixture();
    let server = serve(ok(&keys.east.jwks().unwrap()));
    let f = at(&server, true);
    f.clusters.reload_keys("far").await.unwrap();
    let not_found = "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n".to_owned();
    let moved = "HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n".to_owned();
    for (answer, word) in [(not_found, "404"), (moved, "302"), (ok(&"x".repeat(2 << 20)), "limit"), (ok("{\"keys\":[]}"), "far")] {
        *server.answer.lock().unwrap() = answer;
        let error = f.clusters.reload_keys("far").await.unwrap_err().to_string();
        assert!(error.contains(word) && error.contains("https://127.0.0.1"), "{word}: {error}");
        assert_eq!(f.clusters.status()[0].keys, 1);
    }
    f.attest(&f.agent("far", "node-a"), &f.token(&request("shop", "cart", "chancery"))).await.unwrap();
}

#[tokio::test]
async fn a_server_that_no_known_authority_vouches_for_is_not_believed() {
    let keys = fixture();
    let server = serve(ok(&keys.east.jwks().unwrap()));
    let f = at(&server, false);
    let error = f.clusters.reload_keys("far").await.unwrap_err().to_string();
    assert!(error.contains("certificate"), "{error}");
    assert_eq!(server.requests.load(Ordering::SeqCst), 0, "nothing was asked");
    assert!(f.clusters.cluster_keys("far").is_none());
}

#[tokio::test]
async fn keys_that_were_fetched_serve_after_a_restart_until_there_are_newer_ones() {
    let keys = fixture();
    let server = serve(ok(&keys.east.jwks().unwrap()));
    let f = at(&server, true);
    let kept = f.directory.path().join("kept");
    let start = |issuer: &str| {
        let settings = f.clusters.settings().into_iter().map(|one| ClusterSettings { issuer: issuer.into(), ..one }).collect();
        let clock = Arc::clone(&f.clock) as Arc<dyn Clock>;
        Clusters::keeping_keys("example.org".parse().unwrap(), settings, clock, Some(&kept)).unwrap()
    };
    let (caller, token) = (f.agent("far", "node-a"), f.token(&request("shop", "cart", "chancery")));
    let attest = async |clusters: &Clusters| {
        clusters.attest_workload(&caller, &token, async |_| false).await.map(drop).map_err(|error| error.reason())
    };
    start(ISSUER).reload_keys("far").await.unwrap();

    *server.answer.lock().unwrap() = "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n".to_owned();
    let restarted = start(ISSUER);
    assert_eq!(restarted.status()[0].keys, 0, "what is there now comes first");
    assert_eq!(attest(&restarted).await, Ok(()));
    assert!(restarted.status()[0].error.is_some() && restarted.cluster_keys("far").is_some());
    assert_eq!(attest(&start("https://another")).await, Err("cluster_keys_missing"));

    *server.answer.lock().unwrap() = ok(&keys.west.jwks().unwrap());
    restarted.reload_keys("far").await.unwrap();
    assert_eq!(attest(&restarted).await, Err("token_unknown_key"));
}

#[tokio::test]
async fn running_fetches_at_once_and_ends_when_told() {
    let keys = fixture();
    let server = serve(ok(&keys.east.jwks().unwrap()));
    let f = at(&server, true);
    let (clusters, shutdown) = (f.clusters.clone(), CancellationToken::new());
    let mut changes = clusters.changes();
    changes.mark_unchanged();
    let run = tokio::spawn({
        let shutdown = shutdown.clone();
        async move { clusters.run(shutdown).await }
    });
    tokio::time::timeout(Duration::from_secs(10), changes.changed()).await.unwrap().unwrap();
    assert!(f.clusters.cluster_keys("far").is_some());
    shutdown.cancel();
    tokio::time::timeout(Duration::from_secs(10), run).await.unwrap().unwrap();
}
