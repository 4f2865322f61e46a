//! The TCP control plane over real processes that nothing but their environment introduces to each other.

mod launch;

use launch::{TcpRun, finish, waiting_took_ms};
use std::io::{Read, Write};
use std::net::TcpStream;

#[test]
fn tcp_passes_the_conformance_suite_on_2_and_3_ranks() {
    for ranks in [2, 3] {
        for (rank, (output, text)) in TcpRun::new(ranks).run("").iter().enumerate() {
            assert!(output.status.success() && text.contains(&format!("rank {rank} of {ranks}: ok (tcp)")), "{text}");
        }
    }
}

#[test]
fn a_rank_that_waits_burns_no_core() {
    let ran = TcpRun::new(2).run("--scenario idle");
    assert!(waiting_took_ms(&ran[0].1) < 400.0, "{}", ran[0].1);
}

#[test]
fn a_rank_that_stalls_is_named_to_all_by_rank_0() {
    let run = TcpRun::new(3);
    let children: Vec<_> = (0..3).map(|rank| run.start(rank, "--scenario stall --deadline-s 3")).collect();
    let mut children = children.into_iter();
    let told: Vec<String> = children.by_ref().take(2).map(|child| finish(child).1).collect();
    assert!(told[0].contains("rank 0: all_reduce did not complete within 3s (waiting for rank 2)"), "{}", told[0]);
    let second = "rank 1: all_reduce failed: rank 0 says: waiting for rank 2";
    assert!(told[1].contains(second), "{}", told[1]);
    for mut child in children {
        child.kill().expect("the stalled rank");
        let _ = child.wait();
    }
}

#[test]
fn a_rank_that_dies_is_named_to_all_at_once() {
    let ran = TcpRun::new(3).run("--scenario die --deadline-s 50");
    assert!(ran[0].1.contains("rank 0: all_reduce failed: rank 2 has gone"), "{}", ran[0].1);
    assert!(ran[1].1.contains("rank 1: all_reduce failed: rank 0 says: rank 2 has gone"), "{}", ran[1].1);
}

#[test]
fn ranks_that_do_different_things_are_told_so() {
    let ran = TcpRun::new(3).run("--scenario odd --deadline-s 20");
    let at = "rank 2 is at all_gather of 1000 element(s), its operation 1, rank 0 at all_reduce of 3000 element(s), its operation 1";
    for (rank, (_, text)) in ran.iter().enumerate() {
        let told: Vec<&str> = text.lines().filter(|line| line.contains("told: ")).collect();
        assert!(told.len() == 2 && told[0].contains(at), "rank {rank}: {text}");
        assert!(told[1].contains("given up after: "), "rank {rank}: {text}");
    }
}

#[test]
fn only_those_who_know_the_token_are_taken_in_and_strangers_hold_nobody_up() {
    let run = TcpRun::new(2);
    let first = run.start(0, "");
    // Strangers: one that says nothing, one that says nonsense, and a rank of another run.
    let connect = || loop {
        if let Ok(stream) = TcpStream::connect(("127.0.0.1", run.port())) {
            return stream;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    };
    let _silent = connect();
    let mut loud = connect();
    loud.write_all(&[b'G'; 200]).expect("nonsense");
    let mut answer = Vec::new();
    let _ = loud.read_to_end(&mut answer);
    assert_eq!(answer, b"", "strangers are told nothing");
    let another_token = [("DITHAROS_RENDEZVOUS_TOKEN", "the token of another run".to_owned())];
    let (output, text) = finish(run.clone().variables(&another_token).start(1, ""));
    assert!(!output.status.success(), "{text}");
    assert!(text.contains("tcp cannot be initialised: rank 1: 127.0.0.1:"), "{text}");
    assert!(text.contains("what listens there does not know this run's token"), "{text}");
    let other = run.start(1, "");
    for (rank, child) in [first, other].into_iter().enumerate() {
        let (output, text) = finish(child);
        assert!(output.status.success() && text.contains(&format!("rank {rank} of 2: ok")), "{text}");
        assert!(!text.contains("a token for this test"), "the token is written nowhere: {text}");
    }
}

#[test]
fn what_is_missing_to_meet_is_named() {
    let (_, text) = finish(TcpRun::new(2).variables(&[("DITHAROS_RENDEZVOUS_TOKEN", String::new())]).start(0, ""));
    assert!(text.contains("set DITHAROS_RENDEZVOUS_TOKEN, or DITHAROS_RENDEZVOUS_TOKEN_FILE"), "{text}");
    let (_, text) = finish(TcpRun::new(2).variables(&[("DITHAROS_RENDEZVOUS_TOKEN", "short".to_owned())]).start(0, ""));
    assert!(
        text.contains("the run's token has 5 characters; expected 16 or more") && !text.contains("short"),
        "{text}"
    );
    let (_, text) = finish(TcpRun::new(3).start(0, "--deadline-s 0.3"));
    assert!(
        text.contains("rank 0: rendezvous did not complete within 300ms (waiting for rank(s) 1, 2 of 3)"),
        "{text}"
    );
    let (_, text) = finish(TcpRun::new(2).start(1, "--deadline-s 0.3"));
    assert!(
        text.contains("rank 1: rendezvous did not complete within 300ms (connecting to rank 0 at 127.0.0.1"),
        "{text}"
    );
}

#[test]
fn rank_0_listens_on_the_given_interface_only() {
    let on = |name: &str| TcpRun::new(2).variables(&[("DITHAROS_INTERFACE", name.to_owned())]);
    for (output, text) in on("lo").run("") {
        assert!(output.status.success(), "{text}");
    }
    let (output, text) = finish(on("nothing0").start(0, ""));
    assert!(!output.status.success() && text.contains("DITHAROS_INTERFACE is \"nothing0\": no such"), "{text}");
}
