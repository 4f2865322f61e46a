//! `trainer doctor`: what would keep a run from running well, looked for by one process or by all ranks of a world.

use super::ranks::{ConfigArgs, together};
use crate::engine::agree::{Agreed, agree};
use crate::engine::data::{open_data, warnings};
use crate::engine::preflight::same_programs;
use crate::ffi;
use anyhow::{Context, Result};
use checkpoint::RunStore;
use collective::{Collective, ReduceOp};
use configs::{RunConfig, location};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tch::{Device, Kind, Tensor};

/// Options of `trainer doctor`.
#[derive(clap::Args)]
pub struct DoctorArgs {
    #[command(flatten)]
    run: ConfigArgs,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Clocks may differ by so much before certificates, signatures of requests and logs suffer.
const CLOCK_SKEW: Duration = Duration::from_secs(5);
/// Elements of the buffer that the speed of the network is measured with: 64 MiB.
const BANDWIDTH_NUMEL: usize = 16 << 20;
/// Free space on the disk of a run folder that is certainly too little.
const LITTLE_DISK_BYTES: u64 = 1 << 30;

/// What one look has found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Finding {
    /// What was looked at.
    what: String,
    /// What was found.
    found: String,
    /// What to do about it; none: all is well.
    remedy: Option<String>,
}

impl Finding {
    fn ok(what: &str, found: impl Into<String>) -> Self {
        Self { what: what.to_owned(), found: found.into(), remedy: None }
    }

    fn problem(what: &str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { what: what.to_owned(), found: found.into(), remedy: Some(remedy.into()) }
    }
}

/// Looks, prints one line for each thing that was looked at, and gives the exit code: 0 when nothing is wrong.
///
/// # Errors
/// A config that cannot be used, or an engine whose ranks do not find each other: neither leaves anything to look at.
pub fn doctor(args: &DoctorArgs) -> Result<i32> {
    together(&args.run, Duration::ZERO, |config, collective| {
        let mut mine =
            vec![libtorch(), gpus(config, collective), threads(config, collective), memory(config, collective)];
        mine.extend(config.map(data));
        mine.extend(config.map(|config| store(config, collective.rank())));
        mine.extend(config.and_then(|config| disk(&config.run.url)));
        if collective.world_size() == 1 {
            mine.push(mpirun());
        } else {
            mine.extend([programs(config, collective)?, clocks(collective)?, bandwidth(collective)?]);
        }
        report(args.json, mine, collective)
    })
}

/// Whether all ranks are the same build with the same config; rank 0 tells.
fn programs(config: Option<&RunConfig>, collective: &dyn Collective) -> Result<Finding> {
    const WHAT: &str = "programs";
    match same_programs(collective, config) {
        Ok(()) => Ok(Finding::ok(WHAT, "trainer, libtorch and config are the same on all ranks")),
        Err(error) => match error.downcast::<Agreed>()? {
            Agreed { rank, reason } if collective.rank() == 0 => {
                Ok(Finding::problem(WHAT, format!("rank {rank}: {reason}"), "give every node the same files"))
            }
            _ => Ok(Finding::ok(WHAT, "rank 0 tells")),
        },
    }
}

fn libtorch() -> Finding {
    let product =
        Tensor::ones([64, 64], (Kind::Float, Device::Cpu)).matmul(&Tensor::ones([64, 64], (Kind::Float, Device::Cpu)));
    match (ffi::set_deterministic(false), f64::try_from(product.sum(Kind::Float))) {
        (Ok(()), Ok(sum)) if sum == 64.0 * 64.0 * 64.0 => Finding::ok("libtorch", "loads and computes"),
        (Err(error), _) => Finding::problem("libtorch", error.to_string(), "build again with ./dev build"),
        (_, product) => {
            Finding::problem("libtorch", format!("a product of ones is {product:?}"), "build again with ./dev build")
        }
    }
}

fn gpus(config: Option<&RunConfig>, collective: &dyn Collective) -> Finding {
    const WHAT: &str = "GPU";
    let wanted = config.map_or(configs::Device::Auto, |config| config.train.device);
    let needed = collective.local_size() as i64;
    match (wanted, ffi::load_cuda().map(|()| tch::Cuda::device_count())) {
        (configs::Device::Cpu, _) => Finding::ok(WHAT, "none is asked for"),
        (_, Ok(count)) if count >= needed => Finding::ok(WHAT, format!("{count} for {needed} rank(s) of this machine")),
        (_, Ok(count)) if count > 0 => Finding::problem(
            WHAT,
            format!("{count} for {needed} ranks of this machine"),
            format!("use --procs-per-node {count}, or look at CUDA_VISIBLE_DEVICES"),
        ),
        (configs::Device::Auto, found) => {
            let why = found.err().map_or_else(|| "the driver shows none".to_owned(), |error| error.to_string());
            Finding::ok(WHAT, format!("none ({why}); ranks compute on the CPU"))
        }
        (_, Ok(_)) => Finding::problem(WHAT, "the driver shows none", "look at CUDA_VISIBLE_DEVICES and nvidia-smi"),
        (_, Err(error)) => {
            Finding::problem(WHAT, error.to_string(), "install NVIDIA's driver, or use train.device = \"cpu\"")
        }
    }
}

fn threads(config: Option<&RunConfig>, collective: &dyn Collective) -> Finding {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let each = config.map_or(1, |config| config.train.threads_per_rank);
    let ranks = collective.local_size();
    let found = format!("{ranks} rank(s) × {each} on {cores} core(s)");
    match ranks * each <= cores {
        true => Finding::ok("threads", found),
        false => Finding::problem("threads", found, "start fewer ranks on a machine (--procs-per-node)"),
    }
}

/// Free memory against what this machine's ranks hold: weights and gradients each, moments and averages once.
fn memory(config: Option<&RunConfig>, collective: &dyn Collective) -> Finding {
    const WHAT: &str = "memory";
    let Some(free) = available_bytes() else {
        return Finding::problem(WHAT, "/proc/meminfo cannot be read", "mount /proc");
    };
    let held = config.and_then(|config| {
        let numel = open_data(config).ok()?.1.build_model().ok()?.numel();
        let averages = 1 + config.ema.further_decays.len();
        let local = collective.local_size();
        let sharded = 4 * numel * (2 + averages) * local / collective.world_size();
        Some((8 * numel * local + sharded) as u64)
    });
    match held {
        None => Finding::ok(WHAT, format!("{} available", gigabytes(free))),
        Some(held) if held <= free || config.is_some_and(|config| config.train.device == configs::Device::Cuda) => {
            Finding::ok(
                WHAT,
                format!(
                    "{} available; the ranks of this machine hold {} and activations",
                    gigabytes(free),
                    gigabytes(held)
                ),
            )
        }
        Some(held) => Finding::problem(
            WHAT,
            format!(
                "{} available; the ranks of this machine hold {} and activations",
                gigabytes(free),
                gigabytes(held)
            ),
            "use more machines with fewer ranks on each, or a smaller model",
        ),
    }
}

fn available_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
}

fn gigabytes(bytes: u64) -> String {
    format!("{:.1} GB", bytes as f64 / 1e9)
}

fn data(config: &RunConfig) -> Finding {
    match open_data(config) {
        Ok((sources, _)) => {
            let rows: u64 = sources.iter().map(|source| source.dataset.meta().rows).sum();
            match warnings(config, &sources).first() {
                None => {
                    Finding::ok("data", format!("{rows} rows in {} data set(s), which the config fits", sources.len()))
                }
                Some(warning) => Finding::problem("data", warning.clone(), "encode all data sets with one VAE"),
            }
        }
        Err(error) => Finding::problem(
            "data",
            format!("{error:#}"),
            "see docs/DATA.md; `latents inspect` and `latents verify` tell more",
        ),
    }
}

/// Every rank tries it: credentials and routes may differ.
fn store(config: &RunConfig, rank: usize) -> Finding {
    let url = location::redact(&config.run.url);
    match RunStore::open(&config.run.url).and_then(|store| store.probe()) {
        Ok(()) => Finding::ok("store", format!("{url}: created once, listed, read back and deleted an object")),
        Err(error) => {
            let remedy = format!(
                "look at `run.url`, and at the credentials in the environment of rank {rank}: docs/CHECKPOINTS.md, Stores"
            );
            Finding::problem("store", error.to_string(), remedy)
        }
    }
}

/// Free space where the run folder is, if that is a disk here.
fn disk(url: &str) -> Option<Finding> {
    let path = url.strip_prefix("file://").unwrap_or(url);
    let folder: PathBuf = Path::new(path).ancestors().find(|folder| folder.is_dir())?.to_owned();
    let free = nix_free_bytes(&folder)?;
    let found = format!("{} free below {}", gigabytes(free), folder.display());
    Some(match free >= LITTLE_DISK_BYTES {
        true => Finding::ok("disk", found),
        false => Finding::problem("disk", found, "make room, or choose another `run.url`"),
    })
}

fn nix_free_bytes(folder: &Path) -> Option<u64> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(folder.as_os_str().as_bytes()).ok()?;
    let mut stat = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: the path ends with a zero, and the structure is as large as the call wants it; it is read only on success.
    let stat = unsafe {
        if libc::statvfs(path.as_ptr(), stat.as_mut_ptr()) != 0 {
            return None;
        }
        stat.assume_init()
    };
    Some(stat.f_bavail * stat.f_frsize)
}

/// What a launcher here would start several ranks with.
fn mpirun() -> Finding {
    let asked = Command::new("mpirun").arg("--version").stdin(Stdio::null()).output();
    match asked {
        Ok(ran) if ran.status.success() => {
            let text = String::from_utf8_lossy(&ran.stdout).into_owned();
            Finding::ok("mpirun", text.lines().next().unwrap_or_default())
        }
        Ok(ran) => Finding::problem("mpirun", format!("--version ended with {}", ran.status), "install OpenMPI again"),
        Err(error) => {
            Finding::problem("mpirun", error.to_string(), "install OpenMPI (Debian: apt-get install openmpi-bin)")
        }
    }
}

/// Clocks right after all ranks have met: they differ by their skew and by how long it takes to leave the meeting.
fn clocks(collective: &dyn Collective) -> Result<Finding> {
    collective.barrier().context("all ranks meeting")?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let all = collective.gather_values(vec![now.as_millis() as i64]).context("comparing clocks")?;
    let (first, last) = (all.iter().min().copied().unwrap_or(0), all.iter().max().copied().unwrap_or(0));
    let skew = Duration::from_millis((last - first) as u64);
    let found = format!("ranks differ by at most {} ms", skew.as_millis());
    let late = all.iter().position(|time| *time == first).unwrap_or(0);
    Ok(match skew <= CLOCK_SKEW {
        true => Finding::ok("clocks", found),
        false => Finding::problem(
            "clocks",
            format!("{found}; rank {late}'s is the earliest"),
            "synchronise the machines (chrony, NTP)",
        ),
    })
}

/// How fast gradients can be summed: bytes of the buffer over the median time of an all-reduce.
fn bandwidth(collective: &dyn Collective) -> Result<Finding> {
    let mut times = Vec::new();
    for _ in 0..5 {
        let buffer = Tensor::ones([BANDWIDTH_NUMEL as i64], (Kind::Float, Device::Cpu));
        collective.barrier()?;
        let started = Instant::now();
        collective.all_reduce(ffi::region(&buffer), ReduceOp::Sum)?.wait(collective.deadline())?;
        times.push(started.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    let rate = (4 * BANDWIDTH_NUMEL) as f64 / times[times.len() / 2] / 1e9;
    let (backend, ranks) = (collective.backend(), collective.world_size());
    Ok(Finding::ok("network", format!("{backend}: all_reduce of 64 MiB over {ranks} ranks at {rate:.2} GB/s")))
}

/// Prints what rank 0 has found and what others have found to be wrong.
fn report(as_json: bool, mine: Vec<Finding>, collective: &dyn Collective) -> Result<()> {
    let all = collective.gather_bytes(&serde_json::to_vec(&mine)?).context("gathering what the ranks found")?;
    let all: Vec<Vec<Finding>> = all
        .iter()
        .map(|message| serde_json::from_slice(message).context("what a rank found"))
        .collect::<Result<_>>()?;
    let found =
        || all.iter().enumerate().flat_map(|(rank, findings)| findings.iter().map(move |finding| (rank, finding)));
    let problems = found().filter(|(_, finding)| finding.remedy.is_some()).count();
    if collective.rank() == 0 {
        if as_json {
            let ranks: Vec<_> = all
                .iter()
                .enumerate()
                .map(|(rank, findings)| serde_json::json!({"rank": rank, "findings": findings}))
                .collect();
            println!("{:#}", serde_json::json!({"problems": problems, "world_size": all.len(), "ranks": ranks}));
        } else {
            for (rank, finding) in found().filter(|(rank, finding)| *rank == 0 || finding.remedy.is_some()) {
                let place = if all.len() > 1 { format!(" (rank {rank})") } else { String::new() };
                let Finding { what, found, remedy } = finding;
                match remedy {
                    None => println!("ok       {what}{place}: {found}"),
                    Some(remedy) => println!("problem  {what}{place}: {found}; remedy: {remedy}"),
                }
            }
        }
    }
    let first = found().find(|(_, finding)| finding.remedy.is_some());
    let verdict = match first {
        None => Ok(()),
        Some((rank, finding)) => {
            let reason = format!("{problems} problem(s) found, the first with {}: {}", finding.what, finding.found);
            Err(Agreed { rank, reason }.into())
        }
    };
    // Ranks that are started by an engine end together, after everything was said.
    agree(collective, Ok(()))?;
    verdict
}
