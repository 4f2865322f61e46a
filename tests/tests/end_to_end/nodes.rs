//! Four nodes: network namespaces of this machine with links that can be cut. `./dev test --nodes` runs them, one at a time.

mod kills;

use crate::experiment::{Experiment, Ran, finish, run_ok, start, wait_until};
use crate::stopping::has_checkpoint;
use std::fs::File;
use std::path::Path;
use std::process::Command;

const LONG: [&str; 3] = ["train.steps=1500", "checkpoint.every_steps=50", "log.every_steps=100"];

fn nodes(words: &[&str]) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("cluster/nodes");
    let ran = Command::new(script).args(words).output().unwrap();
    assert!(ran.status.success(), "nodes {words:?}: {}", String::from_utf8_lossy(&ran.stderr));
    String::from_utf8(ran.stdout).unwrap()
}

/// The nodes dn0 to dn3, as long as it lives. This machine has them once, for whichever tests of whichever clone.
struct Nodes {
    _lock: File,
}

impl Nodes {
    fn up() -> Self {
        let lock = File::create(std::env::temp_dir().join("ditharos-nodes.lock")).unwrap();
        lock.lock().unwrap();
        nodes(&["down"]);
        nodes(&["up", "4"]);
        Self { _lock: lock }
    }

    /// The launcher on dn0, with one rank a node.
    fn launcher(&self, experiment: &Experiment, run: &str, options: &[&str]) -> Command {
        self.launcher_with(experiment, run, &LONG, options)
    }

    fn launcher_with(&self, experiment: &Experiment, run: &str, overrides: &[&str], options: &[&str]) -> Command {
        let cluster = Path::new(env!("CARGO_MANIFEST_DIR")).join("cluster");
        let shell = format!("cluster.remote_shell={:?}", cluster.join("node-shell"));
        let overrides = [overrides, &["cluster.interface=eth0", &shell]].concat();
        let inner = experiment.launcher(1, run, &overrides);
        let mut command = Command::new(cluster.join("nodes"));
        command.args(["run", "dn0"]).arg(inner.get_program()).args(inner.get_args());
        command.args(["--hosts", "dn0,dn1,dn2,dn3"]).args(options).current_dir("/");
        command
    }

    /// Nothing of a run is left anywhere.
    fn are_quiet(&self) -> bool {
        nodes(&["pids"]).trim().is_empty()
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        nodes(&["down"]);
    }
}

fn reference(experiment: &Experiment) -> Vec<String> {
    run_ok(&mut experiment.launcher(1, "reference", &LONG));
    experiment.digest("reference")
}

fn world_sizes(experiment: &Experiment, run: &str) -> Vec<u64> {
    let log = experiment.log(run);
    log.iter().filter(|event| event["event"] == "start").map(|event| event["world_size"].as_u64().unwrap()).collect()
}

/// Starts on four nodes, and does something to dn2 after the first checkpoint.
fn disturbed(nodes_of: &Nodes, experiment: &Experiment, options: &[&str], disturb: impl FnOnce()) -> Ran {
    let child = start(&mut nodes_of.launcher(experiment, "run", options));
    wait_until("a checkpoint", || has_checkpoint(experiment, "run"));
    disturb();
    let ran = finish(child);
    assert_eq!(ran.code, Some(0), "{}", ran.text());
    wait_until("the end of all processes on all nodes", || nodes_of.are_quiet());
    ran
}

#[test]
#[ignore = "needs root and four network namespaces: ./dev test --nodes"]
fn a_cut_of_five_seconds_changes_nothing() {
    let (cluster, experiment) = (Nodes::up(), Experiment::new());
    let reference = reference(&experiment);
    disturbed(&cluster, &experiment, &["--nodes", "4", "--restarts", "3"], || {
        nodes(&["cut", "dn2"]);
        std::thread::sleep(std::time::Duration::from_secs(5));
        nodes(&["heal", "dn2"]);
    });
    assert!(world_sizes(&experiment, "run").iter().all(|&ranks| ranks == 4));
    assert_eq!(experiment.digest("run"), reference);
}

#[test]
#[ignore = "needs root and four network namespaces: ./dev test --nodes"]
fn without_a_node_that_was_cut_off_the_run_goes_on_to_the_same_bits() {
    let (cluster, experiment) = (Nodes::up(), Experiment::new());
    let reference = reference(&experiment);
    let ran = disturbed(&cluster, &experiment, &["--nodes", "2..4"], || drop(nodes(&["cut", "dn2"])));
    assert!(
        ran.stderr.contains("node dn2 is lost") && ran.stderr.contains("3 of 4 nodes answer; dn2: "),
        "{}",
        ran.text()
    );
    let lost = ran.stderr.lines().find(|line| line.contains("node dn2 is lost")).unwrap();
    assert!(lost.contains("rank 2 was on dn2 at step ") && lost.contains(" in phase "), "{lost}");
    assert_eq!(world_sizes(&experiment, "run"), [4, 2]);
    assert_eq!(experiment.digest("run"), reference);
}

#[test]
#[ignore = "needs root and four network namespaces: ./dev test --nodes"]
fn a_stop_reaches_the_ranks_of_all_nodes() {
    let (cluster, experiment) = (Nodes::up(), Experiment::new());
    let reference = reference(&experiment);
    let child = start(&mut cluster.launcher(&experiment, "run", &["--nodes", "4"]));
    wait_until("a checkpoint", || has_checkpoint(&experiment, "run"));
    // `nodes run` becomes the launcher itself.
    crate::stopping::kill("-TERM", child.id() as i32);
    let ran = finish(child);
    assert_eq!(ran.code, Some(75), "{}", ran.text());
    assert!(cluster.are_quiet());
    run_ok(&mut experiment.launcher(2, "run", &LONG));
    assert_eq!(world_sizes(&experiment, "run"), [4, 2]);
    assert_eq!(experiment.digest("run"), reference);
}
