//! The judges: OpenSSL, pkilint, webpki and the `spiffe` crate. Each takes certificates as they are, and none asks Chancery anything.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use chancery_tests::lab::Lab;
use chancery_tests::{Result, tools};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, UnixTime};
use serde::Deserialize;
use time::OffsetDateTime;
use webpki::{
    CertRevocationList, EndEntityCert, ExpirationPolicy, KeyUsage, OwnedCertRevocationList, RevocationCheckDepth, RevocationOptionsBuilder,
};

/// `openssl verify`, as strict as it can be.
pub struct OpenSsl {
    program: PathBuf,
}

impl OpenSsl {
    pub fn find() -> Option<Self> {
        tools::openssl().map(|program| Self { program })
    }

    /// Judges `chain` (leaf first) as what `purpose` says (`sslclient`, `sslserver`; `any` for authorities), under `root` alone.
    pub fn verify(&self, chain: &[CertificateDer<'_>], root: &CertificateDer<'_>, purpose: &str, at: OffsetDateTime) -> Result<()> {
        self.verify_with(chain, root, None, purpose, at)
    }

    /// Likewise, and whether `crl` (PEM) revokes the leaf; without a CRL of its issuer nothing passes.
    pub fn verify_with(
        &self,
        chain: &[CertificateDer<'_>],
        root: &CertificateDer<'_>,
        crl: Option<&[u8]>,
        purpose: &str,
        at: OffsetDateTime,
    ) -> Result<()> {
        let lab = Lab::new()?;
        let mut command = Command::new(&self.program);
        if let Some(crl) = crl {
            let file = lab.at("crl.pem");
            std::fs::write(&file, crl)?;
            command.args(["verify", "-crl_check", "-CRLfile"]).arg(file);
        } else {
            command.arg("verify");
        }
        command.args(["-x509_strict", "-check_ss_sig", "-purpose", purpose, "-attime", &at.unix_timestamp().to_string()]);
        command.arg("-trusted").arg(write(&lab, "root", root)?);
        for (number, authority) in chain.iter().enumerate().skip(1) {
            command.arg("-untrusted").arg(write(&lab, &format!("authority-{number}"), authority)?);
        }
        let leaf = chain.first().ok_or("no certificate")?;
        let Output { status, stdout, stderr } = command.arg(write(&lab, "leaf", leaf)?).output()?;
        let words = format!("{}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
        if status.success() && words.trim_end().ends_with(": OK") { Ok(()) } else { Err(format!("openssl, {purpose}: {words}").into()) }
    }
}

/// pkilint: RFC 5280, certificate by certificate and link by link.
pub struct Pkilint {
    certificate: PathBuf,
    link: PathBuf,
}

/// What pkilint may remark on: severity, code, how its message begins, and why that stays.
const ACCEPTED: [(&str, &str, &str, &str); 2] = [
    (
        "ERROR",
        "pkix.invalid_uri_syntax",
        "Invalid URI syntax: \"spiffe://",
        "pkilint has URIs checked by a library for web addresses, which knows no scheme but a dozen (http, ftp, ssh, …), so it says this of \
         every SPIFFE ID there is; X509-SVID §2 demands them, and the `spiffe` crate judges their syntax here",
    ),
    (
        "NOTICE",
        "pkix.unknown_subject_key_identifier_calculation_method",
        "",
        "RFC 5280 §4.2.1.2 leaves the method to the CA: it is SHA-256 over SubjectPublicKeyInfo, cut at 160 bits (RFC 7093 §2, the fourth \
         method), and pkilint computes only the first three",
    ),
];

#[derive(Deserialize)]
struct Report {
    results: Vec<Place>,
}

#[derive(Deserialize)]
struct Place {
    node_path: String,
    finding_descriptions: Vec<Finding>,
}

#[derive(Deserialize)]
struct Finding {
    severity: String,
    code: String,
    message: Option<String>,
}

impl Finding {
    fn is_accepted(&self) -> bool {
        let message = self.message.as_deref().unwrap_or_default();
        let accepts = |(severity, code, begins, _why): &(&str, &str, &str, &str)| {
            self.severity == *severity && self.code == *code && message.starts_with(begins)
        };
        ACCEPTED.iter().any(accepts)
    }
}

impl Pkilint {
    pub fn find() -> Option<Self> {
        let certificate = tools::pkilint()?;
        Some(Self { link: certificate.with_file_name("lint_pkix_signer_signee_cert_chain"), certificate })
    }

    /// Judges one certificate.
    pub fn certificate(&self, certificate: &CertificateDer<'_>) -> Result<()> {
        let lab = Lab::new()?;
        judge(&self.certificate, &[write(&lab, "certificate", certificate)?])
    }

    /// Judges whether `subject` fits `issuer`.
    pub fn link(&self, issuer: &CertificateDer<'_>, subject: &CertificateDer<'_>) -> Result<()> {
        let lab = Lab::new()?;
        judge(&self.link, &[write(&lab, "issuer", issuer)?, write(&lab, "subject", subject)?])
    }
}

fn judge(program: &Path, files: &[PathBuf]) -> Result<()> {
    let Output { stdout, stderr, .. } = Command::new(program)
        .args(["lint", "--severity", "NOTICE", "--format", "JSON", "--document-format", "DER"])
        .args(files)
        .output()?;
    let report: Report = serde_json::from_slice(&stdout)
        .map_err(|error| format!("{} printed no report: {error}\n{}", program.display(), String::from_utf8_lossy(&stderr)))?;
    let mut found = Vec::new();
    for Place { node_path, finding_descriptions } in report.results {
        for finding in finding_descriptions.iter().filter(|finding| !finding.is_accepted()) {
            let Finding { severity, code, message } = finding;
            found.push(format!("{severity} {code} at {node_path}: {}", message.as_deref().unwrap_or_default()));
        }
    }
    if found.is_empty() { Ok(()) } else { Err(format!("pkilint found {}", found.join("; ")).into()) }
}

/// webpki judges `chain` as a server's and as a client's, under `root` alone.
pub fn webpki_verifies(chain: &[CertificateDer<'_>], root: &CertificateDer<'_>, at: OffsetDateTime) -> Result<()> {
    let anchor = webpki::anchor_from_trusted_cert(root)?;
    let (leaf, authorities) = chain.split_first().ok_or("no certificate")?;
    let leaf = EndEntityCert::try_from(leaf)?;
    let at = UnixTime::since_unix_epoch(Duration::from_secs(u64::try_from(at.unix_timestamp())?));
    for usage in [KeyUsage::server_auth(), KeyUsage::client_auth()] {
        let anchors = std::slice::from_ref(&anchor);
        leaf.verify_for_usage(webpki::ALL_VERIFICATION_ALGS, anchors, authorities, at, usage, None, None)?;
    }
    Ok(())
}

/// webpki judges the leaf of `chain` by the CRLs (PEM), as strictly as it can: without a list of its issuer, or with one past its end, it is
/// refused.
pub fn webpki_finds_unrevoked(chain: &[CertificateDer<'_>], root: &CertificateDer<'_>, crl: &[u8], at: OffsetDateTime) -> Result<()> {
    let anchor = webpki::anchor_from_trusted_cert(root)?;
    let (leaf, authorities) = chain.split_first().ok_or("no certificate")?;
    let lists = CertificateRevocationListDer::pem_slice_iter(crl).collect::<Result<Vec<_>, _>>()?;
    let lists = lists.iter().map(|der| Ok(OwnedCertRevocationList::from_der(der)?.into())).collect::<Result<Vec<_>>>()?;
    let lists: Vec<&CertRevocationList<'_>> = lists.iter().collect();
    let options = RevocationOptionsBuilder::new(&lists).map_err(|_| "no CRL")?;
    let options = options.with_depth(RevocationCheckDepth::EndEntity).with_expiration_policy(ExpirationPolicy::Enforce).build();
    let at = UnixTime::since_unix_epoch(Duration::from_secs(u64::try_from(at.unix_timestamp())?));
    let (anchors, usage) = (std::slice::from_ref(&anchor), KeyUsage::client_auth());
    let leaf = EndEntityCert::try_from(leaf)?;
    leaf.verify_for_usage(webpki::ALL_VERIFICATION_ALGS, anchors, authorities, at, usage, Some(options), None)?;
    Ok(())
}

/// The `spiffe` crate reads an SVID with its key; the result is the SPIFFE ID that it finds.
pub fn spiffe_reads_svid(chain: &[CertificateDer<'_>], pkcs8: &[u8]) -> Result<String> {
    Ok(spiffe::X509Svid::parse_from_der(&joined(chain), pkcs8)?.spiffe_id().to_string())
}

/// The `spiffe` crate reads a bundle of `roots`; the result is how many authorities it finds.
pub fn spiffe_reads_bundle(trust_domain: &str, roots: &[CertificateDer<'_>]) -> Result<usize> {
    Ok(spiffe::X509Bundle::parse_from_der(trust_domain.try_into()?, &joined(roots))?.authorities().len())
}

fn joined(certificates: &[CertificateDer<'_>]) -> Vec<u8> {
    certificates.iter().flat_map(|certificate| certificate.iter().copied()).collect()
}

fn write(lab: &Lab, name: &str, certificate: &CertificateDer<'_>) -> Result<PathBuf> {
    let path = lab.at(&format!("{name}.der"));
    std::fs::write(&path, certificate)?;
    Ok(path)
}
