//! A broken row group during training: the run stops, or reads other rows in its place and says so.

use crate::experiment::{Experiment, STEPS, run, write_dataset};
use data_loader::draws::{Key, Purpose, fill_normal};
use std::fs;
use std::path::PathBuf;

/// The row group that is broken, of 16 rows each.
const BROKEN: u64 = 3;
const SKIP: [&str; 2] = ["data.on_broken=skip", "data.skip_budget_rows=16"];

fn file(experiment: &Experiment) -> PathBuf {
    experiment.path("data/part-00000-of-00001.parquet")
}

/// Breaks the header of the row group's first page, which lies before its first number.
pub fn break_row_group(experiment: &Experiment) {
    let mut mean = [0f32; 4];
    fill_normal(Key::new(5, Purpose::Noise, BROKEN * 16), &mut mean);
    let first: Vec<u8> = mean.iter().flat_map(|x| x.to_le_bytes()).collect();
    let mut bytes = fs::read(file(experiment)).unwrap();
    let at = bytes.windows(first.len()).position(|window| window == first).unwrap();
    bytes[at - 12..at].fill(0xff);
    fs::write(file(experiment), bytes).unwrap();
}

#[test]
fn a_broken_row_group_ends_the_run_and_is_named() {
    let experiment = Experiment::new();
    break_row_group(&experiment);
    let ran = run(&mut experiment.launcher(2, "run", &[]));
    assert!(!matches!(ran.code, Some(0) | Some(75)), "{}", ran.text());
    assert!(ran.stderr.contains("part-00000-of-00001.parquet: row group 3"), "{}", ran.text());
    assert!(!ran.text().contains("panicked"), "{}", ran.text());
}

#[test]
fn skipping_gives_the_same_bits_on_any_ranks_and_after_a_resume_even_of_a_repaired_file() {
    let experiment = Experiment::new();
    experiment.train(1, "sound", &SKIP);
    assert_eq!(experiment.manifest("sound", STEPS)["decision_log"], serde_json::json!([]));
    break_row_group(&experiment);
    experiment.train(1, "alone", &SKIP);
    let digest = experiment.digest("alone");
    assert_ne!(digest[0], experiment.digest("sound")[0]);
    let log = experiment.log("alone");
    let told: Vec<_> = log.iter().filter(|event| event["event"] == "replaced").collect();
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!((&told[0]["row_group"], &told[0]["rows"]), (&BROKEN.into(), &16.into()));
    assert!(told[0]["file"].as_str().unwrap().ends_with("part-00000-of-00001.parquet"));
    assert!(told[0]["reason"].as_str().unwrap().contains("cannot be decoded"), "{told:?}");
    let decisions = experiment.manifest("alone", STEPS)["decision_log"].clone();
    let entry = &decisions[0];
    assert_eq!((&entry["kind"], &entry["step"]), (&"row_group_replaced".into(), &told[0]["step"]));

    for ranks in [2, 4] {
        let run = format!("on-{ranks}");
        experiment.train(ranks, &run, &SKIP);
        assert_eq!(experiment.digest(&run), digest, "{ranks} ranks");
        assert_eq!(experiment.manifest(&run, STEPS)["decision_log"], decisions, "{ranks} ranks");
    }
    // As if killed after step 6; then again, with the file repaired meanwhile and without the policy.
    for (step, ranks, repaired) in [(6, 2, false), (6, 4, true)] {
        for later in [9, STEPS] {
            fs::remove_dir_all(experiment.path(&format!("alone/checkpoints/step-{later:09}"))).unwrap();
        }
        if repaired {
            write_dataset(&experiment.path("data"), |_, _| {});
        }
        experiment.train(ranks, "alone", if repaired { &[] } else { &SKIP });
        assert_eq!(experiment.steps_of_last_attempt("alone"), (step + 1..=STEPS).collect::<Vec<_>>());
        assert_eq!(experiment.digest("alone"), digest, "repaired: {repaired}");
        assert_eq!(experiment.manifest("alone", STEPS)["decision_log"], decisions);
    }
}

#[test]
fn a_run_stops_with_the_evidence_when_the_budget_is_used_up() {
    let experiment = Experiment::new();
    break_row_group(&experiment);
    let ran = run(&mut experiment.launcher(2, "run", &["data.on_broken=skip", "data.skip_budget_rows=15"]));
    assert!(!matches!(ran.code, Some(0) | Some(75)), "{}", ran.text());
    for says in ["16 rows", "data.skip_budget_rows", "part-00000-of-00001.parquet (row group 3"] {
        assert!(ran.stderr.contains(says), "`{says}` is not said: {}", ran.text());
    }
    // The budget may be raised on the way.
    experiment.train(2, "run", &SKIP);
}
