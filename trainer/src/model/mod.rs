//! Models as chains of segments.
//!
//! A [`Segment`] maps state tensors to state tensors, with a shared context that an early segment produces and later
//! ones read. The engine owns the weights: each segment's parameters lie in one flat buffer, its bucket. Backward runs
//! segment by segment, last to first, so the engine knows when a bucket's gradient is complete.

mod derived;
pub mod dit;
mod embed;
pub mod freeze;
mod init;
pub mod lora;
pub mod patterns;
pub mod precision;
#[cfg(test)]
pub(crate) mod testing;

pub use embed::{shifted_timestep_embedding, sin_cos_2d, sin_cos_2d_at, timestep_embedding};
pub use init::{Init, initial_values};

use std::collections::HashMap;
use tch::{Kind, Tensor};

/// A parameter as a segment declares it.
#[derive(Clone, Debug)]
pub struct ParamSpec {
    /// Name inside the segment; the segment's prefix makes it the name of the official state dict.
    pub name: String,
    /// Shape, in elements.
    pub shape: Vec<i64>,
    /// Its first values.
    pub init: Init,
    /// Whether the optimizer changes it. Frozen parameters are in checkpoints and in the EMA all the same.
    pub trainable: bool,
    /// Whether the official state dict has it behind the other parameters with its segment's prefix, those of later segments included.
    pub last_of_prefix: bool,
}

impl ParamSpec {
    fn new(name: &str, shape: &[i64], init: Init) -> Self {
        Self { name: name.to_owned(), shape: shape.to_vec(), init, trainable: true, last_of_prefix: false }
    }

    /// Elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product::<i64>() as usize
    }
}

/// What flows from segment to segment.
#[derive(Default)]
pub struct Flow {
    /// The tensors that the next segment transforms.
    pub state: Vec<Tensor>,
    /// Tensors that many segments read, for example the conditioning vector. A segment that returns none passes on
    /// those it was given; their gradients add up in fixed segment order.
    pub context: Vec<Tensor>,
}

/// A segment's weights by their names inside the segment.
pub struct Weights {
    tensors: HashMap<String, Tensor>,
    /// What large products are computed in, see [`precision`].
    kind: Kind,
}

impl Weights {
    /// From (name inside the segment, tensor).
    pub fn new(tensors: impl IntoIterator<Item = (String, Tensor)>) -> Self {
        Self { tensors: tensors.into_iter().collect(), kind: Kind::Float }
    }

    /// These, with some in place of others.
    fn with(&self, replaced: impl IntoIterator<Item = (String, Tensor)>) -> Self {
        let mut tensors: HashMap<String, Tensor> =
            self.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        tensors.extend(replaced);
        Self { tensors, kind: self.kind }
    }
}

impl std::ops::Index<&str> for Weights {
    type Output = Tensor;

    /// # Panics
    /// When the segment asks for a parameter that it did not declare: a mistake in that segment.
    fn index(&self, name: &str) -> &Tensor {
        self.tensors.get(name).unwrap_or_else(|| panic!("the segment did not declare a parameter `{name}`"))
    }
}

/// Sees intermediate tensors by name; [`no_probe`] in training.
pub type Probe<'a> = &'a mut dyn FnMut(&str, &Tensor);

/// A probe that looks at nothing.
pub fn no_probe(_: &str, _: &Tensor) {}

/// A piece of a model with parameters of its own.
pub trait Segment: Send + Sync {
    /// What precedes its parameter names in the state dict, for example `blocks.3.`; segments that follow each other may share it.
    fn prefix(&self) -> &str;
    /// Its parameters, in the order of the official state dict but for [`ParamSpec::last_of_prefix`].
    fn params(&self) -> Vec<ParamSpec>;
    /// Computes the next flow; see [`Flow::context`] for what an empty context means.
    fn forward(&self, weights: &Weights, input: &Flow, probe: Probe) -> Flow;
}

/// A denoiser: x_t, t and a condition in, a prediction out.
pub trait Model: Send + Sync {
    /// The chain, first to last.
    fn segments(&self) -> &[Box<dyn Segment>];
    /// The flow into the first segment.
    ///
    /// # Shapes
    /// `x_t` [N, C, H, W] float; `t` `[N]` float, as the model was trained to read it; `labels` `[N]` int64.
    fn input(&self, x_t: &Tensor, t: &Tensor, labels: &Tensor) -> Flow;
    /// Shape of one latent, `[C, H, W]`.
    fn latent_shape(&self) -> &[i64];
    /// The label that means "no condition", when the model was trained with label dropout.
    fn null_label(&self) -> Option<i64>;
    /// Share of labels that training replaces by the null label.
    fn label_dropout(&self) -> f64;
    /// Whether the output has a second half of channels for the variance.
    fn learn_sigma(&self) -> bool;
    /// Multiply-adds of one forward pass of one sample, as the DiT paper counts them: those of matrix products, and one
    /// for each element of a LayerNorm.
    fn macs_per_sample(&self) -> u64;

    /// Elements of all parameters, frozen ones included.
    fn numel(&self) -> usize {
        self.segments().iter().flat_map(|segment| segment.params()).map(|param| param.numel()).sum()
    }

    /// Full names of all parameters with their declarations, in the order of the official state dict.
    fn named_params(&self) -> Vec<(String, ParamSpec)> {
        let mut named = Vec::new();
        for segments in self.segments().chunk_by(|a, b| a.prefix() == b.prefix()) {
            let params = segments.iter().flat_map(|segment| segment.params());
            let (last, first): (Vec<_>, Vec<_>) = params.partition(|spec| spec.last_of_prefix);
            let full_name = |spec: &ParamSpec| format!("{}{}", segments[0].prefix(), spec.name);
            named.extend(first.into_iter().chain(last).map(|spec| (full_name(&spec), spec)));
        }
        named
    }
}

/// The weights of a whole model outside training: one [`Weights`] a segment.
pub struct WeightSet(Vec<Weights>);

/// Tensors that do not make up the model's weights.
#[derive(Debug, thiserror::Error)]
#[error("the weights do not fit the model: {0}")]
pub struct WeightsMismatch(String);

impl WeightSet {
    /// Takes every parameter of `model` out of `tensors` by its full name.
    ///
    /// # Errors
    /// [`WeightsMismatch`] lists every missing, unknown or wrongly shaped tensor.
    pub fn from_named(model: &dyn Model, mut tensors: HashMap<String, Tensor>) -> Result<Self, WeightsMismatch> {
        let mut problems = Vec::new();
        let mut take = |name: String, spec: &ParamSpec| match tensors.remove(&name) {
            Some(tensor) if tensor.size() == spec.shape => Some(tensor),
            Some(tensor) => {
                problems.push(format!("`{name}` has shape {:?}, expected {:?}", tensor.size(), spec.shape));
                None
            }
            None => {
                problems.push(format!("`{name}` {:?} is missing", spec.shape));
                None
            }
        };
        let mut segments = Vec::new();
        for segment in model.segments() {
            let mut found = Vec::new();
            for spec in segment.params() {
                let tensor = take(format!("{}{}", segment.prefix(), spec.name), &spec);
                found.extend(tensor.map(|tensor| (spec.name, tensor)));
            }
            segments.push(Weights::new(found));
        }
        let mut unknown: Vec<_> = tensors.into_keys().map(|name| format!("`{name}` is unknown")).collect();
        unknown.sort();
        problems.extend(unknown);
        if problems.is_empty() { Ok(Self(segments)) } else { Err(WeightsMismatch(problems.join("; "))) }
    }

    /// One forward pass.
    ///
    /// # Shapes
    /// As [`Model::input`]; returns [N, C or 2C, H, W].
    pub fn forward(&self, model: &dyn Model, x_t: &Tensor, t: &Tensor, labels: &Tensor, probe: Probe) -> Tensor {
        let mut flow = model.input(x_t, t, labels);
        for (segment, weights) in model.segments().iter().zip(&self.0) {
            let next = segment.forward(weights, &flow, probe);
            flow =
                Flow { state: next.state, context: if next.context.is_empty() { flow.context } else { next.context } };
        }
        flow.state.swap_remove(0)
    }
}
