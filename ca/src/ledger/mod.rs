//! The append-only record of every issuance and every act, and the questions it answers.
