//! Chancery's wire: the messages and services of `chancery.v1`, of Envoy's secret discovery and of the kubelet's plugins, generated from
//! `protos/`.
//!
//! Generated code, and [how it travels](codec). The rules about what the messages may say live in `chancery-identity` and in the two ends.
#![allow(missing_docs, clippy::all, clippy::pedantic)]

/// Between agents, operators and the CA, and the encoding of the ledger's entries.
pub mod chancery {
    /// Version 1.
    pub mod v1 {
        tonic::include_proto!("chancery.v1");
    }
}

/// The Container Storage Interface, as far as a node plugin needs it.
pub mod csi {
    /// Version 1.
    pub mod v1 {
        tonic::include_proto!("csi.v1");
    }
}

/// How the kubelet learns of a plugin.
pub mod pluginregistration {
    tonic::include_proto!("pluginregistration");
}

/// Envoy's xDS, as far as SDS needs it.
pub mod envoy {
    /// `envoy.config.core.v3`.
    pub mod config {
        pub mod core {
            pub mod v3 {
                tonic::include_proto!("envoy.config.core.v3");
            }
        }
    }
    /// `envoy.extensions.transport_sockets.tls.v3`.
    pub mod extensions {
        pub mod transport_sockets {
            pub mod tls {
                pub mod v3 {
                    tonic::include_proto!("envoy.extensions.transport_sockets.tls.v3");
                }
            }
        }
    }
    /// `envoy.service`.
    pub mod service {
        pub mod discovery {
            pub mod v3 {
                tonic::include_proto!("envoy.service.discovery.v3");
            }
        }
        pub mod secret {
            pub mod v3 {
                tonic::include_proto!("envoy.service.secret.v3");
            }
        }
    }
}

/// `google.rpc`.
pub mod google {
    pub mod rpc {
        tonic::include_proto!("google.rpc");
    }
}

pub mod any;
pub mod codec;
mod redacted;
