//! What is known about the run under way: by events of rank 0 and heartbeats of all. The supervisor tells it; JSON lines, the
//! terminal and the status server show it.

mod file;
mod history;
mod ranks;
pub mod server;

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use configs::beat::Beat;
use configs::events::{Event, now};
use serde_json::{Value, json};

use crate::plan::Plan;
use file::StatusFile;
use history::History;
use ranks::Ranks;

/// Shared by the supervisor, which writes, and whoever shows it.
pub struct Status(Mutex<State>);

struct State {
    file: Option<StatusFile>,
    run: String,
    phase: RunPhase,
    /// How often this launcher has started the ranks.
    starts: u32,
    steps: u64,
    attempt: Option<u32>,
    world_size: usize,
    /// The newest `step` event.
    step: Option<Event>,
    history: History,
    /// Step and time of the newest checkpoint.
    checkpoint: Option<(u64, f64)>,
    /// Step and place of the newest sample grid.
    sample: Option<(u64, String)>,
    ranks: Ranks,
    /// The same when something went wrong.
    kept: Option<(Ranks, Instant)>,
    /// The last verdict.
    end: Option<(i32, String)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum RunPhase {
    Starting,
    Running,
    Ended,
}

impl RunPhase {
    fn name(self) -> &'static str {
        match self {
            RunPhase::Starting => "starting",
            RunPhase::Running => "running",
            RunPhase::Ended => "ended",
        }
    }
}

impl Status {
    /// Of a launcher that has started nothing yet; `file` gets what is known as JSON lines.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn new(file: Option<&Path>) -> anyhow::Result<Status> {
        Ok(Status(Mutex::new(State {
            file: file.map(StatusFile::open).transpose()?,
            run: String::new(),
            phase: RunPhase::Starting,
            starts: 0,
            steps: 0,
            attempt: None,
            world_size: 0,
            step: None,
            history: History::default(),
            checkpoint: None,
            sample: None,
            ranks: Ranks::default(),
            kept: None,
            end: None,
        })))
    }

    /// Nobody panics while holding the lock; if somebody did, what it guards would still be sound.
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The ranks of `plan` are about to be started.
    pub fn starting(&self, plan: &Plan) {
        let mut state = self.state();
        state.run.clone_from(&plan.run_url);
        (state.phase, state.steps, state.world_size) = (RunPhase::Starting, plan.steps, plan.world_size);
        state.starts += 1;
        state.ranks = Ranks::new(plan.global_batch as f64 / plan.world_size.max(1) as f64);
        (state.step, state.kept, state.end) = (None, None, None);
    }

    /// Rank 0 has told of something.
    pub fn event(&self, event: &Event) {
        let mut state = self.state();
        state.phase = RunPhase::Running;
        match event {
            Event::Start { attempt, resumed_from, time, .. } => {
                state.attempt = Some(*attempt);
                state.checkpoint = state.checkpoint.or(resumed_from.map(|step| (step, *time)));
                state.history.go_back_to(resumed_from.unwrap_or(0));
            }
            Event::Step { step, loss, images_per_s, time, .. } => {
                state.history.push(*step, *loss, *images_per_s, *time);
                state.step = Some(event.clone());
            }
            Event::Checkpoint { step, time, .. } => state.checkpoint = Some((*step, *time)),
            Event::Sample { step, path, .. } => state.sample = Some((*step, path.clone())),
            _ => {}
        }
    }

    /// A rank lives. Gives what people should know about ranks that are slower than the others.
    pub fn beat(&self, rank: usize, beat: Beat, now: Instant) -> Vec<String> {
        self.state().ranks.beat(rank, beat, now)
    }

    /// Does what is due now and then.
    pub fn tick(&self, now: Instant) {
        let mut state = self.state();
        if state.file.as_ref().is_some_and(|file| file.is_due(now, state.world_size)) {
            let snapshot = state.snapshot(now);
            state.write(&snapshot, now);
        }
    }

    /// Nobody could listen until now, so nobody was silent.
    pub fn forgive(&self, now: Instant) {
        self.state().ranks.forgive(now);
    }

    /// A rank that has lived and has not been heard of for so long.
    pub fn silent(&self, limit: Duration, now: Instant) -> Option<usize> {
        self.state().ranks.silent(limit, now)
    }

    /// The ranks are where they were when something went wrong, whatever they do from now on.
    pub fn keep_places(&self, now: Instant) {
        let mut state = self.state();
        state.kept = Some((state.ranks.clone(), now));
    }

    /// Where a rank was last: `it was on HOST at step 7 in phase data for 2.5 s`.
    pub fn place(&self, rank: usize) -> Option<String> {
        self.state().of_fault(|ranks, when| Some(format!("it was {}", ranks.place(rank, when)?)))
    }

    /// Where the ranks of a machine were last.
    pub fn places_on(&self, host: &str) -> Option<String> {
        self.state().of_fault(|ranks, when| ranks.places_on(host, when))
    }

    /// The rank that `rank` waited for, if it waited, and where that one was.
    pub fn waited_for(&self, rank: usize) -> Option<String> {
        self.state().of_fault(|ranks, when| {
            let other = ranks.waited_for(rank, when)?;
            Some(format!("the others waited for rank {other}: it was {}", ranks.place(other, when)?))
        })
    }

    /// Everything that is known now.
    pub fn snapshot(&self, now: Instant) -> Value {
        self.state().snapshot(now)
    }

    /// The logged steps of all starts by this launcher.
    pub fn history(&self) -> Value {
        self.state().history.points().iter().copied().map(history::Point::to_json).collect()
    }

    /// The place of the newest sample grid.
    pub fn sample(&self) -> Option<String> {
        self.state().sample.as_ref().map(|(_, path)| path.clone())
    }

    /// A line for each of the ranks that are worth the room.
    pub fn lines(&self, most: usize, now: Instant) -> Vec<String> {
        self.state().ranks.lines(most, now)
    }

    /// The ranks have ended.
    pub fn ended(&self, code: i32, text: &str, now: Instant) {
        let mut state = self.state();
        (state.phase, state.end) = (RunPhase::Ended, Some((code, text.to_owned())));
        let snapshot = state.snapshot(now);
        state.write(&snapshot, now);
    }
}

impl State {
    fn of_fault(&self, tell: impl FnOnce(&Ranks, Instant) -> Option<String>) -> Option<String> {
        match &self.kept {
            Some((ranks, when)) => tell(ranks, *when),
            None => tell(&self.ranks, Instant::now()),
        }
    }

    fn write(&mut self, snapshot: &Value, now: Instant) {
        if let Some(file) = &mut self.file
            && let Err(error) = file.write(snapshot, now)
        {
            crate::supervise::say(&format!("launcher: warning: --status-file: {error}; no more is written"));
            self.file = None;
        }
    }

    /// Everything, as JSON lines and the status server give it.
    fn snapshot(&self, when: Instant) -> Value {
        let mut all = json!({
            "event": "status",
            "time": now(),
            "run": self.run,
            "state": self.phase.name(),
            "starts": self.starts,
            "attempt": self.attempt,
            "steps": self.steps,
            "world_size": self.world_size,
            "step": self.ranks.step(),
            "checkpoint": self.checkpoint.map(|(step, time)| json!({"step": step, "time": time})),
            "sample": self.sample.as_ref().map(|(step, path)| json!({"step": step, "path": path})),
            "ranks": self.ranks.to_json(when),
            "end": self.end.as_ref().map(|(code, text)| json!({"code": code, "text": text})),
        });
        if let Some(Event::Step { step, loss, lr, grad_norm, images_per_s, data_wait_share, eta_s, .. }) = &self.step {
            all["log"] = json!({
                "step": step, "loss": loss, "lr": lr, "grad_norm": grad_norm, "images_per_s": images_per_s,
                "data_wait_share": data_wait_share, "eta_s": eta_s,
            });
        }
        all
    }
}
