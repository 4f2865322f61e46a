//! The launcher from the outside: the real program, with a shell script in the place of the trainer beside it.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Far above what any case takes; a launcher that hangs is killed and the test fails.
const PATIENCE: Duration = Duration::from_secs(60);

const START: &str = r#"echo '{"event":"start","attempt":1,"resumed_from":null,"world_size":1,"lanes":4,"steps":10,"params":5,"time":0.0}'"#;
const DONE: &str = r#"echo '{"event":"done","step":10,"time":0.0}'"#;

/// Writing a program and starting one must not overlap between test threads: a child that is being started holds the
/// file open for writing, and the kernel refuses to execute it.
static SPAWNING: Mutex<()> = Mutex::new(());

/// A folder with the launcher, a fake trainer and a config.
struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    fn new(trainer: &str) -> Bench {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let bench = Bench { folder };
        let _guard = SPAWNING.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // A hard link, so that the program finds itself in this folder.
        fs::hard_link(env!("CARGO_BIN_EXE_launcher"), bench.path("launcher")).unwrap();
        let script = format!(
            "#!/bin/bash\nRANK=${{OMPI_COMM_WORLD_RANK:-0}}\ncd {}\n{trainer}\n",
            bench.folder.path().display()
        );
        fs::write(bench.path("trainer"), script).unwrap();
        fs::set_permissions(bench.path("trainer"), fs::Permissions::from_mode(0o755)).unwrap();
        let config = "run.url = \"s3://key:hunter2@bucket/run\"\ndata.url = \"data\"\nmodel.preset = \"DiT-S/2\"\n\
                      [train]\nsteps = 10\nlanes = 4\nmicro_batch = 8\nthreads_per_rank = 3\n";
        fs::write(bench.path("run.toml"), config).unwrap();
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn start(&self, arguments: &[&str]) -> Child {
        self.start_with(&[], arguments)
    }

    fn start_with(&self, variables: &[(&str, &str)], arguments: &[&str]) -> Child {
        let _guard = SPAWNING.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        Command::new(self.path("launcher"))
            .current_dir(self.folder.path())
            .args(["--config", "run.toml"])
            .args(arguments)
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// Another program in this folder; gives a PATH on which it comes first.
    fn program(&self, name: &str, text: &str) -> String {
        let _guard = SPAWNING.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        fs::write(self.path(name), format!("#!/bin/bash\n{text}\n")).unwrap();
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o755)).unwrap();
        format!("{}:{}", self.folder.path().display(), std::env::var("PATH").unwrap())
    }

    /// Runs to the end with `procs` ranks.
    fn run(&self, procs: usize) -> Ended {
        finish(self.start(&["--procs-per-node", &procs.to_string()]))
    }

    fn wait_for(&self, name: &str) -> String {
        let began = Instant::now();
        loop {
            match fs::read_to_string(self.path(name)) {
                Ok(text) if text.ends_with('\n') => return text.trim().to_owned(),
                _ if began.elapsed() > PATIENCE => panic!("{name} was never written"),
                _ => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }
}

struct Ended {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Ended {
    fn last_line(&self) -> &str {
        self.stderr.lines().last().unwrap_or_default()
    }
}

fn finish(child: Child) -> Ended {
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
    let (done, is_done) = std::sync::mpsc::channel::<()>();
    std::thread::spawn(move || {
        if is_done.recv_timeout(PATIENCE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            let _ = kill(pid, Signal::SIGKILL);
        }
    });
    let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
    drop(done);
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ended { code: status.code(), stdout: text(stdout), stderr: text(stderr) }
}

/// A process that is neither gone nor a zombie.
fn is_alive(pid: &str) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

fn assert_gone(pid: &str) {
    let began = Instant::now();
    while is_alive(pid) {
        assert!(began.elapsed() < PATIENCE, "process {pid} was left behind");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn the_last_step_must_be_reported_for_success() {
    for procs in [1, 2] {
        assert_eq!(Bench::new(&format!("{START}; [ $RANK = 0 ] && {DONE}; exit 0")).run(procs).code, Some(0));
        let silent = Bench::new(&format!("{START}; exit 0")).run(procs);
        assert_eq!(silent.code, Some(1));
        assert!(silent.last_line().contains("step 10 was not reported as done"), "{}", silent.stderr);
    }
    let early = Bench::new(r#"echo '{"event":"done","step":9,"time":0.0}'"#).run(1);
    assert_eq!(early.code, Some(1), "{}", early.stderr);
}

#[test]
fn a_done_event_of_another_rank_does_not_count() {
    assert_eq!(Bench::new(&format!("[ $RANK = 1 ] && {DONE}; exit 0")).run(2).code, Some(1));
}

#[test]
fn saved_and_resumable_passes_through() {
    for procs in [1, 2] {
        let trainer = format!(
            "{START}; echo '{{\"event\":\"checkpoint\",\"step\":7,\"url\":\"u\",\"time\":0.0}}'; sleep 0.5; exit 75"
        );
        let ended = Bench::new(&trainer).run(procs);
        assert_eq!(ended.code, Some(75), "{}", ended.stderr);
        assert!(ended.last_line().contains("continue from step 7"), "{}", ended.stderr);
        assert!(!ended.stderr.contains("non-zero"), "mpirun's remarks on code 75 only confuse: {}", ended.stderr);
    }
}

#[test]
fn lines_are_prefixed_with_their_rank_and_events_become_readable() {
    let ended =
        Bench::new(&format!("{START}; echo out $RANK; echo err $RANK >&2; [ $RANK = 0 ] && {DONE}; exit 0")).run(2);
    for rank in [0, 1] {
        assert!(ended.stdout.lines().any(|line| line == format!("[rank {rank}] out {rank}")), "{}", ended.stdout);
        assert!(ended.stderr.lines().any(|line| line == format!("[rank {rank}] err {rank}")), "{}", ended.stderr);
    }
    assert!(ended.stderr.contains("start: attempt 1, a fresh run, 4 lanes"), "{}", ended.stderr);
}

#[test]
fn ranks_get_the_config_the_overrides_and_the_agreed_threads() {
    let bench = Bench::new(&format!(
        "echo \"$@\" > arguments; env | grep -E '^(OMP|MKL)_|^DITHAROS_' | sort > environment; {DONE}"
    ));
    let child = bench.start(&["--procs-per-node", "1", "--set", "seed=3", "--set", "ema.decay=0.5"]);
    assert_eq!(finish(child).code, Some(0));
    let config = bench.path("run.toml");
    assert_eq!(
        bench.wait_for("arguments"),
        format!("train --config {} --set seed=3 --set ema.decay=0.5", config.display())
    );
    let expected = "DITHAROS_EVENTS=stdout\nMKL_DYNAMIC=FALSE\nMKL_NUM_THREADS=3\nOMP_DYNAMIC=FALSE\nOMP_NUM_THREADS=3";
    assert_eq!(bench.wait_for("environment"), expected);
}

#[test]
fn a_failing_rank_is_named_with_its_error_and_the_others_are_ended() {
    let bench = Bench::new(&format!(
        "{START}; if [ $RANK = 1 ]; then sleep 0.5; echo 'trainer: part.parquet is cut off' >&2; exit 3; fi; echo $$ > pid; exec sleep 600"
    ));
    let ended = bench.run(2);
    assert_eq!(ended.code, Some(1));
    assert!(ended.last_line().contains("rank 1 failed (exit code 3): part.parquet is cut off"), "{}", ended.stderr);
    assert_gone(&bench.wait_for("pid"));

    let alone = Bench::new("echo 'trainer: no VAE' >&2; exit 1").run(1);
    assert_eq!(alone.code, Some(1));
    assert!(alone.last_line().contains("rank 0 failed (exit code 1): no VAE"), "{}", alone.stderr);
}

#[test]
fn a_killed_rank_is_named_with_its_signal() {
    let bench = Bench::new(&format!("{START}; echo $$ > pid$RANK; exec sleep 600"));
    let child = bench.start(&["--procs-per-node", "2"]);
    let (victim, other) = (bench.wait_for("pid1"), bench.wait_for("pid0"));
    kill(Pid::from_raw(victim.parse().unwrap()), Signal::SIGKILL).unwrap();
    let ended = finish(child);
    assert_eq!(ended.code, Some(1));
    assert!(ended.last_line().contains("rank 1 failed (killed by signal 9 (SIGKILL))"), "{}", ended.stderr);
    assert_gone(&other);

    let bench = Bench::new("echo $$ > pid; exec sleep 600");
    let child = bench.start(&["--procs-per-node", "1"]);
    kill(Pid::from_raw(bench.wait_for("pid").parse().unwrap()), Signal::SIGKILL).unwrap();
    assert!(finish(child).last_line().contains("rank 0 failed (killed by signal 9 (SIGKILL))"));
}

#[test]
fn a_refused_config_of_the_trainer_keeps_its_code() {
    assert_eq!(Bench::new("echo 'trainer: num_classes' >&2; exit 2").run(1).code, Some(2));
}

/// Ranks that save on USR1, ignore other requests, and note the signals.
fn saving() -> String {
    format!(
        "trap '' TERM INT; trap 'echo usr1 > saved$RANK; exit 75' USR1; {START}; echo up > up$RANK; while true; do sleep 0.05; done"
    )
}

#[test]
fn a_stop_request_reaches_every_rank_as_usr1() {
    for (procs, signal) in [(1, Signal::SIGTERM), (2, Signal::SIGTERM), (1, Signal::SIGINT), (2, Signal::SIGUSR1)] {
        let bench = Bench::new(&saving());
        let child = bench.start(&["--procs-per-node", &procs.to_string()]);
        (0..procs).for_each(|rank| assert_eq!(bench.wait_for(&format!("up{rank}")), "up"));
        kill(Pid::from_raw(child.id() as i32), signal).unwrap();
        let ended = finish(child);
        assert_eq!(ended.code, Some(75), "{signal}: {}", ended.stderr);
        (0..procs).for_each(|rank| assert_eq!(bench.wait_for(&format!("saved{rank}")), "usr1"));
    }
}

#[test]
fn a_stop_request_waits_until_the_ranks_are_up() {
    let start = START;
    let bench = Bench::new(&format!(
        "echo $$ > pid; while [ ! -e go ]; do sleep 0.05; done; trap 'exit 75' USR1; {start}; while true; do sleep 0.05; done"
    ));
    let mut child = bench.start(&["--procs-per-node", "1"]);
    bench.wait_for("pid");
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    // The launcher has taken the request once it says so; only then may the rank go on.
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut said = String::new();
    while !said.contains("SIGTERM") {
        assert_ne!(stderr.read_line(&mut said).unwrap(), 0, "the launcher ended early: {said}");
    }
    fs::write(bench.path("go"), "").unwrap();
    let drain = std::thread::spawn(move || stderr.read_to_string(&mut String::new()));
    assert_eq!(finish(child).code, Some(75));
    drain.join().unwrap().unwrap();
}

#[test]
fn a_second_request_ends_ranks_that_do_not_listen() {
    for procs in [1, 2] {
        let bench =
            Bench::new(&format!("trap '' TERM INT USR1; {START}; echo $$ > pid$RANK; while true; do sleep 0.05; done"));
        let child = bench.start(&["--procs-per-node", &procs.to_string()]);
        let pids: Vec<String> = (0..procs).map(|rank| bench.wait_for(&format!("pid{rank}"))).collect();
        let launcher = Pid::from_raw(child.id() as i32);
        kill(launcher, Signal::SIGTERM).unwrap();
        std::thread::sleep(Duration::from_millis(300)); // two pending signals of one kind would merge
        kill(launcher, Signal::SIGTERM).unwrap();
        let ended = finish(child);
        assert_eq!(ended.code, Some(1), "{}", ended.stderr);
        pids.iter().for_each(|pid| assert_gone(pid));
    }
}

#[test]
fn ranks_do_not_outlive_a_killed_launcher() {
    for procs in [1, 2] {
        let bench = Bench::new(&format!("{START}; echo $$ > pid$RANK; exec sleep 600"));
        let mut child = bench.start(&["--procs-per-node", &procs.to_string()]);
        let pids: Vec<String> = (0..procs).map(|rank| bench.wait_for(&format!("pid{rank}"))).collect();
        child.kill().unwrap();
        child.wait().unwrap();
        pids.iter().for_each(|pid| assert_gone(pid));
    }
}

#[test]
fn a_process_that_keeps_the_pipes_open_is_not_waited_for() {
    let bench = Bench::new(&format!("sleep 600 & echo $! > pid; {DONE}; exit 0"));
    let ended = bench.run(1);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert_gone(&bench.wait_for("pid"));
}

#[test]
fn a_dry_run_prints_the_plan_and_starts_nothing() {
    let bench = Bench::new("touch started");
    let plan = |arguments: &[&str]| {
        let ended = finish(bench.start(&[arguments, &["--dry-run", "--json"]].concat()));
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        assert!(!ended.stdout.contains("hunter2"), "{}", ended.stdout);
        serde_json::from_str::<serde_json::Value>(&ended.stdout).unwrap()
    };
    let local = plan(&["--procs-per-node", "2", "--set", "train.steps=20"]);
    let expected = serde_json::json!({
        "nodes": 1, "procs_per_node": 2, "world_size": 2, "lanes": 4, "lanes_per_rank": 2, "micro_batch": 8,
        "global_batch": 32, "threads_per_rank": 3, "steps": 20, "run_url": "s3://bucket/run", "via": "local",
    });
    for (key, value) in expected.as_object().unwrap() {
        assert_eq!(&local[key], value, "{key}");
    }
    let command: Vec<&str> = local["command"].as_array().unwrap().iter().filter_map(|part| part.as_str()).collect();
    assert_eq!(command[0], "mpirun");
    assert!(command.ends_with(&["--config", bench.path("run.toml").to_str().unwrap(), "--set", "train.steps=20"]));
    // What it will take is there too.
    for key in ["/memory/peak_bytes", "/wire/gradients_bytes_per_rank", "/time/step_s", "/time/days"] {
        assert!(local.pointer(key).and_then(serde_json::Value::as_f64).unwrap() > 0.0, "{key}");
    }
    let many = plan(&["--nodes", "3", "--procs-per-node", "1"]);
    assert_eq!((&many["nodes"], &many["idle_nodes"]), (&serde_json::json!(2), &serde_json::json!([2])));
    assert!(many["command"].is_null() && many["missing"].as_str().unwrap().contains("--hostfile FILE"));
    assert!(!bench.path("started").exists());
}

#[test]
fn what_lacks_something_or_is_not_possible_is_refused_and_nothing_starts() {
    let bench = Bench::new("touch started");
    for (arguments, said) in [
        (&["--nodes", "2"][..], "--hosts a,b,…"),
        (&["--via", "kubernetes"], "`run.url` holds credentials"),
        (&["--via", "kubernetes", "--set", "run.url=s3://bucket/run"], "cluster.kubernetes.image"),
        (&["--via", "local", "--hosts", "ada,bob"], "leave them out"),
        (&["--hosts=-mca,bob"], "no host name"),
        (&["--set", "cluster.hosts=[\"ada;rm\"]"], "cluster.hosts"),
        (&["--procs-per-node", "3"], "allowed world sizes are 1, 2, 4"),
        (&["--procs-per-node", "8"], "allowed world sizes are 1, 2, 4"),
        (&["--json"], "--dry-run"),
    ] {
        let ended = finish(bench.start(arguments));
        assert_eq!(ended.code, Some(2), "{arguments:?}: {}", ended.stderr);
        assert!(ended.stderr.contains(said), "{arguments:?}: {}", ended.stderr);
    }
    fs::remove_file(bench.path("trainer")).unwrap();
    let ended = bench.run(1);
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("no trainer beside the launcher"), "{}", ended.stderr);
    assert!(!bench.path("started").exists());
}

#[test]
fn three_mistakes_in_a_config_are_three_lines() {
    let bench = Bench::new("touch started");
    let text = fs::read_to_string(bench.path("run.toml")).unwrap();
    let text = text
        .replace("lanes = 4", "lanes = 12")
        .replace("micro_batch = 8", "microbatch = 8")
        .replace("DiT-S/2", "DiT-S/3");
    // The misspelt key makes two lines: it is unknown, and the right one is missing.
    fs::write(bench.path("run.toml"), text.replace("steps = 10", "steps = 10\nmicro_batch = 8")).unwrap();
    let ended = bench.run(1);
    assert_eq!(ended.code, Some(2));
    assert!(ended.stderr.contains("3 mistakes"), "{}", ended.stderr);
    for key in ["`train.lanes` = 12", "`train.microbatch`", "`model.preset` = \"DiT-S/3\""] {
        assert!(ended.stderr.contains(key), "{key}: {}", ended.stderr);
    }
    assert!(!bench.path("started").exists());
}

/// Starts as many tasks as it is asked for, labels their lines as srun does, and says how they ended.
const SRUN: &str = r#"
for word; do
    case $word in --ntasks=*) tasks=${word#*=};; --*) ;; *) break;; esac
    shift
done
pids=()
trap 'kill -USR1 "${pids[@]}"' USR1
for task in $(seq 0 $((tasks - 1))); do
    { OMPI_COMM_WORLD_RANK=$task "$@" 2> >(sed -u "s/^/$task: /" >&2); code=$?
      [ $code = 0 ] || echo "srun: error: sn$task: task $task: Exited with exit code $code" >&2
      exit $code; } > >(sed -u "s/^/$task: /") &
    pids+=($!)
done
worst=0
for pid in "${pids[@]}"; do wait "$pid"; code=$?; [ $code -gt $worst ] && worst=$code; done
sleep 0.2
exit $worst"#;

#[test]
fn in_a_slurm_allocation_ranks_run_under_srun_and_are_told_apart() {
    let start = |bench: &Bench, nodes| {
        let path = bench.program("srun", SRUN);
        bench.start_with(
            &[("PATH", &path), ("SLURM_JOB_ID", "7"), ("SLURM_JOB_NUM_NODES", nodes)],
            &["--procs-per-node", "1"],
        )
    };
    let trainer = format!("[ $RANK = 0 ] && {{ {START}; {DONE}; }}; echo \"hello of $RANK\"");
    let ended = finish(start(&Bench::new(&trainer), "2"));
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(
        ended.stdout.contains("[rank 0] hello of 0") && ended.stdout.contains("[rank 1] hello of 1"),
        "{}",
        ended.stdout
    );

    let trainer = format!(
        "[ $RANK = 0 ] && {START}; [ $RANK = 3 ] && {{ echo 'trainer: error: part.parquet: cut off' >&2; exit 1; }}; exit 0"
    );
    let ended = finish(start(&Bench::new(&trainer), "4"));
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(
        ended.last_line().contains("rank 3 failed") && ended.last_line().contains("part.parquet: cut off"),
        "{}",
        ended.stderr
    );
}

#[test]
fn from_a_login_node_a_job_is_submitted_that_runs_this_launcher() {
    let bench = Bench::new("touch started");
    let path = bench.program("sbatch", "cat > \"$(dirname \"$0\")/job.sh\"; echo 4711");
    let submit = ["--via", "slurm", "--nodes", "2", "--procs-per-node", "2", "--set", "train.steps=20"];
    let ended = finish(bench.start_with(&[("PATH", &path)], &submit));
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(0), "4711\n"), "{}", ended.stderr);
    let job = fs::read_to_string(bench.path("job.sh")).unwrap();
    let launcher = bench.path("launcher");
    assert!(
        job.contains(&format!("'{}' '--config' '{}'", launcher.display(), bench.path("run.toml").display())),
        "{job}"
    );
    assert!(!job.contains("hunter2") && !bench.path("started").exists(), "{job}");
    let path = bench.program("sbatch", "cat > /dev/null; echo 'sbatch: error: invalid partition' >&2; exit 1");
    let ended = finish(bench.start_with(&[("PATH", &path)], &submit));
    assert_eq!(ended.code, Some(1));
    assert!(
        ended.stderr.contains("invalid partition") && ended.last_line().contains("sbatch refused"),
        "{}",
        ended.stderr
    );
}

/// mpirun over hosts: as many ranks as it is asked for, here.
const MPIRUN: &str = r#"
cd "$(dirname "$0")"
echo "$@" >> calls
while [ "$1" != -n ]; do shift; done
tasks=$2; shift 2
pids=()
for task in $(seq 0 $((tasks - 1))); do
    OMPI_COMM_WORLD_RANK=$task "$@" 2> >(sed -u "s/^/[1,$task]<stderr>:/" >&2) > >(sed -u "s/^/[1,$task]<stdout>:/") &
    pids+=($!)
done
worst=0
for pid in "${pids[@]}"; do wait "$pid"; code=$?; [ $code -gt $worst ] && worst=$code; done
sleep 0.2
exit $worst"#;

fn hosts_of_calls(bench: &Bench) -> Vec<String> {
    let calls = fs::read_to_string(bench.path("calls")).unwrap();
    calls.lines().map(|call| call.split(" --host ").nth(1).unwrap().split(' ').next().unwrap().to_owned()).collect()
}

#[test]
fn with_fewer_nodes_it_goes_on_and_one_that_comes_back_is_used_again() {
    // The first start fails on four nodes, of which bob is away then; the second fails on two; the third, on four again, ends.
    let trainer = format!(
        "[ $RANK = 0 ] || exit 0; {START}\nn=$(wc -l < calls)\n\
         [ $n = 1 ] && {{ touch bob-is-away; echo 'trainer: error: lost bob' >&2; exit 1; }}\n\
         [ $n = 2 ] && {{ rm bob-is-away; echo 'trainer: error: something else' >&2; exit 1; }}\n{DONE}"
    );
    let bench = Bench::new(&trainer);
    let path = bench.program("mpirun", MPIRUN);
    let shell = "[ \"$2\" = true ] || exit 2; ! [ $1 = bob -a -e \"$(dirname \"$0\")/bob-is-away\" ]";
    bench.program("rsh", shell);
    let shell = format!("cluster.remote_shell={:?}", bench.path("rsh"));
    let ended = finish(bench.start_with(
        &[("PATH", &path)],
        &["--nodes", "2..4", "--hosts", "ada,bob,cy,dee", "--procs-per-node", "1", "--set", &shell],
    ));
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert_eq!(hosts_of_calls(&bench), ["ada:1,bob:1,cy:1,dee:1", "ada:1,cy:1", "ada:1,bob:1,cy:1,dee:1"]);
    for said in ["rank 0 failed", "3 of 4 nodes answer; bob: ", "restart 1 of 10", "restart 2 of 10", "dee idle"] {
        assert!(ended.stderr.contains(said), "{said} in {}", ended.stderr);
    }
}

#[test]
fn the_same_failure_three_times_in_a_row_is_the_end_with_the_evidence() {
    let bench =
        Bench::new(&format!("echo x >> starts; {START}; echo 'trainer: error: step 7: the loss is NaN' >&2; exit 1"));
    let ended = finish(bench.start(&["--procs-per-node", "1", "--restarts", "50"]));
    assert_eq!((ended.code, fs::read_to_string(bench.path("starts")).unwrap().lines().count()), (Some(1), 3));
    let last = ended.last_line();
    assert!(last.contains("the same failure 3 times in a row") && last.contains("step 7: the loss is NaN"), "{last}");
}

#[test]
fn a_stop_between_two_starts_is_the_end() {
    // No failure is like the one before: without the stop it would go on for minutes.
    let bench = Bench::new(&format!("{START}; echo \"trainer: error: failure $$\" >&2; echo $$ >> starts; exit 1"));
    let child = bench.start(&["--procs-per-node", "1", "--restarts", "50"]);
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
    bench.wait_for("starts");
    let starts = || fs::read_to_string(bench.path("starts")).unwrap().lines().count();
    let before = starts();
    kill(pid, Signal::SIGTERM).unwrap();
    let ended = finish(child);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(starts() <= before + 1, "{}", ended.stderr);
}

#[test]
fn too_few_nodes_are_waited_for_and_named() {
    let bench = Bench::new("touch started");
    bench.program("rsh", "exit 255");
    let shell = format!("cluster.remote_shell={:?}", bench.path("rsh"));
    let ended = finish(bench.start(&["--nodes", "1..2", "--hosts", "ada,bob", "--restarts", "1", "--set", &shell]));
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert_eq!(ended.stderr.matches("0 node(s) answer, at least 1 are needed; ada: ").count(), 3, "{}", ended.stderr);
    assert!(ended.last_line().contains("all 1 restarts are used up"), "{}", ended.stderr);
    assert!(!bench.path("started").exists());
}
