//! This machine: one rank as a plain process, several through `mpirun`.

use std::ffi::OsString;

use configs::events::{EVENTS_STDOUT, EVENTS_VARIABLE};

use super::{Cluster, EngineCommand, NotBuilt, Output, TrainerCall};
use crate::plan::Plan;

/// Ranks on the machine that the launcher runs on.
pub struct Local {
    /// mpirun refuses root unless it is told otherwise.
    is_root: bool,
}

impl Local {
    /// As the user of this process.
    pub fn this_user() -> Local {
        Local { is_root: nix::unistd::geteuid().is_root() }
    }
}

impl Cluster for Local {
    fn command(&self, plan: &Plan, trainer: &TrainerCall) -> Result<EngineCommand, NotBuilt> {
        if plan.nodes != 1 || !plan.hosts.is_empty() {
            return Err(NotBuilt { via: plan.via, nodes: plan.nodes });
        }
        let (mut argv, output) = match plan.world_size {
            1 => (Vec::new(), Output::RankZero),
            _ => (self.mpirun(plan.world_size), Output::Tagged),
        };
        argv.extend(trainer.argv());
        Ok(EngineCommand { argv, env: environment(plan.threads_per_rank), output })
    }
}

impl Local {
    fn mpirun(&self, world_size: usize) -> Vec<OsString> {
        let mut argv: Vec<OsString> = vec!["mpirun".into()];
        if self.is_root {
            argv.push("--allow-run-as-root".into());
        }
        // Binding is left to the scheduler: ranks may share the machine with others, and threads are counted by env.
        argv.extend(["--oversubscribe", "--bind-to", "none", "--tag-output"].map(OsString::from));
        // Waiting ranks give their core away; and nothing listens on other interfaces than the loopback.
        for (key, value) in [("mpi_yield_when_idle", "1"), ("oob_tcp_if_include", "lo"), ("btl_tcp_if_include", "lo")] {
            argv.extend(["--mca", key, value].map(OsString::from));
        }
        argv.extend(["-n".into(), world_size.to_string().into()]);
        argv
    }
}

/// What ranks need in their environment. mpirun on one machine hands its own environment on.
fn environment(threads_per_rank: usize) -> Vec<(&'static str, String)> {
    let threads = threads_per_rank.to_string();
    vec![
        (EVENTS_VARIABLE, EVENTS_STDOUT.to_owned()),
        // Threads are part of the experiment: set, and not changed at run time.
        ("OMP_NUM_THREADS", threads.clone()),
        ("MKL_NUM_THREADS", threads),
        ("OMP_DYNAMIC", "FALSE".to_owned()),
        ("MKL_DYNAMIC", "FALSE".to_owned()),
    ]
}
