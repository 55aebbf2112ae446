//! The agent's own identity and its one connection to the CA.
