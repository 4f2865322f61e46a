//! What a run will take, computed from its config: memory of a rank by category, bytes on the wire, time. No tensor is made; the trainer's
//! tests hold these sizes against what it allocates, and `./dev bench memory` against what Linux counts.
//!
//! | module | what |
//! |---|---|
//! | [`model`] | the parameters of every segment |
//! | [`bucket`] | flat buffers, and how much of them a rank holds |
//! | [`graph`] | what autograd keeps of a segment, and how much it computes |
//! | [`memory`] | what a rank holds at its fullest |
//! | [`mod@wire`] | bytes between ranks |
//! | [`hardware`] | what machines can do |
//! | [`time`] | seconds of a step |
//! | [`fit`] | what to change where memory does not suffice |

pub mod bucket;
pub mod fit;
pub mod graph;
pub mod hardware;
pub mod memory;
pub mod model;
pub mod time;
pub mod wire;

pub use fit::{Change, changes};
pub use hardware::{Hardware, HardwareError};
pub use memory::{Category, Memory, Place, Sizes};
pub use model::{DataDims, Dims};
pub use time::Time;
pub use wire::Wire;

use configs::RunConfig;

/// The machines that ranks run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machines {
    /// Nodes.
    pub nodes: usize,
    /// Ranks on each.
    pub ranks_per_node: usize,
    /// Whether each rank computes on a GPU.
    pub on_gpu: bool,
}

/// What a run will take.
#[derive(Debug, Clone, PartialEq)]
pub struct Estimate {
    /// Parameters of the model.
    pub params: usize,
    /// Those that are trained.
    pub trained: usize,
    /// What a rank holds.
    pub memory: Memory,
    /// What a step sends.
    pub wire: Wire,
    /// What a step takes.
    pub time: Time,
}

impl Estimate {
    /// Of a config on such machines.
    pub fn new(config: &RunConfig, dims: &Dims, machines: &Machines, hardware: &Hardware) -> Estimate {
        let world_size = machines.nodes * machines.ranks_per_node;
        let sizes = Sizes::new(config, dims, world_size, machines.ranks_per_node);
        let wire = wire::wire(&sizes, config, machines.nodes, machines.ranks_per_node, hardware.nics_per_node);
        let time = sizes.time(config, hardware, &wire, world_size);
        let memory = sizes.memory(config, world_size, machines.on_gpu);
        Estimate { params: sizes.params(), trained: sizes.trained(), memory, wire, time }
    }
}

#[cfg(test)]
mod tests;
