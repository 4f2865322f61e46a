//! A model whose segments are another model's, each seen through a wrapper.

use super::{Flow, Model, Segment};
use std::ops::Deref;
use std::sync::Arc;
use tch::Tensor;

/// One segment of a shared model.
pub(super) struct SharedSegment {
    model: Arc<dyn Model>,
    index: usize,
}

impl Deref for SharedSegment {
    type Target = dyn Segment;

    fn deref(&self) -> &Self::Target {
        &*self.model.segments()[self.index]
    }
}

/// A model with wrapped segments; everything else is the base model's.
pub(super) struct Derived {
    base: Arc<dyn Model>,
    segments: Vec<Box<dyn Segment>>,
}

impl Derived {
    pub(super) fn new(base: Arc<dyn Model>, wrap: impl Fn(SharedSegment) -> Box<dyn Segment>) -> Self {
        let shared = |index| SharedSegment { model: base.clone(), index };
        let segments = (0..base.segments().len()).map(|index| wrap(shared(index))).collect();
        Self { base, segments }
    }
}

impl Model for Derived {
    fn segments(&self) -> &[Box<dyn Segment>] {
        &self.segments
    }

    fn input(&self, x_t: &Tensor, t: &Tensor, labels: &Tensor) -> Flow {
        self.base.input(x_t, t, labels)
    }

    fn latent_shape(&self) -> &[i64] {
        self.base.latent_shape()
    }

    fn null_label(&self) -> Option<i64> {
        self.base.null_label()
    }

    fn label_dropout(&self) -> f64 {
        self.base.label_dropout()
    }

    fn learn_sigma(&self) -> bool {
        self.base.learn_sigma()
    }

    fn macs_per_sample(&self) -> u64 {
        self.base.macs_per_sample()
    }
}
