//! The JSON lines of a run: rank 0 appends them to `log.jsonl` in the run folder and, if the environment variable
//! [`EVENTS_VARIABLE`] is `stdout`, prints them for the launcher.

use serde::{Deserialize, Deserializer, Serialize};
use std::collections::BTreeMap;

/// Environment variable by which the launcher asks rank 0 for events on its stdout (value [`EVENTS_STDOUT`]).
pub const EVENTS_VARIABLE: &str = "DITHAROS_EVENTS";
/// See [`EVENTS_VARIABLE`].
pub const EVENTS_STDOUT: &str = "stdout";

/// Whether the launcher has asked for events, and heartbeats.
pub fn is_launcher_listening() -> bool {
    std::env::var(EVENTS_VARIABLE).is_ok_and(|value| value == EVENTS_STDOUT)
}

/// One line. `time` is in seconds since the Unix epoch; a float that is not finite is written as `null`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The ranks are up and about to run the first step.
    Start {
        /// Number of this start of the run, from 1.
        attempt: u32,
        /// Step of the checkpoint that was continued; `None` for a fresh run.
        resumed_from: Option<u64>,
        /// Ranks.
        world_size: usize,
        /// Lanes of the experiment.
        lanes: usize,
        /// Step at which the run ends.
        steps: u64,
        /// Parameters of the model.
        params: u64,
        /// Those of them that are trained.
        #[serde(default)]
        trainable: u64,
        /// When.
        time: f64,
    },
    /// A new run has taken its first weights from elsewhere.
    Init {
        /// The checkpoint, file or folder, redacted.
        from: String,
        /// What is not as it was there.
        changes: Vec<String>,
        /// When.
        time: f64,
    },
    /// Progress, every `log.every_steps` steps; rates are means since the last such line.
    Step {
        /// Optimizer steps done.
        step: u64,
        /// Step at which the run ends.
        steps: u64,
        /// Passes over the data set that are complete.
        epoch: u64,
        /// Mean loss over the lanes at this step.
        #[serde(deserialize_with = "nan_if_null")]
        loss: f64,
        /// Mean squared error of what the model predicts, before any weighting.
        #[serde(deserialize_with = "nan_if_null")]
        mse: f64,
        /// Its variational-bound term, where the model learns the variance.
        vb: Option<f64>,
        /// Learning rate of this step.
        lr: f64,
        /// Euclidean norm of the gradient.
        #[serde(deserialize_with = "nan_if_null")]
        grad_norm: f64,
        /// Samples per second, all ranks together.
        #[serde(deserialize_with = "nan_if_null")]
        images_per_s: f64,
        /// Share of the wall time that rank 0 waited for data, 0 to 1.
        #[serde(deserialize_with = "nan_if_null")]
        data_wait_share: f64,
        /// Share of the time in which gradients or weights were on rank 0's wire that it did not wait for them; `None` with one rank.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        overlap: Option<f64>,
        /// Seconds to the end at this rate.
        #[serde(deserialize_with = "nan_if_null")]
        eta_s: f64,
        /// Rows read so far of each source of `data.mix`, all ranks and starts together; empty with one data set.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        rows_read: Vec<u64>,
        /// Model FLOP/s over the peak of the devices, where the peak is known.
        mfu: Option<f64>,
        /// When.
        time: f64,
    },
    /// All ranks have agreed to read other rows in place of those of a broken row group.
    Replaced {
        /// The first step at which it made a difference.
        step: u64,
        /// The number of the data set in the mix, else 0.
        source: usize,
        /// The file, redacted.
        file: String,
        /// The row group in the file.
        row_group: usize,
        /// Its rows.
        rows: u64,
        /// What is wrong with it.
        reason: String,
        /// When.
        time: f64,
    },
    /// A step has diverged, and all ranks have agreed on what becomes of it.
    Diverged {
        /// Which.
        step: u64,
        /// What the ranks were at.
        phase: String,
        /// What is wrong.
        reason: String,
        /// The lanes at fault, as far as they are known.
        lanes: Vec<LaneAtFault>,
        /// `stop`, `skip` or `rollback`.
        action: String,
        /// When.
        time: f64,
    },
    /// A checkpoint was committed.
    Checkpoint {
        /// Its step.
        step: u64,
        /// Its manifest, redacted.
        url: String,
        /// When.
        time: f64,
    },
    /// A checkpoint was due but left out (`checkpoint.when_busy`).
    CheckpointSkipped {
        /// Its step.
        step: u64,
        /// Step of the one that was still on its way.
        under_way: u64,
        /// When.
        time: f64,
    },
    /// A sample grid was written.
    Sample {
        /// Step of the weights.
        step: u64,
        /// The image, redacted.
        path: String,
        /// When.
        time: f64,
    },
    /// The loss of one set of weights on held-out rows.
    Validation {
        /// Step of the weights.
        step: u64,
        /// Their section in checkpoints.
        weights: String,
        /// Mean of `bins`.
        #[serde(deserialize_with = "nan_if_null")]
        loss: f64,
        /// Means of its terms before weighting, by name.
        #[serde(deserialize_with = "nans_in_map")]
        parts: BTreeMap<String, f64>,
        /// Mean loss in each of equal parts of the diffusion's time, from data to noise.
        #[serde(deserialize_with = "nans_in_list")]
        bins: Vec<f64>,
        /// When.
        time: f64,
    },
    /// Scores of samples that one set of weights has drawn.
    Scores {
        /// Step of the weights.
        step: u64,
        /// Their section in checkpoints.
        weights: String,
        /// By name: `fid`, `inception_score`.
        #[serde(deserialize_with = "nans_in_map")]
        scores: BTreeMap<String, f64>,
        /// When.
        time: f64,
    },
    /// Progress of `sample`, after every batch; the first one, of 0 images, says that the ranks are up.
    Sampling {
        /// Images done.
        images: u64,
        /// Images asked for.
        total: u64,
        /// All ranks together, since the start.
        #[serde(deserialize_with = "nan_if_null")]
        images_per_s: f64,
        /// Seconds to the end at this rate.
        #[serde(deserialize_with = "nan_if_null")]
        eta_s: f64,
        /// When.
        time: f64,
    },
    /// All images of `sample` are drawn and written.
    Sampled {
        /// How many.
        images: u64,
        /// When.
        time: f64,
    },
    /// The ranks agreed to stop early, and have saved.
    Stop {
        /// Step at which they stopped.
        step: u64,
        /// Why.
        reason: String,
        /// When.
        time: f64,
    },
    /// The last step was reached and committed (also when the run was already complete at the start).
    Done {
        /// That step.
        step: u64,
        /// When.
        time: f64,
    },
}

/// A lane of a step that has diverged.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LaneAtFault {
    /// Which.
    pub lane: usize,
    /// Its loss.
    #[serde(deserialize_with = "nan_if_null")]
    pub loss: f64,
    /// The rank that has run it.
    pub rank: usize,
    /// That rank's machine.
    pub host: String,
}

impl Event {
    /// The event as one line of JSON, without the line end.
    pub fn to_line(&self) -> String {
        // A struct of numbers, strings and options always serialises.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// When it happened.
    pub fn time(&self) -> f64 {
        match self {
            Event::Start { time, .. }
            | Event::Init { time, .. }
            | Event::Step { time, .. }
            | Event::Replaced { time, .. }
            | Event::Diverged { time, .. }
            | Event::Checkpoint { time, .. }
            | Event::CheckpointSkipped { time, .. }
            | Event::Sample { time, .. }
            | Event::Validation { time, .. }
            | Event::Scores { time, .. }
            | Event::Sampling { time, .. }
            | Event::Sampled { time, .. }
            | Event::Stop { time, .. }
            | Event::Done { time, .. } => *time,
        }
    }

    /// Reads a line; `None` if it is something else than a known event.
    pub fn parse(line: &str) -> Option<Event> {
        let line = line.trim();
        // Cheap test first: ranks print many lines that are no events.
        if !line.starts_with('{') || !line.contains("\"event\"") {
            return None;
        }
        serde_json::from_str(line).ok()
    }
}

/// Seconds since the Unix epoch, for the `time` of an event.
pub fn now() -> f64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

fn nan_if_null<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Option::<f64>::deserialize(deserializer).map(|number| number.unwrap_or(f64::NAN))
}

#[derive(Deserialize)]
struct OrNan(#[serde(deserialize_with = "nan_if_null")] f64);

fn nans_in_list<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<f64>, D::Error> {
    Ok(Vec::<OrNan>::deserialize(deserializer)?.into_iter().map(|number| number.0).collect())
}

fn nans_in_map<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, f64>, D::Error> {
    let map = BTreeMap::<String, OrNan>::deserialize(deserializer)?;
    Ok(map.into_iter().map(|(name, number)| (name, number.0)).collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn step(loss: f64) -> Event {
        Event::Step {
            step: 120,
            steps: 1500,
            epoch: 0,
            loss,
            mse: 0.2,
            vb: None,
            lr: 1e-3,
            grad_norm: 1.5,
            images_per_s: 431.0,
            data_wait_share: 0.001,
            overlap: Some(0.75),
            eta_s: 190.0,
            rows_read: vec![30, 10],
            mfu: None,
            time: 1.0,
        }
    }

    #[test]
    fn lines_are_tagged_objects_that_read_back() {
        let line = Event::Done { step: 7, time: 2.5 }.to_line();
        assert_eq!(line, r#"{"event":"done","step":7,"time":2.5}"#);
        assert_eq!(Event::parse(&line), Some(Event::Done { step: 7, time: 2.5 }));
        let event = step(0.213);
        assert_eq!(Event::parse(&event.to_line()), Some(event));
    }

    #[test]
    fn a_loss_that_is_not_finite_survives_as_nan() {
        let line = step(f64::INFINITY).to_line();
        assert!(line.contains(r#""loss":null"#), "{line}");
        let Some(Event::Step { loss, mse, .. }) = Event::parse(&line) else { panic!("not read back: {line}") };
        assert!(loss.is_nan());
        assert_eq!(mse, 0.2);
    }

    #[test]
    fn a_validation_reads_back_even_where_it_is_not_finite() {
        let event = |bin: f64| Event::Validation {
            step: 5,
            weights: "ema".to_owned(),
            loss: 0.5 * (0.25 + bin),
            parts: BTreeMap::from([("mse".to_owned(), bin)]),
            bins: vec![0.25, bin],
            time: 1.0,
        };
        assert_eq!(Event::parse(&event(0.75).to_line()), Some(event(0.75)));
        let Some(Event::Validation { loss, parts, bins, .. }) = Event::parse(&event(f64::NAN).to_line()) else {
            panic!("not read back")
        };
        assert!(loss.is_nan() && parts["mse"].is_nan() && bins[0] == 0.25 && bins[1].is_nan());
    }

    #[test]
    fn other_lines_are_no_events() {
        for line in ["", "loss 0.2", "{\"step\":3}", "{\"event\":\"new_kind\"}", "{\"event\":\"done\""] {
            assert_eq!(Event::parse(line), None, "{line}");
        }
    }
}
