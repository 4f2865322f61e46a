#![allow(clippy::unwrap_used)]
use std::path::Path;

use super::*;
use crate::testing::{sample, samples, write};
use crate::{RowRun, WriterOptions};

fn options() -> WriterOptions {
    WriterOptions { row_group_rows: 30, num_classes: Some(10), ..WriterOptions::new(vec![1, 2, 3]) }
}

fn open(path: &Path) -> Result<LatentDataset, DataError> {
    LatentDataset::open(path.to_str().unwrap(), &Columns::default())
}

/// Two files, 50 and 45 rows of one numbered sequence.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut rows = samples(95, &options());
    let second = rows.split_off(50);
    std::fs::create_dir(folder.path().join("b")).unwrap();
    write(&folder.path().join("a.parquet"), options(), &rows);
    write(&folder.path().join("b/0.parquet"), options(), &second);
    folder
}

#[test]
fn files_of_a_folder_are_one_sequence_of_rows() {
    let folder = folder();
    std::fs::write(folder.path().join("README.txt"), "not data").unwrap();
    let dataset = open(folder.path()).unwrap();
    assert_eq!((dataset.meta().rows, dataset.meta().files, dataset.meta().row_groups), (95, 2, 4));
    let names: Vec<&str> = dataset.files().collect();
    assert!(names[0].ends_with("/a.parquet") && names[1].ends_with("/b/0.parquet"), "{names:?}");
    // Backwards, across row groups and files, and leaving rows out.
    let runs = [
        RowRun { first_row: 90, rows: 5 },
        RowRun { first_row: 3, rows: 2 },
        RowRun { first_row: 28, rows: 40 },
        RowRun { first_row: 10, rows: 1 },
    ];
    let block = dataset.read(&runs).unwrap();
    let expected: Vec<u64> = runs.iter().flat_map(|run| run.first_row..run.first_row + run.rows).collect();
    assert_eq!(block.rows(), expected);
    let mut latent = [0f32; 6];
    for (index, &row) in expected.iter().enumerate() {
        let sample = sample(row as usize, &options());
        assert_eq!(block.labels()[index], sample.label);
        for column in 0..2 {
            block.latent(column, index, &mut latent);
            assert_eq!(latent[..], sample.latents[column][..], "row {row} column {column}");
        }
    }
}

#[test]
fn a_single_file_and_a_url_with_escapes_open_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a b%.parquet");
    write(&path, options(), &samples(9, &options()));
    assert_eq!(open(&path).unwrap().meta().rows, 9);
    let url = url::Url::from_file_path(&path).unwrap();
    assert_eq!(LatentDataset::open(url.as_str(), &Columns::default()).unwrap().meta().rows, 9);
}

#[test]
fn rows_that_are_not_there_or_asked_for_twice_are_refused() {
    let folder = folder();
    let dataset = open(folder.path()).unwrap();
    for (runs, words) in [
        (vec![RowRun { first_row: 90, rows: 6 }], "there are 95"),
        (vec![RowRun { first_row: u64::MAX, rows: 2 }], "there are 95"),
        (vec![RowRun { first_row: 10, rows: 5 }, RowRun { first_row: 12, rows: 1 }], "row 12 was asked for twice"),
    ] {
        let error = dataset.read(&runs).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    assert!(dataset.read(&[]).unwrap().is_empty());
}

#[test]
fn damaged_files_are_each_named() {
    let folder = folder();
    let whole = std::fs::read(folder.path().join("a.parquet")).unwrap();
    std::fs::write(folder.path().join("half.parquet"), &whole[..whole.len() / 2]).unwrap();
    std::fs::write(folder.path().join("garbage.parquet"), [7; 5000]).unwrap();
    std::fs::write(folder.path().join("empty.parquet"), []).unwrap();
    let error = open(folder.path()).unwrap_err().to_string();
    for name in ["half.parquet", "garbage.parquet", "empty.parquet", "3 problems", "cut short"] {
        assert!(error.contains(name), "{error}");
    }
    assert!(!error.contains("a.parquet"), "{error}");
}

#[test]
fn a_footer_that_points_outside_of_its_file_is_refused_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    write(&path, options(), &samples(90, &options()));
    let whole = std::fs::read(&path).unwrap();
    let footer = u32::from_le_bytes(whole[whole.len() - 8..whole.len() - 4].try_into().unwrap()) as usize + 8;
    // The data is gone, the footer is whole.
    std::fs::write(&path, [b"PAR1", &whole[whole.len() - footer..]].concat()).unwrap();
    let error = open(&path).unwrap_err().to_string();
    assert!(error.contains("a.parquet") && error.contains("damaged"), "{error}");
}

#[test]
fn files_that_differ_are_refused_with_the_key() {
    let changes: [(&str, WriterOptions); 4] = [
        ("ditharos.latent_shape", WriterOptions { latent_shape: vec![1, 3, 2], ..options() }),
        ("ditharos.num_classes", WriterOptions { num_classes: Some(11), ..options() }),
        ("ditharos.scaling_factor", WriterOptions { scaling_factor: Some(0.5), ..options() }),
        ("latent_mean", WriterOptions { dtype: Dtype::F32, ..options() }),
    ];
    for (key, changed) in changes {
        let folder = folder();
        write(&folder.path().join("c.parquet"), changed.clone(), &samples(3, &changed));
        let error = open(folder.path()).unwrap_err().to_string();
        assert!(error.contains(key) && error.contains("c.parquet") && error.contains("a.parquet"), "{error}");
    }
}

#[test]
fn what_is_missing_is_named() {
    let folder = folder();
    let path = folder.path().join("a.parquet");
    let missing = |columns: Columns| LatentDataset::open(path.to_str().unwrap(), &columns).unwrap_err().to_string();
    let unlabelled = Columns { label: "class".into(), ..Columns::default() };
    let unlabelled = LatentDataset::open(path.to_str().unwrap(), &unlabelled).unwrap();
    assert!(
        !unlabelled.meta().labels && unlabelled.read(&[RowRun { first_row: 0, rows: 2 }]).unwrap().labels().is_empty()
    );
    let error = unlabelled.require_labels("this model").unwrap_err().to_string();
    assert!(error.contains("`class`") && error.contains("`label`") && error.contains("data.columns"), "{error}");
    let error = missing(Columns { latent_mean: "mu".into(), ..Columns::default() });
    assert!(error.contains("`mu`") && error.contains("`latent_mean`"), "{error}");
    let error = missing(Columns { label: "id".into(), ..Columns::default() });
    assert!(error.contains("`id`") && error.contains("integer"), "{error}");
    std::fs::rename(&path, folder.path().join("part-00001-of-00003.parquet")).unwrap();
    let error = open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("part-00000-of-00003.parquet, part-00002-of-00003.parquet"), "{error}");
    assert!(open(&folder.path().join("nowhere")).unwrap_err().to_string().contains("no such file"));
    std::fs::create_dir(folder.path().join("void")).unwrap();
    assert!(open(&folder.path().join("void")).unwrap_err().to_string().contains("no .parquet file"));
}

#[test]
fn secrets_of_a_url_stay_out_of_errors() {
    for url in
        ["nosuch://secret@host/x", "s3://user:secret@host/x", "https://host/x?token=secret", "http://host/x#secret"]
    {
        let error = LatentDataset::open(url, &Columns::default()).unwrap_err().to_string();
        assert!(error.contains("://host/x") && !error.contains("secret"), "{error}");
    }
}

#[test]
fn a_scaling_factor_may_come_from_either_side_but_not_two_ways() {
    let folder = tempfile::tempdir().unwrap();
    let with = WriterOptions { scaling_factor: Some(0.18215), ..options() };
    write(&folder.path().join("with.parquet"), with.clone(), &samples(3, &with));
    write(&folder.path().join("without.parquet"), options(), &samples(3, &options()));
    let (with, without) =
        (open(&folder.path().join("with.parquet")).unwrap(), open(&folder.path().join("without.parquet")).unwrap());
    assert_eq!(with.scaling_factor(None).unwrap(), 0.18215);
    assert_eq!(with.scaling_factor(Some(0.18215)).unwrap(), 0.18215);
    assert!(with.scaling_factor(Some(0.5)).unwrap_err().to_string().contains("data.scaling_factor"));
    assert_eq!(without.scaling_factor(Some(0.5)).unwrap(), 0.5);
    assert_eq!(without.scaling_factor(None).unwrap(), 1.0);
}
