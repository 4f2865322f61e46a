#![allow(clippy::unwrap_used)]
use std::collections::HashMap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use arrow::array::{
    ArrayRef, BinaryArray, BooleanBuilder, FixedSizeListArray, Float32Array, Float32Builder, ListBuilder, RecordBatch,
};
use arrow::datatypes::{DataType, Field, Schema};
use parquet::arrow::ArrowWriter;

use super::*;
use crate::Columns;
use crate::draws::{Key, Purpose};

#[test]
fn captions_come_as_often_as_they_weigh() {
    let share = |weights: &[f64], captions: usize| -> Vec<f64> {
        let mut counts = vec![0.0; captions];
        for step in 0..20_000 {
            let mut choices = Key::new(7, Purpose::Caption, step).rng();
            counts[choose(&mut choices, weights, captions)] += 1.0 / 20_000.0;
        }
        counts
    };
    for (weights, captions, expected) in [
        (&[][..], 4, &[0.25; 4][..]),
        (&[0.95, 0.05], 2, &[0.95, 0.05]),
        (&[3.0, 0.0, 1.0], 3, &[0.75, 0.0, 0.25]),
        // Rows with fewer captions than weights.
        (&[3.0, 1.0, 4.0], 2, &[0.75, 0.25]),
        (&[0.0, 0.0, 4.0], 2, &[0.5, 0.5]),
        (&[0.5], 1, &[1.0]),
    ] {
        for (share, expected) in share(weights, captions).iter().zip(expected) {
            // Eight standard deviations of the widest.
            assert!((share - expected).abs() < 0.03, "{weights:?}: {share}, expected {expected}");
            assert!(*expected > 0.0 || *share == 0.0, "{weights:?}: {share}");
        }
    }
}

/// Captions as lists of tokens of two numbers; `rows` are tokens of each.
fn tokens(rows: &[usize]) -> ArrayRef {
    let mut captions = ListBuilder::new(ListBuilder::new(Float32Builder::new()));
    for tokens in rows {
        for _ in 0..*tokens {
            captions.values().values().append_slice(&[1.0, 2.0]);
            captions.values().append(true);
        }
        captions.append(true);
    }
    Arc::new(captions.finish())
}

/// Several of a row; `rows` are captions of each, of one token.
fn several(rows: &[usize]) -> ArrayRef {
    let mut captions = ListBuilder::new(ListBuilder::new(ListBuilder::new(Float32Builder::new())));
    for count in rows {
        for _ in 0..*count {
            let caption = captions.values();
            caption.values().values().append_slice(&[1.0, 2.0]);
            caption.values().append(true);
            caption.append(true);
        }
        captions.append(true);
    }
    Arc::new(captions.finish())
}

fn masks(rows: &[usize]) -> ArrayRef {
    let mut masks = ListBuilder::new(BooleanBuilder::new());
    for tokens in rows {
        masks.values().append_n(*tokens, true);
        masks.append(true);
    }
    Arc::new(masks.finish())
}

/// Reads the captions of two rows of such columns.
fn read(folder: &Path, columns: &[(&str, ArrayRef)], shape: Option<&str>) -> Result<CaptionBlock, DataError> {
    let numbers = Arc::new(Float32Array::from(vec![0.0; 8]));
    let latents = FixedSizeListArray::new(Arc::new(Field::new("item", DataType::Float32, true)), 4, numbers, None);
    let latent: [(&str, ArrayRef); 1] = [("latent", Arc::new(latents))];
    let columns: Vec<&(&str, ArrayRef)> = latent.iter().chain(columns).collect();
    let field = |(name, array): &&(&str, ArrayRef)| Field::new(*name, array.data_type().clone(), true);
    let mut keys = HashMap::from([("ditharos.latent_shape".to_owned(), "[1,2,2]".to_owned())]);
    keys.extend(shape.map(|shape| ("ditharos.caption_shape".to_owned(), shape.to_owned())));
    let schema = Arc::new(Schema::new_with_metadata(columns.iter().map(field).collect::<Vec<_>>(), keys));
    let batch = RecordBatch::try_new(schema.clone(), columns.iter().map(|(_, array)| array.clone()).collect()).unwrap();
    let path = folder.join("a.parquet");
    let mut writer = ArrowWriter::try_new(File::create(&path).unwrap(), schema, None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    let dataset = LatentDataset::open(path.to_str().unwrap(), &Columns::default())?;
    dataset.read_captions(&[RowRun { first_row: 0, rows: 2 }])
}

#[test]
fn columns_and_counts_that_disagree_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let read = |columns: &[(&str, ArrayRef)], shape| read(folder.path(), columns, shape).map(|block| block.len());
    let one = tokens(&[2, 3]);
    let bytes: ArrayRef = Arc::new(BinaryArray::from(vec![&b"12345678"[..], b"1234"]));
    assert_eq!(read(&[("caption_embedding", one.clone()), ("caption_mask", masks(&[2, 3]))], None).unwrap(), 2);
    assert_eq!(read(&[("caption_embedding", several(&[1, 2]))], None).unwrap(), 2);
    for (columns, shape, words) in [
        (
            vec![("caption_embedding_1", one.clone()), ("caption_embedding_2", bytes.clone())],
            Some("[3,2]"),
            "`caption_embedding_2` is binary; they must be alike",
        ),
        (
            vec![("caption_embedding_1", bytes.clone()), ("caption_embedding_2", one.clone())],
            Some("[3,2]"),
            "must be alike",
        ),
        (
            vec![
                ("caption_embedding_1", one.clone()),
                ("caption_embedding_2", one.clone()),
                ("caption_mask", masks(&[2, 3])),
            ],
            None,
            "2 such columns, but masks only in caption_mask",
        ),
        (
            vec![("caption_embedding", one.clone())],
            Some("[2,2]"),
            "row 1 (row group 0): `caption_embedding` is a caption of 3 tokens; expected at most 2",
        ),
        (
            vec![("caption_embedding", bytes)],
            Some("[1,2]"),
            "row 0 (row group 0): `caption_embedding` is a caption of 2 tokens",
        ),
        (
            vec![("caption_embedding", several(&[2, 1]))],
            Some("[2,null,2]"),
            "row 1 (row group 0): `caption_embedding` is 1 captions; expected 2",
        ),
        (vec![("caption_embedding", one.clone())], Some("[2,5]"), "a token of 2 numbers; expected 5"),
        (vec![("caption_embedding", one)], Some("[2]"), "`ditharos.caption_shape`"),
    ] {
        let error = read(&columns, shape).unwrap_err().to_string();
        assert!(error.contains(words), "{words} not in: {error}");
    }
}
