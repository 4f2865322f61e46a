//! `trainer draws`: what a run of a config starts from and draws at each step, as files for another program.
//!
//! ```text
//! DIR/config.json                          the config as manifests record it
//! DIR/initial.safetensors                  the first weights by the names of the official state dict
//! DIR/draws-00000001-00000050.safetensors  for these steps, lane after lane:
//!     x_start, noise [steps, global_batch, C, H, W] float32
//!     labels         [steps, global_batch] int64, dropped ones replaced by the null label
//!     t              [steps, global_batch] int64, in continuous time float32
//! ```

use crate::diffusion::{Objective, Time};
use crate::engine::data::{Data, damage_policy, open_data, row_order, skip_budget};
use crate::engine::decisions::DecisionLog;
use crate::engine::initial::{Initial, fresh};
use crate::engine::stepper::Experiment;
use crate::interop::safetensors::{write, write_weights};
use crate::interop::values::{Dtype, TensorSpec, encode, to_vec};
use crate::interop::{NamedWeights, pinned};
use crate::model::Model;
use crate::recipe::Recipe;
use anyhow::{Context, Result, bail};
use configs::RunConfig;
use data_loader::MicroBatchStream;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tch::Device;

/// Options of `trainer draws`.
#[derive(clap::Args)]
pub struct DrawsArgs {
    /// The run's config.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Overrides of config keys.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Steps, from the first; all of `train.steps` where it is left out.
    #[arg(long)]
    steps: Option<u64>,
    /// Steps in a file: as many are held in memory.
    #[arg(long, default_value_t = 50)]
    steps_per_file: u64,
    /// Folder to write to.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// Writes the files.
///
/// # Errors
/// A config that cannot be used, a data set that cannot be read, a folder that cannot be written.
pub fn draws(args: &DrawsArgs) -> Result<()> {
    let config = RunConfig::load(&args.config, &args.overrides)?;
    let steps = args.steps.unwrap_or(config.train.steps);
    if steps > config.train.steps || steps == 0 {
        bail!("--steps {steps}: the run has steps 1 to {} (`train.steps`)", config.train.steps);
    }
    if args.steps_per_file == 0 {
        bail!("--steps-per-file must be at least 1");
    }
    let (sources, recipe) = open_data(&config)?;
    let model = recipe.build_model()?;
    let experiment = Experiment::alone(config.seed, config.train.lanes, Device::Cpu)?;
    let order = row_order(&config, &sources)?;
    let num_classes = recipe.model.num_classes as usize;
    let data = Data { sources, order, num_classes, experiment };
    let damage = damage_policy(&config, &DecisionLog::read(None, skip_budget(&config))?);
    let batches = data.open_stream(&config, damage, 0)?;

    let out = |name: &str| args.out.join(name);
    std::fs::create_dir_all(&args.out).with_context(|| format!("creating {}", args.out.display()))?;
    let record = serde_json::to_string_pretty(&recipe.record(&config))?;
    std::fs::write(out("config.json"), record).with_context(|| format!("writing {}", out("config.json").display()))?;
    write_weights(&out("initial.safetensors"), &initial_weights(&config, &recipe, &*model)?, Dtype::F32)?;
    let mut drawer =
        Drawer { experiment, global_batch: config.global_batch(), objective: recipe.build_objective(), model, batches };
    for first in (1..=steps).step_by(args.steps_per_file as usize) {
        let last = (first + args.steps_per_file - 1).min(steps);
        drawer.write(last - first + 1, &out(&format!("draws-{first:08}-{last:08}.safetensors")))?;
    }
    println!("{steps} steps: {}", args.out.display());
    Ok(())
}

/// The weights that a run starts from: those that `[init]` gives it, and fresh ones for the rest.
fn initial_weights(config: &RunConfig, recipe: &Recipe, model: &dyn Model) -> Result<NamedWeights> {
    let source = config.init.as_ref().map(|init| pinned(&init.from)).transpose().context("`init.from`")?;
    let mut given = Initial::of(config, recipe, model, source.as_deref())?.tensors;
    let mut tensors = BTreeMap::new();
    for (name, spec) in model.named_params() {
        let weights = given.remove(&name).unwrap_or_else(|| fresh(config.seed, &name, &spec));
        tensors.insert(name, weights);
    }
    Ok(NamedWeights { tensors, model: None })
}

/// Draws as the steps of a run do.
struct Drawer {
    experiment: Experiment,
    global_batch: usize,
    objective: Box<dyn Objective>,
    model: Arc<dyn Model>,
    batches: MicroBatchStream,
}

impl Drawer {
    /// Writes the draws of the next `steps` steps.
    fn write(&mut self, steps: u64, path: &Path) -> Result<()> {
        let (mut x_start, mut noise, mut labels, mut t) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut t_dtype = Dtype::I64;
        for _ in 0..steps * self.experiment.mesh.lanes as u64 {
            let batch = self.batches.next()?;
            let (clean, of_batch) = self.experiment.input(&*self.model, &batch);
            let noised = self.objective.noise(clean, self.experiment.seed, batch.step, batch.lane);
            // The CPU has copied it.
            self.batches.recycle(batch);
            x_start.extend(encode(&to_vec(&noised.x_start)?, Dtype::F32));
            noise.extend(encode(&to_vec(&noised.noise)?, Dtype::F32));
            labels.extend(Vec::<i64>::try_from(&of_batch)?.into_iter().flat_map(i64::to_le_bytes));
            match noised.t {
                Time::Steps(indices) => t.extend(indices.into_iter().flat_map(|index| (index as i64).to_le_bytes())),
                Time::Continuous(points) => {
                    t_dtype = Dtype::F32;
                    t.extend(encode(&points, Dtype::F32));
                }
            }
        }
        let rows = [steps as usize, self.global_batch];
        let latents: Vec<usize> =
            rows.into_iter().chain(self.model.latent_shape().iter().map(|&side| side as usize)).collect();
        let mut files = BTreeMap::from([
            ("labels", (Dtype::I64, rows.to_vec(), labels)),
            ("noise", (Dtype::F32, latents.clone(), noise)),
            ("t", (t_dtype, rows.to_vec(), t)),
            ("x_start", (Dtype::F32, latents, x_start)),
        ]);
        let spec = |(name, (dtype, shape, _)): (&&str, &(Dtype, Vec<usize>, Vec<u8>))| {
            ((*name).to_owned(), TensorSpec { dtype: *dtype, shape: shape.clone() })
        };
        let specs: BTreeMap<String, TensorSpec> = files.iter().map(spec).collect();
        Ok(write(path, &specs, |name| Ok(files.remove(name).map(|(_, _, bytes)| bytes).unwrap_or_default()))?)
    }
}
