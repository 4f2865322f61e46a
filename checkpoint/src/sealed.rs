//! Small JSON objects that carry their own digest: attempt records and manifests.
//!
//! The file is one JSON object. Its last member is `"sha256"`, the digest of all bytes before the comma that precedes it:
//! the last 78 bytes are always `,"sha256":"` + 64 hexadecimal digits + `"}` + newline. The rule holds for every
//! version of every sealed format, so that damage and a future version are never confused.

use crate::{chunk::Digest, error::CheckpointError};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

const TRAILER_HEAD: &[u8] = b",\"sha256\":\"";
const TRAILER_TAIL: &[u8] = b"\"}\n";
const TRAILER_BYTES: usize = TRAILER_HEAD.len() + 64 + TRAILER_TAIL.len();

/// Longest sealed object that is written or read. Bounds what a damaged or hostile store can make us allocate.
pub(crate) const MAX_SEALED_BYTES: u64 = 256 << 20;

/// Name and version of a sealed format, its first two members. Versions from 1 to this one are read, this one is written.
pub(crate) struct Format {
    pub name: &'static str,
    pub version: u64,
}

/// Serialises `body`, which must be a JSON object with at least one member and none called `sha256`.
pub(crate) fn seal(body: &impl Serialize) -> Result<Vec<u8>, String> {
    let mut bytes = serde_json::to_vec(body).map_err(|e| e.to_string())?;
    if bytes.pop() != Some(b'}') {
        return Err("not a JSON object".to_owned());
    }
    let digest = Digest::sha256(&bytes).to_string();
    bytes.extend_from_slice(TRAILER_HEAD);
    bytes.extend_from_slice(digest.as_bytes());
    bytes.extend_from_slice(TRAILER_TAIL);
    if bytes.len() as u64 > MAX_SEALED_BYTES {
        return Err(format!("{} bytes of JSON: at most {MAX_SEALED_BYTES} are allowed", bytes.len()));
    }
    Ok(bytes)
}

/// Checks digest, format and version of `bytes`, in this order, and parses them.
pub(crate) fn unseal<T: DeserializeOwned>(
    bytes: &[u8],
    format: &Format,
    url: &str,
    key: &str,
) -> Result<T, CheckpointError> {
    #[derive(Deserialize)]
    struct Head {
        format: String,
        version: u64,
    }
    let damaged = |reason: String| CheckpointError::Damaged { url: url.to_owned(), key: key.to_owned(), reason };
    let expected = bytes
        .len()
        .checked_sub(TRAILER_BYTES)
        .map(|at| bytes.split_at(at))
        .and_then(|(body, trailer)| Some((body, trailer.strip_prefix(TRAILER_HEAD)?.strip_suffix(TRAILER_TAIL)?)))
        .and_then(|(body, hex)| Some((body, std::str::from_utf8(hex).ok()?.parse::<Digest>().ok()?)));
    let Some((body, expected)) = expected else {
        return Err(damaged(format!(
            "its {} bytes do not end with a digest: it is truncated or was edited",
            bytes.len()
        )));
    };
    let found = Digest::sha256(body);
    if found != expected {
        return Err(damaged(format!("its content has SHA-256 {found}, but it was written with {expected}")));
    }
    let head: Head = serde_json::from_slice(bytes).map_err(|e| damaged(format!("no `format` and `version`: {e}")))?;
    if head.format != format.name {
        return Err(damaged(format!("its format is `{}`, expected `{}`", head.format.escape_debug(), format.name)));
    }
    if !(1..=format.version).contains(&head.version) {
        return Err(CheckpointError::UnknownVersion {
            url: url.to_owned(),
            key: key.to_owned(),
            found: head.version,
            supported: format.version,
        });
    }
    serde_json::from_slice(bytes).map_err(|e| damaged(format!("its JSON is not a {}: {e}", format.name)))
}

/// Milliseconds since 1970, for people only: nothing is decided by it.
pub(crate) fn unix_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::{Value, json};

    const FORMAT: Format = Format { name: "test", version: 1 };

    fn open(bytes: &[u8]) -> Result<Value, CheckpointError> {
        unseal(bytes, &FORMAT, "memory:///", "k.json")
    }

    #[test]
    fn a_sealed_object_is_plain_json_and_every_flipped_byte_shows() {
        let bytes = seal(&json!({"format": "test", "version": 1, "note": "ü"})).unwrap();
        let plain: Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(plain["note"], "ü");
        assert_eq!(open(&bytes).unwrap()["version"], 1);
        for i in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[i] ^= 1;
            assert!(matches!(open(&bad), Err(CheckpointError::Damaged { .. })), "byte {i}");
            assert!(matches!(open(&bytes[..i]), Err(CheckpointError::Damaged { .. })), "cut at {i}");
        }
    }

    #[test]
    fn another_version_is_refused_as_such() {
        let bytes = seal(&json!({"format": "test", "version": 2, "shape": "unknown"})).unwrap();
        let error = open(&bytes).unwrap_err();
        assert!(matches!(error, CheckpointError::UnknownVersion { found: 2, supported: 1, .. }), "{error}");
        let bytes = seal(&json!({"format": "other", "version": 1})).unwrap();
        assert!(matches!(open(&bytes), Err(CheckpointError::Damaged { .. })));
    }
}
