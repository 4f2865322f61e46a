#![allow(clippy::unwrap_used)]

use super::*;
use configs::RunConfig;

fn config(overrides: &[&str]) -> RunConfig {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("run.toml");
    let text = "run.url = \"/r\"\ndata.url = \"/d\"\nmodel.preset = \"DiT-S/2\"\n[train]\nsteps = 1000\nlanes = 32\nmicro_batch = 8\n";
    std::fs::write(&file, text).unwrap();
    let overrides: Vec<String> = overrides.iter().map(|text| text.to_string()).collect();
    RunConfig::load(&file, &overrides).unwrap()
}

const DATA: DataDims = DataDims { input_size: 32, in_channels: 4, num_classes: 1000 };

fn estimate(nodes: usize, ranks_per_node: usize, overrides: &[&str]) -> Estimate {
    let config = config(overrides);
    let machines = Machines { nodes, ranks_per_node, on_gpu: true };
    Estimate::new(&config, &Dims::of(&config, DATA), &machines, &Hardware::find("a100").unwrap())
}

fn bytes(estimate: &Estimate, name: &str) -> u64 {
    estimate.memory.categories.iter().find(|category| category.name == name).unwrap().bytes
}

#[test]
fn sharing_out_in_each_node_sends_over_its_cards_what_a_hierarchical_sum_does() {
    let hybrid = estimate(4, 8, &["train.sharding_ranks=8"]);
    let numel = Sizes::new(&config(&[]), &Dims::of(&config(&[]), DATA), 32, 8).numel() as u64;
    // Out and back, three quarters of a copy each.
    assert_eq!(hybrid.wire.gradients_bytes_per_node, 2 * 3 * numel);
    assert_eq!((hybrid.wire.weights_bytes_per_node, hybrid.wire.bytes_per_nic), (0, 6 * numel / 8));
    // Shared out among all ranks, gradients go out and weights come back by the same way.
    let climbing = estimate(4, 8, &[]);
    assert_eq!(climbing.wire.gradients_bytes_per_node, 3 * numel);
    assert_eq!((climbing.wire.weights_bytes_per_node, climbing.wire.bytes_per_nic), (3 * numel, 6 * numel / 8));
    assert!(climbing.memory.peak_bytes < hybrid.memory.peak_bytes);
    // All ranks in one group: every rank sends each of the 24 others elsewhere its part.
    let flat = estimate(4, 8, &["collective.node_ranks=1"]);
    assert_eq!(flat.wire.gradients_bytes_per_node, 4 * numel / 32 * 24 * 8);
    let alone = estimate(1, 8, &[]).wire;
    assert_eq!((alone.gradients_bytes_per_node, alone.bytes_per_nic), (0, 0));
    assert_eq!(alone.gradients_bytes_per_rank, 4 * numel / 8 * 7);
    assert_eq!(estimate(1, 1, &[]).wire, Wire::default());
}

#[test]
fn every_level_shares_out_what_it_says() {
    let levels: Vec<Estimate> = (0..4).map(|level| estimate(1, 8, &[&format!("train.sharding={level}")])).collect();
    let of = |name: &str| levels.iter().map(|estimate| bytes(estimate, name)).collect::<Vec<_>>();
    let (moments, gradients, weights) = (of("moments"), of("gradients"), of("weights"));
    assert_eq!((moments[0], moments[1]), (8 * moments[2], moments[3]));
    assert!(gradients[0] == gradients[1] && gradients[2] < gradients[1] / 2 && gradients[3] == gradients[2]);
    assert!(weights[0] == weights[2] && weights[3] < weights[2] / 2);
    let wire: Vec<u64> = levels.iter().map(|estimate| estimate.wire.weights_bytes_per_rank).collect();
    assert!(wire[0] == 0 && wire[1] == wire[2] && wire[3] > 6 * wire[2], "four lanes a rank, twice each: {wire:?}");
}

#[test]
fn computing_twice_and_bf16_lower_activations_and_the_first_costs_time() {
    let [plain, twice, bf16] =
        [&[][..], &["train.activation_checkpointing=1"], &["train.precision=bf16"]].map(|set| estimate(1, 8, set));
    let activations = |estimate: &Estimate| bytes(estimate, "activations");
    assert!(6 * activations(&twice) < activations(&plain) && activations(&bf16) < activations(&plain));
    let ratio = twice.time.flops / plain.time.flops;
    assert!((1.3..1.34).contains(&ratio), "forward, and backward twice that: {ratio}");
    assert!(bf16.time.compute_s < plain.time.compute_s && plain.time.compute_s < twice.time.compute_s);
}

#[test]
fn what_is_frozen_keeps_nothing_and_has_no_gradient() {
    let [all, half, nearly] =
        ["[]", "[\"?_embedder.*\", \"blocks.[0-5].*\"]", "[\"?_embedder.*\", \"blocks.*\", \"final_layer.adaLN*\"]"]
            .map(|frozen| estimate(1, 1, &[&format!("train.freeze={frozen}")]));
    let activations = |estimate: &Estimate| bytes(estimate, "activations") as f64;
    let share = activations(&half) / activations(&all);
    assert!((0.5..0.6).contains(&share), "{share}");
    assert!(activations(&nearly) < 0.2 * activations(&all));
    assert!(half.time.flops < 0.7 * all.time.flops && half.trained < all.trained && half.params == all.params);
}

#[test]
fn any_number_of_ranks_up_to_the_lanes_has_an_estimate() {
    for (nodes, ranks) in [(1, 1), (1, 8), (64, 8), (512, 8), (4096, 1)] {
        for sharding in 0..4 {
            let estimate = estimate(nodes, ranks, &["train.lanes=4096", &format!("train.sharding={sharding}")]);
            assert!(estimate.time.days.is_finite() && estimate.time.step_s > 0.0 && estimate.memory.peak_bytes > 0);
        }
    }
}

#[test]
fn hardware_is_known_by_name_or_described_in_a_file() {
    for name in ["a100", "h100", "cpu"] {
        assert!(Hardware::find(name).is_ok(), "{name}");
    }
    assert!(Hardware::find("z9").unwrap_err().to_string().contains("one of a100, cpu, h100"));
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("mine.toml");
    let text = "name = \"mine\"\nflops_fp32 = 1e12\nflops_tf32 = 1e12\nflops_bf16 = 2e12\nmemory_bytes_per_s = 1e12\nlink_bytes_per_s = 1e10\n\
                nics_per_node = 1\nnic_bytes_per_s = 1e9\nachieved_flops = 0.5\nachieved_memory = 0.5\nachieved_wire = 0.5\n";
    std::fs::write(&file, text).unwrap();
    let found = |file: &std::path::Path| Hardware::find(file.to_str().unwrap());
    assert_eq!(found(&file).unwrap().name, "mine");
    for (wrong, said) in [(text.replace("= 0.5", "= 1.5"), "at most 1"), (format!("{text}speed = 1\n"), "speed")] {
        std::fs::write(&file, wrong).unwrap();
        let refused = found(&file).unwrap_err().to_string();
        assert!(refused.contains(said) && refused.contains("mine.toml"), "{refused}");
    }
}
