#![allow(clippy::unwrap_used)]
use super::*;
use crate::Columns;
use crate::testing::{captions, sample, samples, write};
use crate::{CaptionMeta, Dtype, LatentDataset, RowRun};

#[test]
fn what_is_written_is_read_back_in_every_layout() {
    for (dtype, flipped, zstd, row_group_rows) in [
        (Dtype::F16, false, false, 4096),
        (Dtype::F16, true, true, 100),
        (Dtype::F32, true, false, 256),
        (Dtype::F32, false, true, 7),
    ] {
        let options = WriterOptions {
            dtype,
            flipped,
            zstd,
            row_group_rows,
            scaling_factor: Some(0.18215),
            num_classes: Some(10),
            vae_digest: Some("sha256:ab".into()),
            ..WriterOptions::new(vec![2, 3, 4])
        };
        let folder = tempfile::tempdir().unwrap();
        let samples = samples(600, &options);
        write(&folder.path().join("a.parquet"), options, &samples);
        let dataset = LatentDataset::open(folder.path().to_str().unwrap(), &Columns::default()).unwrap();
        let meta = dataset.meta();
        assert_eq!((meta.rows, meta.moments, meta.flipped, meta.dtype), (600, true, flipped, dtype));
        assert_eq!(
            (&meta.latent_shape[..], meta.scaling_factor, meta.num_classes),
            (&[2, 3, 4][..], Some(0.18215), Some(10))
        );
        assert_eq!(meta.vae_digest.as_deref(), Some("sha256:ab"));
        assert_eq!(meta.row_groups, 600usize.div_ceil(row_group_rows));
        let block = dataset.read(&[RowRun { first_row: 0, rows: 600 }]).unwrap();
        let mut latent = vec![0.0; 24];
        for (i, sample) in samples.iter().enumerate() {
            assert_eq!(block.labels()[i], sample.label);
            for (column, expected) in sample.latents.iter().enumerate() {
                block.latent(column, i, &mut latent);
                assert_eq!(&latent, expected, "row {i} column {column} {dtype}");
            }
        }
    }
}

#[test]
fn an_unfinished_file_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let options = WriterOptions::new(vec![2, 2, 2]);
    let mut writer = LatentWriter::create(&folder.path().join("a.parquet"), options.clone()).unwrap();
    writer.push(sample(0, &options).row()).unwrap();
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    drop(writer);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn bad_rows_are_refused_by_name_and_the_good_ones_stay() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    let options = WriterOptions { num_classes: Some(10), ..WriterOptions::new(vec![2, 2, 2]) };
    let mut writer = LatentWriter::create(&path, options.clone()).unwrap();
    let good = sample(0, &options);
    writer.push(good.row()).unwrap();
    let too_large = [70000.0f32; 8];
    for (row, words) in [
        (LatentRow { mean: &good.latents[0][..7], ..good.row() }, "7 numbers"),
        (LatentRow { logvar: &[f32::NAN; 8], ..good.row() }, "NaN"),
        (LatentRow { mean: &too_large, ..good.row() }, "f16 cannot hold"),
        (LatentRow { label: 10, ..good.row() }, "0..10"),
        (LatentRow { flipped: Some((&too_large, &too_large)), ..good.row() }, "mirrored"),
    ] {
        let error = writer.push(row).unwrap_err().to_string();
        assert!(error.contains(words) && error.contains("id-0") && error.contains("a.parquet"), "{error}");
    }
    assert_eq!(writer.finish().unwrap().rows, 1);
    assert_eq!(LatentDataset::open(path.to_str().unwrap(), &Columns::default()).unwrap().meta().rows, 1);
}

#[test]
fn plain_latents_are_read_back_in_every_number_type() {
    for (dtype, flipped) in [(Dtype::F16, true), (Dtype::Bf16, true), (Dtype::Bf16, false), (Dtype::F32, false)] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.parquet");
        // A video: [channels, frames, height, width].
        let options = WriterOptions { moments: false, flipped, dtype, ..WriterOptions::new(vec![2, 3, 1, 2]) };
        let mut writer = LatentWriter::create(&path, options).unwrap();
        let latent = |row: usize| -> [f32; 12] { std::array::from_fn(|i| ((row * 5 + i) % 200) as f32 / 2.0 - 50.0) };
        for row in 0..300 {
            let (straight, mirrored) = (latent(row), latent(row + 1000));
            let both: [&[f32]; 2] = [&straight, &mirrored];
            let row = Row {
                latents: &both[..1 + usize::from(flipped)],
                shape: None,
                captions: &[],
                label: Some(row as i64 % 3),
                id: &row.to_string(),
            };
            writer.push_row(row).unwrap();
        }
        writer.finish().unwrap();
        let dataset = LatentDataset::open(path.to_str().unwrap(), &Columns::default()).unwrap();
        let meta = dataset.meta();
        assert_eq!((meta.rows, meta.moments, meta.flipped, meta.dtype), (300, false, flipped, dtype));
        assert_eq!(meta.latent_shape, [2, 3, 1, 2]);
        let block = dataset.read(&[RowRun { first_row: 0, rows: 300 }]).unwrap();
        let mut out = [0.0; 12];
        for row in 0..300 {
            for column in 0..=usize::from(flipped) {
                block.latent(column, row, &mut out);
                assert_eq!(out, latent(row + 1000 * column), "{dtype} row {row}");
            }
        }
    }
}

#[test]
fn a_refused_row_leaves_no_trace() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    let options = WriterOptions { moments: false, flipped: true, ..WriterOptions::new(vec![1, 1, 2]) };
    let mut writer = LatentWriter::create(&path, options).unwrap();
    let mut push = |latents: &[&[f32]], shape, label| {
        writer.push_row(Row { latents, shape, captions: &[], label, id: "x" }).map_err(|error| error.to_string())
    };
    push(&[&[1.0, 2.0], &[3.0, 4.0]], None, Some(0)).unwrap();
    // The second column is refused after the first was taken.
    assert!(push(&[&[9.0, 9.0], &[0.0, 65520.0]], None, Some(0)).unwrap_err().contains("`latent_flipped` holds 65520"));
    assert!(push(&[&[9.0, 9.0]], None, Some(0)).unwrap_err().contains("latent, latent_flipped"));
    assert!(push(&[&[9.0, 9.0], &[9.0, 9.0]], None, None).unwrap_err().contains("no label"));
    assert!(push(&[&[9.0, 9.0], &[9.0, 9.0]], Some(&[1, 2, 1]), Some(0)).unwrap_err().contains("[1, 2, 1]"));
    push(&[&[5.0, 6.0], &[7.0, 8.0]], None, Some(1)).unwrap();
    assert_eq!(writer.finish().unwrap().rows, 2);
    let dataset = LatentDataset::open(path.to_str().unwrap(), &Columns::default()).unwrap();
    let block = dataset.read(&[RowRun { first_row: 0, rows: 2 }]).unwrap();
    let mut out = [0.0; 2];
    let mut read = |column, row| {
        block.latent(column, row, &mut out);
        out
    };
    assert_eq!([read(0, 0), read(1, 0), read(0, 1), read(1, 1)], [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]);
    assert_eq!(block.labels(), [0, 1]);
}

#[test]
fn captions_are_read_back_in_every_layout() {
    let of = |dtype, per_row, most_tokens, masked| CaptionMeta { dim: 3, most_tokens, per_row, dtype, masked };
    for meta in [
        of(Dtype::F16, Some(1), Some(4), true),
        of(Dtype::F32, Some(3), None, true),
        of(Dtype::F16, None, Some(5), true),
        of(Dtype::F32, None, None, false),
        of(Dtype::Bf16, Some(1), Some(4), false),
        of(Dtype::Bf16, Some(2), None, true),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let options = WriterOptions { captions: Some(meta), row_group_rows: 70, ..WriterOptions::new(vec![1, 1, 2]) };
        write(&folder.path().join("a.parquet"), options.clone(), &samples(300, &options));
        let dataset = LatentDataset::open(folder.path().to_str().unwrap(), &Columns::default()).unwrap();
        assert_eq!(dataset.meta().captions, Some(meta));
        let block = dataset.read_captions(&[RowRun { first_row: 0, rows: 300 }]).unwrap();
        for row in 0..300 {
            let expected = captions(row, &meta);
            assert_eq!(block.count(row), expected.len(), "{meta:?} row {row}");
            for (which, (embeddings, mask)) in expected.iter().enumerate() {
                let (mut numbers, mut counts) = (Vec::new(), Vec::new());
                block.caption_into(row, which, &mut numbers, &mut counts);
                assert_eq!((&numbers, &counts), (embeddings, mask), "{meta:?} row {row} caption {which}");
            }
        }
    }
}

#[test]
fn captions_that_break_the_contract_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    let meta = CaptionMeta { dim: 2, most_tokens: Some(3), per_row: Some(1), dtype: Dtype::F16, masked: true };
    let options = WriterOptions { moments: false, captions: Some(meta), ..WriterOptions::new(vec![1, 1, 2]) };
    let row = Row { latents: &[&[1.0, 2.0]], shape: None, captions: &[], label: Some(0), id: "x" };
    let caption = |embeddings| Caption { embeddings, mask: None };
    let mut writer = LatentWriter::create(&path, options.clone()).unwrap();
    for (captions, words) in [
        (&[][..], "0 captions; expected 1"),
        (&[caption(&[0.0; 2]), caption(&[0.0; 2])], "2 captions"),
        (&[caption(&[])], "0 numbers; expected tokens of 2"),
        (&[caption(&[0.0; 3])], "3 numbers"),
        (&[caption(&[0.0; 8])], "4 tokens; expected at most 3"),
        (&[caption(&[0.0, 70000.0])], "70000 at position 1, which f16 cannot hold"),
        (&[Caption { embeddings: &[0.0; 4], mask: Some(&[true]) }], "a mask of 1"),
        (&[Caption { embeddings: &[0.0; 4], mask: Some(&[false, false]) }], "0 of them true"),
    ] {
        let error = writer.push_row(Row { captions, ..row }).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    writer.push_row(Row { captions: &[caption(&[1.0, 2.0])], ..row }).unwrap();
    assert_eq!(writer.finish().unwrap().rows, 1);
    let dataset = LatentDataset::open(path.to_str().unwrap(), &Columns::default()).unwrap();
    assert_eq!(dataset.read_captions(&[RowRun { first_row: 0, rows: 1 }]).unwrap().tokens(0, 0), 1);

    let mut without = LatentWriter::create(&path, WriterOptions { captions: None, ..options.clone() }).unwrap();
    let error = without.push_row(Row { captions: &[caption(&[1.0, 2.0])], ..row }).unwrap_err().to_string();
    assert!(error.contains("no column for them"), "{error}");
    let several = CaptionMeta { per_row: None, dtype: Dtype::Bf16, ..meta };
    let options = WriterOptions { captions: Some(several), ..options };
    assert!(LatentWriter::create(&path, options).err().unwrap().to_string().contains("bf16"));
}
