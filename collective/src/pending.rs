use crate::{CollectiveError, Region};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

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

impl Shared {
    fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Relaxed) {
            0 => Phase::Queued,
            1 => Phase::Compute,
            _ => Phase::Wire,
        }
    }
}

/// Lets the caller's stream wait for an operation; runs in the caller's thread.
pub(crate) type StreamOrder = Box<dyn FnOnce() -> Result<(), String> + Send>;

/// An operation that was started. Dropping it does not cancel the operation: its buffers live until it is done.
#[must_use = "an operation that nobody waits for may still be writing"]
pub struct Pending {
    rank: usize,
    op: &'static str,
    started: Instant,
    done: Receiver<Outcome>,
    shared: Arc<Shared>,
    /// How long the backend may take to clean up after a deadline has passed.
    grace: Duration,
    /// Of an operation on a device: comes when it is on a stream.
    launched: Option<Receiver<StreamOrder>>,
}

/// The result of an operation and when it was there.
type Outcome = (Result<Region, CollectiveError>, Instant);

/// An operation that is done.
pub struct Done {
    /// Holds the result.
    pub region: Region,
    /// When the operation was started.
    pub started: Instant,
    /// When the backend saw its end.
    pub ended: Instant,
}

/// The backend's end of a [`Pending`].
pub struct Completer {
    sender: SyncSender<Outcome>,
    shared: Arc<Shared>,
    launched: Option<SyncSender<StreamOrder>>,
}

impl Pending {
    /// A pending operation of `rank` and the end that completes it.
    pub fn new(rank: usize, op: &'static str) -> (Pending, Completer) {
        let (sender, done) = sync_channel(1);
        let shared = Arc::new(Shared::default());
        let (started, grace) = (Instant::now(), Duration::ZERO);
        let pending = Pending { rank, op, started, done, shared: shared.clone(), grace, launched: None };
        (pending, Completer { sender, shared, launched: None })
    }

    /// As [`Pending::new`], of a backend that after a deadline ends the operation within `grace` and knows more of it.
    pub(crate) fn with_grace(rank: usize, op: &'static str, grace: Duration) -> (Pending, Completer) {
        let (pending, completer) = Self::new(rank, op);
        (Pending { grace, ..pending }, completer)
    }

    /// As [`Pending::with_grace`], of a backend that puts operations on streams.
    pub(crate) fn on_stream(rank: usize, op: &'static str, grace: Duration) -> (Pending, Completer) {
        let (pending, completer) = Self::with_grace(rank, op, grace);
        let (sender, launched) = sync_channel(1);
        (Pending { launched: Some(launched), ..pending }, Completer { launched: Some(sender), ..completer })
    }

    /// Waits for completion and gives back the region that holds the result.
    ///
    /// # Errors
    /// [`CollectiveError::Deadline`] after `deadline`, or what the backend reported. The buffers stay with the operation
    /// then, and the collective cannot be used any more.
    pub fn wait(self, deadline: Duration) -> Result<Region, CollectiveError> {
        self.wait_timed(deadline).map(|done| done.region)
    }

    /// As [`Pending::wait`], with the times of the operation.
    ///
    /// # Errors
    /// As there.
    pub fn wait_timed(self, deadline: Duration) -> Result<Done, CollectiveError> {
        let (rank, op, started) = (self.rank, self.op, self.started);
        let done = |(result, ended): Outcome| result.map(|region| Done { region, started, ended });
        match self.done.recv_timeout(deadline) {
            Ok(outcome) => done(outcome),
            Err(RecvTimeoutError::Timeout) => {
                let phase = self.phase().name().into();
                self.shared.gave_up.store(true, Ordering::Release);
                match self.done.recv_timeout(self.grace) {
                    Ok((Err(CollectiveError::Deadline { phase, .. }), _)) => {
                        Err(CollectiveError::Deadline { rank, op, phase, deadline })
                    }
                    Ok(at_last) => done(at_last),
                    Err(_) => Err(CollectiveError::Deadline { rank, op, phase, deadline }),
                }
            }
            Err(RecvTimeoutError::Disconnected) => {
                Err(CollectiveError::Backend { rank, op, reason: "the progress thread ended".to_owned() })
            }
        }
    }

    /// Lets the work that the caller puts on its current stream from now on wait for the operation, on the device; the host
    /// goes on. Where there is no device this is [`Pending::wait`]. The buffers are given up when the operation is done.
    ///
    /// An error that comes later ends the operation (kernels that wait for other ranks leave the device, and what follows
    /// on the stream reads anything) and is reported by the next operation on the collective: so make one that is waited
    /// for before a result leaves the process.
    ///
    /// # Errors
    /// As [`Pending::wait`], of what happens until the operation is on its stream.
    pub fn wait_on_stream(mut self, deadline: Duration) -> Result<(), CollectiveError> {
        let Some(launched) = self.launched.take() else { return self.wait(deadline).map(|_| ()) };
        match launched.recv_timeout(deadline) {
            Ok(order) => {
                let (rank, op) = (self.rank, self.op);
                order().map_err(|reason| CollectiveError::Backend { rank, op, reason })
            }
            Err(RecvTimeoutError::Disconnected) => self.wait(deadline).map(|_| ()),
            Err(RecvTimeoutError::Timeout) => self.wait(Duration::ZERO).map(|_| ()),
        }
    }

    /// How far it has come.
    pub fn phase(&self) -> Phase {
        self.shared.phase()
    }
}

impl Completer {
    /// Reports the end of the operation.
    pub fn complete(self, result: Result<Region, CollectiveError>) {
        // A caller that gave up has dropped its end; nobody is left to tell.
        let _ = self.sender.send((result, Instant::now()));
    }

    /// Reports that the operation is on its stream.
    pub(crate) fn launched(&mut self, order: StreamOrder) {
        if let Some(launched) = self.launched.take() {
            // A caller that does not ask has dropped its end.
            let _ = launched.send(order);
        }
    }

    /// Reports how far it has come.
    pub fn reached(&self, phase: Phase) {
        self.shared.phase.store(phase as u8, Ordering::Relaxed);
    }

    /// How far it has come.
    pub fn phase(&self) -> Phase {
        self.shared.phase()
    }

    /// Whether the caller has waited in vain: the run cannot go on.
    pub fn is_given_up(&self) -> bool {
        self.shared.gave_up.load(Ordering::Acquire)
    }
}
