//! The order in which samples are written.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// The order in which samples are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// As the source has them.
    Source,
    /// By class; within a class as the source has them.
    ByLabel,
    /// By name.
    ById,
    /// Shuffled, keyed by a seed: the same on every machine.
    Shuffled(u64),
}

/// The source's row numbers in the order in which they are written; `None` is their own order. Memory: 8 bytes a row.
pub(super) fn permutation(
    order: Order,
    labels: Option<&[i64]>,
    ids: Option<&[String]>,
    rows: usize,
) -> Option<Vec<usize>> {
    let mut permutation: Vec<usize> = (0..rows).collect();
    match (order, labels, ids) {
        (Order::ByLabel, Some(labels), _) => permutation.sort_by_key(|&row| labels[row]),
        (Order::ById, _, Some(ids)) => permutation.sort_by(|&a, &b| ids[a].cmp(&ids[b])),
        (Order::Shuffled(seed), _, _) => permutation.shuffle(&mut ChaCha8Rng::seed_from_u64(seed)),
        _ => return None,
    }
    Some(permutation)
}
