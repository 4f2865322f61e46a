//! What the official train.py saves: `{"model", "ema", "opt", "args"}`, with the state of `torch.optim.AdamW` under
//! numbers: those of `model.parameters()`.

use super::file::TensorFile;
use super::torch_file::write::{self, PyValue};
use super::values::{self, Dtype, TensorSpec};
use super::{InteropError, official};
use crate::model::ParamSpec;
use crate::recipe::Recipe;
use checkpoint::CheckpointReader;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// Section names of AdamW's moments in our checkpoints, and their names in PyTorch's state.
pub const MOMENTS: [(&str, &str); 2] = [("adamw/exp_avg", "exp_avg"), ("adamw/exp_avg_sq", "exp_avg_sq")];

/// AdamW's state in a file.
#[derive(Debug, PartialEq)]
pub struct OptimizerState {
    /// Updates done.
    pub step: u64,
    /// Parameter → names of its two moments in the file, in the order of [`MOMENTS`].
    pub moments: BTreeMap<String, [String; 2]>,
    /// The settings of its one parameter group: `lr`, `betas`, `eps`, `weight_decay` …
    pub settings: Value,
}

/// The state of AdamW in `file`, for a model with these parameters in the order of the official state dict; `None` where
/// there is none, or none yet.
///
/// # Errors
/// [`InteropError::Unsupported`] lists everything that does not fit the model.
pub fn optimizer_state(
    file: &dyn TensorFile,
    params: &[(String, ParamSpec)],
) -> Result<Option<OptimizerState>, InteropError> {
    let unsupported = |what: String| InteropError::Unsupported {
        path: file.path().into(),
        what,
        remedy: "give --no-optimizer to start with fresh moments".to_owned(),
    };
    let opt = &file.about()["opt"];
    let Some(groups) = opt["param_groups"].as_array() else { return Ok(None) };
    if opt["state"].as_object().is_none_or(serde_json::Map::is_empty) {
        return Ok(None);
    }
    let [settings] = &groups[..] else {
        let what =
            format!("its optimizer has {} parameter groups, and names in none of them; expected 1", groups.len());
        return Err(unsupported(what));
    };
    let ids: Option<Vec<u64>> = settings["params"].as_array().map(|ids| ids.iter().filter_map(Value::as_u64).collect());
    let ids = ids.ok_or_else(|| unsupported("its optimizer's group has no list `params`".to_owned()))?;
    // Some scripts leave parameters without gradient out of the optimizer.
    let trainable = || params.iter().filter(|(_, spec)| spec.trainable);
    let named: Vec<&(String, ParamSpec)> = match ids.len() {
        count if count == params.len() => params.iter().collect(),
        count if count == trainable().count() => trainable().collect(),
        count => {
            let (all, trained) = (params.len(), trainable().count());
            return Err(unsupported(format!(
                "its optimizer has {count} parameters; this model has {all}, {trained} of them trained"
            )));
        }
    };
    let mut state = OptimizerState { step: 0, moments: BTreeMap::new(), settings: settings.clone() };
    let mut problems = Vec::new();
    let mut steps = BTreeMap::new();
    for (id, (name, spec)) in ids.iter().zip(named).filter(|(_, (_, spec))| spec.trainable) {
        let names = MOMENTS.map(|(_, torch)| format!("opt/state/{id}/{torch}"));
        for moment in &names {
            match file.tensors().get(moment) {
                Some(found) if found.shape.iter().map(|&side| side as i64).eq(spec.shape.iter().copied()) => {}
                Some(found) => problems
                    .push(format!("`{moment}` (of `{name}`) has shape {:?}, expected {:?}", found.shape, spec.shape)),
                None => problems.push(format!("`{moment}` (of `{name}`) is missing")),
            }
        }
        steps.insert(step_of(file, *id)?, name);
        state.moments.insert(name.clone(), names);
    }
    match steps.keys().collect::<Vec<_>>()[..] {
        [Some(step)] => state.step = *step,
        _ => problems.push(format!("its parameters are not all at one step: {steps:?}")),
    }
    if problems.is_empty() {
        return Ok(Some(state));
    }
    Err(unsupported(format!("its optimizer's state does not fit the model:\n  {}\n ", problems.join("\n  "))))
}

/// Updates of one parameter: a tensor, or a plain number before PyTorch 1.12.
fn step_of(file: &dyn TensorFile, id: u64) -> Result<Option<u64>, InteropError> {
    let name = format!("opt/state/{id}/step");
    if file.tensors().contains_key(&name) {
        let step = values::to_vec(&official::tensor(file, &name)?)?;
        return Ok(step.first().filter(|step| **step >= 0.0).map(|step| *step as u64));
    }
    Ok(file.about()["opt"]["state"][id.to_string()]["step"].as_u64())
}

/// Writes a checkpoint of ours as train.py would have: the weights, the main average, AdamW's state in the order of
/// `model.parameters()`, and the run's settings under the names of its arguments, as a plain dict, which
/// `torch.load(weights_only=True)` allows.
///
/// # Errors
/// A damaged checkpoint, or those of the file system.
pub fn write(path: &Path, reader: &CheckpointReader, recipe: &Recipe) -> Result<(), InteropError> {
    let manifest = reader.manifest();
    let model = recipe
        .build_model()
        .map_err(|source| InteropError::Recipe { url: manifest.key(), source: Box::new(source) })?;
    let params = model.named_params();
    let tensor = |section: &str, (name, spec): &(String, ParamSpec)| {
        let shape = spec.shape.iter().map(|&side| side as usize).collect();
        PyValue::Tensor(format!("{section}/{name}"), TensorSpec { dtype: Dtype::F32, shape })
    };
    let state_dict = |section: &str| {
        PyValue::OrderedDict(params.iter().map(|param| (param.0.as_str().into(), tensor(section, param))).collect())
    };
    let step = || PyValue::Tensor(STEP.to_owned(), TensorSpec { dtype: Dtype::F32, shape: vec![] });
    let mut states = Vec::new();
    for (id, param) in params.iter().enumerate().filter(|(_, (_, spec))| spec.trainable && manifest.optimizer_step > 0)
    {
        let [first, second] = MOMENTS.map(|(section, torch)| (torch, tensor(section, param)));
        states.push((PyValue::Int(id as i64), PyValue::dict([("step", step()), first, second])));
    }
    let opt = PyValue::dict([
        ("state", PyValue::Dict(states)),
        ("param_groups", PyValue::List(vec![group(&manifest.config["optimizer"], params.len())])),
    ]);
    let whole = PyValue::dict([
        ("model", state_dict("model")),
        ("ema", state_dict("ema")),
        ("opt", opt),
        ("args", arguments(&manifest.config, recipe)),
    ]);
    write::write(path, &whole, |name| match name {
        STEP => Ok(values::encode(&[manifest.optimizer_step as f32], Dtype::F32)),
        name => Ok(values::encode(&reader.read_all_f32(name)?, Dtype::F32)),
    })
}

/// Stands for the one scalar that every parameter's state repeats.
const STEP: &str = "step";

fn float(value: &Value) -> PyValue {
    PyValue::Float(value.as_f64().unwrap_or_default())
}

/// The parameter group of `torch.optim.AdamW` with the run's base settings over all `count` parameters.
fn group(optimizer: &Value, count: usize) -> PyValue {
    PyValue::dict([
        ("lr", float(&optimizer["lr"])),
        ("betas", PyValue::Tuple(vec![float(&optimizer["betas"][0]), float(&optimizer["betas"][1])])),
        ("eps", float(&optimizer["eps"])),
        ("weight_decay", float(&optimizer["weight_decay"])),
        ("amsgrad", PyValue::Bool(false)),
        ("maximize", PyValue::Bool(false)),
        ("foreach", PyValue::None),
        ("capturable", PyValue::Bool(false)),
        ("differentiable", PyValue::Bool(false)),
        ("fused", PyValue::None),
        ("decoupled_weight_decay", PyValue::Bool(true)),
        ("params", PyValue::List((0..count as i64).map(PyValue::Int).collect())),
    ])
}

/// The arguments of train.py that the run answers to.
fn arguments(config: &Value, recipe: &Recipe) -> PyValue {
    let model = &recipe.model;
    let fits = |preset: &configs::presets::Preset| {
        [preset.hidden_size, preset.depth, preset.num_heads, preset.patch_size].map(|size| size as i64)
            == [model.hidden_size, model.depth, model.num_heads, model.patch_size]
    };
    let name = configs::presets::ALL.into_iter().find(fits).map_or(PyValue::None, |preset| preset.name.into());
    let number = |pointer: &str| config.pointer(pointer).and_then(Value::as_i64).map_or(PyValue::None, PyValue::Int);
    let text = |pointer: &str| config.pointer(pointer).and_then(Value::as_str).map_or(PyValue::None, PyValue::from);
    let size = |pointer: &str| config.pointer(pointer).and_then(Value::as_i64).unwrap_or_default();
    PyValue::dict([
        ("data_path", text("/data/url")),
        ("results_dir", text("/run/url")),
        ("model", name),
        ("image_size", PyValue::Int(model.input_size * 8)),
        ("num_classes", PyValue::Int(model.num_classes)),
        ("global_batch_size", PyValue::Int(size("/train/lanes") * size("/train/micro_batch"))),
        ("global_seed", number("/seed")),
        ("log_every", number("/log/every_steps")),
        ("ckpt_every", number("/checkpoint/every_steps")),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interop::file;
    use crate::model::Model;
    use crate::model::testing::tiny_dit;

    /// Number, shape and step of a parameter in a file.
    type State = (i64, Vec<i64>, f32);

    /// The state that a file with these parameters in its groups and these states gives for the tiny DiT.
    fn read(ids: &[i64], groups: usize, states: &[State]) -> Result<Option<OptimizerState>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("train.pt");
        // A tensor of zeros is asked for by its length, a step by its value.
        let tensor = |name: String, shape: &[i64]| {
            let shape = shape.iter().map(|&side| side as usize).collect();
            PyValue::Tensor(name, TensorSpec { dtype: Dtype::F32, shape })
        };
        let zeros = |shape: &[i64]| tensor(format!("zeros {}", shape.iter().product::<i64>()), shape);
        let state = |(id, shape, step): &State| {
            let entries =
                [("step", tensor(step.to_string(), &[])), ("exp_avg", zeros(shape)), ("exp_avg_sq", zeros(shape))];
            (PyValue::Int(*id), PyValue::dict(entries))
        };
        let ids = PyValue::List(ids.iter().map(|&id| PyValue::Int(id)).collect());
        let group = PyValue::dict([("lr", PyValue::Float(0.25)), ("params", ids)]);
        let opt = PyValue::dict([
            ("state", PyValue::Dict(states.iter().map(state).collect())),
            ("param_groups", PyValue::List(vec![group; groups])),
        ]);
        let values = |name: &str| match name.strip_prefix("zeros ") {
            Some(numel) => Ok(vec![0; 4 * numel.parse::<usize>().unwrap()]),
            None => Ok(values::encode(&[name.parse().unwrap()], Dtype::F32)),
        };
        write::write(&path, &PyValue::dict([("opt", opt)]), values).unwrap();
        optimizer_state(&*file::open(&path).unwrap(), &tiny_dit().named_params()).map_err(|error| error.to_string())
    }

    /// States of the tiny DiT's trained parameters, numbered from `first`.
    fn states(first: i64) -> Vec<State> {
        let trained = tiny_dit().named_params().into_iter().filter(|(_, spec)| spec.trainable);
        trained.zip(first..).map(|((_, spec), id)| (id, spec.shape, 5.0)).collect()
    }

    #[test]
    fn states_belong_to_the_parameters_in_their_order_with_or_without_the_position_table() {
        let (all, trained) = (tiny_dit().named_params().len() as i64, states(0).len() as i64);
        assert_eq!(all, trained + 1);
        for (ids, first) in [((0..all).collect::<Vec<_>>(), 1), ((0..trained).collect(), 0)] {
            let state = read(&ids, 1, &states(first)).unwrap().unwrap();
            assert_eq!((state.step, state.moments.len() as i64), (5, trained));
            assert_eq!(state.settings["lr"], 0.25);
            let names = &state.moments["x_embedder.proj.weight"];
            assert_eq!(names, &[format!("opt/state/{first}/exp_avg"), format!("opt/state/{first}/exp_avg_sq")]);
        }
        assert_eq!(read(&(0..all).collect::<Vec<_>>(), 1, &[]), Ok(None), "before the first step");
    }

    #[test]
    fn states_that_do_not_fit_are_refused_by_name() {
        let all: Vec<i64> = (0..=states(1).len() as i64).collect();
        let refuse = |ids: &[i64], groups, states: &[State], says: &str| {
            let error = read(ids, groups, states).unwrap_err();
            assert!(error.contains(says) && error.contains("--no-optimizer"), "{says}: {error}");
        };
        refuse(&all, 2, &states(1), "2 parameter groups");
        refuse(&all[2..], 1, &states(1), &format!("has {} parameters; this model has {}", all.len() - 2, all.len()));
        refuse(&all, 1, &states(1)[1..], "`opt/state/1/exp_avg` (of `x_embedder.proj.weight`) is missing");
        let mut wrong = states(1);
        wrong[1].1 = vec![35];
        refuse(&all, 1, &wrong, "`opt/state/2/exp_avg_sq` (of `x_embedder.proj.bias`) has shape [35], expected [36]");
        let mut late = states(1);
        late[0].2 = 6.0;
        refuse(&all, 1, &late, "not all at one step");
    }
}
