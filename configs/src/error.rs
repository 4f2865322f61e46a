//! What is wrong with a config, all of it at once.

use std::fmt;
use std::path::PathBuf;

/// Why a config could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("{}: cannot read the config: {source}; check the path given to --config", path.display())]
    Read {
        /// The file as it was given.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The file is not TOML. (The offending source line is not shown: it may hold a URL with credentials.)
    #[error("{}:{line}:{column}: not valid TOML: {message}", path.display())]
    Syntax {
        /// The file as it was given.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column in characters, from 1.
        column: usize,
        /// What the TOML parser said.
        message: String,
    },
    /// The file is TOML, but what it says cannot be run.
    #[error("{}", list(path, mistakes))]
    Invalid {
        /// The file as it was given.
        path: PathBuf,
        /// Every mistake found, in the order of the schema, unknown keys last. Never empty.
        mistakes: Vec<Mistake>,
    },
}

/// One mistake in a config: where, what was found, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// The file, or the `--set` argument, that the value came from.
    pub origin: String,
    /// Dotted key, e.g. `train.lanes`.
    pub key: String,
    /// The value found, as TOML text; `None` where the key is missing or unknown.
    pub found: Option<String>,
    /// What is wrong with it, e.g. `is not a power of two`.
    pub problem: String,
    /// What would be right or what to do.
    pub advice: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: `{}`", self.origin, self.key)?;
        if let Some(found) = &self.found {
            write!(f, " = {found}")?;
        }
        write!(f, " {}; {}", self.problem, self.advice)
    }
}

fn list(path: &std::path::Path, mistakes: &[Mistake]) -> String {
    let plural = if mistakes.len() == 1 { "mistake" } else { "mistakes" };
    let mut text = format!("{}: {} {plural} in the config", path.display(), mistakes.len());
    for mistake in mistakes {
        text.push_str(&format!("\n  {mistake}"));
    }
    text
}
