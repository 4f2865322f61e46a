//! `trainer ema`: a power-function average of any width, from those that a run's checkpoints hold.

use crate::ema::posthoc::{Fit, Profile, fit};
use crate::ema::{gamma_of, sigma_rel_of_section};
use crate::interop::safetensors;
use crate::interop::values::{Dtype, TensorSpec, encode};
use anyhow::{Context, Result, bail};
use checkpoint::{CheckpointReader, RunStore};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// A profile that differs more than this from the one asked for is warned of.
const POOR_FIT: f64 = 0.05;

/// Options of `trainer ema`.
#[derive(clap::Args)]
pub struct EmaArgs {
    /// The run folder; all its checkpoints up to `--step` that hold power-function averages (`ema.power`) are used.
    #[arg(long, value_name = "URL")]
    run: String,
    /// Relative width of the average: its standard deviation over the length of training. Above 0, at most 0.28.
    #[arg(long, value_name = "WIDTH")]
    sigma_rel: f64,
    /// The average as of this step, of which there must be a checkpoint; the newest when not given.
    #[arg(long, value_name = "STEP")]
    step: Option<u64>,
    /// The file to write: float32, official parameter names.
    #[arg(long, value_name = "FILE.safetensors")]
    out: PathBuf,
}

/// A stored average.
struct Stored {
    /// Index of its checkpoint's reader.
    checkpoint: usize,
    section: String,
    profile: Profile,
}

/// Writes the average.
///
/// # Errors
/// No such run or step, no stored averages in it, or a damaged checkpoint.
pub fn ema(args: &EmaArgs) -> Result<()> {
    let sigma_rel = args.sigma_rel;
    if !(sigma_rel > 0.0 && sigma_rel <= 0.28) {
        bail!("--sigma-rel: {sigma_rel} is out of range; give a width above 0 and at most 0.28");
    }
    let here = std::env::current_dir().context("the current folder")?;
    let store = RunStore::open_existing(&configs::location::resolve(&here, &args.run))?;
    let readers = checkpoints(&store, args.step)?;
    let stored = stored_averages(&readers);
    let Some(newest) = readers.first().filter(|_| !stored.is_empty()) else {
        bail!(
            "{}: no checkpoint there{} holds a power-function average; train with ema.power = [0.05, 0.1]",
            store.url(),
            args.step.map(|step| format!(" up to step {step}")).unwrap_or_default()
        );
    };
    let updates = newest.manifest().optimizer_step as f64;
    let profiles: Vec<Profile> = stored.iter().map(|stored| stored.profile).collect();
    let fit = fit(&profiles, Profile { updates, gamma: gamma_of(sigma_rel) })?;
    write(args, &readers, &stored, &fit)?;

    let steps: BTreeSet<u64> = stored.iter().map(|stored| readers[stored.checkpoint].manifest().step).collect();
    let steps: Vec<String> = steps.into_iter().map(|step| step.to_string()).collect();
    let (step, error) = (newest.manifest().step, fit.relative_error);
    println!("{}: average of width {sigma_rel} as of step {step}", args.out.display());
    println!(
        "from {} averages of steps {}; its profile is off by {:.2}%",
        stored.len(),
        steps.join(", "),
        error * 100.0
    );
    if error > POOR_FIT {
        eprintln!(
            "trainer: warning: that is much; keep more checkpoints (checkpoint.keep_every), or ask for a width nearer to those of ema.power"
        );
    }
    Ok(())
}

/// Readers of one commit of every step up to `until`, newest first.
fn checkpoints(store: &RunStore, until: Option<u64>) -> Result<Vec<CheckpointReader>> {
    let mut committed = store.committed()?;
    committed.dedup_by_key(|commit| commit.step);
    if let Some(until) = until {
        let Some(index) = committed.iter().position(|commit| commit.step == until) else {
            let steps: Vec<String> = committed.iter().map(|commit| commit.step.to_string()).collect();
            bail!("{}: no committed checkpoint of step {until}; there are steps {}", store.url(), steps.join(", "));
        };
        committed.drain(..index);
    }
    committed.iter().map(|commit| Ok(store.read(&store.manifest(commit)?))).collect()
}

/// Every power-function average of these checkpoints. Before the first update there is none.
fn stored_averages(readers: &[CheckpointReader]) -> Vec<Stored> {
    let mut stored = Vec::new();
    for (checkpoint, reader) in readers.iter().enumerate().filter(|(_, reader)| reader.manifest().optimizer_step > 0) {
        let updates = reader.manifest().optimizer_step as f64;
        let sections: BTreeSet<&str> = reader.names().filter_map(|name| Some(name.split_once('/')?.0)).collect();
        stored.extend(sections.into_iter().filter_map(|section| {
            let gamma = gamma_of(sigma_rel_of_section(section)?);
            Some(Stored { checkpoint, section: section.to_owned(), profile: Profile { updates, gamma } })
        }));
    }
    stored
}

/// Sums tensor by tensor, in float64.
fn write(args: &EmaArgs, readers: &[CheckpointReader], stored: &[Stored], fit: &Fit) -> Result<()> {
    let newest = &readers[0];
    let prefix = "model/";
    let specs: BTreeMap<String, TensorSpec> = newest
        .names()
        .filter_map(|full| {
            let shape = newest.shape(full)?.to_vec();
            Some((full.strip_prefix(prefix)?.to_owned(), TensorSpec { dtype: Dtype::F32, shape }))
        })
        .collect();
    let values = |name: &str| {
        let mut sum = vec![0f64; specs.get(name).map_or(0, TensorSpec::numel)];
        for (stored, &coefficient) in stored.iter().zip(&fit.coefficients).filter(|(_, x)| **x != 0.0) {
            let values = readers[stored.checkpoint].read_all_f32(&format!("{}/{name}", stored.section))?;
            sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += coefficient * f64::from(value));
        }
        Ok(encode(&sum.iter().map(|&sum| sum as f32).collect::<Vec<f32>>(), Dtype::F32))
    };
    Ok(safetensors::write(&args.out, &specs, values)?)
}
