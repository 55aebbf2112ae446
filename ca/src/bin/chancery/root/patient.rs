//! Questions to a CA that may be away for a while: asked again, over a new connection, until it answers.

use std::time::{Duration, Instant};

use chancery_proto::chancery::v1::root_service_client::RootServiceClient;
use chancery_proto::chancery::v1::{ListRootsRequest, ListRootsResponse};
use tonic::Code;

use super::Roots;
use crate::client::{self, CliError, Way};
use crate::output::remark;
use crate::revocation::Revocations;

/// How often it is asked.
const AGAIN: Duration = Duration::from_millis(500);

/// The services of a CA that a walk of roots asks.
#[derive(Clone, Debug)]
pub(super) struct Services {
    pub(super) roots: Roots,
    pub(super) revocations: Revocations,
}

/// A CA that may go away, and come back.
pub(super) struct Patient<'a> {
    way: &'a Way,
    pub(super) ca: Services,
    /// That it is away has been said.
    is_told: bool,
}

impl<'a> Patient<'a> {
    pub(super) async fn connect(way: &'a Way) -> Result<Self, CliError> {
        Ok(Self { way, ca: Services::connect(way).await?, is_told: false })
    }

    /// Asks again while the CA is away, but not beyond `until`.
    pub(super) async fn ask<T>(
        &mut self,
        until: Option<Instant>,
        question: impl AsyncFn(&mut Services) -> Result<T, CliError>,
    ) -> Result<T, CliError> {
        loop {
            let away = match question(&mut self.ca).await {
                Err(CliError::Refused(status)) if is_away(status.code()) => status,
                answer => {
                    self.is_told &= answer.is_err();
                    return answer;
                }
            };
            if until.is_some_and(|until| Instant::now() >= until) {
                return Err(CliError::Failed(format!("the CA is away: {}", away.message())));
            }
            if !std::mem::replace(&mut self.is_told, true) {
                remark(format!("the CA is away, and is asked again: {}", away.message()));
            }
            tokio::time::sleep(AGAIN).await;
            if let Ok(ca) = Services::connect(self.way).await {
                self.ca = ca;
            }
        }
    }

    pub(super) async fn list(&mut self, until: Option<Instant>) -> Result<ListRootsResponse, CliError> {
        self.ask(until, async |ca| Ok(ca.roots.list_roots(ListRootsRequest {}).await?.into_inner())).await
    }
}

impl Services {
    async fn connect(way: &Way) -> Result<Self, CliError> {
        let channel = client::channel(way).await?;
        Ok(Self { roots: RootServiceClient::new(channel.clone()), revocations: Revocations::new(channel) })
    }
}

fn is_away(code: Code) -> bool {
    matches!(code, Code::Unavailable | Code::Unknown | Code::Cancelled)
}
