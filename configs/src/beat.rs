//! Heartbeats: lines that every rank writes to its stdout for the launcher, if [`EVENTS_VARIABLE`](crate::events::EVENTS_VARIABLE)
//! asks for events. They travel as the rank's other output does; the launcher takes them out of it.

use serde::{Deserialize, Serialize};

use crate::phases::Phase;

/// What a beat begins with, and no other line.
const MARK: &str = "\u{1}ditharos-beat ";

/// A sign of life.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Beat {
    /// The machine's name.
    pub host: String,
    /// The step that is being made, or was made last; 0 before the first.
    pub step: u64,
    /// What the step loop is at.
    pub phase: Phase,
    /// How long it has been there, in seconds.
    pub phase_s: f64,
    /// Seconds of this rank's own work in all steps before this one, waiting for data included.
    pub own_s: f64,
    /// Those of them that it waited for data.
    pub data_s: f64,
    /// Seconds that it waited for other ranks in all steps before this one.
    pub reduce_s: f64,
    /// Resident memory of the process.
    pub memory_bytes: u64,
}

impl Beat {
    /// The beat as one line, without the line end; far shorter than a pipe takes at a time.
    pub fn to_line(&self) -> String {
        // A struct of numbers and a string always serialises.
        format!("{MARK}{}", serde_json::to_string(self).unwrap_or_default())
    }

    /// Whether a line is one, or was meant to be.
    pub fn is_in(line: &str) -> bool {
        line.starts_with(MARK)
    }

    /// Reads a line; `None` if it is something else.
    pub fn parse(line: &str) -> Option<Beat> {
        serde_json::from_str(line.strip_prefix(MARK)?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beats_read_back_and_other_lines_are_none() {
        let beat = Beat {
            host: "node \"7\"".to_owned(),
            step: 12,
            phase: Phase::Backward,
            phase_s: 0.25,
            own_s: 3.0,
            data_s: 1.0,
            reduce_s: 0.5,
            memory_bytes: 1 << 30,
        };
        let line = beat.to_line();
        assert!(!line.contains('\n') && line.contains(r#""phase":"backward""#), "{line}");
        assert_eq!(Beat::parse(&line), Some(beat));
        assert_eq!(Beat::parse(&line[1..]), None);
        assert_eq!(Beat::parse(&line[..line.len() - 1]), None);
    }
}
