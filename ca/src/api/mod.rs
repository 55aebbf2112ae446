//! gRPC services, one file each: translate, authorize, call inward. No logic of their own.
