//! Runs that leave for PyTorch and come back: nothing may change on the way, and training goes on as if nothing had been.

use crate::experiment::{Experiment, STEPS, binary, run, run_ok};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn trainer(arguments: &[&str]) -> Command {
    let mut command = Command::new(binary("trainer"));
    command.args(arguments);
    command
}

/// Text of a path.
fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn export(experiment: &Experiment, from: &str, format: &str, out: &str, options: &[&str]) -> PathBuf {
    let out = experiment.path(out);
    let mut command = trainer(&["export", "--format", format, "--checkpoint", text(&experiment.path(from))]);
    run_ok(command.arg("--out").arg(&out).args(options));
    out
}

fn import(experiment: &Experiment, from: &Path, run: &str, options: &[&str]) -> Command {
    let mut command = trainer(&["import", "--config", text(&experiment.path("config.toml")), "--from", text(from)]);
    command.arg("--set").arg(format!("run.url={:?}", text(&experiment.path(run)))).args(options);
    command
}

fn inspect(source: &Path, options: &[&str]) -> Value {
    let ran = run_ok(trainer(&["inspect", "--json", text(source)]).args(options));
    serde_json::from_str(&ran.stdout).unwrap()
}

/// Digests of weights, average and moments.
fn values(experiment: &Experiment, run: &str) -> Vec<String> {
    experiment.digest(run)[..3].to_vec()
}

/// The project's Python, or `None` (said aloud) where there is no `.venv`.
fn python() -> Option<PathBuf> {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.venv/bin/python");
    if !python.exists() {
        eprintln!("SKIPPED: no {}", python.display());
        return None;
    }
    Some(python)
}

/// Loads the file as train.py's users do, into a model and its optimizer, and saves it again in every form.
const THROUGH_PYTORCH: &str = r#"
import argparse, collections, copy, sys, torch
sys.path.insert(0, sys.argv[1])
from dit_pytorch import DiT
folder = sys.argv[2]
whole = torch.load(f"{folder}/train.pt", weights_only=True)
assert list(whole) == ["model", "ema", "opt", "args"], list(whole)
assert whole["args"]["image_size"] == 32 and whole["args"]["global_batch_size"] == 16, whole["args"]
model = DiT(hidden_size=32, depth=2, num_heads=2, patch_size=2, input_size=4, in_channels=4, num_classes=3)
model.load_state_dict(whole["model"])
names = [name for name, _ in model.named_parameters()]
assert names == list(whole["model"]) == list(whole["ema"]) and names[0] == "pos_embed", names
parameters = list(model.parameters())
opt = torch.optim.AdamW(parameters, lr=0.5)
opt.load_state_dict(whole["opt"])
assert opt.param_groups[0]["lr"] == 1e-3 and opt.param_groups[0]["weight_decay"] == 0.01
assert parameters[0] not in opt.state and len(opt.state_dict()["state"]) == len(names) - 1
assert all(opt.state[p]["step"] == 6 for p in parameters[1:])
before = {id(p): p.detach().clone() for p in parameters}
fresh = copy.deepcopy(opt.state_dict())
for p in parameters[1:]:
    p.grad = torch.ones_like(p)
opt.step()
assert all(not torch.equal(p, before[id(p)]) for p in parameters[1:])

model = collections.OrderedDict((name, whole["model"][name]) for name in names)
args = argparse.Namespace(model="DiT-S/2", image_size=32, num_classes=3)
same = {"model": model, "ema": whole["ema"], "opt": fresh, "args": args}
torch.save(same, f"{folder}/official.pt")
torch.save(same, f"{folder}/legacy.pt", _use_new_zipfile_serialization=False)
wrapped = {key: {f"module._orig_mod.{name}": tensor for name, tensor in whole[key].items()} for key in ("model", "ema")}
torch.save({**wrapped, "opt": fresh, "args": args}, f"{folder}/wrapped.pt")
torch.save(whole["ema"], f"{folder}/bare.pt")
torch.save({name: tensor.half() for name, tensor in whole["ema"].items()}, f"{folder}/half.pt")

exported = torch.load(f"{folder}/ema.pt", weights_only=True)
assert list(exported) == names and all(torch.equal(exported[n].view(torch.int32), whole["ema"][n].view(torch.int32)) for n in names)
raw = open(f"{folder}/model.safetensors", "rb").read()
import json
size = int.from_bytes(raw[:8], "little")
header = json.loads(raw[8:8 + size])
for name, info in header.items():
    if name != "__metadata__":
        start, end = info["data_offsets"]
        assert raw[8 + size + start:8 + size + end] == whole["model"][name].numpy().tobytes(), name
half = torch.load(f"{folder}/half_ours.pt", weights_only=True)
assert all(torch.equal(half[n], whole["ema"][n].half()) for n in names)
"#;

#[test]
fn a_run_goes_to_pytorch_and_back_bit_for_bit_and_trains_on_as_if_it_had_stayed() {
    let experiment = Experiment::new();
    experiment.train(2, "native", &[]);
    let sixth = "native/checkpoints/step-000000006";
    export(&experiment, sixth, "train-pt", "train.pt", &[]);
    // Into a run of its own, and on to the end.
    let ran = run_ok(&mut import(&experiment, &experiment.path("train.pt"), "back", &[]));
    assert!(ran.stdout.contains("step 6, optimizer step 6"), "{}", ran.text());
    let imported = values(&experiment, "back");
    experiment.train(1, "back", &[]);
    assert_eq!(experiment.digest("back"), experiment.digest("native"));
    let first = experiment.steps_of_last_attempt("back")[0];
    assert_eq!(first, 7);

    let Some(python) = python() else { return };
    export(&experiment, sixth, "pt", "ema.pt", &[]);
    export(&experiment, sixth, "pt", "half_ours.pt", &["--dtype", "f16"]);
    export(&experiment, sixth, "safetensors", "model.safetensors", &["--weights", "model"]);
    let bench = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bench");
    run_ok(Command::new(python).args(["-c", THROUGH_PYTORCH]).arg(bench).arg(experiment.folder.path()));
    for file in ["official.pt", "legacy.pt", "wrapped.pt"] {
        let run = format!("run-{file}");
        run_ok(&mut import(&experiment, &experiment.path(file), &run, &[]));
        assert_eq!(values(&experiment, &run), imported, "{file}");
    }
    // One set of weights: both sections, no moments.
    let ran = run_ok(&mut import(&experiment, &experiment.path("bare.pt"), "run-bare", &["--step", "2"]));
    assert!(ran.stdout.contains("one set of weights") && ran.stdout.contains("start from zero"), "{}", ran.text());
    let bare = values(&experiment, "run-bare");
    assert_eq!([&bare[0]["model ".len()..], &bare[1]["ema ".len()..]], [&imported[1]["ema ".len()..]; 2]);
    let facts = inspect(&experiment.path("run-bare"), &[]);
    assert_eq!((&facts["facts"]["step"], &facts["facts"]["optimizer_step"]), (&2.into(), &0.into()));
    // Half precision widens exactly: back in half precision it is what it was.
    run_ok(&mut import(&experiment, &experiment.path("half.pt"), "run-half", &[]));
    let again = export(&experiment, "run-half", "pt", "half_again.pt", &["--dtype", "f16"]);
    assert_eq!(fs::read(again).unwrap(), fs::read(experiment.path("half_ours.pt")).unwrap());
}

#[test]
fn imported_weights_train_from_their_step_with_fresh_moments_and_every_average() {
    let experiment = Experiment::new();
    experiment.train(1, "native", &[]);
    let weights = export(&experiment, "native", "safetensors", "w.safetensors", &[]);
    let averages = "ema.further_decays=[0.5]";
    let ran = run_ok(&mut import(&experiment, &weights, "run", &["--set", averages]));
    assert!(ran.stdout.contains("step 0, optimizer step 0"), "{}", ran.text());
    experiment.train(2, "run", &[averages]);
    assert_eq!(experiment.steps_of_last_attempt("run"), (1..=STEPS).collect::<Vec<_>>());
    // A checkpoint of another run, through its URL.
    run_ok(&mut import(&experiment, &experiment.path("native"), "second", &[]));
    assert_eq!(values(&experiment, "second")[..2], values(&experiment, "native")[..2]);
}

#[test]
fn imports_that_cannot_be_right_are_refused_before_the_run_folder_is_made() {
    let experiment = Experiment::new();
    experiment.train(1, "native", &[]);
    let weights = export(&experiment, "native", "pt", "w.pt", &[]);
    let refuse = |from: &Path, options: &[&str], says: &[&str]| {
        let ran = run(&mut import(&experiment, from, "new", options));
        assert!(ran.code != Some(0) && says.iter().all(|word| ran.stderr.contains(word)), "{says:?}: {}", ran.text());
        assert!(!experiment.path("new/checkpoints").exists());
    };
    let other = ["--set", "model.depth=3", "--set", "model.patch_size=4"];
    refuse(
        &weights,
        &other,
        &["`blocks.2.attn.qkv.weight` [96, 32] is missing", "`pos_embed` has shape [1, 4, 32], expected [1, 1, 32]"],
    );
    refuse(&weights, &["--set", "model.depth=1"], &["`blocks.1.attn.qkv.weight` [96, 32] is not part of the model"]);
    let adapters = ["--set", "lora.rank=2", "--set", r#"lora.targets=["attn.qkv"]"#];
    refuse(&weights, &adapters, &["`[lora]`", "`init.from`"]);
    refuse(&weights, &["--step", "11"], &["step 11, beyond `train.steps` = 10"]);
    refuse(&experiment.path("config.toml"), &[], &["config.toml", "expected a run or checkpoint URL"]);
    refuse(&experiment.path("nothing"), &[], &["nothing"]);
    let ran = run(&mut import(&experiment, &weights, "native", &[]));
    assert!(
        ran.code != Some(0) && ran.stderr.contains("has checkpoints already (the newest of step 10)"),
        "{}",
        ran.text()
    );
    let ran = run(trainer(&[
        "export",
        "--format",
        "pt",
        "--out",
        "/dev/null/x",
        "--checkpoint",
        text(&experiment.path("native")),
    ])
    .args(["--weights", "ema_0.5"]));
    assert!(
        ran.stderr.contains("no `ema_0.5` weights; it has adamw/exp_avg, adamw/exp_avg_sq, ema, model"),
        "{}",
        ran.text()
    );
}

#[test]
fn inspect_shows_step_config_sections_and_tensors() {
    let experiment = Experiment::new();
    experiment.train(2, "run", &[]);
    let summary = inspect(&experiment.path("run"), &["--tensors"]);
    let facts = &summary["facts"];
    assert_eq!((&facts["step"], &facts["world_size"], &facts["attempt"]), (&10.into(), &2.into(), &1.into()));
    assert_eq!(facts["config"]["optimizer"]["lr"], 1e-3);
    assert_eq!(facts["model"]["hidden_size"], 32);
    let sections: Vec<&str> =
        summary["sections"].as_array().unwrap().iter().map(|s| s["name"].as_str().unwrap()).collect();
    assert_eq!(sections, ["adamw/exp_avg", "adamw/exp_avg_sq", "ema", "model"]);
    let tensors = summary["tensors"].as_array().unwrap();
    let table = tensors.iter().find(|tensor| tensor["name"] == "model/pos_embed").unwrap();
    assert_eq!((&table["dtype"], &table["shape"]), (&"F32".into(), &serde_json::json!([1, 4, 32])));
    // A quarter of sin² + cos² over 32 features of 4 positions.
    assert!((table["l2_norm"].as_f64().unwrap() - 64f64.sqrt()).abs() < 1e-6, "{table}");

    let shard = "run/checkpoints/step-000000010/attempt-0001/shard-00001-of-00002.safetensors";
    assert_eq!(inspect(&experiment.path(shard), &[])["kind"], "safetensors");
    let manifest = inspect(&experiment.path("run/checkpoints/step-000000010/manifest-0001.json"), &[]);
    assert_eq!(manifest["facts"]["step"], 10);

    let file = export(&experiment, "run", "train-pt", "train.pt", &[]);
    let of_file = inspect(&file, &[]);
    assert_eq!(of_file["facts"]["about"]["opt"]["param_groups"][0]["betas"], serde_json::json!([0.9, 0.999]));
    let text = run_ok(&mut trainer(&["inspect", text(&file), "--tensors"])).stdout;
    assert!(text.contains("model/blocks.1.mlp.fc2.bias") && text.contains("opt/state"), "{text}");
}
