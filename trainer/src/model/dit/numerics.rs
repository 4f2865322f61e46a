//! Constants that leave no trace in the weights, and in which the world's two DiT implementations differ.

use serde::{Deserialize, Serialize};

/// The official code's constants by default. A model has to be run with those that it was trained with.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "Form", into = "Form")]
pub struct Numerics {
    /// The timestep frequencies are 10000^(−i / (128 − `freq_shift`)).
    pub freq_shift: f64,
    /// Epsilon of the LayerNorm before the MLP of an adaLN-Zero block.
    pub mlp_norm_eps: f64,
}

/// As configs record them: by name, or with numbers that have none.
#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(untagged)]
enum Form {
    Named(configs::Numerics),
    Exact { freq_shift: f64, mlp_norm_eps: f64 },
}

impl From<configs::Numerics> for Numerics {
    fn from(name: configs::Numerics) -> Self {
        match name {
            configs::Numerics::Official => Self::default(),
            configs::Numerics::StockDiffusers => Self::STOCK_DIFFUSERS,
        }
    }
}

impl From<Form> for Numerics {
    fn from(form: Form) -> Self {
        match form {
            Form::Named(name) => name.into(),
            Form::Exact { freq_shift, mlp_norm_eps } => Self { freq_shift, mlp_norm_eps },
        }
    }
}

impl From<Numerics> for Form {
    fn from(numerics: Numerics) -> Self {
        let names = [configs::Numerics::Official, configs::Numerics::StockDiffusers];
        let named = names.into_iter().find(|name| Numerics::from(*name) == numerics).map(Form::Named);
        named.unwrap_or(Form::Exact { freq_shift: numerics.freq_shift, mlp_norm_eps: numerics.mlp_norm_eps })
    }
}

impl Default for Numerics {
    fn default() -> Self {
        Self { freq_shift: 0.0, mlp_norm_eps: super::layers::NORM_EPS }
    }
}

impl Numerics {
    /// What `DiTTransformer2DModel` computes as it is shipped, with its default `norm_eps`.
    pub const STOCK_DIFFUSERS: Self = Self { freq_shift: 1.0, mlp_norm_eps: 1e-5 };

    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numerics_are_recorded_by_the_name_that_the_config_gives_them_or_by_their_numbers() {
        let other = Numerics { freq_shift: 1.0, mlp_norm_eps: 1e-6 };
        for (numerics, recorded) in [
            (Numerics::default(), serde_json::json!("official")),
            (Numerics::STOCK_DIFFUSERS, serde_json::to_value(configs::Numerics::StockDiffusers).unwrap()),
            (other, serde_json::json!({"freq_shift": 1.0, "mlp_norm_eps": 1e-6})),
        ] {
            assert_eq!(serde_json::to_value(numerics).unwrap(), recorded);
            assert_eq!(serde_json::from_value::<Numerics>(recorded).unwrap(), numerics);
        }
    }
}
