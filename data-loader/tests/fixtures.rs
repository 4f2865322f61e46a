//! Files that pyarrow, pandas, polars and `datasets` have written, see fixtures/make.py: each reads back to the numbers in
//! expected.json, or is refused for the reason there.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use data_loader::{
    CaptionOptions, Columns, DataError, Flip, LatentDataset, MicroBatch, MicroBatchStream, PlainMemory, RowRun,
    ScheduleOptions, Shapes, StreamOptions, StreamSource, verify,
};
use serde_json::Value;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/columns")
}

fn expected() -> serde_json::Map<String, Value> {
    let text = std::fs::read_to_string(folder().join("expected.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn open(name: &str) -> Result<LatentDataset, DataError> {
    LatentDataset::open(folder().join(name).to_str().unwrap(), &Columns::default())
}

fn numbers(value: &Value) -> Vec<f32> {
    match value {
        Value::Array(values) => values.iter().flat_map(numbers).collect(),
        number => vec![number.as_f64().unwrap() as f32],
    }
}

fn all(dataset: &LatentDataset) -> [RowRun; 1] {
    [RowRun { first_row: 0, rows: dataset.meta().rows }]
}

#[test]
fn every_file_reads_back_to_its_numbers() {
    let mut read = 0;
    for (name, expected) in expected().iter().filter(|(_, expected)| expected["refused"].is_null()) {
        let dataset = open(name).unwrap_or_else(|error| panic!("{name}: {error}"));
        let (meta, block) = (dataset.meta(), dataset.read(&all(&dataset)).unwrap_or_else(|error| panic!("{error}")));
        let classes = expected["num_classes"].as_u64().map(|classes| classes as usize);
        assert_eq!(meta.num_classes, classes, "{name}");
        assert_eq!(meta.shapes == Shapes::Same, !expected["shape"].is_null(), "{name}");
        let labels: Vec<i64> =
            expected["labels"].as_array().into_iter().flatten().map(|label| label.as_i64().unwrap()).collect();
        assert_eq!(block.labels(), labels, "{name}");
        for (row, latent) in expected["latents"].as_array().unwrap().iter().enumerate() {
            let shape = if expected["shape"].is_null() { &expected["shapes"][row] } else { &expected["shape"] };
            assert_eq!(serde_json::json!(block.latent_shape(row)), *shape, "{name} row {row}");
            let mut out = vec![0f32; block.latent_numel(row)];
            block.latent(0, row, &mut out);
            assert_eq!(out, numbers(latent), "{name} row {row}");
        }
        assert_eq!(block.len(), expected["latents"].as_array().unwrap().len(), "{name}");
        assert_eq!(verify(&dataset), [""; 0], "{name}");
        read += 1;
    }
    assert!(read >= 60, "{read}");
}

#[test]
fn captions_read_back_to_their_tokens_and_masks() {
    let mut read = 0;
    for (name, expected) in expected().iter().filter(|(_, expected)| !expected["captions"].is_null()) {
        let dataset = open(name).unwrap();
        let meta = dataset.meta().captions.unwrap();
        assert_eq!((meta.dim, meta.masked), (3, !expected["masks"].is_null()), "{name}");
        // Backwards and with a gap: by the order of the runs.
        let runs = [RowRun { first_row: 4, rows: 1 }, RowRun { first_row: 1, rows: 2 }];
        let block = dataset.read_captions(&runs).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(block.len(), 3);
        for (index, row) in [4, 1, 2].into_iter().enumerate() {
            let captions = expected["captions"][row].as_array().unwrap();
            assert_eq!(block.count(index), captions.len(), "{name} row {row}");
            for (which, caption) in captions.iter().enumerate() {
                let tokens = caption.as_array().unwrap().len();
                assert_eq!(block.tokens(index, which), tokens, "{name} row {row} caption {which}");
                assert!(meta.most_tokens.is_none_or(|most| tokens <= most), "{name}");
                let told = &expected["masks"][row][which];
                let counts: Vec<bool> = (0..tokens).map(|token| told[token].as_bool().unwrap_or(true)).collect();
                // With room for more, which stays zero and is left out, and with room for less.
                for room in [tokens + 2, tokens, 1] {
                    let (mut embeddings, mut mask) = (vec![7f32; room * 3], vec![true; room]);
                    block.caption(index, which, &mut embeddings, &mut mask);
                    let kept = room.min(tokens);
                    assert_eq!(embeddings[..kept * 3], numbers(caption)[..kept * 3], "{name} row {row}");
                    assert_eq!(mask[..kept], counts[..kept], "{name} row {row} caption {which}");
                    assert!(
                        embeddings[kept * 3..].iter().all(|number| *number == 0.0) && !mask[kept..].contains(&true)
                    );
                }
            }
        }
        read += 1;
    }
    assert_eq!(read, 6);
}

#[test]
fn files_that_break_the_contract_are_refused_with_the_reason() {
    let mut refused = 0;
    for (name, expected) in expected() {
        let Some(words) = expected["refused"].as_array() else { continue };
        let read = |dataset: LatentDataset| {
            dataset.read(&all(&dataset))?;
            dataset.meta().captions.map_or(Ok(()), |_| dataset.read_captions(&all(&dataset)).map(|_| ()))
        };
        let error = open(&name).and_then(read).unwrap_err().to_string();
        for word in words {
            assert!(error.contains(word.as_str().unwrap()), "{name}: {word} not in: {error}");
        }
        refused += 1;
    }
    assert_eq!(refused, 15);
}

#[test]
fn micro_batches_bring_a_caption_of_each_row() {
    let take = |name: &str, weights: Option<&[f64]>| -> Result<Vec<MicroBatch>, DataError> {
        let options = StreamOptions {
            prefetch_bytes: 1 << 20,
            flip: Flip::Never,
            num_classes: None,
            threads: 2,
            captions: weights.map(|weights| CaptionOptions { tokens: 4, weights: weights.to_vec() }),
            allocator: &PlainMemory,
        };
        let dataset = Arc::new(open(name)?);
        let schedule = ScheduleOptions { seed: 3, lanes: 1, micro_batch: 2, range_rows: 2, shuffle_window_rows: 4 };
        let order = dataset.order(schedule)?;
        let source = StreamSource { dataset, scaling_factor: 1.0 };
        let mut stream = MicroBatchStream::start(vec![source], order, 0..1, 0, 40, options)?;
        (0..40).map(|_| stream.next()).collect()
    };
    let stored = &expected()["caption_several.parquet"];
    // How often each of a row's two captions came.
    let chosen = |batches: &[MicroBatch]| {
        let mut chosen = [0; 2];
        for batch in batches {
            count(batch, stored, &mut chosen);
        }
        chosen
    };
    let batches = take("caption_several.parquet", Some(&[])).unwrap();
    let evenly = chosen(&batches);
    assert!(evenly.iter().all(|&count| count > 20), "{evenly:?}");
    let [most, some] = chosen(&take("caption_several.parquet", Some(&[0.8, 0.2])).unwrap());
    assert!(most > 50 && some > 4, "{most}, {some}");
    assert_eq!(chosen(&take("caption_several.parquet", Some(&[0.0, 2.0])).unwrap()), [0, 80]);
    for (name, weights) in [("caption_several.parquet", &[1.0][..]), ("caption_columns.parquet", &[1.0, 1.0, 1.0])] {
        let error = take(name, Some(weights)).unwrap_err().to_string();
        assert!(error.contains("2 captions") && error.contains("data.caption_weights"), "{error}");
    }
    for weights in [&[0.0, 0.0][..], &[-1.0, 2.0], &[f64::NAN, 1.0], &[f64::MAX, f64::MAX]] {
        let error = take("caption_columns.parquet", Some(weights)).unwrap_err().to_string();
        assert!(error.contains("captions are weighed by"), "{error}");
    }
    // The same again, and nothing where nobody asks.
    let again = take("caption_several.parquet", Some(&[])).unwrap();
    assert!(batches.iter().zip(&again).all(|(a, b)| a.captions == b.captions && a.rows == b.rows));
    let without = take("caption_several.parquet", None).unwrap();
    assert!(without.iter().all(|batch| batch.captions.is_none()));
    let error = take("pyarrow_none.parquet", Some(&[])).unwrap_err().to_string();
    assert!(error.contains("data.columns.caption"), "{error}");
    let tokens = |name: &str, configured| open(name).unwrap().caption_tokens(configured);
    assert_eq!(
        [tokens("caption_binary.parquet", None), tokens("caption_binary.parquet", Some(9))].map(Result::unwrap),
        [4, 9]
    );
    assert!(tokens("caption_nested.parquet", None).unwrap_err().to_string().contains("ditharos.caption_shape"));
}

/// Counts which captions a micro-batch has, of two of a row, padded to four tokens of three numbers.
fn count(batch: &MicroBatch, stored: &Value, chosen: &mut [usize; 2]) {
    let captions = batch.captions.as_ref().unwrap();
    assert_eq!((captions.tokens, captions.dim), (4, 3));
    assert_eq!((captions.embeddings.len(), captions.mask.len()), (2 * 4 * 3, 2 * 4));
    for (i, &row) in batch.rows.iter().enumerate() {
        let found = &captions.embeddings[i * 12..][..12];
        let of = |which: usize| {
            let mut padded = numbers(&stored["captions"][row as usize][which]);
            padded.resize(12, 0.0);
            padded
        };
        let which = (0..2).find(|&which| found == of(which)).unwrap();
        let mask: Vec<bool> =
            (0..4).map(|token| stored["masks"][row as usize][which][token].as_bool().unwrap_or(false)).collect();
        assert_eq!(captions.mask[i * 4..][..4], mask);
        chosen[which] += 1;
    }
}
