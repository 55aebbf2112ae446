//! One task owns every workload's certificate: issue, renew, keep, drop.
