//! Token to caller: who is asking, by which cluster's keys.
