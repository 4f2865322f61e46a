//! An experiment gives the same bits on any allowed number of ranks.

use crate::experiment::{Experiment, run};

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
