//! Filling names from facts: a variable never becomes more than the one segment or label part that it stands for.

use std::str::FromStr;

use rustls_pki_types::DnsName;

use super::Workload;
use crate::attestation::RESERVED_SEGMENT;

/// The path of a SPIFFE ID, with variables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Template(Vec<Segment>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Segment {
    Literal(String),
    Variable(Variable),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Variable {
    Cluster,
    Namespace,
    ServiceAccount,
}

/// Why a text is no template.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// No path.
    #[error("{0:?} does not begin with `/`")]
    Path(String),
    /// A segment that is neither a plain word nor one variable.
    #[error(
        "the segment {0:?} is neither a plain word (a-z, A-Z, 0-9, `.`, `-`, `_`) nor exactly one of {{cluster}}, {{namespace}}, {{service_account}}"
    )]
    Segment(String),
    /// Two service accounts would share an ID.
    #[error("{0} must occur, or different service accounts would get the same ID")]
    Missing(&'static str),
    /// Chancery's own IDs are there.
    #[error("no workload may have an ID under /{RESERVED_SEGMENT}/")]
    Reserved,
}

impl Template {
    pub(super) fn fill<'a>(&'a self, workload: Workload<'a>) -> impl Iterator<Item = &'a str> {
        self.0.iter().map(move |segment| match segment {
            Segment::Literal(word) => word.as_str(),
            Segment::Variable(variable) => variable.of(workload),
        })
    }

    pub(super) fn has_cluster(&self) -> bool {
        self.has(Variable::Cluster)
    }

    fn has(&self, variable: Variable) -> bool {
        self.0.contains(&Segment::Variable(variable))
    }
}

impl FromStr for Template {
    type Err = TemplateError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let path = text.strip_prefix('/').ok_or_else(|| TemplateError::Path(text.to_owned()))?;
        let segments = path.split('/').map(|segment| {
            let plain = !matches!(segment, "" | "." | "..")
                && segment.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'));
            match Variable::ALL.into_iter().find(|variable| variable.placeholder() == segment) {
                Some(variable) => Ok(Segment::Variable(variable)),
                None if plain => Ok(Segment::Literal(segment.to_owned())),
                None => Err(TemplateError::Segment(segment.to_owned())),
            }
        });
        let template = Self(segments.collect::<Result<_, _>>()?);
        if template.0.first() == Some(&Segment::Literal(RESERVED_SEGMENT.to_owned())) {
            return Err(TemplateError::Reserved);
        }
        match [Variable::Namespace, Variable::ServiceAccount].into_iter().find(|variable| !template.has(*variable)) {
            Some(missing) => Err(TemplateError::Missing(missing.placeholder())),
            None => Ok(template),
        }
    }
}

impl Variable {
    const ALL: [Self; 3] = [Self::Cluster, Self::Namespace, Self::ServiceAccount];

    fn placeholder(self) -> &'static str {
        match self {
            Self::Cluster => "{cluster}",
            Self::Namespace => "{namespace}",
            Self::ServiceAccount => "{service_account}",
        }
    }

    fn of(self, workload: Workload<'_>) -> &str {
        match self {
            Self::Cluster => workload.cluster,
            Self::Namespace => workload.namespace,
            Self::ServiceAccount => workload.service_account,
        }
    }
}

/// A DNS name from a pattern with variables.
pub(super) fn fill_name(pattern: &str, workload: Workload<'_>) -> Result<String, String> {
    let mut name = pattern.to_owned();
    for variable in Variable::ALL {
        name = name.replace(variable.placeholder(), variable.of(workload));
    }
    // RFC 5280 §4.2.1.6: letters, digits and hyphens, and no dot at the end. Other names, and wildcards, are read differently by different
    // verifiers, so they are never certified.
    let is_preferred = !name.ends_with('.') && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.'));
    if !is_preferred || DnsName::try_from(name.as_str()).is_err() {
        return Err(format!("{pattern:?} does not give a DNS name but {name:?}"));
    }
    Ok(name.to_ascii_lowercase())
}
