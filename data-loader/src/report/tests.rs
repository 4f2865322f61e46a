#![allow(clippy::unwrap_used)]
use std::fs;
use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, Float32Array, Int64Array, ListArray, RecordBatch, StringArray};
use arrow::datatypes::Float32Type;
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;
use sha2::{Digest, Sha256};

use super::*;
use crate::pages::{PageKind, pages};
use crate::testing::{sample, samples, write};
use crate::{CaptionMeta, Columns, Dtype, LatentDataset, LatentWriter, Row, WriterOptions};

fn open(path: &Path) -> LatentDataset {
    LatentDataset::open(path.to_str().unwrap(), &Columns::default()).unwrap()
}

#[test]
fn an_inspection_tells_what_was_written() {
    let folder = tempfile::tempdir().unwrap();
    let options = WriterOptions { row_group_rows: 40, ..WriterOptions::new(vec![2, 3, 4]) };
    let samples = samples(150, &options);
    write(&folder.path().join("a.parquet"), options.clone(), &samples);
    write(&folder.path().join("b.parquet"), options.clone(), &samples);
    let mut told = Vec::new();
    let found = inspect_with(&open(folder.path()), InspectOptions::default(), &mut |rows| told.push(rows)).unwrap();
    assert_eq!((found.rows, found.rows_read, found.row_groups, found.non_finite), (300, 300, 8, 0));
    assert_eq!(told, [40, 80, 120, 150, 190, 230, 270, 300]);
    let numbers = || (0..2).flat_map(|_| &samples).map(|sample| &sample.latents[0]);
    let digest = Sha256::digest(numbers().flatten().flat_map(|number| number.to_le_bytes()).collect::<Vec<u8>>());
    assert_eq!(found.sha256_f32, Some(digest.iter().map(|byte| format!("{byte:02x}")).collect()));
    for (channel, stats) in found.channels.iter().enumerate() {
        let of_channel: Vec<f64> =
            numbers().flat_map(|latent| &latent[channel * 12..][..12]).map(|number| f64::from(*number)).collect();
        let mean = of_channel.iter().sum::<f64>() / of_channel.len() as f64;
        let variance = of_channel.iter().map(|number| (number - mean).powi(2)).sum::<f64>() / of_channel.len() as f64;
        assert!((stats.mean - mean).abs() < 1e-9 && (stats.std - variance.sqrt()).abs() < 1e-9, "{channel}");
    }
    let layout = &found.layout;
    assert_eq!(layout.row_group_rows, Some(Spread { min: 30, median: 40, max: 40 }));
    assert_eq!((layout.latent_chunks, layout.indexed_latent_chunks), (16, 16));
    assert_eq!(layout.latent_page_rows, Some(Spread { min: 30, median: 40, max: 40 }));
    let roles: Vec<_> = layout.columns.iter().map(|column| (column.name.as_str(), column.role)).collect();
    assert_eq!(
        roles,
        [
            ("latent_mean", Some("latent")),
            ("latent_logvar", Some("latent")),
            ("label", Some("label")),
            ("id", Some("id"))
        ]
    );
    assert!(layout.columns[0].compression.contains("UNCOMPRESSED") && layout.columns[0].encodings.contains("PLAIN"));
    assert_eq!(layout.metadata["ditharos.latent_shape"], "[2,3,4]");
    assert!(!layout.metadata.contains_key("ARROW:schema"));
    assert_eq!(layout.total_file_bytes, fs::metadata(folder.path().join("a.parquet")).unwrap().len() * 2);
}

#[test]
fn a_quick_inspection_reads_a_sample_and_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let options = WriterOptions { row_group_rows: 3000, ..WriterOptions::new(vec![1, 1, 1]) };
    write(&folder.path().join("a.parquet"), options.clone(), &samples(20_000, &options));
    let dataset = open(folder.path());
    let found = inspect_with(&dataset, InspectOptions { quick: true }, &mut |_| ()).unwrap();
    assert_eq!((found.rows, found.rows_read, &found.sha256_f32), (20_000, 16_384, &None));
    assert_eq!(found.labels.values().sum::<u64>(), 16_384);
    assert_eq!((found.labels.len(), found.speed.rows), (10, 16_384));
    let whole = inspect(&dataset).unwrap();
    assert!((found.channels[0].mean - whole.channels[0].mean).abs() < 0.5);
    assert_eq!(dataset.spread_rows(4), [0, 5000, 10_000, 15_000]);
    assert_eq!(dataset.spread_rows(u64::MAX).len(), 20_000);
}

/// One latent number a row, in row groups of three rows.
fn write_rows(path: &Path, rows: &[(f32, i64, &str)]) {
    let latents = ListArray::from_iter_primitive::<Float32Type, _, _>(rows.iter().map(|row| Some([Some(row.0)])));
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("latent", Arc::new(latents)),
        ("label", Arc::new(Int64Array::from_iter_values(rows.iter().map(|row| row.1)))),
        ("id", Arc::new(StringArray::from_iter_values(rows.iter().map(|row| row.2)))),
        ("other", Arc::new(Float32Array::from_iter_values(rows.iter().map(|row| row.0)))),
    ];
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let key = parquet::file::metadata::KeyValue::new("ditharos.latent_shape".to_owned(), "[1]".to_owned());
    let properties = WriterProperties::builder()
        .set_key_value_metadata(Some(vec![key]))
        .set_max_row_group_row_count(Some(3))
        .set_dictionary_enabled(false);
    let mut writer =
        ArrowWriter::try_new(fs::File::create(path).unwrap(), batch.schema(), Some(properties.build())).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

#[test]
fn every_problem_is_named_in_order_and_those_beyond_the_limit_are_counted() {
    let folder = tempfile::tempdir().unwrap();
    let nan = f32::NAN;
    write_rows(
        &folder.path().join("a.parquet"),
        &[(0.0, 0, "a"), (nan, 1, "b"), (0.0, -1, "c"), (f32::INFINITY, 9, "d")],
    );
    write_rows(&folder.path().join("b.parquet"), &[(1.0, 0, "b"), (1.0, 1, "e"), (1.0, 2, "f"), (1.0, 2, "b")]);
    let dataset = open(folder.path());
    let expected = [
        ("a.parquet", 0, 1, "NaN at position 0"),
        ("a.parquet", 0, 2, "`label` is -1"),
        ("a.parquet", 1, 3, "inf at position 0"),
        ("b.parquet", 0, 0, "`id` is `b`"),
        ("b.parquet", 1, 3, "row 1 of the data set has it too"),
    ];
    for threads in [1, 2, 5] {
        let options = VerifyOptions { threads, ..VerifyOptions::default() };
        let report = verify_with(&dataset, &options, &mut |_| ());
        assert_eq!((report.rows, report.ids, report.more_problems), (8, 8, 0));
        // Four columns in four row groups.
        assert_eq!((report.pages, report.pages_without_checksum), (16, 16));
        assert_eq!(report.problems.len(), expected.len());
        for (problem, (file, group, row, words)) in report.problems.iter().zip(expected) {
            assert!(problem.file.as_ref().unwrap().ends_with(file), "{problem:?}");
            assert_eq!((problem.row_group, problem.row_in_file), (Some(group), Some(row)), "{problem:?}");
            assert!(problem.message.contains(words), "{problem:?}");
        }
    }
    let report = verify_with(&dataset, &VerifyOptions { max_problems: 2, ..VerifyOptions::default() }, &mut |_| ());
    assert_eq!((report.problems.len(), report.more_problems, report.is_good()), (2, 3, false));
    let report =
        verify_with(&dataset, &VerifyOptions { num_classes: Some(2), ..VerifyOptions::default() }, &mut |_| ());
    assert_eq!(report.problems.iter().filter(|problem| problem.message.contains("0..2")).count(), 4);
    assert_eq!(verify(&dataset).len(), 5);
}

#[test]
fn files_that_cannot_be_opened_do_not_hide_what_is_wrong_with_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let part = |name: &str| folder.path().join(format!("part-{name}-of-00004.parquet"));
    write_rows(&part("00000"), &[(0.0, 0, "a"), (f32::NAN, 1, "b")]);
    fs::write(part("00001"), b"PAR1 no more PAR1").unwrap();
    write(&part("00003"), WriterOptions::new(vec![1, 1, 1]), &[]);
    let url = folder.path().to_str().unwrap();
    let error = LatentDataset::open(url, &Columns::default()).unwrap_err().to_string();
    assert!(error.starts_with("3 problems"), "{error}");
    let (dataset, errors) = LatentDataset::open_sound(url, &Columns::default()).unwrap();
    let report = verify_with(&dataset, &VerifyOptions::default(), &mut |_| ()).with_errors_of_files(errors);
    assert_eq!((report.files, report.rows), (1, 2));
    let words = ["part-00002-of-00004.parquet", "part-00001", "the set of latent columns", "NaN"];
    assert_eq!(report.problems.len(), words.len());
    for (problem, words) in report.problems.iter().zip(words) {
        assert!(problem.message.contains(words), "{problem:?}");
    }
    fs::remove_file(part("00000")).unwrap();
    fs::remove_file(part("00003")).unwrap();
    let error = LatentDataset::open_sound(url, &Columns::default()).unwrap_err().to_string();
    assert!(error.contains("part-00001") && error.contains("missing"), "{error}");
}

/// A file with page checksums, which pyarrow wrote: our own writer cannot.
const WITH_CHECKSUMS: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/parquet_bytes/list_f32_snappy_checksums");

#[test]
fn a_changed_byte_in_any_page_is_found_by_its_checksum() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    let good = fs::read(WITH_CHECKSUMS).unwrap();
    fs::write(&path, &good).unwrap();
    let dataset = open(&path);
    let report = verify_with(&dataset, &VerifyOptions::default(), &mut |_| ());
    assert!(report.is_good() && report.pages_without_checksum == 0, "{report:?}");
    let (mut changed, mut named) = (0, 0);
    let groups = dataset.files[0].metadata.metadata().row_groups().to_vec();
    for (group, metadata) in groups.iter().enumerate() {
        for column in metadata.columns() {
            let (start, length) = column.byte_range();
            for page in pages(&good[start as usize..][..length as usize]).map(Result::unwrap) {
                assert_eq!(page.kind, PageKind::Data);
                let mut bad = good.clone();
                bad[start as usize + page.start + page.bytes / 2] ^= 1;
                fs::write(&path, bad).unwrap();
                let name = column.column_path().string();
                let problems = match LatentDataset::open_sound(path.to_str().unwrap(), &Columns::default()) {
                    Ok((dataset, _)) => verify_with(&dataset, &VerifyOptions::default(), &mut |_| ()).problems,
                    // The first row tells how long the lists are.
                    Err(error) => Problem::of(error),
                };
                assert!(problems.len() == 1 && problems[0].row_group == Some(group), "{problems:?}");
                assert!(problems[0].message.contains("checksum"), "{name}: {problems:?}");
                named += usize::from(problems[0].message.contains(&format!("column {name}: page 0")));
                changed += 1;
            }
        }
    }
    assert_eq!((changed, named), (6, 5));
}

/// Plain latents of `shape`, one row for each.
fn write_latents(path: &Path, shape: &[usize], scaling_factor: Option<f64>, latents: &[Vec<f32>]) {
    let options = WriterOptions { moments: false, scaling_factor, ..WriterOptions::new(shape.to_vec()) };
    let mut writer = LatentWriter::create(path, options).unwrap();
    for (row, latent) in latents.iter().enumerate() {
        let id = row.to_string();
        writer.push_row(Row { latents: &[latent], shape: None, captions: &[], label: Some(0), id: &id }).unwrap();
    }
    writer.finish().unwrap();
}

fn pixel(preview: &Preview, x: usize, y: usize) -> [u8; 3] {
    std::array::from_fn(|c| preview.rgb[(y * preview.width + x) * 3 + c])
}

#[test]
fn latents_of_stable_diffusion_get_the_known_colours() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    // Zero is gray; 5.5 · 0.18215 = 1.002 in the first channel adds half of the map's first row.
    let mut latent = vec![0.0; 4 * 96 * 96];
    latent[..96].fill(5.5);
    write_latents(&path, &[4, 96, 96], Some(0.18215), &[latent.clone(), latent]);
    let preview = preview(&open(&path), 2).unwrap();
    assert_eq!((preview.width, preview.height), (2 + 2 * 98, 2 + 98));
    assert_eq!((pixel(&preview, 0, 0), pixel(&preview, 5, 50)), ([0; 3], [128; 3]));
    for x in [2, 97, 100, 195] {
        assert_eq!(pixel(&preview, x, 2), [172, 157, 169], "{x}");
    }
    let png = preview.to_png().unwrap();
    let mut reader = png::Decoder::new(std::io::Cursor::new(png)).read_info().unwrap();
    let mut decoded = vec![0; reader.output_buffer_size().unwrap()];
    reader.next_frame(&mut decoded).unwrap();
    assert_eq!(decoded, preview.rgb);
}

#[test]
fn other_latents_are_shown_along_the_directions_in_which_they_vary() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    // Channels 1 and 4 rise together from left to right, by far the most; the others hardly change.
    let number = |channel: usize, x: usize, y: usize| match channel {
        1 | 4 => x as f32,
        other => ((x * 7 + y * 3 + other) % 5) as f32 * 0.01,
    };
    let latent: Vec<f32> =
        (0..5).flat_map(|c| (0..96).flat_map(move |y| (0..96).map(move |x| number(c, x, y)))).collect();
    write_latents(&path, &[5, 96, 96], None, &[latent]);
    let preview = preview(&open(&path), 1).unwrap();
    let red: Vec<u8> = (0..96).map(|x| pixel(&preview, 2 + x, 50)[0]).collect();
    assert!(red.is_sorted() && red[0] == 0 && red[95] == 255 && red[48].abs_diff(128) < 8, "{red:?}");
}

#[test]
fn videos_are_rows_of_frames_and_what_is_no_picture_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    // The only channel is the frame's number.
    let latent: Vec<f32> = (0..3).flat_map(|frame| vec![frame as f32; 2 * 48]).collect();
    write_latents(&path, &[1, 3, 2, 48], None, &vec![latent; 5]);
    let video = preview(&open(&path), 2).unwrap();
    // Enlarged 48 times, so that two rows of pixels are 96 high.
    assert_eq!((video.width, video.height), (4 + (3 * 49 - 1) * 48, 2 + 2 * 98));
    let at = |frame: usize| pixel(&video, 2 + (frame * 49 + 20) * 48, 10);
    assert_eq!([at(0), at(1), at(2)], [[0; 3], [128; 3], [255; 3]]);
    write_latents(&path, &[96], None, &[vec![0.0; 96]]);
    let error = preview(&open(&path), 2).unwrap_err().to_string();
    assert!(error.contains("[96]") && error.contains("[channels, height, width]"), "{error}");
}

#[test]
fn a_row_is_read_back_as_it_was_sampled() {
    let folder = tempfile::tempdir().unwrap();
    let options = WriterOptions::new(vec![1, 2, 2]);
    write(&folder.path().join("a.parquet"), options.clone(), &samples(3, &options));
    let (blocks, speed) = open(folder.path()).timed_sample().unwrap();
    let mut latent = [0f32; 4];
    blocks[0].latent(0, 2, &mut latent);
    assert_eq!((latent.to_vec(), speed.rows), (sample(2, &options).latents[0].clone(), 3));
}

#[test]
fn captions_are_counted_and_their_damage_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    // Row r has 1 + r % 3 captions, caption c of it 1 + (r + c) % 4 tokens; the second token does not count.
    let meta = CaptionMeta { dim: 3, most_tokens: None, per_row: None, dtype: Dtype::F16, masked: true };
    let options = WriterOptions { captions: Some(meta), row_group_rows: 5, ..WriterOptions::new(vec![1, 2, 2]) };
    write(&path, options.clone(), &samples(12, &options));
    let dataset = open(&path);
    let found = inspect(&dataset).unwrap().captions.unwrap();
    assert_eq!((&found.columns[..], found.dim, &found.dtype[..]), (&["caption_embedding".to_owned()][..], 3, "f16"));
    assert_eq!((found.masked, found.most_tokens, found.captions, found.non_finite), (true, None, 24, 0));
    assert_eq!(found.of_row, Some(CountRange { min: 1, mean: 2.0, max: 3 }));
    assert_eq!(found.tokens, Some(CountRange { min: 1, mean: 2.5, max: 4 }));
    assert_eq!(found.tokens_that_count, Some(CountRange { min: 1, mean: 1.75, max: 3 }));
    let quick = inspect_with(&dataset, InspectOptions { quick: true }, &mut |_| ()).unwrap();
    assert_eq!(quick.captions, Some(found));
    let roles: Vec<_> = quick.layout.columns.iter().filter_map(|column| column.role).collect();
    assert_eq!(roles, ["latent", "latent", "caption", "mask", "label", "id"]);
    let good = verify_with(&dataset, &VerifyOptions::default(), &mut |_| ());
    assert_eq!((good.captions, good.problems.len()), (24, 0));

    // The last number of the second row group, then a mask of the third.
    let mut bytes = fs::read(&path).unwrap();
    let chunk = |group: usize, name: &str| {
        let columns = dataset.files[0].metadata.metadata().row_group(group).columns();
        columns.iter().find(|chunk| chunk.column_path().parts()[0] == name).unwrap().byte_range()
    };
    let (start, length) = chunk(1, "caption_embedding");
    let end = (start + length) as usize;
    bytes[end - 2..end].copy_from_slice(&0x7e00u16.to_le_bytes());
    let start = chunk(2, "caption_mask").0 as usize;
    bytes[start..start + 8].fill(0xff);
    fs::write(&path, bytes).unwrap();
    let dataset = open(&path);
    let bad = verify_with(&dataset, &VerifyOptions::default(), &mut |_| ());
    let problems: Vec<_> = bad.problems.iter().map(|problem| (problem.row_group, problem.row_in_file)).collect();
    assert_eq!(problems, [(Some(1), Some(9)), (Some(2), None)], "{:?}", bad.problems);
    assert!(
        bad.problems[0].message.contains("`caption_embedding` is NaN at position 2 of token 1 of caption 0"),
        "{:?}",
        bad.problems[0]
    );
    assert!(bad.problems[1].message.contains("caption_mask"), "{:?}", bad.problems[1]);
    assert!(inspect(&dataset).unwrap_err().to_string().contains("row group 2"));
}
