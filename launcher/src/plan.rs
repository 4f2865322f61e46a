//! Who computes what: nodes, ranks per node, lanes per rank. Pure arithmetic over the config, the command line and
//! what a machine has.

use std::collections::BTreeMap;
use std::io::Write;

use configs::lanes::world_sizes;
use configs::{Device, Reduction, RunConfig, location};
use serde::Serialize;
use serde_json::json;

use crate::cli::{Nodes, Via};
use crate::cluster::{ClusterError, Start};
use crate::forecast::Forecast;
use crate::machine::Machine;

/// What the ranks are started for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Job {
    /// Training: ranks share the lanes evenly.
    #[default]
    Train,
    /// Sampling: batches are dealt to any number of ranks.
    Sample,
    /// Held-out loss: likewise.
    Validate,
    /// Evaluation: likewise.
    Evaluate,
    /// Looking for problems: on the ranks that would train.
    Doctor,
}

/// The part of the command line that the plan depends on.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// `--nodes`
    pub nodes: Option<Nodes>,
    /// `--procs-per-node`
    pub procs_per_node: Option<usize>,
    /// `--hosts`
    pub hosts: Vec<String>,
    /// `--via`
    pub via: Option<Via>,
    /// Nodes of the Slurm allocation that the launcher runs in.
    pub allocation: Option<usize>,
    /// The command.
    pub job: Job,
}

/// A run laid out over machines. `world_size = nodes × procs_per_node`; for training `lanes = world_size × lanes_per_rank`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// What the ranks do.
    pub job: Job,
    /// What starts the ranks.
    pub via: Via,
    /// The machines are there already: those of a Slurm allocation.
    pub is_allocated: bool,
    /// Machines that compute.
    pub nodes: usize,
    /// Machines that were offered and are not used, counted from 0, because the lanes allow only certain world sizes.
    pub idle_nodes: Vec<usize>,
    /// Host names, if given; node `i` is `hosts[i]`.
    pub hosts: Vec<String>,
    /// Ranks on each machine.
    pub procs_per_node: usize,
    /// Ranks altogether.
    pub world_size: usize,
    /// How sums over lanes are made.
    pub reduction: Reduction,
    /// World sizes that the experiment's lanes allow for training.
    pub allowed_world_sizes: Vec<usize>,
    /// Lanes of the experiment.
    pub lanes: usize,
    /// Lanes that each rank executes, one after the other; 0 for sampling, which knows no lanes.
    pub lanes_per_rank: usize,
    /// Samples of one lane per step.
    pub micro_batch: usize,
    /// Samples per step.
    pub global_batch: usize,
    /// CPU threads of each rank.
    pub threads_per_rank: usize,
    /// Cores of a node that no thread of a rank is meant for.
    pub idle_cores_per_node: usize,
    /// `cpu` or `cuda`: what ranks will find, judged by this machine.
    pub device: Device,
    /// Optimizer steps of the whole run.
    pub steps: u64,
    /// The run's location, without credentials.
    pub run_url: String,
    /// What the user should know about this plan.
    pub notes: Vec<String>,
}

/// Why the ranks cannot be laid out as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The lanes cannot be shared evenly by that many ranks.
    #[error(
        "{nodes} node(s) × {procs_per_node} rank(s) = world size {world_size}, which cannot share train.lanes = {lanes} evenly; \
         allowed world sizes are {}; choose --procs-per-node accordingly, or leave it out",
        join(allowed)
    )]
    WorldSize {
        /// Machines asked for.
        nodes: usize,
        /// Ranks per machine asked for.
        procs_per_node: usize,
        /// Their product.
        world_size: usize,
        /// Lanes of the experiment.
        lanes: usize,
        /// What would be possible.
        allowed: Vec<usize>,
    },
    /// More machines than names.
    #[error("--nodes {nodes} asks for more machines than --hosts names ({}): {}", hosts.len(), hosts.join(", "))]
    Hosts {
        /// Machines asked for.
        nodes: usize,
        /// Names given.
        hosts: Vec<String>,
    },
    /// More machines than the allocation has.
    #[error(
        "--nodes {nodes} asks for more machines than this Slurm allocation has ({allocated}); leave --nodes out to use all of them"
    )]
    Allocation {
        /// Machines asked for.
        nodes: usize,
        /// Machines of the allocation.
        allocated: usize,
    },
    /// CUDA was demanded and is not there.
    #[error(
        "train.device = \"cuda\", but this machine shows no NVIDIA GPU; use --set train.device=cpu, or look at CUDA_VISIBLE_DEVICES and the driver"
    )]
    NoGpu,
}

impl Plan {
    /// Lays the run out.
    ///
    /// For training, nodes that do not fit an allowed world size stay idle (three nodes left of four run as two). Ranks per node are taken
    /// as asked, or else as many as the node has GPUs (cores over threads per rank where it has none), rounded down. For sampling
    /// every number of ranks will do.
    ///
    /// # Errors
    /// A world size that the lanes do not allow, fewer host names than nodes, CUDA demanded where there is none.
    pub fn new(config: &RunConfig, request: &Request, machine: &Machine) -> Result<Plan, PlanError> {
        let train = &config.train;
        let hosts = if request.hosts.is_empty() { &config.cluster.hosts } else { &request.hosts };
        let named = (!hosts.is_empty()).then_some(hosts.len());
        let is_allocated =
            request.allocation.is_some() && matches!(request.via, None | Some(Via::Slurm)) && named.is_none();
        let there = if is_allocated { request.allocation } else { named };
        let wanted = request.nodes.unwrap_or(Nodes::exactly(there.unwrap_or(config.cluster.nodes)));
        if let Some(there) = there.filter(|there| wanted.least > *there) {
            return Err(match is_allocated {
                true => PlanError::Allocation { nodes: wanted.least, allocated: there },
                false => PlanError::Hosts { nodes: wanted.least, hosts: hosts.clone() },
            });
        }
        let offered = there.map_or(wanted.most, |there| wanted.most.min(there));
        let via = request.via.unwrap_or(match is_allocated {
            true => Via::Slurm,
            false if offered == 1 && named.is_none() => Via::Local,
            false => Via::Mpirun,
        });
        let machine = &Machine {
            cores: config.cluster.cores_per_node.unwrap_or(machine.cores),
            gpus: config.cluster.gpus_per_node.unwrap_or(machine.gpus),
        };
        let device = device(train.device, machine, via)?;
        let job = request.job;
        let allowed = world_sizes(config.reduction, train.lanes);
        let asked = request.procs_per_node.or(config.cluster.procs_per_node);
        if let Some(procs_per_node) = asked.filter(|procs| job == Job::Train && !allowed.contains(procs)) {
            let world_size = offered.saturating_mul(procs_per_node);
            return Err(PlanError::WorldSize {
                nodes: offered,
                procs_per_node,
                world_size,
                lanes: train.lanes,
                allowed,
            });
        }
        let capacity = if device == Device::Cuda { machine.gpus } else { machine.cores / train.threads_per_rank };
        let (nodes, procs_per_node) = match job {
            Job::Train | Job::Doctor => {
                let most = |limit: usize, others: usize| {
                    let fits = |count: &usize| allowed.contains(&(count * others));
                    (1..=limit.min(train.lanes)).rev().find(fits).unwrap_or(1)
                };
                let nodes = most(offered, asked.unwrap_or(1));
                (nodes, asked.unwrap_or_else(|| most(capacity, nodes)))
            }
            Job::Sample | Job::Validate | Job::Evaluate => (offered, asked.unwrap_or(capacity.max(1))),
        };
        let world_size = nodes * procs_per_node;
        let threads = procs_per_node * train.threads_per_rank;
        let mut plan = Plan {
            job,
            via,
            is_allocated,
            nodes,
            idle_nodes: (nodes..offered).collect(),
            hosts: hosts.clone(),
            procs_per_node,
            world_size,
            reduction: config.reduction,
            allowed_world_sizes: allowed,
            lanes: train.lanes,
            lanes_per_rank: if job == Job::Train { train.lanes / world_size } else { 0 },
            micro_batch: train.micro_batch,
            global_batch: config.global_batch(),
            threads_per_rank: train.threads_per_rank,
            idle_cores_per_node: machine.cores.saturating_sub(threads),
            device,
            steps: train.steps,
            run_url: location::redact(&config.run.url),
            notes: Vec::new(),
        };
        plan.notes = plan.remarks(machine);
        Ok(plan)
    }

    fn remarks(&self, machine: &Machine) -> Vec<String> {
        let mut notes = Vec::new();
        if !self.idle_nodes.is_empty() {
            let names: Vec<String> = self
                .idle_nodes
                .iter()
                .map(|&node| self.hosts.get(node).cloned().unwrap_or(format!("node {node}")))
                .collect();
            notes.push(format!(
                "{} of {} nodes compute, {} idle: {} lanes run on {} ranks",
                self.nodes,
                self.nodes + self.idle_nodes.len(),
                names.join(", "),
                self.lanes,
                join(&self.allowed_world_sizes),
            ));
        }
        if self.job == Job::Train && self.reduction == Reduction::Fast {
            notes.push(format!(
                "reduction = \"fast\": the same bits only from starts on {} ranks; \"invariant\" gives them on every allowed number",
                self.world_size
            ));
        }
        let threads = self.procs_per_node * self.threads_per_rank;
        if self.device == Device::Cpu && threads > machine.cores {
            notes.push(format!("{threads} threads share {} cores: ranks will wait for each other", machine.cores));
        }
        if self.device == Device::Cuda && self.procs_per_node > machine.gpus {
            notes.push(format!("{} ranks share {} GPUs", self.procs_per_node, machine.gpus));
        }
        notes
    }
}

/// What ranks will compute on. A machine that only sends work elsewhere says nothing about the GPUs there.
fn device(asked: Device, machine: &Machine, via: Via) -> Result<Device, PlanError> {
    match asked {
        Device::Auto if machine.gpus > 0 => Ok(Device::Cuda),
        Device::Auto => Ok(Device::Cpu),
        Device::Cuda if machine.gpus == 0 && via == Via::Local => Err(PlanError::NoGpu),
        fixed => Ok(fixed),
    }
}

fn join(sizes: &[usize]) -> String {
    sizes.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")
}

/// A dozen at most: the smallest and the largest.
fn short(sizes: &[usize]) -> String {
    match sizes {
        [first @ .., _, _, _] if sizes.len() > 12 => {
            format!("{} … {}", join(&first[..8]), join(&sizes[sizes.len() - 3..]))
        }
        _ => join(sizes),
    }
}

/// Prints the plan, as a table or as one JSON object with the engine's command.
///
/// # Errors
/// When the output cannot be written.
pub fn show(
    plan: &Plan,
    start: Result<&Start, &ClusterError>,
    forecast: Option<&Forecast>,
    as_json: bool,
) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    let argv = start.map(Start::shown);
    let handover = start.ok().and_then(|start| match start {
        Start::Handover(handover) => Some(handover.text.as_str()),
        Start::Engine(_) => None,
    });
    if as_json {
        let mut value = json!(plan);
        value["command"] = json!(argv.as_ref().ok());
        value["env"] = json!(start.ok().map(|start| start.env().iter().cloned().collect::<BTreeMap<_, _>>()));
        value["handover"] = json!(handover);
        value["missing"] = json!(start.err().map(ToString::to_string));
        forecast.iter().for_each(|forecast| forecast.add_to(&mut value));
        return writeln!(out, "{value:#}");
    }
    match plan.job {
        Job::Train => writeln!(out, "run           {}, {} steps", plan.run_url, plan.steps)?,
        Job::Sample => writeln!(out, "run           {}, sampling", plan.run_url)?,
        Job::Validate => writeln!(out, "run           {}, validation", plan.run_url)?,
        Job::Evaluate => writeln!(out, "run           {}, evaluation", plan.run_url)?,
        Job::Doctor => writeln!(out, "run           {}, looking for problems", plan.run_url)?,
    }
    writeln!(out, "engine        {}", plan.via)?;
    writeln!(out, "nodes         {} × {} ranks = world size {}", plan.nodes, plan.procs_per_node, plan.world_size)?;
    if plan.job == Job::Train {
        writeln!(
            out,
            "lanes         {}, {} per rank (allowed world sizes: {})",
            plan.lanes,
            plan.lanes_per_rank,
            short(&plan.allowed_world_sizes)
        )?;
        writeln!(out, "global batch  {} = {} lanes × {}", plan.global_batch, plan.lanes, plan.micro_batch)?;
    }
    writeln!(
        out,
        "a rank        {}, {} thread(s); {} core(s) of a node idle",
        json!(plan.device).as_str().unwrap_or_default(),
        plan.threads_per_rank,
        plan.idle_cores_per_node
    )?;
    if let Some(forecast) = forecast {
        forecast.show(plan, &mut out)?;
    }
    match argv {
        Ok(argv) if argv.is_empty() => {}
        Ok(argv) => writeln!(out, "command       {}", argv.join(" "))?,
        Err(missing) => writeln!(out, "command       none: {missing}")?,
    }
    for note in &plan.notes {
        writeln!(out, "note          {note}")?;
    }
    if let Some(text) = handover {
        writeln!(out, "\n{text}")?;
    }
    Ok(())
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
