//! `trainer bench-step`: the real training step (segments, reduction, AdamW, EMA) on made-up latents.

use crate::diffusion::{Gaussian, Prediction, Respacing, Schedule, Tables};
use crate::ema::Average;
use crate::engine::bucket::Buckets;
use crate::engine::optimizer::{LrDecay, LrSchedule, Optimizer};
use crate::engine::stepper::{Experiment, Stepper};
use crate::ffi::{self, AdamW};
use crate::model::Model;
use crate::model::dit::{Dit, DitConfig};
use crate::model::precision::in_precision;
use anyhow::{Result, bail};
use collective::single::SingleCollective;
use configs::Precision;
use data_loader::MicroBatch;
use data_loader::draws::{Key, Purpose, fill_normal};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::Device;

/// Options of `trainer bench-step`.
#[derive(clap::Args)]
pub struct BenchStepArgs {
    #[arg(long, default_value_t = 384)]
    hidden_size: i64,
    #[arg(long, default_value_t = 6)]
    depth: i64,
    #[arg(long, default_value_t = 6)]
    num_heads: i64,
    #[arg(long, default_value_t = 2)]
    patch_size: i64,
    #[arg(long, default_value_t = 32)]
    input_size: i64,
    #[arg(long, default_value_t = 4)]
    in_channels: i64,
    #[arg(long, default_value_t = 1000)]
    num_classes: i64,
    /// Samples of a step, in one lane.
    #[arg(long, default_value_t = 8)]
    micro_batch: usize,
    #[arg(long, default_value_t = 1)]
    threads: usize,
    #[arg(long, value_enum, default_value_t = Dtype::Fp32)]
    dtype: Dtype,
    /// Of every so many segments one computes its activations again in backward; 0 = none.
    #[arg(long, default_value_t = 0)]
    activation_checkpointing: usize,
    /// Timed steps.
    #[arg(long, default_value_t = 10)]
    steps: usize,
    /// Steps before those.
    #[arg(long, default_value_t = 3)]
    warmup: usize,
    /// End with one JSON line.
    #[arg(long)]
    json: bool,
}

/// What attention and MLPs compute in.
#[derive(Clone, Copy, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
enum Dtype {
    Fp32,
    Bf16,
}

/// Times steps and prints the median and the rate that it means.
///
/// # Errors
/// Dimensions that do not fit together.
pub fn bench_step(args: &BenchStepArgs) -> Result<()> {
    if args.steps == 0 || args.micro_batch == 0 {
        bail!("--steps and --micro-batch must be at least 1");
    }
    tch::set_num_threads(args.threads as i32);
    tch::set_num_interop_threads(1);
    ffi::set_deterministic(false)?;
    let precision = match args.dtype {
        Dtype::Fp32 => Precision::Fp32,
        Dtype::Bf16 => Precision::Bf16,
    };
    let model: Arc<dyn Model> = Arc::new(Dit::new(DitConfig {
        input_size: args.input_size,
        in_channels: args.in_channels,
        num_classes: args.num_classes,
        ..dit_config(args.hidden_size, args.depth, args.num_heads, args.patch_size)
    })?);
    let model = in_precision(model, precision);
    let mut stepper = bench_stepper(model.clone(), args.activation_checkpointing)?;
    let numel = args.micro_batch * model.latent_shape().iter().product::<i64>() as usize;
    let mut step = 0;
    let mut make_step = || -> Result<f64> {
        step += 1;
        let mut x_start = vec![0f32; numel];
        fill_normal(Key::new(0, Purpose::Posterior, step), &mut x_start);
        let labels = (0..args.micro_batch as i64).map(|i| i % args.num_classes).collect();
        let mut batch = Some(MicroBatch::of(step - 1, 0, &x_start, labels));
        let started = Instant::now();
        let mut next = || batch.take().ok_or(data_loader::DataError::EndOfStream { end_step: step });
        stepper.step(step, &mut next, 0)?;
        Ok(started.elapsed().as_secs_f64())
    };
    for _ in 0..args.warmup {
        make_step()?;
    }
    let mut times = (0..args.steps).map(|_| make_step()).collect::<Result<Vec<f64>>>()?;
    times.sort_by(f64::total_cmp);
    let median_step_s = times[times.len() / 2];
    let images_per_s = args.micro_batch as f64 / median_step_s;
    let gflop_per_s = images_per_s * 6.0 * model.macs_per_sample() as f64 / 1e9;
    println!("median step {median_step_s:.4} s, {images_per_s:.1} images/s, {gflop_per_s:.1} GFLOP/s");
    if args.json {
        let line = serde_json::json!({
            "impl": "ditharos", "dtype": args.dtype, "threads": args.threads,
            "images_per_s": images_per_s, "median_step_s": median_step_s,
        });
        println!("{line}");
    }
    Ok(())
}

/// The step of one rank with one lane, from first weights drawn with seed 0.
pub(super) fn bench_stepper(model: Arc<dyn Model>, recompute_every: usize) -> Result<Stepper> {
    let (seed, lanes, device) = (0, 1, Device::Cpu);
    let experiment = Experiment { recompute_every, ..Experiment::alone(seed, lanes, device)? };
    let betas = Schedule::Linear.betas(1000);
    let tables = Tables::new(&betas, &Respacing::All.kept(betas.len())?);
    let schedule = LrSchedule { lr: 1e-4, final_lr: 0.0, warmup_steps: 0, total_steps: 1, decay: LrDecay::Constant };
    let hyper = AdamW { lr: 1e-4, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 };
    let averages = vec![Average::main(0.9999)];
    Ok(Stepper::new(
        model.clone(),
        Box::new(Gaussian::new(tables, Prediction::Eps, true)),
        Buckets::initialise(&*model, &experiment.mesh, averages.len(), seed, &Default::default(), device)?,
        Optimizer::new(hyper, schedule, averages),
        Arc::new(SingleCollective::new(Duration::from_secs(600))),
        experiment,
    )?)
}

/// A DiT as the official code trains it on 256×256 images of ImageNet.
pub(super) fn dit_config(hidden_size: i64, depth: i64, num_heads: i64, patch_size: i64) -> DitConfig {
    DitConfig {
        input_size: 32,
        in_channels: 4,
        patch_size,
        hidden_size,
        depth,
        num_heads,
        mlp_ratio: 4.0,
        class_dropout_prob: 0.1,
        num_classes: 1000,
        learn_sigma: true,
        conditioning: Default::default(),
        numerics: Default::default(),
    }
}
