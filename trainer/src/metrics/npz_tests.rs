#![allow(clippy::unwrap_used)]
//! Sound files of both compressions, and every way in which a file can be wrong.

use super::npz::NpzFile;
use npyz::WriterBuilder;
use npyz::zip::{CompressionMethod, ZipWriter, write::FileOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

fn npy<T: npyz::AutoSerialize>(shape: &[u64], order: npyz::Order, values: impl IntoIterator<Item = T>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer =
        npyz::WriteOptions::new().default_dtype().shape(shape).order(order).writer(&mut bytes).begin_nd().unwrap();
    writer.extend(values).unwrap();
    writer.finish().unwrap();
    bytes
}

fn write(folder: &Path, method: CompressionMethod, members: &[(&str, Vec<u8>)]) -> PathBuf {
    let path = folder.join("a.npz");
    let mut zip = ZipWriter::new(std::fs::File::create(&path).unwrap());
    for (name, bytes) in members {
        zip.start_file(format!("{name}.npy"), FileOptions::default().compression_method(method)).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap();
    path
}

const C: npyz::Order = npyz::Order::C;

#[test]
fn arrays_are_read_bit_by_bit() {
    let dir = tempfile::tempdir().unwrap();
    for method in [CompressionMethod::Stored, CompressionMethod::Deflated] {
        let members = [
            ("arr_0", npy(&[10, 2], C, 0..20u8)),
            ("mu", npy(&[2], C, [0.5f32, -1.0])),
            ("s", npy(&[1, 1], C, [0.1f64])),
        ];
        let mut file = NpzFile::open(&write(dir.path(), method, &members)).unwrap();
        assert_eq!(file.names(), ["arr_0", "mu", "s"]);
        let mut array = file.array("arr_0").unwrap();
        assert_eq!((array.shape(), array.dtype()), (&[10, 2][..], "|u1"));
        assert_eq!(array.read(3).unwrap(), [0, 1, 2]);
        array.skip(5).unwrap();
        assert_eq!(array.read(2).unwrap(), [8, 9]);
        array.skip(0).unwrap();
        let error = array.skip(11).unwrap_err().to_string();
        assert!(error.contains("a.npz: array `arr_0`: ends 1 bytes too early"), "{error}");
        assert_eq!(file.array("mu").unwrap().into_f64(&[2]).unwrap(), [0.5, -1.0]);
        assert_eq!(file.array("s").unwrap().into_f64(&[1, 1]).unwrap(), [0.1]);
    }
}

#[test]
fn files_that_are_wrong_say_how() {
    let dir = tempfile::tempdir().unwrap();
    let message = |member: Vec<u8>| {
        let path = write(dir.path(), CompressionMethod::Stored, &[("mu", member)]);
        let read = NpzFile::open(&path).and_then(|mut file| file.array("mu")).and_then(|array| array.into_f64(&[2]));
        read.unwrap_err().to_string()
    };
    let sound = npy(&[2], C, [1.0f64, 2.0]);
    for (member, expected) in [
        (sound[..sound.len() - 1].to_vec(), "a.npz: array `mu`: shape [2] of '<f8', but 15 bytes follow the header"),
        ([&sound[..], &[0]].concat(), "but 17 bytes follow"),
        (b"hello".to_vec(), "array `mu`: no numpy header"),
        (npy(&[3], C, [1.0f64; 3]), "shape [3], expected [2]"),
        (npy(&[2], C, [1i64, 2]), "element type <i8, expected <f4 or <f8"),
        (npy(&[1, 2], npyz::Order::Fortran, [1.0f64; 2]), "Fortran order"),
    ] {
        let found = message(member);
        assert!(found.contains(expected), "found {found:?}, expected {expected:?}");
    }
    // Headers that promise more than any machine holds.
    for shape in ["(4294967296, 4294967296, 16,)", "(18446744073709551615,)"] {
        let text = std::str::from_utf8(&sound[10..sound.len() - 16]).unwrap().trim_end();
        let (before, after) = (text.split_once('(').unwrap().0, text.split_once(')').unwrap().1);
        let text = [before, shape, after].concat();
        let header = [&sound[..8], &(text.len() as u16 + 1).to_le_bytes(), text.as_bytes(), b"\n", &[0; 16]].concat();
        let found = message(header);
        assert!(found.contains("array `mu`: shape") && found.contains("the file is damaged"), "{found}");
    }

    let path = write(dir.path(), CompressionMethod::Stored, &[("mu", sound)]);
    let missing = NpzFile::open(&path).unwrap().array("sigma").err().unwrap().to_string();
    assert!(missing.contains("array `sigma`: not in the file, which has mu"), "{missing}");
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() - 30]).unwrap();
    assert!(NpzFile::open(&path).err().unwrap().to_string().contains("not a readable .npz file"));
}
