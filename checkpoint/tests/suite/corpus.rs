//! The inputs that fuzzing has kept, through the same code as in the fuzz targets (`./dev fuzz`).

#[path = "../../../fuzz/src/manifest.rs"]
mod manifest;
#[path = "../../../fuzz/src/replay.rs"]
mod replay;
#[path = "../../../fuzz/src/shard_header.rs"]
mod shard_header;

/// With this variable set, the first input of the target `manifest` is written anew.
const WRITE: &str = "DITHAROS_WRITE_SEEDS";

#[test]
fn kept_manifests_do_no_harm() {
    if std::env::var_os(WRITE).is_some() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/manifest/sound");
        std::fs::write(path, manifest::seed()).unwrap();
    }
    replay::replay("manifest", &["sound"], manifest::run);
}

#[test]
fn kept_shard_headers_do_no_harm() {
    replay::replay("shard_header", &["two", "empty", "small_types"], shard_header::run);
}
