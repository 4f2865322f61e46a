//! `[cluster]`: the machines that ranks run on, and what starts them there.

use serde::Serialize;

/// `[cluster]`
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ClusterConfig {
    /// Machines, at least 1.
    pub nodes: usize,
    /// Ranks per machine; `None`: the launcher decides.
    pub procs_per_node: Option<usize>,
    /// Names of the machines that `mpirun` reaches by [`ClusterConfig::remote_shell`].
    pub hosts: Vec<String>,
    /// GPUs of a machine, where those that compute are unlike the one that the launcher runs on.
    pub gpus_per_node: Option<usize>,
    /// Cores of a machine, likewise.
    pub cores_per_node: Option<usize>,
    /// Network interface that ranks and engine are bound to, such as `eth0`; `None`: the engine chooses.
    pub interface: Option<String>,
    /// What `mpirun` starts its daemons on other machines with: a program that is called like `ssh`.
    pub remote_shell: String,
    /// Whether each rank is tied to cores of its own.
    pub bind: Bind,
    /// How often the launcher starts a failed group again by itself; `None`: it decides.
    pub restarts: Option<u32>,
    /// Seconds without a sign of life after which the launcher gives a rank up and ends the group; 0: it waits for ever.
    pub silence_s: u64,
    /// What a Slurm job asks for.
    pub slurm: SlurmConfig,
    /// What an MPIJob asks for.
    pub kubernetes: KubernetesConfig,
}

/// What a rank's threads may run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Bind {
    /// Whatever the scheduler gives them: for machines that are shared.
    None,
    /// `train.threads_per_rank` cores of their own, neighbours of each other.
    Core,
}

/// `[cluster.slurm]`: texts go to the options of `sbatch` with the same names.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SlurmConfig {
    /// `--partition`
    pub partition: Option<String>,
    /// `--account`
    pub account: Option<String>,
    /// `--qos`
    pub qos: Option<String>,
    /// `--constraint`
    pub constraint: Option<String>,
    /// `--time`, as Slurm writes it: `1-12:00:00`.
    pub time: Option<String>,
    /// Seconds before the time limit at which the run saves and stops.
    pub save_before_end_s: u64,
    /// Jobs in a chain, each going on where the one before stopped; 1: one job that is requeued instead.
    pub chain: usize,
    /// How `srun` introduces ranks to each other: `pmix`, or `none` for our own rendezvous.
    pub mpi: SlurmMpi,
    /// Further options of `sbatch`, each beginning with `--`.
    pub options: Vec<String>,
}

/// `srun --mpi`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SlurmMpi {
    /// MPI, through PMIx.
    Pmix,
    /// No MPI: ranks meet over TCP.
    None,
}

/// `[cluster.kubernetes]`
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct KubernetesConfig {
    /// The image that the project's Dockerfile makes.
    pub image: Option<String>,
    /// `metadata.name`.
    pub name: String,
    /// `metadata.namespace`; `None`: that of the context.
    pub namespace: Option<String>,
    /// Persistent volume claims and where they are mounted, each `CLAIM:/PATH`.
    pub claims: Vec<String>,
    /// A secret whose entries become variables of all ranks: credentials of stores.
    pub secret: Option<String>,
}
