//! The header of a safetensors file, from any source. Nothing in it is believed before it is compared with the file's length.

use safetensors::tensor::{Metadata, TensorInfo};
use std::{
    collections::{BTreeMap, HashMap},
    io::{Error, ErrorKind, Read, Result},
};

/// The longest header that safetensors' readers accept.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// What a safetensors file says about its tensors.
#[derive(Debug, Clone)]
pub struct SafetensorsHeader {
    /// Where the data start, in bytes from the start of the file.
    pub data_start: u64,
    /// Type, shape, and place in the data of each tensor by name. The places follow each other without gaps to the file's end, and
    /// each has the length that type and shape take.
    pub tensors: BTreeMap<String, TensorInfo>,
    /// `__metadata__`, if there.
    pub about: Option<HashMap<String, String>>,
}

impl SafetensorsHeader {
    /// Reads the header of a file of `file_bytes` from its start. Allocates no more than the file is long.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidData`] in words that follow the file's name, if header and length do not agree; else what the reader says.
    pub fn read(mut file: impl Read, file_bytes: u64) -> Result<Self> {
        let malformed = |reason: String| Error::new(ErrorKind::InvalidData, reason);
        if file_bytes < 8 {
            return Err(malformed(format!("it has only {file_bytes} bytes")));
        }
        let mut length = [0; 8];
        file.read_exact(&mut length)?;
        let header_bytes = u64::from_le_bytes(length);
        if header_bytes > MAX_HEADER_BYTES.min(file_bytes - 8) {
            return Err(malformed(format!("a header of {header_bytes} bytes in a file of {file_bytes}")));
        }
        let mut header = vec![0; header_bytes as usize];
        file.read_exact(&mut header)?;
        let metadata: Metadata =
            serde_json::from_slice(&header).map_err(|error| malformed(format!("its header: {error}")))?;
        let (data_start, data_bytes) = (8 + header_bytes, metadata.data_len() as u64);
        if data_start.checked_add(data_bytes) != Some(file_bytes) {
            let follow = file_bytes - data_start;
            return Err(malformed(format!("its header tells of {data_bytes} bytes of data, but {follow} follow it")));
        }
        let tensors = metadata.tensors().into_iter().map(|(name, info)| (name, info.clone())).collect();
        Ok(Self { data_start, tensors, about: metadata.metadata().clone() })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn read(header: &str, data_bytes: usize) -> Result<SafetensorsHeader> {
        let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data_bytes]].concat();
        SafetensorsHeader::read(&file[..], file.len() as u64)
    }

    #[test]
    fn places_are_told_and_lengths_compared() {
        let one = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
        let header = read(one, 8).unwrap();
        assert_eq!(header.data_start, 8 + one.len() as u64);
        assert_eq!((header.tensors["a"].data_offsets, &header.tensors["a"].shape[..]), ((0, 8), &[2][..]));
        assert_eq!(header.about.and_then(|about| about.get("format").cloned()).as_deref(), Some("pt"));
        let gap = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#;
        let huge = r#"{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,4]}}"#;
        for (header, data_bytes, says) in
            [(one, 7, "8 bytes of data, but 7"), (one, 9, "but 9"), (gap, 8, "header"), (huge, 4, "header")]
        {
            let error = read(header, data_bytes).unwrap_err();
            assert!(error.kind() == ErrorKind::InvalidData && error.to_string().contains(says), "{error}");
        }
        assert!(SafetensorsHeader::read(&[0; 7][..], 7).unwrap_err().to_string().contains("only 7 bytes"));
        // A length that would be allocated is compared first.
        let error = SafetensorsHeader::read(&u64::MAX.to_le_bytes()[..], 8).unwrap_err().to_string();
        assert!(error.contains("a header of 18446744073709551615 bytes in a file of 8"), "{error}");
        // A file that cannot be read is not a malformed one.
        let unreadable = SafetensorsHeader::read(&[9, 0, 0, 0, 0, 0, 0, 0][..], 99).unwrap_err();
        assert_ne!(unreadable.kind(), ErrorKind::InvalidData);
    }
}
