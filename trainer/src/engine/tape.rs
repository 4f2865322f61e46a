//! Forward and backward through the chain of segments, one segment's graph at a time.

use super::turns::Keep;
use crate::ffi::{self, TorchError};
use crate::model::{Flow, Segment, Weights, no_probe};
use tch::Tensor;

/// The inputs and outputs of every segment of one forward pass; each output's graph ends at its own inputs.
pub struct Tape {
    records: Vec<Record>,
}

struct Record {
    input: Flow,
    output: Flow,
    /// Unless these are its activations, the output has no graph.
    keep: Keep,
}

/// The gradients that flow from segment to segment while a tape is run backwards.
pub struct Backward {
    records: Vec<Record>,
    state: Vec<Tensor>,
    context: Vec<Tensor>,
}

impl Tape {
    /// Starts a tape with the flow into the first segment.
    pub fn new(input: Flow) -> Self {
        Self { records: vec![Record { input: Flow::default(), output: input, keep: Keep::Activations }] }
    }

    /// Runs the next segment.
    pub fn forward(&mut self, segment: &dyn Segment, weights: &Weights, keep: Keep) {
        let Some(previous) = self.records.last_mut() else { return };
        let context =
            if previous.output.context.is_empty() { &previous.input.context } else { &previous.output.context };
        let mut input = Flow { state: leaves(&previous.output.state), context: leaves(context) };
        let mut output = segment.forward(weights, &input, &mut no_probe);
        if keep != Keep::Activations {
            // The graph was needed only to learn what depends on a trainable parameter.
            output = Flow { state: leaves(&output.state), context: leaves(&output.context) };
        }
        let record = Record { input: Flow::default(), output, keep };
        // Where nothing so far is trained, backward has nothing to do.
        if keep == Keep::Nothing || (keep == Keep::Activations && !record.needs_gradient()) {
            input.state.clear();
            previous.output.state.clear();
        }
        self.records.push(Record { input, ..record });
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

/// Tensors without their graphs. What depends on no trainable parameter (the data, and what frozen segments make of them) needs no
/// gradient.
fn leaves(tensors: &[Tensor]) -> Vec<Tensor> {
    tensors.iter().map(|tensor| tensor.detach().set_requires_grad(tensor.requires_grad())).collect()
}

impl Record {
    fn needs_gradient(&self) -> bool {
        self.output.state.iter().chain(&self.output.context).any(Tensor::requires_grad)
    }
}

impl Backward {
    /// Makes the graph of segment `index`, which is `segment` with the `weights` of the forward pass, and with it the input of the next
    /// one, as [`super::turns::Turn::Again`] asks for.
    pub fn again(&mut self, index: usize, segment: &dyn Segment, weights: &Weights) {
        // The first record is what comes into the chain.
        let of_unit = &mut self.records[index + 1..];
        if !of_unit.iter().any(Record::needs_gradient) {
            return;
        }
        if let [record, next, ..] = of_unit {
            record.output = segment.forward(weights, &record.input, &mut no_probe);
            record.keep = Keep::Activations;
            next.input.state = leaves(&record.output.state);
        }
    }

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
        let Some(record) = self.records.pop() else { return Ok(Vec::new()) };
        let output = match record.keep != Keep::Activations && record.needs_gradient() {
            true => segment.forward(weights, &record.input, &mut no_probe),
            false => record.output,
        };
        let input = record.input;
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
    use crate::engine::turns::{Turn, Turns};
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
        let turns = Turns::new(&*model, recompute_every);
        let mut tape = Tape::new(model.input(&x, &t, &y));
        let (mut needed, mut trained) = (Vec::new(), Vec::new());
        for (index, segment) in model.segments().iter().enumerate() {
            tape.forward(&**segment, &buckets.0[index].weights, turns.keeps[index]);
            needed.push(tape.records[index + 1].output.state[0].requires_grad());
            trained.push(tape.records[index + 1].needs_gradient());
        }
        for (index, pair) in tape.records.windows(2).enumerate() {
            let nothing = match turns.keeps[index] {
                Keep::Activations => !trained[index],
                keep => keep == Keep::Nothing,
            };
            assert_eq!([pair[0].output.state.is_empty(), pair[1].input.state.is_empty()], [nothing; 2]);
        }
        let grad = tape.output().cos().detach();
        let mut backward = tape.into_backward(grad);
        let mut gradients = BTreeMap::new();
        for turn in turns.backward {
            let (segment, bucket) = (&model.segments()[turn.segment()], &buckets.0[turn.segment()]);
            match turn {
                Turn::Again(index) => backward.again(index, &**segment, &bucket.weights),
                Turn::Backward(_) => {
                    let trained = bucket.layout.entries.iter().filter(|entry| entry.spec.trainable);
                    let grads = backward.segment(&**segment, &bucket.weights, &bucket.trainable).unwrap();
                    gradients
                        .extend(trained.map(|entry| entry.name.clone()).zip(grads.into_iter().map(Option::unwrap)));
                }
            }
        }
        (gradients, needed)
    }

    #[test]
    fn frozen_parameters_cost_no_gradient_and_the_others_have_the_same_bits() {
        let (all, _) = gradients(&[], 0);
        let embedders = ["x_embedder.*", "t_embedder.*", "y_embedder.*"];
        for (frozen, needed) in [
            (vec!["blocks.0.*"], [true; 8]),
            (vec!["x_embedder.*"], [false, true, true, true, true, true, true, true]),
            (embedders.to_vec(), [false, true, true, true, true, true, true, true]),
            ([&embedders[..], &["blocks.0.*"]].concat(), [false, false, false, false, true, true, true, true]),
            ([&embedders[..], &["blocks.0.attn.*"]].concat(), [false, true, true, true, true, true, true, true]),
            (
                [&embedders[..], &["blocks.*", "final_layer.adaLN*"]].concat(),
                [false, false, false, false, false, false, false, true],
            ),
            (vec!["final_layer.*"], [true; 8]),
            (vec!["*"], [false; 8]),
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
