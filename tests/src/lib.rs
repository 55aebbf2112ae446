//! Harness for the end-to-end tests: real binaries, the real Envoy.
