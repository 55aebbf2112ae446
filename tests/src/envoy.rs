//! A real Envoy with certificates from an agent: an mTLS listener, and a plain one that leads to another workload through mTLS.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use chancery_identity::{Fingerprint, TrustBundle};
use serde_json::{Value, json};

use crate::ca::TRUST_DOMAIN;
use crate::lab::{Lab, free_address};
use crate::process::Process;
use crate::tokens::TokenVolume;
use crate::{Result, http, wait};

const READY_WITHIN: Duration = Duration::from_secs(20);

/// How an Envoy asks for its secrets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// StreamSecrets.
    Stream,
    /// DeltaSecrets.
    Delta,
}

/// What one Envoy does.
#[derive(Clone)]
pub struct Plan {
    /// Node id, and the name of its files.
    pub name: String,
    /// The agent's socket.
    pub sds_socket: PathBuf,
    /// StreamSecrets or DeltaSecrets.
    pub protocol: Protocol,
    /// On a shared socket: the workload's token.
    pub token: Option<TokenVolume>,
    /// Peers must carry a SPIFFE ID that starts with this.
    pub peer_prefix: String,
    /// Where the plain listener's requests go.
    pub upstream: Option<SocketAddr>,
}

/// Where an Envoy listens.
#[derive(Clone, Copy, Debug)]
pub struct Addresses {
    /// The admin interface.
    pub admin: SocketAddr,
    /// Requires a client certificate and answers 200.
    pub inbound: SocketAddr,
    /// Plain; leads through mTLS to the plan's upstream.
    pub outbound: SocketAddr,
}

/// A running Envoy.
pub struct Envoy {
    process: Process,
    binary: PathBuf,
    config: PathBuf,
    log: PathBuf,
    name: String,
    /// Where it listens.
    pub at: Addresses,
}

/// A certificate chain as `/certs` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServedCertificate {
    /// 32 hexadecimal digits, as Chancery writes serial numbers.
    pub serial: String,
    /// The first URI name.
    pub spiffe_id: String,
    /// As Envoy writes it (RFC 3339).
    pub expires: String,
}

impl Envoy {
    /// Starts Envoy; its listeners come up when it has got its secrets.
    pub fn start(lab: &Lab, binary: &Path, plan: &Plan) -> Result<Self> {
        Self::start_changed(lab, binary, plan, |_| {})
    }

    /// The same, with something else in its bootstrap configuration than the plan says.
    pub fn start_changed(lab: &Lab, binary: &Path, plan: &Plan, change: impl FnOnce(&mut Value)) -> Result<Self> {
        let token_secret = lab.at(&format!("{}.token_sds.json", plan.name));
        if let Some(volume) = &plan.token {
            volume.write_envoy_secret(&token_secret)?;
        }
        let at = Addresses::free()?;
        let mut bootstrap = plan.bootstrap(at, &token_secret);
        change(&mut bootstrap);
        Self::start_with(lab, binary, &plan.name, at, &bootstrap)
    }

    /// Starts Envoy with this bootstrap configuration, which listens at these addresses.
    pub fn start_with(lab: &Lab, binary: &Path, name: &str, at: Addresses, bootstrap: &Value) -> Result<Self> {
        let config = lab.at(&format!("{name}.envoy.json"));
        std::fs::write(&config, serde_json::to_vec_pretty(bootstrap)?)?;
        let log = lab.at(&format!("{name}.envoy.log"));
        let process = launch(lab, name, binary, &config, &log)?;
        Ok(Self { process, binary: binary.to_owned(), config, log, name: name.to_owned(), at })
    }

    /// Kills Envoy and starts it again, with the same configuration.
    pub fn restart(self, lab: &Lab) -> Result<Self> {
        let Self { process, binary, config, log, name, at } = self;
        process.kill()?;
        let process = launch(lab, &name, &binary, &config, &log)?;
        Ok(Self { process, binary, config, log, name, at })
    }

    /// Waits until Envoy calls itself ready, which it does with its secrets.
    pub async fn ready(&mut self) -> Result<()> {
        let Self { process, at, name, .. } = self;
        wait::until(&format!("{name}'s Envoy is ready"), READY_WITHIN, async || {
            process.check().map_err(|error| error.to_string())?;
            match http::get(at.admin, "/ready").await {
                Ok((200, _)) => Ok(()),
                Ok((status, body)) => Err(format!("{status} {body}")),
                Err(error) => Err(error.to_string()),
            }
        })
        .await
    }

    /// The certificate that Envoy serves now, as its admin interface shows it.
    pub async fn certificate(&self) -> Result<ServedCertificate> {
        let (_, body) = http::get(self.at.admin, "/certs").await?;
        let document: Value = serde_json::from_str(&body)?;
        let chains = document["certificates"].as_array().ok_or("no certificates")?;
        let leaf = chains.iter().find_map(|chain| chain["cert_chain"].get(0)).ok_or("no certificate chain yet")?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        Ok(ServedCertificate {
            serial: format!("{:0>32}", text(&leaf["serial_number"]).to_lowercase()),
            spiffe_id: leaf["subject_alt_names"].get(0).map(|name| text(&name["uri"])).unwrap_or_default(),
            expires: text(&leaf["expiration_time"]),
        })
    }

    /// Waits until another certificate than `old` is served.
    pub async fn next_certificate(&self, old: &ServedCertificate, within: Duration) -> Result<ServedCertificate> {
        wait::until(&format!("{} serves another certificate than {}", self.name, old.serial), within, async || {
            match self.certificate().await {
                Ok(new) if new.serial != old.serial => Ok(new),
                Ok(_) => Err("still the old one".to_owned()),
                Err(error) => Err(error.to_string()),
            }
        })
        .await
    }

    /// The fingerprints of the roots that Envoy trusts now, as its admin interface shows them.
    pub async fn trusts(&self) -> Result<Vec<String>> {
        let (_, body) = http::get(self.at.admin, "/config_dump?resource=dynamic_active_secrets").await?;
        let dump: Value = serde_json::from_str(&body)?;
        let secrets = dump["configs"].as_array().ok_or("no secrets")?;
        let pem = secrets.iter().find_map(|secret| secret["secret"]["validation_context"]["trusted_ca"]["inline_bytes"].as_str());
        let pem = BASE64_STANDARD.decode(pem.ok_or("no bundle yet")?)?;
        let bundle = TrustBundle::from_pem(TRUST_DOMAIN.parse()?, &pem)?;
        Ok(bundle.x509_authorities().iter().map(|root| Fingerprint::of(root).to_string()).collect())
    }

    /// The statistics whose names match the regular expression.
    pub async fn stats(&self, filter: &str) -> Result<BTreeMap<String, u64>> {
        let (_, body) = http::get(self.at.admin, &format!("/stats?filter={filter}")).await?;
        let parse = |line: &str| {
            let (name, value) = line.rsplit_once(": ")?;
            Some((name.to_owned(), value.parse().ok()?))
        };
        Ok(body.lines().filter_map(parse).collect())
    }

    /// One statistic; 0 while Envoy has not counted any.
    pub async fn stat(&self, name: &str) -> Result<u64> {
        Ok(self.stats(&format!("^{}$", name.replace('.', "%5C."))).await?.get(name).copied().unwrap_or_default())
    }

    /// Its node id.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Leaves Envoy running after this process.
    pub fn detach(self) -> u32 {
        self.process.detach()
    }
}

fn launch(lab: &Lab, name: &str, binary: &Path, config: &Path, log: &Path) -> Result<Process> {
    let mut command = lab.command(binary);
    // Without hot restart, so that several Envoys live side by side; one worker suffices.
    command.arg("--config-path").arg(config).args(["--disable-hot-restart", "--concurrency", "1", "--log-level", "warning"]);
    Process::start(&format!("{name}'s Envoy"), &mut command, log)
}

impl Addresses {
    /// Ports that nobody listens on.
    pub fn free() -> Result<Self> {
        Ok(Self { admin: free_address()?, inbound: free_address()?, outbound: free_address()? })
    }
}

impl Plan {
    /// Envoy's configuration; the inbound listener and the cluster `sds` come first.
    pub fn bootstrap(&self, at: Addresses, token_secret: &Path) -> Value {
        let mut listeners = vec![inbound_listener(self, at.inbound)];
        let mut clusters = vec![sds_cluster(self, token_secret)];
        if let Some(upstream) = self.upstream {
            listeners.push(outbound_listener(at.outbound));
            clusters.push(outbound_cluster(self, upstream));
        }
        json!({
            "node": {"id": self.name, "cluster": "shop"},
            "admin": {"address": socket_address(at.admin)},
            "static_resources": {"listeners": listeners, "clusters": clusters},
        })
    }
}

/// The TLS settings of the inbound listener, in a bootstrap configuration.
pub fn inbound_tls(bootstrap: &mut Value) -> &mut Value {
    &mut bootstrap["static_resources"]["listeners"][0]["filter_chains"][0]["transport_socket"]["typed_config"]
}

/// Requires a client certificate, and answers by itself.
fn inbound_listener(plan: &Plan, address: SocketAddr) -> Value {
    let context = json!({
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        "require_client_certificate": true,
        // A resumed session would prove nothing about certificates.
        "disable_stateless_session_resumption": true,
        "disable_stateful_session_resumption": true,
        "common_tls_context": common_tls_context(plan),
    });
    let answer = json!({"status": 200, "body": {"inline_string": format!("{}\n", plan.name)}});
    let route = json!({"match": {"prefix": "/"}, "direct_response": answer});
    let mut listener = listener("inbound", address, &route);
    listener["filter_chains"][0]["transport_socket"] = json!({"name": "envoy.transport_sockets.tls", "typed_config": context});
    listener
}

fn outbound_listener(address: SocketAddr) -> Value {
    listener("outbound", address, &json!({"match": {"prefix": "/"}, "route": {"cluster": "outbound", "timeout": "5s"}}))
}

fn listener(name: &str, address: SocketAddr, route: &Value) -> Value {
    let manager = json!({
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": name,
        "route_config": {"virtual_hosts": [{"name": name, "domains": ["*"], "routes": [route]}]},
        "http_filters": [{
            "name": "envoy.filters.http.router",
            "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"},
        }],
    });
    json!({
        "name": name,
        "stat_prefix": name,
        "address": socket_address(address),
        "filter_chains": [{"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}],
    })
}

/// One new connection, and so one new handshake, for each request.
fn outbound_cluster(plan: &Plan, upstream: SocketAddr) -> Value {
    let context = json!({
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        "max_session_keys": 0,
        "common_tls_context": common_tls_context(plan),
    });
    json!({
        "name": "outbound",
        "type": "STATIC",
        "connect_timeout": "5s",
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
            "common_http_protocol_options": {"max_requests_per_connection": 1},
            "explicit_http_config": {"http_protocol_options": {}},
        }},
        "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": context},
        "load_assignment": endpoint("outbound", &socket_address(upstream)),
    })
}

fn common_tls_context(plan: &Plan) -> Value {
    let source = json!({
        "resource_api_version": "V3",
        "initial_fetch_timeout": "0s",
        "api_config_source": {
            "api_type": if plan.protocol == Protocol::Delta { "DELTA_GRPC" } else { "GRPC" },
            "transport_api_version": "V3",
            "set_node_on_first_message_only": true,
            "grpc_services": [{"envoy_grpc": {
                "cluster_name": "sds",
                "retry_policy": {"retry_back_off": {"base_interval": "0.1s", "max_interval": "2s"}},
            }}],
        },
    });
    json!({
        "tls_certificate_sds_secret_configs": [{"name": "default", "sds_config": source}],
        "combined_validation_context": {
            "default_validation_context": {
                "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"prefix": plan.peer_prefix}}],
            },
            "validation_context_sds_secret_config": {"name": "ROOTCA", "sds_config": source},
        },
    })
}

/// The agent's socket; on a shared one, each new stream carries the workload's token.
fn sds_cluster(plan: &Plan, token_secret: &Path) -> Value {
    let mut filters = Vec::new();
    if let Some(volume) = &plan.token {
        let credential = json!({
            "@type": "type.googleapis.com/envoy.extensions.http.injected_credentials.generic.v3.Generic",
            "header": "authorization",
            "header_value_prefix": "Bearer ",
            "credential": {"name": "sds_token", "sds_config": {"path_config_source": {
                "path": token_secret,
                "watched_directory": {"path": volume.directory()},
            }}},
        });
        filters.push(json!({"name": "envoy.filters.http.credential_injector", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.credential_injector.v3.CredentialInjector",
            "overwrite": true,
            "credential": {"name": "envoy.http.injected_credentials.generic", "typed_config": credential},
        }}));
    }
    filters.push(json!({"name": "envoy.filters.http.upstream_codec", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.upstream_codec.v3.UpstreamCodec",
    }}));
    json!({
        "name": "sds",
        "type": "STATIC",
        "connect_timeout": "1s",
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": {"http2_protocol_options": {}},
            "http_filters": filters,
        }},
        "load_assignment": endpoint("sds", &json!({"pipe": {"path": plan.sds_socket}})),
    })
}

fn endpoint(cluster: &str, address: &Value) -> Value {
    json!({"cluster_name": cluster, "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}]})
}

fn socket_address(address: SocketAddr) -> Value {
    json!({"socket_address": {"address": address.ip().to_string(), "port_value": address.port()}})
}
