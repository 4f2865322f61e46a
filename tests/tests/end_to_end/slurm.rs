//! A real Slurm of four nodes on this machine. `./dev test --slurm` runs these, one at a time.

use crate::experiment::{Experiment, run_ok, wait_until};
use crate::stopping::has_checkpoint;
use std::path::{Path, PathBuf};
use std::process::Command;

const LONG: [&str; 3] = ["train.steps=1500", "checkpoint.every_steps=50", "log.every_steps=100"];

/// The cluster, as long as it lives.
struct Slurm {
    folder: tempfile::TempDir,
}

impl Slurm {
    fn up() -> Self {
        let slurm = Self { folder: tempfile::tempdir().unwrap() };
        // Its daemons run as another user.
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(slurm.folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        slurm.cluster(&["up"], &[]);
        slurm
    }

    fn cluster(&self, what: &[&str], more: &[&str]) {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("cluster/slurm");
        let status = Command::new(script).args(what).arg(self.folder.path()).args(more).status().unwrap();
        assert!(status.success(), "{what:?}");
    }

    /// A program of Slurm; gives what it says.
    fn tool(&self, name: &str, arguments: &[&str]) -> String {
        let mut command = Command::new(name);
        let ran = self.with_cluster(command.args(arguments)).output().unwrap();
        assert!(ran.status.success(), "{name} {arguments:?}: {}", String::from_utf8_lossy(&ran.stderr));
        String::from_utf8_lossy(&ran.stdout).trim().to_owned()
    }

    /// Ranks of several nodes are on one machine: they must not try its shared memory.
    fn with_cluster<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command.env("SLURM_CONF", self.conf()).env("OMPI_MCA_btl", "tcp,self").current_dir(self.folder.path())
    }

    fn conf(&self) -> PathBuf {
        self.folder.path().join("slurm.conf")
    }

    /// Submits a run on two nodes from the login node, and gives the job's number when it has made a checkpoint.
    fn submit(&self, experiment: &Experiment, options: &[&str]) -> String {
        let mut command = experiment.launcher(1, "run", &[&LONG[..], options].concat());
        command.args(["--via", "slurm", "--nodes", "2"]);
        let job = run_ok(self.with_cluster(&mut command)).stdout.trim().to_owned();
        wait_until("a checkpoint", || has_checkpoint(experiment, "run"));
        job
    }

    /// Waits until the run has reached its last step and the job is gone.
    fn wait_for_end(&self, experiment: &Experiment) {
        wait_until("the last step", || experiment.log("run").iter().any(|event| event["event"] == "done"));
        wait_until("the end of the job", || self.tool("squeue", &["-h", "-t", "R"]).is_empty());
    }

    fn said(&self, job: &str) -> String {
        std::fs::read_to_string(self.folder.path().join(format!("slurm-{job}.out"))).unwrap_or_default()
    }
}

impl Drop for Slurm {
    fn drop(&mut self) {
        self.cluster(&["down"], &[]);
    }
}

fn reference(experiment: &Experiment) -> Vec<String> {
    run_ok(&mut experiment.launcher(1, "reference", &LONG));
    experiment.digest("reference")
}

/// Attempts and the steps that they resumed from.
fn resumed(experiment: &Experiment) -> Vec<Option<u64>> {
    let log = experiment.log("run");
    log.iter().filter(|event| event["event"] == "start").map(|event| event["resumed_from"].as_u64()).collect()
}

#[test]
#[ignore = "needs root and Slurm: ./dev test --slurm"]
fn a_job_that_is_requeued_saves_and_goes_on_to_the_same_bits() {
    let (slurm, experiment) = (Slurm::up(), Experiment::new());
    let reference = reference(&experiment);
    let job = slurm.submit(&experiment, &[]);
    slurm.tool("scontrol", &["requeue", &job]);
    slurm.wait_for_end(&experiment);
    assert!(slurm.said(&job).contains("stopped and saved"), "{}", slurm.said(&job));
    assert!(resumed(&experiment).len() == 2 && resumed(&experiment)[1].is_some(), "{:?}", resumed(&experiment));
    assert_eq!(experiment.digest("run"), reference);
}

#[test]
#[ignore = "needs root and Slurm: ./dev test --slurm"]
fn before_its_time_is_over_a_job_saves_and_requeues_itself() {
    let (slurm, experiment) = (Slurm::up(), Experiment::new());
    let reference = reference(&experiment);
    // A minute is the least that Slurm knows; it looks at the clock now and then.
    let limit = ["train.steps=1000000", "cluster.slurm.time=1", "cluster.slurm.save_before_end_s=50"];
    let job = slurm.submit(&experiment, &limit);
    wait_until("the second start", || resumed(&experiment).len() > 1);
    assert!(slurm.said(&job).contains("stopped and saved"), "{}", slurm.said(&job));
    slurm.tool("scancel", &["--full", &job]);
    wait_until("the end of the job", || slurm.tool("squeue", &["-h"]).is_empty());
    // The steps that it has made are those of the undisturbed run.
    let log = experiment.log("run");
    let losses = log.iter().filter(|event| event["event"] == "step" && event["step"].as_u64() <= Some(1500));
    let same = experiment.log("reference");
    let mut compared = 0;
    for event in losses.filter(|event| event["step"].as_u64().is_some_and(|step| step % 100 == 0)) {
        let twin = same.iter().find(|twin| twin["event"] == "step" && twin["step"] == event["step"]).unwrap();
        assert_eq!(twin["loss"], event["loss"], "{event}");
        compared += 1;
    }
    assert!(compared > 0 && !reference.is_empty());
}

#[test]
#[ignore = "needs root and Slurm: ./dev test --slurm"]
fn after_a_node_has_died_the_job_goes_on_elsewhere_to_the_same_bits() {
    let (slurm, experiment) = (Slurm::up(), Experiment::new());
    let reference = reference(&experiment);
    let job = slurm.submit(&experiment, &[]);
    let node = slurm.tool("squeue", &["-h", "-j", &job, "-o", "%B"]);
    let nodes = slurm.tool("scontrol", &["show", "hostnames", &slurm.tool("squeue", &["-h", "-j", &job, "-o", "%N"])]);
    let other = nodes.lines().find(|name| **name != node).unwrap();
    slurm.cluster(&["kill"], &[other]);
    slurm.wait_for_end(&experiment);
    assert!(resumed(&experiment).len() == 2 && resumed(&experiment)[1].is_some(), "{:?}", resumed(&experiment));
    assert_eq!(experiment.digest("run"), reference);
}

#[test]
#[ignore = "needs root and Slurm: ./dev test --slurm"]
fn ranks_that_meet_over_tcp_know_each_other_by_a_secret_that_nobody_else_sees() {
    let (slurm, experiment) = (Slurm::up(), Experiment::new());
    let reference = reference(&experiment);
    // The nodes of this cluster have no names that anybody could look up.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut command = experiment.launcher(
        1,
        "run",
        &[&LONG[..], &["cluster.slurm.mpi=\"none\"", "cluster.interface=\"lo\""]].concat(),
    );
    command.args(["--via", "slurm", "--nodes", "2"]).env("DITHAROS_RENDEZVOUS", format!("127.0.0.1:{port}"));
    let job = run_ok(slurm.with_cluster(&mut command)).stdout.trim().to_owned();
    wait_until("a checkpoint", || has_checkpoint(&experiment, "run"));

    let ranks = crate::stopping::ranks_of(experiment.path("run").to_str().unwrap());
    let secrets: std::collections::BTreeSet<String> = ranks
        .iter()
        .filter_map(|pid| std::fs::read(format!("/proc/{pid}/environ")).ok())
        .filter_map(|environ| {
            let text = String::from_utf8_lossy(&environ).into_owned();
            text.split('\0').find_map(|pair| pair.strip_prefix("DITHAROS_RENDEZVOUS_TOKEN=")).map(str::to_owned)
        })
        .collect();
    assert_eq!(secrets.len(), 1, "all ranks have the same");
    let secret = secrets.first().unwrap();
    assert_eq!(secret.len(), 64);
    let shown = [
        String::from_utf8(Command::new("ps").args(["-eo", "args"]).output().unwrap().stdout).unwrap(),
        slurm.tool("scontrol", &["show", "job", "-dd", &job]),
        slurm.tool("scontrol", &["show", "step"]),
        slurm.tool("scontrol", &["write", "batch_script", &job, "-"]),
    ];
    assert!(shown.iter().all(|text| !text.contains(secret.as_str())));
    slurm.wait_for_end(&experiment);
    assert!(!slurm.said(&job).contains(secret.as_str()));
    assert_eq!(experiment.digest("run"), reference);
    assert_eq!(experiment.log("run").iter().find(|event| event["event"] == "start").unwrap()["world_size"], 2);
}
