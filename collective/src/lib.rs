//! Collective communication between the ranks of a run.
//!
//! A [`Collective`] starts operations without blocking; the returned [`Pending`] is waited for with a deadline.
//! Every rank of the world must start the same operations in the same order, whatever it computes in between.
//! Buffers are [`Region`]s: plain memory that an operation owns until it completes, so neither side can free it early.
//!
//! Backends: [`single`] (world size 1, no MPI), [`mpi`] (CPU memory and the control plane). [`conformance`] holds
//! the checks that every backend passes.

pub mod conformance;
mod error;
pub mod mpi;
mod op;
mod pending;
mod region;
pub mod single;

pub use error::CollectiveError;
pub use op::{Op, ReduceOp};
pub use pending::{Completer, Pending};
pub use region::{Dtype, Element, Region};

use std::time::Duration;

/// The ranks of one run, as seen from one of them.
pub trait Collective: Send + Sync {
    /// This process's number in the world, `0..world_size`.
    fn rank(&self) -> usize;
    /// How many processes take part.
    fn world_size(&self) -> usize;
    /// This process's number on its own node, as the engine that started it says.
    fn local_rank(&self) -> usize;
    /// How many processes of the run are on this node.
    fn local_size(&self) -> usize;
    /// How long a wait may last before it is an error.
    fn deadline(&self) -> Duration;
    /// Starts `op` and returns at once. Sizes are checked before anything is sent.
    ///
    /// # Errors
    /// [`CollectiveError::Size`] or [`CollectiveError::Unsupported`]; nothing was started then.
    fn start(&self, op: Op) -> Result<Pending, CollectiveError>;
    /// Ends the whole run from this rank with `code`; the other ranks are ended by the engine.
    fn abort(&self, code: i32) -> !;
}

/// The operations by name, and blocking ones for small control messages.
impl dyn Collective + '_ {
    /// Reduces `buffer` element by element over all ranks, in place. The order of additions is the backend's.
    ///
    /// # Errors
    /// See [`Collective::start`].
    pub fn all_reduce(&self, buffer: Region, op: ReduceOp) -> Result<Pending, CollectiveError> {
        self.start(Op::AllReduce { buffer, op })
    }

    /// Reduces `send` (world_size × n elements) and leaves the n elements of this rank's part in `recv`.
    ///
    /// # Errors
    /// See [`Collective::start`].
    pub fn reduce_scatter(&self, send: Region, recv: Region, op: ReduceOp) -> Result<Pending, CollectiveError> {
        self.start(Op::ReduceScatter { send, recv, op })
    }

    /// Gathers every rank's `send` (n elements) into `recv` (world_size × n), in rank order.
    /// Without `send`, this rank's part is already in its place in `recv`.
    ///
    /// # Errors
    /// See [`Collective::start`].
    pub fn all_gather(&self, send: Option<Region>, recv: Region) -> Result<Pending, CollectiveError> {
        self.start(Op::AllGather { send, recv })
    }

    /// Part r of `send` goes to rank r; part r of `recv` comes from rank r.
    ///
    /// # Errors
    /// See [`Collective::start`].
    pub fn all_to_all(&self, send: Region, recv: Region) -> Result<Pending, CollectiveError> {
        self.start(Op::AllToAll { send, recv })
    }

    /// `buffer` of rank `root` goes to all ranks.
    ///
    /// # Errors
    /// See [`Collective::start`].
    pub fn broadcast(&self, buffer: Region, root: usize) -> Result<Pending, CollectiveError> {
        self.start(Op::Broadcast { buffer, root })
    }

    /// Waits until every rank has come here.
    ///
    /// # Errors
    /// [`CollectiveError::Deadline`] when a rank does not come in time.
    pub fn barrier(&self) -> Result<(), CollectiveError> {
        self.start(Op::Barrier)?.wait(self.deadline()).map(|_| ())
    }

    /// Every rank's `values`, in rank order; all ranks pass equally many.
    ///
    /// # Errors
    /// See [`Collective::start`] and [`Pending::wait`].
    pub fn gather_values<T: Element>(&self, values: Vec<T>) -> Result<Vec<T>, CollectiveError> {
        let recv = Region::from_vec(vec![T::default(); values.len() * self.world_size()]);
        self.all_gather(Some(Region::from_vec(values)), recv)?.wait(self.deadline())?.into_vec()
    }

    /// Every rank's message, in rank order; lengths may differ.
    ///
    /// # Errors
    /// See [`Collective::start`] and [`Pending::wait`].
    pub fn gather_bytes(&self, message: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        let lengths = self.gather_values(vec![message.len() as i64])?;
        let longest = lengths.iter().copied().max().unwrap_or(0) as usize;
        let mut padded = message.to_vec();
        padded.resize(longest, 0);
        let all = self.gather_values(padded)?;
        let message_of = |(rank, &length): (usize, &i64)| all[rank * longest..][..length as usize].to_vec();
        Ok(lengths.iter().enumerate().map(message_of).collect())
    }
}

/// The collective of the engine that started this process: [`mpi`] when an MPI launcher says there is more than one
/// rank, else [`single`]. World size 1 never initialises MPI.
///
/// # Errors
/// [`CollectiveError::Init`] when MPI cannot be initialised.
pub fn from_environment(deadline: Duration) -> Result<Box<dyn Collective>, CollectiveError> {
    if mpi::world_size_of_environment() > 1 {
        Ok(Box::new(mpi::MpiCollective::init(deadline)?))
    } else {
        Ok(Box::new(single::SingleCollective::new(deadline)))
    }
}
