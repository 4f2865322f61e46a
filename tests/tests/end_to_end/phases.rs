//! A rank that is killed, or stopped so that it hangs, in each phase of a step: it is named with that phase, within the deadline, and
//! nothing of the run is left. Links that are cut in each phase: see `nodes`.

use crate::experiment::{Experiment, finish, start, wait_until, write_latents};
use crate::stopping::kill;
use crate::watching::{is_in, no_process_is_left, process_of, status, watched};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use stores::testing::MiniS3;

/// A forward pass of a lane takes seconds, a backward pass twice as long.
pub const HEAVY: [&str; 5] =
    ["model.hidden_size=256", "model.depth=12", "model.num_heads=4", "train.micro_batch=24", "train.steps=1000"];
/// Much to save and next to nothing to compute.
pub const LARGE: [&str; 5] = [
    "model.hidden_size=512",
    "model.depth=4",
    "train.steps=1000",
    "checkpoint.every_steps=1",
    "checkpoint.keep_last=2",
];
/// Many averages of many weights. Where a norm limits it, no part of an update comes before the end of the backward pass.
pub const AVERAGED: [&str; 7] = [
    "model.hidden_size=512",
    "model.depth=6",
    "train.micro_batch=1",
    "train.steps=1000",
    "checkpoint.every_steps=1000",
    "optimizer.clip_grad_norm=1",
    "ema.further_decays=[0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.91,0.92,0.93,0.94,0.95,0.96,0.97,0.98,0.99,0.991,0.992,0.993,0.994,0.995]",
];
/// Another moment may have come when the signal does.
pub const TRIES: usize = 8;
const ENDLESS: &str = "train.steps=1000000";

/// Latents large enough for [`HEAVY`].
pub fn heavy() -> Experiment {
    let experiment = Experiment::new();
    std::fs::remove_dir_all(experiment.path("data")).unwrap();
    write_latents(&experiment.path("data"), 3, 32, |_, _| {});
    experiment
}

/// What happens to a rank.
#[derive(Clone, Copy)]
enum Fault {
    Killed,
    Hangs,
}

impl Fault {
    fn befall(self, process: i32) {
        kill(if matches!(self, Fault::Killed) { "-KILL" } else { "-STOP" }, process);
    }

    /// After how long without a sign of life a rank is given up.
    fn patience(self) -> &'static str {
        if matches!(self, Fault::Killed) { "cluster.silence_s=60" } else { "cluster.silence_s=4" }
    }

    /// How the launcher begins to tell of it.
    fn told_of(self, rank: usize) -> String {
        match self {
            Fault::Killed => format!("rank {rank} failed (killed by signal 9 (SIGKILL)); it was on "),
            Fault::Hangs => format!("rank {rank} gave no sign of life for 4 s"),
        }
    }

    /// The end of the run: `rank` is named as it should be. Gives where it was.
    fn is_told(self, experiment: &Experiment, run: &str, rank: usize, child: Child) -> String {
        let ran = finish(child);
        assert_eq!(ran.code, Some(1), "{}", ran.text());
        no_process_is_left(experiment.path(run).to_str().unwrap());
        let last = status(experiment, run);
        let (told, place) =
            (self.told_of(rank), format!("it was on {} at step ", last["ranks"][rank]["host"].as_str().unwrap()));
        for text in [last["end"]["text"].as_str().unwrap(), &ran.stderr] {
            assert!(text.contains(&told) && text.contains(&place), "{told}, {place}\n{}", ran.text());
        }
        // What is left of a rank may wake up when it is ended, and make further steps.
        let rest = ran.stderr.split_once(&place).unwrap().1;
        rest.split_once(" in phase ").unwrap().1.to_owned()
    }
}

/// Lets it happen to rank 1 in `phase`, until that is the phase that it is named with.
fn caught_in(experiment: &Experiment, phase: &str, fault: Fault, overrides: &[&str]) {
    let mut places = Vec::new();
    for attempt in 0..TRIES {
        let run = format!("{phase}-{attempt}");
        let child = start(&mut watched(experiment, &run, &[overrides, &[fault.patience()]].concat()));
        wait_until("the phase", || is_in(experiment, &run, 1, phase));
        fault.befall(process_of(experiment.path(&run).to_str().unwrap(), 1));
        let place = fault.is_told(experiment, &run, 1, child);
        if place.starts_with(phase) {
            return;
        }
        places.push(place);
    }
    panic!("never caught in phase {phase}: {places:?}");
}

#[test]
fn a_rank_that_is_killed_in_forward_is_named_with_its_phase() {
    caught_in(&heavy(), "forward", Fault::Killed, &HEAVY);
}

#[test]
fn a_rank_that_hangs_in_forward_is_named_with_its_phase() {
    caught_in(&heavy(), "forward", Fault::Hangs, &HEAVY);
}

#[test]
fn a_rank_that_is_killed_in_backward_is_named_with_its_phase() {
    caught_in(&heavy(), "backward", Fault::Killed, &HEAVY);
}

#[test]
fn a_rank_that_hangs_in_backward_is_named_with_its_phase() {
    caught_in(&heavy(), "backward", Fault::Hangs, &HEAVY);
}

#[test]
fn a_rank_that_is_killed_in_update_is_named_with_its_phase() {
    caught_in(&Experiment::new(), "update", Fault::Killed, &AVERAGED);
}

#[test]
fn a_rank_that_hangs_in_update_is_named_with_its_phase() {
    caught_in(&Experiment::new(), "update", Fault::Hangs, &AVERAGED);
}

#[test]
fn a_rank_that_is_killed_while_it_saves_is_named_with_its_phase() {
    caught_in(&Experiment::new(), "checkpoint", Fault::Killed, &LARGE);
}

#[test]
fn a_rank_that_hangs_while_it_saves_is_named_with_its_phase() {
    caught_in(&Experiment::new(), "checkpoint", Fault::Hangs, &LARGE);
}

/// Stops rank 0, so that rank 1 waits for it, and goes on when something has happened to that one.
fn caught_waiting(fault: Fault) {
    let experiment = Experiment::new();
    let child = start(&mut watched(&experiment, "reduce", &[ENDLESS, fault.patience()]));
    wait_until("the first steps", || {
        status(&experiment, "reduce")["ranks"][1]["step"].as_u64().is_some_and(|step| step > 0)
    });
    let folder = experiment.path("reduce");
    let [other, victim] = [0, 1].map(|rank| process_of(folder.to_str().unwrap(), rank));
    kill("-STOP", other);
    wait_until("rank 1 to wait", || is_in(&experiment, "reduce", 1, "reduce"));
    fault.befall(victim);
    kill("-CONT", other);
    let place = fault.is_told(&experiment, "reduce", 1, child);
    assert!(place.starts_with("reduce"), "{place}");
}

#[test]
fn a_rank_that_is_killed_while_it_waits_for_another_is_named_with_its_phase() {
    caught_waiting(Fault::Killed);
}

#[test]
fn a_rank_that_hangs_while_it_waits_for_another_is_named_with_its_phase() {
    caught_waiting(Fault::Hangs);
}

/// A data set behind a gate: once it is shut, some clients are answered no more.
pub struct Gate {
    _server: MiniS3,
    address: SocketAddr,
    is_shut: Arc<AtomicBool>,
}

impl Gate {
    /// The experiment's data, for whoever reaches `address`; shut means shut for `whom`.
    pub fn before(experiment: &Experiment, address: IpAddr, whom: fn(IpAddr) -> bool) -> Gate {
        let server = MiniS3::new();
        for file in std::fs::read_dir(experiment.path("data")).unwrap().map(|entry| entry.unwrap().path()) {
            let name = file.file_name().unwrap().to_str().unwrap();
            server.put(&format!("data/{name}"), std::fs::read(&file).unwrap());
        }
        let listener = TcpListener::bind((address, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let (objects, is_shut) = (server.address(), Arc::<AtomicBool>::default());
        let gate = Gate { _server: server, address, is_shut: is_shut.clone() };
        std::thread::spawn(move || {
            let mut kept = Vec::new();
            while let Ok((client, from)) = listener.accept() {
                if is_shut.load(SeqCst) && whom(from.ip()) {
                    kept.push(client);
                    continue;
                }
                let server = TcpStream::connect(objects).unwrap();
                for (mut from, mut to) in [(client.try_clone().unwrap(), server.try_clone().unwrap()), (server, client)]
                {
                    std::thread::spawn(move || {
                        let _ = std::io::copy(&mut from, &mut to);
                        let _ = to.shutdown(std::net::Shutdown::Write);
                    });
                }
            }
        });
        gate
    }

    /// A run that reads through the gate, and little ahead. Ranks inherit the environment.
    pub fn start(&self, command: &mut Command) -> Child {
        command.env("AWS_ENDPOINT_URL", format!("http://{}", self.address));
        for (name, value) in [("AWS_ALLOW_HTTP", "true"), ("AWS_SKIP_SIGNATURE", "true"), ("AWS_REGION", "us-east-1")] {
            command.env(name, value);
        }
        start(command)
    }

    /// Shuts it after the first step of `run`, and waits until one of the ranks has waited for data for a second.
    pub fn shut(&self, experiment: &Experiment, run: &str) -> usize {
        wait_until("a step", || experiment.log(run).iter().any(|event| event["event"] == "step"));
        self.is_shut.store(true, SeqCst);
        let stuck = || {
            (0..2).find(|rank| {
                let rank = &status(experiment, run)["ranks"][rank];
                rank["phase"] == "data" && rank["phase_s"].as_f64().unwrap() > 1.0
            })
        };
        wait_until("a rank without data", || stuck().is_some());
        stuck().unwrap()
    }
}

/// What a run behind a [`Gate`] is told.
pub const BEHIND_GATE: [&str; 3] = ["data.url=s3://bucket/data", "data.prefetch_bytes=1000", ENDLESS];

fn caught_without_data(fault: Fault) {
    let experiment = Experiment::new();
    let gate = Gate::before(&experiment, [127, 0, 0, 1].into(), |_| true);
    let child = gate.start(&mut watched(&experiment, "data", &[&BEHIND_GATE[..], &[fault.patience()]].concat()));
    // Whichever runs out of rows first; the other waits for it.
    let rank = gate.shut(&experiment, "data");
    fault.befall(process_of(experiment.path("data").to_str().unwrap(), rank));
    let place = fault.is_told(&experiment, "data", rank, child);
    assert!(place.starts_with("data for "), "{place}");
}

#[test]
fn a_rank_that_is_killed_while_it_waits_for_data_is_named_with_its_phase() {
    caught_without_data(Fault::Killed);
}

#[test]
fn a_rank_that_hangs_while_it_waits_for_data_is_named_with_its_phase() {
    caught_without_data(Fault::Hangs);
}
