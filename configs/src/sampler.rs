//! The samplers by name: which process each one reverses.

use serde::{Serialize, Serializer};

/// A way from noise to samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sampler {
    /// Ancestral sampling, respaced.
    Ddpm,
    /// DDIM, respaced.
    Ddim,
    /// DPM-Solver++(2M).
    DpmSolver,
    /// Euler's method along the flow.
    Euler,
    /// The midpoint method along the flow, order 2.
    Midpoint,
    /// Heun's method along the flow, order 2.
    Heun,
    /// Heun's method of order 3 along the flow.
    Heun3,
    /// The 3/8 rule along the flow, order 4.
    Rk4,
    /// Dormand–Prince 5(4) along the flow, with a step size that follows the error.
    Dopri5,
    /// Euler–Maruyama for the flow's stochastic differential equation.
    EulerMaruyama,
    /// Stochastic Heun for the flow's stochastic differential equation.
    StochasticHeun,
}

/// What is known about a sampler without running it.
struct Facts {
    sampler: Sampler,
    name: &'static str,
    /// Other names that people know it by.
    aliases: &'static [&'static str],
    is_for_flow: bool,
    /// Steps of `trainer sample` where none are given.
    default_steps: usize,
}

const fn facts(
    sampler: Sampler,
    name: &'static str,
    aliases: &'static [&'static str],
    is_for_flow: bool,
    default_steps: usize,
) -> Facts {
    Facts { sampler, name, aliases, is_for_flow, default_steps }
}

const ALL: [Facts; 11] = [
    facts(Sampler::Ddpm, "ddpm", &[], false, 250),
    facts(Sampler::Ddim, "ddim", &[], false, 50),
    facts(Sampler::DpmSolver, "dpm-solver++", &["dpm-solver++(2m)", "dpm++2m", "dpmsolver++"], false, 25),
    facts(Sampler::Euler, "euler", &[], true, 250),
    facts(Sampler::Midpoint, "midpoint", &[], true, 125),
    facts(Sampler::Heun, "heun", &["heun2"], true, 125),
    facts(Sampler::Heun3, "heun3", &[], true, 80),
    facts(Sampler::Rk4, "rk4", &[], true, 60),
    facts(Sampler::Dopri5, "dopri5", &[], true, 0),
    facts(Sampler::EulerMaruyama, "euler-maruyama", &["sde"], true, 250),
    facts(Sampler::StochasticHeun, "stochastic-heun", &["sde-heun"], true, 125),
];

impl Sampler {
    /// All of them.
    pub fn all() -> impl Iterator<Item = Sampler> {
        ALL.iter().map(|facts| facts.sampler)
    }

    /// Those that reverse a flow, or those that reverse a Gaussian diffusion.
    pub fn that_fit(flow: bool) -> impl Iterator<Item = Sampler> {
        Self::all().filter(move |sampler| sampler.is_for_flow() == flow)
    }

    /// The sampler called so, by its own name or another one that people know it by.
    pub fn by_name(name: &str) -> Option<Sampler> {
        let name = name.to_lowercase();
        ALL.iter().find(|facts| facts.name == name || facts.aliases.contains(&name.as_str())).map(|facts| facts.sampler)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        self.facts().name
    }

    /// Whether it reverses a flow; the others reverse a Gaussian diffusion in discrete time.
    pub fn is_for_flow(self) -> bool {
        self.facts().is_for_flow
    }

    /// The sampler of `trainer sample` where none is named: the one of the DiT paper; for a flow Heun's.
    pub fn default_for(flow: bool) -> Sampler {
        if flow { Sampler::Heun } else { Sampler::Ddpm }
    }

    /// The sampler of the grids during training where none is named: deterministic and cheap.
    pub fn default_of_grids(flow: bool) -> Sampler {
        if flow { Sampler::Euler } else { Sampler::Ddim }
    }

    /// Steps where none are given, for about the cost of 250 evaluations of the model, or of what a fast sampler
    /// needs. 0 for [`Sampler::Dopri5`], which chooses for itself.
    pub fn default_steps(self) -> usize {
        self.facts().default_steps
    }

    fn facts(self) -> &'static Facts {
        // Every variant has a row; a test proves it.
        ALL.iter().find(|facts| facts.sampler == self).unwrap_or(&ALL[0])
    }
}

impl std::fmt::Display for Sampler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl Serialize for Sampler {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// `sample.cfg_channels`: which output channels classifier-free guidance acts on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuidedChannels {
    /// All channels.
    All,
    /// The first three, as in the official code.
    FirstThree,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sampler_has_a_name_of_its_own_that_leads_back_to_it() {
        use Sampler::*;
        let variants =
            [Ddpm, Ddim, DpmSolver, Euler, Midpoint, Heun, Heun3, Rk4, Dopri5, EulerMaruyama, StochasticHeun];
        assert_eq!(Sampler::all().collect::<Vec<_>>(), variants);
        for sampler in variants {
            assert_eq!(Sampler::by_name(sampler.name()), Some(sampler));
        }
        assert_eq!(Sampler::by_name("DPM-Solver++(2M)"), Some(DpmSolver));
        assert_eq!(Sampler::by_name("heun2"), Some(Heun));
        assert_eq!(Sampler::by_name("plms"), None);
    }

    #[test]
    fn defaults_fit_their_process() {
        for flow in [false, true] {
            assert_eq!(Sampler::default_for(flow).is_for_flow(), flow);
            assert_eq!(Sampler::default_of_grids(flow).is_for_flow(), flow);
        }
    }
}
