use super::journal::LogSink;
use super::run_files::{RunFiles, RunFilesError};
use configs::events::{Event, now};
use configs::validation::loss_metric;
use prost::Message;
use std::fs::File;
use std::io::Write;

/// Scalars and images in a TensorBoard event file: one file an attempt, records framed as TFRecord.
///
/// # Source
/// TensorFlow `event.proto`, `summary.proto` (the fields used here) and the TFRecord format: length, masked CRC-32C of
/// the length, data, masked CRC-32C of the data.
pub struct TensorBoard {
    file: File,
    /// The attempt that is writing, so that a reader can tell resumed parts of a curve.
    name: String,
}

#[derive(Clone, PartialEq, Message)]
struct EventRecord {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(string, optional, tag = "3")]
    file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
    #[prost(message, optional, tag = "7")]
    session_log: Option<SessionLog>,
}

/// Tells a reader that earlier files' records from this step on were lost with the process that wrote them.
#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// `SessionLog.START`.
const SESSION_START: i32 = 1;

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<SummaryValue>,
}

#[derive(Clone, PartialEq, Message)]
struct SummaryValue {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
    #[prost(message, optional, tag = "4")]
    image: Option<SummaryImage>,
}

#[derive(Clone, PartialEq, Message)]
struct SummaryImage {
    #[prost(int32, tag = "1")]
    height: i32,
    #[prost(int32, tag = "2")]
    width: i32,
    #[prost(int32, tag = "3")]
    colorspace: i32,
    #[prost(bytes = "vec", tag = "4")]
    encoded_image_string: Vec<u8>,
}

impl TensorBoard {
    /// A new event file of `attempt`, which continues after step `done`, in the run folder.
    ///
    /// # Errors
    /// [`RunFilesError`].
    pub fn create(files: &RunFiles, attempt: u32, done: u64) -> Result<Self, RunFilesError> {
        // TensorBoard reads the files of a folder in the order of their names.
        let name = format!("tensorboard/events.out.tfevents.{:010}.attempt-{attempt:04}", now() as u64);
        let mut board = Self { file: files.append(&name)?, name };
        let version = Some("brain.Event:2".to_owned());
        board.write(&EventRecord { wall_time: now(), file_version: version, ..Default::default() })?;
        let session_log = Some(SessionLog { status: SESSION_START });
        let step = done as i64 + 1;
        board.write(&EventRecord { wall_time: now(), step, session_log, ..Default::default() })?;
        Ok(board)
    }

    fn record(&mut self, step: u64, value: Vec<SummaryValue>) -> Result<(), RunFilesError> {
        let summary = Some(Summary { value });
        self.write(&EventRecord { wall_time: now(), step: step as i64, summary, ..Default::default() })
    }

    fn write(&mut self, record: &EventRecord) -> Result<(), RunFilesError> {
        let data = record.encode_to_vec();
        let length = (data.len() as u64).to_le_bytes();
        let mut framed = Vec::with_capacity(data.len() + 16);
        framed.extend(length);
        framed.extend(masked_crc(&length).to_le_bytes());
        framed.extend(&data);
        framed.extend(masked_crc(&data).to_le_bytes());
        self.file.write_all(&framed).map_err(|error| RunFilesError::of(&self.name, error))
    }
}

/// The step and the curves' points that an event has, by tag.
fn scalars(event: &Event) -> (u64, Vec<(String, f64)>) {
    match event {
        Event::Step {
            step,
            epoch,
            loss,
            mse,
            vb,
            lr,
            grad_norm,
            images_per_s,
            data_wait_share,
            overlap,
            mfu,
            rows_read,
            ..
        } => {
            let scalars = [
                ("loss/total", Some(*loss)),
                ("loss/mse", Some(*mse)),
                ("loss/vb", *vb),
                ("optimizer/lr", Some(*lr)),
                ("optimizer/grad_norm", Some(*grad_norm)),
                ("throughput/images_per_s", Some(*images_per_s)),
                ("throughput/data_wait_share", Some(*data_wait_share)),
                ("throughput/overlap", *overlap),
                ("throughput/mfu", *mfu),
                ("progress/epoch", Some(*epoch as f64)),
            ];
            let of_source = |(source, rows): (usize, &u64)| (format!("data/rows_of_source_{source}"), *rows as f64);
            let scalars = scalars.into_iter().filter_map(|(tag, value)| Some((tag.to_owned(), value?)));
            (*step, scalars.chain(rows_read.iter().enumerate().map(of_source)).collect())
        }
        Event::Validation { step, weights, loss, parts, bins, .. } => {
            let mut scalars = vec![(loss_metric(weights), *loss)];
            scalars.extend(parts.iter().map(|(name, value)| (format!("val_{name}/{weights}"), *value)));
            let bin = |(bin, value): (usize, &f64)| (format!("val_loss_by_time/{weights}/{bin:02}"), *value);
            scalars.extend(bins.iter().enumerate().map(bin));
            (*step, scalars)
        }
        Event::Scores { step, weights, scores, .. } => {
            (*step, scores.iter().map(|(name, score)| (format!("{name}/{weights}"), *score)).collect())
        }
        _ => (0, Vec::new()),
    }
}

fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

impl LogSink for TensorBoard {
    fn event(&mut self, event: &Event) -> Result<(), RunFilesError> {
        let (step, scalars) = scalars(event);
        let value = |(tag, value): (String, f64)| SummaryValue { tag, simple_value: Some(value as f32), image: None };
        if scalars.is_empty() { Ok(()) } else { self.record(step, scalars.into_iter().map(value).collect()) }
    }

    fn image(&mut self, step: u64, tag: &str, png: &[u8], size: (usize, usize)) -> Result<(), RunFilesError> {
        let (width, height) = (size.0 as i32, size.1 as i32);
        let image = SummaryImage { height, width, colorspace: 3, encoded_image_string: png.to_vec() };
        self.record(step, vec![SummaryValue { tag: tag.to_owned(), simple_value: None, image: Some(image) }])
    }
}
