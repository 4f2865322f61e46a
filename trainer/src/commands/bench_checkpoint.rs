//! `trainer bench-checkpoint`: the real saver and the real load on a model's state, one turn per line on stdin.

use super::bench_step::{bench_stepper, dit_config};
use crate::engine::saver::{Save, SaveOptions, Saver};
use crate::engine::snapshot::restore;
use crate::engine::stepper::Stepper;
use crate::engine::stop::StopFlag;
use crate::ffi::SnapshotMemory;
use crate::model::Model;
use crate::model::dit::Dit;
use anyhow::{Context, Result, bail};
use checkpoint::{AttemptInfo, Retention, RunStore};
use collective::single::SingleCollective;
use serde_json::{Value, json};
use std::io::BufRead;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

/// Options of `trainer bench-checkpoint`.
#[derive(clap::Args)]
pub struct BenchCheckpointArgs {
    #[arg(long, default_value_t = 768)]
    hidden_size: i64,
    #[arg(long, default_value_t = 12)]
    depth: i64,
    #[arg(long, default_value_t = 12)]
    num_heads: i64,
    #[arg(long, default_value_t = 2)]
    patch_size: i64,
    #[arg(long, default_value_t = 1)]
    threads: usize,
}

/// Makes a state and answers every line `save NAME FOLDER` or `load NAME FOLDER` with a line of JSON.
///
/// # Errors
/// Dimensions that do not fit together, a line of another form, what the store reports.
pub fn bench_checkpoint(args: &BenchCheckpointArgs) -> Result<()> {
    tch::set_num_threads(args.threads as i32);
    let model: Arc<dyn Model> =
        Arc::new(Dit::new(dit_config(args.hidden_size, args.depth, args.num_heads, args.patch_size))?);
    let mut stepper = stepper(model.clone())?;
    let bytes = 16 * model.numel();
    println!("{}", json!({"ready": true, "numel": model.numel(), "bytes": bytes}));
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let mut words = line.splitn(3, ' ');
        let (Some(what), Some(_), Some(folder)) = (words.next(), words.next(), words.next()) else {
            bail!("found {line:?}; expected `save NAME FOLDER` or `load NAME FOLDER`");
        };
        let answer = match what {
            "save" => save(&mut stepper, folder)?,
            "load" => load(&stepper, folder)?,
            _ => bail!("found {what:?}; expected save or load"),
        };
        println!("{answer}");
    }
    Ok(())
}

fn stepper(model: Arc<dyn Model>) -> Result<Stepper> {
    let mut stepper = bench_stepper(model, 0)?;
    for bucket in &stepper.buckets.0 {
        let states = [&bucket.params, &bucket.exp_avg, &bucket.exp_avg_sq].into_iter().chain(&bucket.averages);
        tch::no_grad(|| states.for_each(|state| drop(state.shallow_clone().uniform_(-1.0, 1.0))));
    }
    stepper.optimizer.updates = 1;
    Ok(stepper)
}

fn save(stepper: &mut Stepper, folder: &str) -> Result<Value> {
    let store = RunStore::open(folder)?;
    let attempt = store.claim_attempt(&AttemptInfo { world_size: 1, ..Default::default() })?;
    let collective = Arc::new(SingleCollective::new(Duration::from_secs(600)));
    let upload_timeout = Duration::from_secs(3600);
    let options = SaveOptions { attempt, retention: Retention::last(2), upload_timeout, stop: StopFlag::default() };
    // A run makes it once, at its start: that is not counted.
    let mut saver = Saver::start(collective, store, stepper, options)?;
    let record = Value::Null;
    let (metrics, requests) = Default::default();
    let save = Save { step: 1, stepper, metrics, put_off: false, record: &record, requests };
    let started = Instant::now();
    saver.save(save)?;
    let stall_s = started.elapsed().as_secs_f64();
    saver.finish()?;
    let total_s = started.elapsed().as_secs_f64();
    drop(saver);
    let (snapshot_s, memcpy_s) = memory_rates(stepper)?;
    Ok(json!({
        "stall_s": stall_s, "total_s": total_s, "memory_snapshot_s": snapshot_s, "memory_memcpy_s": memcpy_s,
    }))
}

/// Seconds to copy the weights into a checkpoint's memory, and to copy as many bytes in one piece by one memcpy a thread.
fn memory_rates(stepper: &Stepper) -> Result<(f64, f64)> {
    let sources: Vec<Tensor> = stepper.buckets.0.iter().map(|bucket| bucket.params.shallow_clone()).collect();
    let numel = sources.iter().map(Tensor::numel).sum();
    let mut memory = SnapshotMemory::allocate(numel, Device::Cpu)?;
    let started = Instant::now();
    memory.fill(&sources)?;
    let snapshot_s = started.elapsed().as_secs_f64();
    let whole = Tensor::ones([numel as i64], (Kind::Float, Device::Cpu));
    let (source, mut target) = (Vec::<f32>::try_from(&whole)?, vec![1f32; numel]);
    let each = numel.div_ceil(tch::get_num_threads() as usize);
    let started = Instant::now();
    std::thread::scope(|scope| {
        for (target, source) in target.chunks_mut(each).zip(source.chunks(each)) {
            scope.spawn(|| target.copy_from_slice(source));
        }
    });
    Ok((snapshot_s, started.elapsed().as_secs_f64()))
}

fn load(stepper: &Stepper, folder: &str) -> Result<Value> {
    let store = RunStore::open_existing(folder)?;
    let started = Instant::now();
    let newest = store.committed()?.into_iter().next().context("no checkpoint")?;
    let manifest = store.manifest(&newest)?;
    restore(&store, &manifest, &stepper.buckets, &stepper.optimizer.averages, (0, 1))?;
    Ok(json!({"total_s": started.elapsed().as_secs_f64()}))
}
