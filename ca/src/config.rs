//! The CA's configuration: read, checked, reloaded whole or not at all.
