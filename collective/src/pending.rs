use crate::{CollectiveError, Region};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

/// How far an operation has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    /// Waiting for the progress thread.
    Queued,
    /// Waiting for the work that was on the caller's stream before it: this rank's own computation is late.
    Compute,
    /// Handed to the backend: other ranks are late, or the network is.
    Wire,
}

impl Phase {
    /// What is waited for, for messages.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Queued => "queued",
            Phase::Compute => "waiting for this rank's own computation",
            Phase::Wire => "waiting for the other ranks",
        }
    }
}

/// What the two ends of an operation know of each other.
#[derive(Default)]
struct Shared {
    phase: AtomicU8,
    gave_up: AtomicBool,
}

/// An operation that was started. Dropping it does not cancel the operation: its buffers live until it is done.
#[must_use = "an operation that nobody waits for may still be writing"]
pub struct Pending {
    rank: usize,
    op: &'static str,
    done: Receiver<Result<Region, CollectiveError>>,
    shared: Arc<Shared>,
}

/// The backend's end of a [`Pending`].
pub struct Completer {
    sender: SyncSender<Result<Region, CollectiveError>>,
    shared: Arc<Shared>,
}

impl Pending {
    /// A pending operation of `rank` and the end that completes it.
    pub fn new(rank: usize, op: &'static str) -> (Pending, Completer) {
        let (sender, done) = sync_channel(1);
        let shared = Arc::new(Shared::default());
        (Pending { rank, op, done, shared: shared.clone() }, Completer { sender, shared })
    }

    /// Waits for completion and gives back the region that holds the result.
    ///
    /// # Errors
    /// [`CollectiveError::Deadline`] after `deadline`, or what the backend reported. The buffers stay with the operation
    /// then, and the collective cannot be used any more.
    pub fn wait(self, deadline: Duration) -> Result<Region, CollectiveError> {
        let (rank, op) = (self.rank, self.op);
        match self.done.recv_timeout(deadline) {
            Ok(result) => result,
            Err(RecvTimeoutError::Timeout) => {
                self.shared.gave_up.store(true, Ordering::Release);
                Err(CollectiveError::Deadline { rank, op, phase: self.phase().name(), deadline })
            }
            Err(RecvTimeoutError::Disconnected) => {
                Err(CollectiveError::Backend { rank, op, reason: "the progress thread ended".to_owned() })
            }
        }
    }

    /// How far it has come.
    pub fn phase(&self) -> Phase {
        match self.shared.phase.load(Ordering::Relaxed) {
            0 => Phase::Queued,
            1 => Phase::Compute,
            _ => Phase::Wire,
        }
    }
}

impl Completer {
    /// Reports the end of the operation.
    pub fn complete(self, result: Result<Region, CollectiveError>) {
        // A caller that gave up has dropped its end; nobody is left to tell.
        let _ = self.sender.send(result);
    }

    /// Reports how far it has come.
    pub fn reached(&self, phase: Phase) {
        self.shared.phase.store(phase as u8, Ordering::Relaxed);
    }

    /// Whether the caller has waited in vain: the run cannot go on.
    pub fn is_given_up(&self) -> bool {
        self.shared.gave_up.load(Ordering::Acquire)
    }
}
