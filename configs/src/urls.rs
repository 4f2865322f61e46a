//! `data.url`: one URL, or several that are read one after the other.

use serde::{Serialize, Serializer};

use crate::location::redact;

/// Absolute URLs, at least one; in records a text if it is one, else a list. May hold credentials.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Urls(Vec<String>);

impl Urls {
    /// Of URLs in this order.
    pub fn new(urls: Vec<String>) -> Self {
        Self(urls)
    }

    /// One after the other.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }

    /// Without what may be secret.
    pub fn redacted(&self) -> Self {
        Self(self.iter().map(redact).collect())
    }
}

impl Serialize for Urls {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match &self.0[..] {
            [one] => serializer.serialize_str(one),
            several => several.serialize(serializer),
        }
    }
}
