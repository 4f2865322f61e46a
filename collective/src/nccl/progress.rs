//! The thread that makes the NCCL calls: it puts operations on streams in the order in which they were started (so that
//! ranks cannot wait for each other crosswise), looks at events and errors with a growing pause, and ends all
//! communicators when one has failed or an operation has passed its deadline.

use super::CallerStream;
use super::communicator::{Communicator, ID_BYTES, State};
use super::driver::{Device, Event};
use crate::call::Call;
use crate::{CollectiveError, Completer, Phase};
use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// First pause between two polls; it doubles up to [`LONGEST_PAUSE`].
const SHORTEST_PAUSE: Duration = Duration::from_micros(10);
const LONGEST_PAUSE: Duration = Duration::from_micros(250);
/// Pause while nothing is on the wire: errors of peers are noticed then, too.
const IDLE_PAUSE: Duration = Duration::from_secs(1);

/// What the thread is asked for. Communicators are called by the number that their making is answered with.
pub(super) enum Order {
    Join { id: [u8; ID_BYTES], rank: usize, size: usize, answer: Sender<Result<usize, CollectiveError>> },
    Split { parent: usize, color: i32, key: i32, size: usize, answer: Sender<Result<usize, CollectiveError>> },
    Start { communicator: usize, call: Call, ready: Event, completer: Completer },
}

/// What the thread owns.
pub(super) struct Progress {
    pub rank: usize,
    pub deadline: Duration,
    pub chunk_numel: usize,
    pub device: Arc<Device>,
    pub caller_stream: Arc<CallerStream>,
    /// Why nothing works any more.
    pub failure: Arc<OnceLock<String>>,
    pub communicators: Vec<Communicator>,
    pub active: VecDeque<Active>,
}

/// An operation with everything it may touch.
pub(super) struct Active {
    communicator: usize,
    call: Call,
    ready: Event,
    launch: Launch,
    completer: Completer,
    since: Instant,
}

enum Launch {
    Queued,
    /// NCCL is at it, for example connecting to a peer.
    Begun,
    /// On the stream, which reaches this event afterwards.
    Done(Arc<Event>),
}

/// Which operation failed, and how.
struct Fault {
    index: usize,
    kind: FaultKind,
}

enum FaultKind {
    Backend(String),
    Deadline(Phase),
}

impl Progress {
    pub fn run(mut self, queue: &Receiver<Order>) {
        let mut pause = SHORTEST_PAUSE;
        loop {
            let idle = self.active.is_empty();
            match queue.recv_timeout(if idle { IDLE_PAUSE } else { pause }) {
                Ok(order) => {
                    self.begin(order);
                    pause = SHORTEST_PAUSE;
                }
                Err(RecvTimeoutError::Timeout) => pause = (pause * 2).min(LONGEST_PAUSE),
                Err(RecvTimeoutError::Disconnected) => return self.end(),
            }
            if self.poll() {
                pause = SHORTEST_PAUSE;
            }
        }
    }

    fn begin(&mut self, order: Order) {
        match order {
            Order::Join { id, rank, size, answer } => {
                let joined = Communicator::join(&self.device, id, rank, size);
                let _ = answer.send(self.add_when_ready(joined, None, "init"));
            }
            Order::Split { parent, color, key, size, answer } => {
                // A communicator that is still at an operation takes no other call.
                while self.active.iter().any(|active| !matches!(active.launch, Launch::Done(_))) {
                    if !self.poll() {
                        std::thread::sleep(LONGEST_PAUSE);
                    }
                }
                let split = match self.communicators.get(parent) {
                    Some(parent) => parent.split(&self.device, color, key, size),
                    None => Err(self.failure.get().cloned().unwrap_or_default()),
                };
                let _ = answer.send(self.add_when_ready(split, Some(parent), "split"));
            }
            Order::Start { communicator, call, ready, completer } => {
                if let Some(reason) = self.failure.get() {
                    let (rank, op) = (self.rank, call.name);
                    return completer.complete(Err(CollectiveError::Backend { rank, op, reason: reason.clone() }));
                }
                let (launch, since) = (Launch::Queued, Instant::now());
                self.active.push_back(Active { communicator, call, ready, launch, completer, since });
            }
        }
    }

    /// Waits until a new communicator (and the one it comes from) can be used. The callers of all ranks wait for it, too,
    /// and do nothing else meanwhile that it could hold up.
    fn add_when_ready(
        &mut self,
        new: Result<Communicator, String>,
        parent: Option<usize>,
        op: &'static str,
    ) -> Result<usize, CollectiveError> {
        let (rank, deadline) = (self.rank, self.deadline);
        let failed = |reason: String| CollectiveError::Backend { rank, op, reason };
        let new = new.map_err(failed)?;
        let parent = parent.and_then(|parent| self.communicators.get(parent));
        let outcome = await_ready(deadline, || {
            let states = [new.state()?, parent.map_or(Ok(State::Ready), Communicator::state)?];
            Ok(states == [State::Ready; 2])
        });
        let error = match outcome {
            Ok(true) => {
                self.communicators.push(new);
                return Ok(self.communicators.len() - 1);
            }
            Ok(false) => CollectiveError::Deadline { rank, op, phase: Phase::Wire.name().into(), deadline },
            Err(reason) => failed(reason),
        };
        self.communicators.push(new);
        self.abort_all(&error.to_string());
        Err(error)
    }

    /// Moves everything on that can move; true when an operation has ended.
    fn poll(&mut self) -> bool {
        let before = self.active.len();
        let polled = self.find_errors().and_then(|()| self.launch_next()).and_then(|()| self.complete());
        if let Err(fault) = polled.and_then(|()| self.find_late()) {
            self.fail(fault);
        }
        self.active.len() < before
    }

    fn find_errors(&mut self) -> Result<(), Fault> {
        for (number, communicator) in self.communicators.iter().enumerate() {
            if let Err(reason) = communicator.state() {
                let index = self.active.iter().position(|active| active.communicator == number).unwrap_or(usize::MAX);
                return Err(Fault { index, kind: FaultKind::Backend(reason) });
            }
        }
        Ok(())
    }

    fn launch_next(&mut self) -> Result<(), Fault> {
        let Self { active, communicators, device, caller_stream, chunk_numel, .. } = self;
        for (index, active) in active.iter_mut().enumerate() {
            let communicator = &communicators[active.communicator];
            let mut launch = || {
                let state = match active.launch {
                    Launch::Done(_) => return Ok(true),
                    Launch::Begun => communicator.state()?,
                    Launch::Queued => communicator.launch(&active.call, &active.ready, *chunk_numel)?,
                };
                active.launch = Launch::Begun;
                if state == State::InProgress {
                    return Ok(false);
                }
                let done = Arc::new(Event::on(device, communicator.stream.handle())?);
                active.launch = Launch::Done(done.clone());
                active.completer.reached(Phase::Compute);
                let caller_stream = caller_stream.clone();
                active.completer.launched(Box::new(move || done.delay(caller_stream()?)));
                Ok(true)
            };
            if !launch().map_err(|reason| Fault { index, kind: FaultKind::Backend(reason) })? {
                break;
            }
        }
        Ok(())
    }

    fn complete(&mut self) -> Result<(), Fault> {
        let mut index = 0;
        while let Some(active) = self.active.get(index) {
            let Launch::Done(done) = &active.launch else { break };
            let fault = |reason| Fault { index, kind: FaultKind::Backend(reason) };
            if done.is_reached().map_err(fault)? {
                if let Some(active) = self.active.remove(index) {
                    active.completer.complete(Ok(active.call.into_result()));
                }
                continue;
            }
            if active.ready.is_reached().map_err(fault)? {
                active.completer.reached(Phase::Wire);
            }
            index += 1;
        }
        Ok(())
    }

    fn find_late(&mut self) -> Result<(), Fault> {
        let late = |active: &Active| active.since.elapsed() > self.deadline || active.completer.is_given_up();
        match self.active.iter().position(late) {
            Some(index) => Err(Fault { index, kind: FaultKind::Deadline(self.active[index].completer.phase()) }),
            None => Ok(()),
        }
    }

    /// Ends everything: an operation that not all ranks can finish leaves its communicator of no use, and ranks that have
    /// lost one cannot go on.
    fn fail(&mut self, fault: Fault) {
        let (rank, deadline) = (self.rank, self.deadline);
        let error_of = |op: &'static str, kind: &FaultKind| match kind {
            FaultKind::Backend(reason) => CollectiveError::Backend { rank, op, reason: reason.clone() },
            FaultKind::Deadline(phase) => CollectiveError::Deadline { rank, op, phase: phase.name().into(), deadline },
        };
        let at_fault = self.active.get(fault.index).map_or("nothing", |active| active.call.name);
        let reason = error_of(at_fault, &fault.kind).to_string();
        self.abort_all(&reason);
        for (index, Active { call, completer, .. }) in self.active.drain(..).enumerate() {
            let op = call.name;
            // What an aborted kernel has touched is not given back.
            std::mem::forget(call);
            completer.complete(Err(match index == fault.index {
                true => error_of(op, &fault.kind),
                false => CollectiveError::Backend { rank, op, reason: format!("given up after: {reason}") },
            }));
        }
    }

    fn abort_all(&mut self, reason: &str) {
        // The first failure is the cause of others.
        let _ = self.failure.set(reason.to_owned());
        for communicator in self.communicators.drain(..).rev() {
            if let Err(error) = communicator.abort() {
                eprintln!("nccl: rank {}: {error}", self.rank);
            }
        }
    }

    /// The collectives are gone: completes what is on the wire and frees the communicators, or aborts them.
    fn end(mut self) {
        while !self.active.is_empty() {
            if !self.poll() {
                std::thread::sleep(LONGEST_PAUSE);
            }
        }
        for communicator in std::mem::take(&mut self.communicators).into_iter().rev() {
            let finalized = communicator.finalize();
            let ready = || Ok(communicator.state()? == State::Ready);
            let ended = match finalized.and_then(|_| await_ready(self.deadline, ready)) {
                Ok(true) => communicator.destroy(),
                _ => communicator.abort(),
            };
            if let Err(error) = ended {
                eprintln!("nccl: rank {}: {error}", self.rank);
            }
        }
    }
}

/// Polls until it is ready or failed; false after the deadline.
fn await_ready(deadline: Duration, ready: impl Fn() -> Result<bool, String>) -> Result<bool, String> {
    let (since, mut pause) = (Instant::now(), SHORTEST_PAUSE);
    while !ready()? {
        if since.elapsed() > deadline {
            return Ok(false);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
    Ok(true)
}
