//! Safetensors files: the header, and ranges of tensors.

use std::collections::HashMap;
use std::ops::Range;

use safetensors::Dtype as TensorType;
use safetensors::tensor::{Metadata, TensorInfo};

use super::array::Element;
use super::files::Place;
use crate::{DataError, Dtype};

/// The longest header that safetensors' own readers accept.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// The header of a file.
pub(super) struct Header {
    pub place: Place,
    data_start: u64,
    tensors: HashMap<String, TensorInfo>,
    /// `__metadata__`.
    pub about: HashMap<String, String>,
}

/// A tensor of a file: rows along its first axis.
#[derive(Clone, Debug)]
pub(super) struct Rows {
    pub element: Element,
    /// The whole shape.
    pub shape: Vec<usize>,
    /// Where the first row begins in the file.
    start: u64,
    /// Bytes of a row.
    row_bytes: u64,
}

impl Rows {
    /// Where a row is in the file.
    pub fn range(&self, row: usize) -> Range<u64> {
        let start = self.start + row as u64 * self.row_bytes;
        start..start + self.row_bytes
    }

    /// Where all rows are.
    pub fn whole(&self) -> Range<u64> {
        self.start..self.start + self.shape[0] as u64 * self.row_bytes
    }
}

impl Header {
    /// Reads the header.
    ///
    /// # Errors
    /// If it does not agree with the file's length.
    pub fn read(place: &Place) -> Result<Self, DataError> {
        let bad = |reason: String| DataError::source(place.name(), format!("is no whole safetensors file: {reason}"));
        let file_bytes = place.bytes()?;
        if file_bytes < 8 {
            return Err(bad(format!("it has only {file_bytes} bytes")));
        }
        let mut length = [0; 8];
        length.copy_from_slice(&place.read_range(0..8)?);
        let header_bytes = u64::from_le_bytes(length);
        if header_bytes > MAX_HEADER_BYTES.min(file_bytes - 8) {
            return Err(bad(format!("a header of {header_bytes} bytes in a file of {file_bytes}")));
        }
        let data_start = 8 + header_bytes;
        let metadata: Metadata = serde_json::from_slice(&place.read_range(8..data_start)?)
            .map_err(|error| bad(format!("its header: {error}")))?;
        let data_bytes = metadata.data_len() as u64;
        if data_start + data_bytes != file_bytes {
            let follow = file_bytes - data_start;
            return Err(bad(format!("its header tells of {data_bytes} bytes of data, but {follow} follow it")));
        }
        let tensors = metadata.tensors().into_iter().map(|(name, info)| (name, info.clone())).collect();
        Ok(Self { place: place.clone(), data_start, tensors, about: metadata.metadata().clone().unwrap_or_default() })
    }

    /// A tensor's rows; `None` if there is none of this name.
    ///
    /// # Errors
    /// If its type is not known or it has no axis.
    pub fn rows(&self, tensor: &str) -> Result<Option<Rows>, DataError> {
        let Some(info) = self.tensors.get(tensor) else {
            return Ok(None);
        };
        let bad = |reason: String| DataError::source(format!("{}: tensor `{tensor}`", self.place.name()), reason);
        let element = match info.dtype {
            TensorType::F16 => Element::Float(Dtype::F16),
            TensorType::BF16 => Element::Float(Dtype::Bf16),
            TensorType::F32 => Element::Float(Dtype::F32),
            TensorType::F64 => Element::F64,
            TensorType::I8 => Element::Signed(1),
            TensorType::I16 => Element::Signed(2),
            TensorType::I32 => Element::Signed(4),
            TensorType::I64 => Element::Signed(8),
            TensorType::U8 => Element::Unsigned(1),
            TensorType::U16 => Element::Unsigned(2),
            TensorType::U32 => Element::Unsigned(4),
            TensorType::U64 => Element::Unsigned(8),
            other => return Err(bad(format!("holds {other:?}; expected floats or integers"))),
        };
        let Some(&rows) = info.shape.first() else {
            return Err(bad("is a single number; expected one row a sample".into()));
        };
        // `Metadata` has checked that the shape and the offsets agree.
        let bytes = (info.data_offsets.1 - info.data_offsets.0) as u64;
        Ok(Some(Rows {
            element,
            shape: info.shape.clone(),
            start: self.data_start + info.data_offsets.0 as u64,
            row_bytes: bytes / (rows as u64).max(1),
        }))
    }

    /// Names of the tensors, for messages.
    pub fn names(&self) -> String {
        let mut names: Vec<_> = self.tensors.iter().map(|(name, info)| format!("`{name}` {:?}", info.shape)).collect();
        names.sort();
        names.join(", ")
    }
}
