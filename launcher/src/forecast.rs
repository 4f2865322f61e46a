//! Will it fit, and how long: what a plan's ranks will hold, send and take, computed before anything starts.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use configs::{Bind, Device, Precision, RunConfig};
use estimate::{Change, DataDims, Dims, Estimate, Hardware, Machines, Place};
use serde::Serialize;
use serde_json::{Value, json};

use crate::cli::Cli;
use crate::plan::{Job, Plan};
use crate::topology::{self, GpuPlace};

/// The latents of ImageNet at 256×256 through the usual VAE, where neither config nor data set says otherwise.
const USUAL: DataDims = DataDims { input_size: 32, in_channels: 4, num_classes: 1000 };
/// Share of a GPU's memory that a rank may hold: the rest is lost between blocks.
const USABLE: f64 = 0.92;
/// Blocks of the model that `--measure` times.
const MEASURED_DEPTH: usize = 2;

/// What the options of the command line say about machines that are not here.
#[derive(Debug, Default)]
pub struct Asked {
    hardware: Option<String>,
    measure: bool,
    /// The machines are others than this one.
    elsewhere: bool,
    /// The folder of the other programs.
    programs: PathBuf,
}

/// What a plan will take.
#[derive(Debug, Serialize)]
pub struct Forecast {
    params: usize,
    trained_params: usize,
    memory: estimate::Memory,
    /// What a rank may hold; `None` where nobody knows.
    budget_bytes: Option<u64>,
    fits: Option<bool>,
    /// Where it does not fit: what to change first, and what else was tried.
    first_change: Option<Change>,
    tried: Vec<Change>,
    wire: estimate::Wire,
    time: estimate::Time,
    /// What would send less between nodes.
    hint: Option<String>,
    hardware: Hardware,
    /// GPUs of this machine in the order of their ranks, if it is one of those that compute.
    gpus: Vec<GpuPlace>,
    /// What a rank's threads may run on.
    bind: Bind,
    /// What was taken for granted.
    assumed: Vec<String>,
}

impl Asked {
    /// Of the command line.
    ///
    /// # Errors
    /// The launcher's own executable cannot be found.
    pub fn of(cli: &Cli) -> anyhow::Result<Asked> {
        let programs = std::env::current_exe().context("cannot find the launcher's own executable")?;
        let programs = programs.parent().unwrap_or(Path::new(".")).to_owned();
        let elsewhere = cli.gpus.is_some();
        Ok(Asked { hardware: cli.hardware.clone(), measure: cli.measure, elsewhere, programs })
    }
}

impl Forecast {
    /// Of a plan for training; other jobs have none.
    ///
    /// # Errors
    /// Hardware that nobody knows, a measurement that fails.
    pub fn new(config: &RunConfig, plan: &Plan, asked: &Asked) -> anyhow::Result<Option<Forecast>> {
        if plan.job != Job::Train {
            return Ok(None);
        }
        let mut assumed = Vec::new();
        let dims = Dims::of(config, data_dims(config, &asked.programs, &mut assumed));
        let on_gpu = plan.device == Device::Cuda;
        let gpu = (on_gpu && !asked.elsewhere).then(this_gpu).flatten();
        let mut hardware = Hardware::find(&match (&asked.hardware, &gpu) {
            (Some(name), _) => name.clone(),
            (None, Some((name, _))) if name.contains("H100") => "h100".to_owned(),
            (None, _) if on_gpu => "a100".to_owned(),
            (None, _) => "cpu".to_owned(),
        })?;
        if asked.measure {
            hardware.measured_s_per_sample = Some(measured(config, &dims, asked)?);
        } else {
            let share = |share: f64| (100.0 * share).round();
            assumed.push(format!(
                "{}: {}% of its products' rate, {}% of its memory's, {}% of the wire's",
                hardware.name,
                share(hardware.achieved_flops),
                share(hardware.achieved_memory),
                share(hardware.achieved_wire)
            ));
        }
        let budget_bytes = match (on_gpu, gpu) {
            (true, Some((_, bytes))) if asked.hardware.is_none() => Some(bytes),
            (true, _) => hardware.memory_bytes.map(|bytes| bytes as u64),
            (false, _) => available_bytes().map(|bytes| bytes / plan.procs_per_node.max(1) as u64),
        };
        let budget_bytes = budget_bytes.map(|bytes| if on_gpu { (bytes as f64 * USABLE) as u64 } else { bytes });
        let machines = Machines { nodes: plan.nodes, ranks_per_node: plan.procs_per_node, on_gpu };
        let estimate = Estimate::new(config, &dims, &machines, &hardware);
        let fits = budget_bytes.map(|budget| estimate.memory.peak_bytes <= budget);
        let tried = match (fits, budget_bytes) {
            (Some(false), Some(budget)) => estimate::changes(config, &dims, &machines, &hardware, &estimate, budget),
            _ => Vec::new(),
        };
        // With CUDA_VISIBLE_DEVICES ranks have others, in another order.
        let is_here = on_gpu && !asked.elsewhere && std::env::var_os("CUDA_VISIBLE_DEVICES").is_none();
        let mut gpus = if is_here { topology::gpus(Path::new("/sys")) } else { Vec::new() };
        gpus.truncate(plan.procs_per_node);
        let hint = in_each_node(config, &dims, &machines, &hardware, &estimate);
        let Estimate { params, trained: trained_params, memory, wire, time } = estimate;
        let first_change = estimate::fit::first(&tried).cloned();
        Ok(Some(Forecast {
            params,
            trained_params,
            memory,
            budget_bytes,
            fits,
            first_change,
            tried,
            wire,
            time,
            hint,
            hardware,
            gpus,
            bind: config.cluster.bind,
            assumed,
        }))
    }

    /// As the parts of the plan's JSON.
    pub fn add_to(&self, plan: &mut Value) {
        let Value::Object(parts) = json!(self) else { return };
        for (key, value) in parts {
            plan[key] = value;
        }
    }

    /// As lines of the plan's table.
    ///
    /// # Errors
    /// When the output cannot be written.
    pub fn show(&self, plan: &Plan, out: &mut impl Write) -> std::io::Result<()> {
        let million = |count: usize| count as f64 / 1e6;
        write!(out, "model         {:.1} million parameters", million(self.params))?;
        match self.trained_params == self.params {
            true => writeln!(out)?,
            false => writeln!(out, ", {:.1} of them trained", million(self.trained_params))?,
        }
        let of_place = |place| {
            let parts = self.memory.categories.iter().filter(|part| part.place == place && part.bytes > 0);
            parts.map(|part| format!("{} {}", part.name, size(part.bytes))).collect::<Vec<_>>().join(", ")
        };
        writeln!(out, "memory        {} a rank: {}", size(self.memory.peak_bytes), of_place(Place::Device))?;
        let beside = match self.memory.host_bytes {
            0 => String::new(),
            bytes => format!("and {} of the host's: ", size(bytes)),
        };
        writeln!(out, "              {beside}{}", of_place(Place::Host))?;
        match (self.fits, self.budget_bytes) {
            (Some(true), Some(budget)) => writeln!(out, "fits          yes: a rank may hold {}", size(budget))?,
            (Some(false), Some(budget)) => {
                writeln!(out, "fits          NO: a rank may hold {}", size(budget))?;
                self.show_changes(out)?;
            }
            _ => writeln!(out, "fits          unknown: the memory of a rank's device is")?,
        }
        let wire = &self.wire;
        if plan.world_size > 1 {
            let (gradients, weights) = (size(wire.gradients_bytes_per_rank), size(wire.weights_bytes_per_rank));
            write!(out, "wire          a rank sends {gradients} of gradients and {weights} of weights a step")?;
            match plan.nodes {
                1 => writeln!(out)?,
                _ => writeln!(
                    out,
                    "; {} leave a node through each of {} NIC(s)",
                    size(wire.bytes_per_nic),
                    self.hardware.nics_per_node
                )?,
            }
        }
        let time = &self.time;
        writeln!(
            out,
            "time          {} a step: compute {}, wire {} ({} of it not hidden), update {}",
            seconds(time.step_s),
            seconds(time.compute_s),
            seconds(time.wire_s),
            seconds(time.exposed_wire_s),
            seconds(time.update_s)
        )?;
        let how = if self.hardware.measured_s_per_sample.is_some() {
            "as measured here"
        } else {
            "a prediction, not a measurement"
        };
        writeln!(
            out,
            "              {:.0} samples/s, {} for {} steps: {how}",
            time.samples_per_s,
            days(time.days),
            plan.steps
        )?;
        for line in topology::lines(&self.gpus) {
            writeln!(out, "order         {line}")?;
        }
        if !self.gpus.is_empty() {
            let bound =
                if self.bind == Bind::Core { "cores of its own" } else { "any core (cluster.bind = \"core\" ties it)" };
            writeln!(
                out,
                "binding       a rank runs on {bound}; NCCL chooses the NIC itself unless NCCL_IB_HCA says otherwise"
            )?;
        }
        if let Some(hint) = &self.hint {
            writeln!(out, "hint          {hint}")?;
        }
        self.assumed.iter().try_for_each(|what| writeln!(out, "assumed       {what}"))
    }

    fn show_changes(&self, out: &mut impl Write) -> std::io::Result<()> {
        let told = |change: &Change| {
            let set: Vec<String> = change.set.iter().map(|pair| format!("--set {pair}")).collect();
            let bits = if change.same_bits { "the same bits" } else { "another experiment" };
            format!("{}: {}, {} a step, {bits}", set.join(" "), size(change.peak_bytes), seconds(change.step_s))
        };
        match &self.first_change {
            Some(change) => writeln!(out, "change first  {}", told(change)),
            None => {
                let least = self.tried.iter().min_by_key(|change| change.peak_bytes);
                let least = least.map_or_else(|| "none lowers it".to_owned(), told);
                writeln!(
                    out,
                    "change first  none suffices; the least is {least}; or take more ranks or a smaller model"
                )
            }
        }
    }
}

/// Whether sharing out in each node, instead of over all of them, halves what leaves it.
fn in_each_node(
    config: &RunConfig,
    dims: &Dims,
    machines: &Machines,
    hardware: &Hardware,
    now: &Estimate,
) -> Option<String> {
    let mut changed = config.clone();
    changed.train.sharding_ranks = Some(machines.ranks_per_node);
    let then = Estimate::new(&changed, dims, machines, hardware);
    (machines.nodes > 1 && 2 * then.wire.bytes_per_nic <= now.wire.bytes_per_nic).then(|| {
        format!(
            "--set train.sharding_ranks={} shares out in each node: {} through a NIC instead of {}, {} a step, {} a rank, the same bits",
            machines.ranks_per_node,
            size(then.wire.bytes_per_nic),
            size(now.wire.bytes_per_nic),
            seconds(then.time.step_s),
            size(then.memory.peak_bytes)
        )
    })
}

/// What the config leaves to the data set, from its metadata if it is on this machine.
fn data_dims(config: &RunConfig, programs: &Path, assumed: &mut Vec<String>) -> DataDims {
    let m = &config.model;
    let needed = m.input_size.is_none() || m.in_channels.is_none() || m.num_classes.is_none();
    if !needed {
        return USUAL;
    }
    if let Some(found) = inspected(config, programs) {
        return found;
    }
    assumed.push(format!(
        "latents of {0}×{1}×{1} and {2} classes, for want of a data set on this machine: set model.in_channels, input_size and \
         num_classes",
        USUAL.in_channels, USUAL.input_size, USUAL.num_classes
    ));
    USUAL
}

/// What `latents inspect` says of a data set on this machine.
fn inspected(config: &RunConfig, programs: &Path) -> Option<DataDims> {
    let source = config.data.sources().into_iter().next()?;
    let url = source.url.iter().next()?.to_owned();
    let path = Path::new(url.strip_prefix("file://").unwrap_or(&url));
    if !path.is_absolute() || !path.exists() {
        return None;
    }
    let mut inspect = Command::new(programs.join("latents"));
    inspect.args(["inspect", "--quick", "--json"]).arg(&url).stdin(Stdio::null());
    let said = inspect.output().ok().filter(|done| done.status.success())?;
    let said: Value = serde_json::from_slice(&said.stdout).ok()?;
    let dimension = |index: usize| Some(said["latent_shape"].get(index)?.as_u64()? as usize);
    let num_classes = said["num_classes"].as_u64().map_or(USUAL.num_classes, |classes| classes as usize);
    Some(DataDims { in_channels: dimension(0)?, input_size: dimension(1)?, num_classes })
}

/// Seconds that a sample takes forward and backward on this machine, by timing the trainer's own step on a model that is as wide, but
/// not as deep.
fn measured(config: &RunConfig, dims: &Dims, asked: &Asked) -> anyhow::Result<f64> {
    let mut shallow = config.clone();
    shallow.model.depth = MEASURED_DEPTH.min(dims.depth);
    (shallow.lora, shallow.train.freeze) = (None, Vec::new());
    shallow.model.conditioning = Default::default();
    shallow.model.mlp_ratio = 4.0;
    let data = DataDims { input_size: dims.input_size, in_channels: dims.in_channels, num_classes: dims.num_classes };
    let shallow_dims = Dims { mlp_hidden: 4 * dims.hidden_size, learn_sigma: true, ..Dims::of(&shallow, data) };
    let of = |config: &RunConfig, dims: &Dims| {
        let ([fp32, bf16], _) = estimate::Sizes::new(config, dims, 1, 1).lane_work(config);
        fp32 + bf16
    };
    let precision = if config.train.precision == Precision::Bf16 { "bf16" } else { "fp32" };
    let numbers = [
        ("--hidden-size", dims.hidden_size),
        ("--depth", shallow.model.depth),
        ("--num-heads", dims.num_heads),
        ("--patch-size", dims.patch_size),
        ("--input-size", dims.input_size),
        ("--in-channels", dims.in_channels),
        ("--num-classes", dims.num_classes),
        ("--micro-batch", config.train.micro_batch),
        ("--threads", config.train.threads_per_rank),
        ("--activation-checkpointing", config.train.activation_checkpointing),
    ];
    let mut bench = Command::new(asked.programs.join("trainer"));
    bench.args(["bench-step", "--json", "--steps", "5", "--warmup", "2", "--dtype", precision]);
    for (option, value) in numbers {
        bench.args([option, &value.to_string()]);
    }
    let done = bench.stdin(Stdio::null()).output().context("--measure: the trainer cannot be started")?;
    let said = String::from_utf8_lossy(&done.stdout);
    let line = said.lines().last().and_then(|line| serde_json::from_str::<Value>(line).ok());
    let rate = line.as_ref().and_then(|line| line["images_per_s"].as_f64()).filter(|rate| *rate > 0.0);
    let Some(rate) = rate.filter(|_| done.status.success()) else {
        bail!(
            "--measure: `trainer bench-step` failed ({}): {}",
            done.status,
            String::from_utf8_lossy(&done.stderr).trim()
        );
    };
    Ok(of(config, dims) / of(&shallow, &shallow_dims) / rate)
}

/// Name and memory of this machine's first GPU.
fn this_gpu() -> Option<(String, u64)> {
    let mut ask = Command::new("nvidia-smi");
    ask.args(["--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]).stdin(Stdio::null());
    let said = ask.stderr(Stdio::null()).output().ok().filter(|done| done.status.success())?;
    gpu_of(&String::from_utf8_lossy(&said.stdout))
}

fn gpu_of(said: &str) -> Option<(String, u64)> {
    let (name, mebibytes) = said.lines().next()?.rsplit_once(',')?;
    Some((name.trim().to_owned(), mebibytes.trim().parse::<u64>().ok()? << 20))
}

/// What this machine has to give.
fn available_bytes() -> Option<u64> {
    let said = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = said.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

fn size(bytes: u64) -> String {
    match bytes as f64 {
        bytes if bytes >= 1e9 => format!("{:.1} GB", bytes / 1e9),
        bytes => format!("{:.0} MB", bytes / 1e6),
    }
}

fn seconds(seconds: f64) -> String {
    match seconds {
        seconds if seconds >= 1.0 => format!("{seconds:.2} s"),
        seconds => format!("{:.1} ms", seconds * 1e3),
    }
}

fn days(days: f64) -> String {
    match days {
        days if days >= 1.0 => format!("{days:.1} days"),
        days if days * 24.0 >= 1.0 => format!("{:.1} hours", days * 24.0),
        days => format!("{:.0} minutes", days * 1440.0),
    }
}

#[cfg(test)]
#[path = "forecast_tests.rs"]
mod tests;
