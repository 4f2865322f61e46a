use std::str::FromStr;

/// Which original timesteps a shorter chain keeps, as the official code writes it: "" (all), "250" (one section),
/// "10,15,20" (sections), "ddim50" (fixed stride).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Respacing {
    /// Every timestep.
    All,
    /// So many timesteps from each of equally long sections.
    Sections(Vec<usize>),
    /// The first integer stride that keeps exactly so many.
    Ddim(usize),
}

/// A respacing that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum RespacingError {
    /// Not of a known form.
    #[error("respacing `{0}` is not a number, a list of numbers (`10,15,20`) or `ddimN`")]
    Form(String),
    /// No stride gives the number.
    #[error("no integer stride keeps exactly {steps} of {timesteps} timesteps; use `{steps}` without `ddim`")]
    NoStride {
        /// Wanted.
        steps: usize,
        /// There are.
        timesteps: usize,
    },
    /// More are kept than there are.
    #[error("a section of {section} timesteps cannot keep {steps}")]
    TooMany {
        /// Wanted.
        steps: usize,
        /// There are.
        section: usize,
    },
}

impl FromStr for Respacing {
    type Err = RespacingError;

    fn from_str(text: &str) -> Result<Self, RespacingError> {
        let number = |part: &str| match part.trim().parse::<usize>() {
            Ok(n) if n > 0 => Ok(n),
            _ => Err(RespacingError::Form(text.to_owned())),
        };
        if text.is_empty() {
            Ok(Respacing::All)
        } else if let Some(steps) = text.strip_prefix("ddim") {
            Ok(Respacing::Ddim(number(steps)?))
        } else {
            Ok(Respacing::Sections(text.split(',').map(number).collect::<Result<_, _>>()?))
        }
    }
}

impl Respacing {
    /// The original timesteps kept, ascending.
    ///
    /// # Errors
    /// [`RespacingError`] when the numbers do not fit `timesteps`.
    pub fn kept(&self, timesteps: usize) -> Result<Vec<usize>, RespacingError> {
        match self {
            Respacing::All => Ok((0..timesteps).collect()),
            Respacing::Ddim(steps) => (1..timesteps)
                .find(|stride| timesteps.div_ceil(*stride) == *steps)
                .map(|stride| (0..timesteps).step_by(stride).collect())
                .ok_or(RespacingError::NoStride { steps: *steps, timesteps }),
            Respacing::Sections(counts) => {
                if counts.is_empty() || counts.contains(&0) {
                    return Err(RespacingError::Form("0".to_owned()));
                }
                let (length, longer) = (timesteps / counts.len(), timesteps % counts.len());
                let mut start = 0;
                let mut kept = Vec::new();
                for (index, &steps) in counts.iter().enumerate() {
                    let section = length + usize::from(index < longer);
                    if steps > section {
                        return Err(RespacingError::TooMany { steps, section });
                    }
                    let stride = if steps == 1 { 1.0 } else { (section - 1) as f64 / (steps - 1) as f64 };
                    // The position is accumulated and rounded half to even, as the official code does: i·stride and
                    // half-up give other timesteps for many step counts.
                    let mut position = 0.0f64;
                    for _ in 0..steps {
                        kept.push(start + position.round_ties_even() as usize);
                        position += stride;
                    }
                    start += section;
                }
                kept.dedup();
                Ok(kept)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(text: &str) -> Result<Vec<usize>, RespacingError> {
        text.parse::<Respacing>()?.kept(1000)
    }

    #[test]
    fn known_respacings() {
        assert_eq!(kept("10").unwrap(), [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]);
        assert_eq!(kept("ddim10").unwrap(), [0, 100, 200, 300, 400, 500, 600, 700, 800, 900]);
        assert_eq!(kept("7").unwrap(), [0, 166, 333, 500, 666, 832, 999]);
        assert_eq!(kept("").unwrap().len(), 1000);
        assert_eq!(kept("2,3").unwrap(), [0, 499, 500, 750, 999]);
    }

    #[test]
    fn impossible_ones_are_refused() {
        assert!(matches!(kept("ddim64"), Err(RespacingError::NoStride { steps: 64, .. })));
        assert!(matches!(kept("1001"), Err(RespacingError::TooMany { .. })));
        for wrong in ["0", "ddim", "-3", "ten", "10,,2"] {
            assert!(matches!(kept(wrong), Err(RespacingError::Form(_))), "{wrong}");
        }
        assert!(Respacing::Sections(vec![0]).kept(1000).is_err());
    }
}
