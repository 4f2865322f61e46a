//! One micro-batch forward and backward as the engine does it: segment by segment, through its tape.

use crate::bundle::{BundleError, Result};
use tch::{Device, Kind, Tensor};
use trainer::engine::bucket::{Buckets, view_of};
use trainer::engine::gradients::flat;
use trainer::engine::tape::Tape;
use trainer::engine::turns::Keep;
use trainer::ffi;
use trainer::model::Model;

/// A scalar loss of the model's output.
pub type LossOf<'a> = &'a dyn Fn(&Tensor) -> Tensor;

/// A model with its weights (of a lone rank with one lane) and one micro-batch.
pub struct Pass<'a> {
    /// The model.
    pub model: &'a dyn Model,
    /// Its weights.
    pub buckets: &'a Buckets,
    /// x_t, t and labels as [`Model::input`] takes them.
    pub input: [&'a Tensor; 3],
}

impl Pass<'_> {
    /// The forward pass.
    pub fn forward(&self) -> Tape {
        let [x_t, t, labels] = self.input;
        let mut tape = Tape::new(self.model.input(x_t, t, labels));
        for (segment, bucket) in self.model.segments().iter().zip(&self.buckets.0) {
            tape.forward(&**segment, &bucket.weights, Keep::Activations);
        }
        tape
    }

    /// Gradients of `loss(output)` by parameter name, as a rank with one lane has them before the update.
    ///
    /// # Errors
    /// What autograd reports.
    pub fn gradients(&self, loss: LossOf) -> Result<Vec<(String, Tensor)>> {
        let torch = |error: ffi::TorchError| BundleError::Run(error.to_string());
        let tape = self.forward();
        let output = tape.output();
        let output_grad = ffi::grad_of_scalar(&loss(&output), &output).map_err(torch)?;
        let mut backward = tape.into_backward(output_grad);
        let mut gradients = Vec::new();
        for (segment, bucket) in self.model.segments().iter().zip(&self.buckets.0).rev() {
            let of_segment = backward.segment(&**segment, &bucket.weights, &bucket.trainable).map_err(torch)?;
            let flat = flat(&bucket.layout, of_segment, Device::Cpu);
            let trainable = bucket.layout.entries.iter().filter(|entry| entry.spec.trainable);
            let gradient = |entry| view_of(&flat, entry).to_kind(Kind::Float).copy();
            gradients.extend(trainable.map(|entry| (entry.name.clone(), gradient(entry))));
        }
        Ok(gradients)
    }
}
