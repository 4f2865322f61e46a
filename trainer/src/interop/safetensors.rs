//! Safetensors files: one tensor at a time in, whole state dicts out.

use super::file::TensorFile;
use super::values::{Dtype, RawTensor, TensorSpec};
use super::{InteropError, NamedWeights};
use crate::images::AtomicFile;
use checkpoint::SafetensorsHeader;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// An open safetensors file; values are read on demand.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    file: File,
    data_start: u64,
    tensors: BTreeMap<String, TensorSpec>,
    offsets: HashMap<String, u64>,
    about: Value,
}

impl SafetensorsFile {
    /// Reads the header.
    ///
    /// # Errors
    /// [`InteropError::Malformed`] when header and file length do not agree.
    pub fn open(path: &Path) -> Result<Self, InteropError> {
        let malformed = |error: std::io::Error| InteropError::Malformed {
            path: path.into(),
            format: "safetensors",
            reason: error.to_string(),
        };
        let file = File::open(path).map_err(InteropError::io(path, "open"))?;
        let file_bytes = file.metadata().map_err(InteropError::io(path, "open"))?.len();
        let header = SafetensorsHeader::read(&file, file_bytes).map_err(malformed)?;
        let mut tensors = BTreeMap::new();
        let mut offsets = HashMap::new();
        for (name, info) in header.tensors {
            offsets.insert(name.clone(), info.data_offsets.0 as u64);
            tensors.insert(name, TensorSpec { dtype: info.dtype, shape: info.shape });
        }
        let about = serde_json::to_value(header.about).unwrap_or_default();
        Ok(Self { path: path.into(), file, data_start: header.data_start, tensors, offsets, about })
    }
}

impl TensorFile for SafetensorsFile {
    fn path(&self) -> &Path {
        &self.path
    }

    fn format(&self) -> &'static str {
        "safetensors"
    }

    fn tensors(&self) -> &BTreeMap<String, TensorSpec> {
        &self.tensors
    }

    fn about(&self) -> &Value {
        &self.about
    }

    fn read(&self, name: &str) -> Result<RawTensor, InteropError> {
        let (Some(spec), Some(&offset)) = (self.tensors.get(name), self.offsets.get(name)) else {
            let reason = "is not in the file".to_owned();
            return Err(InteropError::Tensor { path: self.path.clone(), tensor: name.to_owned(), reason });
        };
        let mut bytes = vec![0; spec.bytes()];
        let read = self.file.read_exact_at(&mut bytes, self.data_start + offset);
        read.map_err(InteropError::io(&self.path, "read"))?;
        Ok(RawTensor { dtype: spec.dtype, shape: spec.shape.clone(), bytes })
    }
}

/// Writes a safetensors file of these tensors, in the order of their names; `values` gives each one's bytes when its
/// turn comes. The file appears complete or not at all.
///
/// # Errors
/// Those of `values` and of the file system.
pub fn write(
    path: &Path,
    tensors: &BTreeMap<String, TensorSpec>,
    mut values: impl FnMut(&str) -> Result<Vec<u8>, InteropError>,
) -> Result<(), InteropError> {
    let io = || InteropError::io(path, "write");
    let mut end = 0;
    let place = |(name, spec): (&String, &TensorSpec)| {
        let start = end;
        end += spec.bytes();
        (name.clone(), TensorInfo { dtype: spec.dtype, shape: spec.shape.clone(), data_offsets: (start, end) })
    };
    let placed = tensors.iter().map(place).collect();
    let about = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let unwritable = |reason: String| InteropError::Malformed { path: path.into(), format: "safetensors", reason };
    let metadata = Metadata::new(Some(about), placed).map_err(|error| unwritable(error.to_string()))?;
    let mut header = serde_json::to_vec(&metadata).map_err(|error| unwritable(error.to_string()))?;
    header.resize(header.len().next_multiple_of(8), b' ');

    let mut file = AtomicFile::create(path).map_err(io())?;
    file.write_all(&(header.len() as u64).to_le_bytes()).map_err(io())?;
    file.write_all(&header).map_err(io())?;
    for (name, spec) in tensors {
        let bytes = values(name)?;
        if bytes.len() != spec.bytes() {
            let reason = format!("has {} bytes; expected {} {:?}", bytes.len(), spec.dtype, spec.shape);
            return Err(InteropError::Tensor { path: path.into(), tensor: name.clone(), reason });
        }
        file.write_all(&bytes).map_err(io())?;
    }
    file.commit().map_err(io())
}

/// Writes `weights` as safetensors of `dtype` (F32, F16 or BF16).
///
/// # Errors
/// Those of the file system.
pub fn write_weights(path: &Path, weights: &NamedWeights, dtype: Dtype) -> Result<(), InteropError> {
    let spec = |tensor: &tch::Tensor| TensorSpec { dtype, shape: tensor.size().iter().map(|&n| n as usize).collect() };
    let specs = weights.tensors.iter().map(|(name, tensor)| (name.clone(), spec(tensor))).collect();
    write(path, &specs, |name| Ok(super::values::encode(&super::values::to_vec(&weights.tensors[name])?, dtype)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interop::WeightsSection;

    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
    }

    #[test]
    fn what_is_written_reads_back_and_the_crate_agrees() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w.safetensors");
        let values = [1.0f32, f32::from_bits(1), -0.0, f32::INFINITY, 3.5e-38, 7.0];
        let tensors = BTreeMap::from([
            ("b".to_owned(), super::super::values::tensor(&values, &[2, 3]).unwrap()),
            ("a.weight".to_owned(), super::super::values::tensor(&values[..1], &[]).unwrap()),
        ]);
        write_weights(&path, &NamedWeights { tensors, model: None }, Dtype::F32).unwrap();
        let read = crate::interop::read_weights(path.to_str().unwrap(), WeightsSection::Ema).unwrap();
        assert_eq!(read.tensors.keys().collect::<Vec<_>>(), ["a.weight", "b"]);
        let back = super::super::values::to_vec(&read.tensors["b"]).unwrap();
        assert!(values.iter().zip(&back).all(|(a, b)| a.to_bits() == b.to_bits()));
        assert_eq!((read.tensors["b"].size(), read.tensors["a.weight"].size()), (vec![2, 3], vec![]));
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(safetensors::SafeTensors::deserialize(&bytes).unwrap().names().len(), 2);
    }

    #[test]
    fn unsound_files_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bad.safetensors");
        let one = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
        let huge = r#"{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,4]}}"#;
        let beyond = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#;
        for (bytes, says) in [
            (vec![1, 2, 3], "only 3 bytes"),
            (u64::MAX.to_le_bytes().to_vec(), "a header of"),
            (file(one, &[0; 3]), "4 bytes of data, but 3 follow"),
            (file(one, &[0; 5]), "4 bytes of data, but 5 follow"),
            (file(huge, &[0; 4]), "header"),
            (file(beyond, &[0; 4]), "header"),
            (file("{", &[]), "header"),
        ] {
            std::fs::write(&path, bytes).unwrap();
            let error = SafetensorsFile::open(&path).unwrap_err().to_string();
            assert!(error.contains(says) && error.contains("bad.safetensors"), "{error}");
        }
    }
}
