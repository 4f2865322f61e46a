//! An object of a store, as it was when it was first seen.

use crate::redact_text;
use object_store::{ObjectMeta, path::Path};
use sha2::{Digest, Sha256};

/// An object that is read in many requests, which must all see the same bytes.
#[derive(Debug, Clone)]
pub struct Object {
    /// Where it is in its store.
    pub path: Path,
    /// Its length.
    pub bytes: u64,
    /// Its URL, for messages and as its name in a cache. Without user-info and query.
    pub name: String,
    e_tag: Option<String>,
    /// In seconds since 1970, the precision of HTTP; 0 where the store does not tell.
    modified_s: i64,
}

impl Object {
    /// The object that a listing or a look-up told of, under the URL `name`.
    pub fn new(meta: &ObjectMeta, name: &str) -> Self {
        Self {
            path: meta.location.clone(),
            bytes: meta.size,
            name: redact_text(name),
            e_tag: meta.e_tag.as_deref().map(|tag| bare(tag).to_owned()),
            modified_s: meta.last_modified.timestamp(),
        }
    }

    /// What tells that `found` is another object than this one was; `None` if nothing does.
    pub(crate) fn difference(&self, found: &ObjectMeta) -> Option<String> {
        if found.size != self.bytes {
            return Some(format!("it has {} bytes now and had {} before", found.size, self.bytes));
        }
        match (&self.e_tag, found.e_tag.as_deref().map(bare)) {
            (Some(known), Some(now)) if known == now => None,
            (Some(known), Some(now)) => Some(format!("its ETag is {now} now and was {known} before")),
            _ => {
                let now = found.last_modified.timestamp();
                let differs = self.modified_s != 0 && now != 0 && self.modified_s != now;
                let before = self.modified_s;
                differs.then(|| {
                    format!("it was last modified at {now} s since 1970, and at {before} s when it was opened")
                })
            }
        }
    }

    /// What names these very bytes, whatever the store holds under this URL later; `None` if the store tells neither ETag
    /// nor time.
    pub(crate) fn identity(&self) -> Option<Sha256> {
        let version = match &self.e_tag {
            Some(tag) => format!("etag {tag}"),
            None if self.modified_s != 0 => format!("modified {}", self.modified_s),
            None => return None,
        };
        let mut digest = Sha256::new();
        for part in [self.name.as_bytes(), version.as_bytes(), &self.bytes.to_le_bytes()] {
            digest.update((part.len() as u64).to_le_bytes());
            digest.update(part);
        }
        Some(digest)
    }
}

/// Listings and answers of one server spell an ETag differently: with quotes or without, weak or not.
fn bare(tag: &str) -> &str {
    tag.trim().trim_start_matches("W/").trim_matches('"')
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn meta(size: u64, e_tag: Option<&str>, modified: &str) -> ObjectMeta {
        ObjectMeta {
            location: Path::from("a"),
            last_modified: modified.parse().unwrap(),
            size,
            e_tag: e_tag.map(str::to_owned),
            version: None,
        }
    }

    #[test]
    fn spellings_of_one_version_are_equal_and_versions_differ() {
        let (then, later) = ("2026-01-01T00:00:00.25Z", "2026-01-01T00:00:02Z");
        let tagged = Object::new(&meta(9, Some("0xAB"), then), "s3://b/a");
        assert_eq!(tagged.difference(&meta(9, Some("\"0xAB\""), later)), None);
        assert_eq!(tagged.difference(&meta(9, Some("W/\"0xAB\""), then)), None);
        assert!(tagged.difference(&meta(9, Some("\"0xAC\""), then)).unwrap().contains("0xAC"));
        assert!(tagged.difference(&meta(8, Some("0xAB"), then)).unwrap().contains("8 bytes"));
        let timed = Object::new(&meta(9, None, then), "s3://b/a");
        assert_eq!(timed.difference(&meta(9, None, "2026-01-01T00:00:00Z")), None);
        assert!(timed.difference(&meta(9, None, later)).is_some());
    }

    #[test]
    fn identities_hold_no_url_and_need_a_version() {
        let then = "2026-01-01T00:00:00Z";
        let of = |size, tag, name| Object::new(&meta(size, tag, then), name).identity().unwrap().finalize();
        let one = of(9, Some("x"), "s3://b/a");
        assert_eq!(one, of(9, Some("\"x\""), "s3://b/a"));
        for other in [of(9, Some("y"), "s3://b/a"), of(8, Some("x"), "s3://b/a"), of(9, Some("x"), "s3://b/c")] {
            assert_ne!(one, other);
        }
        assert!(Object::new(&meta(9, None, "1970-01-01T00:00:00Z"), "http://h/a").identity().is_none());
    }
}
