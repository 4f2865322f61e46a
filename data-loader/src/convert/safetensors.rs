//! Safetensors files: the header, and ranges of tensors.

use std::ops::Range;

use safetensors::Dtype as TensorType;
use stores::SafetensorsHeader;

use super::array::Element;
use super::files::{Place, SeekReader};
use crate::{DataError, Dtype};

/// The header of a file.
pub(super) struct Header {
    pub place: Place,
    header: SafetensorsHeader,
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
    /// If the file cannot be read, or the header does not agree with its length.
    pub fn read(place: &Place) -> Result<Self, DataError> {
        let file = SeekReader::open(place)?;
        let file_bytes = file.file_bytes;
        let header =
            SafetensorsHeader::read(file, file_bytes).map_err(|error| match error.downcast::<DataError>() {
                Ok(unreadable) => unreadable,
                Err(error) => DataError::source(place.name(), format!("is no whole safetensors file: {error}")),
            })?;
        Ok(Self { place: place.clone(), header })
    }

    /// A tensor's rows; `None` if there is none of this name.
    ///
    /// # Errors
    /// If its type is not known or it has no axis.
    pub fn rows(&self, tensor: &str) -> Result<Option<Rows>, DataError> {
        let Some(info) = self.header.tensors.get(tensor) else {
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
            start: self.header.data_start + info.data_offsets.0 as u64,
            row_bytes: bytes / (rows as u64).max(1),
        }))
    }

    /// An entry of `__metadata__`.
    pub fn about(&self, key: &str) -> Option<&String> {
        self.header.about.as_ref()?.get(key)
    }

    /// Names of the tensors, for messages.
    pub fn names(&self) -> String {
        let tensors = self.header.tensors.iter();
        tensors.map(|(name, info)| format!("`{name}` {:?}", info.shape)).collect::<Vec<_>>().join(", ")
    }
}
