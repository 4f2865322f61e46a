//! `mpirun`: ranks of this machine, or of machines that a remote shell reaches. A single rank here needs no engine.

use std::ffi::OsString;

use configs::{Bind, ClusterConfig};

use super::{Cluster, ClusterError, EngineCommand, Output, Start, TrainerCall, environment};
use crate::cli::Via;
use crate::plan::Plan;
use crate::status::server::TOKEN_VARIABLES;

/// Variables of the launcher that ranks on other machines get, too: credentials and settings of stores, proxies, certificates,
/// NCCL. Their names are arguments of mpirun; their values travel in its own channel.
const HANDED_ON: [&str; 13] = [
    "AWS_",
    "AZURE_",
    "GOOGLE_",
    "NCCL_",
    "DITHAROS_",
    "SSL_CERT_",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "RUST_BACKTRACE",
];

/// A link that is down is noticed after about six seconds; without these, mpirun waits for ever.
const KEEPALIVE: [(&str, &str); 3] =
    [("oob_tcp_keepalive_time", "2"), ("oob_tcp_keepalive_intvl", "2"), ("oob_tcp_keepalive_probes", "2")];

/// OpenMPI's launcher.
pub struct Mpirun {
    pub config: ClusterConfig,
    /// mpirun refuses root unless it is told otherwise.
    pub is_root: bool,
    /// Names of this process's variables.
    pub variables: Vec<String>,
}

impl Mpirun {
    /// As the user of this process, with its environment.
    pub fn of_this_user(config: ClusterConfig) -> Mpirun {
        let variables = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok()).collect();
        Mpirun { config, is_root: nix::unistd::geteuid().is_root(), variables }
    }
}

impl Cluster for Mpirun {
    fn start(&self, plan: &Plan, trainer: &TrainerCall) -> Result<Start, ClusterError> {
        let env = environment(plan.threads_per_rank);
        let (mut argv, output) = match (plan.via, plan.hosts.is_empty()) {
            (Via::Local, true) if plan.nodes > 1 => return Err(ClusterError::NotLocal { nodes: plan.nodes }),
            (Via::Local, false) => return Err(ClusterError::Hosts { via: Via::Local }),
            (_, true) if plan.nodes > 1 => return Err(ClusterError::NoHosts { nodes: plan.nodes }),
            (Via::Local, true) if plan.world_size == 1 => (Vec::new(), Output::RankZero),
            (_, true) => (self.on_this_machine(plan), Output::Tagged),
            (_, false) => (self.on_hosts(plan, &env), Output::Tagged),
        };
        argv.extend(trainer.argv());
        Ok(Start::Engine(EngineCommand { argv, env, output, meets_over_tcp: false }))
    }
}

impl Mpirun {
    fn on_this_machine(&self, plan: &Plan) -> Vec<OsString> {
        let mut argv = self.mpirun(plan, "lo");
        argv.extend(["-n".into(), plan.world_size.to_string().into()]);
        argv
    }

    /// Ranks fill one host after the other, so that those of a node are neighbours: their lanes are one block.
    fn on_hosts(&self, plan: &Plan, env: &[(&'static str, String)]) -> Vec<OsString> {
        let mut argv = self.mpirun(plan, self.config.interface.as_deref().unwrap_or_default());
        argv.extend(["--mca", "plm_rsh_agent", &self.config.remote_shell].map(OsString::from));
        for (key, value) in KEEPALIVE {
            argv.extend(["--mca", key, value].map(OsString::from));
        }
        let is_handed_on =
            |name: &&str| HANDED_ON.iter().any(|prefix| name.starts_with(prefix)) && !TOKEN_VARIABLES.contains(name);
        let mut names: Vec<&str> = self.variables.iter().map(String::as_str).filter(is_handed_on).collect();
        names.extend(env.iter().map(|(name, _)| *name));
        names.sort_unstable();
        names.dedup();
        names.iter().for_each(|name| argv.extend(["-x", name].map(OsString::from)));
        let slots = |host: &String| format!("{host}:{}", plan.procs_per_node);
        let hosts: Vec<String> = plan.hosts.iter().take(plan.nodes).map(slots).collect();
        argv.extend(["--host".into(), hosts.join(",").into(), "-n".into(), plan.world_size.to_string().into()]);
        argv
    }

    fn mpirun(&self, plan: &Plan, interface: &str) -> Vec<OsString> {
        let mut argv: Vec<OsString> = vec!["mpirun".into()];
        if self.is_root {
            argv.push("--allow-run-as-root".into());
        }
        argv.extend(["--oversubscribe", "--tag-output"].map(OsString::from));
        match self.config.bind {
            // Ranks may share the machine with others, and threads are counted by the environment.
            Bind::None => argv.extend(["--bind-to", "none"].map(OsString::from)),
            Bind::Core => {
                let cores = format!("slot:PE={}", plan.threads_per_rank);
                argv.extend(["--map-by", &cores, "--bind-to", "core"].map(OsString::from));
            }
        }
        // Waiting ranks give their core away.
        argv.extend(["--mca", "mpi_yield_when_idle", "1"].map(OsString::from));
        if !interface.is_empty() {
            for key in ["oob_tcp_if_include", "btl_tcp_if_include"] {
                argv.extend(["--mca", key, interface].map(OsString::from));
            }
        }
        argv
    }
}
