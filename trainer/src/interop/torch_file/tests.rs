use super::write::PyValue;
use super::*;
use crate::interop::values::Dtype;
use serde_json::json;
use std::io::Write;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/torch_files").join(name)
}

fn values(file: &TorchFile, name: &str) -> Vec<f32> {
    file.read(name).unwrap().to_f32().unwrap()
}

/// The refusal of a file with these bytes.
fn refusal(bytes: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.pt");
    std::fs::write(&path, bytes).unwrap();
    let error = TorchFile::open(&path).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("bad.pt"), "{error}");
    error
}

/// The refusal of a zip file with this pickle and one storage `0` of 8 bytes.
fn pickle_refusal(pickle: &[u8]) -> String {
    refusal(&zip_of(&[("x/data.pkl", pickle), ("x/data/0", &[0; 8])]))
}

fn zip_of(entries: &[(&str, &[u8])]) -> Vec<u8> {
    use npyz::zip::{CompressionMethod, ZipWriter, write::FileOptions};

    let mut zip = ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, bytes) in entries {
        zip.start_file(*name, FileOptions::default().compression_method(CompressionMethod::Stored)).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

#[test]
fn every_form_that_pytorch_writes_reads_to_the_same_values() {
    let base: Vec<f32> = (0..24).map(|i| i as f32 - 3.5).collect();
    for name in ["zip.pt", "zip64.pt", "protocol4.pt", "legacy.pt"] {
        let file = TorchFile::open(&data(name)).unwrap();
        let of = |tensor: &str| values(&file, &format!("model/{tensor}"));
        assert_eq!(of("f32"), base, "{name}");
        let transposed: Vec<f32> = (0..24).map(|i| base[i % 4 * 6 + i / 4]).collect();
        assert_eq!(of("transposed"), transposed, "{name}");
        assert_eq!(file.tensors()["model/transposed"].shape, [6, 4]);
        assert_eq!(of("middle"), [4.5, 5.5, 6.5, 10.5, 11.5, 12.5], "{name}");
        assert_eq!(of("column"), [-2.5, 3.5, 9.5, 15.5], "{name}");
        assert_eq!(of("f64"), base.iter().map(|v| (f64::from(*v) / 3.0) as f32).collect::<Vec<_>>(), "{name}");
        for (tensor, dtype, mantissa_bits) in [("f16", Dtype::F16, 11), ("bf16", Dtype::BF16, 8)] {
            assert_eq!(file.tensors()[&format!("model/{tensor}")].dtype, dtype);
            let close = |(found, exact): (f32, &f32)| {
                (found - exact / 3.0).abs() <= exact.abs() / 3.0 / f32::powi(2.0, mantissa_bits)
            };
            assert!(of(tensor).into_iter().zip(&base).all(close), "{name} {tensor}");
        }
        assert_eq!(of("i64"), [-(2f32.powi(40)), 7.0], "{name}");
        assert_eq!((of("scalar"), &file.tensors()["model/scalar"].shape), (vec![2.5], &vec![]));
        assert_eq!((of("empty"), &file.tensors()["model/empty"].shape), (vec![], &vec![0, 3]));
        assert_eq!(of("parameter"), base[..6].iter().map(|v| v * 2.0).collect::<Vec<_>>(), "{name}");
        assert_eq!(values(&file, "shared/f32"), base);
        assert_eq!(
            file.about(),
            &json!({
                "args": {"model": "DiT-S/4", "image_size": 256, "num_classes": 10, "results_dir": null, "lr": 1e-4, "betas": [0.9, 0.999]},
                "model": {}, "shared": {}, "steps": 7, "tensors": []
            }),
            "{name}"
        );
    }
    let big = TorchFile::open(&data("big_endian.pt")).unwrap();
    assert_eq!((values(&big, "a"), values(&big, "b")), (base.clone(), base));
}

#[test]
fn pickles_that_name_code_are_refused_by_the_name() {
    let error = TorchFile::open(&data("module.pt")).unwrap_err().to_string();
    assert!(error.contains("`torch.nn.modules.linear.Linear`") && error.contains("module.pt"), "{error}");
    for (pickle, name) in [
        (&b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00trueR."[..], "`os.system`"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.", "`builtins.eval`"),
        (b"\x80\x02cnumpy.core.multiarray\nscalar\n.", "`numpy.core.multiarray.scalar`"),
        (b"\x80\x02ctorch\nload\n.", "`torch.load`"),
        (b"\x80\x02ctorch\nQInt8Storage\n.", "`torch.QInt8Storage`"),
    ] {
        let error = pickle_refusal(pickle);
        assert!(error.contains(name) && error.contains("load it with PyTorch"), "{error}");
    }
}

/// A pickle of one float tensor over storage `0` with offset, shape and strides of one byte each.
fn one_tensor(numel: u8, offset: u8, shape: [u8; 2], stride: [u8; 2]) -> Vec<u8> {
    let mut pickle = b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n(".to_vec();
    pickle.extend(b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK");
    pickle.push(numel);
    pickle.extend(b"tQK");
    pickle.push(offset);
    for [first, second] in [shape, stride] {
        pickle.extend([b'K', first, b'K', second, 0x86]);
    }
    pickle.extend(b"\x89}tRs.");
    pickle
}

#[test]
fn views_that_leave_their_storage_are_refused() {
    for (pickle, says) in [
        (one_tensor(2, 1, [1, 2], [1, 1]), "goes beyond its storage"),
        (one_tensor(2, 0, [1, 2], [1, 2]), "goes beyond its storage"),
        (one_tensor(2, 0, [2, 2], [0, 1]), "more elements than its storage"),
        (one_tensor(2, 0, [255, 255], [0, 0]), "more elements than its storage"),
        (one_tensor(3, 0, [1, 3], [1, 1]), "tensor `w`: needs 3 elements of F32 in storage `0`, which has 8 bytes"),
    ] {
        let error = pickle_refusal(&pickle);
        assert!(error.contains(says), "{says}: {error}");
    }
    let lost = refusal(&zip_of(&[("x/data.pkl", &one_tensor(2, 0, [1, 2], [2, 1]))]));
    assert!(lost.contains("storage `0` is not in the file"), "{lost}");
}

#[test]
fn unsound_files_are_refused_and_told_why() {
    let zip = std::fs::read(data("zip.pt")).unwrap();
    let legacy = std::fs::read(data("legacy.pt")).unwrap();
    let compressed = TorchFile::open(&data("compressed.pt")).unwrap_err().to_string();
    assert!(compressed.contains("`zip/data.pkl` is compressed"), "{compressed}");
    for (bytes, says) in [
        (&zip[..zip.len() - 1], "cut short"),
        (&legacy[..legacy.len() - 1], "storage `"),
        (&legacy[..300], "it ends too early"),
        (b"\x80\x02K\x01.", "not one of torch.save"),
    ] {
        let error = refusal(bytes);
        assert!(error.contains(says), "{says}: {error}");
    }
    for (pickle, says) in [
        (&b"\x80\x02N"[..], "it ends too early"),
        (b"\x80\x02.", "the stack is empty"),
        (b"\x80\x02h\x05.", "nothing was remembered as 5"),
        (b"\x80\x09N.", "protocol 9"),
        (b"\x80\x02cos\n", "it ends too early"),
        (b"\x80\x02B\xff\xff\xff\xffa", "goes beyond its end"),
        (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\xffa", "goes beyond its end"),
        (b"\x80\x02i", "opcode 0x69"),
        (b"\x80\x02](NNu.", "no dict"),
        (b"\x80\x02}(Nu.", "a key without a value"),
        (b"\x80\x02t", "there is no mark"),
        (b"\x80\x02NQ.", "describes no storage"),
        (b"\x80\x02N}b.", "a state for something that has none"),
        (b"\x80\x02X\x01\x00\x00\x00\xff.", "not UTF-8"),
    ] {
        let error = pickle_refusal(pickle);
        assert!(error.contains(says), "{says}: {error}");
    }
    // One flipped bit in the values is found when they are read.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("flipped.pt");
    let mut flipped = zip.clone();
    let at = flipped.windows(4).position(|bytes| bytes == (-3.5f32).to_le_bytes()).unwrap();
    flipped[at] ^= 1;
    std::fs::write(&path, flipped).unwrap();
    let error = TorchFile::open(&path).unwrap().read("model/f32").unwrap_err().to_string();
    assert!(error.contains("`model/f32`") && error.contains("CRC-32"), "{error}");
}

#[test]
fn deep_nesting_cycles_and_shared_dicts_end() {
    // A list in a list …, a million deep.
    let deep = [b"\x80\x02".to_vec(), vec![b']'; 1_000_000], vec![b'a'; 999_999], b".".to_vec()].concat();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.pt");
    let open = |pickle: &[u8]| {
        std::fs::write(&path, zip_of(&[("x/data.pkl", pickle)])).unwrap();
        TorchFile::open(&path)
    };
    assert!(open(&deep).unwrap().tensors().is_empty());
    // A dict that holds itself.
    assert!(open(b"\x80\x02}q\x00K\x01h\x00s.").unwrap().tensors().is_empty());
    // Each of 14 dicts holds the one before it a hundred times.
    let mut shared = b"\x80\x02}q\x00".to_vec();
    for level in 1..=14u8 {
        shared.extend(b"}(");
        (0..100u8).for_each(|key| shared.extend([b'K', key, b'h', level - 1]));
        shared.extend([b'u', b'q', level]);
    }
    shared.push(b'.');
    let error = open(&shared).unwrap_err().to_string();
    assert!(error.contains("nested dicts"), "{error}");
}

#[test]
fn no_mutation_of_a_real_file_panics_or_reads_out_of_bounds() {
    let folder = tempfile::tempdir().unwrap();
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let mut accepted = 0;
    for name in ["zip.pt", "zip64.pt", "protocol4.pt", "legacy.pt"] {
        let original = std::fs::read(data(name)).unwrap();
        for round in 0..500 {
            let mut bytes = original.clone();
            for _ in 0..1 + random(4) {
                let at = random(bytes.len());
                match round % 4 {
                    0 => bytes[at] ^= 1 << random(8),
                    1 => bytes[at] = [0, 0xff, b'.', b'(', b'R', b'b', b'u', b'K'][random(8)],
                    2 => drop(bytes.drain(at..(at + 1 + random(8)).min(bytes.len()))),
                    _ => drop(bytes.splice(at..at, [random(256) as u8])),
                }
                if bytes.is_empty() {
                    bytes.push(0x80);
                }
            }
            // A new name each time: file systems flush a file that is written again.
            let path = folder.path().join(format!("{name}-{round}"));
            std::fs::write(&path, bytes).unwrap();
            let opened = crate::interop::file::open(&path);
            std::fs::remove_file(&path).unwrap();
            if let Ok(file) = opened {
                for tensor in file.tensors().keys() {
                    accepted += usize::from(file.read(tensor).is_ok());
                }
            }
        }
    }
    assert!(accepted > 200, "most mutations must get past the container: {accepted}");
}

/// The project's Python, or `None` (said aloud) where there is no `.venv`.
fn python() -> Option<PathBuf> {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.venv/bin/python");
    if !python.exists() {
        writeln!(std::io::stderr(), "SKIPPED: no {}", python.display()).unwrap();
        return None;
    }
    Some(python)
}

fn run_python(python: &Path, script: &str, arguments: &[&Path]) -> String {
    let output = std::process::Command::new(python).arg("-c").arg(script).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn sample() -> PyValue {
    let tensor = |name: &str, dtype, shape: &[usize]| {
        PyValue::Tensor(name.to_owned(), TensorSpec { dtype, shape: shape.to_vec() })
    };
    let state_dict = PyValue::OrderedDict(vec![
        ("a.weight".into(), tensor("a", Dtype::F32, &[2, 3])),
        ("half".into(), tensor("h", Dtype::F16, &[3])),
        ("brain".into(), tensor("b", Dtype::BF16, &[3, 1])),
        ("scalar".into(), tensor("s", Dtype::F32, &[])),
        ("none".into(), tensor("n", Dtype::F32, &[0, 4])),
    ]);
    let plain = PyValue::List(vec![
        PyValue::None,
        PyValue::Bool(true),
        PyValue::Int(-5),
        PyValue::Int(1 << 40),
        PyValue::Float(0.1),
        PyValue::Tuple(vec![]),
        PyValue::Tuple(vec!["ü".into(), PyValue::Dict(vec![(PyValue::Int(3), PyValue::List(vec![]))])]),
    ]);
    PyValue::dict([("model", state_dict), ("plain", plain)])
}

fn sample_values(name: &str) -> Result<Vec<u8>, InteropError> {
    use crate::interop::values::encode;
    Ok(match name {
        "a" => encode(&[1.0, -0.0, 3.5e-42, f32::INFINITY, 0.1, 6.0], Dtype::F32),
        "h" => encode(&[1.0, 0.1, 65504.0], Dtype::F16),
        "b" => encode(&[1.0, 0.1, -3e38], Dtype::BF16),
        "s" => encode(&[7.0], Dtype::F32),
        _ => Vec::new(),
    })
}

#[test]
fn what_is_written_reads_back_and_is_written_complete_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w.pt");
    write::write(&path, &sample(), sample_values).unwrap();
    let file = TorchFile::open(&path).unwrap();
    for (name, value) in
        [("model/a.weight", "a"), ("model/half", "h"), ("model/brain", "b"), ("model/scalar", "s"), ("model/none", "n")]
    {
        assert_eq!(file.read(name).unwrap().bytes, sample_values(value).unwrap(), "{name}");
    }
    assert_eq!(file.tensors()["model/brain"].shape, [3, 1]);
    assert_eq!(file.about()["plain"], json!([null, true, -5, 1u64 << 40, 0.1, [], ["ü", {"3": []}]]));
    let first = std::fs::read(&path).unwrap();
    write::write(&path, &sample(), sample_values).unwrap();
    assert_eq!(first, std::fs::read(&path).unwrap());
    let error = write::write(&path, &sample(), |_| Ok(vec![0; 3])).unwrap_err().to_string();
    assert!(error.contains("tensor `a`: has 3 bytes; expected F32 [2, 3]"), "{error}");
    assert_eq!(first, std::fs::read(&path).unwrap());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file is left");
}

#[test]
fn pytorch_loads_what_is_written_as_weights_only_and_mapped() {
    let Some(python) = python() else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w.pt");
    write::write(&path, &sample(), sample_values).unwrap();
    let script = r#"
import sys, collections, torch
for options in ({}, {"mmap": True}):
    whole = torch.load(sys.argv[1], weights_only=True, **options)
    model = whole["model"]
    assert type(model) is collections.OrderedDict and list(model) == ["a.weight", "half", "brain", "scalar", "none"]
    bits = model["a.weight"].view(torch.int32).tolist()
    assert bits == torch.tensor([[1, -0.0, 3.5e-42], [float("inf"), 0.1, 6]]).view(torch.int32).tolist(), bits
    assert torch.equal(model["half"], torch.tensor([1, 0.1, 65504], dtype=torch.float16))
    assert torch.equal(model["brain"], torch.tensor([[1], [0.1], [-3e38]], dtype=torch.bfloat16))
    assert model["scalar"].shape == () and model["scalar"] == 7 and model["none"].shape == (0, 4)
    assert all(tensor.is_contiguous() for tensor in model.values())
    assert whole["plain"] == [None, True, -5, 1 << 40, 0.1, (), ("ü", {3: []})], whole["plain"]
    model["a.weight"].add_(1)
print("fine")
"#;
    assert_eq!(run_python(&python, script, &[&path]), "fine");
}

#[test]
#[ignore = "writes 4.5 GB"]
fn files_beyond_4_gib_read_back_here_and_in_pytorch() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("large.pt");
    let spec = |numel: usize| TensorSpec { dtype: Dtype::F32, shape: vec![numel] };
    // One tensor beyond 4 GiB, and one that begins beyond it.
    let numel = (1 << 30) + 5;
    let value =
        PyValue::dict([("a", PyValue::Tensor("a".into(), spec(numel))), ("b", PyValue::Tensor("b".into(), spec(2)))]);
    let values = |name: &str| {
        let mut bytes = vec![0; if name == "a" { 4 * numel } else { 8 }];
        let end = bytes.len() - 4;
        bytes[end..].copy_from_slice(&7f32.to_le_bytes());
        Ok(bytes)
    };
    write::write(&path, &value, values).unwrap();
    let file = TorchFile::open(&path).unwrap();
    assert_eq!(super::super::official::tensor(&file, "b").unwrap().double_value(&[1]), 7.0);
    assert_eq!(file.read("a").unwrap().bytes[4 * numel - 4..], 7f32.to_le_bytes());
    let Some(python) = python() else { return };
    let script = "import sys, torch; w = torch.load(sys.argv[1], mmap=True); print(w['a'].shape[0], w['a'][-1].item(), w['b'].tolist())";
    assert_eq!(run_python(&python, script, &[&path]), format!("{numel} 7.0 [0.0, 7.0]"));
}
