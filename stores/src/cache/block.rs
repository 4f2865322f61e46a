//! One block of an object as a file that tells whether it is whole, and whose.

use bytes::Bytes;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

/// Bytes of an object in one block; the last one of an object has fewer.
pub(crate) const BLOCK_BYTES: u64 = 1 << 20;
/// Longest file of a block, in the unit in which files take space.
pub(super) const FILE_BYTES: u64 = space_of(BLOCK_BYTES + HEADER_BYTES);

const MAGIC: [u8; 8] = *b"dthblk01";
/// Magic, key, length of the data (u32, little-endian), CRC-32C of all that and the data (u32).
const HEADER_BYTES: u64 = 8 + 32 + 4 + 4;

/// What a file takes on disk, nearly.
pub(super) const fn space_of(bytes: u64) -> u64 {
    bytes.next_multiple_of(4096)
}

/// Names one block of one version of one object; holds no URL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct BlockKey([u8; 32]);

impl BlockKey {
    pub fn new(identity: &Sha256, index: u64) -> Self {
        Self(identity.clone().chain_update(index.to_le_bytes()).finalize().into())
    }

    /// `ab/abcdef….block` below the folder of blocks.
    pub fn file(&self, blocks: &Path) -> PathBuf {
        let name: String = self.0.iter().map(|byte| format!("{byte:02x}")).collect();
        blocks.join(&name[..2]).join(format!("{name}.block"))
    }
}

/// What goes in front of `data`.
pub(super) fn header(key: &BlockKey, data: &[u8]) -> Vec<u8> {
    let mut header = Vec::with_capacity(HEADER_BYTES as usize);
    header.extend(MAGIC);
    header.extend(key.0);
    header.extend((data.len() as u32).to_le_bytes());
    header.extend(checksum(&header, data).to_le_bytes());
    header
}

/// The data of a block's file; `None` unless the file is whole, unchanged, and this block with its length.
pub(super) fn open(file: Vec<u8>, key: &BlockKey, bytes: u64) -> Option<Bytes> {
    let file = Bytes::from(file);
    if file.len() as u64 != HEADER_BYTES + bytes {
        return None;
    }
    let data = file.slice(HEADER_BYTES as usize..);
    (file[..HEADER_BYTES as usize] == header(key, &data)[..]).then_some(data)
}

fn checksum(header: &[u8], data: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(header), data)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_flipped_bit_and_every_cut_is_found() {
        let key = BlockKey::new(&Sha256::new(), 7);
        let data = b"some bytes of an object";
        let whole = [header(&key, data), data.to_vec()].concat();
        let bytes = data.len() as u64;
        assert_eq!(open(whole.clone(), &key, bytes).unwrap(), &data[..]);
        for bit in 0..whole.len() * 8 {
            let mut flipped = whole.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(open(flipped, &key, bytes), None, "bit {bit}");
        }
        for length in 0..whole.len() {
            assert_eq!(open(whole[..length].to_vec(), &key, bytes), None, "{length} bytes");
        }
        assert_eq!(open(whole.clone(), &BlockKey::new(&Sha256::new(), 8), bytes), None);
        assert_eq!(open(whole, &key, bytes - 1), None);
    }
}
