//! The keys that sign checkpoints: `checkpoint`, and after each rotation the next of `checkpoint-2`, `checkpoint-3` …
//!
//! All that are there sign, the oldest first: two while a rotation is under way, otherwise one.

use std::sync::Arc;

use chancery_identity::checkpoint::{Checkpoint, CheckpointVerifier, Signature, assemble};
use chancery_identity::csr::KeyType;

use super::PublishError;
use crate::keys::{KeyError, KeyManager};

const NAME: &str = "checkpoint";

#[derive(Clone, Debug)]
pub(super) struct SigningKeys {
    manager: Arc<dyn KeyManager>,
    origin: String,
    /// The oldest first.
    keys: Vec<SigningKey>,
}

#[derive(Clone, Debug)]
struct SigningKey {
    number: u64,
    verifier: CheckpointVerifier,
}

impl SigningKeys {
    /// Those that `manager` has for the ledger `origin`; maybe none.
    pub(super) async fn load(manager: Arc<dyn KeyManager>, origin: String) -> Result<Self, PublishError> {
        let mut keys = Vec::new();
        for name in manager.list().await? {
            let Some(number) = number_of(&name) else { continue };
            let verifier = CheckpointVerifier::from_spki(&origin, &manager.public_key(&name).await?.spki)?;
            keys.push(SigningKey { number, verifier });
        }
        keys.sort_by_key(|key| key.number);
        Ok(Self { manager, origin, keys })
    }

    /// What verifies their signatures, the oldest first.
    pub(super) fn verifiers(&self) -> Vec<CheckpointVerifier> {
        self.keys.iter().map(|key| key.verifier.clone()).collect()
    }

    /// Makes the next key, or takes the one that was made by a rotation which could not be recorded.
    pub(super) async fn add(&mut self) -> Result<CheckpointVerifier, PublishError> {
        let number = self.keys.last().map_or(1, |last| last.number + 1);
        let public = match self.manager.generate(&name_of(number), KeyType::Ed25519).await {
            Err(KeyError::Exists(name)) => self.manager.public_key(&name).await?,
            made => made?,
        };
        let verifier = CheckpointVerifier::from_spki(&self.origin, &public.spki)?;
        self.keys.push(SigningKey { number, verifier: verifier.clone() });
        Ok(verifier)
    }

    /// Without all keys but the newest; these are not destroyed yet.
    pub(super) fn newest_alone(&self) -> Self {
        Self { keys: self.keys.last().cloned().into_iter().collect(), ..self.clone() }
    }

    /// Destroys all keys but the newest.
    pub(super) async fn destroy_older(&mut self) -> Result<(), PublishError> {
        while self.keys.len() > 1 {
            self.manager.destroy(&name_of(self.keys[0].number)).await?;
            self.keys.remove(0);
        }
        Ok(())
    }

    /// The note of `checkpoint`, with a signature of each key.
    pub(super) async fn sign(&self, checkpoint: &Checkpoint) -> Result<String, PublishError> {
        let text = checkpoint.to_string();
        let mut signatures = Vec::with_capacity(self.keys.len());
        for key in &self.keys {
            let bytes = self.manager.sign(&name_of(key.number), text.as_bytes()).await?;
            signatures.push(Signature { key: key.verifier.clone(), bytes });
        }
        Ok(assemble(checkpoint, &signatures)?)
    }
}

fn name_of(number: u64) -> String {
    if number == 1 { NAME.to_owned() } else { format!("{NAME}-{number}") }
}

fn number_of(name: &str) -> Option<u64> {
    let number = match name.strip_prefix(NAME)? {
        "" => 1,
        rest => rest.strip_prefix('-')?.parse().ok()?,
    };
    (name_of(number) == name).then_some(number)
}
