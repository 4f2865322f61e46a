use data_loader::draws::{Key, Purpose, fill_normal};
use tch::Tensor;

/// Where between data and noise each sample of a micro-batch is.
#[derive(Clone, Debug, PartialEq)]
pub enum Time {
    /// Indices into the tables of a diffusion in discrete time; 0 is nearly clean.
    Steps(Vec<usize>),
    /// Points of a path in continuous time, 0 (noise) to 1 (data).
    Continuous(Vec<f32>),
}

impl Time {
    /// The indices of a diffusion in discrete time.
    ///
    /// # Panics
    /// For continuous time: an objective was given what another one has noised, a mistake in the caller.
    pub fn steps(&self) -> &[usize] {
        match self {
            Time::Steps(steps) => steps,
            Time::Continuous(_) => panic!("an objective in discrete time was given continuous time"),
        }
    }

    /// The points of a path in continuous time.
    ///
    /// # Panics
    /// For discrete time, as [`Time::steps`].
    pub fn points(&self) -> &[f32] {
        match self {
            Time::Continuous(points) => points,
            Time::Steps(_) => panic!("an objective in continuous time was given discrete time"),
        }
    }
}

/// A micro-batch with noise on it: what the model is given and what the loss needs.
pub struct Noised {
    /// Clean latents [N, C, H, W].
    pub x_start: Tensor,
    /// Noised latents.
    pub x_t: Tensor,
    /// The noise.
    pub noise: Tensor,
    /// Where each sample is.
    pub t: Time,
    /// What the model reads as time, `[N]` float32.
    pub model_t: Tensor,
}

impl Noised {
    /// x_start − noise: the velocity of the straight path from noise to data.
    pub fn velocity(&self) -> Tensor {
        &self.x_start - &self.noise
    }
}

/// One term of a loss.
pub struct LossPart {
    /// What logs call it.
    pub name: &'static str,
    /// Its value for every sample, `[N]`, before weighting.
    pub values: Tensor,
    /// What each sample's value is multiplied by in the loss, `[N]`; 1 if `None`.
    pub weights: Option<Tensor>,
}

impl LossPart {
    /// A part that enters the loss as it is.
    pub fn new(name: &'static str, values: Tensor) -> Self {
        Self { name, values, weights: None }
    }

    fn weighted(&self) -> Tensor {
        match &self.weights {
            Some(weights) => weights * &self.values,
            None => self.values.shallow_clone(),
        }
    }
}

/// The loss of every sample: the weighted sum of its parts.
pub struct SampleLosses {
    first: LossPart,
    rest: Vec<LossPart>,
}

impl SampleLosses {
    /// A loss of these parts.
    pub fn new(first: LossPart, rest: impl IntoIterator<Item = LossPart>) -> Self {
        Self { first, rest: rest.into_iter().collect() }
    }

    /// The parts.
    pub fn parts(&self) -> impl Iterator<Item = &LossPart> {
        std::iter::once(&self.first).chain(&self.rest)
    }

    /// The loss of every sample, `[N]`.
    pub fn total(&self) -> Tensor {
        self.sum(|part| part.weighted())
    }

    /// The means over the micro-batch.
    pub fn mean(&self) -> LossTerms {
        let mean = |part: &LossPart| (part.name, part.values.detach().mean(None));
        LossTerms { total: self.sum(|part| part.weighted().mean(None)), parts: self.parts().map(mean).collect() }
    }

    fn sum(&self, of: impl Fn(&LossPart) -> Tensor) -> Tensor {
        self.rest.iter().fold(of(&self.first), |sum, part| sum + of(part))
    }
}

/// A loss with its parts.
pub struct LossTerms {
    /// What is differentiated: the mean over the micro-batch, a scalar.
    pub total: Tensor,
    /// Named parts of it for the log: means before weighting, scalars, detached.
    pub parts: Vec<(&'static str, Tensor)>,
}

/// What a model is trained to do: how inputs are noised and how an output is judged.
pub trait Objective: Send + Sync {
    /// Draws the times of so many samples with `key`, as training does.
    fn draw_times(&self, samples: usize, key: Key) -> Time;

    /// The times at given shares of the way from data to noise: 0 ≤ share < 1, equally spaced ones are equally
    /// spaced times.
    fn times_at(&self, shares: &[f64]) -> Time;

    /// Mixes data and noise at time `t`.
    ///
    /// # Shapes
    /// `x_start`, `noise` [N, C, H, W]; N times.
    fn noised(&self, x_start: Tensor, t: Time, noise: Tensor) -> Noised;

    /// Judges the model's output for every sample of `noised`.
    ///
    /// # Shapes
    /// `output` [N, C or 2C, H, W].
    fn losses(&self, output: &Tensor, noised: &Noised) -> SampleLosses;

    /// Draws time and noise for the micro-batch of (seed, step, lane) and applies them.
    ///
    /// # Shapes
    /// `x_start` [N, C, H, W].
    fn noise(&self, x_start: Tensor, seed: u64, step: u64, lane: usize) -> Noised {
        let key = |purpose| Key::new(seed, purpose, step).lane(lane);
        let t = self.draw_times(x_start.size()[0] as usize, key(Purpose::Timestep));
        let mut noise = vec![0f32; x_start.numel()];
        fill_normal(key(Purpose::Noise), &mut noise);
        let noise = Tensor::from_slice(&noise).view_as(&x_start).to_device(x_start.device());
        self.noised(x_start, t, noise)
    }

    /// Judges the model's output for `noised` as a whole.
    fn loss(&self, output: &Tensor, noised: &Noised) -> LossTerms {
        self.losses(output, noised).mean()
    }
}
