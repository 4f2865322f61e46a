//! Forward and backward through the chain of segments, one segment's graph at a time.

use crate::ffi::{self, TorchError};
use crate::model::{Flow, Model, Segment, Weights, no_probe};
use tch::Tensor;

/// The inputs and outputs of every segment of one forward pass; each output's graph ends at its own inputs.
pub struct Tape {
    records: Vec<Record>,
    /// Of so many segments one keeps no graph; 0: every segment keeps its own.
    recompute_every: usize,
}

struct Record {
    input: Flow,
    output: Flow,
    /// The output has no graph: backward runs the segment again.
    recompute: bool,
}

/// The gradients that flow from segment to segment while a tape is run backwards.
pub struct Backward {
    records: Vec<Record>,
    state: Vec<Tensor>,
    context: Vec<Tensor>,
}

impl Tape {
    /// Starts a tape with the flow into the first segment. Of every `recompute_every` segments (0: never) the last keeps
    /// its input only, and computes its activations anew in backward.
    pub fn new(model: &dyn Model, input: Flow, recompute_every: usize) -> Self {
        let mut records = Vec::with_capacity(model.segments().len() + 1);
        records.push(Record { input: Flow::default(), output: input, recompute: false });
        Self { records, recompute_every }
    }

    /// Runs the next segment.
    pub fn forward(&mut self, segment: &dyn Segment, weights: &Weights) {
        let Some(previous) = self.records.last() else { return };
        // What depends on no trainable parameter (the data, and what frozen segments make of them) needs no gradient.
        let leaf = |tensor: &Tensor| tensor.detach().set_requires_grad(tensor.requires_grad());
        let context =
            if previous.output.context.is_empty() { &previous.input.context } else { &previous.output.context };
        let input = Flow {
            state: previous.output.state.iter().map(leaf).collect(),
            context: context.iter().map(leaf).collect(),
        };
        let mut output = segment.forward(weights, &input, &mut no_probe);
        let recompute = self.recompute_every > 0 && self.records.len().is_multiple_of(self.recompute_every);
        if recompute {
            // The graph was needed only to learn what depends on a trainable parameter.
            let state = output.state.iter().map(leaf).collect();
            output = Flow { state, context: output.context.iter().map(leaf).collect() };
        }
        self.records.push(Record { input, output, recompute });
    }

    /// The chain's output as a leaf of the loss's graph.
    pub fn output(&self) -> Tensor {
        let last = self.records.last().and_then(|record| record.output.state.first());
        last.map_or_else(Tensor::new, |output| output.detach().set_requires_grad(true))
    }

    /// Ends the forward pass; `grad` is the gradient of the loss with respect to [`Tape::output`].
    pub fn into_backward(self, grad: Tensor) -> Backward {
        Backward { records: self.records, state: vec![grad], context: Vec::new() }
    }
}

impl Backward {
    /// Runs the last segment not yet run backwards and frees its graph; it is `segment`, has the `weights` of the forward
    /// pass, and of these `parameters` are the trainable ones. Gives their gradients (`None` where one takes no part).
    ///
    /// # Errors
    /// What autograd reports.
    pub fn segment(
        &mut self,
        segment: &dyn Segment,
        weights: &Weights,
        parameters: &[Tensor],
    ) -> Result<Vec<Option<Tensor>>, TorchError> {
        let Some(Record { input, mut output, recompute }) = self.records.pop() else { return Ok(Vec::new()) };
        if recompute && output.state.iter().chain(&output.context).any(Tensor::requires_grad) {
            output = segment.forward(weights, &input, &mut no_probe);
        }
        // Gradients are held for those tensors between two segments that need one, see [`Tape::forward`].
        let needing = |tensors: &[Tensor]| -> Vec<Tensor> {
            tensors.iter().filter(|tensor| tensor.requires_grad()).map(Tensor::shallow_clone).collect()
        };
        let makes_context = !output.context.is_empty();
        let mut outputs = needing(&output.state);
        let mut output_grads: Vec<&Tensor> = self.state.iter().collect();
        if makes_context {
            outputs.extend(needing(&output.context));
            output_grads.extend(&self.context);
        }
        if outputs.is_empty() {
            // Frozen, and so is everything before it.
            (self.state, self.context) = (Vec::new(), Vec::new());
            return Ok(parameters.iter().map(|_| None).collect());
        }
        let outputs: Vec<&Tensor> = outputs.iter().collect();
        let (state, context) = (needing(&input.state), needing(&input.context));
        let inputs: Vec<&Tensor> = parameters.iter().chain(&state).chain(&context).collect();
        let mut grads = ffi::grad(&outputs, &output_grads, &inputs)?;
        let or_zero = |(grad, leaf): (Option<Tensor>, &Tensor)| grad.unwrap_or_else(|| leaf.zeros_like());
        let context_grads = grads.split_off(parameters.len() + state.len());
        let state_grads = grads.split_off(parameters.len());
        self.state = state_grads.into_iter().zip(&state).map(or_zero).collect();
        let context_grads = context_grads.into_iter().zip(&context).map(or_zero);
        self.context = if makes_context || self.context.is_empty() {
            context_grads.collect()
        } else {
            // Last segment first: a fixed order, so the sum has the same bits on every rank.
            self.context.iter().zip(context_grads).map(|(sum, grad)| sum + grad).collect()
        };
        Ok(grads)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::bucket::Buckets;
    use crate::engine::mesh::Mesh;
    use crate::model::freeze::freeze;
    use crate::model::testing::tiny_dit;
    use crate::model::{Init, initial_values};
    use std::collections::{BTreeMap, HashMap};
    use std::sync::Arc;
    use tch::{Device, Kind};

    /// Gradients by name, and which segments' outputs needed one.
    fn gradients(frozen: &[&str], recompute_every: usize) -> (BTreeMap<String, Tensor>, Vec<bool>) {
        let patterns: Vec<String> = frozen.iter().map(|text| text.to_string()).collect();
        let model = freeze(Arc::new(tiny_dit()), &patterns).unwrap();
        let value = |(name, spec): (String, crate::model::ParamSpec)| {
            let values = initial_values(3, &name, &Init::Normal { std: 0.2 }, spec.numel());
            (name, Tensor::from_slice(&values).view(spec.shape.as_slice()))
        };
        let given: HashMap<String, Tensor> = model.named_params().into_iter().map(value).collect();
        let buckets = Buckets::initialise(&*model, &Mesh::alone(1).unwrap(), 0, 0, &given, Device::Cpu).unwrap();
        let x = Tensor::arange(2 * 4 * 64, (Kind::Float, Device::Cpu)).sin().view([2, 4, 8, 8]);
        let (t, y) = (Tensor::from_slice(&[3f32, 700.0]), Tensor::from_slice(&[1i64, 7]));
        let mut tape = Tape::new(&*model, model.input(&x, &t, &y), recompute_every);
        for (segment, bucket) in model.segments().iter().zip(&buckets.0) {
            tape.forward(&**segment, &bucket.weights);
        }
        let needed = tape.records[1..].iter().map(|record| record.output.state[0].requires_grad()).collect();
        let grad = tape.output().cos().detach();
        let mut backward = tape.into_backward(grad);
        let mut gradients = BTreeMap::new();
        for (segment, bucket) in model.segments().iter().zip(&buckets.0).rev() {
            let names = bucket.layout.entries.iter().filter(|entry| entry.spec.trainable).map(|entry| &entry.name);
            let grads = backward.segment(&**segment, &bucket.weights, &bucket.trainable).unwrap();
            gradients.extend(names.cloned().zip(grads.into_iter().map(|grad| grad.unwrap())));
        }
        (gradients, needed)
    }

    #[test]
    fn frozen_parameters_cost_no_gradient_and_the_others_have_the_same_bits() {
        let (all, _) = gradients(&[], 0);
        let embedders = ["x_embedder.*", "t_embedder.*", "y_embedder.*"];
        for (frozen, needed) in [
            (vec!["blocks.0.*"], [true; 4]),
            (vec!["x_embedder.*"], [false, true, true, true]),
            (embedders.to_vec(), [false, true, true, true]),
            ([&embedders[..], &["blocks.0.*"]].concat(), [false, false, true, true]),
            ([&embedders[..], &["blocks.*", "final_layer.adaLN*"]].concat(), [false, false, false, true]),
            (vec!["final_layer.*"], [true; 4]),
            (vec!["*"], [false; 4]),
        ] {
            for recompute_every in 0..=3 {
                let case = format!("without {frozen:?}, recomputing every {recompute_every}");
                let (some, found) = gradients(&frozen, recompute_every);
                assert_eq!(found, needed, "{case}");
                assert!(some.len() < all.len() && (some.is_empty() == (frozen == ["*"])), "{case}");
                for (name, gradient) in some {
                    assert!(gradient.equal(&all[&name]), "{name} {case}");
                }
            }
        }
    }
}
