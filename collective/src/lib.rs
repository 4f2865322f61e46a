//! Collective communication between the ranks of a run.
//!
//! A [`Collective`] starts operations without blocking; the returned [`Pending`] is waited for with a deadline.
//! Every rank of the world must start the same operations in the same order, whatever it computes in between.
//! Buffers are [`Region`]s: plain memory that an operation owns until it completes, so neither side can free it early.
//!
//! Backends: [`single`] (world size 1, no MPI), [`mpi`] (host memory), [`tcp`] (small things in host memory, where nothing but the
//! environment introduces ranks to each other), [`nccl`] (GPU memory, with one of the others as control plane). [`conformance`] holds the checks that every backend passes; docs/COLLECTIVE.md tells the whole.

mod call;
pub mod conformance;
mod environment;
mod error;
pub mod mpi;
pub mod nccl;
mod op;
mod pending;
mod reduce;
mod region;
pub mod single;
pub mod tcp;

pub use error::CollectiveError;
pub use op::{Op, ReduceOp};
pub use pending::{Completer, Done, Pending, Phase};
pub use region::{Dtype, Element, Place, Region};

use environment::Started;
use std::time::Duration;

/// The ranks of one run, as seen from one of them.
pub trait Collective: Send + Sync {
    /// The backend's name.
    fn backend(&self) -> &'static str;
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
    /// [`CollectiveError::Size`], [`CollectiveError::Place`]; nothing was started then.
    fn start(&self, op: Op) -> Result<Pending, CollectiveError>;
    /// The ranks that pass the same `color`, as a world of their own, numbered by `key` (equal keys: by rank). All ranks
    /// call it together; it blocks. Errors of a group name ranks as the whole run numbers them; `local_rank` and
    /// `local_size` stay those of the whole run.
    ///
    /// # Errors
    /// [`CollectiveError::Deadline`] when a rank does not come in time, or what the backend reports.
    fn split(&self, color: usize, key: usize) -> Result<Box<dyn Collective>, CollectiveError>;
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
        self.start(Op::AllReduce { send: None, recv: buffer, op })
    }

    /// Reduces `send` (world_size × n elements) and leaves the n elements of this rank's part in `recv`. Without `recv`
    /// they are left in this rank's part of `send`, whose other parts then hold anything.
    ///
    /// # Errors
    /// See [`Collective::start`].
    pub fn reduce_scatter(&self, send: Region, recv: Option<Region>, op: ReduceOp) -> Result<Pending, CollectiveError> {
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

    /// How many consecutive ranks each node (host name) has, if all have equally many; else, and where nodes take turns, 1. All ranks
    /// call it together; it blocks.
    ///
    /// # Errors
    /// See [`Collective::start`] and [`Pending::wait`].
    pub fn ranks_per_node(&self) -> Result<usize, CollectiveError> {
        Ok(equal_runs(&self.gather_bytes(host_name().as_bytes())?))
    }

    /// The two groups that a hierarchical operation climbs through. All ranks call it together; it blocks.
    ///
    /// # Errors
    /// See [`Collective::split`].
    pub fn node_groups(&self) -> Result<NodeGroups, CollectiveError> {
        let node_of_rank = self.gather_bytes(host_name().as_bytes())?;
        let (node, rank_of_node) = place_on_node(&node_of_rank, self.rank());
        let within = self.split(node, self.rank())?;
        let across = self.split(rank_of_node, self.rank())?;
        Ok(NodeGroups { within, across })
    }
}

/// See [`node_groups`](trait.Collective.html#method.node_groups).
pub struct NodeGroups {
    /// The ranks on this rank's node (those with the same host name).
    pub within: Box<dyn Collective>,
    /// One rank of each node: those with the same number in their `within`.
    pub across: Box<dyn Collective>,
}

/// The first rank on the node of `rank`, and the number of `rank` among the ranks there.
fn place_on_node(node_of_rank: &[Vec<u8>], rank: usize) -> (usize, usize) {
    let here = |other: &&Vec<u8>| **other == node_of_rank[rank];
    let first = node_of_rank.iter().take(rank).position(|other| *other == node_of_rank[rank]).unwrap_or(rank);
    (first, node_of_rank.iter().take(rank).filter(here).count())
}

/// The length of the runs of equal names, if they are equally long and no name has two.
fn equal_runs(node_of_rank: &[Vec<u8>]) -> usize {
    let runs: Vec<&[Vec<u8>]> = node_of_rank.chunk_by(|a, b| a == b).collect();
    let length = runs.first().map_or(1, |run| run.len());
    let names: std::collections::HashSet<&Vec<u8>> = node_of_rank.iter().collect();
    if names.len() == runs.len() && runs.iter().all(|run| run.len() == length) { length } else { 1 }
}

/// The name of this machine.
pub fn host_name() -> String {
    let mut name = [0u8; 256];
    // SAFETY: the buffer has the length given; the last byte stays 0 whatever is written.
    unsafe { libc::gethostname(name.as_mut_ptr().cast(), name.len() - 1) };
    String::from_utf8_lossy(name.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned()
}

/// The collective of the engine that started this process, over host memory: [`mpi`] when an MPI launcher says that there is
/// more than one rank, [`tcp`] when Slurm, Kubernetes or a launcher like torchrun does, else [`single`]. World size 1 never
/// initialises MPI.
///
/// # Errors
/// [`CollectiveError::Init`] when MPI cannot be initialised, the environment contradicts itself or ranks do not belong
/// together; [`CollectiveError::Deadline`] when a rank does not come in time.
pub fn from_environment(deadline: Duration) -> Result<Box<dyn Collective>, CollectiveError> {
    match environment::started().map_err(|reason| CollectiveError::Init { backend: "the collective", reason })? {
        Started::Alone => Ok(Box::new(single::SingleCollective::new(deadline))),
        Started::Mpi(_) => Ok(Box::new(mpi::MpiCollective::init(mpi::MpiOptions::new(deadline))?)),
        Started::Tcp(meeting) => Ok(Box::new(tcp::TcpCollective::meet(meeting, deadline)?)),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn ranks_find_their_place_on_nodes_however_they_are_dealt() {
        let nodes = |names: &str| names.bytes().map(|name| vec![name]).collect::<Vec<_>>();
        let places = |names: &str| (0..names.len()).map(|r| super::place_on_node(&nodes(names), r)).collect::<Vec<_>>();
        assert_eq!(places("aabb"), [(0, 0), (0, 1), (2, 0), (2, 1)]);
        assert_eq!(places("abab"), [(0, 0), (1, 0), (0, 1), (1, 1)]);
        assert_eq!(places("a"), [(0, 0)]);
    }

    #[test]
    fn nodes_count_where_each_has_equally_many_consecutive_ranks() {
        let nodes = |names: &str| names.bytes().map(|name| vec![name]).collect::<Vec<_>>();
        let cases = [("aabb", 2), ("abab", 1), ("aaab", 1), ("aabbaa", 1), ("a", 1), ("aaaa", 4), ("aaabbbccc", 3)];
        for (names, ranks) in cases {
            assert_eq!(super::equal_runs(&nodes(names)), ranks, "{names}");
        }
    }
}
