//! What the launcher knows of its ranks while they run: who is where, and in which phase one was that is killed, hangs or waits.

use crate::experiment::{Experiment, Ran, binary, finish, run_ok, start, wait_until, write_latents};
use crate::stopping::{kill, ranks_of};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use stores::testing::MiniS3;

/// A forward pass of a lane takes seconds, a backward pass twice as long.
const HEAVY: [&str; 6] = [
    "model.hidden_size=256",
    "model.depth=12",
    "model.num_heads=4",
    "train.micro_batch=24",
    "train.steps=1000",
    "cluster.silence_s=60",
];
/// Much to save and next to nothing to compute.
const LARGE: [&str; 6] = [
    "model.hidden_size=512",
    "model.depth=4",
    "train.steps=1000",
    "checkpoint.every_steps=1",
    "checkpoint.keep_last=2",
    "cluster.silence_s=60",
];
/// Another moment may have come when the signal does.
const TRIES: usize = 5;

/// Latents large enough for [`HEAVY`].
fn heavy() -> Experiment {
    let experiment = Experiment::new();
    std::fs::remove_dir_all(experiment.path("data")).unwrap();
    write_latents(&experiment.path("data"), 3, 32, |_, _| {});
    experiment
}

/// Two ranks that tell where they are in `status.jsonl` beside the run.
fn watched(experiment: &Experiment, run: &str, overrides: &[&str]) -> Command {
    let mut command = experiment.launcher(2, run, overrides);
    command.arg("--status-file").arg(experiment.path(run).with_extension("status"));
    command
}

/// The newest line about the ranks.
fn status(experiment: &Experiment, run: &str) -> Value {
    let text = std::fs::read_to_string(experiment.path(run).with_extension("status")).unwrap_or_default();
    // The last line may be half written.
    text.lines().rev().find_map(|line| serde_json::from_str(line).ok()).unwrap_or_default()
}

fn is_in(experiment: &Experiment, run: &str, rank: usize, phase: &str) -> bool {
    status(experiment, run)["ranks"][rank]["phase"] == phase
}

/// The process of a rank.
fn process_of(folder: &str, rank: usize) -> i32 {
    let variable = format!("OMPI_COMM_WORLD_RANK={rank}");
    let is_it = |pid: &i32| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|entry| entry == variable.as_bytes())
    };
    ranks_of(folder).into_iter().find(is_it).unwrap_or_else(|| panic!("no rank {rank} of {folder}"))
}

fn no_process_is_left(folder: &str) {
    wait_until("the end of every rank", || ranks_of(folder).is_empty());
}

/// Kills rank 1 in `phase`, and sees that it is named with that phase.
fn killed_in(experiment: &Experiment, phase: &str, overrides: &[&str]) {
    let mut said = String::new();
    for attempt in 0..TRIES {
        let run = format!("{phase}-{attempt}");
        let folder = experiment.path(&run);
        let folder = folder.to_str().unwrap();
        let child = start(&mut watched(experiment, &run, overrides));
        wait_until("the phase", || is_in(experiment, &run, 1, phase));
        kill("-KILL", process_of(folder, 1));
        let ran = finish(child);
        assert_eq!(ran.code, Some(1), "{}", ran.text());
        no_process_is_left(folder);
        let last = status(experiment, &run);
        let (step, place) = (&last["ranks"][1]["step"], last["end"]["text"].as_str().unwrap().to_owned());
        let host = last["ranks"][1]["host"].as_str().unwrap();
        let named = format!("rank 1 failed (killed by signal 9 (SIGKILL)); it was on {host} at step {step} in phase ");
        assert!(place.contains(&named) && ran.stderr.contains(&named), "{named}\n{}", ran.text());
        if place.contains(&format!("{named}{phase}")) {
            return;
        }
        said = place;
    }
    panic!("never caught in phase {phase}: {said}");
}

#[test]
fn a_rank_that_is_killed_in_forward_is_named_with_its_phase() {
    killed_in(&heavy(), "forward", &HEAVY);
}

#[test]
fn a_rank_that_is_killed_in_backward_is_named_with_its_phase() {
    killed_in(&heavy(), "backward", &HEAVY);
}

#[test]
fn a_rank_that_is_killed_while_it_saves_is_named_with_its_phase() {
    killed_in(&Experiment::new(), "checkpoint", &LARGE);
}

/// A server of objects behind a gate: once it is shut, nothing is answered any more.
struct Gate {
    address: SocketAddr,
    is_shut: Arc<AtomicBool>,
}

impl Gate {
    fn before(server: SocketAddr) -> Gate {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let gate = Gate { address: listener.local_addr().unwrap(), is_shut: Arc::default() };
        let is_shut = gate.is_shut.clone();
        std::thread::spawn(move || {
            let mut kept = Vec::new();
            for client in listener.incoming().map_while(Result::ok) {
                if is_shut.load(SeqCst) {
                    kept.push(client);
                    continue;
                }
                let server = TcpStream::connect(server).unwrap();
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
}

#[test]
fn a_rank_that_is_killed_while_it_waits_for_data_is_named_with_its_phase() {
    let experiment = Experiment::new();
    let server = MiniS3::new();
    for file in std::fs::read_dir(experiment.path("data")).unwrap().map(|entry| entry.unwrap().path()) {
        let name = file.file_name().unwrap().to_str().unwrap();
        server.put(&format!("data/{name}"), std::fs::read(&file).unwrap());
    }
    let gate = Gate::before(server.address());
    let overrides =
        ["data.url=s3://bucket/data", "data.prefetch_bytes=1000", "train.steps=100000", "cluster.silence_s=60"];
    let mut command = watched(&experiment, "data-0", &overrides);
    command.env("AWS_ENDPOINT_URL", format!("http://{}", gate.address));
    for (name, value) in [("AWS_ALLOW_HTTP", "true"), ("AWS_SKIP_SIGNATURE", "true"), ("AWS_REGION", "us-east-1")] {
        command.env(name, value);
    }
    let child = start(&mut command);
    wait_until("a step", || experiment.log("data-0").iter().any(|event| event["event"] == "step"));
    gate.is_shut.store(true, SeqCst);
    // Whichever runs out of rows first; the other waits for it.
    let stuck = || {
        (0..2).find(|rank| {
            let rank = &status(&experiment, "data-0")["ranks"][rank];
            rank["phase"] == "data" && rank["phase_s"].as_f64().unwrap() > 1.0
        })
    };
    wait_until("a rank without data", || stuck().is_some());
    let folder = experiment.path("data-0");
    let rank = stuck().unwrap();
    kill("-KILL", process_of(folder.to_str().unwrap(), rank));
    let ran = finish(child);
    assert_eq!(ran.code, Some(1), "{}", ran.text());
    let named = format!("rank {rank} failed (killed by signal 9 (SIGKILL)); it was on ");
    assert!(ran.stderr.contains(&named) && ran.stderr.contains(" in phase data for "), "{}", ran.text());
    no_process_is_left(folder.to_str().unwrap());
}

/// Stops rank 1 once all ranks make steps, waits until rank 0 waits for it in vain, and does something then.
fn stopped(experiment: &Experiment, overrides: &[&str], then: impl FnOnce(&str)) -> Ran {
    let folder = experiment.path("stopped");
    let folder = folder.to_str().unwrap();
    let child = start(&mut watched(experiment, "stopped", overrides));
    wait_until("the first steps", || {
        status(experiment, "stopped")["ranks"][1]["step"].as_u64().is_some_and(|step| step > 0)
    });
    kill("-STOP", process_of(folder, 1));
    then(folder);
    let ran = finish(child);
    assert_eq!(ran.code, Some(1), "{}", ran.text());
    no_process_is_left(folder);
    ran
}

#[test]
fn a_rank_that_hangs_is_given_up_and_named() {
    let experiment = Experiment::new();
    let ran = stopped(&experiment, &["train.steps=1000000", "cluster.silence_s=3"], |_| {});
    assert!(ran.stderr.contains("rank 1 gave no sign of life for 3 s"), "{}", ran.text());
    assert!(ran.stderr.contains(" in phase ") && ran.stderr.contains("last heard 3 s ago"), "{}", ran.text());
}

#[test]
fn a_rank_that_is_killed_while_it_waits_for_another_is_named_with_its_phase() {
    let experiment = Experiment::new();
    let ran = stopped(&experiment, &["train.steps=1000000", "cluster.silence_s=60"], |folder| {
        wait_until("rank 0 to wait", || is_in(&experiment, "stopped", 0, "reduce"));
        kill("-KILL", process_of(folder, 0));
    });
    assert!(ran.stderr.contains("rank 0 failed (killed by signal 9 (SIGKILL))"), "{}", ran.text());
    assert!(ran.stderr.contains(" in phase reduce"), "{}", ran.text());
}

#[test]
fn who_waits_in_vain_says_for_whom() {
    let experiment = Experiment::new();
    let overrides = ["train.steps=1000000", "cluster.silence_s=0", "collective.timeout_s=5"];
    let ran = stopped(&experiment, &overrides, |_| {});
    assert!(
        ran.stderr.contains("rank 0 failed") && ran.stderr.contains("did not complete within 5s"),
        "{}",
        ran.text()
    );
    assert!(ran.stderr.contains("the others waited for rank 1: it was on "), "{}", ran.text());
}

/// A run of two ranks with sample grids and a status server; gives the server's address.
fn served(experiment: &Experiment, token: Option<&str>) -> (Child, SocketAddr) {
    let vae = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/vae/fashion-kl-f4");
    let vae = format!("sample.vae={:?}", vae.to_str().unwrap());
    let overrides = ["train.steps=1000000", "sample.every_steps=5", "sample.num=6", "sample.steps=2", &vae];
    let mut command = watched(experiment, "served", &overrides);
    command.args(["--status-addr", "127.0.0.1:0"]);
    token.map(|token| command.env("DITHAROS_STATUS_TOKEN", token));
    let mut child = start(&mut command);
    let mut said = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    // What follows must be read by somebody.
    std::thread::spawn(move || said.read_to_end(&mut Vec::new()));
    let address = line.trim().strip_prefix("launcher: status at http://").and_then(|rest| rest.strip_suffix('/'));
    let address = address.unwrap_or_else(|| panic!("no address in {line:?}")).parse().unwrap();
    (child, address)
}

/// Head and body of the answer to a GET.
fn get(address: SocketAddr, path: &str, header: &str) -> (String, Vec<u8>) {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\n{header}\r\n").unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let end = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n").unwrap();
    (String::from_utf8(answer[..end].to_vec()).unwrap(), answer[end + 4..].to_vec())
}

#[test]
fn a_run_is_seen_over_http_by_who_has_the_token_and_from_its_folder_afterwards() {
    let experiment = Experiment::new();
    let token = "correct-horse-battery";
    let (child, address) = served(&experiment, Some(token));
    let bearer = format!("Authorization: Bearer {token}\r\n");
    let ok = |path: &str| {
        let (head, body) = get(address, path, &bearer);
        assert!(head.starts_with("HTTP/1.1 200 "), "{path}: {head}");
        body
    };
    for path in ["/", "/status.json", "/metrics", "/history.json", "/sample.png"] {
        let (head, body) = get(address, path, "");
        assert!(
            head.starts_with("HTTP/1.1 401 ") && !String::from_utf8(body).unwrap().contains("run"),
            "{path}: {head}"
        );
    }
    wait_until("a sample grid", || get(address, "/sample.png", &bearer).0.starts_with("HTTP/1.1 200 "));
    assert!(ok("/sample.png").starts_with(b"\x89PNG"));
    // Clients that say nothing, and one that never stops, hold nothing up.
    let mut idle: Vec<TcpStream> = (0..50).filter_map(|_| TcpStream::connect(address).ok()).collect();
    idle.iter_mut().for_each(|stream| drop(stream.write_all(b"GET / HTTP/1.1\r\nA: ")));
    let step = |status: &Value| status["log"]["step"].as_u64().unwrap_or(0);
    let before = step(&status(&experiment, "served"));
    wait_until("further steps", || step(&status(&experiment, "served")) > before + 5);
    drop(idle);

    wait_until("an answer", || {
        TcpStream::connect(address).is_ok() && step(&serde_json::from_slice(&ok("/status.json")).unwrap()) > 0
    });
    let seen: Value = serde_json::from_slice(&ok("/status.json")).unwrap();
    assert_eq!((seen["world_size"].as_u64(), seen["ranks"].as_array().unwrap().len()), (Some(2), 2), "{seen}");
    let metrics = String::from_utf8(ok("/metrics")).unwrap();
    assert!(
        metrics.contains("\nditharos_rank_step{rank=\"1\",host=\"") && metrics.contains("\nditharos_loss "),
        "{metrics}"
    );
    let history: Value = serde_json::from_slice(&ok("/history.json")).unwrap();
    let logged = experiment.log("served");
    let first = logged.iter().find(|event| event["event"] == "step").unwrap();
    assert_eq!((&history[0]["step"], &history[0]["loss"]), (&first["step"], &first["loss"]));
    assert!(String::from_utf8(ok("/")).unwrap().contains("<!DOCTYPE html>"));

    let folder = experiment.path("served");
    let folder = folder.to_str().unwrap();
    for rank in ranks_of(folder) {
        let environment =
            String::from_utf8_lossy(&std::fs::read(format!("/proc/{rank}/environ")).unwrap()).into_owned();
        assert!(!environment.contains(token), "rank {rank} has the token");
    }
    kill("-TERM", child.id() as i32);
    let ran = finish(child);
    assert_eq!(ran.code, Some(75), "{}", ran.text());

    let ran = run_ok(Command::new(binary("launcher")).args(["status", folder, "--json"]));
    let found: Value = serde_json::from_str(&ran.stdout).unwrap();
    let stop = experiment.log("served").into_iter().find(|event| event["event"] == "stop").unwrap();
    assert_eq!((&found["state"], &found["checkpoint"]["step"]), (&"stopped".into(), &stop["step"]), "{found}");
    assert_eq!((&found["attempt"], &found["world_size"]), (&1.into(), &2.into()), "{found}");
    let ran = run_ok(Command::new(binary("launcher")).args(["status", folder]));
    assert!(ran.stdout.contains("stopped on request") && ran.stdout.contains("loss "), "{}", ran.text());
    let nothing = crate::experiment::run(Command::new(binary("launcher")).args(["status", "/tmp/no-such-run"]));
    assert_eq!(nothing.code, Some(1), "{}", nothing.text());
}

/// `./dev test --browser`. With DITHAROS_SCREENSHOT=FILE the page is photographed, too.
#[test]
#[ignore = "needs Chromium: ./dev test --browser"]
fn the_page_shows_the_run_in_a_browser() {
    let experiment = Experiment::new();
    let (child, address) = served(&experiment, None);
    wait_until("curves and rates", || {
        let status = status(&experiment, "served");
        status["ranks"][1]["images_per_s"].is_number()
            && status["sample"]["step"].as_u64().is_some_and(|step| step > 20)
    });
    let url = format!("http://{address}/");
    let profile = format!("--user-data-dir={}", experiment.path("profile").display());
    let browser = |options: &[&str]| {
        // What the page asks for comes in real time; the browser's own clock is run ahead once it waits for nothing.
        let mut command = Command::new("chromium");
        command.args([
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
        ]);
        run_ok(command.args([&profile, "--window-size=1100,900", "--virtual-time-budget=6000"]).args(options).arg(&url))
    };
    let page = browser(&["--dump-dom"]).stdout;
    let host = status(&experiment, "served")["ranks"][0]["host"].as_str().unwrap().to_owned();
    assert_eq!(page.matches(&format!("<td>{host}</td>")).count(), 2, "a row for each rank: {page}");
    assert!(page.matches("<path d=\"M").count() == 2, "two curves: {page}");
    assert!(page.contains("step ") && page.contains("of 1000000") && page.contains("2 ranks"), "{page}");
    assert!(page.contains("/sample.png?step="), "{page}");
    if let Some(file) = std::env::var_os("DITHAROS_SCREENSHOT") {
        let file = format!("--screenshot={}", Path::new(&file).display());
        browser(&[&file]);
    }
    kill("-TERM", child.id() as i32);
    assert_eq!(finish(child).code, Some(75));
}
