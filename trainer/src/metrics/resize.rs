//! The resize at the head of the Inception graph.

use tch::{Kind, Tensor};

/// For each output position: the two input positions it lies between and how far it is from the first.
fn positions(from: i64, to: i64) -> (Vec<i64>, Vec<i64>, Vec<f32>) {
    let scale = from as f32 / to as f32;
    let mut found = (Vec::new(), Vec::new(), Vec::new());
    for out in 0..to {
        let at = out as f32 * scale;
        let lower = at.floor();
        found.0.push(lower as i64);
        found.1.push((lower as i64 + 1).min(from - 1));
        found.2.push(at - lower);
    }
    found
}

/// Bilinear interpolation to `size` × `size` as TensorFlow 1 computes it by default: corners not aligned, and pixel `i` of
/// the output at `i · from / size` of the input, without the half-pixel offset that PyTorch and Pillow use. It neither
/// anti-aliases nor rounds.
///
/// # Shapes
/// `images`: f32 `[N, C, H, W]` → `[N, C, size, size]`, values in the range of the input.
///
/// # Errors
/// A refusal by libtorch.
///
/// # Source
/// `ResizeBilinear` of the graph `inception-2015-12-05`.
pub fn resize_bilinear_tf1(images: &Tensor, size: i64) -> Result<Tensor, tch::TchError> {
    let (_, _, height, width) = images.size4()?;
    if (height, width) == (size, size) {
        return Ok(images.shallow_clone());
    }
    let device = images.device();
    let along = |x: &Tensor, dim: i64, from: i64, shape: [i64; 4]| {
        let (lower, upper, weight) = positions(from, size);
        let lower = x.f_index_select(dim, &Tensor::from_slice(&lower).to_device(device))?;
        let upper = x.f_index_select(dim, &Tensor::from_slice(&upper).to_device(device))?;
        let weight = Tensor::from_slice(&weight).to_device(device).to_kind(Kind::Float).f_view(shape)?;
        lower.f_add(&upper.f_sub(&lower)?.f_mul(&weight)?)
    };
    let rows = along(images, 3, width, [1, 1, 1, size])?;
    along(&rows, 2, height, [1, 1, size, 1])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn resized(values: &[f32], shape: [i64; 4], size: i64) -> Vec<f32> {
        let out = resize_bilinear_tf1(&Tensor::from_slice(values).view(shape), size).unwrap();
        Vec::try_from(out.flatten(0, -1)).unwrap()
    }

    #[test]
    fn enlarging_has_no_half_pixel_offset_and_repeats_the_border() {
        // By hand: positions 0, 0.5, 1, 1.5 of a 2-pixel axis; beyond the last pixel its value is repeated.
        let expected = [0., 2., 4., 4., 4., 6., 8., 8., 8., 10., 12., 12., 8., 10., 12., 12.];
        assert_eq!(resized(&[0., 4., 8., 12.], [1, 1, 2, 2], 4), expected);
    }

    #[test]
    fn shrinking_picks_positions_without_antialiasing() {
        // By hand: 3 columns to 2, positions 0 and 1.5; 1 row to 2, both row 0.
        assert_eq!(resized(&[10., 20., 40.], [1, 1, 1, 3], 2), [10., 30., 10., 30.]);
        // 4 to 2: positions 0 and 2, the pixels between are never looked at.
        let square: Vec<f32> = (0..16).map(|i| i as f32).collect();
        assert_eq!(resized(&square, [1, 1, 4, 4], 2), [0., 2., 8., 10.]);
    }

    #[test]
    fn channels_and_images_stay_apart_and_the_own_size_is_kept() {
        let values: Vec<f32> = (0..8).map(|i| (i * i) as f32).collect();
        assert_eq!(resized(&values, [2, 1, 2, 2], 2), values);
        let images = Tensor::from_slice(&values).view([1, 2, 2, 2]);
        let both = resize_bilinear_tf1(&images, 3).unwrap();
        let second = resize_bilinear_tf1(&images.narrow(1, 1, 1), 3).unwrap();
        assert_eq!(both.narrow(1, 1, 1), second);
    }
}
