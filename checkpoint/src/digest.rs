//! Digests of a checkpoint's values: equal for equal values, however many ranks wrote them and wherever they are cut.

use crate::{chunk::Digest, error::CheckpointError, manifest::TensorEntry, reader::CheckpointReader};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;

/// Elements read at a time: bounds memory to 64 MiB of f32.
const PIECE_NUMEL: usize = 16 << 20;

/// One tensor's digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorDigest {
    /// Name with its section.
    pub name: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// Digest of its values in little-endian row-major order.
    pub sha256: Digest,
}

/// Digests of the sections (`model`, `ema`, `adamw`, …: the part of a name before its first `/`). A section's digest is
/// SHA-256 over the little-endian values of its tensors in the order of their names, `adamw/exp_avg/…` before `adamw/exp_avg_sq/…`.
///
/// # Errors
/// As [`CheckpointReader::read_f32`].
pub fn section_digests(reader: &CheckpointReader) -> Result<BTreeMap<String, Digest>, CheckpointError> {
    digests(reader, |_| {})
}

/// [`section_digests`], and the digest of every tensor in the order of names, in one pass over the store.
///
/// # Errors
/// As [`CheckpointReader::read_f32`].
#[allow(clippy::type_complexity)]
pub fn all_digests(
    reader: &CheckpointReader,
) -> Result<(BTreeMap<String, Digest>, Vec<TensorDigest>), CheckpointError> {
    let mut tensors = Vec::new();
    let sections = digests(reader, |tensor| tensors.push(tensor))?;
    Ok((sections, tensors))
}

fn digests(
    reader: &CheckpointReader,
    mut each: impl FnMut(TensorDigest),
) -> Result<BTreeMap<String, Digest>, CheckpointError> {
    let mut sections: BTreeMap<&str, Sha256> = BTreeMap::new();
    for (name, tensor) in &reader.manifest().tensors {
        let section = sections.entry(name.split('/').next().unwrap_or(name)).or_default();
        let mut own = Sha256::new();
        visit(reader, name, tensor, |bytes| {
            section.update(bytes);
            own.update(bytes);
        })?;
        each(TensorDigest { name: name.clone(), shape: tensor.shape.clone(), sha256: Digest(own.finalize().into()) });
    }
    Ok(sections.into_iter().map(|(name, hash)| (name.to_owned(), Digest(hash.finalize().into()))).collect())
}

fn visit(
    reader: &CheckpointReader,
    name: &str,
    tensor: &TensorEntry,
    mut sink: impl FnMut(&[u8]),
) -> Result<(), CheckpointError> {
    let numel = tensor.numel();
    (0..numel).step_by(PIECE_NUMEL).try_for_each(|start| {
        sink(&reader.read_bytes(name, start..numel.min(start + PIECE_NUMEL))?);
        Ok(())
    })
}
