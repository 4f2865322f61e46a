//! How tests start ranks.

#![allow(dead_code)] // Each test program that includes this file uses a part of it.

use std::net::TcpListener;
use std::process::{Child, Command, Output, Stdio};

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
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    finish(child.expect("mpirun must be installed: ./dev setup"))
}

/// Processor time that rank 0 says it used while it waited for two seconds.
pub fn waiting_took_ms(text: &str) -> f64 {
    let told = text.lines().find_map(|line| line.split_once("rank 0 of 2: waiting took ")).expect(text).1;
    told.trim().trim_end_matches(" ms").parse().expect(text)
}

/// Ranks that know each other from the variables of torchrun and Kubernetes alone.
#[derive(Clone)]
pub struct TcpRun {
    ranks: usize,
    port: u16,
    variables: Vec<(String, String)>,
}

impl TcpRun {
    pub fn new(ranks: usize) -> Self {
        // Free now, and not given out again so soon.
        let port = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").port();
        let token = ("DITHAROS_RENDEZVOUS_TOKEN".to_owned(), "a token for this test".to_owned());
        Self { ranks, port, variables: vec![token] }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn variables(mut self, variables: &[(&str, String)]) -> Self {
        self.variables.extend(variables.iter().map(|(name, value)| (name.to_string(), value.clone())));
        self
    }

    /// Starts rank `rank`, ended by force after a minute. It is no child of an MPI launcher, whatever started the tests.
    pub fn start(&self, rank: usize, options: &str) -> Child {
        let mut command = Command::new("timeout");
        command.args(["-k", "5", "60", env!("CARGO_BIN_EXE_collective-conformance")]).args(options.split_whitespace());
        command.env_remove("OMPI_COMM_WORLD_SIZE").env_remove("PMI_SIZE").envs(self.variables.iter().cloned());
        let [rank, size, port] = [rank, self.ranks, self.port.into()].map(|number| number.to_string());
        command.env("RANK", &rank).env("LOCAL_RANK", &rank).env("WORLD_SIZE", &size).env("LOCAL_WORLD_SIZE", &size);
        command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", &port);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the conformance program")
    }

    /// Starts all ranks and waits for them: what each says.
    pub fn run(&self, options: &str) -> Vec<(Output, String)> {
        let children: Vec<Child> = (0..self.ranks).map(|rank| self.start(rank, options)).collect();
        children.into_iter().map(finish).collect()
    }
}

/// Waits for a program: what it says.
pub fn finish(child: Child) -> (Output, String) {
    let output = child.wait_with_output().expect("the program's output");
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (output, text)
}
