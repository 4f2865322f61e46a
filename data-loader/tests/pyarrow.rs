//! Files that other writers make: pyarrow writes the forms that users have, and each must read back to the same numbers.
//! Needs the project's `.venv`; without it the test says so and passes.
#![allow(clippy::unwrap_used, clippy::explicit_write)]

use std::path::{Path, PathBuf};
use std::process::Command;

use data_loader::{Columns, Dtype, LatentDataset, LatentRow, LatentWriter, RowRun, WriterOptions, inspect, verify};

/// Writes one file per form into the folder that is its argument: 70 rows of shape [2, 3, 4].
const WRITER: &str = r#"
import sys, numpy as np, pyarrow as pa, pyarrow.parquet as pq
folder = sys.argv[1]
rows, shape = 70, (2, 3, 4)
# Exact in bf16: eight significant bits.
x = ((np.arange(rows * 24) % 255 - 127) / 16).astype(np.float32).reshape(rows, *shape)
labels = pa.array(np.arange(rows) % 7)
flat16, flat32 = x.astype(np.float16).reshape(rows, 24), x.reshape(rows, 24)
bf16 = (x.view(np.uint32) >> 16).astype(np.uint16).reshape(rows, 24)
key = {b"ditharos.latent_shape": b"[2, 3, 4]"}

def nested(values, make):
    array = pa.array(values.reshape(-1))
    for size in reversed(shape):
        array = make(array, size)
    return array

def offsets(array, size, kind):
    return kind.from_arrays(pa.array(range(0, len(array) + 1, size), type=pa.int32() if kind is pa.ListArray else pa.int64()), array)

var = lambda array, size: offsets(array, size, pa.ListArray)
large = lambda array, size: offsets(array, size, pa.LargeListArray)
fixed = lambda array, size: pa.FixedSizeListArray.from_arrays(array, size)
raw = lambda numbers, kind: pa.array([row.tobytes() for row in numbers], type=kind)
write = lambda name, latent, label=labels, meta={}, **more: pq.write_table(
    pa.table({"id": pa.array(range(rows)), "latent": latent, "label": label}).replace_schema_metadata(meta),
    f"{folder}/{name}.parquet", **{"row_group_size": 32, **more})

write("nested_list_f32", nested(x, var))
write("nested_list_f16", nested(x.astype(np.float16), var), compression="zstd")
write("nested_large_f16", nested(x.astype(np.float16), large), write_page_index=True, data_page_size=200)
write("nested_list_f64", nested(x.astype(np.float64), var))
write("nested_fixed_f32", nested(x, fixed), data_page_version="2.0", compression="gzip")
write("flat_list_f16", var(pa.array(flat16.reshape(-1)), 24), meta=key, compression="lz4")
write("flat_fixed_f16", fixed(pa.array(flat16.reshape(-1)), 24), meta=key, use_dictionary=False)
write("bytes_f16", raw(flat16, pa.binary(48)), meta=key)
write("bytes_f32", raw(flat32, pa.binary()), meta=key)
write("large_bytes_f32", raw(flat32, pa.large_binary()), meta=key)
write("bytes_bf16", raw(bf16, pa.binary(48)), meta={**key, b"ditharos.latent_dtype": b"bf16"})
write("view_bytes_bf16", raw(bf16, pa.binary_view()), meta={**key, b"ditharos.latent_dtype": b"bf16"})
write("labels_dictionary", nested(x, var), label=labels.dictionary_encode())
for name in ("int8", "int16", "int32", "uint8", "uint16", "uint32", "uint64"):
    write("labels_" + name, nested(x, var), label=labels.cast(name))
pq.write_table(pa.table({"latent_mean": nested(x, var), "latent_logvar": nested(-x, large), "latent_flipped_mean": nested(x[..., ::-1].copy(), var),
    "latent_flipped_logvar": nested(x * 0, var), "label": labels}), f"{folder}/moments.parquet")

bad = f"{folder}/bad"
import os; os.mkdir(bad)
folder = bad
listed = [row.tolist() for row in x]
with_null = lambda at: pa.array([None if i == at else row for i, row in enumerate(listed)], type=pa.list_(pa.list_(pa.list_(pa.float32()))))
write("null_row", with_null(40))
short = [row for row in listed]; short[45] = [plane[:2] for plane in listed[45]]
write("short_row", pa.array(short, type=pa.list_(pa.list_(pa.list_(pa.float32())))))
hole = [row for row in listed]; hole[3] = [[[None] * 4] * 3] * 2
write("null_number", pa.array(hole, type=pa.list_(pa.list_(pa.list_(pa.float32())))))
write("null_label", nested(x, var), label=pa.array([None if i == 50 else 1 for i in range(rows)], type=pa.int64()))
write("label_range", nested(x, var), meta={b"ditharos.num_classes": b"6"})
write("short_bytes", pa.array([b"x" * (95 if i == 33 else 96) for i in range(rows)]), meta=key)
write("no_shape", var(pa.array(flat16.reshape(-1)), 24))
write("other_shape", nested(x, fixed), meta={b"ditharos.latent_shape": b"[2,4,3]"})
write("bad_shape", nested(x, fixed), meta={b"ditharos.latent_shape": b"[2,0,3]"})
write("int32", nested(x.astype(np.int32), var))
nan = x.copy(); nan[35, 1, 2, 3] = np.nan; nan[69, 0, 0, 0] = np.inf
pq.write_table(pa.table({"latent": nested(nan, var), "label": labels, "id": pa.array(["same" if i in (4, 60) else f"id-{i}" for i in range(rows)])}),
    f"{folder}/nan.parquet", row_group_size=32)
"#;

/// Prints every column of the file that is its argument as JSON, and the metadata.
const READER: &str = r#"
import sys, json, pyarrow.parquet as pq
table = pq.read_table(sys.argv[1])
decode = lambda pairs: {key.decode(): value.decode() for key, value in pairs.items()}
meta = decode(table.schema.metadata)
footer = decode(pq.read_metadata(sys.argv[1]).metadata)
assert all(footer[key] == value for key, value in meta.items()), footer
print(json.dumps({"columns": {name: str(table.schema.field(name).type) for name in table.schema.names}, "meta": meta, "rows": table.to_pylist()}))
"#;

/// The project's Python, or `None` (said aloud) where there is no `.venv`.
fn python() -> Option<PathBuf> {
    let python = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../.venv/bin/python");
    if !python.exists() {
        // Past the test harness, which swallows what a passing test prints.
        use std::io::Write;
        writeln!(std::io::stderr(), "skipped: no .venv (make it with ./dev setup): pyarrow's files were not read")
            .unwrap();
        return None;
    }
    Some(python)
}

/// The folder with the files that pyarrow wrote.
fn fixtures() -> Option<tempfile::TempDir> {
    let python = python()?;
    let folder = tempfile::tempdir().unwrap();
    let done = Command::new(python).arg("-c").arg(WRITER).arg(folder.path()).output().unwrap();
    assert!(done.status.success(), "pyarrow could not write the files:\n{}", String::from_utf8_lossy(&done.stderr));
    Some(folder)
}

fn open(path: &Path) -> Result<LatentDataset, data_loader::DataError> {
    LatentDataset::open(path.to_str().unwrap(), &Columns::default())
}

fn number(index: usize) -> f32 {
    (index % 255) as f32 / 16.0 - 127.0 / 16.0
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file()).collect();
    files.sort();
    files
}

#[test]
fn every_form_reads_back_to_the_same_numbers() {
    let Some(folder) = fixtures() else { return };
    let files = files(folder.path());
    assert_eq!(files.len(), 21);
    let mut digests = Vec::new();
    for path in &files {
        let dataset = open(path).unwrap();
        let meta = dataset.meta();
        let name = path.file_stem().unwrap().to_str().unwrap();
        assert_eq!((&meta.latent_shape[..], meta.rows), (&[2, 3, 4][..], 70), "{name}");
        assert_eq!(meta.dtype == Dtype::Bf16, name.ends_with("bf16"), "{name}");
        // Out of order, with gaps and across row groups, as a shuffled epoch reads.
        let runs =
            [RowRun { first_row: 60, rows: 10 }, RowRun { first_row: 2, rows: 5 }, RowRun { first_row: 25, rows: 20 }];
        let block = dataset.read(&runs).unwrap();
        let mut latent = [0f32; 24];
        for (index, &row) in block.rows().iter().enumerate() {
            block.latent(0, index, &mut latent);
            assert_eq!(latent, std::array::from_fn(|i| number(row as usize * 24 + i)), "{name} row {row}");
            assert_eq!(block.labels()[index], row as i64 % 7, "{name}");
        }
        assert!(verify(&dataset).is_empty(), "{name}");
        digests.push(inspect(&dataset).unwrap().sha256_f32);
    }
    assert!(digests.iter().all(|digest| *digest == digests[0]), "{digests:?}");
}

#[test]
fn moments_and_mirrored_moments_are_told_apart() {
    let Some(folder) = fixtures() else { return };
    let dataset = open(&folder.path().join("moments.parquet")).unwrap();
    assert!(dataset.meta().moments && dataset.meta().flipped);
    let block = dataset.read(&[RowRun { first_row: 9, rows: 1 }]).unwrap();
    let mut columns = [[0f32; 24]; 4];
    for (column, out) in columns.iter_mut().enumerate() {
        block.latent(column, 0, out);
    }
    let [mean, logvar, flipped_mean, flipped_logvar] = columns;
    assert_eq!(mean, std::array::from_fn(|i| number(9 * 24 + i)));
    assert_eq!(logvar, mean.map(|number| -number));
    assert_eq!(flipped_mean, std::array::from_fn(|i| mean[i / 4 * 4 + 3 - i % 4]));
    assert_eq!(flipped_logvar, [0.0; 24]);
}

#[test]
fn bad_files_are_refused_with_the_file_and_the_row() {
    let Some(folder) = fixtures() else { return };
    let all = [RowRun { first_row: 0, rows: 70 }];
    let expected: [(&str, &[&str]); 10] = [
        ("null_row", &["row 40 (row group 1)", "`latent` is null"]),
        ("short_row", &["row 45 (row group 1)", "a list of 2", "[2, 3, 4]"]),
        ("null_number", &["row 3 (row group 0)", "`latent` is null"]),
        ("null_label", &["row 50 (row group 1)", "`label` is null"]),
        ("label_range", &["row 6 (row group 0)", "`label` is 6", "0..6"]),
        ("short_bytes", &["row 33 (row group 1)", "95 bytes", "96 bytes"]),
        ("no_shape", &["ditharos.latent_shape", "absent"]),
        ("other_shape", &["ditharos.latent_shape", "[2, 4, 3]"]),
        ("bad_shape", &["ditharos.latent_shape", "`[2,0,3]`"]),
        ("int32", &["`latent`", "Int32", "float32"]),
    ];
    for (name, words) in expected {
        let path = folder.path().join(format!("bad/{name}.parquet"));
        let error = open(&path).and_then(|dataset| dataset.read(&all).map(|_| ())).unwrap_err().to_string();
        assert!(error.contains(path.to_str().unwrap()), "{error}");
        for word in words {
            assert!(error.contains(word), "{name}: `{word}` not in: {error}");
        }
    }
}

#[test]
fn the_program_reports_what_is_there_and_what_is_wrong() {
    let Some(folder) = fixtures() else { return };
    let latents = |arguments: &[&str], file: &str| {
        Command::new(env!("CARGO_BIN_EXE_latents")).args(arguments).arg(folder.path().join(file)).output().unwrap()
    };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();

    let good = latents(&["inspect", "--json"], "labels_int8.parquet");
    let report: serde_json::Value = serde_json::from_slice(&good.stdout).unwrap();
    assert_eq!((report["rows"].as_u64(), report["labels"]["3"].as_u64()), (Some(70), Some(10)));
    assert_eq!(report["latent_shape"], serde_json::json!([2, 3, 4]));
    assert_eq!(report["channels"].as_array().unwrap().len(), 2);
    assert!(latents(&["verify"], "labels_int8.parquet").status.success());

    let bad = latents(&["verify"], "bad/nan.parquet");
    let problems = text(&bad.stderr);
    assert_eq!(bad.status.code(), Some(1), "{problems}");
    for words in [
        "row 35 (row group 1)",
        "NaN at position 23",
        "row 69 (row group 2)",
        "inf at position 0",
        "row 60 (row group 1): `id` is `same`",
        "row 4 of the data set",
    ] {
        assert!(problems.contains(words), "`{words}` not in: {problems}");
    }
    let short = latents(&["verify"], "bad/short_row.parquet");
    assert!(!short.status.success() && text(&short.stderr).contains("row 45"), "{}", text(&short.stderr));
    assert!(!latents(&["inspect"], "nowhere.parquet").status.success());
}

#[test]
fn pyarrow_reads_what_the_writer_writes() {
    let Some(python) = python() else { return };
    let folder = tempfile::tempdir().unwrap();
    for (dtype, name, zstd) in [(Dtype::F16, "halffloat", true), (Dtype::F32, "float", false)] {
        let path = folder.path().join(format!("{dtype}.parquet"));
        let options = WriterOptions {
            dtype,
            zstd,
            scaling_factor: Some(0.18215),
            num_classes: Some(5),
            row_group_rows: 300,
            ..WriterOptions::new(vec![2, 3, 4])
        };
        let mut writer = LatentWriter::create(&path, options).unwrap();
        for row in 0..700 {
            let mean: [f32; 24] = std::array::from_fn(|i| number(row * 24 + i));
            let id = format!("n/{row}");
            writer
                .push(LatentRow {
                    mean: &mean,
                    logvar: &mean.map(|x| -x),
                    flipped: None,
                    label: row as i64 % 5,
                    id: &id,
                })
                .unwrap();
        }
        writer.finish().unwrap();
        let done = Command::new(&python).arg("-c").arg(READER).arg(&path).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let read: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
        assert_eq!(read["columns"]["latent_mean"], format!("fixed_size_list<element: {name} not null>[24]"));
        assert_eq!((&read["columns"]["label"], &read["columns"]["id"]), (&"int64".into(), &"string".into()));
        assert_eq!(
            (&read["meta"]["ditharos.latent_shape"], &read["meta"]["ditharos.scaling_factor"]),
            (&"[2,3,4]".into(), &"0.18215".into())
        );
        let rows = read["rows"].as_array().unwrap();
        assert_eq!(rows.len(), 700);
        for (row, read) in rows.iter().enumerate() {
            assert_eq!((&read["label"], &read["id"]), (&(row % 5).into(), &format!("n/{row}").into()));
            for i in 0..24 {
                let expected = f64::from(number(row * 24 + i));
                assert_eq!(
                    (read["latent_mean"][i].as_f64(), read["latent_logvar"][i].as_f64()),
                    (Some(expected), Some(-expected)),
                    "row {row}"
                );
            }
        }
    }
}
