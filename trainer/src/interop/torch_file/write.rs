//! Writing what `torch.load` reads, also with `weights_only=True`: a zip file with one pickle and the tensors' values.

use super::FORMAT;
use crate::images::AtomicFile;
use crate::interop::InteropError;
use crate::interop::values::{Dtype, TensorSpec};
use npyz::zip::{CompressionMethod, DateTime, ZipWriter, write::FileOptions};
use std::io::Write;
use std::path::Path;

/// Values start at a multiple of this, as PyTorch's own do.
const ALIGN_BYTES: u16 = 64;

/// A Python value as it is to be pickled.
#[derive(Clone, Debug, PartialEq)]
pub enum PyValue {
    /// `None`
    None,
    /// A truth value.
    Bool(bool),
    /// An integer.
    Int(i64),
    /// A float.
    Float(f64),
    /// A string.
    Str(String),
    /// A list.
    List(Vec<PyValue>),
    /// A tuple.
    Tuple(Vec<PyValue>),
    /// A dict, in order.
    Dict(Vec<(PyValue, PyValue)>),
    /// A `collections.OrderedDict`, as state dicts are.
    OrderedDict(Vec<(PyValue, PyValue)>),
    /// A contiguous tensor, F32, F16 or BF16, with a name to ask for its values by.
    Tensor(String, TensorSpec),
}

impl From<&str> for PyValue {
    fn from(text: &str) -> Self {
        Self::Str(text.to_owned())
    }
}

impl PyValue {
    /// A dict with string keys.
    pub fn dict<const N: usize>(entries: [(&str, Self); N]) -> Self {
        Self::Dict(entries.into_iter().map(|(key, value)| (key.into(), value)).collect())
    }
}

/// Writes `value`; `values` gives the bytes of each tensor (row-major, little-endian) when its turn comes. The file appears
/// complete or not at all, and equal values give equal bytes.
///
/// # Errors
/// Those of `values` and of the file system; a tensor whose values have another length than its shape.
pub fn write(
    path: &Path,
    value: &PyValue,
    mut values: impl FnMut(&str) -> Result<Vec<u8>, InteropError>,
) -> Result<(), InteropError> {
    let io = || InteropError::io(path, "write");
    let mut pickler = Pickler { bytes: vec![0x80, 2], tensors: Vec::new() };
    pickler.value(value).map_err(|reason| InteropError::Malformed { path: path.into(), format: FORMAT, reason })?;
    pickler.bytes.push(b'.');

    let mut zip = ZipWriter::new(AtomicFile::create(path).map_err(io())?);
    let mut entry = |name: &str, bytes: &[u8]| {
        let options = FileOptions::default()
            .compression_method(CompressionMethod::Stored)
            .last_modified_time(DateTime::default())
            .large_file(u32::try_from(bytes.len()).is_err());
        zip.start_file_aligned(format!("archive/{name}"), options, ALIGN_BYTES).map_err(|error| io()(error.into()))?;
        zip.write_all(bytes).map_err(io())
    };
    entry("data.pkl", &pickler.bytes)?;
    entry("byteorder", b"little")?;
    for (index, (name, spec)) in pickler.tensors.iter().enumerate() {
        let bytes = values(name)?;
        if bytes.len() != spec.bytes() {
            let reason = format!("has {} bytes; expected {} {:?}", bytes.len(), spec.dtype, spec.shape);
            return Err(InteropError::Tensor { path: path.into(), tensor: (*name).to_owned(), reason });
        }
        entry(&format!("data/{index}"), &bytes)?;
    }
    entry("version", b"3\n")?;
    zip.finish().map_err(|error| io()(error.into()))?.commit().map_err(io())
}

/// Protocol 2, as `torch.save` has it, without memo.
struct Pickler<'a> {
    bytes: Vec<u8>,
    /// In the order of their storages.
    tensors: Vec<(&'a str, &'a TensorSpec)>,
}

impl<'a> Pickler<'a> {
    fn value(&mut self, value: &'a PyValue) -> Result<(), String> {
        match value {
            PyValue::None => self.bytes.push(b'N'),
            PyValue::Bool(value) => self.bytes.push(if *value { 0x88 } else { 0x89 }),
            PyValue::Int(value) => self.int(*value),
            PyValue::Float(value) => {
                self.bytes.push(b'G');
                self.bytes.extend(value.to_be_bytes());
            }
            PyValue::Str(text) => self.text(text)?,
            PyValue::List(items) => {
                self.bytes.extend(b"](");
                items.iter().try_for_each(|item| self.value(item))?;
                self.bytes.push(b'e');
            }
            PyValue::Tuple(items) => {
                self.bytes.push(b'(');
                items.iter().try_for_each(|item| self.value(item))?;
                self.bytes.push(b't');
            }
            PyValue::Dict(entries) => {
                self.bytes.push(b'}');
                self.entries(entries)?;
            }
            PyValue::OrderedDict(entries) => {
                self.bytes.extend(b"ccollections\nOrderedDict\n)R");
                self.entries(entries)?;
            }
            PyValue::Tensor(name, spec) => self.tensor(name, spec)?,
        }
        Ok(())
    }

    fn int(&mut self, value: i64) {
        match i32::try_from(value) {
            Ok(value) => {
                self.bytes.push(b'J');
                self.bytes.extend(value.to_le_bytes());
            }
            Err(_) => {
                self.bytes.extend([0x8a, 8]);
                self.bytes.extend(value.to_le_bytes());
            }
        }
    }

    fn text(&mut self, text: &str) -> Result<(), String> {
        let len = u32::try_from(text.len()).map_err(|_| format!("a string of {} bytes", text.len()))?;
        self.bytes.push(b'X');
        self.bytes.extend(len.to_le_bytes());
        self.bytes.extend(text.as_bytes());
        Ok(())
    }

    fn entries(&mut self, entries: &'a [(PyValue, PyValue)]) -> Result<(), String> {
        self.bytes.push(b'(');
        for (key, value) in entries {
            self.value(key)?;
            self.value(value)?;
        }
        self.bytes.push(b'u');
        Ok(())
    }

    fn tensor(&mut self, name: &'a str, spec: &'a TensorSpec) -> Result<(), String> {
        let storage = match spec.dtype {
            Dtype::F32 => "Float",
            Dtype::F16 => "Half",
            Dtype::BF16 => "BFloat16",
            other => return Err(format!("tensor `{name}` is {other}; weights are written as F32, F16 or BF16")),
        };
        self.bytes.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        self.text("storage")?;
        self.bytes.extend(format!("ctorch\n{storage}Storage\n").as_bytes());
        self.text(&self.tensors.len().to_string())?;
        self.text("cpu")?;
        self.int(spec.numel() as i64);
        self.bytes.extend(b"tQ");
        self.int(0);
        self.bytes.push(b'(');
        spec.shape.iter().for_each(|&side| self.int(side as i64));
        self.bytes.extend(b"t(");
        for dimension in 0..spec.shape.len() {
            let below = spec.shape[dimension + 1..].iter().map(|&side| side.max(1)).product::<usize>();
            self.int(below as i64);
        }
        // requires_grad False; no hooks.
        self.bytes.extend(b"t\x89ccollections\nOrderedDict\n)RtR");
        self.tensors.push((name, spec));
        Ok(())
    }
}
