//! What is known, as JSON lines.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use serde_json::Value;

/// Between two lines, of a world of no more than 16 ranks; a larger one has longer lines, less often.
const PERIOD: Duration = Duration::from_secs(1);
const RANKS_PER_PERIOD: usize = 16;

/// A file of one JSON object a line, to which every start appends.
pub struct StatusFile {
    file: File,
    written: Option<Instant>,
}

impl StatusFile {
    /// # Errors
    /// It cannot be written.
    pub fn open(path: &Path) -> anyhow::Result<StatusFile> {
        let file = File::options().create(true).append(true).open(path);
        let file = file.with_context(|| format!("--status-file {} cannot be written", path.display()))?;
        Ok(StatusFile { file, written: None })
    }

    /// A line should be written.
    pub fn is_due(&self, now: Instant, ranks: usize) -> bool {
        let period = PERIOD * u32::try_from(ranks.div_ceil(RANKS_PER_PERIOD).max(1)).unwrap_or(u32::MAX);
        self.written.is_none_or(|written| now.saturating_duration_since(written) >= period)
    }

    /// Appends a line, in one write.
    ///
    /// # Errors
    /// As the system tells it.
    pub fn write(&mut self, snapshot: &Value, now: Instant) -> std::io::Result<()> {
        self.written = Some(now);
        self.file.write_all(format!("{snapshot}\n").as_bytes())
    }
}
