//! Where images go, and what people see meanwhile.

use crate::images::{Grid, ImageBatch, NpzWriter};
use anyhow::Result;
use configs::events::{EVENTS_STDOUT, EVENTS_VARIABLE, Event, now};
use indicatif::{ProgressBar, ProgressStyle};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The files that were asked for; they appear complete or not at all.
pub struct Output {
    labels: Vec<i64>,
    npz: Option<(PathBuf, Option<NpzWriter>)>,
    grid: Option<(PathBuf, Option<ImageBatch>)>,
    grid_num: usize,
    columns: usize,
    progress: Progress,
}

impl Output {
    /// Nothing is opened before the first images come. `columns` is for the grid of the first `grid_num` images.
    ///
    /// # Errors
    /// When the progress bar cannot be made.
    pub fn new(
        labels: Vec<i64>,
        npz: Option<&Path>,
        grid: Option<&Path>,
        grid_num: usize,
        columns: usize,
    ) -> Result<Self> {
        let progress = Progress::new(labels.len())?;
        let npz = npz.map(|path| (path.to_owned(), None));
        let grid = grid.map(|path| (path.to_owned(), None));
        Ok(Self { labels, npz, grid, grid_num: grid_num.max(1), columns, progress })
    }

    /// Takes the next images.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn take(&mut self, images: ImageBatch) -> Result<()> {
        if let Some((path, writer)) = &mut self.npz {
            if writer.is_none() {
                *writer = Some(NpzWriter::create(path, self.labels.len(), images.height, images.width)?);
            }
            if let Some(writer) = writer {
                writer.push(&images)?;
            }
        }
        self.progress.add(images.count);
        if let Some((_, shown)) = &mut self.grid {
            let shown = match shown {
                None => shown.insert(images),
                Some(shown) if shown.count >= self.grid_num => return Ok(()),
                Some(shown) => {
                    shown.append(images)?;
                    shown
                }
            };
            shown.truncate(self.grid_num);
        }
        Ok(())
    }

    /// Completes the files and says where they are.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn finish(self) -> Result<()> {
        self.progress.finish();
        if let Some((path, Some(writer))) = self.npz {
            writer.finish(Some(&self.labels))?;
            self.progress.written(self.labels.len(), &path);
        }
        if let Some((path, Some(shown))) = self.grid {
            Grid::new(&shown, self.columns, 2)?.write(&path)?;
            self.progress.written(shown.count, &path);
        }
        self.progress.done();
        Ok(())
    }
}

/// Events on stdout where the launcher reads them, a bar otherwise.
struct Progress {
    bar: Option<ProgressBar>,
    total: usize,
    done: usize,
    started: Instant,
    told: Option<Instant>,
}

/// Between two events of progress.
const PAUSE: Duration = Duration::from_secs(1);

impl Progress {
    fn new(total: usize) -> Result<Self> {
        let for_launcher = std::env::var(EVENTS_VARIABLE).is_ok_and(|value| value == EVENTS_STDOUT);
        let style = ProgressStyle::with_template("{bar:40} {pos}/{len} images  {per_sec}  eta {eta}")?;
        let bar = (!for_launcher).then(|| ProgressBar::new(total as u64).with_style(style));
        let mut progress = Self { bar, total, done: 0, started: Instant::now(), told: None };
        progress.tell();
        Ok(progress)
    }

    fn add(&mut self, images: usize) {
        self.done += images;
        match &self.bar {
            Some(bar) => bar.inc(images as u64),
            None => self.tell(),
        }
    }

    fn tell(&mut self) {
        let is_due = self.done == self.total || self.told.is_none_or(|told| told.elapsed() >= PAUSE);
        if self.bar.is_none() && is_due {
            self.told = Some(Instant::now());
            let rate = self.done as f64 / self.started.elapsed().as_secs_f64();
            let (images, total) = (self.done as u64, self.total as u64);
            let eta_s = (self.total - self.done) as f64 / rate;
            println!("{}", Event::Sampling { images, total, images_per_s: rate, eta_s, time: now() }.to_line());
        }
    }

    fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn written(&self, images: usize, path: &Path) {
        println!("{images} images: {}", path.display());
    }

    fn done(&self) {
        if self.bar.is_none() {
            println!("{}", Event::Sampled { images: self.total as u64, time: now() }.to_line());
        }
    }
}
