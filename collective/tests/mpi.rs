//! The MPI backend over real processes.

use std::process::Command;

/// `program` on `ranks` processes of this machine, ended by force after a minute.
fn mpirun(ranks: usize, program: &str) -> std::process::Output {
    Command::new("timeout")
        .args(["-k", "5", "60", "mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"])
        .args(["--mca", "mpi_yield_when_idle", "1", "--mca", "btl", "self,vader"])
        .args(["--mca", "oob_tcp_if_include", "lo", "-n", &ranks.to_string(), program])
        .output()
        .expect("mpirun must be installed: ./dev setup")
}

#[test]
fn mpi_passes_the_conformance_suite_on_1_2_3_and_4_ranks() {
    for ranks in 1..=4 {
        let output = mpirun(ranks, env!("CARGO_BIN_EXE_collective-conformance"));
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{ranks} ranks: {text}{}", String::from_utf8_lossy(&output.stderr));
        for rank in 0..ranks {
            assert!(text.contains(&format!("rank {rank} of {ranks}: ok")), "{ranks} ranks: {text}");
        }
    }
}
