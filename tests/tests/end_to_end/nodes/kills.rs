//! Ranks, engine and launcher of a run on four nodes, killed and stopped at random, again and again.

use super::{Nodes, nodes};
use crate::experiment::{Experiment, binary, finish, run, run_ok, start, wait_until};
use crate::stopping::kill;
use data_loader::draws::{Key, Purpose};
use rand::RngExt;
use std::collections::BTreeMap;
use std::process::Command;
use std::time::{Duration, Instant};

/// Blows of the default test; `DITHAROS_KILLS` asks for more (`./dev test --nodes --kills 100`).
const KILLS: u64 = 10;
/// No process of a run is left anywhere after this time.
const GONE_WITHIN: Duration = Duration::from_secs(60);
const EAGER: [&str; 4] =
    ["train.steps=600", "checkpoint.every_steps=5", "checkpoint.keep_last=2", "log.every_steps=100"];
const DONE: &str = "step 600 of 600 reached";

/// What is done to a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Blow {
    /// A rank, on any node.
    KillRank,
    /// OpenMPI's daemon of another node.
    KillDaemon,
    KillMpirun,
    KillLauncher,
    /// A signal to the launcher: save and stop.
    Stop(&'static str),
    /// The signal, and soon once more: stop at once.
    StopTwice(&'static str),
}

const BLOWS: [Blow; 9] = [
    Blow::KillRank,
    Blow::KillRank,
    Blow::KillDaemon,
    Blow::KillMpirun,
    Blow::KillLauncher,
    Blow::Stop("-INT"),
    Blow::Stop("-TERM"),
    Blow::Stop("-USR1"),
    Blow::StopTwice("-INT"),
];

impl Blow {
    /// The names of programs of which it takes one.
    fn victim(self) -> &'static str {
        match self {
            Blow::KillRank => "trainer",
            Blow::KillDaemon => "orted",
            Blow::KillMpirun => "mpirun",
            Blow::KillLauncher | Blow::Stop(_) | Blow::StopTwice(_) => "launcher",
        }
    }

    /// Whether docs/GUIDE.md allows a launcher that has met it to end like this.
    fn allows(self, code: Option<i32>, said: &str) -> bool {
        let before_the_start = said.contains("stopped before the run had started");
        match (self, code) {
            (_, Some(0)) => said.contains(DONE),
            (Blow::KillLauncher, code) => code.is_none(),
            (Blow::KillRank | Blow::KillDaemon | Blow::KillMpirun, code) => code == Some(1),
            (Blow::Stop(_), code) => code == Some(75) || (code == Some(1) && before_the_start),
            (Blow::StopTwice(_), code) => matches!(code, Some(1 | 75)),
        }
    }
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// What runs on any node, by the name of its program.
fn programs() -> Vec<(i32, String)> {
    let named = |pid: i32| Some((pid, std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?.trim().to_owned()));
    nodes(&["pids"]).lines().filter_map(|pid| named(pid.parse().ok()?)).collect()
}

#[test]
#[ignore = "needs root and four network namespaces: ./dev test --nodes"]
fn whatever_is_killed_or_stopped_nothing_is_left_nothing_is_lost_and_the_bits_are_the_same() {
    let (cluster, experiment) = (Nodes::up(), Experiment::new());
    run_ok(&mut experiment.launcher(1, "reference", &EAGER));
    let reference = experiment.digest("reference");
    let launcher = || cluster.launcher_with(&experiment, "run", &EAGER, &["--nodes", "4"]);
    let folder = experiment.path("run");
    let newest = || {
        let names = std::fs::read_dir(folder.join("checkpoints")).into_iter().flatten().flatten();
        names.map(|entry| entry.file_name()).max()
    };
    let seed = number("DITHAROS_KILL_SEED", std::process::id().into());
    let (mut endings, mut slowest, mut finished) = (BTreeMap::new(), Duration::ZERO, 0);
    for count in 0..number("DITHAROS_KILLS", KILLS) {
        let mut rng = Key::new(seed, Purpose::Init, count).rng();
        let blow = BLOWS[rng.random_range(0..BLOWS.len())];
        let before = newest();
        let mut child = start(&mut launcher());
        if rng.random_bool(0.8) {
            // Most blows fall on steps and checkpoints, the rest on the start.
            let until = Instant::now() + crate::experiment::DEADLINE;
            while newest() == before && child.try_wait().unwrap().is_none() {
                assert!(Instant::now() < until, "seed {seed}, blow {count}: no checkpoint and no end");
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        std::thread::sleep(Duration::from_millis(rng.random_range(0..1500)));
        // The launcher is the child; its guard has the same name.
        let all = programs();
        let mut victims: Vec<i32> = match blow.victim() {
            "launcher" => vec![child.id() as i32],
            name => all.iter().filter(|(_, program)| program == name).map(|(pid, _)| *pid).collect(),
        };
        // Too early for them: the launcher is there.
        let blow = if victims.is_empty() { Blow::KillLauncher } else { blow };
        if victims.is_empty() {
            victims.push(child.id() as i32);
        }
        let victim = victims[rng.random_range(0..victims.len())];
        let struck = Instant::now();
        match blow {
            Blow::Stop(signal) => kill(signal, victim),
            Blow::StopTwice(signal) => {
                kill(signal, victim);
                std::thread::sleep(Duration::from_millis(rng.random_range(50..300)));
                kill(signal, victim);
            }
            _ => kill("-KILL", victim),
        }
        let ran = finish(child);
        let context = format!("seed {seed}, blow {count} ({blow:?}): {}", ran.text());
        while !cluster.are_quiet() {
            assert!(struck.elapsed() < GONE_WITHIN, "{:?} are left: {context}", programs());
            std::thread::sleep(Duration::from_millis(50));
        }
        slowest = slowest.max(struck.elapsed());
        assert!(blow.allows(ran.code, &ran.stderr), "{context}");
        *endings.entry((blow, ran.code)).or_insert(0) += 1;
        if newest().is_some() {
            let verified = run(Command::new(binary("trainer")).arg("checkpoints").arg(&folder).arg("verify"));
            assert_eq!(verified.code, Some(0), "{context}\n{}", verified.text());
        }
        if ran.code == Some(0) {
            assert_eq!(experiment.digest("run"), reference, "{context}");
            std::fs::remove_dir_all(&folder).unwrap();
            finished += 1;
        }
    }
    run_ok(&mut launcher());
    wait_until("the end of all processes on all nodes", || cluster.are_quiet());
    assert_eq!(experiment.digest("run"), reference, "seed {seed}");
    println!(
        "seed {seed}: {endings:?}; {finished} run(s) finished on the way; all processes gone after {slowest:?} at most"
    );
}
