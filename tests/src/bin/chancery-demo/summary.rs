//! What the demo showed, counted by those who must know: the ledger, the proxies, the client.

use std::io::Write;

use chancery_tests::load::Counts;
use chancery_tests::mesh::Mesh;
use chancery_tests::{Error, Result};

use crate::Watched;

/// The demo's outcome.
pub(crate) struct Summary {
    issued: usize,
    rotations: Vec<(String, u32)>,
    requests: u64,
    failed: u64,
    failures: Vec<String>,
    handshakes: u64,
    reused: u64,
    unknown: Vec<String>,
    identities: String,
}

impl Summary {
    pub(crate) async fn gather(mesh: &Mesh, watched: &[Watched], counts: &Counts) -> Result<Self> {
        let issued = mesh.ca.ask(&["identity", "list", "--limit", "10000"])?;
        let issued = issued.as_array().ok_or("the list of identities is not a list")?;
        let in_ledger = |one: &&Watched| issued.iter().any(|identity| identity["serial"] == one.certificate.serial);
        let client = &watched.first().ok_or("no workload")?.workload.envoy;
        Ok(Self {
            issued: issued.len(),
            rotations: watched.iter().map(|one| (one.workload.name(), one.rotations)).collect(),
            requests: counts.ok() + counts.failed(),
            failed: counts.failed(),
            failures: counts.failures(),
            handshakes: client.stat("cluster.outbound.ssl.handshake").await?,
            reused: client.stat("cluster.outbound.ssl.session_reused").await?,
            unknown: watched.iter().filter(|one| !in_ledger(one)).map(|one| one.certificate.serial.clone()).collect(),
            identities: mesh.ca.chancery(&["identity", "list"])?,
        })
    }

    /// No request failed, each was a handshake of its own, each proxy saw rotations, and the ledger knows what they hold.
    pub(crate) fn good(&self) -> bool {
        self.complaints().is_empty()
    }

    pub(crate) fn print(&self, out: &mut impl Write) -> Result<(), Error> {
        writeln!(out, "\nIdentities issued, newest first:\n\n{}", self.identities)?;
        writeln!(out, "certificates issued:   {}", self.issued)?;
        for (workload, rotations) in &self.rotations {
            writeln!(out, "rotations seen by {workload}'s Envoy: {rotations}")?;
        }
        writeln!(out, "requests sent:         {}", self.requests)?;
        writeln!(out, "TLS handshakes:        {} (sessions reused: {})", self.handshakes, self.reused)?;
        writeln!(out, "requests failed:       {}", self.failed)?;
        for complaint in self.complaints() {
            writeln!(out, "WRONG: {complaint}")?;
        }
        Ok(())
    }

    fn complaints(&self) -> Vec<String> {
        let mut complaints: Vec<String> = self.failures.iter().map(|failure| format!("a request failed: {failure}")).collect();
        if self.requests == 0 {
            complaints.push("no request was sent".to_owned());
        }
        if self.handshakes != self.requests || self.reused > 0 {
            complaints.push("not every request was a TLS handshake of its own".to_owned());
        }
        complaints
            .extend(self.rotations.iter().filter(|(_, rotations)| *rotations == 0).map(|(name, _)| format!("{name} saw no rotation")));
        complaints.extend(self.unknown.iter().map(|serial| format!("the ledger does not know the serial {serial} that a proxy serves")));
        complaints
    }
}
