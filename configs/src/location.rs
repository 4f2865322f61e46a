//! Where things are: a path or a URL in a config becomes one absolute URL, and a URL is stripped before it is shown.

use std::path::{Component, Path, PathBuf};

use url::Url;

/// Turns the text of a config into an absolute URL.
///
/// A text with a scheme (`s3://bucket/run`) is kept. Anything else is a path; a relative one is taken from `base_dir`,
/// and `.` and `..` are folded textually. No file needs to exist.
pub fn resolve(base_dir: &Path, text: &str) -> String {
    if has_scheme(text) {
        return text.to_owned();
    }
    let path = fold(&base_dir.join(text));
    // Only a relative base_dir that cannot be made absolute (no current folder) fails here; the path itself is then
    // the best name that is left.
    Url::from_file_path(&path).map_or_else(|()| path.display().to_string(), String::from)
}

/// The local path that a `file://` URL (or a plain path) stands for; `None` for any other scheme.
pub fn local_path(location: &str) -> Option<PathBuf> {
    if !has_scheme(location) {
        return Some(PathBuf::from(location));
    }
    Url::parse(location).ok().filter(|url| url.scheme() == "file").and_then(|url| url.to_file_path().ok())
}

/// The location without what may be secret: user-info, query and fragment. For messages and logs.
///
/// Works on the text, so that a malformed URL is stripped as well.
pub fn redact(location: &str) -> String {
    let Some((scheme, rest)) = location.split_once("://") else {
        return location.to_owned();
    };
    let rest = &rest[..rest.find(['?', '#']).unwrap_or(rest.len())];
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    format!("{scheme}://{host}{path}")
}

/// Why a text with a scheme is not a usable URL; `None` if it is fine (paths always are).
pub(crate) fn defect(text: &str) -> Option<String> {
    if text.is_empty() {
        return Some("is empty".to_owned());
    }
    if !has_scheme(text) {
        return None;
    }
    match Url::parse(text) {
        Err(error) => Some(format!("is not a valid URL ({error})")),
        Ok(url) if url.scheme() == "file" && url.to_file_path().is_err() => {
            Some("is not an absolute file URL on this machine".to_owned())
        }
        Ok(_) => None,
    }
}

fn has_scheme(text: &str) -> bool {
    text.split_once("://").is_some_and(|(scheme, _)| {
        scheme.starts_with(|c: char| c.is_ascii_alphabetic())
            && scheme.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.'))
    })
}

/// Absolute and without `.` and `..`, by text alone.
fn fold(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut folded = PathBuf::new();
    for component in absolute.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => {
                folded.pop();
            }
            other => folded.push(other),
        }
    }
    folded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_become_file_urls_relative_to_the_base() {
        let base = Path::new("/home/ada/configs");
        assert_eq!(resolve(base, "../runs/a"), "file:///home/ada/runs/a");
        assert_eq!(resolve(base, "./x/../y/"), "file:///home/ada/configs/y");
        assert_eq!(resolve(base, "/data/set 1?"), "file:///data/set%201%3F");
        assert_eq!(resolve(base, "s3://bucket/run?x=1"), "s3://bucket/run?x=1");
    }

    #[test]
    fn file_urls_lead_back_to_their_path() {
        let url = resolve(Path::new("/b"), "a folder/ü");
        assert_eq!(local_path(&url), Some(PathBuf::from("/b/a folder/ü")));
        assert_eq!(local_path("/plain/path"), Some(PathBuf::from("/plain/path")));
        assert_eq!(local_path("s3://bucket/run"), None);
    }

    #[test]
    fn secrets_are_stripped_even_from_malformed_urls() {
        assert_eq!(redact("s3://key:secret@bucket/run?sig=abc#f"), "s3://bucket/run");
        assert_eq!(redact("https://host?token=abc"), "https://host");
        assert_eq!(redact("s3://key:se@cret@bu cket:bad/run"), "s3://bu cket:bad/run");
        assert_eq!(redact("file:///tmp/user@host/run"), "file:///tmp/user@host/run");
        assert_eq!(redact("/tmp/what?"), "/tmp/what?");
    }

    #[test]
    fn unusable_urls_are_told_from_paths() {
        assert_eq!(defect("runs/a"), None);
        assert_eq!(defect("s3://bucket/run"), None);
        assert!(defect("").is_some());
        assert!(defect("http://[::1/run").is_some());
        assert!(defect("file://elsewhere/run").is_some());
    }
}
