//! Files of named tensors, whatever their format.

use super::InteropError;
use super::safetensors::SafetensorsFile;
use super::torch_file::TorchFile;
use super::values::{RawTensor, TensorSpec};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// An open file of tensors; values are read one tensor at a time. The tensors of nested dicts have the path to them as
/// name: `model/blocks.0.attn.qkv.weight`.
pub trait TensorFile {
    /// The file.
    fn path(&self) -> &Path;
    /// Name of the format, for people.
    fn format(&self) -> &'static str;
    /// What is in it.
    fn tensors(&self) -> &BTreeMap<String, TensorSpec>;
    /// Everything in it that is plain and no tensor.
    fn about(&self) -> &Value;
    /// The values of one tensor.
    ///
    /// # Errors
    /// No such tensor, damage, or the file system's.
    fn read(&self, name: &str) -> Result<RawTensor, InteropError>;
}

/// Opens a file by what it begins with, whatever it is called.
///
/// # Errors
/// [`InteropError::NotRecognised`], or what its reader finds wrong.
pub fn open(path: &Path) -> Result<Box<dyn TensorFile>, InteropError> {
    let mut magic = Vec::new();
    let file = File::open(path).map_err(InteropError::io(path, "open"))?;
    file.take(512).read_to_end(&mut magic).map_err(InteropError::io(path, "read"))?;
    let unsupported = |what: &str, remedy: &str| InteropError::Unsupported {
        path: path.into(),
        what: what.to_owned(),
        remedy: remedy.to_owned(),
    };
    if TorchFile::is_likely(&magic) {
        return Ok(Box::new(TorchFile::open(path)?));
    }
    if magic.get(257..262) == Some(b"ustar") {
        let remedy = "load it with PyTorch and save it again with torch.save of 1.6 or later";
        return Err(unsupported("a tar file, as torch.save wrote before 0.1.10 or a downloaded archive", remedy));
    }
    if magic.get(8) == Some(&b'{') {
        return Ok(Box::new(SafetensorsFile::open(path)?));
    }
    if magic.starts_with(b"version https://git-lfs") {
        return Err(unsupported("a Git LFS pointer and not the file itself", "fetch it with `git lfs pull`"));
    }
    let found = match &magic[..] {
        [] => "an empty file".to_owned(),
        magic => format!("a file that begins with {}", magic[..magic.len().min(8)].escape_ascii()),
    };
    Err(InteropError::NotRecognised { location: path.display().to_string(), found })
}

#[cfg(test)]
mod tests {
    #[test]
    fn other_files_are_named_for_what_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file.pt");
        let mut tar = vec![0; 512];
        tar[257..262].copy_from_slice(b"ustar");
        for (bytes, says) in [
            (&b""[..], "an empty file"),
            (b"hello world", "begins with hello wo"),
            (&tar, "a tar file"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ] {
            std::fs::write(&path, bytes).unwrap();
            let error = super::open(&path).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains(says) && error.contains("file.pt"), "{error}");
        }
    }
}
