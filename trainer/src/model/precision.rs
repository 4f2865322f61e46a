//! Large products in bfloat16.

use super::derived::{Derived, SharedSegment};
use super::{Flow, Model, ParamSpec, Probe, Segment, Weights};
use configs::Precision;
use std::sync::Arc;
use tch::Kind;

/// `model`, whose attention and MLP compute in `precision`: their inputs and weights are rounded to it, and gradients of weights
/// come back as float32. Everything else (residual stream, norms, modulation, embedders, final layer) stays in float32.
pub fn in_precision(model: Arc<dyn Model>, precision: Precision) -> Arc<dyn Model> {
    let kind = match precision {
        Precision::Fp32 => return model,
        Precision::Bf16 => Kind::BFloat16,
    };
    Arc::new(Derived::new(model, |segment| Box::new(Rounded { segment, kind })))
}

struct Rounded {
    segment: SharedSegment,
    kind: Kind,
}

impl Segment for Rounded {
    fn prefix(&self) -> &str {
        self.segment.prefix()
    }

    fn params(&self) -> Vec<ParamSpec> {
        self.segment.params()
    }

    fn forward(&self, weights: &Weights, input: &Flow, probe: Probe) -> Flow {
        let weights = Weights { kind: self.kind, ..weights.with([]) };
        self.segment.forward(&weights, input, probe)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::bucket::Buckets;
    use crate::engine::mesh::Mesh;
    use crate::engine::tape::Tape;
    use crate::engine::turns::{Turn, Turns};
    use crate::model::dit::{Conditioning, Dit};
    use crate::model::testing::tiny_dit;
    use std::collections::HashMap;
    use tch::{Device, Tensor};

    /// Output and all gradients of one pass over weights without zeros, by segment and place.
    fn pass(model: &dyn Model) -> Vec<Tensor> {
        let value = |(name, spec): (String, ParamSpec)| {
            let init = crate::model::Init::Normal { std: 0.1 };
            let values = crate::model::initial_values(3, &name, &init, spec.numel());
            (name, Tensor::from_slice(&values).view(spec.shape.as_slice()))
        };
        let given: HashMap<String, Tensor> = model.named_params().into_iter().map(value).collect();
        let buckets = Buckets::initialise(model, &Mesh::alone(1).unwrap(), 0, 0, &given, Device::Cpu).unwrap();
        let x = Tensor::arange(2 * 4 * 64, (Kind::Float, Device::Cpu)).sin().view([2, 4, 8, 8]);
        let (t, y) = (Tensor::from_slice(&[3f32, 700.0]), Tensor::from_slice(&[1i64, 7]));
        let turns = Turns::new(model, 2);
        let mut tape = Tape::new(model.input(&x, &t, &y));
        for (index, segment) in model.segments().iter().enumerate() {
            tape.forward(&**segment, &buckets.0[index].weights, turns.keeps[index]);
        }
        let output = tape.output();
        let mut all = vec![output.detach()];
        let mut backward = tape.into_backward(output.cos().detach());
        for turn in turns.backward {
            let (segment, bucket) = (&*model.segments()[turn.segment()], &buckets.0[turn.segment()]);
            match turn {
                Turn::Again(index) => backward.again(index, segment, &bucket.weights),
                Turn::Backward(_) => {
                    let grads = backward.segment(segment, &bucket.weights, &bucket.trainable).unwrap();
                    all.extend(grads.into_iter().map(Option::unwrap));
                }
            }
        }
        all
    }

    #[test]
    fn bf16_is_near_float32_in_every_design_and_leaves_float32_gradients() {
        for conditioning in
            [Conditioning::AdaLnZero, Conditioning::AdaLn, Conditioning::CrossAttention, Conditioning::InContext]
        {
            let config = crate::model::dit::DitConfig { conditioning, ..tiny_dit().config().clone() };
            let model: Arc<dyn Model> = Arc::new(Dit::new(config).unwrap());
            let exact = pass(&*model);
            let rounded = pass(&*in_precision(model.clone(), Precision::Bf16));
            assert!(rounded.iter().all(|tensor| tensor.kind() == Kind::Float));
            assert!(exact.iter().zip(&rounded).any(|(a, b)| !a.equal(b)), "{conditioning:?} computes in bf16");
            for (index, (a, b)) in exact.iter().zip(&rounded).enumerate() {
                let error = ((a - b).norm() / a.norm()).double_value(&[]);
                assert!(error < 0.03, "{conditioning:?}, tensor {index}: {error}");
            }
            assert!(pass(&*in_precision(model, Precision::Fp32)).iter().zip(&exact).all(|(a, b)| a.equal(b)));
        }
    }
}
