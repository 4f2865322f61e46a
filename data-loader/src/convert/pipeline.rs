//! Reads a source on several threads and writes it part by part.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Mutex, PoisonError};

use super::destination::Destination;
use super::files::Place;
use super::labels::LabelMap;
use super::order::{Order, permutation};
use super::sink::{ExportFormat, Sink, SinkRow, parquet_name};
use super::spool::Spool;
use super::values::Values;
use super::{About, CaptionArray, Sample, Source};
use crate::{Caption, DataError, Dtype, WriterOptions};

/// Rows that a thread reads at a time, and batches that it may have ready.
const BATCH_ROWS: usize = 64;
const AHEAD: usize = 2;
/// Samples whose sizes are looked at where rows have shapes of their own.
const MEASURED_ROWS: usize = 1024;

/// How large a file becomes. Rows are spread evenly over the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSize {
    /// At most so many rows.
    Rows(usize),
    /// At most about so many bytes of numbers.
    Bytes(u64),
}

/// How a source is converted.
#[derive(Clone, Debug)]
pub struct ConvertOptions {
    /// What is written.
    pub format: ExportFormat,
    /// The number type that is stored; the source's if not given.
    pub dtype: Option<Dtype>,
    /// The order of the rows.
    pub order: Order,
    /// Size of the files.
    pub file_size: FileSize,
    /// Threads that read and write.
    pub threads: usize,
    /// What is done to the numbers.
    pub values: Values,
    /// What a reader must multiply the stored numbers by; else what the source tells, times [`Values::divide_by`].
    pub scaling_factor: Option<f64>,
    /// Number of classes; else what the source tells, or the largest label + 1.
    pub num_classes: Option<usize>,
    /// Labels from elsewhere.
    pub labels: Option<LabelMap>,
    /// One label for all samples.
    pub label: Option<i64>,
    /// Write no labels.
    pub unlabelled: bool,
    /// Digest of the VAE; else what the source tells.
    pub vae_digest: Option<String>,
    /// Store a shape with each row instead of refusing shapes that differ.
    pub row_shapes: bool,
    /// Store the posterior's mean as the latent.
    pub mean_only: bool,
    /// Leave out the mirrored latents.
    pub drop_flipped: bool,
}

/// How far a conversion is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What is being done.
    pub phase: &'static str,
    /// Rows that it is done for.
    pub rows: usize,
    /// All rows.
    pub of_rows: usize,
}

/// What was written.
#[derive(Clone, Debug, PartialEq)]
pub struct Converted {
    /// Samples.
    pub rows: usize,
    /// Parts.
    pub files: usize,
    /// Bytes of the stored numbers.
    pub latent_bytes: u64,
    /// Number of classes.
    pub num_classes: Option<usize>,
    /// What the stored numbers must be multiplied by.
    pub scaling_factor: Option<f64>,
}

/// Everything that is settled before the first row is written.
struct Plan<'a> {
    source: &'a dyn Source,
    options: &'a ConvertOptions,
    dtype: Dtype,
    labels: Option<Vec<i64>>,
    order: Option<Vec<usize>>,
    row_shapes: bool,
    rows: usize,
    parts: usize,
}

/// Writes the samples of `source` to the path or URL `to`.
///
/// Memory: for each thread three batches of 64 samples and, for parquet, one row group; 8 bytes a row for labels, 8 where the
/// order is not the source's.
///
/// # Errors
/// The first thing that is wrong with a sample, named by file and entry. The target does not exist then.
pub fn convert(
    source: &dyn Source,
    to: &str,
    options: &ConvertOptions,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<Converted, DataError> {
    convert_to(source, Place::parse(to)?, options, progress)
}

/// The same for a place that is made already.
pub(super) fn convert_to(
    source: &dyn Source,
    to: Place,
    options: &ConvertOptions,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<Converted, DataError> {
    let about = source.about().clone();
    let rows = source.rows();
    let refuse = |reason: String| DataError::source(&about.name, reason);
    if rows == 0 {
        return Err(refuse("holds no sample".into()));
    }
    options.values.check(&about.name, about.moments, &about.latent_shape)?;
    let dtype = options.dtype.unwrap_or(match about.dtype {
        dtype if options.format.writes(dtype) => dtype,
        _ => Dtype::F32,
    });
    if !options.format.writes(dtype) {
        return Err(refuse(format!("cannot be written as {dtype}: numpy does not know it; take f16 or f32")));
    }
    let row_shapes = options.row_shapes || about.row_shapes;
    if row_shapes && !options.format.writes_row_shapes() {
        return Err(refuse("samples of different shapes have no place in this format".into()));
    }
    if !options.format.uploads() && matches!(to, Place::Remote(..)) {
        return Err(refuse(format!(
            "{}: this format is written to local folders only; copy them from there",
            to.name()
        )));
    }
    let labels = labels(source, options, progress)?;
    let num_classes = classes(source, labels.as_deref(), options.num_classes.or(about.num_classes))?;
    let scaling_factor =
        options.scaling_factor.or(about.scaling_factor.map(|factor| factor * options.values.divide_by.unwrap_or(1.0)));
    let writer = WriterOptions {
        row_shapes,
        moments: about.moments && !options.mean_only,
        flipped: about.flipped && !options.drop_flipped,
        labels: labels.is_some(),
        captions: about.captions,
        scaling_factor,
        num_classes,
        vae_digest: options.vae_digest.clone().or(about.vae_digest.clone()),
        metadata: normalization(&about, options),
        dtype,
        ..WriterOptions::new(about.latent_shape.clone())
    };
    let sink = options.format.sink(&writer).map_err(refuse)?;
    let row_bytes = row_bytes(source, &writer)?;
    let rows_of_file = match options.file_size {
        FileSize::Rows(rows) => rows,
        FileSize::Bytes(bytes) => {
            let of_captions = about.captions.map_or(0, |captions| captions.row_bytes() as u64);
            (bytes / (row_bytes + of_captions).max(1)).max(1) as usize
        }
    };
    if rows_of_file == 0 {
        return Err(refuse("files of 0 rows; expected at least 1".into()));
    }
    let parts = rows.div_ceil(rows_of_file);
    let ids = match options.order {
        Order::ById => Some(source.ids(0..rows)?),
        _ => None,
    };
    if options.order == Order::ByLabel && labels.is_none() {
        return Err(refuse("has no labels to sort by".into()));
    }
    let order = permutation(options.order, labels.as_deref(), ids.as_deref(), rows);
    drop(ids);

    let names: Vec<String> = (0..parts).map(|part| parquet_name(part, parts)).collect();
    let to = Destination::create(to, &names)?;
    let written = (|| {
        let spool = match &order {
            Some(_) if about.sequential => {
                let copied = AtomicUsize::new(0);
                Some(Spool::copy(source, to.folder(), &|batch| {
                    let rows_done = copied.fetch_add(batch, Ordering::Relaxed) + batch;
                    progress(Progress { phase: "copied", rows: rows_done, of_rows: rows });
                })?)
            }
            _ => None,
        };
        let source = spool.as_ref().map_or(source, |spool| spool as &dyn Source);
        let plan = Plan { source, options, dtype, labels, order, row_shapes, rows, parts };
        sink.begin(to.folder(), parts)?;
        plan.run(sink.as_ref(), &to, progress)?;
        sink.end(to.folder(), parts)
    })();
    match written {
        Ok(()) => to.complete()?,
        Err(error) => {
            to.abandon();
            return Err(error);
        }
    }
    Ok(Converted { rows, files: parts, latent_bytes: row_bytes * rows as u64, num_classes, scaling_factor })
}

/// All labels, where there are any.
fn labels(
    source: &dyn Source,
    options: &ConvertOptions,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<Option<Vec<i64>>, DataError> {
    let rows = source.rows();
    if options.unlabelled {
        return Ok(None);
    }
    if let Some(label) = options.label {
        return Ok(Some(vec![label; rows]));
    }
    if options.labels.is_none() && !source.about().labels {
        let reason =
            "has no labels; give them with --labels FILE, or --label N for one class, or do without by --unlabelled";
        return Err(DataError::source(&source.about().name, reason));
    }
    let batches: Vec<Range<usize>> =
        (0..rows).step_by(BATCH_ROWS * 16).map(|start| start..rows.min(start + BATCH_ROWS * 16)).collect();
    let read = |batch: &Range<usize>| match &options.labels {
        None => source.labels(batch.clone()),
        Some(map) => {
            let ids = source.ids(batch.clone())?;
            ids.iter().zip(batch.clone()).map(|(id, row)| map.class(id, || source.place(row))).collect()
        }
    };
    let found = Mutex::new(vec![Vec::new(); batches.len()]);
    let done = AtomicUsize::new(0);
    each_on_threads(options.threads, batches.len(), |at| {
        let labels = read(&batches[at])?;
        let rows_done = done.fetch_add(labels.len(), Ordering::Relaxed) + labels.len();
        found.lock().unwrap_or_else(PoisonError::into_inner)[at] = labels;
        progress(Progress { phase: "labels read", rows: rows_done, of_rows: rows });
        Ok(())
    })?;
    Ok(Some(found.into_inner().unwrap_or_else(PoisonError::into_inner).concat()))
}

/// Checks the labels against the number of classes, or finds it.
fn classes(source: &dyn Source, labels: Option<&[i64]>, given: Option<usize>) -> Result<Option<usize>, DataError> {
    let Some(labels) = labels else { return Ok(given) };
    let bad = labels.iter().position(|&label| label < 0 || given.is_some_and(|classes| label >= classes as i64));
    if let Some(row) = bad {
        let expected = given.map_or("0 or more".to_owned(), |classes| format!("a class in 0..{classes}"));
        let reason = format!("has the label {}; expected {expected}", labels[row]);
        return Err(DataError::source(source.place(row), reason));
    }
    let largest = labels.iter().max().map_or(0, |&label| label as usize);
    Ok(given.or(Some(largest + 1)))
}

/// What is known of the channels, so that nobody needs to guess whether it is applied.
fn normalization(about: &About, options: &ConvertOptions) -> Vec<(String, String)> {
    let applied = options.values.normalize.as_ref();
    let Some((mean, std)) = applied.or(about.channel_stats.as_ref()) else { return Vec::new() };
    let told = serde_json::json!({ "mean": mean, "std": std, "applied": applied.is_some() });
    vec![("ditharos.normalization".to_owned(), told.to_string())]
}

/// Bytes of the numbers of one row; a mean over some rows where they have shapes of their own.
fn row_bytes(source: &dyn Source, writer: &WriterOptions) -> Result<u64, DataError> {
    let numel = if writer.row_shapes {
        let measured = source.rows().min(MEASURED_ROWS);
        let step = if source.about().sequential { 1 } else { source.rows() / measured };
        let mut numel = 0;
        for batch in (0..measured).collect::<Vec<_>>().chunks(BATCH_ROWS) {
            let rows: Vec<usize> = batch.iter().map(|row| row * step).collect();
            let samples = source.read(&rows)?;
            numel +=
                samples.iter().filter_map(|sample| sample.latents.first()).map(|one| one.numbers.len()).sum::<usize>();
        }
        numel.div_ceil(measured)
    } else {
        writer.latent_shape.iter().product()
    };
    Ok((numel * writer.dtype.bytes() * writer.latent_columns().len()) as u64)
}

impl Plan<'_> {
    fn run(&self, sink: &dyn Sink, to: &Destination, progress: &(dyn Fn(Progress) + Sync)) -> Result<(), DataError> {
        let writers = self.options.threads.clamp(1, self.parts);
        let readers = (self.options.threads / writers).max(1);
        let done = AtomicUsize::new(0);
        each_on_threads(writers, self.parts, |part| {
            self.write_part(part, readers, sink, to, &|batch| {
                let rows = done.fetch_add(batch, Ordering::Relaxed) + batch;
                progress(Progress { phase: "written", rows, of_rows: self.rows });
            })
        })
    }

    fn rows_of(&self, part: usize) -> Range<usize> {
        // In 128 bits the product cannot overflow.
        let bound = |part: usize| (part as u128 * self.rows as u128 / self.parts as u128) as usize;
        bound(part)..bound(part + 1)
    }

    fn write_part(
        &self,
        part: usize,
        readers: usize,
        sink: &dyn Sink,
        to: &Destination,
        progress: &dyn Fn(usize),
    ) -> Result<(), DataError> {
        let range = self.rows_of(part);
        let rows: Vec<usize> = match &self.order {
            Some(order) => order[range.clone()].to_vec(),
            None => range.clone().collect(),
        };
        let mut out = sink.part(to.folder(), part, self.parts, range.start)?;
        let batches: Vec<&[usize]> = rows.chunks(BATCH_ROWS).collect();
        std::thread::scope(|scope| -> Result<(), DataError> {
            // Reader `r` reads batches r, r + readers, …; taking them in turn restores the order. When this thread returns early
            // the receivers are dropped, sends fail and the readers end.
            let receivers: Vec<Receiver<Result<Vec<Sample>, DataError>>> = (0..readers)
                .map(|reader| {
                    let (sender, receiver) = sync_channel(AHEAD);
                    let batches = &batches;
                    scope.spawn(move || {
                        for batch in batches.iter().skip(reader).step_by(readers) {
                            if sender.send(self.read(batch)).is_err() {
                                break;
                            }
                        }
                    });
                    receiver
                })
                .collect();
            for (at, batch) in batches.iter().enumerate() {
                let samples = receivers[at % readers].recv().map_err(|_| DataError::Panicked {
                    place: self.source.about().name.clone(),
                    message: "a reader thread ended early".into(),
                })??;
                for (sample, &row) in samples.iter().zip(*batch) {
                    let latents: Vec<&[f32]> = sample.latents.iter().map(|latent| &latent.numbers[..]).collect();
                    let captions: Vec<Caption<'_>> = sample.captions.iter().map(CaptionArray::as_written).collect();
                    let row_out = SinkRow {
                        latents: &latents,
                        shape: &sample.latents[0].shape,
                        dtype: self.dtype,
                        captions: &captions,
                        label: self.labels.as_ref().map(|labels| labels[row]),
                        id: &sample.id,
                    };
                    out.push(row_out)?;
                }
                progress(batch.len());
            }
            Ok(())
        })?;
        out.finish()?;
        to.finished(&parquet_name(part, self.parts))
    }

    /// Reads samples, checks them and does to the numbers what is asked.
    fn read(&self, rows: &[usize]) -> Result<Vec<Sample>, DataError> {
        let about = self.source.about();
        let mut samples = self.source.read(rows)?;
        for (sample, &row) in samples.iter_mut().zip(rows) {
            let refuse = |reason: String| Err(DataError::source(self.source.place(row), reason));
            let shape = sample.latents[0].shape.clone();
            if let Some(other) = sample.latents.iter().find(|latent| latent.shape != shape) {
                return refuse(format!("has latents of shapes {shape:?} and {:?}; expected one", other.shape));
            }
            if self.row_shapes && shape.len() != about.latent_shape.len() {
                return refuse(format!(
                    "has shape {shape:?}; the first sample has {:?}: all must have as many dimensions",
                    about.latent_shape
                ));
            }
            if shape != about.latent_shape && !self.row_shapes {
                return refuse(format!(
                    "has shape {shape:?}; the first sample has {:?}; with --row-shapes each row stores its own",
                    about.latent_shape
                ));
            }
            if self.options.drop_flipped && about.flipped {
                sample.latents.truncate(sample.latents.len() / 2);
            }
            self.options.values.apply(&mut sample.latents, about.moments);
            if self.options.mean_only && about.moments {
                let mut column = 0;
                sample.latents.retain(|_| {
                    column += 1;
                    column % 2 == 1
                });
            }
            for latent in &sample.latents {
                if let Some(at) = latent.numbers.iter().position(|number| !self.dtype.holds(*number)) {
                    let number = latent.numbers[at];
                    return refuse(format!(
                        "holds {number} at position {at}, which {} cannot hold{}",
                        self.dtype,
                        if number.is_finite() { "; take another --dtype" } else { "" }
                    ));
                }
            }
            if let Some(captions) = &about.captions {
                let written: Vec<Caption<'_>> = sample.captions.iter().map(CaptionArray::as_written).collect();
                captions.check_row(&written).map_err(|reason| DataError::source(self.source.place(row), reason))?;
            }
        }
        Ok(samples)
    }
}

/// Runs `work` for 0 to `count` on so many threads, each taking the next number; the error of the smallest number that fails.
fn each_on_threads(
    threads: usize,
    count: usize,
    work: impl Fn(usize) -> Result<(), DataError> + Sync,
) -> Result<(), DataError> {
    let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let first_error: Mutex<Option<(usize, DataError)>> = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..threads.clamp(1, count.max(1)) {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    if at >= count {
                        break;
                    }
                    if let Err(error) = work(at) {
                        stop.store(true, Ordering::Relaxed);
                        let mut first = first_error.lock().unwrap_or_else(PoisonError::into_inner);
                        if first.as_ref().is_none_or(|(earlier, _)| at < *earlier) {
                            *first = Some((at, error));
                        }
                    }
                }
            });
        }
    });
    first_error.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), |(_, error)| Err(error))
}
