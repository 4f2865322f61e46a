//! TCP over host memory: the control plane of a run whose ranks no MPI launcher has introduced to each other (plain srun,
//! Kubernetes, torchrun and its like). All goes through rank 0, so it is for messages and small buffers, not for gradients.
//!
//! Nothing is encrypted; the token keeps strangers out of the group, so that neither they nor another run are taken for
//! ranks. Use it, as NCCL itself, on a network of your own.

mod interface;
mod rendezvous;
mod star;

use crate::call::Call;
use crate::environment::{Meeting, Seat};
use crate::{Collective, CollectiveError, Completer, Op, Pending, Phase, Place};
use rendezvous::{Group, Token};
use star::{GRACE, Star};
use std::net::TcpStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

const BACKEND: &str = "tcp";

/// Ranks that are connected to the first of them.
pub struct TcpCollective {
    rank: usize,
    size: usize,
    seat: Seat,
    /// Where others reach this process: by name for rank 0, by address for the others.
    reached_at: String,
    /// Groups made from this one so far.
    splits: Mutex<u64>,
    group: Group,
    calls: Mutex<Option<Sender<Started>>>,
    /// Disconnected when the progress thread has ended.
    ended: Mutex<Receiver<()>>,
}

/// An operation on its way to the progress thread.
type Started = (Box<Call>, Completer);

impl TcpCollective {
    /// Meets the others where the environment says.
    ///
    /// # Errors
    /// See [`crate::from_environment`].
    pub(crate) fn meet(meeting: Meeting, deadline: Duration) -> Result<Self, CollectiveError> {
        let Meeting { rank, seat, host, port } = meeting;
        let token = Token::of_environment().map_err(|reason| CollectiveError::Init { backend: BACKEND, reason })?;
        let group = Group { id: 0, rank, size: seat.world_size, run_rank: rank, token, deadline };
        let (streams, reached_at) = match rank {
            0 => (group.take_in(&group.listen(&host, port)?)?, host),
            _ => {
                let stream = group.connect(&host, port)?;
                let address = own_address(&stream);
                (vec![stream], address)
            }
        };
        Self::over(streams, group, seat, reached_at)
    }

    fn over(streams: Vec<TcpStream>, group: Group, seat: Seat, reached_at: String) -> Result<Self, CollectiveError> {
        let Group { rank, size, run_rank, deadline, .. } = group;
        let mut star = Star { rank, size, run_rank, deadline, streams, number: 0, failed: None };
        let (calls, queue) = channel::<Started>();
        let (alive, ended) = channel::<()>();
        let work = move || {
            for (call, completer) in queue {
                completer.reached(Phase::Wire);
                let outcome = star.run(&call);
                completer.complete(outcome.map(|()| call.into_result()));
            }
            drop(alive);
        };
        let failed = |error| CollectiveError::Init { backend: BACKEND, reason: format!("no progress thread: {error}") };
        std::thread::Builder::new().name("tcp-progress".to_owned()).spawn(work).map_err(failed)?;
        let (splits, calls, ended) = (Mutex::new(0), Mutex::new(Some(calls)), Mutex::new(ended));
        Ok(Self { rank, size, seat, reached_at, splits, group, calls, ended })
    }
}

impl Collective for TcpCollective {
    fn backend(&self) -> &'static str {
        BACKEND
    }
    fn rank(&self) -> usize {
        self.rank
    }
    fn world_size(&self) -> usize {
        self.size
    }
    fn local_rank(&self) -> usize {
        self.seat.local_rank
    }
    fn local_size(&self) -> usize {
        self.seat.local_size
    }
    fn deadline(&self) -> Duration {
        self.group.deadline
    }

    fn start(&self, op: Op) -> Result<Pending, CollectiveError> {
        let rank = self.group.run_rank;
        let call = Call::new(op, self.rank, self.size, rank)?;
        if call.place != Place::Host {
            return Err(CollectiveError::Place { rank, op: call.name, backend: BACKEND, found: call.place });
        }
        let (pending, completer) = Pending::with_grace(rank, call.name, GRACE + Duration::from_secs(1));
        if call.is_empty() {
            completer.complete(Ok(call.into_result()));
        } else if let Some(calls) = lock(&self.calls).as_ref() {
            // A dead progress thread drops what answers the caller, who learns of it by that.
            let _ = calls.send((Box::new(call), completer));
        }
        Ok(pending)
    }

    fn split(&self, color: usize, key: usize) -> Result<Box<dyn Collective>, CollectiveError> {
        let this: &dyn Collective = self;
        let told = this.gather_values(vec![color as i64, key as i64])?;
        let mut members: Vec<(i64, usize)> = told
            .chunks_exact(2)
            .enumerate()
            .filter(|(_, pair)| pair[0] == color as i64)
            .map(|(rank, pair)| (pair[1], rank))
            .collect();
        members.sort_unstable();
        let rank = members.iter().position(|(_, rank)| *rank == self.rank).unwrap_or_default();
        let number = {
            let mut splits = lock(&self.splits);
            *splits += 1;
            *splits
        };
        // Different for all groups of a run, in which there are few.
        let id = self.group.id.wrapping_mul(1 << 20).wrapping_add(number << 32).wrapping_add(color as u64 + 1);
        let group = Group { id, rank, size: members.len(), ..self.group.clone() };

        // The first of each group listens and says where, by way of rank 0 of this one.
        let listener = match (rank, members.len()) {
            (0, 2..) => Some(group.listen(&self.reached_at, 0)?),
            _ => None,
        };
        let port =
            listener.as_ref().and_then(|listener| listener.local_addr().ok()).map_or(0, |address| address.port());
        let places = this.gather_bytes(format!("{port} {}", self.reached_at).as_bytes())?;
        let first = String::from_utf8_lossy(&places[members[0].1]).into_owned();
        let streams = match (listener, first.split_once(' ')) {
            (Some(listener), _) => group.take_in(&listener)?,
            (None, Some((port, host))) if members.len() > 1 => {
                vec![group.connect(host, port.parse().unwrap_or_default())?]
            }
            _ => Vec::new(),
        };
        Ok(Box::new(Self::over(streams, group, self.seat, self.reached_at.clone())?))
    }

    fn abort(&self, code: i32) -> ! {
        // The others find their connections closed.
        std::process::exit(code)
    }
}

impl Drop for TcpCollective {
    fn drop(&mut self) {
        drop(lock(&self.calls).take());
        let patience = self.group.deadline + GRACE * 2;
        if let Err(RecvTimeoutError::Timeout) = lock(&self.ended).recv_timeout(patience) {
            eprintln!("tcp: what was started did not end within {patience:?}");
        }
    }
}

fn own_address(stream: &TcpStream) -> String {
    stream.local_addr().map_or_else(|_| String::new(), |address| address.ip().to_canonical().to_string())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
