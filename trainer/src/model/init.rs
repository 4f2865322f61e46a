use data_loader::draws::{Key, Purpose, fill_normal};
use rand_distr::{Distribution, Uniform};
use sha2::{Digest, Sha256};

/// The first values of a parameter.
#[derive(Clone, Debug, PartialEq)]
pub enum Init {
    /// All zero.
    Zeros,
    /// All one.
    Ones,
    /// Normal with mean 0.
    Normal {
        /// Standard deviation.
        std: f64,
    },
    /// Uniform in ±bound.
    Uniform {
        /// Largest absolute value.
        bound: f64,
    },
    /// Uniform in ±sqrt(6 / (fan_in + fan_out)).
    XavierUniform {
        /// Inputs of one output.
        fan_in: i64,
        /// Outputs fed by one input.
        fan_out: i64,
    },
    /// These very values.
    Table(Vec<f32>),
}

/// The first `numel` values of the parameter called `name`: a pure function of seed and name, whatever else the model
/// has and whichever rank asks.
pub fn initial_values(seed: u64, name: &str, init: &Init, numel: usize) -> Vec<f32> {
    let digest: [u8; 32] = Sha256::digest(name.as_bytes()).into();
    let mut name_digest = [0u8; 8];
    name_digest.copy_from_slice(&digest[..8]);
    let key = Key::new(seed, Purpose::Init, u64::from_le_bytes(name_digest));
    match init {
        Init::Zeros => vec![0.0; numel],
        Init::Ones => vec![1.0; numel],
        Init::Normal { std } => {
            let mut values = vec![0.0; numel];
            fill_normal(key, &mut values);
            values.iter_mut().for_each(|value| *value *= *std as f32);
            values
        }
        Init::Uniform { bound } => uniform(key, *bound as f32, numel),
        Init::XavierUniform { fan_in, fan_out } => uniform(key, (6.0 / (fan_in + fan_out) as f64).sqrt() as f32, numel),
        Init::Table(values) => values.clone(),
    }
}

fn uniform(key: Key, bound: f32, numel: usize) -> Vec<f32> {
    let mut rng = key.rng();
    match Uniform::new_inclusive(-bound, bound) {
        Ok(uniform) => (0..numel).map(|_| uniform.sample(&mut rng)).collect(),
        Err(_) => vec![0.0; numel],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_follow_their_law_and_depend_on_name_and_seed() {
        let xavier = Init::XavierUniform { fan_in: 30, fan_out: 20 };
        let bound = (6.0f32 / 50.0).sqrt();
        let a = initial_values(1, "blocks.0.mlp.fc1.weight", &xavier, 20_000);
        assert!(a.iter().all(|v| v.abs() <= bound));
        let mean_square = a.iter().map(|v| v * v).sum::<f32>() / a.len() as f32;
        assert!((mean_square / (bound * bound / 3.0) - 1.0).abs() < 0.03, "{mean_square}");
        assert_eq!(a, initial_values(1, "blocks.0.mlp.fc1.weight", &xavier, 20_000));
        assert_ne!(a, initial_values(1, "blocks.1.mlp.fc1.weight", &xavier, 20_000));
        assert_ne!(a, initial_values(2, "blocks.0.mlp.fc1.weight", &xavier, 20_000));
        let normal = initial_values(1, "t_embedder.mlp.0.weight", &Init::Normal { std: 0.02 }, 20_000);
        let std = (normal.iter().map(|v| v * v).sum::<f32>() / normal.len() as f32).sqrt();
        assert!((std / 0.02 - 1.0).abs() < 0.03, "{std}");
    }
}
