use super::{
    Chain, Ddim, Ddpm, DiffusionForm, Dopri5, DpmSolver, LastStep, RungeKutta, Sampler, SamplerKind, StochasticFlow,
    StochasticMethod, Tableau,
};
use crate::diffusion::{Prediction, Process, Respacing, RespacingError};

/// A sampler with all its settings; those of other samplers are not looked at.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplerOptions {
    /// Which one.
    pub kind: SamplerKind,
    /// Steps; not used by dopri5.
    pub steps: usize,
    /// See [`Chain::clip_denoised`].
    pub clip_denoised: bool,
    /// See [`Ddim::eta`].
    pub eta: f64,
    /// See [`Dopri5::atol`].
    pub atol: f64,
    /// See [`Dopri5::rtol`].
    pub rtol: f64,
    /// See [`StochasticFlow::diffusion`].
    pub sde_diffusion: DiffusionForm,
    /// See [`StochasticFlow::norm`].
    pub sde_norm: f64,
    /// See [`StochasticFlow::last_step`].
    pub sde_last_step: LastStep,
    /// See [`StochasticFlow::last_step_size`].
    pub sde_last_step_size: f64,
}

impl SamplerOptions {
    /// The defaults of a sampler: those of the official code.
    pub fn new(kind: SamplerKind, steps: usize) -> Self {
        Self {
            kind,
            steps,
            clip_denoised: false,
            eta: 0.0,
            atol: 1e-6,
            rtol: 1e-3,
            sde_diffusion: DiffusionForm::Sigma,
            sde_norm: 1.0,
            sde_last_step: LastStep::Mean,
            sde_last_step_size: 0.04,
        }
    }

    /// The sampler for a model that was trained to reverse `process`.
    ///
    /// # Errors
    /// A sampler or settings that do not fit the process.
    pub fn build(&self, process: &Process) -> Result<Box<dyn Sampler>, SamplingError> {
        let (kind, steps) = (self.kind, self.steps);
        let is_flow = matches!(process, Process::Flow);
        if kind.is_for_flow() != is_flow {
            return Err(SamplingError::misfit(kind, is_flow));
        }
        let ode = |tableau: &'static Tableau| -> Result<Box<dyn Sampler>, SamplingError> {
            self.check_steps(1)?;
            Ok(Box::new(RungeKutta { tableau, steps }))
        };
        match kind {
            SamplerKind::Ddpm => Ok(Box::new(Ddpm { chain: self.respaced(process)? })),
            SamplerKind::Ddim => Ok(Box::new(Ddim { chain: self.respaced(process)?, eta: self.eta })),
            SamplerKind::DpmSolver => {
                let (betas, prediction) = self.gaussian(process)?;
                Ok(Box::new(DpmSolver::new(betas, steps, prediction, self.clip_denoised)?))
            }
            SamplerKind::Euler => ode(&Tableau::EULER),
            SamplerKind::Midpoint => ode(&Tableau::MIDPOINT),
            SamplerKind::Heun => ode(&Tableau::HEUN2),
            SamplerKind::Heun3 => ode(&Tableau::HEUN3),
            SamplerKind::Rk4 => ode(&Tableau::RK4),
            SamplerKind::Dopri5 => Ok(Box::new(Dopri5 { atol: self.atol, rtol: self.rtol })),
            SamplerKind::EulerMaruyama => self.stochastic(StochasticMethod::EulerMaruyama),
            SamplerKind::StochasticHeun => self.stochastic(StochasticMethod::Heun),
        }
    }

    /// `steps` counts the last step of a stochastic sampler, so that it is the number of model evaluations of
    /// Euler–Maruyama, as in SiT.
    fn stochastic(&self, method: StochasticMethod) -> Result<Box<dyn Sampler>, SamplingError> {
        let last_steps = usize::from(self.sde_last_step != LastStep::None);
        self.check_steps(1 + last_steps)?;
        if method == StochasticMethod::Heun && self.sde_last_step == LastStep::None {
            return Err(SamplingError::NoLastStep);
        }
        Ok(Box::new(StochasticFlow {
            method,
            diffusion: self.sde_diffusion,
            norm: self.sde_norm,
            steps: self.steps - last_steps,
            last_step: self.sde_last_step,
            last_step_size: self.sde_last_step_size,
        }))
    }

    fn check_steps(&self, least: usize) -> Result<(), SamplingError> {
        let (sampler, steps) = (self.kind, self.steps);
        if steps < least { Err(SamplingError::TooFewSteps { sampler, steps, least }) } else { Ok(()) }
    }

    fn gaussian<'a>(&self, process: &'a Process) -> Result<(&'a [f64], Prediction), SamplingError> {
        match process {
            Process::Gaussian { betas, prediction } => {
                let is_zero_snr = betas.iter().any(|&beta| beta >= 1.0);
                if is_zero_snr && *prediction == Prediction::Eps {
                    return Err(SamplingError::ZeroSnr);
                }
                Ok((betas, *prediction))
            }
            Process::Flow => Err(SamplingError::misfit(self.kind, true)),
        }
    }

    fn respaced(&self, process: &Process) -> Result<Chain, SamplingError> {
        let (betas, prediction) = self.gaussian(process)?;
        let kept = Respacing::Sections(vec![self.steps]).kept(betas.len())?;
        Ok(Chain::new(betas, &kept, prediction, self.clip_denoised))
    }
}

/// Samples that cannot be drawn.
#[derive(Debug, thiserror::Error)]
pub enum SamplingError {
    /// A sampler of another process.
    #[error("the sampler {sampler} does not reverse {process}, which the model was trained on; use {fitting}")]
    Misfit {
        /// Asked for.
        sampler: SamplerKind,
        /// In words.
        process: &'static str,
        /// Those that would.
        fitting: String,
    },
    /// The steps do not fit the diffusion.
    #[error("steps: {0}")]
    Respacing(#[from] RespacingError),
    /// The steps do not fit the diffusion.
    #[error("{steps} steps of {sampler}: use 1 to {most}, one fewer than the diffusion has timesteps")]
    Steps {
        /// Asked for.
        sampler: SamplerKind,
        /// Wanted.
        steps: usize,
        /// Possible.
        most: usize,
    },
    /// Not enough steps.
    #[error("{steps} steps of {sampler}: use at least {least} (a last step without noise counts)")]
    TooFewSteps {
        /// Asked for.
        sampler: SamplerKind,
        /// Wanted.
        steps: usize,
        /// Needed.
        least: usize,
    },
    /// eps tells nothing about x_start where there is nothing but noise.
    #[error(
        "the diffusion ends at zero signal-to-noise ratio, where a prediction of eps says nothing about the image; \
         train with objective \"v\" or \"x_start\""
    )]
    ZeroSnr,
    /// A step onto the end of the path.
    #[error(
        "stochastic-heun evaluates the score at the end of its steps, and at t = 1 it is infinite; give it a last step"
    )]
    NoLastStep,
    /// Guidance without a null label.
    #[error("the model was trained without label dropout, so there is no guidance; use a guidance scale of 1")]
    NoNullLabel,
    /// The step size cannot be chosen.
    #[error(
        "dopri5 gets no further than t = {t} with sample {sample} of the batch (error over tolerance {error}); \
         the velocity is not finite or too rough there: use larger tolerances or a solver with fixed steps"
    )]
    Stuck {
        /// Row of the batch.
        sample: usize,
        /// Where.
        t: f64,
        /// What the last trial gave.
        error: f64,
    },
    /// A sample is not a number.
    #[error(
        "sample {number} (label {label}) is not finite; look at the checkpoint (trainer inspect), at the guidance scale \
         and at the number of steps"
    )]
    NotFinite {
        /// Its number.
        number: u64,
        /// Its label.
        label: i64,
    },
}

impl SamplingError {
    fn misfit(sampler: SamplerKind, is_flow: bool) -> Self {
        let process = if is_flow { "a flow" } else { "a Gaussian diffusion" };
        let fitting = SamplerKind::that_fit(is_flow).map(SamplerKind::name).collect::<Vec<_>>().join(", ");
        Self::Misfit { sampler, process, fitting }
    }
}
