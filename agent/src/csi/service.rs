//! The gRPC services that the kubelet calls: registration, `Identity` and `Node`. They translate and call inward; no request is ever logged.

use std::io;
use std::sync::Arc;

use chancery_proto::csi::v1 as wire;
use chancery_proto::csi::v1::identity_server::{Identity, IdentityServer};
use chancery_proto::csi::v1::node_server::{Node, NodeServer};
use chancery_proto::pluginregistration::registration_server::{Registration, RegistrationServer};
use chancery_proto::pluginregistration::{InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse};
use futures_util::stream::{self, Stream};
use tokio::io::join;
use tokio::net::UnixListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use super::authority::AnyAuthority;
use super::{Plugin, Stage};
use crate::accepted::{Accepted, Listener};

/// As the kubelet names it.
const PLUGIN_TYPE: &str = "CSIPlugin";
const CSI_VERSION: &str = "1.0.0";
/// The kubelet opens a connection for each call; more wait in the listener.
const MAX_CONNECTIONS: usize = 256;
const MAX_STREAMS_PER_CONNECTION: u32 = 64;
/// Of a request; the pod's tokens are the largest part.
const MAX_REQUEST_BYTES: usize = 256 * 1024;

/// Serves the kubelet's calls for volumes until `shutdown`.
pub(super) async fn serve(plugin: &Plugin, listener: UnixListener, shutdown: &CancellationToken) -> Result<(), tonic::transport::Error> {
    let node = NodeServer::new(plugin.clone()).max_decoding_message_size(MAX_REQUEST_BYTES);
    let routes = server().add_service(IdentityServer::new(plugin.clone())).add_service(node);
    routes.serve_with_incoming_shutdown(incoming(listener), shutdown.clone().cancelled_owned()).await
}

/// Tells the kubelet of the plugin, whenever it asks, until `shutdown`.
pub(super) async fn announce(plugin: &Plugin, listener: UnixListener, shutdown: &CancellationToken) -> Result<(), tonic::transport::Error> {
    let routes = server().add_service(RegistrationServer::new(plugin.clone()));
    routes.serve_with_incoming_shutdown(incoming(listener), shutdown.clone().cancelled_owned()).await
}

fn server() -> Server {
    Server::builder().max_concurrent_streams(MAX_STREAMS_PER_CONNECTION)
}

#[tonic::async_trait]
impl Registration for Plugin {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        let endpoint = self.0.endpoint.path();
        let endpoint = endpoint.to_str().ok_or_else(|| Status::internal(format!("{} is not UTF-8", endpoint.display())))?;
        Ok(Response::new(PluginInfo {
            r#type: PLUGIN_TYPE.to_owned(),
            name: self.0.settings.driver.clone(),
            endpoint: endpoint.to_owned(),
            supported_versions: vec![CSI_VERSION.to_owned()],
        }))
    }

    async fn notify_registration_status(
        &self,
        request: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let RegistrationStatus { plugin_registered, error } = request.into_inner();
        if plugin_registered {
            tracing::info!(driver = self.0.settings.driver, "the kubelet has registered the CSI driver");
            self.0.stage.send_replace(Stage::Registered);
        } else {
            self.0.stage.send_replace(Stage::Refused(error));
        }
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}

#[tonic::async_trait]
impl Identity for Plugin {
    async fn get_plugin_info(&self, _: Request<wire::GetPluginInfoRequest>) -> Result<Response<wire::GetPluginInfoResponse>, Status> {
        let (name, vendor_version) = (self.0.settings.driver.clone(), env!("CARGO_PKG_VERSION").to_owned());
        Ok(Response::new(wire::GetPluginInfoResponse { name, vendor_version }))
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<wire::GetPluginCapabilitiesRequest>,
    ) -> Result<Response<wire::GetPluginCapabilitiesResponse>, Status> {
        Ok(Response::new(wire::GetPluginCapabilitiesResponse {}))
    }

    async fn probe(&self, _: Request<wire::ProbeRequest>) -> Result<Response<wire::ProbeResponse>, Status> {
        Ok(Response::new(wire::ProbeResponse { ready: Some(true) }))
    }
}

#[tonic::async_trait]
impl Node for Plugin {
    async fn node_publish_volume(
        &self,
        request: Request<wire::NodePublishVolumeRequest>,
    ) -> Result<Response<wire::NodePublishVolumeResponse>, Status> {
        self.0.volumes.publish(request.into_inner()).await?;
        Ok(Response::new(wire::NodePublishVolumeResponse {}))
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<wire::NodeUnpublishVolumeRequest>,
    ) -> Result<Response<wire::NodeUnpublishVolumeResponse>, Status> {
        self.0.volumes.unpublish(request.into_inner()).await?;
        Ok(Response::new(wire::NodeUnpublishVolumeResponse {}))
    }

    async fn node_get_capabilities(
        &self,
        _: Request<wire::NodeGetCapabilitiesRequest>,
    ) -> Result<Response<wire::NodeGetCapabilitiesResponse>, Status> {
        Ok(Response::new(wire::NodeGetCapabilitiesResponse {}))
    }

    async fn node_get_info(&self, _: Request<wire::NodeGetInfoRequest>) -> Result<Response<wire::NodeGetInfoResponse>, Status> {
        Ok(Response::new(wire::NodeGetInfoResponse { node_id: self.0.settings.node_id.clone() }))
    }
}

fn incoming(listener: UnixListener) -> impl Stream<Item = io::Result<Accepted>> + Send {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    stream::unfold((Listener::new(listener), places), |(listener, places)| async move {
        let place = places.clone().acquire_owned().await.ok()?;
        let (read, write) = listener.accept().await.into_split();
        Some((Ok(Accepted::new(join(AnyAuthority::new(read), write), place)), (listener, places)))
    })
}
