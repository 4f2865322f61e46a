"""`./dev bench inception`: our Inception-v3 and our scores beside PyTorch's and numpy's, on made-up weights and pictures.

The real weights need not be there: a network of another architecture, resize or pooling gives other features with any
weights. Pictures go through `trainer evaluate --save-stats` and through two independent implementations: torch-fidelity's
extractor (resize included) and pytorch-fid's network. Scores are compared with numpy's on PyTorch's features, computed by
other formulas than the trainer's. The command fails where anything differs by more than 1e-4 (relative to the largest value).

    ./dev bench inception [--num 64] [--record]     --record prints what the trainer's unit test expects
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import pytorch_fid.inception
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torchvision.models import inception_v3

ROOT = pathlib.Path(__file__).resolve().parent.parent
TRAINER = ROOT / "target/release/trainer"
TOLERANCE = 1e-4


def hashed(x):
    """uint32 to uint32, well mixed; the trainer's unit test has the same function."""
    x = np.atleast_1d(np.asarray(x, np.uint32))
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def spread(number, count):
    """`count` values in [-1, 1), others for every `number`."""
    index = np.arange(count, dtype=np.uint32)
    return hashed(index + hashed(np.uint32(number))) / 2.0**31 - 1.0


def made_up(name, shape, number):
    """A tensor that keeps the activations of the network in range, and different for different pictures: the filters have no
    mean that all pictures would share."""
    values = spread(number, int(np.prod(shape))).reshape(shape)
    if name.endswith("conv.weight"):
        values = (values - values.mean((1, 2, 3), keepdims=True)) * np.sqrt(8 / np.prod(shape[1:]))
    elif name.endswith("bn.weight"):
        values = 1 + 0.3 * values
    elif name.endswith("running_var"):
        values = 1 + 0.5 * values
    else:
        values = 0.2 * values
    return torch.from_numpy(values.astype(np.float32))


def made_up_state_dict():
    state = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False).state_dict()
    names = sorted(name for name in state if not name.endswith("num_batches_tracked"))
    for number, name in enumerate(names):
        state[name] = made_up(name, tuple(state[name].shape), number)
    return state


def pictures(count, first, height=40, width=56):
    """Waves of `count` frequencies with some noise: uint8 [count, height, width, 3]."""
    y, x, c = np.mgrid[:height, :width, :3]
    waves = [np.sin((k % 7 + 1) * x / 9 + k * y / 31 + c * (k % 3)) for k in range(first, first + count)]
    noise = hashed(np.arange(count * height * width * 3) + first * 1_000_003).reshape(count, height, width, 3) / 2.0**32
    return np.clip(128 + 90 * np.stack(waves) + 60 * (noise - 0.5), 0, 255).astype(np.uint8)


def peer_features(state, images, weights_file):
    """Pool and spatial features [N, 2048], [N, 2023] and logits without bias, of torch-fidelity; pool of pytorch-fid."""
    fidelity = FeatureExtractorInceptionV3("bench", ["2048", "logits_unbiased"], weights_file)
    spatial = []
    fidelity.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, out: spatial.append(out[:, :7].permute(0, 2, 3, 1).flatten(1)))
    pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: state
    fid = pytorch_fid.inception.InceptionV3(resize_input=False, normalize_input=False).eval()
    pool, logits, pool_of_fid = [], [], []
    with torch.inference_mode():
        for batch in torch.from_numpy(images).permute(0, 3, 1, 2).split(16):
            outputs = fidelity(batch)
            pool.append(outputs[0])
            logits.append(outputs[1])
            resized = interpolate_bilinear_2d_like_tensorflow1x(batch.float(), size=(299, 299), align_corners=False)
            pool_of_fid.append(fid((resized - 128) / 128)[0].flatten(1))
    return [torch.cat(parts).numpy() for parts in (pool, spatial, logits, pool_of_fid)]


def frechet(a, b):
    """Between Gaussians fitted to features, through the singular values of A·Bᵀ: tr √(Σ₁Σ₂) is their sum."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    (mean_a, a), (mean_b, b) = ((x.mean(0), (x - x.mean(0)) / np.sqrt(len(x) - 1)) for x in (a, b))
    return ((mean_a - mean_b) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * np.linalg.svd(a @ b.T, compute_uv=False).sum()


def inception_score(logits):
    """exp(H(E p) − E H(p)) of one split."""
    p = np.exp(logits - logits.max(1, keepdims=True), dtype=np.float64)
    p /= p.sum(1, keepdims=True)
    entropy = lambda p: -(p * np.log(p)).sum(-1)
    return np.exp(entropy(p.mean(0)) - entropy(p).mean())


def covered(points, centres):
    """Share of points in some ball around a centre that reaches to its third nearest neighbour."""
    distance = lambda a, b: np.linalg.norm(a[:, None].astype(np.float64) - b[None], axis=2)
    radii = np.sort(distance(centres, centres), axis=1)[:, 3]
    return (distance(points, centres) <= radii).any(1).mean()


def evaluate(*flags):
    command = [str(TRAINER), "evaluate", *map(str, flags)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}")
    return done.stdout


def relative(found, expected):
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=64, help="samples; there are half as many more reference pictures")
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    state = made_up_state_dict()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        files = {name: folder / name for name in ("weights.pth", "samples.npz", "reference.npz", "stats.npz")}
        # As pytorch-fid's own file is stored: from before torch.save wrote zip files.
        torch.save(state, files["weights.pth"], _use_new_zipfile_serialization=False)
        if args.record:
            pool, spatial, logits, _ = peer_features(state, pictures(2, 0), files["weights.pth"])
            for name, values in (("POOL", pool), ("SPATIAL", spatial), ("LOGITS", logits)):
                chosen = values[:, [0, 1, 500, -1]].ravel().tolist() + [values.sum(dtype=np.float64)]
                print(f"const {name}: [f64; 9] = {[float(f'{value:.7g}') for value in chosen]};")
            return
        samples, reference = pictures(args.num, 0), pictures(args.num * 3 // 2, args.num // 2)
        np.savez(files["samples.npz"], arr_0=samples)
        np.savez_compressed(files["reference.npz"], arr_0=reference)
        ours = json.loads(evaluate("--samples", files["samples.npz"], "--reference", files["reference.npz"], "--inception",
                                   files["weights.pth"], "--save-stats", files["stats.npz"], "--json"))
        again = json.loads(evaluate("--samples", files["samples.npz"], "--reference", files["stats.npz"], "--inception",
                                    files["weights.pth"], "--json"))
        stats = dict(np.load(files["stats.npz"]))
        pool, spatial, logits, _ = peer_features(state, samples, files["weights.pth"])
        pool_ref, spatial_ref, _, pool_of_fid = peer_features(state, reference, files["weights.pth"])
    checks = {
        "pool features (torch-fidelity)": relative(stats["pool"], pool_ref),
        "pool features (pytorch-fid)": relative(stats["pool"], pool_of_fid),
        "mean of pool features": relative(stats["mu"], pool_ref.mean(0, dtype=np.float64)),
        "covariance of pool features": relative(stats["sigma"], np.cov(pool_ref, rowvar=False)),
        "mean of spatial features": relative(stats["mu_s"], spatial_ref.mean(0, dtype=np.float64)),
        "covariance of spatial features": relative(stats["sigma_s"], np.cov(spatial_ref, rowvar=False)),
    }
    expected = {
        "inception_score": inception_score(logits),
        "fid": frechet(pool, pool_ref),
        "sfid": frechet(spatial, spatial_ref),
        "precision": covered(pool, pool_ref),
        "recall": covered(pool_ref, pool),
    }
    for name, value in expected.items():
        checks[f"{name} {ours[name]:.6f}, numpy {value:.6f}"] = abs(ours[name] - value) / max(abs(value), 1e-12)
        checks[f"{name} from --save-stats"] = abs(ours[name] - again[name])
    for name, error in checks.items():
        print(f"{'ok  ' if error <= TOLERANCE else 'FAIL'} {error:9.2e}  {name}")
    print("pictures with distinct features:", len(np.unique(pool_ref.round(4), axis=0)), "of", len(pool_ref))
    sys.exit(any(error > TOLERANCE for error in checks.values()))


if __name__ == "__main__":
    main()
