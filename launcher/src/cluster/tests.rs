#![allow(clippy::unwrap_used)]

use super::*;
use crate::cli::Nodes;
use crate::machine::Machine;
use crate::plan::{Job, Request};

const NODE: Machine = Machine { cores: 8, gpus: 0 };

fn config(extra: &str) -> RunConfig {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("run.toml");
    let text = format!(
        "run.url = \"s3://bucket/r\"\ndata.url = \"s3://bucket/d\"\nmodel.preset = \"DiT-S/2\"\n\
         [train]\nsteps = 7\nmicro_batch = 8\nlanes = 8\nthreads_per_rank = 2\n{extra}"
    );
    std::fs::write(&file, text).unwrap();
    RunConfig::load(&file, &[]).unwrap()
}

fn trainer() -> TrainerCall {
    TrainerCall {
        program: "/opt/d/trainer".into(),
        config: "/runs/it's here.toml".into(),
        overrides: vec!["train.steps=9".into()],
        command: "train",
        options: Vec::new(),
    }
}

fn hosts(names: &[&str]) -> Request {
    Request { hosts: names.iter().map(|name| name.to_string()).collect(), ..Request::default() }
}

fn start(config: &RunConfig, request: &Request) -> (Plan, Result<Start, ClusterError>) {
    let plan = Plan::new(config, request, &NODE).unwrap();
    let started = for_plan(&plan, config).start(&plan, &trainer());
    (plan, started)
}

fn engine(config: &RunConfig, request: &Request) -> EngineCommand {
    match start(config, request).1.unwrap() {
        Start::Engine(command) => command,
        Start::Handover(handover) => panic!("{}", handover.text),
    }
}

fn handover(config: &RunConfig, request: &Request) -> Handover {
    match start(config, request).1.unwrap() {
        Start::Handover(handover) => handover,
        Start::Engine(command) => panic!("{command:?}"),
    }
}

fn line(command: &EngineCommand) -> String {
    command.shown().join(" ")
}

impl EngineCommand {
    fn shown(&self) -> Vec<String> {
        shown(&self.argv)
    }
}

const CALL: &str = "/opt/d/trainer train --config /runs/it's here.toml --set train.steps=9";

#[test]
fn one_rank_here_is_the_trainer_itself_and_several_are_mpiruns() {
    let alone = engine(&config(""), &Request { procs_per_node: Some(1), ..Request::default() });
    assert_eq!((line(&alone).as_str(), alone.output), (CALL, Output::RankZero));
    assert!(alone.env.contains(&("OMP_NUM_THREADS", "2".to_owned())));
    let four = engine(&config(""), &Request::default());
    assert!(line(&four).ends_with(&format!("--mca btl_tcp_if_include lo -n 4 {CALL}")), "{}", line(&four));
    assert_eq!(four.output, Output::Tagged);
}

#[test]
fn hosts_get_neighbouring_ranks_and_the_names_of_variables_but_not_their_values() {
    let config = config("[cluster]\ninterface = \"eth0\"\nremote_shell = \"/opt/rsh\"\nbind = \"core\"\n");
    let plan = Plan::new(&config, &hosts(&["ada", "bob", "cy"]), &NODE).unwrap();
    assert_eq!((plan.nodes, plan.procs_per_node), (2, 4));
    let variables = ["AWS_SECRET_ACCESS_KEY", "HOME", "DITHAROS_EVENTS", "SECRET"].map(str::to_owned).to_vec();
    let mpirun = mpirun::Mpirun { config: config.cluster.clone(), is_root: false, variables };
    let Start::Engine(command) = mpirun.start(&plan, &trainer()).unwrap() else { panic!() };
    let line = line(&command);
    assert!(line.ends_with(&format!("--host ada:4,bob:4 -n 8 {CALL}")), "{line}");
    for part in [
        "--mca plm_rsh_agent /opt/rsh ",
        "--mca oob_tcp_if_include eth0 --mca btl_tcp_if_include eth0 ",
        "--mca oob_tcp_keepalive_time 2 ",
        "--map-by slot:PE=2 --bind-to core ",
        "-x AWS_SECRET_ACCESS_KEY -x DITHAROS_EVENTS -x MKL_DYNAMIC ",
    ] {
        assert!(line.contains(part), "{part} in {line}");
    }
    assert!(!line.contains("HOME") && !line.contains("-x SECRET") && !line.contains("allow-run-as-root"), "{line}");
    assert_eq!(line.matches("DITHAROS_EVENTS").count(), 1);
}

#[test]
fn hosts_of_the_config_are_those_of_the_command_line() {
    let config = config("[cluster]\nhosts = [\"ada\", \"bob\"]\n");
    assert!(line(&engine(&config, &Request::default())).contains("--host ada:4,bob:4 -n 8"));
    assert!(line(&engine(&config, &hosts(&["cy"]))).contains("--host cy:4 -n 4"));
}

#[test]
fn what_is_missing_is_said_with_the_remedy() {
    let why = |config: &RunConfig, request: Request| start(config, &request).1.unwrap_err().to_string();
    let nodes = |via| Request { nodes: Some(Nodes::exactly(2)), via, ..Request::default() };
    assert!(why(&config(""), nodes(None)).contains("--hosts a,b,…"));
    assert!(why(&config(""), nodes(Some(Via::Local))).contains("--via mpirun with --hosts"));
    assert!(why(&config(""), nodes(Some(Via::Kubernetes))).contains("`cluster.kubernetes.image` is missing"));
    let via = |via| Request { via: Some(via), ..hosts(&["ada"]) };
    assert!(why(&config(""), via(Via::Slurm)).contains("leave them out"));
    let sample = |via| Request { via: Some(via), job: Job::Sample, ..Request::default() };
    assert!(why(&config(""), sample(Via::Slurm)).contains("inside of a job"));
}

#[test]
fn inside_an_allocation_srun_starts_the_ranks_on_its_nodes() {
    let allocation = Request { allocation: Some(4), procs_per_node: Some(2), ..Request::default() };
    let command = engine(&config(""), &allocation);
    let sizes = "--nodes=4 --ntasks=8 --ntasks-per-node=2 --cpus-per-task=2";
    let wanted = format!("srun --mpi=pmix --kill-on-bad-exit=1 --label {sizes} {CALL}");
    assert_eq!((line(&command), command.output), (wanted, Output::Labelled));
    let elsewhere = Request { hosts: vec!["ada".into()], ..allocation.clone() };
    assert!(line(&engine(&config(""), &elsewhere)).starts_with("mpirun "));
    let more = Plan::new(&config(""), &Request { nodes: Some(Nodes::exactly(5)), ..allocation }, &NODE).unwrap_err();
    assert!(more.to_string().contains("allocation has (4)"), "{more}");
}

#[test]
fn a_batch_script_is_sound_bash_whose_words_are_what_was_asked() {
    let config = config(
        "[cluster.slurm]\npartition = \"gpu\"\ntime = \"1-12:00:00\"\nconstraint = \"a100 & nvlink\"\noptions = [\"--mem=0\"]\n",
    );
    let asked = Request {
        nodes: Some(Nodes::exactly(2)),
        via: Some(Via::Slurm),
        procs_per_node: Some(4),
        ..Request::default()
    };
    let Handover { text, submit } = handover(&config, &asked);
    assert_eq!(submit, ["sbatch", "--parsable"]);
    for part in [
        "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=4\n",
        "#SBATCH --signal=B:USR1@120\n",
        "#SBATCH --requeue\n",
        "#SBATCH --partition=gpu\n#SBATCH \"--constraint=a100 & nvlink\"\n#SBATCH --time=1-12:00:00\n#SBATCH --mem=0\n",
        r"'/opt/d/launcher' '--config' '/runs/it'\''s here.toml' '--set' 'train.steps=9' '--via' 'slurm' '--procs-per-node' '4' &",
        "[ \"$time_is_over$code\" = yes75 ] && scontrol requeue",
    ] {
        assert!(text.contains(part), "{part} in\n{text}");
    }
    // In a chain the next job goes on.
    let mut chained = config;
    chained.cluster.slurm.chain = 5;
    let text = handover(&chained, &asked).text;
    assert!(text.contains("#SBATCH --array=1-5%1\n") && !text.contains("scontrol"), "{text}");
}

/// Runs the script with a launcher that saves when it is asked to.
#[test]
fn the_batch_script_saves_when_asked_and_requeues_at_its_time_limit_only() {
    let folder = tempfile::tempdir().unwrap();
    let program = |name: &str, text: &str| {
        use std::os::unix::fs::PermissionsExt;
        let path = folder.path().join(name);
        std::fs::write(&path, format!("#!/bin/bash\n{text}")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    };
    // Bash runs a trap when the sleep has ended.
    program("launcher", "trap 'exit 75' USR1; touch \"$0.up\"; while :; do sleep 0.05; done");
    program("scontrol", "echo \"$@\" > \"$0.said\"");
    let config = config("");
    let plan = Plan::new(&config, &Request { via: Some(Via::Slurm), ..Request::default() }, &NODE).unwrap();
    let trainer = TrainerCall { program: folder.path().join("trainer"), ..trainer() };
    let Start::Handover(script) = for_plan(&plan, &config).start(&plan, &trainer).unwrap() else { panic!() };
    use nix::sys::signal::Signal;
    for (signal, is_requeued) in [(Signal::SIGTERM, false), (Signal::SIGUSR1, true)] {
        let mut job = std::process::Command::new("bash")
            .args(["-c", &script.text])
            .env("PATH", format!("{}:/usr/bin:/bin", folder.path().display()))
            .env("SLURM_JOB_ID", "77")
            .spawn()
            .unwrap();
        while std::fs::remove_file(folder.path().join("launcher.up")).is_err() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(job.id() as i32), signal).unwrap();
        assert_eq!(job.wait().unwrap().code(), Some(75));
        let said = std::fs::read_to_string(folder.path().join("scontrol.said")).ok();
        assert_eq!(said.as_deref(), is_requeued.then_some("requeue 77\n"), "{signal}");
    }
}

#[test]
fn a_manifest_has_the_config_the_workers_and_a_launcher_that_comes_back() {
    let config = config(
        "[cluster]\ngpus_per_node = 4\n[cluster.kubernetes]\nimage = \"ditharos:1\"\nname = \"dit\"\nnamespace = \"ml\"\n\
         claims = [\"data:/data\"]\nsecret = \"s3\"\n",
    );
    let folder = tempfile::tempdir().unwrap();
    let trainer = TrainerCall { config: folder.path().join("run.toml"), ..trainer() };
    std::fs::write(&trainer.config, "run.url = 1").unwrap();
    let request = Request { nodes: Some(Nodes::exactly(2)), via: Some(Via::Kubernetes), ..Request::default() };
    let plan = Plan::new(&config, &request, &NODE).unwrap();
    let Start::Handover(manifest) = for_plan(&plan, &config).start(&plan, &trainer).unwrap() else { panic!() };
    assert_eq!(manifest.submit, Vec::<OsString>::new());
    let list: serde_json::Value = serde_json::from_str(&manifest.text).unwrap();
    let (map, job) = (&list["items"][0], &list["items"][1]);
    assert_eq!((&map["kind"], &map["data"]["run.toml"]), (&"ConfigMap".into(), &"run.url = 1".into()));
    assert_eq!((&job["apiVersion"], &job["kind"]), (&"kubeflow.org/v2beta1".into(), &"MPIJob".into()));
    assert_eq!(job["metadata"], serde_json::json!({"name": "dit", "namespace": "ml"}));
    let spec = &job["spec"];
    assert_eq!(spec["slotsPerWorker"], 4);
    let (workers, launcher) = (&spec["mpiReplicaSpecs"]["Worker"], &spec["mpiReplicaSpecs"]["Launcher"]);
    assert_eq!((&workers["replicas"], &launcher["replicas"]), (&2.into(), &1.into()));
    assert_eq!(launcher["restartPolicy"], "OnFailure");
    let container = |replica: &serde_json::Value| replica["template"]["spec"]["containers"][0].clone();
    assert_eq!(container(workers)["resources"]["limits"]["nvidia.com/gpu"], 4);
    let command = container(launcher)["command"].to_string();
    let wanted = r#"["/opt/ditharos/bin/launcher","--config","/etc/ditharos/run.toml","--set","train.steps=9","--via","mpirun","--hostfile","/etc/mpi/hostfile","--nodes","2","--procs-per-node","4"]"#;
    assert_eq!(command, wanted);
    assert_eq!(container(workers)["envFrom"][0]["secretRef"]["name"], "s3");
    assert!(container(workers)["volumeMounts"].to_string().contains(r#"{"mountPath":"/data","name":"claim-0"}"#));
    // Who applies a manifest reads it.
    let mut secret = config;
    secret.run.url = "s3://key:hunter2@bucket/r".to_owned();
    let refused = for_plan(&plan, &secret).start(&plan, &trainer).unwrap_err().to_string();
    assert!(refused.contains("`run.url` holds credentials") && !refused.contains("hunter2"), "{refused}");
}
