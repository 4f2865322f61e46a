//! What can be said about the way in which samples are drawn, and what of it fits together.

use crate::diffusion::Process;
use crate::sampling::{DiffusionForm, Guidance, GuidedChannels, LastStep, SamplerKind, SamplerOptions};
use anyhow::{Result, bail};

/// The sampler with its settings, and guidance.
#[derive(clap::Args)]
pub struct SamplerArgs {
    /// For a Gaussian diffusion: ddpm (default), ddim, dpm-solver++. For a flow: heun (default), euler, midpoint,
    /// heun3, rk4, dopri5, euler-maruyama, stochastic-heun.
    #[arg(long, value_name = "NAME", value_parser = sampler)]
    sampler: Option<SamplerKind>,
    /// Steps [default: 250 for ddpm, euler and euler-maruyama, 125 for methods with two evaluations of the model a step,
    /// 80 for heun3, 60 for rk4, 50 for ddim, 25 for dpm-solver++].
    #[arg(long)]
    steps: Option<usize>,
    /// Classifier-free guidance scale; 1 is none.
    #[arg(long, default_value_t = 1.5)]
    cfg_scale: f64,
    /// Output channels that guidance acts on: all, or the first three as in the official code.
    #[arg(long, value_enum, default_value_t = Channels::All)]
    cfg_channels: Channels,
    /// Noise levels between which guidance acts, from 0 (data) to 1 (noise), ends included; two equal ones mean nowhere.
    /// Outside, sampling costs half as much.
    #[arg(long, value_name = "LO,HI", value_delimiter = ',', default_values_t = [0.0, 1.0])]
    cfg_interval: Vec<f64>,
    /// ddim: share of the ancestral noise, 0 (deterministic) to 1.
    #[arg(long)]
    eta: Option<f64>,
    /// ddpm, ddim, dpm-solver++: clamp the predicted clean latent to −1..1. Latents are not bounded; pixels are.
    #[arg(long)]
    clip_denoised: bool,
    /// dopri5: error per step that is allowed whatever the size of the state [default: 1e-6].
    #[arg(long)]
    atol: Option<f64>,
    /// dopri5: error per step that is allowed relative to the state [default: 1e-3].
    #[arg(long)]
    rtol: Option<f64>,
    /// Stochastic samplers: the diffusion coefficient, sigma (default), linear, constant, decreasing or
    /// increasing-decreasing.
    #[arg(long, value_name = "FORM")]
    sde_diffusion: Option<DiffusionForm>,
    /// Stochastic samplers: what the diffusion coefficient is multiplied by [default: 1].
    #[arg(long)]
    sde_norm: Option<f64>,
    /// Stochastic samplers: mean (default), tweedie, euler or none.
    #[arg(long, value_name = "KIND")]
    sde_last_step: Option<LastStep>,
    /// Stochastic samplers: length of the last step, of a path of length 1 [default: 0.04].
    #[arg(long)]
    sde_last_step_size: Option<f64>,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Channels {
    All,
    FirstThree,
}

fn sampler(name: &str) -> Result<SamplerKind, String> {
    let names = || SamplerKind::all().map(SamplerKind::name).collect::<Vec<_>>().join(", ");
    SamplerKind::by_name(name).ok_or_else(|| format!("use one of {}", names()))
}

impl SamplerArgs {
    /// The sampler for a process; what is not given takes its default.
    ///
    /// # Errors
    /// A value out of range, or an option that means nothing to the sampler.
    pub fn sampler(&self, process: &Process) -> Result<SamplerOptions> {
        let kind = self.sampler.unwrap_or(SamplerKind::default_for(matches!(process, Process::Flow)));
        self.check_meaning(kind)?;
        let positive = |name: &str, value: f64| match value.is_finite() && value > 0.0 {
            true => Ok(value),
            false => bail!("--{name} {value} is not a number above 0"),
        };
        let default = SamplerOptions::new(kind, self.steps.unwrap_or(kind.default_steps()));
        let eta = self.eta.unwrap_or(default.eta);
        if !(0.0..=1.0).contains(&eta) {
            bail!("--eta {eta} is not between 0 and 1");
        }
        let sde_last_step_size = self.sde_last_step_size.unwrap_or(default.sde_last_step_size);
        if !(sde_last_step_size > 0.0 && sde_last_step_size < 1.0) {
            bail!("--sde-last-step-size {sde_last_step_size} is not between 0 and 1");
        }
        Ok(SamplerOptions {
            eta,
            sde_last_step_size,
            clip_denoised: self.clip_denoised,
            atol: positive("atol", self.atol.unwrap_or(default.atol))?,
            rtol: positive("rtol", self.rtol.unwrap_or(default.rtol))?,
            sde_diffusion: self.sde_diffusion.unwrap_or(default.sde_diffusion),
            sde_norm: positive("sde-norm", self.sde_norm.unwrap_or(default.sde_norm))?,
            sde_last_step: self.sde_last_step.unwrap_or(default.sde_last_step),
            ..default
        })
    }

    /// Guidance as asked for.
    ///
    /// # Errors
    /// A value out of range.
    pub fn guidance(&self) -> Result<Guidance> {
        if !(self.cfg_scale.is_finite() && self.cfg_scale >= 0.0) {
            bail!("--cfg-scale {} is not a number of at least 0", self.cfg_scale);
        }
        let interval = match self.cfg_interval[..] {
            [low, high] if 0.0 <= low && low <= high && high <= 1.0 => [low, high],
            _ => bail!("--cfg-interval {:?} is not LO,HI with 0 ≤ LO ≤ HI ≤ 1", self.cfg_interval),
        };
        let channels = match self.cfg_channels {
            Channels::All => GuidedChannels::All,
            Channels::FirstThree => GuidedChannels::FirstThree,
        };
        Ok(Guidance { scale: self.cfg_scale, channels, interval })
    }

    fn check_meaning(&self, kind: SamplerKind) -> Result<()> {
        let is_stochastic = matches!(kind, SamplerKind::EulerMaruyama | SamplerKind::StochasticHeun);
        let is_adaptive = kind == SamplerKind::Dopri5;
        let given = [
            ("steps", self.steps.is_some(), !is_adaptive),
            ("eta", self.eta.is_some(), kind == SamplerKind::Ddim),
            ("clip-denoised", self.clip_denoised, !kind.is_for_flow()),
            ("atol", self.atol.is_some(), is_adaptive),
            ("rtol", self.rtol.is_some(), is_adaptive),
            ("sde-diffusion", self.sde_diffusion.is_some(), is_stochastic),
            ("sde-norm", self.sde_norm.is_some(), is_stochastic),
            ("sde-last-step", self.sde_last_step.is_some(), is_stochastic),
            ("sde-last-step-size", self.sde_last_step_size.is_some(), is_stochastic),
        ];
        match given.iter().find(|(_, is_given, has_meaning)| *is_given && !has_meaning) {
            Some((name, ..)) => bail!("--{name} means nothing to the sampler {kind}; leave it out"),
            None => Ok(()),
        }
    }
}
