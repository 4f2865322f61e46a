//! The thread that makes the MPI calls.

use super::bf16::Bf16Ops;
use super::wire::{Comm, Transfer, Wire};
use super::{MpiOptions, abort};
use crate::call::Call;
use crate::{CollectiveError, Completer, Phase};
use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

/// First pause between two polls; it doubles up to [`LONGEST_PAUSE`].
const SHORTEST_PAUSE: Duration = Duration::from_micros(10);
const LONGEST_PAUSE: Duration = Duration::from_millis(1);
/// While a rank has so many of a communicator's operations on the wire, and so many bytes of them, later ones wait. Together they would
/// share the wire and all end late, while it is the first that is waited for. One alone would leave the wire idle
/// while it is negotiated; over TCP, whose replies queue behind data, it would use one direction at a time.
const WINDOW_OPS: usize = 2;
const WINDOW_BYTES: usize = 2 << 20;

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
    /// Not on the wire yet, in the order of their starts.
    waiting: VecDeque<Waiting>,
    active: Vec<Active>,
}

/// An operation that was started, with everything it may touch.
struct Waiting {
    comm: Comm,
    call: Box<Call>,
    completer: Completer,
}

impl Waiting {
    /// What this rank puts on the wire for it, about.
    fn bytes(&self) -> usize {
        self.call.numel * self.call.dtype.bytes() * (self.comm.size - 1)
    }
}

/// One on the wire.
struct Active {
    transfer: Transfer,
    of: Waiting,
}

impl Progress {
    pub fn new(rank: usize, options: MpiOptions) -> Self {
        let wire =
            Wire { rank, chunk_numel: options.chunk_numel, in_place: super::wire::in_place(), bf16: Bf16Ops::new() };
        Self { rank, deadline: options.deadline, wire, waiting: VecDeque::new(), active: Vec::new() }
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
                self.put_on_the_wire();
                pause = SHORTEST_PAUSE;
            }
        }
    }

    /// Completes what is on the wire, or ends the run when a partner does not come.
    fn drain(mut self) {
        let ended_by = Instant::now() + self.deadline;
        while !self.active.is_empty() {
            if Instant::now() > ended_by {
                let open: Vec<_> =
                    self.active.iter().map(|active| &active.of).chain(&self.waiting).map(|of| of.call.name).collect();
                eprintln!(
                    "mpi: rank {}: {open:?} did not complete within {:?}; ending the run",
                    self.rank, self.deadline
                );
                abort(1);
            }
            if self.poll() {
                self.put_on_the_wire();
            } else {
                std::thread::sleep(LONGEST_PAUSE);
            }
        }
    }

    fn begin(&mut self, order: Order) {
        match order {
            Order::Start { comm, call, completer } => {
                self.waiting.push_back(Waiting { comm, call, completer });
                self.put_on_the_wire();
            }
            Order::Split { comm, color, key, answer } => {
                // A caller that gave up is gone.
                let _ = answer.send(self.wire.split(comm, color, key));
            }
        }
    }

    /// Starts what there is room for. The operations of a communicator keep their order, which is the same on all ranks; those of
    /// different ones never wait for each other, since ranks may start them in different orders.
    fn put_on_the_wire(&mut self) {
        let mut full: Vec<Comm> = Vec::new();
        for of in std::mem::take(&mut self.waiting) {
            let on_the_wire = self.active.iter().filter(|active| active.of.comm.is(&of.comm));
            let (ops, bytes) = on_the_wire.fold((0, 0), |(ops, bytes), active| (ops + 1, bytes + active.of.bytes()));
            if (ops >= WINDOW_OPS && bytes >= WINDOW_BYTES) || full.iter().any(|comm| comm.is(&of.comm)) {
                full.push(of.comm);
                self.waiting.push_back(of);
                continue;
            }
            match self.wire.start(of.comm, &of.call) {
                Ok(transfer) => {
                    of.completer.reached(Phase::Wire);
                    self.active.push(Active { transfer, of });
                }
                Err(error) => fail(of, error),
            }
        }
    }

    /// Completes what has arrived; true when anything has.
    fn poll(&mut self) -> bool {
        let before = self.active.len();
        for mut active in std::mem::take(&mut self.active) {
            match self.wire.is_done(&mut active.transfer, active.of.call.name) {
                Ok(false) => self.active.push(active),
                Ok(true) => active.of.completer.complete(Ok(active.of.call.into_result())),
                Err(error) => fail(active.of, error),
            }
        }
        self.active.len() < before
    }
}

/// Parts of a failed operation may still be on the wire, so its buffers are never freed.
fn fail(of: Waiting, error: CollectiveError) {
    std::mem::forget(of.call);
    of.completer.complete(Err(error));
}
