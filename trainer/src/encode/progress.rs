//! What a person sees while images are encoded.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::plan::Share;

/// Seconds between plain lines.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// A bar on rank 0's terminal; elsewhere a line now and then.
pub(super) struct Progress {
    bar: Option<ProgressBar>,
    prefix: String,
    total: usize,
    done: usize,
    encoded: usize,
    started: Instant,
    last_line: Instant,
}

impl Progress {
    /// For a rank that has `total` images to do.
    pub(super) fn new(share: Share, total: usize) -> Self {
        let bar = (share.rank == 0 && std::io::stderr().is_terminal()).then(|| {
            let style =
                ProgressStyle::with_template("{prefix} {bar:32} {human_pos}/{human_len} images {per_sec} ETA {eta}")
                    .unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(total as u64).with_style(style).with_prefix("encode")
        });
        let prefix = match share.world_size {
            1 => "encode".to_string(),
            n => format!("encode [rank {} of {n}]", share.rank),
        };
        let now = Instant::now();
        Self { bar, prefix, total, done: 0, encoded: 0, started: now, last_line: now }
    }

    /// Images of a part that was there already.
    pub(super) fn found(&mut self, images: usize) {
        self.done += images;
        if let Some(bar) = &self.bar {
            bar.inc(images as u64);
            // The rate and the ETA are those of encoding, not of skipping.
            bar.reset_eta();
        }
    }

    /// Images just encoded.
    pub(super) fn encoded(&mut self, images: usize) {
        self.done += images;
        self.encoded += images;
        match &self.bar {
            Some(bar) => bar.inc(images as u64),
            None if self.last_line.elapsed() >= LINE_EVERY => {
                self.last_line = Instant::now();
                let rate = self.encoded as f64 / self.started.elapsed().as_secs_f64();
                let eta_s = (self.total - self.done) as f64 / rate;
                eprintln!(
                    "{}: {}/{} images, {rate:.0} images/s, {eta_s:.0} s left",
                    self.prefix, self.done, self.total
                );
            }
            None => {}
        }
    }

    /// A message that must not tear the bar.
    pub(super) fn say(&self, message: &str) {
        let line = format!("{}: {message}", self.prefix);
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{line}")),
            None => eprintln!("{line}"),
        }
    }

    /// Takes the bar away and sums up.
    pub(super) fn finish(self, summary: &str) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let seconds = self.started.elapsed().as_secs_f64();
        let rate = self.encoded as f64 / seconds.max(1e-9);
        eprintln!("{}: {} images encoded in {seconds:.1} s ({rate:.0} images/s); {summary}", self.prefix, self.encoded);
    }
}
