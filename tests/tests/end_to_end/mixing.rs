//! Data sets mixed by weight.

use crate::experiment::{Experiment, STEPS, run, write_dataset};
use std::fs;

/// An experiment over two data sets, three rows to one.
fn mixed() -> Experiment {
    let experiment = Experiment::new();
    write_dataset(&experiment.path("other"), |_, mean| mean.iter_mut().for_each(|x| *x = 2.0 - *x));
    set_sources(&experiment, r#"mix = [{ url = "data", weight = 3 }, { url = "other", weight = 1 }]"#);
    experiment
}

fn set_sources(experiment: &Experiment, sources: &str) {
    let path = experiment.path("config.toml");
    let text = fs::read_to_string(&path).unwrap();
    let (start, end) = (text.find("data = {").unwrap(), text.find(", range_rows").unwrap());
    fs::write(path, format!("{}data = {{ {sources}{}", &text[..start], &text[end..])).unwrap();
}

#[test]
fn a_mix_gives_the_same_bits_on_any_ranks_and_after_a_resume_and_says_what_was_read() {
    let experiment = mixed();
    experiment.train(1, "alone", &[]);
    let digest = experiment.digest("alone");
    for event in experiment.log("alone").iter().filter(|event| event["event"] == "step") {
        let read: Vec<u64> = event["rows_read"].as_array().unwrap().iter().map(|rows| rows.as_u64().unwrap()).collect();
        assert_eq!(read.iter().sum::<u64>(), event["step"].as_u64().unwrap() * 16);
        assert!(event["step"] != STEPS || (100..140).contains(&read[0]), "{read:?}");
    }
    for ranks in [2, 4] {
        experiment.train(ranks, &format!("on-{ranks}"), &[]);
        assert_eq!(experiment.digest(&format!("on-{ranks}")), digest, "{ranks} ranks");
    }
    // As if killed after step 6: nothing but that checkpoint is left, and another number of ranks goes on, with the
    // data sets moved.
    for later in [9, STEPS] {
        fs::remove_dir_all(experiment.path(&format!("alone/checkpoints/step-{later:09}"))).unwrap();
    }
    fs::rename(experiment.path("other"), experiment.path("moved")).unwrap();
    set_sources(&experiment, r#"mix = [{ url = "data", weight = 3 }, { url = "moved", weight = 1 }]"#);
    experiment.train(2, "alone", &[]);
    assert_eq!(experiment.steps_of_last_attempt("alone"), (7..=STEPS).collect::<Vec<_>>());
    assert_eq!(experiment.digest("alone"), digest);

    set_sources(&experiment, r#"url = "data""#);
    experiment.train(1, "plain", &[]);
    assert_ne!(experiment.digest("plain")[0], digest[0]);
}

#[test]
fn another_mix_is_another_experiment() {
    let experiment = mixed();
    experiment.train(2, "run", &[]);
    for (sources, says) in [
        (r#"mix = [{ url = "data", weight = 3 }, { url = "other", weight = 2 }]"#, "`data.mix` was"),
        (r#"mix = [{ url = "data", weight = 3 }]"#, "`data.mix` was"),
        (r#"url = "data""#, "`data.mix` was"),
        (r#"url = "data", mix = [{ url = "data", weight = 3 }]"#, "is given beside data.url"),
        (r#"mix = [{ url = "data", weight = 3 }, { url = "nowhere", weight = 1 }]"#, "`data.mix[1].url`"),
    ] {
        set_sources(&experiment, sources);
        let ran = run(&mut experiment.launcher(1, "run", &[]));
        assert!(ran.code != Some(0) && ran.text().contains(says), "{sources}: {}", ran.text());
    }
}
