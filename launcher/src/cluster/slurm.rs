//! Slurm: `srun` inside an allocation; outside of one, a batch script that runs this launcher inside the one it asks for.

use std::ffi::OsString;

use configs::{Bind, ClusterConfig, Device, SlurmConfig, SlurmMpi, exit};

use super::{Cluster, ClusterError, EngineCommand, Handover, Output, Start, TrainerCall, environment};
use crate::cli::Via;
use crate::plan::{Job, Plan};

/// A Slurm cluster.
pub struct Slurm {
    pub config: ClusterConfig,
}

impl Cluster for Slurm {
    fn start(&self, plan: &Plan, trainer: &TrainerCall) -> Result<Start, ClusterError> {
        if !plan.hosts.is_empty() {
            return Err(ClusterError::Hosts { via: Via::Slurm });
        }
        if plan.is_allocated {
            let mut argv = self.srun(plan);
            argv.extend(trainer.argv());
            let mut env = environment(plan.threads_per_rank);
            let meets_over_tcp = self.config.slurm.mpi == SlurmMpi::None && plan.world_size > 1;
            let interface = self.config.interface.clone().filter(|_| meets_over_tcp);
            env.extend(interface.map(|name| ("DITHAROS_INTERFACE", name)));
            return Ok(Start::Engine(EngineCommand { argv, env, output: Output::Labelled, meets_over_tcp }));
        }
        if plan.job != Job::Train {
            return Err(ClusterError::NotTraining { via: Via::Slurm });
        }
        let text = self.batch_script(plan, trainer);
        Ok(Start::Handover(Handover { text, submit: ["sbatch", "--parsable"].map(OsString::from).to_vec() }))
    }
}

impl Slurm {
    /// The step ends as a whole when one rank fails; without that, srun waits for ever.
    fn srun(&self, plan: &Plan) -> Vec<OsString> {
        let mpi = match self.config.slurm.mpi {
            SlurmMpi::Pmix => "--mpi=pmix",
            SlurmMpi::None => "--mpi=none",
        };
        let fixed = ["srun", mpi, "--kill-on-bad-exit=1", "--label"].map(str::to_owned);
        let sizes = [
            format!("--nodes={}", plan.nodes),
            format!("--ntasks={}", plan.world_size),
            format!("--ntasks-per-node={}", plan.procs_per_node),
            format!("--cpus-per-task={}", plan.threads_per_rank),
        ];
        let bind = (self.config.bind == Bind::Core).then(|| "--cpu-bind=cores".to_owned());
        fixed.into_iter().chain(sizes).chain(bind).map(OsString::from).collect()
    }

    /// A job that saves before its time is over and comes back: requeued, or as the next of a chain.
    fn batch_script(&self, plan: &Plan, trainer: &TrainerCall) -> String {
        let SlurmConfig { partition, account, qos, constraint, time, save_before_end_s, chain, options, .. } =
            &self.config.slurm;
        let mut asks = vec![
            "--job-name=ditharos".to_owned(),
            format!("--nodes={}", plan.nodes),
            format!("--ntasks-per-node={}", plan.procs_per_node),
            format!("--cpus-per-task={}", plan.threads_per_rank),
            // To the batch shell, which hands it to the launcher, which asks the ranks.
            format!("--signal=B:USR1@{save_before_end_s}"),
            "--open-mode=append".to_owned(),
        ];
        if plan.device == Device::Cuda {
            asks.push(format!("--gpus-per-node={}", self.config.gpus_per_node.unwrap_or(plan.procs_per_node)));
        }
        match chain {
            1 => asks.push("--requeue".to_owned()),
            jobs => asks.push(format!("--array=1-{jobs}%1")),
        }
        let named =
            [("partition", partition), ("account", account), ("qos", qos), ("constraint", constraint), ("time", time)];
        asks.extend(named.into_iter().filter_map(|(name, value)| Some(format!("--{name}={}", value.as_ref()?))));
        asks.extend(options.iter().cloned());
        let asks: String = asks.iter().map(|ask| format!("#SBATCH {}\n", in_directive(ask))).collect();

        let mut launcher = trainer.launcher(&trainer.config);
        launcher.extend(["--via", "slurm", "--procs-per-node"].map(OsString::from));
        launcher.push(plan.procs_per_node.to_string().into());
        let launcher: Vec<String> = launcher.iter().map(|argument| quoted(&argument.to_string_lossy())).collect();
        let again = match chain {
            1 => format!("[ \"$time_is_over$code\" = yes{} ] && scontrol requeue \"$SLURM_JOB_ID\"\n", exit::RESUMABLE),
            _ => String::new(),
        };
        format!(
            "#!/bin/bash\n{asks}\n\
             # USR1 comes before the time limit. TERM is a cancellation, or a pre-emption after which Slurm itself requeues the job.\n\
             launcher= asked= time_is_over=\n\
             stop() {{ asked=yes; [ -z \"$launcher\" ] || kill -USR1 \"$launcher\"; }}\n\
             trap 'time_is_over=yes; stop' USR1\n\
             trap stop TERM\n\
             {} &\n\
             launcher=$!\n\
             [ -z \"$asked\" ] || stop\n\
             wait $launcher; code=$?\n\
             # A signal ends the wait, not the launcher.\n\
             while kill -0 $launcher 2>/dev/null; do wait $launcher; code=$?; done\n\
             {again}exit $code\n",
            launcher.join(" ")
        )
    }
}

/// A word for the shell, whatever is in it.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// A value in a line of directives, which Slurm splits like a shell.
fn in_directive(ask: &str) -> String {
    match ask.chars().all(|c| c.is_ascii_alphanumeric() || "-_=:@%.,/+".contains(c)) {
        true => ask.to_owned(),
        false => format!("\"{}\"", ask.replace('\\', r"\\").replace('"', "\\\"")),
    }
}
