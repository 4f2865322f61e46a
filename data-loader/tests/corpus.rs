//! The inputs that fuzzing has kept, through the same code as in the fuzz targets (`./dev fuzz`).

#![allow(clippy::unwrap_used)]

use data_loader::{Columns, DataError, LatentDataset};

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

/// Found by fuzzing: the parquet library panics over the first row, which is read to open the data set.
#[test]
fn a_panic_while_a_data_set_is_opened_is_an_error_that_names_the_file() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/parquet_bytes/dictionary_index_beyond_the_end");
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(file, folder.path().join("a.parquet")).unwrap();
    let error = LatentDataset::open(folder.path().to_str().unwrap(), &Columns::default()).unwrap_err();
    assert!(matches!(error, DataError::Panicked { .. }) && error.to_string().contains("a.parquet"), "{error}");
}
