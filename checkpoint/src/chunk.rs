//! Digests of the fixed chunks of an object, so that any byte range of it can be verified alone.

use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use sha2::{Digest as _, Sha256};
use std::{fmt, str::FromStr};

/// Length of a chunk in bytes; the last one of an object is shorter. A power of two, so no element lies across two.
pub const CHUNK_BYTES: u64 = 4 << 20;

/// A digest of 256 bits; in JSON 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// SHA-256 of `bytes`.
    pub fn sha256(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let nibble = |c: u8| match c {
            b'0'..=b'9' => Ok(c - b'0'),
            b'a'..=b'f' => Ok(c - b'a' + 10),
            _ => Err(format!("`{}` is no digest: expected 64 lower-case hexadecimal digits", text.escape_debug())),
        };
        let mut value = [0u8; 32];
        if text.len() != 64 {
            return Err(format!("a digest of {} characters: expected 64 lower-case hexadecimal digits", text.len()));
        }
        for (byte, pair) in value.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
        }
        Ok(Self(value))
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(D::Error::custom)
    }
}

/// The digests of an object's chunks, in order; in JSON `"blake3": [...]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ChunkDigests {
    /// Written by format version 1.
    Sha256(Vec<Digest>),
    /// Two to three times as fast, which a load waits for.
    Blake3(Vec<Digest>),
}

impl ChunkDigests {
    fn values(&self) -> &[Digest] {
        let (Self::Sha256(values) | Self::Blake3(values)) = self;
        values
    }

    /// Number of chunks.
    pub fn count(&self) -> usize {
        self.values().len()
    }

    /// What chunk `index` was written with.
    pub(crate) fn expected(&self, index: usize) -> ChunkDigest {
        let digest = self.values()[index];
        match self {
            Self::Sha256(_) => ChunkDigest::Sha256(digest),
            Self::Blake3(_) => ChunkDigest::Blake3(digest),
        }
    }
}

/// A chunk's digest and how it is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ChunkDigest {
    Sha256(Digest),
    Blake3(Digest),
}

impl fmt::Display for ChunkDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sha256(digest) => write!(f, "SHA-256 {digest}"),
            Self::Blake3(digest) => write!(f, "BLAKE3 {digest}"),
        }
    }
}

impl ChunkDigest {
    /// Begins a digest of this kind.
    pub fn hasher(self) -> ChunkHasher {
        match self {
            Self::Sha256(_) => ChunkHasher::Sha256(Sha256::new()),
            Self::Blake3(_) => ChunkHasher::Blake3(Box::default()),
        }
    }

    /// The digest of this kind of `bytes`.
    pub fn same_kind_of(self, bytes: &[u8]) -> Self {
        let mut hasher = self.hasher();
        hasher.update(bytes);
        hasher.finish()
    }
}

/// A digest that is being made.
pub(crate) enum ChunkHasher {
    Sha256(Sha256),
    Blake3(Box<blake3::Hasher>),
}

impl ChunkHasher {
    pub fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Blake3(hasher) => drop(hasher.update(bytes)),
        }
    }

    pub fn finish(self) -> ChunkDigest {
        match self {
            Self::Sha256(hasher) => ChunkDigest::Sha256(Digest(hasher.finalize().into())),
            Self::Blake3(hasher) => ChunkDigest::Blake3(Digest(hasher.finalize().into())),
        }
    }
}

/// Length and chunk digests of an object's bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fingerprint {
    pub bytes: u64,
    pub chunks: ChunkDigests,
}

/// The fingerprint of an object that consists of these segments.
pub(crate) fn fingerprint(segments: &[Bytes]) -> Fingerprint {
    let mut chunks = Vec::new();
    let (mut open, mut room) = (blake3::Hasher::new(), CHUNK_BYTES as usize);
    for mut segment in segments.iter().map(|segment| &segment[..]) {
        while !segment.is_empty() {
            let (now, later) = segment.split_at(segment.len().min(room));
            open.update(now);
            room -= now.len();
            if room == 0 {
                chunks.push(Digest(open.finalize().into()));
                open.reset();
                room = CHUNK_BYTES as usize;
            }
            segment = later;
        }
    }
    if room < CHUNK_BYTES as usize {
        chunks.push(Digest(open.finalize().into()));
    }
    let bytes = segments.iter().map(|segment| segment.len() as u64).sum();
    Fingerprint { bytes, chunks: ChunkDigests::Blake3(chunks) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn chunks_do_not_depend_on_the_segments() {
        let bytes: Vec<u8> = (0..10_000_064u32).map(|i| (i % 251) as u8).collect();
        let whole = Bytes::from(bytes.clone());
        let digest = |chunk: &[u8]| Digest(blake3::hash(chunk).into());
        let expected = ChunkDigests::Blake3(bytes.chunks(CHUNK_BYTES as usize).map(digest).collect());
        for cuts in [vec![], vec![64, 64, 5_000_001], vec![CHUNK_BYTES as usize]] {
            let ends = cuts.iter().copied().chain([bytes.len()]);
            let segments: Vec<Bytes> =
                ends.scan(0, |start, end| Some(whole.slice(std::mem::replace(start, end)..end))).collect();
            assert_eq!(fingerprint(&segments), Fingerprint { bytes: 10_000_064, chunks: expected.clone() });
        }
        assert_eq!(fingerprint(&[]), Fingerprint { bytes: 0, chunks: ChunkDigests::Blake3(vec![]) });
    }

    #[test]
    fn digest_text_is_strict() {
        let digest = Digest::sha256(b"abc");
        assert_eq!(digest.to_string(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
        assert!(digest.to_string().to_uppercase().parse::<Digest>().is_err());
        assert!("é".repeat(32).parse::<Digest>().is_err());
    }
}
