//! Sources and targets in an object store.
#![allow(clippy::unwrap_used)]

use std::path::Path as FsPath;
use std::sync::Arc;

use futures::TryStreamExt;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};

use super::pipeline::convert_to;
use super::*;
use crate::{Columns, LatentDataset};

const SHARDS: [(&str, SourceFormat); 5] = [
    ("fast_dit", SourceFormat::FastDit),
    ("lightningdit", SourceFormat::LightningDit),
    ("webdataset", SourceFormat::WebDataset),
    ("mds", SourceFormat::Mds),
    ("mds_zstd", SourceFormat::Mds),
];

fn block_on<T>(future: impl Future<Output = T>) -> T {
    futures::executor::block_on(future)
}

/// A store with the fixtures.
fn store() -> Arc<InMemory> {
    fn put(store: &InMemory, folder: &FsPath, below: &str) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = format!("{below}/{}", path.file_name().unwrap().to_str().unwrap());
            if path.is_dir() {
                put(store, &path, &name);
            } else {
                block_on(store.put(&Path::from(name), std::fs::read(&path).unwrap().into())).unwrap();
            }
        }
    }
    let store = Arc::new(InMemory::new());
    put(&store, &FsPath::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/convert"), "fixtures");
    store
}

fn place(store: &Arc<InMemory>, path: &str) -> Place {
    Place::in_store(store.clone(), Path::from(path), "mem://".into()).unwrap()
}

fn options(rows_of_file: usize) -> ConvertOptions {
    ConvertOptions {
        format: ExportFormat::Parquet(ParquetLayout { row_group_rows: 4, zstd: false }),
        dtype: None,
        order: Order::Source,
        file_size: FileSize::Rows(rows_of_file),
        threads: 2,
        values: Values::default(),
        scaling_factor: None,
        num_classes: None,
        labels: None,
        label: None,
        unlabelled: false,
        vae_digest: None,
        row_shapes: false,
        mean_only: false,
        drop_flipped: false,
    }
}

fn import(store: &Arc<InMemory>, from: &str, to: &str, rows_of_file: usize) -> Result<Converted, DataError> {
    let source = place(store, from);
    let source = open_at(&source, detect(&source)?, &SourceOptions::default())?;
    convert_to(source.as_ref(), place(store, to), &options(rows_of_file), &|_| {})
}

fn files(store: &InMemory, folder: &str) -> Vec<String> {
    let listed: Vec<_> = block_on(store.list(Some(&Path::from(folder))).try_collect()).unwrap();
    let mut names: Vec<String> = listed.into_iter().map(|object| object.location.filename().unwrap().into()).collect();
    names.sort();
    names
}

#[test]
fn sources_and_targets_may_be_in_an_object_store() {
    let store = store();
    let mut digests = Vec::new();
    for (name, format) in SHARDS {
        let source = place(&store, &format!("fixtures/{name}"));
        assert_eq!(detect(&source).unwrap(), format, "{name}");
        let to = format!("sets/{name}");
        import(&store, &format!("fixtures/{name}"), &to, 5).unwrap();
        assert_eq!(files(&store, &to), [0, 1, 2].map(|part| format!("part-0000{part}-of-00003.parquet")), "{name}");
        let dataset = LatentDataset::open_in(store.clone(), Path::from(to), &Columns::default()).unwrap();
        digests.push(crate::inspect(&dataset).unwrap().sha256_f32);
    }
    assert!(digests.iter().all(|digest| *digest == digests[0]), "{digests:?}");
}

#[test]
fn what_was_interrupted_is_completed_and_what_is_complete_is_kept() {
    let store = store();
    import(&store, "fixtures/mds", "set", 5).unwrap();
    let complete = import(&store, "fixtures/mds", "set", 5).unwrap_err().to_string();
    assert!(complete.contains("complete data set") && complete.contains("mem://set"), "{complete}");
    let other = import(&store, "fixtures/mds", "set", 6).unwrap_err().to_string();
    assert!(other.contains("part-00000-of-00003.parquet"), "{other}");

    // A part is missing, as after a kill: the set is refused by readers, and the same command completes it.
    block_on(store.delete(&Path::from("set/part-00001-of-00003.parquet"))).unwrap();
    let open = || LatentDataset::open_in(store.clone(), Path::from("set"), &Columns::default());
    assert!(open().unwrap_err().to_string().contains("part-00001-of-00003.parquet"));
    import(&store, "fixtures/mds", "set", 5).unwrap();
    assert_eq!(open().unwrap().meta().rows, 12);
}

#[test]
fn formats_of_many_files_are_not_uploaded() {
    let store = store();
    let source = open_at(&place(&store, "fixtures/mds"), SourceFormat::Mds, &SourceOptions::default()).unwrap();
    let options = ConvertOptions { format: ExportFormat::Mds, ..options(5) };
    let error = convert_to(source.as_ref(), place(&store, "out"), &options, &|_| {}).unwrap_err().to_string();
    assert!(error.contains("local folders only") && files(&store, "out").is_empty(), "{error}");
}

#[test]
fn an_error_in_a_store_names_the_object() {
    let store = store();
    let path = Path::from("fixtures/lightningdit/latents_rank00_shard001.safetensors");
    let bytes = block_on(async { store.get(&path).await?.bytes().await }).unwrap();
    block_on(store.put(&path, bytes.slice(..400).into())).unwrap();
    let error = import(&store, "fixtures/lightningdit", "set", 5).unwrap_err().to_string();
    assert!(error.contains("mem://fixtures/lightningdit/latents_rank00_shard001.safetensors"), "{error}");
    assert!(files(&store, "set").is_empty());
}
