//! How long a step takes, by what it computes and sends.

use configs::RunConfig;
use serde::Serialize;

use crate::hardware::Hardware;
use crate::memory::Sizes;
use crate::wire::Wire;

/// Bytes that AdamW reads and writes of an element, and an average.
const ADAMW_BYTES: f64 = 28.0;
const AVERAGE_BYTES: f64 = 12.0;

/// Seconds of a step, and what follows.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Time {
    /// Floating-point operations of a step, of all ranks.
    pub flops: f64,
    /// Forward and backward of a rank's lanes.
    pub compute_s: f64,
    /// Gradients and weights on the wire.
    pub wire_s: f64,
    /// What of it nothing else hides.
    pub exposed_wire_s: f64,
    /// AdamW and averages.
    pub update_s: f64,
    /// A step.
    pub step_s: f64,
    /// Samples a second, of all ranks.
    pub samples_per_s: f64,
    /// All steps of the run, without checkpoints and validation.
    pub days: f64,
}

impl Sizes {
    /// Operations of a rank's lane in a step: [float32, bfloat16], and bytes that everything else reads and writes.
    pub fn lane_work(&self, config: &RunConfig) -> ([f64; 2], f64) {
        let (mut flops, mut traffic) = ([0.0; 2], 0.0);
        for (unit, again) in self.units(config) {
            let again = if again { 1.0 } else { 0.0 };
            for cost in &self.costs[unit] {
                for (kind, sum) in flops.iter_mut().enumerate() {
                    *sum += (1.0 + again) * cost.forward_flops[kind] + cost.backward_flops[kind];
                }
                traffic += (3.0 + again) * cost.forward_traffic;
            }
        }
        (flops, traffic)
    }

    /// A step's time on such hardware. What a rank sends goes over the node's links, what leaves a node through its interfaces;
    /// gradients travel while lanes are run backwards (in the last lane only, where they travel once a step), weights while they are
    /// run forwards or, where they are shared out, both ways; a third of them may go behind the gradients. The slower of the two counts, and
    /// after it the update.
    pub fn time(&self, config: &RunConfig, hardware: &Hardware, wire: &Wire, world_size: usize) -> Time {
        let lanes = self.groups.lanes_per_rank as f64;
        let threads = if hardware.memory_bytes.is_none() { config.train.threads_per_rank as f64 } else { 1.0 };
        let ([fp32, bf16], traffic) = self.lane_work(config);
        let fp32_rate = if config.train.tf32 { hardware.flops_tf32 } else { hardware.flops_fp32 };
        let products = fp32 / fp32_rate + bf16 / hardware.flops_bf16;
        let memory_rate = hardware.memory_bytes_per_s * hardware.achieved_memory;
        let lane_s = match hardware.measured_s_per_sample {
            Some(seconds) => seconds * config.train.micro_batch as f64,
            None => products / threads / hardware.achieved_flops + traffic / memory_rate,
        };
        let compute_s = lanes * lane_s;
        let share = hardware.achieved_wire;
        let seconds = |per_rank: u64, per_node: u64| {
            let inside = per_rank as f64 / (hardware.link_bytes_per_s * share);
            let between = per_node as f64 / (hardware.nics_per_node as f64 * hardware.nic_bytes_per_s * share);
            inside.max(between)
        };
        let gradients_s = seconds(wire.gradients_bytes_per_rank, wire.gradients_bytes_per_node);
        let weights_s = seconds(wire.weights_bytes_per_rank, wire.weights_bytes_per_node);
        // A backward pass takes two thirds of a lane.
        let backwards = if self.groups.shares_out_gradients() { lanes } else { 1.0 } * lane_s * 2.0 / 3.0;
        let forwards = if self.groups.shares_out_weights() { compute_s } else { lane_s / 3.0 };
        let ahead_s = if self.groups.updates_ahead(config) { weights_s / 3.0 } else { 0.0 };
        let behind_gradients = (backwards - gradients_s).clamp(0.0, ahead_s);
        let exposed_wire_s = (gradients_s - backwards).max(0.0) + (weights_s - behind_gradients - forwards).max(0.0);
        let averages = (1 + config.ema.further_decays.len() + config.ema.power.len()) as f64;
        let update_s = self.held() as f64 * (ADAMW_BYTES + AVERAGE_BYTES * averages) / memory_rate;
        let step_s = compute_s + exposed_wire_s + update_s;
        Time {
            flops: (fp32 + bf16) * lanes * world_size as f64,
            compute_s,
            wire_s: gradients_s + weights_s,
            exposed_wire_s,
            update_s,
            step_s,
            samples_per_s: config.global_batch() as f64 / step_s,
            days: step_s * config.train.steps as f64 / 86_400.0,
        }
    }
}
