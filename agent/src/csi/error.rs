//! What goes wrong with a volume, and what the kubelet is told.

use std::path::{Path, PathBuf};

use chancery_process::files::FileError;
use tonic::{Code, Status};

use crate::svids::AttachError;

/// Why a call of the kubelet's failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VolumeError {
    /// The pod asks for something that there is not.
    #[error("{0}")]
    Request(String),
    /// The kubelet brought no token.
    #[error(
        "the kubelet brought no token with the audience {0:?}: does the CSIDriver object list it under `tokenRequests`, with `requiresRepublish: true` and `podInfoOnMount: true`?"
    )]
    NoToken(String),
    /// The token is not good, or the agent cannot tell.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// The token is another pod's.
    #[error("the kubelet says that the volume is for {said}, but the token that it brought is of {found}")]
    OtherPod {
        /// The pod of the call.
        said: String,
        /// The pod of the token.
        found: String,
    },
    /// A volume is asked for where it is not.
    #[error("the volume is published at {} already", .0.display())]
    OtherTarget(PathBuf),
    /// The limit is reached.
    #[error("this agent has {0} volumes already; raise limits.workloads")]
    TooMany(usize),
    /// A call for the same volume is under way.
    #[error("another call for this volume is under way")]
    UnderWay,
    /// A file, a directory or a socket.
    #[error(transparent)]
    File(#[from] FileError),
    /// What the plugin itself did not expect.
    #[error("{0}")]
    Internal(String),
}

impl VolumeError {
    pub(super) fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |error| FileError::Io { path, action, error }.into()
    }

    /// A stable word for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Request(_) => "bad_request",
            Self::NoToken(_) => "no_token",
            Self::Attach(error) => error.reason(),
            Self::OtherPod { .. } => "other_pod",
            Self::OtherTarget(_) => "other_target",
            Self::TooMany(_) => "too_many",
            Self::UnderWay => "under_way",
            Self::File(_) => "file",
            Self::Internal(_) => "internal",
        }
    }

    /// For the kubelet. `in_use`: the pod has the volume already; an error that the kubelet takes for final would cut it off for good.
    pub(super) fn status(&self, in_use: bool) -> Status {
        let code = match self {
            Self::Request(_) => Code::InvalidArgument,
            Self::Attach(AttachError::Unauthenticated { .. }) => Code::Unauthenticated,
            Self::OtherPod { .. } | Self::Attach(AttachError::WrongPlace(_)) => Code::PermissionDenied,
            Self::OtherTarget(_) => Code::FailedPrecondition,
            Self::Attach(AttachError::Busy(_)) | Self::TooMany(_) => Code::ResourceExhausted,
            Self::UnderWay => Code::Aborted,
            Self::NoToken(_) | Self::Attach(_) => Code::Unavailable,
            Self::File(_) | Self::Internal(_) => Code::Internal,
        };
        // What the kubelet's `isFinalError` leaves out.
        let is_final = !matches!(code, Code::Unavailable | Code::ResourceExhausted | Code::Aborted);
        Status::new(if in_use && is_final { Code::Unavailable } else { code }, self.to_string())
    }
}
