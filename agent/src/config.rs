//! The agent's configuration: read, checked, reloaded whole or not at all.
