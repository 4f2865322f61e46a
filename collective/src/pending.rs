use crate::{CollectiveError, Region};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

/// An operation that was started. Dropping it does not cancel the operation.
#[must_use = "an operation that nobody waits for may still be writing"]
pub struct Pending {
    rank: usize,
    op: &'static str,
    done: Receiver<Result<Region, CollectiveError>>,
}

/// The backend's end of a [`Pending`].
pub struct Completer(SyncSender<Result<Region, CollectiveError>>);

impl Pending {
    /// A pending operation and the end that completes it.
    pub fn new(rank: usize, op: &'static str) -> (Pending, Completer) {
        let (sender, done) = sync_channel(1);
        (Pending { rank, op, done }, Completer(sender))
    }

    /// Waits for completion and gives back the region that holds the result.
    ///
    /// # Errors
    /// [`CollectiveError::Deadline`] after `deadline`, or what the backend reported.
    pub fn wait(self, deadline: Duration) -> Result<Region, CollectiveError> {
        match self.done.recv_timeout(deadline) {
            Ok(result) => result,
            Err(RecvTimeoutError::Timeout) => Err(CollectiveError::Deadline { rank: self.rank, op: self.op, deadline }),
            Err(RecvTimeoutError::Disconnected) => Err(CollectiveError::Backend {
                rank: self.rank,
                op: self.op,
                reason: "the progress thread ended".to_owned(),
            }),
        }
    }
}

impl Completer {
    /// Reports the end of the operation.
    pub fn complete(self, result: Result<Region, CollectiveError>) {
        // A caller that gave up has dropped its end; nobody is left to tell.
        let _ = self.0.send(result);
    }
}
