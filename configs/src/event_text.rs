//! Events as plain lines for people.

use crate::events::Event;
use std::fmt::{Display, Formatter, Result};

impl Display for Event {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match self {
            Event::Start { attempt, resumed_from, world_size, lanes, params, trainable, .. } => {
                write!(f, "start: attempt {attempt}, ")?;
                match resumed_from {
                    Some(step) => write!(f, "resumed from step {step}")?,
                    None => write!(f, "a fresh run")?,
                }
                write!(f, ", {lanes} lanes on {world_size} rank(s), {trainable} of {params} parameters trained")
            }
            Event::Init { from, changes, .. } => {
                write!(f, "init: weights of {from}")?;
                changes.iter().try_for_each(|change| write!(f, "\n  {change}"))
            }
            Event::Step { step, steps, .. } => write!(f, "step {step}/{steps}  {}", self.rates()),
            Event::Replaced { step, file, row_group, rows, reason, .. } => {
                write!(f, "replaced: from step {step} on, {rows} rows of {file} (row group {row_group}): {reason}")
            }
            Event::Diverged { step, phase, reason, lanes, action, .. } => {
                write!(f, "diverged: step {step}, phase {phase}: {reason}")?;
                let mut lanes = lanes.iter();
                lanes.try_for_each(|at| write!(f, "; lane {} is of rank {} on {}", at.lane, at.rank, at.host))?;
                write!(f, ": {action}")
            }
            Event::Checkpoint { step, url, .. } => write!(f, "checkpoint: step {step} committed, {url}"),
            Event::CheckpointSkipped { step, under_way, .. } => {
                write!(f, "checkpoint: step {step} skipped, that of step {under_way} is still on its way")
            }
            Event::Sample { step, path, .. } => write!(f, "samples: step {step}, {path}"),
            Event::Validation { step, weights, loss, bins, .. } => {
                write!(f, "validation: step {step}, {weights}  loss {loss:.4}  by time")?;
                bins.iter().try_for_each(|bin| write!(f, " {bin:.3}"))
            }
            Event::Scores { step, weights, scores, .. } => {
                write!(f, "scores: step {step}, {weights} ")?;
                scores.iter().try_for_each(|(name, score)| write!(f, " {name} {score:.3}"))
            }
            Event::Sampling { images, total, .. } => write!(f, "sampling: {images}/{total} images  {}", self.rates()),
            Event::Sampled { images, .. } => write!(f, "done: {images} images"),
            Event::Stop { step, reason, .. } => write!(f, "stop: at step {step}, {reason}"),
            Event::Done { step, .. } => write!(f, "done: step {step}"),
        }
    }
}

impl Event {
    /// Loss and rates of a [`Event::Step`], rates of an [`Event::Sampling`]; empty for other events.
    pub fn rates(&self) -> String {
        match self {
            Event::Step { loss, images_per_s, data_wait_share, overlap, eta_s, .. } => {
                let (wait, eta) = (100.0 * data_wait_share, duration(*eta_s));
                let overlap = overlap.map(|share| format!("  overlap {:.0}%", 100.0 * share)).unwrap_or_default();
                format!("loss {loss:.4}  images/s {images_per_s:.0}  data-wait {wait:.1}%{overlap}  eta {eta}")
            }
            Event::Sampling { images_per_s, eta_s, .. } => {
                format!("images/s {images_per_s:.1}  eta {}", duration(*eta_s))
            }
            _ => String::new(),
        }
    }
}

fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "?".to_owned();
    }
    let seconds = seconds.round() as u64;
    match (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60) {
        (0, 0, 0, s) => format!("{s}s"),
        (0, 0, m, s) => format!("{m}m{s:02}s"),
        (0, h, m, _) => format!("{h}h{m:02}m"),
        (d, h, _, _) => format!("{d}d{h:02}h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_one_plain_line() {
        let event = |overlap| Event::Step {
            step: 120,
            steps: 1500,
            epoch: 0,
            loss: 0.21304,
            mse: 0.2,
            vb: None,
            lr: 1e-3,
            grad_norm: 1.5,
            images_per_s: 431.4,
            data_wait_share: 0.001,
            overlap,
            eta_s: 190.2,
            rows_read: Vec::new(),
            mfu: None,
            time: 1.0,
        };
        assert_eq!(event(None).to_string(), "step 120/1500  loss 0.2130  images/s 431  data-wait 0.1%  eta 3m10s");
        let expected = "step 120/1500  loss 0.2130  images/s 431  data-wait 0.1%  overlap 87%  eta 3m10s";
        assert_eq!(event(Some(0.874)).to_string(), expected);
    }

    #[test]
    fn a_validation_is_one_plain_line() {
        let (weights, parts) = ("ema".to_owned(), Default::default());
        let event = Event::Validation { step: 200, weights, loss: 0.25, parts, bins: vec![0.4, 0.1], time: 1.0 };
        assert_eq!(event.to_string(), "validation: step 200, ema  loss 0.2500  by time 0.400 0.100");
    }

    #[test]
    fn times_are_short() {
        let texts = [0.4, 59.6, 3600.0, 90_000.0, f64::NAN].map(duration);
        assert_eq!(texts, ["0s", "1m00s", "1h00m", "1d01h", "?"]);
    }
}
