//! What every backend must do, checked through the trait. All ranks call [`run`] together.

use crate::{Collective, CollectiveError, Element, Op, Pending, ReduceOp, Region};
use half::bf16;
use std::fmt::Debug;

/// Sizes (elements per rank) that every operation is tried with: none, one, odd, and more than a page.
const SIZES: [usize; 4] = [0, 1, 37, 5000];

/// Memory that the operations are tried on.
pub trait Memory {
    /// The values of a region of host memory in a region of this memory.
    ///
    /// # Errors
    /// What the memory's owner says.
    fn put(&self, host: Region) -> Result<Region, CollectiveError>;
    /// The values of a region of this memory in a region that [`Region::into_vec`] reads.
    ///
    /// # Errors
    /// What the memory's owner says.
    fn get(&self, region: Region) -> Result<Region, CollectiveError>;
}

/// The memory of this process.
pub struct Host;

impl Memory for Host {
    fn put(&self, host: Region) -> Result<Region, CollectiveError> {
        Ok(host)
    }
    fn get(&self, region: Region) -> Result<Region, CollectiveError> {
        Ok(region)
    }
}

/// Runs the whole suite on every rank of `collective`, and on groups of them.
///
/// # Errors
/// The first operation whose result is wrong, with what was found and expected.
pub fn run(collective: &dyn Collective, memory: &dyn Memory) -> Result<(), String> {
    let suite = Suite { c: collective, memory, name: "" };
    operations(&suite)?;
    let (rank, world_size) = (collective.rank(), collective.world_size());
    // Groups are made while an operation is on the wire.
    let pending = collective.all_reduce(suite.region(vec![1f32; 100_000])?, ReduceOp::Sum);
    let halves = split(collective, rank % 2, world_size - rank)?;
    same("all_reduce around a split", suite.finish(pending)?, vec![world_size as f32; 100_000])?;
    let place = ((world_size + 1 - rank % 2) / 2 - 1 - rank / 2, (world_size + 1 - rank % 2) / 2);
    same("rank and size in a half, numbered backwards", vec![(halves.rank(), halves.world_size())], vec![place])?;
    operations(&Suite { c: &*halves, memory, name: "a half, " })?;
    let nodes = collective.node_groups().map_err(|error| error.to_string())?;
    operations(&Suite { c: &*nodes.within, memory, name: "a node, " })?;
    operations(&Suite { c: &*nodes.across, memory, name: "across nodes, " })?;
    collective.barrier().map_err(|error| error.to_string())
}

fn split(collective: &dyn Collective, color: usize, key: usize) -> Result<Box<dyn Collective>, String> {
    collective.split(color, key).map_err(|error| error.to_string())
}

fn operations(suite: &Suite) -> Result<(), String> {
    for n in SIZES {
        suite.moves::<f32>(n, |v| v as f32)?;
        suite.moves::<f64>(n, |v| v as f64)?;
        suite.moves::<i64>(n, |v| v as i64)?;
        suite.moves::<u8>(n, |v| v as u8)?;
        suite.moves::<bf16>(n, |v| bf16::from_f32((v % 200) as f32))?;
        suite.reduces::<f32>(n, |v| v as f32)?;
        suite.reduces::<f64>(n, |v| v as f64)?;
        suite.reduces::<i64>(n, |v| v as i64)?;
        suite.reduces::<u8>(n, |v| v as u8)?;
        suite.reduces::<bf16>(n, |v| bf16::from_f32(v as f32))?;
    }
    suite.sums_again()?;
    suite.several_in_flight()?;
    suite.dropped()?;
    suite.messages()?;
    suite.wrong_sizes()?;
    suite.c.barrier().map_err(|error| error.to_string())
}

fn same<T: PartialEq + Debug>(what: &str, found: Vec<T>, expected: Vec<T>) -> Result<(), String> {
    match found.iter().zip(&expected).position(|(f, e)| f != e) {
        None if found.len() == expected.len() => Ok(()),
        None => Err(format!("{what}: {} elements, expected {}", found.len(), expected.len())),
        Some(i) => Err(format!("{what}: element {i} is {:?}, expected {:?}", found[i], expected[i])),
    }
}

struct Suite<'a> {
    c: &'a dyn Collective,
    memory: &'a dyn Memory,
    name: &'a str,
}

impl Suite<'_> {
    fn region<T: Element>(&self, values: Vec<T>) -> Result<Region, String> {
        self.memory.put(Region::from_vec(values)).map_err(|error| error.to_string())
    }

    fn finish<T: Element>(&self, pending: Result<Pending, CollectiveError>) -> Result<Vec<T>, String> {
        let region = pending.and_then(|p| p.wait(self.c.deadline())).and_then(|region| self.memory.get(region));
        region.and_then(Region::into_vec).map_err(|error| error.to_string())
    }

    fn label<T: Element>(&self, op: &str, n: usize) -> String {
        format!("{}rank {}: {op} of {n} {}", self.name, self.c.rank(), T::DTYPE.name())
    }

    /// all_gather (both forms), all_to_all, broadcast: bits arrive where they belong.
    fn moves<T: Element + PartialEq + Debug>(&self, n: usize, make: fn(usize) -> T) -> Result<(), String> {
        let (rank, world) = (self.c.rank(), self.c.world_size());
        let part = |from: usize, to: usize| (0..n).map(move |i| make(from * 31 + to * 7 + i)).collect::<Vec<T>>();
        let label = |op: &str| self.label::<T>(op, n);
        let gathered: Vec<T> = (0..world).flat_map(|r| part(r, 0)).collect();

        let recv = self.region(vec![T::default(); n * world])?;
        let found = self.finish(self.c.all_gather(Some(self.region(part(rank, 0))?), recv))?;
        same(&label("all_gather"), found, gathered.clone())?;

        let mut mine = vec![T::default(); n * world];
        mine[rank * n..][..n].copy_from_slice(&part(rank, 0));
        let found = self.finish(self.c.all_gather(None, self.region(mine)?))?;
        same(&label("all_gather in place"), found, gathered)?;

        let send: Vec<T> = (0..world).flat_map(|to| part(rank, to)).collect();
        let recv = self.region(vec![T::default(); n * world])?;
        let found = self.finish(self.c.all_to_all(self.region(send)?, recv))?;
        same(&label("all_to_all"), found, (0..world).flat_map(|from| part(from, rank)).collect())?;

        for root in 0..world {
            let buffer = if rank == root { part(root, 3) } else { vec![T::default(); n] };
            let found = self.finish(self.c.broadcast(self.region(buffer)?, root))?;
            same(&label("broadcast"), found, part(root, 3))?;
        }
        Ok(())
    }

    /// all_reduce and reduce_scatter (both forms), on small whole numbers so that the order of additions cannot matter.
    fn reduces<T: Element + PartialEq + Debug>(&self, n: usize, make: fn(usize) -> T) -> Result<(), String> {
        let (rank, world) = (self.c.rank(), self.c.world_size());
        let value = |r: usize, i: usize| (r + 1) * (i % 25 + 1);
        let reduce = |i: usize, op: ReduceOp| {
            let all = (0..world).map(|r| value(r, i));
            make(match op {
                ReduceOp::Sum => all.sum(),
                ReduceOp::Max => all.max().unwrap_or(0),
                ReduceOp::Min => all.min().unwrap_or(0),
            })
        };
        let values = |n: usize| (0..n).map(|i| make(value(rank, i))).collect::<Vec<T>>();
        for op in [ReduceOp::Sum, ReduceOp::Max, ReduceOp::Min] {
            let label = |name: &str| self.label::<T>(&format!("{name} {op:?}"), n);
            let all: Vec<T> = (0..n).map(|i| reduce(i, op)).collect();
            let found = self.finish(self.c.all_reduce(self.region(values(n))?, op))?;
            same(&label("all_reduce in place"), found, all.clone())?;
            let (send, recv) = (self.region(values(n))?, self.region(vec![T::default(); n])?);
            let found = self.finish(self.c.start(Op::AllReduce { send: Some(send), recv, op }))?;
            same(&label("all_reduce"), found, all)?;

            let mine: Vec<T> = (rank * n..(rank + 1) * n).map(|i| reduce(i, op)).collect();
            let (send, recv) = (self.region(values(n * world))?, self.region(vec![T::default(); n])?);
            let found = self.finish(self.c.reduce_scatter(send, Some(recv), op))?;
            same(&label("reduce_scatter"), found, mine.clone())?;
            let found: Vec<T> = self.finish(self.c.reduce_scatter(self.region(values(n * world))?, None, op))?;
            same(&label("reduce_scatter in place"), found[rank * n..(rank + 1) * n].to_vec(), mine)?;
        }
        Ok(())
    }

    /// Sums of numbers whose order matters: the same bits every time, and in f32 near what f64 gives.
    fn sums_again(&self) -> Result<(), String> {
        let (rank, world, n) = (self.c.rank(), self.c.world_size(), 3000);
        let value = |r: usize, i: usize| ((r * 37 + i * 11) as f32 * 0.7).sin() * [1e-3, 1.0, 1e3][(r + i) % 3];
        let values: Vec<f32> = (0..n * world).map(|i| value(rank, i)).collect();
        let rounded: Vec<bf16> = values.iter().copied().map(bf16::from_f32).collect();
        let sum = || {
            self.finish::<f32>(self.c.reduce_scatter(
                self.region(values.clone())?,
                Some(self.region(vec![0f32; n])?),
                ReduceOp::Sum,
            ))
        };
        let sum_rounded = || {
            let recv = self.region(vec![bf16::ZERO; n])?;
            self.finish::<bf16>(self.c.reduce_scatter(self.region(rounded.clone())?, Some(recv), ReduceOp::Sum))
        };
        let first = sum()?;
        for (i, found) in first.iter().enumerate() {
            let terms: Vec<f64> = (0..world).map(|r| f64::from(value(r, rank * n + i))).collect();
            let (exact, scale) = (terms.iter().sum::<f64>(), terms.iter().map(|term| term.abs()).sum::<f64>());
            if (f64::from(*found) - exact).abs() > 1e-6 * scale * world as f64 {
                return Err(format!("{}: element {i} is {found}, expected {exact}", self.label::<f32>("sum", n)));
            }
        }
        let first_rounded = sum_rounded()?;
        for _ in 0..3 {
            same(&self.label::<f32>("the same sum again", n), sum()?, first.clone())?;
            same(&self.label::<bf16>("the same sum again", n), sum_rounded()?, first_rounded.clone())?;
        }
        Ok(())
    }

    fn several_in_flight(&self) -> Result<(), String> {
        let start = |k: i64| Ok(self.c.all_reduce(self.region(vec![k; 1000])?, ReduceOp::Sum));
        let pending = (0..8).map(start).collect::<Result<Vec<_>, String>>()?;
        for (k, pending) in pending.into_iter().enumerate().rev() {
            let found: Vec<i64> = self.finish(pending)?;
            same("several in flight", found, vec![(k * self.c.world_size()) as i64; 1000])?;
        }
        Ok(())
    }

    /// Operations that nobody waits for run to their end on memory that lives as long, and disturb no other.
    fn dropped(&self) -> Result<(), String> {
        for _ in 0..4 {
            let buffer = self.region(vec![1f32; 100_000])?;
            drop(self.c.all_reduce(buffer, ReduceOp::Sum).map_err(|error| error.to_string())?);
        }
        let found: Vec<f32> = self.finish(self.c.all_reduce(self.region(vec![1f32; 100_000])?, ReduceOp::Sum))?;
        same("all_reduce after dropped ones", found, vec![self.c.world_size() as f32; 100_000])
    }

    fn messages(&self) -> Result<(), String> {
        let message_of = |rank: usize| vec![rank as u8; rank * 3];
        let found = self.c.gather_bytes(&message_of(self.c.rank())).map_err(|error| error.to_string())?;
        same("gather_bytes", found, (0..self.c.world_size()).map(message_of).collect())
    }

    /// Every rank makes the same mistake; nothing is started.
    fn wrong_sizes(&self) -> Result<(), String> {
        let region = |n: usize| self.region(vec![0f32; n]);
        let world = self.c.world_size();
        let wrong = [
            Op::AllReduce { send: Some(region(2)?), recv: region(3)?, op: ReduceOp::Sum },
            Op::AllGather { send: Some(region(2)?), recv: region(2 * world + 1)? },
            Op::AllGather { send: Some(self.region(vec![0i64; 2])?), recv: region(2 * world)? },
            Op::ReduceScatter { send: region(3 * world)?, recv: Some(region(2)?), op: ReduceOp::Sum },
            Op::AllToAll { send: region(2 * world)?, recv: region(3 * world)? },
            Op::Broadcast { buffer: region(1)?, root: world },
        ];
        for op in wrong {
            let name = op.name();
            match self.c.start(op) {
                Err(CollectiveError::Size { .. }) => {}
                Err(other) => return Err(format!("{name} with wrong sizes: {other}")),
                Ok(_) => return Err(format!("{name} with wrong sizes was started")),
            }
        }
        if world > 1 {
            for op in [
                Op::AllGather { send: None, recv: region(world + 1)? },
                Op::ReduceScatter { send: region(world + 1)?, recv: None, op: ReduceOp::Sum },
                Op::AllToAll { send: region(world + 1)?, recv: region(world + 1)? },
            ] {
                let name = op.name();
                if !matches!(self.c.start(op), Err(CollectiveError::Size { .. })) {
                    return Err(format!("{name} of no multiple of the world size was not refused"));
                }
            }
        }
        Ok(())
    }
}
