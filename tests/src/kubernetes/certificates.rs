//! The API server's keys: an authority for its own certificate and those of its clients, and the keys that sign tokens.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, PKCS_RSA_SHA256,
    RsaKeySize, SanType,
};
use uuid::Uuid;

use crate::Result;

/// Signs for the API server and for its clients.
pub(super) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    directory: PathBuf,
    certificate: PathBuf,
    server: (PathBuf, PathBuf),
}

impl Authority {
    /// With the server's certificate; everything lies in this directory.
    pub(super) fn create(directory: &Path) -> Result<Self> {
        fs::create_dir_all(directory)?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "test cluster");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let certificate = directory.join("ca.pem");
        fs::write(&certificate, issuer.pem())?;
        let mut authority = Self { issuer, directory: directory.to_owned(), certificate, server: Default::default() };
        let mut params = CertificateParams::new(["kubernetes.default.svc".to_owned(), "localhost".to_owned()])?;
        params.subject_alt_names.push(SanType::IpAddress(IpAddr::V4(Ipv4Addr::LOCALHOST)));
        params.distinguished_name.push(DnType::CommonName, "kube-apiserver");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        authority.server = authority.sign(&params, "server")?;
        Ok(authority)
    }

    /// Certificate and key of a user, of this group.
    pub(super) fn client(&self, user: &str, group: Option<&str>) -> Result<(PathBuf, PathBuf)> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, user);
        if let Some(group) = group {
            params.distinguished_name.push(DnType::OrganizationName, group);
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(&params, &Uuid::new_v4().to_string())
    }

    /// Its own certificate.
    pub(super) fn certificate(&self) -> &Path {
        &self.certificate
    }

    /// The server's certificate.
    pub(super) fn server_certificate(&self) -> &Path {
        &self.server.0
    }

    /// The server's key.
    pub(super) fn server_key(&self) -> &Path {
        &self.server.1
    }

    fn sign(&self, params: &CertificateParams, name: &str) -> Result<(PathBuf, PathBuf)> {
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        let (certificate_file, key_file) = (self.directory.join(format!("{name}.pem")), self.directory.join(format!("{name}.key")));
        fs::write(&certificate_file, certificate.pem())?;
        fs::write(&key_file, key.serialize_pem())?;
        Ok((certificate_file, key_file))
    }
}

/// A new key that signs tokens, of the kind that clusters usually have.
pub(super) fn signing_key(path: &Path) -> Result<PathBuf> {
    fs::write(path, KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048)?.serialize_pem())?;
    Ok(path.to_owned())
}
