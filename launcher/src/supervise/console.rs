//! What people see: a progress bar where stderr is a terminal, plain lines otherwise.

use std::io::{IsTerminal, Write};

use configs::events::Event;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::demux::Line;

/// Writes one line to stderr. A terminal or pipe that has gone away must not end the run, so errors are ignored.
pub fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// The launcher's output.
pub struct Console {
    bar: Option<ProgressBar>,
}

impl Console {
    /// A bar of `steps` steps if stderr is a terminal.
    pub fn new(steps: u64) -> Console {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stderr());
            // The template is fixed; should it ever be wrong, the default style serves.
            if let Ok(style) = ProgressStyle::with_template("{wide_bar} {pos}/{len}  {msg}") {
                bar.set_style(style);
            }
            bar.set_message("starting");
            bar
        });
        Console { bar }
    }

    /// A line of a rank, or of the engine itself, to the stream that it came from.
    pub fn line(&self, line: &Line) {
        let text = match line.rank {
            Some(rank) => format!("[rank {rank}] {}", line.text),
            None => format!("[mpirun] {}", line.text),
        };
        match line.is_stderr {
            true => self.say(&text),
            false => self.above_bar(|| {
                let _ = writeln!(std::io::stdout(), "{text}");
            }),
        }
    }

    /// A line of the launcher.
    pub fn say(&self, text: &str) {
        self.above_bar(|| say(text));
    }

    /// Something happened in the run.
    pub fn event(&self, event: &Event) {
        match (&self.bar, event) {
            (Some(bar), Event::Step { step, steps, .. }) => {
                bar.set_length(*steps);
                bar.set_position(*step);
                bar.set_message(rates(event));
            }
            _ => self.say(&describe(event)),
        }
    }

    /// Leaves the last state of the bar on the screen, and the cursor below it.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.abandon();
            say("");
        }
    }

    fn above_bar(&self, print: impl FnOnce()) {
        match &self.bar {
            Some(bar) => bar.suspend(print),
            None => print(),
        }
    }
}

fn describe(event: &Event) -> String {
    match event {
        Event::Start {
            attempt,
            resumed_from,
            world_size,
            lanes,
            params,
            ..
        } => {
            let from = resumed_from.map_or("a fresh run".to_owned(), |step| {
                format!("resumed from step {step}")
            });
            format!(
                "start: attempt {attempt}, {from}, {lanes} lanes on {world_size} rank(s), {params} parameters"
            )
        }
        Event::Step { step, steps, .. } => format!("step {step}/{steps}  {}", rates(event)),
        Event::Checkpoint { step, url, .. } => format!("checkpoint: step {step} committed, {url}"),
        Event::Sample { step, path, .. } => format!("samples: step {step}, {path}"),
        Event::Stop { step, reason, .. } => format!("stop: at step {step}, {reason}"),
        Event::Done { step, .. } => format!("done: step {step}"),
    }
}

fn rates(event: &Event) -> String {
    let Event::Step {
        loss,
        images_per_s,
        data_wait_share,
        eta_s,
        ..
    } = event
    else {
        return String::new();
    };
    format!(
        "loss {loss:.4}  images/s {images_per_s:.0}  data-wait {:.1}%  eta {}",
        100.0 * data_wait_share,
        duration(*eta_s)
    )
}

fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "?".to_owned();
    }
    let seconds = seconds.round() as u64;
    match (
        seconds / 86_400,
        seconds / 3600 % 24,
        seconds / 60 % 60,
        seconds % 60,
    ) {
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
        let event = Event::Step {
            step: 120,
            steps: 1500,
            epoch: 0,
            loss: 0.2131,
            mse: 0.2,
            vb: None,
            lr: 1e-3,
            grad_norm: 1.0,
            images_per_s: 431.2,
            data_wait_share: 0.001,
            eta_s: 190.4,
            mfu: None,
            time: 0.0,
        };
        assert_eq!(
            describe(&event),
            "step 120/1500  loss 0.2131  images/s 431  data-wait 0.1%  eta 3m10s"
        );
    }

    #[test]
    fn durations_show_their_two_largest_units() {
        let shown = [0.4, 59.6, 3600.0, 90_061.0, f64::NAN].map(duration);
        assert_eq!(shown, ["0s", "1m00s", "1h00m", "1d01h", "?"]);
    }
}
