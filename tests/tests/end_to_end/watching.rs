//! What the launcher knows of its ranks while they run: who is where, and for whom others wait.

use crate::experiment::{Experiment, Ran, binary, finish, run_ok, start, wait_until};
use crate::stopping::{kill, ranks_of};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command};

/// Two ranks that tell where they are in `status.jsonl` beside the run.
pub fn watched(experiment: &Experiment, run: &str, overrides: &[&str]) -> Command {
    let mut command = experiment.launcher(2, run, overrides);
    command.arg("--status-file").arg(experiment.path(run).with_extension("status"));
    command
}

/// The newest line about the ranks.
pub fn status(experiment: &Experiment, run: &str) -> Value {
    let text = std::fs::read_to_string(experiment.path(run).with_extension("status")).unwrap_or_default();
    // The last line may be half written.
    text.lines().rev().find_map(|line| serde_json::from_str(line).ok()).unwrap_or_default()
}

pub fn is_in(experiment: &Experiment, run: &str, rank: usize, phase: &str) -> bool {
    status(experiment, run)["ranks"][rank]["phase"] == phase
}

/// The process of a rank.
pub fn process_of(folder: &str, rank: usize) -> i32 {
    let variable = format!("OMPI_COMM_WORLD_RANK={rank}");
    let is_it = |pid: &i32| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|entry| entry == variable.as_bytes())
    };
    ranks_of(folder).into_iter().find(is_it).unwrap_or_else(|| panic!("no rank {rank} of {folder}"))
}

pub fn no_process_is_left(folder: &str) {
    wait_until("the end of every rank", || ranks_of(folder).is_empty());
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
