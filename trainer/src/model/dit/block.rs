//! A transformer block of any design.

use super::DitConfig;
use crate::model::{Flow, ParamSpec, Probe, Segment, Weights};

/// Block number `prefix` names; what it computes is its design's.
pub(super) struct Block {
    pub config: DitConfig,
    pub prefix: String,
}

impl Segment for Block {
    fn prefix(&self) -> &str {
        &self.prefix
    }

    fn params(&self) -> Vec<ParamSpec> {
        (self.config.design().block_params)(&self.config)
    }

    fn forward(&self, w: &Weights, input: &Flow, probe: Probe) -> Flow {
        let mut see = |name: &str, tensor: &_| probe(&format!("{}{name}", self.prefix), tensor);
        let x = (self.config.design().block)(&self.config, w, input, &mut see);
        see("", &x);
        Flow { state: vec![x], context: Vec::new() }
    }
}
