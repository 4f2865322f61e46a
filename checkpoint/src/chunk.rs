//! SHA-256 over the fixed chunks of an object, so that any byte range of it can be verified alone.

use bytes::Bytes;
use object_store::PutPayload;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use sha2::{Digest as _, Sha256};
use std::{fmt, str::FromStr};

/// Length of a chunk in bytes; the last one of an object is shorter. A power of two, so no element lies across two.
pub const CHUNK_BYTES: u64 = 4 << 20;

/// A SHA-256 value; in JSON 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sha256Digest(pub [u8; 32]);

impl Sha256Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }
}

impl fmt::Display for Sha256Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Sha256Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Sha256Digest {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let nibble = |c: u8| match c {
            b'0'..=b'9' => Ok(c - b'0'),
            b'a'..=b'f' => Ok(c - b'a' + 10),
            _ => Err(format!("`{}` is no SHA-256: expected 64 lower-case hexadecimal digits", text.escape_debug())),
        };
        let mut value = [0u8; 32];
        if text.len() != 64 {
            return Err(format!("a SHA-256 of {} characters: expected 64 lower-case hexadecimal digits", text.len()));
        }
        for (byte, pair) in value.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
        }
        Ok(Self(value))
    }
}

impl Serialize for Sha256Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Sha256Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(D::Error::custom)
    }
}

/// Length and chunk digests of an object's bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fingerprint {
    pub bytes: u64,
    pub chunks: Vec<Sha256Digest>,
}

/// Collects an object as blocks of one chunk each, hashed as they fill. Holds the object's bytes once.
pub(crate) struct ChunkedObject {
    blocks: Vec<Bytes>,
    open: Vec<u8>,
    fingerprint: Fingerprint,
}

impl ChunkedObject {
    pub fn new() -> Self {
        Self { blocks: Vec::new(), open: Vec::new(), fingerprint: Fingerprint { bytes: 0, chunks: Vec::new() } }
    }

    pub fn extend(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(self.room_bytes()));
            self.open.extend_from_slice(now);
            self.close_if_full();
            bytes = later;
        }
    }

    /// Appends `values` in little-endian order. The bytes so far must be a multiple of 4.
    pub fn extend_f32(&mut self, mut values: &[f32]) {
        while !values.is_empty() {
            let (now, later) = values.split_at(values.len().min((self.room_bytes() / 4).max(1)));
            let at = self.open.len();
            self.open.resize(at + now.len() * 4, 0);
            for (bytes, value) in self.open[at..].chunks_exact_mut(4).zip(now) {
                bytes.copy_from_slice(&value.to_le_bytes());
            }
            self.close_if_full();
            values = later;
        }
    }

    pub fn finish(mut self) -> (PutPayload, Fingerprint) {
        if !self.open.is_empty() {
            self.close();
        }
        (PutPayload::from_iter(self.blocks), self.fingerprint)
    }

    fn room_bytes(&mut self) -> usize {
        if self.open.capacity() == 0 {
            self.open.reserve_exact(CHUNK_BYTES as usize);
        }
        CHUNK_BYTES as usize - self.open.len()
    }

    fn close_if_full(&mut self) {
        if self.open.len() == CHUNK_BYTES as usize {
            self.close();
        }
    }

    fn close(&mut self) {
        let block = std::mem::take(&mut self.open);
        self.fingerprint.bytes += block.len() as u64;
        self.fingerprint.chunks.push(Sha256Digest::of(&block));
        self.blocks.push(block.into());
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn blocks_are_the_chunks_and_digests_are_theirs() {
        let values: Vec<f32> = (0..2_500_000).map(|i| i as f32).collect();
        let mut object = ChunkedObject::new();
        object.extend(&[7u8; 64]);
        object.extend_f32(&values);
        let (payload, fingerprint) = object.finish();
        let bytes: Vec<u8> = [7u8; 64].into_iter().chain(values.iter().flat_map(|v| v.to_le_bytes())).collect();
        assert_eq!(fingerprint.bytes, 10_000_064);
        assert_eq!(Bytes::from(payload), bytes);
        let expected: Vec<_> = bytes.chunks(CHUNK_BYTES as usize).map(Sha256Digest::of).collect();
        assert_eq!(fingerprint.chunks, expected);
    }

    #[test]
    fn digest_text_is_strict() {
        let digest = Sha256Digest::of(b"abc");
        assert_eq!(digest.to_string(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(digest.to_string().parse::<Sha256Digest>().unwrap(), digest);
        assert!(digest.to_string().to_uppercase().parse::<Sha256Digest>().is_err());
        assert!("é".repeat(32).parse::<Sha256Digest>().is_err());
    }
}
