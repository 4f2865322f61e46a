#![allow(clippy::unwrap_used)]
use std::fs::OpenOptions as FileOptions;
use std::io::Write;
use std::path::Path;

use arrow::array::{
    ArrayRef, FixedSizeBinaryArray, FixedSizeListArray, Float16Array, Float32Array, Int64Array, ListArray, RecordBatch,
};
use arrow::buffer::{NullBuffer, OffsetBuffer};
use arrow::datatypes::{DataType, Field, Schema};
use half::f16;
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::{WriterProperties, WriterPropertiesBuilder, WriterVersion};
use proptest::prelude::*;

use super::*;
use crate::properties::cases;
use crate::testing::{samples, write};
use crate::{Columns, WriterOptions};

fn open(path: &Path) -> LatentDataset {
    LatentDataset::open(path.to_str().unwrap(), &Columns::default()).unwrap()
}

/// Rows as they lie in the file, through the direct path.
fn directly(dataset: &LatentDataset, rows: &[u64], column: usize) -> Result<Vec<Vec<u8>>, DataError> {
    let row_bytes = dataset.stored[column].numel * dataset.stored[column].dtype.bytes();
    let mut out = vec![vec![0; row_bytes]; rows.len()];
    let wanted = rows.iter().zip(&mut out).map(|(&row, out)| Wanted { row, column, out }).collect();
    dataset.read_directly(wanted)?;
    Ok(out)
}

/// The same through the general path.
fn generally(dataset: &LatentDataset, rows: &[u64], column: usize) -> Vec<Vec<u8>> {
    let row_bytes = dataset.stored[column].numel * dataset.stored[column].dtype.bytes();
    let row = |&row: &u64| {
        let mut out = vec![0; row_bytes];
        dataset.read(&[RowRun { first_row: row, rows: 1 }]).unwrap().copy_stored(column, 0, &mut out);
        out
    };
    rows.iter().map(row).collect()
}

fn whole(dataset: &LatentDataset) -> [RowRun; 1] {
    [RowRun { first_row: 0, rows: dataset.meta().rows }]
}

/// A column of `rows` latents of `shape`, in one of the layouts that have nothing but plain values.
fn column(layout: usize, rows: usize, shape: [usize; 3], nullable: bool) -> ArrayRef {
    let numel: usize = shape.iter().product();
    let numbers = (0..rows * numel).map(|i| (i * 37 % 2001) as f32 / 64.0 - 15.0);
    let item = |data_type: &DataType| std::sync::Arc::new(Field::new("item", data_type.clone(), nullable));
    let halves = || -> ArrayRef { Arc::new(Float16Array::from_iter_values(numbers.clone().map(f16::from_f32))) };
    let nested = |mut items: ArrayRef, fixed: bool| {
        for dim in shape.into_iter().rev() {
            let (field, lists) = (item(items.data_type()), items.len() / dim);
            items = match fixed {
                true => Arc::new(FixedSizeListArray::new(field, dim as i32, items, None)),
                false => {
                    let offsets = OffsetBuffer::from_lengths(std::iter::repeat_n(dim, lists));
                    Arc::new(ListArray::new(field, offsets, items, None))
                }
            };
        }
        items
    };
    match layout {
        0 => Arc::new(FixedSizeListArray::new(item(&DataType::Float16), numel as i32, halves(), None)),
        1 => {
            let singles: ArrayRef = Arc::new(Float32Array::from_iter_values(numbers));
            let offsets = OffsetBuffer::from_lengths(std::iter::repeat_n(numel, rows));
            Arc::new(ListArray::new(item(&DataType::Float32), offsets, singles, None))
        }
        2 => nested(halves(), true),
        3 => nested(halves(), false),
        _ => {
            let bytes: Vec<u8> = numbers.flat_map(f32::to_le_bytes).collect();
            Arc::new(FixedSizeBinaryArray::new((numel * 4) as i32, bytes.into(), None))
        }
    }
}

fn plain() -> WriterPropertiesBuilder {
    WriterProperties::builder().set_compression(Compression::UNCOMPRESSED).set_dictionary_enabled(false)
}

fn save(path: &Path, latents: ArrayRef, shape: [usize; 3], nullable: bool, properties: WriterPropertiesBuilder) {
    let rows = latents.len() as i64;
    let labels: ArrayRef = Arc::new(Int64Array::from_iter_values((0..rows).map(|row| row % 10)));
    let schema = Arc::new(Schema::new(vec![
        Field::new("latent", latents.data_type().clone(), nullable),
        Field::new("label", DataType::Int64, false),
    ]));
    let shape = KeyValue::new("ditharos.latent_shape".into(), format!("{shape:?}"));
    let properties = properties.set_key_value_metadata(Some(vec![shape])).build();
    let mut writer = ArrowWriter::try_new(File::create(path).unwrap(), schema.clone(), Some(properties)).unwrap();
    writer.write(&RecordBatch::try_new(schema, vec![latents, labels]).unwrap()).unwrap();
    writer.close().unwrap();
}

proptest! {
    #![proptest_config(cases(48))]

    #[test]
    fn both_paths_read_the_same_bytes_of_every_plain_layout(
        layout in 0..5usize,
        rows in 1..90usize,
        shape in [1..4usize, 1..5usize, 1..6usize],
        nullable in any::<bool>(),
        second_version in any::<bool>(),
        page_rows in 1..40usize,
        group_rows in 1..60usize,
        picks in prop::collection::vec(any::<prop::sample::Index>(), 1..40),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.parquet");
        let version = if second_version { WriterVersion::PARQUET_2_0 } else { WriterVersion::PARQUET_1_0 };
        let properties = plain()
            .set_writer_version(version)
            .set_encoding(parquet::basic::Encoding::PLAIN)
            .set_data_page_row_count_limit(page_rows)
            .set_write_batch_size(page_rows)
            .set_max_row_group_row_count(Some(group_rows));
        save(&path, column(layout, rows, shape, nullable), shape, nullable, properties);
        let dataset = open(&path);
        prop_assert!(dataset.map_rows(&whole(&dataset)).unwrap(), "not taken for plain");
        let mut picks: Vec<u64> = picks.iter().map(|pick| pick.index(rows) as u64).collect();
        picks.sort_unstable();
        picks.dedup();
        picks.reverse();
        dataset.advise(&whole(&dataset));
        prop_assert_eq!(directly(&dataset, &picks, 0).unwrap(), generally(&dataset, &picks, 0));
    }
}

#[test]
fn what_the_writer_writes_is_read_directly_column_by_column() {
    let folder = tempfile::tempdir().unwrap();
    for (dtype, moments, flipped) in
        [(Dtype::F16, true, true), (Dtype::F32, true, false), (Dtype::Bf16, false, true), (Dtype::F16, false, false)]
    {
        let options =
            WriterOptions { dtype, moments, flipped, row_group_rows: 300, ..WriterOptions::new(vec![1, 3, 5]) };
        let path = folder.path().join("a.parquet");
        write(&path, options.clone(), &samples(700, &options));
        let dataset = open(&path);
        assert!(dataset.map_rows(&whole(&dataset)).unwrap(), "{dtype}");
        let rows: Vec<u64> = (0..700).step_by(13).chain(590..610).collect();
        for column in 0..dataset.stored.len() {
            assert_eq!(directly(&dataset, &rows, column).unwrap(), generally(&dataset, &rows, column));
        }
    }
}

#[test]
fn what_is_not_plain_is_left_to_the_general_path() {
    let (shape, folder) = ([1, 2, 3], tempfile::tempdir().unwrap());
    let path = folder.path().join("a.parquet");
    let latents = column(0, 50, shape, true);
    let is_plain = || {
        let dataset = open(&path);
        dataset.map_rows(&whole(&dataset)).unwrap()
    };
    save(&path, latents.clone(), shape, true, plain());
    assert!(is_plain());
    save(&path, latents.clone(), shape, true, plain().set_compression(Compression::SNAPPY));
    assert!(!is_plain(), "compressed");
    save(&path, latents.clone(), shape, true, plain().set_dictionary_enabled(true));
    assert!(!is_plain(), "with a dictionary");
    let shuffled = plain().set_encoding(parquet::basic::Encoding::BYTE_STREAM_SPLIT);
    save(&path, latents, shape, true, shuffled);
    assert!(!is_plain(), "byte stream split");

    // A null, and a list of another length, are seen and named by the general path.
    let items: ArrayRef = Arc::new(Float32Array::from(vec![1.0; 18]));
    let item = Arc::new(Field::new("item", DataType::Float32, true));
    let offsets = OffsetBuffer::from_lengths([6, 6, 6]);
    let nulls = NullBuffer::from(vec![true, false, true]);
    let with_null: ArrayRef = Arc::new(ListArray::new(item.clone(), offsets, items.clone(), Some(nulls)));
    let uneven: ArrayRef = Arc::new(ListArray::new(item, OffsetBuffer::from_lengths([6, 7, 5]), items, None));
    for (latents, found) in [(with_null, "null"), (uneven, "a list of 7")] {
        save(&path, latents, shape, true, plain());
        assert!(!is_plain());
        let dataset = open(&path);
        let error = dataset.read(&whole(&dataset)).unwrap_err().to_string();
        assert!(error.contains("row 1") && error.contains(found), "{error}");
    }
}

#[test]
fn a_file_that_is_cut_or_changed_meanwhile_is_an_error_with_its_place() {
    let (shape, folder) = ([1, 8, 8], tempfile::tempdir().unwrap());
    let path = folder.path().join("a.parquet");
    let fresh = || {
        save(&path, column(0, 500, shape, false), shape, false, plain().set_max_row_group_row_count(Some(100)));
        open(&path)
    };
    let cut = |bytes: u64| FileOptions::new().write(true).open(&path).unwrap().set_len(bytes).unwrap();
    // After it was mapped.
    let dataset = fresh();
    assert!(dataset.map_rows(&whole(&dataset)).unwrap());
    cut(30_000);
    let error = directly(&dataset, &[7, 350, 3], 0).unwrap_err().to_string();
    assert!(error.contains("a.parquet: row 350 (row group 3)") && error.contains("ends too early"), "{error}");
    let error = dataset.map_rows(&whole(&dataset)).unwrap_err().to_string();
    assert!(
        error.contains("a.parquet: row group 0") && error.contains("has changed") && error.contains("30000"),
        "{error}"
    );
    // Before.
    let dataset = fresh();
    cut(30_000);
    let error = dataset.map_rows(&whole(&dataset)).unwrap_err().to_string();
    assert!(error.contains("a.parquet: row group 0") && error.contains("has changed"), "{error}");
    // Written to in between.
    let dataset = fresh();
    assert!(dataset.map_rows(&whole(&dataset)).unwrap());
    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(5);
    let mut file = FileOptions::new().append(true).open(&path).unwrap();
    file.write_all(b"more").unwrap();
    file.set_modified(later).unwrap();
    assert!(dataset.map_rows(&whole(&dataset)).unwrap_err().to_string().contains("has changed"));
    // Gone: what is open stays readable.
    let dataset = fresh();
    assert!(dataset.map_rows(&whole(&dataset)).unwrap());
    std::fs::remove_file(&path).unwrap();
    assert_eq!(directly(&dataset, &[499], 0).unwrap().len(), 1);
}

#[test]
fn no_flipped_byte_makes_a_panic_or_a_row_of_other_length() {
    let (shape, folder) = ([1, 1, 3], tempfile::tempdir().unwrap());
    let path = folder.path().join("a.parquet");
    save(&path, column(0, 20, shape, true), shape, true, plain());
    let good = std::fs::read(&path).unwrap();
    // Header, levels and the first values of the only page.
    for at in 4..100 {
        for bit in 0..8 {
            let mut bytes = good.clone();
            bytes[at] ^= 1 << bit;
            std::fs::write(&path, bytes).unwrap();
            let dataset = open(&path);
            if dataset.map_rows(&whole(&dataset)).unwrap() {
                assert_eq!(directly(&dataset, &[0, 19], 0).unwrap()[1].len(), 6);
            }
        }
    }
}
