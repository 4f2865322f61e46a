//! What is shared out among ranks and what is computed twice changes no bit.

use crate::experiment::{Experiment, run, run_ok};
use serde_json::{Value, json};

/// One way to run an experiment.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Way {
    precision: &'static str,
    lanes: usize,
    ranks: usize,
    sharding: usize,
    /// `train.sharding_ranks`; 0 where it is not given.
    group: usize,
    /// `collective.node_ranks`; 0 where it is not given.
    node: usize,
    activation_checkpointing: usize,
}

impl Way {
    /// All that differ.
    fn all() -> Vec<Self> {
        let mut ways = Vec::new();
        for (precision, lanes) in EXPERIMENTS {
            for (ranks, sharding) in [1, 2, 4].into_iter().flat_map(|ranks| [1, 0, 2, 3].map(|level| (ranks, level))) {
                let places: &[[usize; 2]] = match (ranks, sharding) {
                    (4, 1 | 2) => &[[0, 0], [2, 0], [0, 2]],
                    (4, 3) => &[[0, 0], [2, 0]],
                    _ => &[[0, 0]],
                };
                for (&[group, node], every) in places.iter().flat_map(|place| [0, 1].map(|every| (place, every))) {
                    ways.push(Self { precision, lanes, ranks, sharding, group, node, activation_checkpointing: every });
                }
            }
        }
        ways
    }

    fn is_of(&self, experiment: (&str, usize)) -> bool {
        (self.precision, self.lanes) == experiment
    }

    /// Every two of its settings with their places.
    fn pairs(&self) -> Vec<[(usize, usize); 2]> {
        let Self { precision, lanes, ranks, sharding, group, node, activation_checkpointing } = *self;
        let values = [usize::from(precision == "bf16"), lanes, ranks, sharding, group, node, activation_checkpointing];
        let places = 0..values.len();
        places.clone().flat_map(|b| (0..b).map(move |a| [(a, values[a]), (b, values[b])])).collect()
    }

    /// Some of `all` in which any two settings that occur together at all do so at least once, found greedily; the first of
    /// every experiment is there to be compared with.
    fn pairwise(all: &[Self]) -> Vec<Self> {
        let first = |experiment: &(&str, usize)| all.iter().find(|way| way.is_of(*experiment)).copied();
        let mut chosen: Vec<Self> = EXPERIMENTS.iter().filter_map(first).collect();
        loop {
            let covered: Vec<_> = chosen.iter().flat_map(Self::pairs).collect();
            let new = |way: &&Self| way.pairs().iter().filter(|pair| !covered.contains(pair)).count();
            // Of equals the first.
            match all.iter().rev().max_by_key(new) {
                Some(best) if new(&best) > 0 => chosen.push(*best),
                _ => return chosen,
            }
        }
    }

    fn overrides(&self) -> Vec<String> {
        let mut overrides = vec![
            format!("train.precision={}", self.precision),
            format!("train.lanes={}", self.lanes),
            format!("train.micro_batch={}", 16 / self.lanes),
            format!("train.sharding={}", self.sharding),
            format!("train.activation_checkpointing={}", self.activation_checkpointing),
        ];
        overrides.extend((self.group > 0).then(|| format!("train.sharding_ranks={}", self.group)));
        overrides.extend((self.node > 0).then(|| format!("collective.node_ranks={}", self.node)));
        // Without a limit on the norm a part of the update comes before the end of the backward pass.
        overrides.extend((self.lanes == 16).then(|| "optimizer.clip_grad_norm=0.05".to_owned()));
        overrides
    }
}

/// Precision and lanes: within each of them every way gives the same bits.
const EXPERIMENTS: [(&str, usize); 4] = [("fp32", 4), ("fp32", 16), ("bf16", 4), ("bf16", 16)];

/// Everything that has state or is summed over ranks, in a dozen steps.
const EVERYTHING: [&str; 7] = [
    "train.steps=12",
    "checkpoint.every_steps=100",
    "optimizer.groups=[{match=[\"*.bias\", \"y_embedder.*\"], weight_decay=0.0}, {match=[\"blocks.0.*\"], lr_scale=0.3}]",
    "model.depth=4",
    "optimizer.warmup_steps=4",
    "ema.further_decays=[0.5]",
    "log.tensorboard=false",
];

/// Losses and gradient norms, step by step.
fn told(experiment: &Experiment, run: &str) -> Vec<Value> {
    let log = experiment.log(run);
    let steps = log.iter().filter(|event| event["event"] == "step");
    steps.map(|e| json!([e["step"], e["loss"], e["vb"], e["grad_norm"]])).collect()
}

/// A pairwise cover; `DITHAROS_MATRIX=full` asks for all (`./dev test --matrix`).
#[test]
fn ranks_sharding_and_activation_checkpointing_change_no_bit() {
    let all = Way::all();
    let is_full = std::env::var("DITHAROS_MATRIX").is_ok_and(|asked| asked == "full");
    let ways = if is_full { all } else { Way::pairwise(&all) };
    let experiment = Experiment::new();
    let mut models = Vec::new();
    for of in EXPERIMENTS {
        let mut first = None;
        for (number, way) in ways.iter().filter(|way| way.is_of(of)).enumerate() {
            let run = format!("run-{}-{}-{number}", of.0, of.1);
            let overrides = way.overrides();
            let overrides: Vec<&str> = EVERYTHING.into_iter().chain(overrides.iter().map(String::as_str)).collect();
            run_ok(&mut experiment.launcher(way.ranks, &run, &overrides));
            let found = (experiment.digest(&run), told(&experiment, &run));
            assert_eq!((&found.0[3][..], found.1.len()), ("step 12", 12));
            let expected = first.get_or_insert_with(|| found.clone());
            assert_eq!(found, *expected, "{way:?}");
            println!("the same bits: {way:?}");
        }
        models.extend(first.map(|(digest, _)| digest[0].clone()));
    }
    models.sort();
    models.dedup();
    assert_eq!(models.len(), EXPERIMENTS.len(), "lanes and precision are part of the experiment");
}

#[test]
fn a_checkpoint_is_read_at_any_sharding_on_any_number_of_ranks() {
    let experiment = Experiment::new();
    let data = format!("validation.url={:?}", experiment.path("data").to_str().unwrap());
    let looking = [
        "log.tensorboard=false",
        "ema.further_decays=[0.5]",
        "validation.every_steps=3",
        "validation.rows=16",
        "validation.weights=[\"model\", \"ema\", \"ema_0.5\"]",
        &data,
    ];
    let go_on = |run: &str, ranks: usize, steps: u64, how: &[&str]| {
        let steps = format!("train.steps={steps}");
        let overrides: Vec<&str> = looking.into_iter().chain(how.iter().copied()).chain([steps.as_str()]).collect();
        run_ok(&mut experiment.launcher(ranks, run, &overrides));
    };
    let judged = |run: &str| -> Vec<Value> {
        let log = experiment.log(run);
        let found = log.iter().filter(|event| event["event"] == "validation");
        found.map(|e| json!([e["step"], e["weights"], e["loss"]])).collect()
    };
    go_on("alone", 1, 12, &[]);
    go_on("moved", 4, 3, &["train.sharding=3"]);
    go_on("moved", 2, 6, &["train.sharding=0", "train.activation_checkpointing=1"]);
    go_on("moved", 4, 9, &["train.sharding=3", "train.sharding_ranks=2"]);
    go_on("moved", 1, 10, &["train.sharding=2"]);
    go_on("moved", 4, 12, &["collective.node_ranks=2"]);
    assert_eq!(experiment.digest("moved"), experiment.digest("alone"));
    let expected = judged("alone");
    assert_eq!(expected.len(), 12, "three sets of weights, four times");
    let at_all_steps = judged("moved");
    let at_same_steps: Vec<Value> = at_all_steps.into_iter().filter(|event| event[0] != json!(10)).collect();
    assert_eq!(at_same_steps, expected);
    let ran = run(&mut experiment.launcher(1, "alone", &["train.sharding=4"]));
    assert!(ran.code == Some(2) && ran.stderr.contains("`train.sharding`"), "{}", ran.text());
}
