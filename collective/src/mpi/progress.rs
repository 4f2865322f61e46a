//! The thread that makes the MPI calls.

use super::bf16::Bf16Ops;
use super::wire::{Comm, Transfer, Wire};
use super::{MpiOptions, abort};
use crate::call::Call;
use crate::{CollectiveError, Completer, Phase};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

/// First pause between two polls; it doubles up to [`LONGEST_PAUSE`].
const SHORTEST_PAUSE: Duration = Duration::from_micros(10);
const LONGEST_PAUSE: Duration = Duration::from_millis(1);

/// What the thread is asked for.
pub(super) enum Order {
    Start { comm: Comm, call: Box<Call>, completer: Completer },
    Split { comm: Comm, color: i32, key: i32, answer: Sender<Result<Comm, CollectiveError>> },
}

/// What the thread owns.
pub(super) struct Progress {
    rank: usize,
    deadline: Duration,
    wire: Wire,
    active: Vec<Active>,
}

/// An operation on the wire with everything it may touch.
struct Active {
    transfer: Transfer,
    call: Box<Call>,
    completer: Completer,
}

impl Progress {
    pub fn new(rank: usize, options: MpiOptions) -> Self {
        let wire =
            Wire { rank, chunk_numel: options.chunk_numel, in_place: super::wire::in_place(), bf16: Bf16Ops::new() };
        Self { rank, deadline: options.deadline, wire, active: Vec::new() }
    }

    pub fn run(mut self, queue: &Receiver<Order>) {
        let mut pause = SHORTEST_PAUSE;
        loop {
            let next = if self.active.is_empty() {
                queue.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                queue.recv_timeout(pause)
            };
            match next {
                Ok(order) => {
                    self.begin(order);
                    pause = SHORTEST_PAUSE;
                }
                Err(RecvTimeoutError::Timeout) => pause = (pause * 2).min(LONGEST_PAUSE),
                // The collective is gone, and with it everyone who could wait. What is on the wire still uses its
                // buffers, so it is completed first.
                Err(RecvTimeoutError::Disconnected) => return self.drain(),
            }
            if self.poll() {
                pause = SHORTEST_PAUSE;
            }
        }
    }

    /// Completes what is on the wire, or ends the run when a partner does not come.
    fn drain(mut self) {
        let ended_by = Instant::now() + self.deadline;
        while !self.active.is_empty() {
            if Instant::now() > ended_by {
                let open: Vec<_> = self.active.iter().map(|active| active.call.name).collect();
                eprintln!(
                    "mpi: rank {}: {open:?} did not complete within {:?}; ending the run",
                    self.rank, self.deadline
                );
                abort(1);
            }
            if !self.poll() {
                std::thread::sleep(LONGEST_PAUSE);
            }
        }
    }

    fn begin(&mut self, order: Order) {
        match order {
            Order::Start { comm, call, completer } => match self.wire.start(comm, &call) {
                Ok(transfer) => {
                    completer.reached(Phase::Wire);
                    self.active.push(Active { transfer, call, completer });
                }
                Err(error) => fail(call, completer, error),
            },
            Order::Split { comm, color, key, answer } => {
                // A caller that gave up is gone.
                let _ = answer.send(self.wire.split(comm, color, key));
            }
        }
    }

    /// Completes what has arrived; true when anything has.
    fn poll(&mut self) -> bool {
        let before = self.active.len();
        for mut active in std::mem::take(&mut self.active) {
            match self.wire.is_done(&mut active.transfer, active.call.name) {
                Ok(false) => self.active.push(active),
                Ok(true) => active.completer.complete(Ok(active.call.into_result())),
                Err(error) => fail(active.call, active.completer, error),
            }
        }
        self.active.len() < before
    }
}

/// Parts of a failed operation may still be on the wire, so its buffers are never freed.
fn fail(call: Box<Call>, completer: Completer, error: CollectiveError) {
    std::mem::forget(call);
    completer.complete(Err(error));
}
