//! What a rank holds at its fullest, by category.

use std::collections::BTreeSet;
use std::ops::Range;

use configs::{Reduction, ReductionDtype, RunConfig};
use serde::Serialize;

use crate::bucket::{Bucket, Groups};
use crate::graph::{Inputs, SegmentCost, segment_cost};
use crate::model::{Dims, Segment};

/// What a rank's process holds before it has a model, and beside it: libtorch's pages, threads, the store's buffers. Measured on the
/// CPU (`./dev bench memory`).
const PROCESS_BYTES: f64 = 170e6;
/// More of it with several ranks: the buffers of MPI.
const MPI_BYTES: f64 = 10e6;
/// What CUDA, its libraries and NCCL hold on a GPU: assumed, not measured.
const CUDA_BYTES: f64 = 1.5e9;
/// What malloc keeps of blocks that were freed and do not serve the next request, in multiples of what the fullest segment takes:
/// found by measurement, with glibc.
const MALLOC_SEGMENTS: f64 = 3.0;
/// Bytes of a row beside its latent.
const ROW_BYTES: usize = 32;

/// Where memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Place {
    /// Where the rank computes: the GPU, or with none the host.
    Device,
    /// Host memory. Where ranks compute on the CPU it is the same memory.
    Host,
}

/// One kind of memory.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Category {
    /// What it holds.
    pub name: &'static str,
    /// Bytes of one rank.
    pub bytes: u64,
    /// Where.
    pub place: Place,
}

/// What a rank holds at its fullest.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Memory {
    /// Of the memory that must not run out: the GPU's, or on the CPU everything.
    pub peak_bytes: u64,
    /// Beside a GPU, of the host's.
    pub host_bytes: u64,
    /// What it consists of.
    pub categories: Vec<Category>,
}

/// Everything about a run that sizes are computed from.
#[derive(Debug, Clone)]
pub struct Sizes {
    /// The model's dimensions.
    pub dims: Dims,
    /// Its segments.
    pub segments: Vec<Segment>,
    /// Their buckets.
    pub buckets: Vec<Bucket>,
    /// What each segment takes for one micro-batch.
    pub costs: Vec<SegmentCost>,
    /// How ranks share what belongs to the weights.
    pub groups: Groups,
}

impl Sizes {
    /// Those of a config on `world_size` ranks, on nodes of `ranks_per_node`.
    pub fn new(config: &RunConfig, dims: &Dims, world_size: usize, ranks_per_node: usize) -> Sizes {
        let segments = crate::model::segments(config, dims);
        let buckets = segments.iter().map(|segment| Bucket::new(segment, config.train.lanes)).collect();
        let mut inputs = Inputs::default();
        let cost = |segment: &Segment| {
            let (cost, next) = segment_cost(segment, dims, config.train.micro_batch, config.train.precision, inputs);
            inputs = next;
            cost
        };
        let costs = segments.iter().map(cost).collect();
        Sizes { dims: dims.clone(), buckets, costs, groups: Groups::of(config, world_size, ranks_per_node), segments }
    }

    /// Parameters, padding left out.
    pub fn params(&self) -> usize {
        self.segments.iter().flat_map(|segment| &segment.params).map(|param| param.numel()).sum()
    }

    /// Parameters that are trained.
    pub fn trained(&self) -> usize {
        let params = self.segments.iter().flat_map(|segment| &segment.params);
        params.filter(|param| param.trainable).map(|param| param.numel()).sum()
    }

    /// Elements of all buckets.
    pub fn numel(&self) -> usize {
        self.buckets.iter().map(|bucket| bucket.numel).sum()
    }

    /// Elements that a rank holds the state of.
    pub fn held(&self) -> usize {
        self.buckets.iter().map(|bucket| self.groups.held(bucket)).sum()
    }

    /// Elements that come to a rank in its group.
    pub fn part(&self) -> usize {
        self.buckets.iter().map(|bucket| self.groups.part(bucket)).sum()
    }

    /// Segments whose activations are kept together or computed twice together, and which of the two; see
    /// `trainer/src/engine/turns.rs`.
    pub(crate) fn units(&self, config: &RunConfig) -> Vec<(Range<usize>, bool)> {
        let (every, mut units) = (config.train.activation_checkpointing, Vec::<(Range<usize>, bool)>::new());
        for segments in self.segments.chunk_by(|a, b| a.prefix == b.prefix) {
            let start = units.last().map_or(0, |(unit, _)| unit.end);
            let again = every > 0 && (units.len() + 1).is_multiple_of(every);
            units.push((start..start + segments.len(), again));
        }
        units
    }

    /// The segments in the order in which a micro-batch computes them, each with whether its weights stay for its next use.
    pub fn uses(&self, config: &RunConfig) -> Vec<(usize, bool)> {
        let backward = |(unit, again): (Range<usize>, bool)| {
            let first = if again { unit.start..unit.end - 1 } else { 0..0 };
            first.map(|index| (index, true)).chain(unit.rev().map(|index| (index, index == 0)))
        };
        let forwards = (0..self.segments.len()).map(|index| (index, index + 1 == self.segments.len()));
        forwards.chain(self.units(config).into_iter().rev().flat_map(backward)).collect()
    }

    /// Elements of the largest buckets that lie beside each other, so many of them.
    fn largest(&self, together: usize) -> usize {
        let sums = self.buckets.windows(together.min(self.buckets.len()).max(1));
        sums.map(|buckets| buckets.iter().map(|bucket| bucket.numel).sum()).max().unwrap_or(0)
    }

    /// Elements of the buckets that are gathered at a time, at the most, where ranks share out weights: that of a turn, the next, and
    /// what stays.
    fn most_gathered(&self, config: &RunConfig) -> usize {
        let uses = self.uses(config);
        let (mut here, mut most) = (BTreeSet::new(), 0);
        for (place, (index, stays)) in uses.iter().enumerate() {
            here.extend([*index, uses[(place + 1) % uses.len()].0]);
            most = most.max(here.iter().map(|index| self.buckets[*index].numel).sum());
            if !stays {
                here.remove(index);
            }
        }
        most
    }

    /// Elements of the buffers in which sums over ranks come in, see `trainer/src/engine/reducer.rs`; bytes.
    pub fn exchange_bytes(&self, config: &RunConfig) -> usize {
        let Groups { shards, replicas, .. } = self.groups;
        let in_group = if self.groups.sharding >= configs::Sharding::Gradients { 1 } else { shards };
        let room = |numel: usize, count: usize| match (count, config.reduction, config.reduction_dtype) {
            (1, ..) => 0,
            (_, Reduction::Invariant, _) => 4 * numel,
            (_, Reduction::Fast, ReductionDtype::Fp32) => 4 * (numel / count),
            (_, Reduction::Fast, ReductionDtype::Bf16) => 2 * (numel / count),
        };
        let of_bucket = |bucket: &Bucket| room(bucket.numel, in_group) + room(self.groups.part(bucket), replicas);
        self.buckets.iter().map(of_bucket).sum()
    }

    /// What autograd and the tape hold at the beginning of the backward pass, or of that of the segment that needs most.
    pub fn activation_bytes(&self, config: &RunConfig) -> f64 {
        let (mut below, mut most) = (0.0f64, 0.0f64);
        let mut units = self.units(config).into_iter().peekable();
        while let Some((unit, again)) = units.next() {
            let (mut here, mut output) = (below, 0.0);
            for index in unit.clone() {
                let cost = &self.costs[index];
                // An input is kept for a backward pass, or to compute again from.
                let trained = self.costs.get(index + 1).is_none_or(|next| next.requires_grad);
                let starts_unit = index + 1 == unit.end && units.peek().is_some_and(|(_, again)| *again);
                output = if trained || starts_unit { cost.output_bytes } else { 0.0 };
                here += cost.kept_bytes + output;
                most = most.max(here + cost.backward_bytes);
            }
            below = if again { below + output } else { here };
        }
        let latents = 4 * config.train.micro_batch * self.dims.in_channels * self.dims.input_size.pow(2);
        most + 5.0 * latents as f64
    }

    /// What validation and sample grids take between two steps: the averaged weights, gathered, and a segment's forward pass. The VAE of
    /// the grids and the network of FID are not in it.
    fn between_steps_bytes(&self, config: &RunConfig) -> f64 {
        let batches = [
            config
                .validation
                .as_ref()
                .filter(|validation| validation.every_steps > 0)
                .map(|validation| validation.batch),
            // With guidance every sample is computed twice.
            (config.sample.every_steps > 0).then_some(2 * config.sample.batch),
            config.fid.as_ref().map(|_| 2 * config.sample.batch),
        ];
        let Some(batch) = batches.into_iter().flatten().max() else { return 0.0 };
        let inside = self.costs.iter().map(|cost| cost.kept_bytes + cost.output_bytes).fold(0.0, f64::max);
        // Without a graph about half of what it would keep is there at a time.
        4.0 * self.numel() as f64 + 0.5 * inside * batch as f64 / config.train.micro_batch as f64
    }

    /// What the fullest segment takes in its backward pass: activations and gradients.
    fn segment_bytes(&self) -> f64 {
        let of_segment = |(segment, cost): (&Segment, &SegmentCost)| {
            let trained = segment.params.iter().filter(|param| param.trainable).map(|param| param.numel());
            cost.kept_bytes + cost.output_bytes + cost.backward_bytes + 4.0 * trained.sum::<usize>() as f64
        };
        self.segments.iter().zip(&self.costs).map(of_segment).fold(0.0, f64::max)
    }

    /// What a rank holds.
    pub fn memory(&self, config: &RunConfig, world_size: usize, on_gpu: bool) -> Memory {
        let groups = &self.groups;
        let averages = 1 + config.ema.further_decays.len() + config.ema.power.len();
        let (numel, held) = (self.numel(), self.held());
        let is_rounded = config.reduction == Reduction::Fast && config.reduction_dtype == ReductionDtype::Bf16;
        let weights = if groups.shares_out_weights() { held + self.most_gathered(config) } else { numel };
        let part = self.part();
        let sums = groups.sum_buffers(config.reduction) * if groups.shares_out_gradients() { part } else { numel };
        // A segment's gradients, before they are added to the sums.
        let gradients = 4 * (sums + self.largest(1)) + if is_rounded && world_size > 1 { 4 * held } else { 0 };
        let on_the_way = match groups.shares_out_gradients() {
            true => 2 * 2 * 4 * self.largest(1),
            false if is_rounded && world_size > 1 => 2 * self.largest(2),
            false => 0,
        };
        let latent = self.dims.in_channels * self.dims.input_size.pow(2);
        let batch = config.train.micro_batch * (4 * latent + ROW_BYTES);
        let all_batches = (config.train.steps.min(1 << 20) as usize).saturating_mul(groups.lanes_per_rank * batch);
        let read_ahead = (config.data.prefetch_bytes as usize).max(batch).min(all_batches);
        let held_out = config.validation.as_ref().filter(|validation| validation.every_steps > 0);
        let held_out = held_out.map_or(0, |validation| 4 * latent * validation.rows.div_ceil(world_size));
        let process = PROCESS_BYTES + if world_size > 1 { MPI_BYTES } else { 0.0 };
        let device = |name, bytes: usize| Category { name, bytes: bytes as u64, place: Place::Device };
        let host = |name, bytes: usize| Category { name, bytes: bytes as u64, place: Place::Host };
        let mut categories = vec![
            device("weights", 4 * weights),
            device("gradients", gradients),
            device("moments", 8 * held),
            device("ema", 4 * averages * held),
            device("activations", self.activation_bytes(config) as usize),
            // What a step does not need anyway.
            device(
                "between steps",
                (self.between_steps_bytes(config) - self.activation_bytes(config)).max(0.0) as usize,
            ),
            device("buffers", self.exchange_bytes(config) + on_the_way),
            host("checkpoint", 4 * groups.snapshot(&self.buckets, 1 + averages, 2)),
            host("data", held_out + read_ahead + groups.lanes_per_rank * batch),
            host("process", process as usize),
        ];
        categories.push(match on_gpu {
            true => device("cuda", CUDA_BYTES as usize),
            false => host("allocator", (MALLOC_SEGMENTS * self.segment_bytes()) as usize),
        });
        let of = |place: Place| categories.iter().filter(|c| c.place == place).map(|c| c.bytes).sum::<u64>();
        let (device, host) = (of(Place::Device), of(Place::Host));
        let (peak_bytes, host_bytes) = if on_gpu { (device, host) } else { (device + host, 0) };
        Memory { peak_bytes, host_bytes, categories }
    }
}
