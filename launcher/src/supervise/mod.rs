//! Watching a run: starts the engine, shows what it says, hands signals on, and judges how it ended.
//!
//! One loop on the main thread takes reports from a channel; threads that may block (two readers, one waiter, one for
//! signals) only send. Every wait of the loop has an end: see [`Watch::deadline`].

mod console;
mod demux;
mod engine;
mod faults;
mod guard;
mod session;
mod verdict;

use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use configs::beat::Beat;
use configs::events::Event;
use nix::sys::signal::Signal;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;

pub use console::say;
pub use guard::run_if_asked as run_as_guard_if_asked;

use crate::cluster::{EngineCommand, Output};
use crate::plan::{Job, Plan};
use crate::status::Status;
use console::Console;
use demux::Line;
use engine::Engine;
use faults::{Ended, Faults};
use verdict::End;

/// After a rank has failed, how long the others may take to end.
const AFTER_FAULT: Duration = Duration::from_secs(30);
/// Between asking the group to end and killing it.
const TERM_TO_KILL: Duration = Duration::from_secs(5);
/// After the engine's main process has ended, how long to read on while others hold its pipes open.
const DRAIN: Duration = Duration::from_secs(2);
/// How long a stop request is held back for ranks that have not shown a sign of life: before a rank has set its
/// handlers up, the request would kill it.
const START_UP: Duration = Duration::from_secs(20);

/// While ranks live, how often the launcher looks after them.
const TICK: Duration = Duration::from_secs(1);
/// A launcher that looks so late was stopped itself, or could not write; what it has not heard since is nobody's silence.
const LATE: Duration = Duration::from_secs(5);

/// How a rank complains that an operation of all ranks did not end in time.
const OUT_OF_TIME: &str = "did not complete within";

/// What the threads tell the loop.
enum Report {
    Line(Line),
    /// One of the engine's two streams has ended.
    Closed,
    /// The engine's main process has ended.
    Ended(Ended),
    /// The launcher received a signal.
    Signal(i32),
}

/// Starts engines, one after the other, and watches each to its end.
pub struct Supervisor {
    /// Receives what the launcher is told by signals.
    signals: Arc<Mutex<Listener>>,
    status: Arc<Status>,
    /// See `cluster.silence_s`.
    silence: Option<Duration>,
}

/// Who hears of signals: the run under way.
#[derive(Default)]
struct Listener {
    run: Option<SyncSender<Report>>,
    /// Some signal has come since the launcher started.
    is_asked: bool,
}

impl Supervisor {
    /// From here on no signal ends the launcher by itself: none can while an engine exists. What is seen of runs goes to `status`;
    /// a rank that is silent for longer than `silence` is given up.
    ///
    /// # Errors
    /// When the system refuses handlers or a thread.
    pub fn new(status: Arc<Status>, silence: Option<Duration>) -> anyhow::Result<Supervisor> {
        let listener = Arc::new(Mutex::new(Listener::default()));
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP, SIGUSR1]).context("cannot set signal handlers up")?;
        let told = listener.clone();
        let work = move || {
            signals.forever().for_each(|signal| {
                let mut listener = lock(&told);
                listener.is_asked = true;
                let run = listener.run.clone();
                drop(listener);
                let _ = run.map(|run| run.send(Report::Signal(signal)));
            })
        };
        std::thread::Builder::new().name("signals".to_owned()).spawn(work).context("cannot start a thread")?;
        Ok(Supervisor { signals: listener, status, silence })
    }

    /// Somebody has asked the launcher to stop.
    pub fn is_asked(&self) -> bool {
        lock(&self.signals).is_asked
    }

    /// Starts the engine and watches it to its end, of which it tells people.
    ///
    /// Call it from the main thread: the engine's life is tied to it.
    ///
    /// # Errors
    /// When the engine cannot be started.
    pub fn run(&self, command: &EngineCommand, plan: &Plan) -> anyhow::Result<Ending> {
        let (sender, reports) = sync_channel(1024);
        lock(&self.signals).run = Some(sender.clone());
        self.status.starting(plan);
        let engine = Engine::start(command, &sender)?;
        let mut watch = Watch::new(engine, command.output, plan, self);
        while !watch.is_over() {
            let report = match watch.deadline() {
                Some(deadline) => reports.recv_timeout(deadline.saturating_duration_since(Instant::now())),
                None => reports.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match report {
                Ok(report) => watch.take(report),
                Err(RecvTimeoutError::Timeout) => {}
                // Cannot happen while `sender` lives; if it did, nobody would tell of the end.
                Err(RecvTimeoutError::Disconnected) => break,
            }
            watch.act(Instant::now());
        }
        lock(&self.signals).run = None;
        Ok(watch.finish())
    }
}

/// No thread panics while it holds the lock; if one did, what it guards would still be sound.
fn lock(listener: &Mutex<Listener>) -> MutexGuard<'_, Listener> {
    listener.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How a watched run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ending {
    /// The launcher's exit code, were this the end.
    pub code: i32,
    /// What went wrong, in words.
    pub cause: String,
    /// Step of the last checkpoint that was committed or resumed from, as far as seen.
    pub saved_step: Option<u64>,
}

/// The state of a watched run.
struct Watch {
    engine: Engine,
    status: Arc<Status>,
    silence: Option<Duration>,
    /// Since the first heartbeat, when the ranks were last looked after.
    ticked: Option<Instant>,
    output: Output,
    console: Console,
    faults: Faults,
    started: Instant,
    job: Job,
    steps: u64,
    open_streams: usize,
    ended: Option<(Ended, Instant)>,
    is_started: bool,
    is_done: bool,
    saved_step: Option<u64>,
    stop: Stop,
    /// INT, TERM and HUP received.
    terminations: usize,
    fault_seen: Option<Instant>,
    /// Why and since when the group is being ended; then whether it has been killed.
    forced: Option<(&'static str, Instant)>,
    is_killed: bool,
}

/// A request to save and stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    NotAsked,
    /// Held back until the ranks are up.
    Held,
    Sent,
}

impl Watch {
    fn new(engine: Engine, output: Output, plan: &Plan, supervisor: &Supervisor) -> Watch {
        let steps = plan.steps;
        Watch {
            engine,
            status: supervisor.status.clone(),
            silence: supervisor.silence,
            ticked: None,
            output,
            job: plan.job,
            console: Console::new(steps),
            faults: Faults::default(),
            started: Instant::now(),
            steps,
            open_streams: 2,
            ended: None,
            is_started: false,
            is_done: false,
            saved_step: None,
            stop: Stop::NotAsked,
            terminations: 0,
            fault_seen: None,
            forced: None,
            is_killed: false,
        }
    }

    /// The main process has ended, and all that it said has been read or has had its time.
    fn is_over(&self) -> bool {
        self.ended.is_some_and(|(_, when)| self.open_streams == 0 || when.elapsed() >= DRAIN)
    }

    /// When `act` has something to do even if no report comes.
    fn deadline(&self) -> Option<Instant> {
        if let Some((_, when)) = self.ended {
            return Some(when + DRAIN);
        }
        let stop = (self.stop == Stop::Held).then(|| self.started + START_UP);
        let end = match self.forced {
            None => self.fault_seen.map(|when| when + AFTER_FAULT),
            Some((_, when)) if !self.is_killed => Some(when + TERM_TO_KILL),
            // Killed: if even that does not end it, try again now and then.
            Some(_) => Some(Instant::now() + TERM_TO_KILL),
        };
        let tick = self.ticked.map(|when| when + TICK);
        [stop, end, tick].into_iter().flatten().min()
    }

    fn take(&mut self, report: Report) {
        match report {
            Report::Line(line) => self.take_line(line),
            Report::Closed => self.open_streams = self.open_streams.saturating_sub(1),
            Report::Ended(ended) => {
                self.ended = Some((ended, Instant::now()));
                if self.output == Output::RankZero {
                    self.faults.rank_ended(0, ended);
                }
            }
            Report::Signal(signal) => self.take_signal(signal),
        }
    }

    fn take_line(&mut self, line: Line) {
        match line.rank {
            Some(rank) if !line.is_stderr && Beat::is_in(&line.text) => self.take_beat(rank, &line.text),
            Some(0) if !line.is_stderr => match Event::parse(&line.text) {
                Some(event) => self.take_event(&event),
                None => self.console.line(&line),
            },
            Some(rank) => {
                if line.is_stderr {
                    self.faults.rank_line(rank, &line.text);
                }
                self.console.line(&line);
            }
            None => {
                for text in self.faults.engine_line(&line.text) {
                    self.console.line(&Line { text, ..line });
                }
            }
        }
    }

    fn take_beat(&mut self, rank: usize, line: &str) {
        let now = Instant::now();
        // A broken one says nothing.
        let Some(beat) = Beat::parse(line) else { return };
        self.ticked.get_or_insert(now);
        for said in self.status.beat(rank, beat, now) {
            self.console.say(&format!("launcher: {said}"));
        }
    }

    fn take_event(&mut self, event: &Event) {
        self.is_started = true;
        self.status.event(event);
        match event {
            Event::Start { resumed_from, .. } => self.saved_step = *resumed_from,
            Event::Checkpoint { step, .. } | Event::Stop { step, .. } => self.saved_step = Some(*step),
            Event::Done { step, .. } => self.is_done = *step >= self.steps,
            Event::Init { .. }
            | Event::CheckpointSkipped { .. }
            | Event::Step { .. }
            | Event::Replaced { .. }
            | Event::Diverged { .. }
            | Event::Sample { .. }
            | Event::Validation { .. }
            | Event::Scores { .. }
            | Event::Sampling { .. } => {}
            Event::Sampled { .. } => self.is_done = true,
        }
        self.console.event(event);
    }

    /// The first request asks the ranks to save; a second INT, TERM or HUP ends them. (A scheduler's USR1 ahead of its
    /// TERM asks once.)
    fn take_signal(&mut self, signal: i32) {
        let name = Signal::try_from(signal).map_or("a signal", Signal::as_str);
        self.terminations += usize::from(signal != SIGUSR1);
        if self.terminations >= 2 {
            self.console.say(&format!("launcher: {name} again: ending all ranks"));
            self.force("asked a second time");
        } else if self.stop == Stop::NotAsked {
            self.stop = Stop::Held;
            let what = if self.job == Job::Train { "save and stop" } else { "stop" };
            self.console.say(&format!("launcher: {name}: asking the ranks to {what}; once more ends them at once"));
        }
    }

    /// Does what has become due.
    fn act(&mut self, now: Instant) {
        if self.ended.is_some() {
            return;
        }
        if self.stop == Stop::Held && (self.is_started || now >= self.started + START_UP) {
            self.engine.signal(Signal::SIGUSR1);
            self.stop = Stop::Sent;
        }
        if self.ticked.is_some_and(|when| now >= when + TICK) {
            self.tick(now);
        }
        if self.fault_seen.is_none() && self.faults.any() {
            self.see_fault(now);
        }
        if self.fault_seen.is_some_and(|when| now >= when + AFTER_FAULT) {
            self.force("a rank had failed and the others did not end");
        }
        if self.forced.is_some_and(|(_, when)| now >= when + TERM_TO_KILL) {
            self.engine.kill_all();
            self.is_killed = true;
        }
    }

    /// Looks after the ranks that have shown a sign of life.
    fn tick(&mut self, now: Instant) {
        if self.ticked.replace(now).is_some_and(|when| now >= when + LATE) {
            self.status.forgive(now);
        }
        self.status.tick(now);
        self.console.ranks(|most| self.status.lines(most, now));
        let is_over = self.forced.is_some() || self.faults.any();
        let limit = self.silence.filter(|_| !is_over);
        let silent = limit.and_then(|limit| Some((self.status.silent(limit, now)?, limit)));
        if let Some((rank, limit)) = silent {
            self.faults.rank_silent(rank, limit);
            self.see_fault(now);
            self.force("a rank was silent");
        }
    }

    /// Something is wrong. What ends the ranks wakes them up, so where they are from now on says nothing about the cause.
    fn see_fault(&mut self, now: Instant) {
        self.fault_seen = Some(now);
        self.status.keep_places(now);
    }

    fn force(&mut self, why: &'static str) {
        if self.forced.is_none() {
            self.forced = Some((why, Instant::now()));
            self.engine.signal(Signal::SIGTERM);
        }
    }

    /// Ends what is left and says how it ended.
    fn finish(mut self) -> Ending {
        for text in self.faults.finish() {
            self.console.line(&Line { rank: None, is_stderr: true, text });
        }
        let place = self.place_of_fault();
        self.console.finish();
        self.engine.finish();
        let end = End {
            ended: self.ended.map_or(Ended::Exit(configs::exit::FAILED), |(ended, _)| ended),
            job: self.job,
            is_done: self.is_done,
            is_started: self.is_started,
            steps: self.steps,
            forced: self.forced.map(|(why, _)| why),
            is_stop_asked: self.stop != Stop::NotAsked,
            fault: self.faults.describe(),
            saved_step: self.saved_step,
        };
        let cause = end.cause();
        let (code, text) = end.at(place).verdict();
        say(&format!("launcher: {text}"));
        self.status.ended(code, &text, Instant::now());
        Ending { code, cause, saved_step: self.saved_step }
    }

    /// Where the rank at fault, or the ranks of the lost machine, were when that was noticed.
    fn place_of_fault(&self) -> Option<String> {
        if let Some(node) = self.faults.lost_node() {
            return self.status.places_on(node);
        }
        let rank = self.faults.culprit()?;
        // Who complains that another did not come is not the one.
        let in_vain = self.faults.describe().is_some_and(|fault| fault.contains(OUT_OF_TIME));
        in_vain.then(|| self.status.waited_for(rank)).flatten().or_else(|| self.status.place(rank))
    }
}
