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
