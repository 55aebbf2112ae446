//! A stand-in for a cluster's token issuer, for development and tests: signs tokens with exactly the claims that Kubernetes binds to a pod.
//!
//! Its key is RSA-2048, as most clusters' are. UIDs are derived from names, so that the same pod has the same UID in every token.

use std::path::Path;
use std::time::Duration;

use aws_lc_rs::digest;
use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{KeyPair, RSA_PKCS1_SHA256, RsaKeyPair};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chancery_identity::PrivateKey;
use chancery_process::files::{self, FileError};
use rustls_pki_types::PrivatePkcs8KeyDer;
use rustls_pki_types::pem::PemObject;
use serde_json::json;
use time::OffsetDateTime;
use uuid::Uuid;
use x509_parser::prelude::FromDer;
use x509_parser::public_key::RSAPublicKey;
use zeroize::{Zeroize, Zeroizing};

/// The `iss` of its tokens.
pub const ISSUER: &str = "https://kubernetes.development.chancery";
const KEY_FILE: &str = "issuer.pem";
/// The file of its public keys, in its directory.
pub const JWKS_FILE: &str = "jwks.json";

/// Why there is no development issuer, or no token.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DevelopmentError {
    /// The directory or a file in it.
    #[error(transparent)]
    File(#[from] FileError),
    /// The key's file holds no key.
    #[error("{0} holds no RSA key; remove it to have a new one made")]
    Damaged(String),
    /// The cryptography failed.
    #[error("the development issuer cannot {0}")]
    Crypto(&'static str),
}

/// What a token shall say.
#[derive(Clone, Debug)]
pub struct TokenRequest {
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's service account.
    pub service_account: String,
    /// The pod's name.
    pub pod: String,
    /// The node's name.
    pub node: String,
    /// `aud`.
    pub audience: String,
    /// From now to `exp`.
    pub lifetime: Duration,
    /// Instead of the UID derived from the names.
    pub pod_uid: Option<Uuid>,
    /// Instead of the UID derived from the name.
    pub node_uid: Option<Uuid>,
}

/// Signs tokens as a cluster would.
pub struct DevelopmentIssuer {
    key: RsaKeyPair,
    key_id: String,
}

impl DevelopmentIssuer {
    /// Reads the issuer's key from `directory`, or makes it, and writes its public keys beside it as [`JWKS_FILE`].
    ///
    /// # Errors
    /// If the directory or the key are open to others or cannot be used.
    pub fn open_or_create(directory: &Path) -> Result<Self, DevelopmentError> {
        files::create_private_dir(directory)?;
        let path = directory.join(KEY_FILE);
        if !path.exists() {
            let key = RsaKeyPair::generate(KeySize::Rsa2048).map_err(|_| DevelopmentError::Crypto("make its key"))?;
            let der = AsDer::<Pkcs8V1Der<'_>>::as_der(&key).map_err(|_| DevelopmentError::Crypto("write its key"))?;
            let key = PrivateKey::from_pkcs8(Zeroizing::new(der.as_ref().to_vec()));
            files::write_private(&path, key.secret_pem().as_bytes())?;
        }
        let damaged = || DevelopmentError::Damaged(path.display().to_string());
        let mut der = PrivatePkcs8KeyDer::from_pem_slice(&files::read_private(&path)?).map_err(|_| damaged())?;
        let key = RsaKeyPair::from_pkcs8(der.secret_pkcs8_der());
        der.zeroize();
        let key = key.map_err(|_| damaged())?;
        let key_id = hex::encode(&digest::digest(&digest::SHA256, key.public_key().as_ref()).as_ref()[..8]);
        let issuer = Self { key, key_id };
        let jwks_file = directory.join(JWKS_FILE);
        let jwks = issuer.jwks()?;
        if !std::fs::read_to_string(&jwks_file).is_ok_and(|before| before == jwks) {
            files::write_private(&jwks_file, jwks.as_bytes())?;
        }
        Ok(issuer)
    }

    /// Its public keys, RFC 7517.
    pub fn jwks(&self) -> Result<String, DevelopmentError> {
        let (_, public) =
            RSAPublicKey::from_der(self.key.public_key().as_ref()).map_err(|_| DevelopmentError::Crypto("read its own public key"))?;
        let number = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(&bytes[bytes.iter().take_while(|byte| **byte == 0).count()..]);
        let key = json!({
            "kty": "RSA", "use": "sig", "alg": "RS256", "kid": self.key_id,
            "n": number(public.modulus), "e": number(public.exponent),
        });
        Ok(json!({ "keys": [key] }).to_string())
    }

    /// A token for a pod, valid from `now`.
    pub fn sign(&self, request: &TokenRequest, now: OffsetDateTime) -> Result<Zeroizing<String>, DevelopmentError> {
        let TokenRequest { namespace, service_account, pod, node, .. } = request;
        let issued = now.unix_timestamp();
        let claims = json!({
            "iss": ISSUER,
            "sub": format!("system:serviceaccount:{namespace}:{service_account}"),
            "aud": [request.audience],
            "iat": issued,
            "nbf": issued,
            "exp": issued.saturating_add_unsigned(request.lifetime.as_secs()),
            "jti": Uuid::new_v4(),
            "kubernetes.io": {
                "namespace": namespace,
                "serviceaccount": { "name": service_account, "uid": uid("serviceaccount", &[namespace, service_account]) },
                "pod": { "name": pod, "uid": request.pod_uid.unwrap_or_else(|| pod_uid(namespace, pod)) },
                "node": { "name": node, "uid": request.node_uid.unwrap_or_else(|| node_uid(node)) },
            },
        });
        self.sign_claims(&claims)
    }

    /// A token with these claims, whatever they are.
    pub fn sign_claims(&self, claims: &serde_json::Value) -> Result<Zeroizing<String>, DevelopmentError> {
        let header = json!({ "alg": "RS256", "typ": "JWT", "kid": self.key_id });
        let mut token =
            Zeroizing::new(format!("{}.{}", URL_SAFE_NO_PAD.encode(header.to_string()), URL_SAFE_NO_PAD.encode(claims.to_string())));
        let mut signature = vec![0; self.key.public_modulus_len()];
        self.key
            .sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), token.as_bytes(), &mut signature)
            .map_err(|_| DevelopmentError::Crypto("sign a token"))?;
        let signature = URL_SAFE_NO_PAD.encode(signature);
        // Room for all of it at once, so that no shorter copy stays behind in memory.
        token.reserve_exact(signature.len() + 1);
        token.push('.');
        token.push_str(&signature);
        Ok(token)
    }
}

/// The UID that a node of this name has here.
pub fn node_uid(name: &str) -> Uuid {
    uid("node", &[name])
}

/// The UID that a pod of this name has here.
pub fn pod_uid(namespace: &str, name: &str) -> Uuid {
    uid("pod", &[namespace, name])
}

/// A version 8 UUID (RFC 9562 §5.8): the kind and the names, hashed.
fn uid(kind: &str, names: &[&str]) -> Uuid {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(kind.as_bytes());
    for name in names {
        // `/` occurs in no Kubernetes name, so no two lists of names hash alike.
        context.update(b"/");
        context.update(name.as_bytes());
    }
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&context.finish().as_ref()[..16]);
    uuid::Builder::from_custom_bytes(bytes).into_uuid()
}

impl std::fmt::Debug for DevelopmentIssuer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DevelopmentIssuer").field("key_id", &self.key_id).finish_non_exhaustive()
    }
}
