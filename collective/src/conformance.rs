//! What every backend must do, checked through the trait. All ranks call [`run`] together.

use crate::{Collective, CollectiveError, Element, Op, ReduceOp, Region};

/// Sizes (elements per rank) that every operation is tried with: none, one, odd, and more than a page.
const SIZES: [usize; 4] = [0, 1, 37, 5000];

/// Runs the whole suite on every rank of `collective`.
///
/// # Errors
/// The first operation whose result is wrong, with what was found and expected.
pub fn run(collective: &dyn Collective) -> Result<(), String> {
    for n in SIZES {
        moves::<f32>(collective, n, |v| v as f32)?;
        moves::<f64>(collective, n, |v| v as f64)?;
        moves::<i64>(collective, n, |v| v as i64)?;
        moves::<u8>(collective, n, |v| v as u8)?;
        moves::<half::bf16>(collective, n, |v| half::bf16::from_f32((v % 200) as f32))?;
        reduces::<f32>(collective, n, |v| v as f32)?;
        reduces::<f64>(collective, n, |v| v as f64)?;
        reduces::<i64>(collective, n, |v| v as i64)?;
    }
    several_in_flight(collective)?;
    messages(collective)?;
    wrong_sizes(collective)?;
    collective.barrier().map_err(|error| error.to_string())
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, found: Vec<T>, expected: Vec<T>) -> Result<(), String> {
    match found.iter().zip(&expected).position(|(f, e)| f != e) {
        None if found.len() == expected.len() => Ok(()),
        None => Err(format!("{what}: {} elements, expected {}", found.len(), expected.len())),
        Some(i) => Err(format!("{what}: element {i} is {:?}, expected {:?}", found[i], expected[i])),
    }
}

fn finish<T: Element>(c: &dyn Collective, pending: Result<crate::Pending, CollectiveError>) -> Result<Vec<T>, String> {
    let region = pending.and_then(|p| p.wait(c.deadline())).map_err(|error| error.to_string())?;
    region.into_vec().map_err(|error| error.to_string())
}

/// all_gather (both forms), all_to_all, broadcast: bits arrive where they belong.
fn moves<T: Element + PartialEq + std::fmt::Debug>(
    c: &dyn Collective,
    n: usize,
    make: fn(usize) -> T,
) -> Result<(), String> {
    let (rank, world) = (c.rank(), c.world_size());
    let part = |from: usize, to: usize| (0..n).map(move |i| make(from * 31 + to * 7 + i)).collect::<Vec<T>>();
    let label = |op: &str| format!("rank {rank}: {op} of {n} {}", T::DTYPE.name());
    let gathered: Vec<T> = (0..world).flat_map(|r| part(r, 0)).collect();

    let recv = Region::from_vec(vec![T::default(); n * world]);
    let found = finish(c, c.all_gather(Some(Region::from_vec(part(rank, 0))), recv))?;
    same(&label("all_gather"), found, gathered.clone())?;

    let mut mine = vec![T::default(); n * world];
    mine[rank * n..][..n].copy_from_slice(&part(rank, 0));
    let found = finish(c, c.all_gather(None, Region::from_vec(mine)))?;
    same(&label("all_gather in place"), found, gathered)?;

    let send: Vec<T> = (0..world).flat_map(|to| part(rank, to)).collect();
    let recv = Region::from_vec(vec![T::default(); n * world]);
    let found = finish(c, c.all_to_all(Region::from_vec(send), recv))?;
    same(&label("all_to_all"), found, (0..world).flat_map(|from| part(from, rank)).collect())?;

    for root in 0..world {
        let buffer = if rank == root { part(root, 3) } else { vec![T::default(); n] };
        let found = finish(c, c.broadcast(Region::from_vec(buffer), root))?;
        same(&label("broadcast"), found, part(root, 3))?;
    }
    Ok(())
}

/// all_reduce and reduce_scatter, on whole numbers so that the order of additions cannot matter.
fn reduces<T: Element + PartialEq + std::fmt::Debug>(
    c: &dyn Collective,
    n: usize,
    make: fn(usize) -> T,
) -> Result<(), String> {
    let (rank, world) = (c.rank(), c.world_size());
    let value = |r: usize, i: usize| (r + 1) * (i % 50 + 1);
    let reduce = |i: usize, op: ReduceOp| {
        let all = (0..world).map(|r| value(r, i));
        make(match op {
            ReduceOp::Sum => all.sum(),
            ReduceOp::Max => all.max().unwrap_or(0),
            ReduceOp::Min => all.min().unwrap_or(0),
        })
    };
    for op in [ReduceOp::Sum, ReduceOp::Max, ReduceOp::Min] {
        let label = |name: &str| format!("rank {rank}: {name} {op:?} of {n} {}", T::DTYPE.name());
        let mine: Vec<T> = (0..n).map(|i| make(value(rank, i))).collect();
        let found = finish(c, c.all_reduce(Region::from_vec(mine), op))?;
        same(&label("all_reduce"), found, (0..n).map(|i| reduce(i, op)).collect())?;

        let mine: Vec<T> = (0..n * world).map(|i| make(value(rank, i))).collect();
        let recv = Region::from_vec(vec![T::default(); n]);
        let found = finish(c, c.reduce_scatter(Region::from_vec(mine), recv, op))?;
        same(&label("reduce_scatter"), found, (rank * n..(rank + 1) * n).map(|i| reduce(i, op)).collect())?;
    }
    Ok(())
}

fn several_in_flight(c: &dyn Collective) -> Result<(), String> {
    let start = |k: i64| c.all_reduce(Region::from_vec(vec![k; 1000]), ReduceOp::Sum);
    let pending: Vec<_> = (0..8).map(start).collect();
    for (k, pending) in pending.into_iter().enumerate().rev() {
        let found: Vec<i64> = finish(c, pending)?;
        same("several in flight", found, vec![(k * c.world_size()) as i64; 1000])?;
    }
    Ok(())
}

fn messages(c: &dyn Collective) -> Result<(), String> {
    let message_of = |rank: usize| vec![rank as u8; rank * 3];
    let found = c.gather_bytes(&message_of(c.rank())).map_err(|error| error.to_string())?;
    same("gather_bytes", found, (0..c.world_size()).map(message_of).collect())
}

fn wrong_sizes(c: &dyn Collective) -> Result<(), String> {
    let region = |n: usize| Region::from_vec(vec![0f32; n]);
    let world = c.world_size();
    let wrong = [
        Op::AllGather { send: Some(region(2)), recv: region(2 * world + 1) },
        Op::AllGather { send: Some(Region::from_vec(vec![0i64; 2])), recv: region(2 * world) },
        Op::ReduceScatter { send: region(3 * world), recv: region(2), op: ReduceOp::Sum },
        Op::AllToAll { send: region(2 * world), recv: region(3 * world) },
        Op::Broadcast { buffer: region(1), root: world },
    ];
    for op in wrong {
        let name = op.name();
        match c.start(op) {
            Err(CollectiveError::Size { .. }) => {}
            Err(other) => return Err(format!("{name} with wrong sizes: {other}")),
            Ok(_) => return Err(format!("{name} with wrong sizes was started")),
        }
    }
    Ok(())
}
