//! The crate `estimate` computes sizes without tensors. Here they are held against what the engine makes and sends.
#![allow(clippy::unwrap_used)]

use super::bucket::{Bucket, BucketLayout, Buckets};
use super::mesh::Mesh;
use super::ranks::Ranks;
use super::snapshot::Snapshot;
use super::turns::{Turn, Turns};
use super::wire::Summation;
use super::{gradients, weights};
use crate::ema::Average;
use crate::model::dit::{Dit, DitConfig};
use crate::model::{Model, ParamSpec, Segment, freeze::freeze, lora::adapt};
use collective::{Collective, CollectiveError, Op, Pending};
use configs::RunConfig;
use estimate::{Dims, Sizes};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tch::Device;

fn config(overrides: &[&str]) -> RunConfig {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("run.toml");
    let text = "run.url = \"/r\"\ndata.url = \"/d\"\n[model]\nhidden_size = 36\ndepth = 3\nnum_heads = 3\npatch_size = 2\ninput_size = 8\n\
                in_channels = 4\nnum_classes = 7\n[train]\nsteps = 7\nlanes = 8\nmicro_batch = 2\n";
    std::fs::write(&file, text).unwrap();
    let overrides: Vec<String> = overrides.iter().map(|text| text.to_string()).collect();
    RunConfig::load(&file, &overrides).unwrap()
}

fn dims(config: &RunConfig) -> Dims {
    Dims::of(config, estimate::DataDims { input_size: 8, in_channels: 4, num_classes: 7 })
}

fn model(config: &RunConfig) -> Arc<dyn Model> {
    let m = &config.model;
    let side = |side: Option<usize>| side.unwrap() as i64;
    let dit = DitConfig {
        input_size: side(m.input_size),
        in_channels: side(m.in_channels),
        patch_size: m.patch_size as i64,
        hidden_size: m.hidden_size as i64,
        depth: m.depth as i64,
        num_heads: m.num_heads as i64,
        mlp_ratio: m.mlp_ratio,
        class_dropout_prob: m.class_dropout_prob,
        num_classes: side(m.num_classes),
        learn_sigma: m.learn_sigma,
        conditioning: m.conditioning,
        numerics: m.numerics.into(),
    };
    let base: Arc<dyn Model> = Arc::new(Dit::new(dit).unwrap());
    let adapted = config.lora.as_ref().map_or(base.clone(), |lora| adapt(base, lora).unwrap());
    freeze(adapted, &config.train.freeze).unwrap()
}

const MODELS: [&[&str]; 9] = [
    &[],
    &["model.conditioning=adaln", "model.learn_sigma=false"],
    &["model.conditioning=in-context", "model.class_dropout_prob=0", "model.mlp_ratio=2.5"],
    &["model.conditioning=cross-attention", "model.patch_size=4"],
    &["train.freeze=[\"*.bias\", \"blocks.1.*\"]"],
    &["lora.rank=3", "lora.alpha=3", "lora.targets=[\"attn.qkv\", \"final_layer.linear\"]"],
    &[
        "lora.rank=2",
        "lora.alpha=3",
        "lora.targets=[\"mlp.*\"]",
        "lora.also_train=[\"y_embedder.*\"]",
        "train.freeze=[\"blocks.0.*\"]",
    ],
    &["diffusion.objective=flow", "model.learn_sigma=false", "ema.further_decays=[0.5]", "ema.power=[0.1]"],
    &["model.preset=DiT-B/4", "model.depth=2", "model.input_size=32", "model.num_classes=1000"],
];

#[test]
fn parameters_and_buckets_are_those_of_the_estimate() {
    for overrides in MODELS {
        let config = config(overrides);
        let (model, sizes) = (model(&config), Sizes::new(&config, &dims(&config), 1, 1));
        let of_segment = |segment: &dyn Segment| {
            let full = |spec: ParamSpec| (format!("{}{}", segment.prefix(), spec.name), spec.shape, spec.trainable);
            segment.params().into_iter().map(full).collect::<Vec<_>>()
        };
        let made: Vec<_> = model.segments().iter().flat_map(|segment| of_segment(&**segment)).collect();
        let declared = sizes.segments.iter().flat_map(|segment| &segment.params);
        let declared =
            declared.map(|p| (p.name.clone(), p.shape.iter().map(|&side| side as i64).collect(), p.trainable));
        assert_eq!(declared.collect::<Vec<_>>(), made, "{overrides:?}");
        assert_eq!(sizes.params(), model.numel());
        for lanes in [1, 8, 128] {
            let made = model.segments().iter().map(|segment| BucketLayout::new(&**segment, lanes).numel);
            let made: Vec<usize> = made.collect();
            let estimated = sizes.segments.iter().map(|segment| estimate::bucket::Bucket::new(segment, lanes).numel);
            assert_eq!(estimated.collect::<Vec<_>>(), made, "{overrides:?}, {lanes} lanes");
        }
    }
}

#[test]
fn products_are_those_that_the_model_counts() {
    for overrides in MODELS.iter().filter(|overrides| !overrides.iter().any(|pair| pair.contains("lora"))) {
        let config = config(overrides);
        let (model, sizes) = (model(&config), Sizes::new(&config, &dims(&config), 1, 1));
        let flops: f64 = sizes.costs.iter().map(|cost| cost.forward_flops[0]).sum();
        let counted = 2.0 * config.train.micro_batch as f64 * model.macs_per_sample() as f64;
        // Which has an element of a norm as one.
        assert!(flops <= counted && flops > 0.95 * counted, "{overrides:?}: {flops} and {counted}");
    }
}

/// One of several ranks, whose operations are done at once and move nothing.
struct Counting {
    world_size: usize,
    rank: usize,
    /// Sizes of the worlds that [`Collective::split`] makes, in this order.
    splits: Mutex<Vec<usize>>,
    sent: Arc<AtomicUsize>,
}

impl Collective for Counting {
    fn backend(&self) -> &'static str {
        "counting"
    }
    fn rank(&self) -> usize {
        self.rank
    }
    fn world_size(&self) -> usize {
        self.world_size
    }
    fn local_rank(&self) -> usize {
        self.rank
    }
    fn local_size(&self) -> usize {
        self.world_size
    }
    fn deadline(&self) -> Duration {
        Duration::from_secs(60)
    }

    fn start(&self, op: Op) -> Result<Pending, CollectiveError> {
        op.check(self.rank, self.world_size)?;
        let (pending, completer) = Pending::new(self.rank, op.name());
        let (bytes, result) = match op {
            Op::ReduceScatter { send, recv: Some(recv), .. } => (send.len_bytes(), recv),
            Op::AllGather { recv, .. } | Op::AllToAll { recv, .. } => (recv.len_bytes(), recv),
            _ => panic!("gradients and weights move by other operations"),
        };
        self.sent.fetch_add(bytes - bytes / self.world_size, Ordering::Relaxed);
        completer.complete(Ok(result));
        Ok(pending)
    }

    fn split(&self, _: usize, key: usize) -> Result<Box<dyn Collective>, CollectiveError> {
        let world_size = self.splits.lock().unwrap().remove(0);
        Ok(Box::new(Self { world_size, rank: key, splits: Mutex::default(), sent: self.sent.clone() }))
    }

    fn abort(&self, code: i32) -> ! {
        panic!("aborted with {code}")
    }
}

/// Makes everything that `rank` has, moves what a step moves, and compares both with the estimate. Gives what a checkpoint copies.
fn compare(config: &RunConfig, rank: usize, world_size: usize) -> usize {
    let (model, train) = (model(config), &config.train);
    let sizes = Sizes::new(config, &dims(config), world_size, world_size);
    let place = Mesh::under(config.reduction, rank, world_size, train.lanes, train.sharding, train.sharding_ranks);
    let mesh = place.unwrap().over_nodes(config.collective.node_ranks.unwrap_or(world_size));
    let case = format!("{mesh:?}, {:?}", config.reduction);
    let averages = Average::of_config(&config.ema);
    let buckets = Buckets::zeroed(&*model, &mesh, averages.len(), Device::Cpu).unwrap();
    let sum = |numel: &dyn Fn(&Bucket) -> usize| buckets.0.iter().map(numel).sum::<usize>();
    assert_eq!(sum(&|bucket| bucket.exp_avg.numel() + bucket.exp_avg_sq.numel()), 2 * sizes.held(), "{case}");
    assert_eq!(
        sum(&|bucket| bucket.averages.iter().map(|average| average.numel()).sum()),
        averages.len() * sizes.held()
    );
    assert_eq!(
        sum(&|bucket| bucket.held.numel()),
        if mesh.shares_out_weights() { sizes.held() } else { sum(&|b| b.shard.len()) }
    );
    assert_eq!(buckets.numel(), sizes.numel());
    assert_eq!(sizes.groups.shares_out_weights(), mesh.shares_out_weights());

    let sent = Arc::new(AtomicUsize::new(0));
    let splits = Mutex::new(vec![mesh.shards, mesh.replicas]);
    let all = Arc::new(Counting { world_size, rank, splits, sent: sent.clone() });
    let ranks = Arc::new(Ranks::connect(all, mesh, Summation::of_config(config)).unwrap());
    let mut gradients = gradients::sum(ranks.clone(), &buckets.0);
    let turns = Turns::new(&*model, train.activation_checkpointing);
    assert_eq!(sizes.uses(config), turns.uses(), "{case}");
    let mut weights = weights::source(ranks, &turns);
    let [sums, received] = gradients.held_bytes();
    let summed = if sizes.groups.shares_out_gradients() { sizes.part() } else { sizes.numel() };
    assert_eq!(sums, 4 * summed * sizes.groups.sum_buffers(config.reduction), "{case}");
    assert_eq!(received, sizes.exchange_bytes(config), "{case}");
    for _ in 0..mesh.lanes_per_rank() {
        for index in 0..buckets.0.len() {
            weights.acquire(&buckets.0, index).unwrap();
            weights.release(&buckets.0, index).unwrap();
        }
        for turn in &turns.backward {
            let (index, bucket) = (turn.segment(), &buckets.0[turn.segment()]);
            weights.acquire(&buckets.0, index).unwrap();
            weights.release(&buckets.0, index).unwrap();
            if let Turn::Backward(_) = turn {
                gradients.push(bucket, index, bucket.trainable.iter().map(|_| None).collect()).unwrap();
            }
        }
    }
    gradients.finish(mesh.lanes, &mut |_, _| ()).unwrap();
    (0..buckets.0.len()).for_each(|index| weights.publish(&buckets.0, index).unwrap());
    weights.settle(&buckets.0).unwrap();
    let wire = estimate::wire::wire(&sizes, config, 1, world_size, 1);
    let estimated = wire.gradients_bytes_per_rank + wire.weights_bytes_per_rank;
    assert_eq!(sent.load(Ordering::Relaxed) as u64, estimated, "{case}");
    Snapshot::allocate(&buckets, &averages).unwrap().numel()
}

#[test]
fn state_buffers_traffic_and_snapshots_are_those_of_the_estimate_on_every_number_of_ranks() {
    for (number, overrides) in MODELS.iter().take(8).enumerate() {
        for (world_size, sharding) in [1, 2, 4, 8].into_iter().flat_map(|ranks| (0..4).map(move |level| (ranks, level)))
        {
            // All models, each with some of the rest.
            let group = [None, Some(2)][(number + world_size / 2) % 2].filter(|_| sharding > 0);
            let mut all: Vec<String> = overrides.iter().map(|text| text.to_string()).collect();
            all.push(format!("train.sharding={sharding}"));
            all.extend(group.map(|ranks| format!("train.sharding_ranks={ranks}")));
            all.extend((number % 3 > 0).then(|| "collective.node_ranks=2".to_owned()));
            all.push(format!("train.activation_checkpointing={}", number % 3));
            let ways: [&[&str]; 3] = [&[], &["reduction=fast"], &["reduction=fast", "reduction_dtype=bf16"]];
            all.extend(ways[(number + sharding) % 3].iter().map(|text| text.to_string()));
            let config = config(&all.iter().map(String::as_str).collect::<Vec<_>>());
            let copied = (0..world_size).map(|rank| compare(&config, rank, world_size)).max();
            let sizes = Sizes::new(&config, &dims(&config), world_size, world_size);
            let weights = 1 + Average::of_config(&config.ema).len();
            assert_eq!(Some(sizes.groups.snapshot(&sizes.buckets, weights, 2)), copied, "{all:?}, {world_size} ranks");
        }
    }
}
