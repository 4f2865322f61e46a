//! What people see: a progress bar where stderr is a terminal, plain lines otherwise.

use std::io::{IsTerminal, Write};

use configs::events::Event;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::demux::Line;

/// Writes one line to stderr. A terminal or pipe that has gone away must not end the run, so errors are ignored.
pub fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Lines for ranks below the bar.
const MOST_RANKS: usize = 8;

/// The launcher's output.
pub struct Console {
    screen: Option<Screen>,
}

/// What a terminal shows below the lines that pass.
struct Screen {
    all: MultiProgress,
    bar: ProgressBar,
    ranks: Vec<ProgressBar>,
}

impl Console {
    /// A bar of `steps` steps if stderr is a terminal.
    pub fn new(steps: u64) -> Console {
        let screen = std::io::stderr().is_terminal().then(|| {
            let all = MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
            let bar = all.add(ProgressBar::new(steps));
            // The template is fixed; should it ever be wrong, the default style serves.
            if let Ok(style) = ProgressStyle::with_template("{wide_bar} {pos}/{len}  {msg}") {
                bar.set_style(style);
            }
            bar.set_message("starting");
            Screen { all, bar, ranks: Vec::new() }
        });
        Console { screen }
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
        match (self.screen.as_ref().map(|screen| &screen.bar), event) {
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

    /// Shows what there is to say of each rank, where there is a terminal; `lines` is told how many lines there is room for.
    pub fn ranks(&mut self, lines: impl FnOnce(usize) -> Vec<String>) {
        let Some(screen) = &mut self.screen else { return };
        let lines = lines(MOST_RANKS);
        while screen.ranks.len() < lines.len() {
            let line = screen.all.add(ProgressBar::new_spinner());
            // The template is fixed; should it ever be wrong, the default style serves.
            if let Ok(style) = ProgressStyle::with_template("{wide_msg}") {
                line.set_style(style);
            }
            screen.ranks.push(line);
        }
        for (shown, line) in screen.ranks.iter().zip(lines) {
            shown.set_message(line);
        }
    }

    /// Leaves the last state of the bar on the screen, and the cursor below it.
    pub fn finish(&self) {
        if let Some(screen) = &self.screen {
            screen.ranks.iter().for_each(ProgressBar::abandon);
            screen.bar.abandon();
            say("");
        }
    }

    fn above_bar(&self, print: impl FnOnce()) {
        match &self.screen {
            Some(screen) => screen.all.suspend(print),
            None => print(),
        }
    }
}
