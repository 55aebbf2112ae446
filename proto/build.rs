//! Compiles the `.proto` files with protox, so that building needs no protoc.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    const INCLUDE: &str = "protos";
    const FILES: [&str; 10] = [
        "chancery/v1/agent.proto",
        "chancery/v1/ledger.proto",
        "chancery/v1/log.proto",
        "chancery/v1/operator.proto",
        "chancery/v1/revocation.proto",
        "chancery/v1/root.proto",
        "csi/v1/csi.proto",
        "envoy/extensions/transport_sockets/tls/v3/secret.proto",
        "envoy/service/secret/v3/sds.proto",
        "pluginregistration/v1/api.proto",
    ];
    println!("cargo:rerun-if-changed={INCLUDE}");
    let descriptors = protox::compile(FILES, [INCLUDE])?;
    tonic_prost_build::configure()
        // Tokens and private keys travel in these: no derived `Debug` may print them.
        .skip_debug([
            "chancery.v1.JoinRequest",
            "chancery.v1.WorkloadRequest",
            "csi.v1.NodePublishVolumeRequest",
            "envoy.config.core.v3.DataSource",
        ])
        .bytes(".chancery.v1.IssuedSvid")
        .bytes(".chancery.v1.Issuance")
        .bytes(".chancery.v1.GetTileResponse")
        .bytes(".chancery.v1.ProveInclusionResponse.bytes")
        .bytes(".chancery.v1.StoredEntry")
        .bytes(".envoy")
        // The secrets that SDS sends travel in `Any`: shared instead of copied, and never printed.
        .extern_path(".google.protobuf.Any", "crate::any::Any")
        .codec_path("crate::codec::SmallBuffers")
        .compile_fds(descriptors)?;
    Ok(())
}
