#![allow(clippy::unwrap_used)]
//! The network against PyTorch's on made-up weights, and the way from pictures to scores.

use super::*;
use crate::images::{ImageBatch, NpzWriter};
use crate::interop::NamedWeights;
use collective::single::SingleCollective;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;
use tch::{Device, Kind, Tensor};

fn hashed(x: u32) -> u32 {
    let x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    let x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

/// The tensors of `bench/inception.py`; names and shapes are those that the network asks for.
fn made_up_weights() -> BTreeMap<String, Tensor> {
    // Tests run side by side.
    tch::set_num_threads(1);
    let Err(MetricsError::Weights { problems, .. }) = Inception::from_weights(BTreeMap::new(), Device::Cpu) else {
        panic!("an empty file must be refused")
    };
    let expected = problems.iter().map(|problem| {
        let (name, shape) = problem.split_once(": missing, expected shape ").unwrap();
        (name.to_owned(), serde_json::from_str::<Vec<i64>>(shape).unwrap())
    });
    let mut shapes: BTreeMap<String, Vec<i64>> = expected.collect();
    shapes.insert("fc.bias".to_owned(), vec![1008]);
    let tensor = |(number, (name, shape)): (usize, (&String, &Vec<i64>))| {
        let seed = hashed(number as u32);
        let spread = |i: u32| f64::from(hashed(i.wrapping_add(seed))) / 2f64.powi(31) - 1.0;
        let values: Vec<f64> = (0..shape.iter().product::<i64>() as u32).map(spread).collect();
        let values = Tensor::from_slice(&values).view(shape.as_slice());
        let values = if name.ends_with("conv.weight") {
            let centred = &values - values.mean_dim([1i64, 2, 3].as_slice(), true, Kind::Double);
            centred * (8.0 / shape[1..].iter().product::<i64>() as f64).sqrt()
        } else if name.ends_with("bn.weight") {
            values * 0.3 + 1.0
        } else if name.ends_with("running_var") {
            values * 0.5 + 1.0
        } else {
            values * 0.2
        };
        (name.clone(), values.to_kind(Kind::Float))
    };
    shapes.iter().enumerate().map(tensor).collect()
}

/// The pictures of `bench/inception.py`: uint8 `[count, 3, 40, 56]`.
fn pictures(count: usize, first: usize) -> Tensor {
    let (height, width) = (40, 56);
    let mut pixels = Vec::new();
    for (number, k) in (first..first + count).enumerate() {
        for at in 0..height * width * 3 {
            let (y, x, c) = ((at / 3 / width) as f64, (at / 3 % width) as f64, at % 3);
            let wave = ((k % 7 + 1) as f64 * x / 9.0 + k as f64 * y / 31.0 + (c * (k % 3)) as f64).sin();
            let noise = hashed((number * height * width * 3 + at + first * 1_000_003) as u32);
            let noise = f64::from(noise) / 2f64.powi(32);
            pixels.push((128.0 + 90.0 * wave + 60.0 * (noise - 0.5)).clamp(0.0, 255.0) as u8);
        }
    }
    Tensor::from_slice(&pixels).view([count as i64, height as i64, width as i64, 3]).permute([0, 3, 1, 2])
}

/// Columns 0, 1, 500 and the last of both pictures, and the sum of all: what `./dev bench inception --record` prints
/// (torch-fidelity 0.4.0, PyTorch 2.13.0).
const POOL: [f64; 9] =
    [0.9874621, 0.5837361, 0.07833724, 0.2458574, 1.469879, 0.1658914, 0.1110172, 0.4045404, 2811.157];
const SPATIAL: [f64; 9] = [0.9752027, 0.2562276, 0.5308888, 0.0, 0.0, 0.6819457, 0.8431665, 0.0, 2102.574];
const LOGITS: [f64; 9] = [3.711232, 7.641262, -1.08212, -0.853843, 6.675478, 7.729296, 2.442243, -2.144107, 163.0808];

fn assert_recorded(found: &Tensor, expected: [f64; 9], what: &str) {
    let last = found.size()[1] - 1;
    let columns = Tensor::from_slice(&[0, 1, 500, last]);
    let mut values = Vec::<f64>::try_from(found.index_select(1, &columns).to_kind(Kind::Double).view(-1)).unwrap();
    values.push(found.sum(Kind::Double).double_value(&[]));
    for (found, expected) in values.iter().zip(expected) {
        assert!((found - expected).abs() <= 1e-4 * expected.abs().max(1.0), "{what}: {values:?}, expected {expected}");
    }
}

#[test]
fn features_and_logits_are_those_of_pytorch() {
    let inception = Inception::from_weights(made_up_weights(), Device::Cpu).unwrap();
    let features = inception.features(&pictures(2, 0)).unwrap();
    assert_eq!((features.pool.size(), features.spatial.size()), (vec![2, POOL_FEATURES], vec![2, SPATIAL_FEATURES]));
    assert_recorded(&features.pool, POOL, "pool features");
    assert_recorded(&features.spatial, SPATIAL, "spatial features");
    let recorded = Tensor::from_slice(&LOGITS[..4]).view([1, 4]);
    let log_probabilities = inception.log_probabilities(&features.pool).unwrap();
    let columns = log_probabilities.narrow(0, 0, 1).index_select(1, &Tensor::from_slice(&[0i64, 1, 500, 1007]));
    // Probabilities hold the logits up to a constant.
    let apart = columns - recorded;
    assert!(f64::try_from(apart.max() - apart.min()).unwrap() < 1e-3, "{apart}");
    assert!((f64::try_from(log_probabilities.exp().sum(Kind::Double)).unwrap() - 2.0).abs() < 1e-9);
}

#[test]
fn wrong_weights_are_all_named() {
    let mut weights = made_up_weights();
    weights.remove("Mixed_6d.branch7x7dbl_4.bn.running_var");
    weights.insert("fc.weight".into(), Tensor::zeros([1000, 2048], (Kind::Float, Device::Cpu)));
    weights.insert("AuxLogits.fc.bias".into(), Tensor::zeros([1000], (Kind::Float, Device::Cpu)));
    weights.insert("Mixed_7c.branch1x1.bn.num_batches_tracked".into(), Tensor::from(3i64));
    let message = Inception::from_weights(weights, Device::Cpu).err().unwrap().to_string();
    for expected in [
        "3 tensors are not those of the Inception-v3 of 2015-12-05",
        "AuxLogits.fc.bias: not part of the network (shape [1000])",
        "Mixed_6d.branch7x7dbl_4.bn.running_var: missing, expected shape [160]",
        "fc.weight: shape [1000, 2048], expected [1008, 2048]",
    ] {
        assert!(message.contains(expected), "{message}");
    }
}

fn write_npz(path: &Path, pictures: &Tensor) {
    let shape = [0, 1, 2, 3].map(|dim| pictures.size()[dim] as usize);
    let pixels = Vec::<u8>::try_from(pictures.contiguous().view(-1)).unwrap();
    let mut npz = NpzWriter::create(path, shape[0], shape[2], shape[3]).unwrap();
    npz.push(&ImageBatch::new(shape, pixels).unwrap()).unwrap();
    npz.finish(None).unwrap();
}

#[test]
fn weights_from_a_file_statistics_kept_and_read_give_the_same_scores() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let weights = NamedWeights { tensors: made_up_weights(), model: None };
    crate::interop::safetensors::write_weights(&path("w.safetensors"), &weights, safetensors::Dtype::F32).unwrap();
    let inception = Inception::load(&path("w.safetensors"), Device::Cpu).unwrap();
    let alone = SingleCollective::new(Duration::from_secs(1));
    let of = |name: &str, pictures: Tensor, batch: usize| {
        write_npz(&path(name), &pictures);
        let set = ImageSet::open(path(name).to_str().unwrap(), Fit::default()).unwrap();
        let wanted = Wanted { spatial: true, features: 6 };
        Statistics::of_set(&Extractor::new(&inception, &alone, batch), &set, wanted, &|_| {}).unwrap().unwrap()
    };
    let (samples, reference) = (of("a.npz", pictures(6, 0), 4), of("b.npz", pictures(8, 3), 3));
    assert_eq!((samples.features.size()[0], reference.features.size()[0]), (6, 6));
    reference.save(&path("stats.npz"), inception.digest()).unwrap();
    let read = Statistics::read(&path("stats.npz"), inception.digest()).unwrap().unwrap();
    let gaussians =
        |of: &Statistics| [&of.pool, of.spatial.as_ref().unwrap()].map(|of| (of.mean.copy(), of.covariance.copy()));
    assert_eq!(gaussians(&read), gaussians(&reference));
    assert_eq!(read.features, reference.features);
    let scores = Scores::compute(&inception, &samples, &read).unwrap();
    let close = |a: f64, b: f64| (a - b).abs() <= 1e-6 * b;
    let direct = Scores::compute(&inception, &samples, &reference).unwrap();
    assert!(scores.fid > 1.0 && close(scores.fid, direct.fid), "{scores:?}, {direct:?}");
    assert!(scores.sfid.unwrap() > 1.0 && close(scores.sfid.unwrap(), direct.sfid.unwrap()), "{scores:?}, {direct:?}");
    assert!(scores.inception_score > 1.0 && scores.precision.unwrap() > 0.0 && scores.recall.unwrap() > 0.0);
    let own = Scores::compute(&inception, &samples, &samples).unwrap();
    assert!(own.fid < 1e-3 && own.sfid.unwrap() < 1e-3, "{own:?}");
    assert_eq!((own.precision, own.recall), (Some(1.0), Some(1.0)));
    assert!(Statistics::read(&path("a.npz"), None).unwrap().is_none());
    let other = Statistics::read(&path("stats.npz"), Some("00")).err().unwrap().to_string();
    assert!(other.contains("made with Inception weights") && other.contains("make them again"), "{other}");
}
