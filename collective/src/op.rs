use crate::{CollectiveError, Place, Region};

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

/// A collective operation with its buffers. All buffers of one operation have one element type and are in one place.
pub enum Op {
    /// Both have n elements.
    AllReduce {
        /// Read; `None`: what is in `recv` is read.
        send: Option<Region>,
        /// Written.
        recv: Region,
        /// How.
        op: ReduceOp,
    },
    /// `send` has world_size × n elements, `recv` n.
    ReduceScatter {
        /// Read. Without `recv` the result is in this rank's part of it, and its other parts hold anything.
        send: Region,
        /// Written.
        recv: Option<Region>,
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

    /// Where the buffers are; that of the first when they differ. A barrier is the host's.
    pub fn place(&self) -> Place {
        match self {
            Op::AllReduce { recv: region, .. }
            | Op::ReduceScatter { send: region, .. }
            | Op::AllGather { recv: region, .. }
            | Op::AllToAll { recv: region, .. }
            | Op::Broadcast { buffer: region, .. } => region.place(),
            Op::Barrier => Place::Host,
        }
    }

    /// Checks sizes, element types and places for a world.
    ///
    /// # Errors
    /// [`CollectiveError::Size`].
    pub fn check(&self, rank: usize, world_size: usize) -> Result<(), CollectiveError> {
        let wrong =
            |found: String, expected: String| Err(CollectiveError::Size { rank, op: self.name(), found, expected });
        // `small` and `large` hold `small_parts` and `large_parts` parts of equal length.
        let fit = |(name, small, parts): (&str, &Region, usize),
                   (large_name, large, large_parts): (&str, &Region, usize)| {
            if small.dtype() != large.dtype() {
                return wrong(
                    format!("`{name}` of {}", small.dtype().name()),
                    format!("the element type of `{large_name}`, {}", large.dtype().name()),
                );
            }
            if small.place() != large.place() {
                return wrong(
                    format!("`{name}` in {}", small.place()),
                    format!("the place of `{large_name}`, {}", large.place()),
                );
            }
            let part = large.numel() / large_parts;
            if large.numel() % large_parts != 0 || part.checked_mul(parts) != Some(small.numel()) {
                let times = |parts: usize| if parts == 1 { "n".to_owned() } else { format!("world size {parts} × n") };
                return wrong(
                    format!("`{name}` of {} and `{large_name}` of {} elements", small.numel(), large.numel()),
                    format!("`{name}` of {} and `{large_name}` of {} elements", times(parts), times(large_parts)),
                );
            }
            Ok(())
        };
        match self {
            Op::AllReduce { send: Some(send), recv, .. } => fit(("send", send, 1), ("recv", recv, 1)),
            Op::ReduceScatter { send, recv: Some(recv), .. } => fit(("recv", recv, 1), ("send", send, world_size)),
            Op::AllGather { send: Some(send), recv } => fit(("send", send, 1), ("recv", recv, world_size)),
            Op::AllToAll { send, recv } => fit(("send", send, world_size), ("recv", recv, world_size)),
            Op::ReduceScatter { send: whole, recv: None, .. } | Op::AllGather { send: None, recv: whole }
                if whole.numel() % world_size != 0 =>
            {
                wrong(
                    format!("a buffer of {} elements", whole.numel()),
                    format!("a multiple of the world size {world_size}"),
                )
            }
            Op::Broadcast { root, .. } if *root >= world_size => {
                wrong(format!("root {root}"), format!("a rank below {world_size}"))
            }
            _ => Ok(()),
        }
    }
}
