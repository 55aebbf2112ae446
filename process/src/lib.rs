//! What every Chancery process does at its edge: configuration, logs, health, shutdown.
