#![allow(clippy::unwrap_used)]
use std::path::Path;
use std::sync::Arc;

use object_store::memory::InMemory;
use object_store::{ObjectStore, ObjectStoreExt};

use super::*;
use crate::RowRun;
use crate::WriterOptions;
use crate::testing::{samples, write};

fn options() -> WriterOptions {
    WriterOptions { num_classes: Some(10), ..WriterOptions::new(vec![1, 2, 2]) }
}

/// Files of so many rows at these paths below a folder.
fn folder(files: &[(&str, usize)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, rows) in files {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        write(&path, options(), &samples(*rows, &options()));
    }
    folder
}

fn open_all(urls: &[String]) -> Result<LatentDataset, DataError> {
    LatentDataset::open_all(urls.iter().map(String::as_str), &OpenOptions::default())
}

fn names(dataset: &LatentDataset, below: &Path) -> Vec<String> {
    let front = format!("{}/", below.display());
    dataset.files().map(|name| name.trim_start_matches(&front).to_owned()).collect()
}

const FILES: [(&str, usize); 6] = [
    ("train-00000-of-00002.parquet", 3),
    ("train-00001-of-00002.parquet", 4),
    ("val-00000-of-00002.parquet", 5),
    ("_old/train-00000-of-00002.parquet", 6),
    ("more/a/x.parquet", 7),
    ("more/b/y.parquet", 8),
];

#[test]
fn wildcards_ranges_and_lists_name_files_on_the_disk() {
    let folder = folder(&FILES);
    let root = folder.path();
    let (first, second) = (FILES[0].0, FILES[1].0);
    for (texts, expected) in [
        (vec!["train-*.parquet"], vec![first, second]),
        (vec!["train-0000[0]-*.parquet"], vec![first]),
        (vec!["more/*", "train-00001-of-00002.parquet"], vec!["more/a/x.parquet", "more/b/y.parquet", second]),
        (vec!["more/**/y.parquet"], vec!["more/b/y.parquet"]),
        (vec!["train-{00000..00001}-of-00002.parquet"], vec![first, second]),
        (vec!["{train-00001,val-00000}-of-00002.parquet"], vec![second, FILES[2].0]),
        (vec!["more/{b,a}"], vec!["more/b/y.parquet", "more/a/x.parquet"]),
        (vec!["*/train-*"], vec![]),
    ] {
        let texts: Vec<String> = texts.iter().map(|text| root.join(text).to_str().unwrap().to_owned()).collect();
        match open_all(&texts) {
            Ok(dataset) => assert_eq!(names(&dataset, root), expected, "{texts:?}"),
            Err(error) => assert!(expected.is_empty() && error.to_string().contains("no .parquet file"), "{error}"),
        }
    }
    let at = |text: &str| root.join(text).to_str().unwrap().to_owned();
    for (texts, words) in [
        (vec![at("val-*")], "val-00001-of-00002.parquet"),
        (vec![at("train-{00000..00003}-of-00002.parquet")], "2 problems"),
        (vec![at("more"), at("more/a")], "names this file twice"),
        (vec![at("train-{0..1"), at("nowhere")], "2 problems"),
        (vec![], "list of URLs is empty"),
        (vec![at("x-{9..1}")], "runs backwards"),
    ] {
        let error = open_all(&texts).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    // A name that is there is no pattern.
    std::fs::create_dir(root.join("odd [1]{2..3}*")).unwrap();
    std::fs::copy(root.join(first), root.join("odd [1]{2..3}*/a.parquet")).unwrap();
    assert_eq!(open_all(&[at("odd [1]{2..3}*")]).unwrap().meta().rows, 3);
}

#[test]
fn wildcards_and_ranges_name_objects_of_a_store() {
    let folder = folder(&FILES);
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    for (name, _) in FILES {
        let bytes = std::fs::read(folder.path().join(name)).unwrap();
        let path = object_store::path::Path::from(format!("set/{name}"));
        runtime.block_on(store.put(&path, bytes.into())).unwrap();
    }
    let open = |pattern: &str| {
        let path = object_store::path::Path::parse(pattern).unwrap();
        LatentDataset::open_in(store.clone(), path, &Columns::default())
    };
    let rows = |pattern: &str| open(pattern).unwrap().meta().rows;
    assert_eq!([rows("set/train-*.parquet"), rows("set/mo*"), rows("set/more/{a,b}")], [7, 15, 15]);
    assert_eq!(rows("set/train-{00000..00001}-of-00002.parquet"), 7);
    assert!(open("set/val-*").unwrap_err().to_string().contains("val-00001-of-00002.parquet"));
    assert!(open("set/nothing-*").unwrap_err().to_string().contains("no .parquet file"));
}

#[test]
fn a_web_server_is_not_asked_for_a_list() {
    let error = LatentDataset::open("https://127.0.0.1:9/a/*.parquet", &Columns::default()).unwrap_err().to_string();
    assert!(error.contains("does not list") && error.contains("{00000..00007}"), "{error}");
}

#[test]
fn folders_of_the_hive_kind_give_the_label_that_files_lack() {
    let folder = tempfile::tempdir().unwrap();
    let without = WriterOptions { labels: false, num_classes: Some(4), ..options() };
    for class in [3, 1] {
        let path = folder.path().join(format!("class={class}/part-0.parquet"));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        write(&path, without.clone(), &samples(2, &without));
    }
    let columns = Columns { label: "class".into(), ..Columns::default() };
    let open = || LatentDataset::open(folder.path().to_str().unwrap(), &columns);
    let dataset = open().unwrap();
    assert!(dataset.meta().labels);
    assert_eq!(dataset.read(&[RowRun { first_row: 0, rows: 4 }]).unwrap().labels(), [1, 1, 3, 3]);
    let lone = LatentDataset::open(folder.path().join("class=3/part-0.parquet").to_str().unwrap(), &columns).unwrap();
    assert_eq!(lone.read(&[RowRun { first_row: 1, rows: 1 }]).unwrap().labels(), [3]);

    std::fs::rename(folder.path().join("class=1"), folder.path().join("class=cat%20s")).unwrap();
    let error = open().unwrap_err().to_string();
    assert!(error.contains("`class`") && error.contains("`cat s`") && error.contains("integer"), "{error}");
    std::fs::rename(folder.path().join("class=cat%20s"), folder.path().join("none")).unwrap();
    let error = open().unwrap_err().to_string();
    assert!(error.contains("none/part-0.parquet: the label is absent"), "{error}");
}
