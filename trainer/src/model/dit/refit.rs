//! The weights of one DiT made to fit another with other classes, another size of image or without the variance. What
//! differs is changed only where `[init]` asks for it.

use super::DitConfig;
use crate::model::{ParamSpec, sin_cos_2d_at};
use configs::{Adapt, InitClasses, InitConfig, InitPositions};
use tch::Tensor;

/// Two models and what may be changed between them.
pub struct Refit<'a> {
    /// The model that the weights are of, where the source tells.
    pub from: Option<&'a DitConfig>,
    /// The model that they are for.
    pub to: &'a DitConfig,
    /// What is asked for.
    pub how: &'a InitConfig,
}

/// A parameter that is not as the source has it.
#[derive(Debug)]
pub struct Change {
    /// What was done, for the log.
    pub note: String,
    /// Part of it has its first values and must be trained.
    pub untrained: bool,
}

type Refitted = Result<(Tensor, Option<Change>), String>;

impl Refit<'_> {
    /// The dimensions in which the models differ and which nothing bridges.
    pub fn contradictions(&self) -> Vec<String> {
        let Some(from) = self.from else { return Vec::new() };
        let to = self.to;
        let dimensions = [
            ("patch_size", from.patch_size.to_string(), to.patch_size.to_string()),
            ("in_channels", from.in_channels.to_string(), to.in_channels.to_string()),
            ("hidden_size", from.hidden_size.to_string(), to.hidden_size.to_string()),
            ("depth", from.depth.to_string(), to.depth.to_string()),
            ("num_heads", from.num_heads.to_string(), to.num_heads.to_string()),
            ("mlp_ratio", from.mlp_ratio.to_string(), to.mlp_ratio.to_string()),
            ("conditioning", format!("{:?}", from.conditioning), format!("{:?}", to.conditioning)),
        ];
        let differing = dimensions.into_iter().filter(|(_, from, to)| from != to);
        differing.map(|(key, from, to)| format!("`model.{key}` is {to}, but {from} in the source")).collect()
    }

    /// What the source was trained with and the model does not compute with.
    pub fn remarks(&self) -> Vec<String> {
        let differing = self.from.filter(|from| from.numerics != self.to.numerics);
        let remark = |from: &DitConfig| {
            let (from, to) = (from.numerics, self.to.numerics);
            format!(
                "the source was trained with {from:?} and this run computes with {to:?} (`model.numerics`): its first \
                 outputs are off"
            )
        };
        differing.map(remark).into_iter().collect()
    }

    /// Parameter `name`, declared as `spec`, from the source's tensor of that name; `fresh` gives its first values.
    ///
    /// # Errors
    /// What differs and what to do about it.
    pub fn parameter(&self, name: &str, tensor: Tensor, spec: &ParamSpec, fresh: &dyn Fn() -> Tensor) -> Refitted {
        let found = tensor.size();
        let same_but = |dimension: usize| {
            let others = |shape: &[i64]| {
                let kept = shape.iter().enumerate().filter(|(index, _)| *index != dimension);
                kept.map(|(_, side)| *side).collect::<Vec<_>>()
            };
            found.len() == spec.shape.len() && others(&found) == others(&spec.shape)
        };
        match name {
            "y_embedder.embedding_table.weight" if same_but(0) => self.labels(tensor, fresh),
            _ if found == spec.shape => Ok((tensor, None)),
            "pos_embed" if same_but(1) => self.positions(tensor),
            "final_layer.linear.weight" | "final_layer.linear.bias" if same_but(0) => self.outputs(tensor, fresh),
            _ => Err(format!("has shape {found:?}; expected {:?}", spec.shape)),
        }
    }

    /// Rows of classes and the null row behind them.
    fn labels(&self, source: Tensor, fresh: &dyn Fn() -> Tensor) -> Refitted {
        let rows = source.size()[0];
        let (classes, had_null) = match self.from {
            Some(from) => (from.num_classes, from.label_rows() > from.num_classes),
            // A source that says nothing: as many classes as here, else the official code's extra row.
            None if rows == self.to.num_classes => (rows, false),
            None => (rows - 1, true),
        };
        if classes + i64::from(had_null) != rows {
            return Err(format!("has {rows} rows, but the source's config says {classes} classes"));
        }
        let (wanted, has_null) = (self.to.num_classes, self.to.label_rows() > self.to.num_classes);
        if self.how.classes == InitClasses::New {
            let table = fresh();
            let mut note = format!("{wanted} new rows of classes in place of the source's {classes}");
            if had_null && has_null {
                table.narrow(0, wanted, 1).copy_(&source.narrow(0, classes, 1));
                note += ", its row of the null class kept";
            }
            return Ok((table, Some(Change { note, untrained: true })));
        }
        if classes != wanted {
            return Err(format!(
                "has rows of {classes} classes; expected {wanted} (`model.num_classes`); set init.classes = \"new\" for a \
                 new label table"
            ));
        }
        if had_null == has_null {
            return Ok((source, None));
        }
        let (which, remedy) = match has_null {
            true => ("has no row of the null class", "model.class_dropout_prob = 0"),
            false => ("has a row of the null class, which this model has not", "model.class_dropout_prob above 0"),
        };
        if self.how.null_class == Adapt::Keep {
            return Err(format!("{which}; set init.null_class = \"adapt\", or {remedy}"));
        }
        let of_classes = source.narrow(0, 0, classes);
        let (table, note) = match has_null {
            true => (Tensor::cat(&[of_classes, fresh().narrow(0, classes, 1)], 0), "a new row of the null class"),
            false => (of_classes, "without the source's row of the null class"),
        };
        Ok((table, Some(Change { note: note.to_owned(), untrained: has_null })))
    }

    /// The position table of another grid, computed anew.
    fn positions(&self, source: Tensor) -> Refitted {
        let (old_tokens, new) = (source.size()[1], self.to.grid());
        let old = (old_tokens as f64).sqrt().round() as i64;
        if old * old != old_tokens {
            return Err(format!("has {old_tokens} positions, which are no square"));
        }
        let (spacing, asked) = match self.how.positions {
            None => {
                return Err(format!(
                    "is for {old}×{old} tokens, but this model has {new}×{new}; set init.positions = \"interpolate\" \
                     (the new grid covers what the old one did) or \"extend\" (tokens keep their distance)"
                ));
            }
            Some(InitPositions::Interpolate) => (old as f64 / new as f64, "interpolated"),
            Some(InitPositions::Extend) => (1.0, "extended"),
        };
        let table: Vec<f32> =
            sin_cos_2d_at(self.to.hidden_size, new, spacing).into_iter().map(|value| value as f32).collect();
        let note = format!("{asked} from {old}×{old} to {new}×{new} tokens");
        let table = Tensor::from_slice(&table).view([1, new * new, self.to.hidden_size]);
        Ok((table, Some(Change { note, untrained: false })))
    }

    /// The last layer's rows [p·p, channels] with or without the channels of the variance.
    fn outputs(&self, source: Tensor, fresh: &dyn Fn() -> Tensor) -> Refitted {
        let (found, channels) = (source.size(), self.to.in_channels);
        let patch = self.to.patch_size * self.to.patch_size;
        let had_sigma = found[0] == 2 * channels * patch;
        if !had_sigma && found[0] != channels * patch {
            return Err(format!("has shape {found:?}; expected {} rows", self.to.patch_outputs()));
        }
        let which = match self.to.learn_sigma {
            true => "has no channels of the variance, which this model has (`model.learn_sigma`)",
            false => "has channels of the variance, which this model has not (`model.learn_sigma`)",
        };
        if self.how.learn_sigma == Adapt::Keep {
            return Err(format!("{which}; set init.learn_sigma = \"adapt\", or give both the same"));
        }
        // [p·p, C or 2C, the rest].
        let by_channel = |tensor: &Tensor| tensor.reshape([patch, tensor.size()[0] / patch, -1]);
        let kept = by_channel(&source).narrow(1, 0, channels);
        let (joined, note) = match self.to.learn_sigma {
            true => {
                let variance = by_channel(&fresh()).narrow(1, channels, channels);
                (Tensor::cat(&[kept, variance], 1), "new channels of the variance")
            }
            false => (kept, "without the source's channels of the variance"),
        };
        let shape: Vec<i64> = std::iter::once(self.to.patch_outputs()).chain(found[1..].iter().copied()).collect();
        let change = Change { note: note.to_owned(), untrained: self.to.learn_sigma };
        Ok((joined.reshape(shape.as_slice()), Some(change)))
    }
}

#[cfg(test)]
#[path = "refit_tests.rs"]
mod tests;
