//! The NCCL backend, driven through its whole call sequence over the stub of `collective/stub` in place of NVIDIA's libraries. That
//! shows how the libraries are called, and nothing of how they answer on a real GPU: for that there is `./dev test --gpu`.

mod launch;

use launch::{TcpRun, mpirun, waiting_took_ms};
use std::path::Path;
use std::process::{Command, Output};
use tempfile::TempDir;

/// A folder where the loader finds the stub under the names of NVIDIA's libraries, and where the stub's ranks meet.
struct Stub {
    folder: TempDir,
}

impl Stub {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        // Cargo builds it for these tests, beside them.
        let library = std::env::current_exe().expect("this program's path").with_file_name("libcollective_stub.so");
        assert!(library.is_file(), "{} was not built", library.display());
        for name in ["libcuda.so", "libcuda.so.1", "libnccl.so"] {
            std::os::unix::fs::symlink(&library, folder.path().join(name)).expect("a link");
        }
        Self { folder }
    }

    fn variables(&self, fault: &str) -> Vec<(&'static str, String)> {
        let folder = self.folder.path().display().to_string();
        let mut variables = vec![("LD_LIBRARY_PATH", folder.clone()), ("DITHAROS_STUB_DIR", folder)];
        if !fault.is_empty() {
            variables.push(("DITHAROS_STUB_FAULT", fault.to_owned()));
        }
        variables
    }

    /// The conformance program over the stub.
    fn run(&self, ranks: usize, options: &str, fault: &str) -> (Output, String) {
        mpirun(ranks, &format!("--backend nccl {options}"), &self.variables(fault))
    }

    /// What `rank` called, in order.
    fn calls(&self, rank: usize) -> Vec<String> {
        let log = std::fs::read_to_string(self.folder.path().join(format!("calls.{rank}"))).expect("the stub's log");
        log.lines().map(str::to_owned).collect()
    }
}

fn passes_the_suite(ranks: usize, options: &str) -> Stub {
    let stub = Stub::new();
    let (output, text) = stub.run(ranks, options, "");
    assert!(output.status.success(), "{ranks} ranks: {text}");
    for rank in 0..ranks {
        assert!(text.contains(&format!("rank {rank} of {ranks}: ok (nccl)")), "{ranks} ranks: {text}");
        let calls = stub.calls(rank);
        assert!(!calls.iter().any(|call| call.starts_with("VIOLATION")), "{calls:?}");
        let count = |name: &str| calls.iter().filter(|call| call.starts_with(name)).count();
        // The world, a half, a node, across nodes: all freed, nothing aborted.
        assert_eq!((count("ncclCommInitRankConfig"), count("ncclCommSplit")), (1, 3));
        assert_eq!((count("ncclCommFinalize"), count("ncclCommDestroy"), count("ncclCommAbort")), (4, 4, 0));
        assert_eq!(count("cuStreamCreate"), count("cuStreamDestroy") + 1, "all but the caller's own");
    }
    stub
}

#[test]
fn nccl_passes_the_conformance_suite_over_the_stub_on_1_and_2_ranks() {
    (1..=2).for_each(|ranks| drop(passes_the_suite(ranks, "")));
}

#[test]
fn nccl_passes_the_conformance_suite_over_the_stub_chunk_by_chunk() {
    let stub = passes_the_suite(2, "--chunk-numel 3000");
    let calls = stub.calls(0);
    assert!(!calls.iter().any(|call| call.contains("count=5000 ")), "a chunk is too long");
    assert!(calls.iter().any(|call| call.starts_with("ncclReduce count=2000")), "the last chunk");
}

#[test]
fn an_operation_is_put_between_two_events_in_one_group_on_a_stream_of_its_own() {
    let stub = Stub::new();
    let (output, text) = stub.run(2, "--scenario told", "");
    assert!(output.status.success(), "{text}");
    for rank in 0..2 {
        let calls = stub.calls(rank);
        let id = (rank == 0).then_some("ncclGetUniqueId");
        let init = format!("ncclCommInitRankConfig rank={rank} of 2 blocking=0");
        let mut expected: Vec<String> = vec!["cuInit".into(), format!("cuDevicePrimaryCtxRetain {rank}")];
        expected.extend(id.map(str::to_owned));
        expected.extend(["cuStreamCreate stream1 flags=1".to_owned(), init]);
        for (ready, done) in [("event2", "event3"), ("event4", "event5")] {
            expected.extend([
                format!("cuEventRecord {ready} default"),
                format!("cuStreamWaitEvent stream1 {ready}"),
                "ncclGroupStart".to_owned(),
                "ncclAllReduce count=2000 type=7 stream1".to_owned(),
                "ncclGroupEnd".to_owned(),
                format!("cuEventRecord {done} stream1"),
            ]);
        }
        expected.extend(["ncclCommFinalize", "ncclCommDestroy", "cuStreamDestroy stream1"].map(str::to_owned));
        expected.push(format!("cuDevicePrimaryCtxRelease {rank}"));
        assert_eq!(calls, expected, "rank {rank}");
    }
}

/// Two reductions while something is broken: the first is aborted and named by each of `ranks`, the second is refused because
/// of the first.
fn is_told(fault: &str, ranks: &[usize], reason: &str) {
    let stub = Stub::new();
    let (output, text) = stub.run(2, "--scenario told --deadline-s 3", fault);
    assert!(output.status.success(), "{text}");
    for rank in ranks {
        let of_rank = format!("rank {rank} of 2: told: rank {rank}: all_reduce ");
        let told: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix(&of_rank)).collect();
        assert_eq!(told.len(), 2, "{text}");
        assert!(told[0].contains(reason), "{text}");
        assert!(told[1].contains(&format!("failed: given up after: rank {rank}: all_reduce")), "{text}");
        assert!(told[1].contains(reason), "{text}");
        let calls = stub.calls(*rank);
        let count = |name: &str| calls.iter().filter(|call| call.starts_with(name)).count();
        assert!(count("ncclAllReduce") <= 1, "{calls:?}");
        assert_eq!(
            (count("ncclCommAbort"), count("ncclCommFinalize"), count("ncclCommDestroy")),
            (1, 0, 0),
            "{calls:?}"
        );
    }
}

#[test]
fn an_operation_that_hangs_is_aborted_at_the_deadline_and_named_on_every_rank() {
    is_told("hang:ncclAllReduce:1", &[0, 1], "did not complete within 3s (waiting for the other ranks)");
}

#[test]
fn an_error_that_comes_later_aborts_the_communicator_and_is_named() {
    let reason = "NCCL reports: remote process exited or there was a network error: said by the stub";
    is_told("async:ncclAllReduce:0", &[0], reason);
}

#[test]
fn a_call_that_fails_aborts_the_communicator_and_is_named() {
    is_told("fail:ncclAllReduce:0", &[0], "ncclGroupEnd: internal error: said by the stub");
    is_told("fail:cuStreamWaitEvent:0", &[0], "cuStreamWaitEvent: CUDA_ERROR_INVALID_VALUE");
}

#[test]
fn a_communicator_that_is_never_made_is_aborted_at_the_deadline() {
    let stub = Stub::new();
    let (output, text) = stub.run(2, "--deadline-s 1", "hang:ncclCommInitRankConfig:1");
    assert!(!output.status.success() && output.status.code() != Some(124), "{text}");
    assert!(text.contains("init did not complete within 1s (waiting for the other ranks)"), "{text}");
    assert!((0..2).any(|rank| stub.calls(rank).contains(&"ncclCommAbort".to_owned())), "{text}");
}

#[test]
fn what_one_rank_lacks_is_told_to_all_before_any_communicator_is_made() {
    let stub = Stub::new();
    let (output, text) = stub.run(2, "", "fail:cuInit:1");
    assert!(!output.status.success(), "{text}");
    assert!(text.contains("nccl cannot be initialised: rank 1: cuInit: CUDA_ERROR_INVALID_VALUE"), "{text}");
    assert!(!stub.calls(0).iter().any(|call| call.starts_with("ncclComm")), "{text}");

    let mut variables = stub.variables("");
    variables.push(("DITHAROS_STUB_DEVICES", "1".to_owned()));
    let (output, text) = mpirun(2, "--backend nccl", &variables);
    assert!(!output.status.success(), "{text}");
    assert!(text.contains("rank 1: there is no GPU 1 for this rank: the driver shows 1"), "{text}");
}

#[test]
fn a_rank_that_waits_on_a_gpu_burns_no_core() {
    let (output, text) = Stub::new().run(2, "--scenario idle", "");
    assert!(output.status.success(), "{text}");
    // Of two seconds; the stub, too, polls for its peer.
    assert!(waiting_took_ms(&text) < 800.0, "{text}");
}

#[test]
fn the_unique_id_goes_round_over_tcp_where_there_is_no_mpi() {
    let stub = Stub::new();
    let ran = TcpRun::new(2).variables(&stub.variables("")).run("--backend nccl");
    for (rank, (output, text)) in ran.iter().enumerate() {
        assert!(output.status.success() && text.contains(&format!("rank {rank} of 2: ok (nccl)")), "{text}");
    }
}

#[test]
fn libraries_that_are_missing_or_too_old_are_named_with_what_to_do() {
    let alone = |variables: &[(&str, String)]| {
        let mut program = Command::new(env!("CARGO_BIN_EXE_collective-conformance"));
        let (output, text) = launch::run(&mut program, "--backend nccl", variables);
        assert_eq!(output.status.code(), Some(1), "{text}");
        text
    };
    let stub = Stub::new();
    let mut variables = stub.variables("");
    variables.push(("DITHAROS_STUB_NCCL_VERSION", "21805".to_owned()));
    assert!(alone(&variables).contains("libnccl.so is version 2.18.5; expected 2.29"));

    if !Path::new("/dev/nvidiactl").exists() {
        let text = alone(&[]);
        assert!(
            text.contains("finds no CUDA driver (libcuda.so.1)") && text.contains("train.device = \"cpu\""),
            "{text}"
        );
    }
}

/// Run by `./dev test --gpu`, which says how many there are.
#[test]
#[ignore = "needs GPUs: ./dev test --gpu"]
fn nccl_passes_the_conformance_suite_on_real_gpus() {
    let Some(gpus) = std::env::var("DITHAROS_GPUS").ok().and_then(|gpus| gpus.parse::<usize>().ok()) else {
        eprintln!("skipped: no GPUs; this is a part of ./dev test --gpu");
        return;
    };
    for (ranks, options) in (1..=gpus).map(|ranks| (ranks, "")).chain([(gpus, "--chunk-numel 3000")]) {
        let (output, text) = mpirun(ranks, &format!("--backend nccl {options}"), &[]);
        assert!(output.status.success(), "{ranks} ranks: {text}");
        assert_eq!(text.matches(": ok (nccl)").count(), ranks, "{text}");
    }
    let ran = TcpRun::new(gpus).run("--backend nccl");
    assert!(ran.iter().all(|(output, _)| output.status.success()), "{}", ran[0].1);
}
