//! The thread that makes the MPI calls.

use super::bf16::Bf16Ops;
use super::wire::{Comm, Transfer, Wire};
use super::{MpiOptions, abort};
use crate::call::Call;
use crate::{CollectiveError, Completer, Phase};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

/// First pause between two polls; it doubles up to [`LONGEST_PAUSE`].
const SHORTEST_PAUSE: Duration = Duration::from_micros(10);
const LONGEST_PAUSE: Duration = Duration::from_millis(1);
/// What a communicator may have on the wire while later pieces wait. All at once would share the wire and end late, while it is the
/// first that is waited for; too little would leave the wire idle while the next piece is negotiated, and over TCP, whose replies
/// queue behind data, use one direction at a time.
const WINDOW_BYTES: usize = 2 << 20;
/// Fewer pieces than the first are never too many, more than the second always.
const WINDOW_PIECES: (usize, usize) = (2, 16);

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
    queues: Vec<Queue>,
}

/// The operations of a communicator that are not complete, in the order of their starts, which is the same on all ranks. Those of
/// different ones never wait for each other, since ranks may start them in different orders.
struct Queue {
    comm: Comm,
    operations: VecDeque<Operation>,
}

/// An operation with everything it may touch.
struct Operation {
    call: Box<Call>,
    completer: Completer,
    /// What of each rank's part is not on the wire yet.
    waiting: VecDeque<Range<usize>>,
    on_the_wire: VecDeque<Transfer>,
}

/// What a communicator has on the wire.
#[derive(Default)]
struct Load {
    pieces: usize,
    bytes: usize,
}

impl Load {
    fn add(&mut self, transfer: &Transfer) {
        self.pieces += 1;
        self.bytes += transfer.bytes;
    }

    fn is_full(&self) -> bool {
        let (few, many) = WINDOW_PIECES;
        self.pieces >= many || (self.pieces >= few && self.bytes >= WINDOW_BYTES)
    }
}

impl Progress {
    pub fn new(rank: usize, options: MpiOptions) -> Self {
        let wire =
            Wire { rank, chunk_numel: options.chunk_numel, in_place: super::wire::in_place(), bf16: Bf16Ops::new() };
        Self { rank, deadline: options.deadline, wire, queues: Vec::new() }
    }

    pub fn run(mut self, queue: &Receiver<Order>) {
        let mut pause = SHORTEST_PAUSE;
        loop {
            let next = if self.is_idle() {
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
        while !self.is_idle() {
            if Instant::now() > ended_by {
                let open = self.queues.iter().flat_map(|queue| &queue.operations);
                let open: Vec<_> = open.map(|operation| operation.call.name).collect();
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
            Order::Start { comm, call, completer } => {
                let waiting = self.wire.pieces(comm, &call);
                let known = self.queues.iter().position(|queue| queue.comm.is(&comm));
                let index = known.unwrap_or(self.queues.len());
                if known.is_none() {
                    self.queues.push(Queue { comm, operations: VecDeque::new() });
                }
                let queue = &mut self.queues[index];
                queue.operations.push_back(Operation { call, completer, waiting, on_the_wire: VecDeque::new() });
                queue.fill(&self.wire);
            }
            Order::Split { comm, color, key, answer } => {
                // A caller that gave up is gone.
                let _ = answer.send(self.wire.split(comm, color, key));
            }
        }
    }

    fn is_idle(&self) -> bool {
        self.queues.iter().all(|queue| queue.operations.is_empty())
    }

    /// Completes what has arrived and starts what there is room for then; true when anything has arrived.
    fn poll(&mut self) -> bool {
        let mut any = false;
        for queue in &mut self.queues {
            if queue.take_arrived(&self.wire) {
                queue.fill(&self.wire);
                any = true;
            }
        }
        any
    }
}

impl Queue {
    /// Starts what there is room for, piece by piece.
    fn fill(&mut self, wire: &Wire) {
        let mut load = Load::default();
        self.operations.iter().flat_map(|operation| &operation.on_the_wire).for_each(|transfer| load.add(transfer));
        let mut index = 0;
        while let Some(operation) = self.operations.get_mut(index).filter(|_| !load.is_full()) {
            let filled = operation.fill(self.comm, wire, &mut load);
            let Err(error) = filled else {
                index += 1;
                continue;
            };
            if let Some(failed) = self.operations.remove(index) {
                failed.fail(error);
            }
        }
    }

    /// Completes what has arrived, in order: what comes later arrives later, and every question costs as much as progress on all.
    /// True when any piece has.
    fn take_arrived(&mut self, wire: &Wire) -> bool {
        let mut any = false;
        while let Some(operation) = self.operations.front_mut() {
            let arrived = operation.take_arrived(wire);
            any |= matches!(arrived, Ok(true));
            if arrived.is_ok() && !(operation.waiting.is_empty() && operation.on_the_wire.is_empty()) {
                break;
            }
            let Some(operation) = self.operations.pop_front() else { break };
            match arrived {
                Ok(_) => operation.completer.complete(Ok(operation.call.into_result())),
                Err(error) => operation.fail(error),
            }
        }
        any
    }
}

impl Operation {
    fn fill(&mut self, comm: Comm, wire: &Wire, load: &mut Load) -> Result<(), CollectiveError> {
        while !load.is_full() {
            let Some(piece) = self.waiting.pop_front() else { break };
            let transfer = wire.start(comm, &self.call, piece)?;
            load.add(&transfer);
            self.on_the_wire.push_back(transfer);
            self.completer.reached(Phase::Wire);
        }
        Ok(())
    }

    fn take_arrived(&mut self, wire: &Wire) -> Result<bool, CollectiveError> {
        let before = self.on_the_wire.len();
        while let Some(transfer) = self.on_the_wire.front_mut() {
            if !wire.is_done(transfer, self.call.name)? {
                break;
            }
            self.on_the_wire.pop_front();
        }
        Ok(self.on_the_wire.len() < before)
    }

    /// Parts of a failed operation may still be on the wire, so its buffers are never freed.
    fn fail(self, error: CollectiveError) {
        std::mem::forget(self.call);
        self.completer.complete(Err(error));
    }
}
