//! What `chancery-agent config example` prints.

/// Every key with its meaning; what is optional has its default.
pub const EXAMPLE: &str = r#"# chancery-agent's configuration. Unknown keys are refused.
# The log level applies again when this file changes or on SIGHUP. Everything else applies when the agent starts: a file that changes any of it
# is refused whole by a running agent, which goes on as it is and says so in its metrics and in `chancery-agent status` and `check`.

# The trust domain that the CA issues for.
trust_domain = "example.org"
# The cluster that this agent belongs to, as the CA's configuration calls it.
cluster = "east"
# Where the CA listens.
ca_address = "chancery-ca.chancery-system:8443"
# "node": serves every pod on its node; a stream carries its pod's token as `authorization: Bearer` metadata.
# "sidecar": serves the pod that it runs in; whoever reaches the socket is that pod.
mode = "node"
# The service-account token to join with (audience `chancery-agent`); as a sidecar the pod's own (audience `chancery`). Read anew for each use.
token_file = "/var/run/secrets/chancery/token"
# Of the workloads' keys and the agent's own: ecdsa-p256, ecdsa-p384, ed25519, rsa-2048, rsa-3072, rsa-4096.
key_type = "ecdsa-p256"
# Where trust, certificates, keys and what was seen of the ledger are kept for a restart; never a token. It must be on a memory-backed file
# system.
state_dir = "/run/chancery/agent-state"
# Accept a state_dir on a disk, which then holds private keys.
allow_disk_state = false
# Plain HTTP for /metrics, /livez and /readyz.
http_listen = "127.0.0.1:9465"
# For `chancery-agent status` and `chancery-agent streams`; for the agent's own user alone.
admin_socket = "/run/chancery/agent-admin.sock"

[trust]
# What the first contact is verified with: the roots as PEM, or instead of it `root_fingerprint`, the SHA-256 of one root in hexadecimal.
# Once the agent has a trust state from the CA, that alone counts. A bundle file is heard again only if it has a line
# `# sequence: N` with a larger number than that state; otherwise `chancery-agent reset` forgets the state.
bundle_file = "/etc/chancery/bundle.pem"

[sds]
# The socket for proxies.
socket = "/run/chancery/sds.sock"
# Its permissions. On a shared socket the token decides, so everybody may connect; a sidecar's socket is better narrowed.
socket_mode = 0o666

# The CSI plugin, which the kubelet calls to give each pod with a volume of this driver a socket of its own: whoever reaches that socket is
# that pod, and sends no token. Without this section there is none. The agent's pod must be privileged, with the kubelet's directory
# mounted with `mountPropagation: Bidirectional`. At most as many volumes as limits.workloads are published.
#[csi]
# The driver's name, as the CSIDriver object and the pods' volumes have it.
#driver = "csi.chancery.dev"
# Where the plugin's own socket is; by default below /var/lib/kubelet/plugins, under the driver's name.
#plugin_dir = "/var/lib/kubelet/plugins/csi.chancery.dev"
# Where the kubelet looks for plugins.
#registry_dir = "/var/lib/kubelet/plugins_registry"
# Where the pods' directories are; the node's own directory, not one of the agent's pod, or running pods lose their sockets with that.
#socket_root = "/run/chancery/pods"
# What the kubelet is told that this node is called: by default the environment variable NODE_NAME, else the host's name.
#node_id = "node-1"
# The audience of the pods' tokens, as the CSIDriver object's `tokenRequests` have it.
#audience = "chancery"

[renewal]
# The part of the lifetime after which a certificate is renewed; a random tenth is added.
from = 0.5
# How long a workload is kept, and renewed, after its last stream has gone.
keep = "5m"
# For each call to the CA; at least 5s, since the CA may have to ask the cluster about a new pod.
call_timeout = "10s"

[limits]
# More workloads at a time are refused.
workloads = 1000
# More connections of proxies at a time are refused; a proxy needs one, and two while it restarts.
connections = 2000
# More streams of one workload at a time are refused.
streams_per_workload = 64
# Requests that one call to the CA carries at most; 1 to 512.
batch = 64

[log]
# "text" or "json". Takes effect when the agent starts.
format = "text"
# error, warn, info, debug, trace, or directives such as "info,chancery=debug".
level = "info"
"#;
