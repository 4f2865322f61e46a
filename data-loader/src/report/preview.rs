//! Latents as pictures, without the decoder that belongs to them.

use crate::{DataError, LatentDataset, RowRun};

/// Pixels between pictures.
const GAP: usize = 2;
/// Pictures are enlarged to about this many pixels.
const TILE: usize = 96;
/// Frames of a video that are shown, side by side.
const MAX_FRAMES: usize = 8;
/// Steps of the power iteration for each principal direction.
const POWER_STEPS: usize = 100;

/// Linear maps from latents of Stable Diffusion's 4-channel autoencoders, scaled, to RGB in -1..1, known by their scaling factor:
/// least-squares fits to decoded pictures that the community found, as ComfyUI has them in `comfy/latent_formats.py`.
const KNOWN: [(f64, [[f32; 3]; 4], [f32; 3]); 2] = [
    (
        0.18215,
        [[0.3512, 0.2297, 0.3227], [0.3250, 0.4974, 0.2350], [-0.2829, 0.1762, 0.2721], [-0.2120, -0.2616, -0.7177]],
        [0.0; 3],
    ),
    (
        0.13025,
        [[0.3651, 0.4232, 0.4341], [-0.2533, -0.0042, 0.1068], [0.1076, 0.1111, -0.0362], [-0.3165, -0.2492, -0.2188]],
        [0.1084, -0.0175, -0.0011],
    ),
];

/// A picture of many latents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Preview {
    /// Columns of pixels.
    pub width: usize,
    /// Rows of pixels.
    pub height: usize,
    /// `[height, width, 3]`.
    pub rgb: Vec<u8>,
    /// How numbers became colours.
    pub colours: &'static str,
}

/// One latent, frames in a row: `[channels, frames, height, width]`.
struct Picture {
    dims: [usize; 4],
    numbers: Vec<f32>,
}

impl Picture {
    /// The channels of every shown pixel, with its place.
    fn pixels(&self) -> impl Iterator<Item = (usize, usize, Vec<f32>)> + '_ {
        let [channels, frames, height, width] = self.dims;
        let shown = frames.min(MAX_FRAMES);
        (0..shown * height * width).map(move |i| {
            let (column, y, x) = (i / (height * width), i / width % height, i % width);
            let frame = column * frames / shown;
            let number = |channel: usize| self.numbers[((channel * frames + frame) * height + y) * width + x];
            (column * (width + 1) + x, y, (0..channels).map(number).collect())
        })
    }

    fn size(&self) -> [usize; 2] {
        let [_, frames, height, width] = self.dims;
        [frames.min(MAX_FRAMES) * (width + 1) - 1, height]
    }
}

/// Shows `count` rows, evenly spread over the data set, as a grid in reading order; of videos a row of frames each. Latents of
/// the Stable Diffusion autoencoders get about their true colours; of others, the three directions in which they vary most
/// become red, green and blue.
///
/// # Errors
/// If a row cannot be read, or latents are no `[channels, height, width]` or `[channels, frames, height, width]`.
pub fn preview(dataset: &LatentDataset, count: u64) -> Result<Preview, DataError> {
    let rows = dataset.spread_rows(count.max(1));
    let runs: Vec<RowRun> = rows.iter().map(|&first_row| RowRun { first_row, rows: 1 }).collect();
    let block = dataset.read(&runs)?;
    let mut pictures = Vec::with_capacity(block.len());
    for row in 0..block.len() {
        let dims = match *block.latent_shape(row) {
            [channels, height, width] => [channels, 1, height, width],
            [channels, frames, height, width] => [channels, frames, height, width],
            ref other => {
                let reason = format!(
                    "latents of shape {other:?} cannot be shown; expected [channels, height, width] or [channels, frames, height, width]"
                );
                return Err(DataError::Request { url: dataset.name().to_owned(), reason });
            }
        };
        let mut numbers = vec![0f32; block.latent_numel(row)];
        block.latent(0, row, &mut numbers);
        // A picture of them must not depend on what cannot be drawn.
        numbers.iter_mut().filter(|number| !number.is_finite()).for_each(|number| *number = 0.0);
        pictures.push(Picture { dims, numbers });
    }
    let (colours, rgb) = colour(&pictures, dataset.meta().scaling_factor);
    Ok(lay_out(&pictures, &rgb, colours))
}

/// The colours of all pixels of all pictures, in 0..1.
fn colour(pictures: &[Picture], scaling_factor: Option<f64>) -> (&'static str, Vec<[f32; 3]>) {
    let channels = pictures.iter().map(|picture| picture.dims[0]).min().unwrap_or(0);
    let pixels: Vec<Vec<f32>> =
        pictures.iter().flat_map(|picture| picture.pixels().map(|(_, _, pixel)| pixel[..channels].to_vec())).collect();
    let known = KNOWN
        .iter()
        .find(|(factor, ..)| channels == 4 && scaling_factor.is_some_and(|found| (found / factor - 1.0).abs() < 1e-3));
    if let Some((factor, map, bias)) = known {
        let to_rgb = |pixel: &Vec<f32>| -> [f32; 3] {
            std::array::from_fn(|c| {
                let sum: f32 = pixel.iter().zip(map).map(|(number, row)| number * *factor as f32 * row[c]).sum();
                (sum + bias[c] + 1.0) / 2.0
            })
        };
        return ("the linear map of Stable Diffusion's autoencoder", pixels.iter().map(to_rgb).collect());
    }
    let directions = match channels {
        0..=3 => (0..channels).map(|own| (0..channels).map(|c| f64::from(u8::from(c == own))).collect()).collect(),
        _ => principal_directions(&pixels, 3),
    };
    let planes: Vec<Vec<f32>> = directions.iter().map(|direction| stretched(&pixels, direction)).collect();
    let plane = |c: usize, i: usize| match planes.len() {
        1 => planes[0][i],
        _ => planes.get(c).map_or(0.5, |plane| plane[i]),
    };
    let rgb = (0..pixels.len()).map(|i| std::array::from_fn(|c| plane(c, i))).collect();
    match channels {
        0 | 1 => ("the one channel, stretched", rgb),
        2 | 3 => ("the channels, stretched", rgb),
        _ => ("the three principal directions, stretched", rgb),
    }
}

/// The pixels along a direction, so that 1 % of them are below 0 and 1 % above 1.
fn stretched(pixels: &[Vec<f32>], direction: &[f64]) -> Vec<f32> {
    let along =
        |pixel: &Vec<f32>| pixel.iter().zip(direction).map(|(number, d)| f64::from(*number) * d).sum::<f64>() as f32;
    let mut plane: Vec<f32> = pixels.iter().map(along).collect();
    let mut sorted = plane.clone();
    sorted.sort_unstable_by(f32::total_cmp);
    let at =
        |share: f64| sorted.get(((sorted.len().saturating_sub(1)) as f64 * share) as usize).copied().unwrap_or(0.0);
    let (low, high) = (at(0.01), at(0.99));
    let range = if high > low { high - low } else { 1.0 };
    plane.iter_mut().for_each(|number| *number = (*number - low) / range);
    plane
}

/// The directions in which the pixels vary most, by power iteration on their covariance; the largest part of each is positive.
fn principal_directions(pixels: &[Vec<f32>], count: usize) -> Vec<Vec<f64>> {
    let channels = pixels.first().map_or(0, Vec::len);
    let total = pixels.len().max(1) as f64;
    let mut mean = vec![0f64; channels];
    for pixel in pixels {
        mean.iter_mut().zip(pixel).for_each(|(mean, number)| *mean += f64::from(*number) / total);
    }
    let mut covariance = vec![vec![0f64; channels]; channels];
    for pixel in pixels {
        let centred: Vec<f64> = pixel.iter().zip(&mean).map(|(number, mean)| f64::from(*number) - mean).collect();
        for (row, a) in covariance.iter_mut().zip(&centred) {
            row.iter_mut().zip(&centred).for_each(|(sum, b)| *sum += a * b / total);
        }
    }
    let mut directions = Vec::new();
    for _ in 0..count {
        // Not orthogonal to any direction of interest but by accident.
        let mut direction: Vec<f64> = (0..channels).map(|c| 1.0 + c as f64 / channels as f64).collect();
        let mut length = 0.0;
        for _ in 0..POWER_STEPS {
            let next: Vec<f64> =
                covariance.iter().map(|row| row.iter().zip(&direction).map(|(a, b)| a * b).sum()).collect();
            length = next.iter().map(|x| x * x).sum::<f64>().sqrt();
            if length <= f64::MIN_POSITIVE {
                break;
            }
            direction = next.iter().map(|x| x / length).collect();
        }
        if direction.iter().copied().reduce(|a, b| if b.abs() > a.abs() { b } else { a }).is_some_and(|x| x < 0.0) {
            direction.iter_mut().for_each(|x| *x = -*x);
        }
        for (row, a) in covariance.iter_mut().zip(&direction) {
            row.iter_mut().zip(&direction).for_each(|(sum, b)| *sum -= length * a * b);
        }
        directions.push(direction);
    }
    directions
}

fn lay_out(pictures: &[Picture], rgb: &[[f32; 3]], colours: &'static str) -> Preview {
    let largest = |side: usize| pictures.iter().map(|picture| picture.size()[side]).max().unwrap_or(1);
    let (tile_width, tile_height) = (largest(0), largest(1));
    let zoom = (TILE / tile_height).max(1);
    let videos = pictures.iter().any(|picture| picture.dims[1] > 1);
    let columns = if videos { 1 } else { (pictures.len() as f64).sqrt().ceil() as usize }.max(1);
    let (step_x, step_y) = (tile_width * zoom + GAP, tile_height * zoom + GAP);
    let (width, height) = (GAP + columns * step_x, GAP + pictures.len().div_ceil(columns) * step_y);
    let mut preview = Preview { width, height, rgb: vec![0; width * height * 3], colours };
    let mut colours = rgb.iter();
    for (index, picture) in pictures.iter().enumerate() {
        let (left, top) = (GAP + index % columns * step_x, GAP + index / columns * step_y);
        for ((x, y, _), colour) in picture.pixels().zip(&mut colours) {
            let colour = colour.map(|part| (part.clamp(0.0, 1.0) * 255.0).round() as u8);
            for (dy, dx) in (0..zoom).flat_map(|dy| (0..zoom).map(move |dx| (dy, dx))) {
                let at = ((top + y * zoom + dy) * width + left + x * zoom + dx) * 3;
                preview.rgb[at..at + 3].copy_from_slice(&colour);
            }
        }
    }
    preview
}

impl Preview {
    /// As a PNG file in memory.
    ///
    /// # Errors
    /// With the encoder's words, if the picture is larger than PNG allows.
    pub fn to_png(&self) -> Result<Vec<u8>, String> {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, self.width as u32, self.height as u32);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let mut writer = encoder.write_header().map_err(|error| error.to_string())?;
        writer.write_image_data(&self.rgb).map_err(|error| error.to_string())?;
        writer.finish().map_err(|error| error.to_string())?;
        Ok(bytes)
    }
}
