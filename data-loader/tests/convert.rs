//! What other programs have written becomes a data set, and goes back again. The fixtures are made by the real libraries, see
//! tests/fixtures/convert/make.py.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use data_loader::{Columns, Dtype, LatentDataset, RowBlock, RowRun, inspect, verify};

const ROWS: usize = 12;
const NUMEL: usize = 24;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/convert").join(name)
}

fn latents(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_latents")).args(arguments).output().unwrap()
}

/// Runs `latents` and expects it to succeed.
fn run(arguments: &[&str]) -> String {
    let done = latents(arguments);
    let told = String::from_utf8(done.stderr).unwrap();
    assert!(done.status.success(), "latents {arguments:?}: {told}");
    told
}

/// Runs `latents import`, expects it to fail and to leave nothing, and returns its words.
fn refused(source: &Path, more: &[&str]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let dest = folder.path().join("set");
    let done = latents(&[&["import", text(source), text(&dest)], more].concat());
    assert_eq!(done.status.code(), Some(1), "{source:?} {more:?}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "something is left of {source:?}");
    String::from_utf8(done.stderr).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn open(path: &Path) -> LatentDataset {
    LatentDataset::open(text(path), &Columns::default()).unwrap()
}

fn all(dataset: &LatentDataset) -> RowBlock {
    dataset.read(&[RowRun { first_row: 0, rows: dataset.meta().rows }]).unwrap()
}

fn latent(block: &RowBlock, column: usize, row: usize) -> [f32; NUMEL] {
    let mut out = [0.0; NUMEL];
    block.latent(column, row, &mut out);
    out
}

/// Sample `row` of every fixture.
fn sample(row: usize) -> [f32; NUMEL] {
    std::array::from_fn(|i| ((row * NUMEL + i) % 255) as f32 / 16.0 - 127.0 / 16.0)
}

fn mirrored(latent: [f32; NUMEL]) -> [f32; NUMEL] {
    std::array::from_fn(|i| latent[i / 4 * 4 + 3 - i % 4])
}

fn label(row: usize) -> i64 {
    (row * 3 % 7) as i64
}

/// The ids of a data set, by way of an export to JSON members.
fn ids(dataset: &Path) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("npy");
    run(&["export", text(dataset), text(&out), "--to", "npy", "--posterior", "mean", "--drop-flipped"]);
    let text = std::fs::read_to_string(out.join("ids.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn every_format_is_imported_with_its_numbers_labels_and_ids() {
    let numbered = |format: &str| (0..ROWS).map(|row| format.replace("{}", &row.to_string())).collect::<Vec<_>>();
    let shards = (0..ROWS)
        .map(|row| {
            if row < 7 {
                format!("latents_rank00_shard000/{row}")
            } else {
                format!("latents_rank00_shard001/{}", row - 7)
            }
        })
        .collect::<Vec<_>>();
    let keys = (0..ROWS).map(|row| format!("n{}/{row:04}", label(row))).collect::<Vec<_>>();
    let of_bytes = ["--column", "latent=vae", "--shape", "2,3,4", "--bytes-dtype", "f16"];
    // Name, options, number type, log-variances, mirrored ones, ids.
    let expected = [
        ("fast_dit", &[][..], Dtype::F32, false, false, numbered("{}")),
        ("lightningdit", &[], Dtype::F32, false, true, shards),
        ("webdataset", &[], Dtype::F16, false, false, keys),
        ("webdataset_moments", &[], Dtype::F32, true, false, numbered("name.{}")),
        ("mds", &[], Dtype::F16, false, false, numbered("id-{}")),
        ("mds_zstd", &[], Dtype::F16, false, false, numbered("id-{}")),
        ("mds_gz", &[], Dtype::F16, false, false, numbered("id-{}")),
        ("mds_bytes", &of_bytes, Dtype::F16, false, false, numbered("{}")),
    ];
    let folder = tempfile::tempdir().unwrap();
    let mut digests = Vec::new();
    for (name, options, dtype, moments, flipped, expected_ids) in expected {
        let dest = folder.path().join(name);
        let options = [options, &["--file-rows", "5", "--row-group-rows", "2", "--threads", "3"]].concat();
        run(&[&["import", text(&fixture(name)), text(&dest)], &options[..]].concat());
        let dataset = open(&dest);
        let meta = dataset.meta();
        assert_eq!((meta.rows, meta.files, meta.num_classes), (12, 3, Some(7)), "{name}");
        assert_eq!((&meta.latent_shape[..], meta.dtype), (&[2, 3, 4][..], dtype), "{name}");
        assert_eq!((meta.moments, meta.flipped), (moments, flipped), "{name}");
        assert_eq!(dataset.row_groups().iter().map(|group| group.rows).max(), Some(2), "{name}");
        let block = all(&dataset);
        for row in 0..ROWS {
            assert_eq!(latent(&block, 0, row), sample(row), "{name} row {row}");
            assert_eq!(block.labels()[row], label(row), "{name}");
            if moments {
                assert_eq!(latent(&block, 1, row), sample(row).map(|x| -x));
            }
            if flipped {
                assert_eq!(latent(&block, 1, row), mirrored(sample(row)));
            }
        }
        assert_eq!(ids(&dest), expected_ids, "{name}");
        assert!(verify(&dataset).is_empty(), "{name}");
        digests.push(inspect(&dataset).unwrap().sha256_f32);
    }
    assert!(digests.iter().all(|digest| *digest == digests[0]), "{digests:?}");
}

#[test]
fn what_is_exported_is_imported_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    run(&["import", text(&fixture("lightningdit")), text(&at("flipped")), "--scaling-factor", "0.5"]);
    run(&["import", text(&fixture("webdataset_moments")), text(&at("moments")), "--dtype", "f16"]);
    run(&["import", text(&fixture("mds")), text(&at("plain")), "--dtype", "bf16", "--num-classes", "10"]);
    for (set, to, more) in [
        ("flipped", "parquet", &[][..]),
        ("flipped", "safetensors", &[]),
        ("flipped", "webdataset", &[]),
        ("flipped", "mds", &[]),
        ("moments", "parquet", &["--zstd"]),
        ("moments", "webdataset", &[]),
        ("moments", "mds", &[]),
        ("plain", "parquet", &[]),
        ("plain", "npy", &[]),
        ("plain", "safetensors", &["--dtype", "bf16"]),
        ("plain", "mds", &[]),
    ] {
        let (out, back) = (at(&format!("{set}-{to}")), at(&format!("{set}-{to}-back")));
        run(&[&["export", text(&at(set)), text(&out), "--to", to, "--file-rows", "5"], more].concat());
        run(&["import", text(&out), text(&back)]);
        let (first, second) = (open(&at(set)), open(&back));
        let (old, new) = (inspect(&first).unwrap(), inspect(&second).unwrap());
        assert_eq!(old.sha256_f32, new.sha256_f32, "{set} {to}");
        assert_eq!((old.moments, old.flipped), (new.moments, new.flipped), "{set} {to}");
        let (old, new) = (all(&first), all(&second));
        assert_eq!(old.labels(), new.labels(), "{set} {to}");
        for row in 0..ROWS {
            for column in 0..old.latent_columns() {
                assert_eq!(latent(&old, column, row), latent(&new, column, row), "{set} {to}");
            }
        }
        assert_eq!(ids(&at(set)), ids(&back), "{set} {to}");
        if to == "parquet" {
            let (old, new) = (first.meta(), second.meta());
            assert_eq!(
                (old.scaling_factor, old.num_classes, old.dtype),
                (new.scaling_factor, new.num_classes, new.dtype)
            );
        }
    }
    // What a format has no place for is said.
    for (set, to, says) in [("moments", "npy", "--posterior mean"), ("flipped", "npy", "--drop-flipped")] {
        let done = latents(&["export", text(&at(set)), text(&at("never")), "--to", to]);
        let told = String::from_utf8(done.stderr).unwrap();
        assert!(!done.status.success() && told.contains(says), "{told}");
        assert!(!at("never").exists());
    }
}

#[test]
fn rows_are_sorted_and_shuffled_the_same_way_from_every_source() {
    let folder = tempfile::tempdir().unwrap();
    let mut shuffled: Vec<Vec<String>> = Vec::new();
    run(&["import", text(&fixture("mds")), text(&folder.path().join("parquet"))]);
    for (name, source) in [
        ("mds", fixture("mds")),
        ("mds_zstd", fixture("mds_zstd")),
        // A sequential source goes through a copy.
        ("parquet", folder.path().join("parquet")),
    ] {
        let dest = |kind: &str| folder.path().join(format!("{name}-{kind}"));
        run(&["import", text(&source), text(&dest("label")), "--sort", "label", "--file-rows", "5"]);
        let dataset = open(&dest("label"));
        let block = all(&dataset);
        let mut expected: Vec<usize> = (0..ROWS).collect();
        expected.sort_by_key(|&row| label(row));
        for (at, &row) in expected.iter().enumerate() {
            assert_eq!((latent(&block, 0, at), block.labels()[at]), (sample(row), label(row)), "{name}");
        }
        let by_label: Vec<String> = expected.iter().map(|row| format!("id-{row}")).collect();
        assert_eq!(ids(&dest("label")), by_label);

        run(&["import", text(&source), text(&dest("id")), "--sort", "id"]);
        let sorted = ids(&dest("id"));
        assert!(sorted.is_sorted() && sorted.len() == ROWS, "{sorted:?}");

        run(&[
            "import",
            text(&source),
            text(&dest("shuffled")),
            "--shuffle",
            "7",
            "--file-rows",
            "5",
            "--threads",
            "4",
        ]);
        let (block, order) = (all(&open(&dest("shuffled"))), ids(&dest("shuffled")));
        for (at, id) in order.iter().enumerate() {
            let row: usize = id.trim_start_matches("id-").parse().unwrap();
            assert_eq!((latent(&block, 0, at), block.labels()[at]), (sample(row), label(row)), "{name}");
        }
        shuffled.push(order);
    }
    assert!(shuffled.iter().all(|order| *order == shuffled[0]), "{shuffled:?}");
    let mut back = shuffled[0].clone();
    back.sort_by_key(|id| id[3..].parse::<usize>().unwrap());
    assert!(back != shuffled[0] && back == (0..ROWS).map(|row| format!("id-{row}")).collect::<Vec<_>>());
}

#[test]
fn numbers_are_scaled_and_normalised_as_asked() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    // fast-DiT's numbers are scaled already; what the model sees stays the same.
    run(&["import", text(&fixture("fast_dit")), text(&at("as-is"))]);
    assert_eq!(open(&at("as-is")).meta().scaling_factor, Some(1.0));
    run(&["import", text(&fixture("fast_dit")), text(&at("raw")), "--divide-by", "0.25", "--dtype", "f16"]);
    let raw = open(&at("raw"));
    assert_eq!((raw.meta().scaling_factor, raw.meta().dtype), (Some(0.25), Dtype::F16));
    assert_eq!(latent(&all(&raw), 0, 5), sample(5).map(|x| x * 4.0));
    // And back.
    run(&["export", text(&at("raw")), text(&at("npy")), "--to", "npy", "--scaled"]);
    run(&["import", text(&at("npy")), text(&at("again"))]);
    assert_eq!(latent(&all(&open(&at("again"))), 0, 5), sample(5));

    run(&["import", text(&fixture("webdataset_moments")), text(&at("moments")), "--divide-by", "0.5"]);
    let block = all(&open(&at("moments")));
    assert_eq!(latent(&block, 0, 3), sample(3).map(|x| x * 2.0));
    assert_eq!(latent(&block, 1, 3), sample(3).map(|x| -x - (2.0 * 0.5f64.ln()) as f32));

    let told = run(&["import", text(&fixture("lightningdit")), text(&at("lightning"))]);
    assert!(told.contains("--normalize"), "{told}");
    run(&["import", text(&fixture("lightningdit")), text(&at("normal")), "--normalize"]);
    let block = all(&open(&at("normal")));
    let normal = |latent: [f32; NUMEL]| -> [f32; NUMEL] {
        std::array::from_fn(|i| if i < 12 { (latent[i] - 0.5) / 2.0 } else { (latent[i] + 1.0) / 4.0 })
    };
    assert_eq!(latent(&block, 0, 8), normal(sample(8)));
    assert_eq!(latent(&block, 1, 8), normal(mirrored(sample(8))));
    // The same statistics from a file.
    let stats = at("stats.json");
    std::fs::write(&stats, r#"{"mean": [0.5, -1], "std": [2, 4]}"#).unwrap();
    run(&["import", text(&fixture("lightningdit")), text(&at("normal2")), "--normalize", "--stats", text(&stats)]);
    assert_eq!(latent(&all(&open(&at("normal2"))), 0, 8), normal(sample(8)));
}

#[test]
fn labels_come_from_a_table_or_another_field() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let table = at("labels.csv");
    std::fs::write(&table, (0..ROWS).map(|row| format!("{row},{}\n", 100 + row)).collect::<String>()).unwrap();
    let of_bytes = ["--column", "latent=vae", "--shape", "2,3,4", "--bytes-dtype", "f16"];
    let source = fixture("mds_bytes");
    run(&[&["import", text(&source), text(&at("table")), "--labels", text(&table)], &of_bytes[..]].concat());
    let dataset = open(&at("table"));
    assert_eq!(dataset.meta().num_classes, Some(112));
    assert_eq!(all(&dataset).labels(), (100..112).collect::<Vec<i64>>());
    run(&[&["import", text(&source), text(&at("one")), "--label", "4"], &of_bytes[..]].concat());
    assert_eq!(all(&open(&at("one"))).labels(), [4; ROWS]);

    // Without classes a data set is good for other models, and can be exported as such.
    let words = ["--column", "label=class"];
    run(&[&["import", text(&source), text(&at("none")), "--unlabelled"], &of_bytes[..]].concat());
    assert!(!open(&at("none")).meta().labels);
    for to in ["webdataset", "mds", "safetensors"] {
        let (out, back) = (at(to), at(&format!("{to}-back")));
        run(&["export", text(&at("none")), text(&out), "--to", to]);
        assert!(refused(&out, &[]).contains("--unlabelled"));
        run(&["import", text(&out), text(&back), "--unlabelled"]);
        assert_eq!(latent(&all(&open(&back)), 0, 7), sample(7));
    }
    run(&[&["import", text(&source), text(&at("words"))], &of_bytes[..], &words].concat());
    assert_eq!(all(&open(&at("words"))).labels(), (0..ROWS).map(label).collect::<Vec<_>>());

    let moments = fixture("webdataset_moments");
    run(&["import", text(&moments), text(&at("field")), "--column", "label=json:class"]);
    assert_eq!(all(&open(&at("field"))).labels(), (0..ROWS).map(|row| label(row) + 1).collect::<Vec<_>>());

    std::fs::write(&table, "0,1\n").unwrap();
    let told = refused(&source, &[&["--labels", text(&table)], &of_bytes[..]].concat());
    assert!(told.contains("`1`") && told.contains("labels.csv"), "{told}");
    assert!(refused(&fixture("mds"), &["--num-classes", "6"]).contains("label 6"));
}

/// A copy of a fixture that a test may break.
fn copied(name: &str) -> (tempfile::TempDir, PathBuf) {
    fn copy(from: &Path, to: &Path) {
        std::fs::create_dir(to).unwrap();
        for entry in std::fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            let target = to.join(entry.file_name());
            match entry.file_type().unwrap().is_dir() {
                true => copy(&entry.path(), &target),
                false => drop(std::fs::copy(entry.path(), target).unwrap()),
            }
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    copy(&fixture(name), &path);
    (folder, path)
}

fn cut(file: &Path, bytes: u64) {
    std::fs::OpenOptions::new().write(true).open(file).unwrap().set_len(bytes).unwrap();
}

/// A `.npy` file of f32.
fn npy(shape: &str, numbers: &[f32]) -> Vec<u8> {
    let text = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({shape}), }}\n");
    let bytes = numbers.iter().flat_map(|number| number.to_le_bytes());
    [b"\x93NUMPY\x01\x00", &(text.len() as u16).to_le_bytes()[..], text.as_bytes()]
        .concat()
        .into_iter()
        .chain(bytes)
        .collect()
}

#[test]
fn bad_npy_folders_are_refused_by_file() {
    let refused = |break_it: &dyn Fn(&Path, &Path), more: &[&str], says: &[&str]| {
        let (_folder, source) = copied("fast_dit");
        break_it(&source.join("imagenet256_features"), &source.join("imagenet256_labels"));
        let told = refused(&source, more);
        for words in says {
            assert!(told.contains(words), "`{words}` not in: {told}");
        }
    };
    let write = |path: PathBuf, bytes: &[u8]| std::fs::write(path, bytes).unwrap();
    refused(&|features, _| cut(&features.join("3.npy"), 200), &[], &["features/3.npy", "has 72 bytes", "96"]);
    refused(&|features, _| cut(&features.join("0.npy"), 4), &[], &["features/0.npy", "only 4 bytes"]);
    refused(&|_, labels| std::fs::remove_file(labels.join("10.npy")).unwrap(), &[], &["labels/10.npy", "missing"]);
    refused(&|features, _| std::fs::remove_file(features.join("2.npy")).unwrap(), &[], &["features/2.npy", "missing"]);
    refused(&|_, labels| write(labels.join("4.npy"), b"nonsense"), &[], &["labels/4.npy", "no .npy file"]);
    refused(
        &|features, _| write(features.join("5.npy"), &npy("1, 2, 4, 3", &[0.0; NUMEL])),
        &[],
        &["features/5.npy", "[2, 4, 3]", "[2, 3, 4]"],
    );
    refused(
        &|features, _| write(features.join("5.npy"), &npy("2, 2, 3, 4", &[0.0; 48])),
        &[],
        &["features/5.npy", "2 samples"],
    );
    let with = |number: f32| {
        let mut numbers = [0.0; NUMEL];
        numbers[9] = number;
        npy("1, 2, 3, 4", &numbers)
    };
    refused(
        &|features, _| write(features.join("11.npy"), &with(f32::NAN)),
        &[],
        &["features/11.npy", "NaN", "position 9"],
    );
    refused(
        &|features, _| write(features.join("11.npy"), &with(65520.0)),
        &["--dtype", "f16"],
        &["features/11.npy", "65520", "f16", "--dtype"],
    );
    refused(&|features, _| std::fs::remove_dir_all(features).unwrap(), &[], &["holds 0 folders …_features"]);
}

#[test]
fn bad_shards_are_refused_by_file_and_entry() {
    let refused = |name: &str, file: &str, break_it: &dyn Fn(&Path), says: &[&str]| {
        let (_folder, source) = copied(name);
        break_it(&source.join(file));
        let told = refused(&source, &[]);
        for words in says.iter().chain(&[file]) {
            assert!(told.contains(words), "{name}: `{words}` not in: {told}");
        }
    };
    let flip = |at: usize| {
        move |path: &Path| {
            let mut bytes = std::fs::read(path).unwrap();
            bytes[at] ^= 1;
            std::fs::write(path, bytes).unwrap();
        }
    };
    let replace = |from: &'static str, to: &'static str| {
        move |path: &Path| {
            let text = std::fs::read_to_string(path).unwrap();
            assert!(text.contains(from));
            std::fs::write(path, text.replacen(from, to, 1)).unwrap();
        }
    };
    let shard = "latents_rank00_shard001.safetensors";
    refused("lightningdit", shard, &|path| cut(path, 500), &["bytes of data"]);
    refused("lightningdit", shard, &|path| cut(path, 5), &["only 5 bytes"]);
    refused("lightningdit", shard, &|path| drop(std::fs::write(path, [0xff; 64])), &["a header of"]);

    // In the data of an entry, in a header, and before the end of the archive.
    refused("webdataset", "train-000001.tar", &|path| cut(path, 512 + 100), &["cut short", "0007"]);
    refused("webdataset", "train-000001.tar", &|path| cut(path, 2048 + 300), &["train-000001.tar"]);
    refused("webdataset", "train-000001.tar", &|path| cut(path, 4 * 2048), &["cut short", "end of the archive"]);
    refused("webdataset", "train-000000.tar", &|path| drop(std::fs::write(path, [7; 4096])), &["no whole tar"]);

    let last = "shard.00001.mds";
    refused("mds", last, &flip(400), &["sha1", "damaged"]);
    refused("mds", last, &|path| cut(path, 300), &["has 300 bytes"]);
    refused("mds", last, &|path| std::fs::remove_file(path).unwrap(), &["cannot be read"]);
    refused("mds_zstd", "shard.00000.mds.zstd", &flip(30), &["md5"]);
    refused("mds_gz", "shard.00000.mds.gz", &flip(30), &["sha256"]);
    refused("mds", "index.json", &|path| cut(path, 100), &["no index"]);
    refused("mds", "index.json", &replace("shard.00000.mds", "../other.mds"), &["../other.mds", "out of the folder"]);
    refused("mds", "index.json", &replace("\"version\": 2}", "\"version\": 3}"), &["expected 2"]);
    refused("mds", "index.json", &replace("ndarray:float16:2,3,4", "ndarray:float16:2,3,5"), &["other columns"]);
    refused(
        "mds_zstd",
        "index.json",
        &|path| {
            let text = std::fs::read_to_string(path).unwrap();
            std::fs::write(path, text.replace("zstd:3", "br")).unwrap();
        },
        &["compressed with br"],
    );
    refused("mds_bytes", "index.json", &|_| {}, &["none of which is known to hold latents"]);
}

#[test]
fn offsets_that_lead_out_of_a_shard_are_refused() {
    // Without digests nothing but the offsets themselves can tell.
    let (_folder, source) = copied("mds_bytes");
    let path = source.join("shard.00001.mds");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    let told = refused(&source, &["--column", "latent=vae", "--shape", "2,3,4", "--bytes-dtype", "f16"]);
    assert!(told.contains("shard.00001.mds: row 0") && told.contains("lies at bytes"), "{told}");
    let (_folder, source) = copied("mds_bytes");
    let told = refused(&source, &["--column", "latent=vae", "--shape", "2,3,5", "--bytes-dtype", "f16"]);
    assert!(told.contains("shard.00000.mds: row 0") && told.contains("takes 60"), "{told}");
}

/// Shape, label and numbers of each row, in an order of their own.
fn rows_in_order(dataset: &Path) -> Vec<(Vec<usize>, i64, Vec<u32>)> {
    let block = all(&open(dataset));
    let row = |row: usize| {
        let mut numbers = vec![0.0; block.latent_numel(row)];
        block.latent(0, row, &mut numbers);
        (block.latent_shape(row).to_vec(), block.labels()[row], numbers.iter().map(|number| number.to_bits()).collect())
    };
    let mut rows: Vec<_> = (0..block.len()).map(row).collect();
    rows.sort();
    rows
}

#[test]
fn rows_may_have_shapes_of_their_own() {
    let (folder, source) = copied("fast_dit");
    std::fs::write(source.join("imagenet256_features/5.npy"), npy("1, 2, 1, 5", &[2.5; 10])).unwrap();
    for dtype in ["f16", "bf16", "f32"] {
        let dest = folder.path().join(dtype);
        run(&["import", text(&source), text(&dest), "--row-shapes", "--dtype", dtype]);
        let dataset = open(&dest);
        let shapes = dataset.row_shapes().unwrap();
        assert_eq!((shapes.of(4), shapes.of(5)), (&[2, 3, 4][..], &[2, 1, 5][..]));
        let block = all(&dataset);
        let mut short = [0.0; 10];
        block.latent(0, 5, &mut short);
        assert_eq!((short, latent(&block, 0, 6)), ([2.5; 10], sample(6)));
        for to in ["parquet", "mds", "webdataset"] {
            let (out, back) =
                (folder.path().join(format!("{dtype}-{to}")), folder.path().join(format!("{dtype}-{to}-back")));
            run(&["export", text(&dest), text(&out), "--to", to]);
            run(&["import", text(&out), text(&back), "--row-shapes", "--shuffle", "3"]);
            let (old, new) = (rows_in_order(&dest), rows_in_order(&back));
            assert_eq!(old, new, "{dtype} {to}");
        }
    }
}

#[test]
fn a_killed_import_leaves_no_data_set_and_can_be_repeated() {
    let (folder, source) = copied("fast_dit");
    let (dest, partial) = (folder.path().join("set"), folder.path().join(".set.partial"));
    // Reading it waits for a writer that never comes, when the first parts are written already.
    let pipe = source.join("imagenet256_features/9.npy");
    let good = std::fs::read(&pipe).unwrap();
    std::fs::remove_file(&pipe).unwrap();
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let arguments = ["import", text(&source), text(&dest), "--file-rows", "2", "--threads", "1"];
    let mut import = Command::new(env!("CARGO_BIN_EXE_latents")).args(arguments).spawn().unwrap();
    let parts = || match std::fs::read_dir(&partial) {
        Ok(entries) => entries.filter(|entry| text(&entry.as_ref().unwrap().path()).ends_with(".parquet")).count(),
        Err(_) => 0,
    };
    while parts() < 2 {
        assert!(import.try_wait().unwrap().is_none());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let second = latents(&arguments);
    assert!(String::from_utf8_lossy(&second.stderr).contains("another process is writing"), "{second:?}");
    import.kill().unwrap();
    import.wait().unwrap();
    assert!(!dest.exists());
    // Neither the folder around it nor the leftover reads as a data set.
    for place in [folder.path(), &partial] {
        assert!(LatentDataset::open(text(place), &Columns::default()).is_err());
    }
    std::fs::remove_file(&pipe).unwrap();
    std::fs::write(&pipe, good).unwrap();
    run(&arguments);
    assert_eq!(open(&dest).meta().rows, 12);
    assert!(!partial.exists());
    let again = latents(&arguments);
    assert!(String::from_utf8_lossy(&again.stderr).contains("not empty"), "{again:?}");
}

#[test]
fn shards_are_named_by_patterns_and_sources_are_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let shards = fixture("webdataset");
    for (at, pattern) in ["train-{000000..000001}.tar", "train-*.tar", "train-00000?.tar"].iter().enumerate() {
        let dest = folder.path().join(at.to_string());
        run(&["import", text(&shards.join(pattern)), text(&dest)]);
        assert_eq!(open(&dest).meta().rows, 12, "{pattern}");
    }
    let dest = folder.path().join("one");
    run(&["import", text(&shards.join("train-000001.tar")), text(&dest)]);
    assert_eq!(open(&dest).meta().rows, 5);
    run(&["import", text(&fixture("fast_dit/imagenet256_features")), text(&folder.path().join("npy"))]);

    assert!(refused(&shards.join("train-{000000..000002}.tar"), &[]).contains("train-000002.tar"));
    let two = tempfile::tempdir().unwrap();
    std::fs::write(two.path().join("a.tar"), "").unwrap();
    std::fs::write(two.path().join("a.safetensors"), "").unwrap();
    let told = refused(two.path(), &[]);
    assert!(told.contains("LightningDit") && told.contains("WebDataset") && told.contains("--from"), "{told}");
    assert!(refused(tempfile::tempdir().unwrap().path(), &[]).contains("nothing that is known"));
}

/// Labels, captions and masks of each row, by its latent.
fn captions_by_latent(path: &Path) -> std::collections::BTreeMap<String, String> {
    let dataset = open(path);
    let (block, meta) = (all(&dataset), dataset.meta().clone());
    let captions = dataset.read_captions(&[RowRun { first_row: 0, rows: meta.rows }]).unwrap();
    let told = |row: usize| {
        let caption = |which: usize| {
            let tokens = captions.tokens(row, which);
            let (mut numbers, mut mask) = (vec![0.0; tokens * captions.dim()], vec![false; tokens]);
            captions.caption(row, which, &mut numbers, &mut mask);
            (numbers, mask)
        };
        let captions: Vec<_> = (0..captions.count(row)).map(caption).collect();
        (format!("{:?}", latent(&block, 0, row)), format!("{:?} {captions:?}", block.labels().get(row)))
    };
    (0..meta.rows as usize).map(told).collect()
}

#[test]
fn captions_are_kept_or_left_out_on_request() {
    let folder = tempfile::tempdir().unwrap();
    let columns = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/columns");
    for name in ["nested", "several", "binary", "columns", "flat", "datasets"] {
        let source = columns.join(format!("caption_{name}.parquet"));
        let expected = captions_by_latent(&source);
        assert_eq!(expected.len(), 5);
        // In order, and by way of a copy on the disk.
        for (number, more) in [&[][..], &["--shuffle", "1", "--file-rows", "2"]].into_iter().enumerate() {
            let there = open(&source).meta().labels;
            let labels: &[&str] = if there { &[] } else { &["--unlabelled"] };
            let (imported, exported) =
                (folder.path().join(format!("{name}-{number}")), folder.path().join(format!("{name}-{number}-x")));
            run(&[&["import", text(&source), text(&imported)], more, labels].concat());
            run(&["export", text(&imported), text(&exported), "--to", "parquet"]);
            for written in [&imported, &exported] {
                assert_eq!(captions_by_latent(written), expected, "{name} {more:?}");
                assert_eq!(
                    open(written).meta().captions.unwrap().masked,
                    open(&source).meta().captions.unwrap().masked
                );
                assert_eq!(verify(&open(written)), [""; 0]);
            }
        }
    }
    let source = columns.join("caption_several.parquet");
    let out = folder.path().join("npy");
    for to in ["npy", "safetensors", "webdataset", "mds"] {
        let done = latents(&["export", text(&source), text(&out), "--to", to]);
        let said = String::from_utf8(done.stderr).unwrap();
        assert!(
            done.status.code() == Some(1) && said.contains("captions") && said.contains("--drop-captions"),
            "{said}"
        );
        assert!(!out.exists(), "{to}");
    }
    run(&["export", text(&source), text(&out), "--to", "npy", "--drop-captions"]);
    let bare = folder.path().join("bare");
    run(&["import", text(&source), text(&bare), "--drop-captions"]);
    assert_eq!(open(&bare).meta().captions, None);
    let said = refused(&source, &["--column", "caption=caption_embeddings"]);
    assert!(said.contains("no column `caption_embeddings` or `caption_embeddings_1`"), "{said}");
}
