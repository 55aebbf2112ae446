//! The published volumes: each call of the kubelet's for one of them, from beginning to end.
//!
//! Calls for one volume never overlap: a second is told that the first is under way. A call goes on to its end even when the kubelet no longer
//! waits for it, so that it leaves nothing halfway.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use chancery_proto::csi::v1::{NodePublishVolumeRequest, NodeUnpublishVolumeRequest};
use tokio::task::JoinError;
use tonic::Status;

use super::error::VolumeError;
use super::kept::{Facts, Kept};
use super::mounts::{self, Mounts, View};
use super::request::{Pod, Publish, Unpublish};
use super::volume::{Directories, Served};
use super::{Settings, Sockets, VolumeStatus};
use crate::svids::{Svids, Tenant, Token};
use crate::telemetry::{Metrics, Outcome};

/// In the agent's private directory: where the pods' directories are mounted once more.
const VIEW: &str = "shown";

/// All volumes of the node.
pub(super) struct Volumes {
    svids: Svids,
    sockets: Arc<dyn Sockets>,
    kept: Kept,
    directories: Directories,
    view: Arc<View>,
    audience: String,
    most: usize,
    metrics: Metrics,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    published: HashMap<String, Volume>,
    /// A call for these is under way.
    claimed: HashSet<String>,
}

/// A published volume.
struct Volume {
    facts: Facts,
    tenant: Tenant,
    served: Served,
    problem: String,
}

/// The right to change one volume.
struct Claim {
    volumes: Arc<Volumes>,
    volume_id: String,
}

impl Volumes {
    pub(super) fn new(settings: &Settings, kept: Kept, svids: Svids, sockets: Arc<dyn Sockets>, metrics: Metrics) -> Self {
        Self {
            svids,
            sockets,
            kept,
            directories: Directories::new(settings.socket_root.clone()),
            view: Arc::new(View::new(settings.socket_root.clone(), settings.state_dir.join(VIEW))),
            audience: settings.audience.clone(),
            most: settings.max_volumes,
            metrics,
            state: Mutex::default(),
        }
    }

    /// Serves the pods again that had their volumes when the plugin ended, and forgets those whose volumes are gone.
    pub(super) async fn restore(self: &Arc<Self>) {
        let mounts = match Mounts::read() {
            Ok(mounts) => mounts,
            Err(error) => return tracing::error!(%error, "no pod is served before the kubelet has told of it again"),
        };
        for facts in self.kept.load() {
            let (volume_id, pod) = (facts.volume_id.clone(), facts.pod.clone());
            let restored = if mounts.has(&facts.target) { self.restore_one(facts).await } else { self.forget(&volume_id) };
            if let Err(error) = restored {
                tracing::warn!(volume_id, pod, %error, "the pod is not served before the kubelet has told of it again");
            }
        }
        tracing::info!(volumes = self.lock().published.len(), "pods from before the restart are served");
    }

    /// The bound is on those that are being published, too: each has a claim.
    fn has_room(&self) -> Result<(), VolumeError> {
        let state = self.lock();
        let coming = state.claimed.iter().filter(|claimed| !state.published.contains_key(*claimed)).count();
        if state.published.len() + coming > self.most { Err(VolumeError::TooMany(self.most)) } else { Ok(()) }
    }

    async fn restore_one(self: &Arc<Self>, facts: Facts) -> Result<(), VolumeError> {
        let claim = Claim::new(self, &facts.volume_id)?;
        let tenant = self.svids.readmit(facts.workload.clone(), facts.pod.clone()).await?;
        let directory = self.directories.create(facts.workload.pod_uid, &facts.volume_id)?;
        let served = Served::start(&directory, &facts.socket, tenant.clone(), &*self.sockets)?;
        claim.put(Volume { facts, tenant, served, problem: String::new() });
        Ok(())
    }

    /// `NodePublishVolume`.
    pub(super) async fn publish(self: &Arc<Self>, request: NodePublishVolumeRequest) -> Result<(), Status> {
        let (volume_id, target) = (request.volume_id.clone(), PathBuf::from(&request.target_path));
        let again = self.lock().published.contains_key(&volume_id);
        let volumes = self.clone();
        let published = to_its_end(async move {
            let claim = Claim::new(&volumes, &request.volume_id)?;
            claim.publish(Publish::read(request, &volumes.audience)?).await
        });
        let published = published.await;
        let outcome = match &published {
            Ok(()) if again => "republished",
            Ok(()) => "published",
            Err(error) => error.reason(),
        };
        self.metrics.csi_publishes.get_or_create(&Outcome { outcome }).inc();
        if let Some(volume) = self.lock().published.get_mut(&volume_id) {
            volume.problem = published.as_ref().err().map(ToString::to_string).unwrap_or_default();
        }
        published.map_err(|error| {
            // A plugin that has lost its memory still finds the pod's mount.
            let in_use = again || Mounts::read().is_ok_and(|mounts| mounts.has(&target));
            tracing::warn!(volume_id, target = %target.display(), in_use, %error, "a volume was not published");
            error.status(in_use)
        })
    }

    /// `NodeUnpublishVolume`.
    pub(super) async fn unpublish(self: &Arc<Self>, request: NodeUnpublishVolumeRequest) -> Result<(), Status> {
        let volumes = self.clone();
        let unpublished = to_its_end(async move {
            let Unpublish { volume_id, target } = Unpublish::read(request)?;
            Claim::new(&volumes, &volume_id)?.unpublish(target).await
        });
        unpublished.await.map_err(|error| {
            tracing::warn!(%error, "a volume was not taken away");
            error.status(false)
        })
    }

    /// For `chancery-agent status`.
    pub(super) fn list(&self) -> Vec<VolumeStatus> {
        let mut all: Vec<_> = self.lock().published.values().map(Volume::status).collect();
        all.sort_by(|a, b| (&a.namespace, &a.pod, &a.socket).cmp(&(&b.namespace, &b.pod, &b.socket)));
        all
    }

    async fn show(&self, directory: PathBuf, target: PathBuf) -> Result<(), VolumeError> {
        let view = self.view.clone();
        blocking(move || view.show(&directory, &target)).await
    }

    fn forget(&self, volume_id: &str) -> Result<(), VolumeError> {
        self.directories.remove(volume_id)?;
        self.kept.forget(volume_id)
    }

    /// Nothing that is done under this lock can panic halfway.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Claim {
    fn new(volumes: &Arc<Volumes>, volume_id: &str) -> Result<Self, VolumeError> {
        if !volumes.lock().claimed.insert(volume_id.to_owned()) {
            return Err(VolumeError::UnderWay);
        }
        Ok(Self { volumes: volumes.clone(), volume_id: volume_id.to_owned() })
    }

    async fn publish(&self, wanted: Publish) -> Result<(), VolumeError> {
        if let Some(mut volume) = self.take() {
            let published = self.publish_again(&mut volume, wanted).await;
            self.put(volume);
            return published;
        }
        let target = wanted.target.clone();
        let volume = self.publish_first(wanted).await.inspect_err(|_| self.clean_up(&target))?;
        let socket = volume.served.path().display();
        tracing::info!(namespace = volume.facts.workload.namespace, pod = volume.facts.pod, %socket, "a volume was published");
        self.put(volume);
        Ok(())
    }

    async fn publish_first(&self, wanted: Publish) -> Result<Volume, VolumeError> {
        let volumes = &self.volumes;
        volumes.has_room()?;
        let tenant = self.admit(wanted.token, &wanted.pod).await?;
        let workload = tenant.workload().clone();
        let directory = volumes.directories.create(workload.pod_uid, &self.volume_id)?;
        let served = Served::start(&directory, &wanted.socket, tenant.clone(), &*volumes.sockets)?;
        volumes.show(directory, wanted.target.clone()).await?;
        let pod = tenant.pod_name().to_owned();
        let facts = Facts::new(self.volume_id.clone(), wanted.target, workload, pod, wanted.socket);
        volumes.kept.write(&facts)?;
        Ok(Volume { facts, tenant, served, problem: String::new() })
    }

    /// Repairs what is missing, whether there is a token or not, and takes the token over.
    async fn publish_again(&self, volume: &mut Volume, wanted: Publish) -> Result<(), VolumeError> {
        let volumes = &self.volumes;
        if volume.facts.target != wanted.target {
            return Err(VolumeError::OtherTarget(volume.facts.target.clone()));
        }
        let directory = volumes.directories.create(volume.facts.workload.pod_uid, &self.volume_id)?;
        if !volume.served.is_there() {
            tracing::warn!(socket = %volume.served.path().display(), "the socket was removed by somebody; it is made again");
            volume.served = Served::start(&directory, &volume.facts.socket, volume.tenant.clone(), &*volumes.sockets)?;
        }
        volumes.show(directory, wanted.target).await?;
        if !volumes.kept.has(&self.volume_id) {
            volumes.kept.write(&volume.facts)?;
        }
        volume.tenant = self.admit(wanted.token, &wanted.pod).await?;
        Ok(())
    }

    async fn admit(&self, token: Option<Token>, pod: &Pod) -> Result<Tenant, VolumeError> {
        let token = token.ok_or_else(|| VolumeError::NoToken(self.volumes.audience.clone()))?;
        let applicant = self.volumes.svids.recognise(token).await?;
        pod.check(&applicant)?;
        Ok(applicant.admit().await?)
    }

    async fn unpublish(&self, target: PathBuf) -> Result<(), VolumeError> {
        let volume = self.take();
        if let Err(error) = blocking(move || mounts::hide(&target)).await {
            if let Some(volume) = volume {
                self.put(volume);
            }
            return Err(error);
        }
        if let Some(Volume { facts, tenant, served, .. }) = volume {
            drop(served);
            tracing::info!(namespace = facts.workload.namespace, pod = facts.pod, "a volume was taken away");
            tenant.leave().await;
        }
        self.volumes.forget(&self.volume_id)
    }

    /// After a volume was not published for the first time: what was made for it goes, unless a pod has it mounted.
    fn clean_up(&self, target: &Path) {
        let in_use = Mounts::read().is_ok_and(|mounts| mounts.has(target));
        if !in_use && let Err(error) = self.volumes.forget(&self.volume_id) {
            tracing::debug!(volume_id = self.volume_id, %error, "something of an unpublished volume is left");
        }
    }

    fn take(&self) -> Option<Volume> {
        self.volumes.lock().published.remove(&self.volume_id)
    }

    fn put(&self, volume: Volume) {
        self.volumes.lock().published.insert(self.volume_id.clone(), volume);
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut state = self.volumes.lock();
        state.claimed.remove(&self.volume_id);
        self.volumes.metrics.csi_volumes.set(i64::try_from(state.published.len()).unwrap_or(i64::MAX));
    }
}

impl Volume {
    fn status(&self) -> VolumeStatus {
        let Facts { workload, target, pod, .. } = &self.facts;
        VolumeStatus {
            namespace: workload.namespace.clone(),
            pod: pod.clone(),
            pod_uid: workload.pod_uid,
            service_account: workload.service_account.clone(),
            socket: self.served.path().to_owned(),
            target: target.clone(),
            problem: self.problem.clone(),
        }
    }
}

impl fmt::Debug for Volumes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Volumes").finish_non_exhaustive()
    }
}

/// The kernel may take its time.
async fn blocking(work: impl FnOnce() -> Result<(), VolumeError> + Send + 'static) -> Result<(), VolumeError> {
    ended(tokio::task::spawn_blocking(work).await)
}

/// Goes on even if nobody waits any longer.
async fn to_its_end(call: impl Future<Output = Result<(), VolumeError>> + Send + 'static) -> Result<(), VolumeError> {
    ended(tokio::spawn(call).await)
}

fn ended(task: Result<Result<(), VolumeError>, JoinError>) -> Result<(), VolumeError> {
    task.unwrap_or_else(|error| Err(VolumeError::Internal(format!("the call has failed: {error}"))))
}
