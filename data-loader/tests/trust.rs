//! `latents inspect` and `latents verify` as programs.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use data_loader::{LatentWriter, Row, WriterOptions};
use serde_json::Value;

fn latents(arguments: &[&str], place: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_latents")).args(arguments).arg(place).output().unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

/// Rows 0 to 9 of a set of two parts; row `same` has the id of row 0.
fn write(folder: &Path, part: &str, same: Option<usize>) {
    let options = WriterOptions { moments: false, num_classes: Some(3), ..WriterOptions::new(vec![4, 2, 3]) };
    let mut writer = LatentWriter::create(&folder.join(part), options).unwrap();
    for row in 0..10 {
        let latent: Vec<f32> = (0..24).map(|i| (row * 24 + i) as f32 / 16.0).collect();
        let id = format!("{part}/{}", if Some(row) == same { 0 } else { row });
        writer
            .push_row(Row { latents: &[&latent], shape: None, captions: &[], label: Some(row as i64 % 3), id: &id })
            .unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn inspect_gives_json_and_a_picture() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "part-00000-of-00001.parquet", None);
    let png = folder.path().join("p.png");
    let whole =
        latents(&["inspect", "--json", "--preview", png.to_str().unwrap(), "--preview-rows", "4"], folder.path());
    assert!(whole.status.success(), "{whole:?}");
    let report = json(&whole);
    assert_eq!((&report["rows"], &report["rows_read"], &report["num_classes"]), (&10.into(), &10.into(), &3.into()));
    assert_eq!(report["latent_shape"], serde_json::json!([4, 2, 3]));
    assert_eq!((report["sha256_f32"].as_str().unwrap().len(), &report["labels"]["0"]), (64, &4.into()));
    assert!(report["speed"]["epochs_per_s"].as_f64().unwrap() > 0.0);
    assert_eq!(report["layout"]["columns"][0]["role"], "latent");
    assert!(fs::read(&png).unwrap().starts_with(b"\x89PNG"));
    let quick = json(&latents(&["inspect", "--json", "--quick"], folder.path()));
    assert_eq!((&quick["sha256_f32"], &quick["rows"]), (&Value::Null, &10.into()));
    let text = String::from_utf8(latents(&["inspect"], folder.path()).stdout).unwrap();
    for words in [
        "latent shape    [4, 2, 3]",
        "its rows      10",
        "FixedSizeList",
        "reading speed",
        report["sha256_f32"].as_str().unwrap(),
    ] {
        assert!(text.contains(words), "`{words}` not in: {text}");
    }
}

#[test]
fn verify_fails_if_there_is_a_problem_and_counts_what_it_does_not_name() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "part-00000-of-00002.parquet", None);
    write(folder.path(), "part-00001-of-00002.parquet", None);
    let good = latents(&["verify"], folder.path());
    assert!(good.status.success(), "{good:?}");
    assert!(String::from_utf8_lossy(&good.stdout).contains("good: 20 rows in 2 row groups of 2 files"), "{good:?}");

    write(folder.path(), "part-00001-of-00002.parquet", Some(7));
    let bad = latents(&["verify", "--json", "--threads", "1"], folder.path());
    assert_eq!(bad.status.code(), Some(1));
    let problem = &json(&bad)["problems"][0];
    assert_eq!((&problem["row_in_file"], &problem["row_group"]), (&7.into(), &0.into()));
    assert!(problem["file"].as_str().unwrap().ends_with("part-00001-of-00002.parquet"));
    let few = latents(&["verify", "--max-problems", "3", "--num-classes", "1"], folder.path());
    let said = String::from_utf8_lossy(&few.stderr).into_owned();
    // Twelve labels and an id.
    assert!(few.status.code() == Some(1) && said.lines().count() == 4 && said.contains("and 10 more"), "{said}");

    fs::remove_file(folder.path().join("part-00000-of-00002.parquet")).unwrap();
    let missing = latents(&["verify", "--json"], folder.path());
    let report = json(&missing);
    assert!(report["problems"][0]["message"].as_str().unwrap().contains("part-00000-of-00002.parquet"), "{report}");
    assert_eq!((missing.status.code(), report["problems"].as_array().unwrap().len()), (Some(1), 2));
    let nowhere = latents(&["verify", "--json"], &folder.path().join("nowhere"));
    assert!(json(&nowhere)["problems"][0]["message"].as_str().unwrap().contains("no such file"), "{nowhere:?}");
}

#[test]
fn bench_counts_rows_with_and_without_labels() {
    for labels in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let options = WriterOptions { moments: false, labels, ..WriterOptions::new(vec![1, 2, 2]) };
        let mut writer = LatentWriter::create(&folder.path().join("a.parquet"), options).unwrap();
        for row in 0..20 {
            let (label, id) = (labels.then_some(0), row.to_string());
            writer.push_row(Row { latents: &[&[row as f32; 4]], shape: None, captions: &[], label, id: &id }).unwrap();
        }
        writer.finish().unwrap();
        let report = json(&latents(&["bench", "--json", "--seconds", "0.1", "--micro-batch", "5"], folder.path()));
        // One micro-batch is always taken.
        assert!(report["samples"].as_u64().unwrap() >= 5, "labels {labels}: {report}");
    }
}
