//! Local questions to a running agent: `status` and `streams`.
