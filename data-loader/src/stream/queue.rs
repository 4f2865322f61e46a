//! Between the threads that fill micro-batches and the one that takes them: order, bounds, and memory for the next ones.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::MicroBatch;
use crate::DataError;

/// Micro-batches by number, counted in the order in which they are taken.
pub(super) struct Queue {
    state: Mutex<State>,
    changed: Condvar,
    most_bytes: usize,
}

#[derive(Default)]
struct State {
    /// Number of the next one to be taken, which is the first in `ready`.
    next: u64,
    ready: VecDeque<Option<MicroBatch>>,
    /// Bytes that are being filled or are ready.
    bytes: usize,
    /// Given back; never more than were in use at the same time.
    spare: Vec<MicroBatch>,
    /// Threads that still work.
    working: usize,
    /// No new work is wanted: the consumer has gone, or something went wrong.
    closed: bool,
    failure: Option<DataError>,
    /// The failure has been handed out.
    failed: bool,
}

impl Queue {
    /// For so many bytes and threads.
    pub fn new(most_bytes: usize, threads: usize) -> Self {
        let state = State { working: threads, ..State::default() };
        Self { state: Mutex::new(state), changed: Condvar::new(), most_bytes }
    }

    /// The state is plain data that is valid between statements, so a poisoned lock is still good.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `bytes` more may be filled; `false` if no new work is wanted.
    pub fn claim(&self, bytes: usize) -> bool {
        let mut state = self.lock();
        while !state.closed && state.bytes > 0 && state.bytes.saturating_add(bytes) > self.most_bytes {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.bytes += bytes;
        !state.closed
    }

    /// Memory that was given back.
    pub fn spare(&self) -> Option<MicroBatch> {
        self.lock().spare.pop()
    }

    /// Takes the memory of a micro-batch back.
    pub fn recycle(&self, batch: MicroBatch) {
        self.lock().spare.push(batch);
    }

    /// Puts filled micro-batches in their places: number `first` and every `stride`-th after it.
    pub fn deliver(&self, first: u64, stride: usize, batches: Vec<MicroBatch>) {
        let mut state = self.lock();
        // Nothing is taken before it is there.
        let mut at = (first - state.next) as usize;
        for batch in batches {
            if state.ready.len() <= at {
                state.ready.resize_with(at + 1, || None);
            }
            state.ready[at] = Some(batch);
            at += stride;
        }
        self.changed.notify_all();
    }

    /// The next one in order; `None` after the last.
    pub fn take(&self) -> Option<Result<MicroBatch, DataError>> {
        let mut state = self.lock();
        loop {
            if let Some(batch) = state.ready.front_mut().and_then(Option::take) {
                state.ready.pop_front();
                state.next += 1;
                state.bytes -= batch.bytes();
                self.changed.notify_all();
                return Some(Ok(batch));
            }
            if state.failed {
                return Some(Err(DataError::Stopped));
            }
            // What other threads were filling when one failed still comes.
            if state.working == 0 {
                let failure = state.failure.take()?;
                state.failed = true;
                return Some(Err(failure));
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A thread has ended.
    pub fn leave(&self, outcome: Result<(), DataError>) {
        let mut state = self.lock();
        state.working -= 1;
        if let Err(error) = outcome {
            state.closed = true;
            state.failure.get_or_insert(error);
        }
        self.changed.notify_all();
    }

    /// The consumer has gone.
    pub fn stop(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    #[cfg(test)]
    pub fn ready(&self) -> usize {
        self.lock().ready.iter().flatten().count()
    }
}
