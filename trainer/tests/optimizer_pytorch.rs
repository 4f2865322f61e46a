//! The update beside PyTorch's own: `torch.optim.AdamW` with parameter groups, `clip_grad_norm_`, schedulers, an EMA.
//! Needs the project's `.venv`; without it the test says so and passes.
#![allow(clippy::unwrap_used, clippy::explicit_write)]

use data_loader::draws::{Key, Purpose, fill_normal};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;
use tch::{Device, Kind, Tensor};
use trainer::ema::Average;
use trainer::engine::bucket::{Bucket, Buckets, slice, view_of};
use trainer::engine::groups::ParamGroups;
use trainer::engine::mesh::Mesh;
use trainer::engine::optimizer::{LrDecay, LrSchedule, Optimizer};
use trainer::ffi::AdamW;
use trainer::model::dit::Dit;

const STEPS: u64 = 12;
const WARMUP: u64 = 4;
const LR: f64 = 1e-2;
const MAX_NORM: f64 = 3.0;
const EMA_DECAY: f64 = 0.8;

/// Trains parameters with recorded gradients; `plan.json` tells all, values are float32 in files of one tensor after the other.
const PYTORCH: &str = r#"
import sys, json, numpy as np, torch
torch.set_num_threads(1)
folder = sys.argv[1]
plan = json.load(open(f"{folder}/plan.json"))
numel = [int(np.prod(p["shape"])) for p in plan["params"]]
def read(name):
    parts = np.split(np.fromfile(f"{folder}/{name}", "<f4"), np.cumsum(numel)[:-1])
    return [torch.from_numpy(part.reshape(p["shape"]).copy()) for part, p in zip(parts, plan["params"])]
params = [torch.nn.Parameter(t) for t in read("initial")]
groups = [{"params": [p for p, about in zip(params, plan["params"]) if about["group"] == i],
           "lr": plan["lr"] * g["lr_scale"], "weight_decay": g["weight_decay"]} for i, g in enumerate(plan["groups"])]
optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-8)
steps, warmup = plan["steps"], plan["warmup"]
S = torch.optim.lr_scheduler
rising = S.LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
falling = S.CosineAnnealingLR(optimizer, T_max=steps - warmup)
schedule = S.SequentialLR(optimizer, [rising, falling], milestones=[warmup - 1])
ema = [p.detach().clone() for p in params]
lrs, norms = [], []
for step in range(1, steps + 1):
    for p, grad in zip(params, read(f"grads-{step}")):
        p.grad = grad
    norms.append(torch.nn.utils.clip_grad_norm_(params, plan["max_norm"]).item())
    lrs.append(optimizer.param_groups[0]["lr"])
    optimizer.step()
    schedule.step()
    for e, p in zip(ema, params):
        e.mul_(plan["ema_decay"]).add_(p.detach(), alpha=1 - plan["ema_decay"])
state = lambda key: [optimizer.state[p][key] for p in params]
for name, tensors in [("params", params), ("exp_avg", state("exp_avg")), ("exp_avg_sq", state("exp_avg_sq")), ("ema", ema)]:
    np.concatenate([t.detach().numpy().reshape(-1) for t in tensors]).astype("<f4").tofile(f"{folder}/{name}")
print(json.dumps({"lrs": lrs, "norms": norms}))
"#;

/// The project's Python, or `None` (said aloud) where there is no `.venv`.
fn python() -> Option<PathBuf> {
    let python = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../.venv/bin/python");
    if !python.exists() {
        use std::io::Write;
        writeln!(std::io::stderr(), "skipped: no .venv (make it with ./dev setup): nothing to compare the update with")
            .unwrap();
        return None;
    }
    Some(python)
}

fn model() -> Dit {
    let config = json!({
        "input_size": 4, "in_channels": 4, "patch_size": 2, "hidden_size": 36, "depth": 2, "num_heads": 3,
        "mlp_ratio": 4.0, "class_dropout_prob": 0.1, "num_classes": 7, "learn_sigma": true,
    });
    Dit::new(serde_json::from_value(config).unwrap()).unwrap()
}

fn optimizer(model: &Dit) -> Optimizer {
    let group = |pattern: &str, weight_decay, lr_scale| configs::ParamGroup {
        patterns: vec![pattern.to_owned()],
        weight_decay,
        lr_scale,
    };
    let declared = [group("*.bias", Some(0.0), None), group("blocks.0.*", Some(0.3), Some(0.5))];
    let schedule =
        LrSchedule { lr: LR, final_lr: 0.0, warmup_steps: WARMUP, total_steps: STEPS, decay: LrDecay::Cosine };
    let hyper = AdamW { lr: LR, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1 };
    Optimizer {
        groups: ParamGroups::of_config(&declared, 0.1, model).unwrap(),
        clip_grad_norm: Some(MAX_NORM),
        ..Optimizer::new(hyper, schedule, vec![Average::main(EMA_DECAY)])
    }
}

/// The trainable parameters' values of one state, one tensor after the other.
fn trainable(buckets: &Buckets, state: impl Fn(usize, &Bucket) -> Tensor) -> Vec<f32> {
    let mut values = Vec::new();
    for (index, bucket) in buckets.0.iter().enumerate() {
        let flat = state(index, bucket);
        for entry in bucket.layout.entries.iter().filter(|entry| entry.spec.trainable) {
            values.extend(Vec::<f32>::try_from(view_of(&flat, entry).reshape([-1])).unwrap());
        }
    }
    values
}

fn write(folder: &Path, name: &str, values: &[f32]) {
    std::fs::write(folder.join(name), values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>())
        .unwrap();
}

fn read(folder: &Path, name: &str) -> Vec<f32> {
    let bytes = std::fs::read(folder.join(name)).unwrap();
    bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

/// A mean gradient for every bucket, zero at frozen parameters and padding; large at every third step, else small.
fn gradients(buckets: &Buckets, step: u64) -> Vec<Tensor> {
    let gradient = |(index, bucket): (usize, &Bucket)| {
        let flat = Tensor::zeros([bucket.layout.numel as i64], (Kind::Float, Device::Cpu));
        for (number, entry) in bucket.layout.entries.iter().enumerate().filter(|(_, entry)| entry.spec.trainable) {
            let mut values = vec![0f32; entry.spec.numel()];
            fill_normal(Key::new(step, Purpose::Noise, (1000 * index + number) as u64), &mut values);
            let scale = if step.is_multiple_of(3) { 0.5 } else { 0.01 };
            slice(&flat, &entry.range()).copy_(&(Tensor::from_slice(&values) * scale));
        }
        flat
    };
    buckets.0.iter().enumerate().map(gradient).collect()
}

#[test]
fn groups_clipping_schedule_and_ema_are_those_of_pytorch() {
    let Some(python) = python() else { return };
    tch::set_num_threads(1);
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let (model, lanes) = (model(), 4);
    let mut optimizer = optimizer(&model);
    let buckets =
        Buckets::initialise(&model, &Mesh::alone(lanes).unwrap(), 1, 0, &Default::default(), Device::Cpu).unwrap();
    write(folder, "initial", &trainable(&buckets, |_, bucket| bucket.params.shallow_clone()));
    let mut norms = Vec::new();
    for step in 1..=STEPS {
        let grads = gradients(&buckets, step);
        write(folder, &format!("grads-{step}"), &trainable(&buckets, |index, _| grads[index].shallow_clone()));
        let squares = grads.iter().map(|grad| grad.square().sum(Kind::Double).double_value(&[]));
        norms.push(squares.sum::<f64>().sqrt());
        optimizer.clip(&grads, norms[norms.len() - 1]);
        let mut parts = buckets.0.iter().zip(&grads);
        parts.try_for_each(|(bucket, grad)| optimizer.update_bucket(bucket, grad, step)).unwrap();
        optimizer.end_update();
    }
    assert!(norms.iter().any(|norm| *norm > MAX_NORM) && norms.iter().any(|norm| *norm < MAX_NORM), "{norms:?}");

    let entries = buckets.0.iter().flat_map(|bucket| &bucket.layout.entries).filter(|entry| entry.spec.trainable);
    let about = |entry: &trainer::engine::bucket::Entry| json!({"shape": entry.spec.shape, "group": optimizer.groups.of(&entry.name)});
    let groups = optimizer.groups.groups().iter();
    let plan = json!({
        "params": entries.map(about).collect::<Vec<Value>>(),
        "groups": groups.map(|g| json!({"lr_scale": g.lr_scale, "weight_decay": g.weight_decay})).collect::<Vec<Value>>(),
        "lr": LR, "steps": STEPS, "warmup": WARMUP, "max_norm": MAX_NORM, "ema_decay": EMA_DECAY,
    });
    std::fs::write(folder.join("plan.json"), plan.to_string()).unwrap();
    let done = Command::new(python).arg("-c").arg(PYTORCH).arg(folder).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let told: Value = serde_json::from_slice(&done.stdout).unwrap();

    for (index, norm) in norms.iter().enumerate() {
        let (torch_norm, torch_lr) = (told["norms"][index].as_f64().unwrap(), told["lrs"][index].as_f64().unwrap());
        assert!((torch_norm / norm - 1.0).abs() < 1e-6, "step {}: {norm}, PyTorch {torch_norm}", index + 1);
        let lr = optimizer.schedule.at(index as u64 + 1);
        assert!((torch_lr - lr).abs() < 1e-15, "step {}: {lr}, PyTorch {torch_lr}", index + 1);
    }
    let found = |state: fn(&Bucket) -> &Tensor| trainable(&buckets, |_, bucket| state(bucket).shallow_clone());
    for (name, found, tolerance) in [
        ("params", found(|bucket| &bucket.params), 2e-7),
        ("ema", found(|bucket| &bucket.averages[0]), 2e-7),
        ("exp_avg", found(|bucket| &bucket.exp_avg), 1e-8),
        ("exp_avg_sq", found(|bucket| &bucket.exp_avg_sq), 1e-10),
    ] {
        let expected = read(folder, name);
        assert_eq!(found.len(), expected.len(), "{name}");
        let error = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(error <= tolerance, "{name}: {error:e}");
    }
}
