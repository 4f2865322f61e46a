//! How tests start ranks.

use std::process::{Command, Output};

/// The conformance program on `ranks` processes of this machine, ended by force after a minute; what it says.
pub fn mpirun(ranks: usize, options: &str, variables: &[(&str, String)]) -> (Output, String) {
    let mut command = Command::new("timeout");
    command.args(["-k", "5", "60", "mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]);
    command.args(["--mca", "mpi_yield_when_idle", "1", "--mca", "btl", "self,vader"]);
    command.args(["--mca", "oob_tcp_if_include", "lo", "-n", &ranks.to_string()]);
    run(command.arg(env!("CARGO_BIN_EXE_collective-conformance")), options, variables)
}

/// A program with options and variables.
pub fn run(command: &mut Command, options: &str, variables: &[(&str, String)]) -> (Output, String) {
    command.args(options.split_whitespace()).envs(variables.iter().map(|(name, value)| (name, value)));
    let output = command.output().expect("mpirun must be installed: ./dev setup");
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (output, text)
}

/// Processor time that rank 0 says it used while it waited for two seconds.
pub fn waiting_took_ms(text: &str) -> f64 {
    let told = text.lines().find_map(|line| line.split_once("rank 0 of 2: waiting took ")).expect(text).1;
    told.trim().trim_end_matches(" ms").parse().expect(text)
}
