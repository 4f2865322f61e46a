//! Rows with shapes of their own.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array, RecordBatch};
use arrow::array::{BinaryArray, Float32Builder, ListBuilder, UInt16Builder};
use data_loader::{Columns, LatentDataset, RowRun, Shapes, inspect, verify};
use parquet::arrow::ArrowWriter;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;

const ROWS: usize = 40;

fn shape(row: usize) -> [usize; 3] {
    [2, 1 + row % 3, 2 + row % 2]
}

fn latent(row: usize) -> Vec<f32> {
    (0..shape(row).iter().product()).map(|i| (row * 100 + i) as f32).collect()
}

fn shapes() -> ArrayRef {
    let mut lists = ListBuilder::new(UInt16Builder::new());
    (0..ROWS).for_each(|row| lists.append_value(shape(row).map(|dim| Some(dim as u16))));
    Arc::new(lists.finish())
}

fn flat() -> ArrayRef {
    let mut lists = ListBuilder::new(Float32Builder::new());
    (0..ROWS).for_each(|row| lists.append_value(latent(row).into_iter().map(Some)));
    Arc::new(lists.finish())
}

fn nested() -> ArrayRef {
    let mut lists = ListBuilder::new(ListBuilder::new(ListBuilder::new(Float32Builder::new())));
    for row in 0..ROWS {
        let [_, height, width] = shape(row);
        for plane in latent(row).chunks(height * width) {
            for line in plane.chunks(width) {
                lists.values().values().append_value(line.iter().copied().map(Some));
            }
            lists.values().append(true);
        }
        lists.append(true);
    }
    Arc::new(lists.finish())
}

fn bytes() -> ArrayRef {
    let rows: Vec<Vec<u8>> = (0..ROWS).map(|row| latent(row).iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
    Arc::new(BinaryArray::from_iter_values(rows))
}

/// A file of row groups of 16 rows.
fn write(folder: &Path, columns: Vec<(&str, ArrayRef)>, told: Option<&str>) -> PathBuf {
    let path = folder.join("rows.parquet");
    let label: ArrayRef = Arc::new(Int64Array::from_iter_values(0..ROWS as i64));
    let batch = RecordBatch::try_from_iter(columns.into_iter().chain([("label", label)])).unwrap();
    let told = told.map(|shape| vec![KeyValue::new("ditharos.latent_shape".into(), shape.to_owned())]);
    let options =
        WriterProperties::builder().set_max_row_group_row_count(Some(16)).set_key_value_metadata(told).build();
    let mut writer = ArrowWriter::try_new(File::create(&path).unwrap(), batch.schema(), Some(options)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    path
}

fn open(path: &Path) -> LatentDataset {
    LatentDataset::open(path.to_str().unwrap(), &Columns::default()).unwrap()
}

#[test]
fn every_form_gives_each_row_in_its_shape() {
    type Case = (Vec<(&'static str, ArrayRef)>, Option<&'static str>, Vec<Option<usize>>);
    let cases: [Case; 4] = [
        (vec![("latent", flat()), ("shape", shapes())], None, vec![None; 3]),
        (vec![("latent", bytes()), ("shape", shapes())], Some("[2, null, null]"), vec![Some(2), None, None]),
        (vec![("latent", nested()), ("shape", shapes())], None, vec![None; 3]),
        (vec![("latent", nested())], Some("[null, null, null]"), vec![None; 3]),
    ];
    let mut digests = Vec::new();
    for (columns, told, dims) in cases {
        let folder = tempfile::tempdir().unwrap();
        let dataset = open(&write(folder.path(), columns, told));
        assert_eq!((&dataset.meta().shapes, dataset.meta().latent_shape.len()), (&Shapes::Variable(dims), 0));
        let shapes = dataset.row_shapes().unwrap();
        assert_eq!(shapes.shapes().len(), 6);
        assert!(shapes.shapes().is_sorted());
        let runs = [RowRun { first_row: 30, rows: 9 }, RowRun { first_row: 3, rows: 20 }];
        let block = dataset.read(&runs).unwrap();
        assert_eq!(block.len(), 29);
        for (index, &row) in block.rows().iter().enumerate() {
            assert_eq!(
                (block.latent_shape(index), shapes.of(row)),
                (&shape(row as usize)[..], &shape(row as usize)[..])
            );
            let mut out = vec![0f32; block.latent_numel(index)];
            block.latent(0, index, &mut out);
            assert_eq!((out, block.labels()[index]), (latent(row as usize), row as i64));
        }
        assert_eq!(verify(&dataset), [""; 0]);
        let found = inspect(&dataset).unwrap();
        let counts: Vec<u64> = found.shapes.iter().map(|shape| shape.rows).collect();
        assert_eq!((counts, found.channels.len()), (vec![7, 7, 6, 7, 7, 6], 2));
        digests.push(found.sha256_f32);
    }
    assert!(digests.iter().all(|digest| *digest == digests[0]));
}

#[test]
fn a_row_that_breaks_its_shape_is_named() {
    let mut wrong = ListBuilder::new(UInt16Builder::new());
    (0..ROWS).for_each(|row| wrong.append_value(shape(if row == 20 { 21 } else { row }).map(|dim| Some(dim as u16))));
    let wrong: ArrayRef = Arc::new(wrong.finish());
    let all = [RowRun { first_row: 0, rows: ROWS as u64 }];
    for (column, told, words) in [
        (flat(), None, "row 20 (row group 1): `latent` is a list of 12; expected lists of lengths [6]"),
        (nested(), None, "row 20 (row group 1): `latent` is a list of 3; expected lists of lengths [2, 1, 3]"),
        (bytes(), None, "row 20 (row group 1): `latent` is 48 bytes; expected 24 bytes (6 × f32)"),
        (
            flat(),
            Some("[2, 3, null]"),
            "row 0 (row group 0): `shape` is of shape [2, 1, 2]; expected a shape like [2, 3, any]",
        ),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let dataset = open(&write(folder.path(), vec![("latent", column), ("shape", wrong.clone())], told));
        let error = dataset.read(&all).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn one_shape_in_the_metadata_wins_over_the_column() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(folder.path(), vec![("latent", nested()), ("shape", shapes())], Some("[2, 1, 2]"));
    let dataset = open(&path);
    assert_eq!((&dataset.meta().shapes, &dataset.meta().latent_shape[..]), (&Shapes::Same, &[2, 1, 2][..]));
    let error = dataset.read(&[RowRun { first_row: 0, rows: 5 }]).unwrap_err().to_string();
    assert!(error.contains("row 1 (row group 0)") && error.contains("a list of 2"), "{error}");
}
