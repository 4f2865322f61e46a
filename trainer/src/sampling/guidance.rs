use super::{GuidedChannels, ModelTime};
use crate::model::{Model, WeightSet, no_probe};
use tch::Tensor;

/// Classifier-free guidance: output = uncond + scale·(cond − uncond) on the guided channels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Guidance {
    /// 1 is none.
    pub scale: f64,
    /// What it acts on; the learned variance stays that of the condition.
    pub channels: GuidedChannels,
    /// Noise levels, 0 (data) to 1 (noise), between which it acts, ends included; empty when both are equal. Outside,
    /// the model sees the condition only, which costs half as much.
    ///
    /// # Source
    /// Kynkäänniemi et al. 2024, "Applying Guidance in a Limited Interval".
    pub interval: [f64; 2],
}

impl Guidance {
    /// No guidance.
    pub const NONE: Guidance = Guidance { scale: 1.0, channels: GuidedChannels::All, interval: [0.0, 1.0] };

    /// Whether it acts anywhere.
    pub fn is_any(&self) -> bool {
        self.scale != 1.0 && self.interval[0] < self.interval[1]
    }

    /// Whether it acts at a noise level.
    fn acts_at(&self, level: f64) -> bool {
        let [low, high] = self.interval;
        self.is_any() && (low..=high).contains(&level)
    }

    /// The model's guided output.
    ///
    /// # Shapes
    /// `x` [N, C, H, W]; `labels` `[N]` → [N, C or 2C, H, W].
    pub fn output(
        &self,
        (model, weights): (&dyn Model, &WeightSet),
        x: &Tensor,
        time: &ModelTime,
        labels: &Tensor,
    ) -> Tensor {
        let acts = |(row, level): (usize, &f64)| self.acts_at(*level).then_some(row as i64);
        let rows: Vec<i64> = time.noise_levels.iter().enumerate().filter_map(acts).collect();
        let Some(null_label) = model.null_label().filter(|_| !rows.is_empty()) else {
            return weights.forward(model, x, &time.t, labels, &mut no_probe);
        };
        let n = x.size()[0];
        let guided = rows.len() as i64;
        let rows = (guided < n).then(|| Tensor::from_slice(&rows).to_device(x.device()));
        let chosen = |of: &Tensor| rows.as_ref().map_or_else(|| of.shallow_clone(), |rows| of.index_select(0, rows));
        let twice = |of: &Tensor| Tensor::cat(&[of, &chosen(of)], 0);
        let null = labels.narrow(0, 0, guided).full_like(null_label);
        let output =
            weights.forward(model, &twice(x), &twice(&time.t), &Tensor::cat(&[labels, &null], 0), &mut no_probe);
        let (cond, uncond) = (output.narrow(0, 0, n), output.narrow(0, n, guided));
        let mixed = mix(&chosen(&cond), &uncond, self.scale, guided_channels(self.channels, x.size()[1]));
        rows.map_or(mixed.shallow_clone(), |rows| cond.index_copy(0, &rows, &mixed))
    }
}

/// How many leading channels are guided.
fn guided_channels(channels: GuidedChannels, in_channels: i64) -> i64 {
    match channels {
        GuidedChannels::All => in_channels,
        GuidedChannels::FirstThree => in_channels.min(3),
    }
}

/// The conditional output with its first `guided` channels mixed.
fn mix(cond: &Tensor, uncond: &Tensor, scale: f64, guided: i64) -> Tensor {
    let (c, u) = (cond.narrow(1, 0, guided), uncond.narrow(1, 0, guided));
    let rest = cond.narrow(1, guided, cond.size()[1] - guided);
    Tensor::cat(&[&u + (c - &u) * scale, rest], 1)
}

/// The model's output under guidance in the official form: both halves get the mixed channels, everything else stays
/// as each half has it.
///
/// # Shapes
/// `x` [2N, C, H, W], of which the first half is used, twice; `t` `[2N]`; `labels` `[2N]`, conditions first, then null
/// labels. Returns [2N, C or 2C, H, W].
///
/// # Source
/// Ho & Salimans 2021; halves and channels as the official DiT's `forward_with_cfg`.
pub fn forward_with_cfg(
    model: &dyn Model,
    weights: &WeightSet,
    x: &Tensor,
    t: &Tensor,
    labels: &Tensor,
    scale: f64,
    channels: GuidedChannels,
) -> Tensor {
    let half = x.narrow(0, 0, x.size()[0] / 2);
    let output = weights.forward(model, &Tensor::cat(&[&half, &half], 0), t, labels, &mut no_probe);
    let guided = guided_channels(channels, x.size()[1]);
    let halves = output.chunk(2, 0);
    let (cond, uncond) = (&halves[0], &halves[1]);
    let mixed = mix(cond, uncond, scale, guided);
    let rest = uncond.narrow(1, guided, uncond.size()[1] - guided);
    let null = Tensor::cat(&[mixed.narrow(1, 0, guided), rest], 1);
    Tensor::cat(&[mixed, null], 0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::model::dit::{Dit, DitConfig};
    use tch::{Device, Kind};

    const N: i64 = 3;

    fn model() -> (Dit, WeightSet) {
        let config = DitConfig {
            input_size: 4,
            in_channels: 4,
            patch_size: 2,
            hidden_size: 16,
            depth: 1,
            num_heads: 2,
            mlp_ratio: 2.0,
            class_dropout_prob: 0.1,
            num_classes: 5,
            learn_sigma: true,
            conditioning: Default::default(),
            numerics: Default::default(),
        };
        let model = Dit::new(config).unwrap();
        let draw = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu)) * 0.1;
        let tensors = model.named_params().into_iter().map(|(name, spec)| (name, draw(&spec.shape)));
        let weights = WeightSet::from_named(&model, tensors.collect()).unwrap();
        (model, weights)
    }

    /// The guided output of rows at these noise levels, the plain one and the official guided one.
    fn outputs(guidance: Guidance, levels: [f64; 3]) -> [Tensor; 3] {
        tch::manual_seed(1);
        let _no_grad = tch::no_grad_guard();
        let (model, weights) = model();
        let x = Tensor::randn([N, 4, 4, 4], (Kind::Float, Device::Cpu));
        let t = Tensor::from_slice(&[900f32, 500.0, 10.0]);
        let y = Tensor::from_slice(&[0i64, 3, 4]);
        let both = |of: &Tensor| Tensor::cat(&[of, of], 0);
        let labels = Tensor::cat(&[&y, &y.full_like(5)], 0);
        let official =
            forward_with_cfg(&model, &weights, &both(&x), &both(&t), &labels, guidance.scale, guidance.channels);
        let plain = weights.forward(&model, &x, &t, &y, &mut no_probe);
        let time = ModelTime { t, noise_levels: levels.to_vec() };
        [guidance.output((&model, &weights), &x, &time, &y), plain, official.narrow(0, 0, N)]
    }

    fn difference(a: &Tensor, b: &Tensor) -> f64 {
        (a - b).abs().max().double_value(&[])
    }

    #[test]
    fn over_all_noise_levels_it_is_plain_guidance() {
        for channels in [GuidedChannels::All, GuidedChannels::FirstThree] {
            let guidance = Guidance { scale: 4.0, channels, interval: [0.0, 1.0] };
            let [found, plain, official] = outputs(guidance, [1.0, 0.5, 0.0]);
            assert!(found.equal(&official) && difference(&found, &plain) > 1e-3);
        }
    }

    #[test]
    fn an_empty_interval_is_no_guidance() {
        for interval in [[0.5, 0.5], [0.0, 0.0], [1.0, 1.0]] {
            let [found, plain, _] = outputs(Guidance { scale: 4.0, interval, ..Guidance::NONE }, [1.0, 0.5, 0.0]);
            assert!(found.equal(&plain), "{interval:?}");
        }
        let [found, plain, _] = outputs(Guidance::NONE, [1.0, 0.5, 0.0]);
        assert!(found.equal(&plain));
    }

    #[test]
    fn only_rows_inside_the_interval_are_guided() {
        let guidance = Guidance { scale: 4.0, channels: GuidedChannels::FirstThree, interval: [0.4, 0.6] };
        let [found, plain, official] = outputs(guidance, [1.0, 0.5, 0.0]);
        for (row, expected) in [(0, &plain), (1, &official), (2, &plain)] {
            // A batch of another size may be rounded in another way.
            let scale = expected.abs().max().double_value(&[]);
            assert!(difference(&found.get(row), &expected.get(row)) < 1e-5 * scale, "row {row}");
        }
        assert!(difference(&found.get(1), &plain.get(1)) > 1e-3);
    }
}
