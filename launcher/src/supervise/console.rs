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
            None => format!("[engine] {}", line.text),
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
                bar.set_message(event.rates());
            }
            (Some(bar), Event::Sampling { images, total, .. }) => {
                bar.set_length(*total);
                bar.set_position(*images);
                bar.set_message(event.rates());
            }
            _ => self.say(&event.to_string()),
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
