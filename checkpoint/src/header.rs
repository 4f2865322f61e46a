//! The header of a safetensors file, from any source. Nothing in it is believed before it is compared with the file's length.

use safetensors::tensor::{Metadata, TensorInfo};
use std::{
    collections::{BTreeMap, HashMap},
    io::Read,
};

/// The longest header that safetensors' readers accept.
pub(crate) const MAX_HEADER_BYTES: u64 = 100_000_000;

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
    /// In words that follow the file's name, if the file cannot be read or header and length do not agree.
    pub fn read(mut file: impl Read, file_bytes: u64) -> Result<Self, String> {
        let mut length = [0; 8];
        file.read_exact(&mut length).map_err(|_| format!("it has only {file_bytes} bytes"))?;
        let header_bytes = u64::from_le_bytes(length);
        if header_bytes > MAX_HEADER_BYTES.min(file_bytes.saturating_sub(8)) {
            return Err(format!("a header of {header_bytes} bytes in a file of {file_bytes}"));
        }
        let mut header = vec![0; header_bytes as usize];
        file.read_exact(&mut header).map_err(|error| format!("its header: {error}"))?;
        let metadata: Metadata = serde_json::from_slice(&header).map_err(|error| format!("its header: {error}"))?;
        let (data_start, data_bytes) = (8 + header_bytes, metadata.data_len() as u64);
        if data_start.checked_add(data_bytes) != Some(file_bytes) {
            return Err(format!(
                "its header tells of {data_bytes} bytes of data, but {} follow it",
                file_bytes - data_start
            ));
        }
        let tensors = metadata.tensors().into_iter().map(|(name, info)| (name, info.clone())).collect();
        Ok(Self { data_start, tensors, about: metadata.metadata().clone() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(header: &str, data_bytes: usize) -> Result<SafetensorsHeader, String> {
        let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data_bytes]].concat();
        SafetensorsHeader::read(&file[..], file.len() as u64)
    }

    #[test]
    fn places_are_told_and_lengths_compared() {
        let one = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
        let header = read(one, 8).unwrap_or_else(|reason| panic!("{reason}"));
        assert_eq!(header.data_start, 8 + one.len() as u64);
        assert_eq!((header.tensors["a"].data_offsets, &header.tensors["a"].shape[..]), ((0, 8), &[2][..]));
        assert_eq!(header.about.and_then(|about| about.get("format").cloned()).as_deref(), Some("pt"));
        let gap = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#;
        let huge = r#"{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,4]}}"#;
        for (header, data_bytes, says) in
            [(one, 7, "8 bytes of data, but 7"), (one, 9, "but 9"), (gap, 8, "header"), (huge, 4, "header")]
        {
            let reason = read(header, data_bytes).err().unwrap_or_default();
            assert!(reason.contains(says), "{reason}");
        }
        // A length that would be allocated is compared first.
        let reason = SafetensorsHeader::read(&u64::MAX.to_le_bytes()[..], 8).err().unwrap_or_default();
        assert!(reason.contains("a header of 18446744073709551615 bytes in a file of 8"), "{reason}");
    }
}
