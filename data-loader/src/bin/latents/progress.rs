//! Rows done so far, on a terminal.

use indicatif::{ProgressBar, ProgressStyle};

/// A bar over `rows` rows on standard error; nothing where that is no terminal.
pub fn bar(rows: u64) -> ProgressBar {
    let bar = ProgressBar::new(rows);
    let style = ProgressStyle::with_template("{wide_bar} {human_pos} of {human_len} rows, {per_sec}, {eta} left");
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}
