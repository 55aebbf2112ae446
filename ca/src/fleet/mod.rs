//! The connected agents: one stream each; trust and orders down, acknowledgements up.
