use crate::{CollectiveError, Region};

/// How elements of several ranks become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReduceOp {
    /// Addition, in the backend's order.
    Sum,
    /// The largest.
    Max,
    /// The smallest.
    Min,
}

/// A collective operation with its buffers.
pub enum Op {
    /// In place over `buffer`.
    AllReduce {
        /// Read and written.
        buffer: Region,
        /// How.
        op: ReduceOp,
    },
    /// `send` has world_size × n elements, `recv` n.
    ReduceScatter {
        /// Read.
        send: Region,
        /// Written.
        recv: Region,
        /// How.
        op: ReduceOp,
    },
    /// `send` has n elements (or is this rank's part of `recv`), `recv` world_size × n.
    AllGather {
        /// Read; `None` when this rank's part is in its place in `recv`.
        send: Option<Region>,
        /// Written.
        recv: Region,
    },
    /// Both have world_size × n elements.
    AllToAll {
        /// Read.
        send: Region,
        /// Written.
        recv: Region,
    },
    /// From `root` to all.
    Broadcast {
        /// Read on `root`, written elsewhere.
        buffer: Region,
        /// Whose.
        root: usize,
    },
    /// No data.
    Barrier,
}

impl Op {
    /// The operation's name in the standard.
    pub fn name(&self) -> &'static str {
        match self {
            Op::AllReduce { .. } => "all_reduce",
            Op::ReduceScatter { .. } => "reduce_scatter",
            Op::AllGather { .. } => "all_gather",
            Op::AllToAll { .. } => "all_to_all",
            Op::Broadcast { .. } => "broadcast",
            Op::Barrier => "barrier",
        }
    }

    /// The result of an operation that has no data to move (a barrier is not one), or the operation itself.
    ///
    /// # Errors
    /// The operation, when there is something to do.
    pub fn into_result_if_empty(self) -> Result<Region, Op> {
        match self {
            Op::AllReduce { buffer: recv, .. }
            | Op::Broadcast { buffer: recv, .. }
            | Op::ReduceScatter { recv, .. }
            | Op::AllGather { recv, .. }
            | Op::AllToAll { recv, .. }
                if recv.numel() == 0 =>
            {
                Ok(recv)
            }
            op => Err(op),
        }
    }

    /// Checks sizes and element types for a world; every backend calls it first.
    ///
    /// # Errors
    /// [`CollectiveError::Size`].
    pub fn check(&self, rank: usize, world_size: usize) -> Result<(), CollectiveError> {
        let wrong =
            |found: String, expected: String| Err(CollectiveError::Size { rank, op: self.name(), found, expected });
        let part_of_whole = |part: &Region, whole: &Region, part_name: &str, whole_name: &str| {
            if part.dtype() != whole.dtype() {
                return wrong(
                    format!("`{part_name}` of {}", part.dtype().name()),
                    format!("the element type of `{whole_name}`, {}", whole.dtype().name()),
                );
            }
            if part.numel().checked_mul(world_size) != Some(whole.numel()) {
                return wrong(
                    format!("`{part_name}` of {} and `{whole_name}` of {} elements", part.numel(), whole.numel()),
                    format!("`{whole_name}` = `{part_name}` × world size {world_size}"),
                );
            }
            Ok(())
        };
        match self {
            Op::ReduceScatter { send, recv, .. } => part_of_whole(recv, send, "recv", "send"),
            Op::AllGather { send: Some(send), recv } => part_of_whole(send, recv, "send", "recv"),
            Op::AllGather { send: None, recv } if recv.numel() % world_size != 0 => wrong(
                format!("`recv` of {} elements", recv.numel()),
                format!("a multiple of the world size {world_size}"),
            ),
            Op::AllToAll { send, recv } => {
                if send.dtype() != recv.dtype() || send.numel() != recv.numel() || send.numel() % world_size != 0 {
                    return wrong(
                        format!(
                            "`send` of {} {} and `recv` of {} {}",
                            send.numel(),
                            send.dtype().name(),
                            recv.numel(),
                            recv.dtype().name()
                        ),
                        format!("equal types and sizes, a multiple of the world size {world_size}"),
                    );
                }
                Ok(())
            }
            Op::Broadcast { root, .. } if *root >= world_size => {
                wrong(format!("root {root}"), format!("a rank below {world_size}"))
            }
            _ => Ok(()),
        }
    }
}
