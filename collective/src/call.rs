//! An operation as backends see it: checked, of one form, with its buffers kept.

use crate::{CollectiveError, Dtype, Op, Place, ReduceOp, Region};
use std::ops::Range;

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    AllReduce(ReduceOp),
    ReduceScatter(ReduceOp),
    AllGather,
    AllToAll,
    Broadcast { root: usize },
    Barrier,
}

/// A checked operation on parts of `numel` elements each.
pub(crate) struct Call {
    pub kind: Kind,
    pub name: &'static str,
    pub dtype: Dtype,
    pub place: Place,
    /// Elements of one rank's part.
    pub numel: usize,
    /// Whether it reads where it writes.
    pub in_place: bool,
    send: *mut u8,
    recv: *mut u8,
    result: Region,
    _read: Option<Region>,
}

// SAFETY: the pointers are into the regions, which are Send and live as long.
unsafe impl Send for Call {}

impl Call {
    /// For rank `rank` of a group of `world_size`, which messages call by its number in the whole run.
    ///
    /// # Errors
    /// [`CollectiveError::Size`].
    pub fn new(op: Op, rank: usize, world_size: usize, run_rank: usize) -> Result<Self, CollectiveError> {
        op.check(run_rank, world_size)?;
        let (name, place) = (op.name(), op.place());
        let (kind, read, result, parts) = match op {
            Op::AllReduce { send, recv, op } => (Kind::AllReduce(op), send, recv, 1),
            Op::ReduceScatter { send, recv: Some(recv), op } => (Kind::ReduceScatter(op), Some(send), recv, 1),
            Op::ReduceScatter { send, recv: None, op } => (Kind::ReduceScatter(op), None, send, world_size),
            Op::AllGather { send, recv } => (Kind::AllGather, send, recv, world_size),
            Op::AllToAll { send, recv } => (Kind::AllToAll, Some(send), recv, world_size),
            Op::Broadcast { buffer, root } => (Kind::Broadcast { root }, None, buffer, 1),
            Op::Barrier => (Kind::Barrier, None, Region::empty(), 1),
        };
        let (dtype, numel, buffer) = (result.dtype(), result.numel() / parts, result.as_ptr());
        let own_part = buffer.wrapping_add(rank * numel * dtype.bytes());
        let (send, recv) = match (&read, kind) {
            (Some(read), _) => (read.as_ptr(), buffer),
            (None, Kind::AllGather) => (own_part, buffer),
            (None, Kind::ReduceScatter(_)) => (buffer, own_part),
            (None, _) => (buffer, buffer),
        };
        Ok(Self { kind, name, dtype, place, numel, in_place: read.is_none(), send, recv, result, _read: read })
    }

    /// Whether there is nothing to do, on any rank; a barrier is something.
    pub fn is_empty(&self) -> bool {
        self.numel == 0 && self.kind != Kind::Barrier
    }

    /// Where element `index` of what this rank gives is read: of its part, or of the parts for all ranks one after the
    /// other (reduce_scatter, all_to_all).
    pub fn from(&self, index: usize) -> *mut u8 {
        self.send.wrapping_add(index * self.dtype.bytes())
    }

    /// Where element `index` of what this rank gets is written: of its part, or of the parts of all ranks one after the
    /// other (all_gather, all_to_all).
    pub fn to(&self, index: usize) -> *mut u8 {
        self.recv.wrapping_add(index * self.dtype.bytes())
    }

    /// The ranges of a part, none longer than `longest`.
    pub fn chunks(&self, longest: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let numel = self.numel;
        (0..numel).step_by(longest).map(move |start| start..numel.min(start.saturating_add(longest)))
    }

    /// What the caller gets back. A buffer that was only read is given up.
    pub fn into_result(self) -> Region {
        self.result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_a_part_once_and_none_is_longer_than_asked() {
        for (numel, longest) in [(0, 4), (1, 4), (4, 4), (5, 4), (8, 4), (37, 1), (3, usize::MAX)] {
            let op = Op::AllReduce { send: None, recv: Region::from_vec(vec![0u8; numel]), op: ReduceOp::Sum };
            let chunks: Vec<_> = Call::new(op, 0, 1, 0).unwrap().chunks(longest).collect();
            assert_eq!(chunks.iter().cloned().flatten().collect::<Vec<_>>(), (0..numel).collect::<Vec<_>>());
            assert!(chunks.iter().all(|chunk| !chunk.is_empty() && chunk.len() <= longest), "{numel} by {longest}");
        }
    }
}
