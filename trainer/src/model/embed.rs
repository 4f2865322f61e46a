use tch::{Kind, Tensor};

/// Sinusoidal features of timesteps, `[cos | sin]`, computed in float32; an odd `dim` gets a zero column at the end.
///
/// # Shapes
/// `t` `[N]` → [N, dim] float32.
///
/// # Source
/// DiT, section 3.2 (the frequencies of ADM): f_i = 10000^(−i / (dim/2)).
pub fn timestep_embedding(t: &Tensor, dim: i64) -> Tensor {
    shifted_timestep_embedding(t, dim, 0.0)
}

/// [`timestep_embedding`] with f_i = 10000^(−i / (dim/2 − shift)).
///
/// # Shapes
/// As [`timestep_embedding`].
pub fn shifted_timestep_embedding(t: &Tensor, dim: i64, shift: f64) -> Tensor {
    let half = dim / 2;
    let exponents = Tensor::arange(half, (Kind::Float, t.device())) * -(10000f64.ln()) / (half as f64 - shift);
    let angles = t.to_kind(Kind::Float).unsqueeze(1) * exponents.exp().unsqueeze(0);
    let features = Tensor::cat(&[angles.cos(), angles.sin()], -1);
    if dim % 2 == 1 { features.constant_pad_nd([0, 1]) } else { features }
}

/// The fixed 2-D sin-cos position table, in float64, row-major over (row, column); the first half of a row encodes
/// the *column*, the second half the row of the grid.
///
/// # Shapes
/// [grid · grid, dim]; `dim` is a multiple of 4.
///
/// # Source
/// MAE / DiT `get_2d_sincos_pos_embed`: ω_k = 10000^(−k / (dim/4)), each half [sin | cos].
pub fn sin_cos_2d(dim: i64, grid: i64) -> Vec<f64> {
    sin_cos_2d_at(dim, grid, 1.0)
}

/// [`sin_cos_2d`] with neighbours at a distance of `spacing`.
///
/// # Shapes
/// As [`sin_cos_2d`].
pub fn sin_cos_2d_at(dim: i64, grid: i64, spacing: f64) -> Vec<f64> {
    let quarter = dim / 4;
    let omega: Vec<f64> = (0..quarter).map(|k| 1.0 / 10000f64.powf(k as f64 / quarter as f64)).collect();
    let mut table = Vec::with_capacity((grid * grid * dim) as usize);
    for row in 0..grid {
        for column in 0..grid {
            for position in [column as f64 * spacing, row as f64 * spacing] {
                table.extend(omega.iter().map(|w| (position * w).sin()));
                table.extend(omega.iter().map(|w| (position * w).cos()));
            }
        }
    }
    table
}
