//! What every key manager promises, checked on any of them.

use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, ECDSA_P384_SHA384_ASN1, ED25519, UnparsedPublicKey, VerificationAlgorithm};
use chancery_identity::csr::KeyType;
use x509_parser::prelude::FromDer;
use x509_parser::x509::SubjectPublicKeyInfo;

use super::{KeyError, KeyManager};

/// Runs the whole contract on an empty manager.
pub(super) async fn check(keys: &dyn KeyManager) {
    names_are_checked(keys).await;
    a_signature_verifies_with_the_public_key(keys).await;
    a_key_is_never_overwritten(keys).await;
    a_destroyed_key_is_gone(keys).await;
    a_type_that_cannot_be_made_is_refused(keys).await;
}

async fn names_are_checked(keys: &dyn KeyManager) {
    let long = "a".repeat(65);
    for name in ["", "../escape", "a/b", "UPPER", "dot.pem", &long] {
        assert!(matches!(keys.generate(name, KeyType::EcdsaP256).await, Err(KeyError::Name(_))), "{name:?}");
    }
    assert!(keys.list().await.unwrap().is_empty());
}

async fn a_signature_verifies_with_the_public_key(keys: &dyn KeyManager) {
    let types: [(KeyType, &dyn VerificationAlgorithm); 3] =
        [(KeyType::EcdsaP256, &ECDSA_P256_SHA256_ASN1), (KeyType::EcdsaP384, &ECDSA_P384_SHA384_ASN1), (KeyType::Ed25519, &ED25519)];
    for (key_type, algorithm) in types {
        let name = format!("sign-{key_type}");
        let public = keys.generate(&name, key_type).await.unwrap();
        assert_eq!(public.key_type, key_type);
        assert_eq!(keys.public_key(&name).await.unwrap(), public);
        let signature = keys.sign(&name, b"message").await.unwrap();
        let (_, spki) = SubjectPublicKeyInfo::from_der(&public.spki).unwrap();
        // aws-lc-rs reads a bare point or key, which is the content of the bit string.
        let verifier = UnparsedPublicKey::new(algorithm, &spki.subject_public_key.data);
        verifier.verify(b"message", &signature).unwrap();
        assert!(verifier.verify(b"another", &signature).is_err());
        keys.destroy(&name).await.unwrap();
    }
}

async fn a_key_is_never_overwritten(keys: &dyn KeyManager) {
    let first = keys.generate("once", KeyType::EcdsaP256).await.unwrap();
    assert!(matches!(keys.generate("once", KeyType::EcdsaP256).await, Err(KeyError::Exists(_))));
    assert_eq!(keys.public_key("once").await.unwrap(), first);
    assert_eq!(keys.list().await.unwrap(), ["once"]);
}

async fn a_destroyed_key_is_gone(keys: &dyn KeyManager) {
    keys.destroy("once").await.unwrap();
    assert!(matches!(keys.sign("once", b"message").await, Err(KeyError::Unknown(_))));
    assert!(matches!(keys.public_key("once").await, Err(KeyError::Unknown(_))));
    assert!(matches!(keys.destroy("once").await, Err(KeyError::Unknown(_))));
    assert!(keys.list().await.unwrap().is_empty());
}

async fn a_type_that_cannot_be_made_is_refused(keys: &dyn KeyManager) {
    if let Err(error) = keys.generate("rsa", KeyType::Rsa2048).await {
        assert!(matches!(error, KeyError::Unsupported(KeyType::Rsa2048)), "{error}");
        assert!(keys.list().await.unwrap().is_empty());
    }
}
