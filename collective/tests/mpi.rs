//! The MPI backend over real processes.

mod launch;

use launch::{mpirun, waiting_took_ms};

fn passes_the_suite(ranks: usize, options: &str) {
    let (output, text) = mpirun(ranks, options, &[]);
    assert!(output.status.success(), "{ranks} ranks: {text}");
    for rank in 0..ranks {
        assert!(text.contains(&format!("rank {rank} of {ranks}: ok (")), "{ranks} ranks: {text}");
    }
}

#[test]
fn mpi_passes_the_conformance_suite_on_1_2_3_and_4_ranks() {
    (1..=4).for_each(|ranks| passes_the_suite(ranks, ""));
}

#[test]
fn mpi_passes_the_conformance_suite_when_buffers_are_moved_chunk_by_chunk() {
    passes_the_suite(3, "--chunk-numel 97");
}

#[test]
fn a_rank_that_waits_for_another_burns_no_core() {
    let (output, text) = mpirun(2, "--scenario idle", &[]);
    assert!(output.status.success(), "{text}");
    // It waited for two seconds: a fifth of a core is more than polling once a millisecond takes.
    assert!(waiting_took_ms(&text) < 400.0, "{text}");
}

#[test]
fn a_rank_that_stalls_is_reported_by_those_that_wait_within_the_deadline() {
    let (output, text) = mpirun(3, "--scenario stall --deadline-s 2", &[]);
    assert_eq!(output.status.code(), Some(3), "{text}");
    let told = "all_reduce did not complete within 2s (waiting for the other ranks): a rank is stuck";
    // Both wait equally long, and the first to give up ends the run.
    let rank = (0..2).find(|rank| text.contains(&format!("rank {rank} of 3: after 2"))).expect(&text);
    assert!(text.contains(&format!("rank {rank}: {told}")), "{text}");
    assert!(text.contains("buffer freed: false"), "{text}");
}

#[test]
fn a_rank_that_dies_ends_the_run() {
    let (output, text) = mpirun(2, "--scenario die --deadline-s 20", &[]);
    assert!(!output.status.success() && output.status.code() != Some(124), "{text}");
}
