//! Who is on the other end of a connection, told by the SPIFFE ID that TLS verified.

use chancery_identity::{SpiffeId, SpiffeIdError, TrustDomain};
use chancery_proto::chancery::v1::Role;
use uuid::Uuid;

/// The first path segment of every ID that Chancery's own parts have; no workload gets one under it.
pub const RESERVED_SEGMENT: &str = "chancery";

/// What a holder of one of our own SVIDs speaks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Holder {
    /// Every pod on this node.
    Agent {
        /// The node's UID.
        node: Uuid,
    },
    /// This pod alone.
    Sidecar {
        /// The pod's UID.
        pod: Uuid,
    },
}

/// An agent or sidecar, as TLS verified it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Caller {
    id: SpiffeId,
    cluster: String,
    holder: Holder,
}

/// The peer is none of ours.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is neither an agent nor a sidecar of this trust domain")]
pub struct NotACaller(SpiffeId);

impl Caller {
    /// Reads a peer's ID.
    ///
    /// # Errors
    /// If it is of another trust domain, or neither an agent's nor a sidecar's.
    pub fn from_peer(id: &SpiffeId, trust_domain: &TrustDomain) -> Result<Self, NotACaller> {
        let refused = || NotACaller(id.clone());
        if id.trust_domain() != trust_domain {
            return Err(refused());
        }
        let segments: Vec<&str> = id.segments().collect();
        let [RESERVED_SEGMENT, role, cluster, uid] = segments[..] else { return Err(refused()) };
        let uid = Uuid::parse_str(uid).map_err(|_| refused())?;
        let holder = match role {
            "agent" => Holder::Agent { node: uid },
            "sidecar" => Holder::Sidecar { pod: uid },
            _ => return Err(refused()),
        };
        Ok(Self { id: id.clone(), cluster: cluster.to_owned(), holder })
    }

    pub(super) fn new(trust_domain: &TrustDomain, cluster: &str, holder: Holder) -> Result<Self, SpiffeIdError> {
        let (role, uid) = match holder {
            Holder::Agent { node } => ("agent", node),
            Holder::Sidecar { pod } => ("sidecar", pod),
        };
        let id = trust_domain.member([RESERVED_SEGMENT, role, cluster, &uid.to_string()])?;
        Ok(Self { id, cluster: cluster.to_owned(), holder })
    }

    /// `…/chancery/agent/<cluster>/<node uid>` or `…/chancery/sidecar/<cluster>/<pod uid>`.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// The cluster that it runs in.
    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    /// What it speaks for.
    pub fn holder(&self) -> Holder {
        self.holder
    }

    /// As on the wire.
    pub fn role(&self) -> Role {
        match self.holder {
            Holder::Agent { .. } => Role::Agent,
            Holder::Sidecar { .. } => Role::Sidecar,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0b9a2c5e-8f5e-4f51-9c0e-6f1d6f0c7a11";

    fn read(id: &str) -> Result<Caller, NotACaller> {
        Caller::from_peer(&id.parse().unwrap(), &"example.org".parse().unwrap())
    }

    #[test]
    fn agents_and_sidecars_are_read_from_their_ids() {
        let agent = read(&format!("spiffe://example.org/chancery/agent/east/{UID}")).unwrap();
        assert_eq!((agent.cluster(), agent.role()), ("east", Role::Agent));
        assert_eq!(agent.holder(), Holder::Agent { node: UID.parse().unwrap() });
        let sidecar = read(&format!("spiffe://example.org/chancery/sidecar/east/{UID}")).unwrap();
        assert_eq!(sidecar.holder(), Holder::Sidecar { pod: UID.parse().unwrap() });
    }

    #[test]
    fn nobody_else_is_a_caller() {
        for id in [
            format!("spiffe://other.org/chancery/agent/east/{UID}"),
            "spiffe://example.org/ns/shop/sa/cart".to_owned(),
            "spiffe://example.org/chancery/ca".to_owned(),
            "spiffe://example.org/chancery/agent/east/node-1".to_owned(),
            format!("spiffe://example.org/chancery/agent/east/{UID}/more"),
            format!("spiffe://example.org/chancery/admin/east/{UID}"),
            "spiffe://example.org".to_owned(),
        ] {
            assert!(read(&id).is_err(), "{id}");
        }
    }
}
