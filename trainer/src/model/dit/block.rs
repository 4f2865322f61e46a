//! A transformer block of any design, as two segments: the gradients of one half are on the wire while the other computes, and the
//! chain waits for the weights of a half at a time.

use super::DitConfig;
use crate::model::{Flow, ParamSpec, Probe, Segment, Weights};
use tch::Tensor;

/// Which half of a block.
#[derive(Clone, Copy)]
pub(super) enum Part {
    /// All that comes before the MLP's branch.
    Attention,
    Mlp,
}

/// What a design makes of a half.
pub(super) struct Half {
    pub params: fn(&DitConfig) -> Vec<ParamSpec>,
    /// The state after it, the tokens first, from the state before and the context of `enter`.
    pub forward: fn(&DitConfig, &Weights, &Flow, Probe) -> Vec<Tensor>,
}

/// Half of the block that `prefix` names; what it computes is its design's.
pub(super) struct HalfBlock {
    pub config: DitConfig,
    pub prefix: String,
    pub part: Part,
}

impl HalfBlock {
    fn design(&self) -> &'static Half {
        let design = self.config.design();
        match self.part {
            Part::Attention => &design.attention,
            Part::Mlp => &design.mlp,
        }
    }
}

impl Segment for HalfBlock {
    fn prefix(&self) -> &str {
        &self.prefix
    }

    fn params(&self) -> Vec<ParamSpec> {
        (self.design().params)(&self.config)
    }

    fn forward(&self, w: &Weights, input: &Flow, probe: Probe) -> Flow {
        let mut see = |name: &str, tensor: &_| probe(&format!("{}{name}", self.prefix), tensor);
        let state = (self.design().forward)(&self.config, w, input, &mut see);
        if matches!(self.part, Part::Mlp) {
            see("", &state[0]);
        }
        Flow { state, context: Vec::new() }
    }
}
