//! `Debug` for the messages that carry tokens or private keys: they say that something is there, never what.

use std::fmt;

use crate::chancery::v1::{JoinRequest, WorkloadRequest};
use crate::csi::v1::NodePublishVolumeRequest;
use crate::envoy::config::core::v3::{DataSource, data_source::Specifier};

impl fmt::Debug for JoinRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinRequest")
            .field("role", &self.role)
            .field("cluster", &self.cluster)
            .field("request_id", &self.request_id)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for WorkloadRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkloadRequest").field("request_id", &self.request_id).field("reason", &self.reason).finish_non_exhaustive()
    }
}

impl fmt::Debug for NodePublishVolumeRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Before Kubernetes 1.35 the tokens lie among the facts of the context.
        f.debug_struct("NodePublishVolumeRequest")
            .field("volume_id", &self.volume_id)
            .field("target_path", &self.target_path)
            .field("readonly", &self.readonly)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for DataSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let length = match &self.specifier {
            Some(Specifier::InlineBytes(bytes)) => bytes.len(),
            Some(Specifier::InlineString(text) | Specifier::Filename(text)) => text.len(),
            None => 0,
        };
        write!(f, "DataSource({length} bytes)")
    }
}
