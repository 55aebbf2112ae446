//! The issuance cycle: an attested identity and a key from a CSR become a recorded certificate.

pub mod policy;
