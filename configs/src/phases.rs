//! What the step loop of this process is at, for those who watch it: its step, the phase of it, and how long that lasts.
//!
//! Off until [`watch`]; then a change of phase costs a clock reading and a lock that nobody else holds for long.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// A part of a run, as its step loop goes through it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Before the first step.
    #[default]
    SetUp,
    /// Waiting for a micro-batch.
    Data,
    /// Noise, forward pass, loss.
    Forward,
    /// Backward pass.
    Backward,
    /// Waiting for gradients, weights or agreement of the other ranks.
    Reduce,
    /// Optimizer and moving averages.
    Update,
    /// Samples, held-out loss, scores.
    Evaluate,
    /// Copying what is to be saved, or waiting until it is committed.
    Checkpoint,
    /// Between two steps, in none of the above.
    Between,
    /// After the last step.
    End,
}

const PHASES: usize = Phase::End as usize + 1;

impl Phase {
    /// As beats and messages call it.
    pub fn name(self) -> &'static str {
        match self {
            Phase::SetUp => "set_up",
            Phase::Data => "data",
            Phase::Forward => "forward",
            Phase::Backward => "backward",
            Phase::Reduce => "reduce",
            Phase::Update => "update",
            Phase::Evaluate => "evaluate",
            Phase::Checkpoint => "checkpoint",
            Phase::Between => "between",
            Phase::End => "end",
        }
    }
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What the step loop was at when somebody looked.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Seen {
    /// The step that is being made, or was made last; 0 before the first.
    pub step: u64,
    /// Its phase.
    pub phase: Phase,
    /// How long that lasts already.
    pub since: Duration,
    /// Counts the changes of phase.
    pub change: u64,
    /// Time in phase data of all steps before this one.
    pub data: Duration,
    /// Time in phases data, forward, backward and update of all steps before this one: this rank's own work.
    pub own: Duration,
    /// Time in phase reduce of all steps before this one: waiting for others.
    pub reduce: Duration,
}

struct State {
    step: u64,
    phase: Phase,
    entered: Instant,
    change: u64,
    spent: [Duration; PHASES],
    /// `spent` when the step began.
    before: [Duration; PHASES],
}

static WATCHED: AtomicBool = AtomicBool::new(false);
static STATE: Mutex<Option<State>> = Mutex::new(None);

fn state() -> MutexGuard<'static, Option<State>> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    fn enter(&mut self, phase: Phase) -> Phase {
        let (now, before) = (Instant::now(), self.phase);
        self.spent[before as usize] += now - self.entered;
        (self.phase, self.entered, self.change) = (phase, now, self.change + 1);
        before
    }
}

/// From now on phases are kept.
pub fn watch() {
    let none = [Duration::ZERO; PHASES];
    let entered = Instant::now();
    *state() = Some(State { step: 0, phase: Phase::SetUp, entered, change: 0, spent: none, before: none });
    WATCHED.store(true, Ordering::Relaxed);
}

/// What the step loop is at; `None` where nobody watches.
pub fn now() -> Option<Seen> {
    let state = state();
    let state = state.as_ref()?;
    let of = |phases: &[Phase]| phases.iter().map(|&phase| state.before[phase as usize]).sum();
    Some(Seen {
        step: state.step,
        phase: state.phase,
        since: state.entered.elapsed(),
        change: state.change,
        data: of(&[Phase::Data]),
        own: of(&[Phase::Data, Phase::Forward, Phase::Backward, Phase::Update]),
        reduce: of(&[Phase::Reduce]),
    })
}

/// The step loop enters a phase; gives the one that it leaves. The step loop's thread alone calls this.
pub fn enter(phase: Phase) -> Option<Phase> {
    if !WATCHED.load(Ordering::Relaxed) {
        return None;
    }
    state().as_mut().map(|state| state.enter(phase))
}

/// The step loop begins a step.
pub fn begin_step(step: u64) {
    if WATCHED.load(Ordering::Relaxed)
        && let Some(state) = state().as_mut()
    {
        state.enter(state.phase);
        (state.step, state.before) = (step, state.spent);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // What is kept is the process's: one test.
    #[test]
    fn time_goes_to_the_phase_that_it_passes_in_and_counts_when_the_step_is_over() {
        assert_eq!((enter(Phase::Data), now()), (None, None));
        watch();
        begin_step(7);
        let outer = enter(Phase::Data).unwrap();
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(outer, Phase::SetUp);
        assert_eq!(enter(Phase::Reduce), Some(Phase::Data));
        std::thread::sleep(Duration::from_millis(1));
        let seen = now().unwrap();
        assert_eq!((seen.step, seen.phase, seen.own), (7, Phase::Reduce, Duration::ZERO));
        assert!(seen.since >= Duration::from_millis(1));
        begin_step(8);
        let seen = now().unwrap();
        assert!(seen.data >= Duration::from_millis(2) && seen.reduce >= Duration::from_millis(1), "{seen:?}");
        assert_eq!((seen.step, seen.phase, seen.own), (8, Phase::Reduce, seen.data));
    }
}
