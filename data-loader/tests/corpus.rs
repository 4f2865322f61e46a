//! The inputs that fuzzing has kept, through the same code as in the fuzz targets (`./dev fuzz`).

#[path = "../../fuzz/src/parquet_bytes.rs"]
mod parquet_bytes;
#[path = "../../fuzz/src/replay.rs"]
mod replay;

#[test]
fn kept_parquet_files_do_no_harm() {
    let accepted = [
        "fixed_f16",
        "list_f32_snappy_checksums",
        "large_f16_zstd_dictionary",
        "fixed_f32_gzip_v2",
        "nested_f32",
        "bytes_f16",
        "bytes_bf16",
        "bytes_f32_delta",
        "split_f32",
        "labels_dictionary",
        "moments_flipped",
        "captions_binary",
        "captions_columns",
        "captions_several",
    ];
    replay::replay("parquet_bytes", &accepted, parquet_bytes::run);
}
