//! A transformer block of any design, as three segments: attention, and the two layers of the MLP. The gradients of one are on the wire
//! while the next computes, and the chain waits for the weights of one at a time.

use super::DitConfig;
use super::layers::{fc2, fc2_params};
use crate::model::{Flow, ParamSpec, Probe, Segment, Weights};
use tch::Tensor;

/// What a design makes of a part of its block.
pub(super) struct Part {
    pub params: fn(&DitConfig) -> Vec<ParamSpec>,
    /// The state after it, the tokens first, from the state before and the context of `enter`.
    pub forward: fn(&DitConfig, &Weights, &Flow, Probe) -> Vec<Tensor>,
}

/// The parts of a block in their order.
pub(super) struct Parts {
    /// All that comes before the MLP's branch.
    pub attention: Part,
    /// From the tokens to the middle of the MLP; the tokens go on beside it.
    pub fc1: Part,
    /// From the middle of the MLP to the tokens.
    pub fc2: Part,
}

/// The last part where the branch has no gate: x += fc2(hidden).
pub(super) const UNGATED_FC2: Part = Part {
    params: fc2_params,
    forward: |_, w, input, see| {
        let [x, hidden] = &input.state[..] else { panic!("fc2 takes tokens and the MLP's middle") };
        vec![x + fc2(w, hidden, see)]
    },
};

/// Part `number` of the block that `prefix` names; what it computes is its design's.
pub(super) struct BlockPart {
    config: DitConfig,
    prefix: String,
    number: usize,
}

impl BlockPart {
    /// All parts of block `index`.
    pub fn of_block(config: &DitConfig, index: i64) -> [Box<dyn Segment>; 3] {
        std::array::from_fn(|number| -> Box<dyn Segment> {
            Box::new(Self { config: config.clone(), prefix: format!("blocks.{index}."), number })
        })
    }

    fn part(&self) -> &'static Part {
        let parts = &self.config.design().block;
        [&parts.attention, &parts.fc1, &parts.fc2][self.number]
    }
}

impl Segment for BlockPart {
    fn prefix(&self) -> &str {
        &self.prefix
    }

    fn params(&self) -> Vec<ParamSpec> {
        (self.part().params)(&self.config)
    }

    fn forward(&self, w: &Weights, input: &Flow, probe: Probe) -> Flow {
        let mut see = |name: &str, tensor: &_| probe(&format!("{}{name}", self.prefix), tensor);
        let state = (self.part().forward)(&self.config, w, input, &mut see);
        if self.number == 2 {
            see("", &state[0]);
        }
        Flow { state, context: Vec::new() }
    }
}
