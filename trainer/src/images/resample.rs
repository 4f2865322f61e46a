//! Separable resampling of 8-bit pictures, to the bit as Pillow computes it.
//!
//! Diffusion data sets have always been made with Pillow's `resize`: windows that widen when shrinking (so it
//! anti-aliases), weights in fixed point with 22 fractional bits, a horizontal pass rounded to 8 bits, then a vertical one.
//! (Pillow 13 shrinks pictures more than twice as high as wide vertically first; single pixels of those differ by one level.)

const WEIGHT_BITS: u32 = 22;

/// A resampling kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Filter {
    /// The mean of the pixels whose centres fall into the window.
    Box,
    /// Cubic convolution with a = -0.5 (Catmull-Rom).
    Bicubic,
}

impl Filter {
    /// Half the width of the kernel, in output pixels when shrinking and input pixels when enlarging.
    fn support(self) -> f64 {
        match self {
            Self::Box => 0.5,
            Self::Bicubic => 2.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        match self {
            Self::Box => f64::from(x > -0.5 && x <= 0.5),
            Self::Bicubic => {
                const A: f64 = -0.5;
                match x.abs() {
                    x if x < 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
                    x if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * A,
                    _ => 0.0,
                }
            }
        }
    }
}

/// The input pixels, and their weights, that one output pixel is made of.
struct Window {
    first: usize,
    weights: Vec<i32>,
}

fn windows(from: usize, to: usize, filter: Filter) -> Vec<Window> {
    let scale = from as f64 / to as f64;
    let stretch = scale.max(1.0);
    let support = filter.support() * stretch;
    (0..to)
        .map(|out| {
            let centre = (out as f64 + 0.5) * scale;
            let first = (centre - support + 0.5).max(0.0) as usize;
            let end = ((centre + support + 0.5) as usize).min(from);
            // A multiplication by the reciprocal, as in Pillow: a division would round some weights differently.
            let shrink = 1.0 / stretch;
            let raw: Vec<f64> = (first..end).map(|x| filter.weight((x as f64 - centre + 0.5) * shrink)).collect();
            let sum: f64 = raw.iter().sum();
            let reciprocal = if sum == 0.0 { 1.0 } else { 1.0 / sum };
            let fixed = |w: f64| (w * reciprocal * f64::from(1u32 << WEIGHT_BITS)).round() as i32;
            Window { first, weights: raw.into_iter().map(fixed).collect() }
        })
        .collect()
}

/// Half a unit, so that the shift in [`to_u8`] rounds.
const HALF: i32 = 1 << (WEIGHT_BITS - 1);

fn to_u8(sum: i32) -> u8 {
    (sum >> WEIGHT_BITS).clamp(0, 255) as u8
}

/// Resizes every row.
///
/// # Shapes
/// `pixels`: `[height, from, channels]`; the result is `[height, to, channels]`.
pub(super) fn horizontal(pixels: &[u8], from: usize, to: usize, channels: usize, filter: Filter) -> Vec<u8> {
    let windows = windows(from, to, filter);
    let mut out = Vec::with_capacity(pixels.len() / from * to);
    for row in pixels.chunks_exact(from * channels) {
        for window in &windows {
            for channel in 0..channels {
                let column = row[window.first * channels + channel..].iter().step_by(channels);
                let sum = column.zip(&window.weights).fold(HALF, |sum, (&v, &w)| sum + i32::from(v) * w);
                out.push(to_u8(sum));
            }
        }
    }
    out
}

/// Resizes every column.
///
/// # Shapes
/// `pixels`: `[from, row_bytes]`; the result is `[to, row_bytes]`.
pub(super) fn vertical(pixels: &[u8], from: usize, to: usize, filter: Filter) -> Vec<u8> {
    let row_bytes = pixels.len() / from;
    let mut out = Vec::with_capacity(row_bytes * to);
    let mut sums = vec![0i32; row_bytes];
    for window in windows(from, to, filter) {
        sums.fill(HALF);
        for (row, &w) in pixels[window.first * row_bytes..].chunks_exact(row_bytes).zip(&window.weights) {
            for (sum, &v) in sums.iter_mut().zip(row) {
                *sum += i32::from(v) * w;
            }
        }
        out.extend(sums.iter().map(|&sum| to_u8(sum)));
    }
    out
}
