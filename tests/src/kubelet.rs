//! Playing the kubelet of one node: registers the CSI plugin and calls it as the kubelet of Kubernetes 1.37 does (`pkg/kubelet/pluginmanager`,
//! `pkg/volume/csi`), with tokens of the development issuer.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use chancery_ca::attestation::development::{DevelopmentIssuer, TokenRequest};
use chancery_proto::csi::v1::identity_client::IdentityClient;
use chancery_proto::csi::v1::node_client::NodeClient;
use chancery_proto::csi::v1::volume_capability::{AccessType, MountVolume};
use chancery_proto::csi::v1::{
    GetPluginCapabilitiesRequest, GetPluginInfoRequest, NodeGetCapabilitiesRequest, NodeGetInfoRequest, NodePublishVolumeRequest,
    NodeUnpublishVolumeRequest, ProbeRequest, VolumeCapability,
};
use chancery_proto::pluginregistration::registration_client::RegistrationClient;
use chancery_proto::pluginregistration::{PluginInfo, RegistrationStatus};
use prost::Message;
use serde_json::json;
use time::OffsetDateTime;
use tokio::task::JoinSet;
use tonic::Status;
use uuid::Uuid;

use crate::lab::Lab;
use crate::mesh::{NAMESPACE, NODE};
use crate::node::{Container, Node};
use crate::secrets::Stream;
use crate::{Result, secrets, wait};

/// Of the tests' CSI driver.
pub const DRIVER: &str = "csi.chancery.dev";
const TOKENS: &str = "csi.storage.k8s.io/serviceAccount.tokens";
const ROOT: &str = "kubelet";
const PODS: &str = "pods";
const PATIENCE: Duration = Duration::from_secs(10);
const TOKEN_LIFETIME: Duration = Duration::from_secs(600);

/// What grpc-go 1.82 writes for the kubelet's two calls to a registration socket; recorded. Its authority is the socket's path.
const PREFACE: &str = "505249202a20485454502f322e300d0a0d0a534d0d0a0d0a000000040000000000";
const GET_INFO: &str = "0000000401000000000000830104000000018386459c62ba2d98d558598c84d83498f52fb4b31909b06931ea63115392a94f41bd5458534d6a8b09\
    1065a63aa2c3dc762a2c341a354587adb19682a55161ae8b6635488ac2cc6426cf4a8b091065c938ea216cf4bc85eeb58599741c9d7f5f8b1d75d0620d263d4c4d65\
    647a8a9acac8b4c7602bbc25c340027465864d833505b11f0000050001000000010000000000";
/// Of `plugin_registered: true`.
const NOTIFY: &str = "000030010400000003838645a862ba2d98d558598c84d83498f52fb4b31909b06931ea6349d2697d6d2cc6426c1a4c7ab72469b51fc2c1c0bf\
    00000700010000000300000000020801";

/// The kubelet of one node.
pub struct Kubelet {
    root: PathBuf,
    issuer: DevelopmentIssuer,
    endpoint: PathBuf,
}

/// A pod with our volume.
#[derive(Clone, Debug)]
pub struct Pod {
    /// Its name.
    pub name: String,
    /// Its service account.
    pub account: String,
    /// Its UID.
    pub uid: Uuid,
    /// `volumeAttributes` of the volume.
    pub attributes: HashMap<String, String>,
}

/// Pods that were started at once, and how long the slowest of them waited for its first certificate.
#[derive(Default)]
pub struct Started {
    /// From the kubelet's call on, which all make at the same time: with the mounts of all pods, and whatever the calls wait for each other.
    pub since_called: Duration,
    /// From the end of that call on, when the kubelet starts the pod's containers.
    pub since_published: Duration,
    /// One of each pod.
    pub streams: Vec<Stream>,
}

/// How the pod's tokens are handed over.
#[derive(Clone, Debug)]
pub enum Handing {
    /// As since Kubernetes 1.35.
    InSecrets(String),
    /// As before.
    InContext(String),
    /// The `CSIDriver` object asks for none.
    None,
}

impl Pod {
    /// One of the shop's, with a UID of its own.
    pub fn new(account: &str, number: usize) -> Self {
        Self { name: format!("{account}-{number}"), account: account.to_owned(), uid: Uuid::new_v4(), attributes: HashMap::new() }
    }

    /// The kubelet hashes UID and volume name.
    pub fn volume_id(&self) -> String {
        format!("csi-{}{}", self.uid.simple(), self.uid.simple())
    }
}

impl Kubelet {
    /// With its directories in the lab.
    pub fn new(lab: &Lab, issuer: DevelopmentIssuer) -> Result<Self> {
        let root = lab.at(ROOT);
        for directory in ["plugins_registry", "plugins"] {
            std::fs::create_dir_all(root.join(directory))?;
        }
        pods(lab)?;
        Ok(Self { endpoint: root.join("plugins").join(DRIVER).join("csi.sock"), root, issuer })
    }

    /// The plugin's section of the agent's configuration.
    pub fn section(&self, lab: &Lab) -> String {
        let at = |path: &Path| path.display().to_string();
        format!(
            "\n[csi]\nplugin_dir = \"{}\"\nregistry_dir = \"{}\"\nsocket_root = \"{}\"\nnode_id = \"{NODE}\"\n",
            at(&self.root.join("plugins").join(DRIVER)),
            at(&self.root.join("plugins_registry")),
            at(&self.socket_root(lab)),
        )
    }

    /// Where the plugin has the pods' directories.
    pub fn socket_root(&self, lab: &Lab) -> PathBuf {
        lab.at("pods")
    }

    /// Where the plugin is called.
    pub fn endpoint(&self) -> &Path {
        &self.endpoint
    }

    /// Where the plugin announces itself.
    pub fn registration(&self) -> PathBuf {
        self.root.join("plugins_registry").join(format!("{DRIVER}-reg.sock"))
    }

    /// Waits for the plugin to announce itself, and registers it. The bytes are the kubelet's own.
    pub async fn register(&self) -> Result<PluginInfo> {
        let socket = self.announced().await?;
        let info = tokio::task::spawn_blocking(move || -> Result<PluginInfo> {
            let mut connection = UnixStream::connect(socket)?;
            connection.set_read_timeout(Some(PATIENCE))?;
            write(&mut connection, PREFACE)?;
            // grpc-go waits for the server's SETTINGS before it acknowledges them.
            while frame(&mut connection)?.kind != SETTINGS {}
            write(&mut connection, GET_INFO)?;
            let info = PluginInfo::decode(&*message(&mut connection, 1)?)?;
            write(&mut connection, NOTIFY)?;
            message(&mut connection, 3)?;
            Ok(info)
        });
        let info = info.await??;
        if (&*info.r#type, Path::new(&info.endpoint)) != ("CSIPlugin", &*self.endpoint) {
            return Err(format!("{info:?}").into());
        }
        // What `RegisterPlugin` asks before it says that all is well.
        let channel = secrets::connect(&self.endpoint).await?;
        let node = NodeClient::new(channel.clone()).node_get_info(NodeGetInfoRequest {}).await?.into_inner();
        // Asked before each publication: it can nothing that has to be asked for.
        NodeClient::new(channel.clone()).node_get_capabilities(NodeGetCapabilitiesRequest {}).await?;
        IdentityClient::new(channel.clone()).get_plugin_capabilities(GetPluginCapabilitiesRequest {}).await?;
        let name = IdentityClient::new(channel.clone()).get_plugin_info(GetPluginInfoRequest {}).await?.into_inner().name;
        let probed = IdentityClient::new(channel).probe(ProbeRequest {}).await?.into_inner();
        if (&*node.node_id, &*name, probed.ready) != (NODE, DRIVER, Some(true)) {
            return Err(format!("{node:?} {name} {probed:?}").into());
        }
        Ok(info)
    }

    /// Waits for the plugin to announce itself, and refuses it.
    pub async fn refuse(&self, reason: &str) -> Result<()> {
        let channel = secrets::connect(&self.announced().await?).await?;
        let status = RegistrationStatus { plugin_registered: false, error: reason.to_owned() };
        // The plugin may end before it has answered.
        let _ = RegistrationClient::new(channel).notify_registration_status(status).await;
        Ok(())
    }

    async fn announced(&self) -> Result<PathBuf> {
        let socket = self.registration();
        wait::until("the plugin announces itself", PATIENCE, async || match UnixStream::connect(&socket) {
            Ok(_) => Ok(socket.clone()),
            Err(error) => Err(error.to_string()),
        })
        .await
    }

    /// Where a pod's volume is mounted.
    pub fn target(&self, pod: &Pod) -> PathBuf {
        self.root.join(PODS).join(pod.uid.to_string()).join("volumes/kubernetes.io~csi/chancery/mount")
    }

    /// A token for a pod, as the API server would sign it.
    pub fn token(&self, pod: &Pod, lifetime: Duration) -> Result<String> {
        let request = TokenRequest {
            namespace: NAMESPACE.into(),
            service_account: pod.account.clone(),
            pod: pod.name.clone(),
            node: NODE.into(),
            audience: "chancery".into(),
            lifetime,
            pod_uid: Some(pod.uid),
            node_uid: None,
        };
        Ok(self.issuer.sign(&request, OffsetDateTime::now_utc())?.to_string())
    }

    /// `NodePublishVolume` with a fresh token.
    pub async fn publish(&self, pod: &Pod) -> Result<()> {
        let token = self.token(pod, TOKEN_LIFETIME)?;
        Ok(self.publish_with(pod, &Handing::InSecrets(token)).await?)
    }

    /// `NodePublishVolume`, with these tokens. The kubelet opens a connection for each call.
    pub async fn publish_with(&self, pod: &Pod, handing: &Handing) -> Result<(), Status> {
        self.call_publish(self.request(pod, handing)).await
    }

    /// What the kubelet would send.
    pub fn request(&self, pod: &Pod, handing: &Handing) -> NodePublishVolumeRequest {
        let facts = [
            ("pod.name", pod.name.clone()),
            ("pod.namespace", NAMESPACE.to_owned()),
            ("pod.uid", pod.uid.to_string()),
            ("serviceAccount.name", pod.account.clone()),
            ("ephemeral", "true".to_owned()),
        ];
        let mut context = pod.attributes.clone();
        context.extend(facts.map(|(name, value)| (format!("csi.storage.k8s.io/{name}"), value)));
        let tokens = |token: &str| {
            let expires = "2099-01-01T00:00:00Z";
            json!({"chancery": {"token": token, "expirationTimestamp": expires}}).to_string()
        };
        let mut secrets = HashMap::new();
        match handing {
            Handing::InSecrets(token) => secrets.insert(TOKENS.to_owned(), tokens(token)),
            Handing::InContext(token) => context.insert(TOKENS.to_owned(), tokens(token)),
            Handing::None => None,
        };
        NodePublishVolumeRequest {
            volume_id: pod.volume_id(),
            target_path: self.target(pod).display().to_string(),
            volume_capability: Some(VolumeCapability { access_type: Some(AccessType::Mount(MountVolume {})) }),
            readonly: true,
            secrets,
            volume_context: context,
        }
    }

    /// Makes the directory above the target, as the kubelet does, and sends the request.
    pub async fn call_publish(&self, request: NodePublishVolumeRequest) -> Result<(), Status> {
        let internal = |error: &dyn std::fmt::Display| Status::internal(format!("the test's kubelet: {error}"));
        if let Some(above) = Path::new(&request.target_path).parent() {
            std::fs::DirBuilder::new().recursive(true).mode(0o750).create(above).map_err(|error| internal(&error))?;
        }
        let channel = secrets::connect(&self.endpoint).await.map_err(|error| internal(&error))?;
        NodeClient::new(channel).node_publish_volume(request).await.map(|_| ())
    }

    /// Publishes the volumes of all these pods at once, as a kubelet that starts does, and holds a stream open for each.
    pub async fn start_pods(self: &Arc<Self>, node: &Node, pods: &[Pod]) -> Result<Started> {
        let mut starting = JoinSet::<Result<_>>::new();
        for pod in pods {
            let (kubelet, pod, seen) = (self.clone(), pod.clone(), node.see(&self.target(pod)));
            starting.spawn(async move {
                let called = Instant::now();
                kubelet.publish(&pod).await?;
                let published = Instant::now();
                let container = Container::open(&seen)?;
                let stream = secrets::hold(&container.at("sds.sock"), None, None, PATIENCE).await?;
                Ok((called.elapsed(), published.elapsed(), stream))
            });
        }
        let mut all = Started::default();
        for started in starting.join_all().await {
            let (called, published, stream) = started?;
            all.since_called = all.since_called.max(called);
            all.since_published = all.since_published.max(published);
            all.streams.push(stream);
        }
        Ok(all)
    }

    /// `NodeUnpublishVolume`; then the target must be gone, or the kubelet would not get rid of the pod.
    pub async fn unpublish(&self, pod: &Pod) -> Result<()> {
        let target = self.target(pod);
        let request = NodeUnpublishVolumeRequest { volume_id: pod.volume_id(), target_path: target.display().to_string() };
        let channel = secrets::connect(&self.endpoint).await?;
        NodeClient::new(channel).node_unpublish_volume(request).await?;
        if target.exists() { Err(format!("{} is still there", target.display()).into()) } else { Ok(()) }
    }
}

/// The directory below which all pods have their volumes; created if need be.
pub(crate) fn pods(lab: &Lab) -> Result<PathBuf> {
    let path = lab.at(ROOT).join(PODS);
    std::fs::create_dir_all(&path)?;
    Ok(path)
}

/// Recorded bytes.
fn write(connection: &mut UnixStream, hexadecimal: &str) -> Result<()> {
    let pairs = hexadecimal.as_bytes().chunks(2);
    let bytes = pairs.map(|pair| Ok(u8::from_str_radix(std::str::from_utf8(pair)?, 16)?)).collect::<Result<Vec<u8>>>()?;
    Ok(connection.write_all(&bytes)?)
}

/// RFC 9113, 4.1.
struct Frame {
    kind: u8,
    ends_stream: bool,
    stream: u32,
    payload: Vec<u8>,
}

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;

fn frame(connection: &mut UnixStream) -> Result<Frame> {
    let mut header = [0; 9];
    connection.read_exact(&mut header)?;
    let [length_0, length_1, length_2, kind, flags, stream @ ..] = header;
    let mut payload = vec![0; u32::from_be_bytes([0, length_0, length_1, length_2]) as usize];
    connection.read_exact(&mut payload)?;
    Ok(Frame { kind, ends_stream: flags & 1 != 0, stream: u32::from_be_bytes(stream), payload })
}

/// The message that answers a call.
fn message(connection: &mut UnixStream, stream: u32) -> Result<Vec<u8>> {
    let mut message = Vec::new();
    loop {
        let frame = frame(connection)?;
        let ours = frame.stream == stream;
        match frame.kind {
            DATA if ours => message.extend(frame.payload),
            // The trailers.
            HEADERS if ours && frame.ends_stream => break,
            RST_STREAM if ours => return Err(format!("the stream was reset: {:?}", frame.payload).into()),
            GOAWAY => return Err(format!("the connection was ended: {:?}", frame.payload).into()),
            _ => {}
        }
    }
    Ok(message.get(5..).ok_or("the call was answered without a message")?.to_vec())
}
