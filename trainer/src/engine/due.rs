//! When a checkpoint is due: every so many steps, every so many minutes, when somebody asks, on a stop, at the end.

use super::requests::Requests;
use super::stop::{STOP, StopFlag};
use configs::CheckpointConfig;
use std::time::{Duration, Instant};

/// Bit of rank 0's step signal: its clock says that it is time for a checkpoint.
const CLOCK: u32 = 8;
/// Bit of rank 0's step signal: somebody asks for a checkpoint.
const REQUEST: u32 = 16;

/// Why a checkpoint is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// The last step.
    End,
    /// A stop request.
    Stop,
    /// Somebody's wish.
    Request,
    /// Time or steps gone by.
    Regular,
}

/// Says when. All ranks decide alike, from the step and from what was signalled in it; clock and requests are rank 0's.
pub struct Timetable {
    every_steps: u64,
    every: Option<Duration>,
    last_step: u64,
    begun: Instant,
    requests: Option<Requests>,
}

impl Timetable {
    /// For a run to `last_step`; `requests` on rank 0.
    pub fn new(config: &CheckpointConfig, last_step: u64, requests: Option<Requests>) -> Self {
        let every = (config.every_minutes > 0.0 && requests.is_some())
            .then(|| Duration::from_secs_f64(60.0 * config.every_minutes));
        Self { every_steps: config.every_steps, every, last_step, begun: Instant::now(), requests }
    }

    /// This rank's part of the next step's signal.
    pub fn signal(&self, stop: &StopFlag) -> u32 {
        let clock = self.every.is_some_and(|every| self.begun.elapsed() >= every);
        let asked = self.requests.as_ref().is_some_and(Requests::any);
        [(STOP, stop.is_raised()), (CLOCK, clock), (REQUEST, asked)]
            .into_iter()
            .map(|(bit, is_set)| if is_set { bit } else { 0 })
            .sum()
    }

    /// Whether a checkpoint of `step`, in which all ranks signalled `signals`, is due.
    pub fn due(&self, step: u64, signals: &[u32]) -> Option<Due> {
        let signalled = |bit: u32| signals.iter().any(|signal| signal & bit != 0);
        let stepped = self.every_steps > 0 && step.is_multiple_of(self.every_steps);
        match () {
            () if step == self.last_step => Some(Due::End),
            () if signalled(STOP) => Some(Due::Stop),
            () if signalled(REQUEST) => Some(Due::Request),
            () if stepped || signalled(CLOCK) => Some(Due::Regular),
            () => None,
        }
    }

    /// A checkpoint is begun, or was skipped: the clock starts again. Gives the requests that it answers.
    pub fn restart(&mut self, is_begun: bool) -> Vec<String> {
        self.begun = Instant::now();
        self.requests.as_ref().filter(|_| is_begun).map(Requests::take).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_comes_to_the_same_from_the_same_signals_whatever_its_clock() {
        let timetable = |every_steps, every| {
            let (last_step, begun, requests) = (10, Instant::now(), None);
            Timetable { every_steps, every, last_step, begun, requests }
        };
        let by_steps = timetable(4, None);
        let none = [0, super::super::saver::UPLOADED];
        let dues: Vec<_> = (1..=10).map(|step| by_steps.due(step, &none)).collect();
        let regular = Some(Due::Regular);
        assert_eq!(dues, [None, None, None, regular, None, None, None, regular, None, Some(Due::End)]);
        let mut by_clock = timetable(0, Some(Duration::ZERO));
        assert_eq!(by_clock.signal(&StopFlag::default()), CLOCK);
        by_clock.every = Some(Duration::MAX);
        assert_eq!(by_clock.signal(&StopFlag::default()), 0);
        assert_eq!((by_clock.due(4, &none), by_clock.due(10, &none)), (None, Some(Due::End)));
        assert_eq!(by_clock.due(3, &[CLOCK, 0]), regular);
        assert_eq!(by_steps.due(4, &[CLOCK | REQUEST, 0]), Some(Due::Request));
        assert_eq!(by_steps.due(3, &[REQUEST, STOP]), Some(Due::Stop));
    }
}
