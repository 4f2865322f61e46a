//! `train_steps` and `train_steps_ema`: whole optimizer steps through the engine's own step, with recorded draws.

use super::{Kind, alone};
use crate::bundle::{Bundle, BundleError, Result, values};
use crate::dit;
use crate::report::Report;
use crate::tolerance::Tolerance;
use collective::single::SingleCollective;
use data_loader::MicroBatch;
use data_loader::draws::Key;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tch::{Device, Tensor};
use trainer::diffusion::{Gaussian, LossTerms, Noised, Objective, Prediction, SampleLosses, Time};
use trainer::ema::Average;
use trainer::engine::bucket::{Bucket, Buckets, Entry, view_of};
use trainer::engine::optimizer::{LrDecay, LrSchedule, Optimizer};
use trainer::engine::stepper::{Experiment, Stepper};
use trainer::ffi::AdamW;
use trainer::model::dit::Dit;
use trainer::model::{Flow, Model, Segment};

const TOLERANCES: &[(&str, &str)] = &[
    ("out/*", "5e-5*max(1,|ref|)"),
    ("final", "max|d| <= 0.5*lr and 99.9th percentile over all elements <= 2e-7 + 0.002*lr"),
    ("adam_m", "1e-6+1e-4*max|ref|"),
    ("adam_v", "1e-10+2e-4*max|ref|"),
    ("ema0.9999", "max 1e-6"),
    ("emazero0.9999", "max 1e-9+5e-4*lr, p99.9 <= 1e-9"),
    ("ema*", "max 1e-6+0.05*lr, p99.9 <= 4e-7"),
];

pub(super) const STEPS: Kind = Kind {
    name: "train_steps",
    tolerances: TOLERANCES,
    partner: alone,
    references_in_partner: false,
    run: |bundle, _, report| {
        let recording = Recording::read(bundle)?;
        let averages = recorded_averages(bundle, &recording, report);
        let end = recording.train(&averages)?;
        compare_losses(&recording, &end, report);
        let prefixes: [(&str, StateOf); 3] = [
            ("final", &|b, e| view_of(&b.params, e)),
            ("adam_m", &|b, e| view_of(&b.exp_avg, e)),
            ("adam_v", &|b, e| view_of(&b.exp_avg_sq, e)),
        ];
        for (prefix, state) in prefixes {
            compare_state(prefix, &end.buckets, state, prefix == "final", &recording, report);
        }
        compare_averages(&averages, &end, &recording, report);
        Ok(())
    },
};

pub(super) const EMA: Kind = Kind {
    name: "train_steps_ema",
    tolerances: TOLERANCES,
    partner: |bundle| {
        let named = bundle.spec.text("inputs_from").or_else(|| {
            let stem = bundle.path.file_stem()?.to_str()?.strip_suffix("_ema")?;
            Some(format!("{stem}.safetensors"))
        });
        let named = named.ok_or_else(|| {
            BundleError::Partner("the spec has no `inputs_from`, and the file's name does not end in `_ema`".to_owned())
        })?;
        bundle.sibling(&named).map(Some)
    },
    references_in_partner: false,
    run: |bundle, inputs, report| {
        let inputs = inputs.ok_or_else(|| BundleError::Partner("none was given".to_owned()))?;
        let kind = inputs.spec.kind()?;
        if kind != "train_steps" {
            let text = format!("{} is of kind `{kind}`, expected `train_steps`", inputs.path.display());
            return Err(BundleError::Partner(text));
        }
        for key in ["lr", "steps", "optimizer", "batch"] {
            let (own, theirs) = (bundle.spec.text(key), inputs.spec.text(key));
            if own.is_some() && own != theirs {
                let text = format!("{} has `{key}` = {theirs:?}, this bundle {own:?}", inputs.path.display());
                return Err(BundleError::Partner(text));
            }
        }
        let recording = Recording::read(inputs)?;
        let averages = recorded_averages(bundle, &recording, report);
        compare_averages(&averages, &recording.train(&averages)?, &recording, report);
        Ok(())
    },
};

/// A moving average of the weights that a bundle has.
struct Recorded {
    /// What its tensors are below, without the slash.
    prefix: String,
    decay: f64,
    /// Starts at zero, not as a copy of the weights.
    from_zero: bool,
}

/// The recorded run: initial weights, batches and draws.
struct Recording<'b> {
    bundle: &'b Bundle,
    model: Arc<Dit>,
    optimizer: AdamW,
    batches: Vec<Batch>,
}

/// One step's data and draws.
struct Batch {
    x_start: Tensor,
    noise: Tensor,
    t: Vec<usize>,
    /// After label dropout.
    labels: Vec<i64>,
}

/// Where a run ended.
struct End {
    buckets: Buckets,
    loss: Vec<f64>,
    grad_norm: Vec<f64>,
    /// mse and vb of every sample of every step.
    parts: Vec<(Tensor, Option<Tensor>)>,
}

impl<'b> Recording<'b> {
    fn read(bundle: &'b Bundle) -> Result<Self> {
        let model = dit::model(bundle)?;
        let timesteps = dit::tables(&bundle.spec)?.timesteps();
        let steps: usize = bundle.spec.parse("steps", "a number of steps")?;
        let batch = |step: usize| {
            let name = |what: &str| format!("in/step{step}/{what}");
            let x_start = dit::latents(bundle, &name("x_start"), &model, -1)?;
            let n = x_start.size()[0];
            Ok(Batch {
                noise: dit::latents(bundle, &name("noise"), &model, n)?,
                t: dit::timesteps(bundle, &name("t"), n, timesteps)?,
                labels: labels_after_dropout(bundle, &name, &model, n)?,
                x_start,
            })
        };
        let batches = (0..steps).map(batch).collect::<Result<Vec<Batch>>>()?;
        let rows = batches.first().map(|batch| batch.x_start.size()[0]);
        if rows.is_none_or(|rows| rows == 0) || batches.iter().any(|batch| Some(batch.x_start.size()[0]) != rows) {
            let (key, expected) = ("steps".to_owned(), "at least one step, all of the same batch".to_owned());
            return Err(BundleError::Key { key, found: steps.to_string(), expected });
        }
        Ok(Self { optimizer: adamw(bundle)?, bundle, model: Arc::new(model), batches })
    }

    /// Makes all steps as a lone rank with one lane.
    fn train(&self, averages: &[Recorded]) -> Result<End> {
        let failed = |error: &dyn std::fmt::Display| BundleError::Run(error.to_string());
        let tables = dit::tables(&self.bundle.spec)?;
        let buckets = dit::buckets(self.bundle, &*self.model, averages.len())?;
        for (index, _) in averages.iter().enumerate().filter(|(_, average)| average.from_zero) {
            buckets.0.iter().for_each(|bucket| drop(bucket.averages[index].shallow_clone().zero_()));
        }
        let draw = |batch: &Batch| (batch.t.clone(), batch.noise.shallow_clone());
        let replay = Arc::new(Replay {
            inner: Gaussian::new(tables, Prediction::Eps, self.model.learn_sigma()),
            draws: Mutex::new(self.batches.iter().map(draw).collect()),
            parts: Mutex::default(),
        });
        let lr = self.optimizer.lr;
        let schedule =
            LrSchedule { lr, final_lr: lr, warmup_steps: 0, total_steps: u64::MAX, decay: LrDecay::Constant };
        let averages = averages.iter().map(|average| Average::main(average.decay)).collect();
        let optimizer = Optimizer::new(self.optimizer, schedule, averages);
        let experiment = Experiment::alone(0, 1, Device::Cpu).map_err(|error| failed(&error))?;
        let mut stepper = Stepper::new(
            Arc::new(LabelsAsGiven(self.model.clone())),
            Box::new(Replaying(replay.clone())),
            buckets,
            optimizer,
            Arc::new(SingleCollective::new(Duration::from_secs(60))),
            experiment,
        )
        .map_err(|error| failed(&error))?;
        let (mut loss, mut grad_norm) = (Vec::new(), Vec::new());
        for (index, batch) in self.batches.iter().enumerate() {
            let step = index as u64 + 1;
            let mut next_batch = || {
                let x_start: Vec<f32> = values(&batch.x_start).into_iter().map(|value| value as f32).collect();
                Ok(MicroBatch::of(step, 0, &x_start, batch.labels.clone()))
            };
            let report = stepper.step(step, &mut next_batch, 0).map_err(|error| failed(&error))?;
            loss.push(report.loss);
            grad_norm.push(report.grad_norm);
        }
        let parts = std::mem::take(&mut *replay.parts.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(End { buckets: stepper.buckets, loss, grad_norm, parts })
    }

    fn lr(&self) -> f64 {
        self.optimizer.lr
    }
}

/// The labels to feed, checked against the recorded draws of the dropout.
fn labels_after_dropout(bundle: &Bundle, name: &dyn Fn(&str) -> String, model: &Dit, n: i64) -> Result<Vec<i64>> {
    let integers = |tensor: Tensor| values(&tensor).into_iter().map(|value| value as i64).collect::<Vec<i64>>();
    let labels = integers(dit::labels(bundle, &name("y"), model, n)?);
    let dropped = integers(dit::labels(bundle, &name("y_eff"), model, n)?);
    let draws = values(&bundle.floats(&name("drop_u"), &[n])?);
    let probability = model.label_dropout() as f32;
    let null_label = model.null_label();
    let expected =
        labels.iter().zip(draws).map(|(&label, u)| null_label.filter(|_| (u as f32) < probability).unwrap_or(label));
    let expected: Vec<i64> = expected.collect();
    if expected == dropped {
        return Ok(dropped);
    }
    let expected = format!("{expected:?}, which is `y` with the null label where `drop_u` < {probability}");
    Err(BundleError::Tensor { name: name("y_eff"), found: format!("{dropped:?}"), expected })
}

/// What an objective replays, and what it notes.
struct Replay {
    inner: Gaussian,
    /// t and noise of every step.
    draws: Mutex<Vec<(Vec<usize>, Tensor)>>,
    /// mse and vb of every sample, appended by every step.
    parts: Mutex<Vec<(Tensor, Option<Tensor>)>>,
}

/// The objective with recorded draws instead of keyed ones.
struct Replaying(Arc<Replay>);

impl Objective for Replaying {
    fn draw_times(&self, samples: usize, key: Key) -> Time {
        self.0.inner.draw_times(samples, key)
    }

    fn times_at(&self, shares: &[f64]) -> Time {
        self.0.inner.times_at(shares)
    }

    fn noised(&self, x_start: Tensor, t: Time, noise: Tensor) -> Noised {
        self.0.inner.noised(x_start, t, noise)
    }

    fn losses(&self, output: &Tensor, noised: &Noised) -> SampleLosses {
        self.0.inner.losses(output, noised)
    }

    fn noise(&self, x_start: Tensor, _seed: u64, step: u64, _lane: usize) -> Noised {
        let draws = self.0.draws.lock().unwrap_or_else(PoisonError::into_inner);
        let (t, noise) = &draws[step as usize - 1];
        self.noised(x_start, Time::Steps(t.clone()), noise.shallow_clone())
    }

    fn loss(&self, output: &Tensor, noised: &Noised) -> LossTerms {
        let parts = tch::no_grad(|| self.0.inner.per_sample(output, noised));
        self.0.parts.lock().unwrap_or_else(PoisonError::into_inner).push(parts);
        self.0.inner.loss(output, noised)
    }
}

/// The model, but for label dropout: recorded labels have been through it.
struct LabelsAsGiven(Arc<Dit>);

impl Model for LabelsAsGiven {
    fn segments(&self) -> &[Box<dyn Segment>] {
        self.0.segments()
    }
    fn input(&self, x_t: &Tensor, t: &Tensor, labels: &Tensor) -> Flow {
        self.0.input(x_t, t, labels)
    }
    fn latent_shape(&self) -> &[i64] {
        self.0.latent_shape()
    }
    fn null_label(&self) -> Option<i64> {
        None
    }
    fn label_dropout(&self) -> f64 {
        0.0
    }
    fn learn_sigma(&self) -> bool {
        self.0.learn_sigma()
    }
    fn macs_per_sample(&self) -> u64 {
        self.0.macs_per_sample()
    }
}

/// `lr`, and what `optimizer` says as PyTorch would write the call.
fn adamw(bundle: &Bundle) -> Result<AdamW> {
    let text = bundle.spec.text("optimizer").unwrap_or_default();
    let refuse = || BundleError::Key {
        key: "optimizer".to_owned(),
        found: text.clone(),
        expected: "`AdamW(betas=(0.9,0.999), eps=1e-8, weight_decay=0)`".to_owned(),
    };
    let argument = |name: &str, end: &[char]| -> Result<&str> {
        let (_, rest) = text.split_once(&format!("{name}=")).ok_or_else(refuse)?;
        Ok(rest.split(end).next().unwrap_or_default())
    };
    let number = |text: &str| text.trim().parse::<f64>().map_err(|_| refuse());
    if !text.contains("AdamW(") {
        return Err(refuse());
    }
    let (beta1, beta2) = argument("betas", &[')'])?.trim_start_matches('(').split_once(',').ok_or_else(refuse)?;
    Ok(AdamW {
        lr: bundle.spec.parse("lr", "a learning rate")?,
        beta1: number(beta1)?,
        beta2: number(beta2)?,
        eps: number(argument("eps", &[',', ')'])?)?,
        weight_decay: number(argument("weight_decay", &[',', ')'])?)?,
    })
}

fn compare_losses(recording: &Recording, end: &End, report: &mut Report) {
    report.compare("out/loss", &Tensor::from_slice(&end.loss));
    report.compare("out/grad_norm", &Tensor::from_slice(&end.grad_norm));
    let mse: Vec<&Tensor> = end.parts.iter().map(|(mse, _)| mse).collect();
    let mse = Tensor::stack(&mse, 0);
    report.compare("out/mse_per_sample", &mse);
    let mut loss = mse;
    if recording.model.learn_sigma() {
        let vb: Vec<&Tensor> = end.parts.iter().filter_map(|(_, vb)| vb.as_ref()).collect();
        let vb = Tensor::stack(&vb, 0);
        report.compare("out/vb_per_sample", &vb);
        loss += vb;
    }
    report.compare("out/loss_per_sample", &loss);
}

/// A parameter's part of some state of a bucket.
type StateOf<'a> = &'a dyn Fn(&Bucket, &Entry) -> Tensor;

/// Compares one state of every parameter (frozen ones too when `with_frozen`) with the tensors below `prefix`.
fn compare_state(
    prefix: &str,
    buckets: &Buckets,
    state: StateOf,
    with_frozen: bool,
    recording: &Recording,
    report: &mut Report,
) {
    for bucket in &buckets.0 {
        for entry in bucket.layout.entries.iter().filter(|entry| with_frozen || entry.spec.trainable) {
            let name = format!("{prefix}/{}", entry.name);
            let found = state(bucket, entry);
            if !entry.name.ends_with("attn.qkv.bias") {
                report.compare_in(prefix, &name, &found);
                continue;
            }
            // The gradient of the key bias is zero but for rounding, which AdamW turns into moves of up to lr a step:
            // only that holds for it.
            let Some((expected, tolerance)) = report.reference(&name, &found.size()) else { continue };
            let moves = Tolerance::absolute(recording.batches.len() as f64 * recording.lr());
            let keys_and_rest = |bias: &Tensor| {
                let parts = bias.chunk(3, 0);
                (parts[1].shallow_clone(), Tensor::cat(&[&parts[0], &parts[2]], 0))
            };
            let ((keys, rest), (expected_keys, expected_rest)) = (keys_and_rest(&found), keys_and_rest(&expected));
            report.within(prefix, &format!("{name} (without keys)"), &rest, &expected_rest, tolerance);
            report.within(&format!("{prefix} (key biases)"), &format!("{name} (keys)"), &keys, &expected_keys, moves);
        }
    }
}

/// Every moving average that the bundle has below `emaDECAY/` or `emazeroDECAY/`; those with a tolerance in the
/// specification of an EMA bundle must be there.
fn recorded_averages(bundle: &Bundle, recording: &Recording, report: &mut Report) -> Vec<Recorded> {
    let top = |name: &str| Some(name.split_once('/')?.0.to_owned());
    let mut prefixes: BTreeSet<String> = bundle.names().filter_map(top).filter(|top| top.starts_with("ema")).collect();
    if !std::ptr::eq(bundle, recording.bundle) {
        let stated = bundle.spec.0.keys().filter_map(|key| key.strip_prefix("tol.ema"));
        prefixes.extend(stated.filter(|rest| !rest.contains(['*', '/', ','])).map(|rest| format!("ema{rest}")));
        if prefixes.is_empty() {
            report.problem("there is no `emaDECAY/` in it".to_owned());
        }
    }
    let mut recorded = Vec::new();
    for prefix in prefixes {
        let rest = prefix.trim_start_matches("ema");
        let from_zero = rest.starts_with("zero");
        match rest.trim_start_matches("zero").parse().ok().filter(|decay| (0.0..=1.0).contains(decay)) {
            Some(decay) => recorded.push(Recorded { prefix, decay, from_zero }),
            None => report.problem(format!("`{prefix}/` does not name a decay, as in `ema0.999/`")),
        }
    }
    recorded
}

fn compare_averages(averages: &[Recorded], end: &End, recording: &Recording, report: &mut Report) {
    for (index, average) in averages.iter().enumerate() {
        let state = |bucket: &Bucket, entry: &Entry| view_of(&bucket.averages[index], entry);
        compare_state(&average.prefix, &end.buckets, &state, true, recording, report);
    }
}
