//! Four nodes: network namespaces of this machine with links that can be cut. `./dev test --nodes` runs them, one at a time.

mod kills;

use crate::experiment::{Experiment, Ran, finish, run_ok, start, wait_until};
use crate::phases::{self, BEHIND_GATE, Gate};
use crate::stopping::{has_checkpoint, kill};
use crate::watching::{is_in, process_of, status};
use std::fs::File;
use std::net::IpAddr;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

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
        std::thread::sleep(Duration::from_secs(5));
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
    kill("-TERM", child.id() as i32);
    let ran = finish(child);
    assert_eq!(ran.code, Some(75), "{}", ran.text());
    assert!(cluster.are_quiet());
    run_ok(&mut experiment.launcher(2, "run", &LONG));
    assert_eq!(world_sizes(&experiment, "run"), [4, 2]);
    assert_eq!(experiment.digest("run"), reference);
}

/// Two ranks on two nodes.
fn two(cluster: &Nodes, experiment: &Experiment, run: &str, overrides: &[&str]) -> Command {
    let status_file = experiment.path(run).with_extension("status");
    let options = ["--nodes", "2", "--status-file", status_file.to_str().unwrap()];
    cluster.launcher_with(experiment, run, overrides, &options)
}

/// The cable of rank 1's node is pulled in `phase`. Gives where it was, by the launcher's word.
fn cut_in(cluster: &Nodes, experiment: &Experiment, phase: &str, run: &str, overrides: &[&str]) -> String {
    let child = start(&mut two(cluster, experiment, run, overrides));
    let folder = experiment.path(run);
    let rank = |rank: usize| process_of(folder.to_str().unwrap(), rank);
    if phase == "reduce" {
        wait_until("the first steps", || {
            status(experiment, run)["ranks"][1]["step"].as_u64().is_some_and(|step| step > 0)
        });
        kill("-STOP", rank(0));
    }
    wait_until("the phase", || is_in(experiment, run, 1, phase));
    cut(cluster, child, phase, || {
        if phase == "reduce" {
            kill("-CONT", rank(0));
        }
    })
}

/// Pulls the cable, and does something `then`.
fn cut(cluster: &Nodes, child: Child, phase: &str, then: impl FnOnce()) -> String {
    nodes(&["cut", "dn1"]);
    let cut = Instant::now();
    then();
    let ran = finish(child);
    let took = cut.elapsed();
    assert_eq!(ran.code, Some(1), "{}", ran.text());
    assert!(took < Duration::from_secs(30), "ended after {took:?}: {}", ran.text());
    wait_until("the end of all processes on all nodes", || cluster.are_quiet());
    nodes(&["heal", "dn1"]);
    assert!(ran.stderr.contains("node dn1 is lost"), "{}", ran.text());
    let place = ran.stderr.split_once("rank 1 was on dn1 at step ").unwrap_or_else(|| panic!("{}", ran.text())).1;
    println!("{phase}: {:.1} s after the cut: {}", took.as_secs_f64(), place.lines().next().unwrap());
    place.split_once(" in phase ").unwrap().1.to_owned()
}

#[test]
#[ignore = "needs root and four network namespaces: ./dev test --nodes"]
fn a_link_that_is_cut_in_any_phase_ends_the_run_and_the_rank_behind_it_is_named_with_its_phase() {
    let cluster = Nodes::up();
    let endless = ["train.steps=1000000"];
    let cases: [(&str, Experiment, &[&str]); 5] = [
        ("forward", phases::heavy(), &phases::HEAVY),
        ("backward", phases::heavy(), &phases::HEAVY),
        ("reduce", Experiment::new(), &endless),
        ("update", Experiment::new(), &phases::AVERAGED),
        ("checkpoint", Experiment::new(), &phases::LARGE),
    ];
    for (phase, experiment, overrides) in &cases {
        let caught =
            |attempt| cut_in(&cluster, experiment, phase, &format!("{phase}-{attempt}"), overrides).starts_with(phase);
        assert!((0..phases::TRIES).any(caught), "never caught in phase {phase}");
    }
}

#[test]
#[ignore = "needs root and four network namespaces: ./dev test --nodes"]
fn a_link_that_is_cut_while_a_rank_waits_for_data_ends_the_run_and_the_rank_behind_it_is_named_with_its_phase() {
    let (cluster, experiment) = (Nodes::up(), Experiment::new());
    // This process is on the switch too. Rank 0 gets its data all the time.
    let dn1 = |client| client == IpAddr::from([10, 79, 0, 2]);
    let gate = Gate::before(&experiment, [10, 79, 0, 254].into(), dn1);
    let child = gate.start(&mut two(&cluster, &experiment, "data", &BEHIND_GATE));
    assert_eq!(gate.shut(&experiment, "data"), 1);
    let place = cut(&cluster, child, "data", || ());
    assert!(place.starts_with("data"), "{place}");
}
