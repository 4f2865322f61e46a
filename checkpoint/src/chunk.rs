//! SHA-256 over the fixed chunks of an object, so that any byte range of it can be verified alone.

use bytes::Bytes;
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

/// The fingerprint of an object that consists of these segments.
pub(crate) fn fingerprint(segments: &[Bytes]) -> Fingerprint {
    let mut chunks = Vec::new();
    let (mut open, mut room) = (Sha256::new(), CHUNK_BYTES as usize);
    for mut segment in segments.iter().map(|segment| &segment[..]) {
        while !segment.is_empty() {
            let (now, later) = segment.split_at(segment.len().min(room));
            open.update(now);
            room -= now.len();
            if room == 0 {
                chunks.push(Sha256Digest(open.finalize_reset().into()));
                room = CHUNK_BYTES as usize;
            }
            segment = later;
        }
    }
    if room < CHUNK_BYTES as usize {
        chunks.push(Sha256Digest(open.finalize().into()));
    }
    Fingerprint { bytes: segments.iter().map(|segment| segment.len() as u64).sum(), chunks }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn chunks_do_not_depend_on_the_segments() {
        let bytes: Vec<u8> = (0..10_000_064u32).map(|i| (i % 251) as u8).collect();
        let whole = Bytes::from(bytes.clone());
        let expected: Vec<_> = bytes.chunks(CHUNK_BYTES as usize).map(Sha256Digest::of).collect();
        for cuts in [vec![], vec![64, 64, 5_000_001], vec![CHUNK_BYTES as usize]] {
            let ends = cuts.iter().copied().chain([bytes.len()]);
            let segments: Vec<Bytes> =
                ends.scan(0, |start, end| Some(whole.slice(std::mem::replace(start, end)..end))).collect();
            assert_eq!(fingerprint(&segments), Fingerprint { bytes: 10_000_064, chunks: expected.clone() });
        }
        assert_eq!(fingerprint(&[]), Fingerprint { bytes: 0, chunks: vec![] });
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
