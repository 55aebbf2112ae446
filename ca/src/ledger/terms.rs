//! Under which words an issuance can be found.
//!
//! Few and small: each is a key in the index of every entry. What has no term of its own (a service account's name without its namespace, a
//! time) is answered from these and by looking at the entries. The numbers of the dimensions are part of the index's format.

use bytes::Bytes;
use chancery_identity::SpiffeId;

use super::entry::{Body, Entry, Issuance};
use super::leaf::Leaf;
use crate::store::{Term, Terms};

/// Which question a term answers. Numbers are never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Dimension {
    Serial = 1,
    SpiffeId = 2,
    PodUid = 3,
    /// The pod's name without its namespace: such names are all but unique.
    PodName = 4,
    Node = 5,
    /// SPIFFE ID of the agent or sidecar that asked.
    Asker = 6,
    /// `name/namespace`: so a prefix finds the name in every namespace.
    ServiceAccount = 7,
    Namespace = 8,
    TokenId = 9,
    /// What is no issuance, by the kind of its body.
    Kind = 10,
    /// First half of the issuing certificate's fingerprint. Neighbours share it and the root's, and so most of a posting.
    IssuingCertificate = 11,
    /// First half of the trust root's fingerprint.
    Root = 12,
}

/// The dimensions whose values can be listed by prefix; a store is to be opened with them.
pub const DICTIONARY_DIMENSIONS: [u8; 4] =
    [Dimension::SpiffeId as u8, Dimension::ServiceAccount as u8, Dimension::IssuingCertificate as u8, Dimension::Root as u8];

/// Tells the terms of the ledger's entries; a store is to be opened with it.
#[derive(Clone, Copy, Debug, Default)]
pub struct EntryTerms;

impl Terms for EntryTerms {
    fn terms(&self, entry: &Bytes) -> Vec<Term> {
        // An entry of a newer version has no terms here; the newer Chancery that reads it builds its index anew.
        let Ok(entry) = Entry::decode(entry.clone()) else { return Vec::new() };
        match entry.body {
            Body::Issuance(issuance) => issuance_terms(&issuance),
            Body::Act(_) => vec![kind("act")],
            Body::Start(_) => vec![kind("start")],
            Body::Configuration(_) => vec![kind("configuration")],
            Body::Authority(_) => vec![kind("authority")],
            Body::State(_) => vec![kind("state")],
        }
    }
}

fn issuance_terms(issuance: &Issuance) -> Vec<Term> {
    let mut terms = Vec::with_capacity(11);
    terms.push(term(Dimension::IssuingCertificate, issuance.issuing_certificate));
    terms.push(term(Dimension::Root, issuance.root));
    if let Ok((serial, spiffe_id)) = Leaf::read_names(&issuance.certificate) {
        terms.push(term(Dimension::Serial, serial.0));
        let asker = spiffe_id.parse::<SpiffeId>().ok().and_then(|id| issuance.asker(id.trust_domain()));
        terms.extend(asker.map(|asker| term(Dimension::Asker, asker.as_str())));
        terms.push(Term { dimension: Dimension::SpiffeId as u8, value: spiffe_id.into() });
    }
    terms.extend(issuance.pod_uid.map(|uid| term(Dimension::PodUid, uid.as_bytes())));
    if !issuance.service_account.is_empty() {
        terms.push(service_account(&issuance.service_account, &issuance.namespace));
    }
    let names = [
        (Dimension::PodName, &issuance.pod),
        (Dimension::Node, &issuance.node),
        (Dimension::Namespace, &issuance.namespace),
        (Dimension::TokenId, &issuance.token_id),
    ];
    terms.extend(names.into_iter().filter(|(_, name)| !name.is_empty()).map(|(dimension, name)| term(dimension, name)));
    terms
}

/// The term of `value` in `dimension`.
pub(super) fn term(dimension: Dimension, value: impl AsRef<[u8]>) -> Term {
    Term { dimension: dimension as u8, value: Bytes::copy_from_slice(value.as_ref()) }
}

/// The term of a service account in a namespace.
pub(super) fn service_account(name: &str, namespace: &str) -> Term {
    term(Dimension::ServiceAccount, format!("{name}/{namespace}"))
}

/// The term of the entries of a kind that is no issuance.
pub(super) fn kind(kind: &'static str) -> Term {
    Term { dimension: Dimension::Kind as u8, value: Bytes::from_static(kind.as_bytes()) }
}
