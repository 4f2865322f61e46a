//! An experiment gives the same bits on any allowed number of ranks.

use crate::experiment::{Experiment, STEPS, run};
use std::fs;

#[test]
fn one_two_and_four_ranks_give_the_same_bits_and_the_same_losses() {
    let experiment = Experiment::new();
    let mut seen: Option<(Vec<String>, Vec<serde_json::Value>)> = None;
    for ranks in [1, 2, 4] {
        let run = format!("run-{ranks}");
        experiment.train(ranks, &run, &[]);
        let log = experiment.log(&run);
        assert_eq!(log[0]["world_size"], ranks);
        let steps = log.iter().filter(|event| event["event"] == "step");
        let numbers: Vec<_> =
            steps.map(|e| serde_json::json!([e["step"], e["loss"], e["vb"], e["grad_norm"]])).collect();
        assert_eq!(numbers.len(), 10);
        let found = (experiment.digest(&run), numbers);
        match &seen {
            None => seen = Some(found),
            Some(first) => assert_eq!(*first, found, "{ranks} ranks"),
        }
    }
}

/// Everything of `[optimizer]` and `[ema]` that has state or is summed over ranks.
const ALL_OF_THE_OPTIMIZER: [&str; 7] = [
    "checkpoint.keep_last=9",
    "optimizer.groups=[{match=[\"*.bias\", \"y_embedder.*\"], weight_decay=0.0}, {match=[\"blocks.0.*\"], lr_scale=0.3}]",
    "optimizer.clip_grad_norm=0.05",
    "optimizer.warmup_steps=4",
    "optimizer.decay=\"cosine\"",
    "ema.further_decays=[0.5, 0.99]",
    "ema.power=[0.1, 0.2]",
];

#[test]
fn groups_clipping_and_many_averages_have_the_same_bits_on_any_ranks_and_after_a_resume() {
    let experiment = Experiment::new();
    experiment.train(1, "alone", &ALL_OF_THE_OPTIMIZER);
    let digest = experiment.digest("alone");
    let further: Vec<&str> = digest[4..].iter().filter_map(|line| line.split(' ').next()).collect();
    assert_eq!(further, ["ema_0.5", "ema_0.99", "ema_power_0.1", "ema_power_0.2"]);
    let values: std::collections::BTreeSet<&str> = digest.iter().filter_map(|line| line.split(' ').nth(1)).collect();
    assert_eq!(values.len(), digest.len(), "every section is its own: {digest:?}");
    experiment.train(4, "four", &ALL_OF_THE_OPTIMIZER);
    assert_eq!(experiment.digest("four"), digest);

    // As if killed after step 3 or 6: nothing but those checkpoints is left, and another number of ranks goes on.
    for (step, ranks) in [(6, 2), (3, 4)] {
        for later in (step + 1..=STEPS).filter(|later| later % 3 == 0 || *later == STEPS) {
            fs::remove_dir_all(experiment.path(&format!("alone/checkpoints/step-{later:09}"))).unwrap();
        }
        experiment.train(ranks, "alone", &ALL_OF_THE_OPTIMIZER);
        assert_eq!(experiment.steps_of_last_attempt("alone"), (step + 1..=STEPS).collect::<Vec<_>>());
        assert_eq!(experiment.digest("alone"), digest, "resumed from step {step} on {ranks} ranks");
    }
    experiment.train(1, "plain", &[]);
    assert_ne!(experiment.digest("plain")[0], digest[0]);
}

#[test]
fn other_averages_or_groups_are_another_experiment() {
    let experiment = Experiment::new();
    experiment.train(1, "run", &["ema.further_decays=[0.5]"]);
    for (overrides, key) in [
        (&["ema.further_decays=[0.6]"][..], "ema.further_decays"),
        (&["ema.further_decays=[0.5]", "ema.power=[0.1]"], "ema.power"),
        (&["ema.further_decays=[0.5]", "optimizer.groups=[{match=[\"*.bias\"], lr_scale=0.5}]"], "optimizer.groups"),
        (&["ema.further_decays=[0.5]", "optimizer.clip_grad_norm=1.0"], "optimizer.clip_grad_norm"),
    ] {
        let ran = run(&mut experiment.launcher(1, "run", overrides));
        assert_ne!(ran.code, Some(0));
        assert!(ran.stderr.contains(&format!("`{key}` was")), "{key}: {}", ran.text());
    }
    let ran = run(&mut experiment.launcher(2, "other", &["optimizer.groups=[{match=[\"*.bais\"]}]"]));
    assert_ne!(ran.code, Some(0));
    let expected = "`optimizer.groups[0].match`: \"*.bais\" matches no parameter";
    assert!(ran.stderr.contains(expected), "{}", ran.text());
}

#[test]
fn the_other_conditioning_designs_give_the_same_bits_too() {
    let experiment = Experiment::new();
    let mut digests = Vec::new();
    // One of them without label dropout: then there is no row for the null label.
    for (design, dropout) in [("adaln", 0.2), ("cross-attention", 0.2), ("in-context", 0.0)] {
        let conditioning = format!("model.conditioning={design}");
        let overrides = [conditioning.as_str(), &format!("model.class_dropout_prob={dropout}")];
        for ranks in [1, 2] {
            experiment.train(ranks, &format!("{design}-{ranks}"), &overrides);
            digests.push(experiment.digest(&format!("{design}-{ranks}")));
        }
        assert_eq!(digests[digests.len() - 1], digests[digests.len() - 2], "{design}");
        let ran = run(&mut experiment.launcher(1, &format!("{design}-1"), &overrides[1..]));
        assert!(ran.code != Some(0) && ran.stderr.contains("`model.conditioning` was"), "{}", ran.text());
    }
    digests.dedup();
    assert_eq!(digests.len(), 3);
}

#[test]
fn seed_and_lanes_are_part_of_the_experiment() {
    let experiment = Experiment::new();
    experiment.train(1, "a", &[]);
    experiment.train(1, "b", &["seed=4"]);
    experiment.train(1, "c", &["train.lanes=8", "train.micro_batch=2"]);
    let digests = ["a", "b", "c"].map(|run| experiment.digest(run));
    assert_ne!(digests[0][0], digests[1][0]);
    assert_ne!(digests[0][0], digests[2][0]);
}

#[test]
fn a_number_of_ranks_that_the_lanes_do_not_allow_is_refused() {
    let experiment = Experiment::new();
    let ran = run(&mut experiment.launcher(3, "run", &[]));
    assert_ne!(ran.code, Some(0));
    assert!(ran.stderr.contains('3') && ran.stderr.contains("1, 2, 4"), "{}", ran.text());
}
