//! What the kubelet asks to publish: read and checked as a whole, before anything is done.
//!
//! `volume_context` mixes what the pod's author wrote (`volumeAttributes`), what the kubelet says of the pod, and, before Kubernetes 1.35, the
//! pod's tokens. None of it counts as proof of anything but the token.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::path::{Component, PathBuf};

use chancery_proto::csi::v1::volume_capability::AccessType;
use chancery_proto::csi::v1::{NodePublishVolumeRequest, NodeUnpublishVolumeRequest};
use serde::Deserialize;
use uuid::Uuid;
use zeroize::Zeroizing;

use super::error::VolumeError;
use crate::svids::{Applicant, Token, WorkloadKey};

/// What the kubelet adds begins with this.
const KUBELET: &str = "csi.storage.k8s.io/";
const TOKENS: &str = "csi.storage.k8s.io/serviceAccount.tokens";
/// The one attribute that a pod's author may write: the socket's file name.
const SOCKET_NAME: &str = "socketName";
/// By convention; Istio's proxies expect `socket`.
const DEFAULT_SOCKET: &str = "sds.sock";
const MAX_SOCKET_NAME: usize = 16;
/// CSI's limit for any string that does not say otherwise.
const MAX_ID_BYTES: usize = 128;
const MAX_PATH_BYTES: usize = 4096;

/// A volume to publish.
#[derive(Debug)]
pub(super) struct Publish {
    pub(super) target: PathBuf,
    pub(super) pod: Pod,
    pub(super) socket: String,
    /// The pod's token, if the kubelet brought one for our audience.
    pub(super) token: Option<Token>,
}

/// A volume to take away.
#[derive(Debug)]
pub(super) struct Unpublish {
    pub(super) volume_id: String,
    pub(super) target: PathBuf,
}

/// What the kubelet says of the pod.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Pod {
    uid: Uuid,
    namespace: String,
    name: String,
    service_account: String,
}

impl Publish {
    /// Reads a request. `audience`: of the token that is taken.
    pub(super) fn read(request: NodePublishVolumeRequest, audience: &str) -> Result<Self, VolumeError> {
        let NodePublishVolumeRequest { volume_id, target_path, volume_capability, readonly, mut secrets, volume_context: mut context } =
            request;
        // Taken out first, so that whatever is wrong with the rest, no error can quote them.
        let tokens = [secrets.remove(TOKENS), context.remove(TOKENS)].map(|text| text.map(Zeroizing::new));
        let access = volume_capability.and_then(|capability| capability.access_type);
        if matches!(access, Some(AccessType::Block(_))) {
            return Err(bad("the volume is a directory; it cannot be used as a block device"));
        }
        if context.get("csi.storage.k8s.io/ephemeral").is_none_or(|ephemeral| ephemeral != "true") {
            return Err(bad(
                "only inline volumes of a pod are served (`csi:` under the pod's `volumes`), and only if the CSIDriver object has `podInfoOnMount: true` and `volumeLifecycleModes: [Ephemeral]`",
            ));
        }
        if !readonly {
            return Err(bad("the volume must be read-only: write `readOnly: true` under the pod's `csi:`"));
        }
        let socket = context.remove(SOCKET_NAME).map_or_else(|| Ok(DEFAULT_SOCKET.to_owned()), socket_name)?;
        if let Some(unknown) = context.keys().find(|key| !key.starts_with(KUBELET)) {
            return Err(bad(&format!("the volume attribute {unknown:?} is unknown; there is {SOCKET_NAME:?} only")));
        }
        check_id(&volume_id)?;
        Ok(Self {
            target: path(target_path)?,
            pod: Pod::read(&context)?,
            socket,
            token: tokens.iter().flatten().find_map(|text| token(text, audience)),
        })
    }
}

impl Unpublish {
    /// Reads a request.
    pub(super) fn read(request: NodeUnpublishVolumeRequest) -> Result<Self, VolumeError> {
        check_id(&request.volume_id)?;
        Ok(Self { volume_id: request.volume_id, target: path(request.target_path)? })
    }
}

impl Pod {
    fn read(context: &HashMap<String, String>) -> Result<Self, VolumeError> {
        let fact = |name: &str| {
            let found = context.get(&format!("{KUBELET}{name}")).filter(|value| !value.is_empty());
            found
                .cloned()
                .ok_or_else(|| bad(&format!("the kubelet does not say {name}: does the CSIDriver object have `podInfoOnMount: true`?")))
        };
        let uid =
            fact("pod.uid")?.parse().map_err(|_| bad("the pod's UID is no UUID; pods that a node makes from files have no identity"))?;
        Ok(Self { uid, namespace: fact("pod.namespace")?, name: fact("pod.name")?, service_account: fact("serviceAccount.name")? })
    }

    /// Refuses a token that is of any other pod.
    pub(super) fn check(&self, applicant: &Applicant) -> Result<(), VolumeError> {
        let WorkloadKey { pod_uid, namespace, service_account } = applicant.workload().clone();
        let found = Self { uid: pod_uid, namespace, name: applicant.pod_name().to_owned(), service_account };
        if found == *self { Ok(()) } else { Err(VolumeError::OtherPod { said: self.to_string(), found: found.to_string() }) }
    }
}

impl fmt::Display for Pod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{} (UID {}, service account {})", self.namespace, self.name, self.uid, self.service_account)
    }
}

/// By audience; the kubelet writes it as JSON.
#[derive(Deserialize)]
struct Entry<'t> {
    /// Borrowed: the text is zeroized with what it is part of.
    #[serde(borrow)]
    token: Cow<'t, str>,
}

/// The token for `audience`, if there is one. Nothing that this could complain about may be quoted, so it does not complain.
fn token(tokens: &str, audience: &str) -> Option<Token> {
    let mut entries: HashMap<Cow<'_, str>, Entry<'_>> = serde_json::from_str(tokens).ok()?;
    let entry = entries.remove(audience).filter(|entry| !entry.token.is_empty())?;
    Some(Token::new(Zeroizing::new(entry.token.into_owned())))
}

fn socket_name(name: String) -> Result<String, VolumeError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    if name.is_empty() || name.len() > MAX_SOCKET_NAME || name.starts_with('.') || !name.chars().all(allowed) {
        let rule = format!("letters, digits, `.`, `-` and `_`, at most {MAX_SOCKET_NAME}, and not a `.` first");
        return Err(bad(&format!("the volume attribute {SOCKET_NAME:?} is no name for a socket: {rule}")));
    }
    Ok(name)
}

fn check_id(volume_id: &str) -> Result<(), VolumeError> {
    if volume_id.is_empty() || volume_id.len() > MAX_ID_BYTES {
        return Err(bad(&format!("the volume's ID has {} bytes; it must have 1 to {MAX_ID_BYTES}", volume_id.len())));
    }
    Ok(())
}

fn path(target: String) -> Result<PathBuf, VolumeError> {
    let length = target.len();
    let path = PathBuf::from(target);
    let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if !path.is_absolute() || !plain || length > MAX_PATH_BYTES || path.parent().is_none() {
        return Err(bad("the target path must be absolute, without `..`, and not the root"));
    }
    Ok(path)
}

fn bad(problem: &str) -> VolumeError {
    VolumeError::Request(problem.to_owned())
}

#[cfg(test)]
mod tests {
    use chancery_proto::csi::v1::VolumeCapability;
    use chancery_proto::csi::v1::volume_capability::{BlockVolume, MountVolume};

    use super::*;

    const POD: &str = "0b6a4b6e-7d43-4c51-9bb5-6a1f7f1a2c3d";

    /// As the kubelet of Kubernetes 1.37 asks.
    fn request() -> NodePublishVolumeRequest {
        let context =
            [("pod.name", "cart-0"), ("pod.namespace", "shop"), ("pod.uid", POD), ("serviceAccount.name", "cart"), ("ephemeral", "true")];
        NodePublishVolumeRequest {
            volume_id: "csi-1".into(),
            target_path: "/var/lib/kubelet/pods/p/volumes/kubernetes.io~csi/chancery/mount".into(),
            volume_capability: Some(VolumeCapability { access_type: Some(AccessType::Mount(MountVolume {})) }),
            readonly: true,
            secrets: [(TOKENS.to_owned(), tokens("from secrets"))].into(),
            volume_context: context.map(|(key, value)| (format!("{KUBELET}{key}"), value.to_owned())).into(),
        }
    }

    fn tokens(token: &str) -> String {
        format!(r#"{{"other":{{"token":"x","expirationTimestamp":"2026-11-23T00:00:00Z"}},"chancery":{{"token":"{token}"}}}}"#)
    }

    fn read(request: NodePublishVolumeRequest) -> Result<Publish, String> {
        Publish::read(request, "chancery").map_err(|error| error.to_string())
    }

    #[test]
    fn the_token_is_taken_from_the_secrets_first_and_else_from_the_context() {
        let secret = |request| read(request).unwrap().token.map(|token| token.secret().to_owned());
        let mut both = request();
        both.volume_context.insert(TOKENS.into(), tokens("from the context"));
        assert_eq!(secret(both.clone()).unwrap(), "from secrets");
        both.secrets.clear();
        assert_eq!(secret(both.clone()).unwrap(), "from the context");
        both.secrets.insert(TOKENS.into(), "garbage".into());
        assert_eq!(secret(both).unwrap(), "from the context");
        let none = NodePublishVolumeRequest { secrets: HashMap::new(), ..request() };
        assert_eq!(secret(none.clone()), None);
        let other = NodePublishVolumeRequest { secrets: [(TOKENS.to_owned(), r#"{"other":{"token":"x"}}"#.into())].into(), ..none };
        assert_eq!(secret(other), None);
    }

    #[test]
    fn a_pod_may_name_its_socket_as_istio_does_and_nothing_else() {
        let with = |key: &str, value: &str| {
            let mut request = request();
            request.volume_context.insert(key.into(), value.into());
            read(request)
        };
        assert_eq!(read(request()).unwrap().socket, "sds.sock");
        assert_eq!(with("socketName", "socket").unwrap().socket, "socket");
        for name in ["", ".", "..", ".hidden", "a/b", "seventeen-letters", "a b"] {
            assert!(with("socketName", name).unwrap_err().contains("no name for a socket"), "{name}");
        }
        assert!(with("sockName", "socket").unwrap_err().contains("\"sockName\" is unknown"));
        with("csi.storage.k8s.io/new", "of a later kubelet").unwrap();
    }

    #[test]
    fn what_no_pod_may_have_is_refused_with_the_remedy() {
        let refused = |change: &dyn Fn(&mut NodePublishVolumeRequest)| {
            let mut request = request();
            change(&mut request);
            read(request).unwrap_err()
        };
        assert!(refused(&|request| request.readonly = false).contains("readOnly: true"));
        assert!(refused(&|request| drop(request.volume_context.remove("csi.storage.k8s.io/ephemeral"))).contains("inline"));
        let block = VolumeCapability { access_type: Some(AccessType::Block(BlockVolume {})) };
        assert!(refused(&|request| request.volume_capability = Some(block)).contains("block"));
        for fact in ["pod.name", "pod.namespace", "pod.uid", "serviceAccount.name"] {
            let key = format!("{KUBELET}{fact}");
            assert!(refused(&|request| drop(request.volume_context.remove(&key))).contains("podInfoOnMount"), "{fact}");
        }
        assert!(refused(&|request| drop(request.volume_context.insert(format!("{KUBELET}pod.uid"), "../x".into()))).contains("UUID"));
        for target in ["", "mount", "/", "/var/../etc"] {
            assert!(refused(&|request| request.target_path = target.into()).contains("absolute"), "{target}");
        }
        assert!(refused(&|request| request.volume_id = String::new()).contains("ID"));
        assert!(refused(&|request| request.volume_id = "x".repeat(129)).contains("129 bytes"));
    }

    #[test]
    fn no_error_and_no_debug_output_shows_a_token() {
        let mut request = request();
        request.volume_context.insert(TOKENS.into(), tokens("from the context"));
        assert!(!format!("{request:?}").contains("from"));
        let read = Publish::read(request.clone(), "chancery").unwrap();
        assert!(!format!("{read:?}").contains("from"));
        request.readonly = false;
        assert!(!format!("{:?}", Publish::read(request, "chancery").unwrap_err()).contains("from"));
    }
}
