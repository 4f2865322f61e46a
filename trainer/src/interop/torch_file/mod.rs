//! Files of `torch.save`, read without running anything of them: the zip form of PyTorch 1.6 and later, and the stream of
//! pickles before it.

mod legacy;
mod pickle;
mod rebuild;
pub mod write;
mod zip;

use self::pickle::{Id, Node, Pickle, PickleError};
use self::rebuild::TensorRef;
use super::InteropError;
use super::file::TensorFile;
use super::values::{RawTensor, TensorSpec};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const FORMAT: &str = "torch.save";
/// Deepest nesting of dicts around a tensor or a plain value.
const MAX_DEPTH: usize = 16;
/// Most entries that are looked at: shared dicts could multiply without end.
const MAX_ENTRIES: usize = 1 << 20;

/// An open `torch.save` file; values are read on demand.
#[derive(Debug)]
pub struct TorchFile {
    path: PathBuf,
    file: File,
    places: HashMap<String, Place>,
    big_endian: bool,
    views: HashMap<String, TensorRef>,
    tensors: BTreeMap<String, TensorSpec>,
    about: Value,
}

/// Where the values of a storage lie in the file.
#[derive(Clone, Copy, Debug)]
struct Place {
    offset: u64,
    bytes: u64,
    /// CRC-32, where there is one.
    crc32: Option<u32>,
}

/// What a container holds, whatever its kind.
struct Contents {
    pickle: Pickle,
    places: HashMap<String, Place>,
    big_endian: bool,
}

impl TorchFile {
    /// Whether a file that begins with `magic` may be one.
    pub fn is_likely(magic: &[u8]) -> bool {
        magic.starts_with(b"PK") || magic.starts_with(b"\x80")
    }

    /// Reads everything but the values; each tensor is then known to lie inside the file.
    ///
    /// # Errors
    /// [`InteropError::Malformed`]; [`InteropError::Unsupported`] for a pickle that needs code to be run, and for
    /// compressed or encrypted entries.
    pub fn open(path: &Path) -> Result<Self, InteropError> {
        let file = File::open(path).map_err(InteropError::io(path, "open"))?;
        let mut magic = [0; 2];
        file.read_exact_at(&mut magic, 0).map_err(InteropError::io(path, "read"))?;
        let contents = if &magic == b"PK" { zipped(&file, path)? } else { legacy::read(&file, path)? };
        let mut found = Found::default();
        found.visit(&contents.pickle, contents.pickle.root(), "", 0);
        let about = plain(&contents.pickle, contents.pickle.root(), 0, &mut { MAX_ENTRIES }).unwrap_or_default();
        if found.entries > MAX_ENTRIES {
            return Err(malformed(path, format!("more than {MAX_ENTRIES} entries of nested dicts")));
        }
        let Contents { places, big_endian, .. } = contents;
        let mut tensors = BTreeMap::new();
        for (name, view) in &found.views {
            check_place(path, name, view, &places)?;
            let shape = view.shape.iter().map(|&side| side as usize).collect();
            tensors.insert(name.clone(), TensorSpec { dtype: view.dtype, shape });
        }
        Ok(Self { path: path.into(), file, places, big_endian, views: found.views, tensors, about })
    }
}

fn malformed(path: &Path, reason: String) -> InteropError {
    InteropError::Malformed { path: path.into(), format: FORMAT, reason }
}

/// Names the file in what the pickle reader found.
fn of_pickle(path: &Path) -> impl Fn(PickleError) -> InteropError + use<> {
    let path = path.to_owned();
    move |error| match error {
        PickleError::Malformed { .. } => malformed(&path, error.to_string()),
        PickleError::Forbidden { .. } => InteropError::Unsupported {
            path: path.clone(),
            what: format!("{error}, which is not made here: it could run anything"),
            remedy: "where you trust the file, load it with PyTorch and save its tensors and plain values only"
                .to_owned(),
        },
    }
}

fn check_place(path: &Path, name: &str, view: &TensorRef, places: &HashMap<String, Place>) -> Result<(), InteropError> {
    let problem = |reason| InteropError::Tensor { path: path.into(), tensor: name.to_owned(), reason };
    let key = &view.storage.key;
    let place = places.get(key).ok_or_else(|| problem(format!("its storage `{key}` is not in the file")))?;
    let element_bytes = view.dtype.bitsize() as u64 / 8;
    if view.end() > place.bytes / element_bytes {
        let (end, dtype, bytes) = (view.end(), view.dtype, place.bytes);
        return Err(problem(format!("needs {end} elements of {dtype} in storage `{key}`, which has {bytes} bytes")));
    }
    Ok(())
}

fn zipped(file: &File, path: &Path) -> Result<Contents, InteropError> {
    let entries = zip::entries(file).map_err(|reason| malformed(path, reason))?;
    let mut roots = entries.keys().filter_map(|name| name.strip_suffix("/data.pkl"));
    let root = roots.next().ok_or_else(|| malformed(path, "a zip file without NAME/data.pkl".to_owned()))?;
    let prefix = format!("{root}/data/");
    let place = |entry: &zip::Entry| {
        // PyTorch can be told to leave the CRC out; it then writes 0.
        Place { offset: entry.offset, bytes: entry.bytes, crc32: Some(entry.crc32).filter(|&crc| crc != 0) }
    };
    let storages =
        entries.iter().filter_map(|(name, entry)| Some((name.strip_prefix(&prefix)?.to_owned(), place(entry))));
    let at = entries[&format!("{root}/data.pkl")];
    let reader = Section { file, at: at.offset, end: at.offset + at.bytes };
    let (pickle, _) = Pickle::read(std::io::BufReader::new(reader)).map_err(of_pickle(path))?;
    let mut order = [0; 3];
    let big_endian = match entries.get(&format!("{root}/byteorder")) {
        Some(entry) if entry.bytes == 3 => {
            file.read_exact_at(&mut order, entry.offset).map_err(InteropError::io(path, "read"))?;
            &order == b"big"
        }
        _ => false,
    };
    Ok(Contents { pickle, places: storages.collect(), big_endian })
}

/// A part of a file as a reader.
struct Section<'a> {
    file: &'a File,
    at: u64,
    end: u64,
}

impl std::io::Read for Section<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let wanted = out.len().min(usize::try_from(self.end - self.at).unwrap_or(usize::MAX));
        let read = self.file.read_at(&mut out[..wanted], self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

/// Tensors by their path in nested dicts: `model/blocks.0.attn.qkv.weight`, `opt/state/1/exp_avg`.
#[derive(Default)]
struct Found {
    views: HashMap<String, TensorRef>,
    entries: usize,
}

impl Found {
    fn visit(&mut self, pickle: &Pickle, node: &Node, name: &str, depth: usize) {
        if let Node::Tensor(view) = node {
            self.views.insert(name.to_owned(), (**view).clone());
            return;
        }
        if depth == MAX_DEPTH || !matches!(node, Node::Dict(_)) {
            return;
        }
        for &(key, value) in pickle.entries(node) {
            self.entries += 1;
            if self.entries > MAX_ENTRIES {
                return;
            }
            let Some(key) = key_text(pickle, key) else { continue };
            let name = if name.is_empty() { key } else { format!("{name}/{key}") };
            self.visit(pickle, pickle.get(value), &name, depth + 1);
        }
    }
}

fn key_text(pickle: &Pickle, key: Id) -> Option<String> {
    match pickle.get(key) {
        Node::Str(text) => Some(text.clone()),
        Node::Int(number) => Some(number.to_string()),
        _ => None,
    }
}

/// A value as JSON, without its tensors; `None` for what is not plain or nested too deeply.
fn plain(pickle: &Pickle, node: &Node, depth: usize, budget: &mut usize) -> Option<Value> {
    *budget = budget.checked_sub(1)?;
    if depth == MAX_DEPTH {
        return None;
    }
    Some(match node {
        Node::None => Value::Null,
        Node::Bool(value) => (*value).into(),
        Node::Int(value) => (*value).into(),
        Node::Float(value) => (*value).into(),
        Node::Str(text) => text.clone().into(),
        Node::Tuple(items) | Node::List(items) => {
            items.iter().map_while(|&item| plain(pickle, pickle.get(item), depth + 1, budget)).collect()
        }
        Node::Dict(_) | Node::Namespace(_) => {
            let mut object = serde_json::Map::new();
            for &(key, value) in pickle.entries(node) {
                let Some(key) = key_text(pickle, key) else { continue };
                if let Some(value) = plain(pickle, pickle.get(value), depth + 1, budget) {
                    object.insert(key, value);
                }
            }
            Value::Object(object)
        }
        _ => return None,
    })
}

impl TensorFile for TorchFile {
    fn path(&self) -> &Path {
        &self.path
    }

    fn format(&self) -> &'static str {
        FORMAT
    }

    fn tensors(&self) -> &BTreeMap<String, TensorSpec> {
        &self.tensors
    }

    fn about(&self) -> &Value {
        &self.about
    }

    fn read(&self, name: &str) -> Result<RawTensor, InteropError> {
        let problem =
            |reason: String| InteropError::Tensor { path: self.path.clone(), tensor: name.to_owned(), reason };
        let view = self.views.get(name).ok_or_else(|| problem("is not in the file".to_owned()))?;
        let place = self.places.get(&view.storage.key).ok_or_else(|| problem("has no storage".to_owned()))?;
        let element_bytes = view.dtype.bitsize() / 8;
        let mut span = vec![0; (view.end() - view.offset) as usize * element_bytes];
        let at = place.offset + view.offset * element_bytes as u64;
        self.file.read_exact_at(&mut span, at).map_err(InteropError::io(&self.path, "read"))?;
        if let Some(expected) = place.crc32.filter(|_| span.len() as u64 == place.bytes) {
            let mut crc = flate2::Crc::new();
            crc.update(&span);
            if crc.sum() != expected {
                let key = &view.storage.key;
                return Err(problem(format!(
                    "storage `{key}` has CRC-32 {:08x}; expected {expected:08x}: the file is damaged",
                    crc.sum()
                )));
            }
        }
        let mut bytes = if view.is_contiguous() { span } else { gathered(view, &span, element_bytes) };
        if self.big_endian {
            bytes.chunks_exact_mut(element_bytes).for_each(<[u8]>::reverse);
        }
        let shape = view.shape.iter().map(|&side| side as usize).collect();
        Ok(RawTensor { dtype: view.dtype, shape, bytes })
    }
}

/// The elements of a strided view in row-major order; `span` begins with its first one.
fn gathered(view: &TensorRef, span: &[u8], element_bytes: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(view.numel() as usize * element_bytes);
    let mut index = vec![0; view.shape.len()];
    for _ in 0..view.numel() {
        let at: u64 = index.iter().zip(&view.stride).map(|(index, stride)| index * stride).sum();
        let at = at as usize * element_bytes;
        bytes.extend_from_slice(&span[at..at + element_bytes]);
        for (index, &side) in index.iter_mut().zip(&view.shape).rev() {
            *index += 1;
            if *index < side {
                break;
            }
            *index = 0;
        }
    }
    bytes
}

#[cfg(test)]
mod tests;
