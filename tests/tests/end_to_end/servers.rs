//! A whole run whose data set and checkpoints are on a server.

use crate::experiment::{Experiment, binary, finish, run, run_ok, start, wait_until};
use crate::stopping::{kill, ranks_of};
use object_store::ObjectStoreExt;
use serde_json::Value;
use std::process::Command;
use std::time::SystemTime;

/// `./dev test --stores` starts servers and runs this on each.
#[test]
#[ignore = "needs DITHAROS_TEST_STORE=URL and a server behind it"]
fn a_killed_run_on_a_server_goes_on_to_the_same_bits() {
    let experiment = Experiment::new();
    let nanos = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos();
    let base = format!("{}/trained-{nanos}", std::env::var("DITHAROS_TEST_STORE").unwrap());
    let data = url::Url::parse(&format!("{base}/data")).unwrap();
    let (store, folder) = stores::open(&data, stores::Bounds::default()).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    for file in std::fs::read_dir(experiment.path("data")).unwrap().map(|entry| entry.unwrap().path()) {
        let name = file.file_name().unwrap().to_str().unwrap();
        runtime.block_on(store.put(&folder.clone().join(name), std::fs::read(&file).unwrap().into())).unwrap();
    }

    let url = format!("{base}/run");
    let cache = experiment.path("cache");
    let places = [("run.url", &*url), ("data.url", data.as_str()), ("cache.dir", cache.to_str().unwrap())]
        .map(|(k, v)| format!("{k}={v:?}"));
    let train = |ranks, steps: u64| {
        let mut command = experiment.launcher(ranks, "unused", &["cache.bytes=100000000", "checkpoint.every_steps=20"]);
        command.args(["--set", &format!("train.steps={steps}")]);
        places.iter().for_each(|place| _ = command.args(["--set", place]));
        command
    };
    let committed = || {
        let listed = run(Command::new(binary("trainer")).args(["checkpoints", &url, "list", "--json"]));
        let newest: Option<Value> = listed.stdout.lines().next().map(|line| serde_json::from_str(line).unwrap());
        newest.map(|commit| commit["step"].as_u64().unwrap())
    };
    // It would never end by itself.
    let child = start(&mut train(2, 1_000_000));
    wait_until("a checkpoint", || committed().is_some());
    ranks_of(&url).iter().for_each(|&pid| kill("-KILL", pid));
    let ran = finish(child);
    assert!(ran.code != Some(0) && ran.text().contains("signal 9"), "{}", ran.text());
    wait_until("the end of every rank", || ranks_of(&url).is_empty());

    let saved = committed().unwrap();
    let ran = run_ok(&mut train(1, saved + 20));
    let digest = run_ok(Command::new(binary("trainer")).args(["digest", &url])).stdout;
    let steps = format!("train.steps={}", saved + 20);
    run_ok(&mut experiment.launcher(1, "reference", &[&steps, "checkpoint.every_steps=100000"]));
    assert_eq!(digest.lines().collect::<Vec<_>>(), experiment.digest("reference"), "{}", ran.text());
    run_ok(Command::new(binary("trainer")).args(["checkpoints", &url, "verify"]));
}
