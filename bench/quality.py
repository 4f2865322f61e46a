"""Judges class-conditional Fashion-MNIST samples with a small classifier trained on the real images.

    ./dev bench quality [--run URL] [--num 1000] [--grid grid.png]      draws the samples from a run's newest checkpoint
    ./dev bench quality --npz samples.npz                               or takes them from a file
    ./dev bench quality --num 0                                         the judge alone

A sample file is what `trainer sample` writes: arr_0 uint8 [N, 32, 32, 3], arr_1 int64 [N] (the labels asked for).

Three figures, each beside what real images get from the same judge:
  agreement            share of samples that the judge puts in the class that was asked for (accuracy, for real images)
  within-class spread  mean over classes of trace(cov of features), as a share of the real test set's: 1 is as varied as
                       reality, 0 is one picture per class. Agreement alone would reward that.
  Fréchet distance     between Gaussians fitted to the features of the samples and of the real training images; the floor
                       is what as many real test images, equally many per class, get

Features are the 128 inputs of the judge's last layer. The judge is trained once (about 90 s on two cores) and kept.
"""

import argparse
import gzip
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

ROOT = pathlib.Path(__file__).resolve().parent.parent
TRAINER = ROOT / "target/release/trainer"
CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
# Part of the file name of a kept judge: change it with the network or its training.
JUDGE_VERSION = "cnn-1"
MIN_ACCURACY = 0.88


class Judge(nn.Module):
    """A 3-stage CNN over grey images [B, 1, 32, 32] in [-1, 1]."""

    def __init__(self):
        super().__init__()

        def stage(c_in, c_out):
            conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU(), nn.MaxPool2d(2))

        self.stages = nn.Sequential(stage(1, 32), stage(32, 64), stage(64, 64))
        self.hidden = nn.Linear(64 * 4 * 4, 128)
        self.head = nn.Linear(128, len(CLASSES))

    def features(self, images):
        return F.relu(self.hidden(self.stages(images).flatten(1)))

    def forward(self, images):
        return self.head(self.features(images))


def read_idx(path):
    """One gzipped IDX file of unsigned bytes, as an array of the shape that its header gives."""
    with gzip.open(path, "rb") as file:
        raw = file.read()
    if raw[:3] != b"\x00\x00\x08":
        sys.exit(f"{path}: not an IDX file of unsigned bytes (header {raw[:4].hex()})")
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape.tolist())


def real_images(folder, split):
    """uint8 [N, 32, 32] (28×28 padded with black, as the VAE was trained) and int64 labels [N] of "train" or "t10k"."""
    files = [folder / f"{split}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    for file in files:
        if not file.is_file():
            sys.exit(f"{file} is missing; install Debian's dataset-fashion-mnist (`./dev setup`) or give --images FOLDER")
    images, labels = map(read_idx, files)
    return np.pad(images, ((0, 0), (2, 2), (2, 2))), labels.astype(np.int64)


def normalised(images):
    """uint8 [N, 32, 32] as the judge's input."""
    return torch.from_numpy(np.ascontiguousarray(images)).unsqueeze(1).float() / 127.5 - 1


def train_judge(images, labels, epochs=2, batch=128):
    """Two passes of AdamW under a one-cycle learning rate, from a fixed seed."""
    torch.manual_seed(0)
    judge = Judge()
    inputs, labels = normalised(images), torch.from_numpy(labels)
    steps_per_epoch = len(labels) // batch
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=epochs * steps_per_epoch)
    start = time.monotonic()
    for epoch in range(epochs):
        order = torch.randperm(len(labels))
        for step in range(steps_per_epoch):
            rows = order[step * batch : (step + 1) * batch]
            loss = F.cross_entropy(judge(inputs[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        say(f"judge: epoch {epoch + 1} of {epochs}, last loss {loss.item():.3f}, {time.monotonic() - start:.0f} s")
    return judge.eval()


@torch.inference_mode()
def judged(judge, images, batch=500):
    """Predicted classes int64 [N] and features float64 [N, 128] of uint8 images [N, 32, 32]."""
    predicted, features = [], []
    for first in range(0, len(images), batch):
        feature = judge.features(normalised(images[first : first + batch]))
        predicted.append(judge.head(feature).argmax(1).numpy())
        features.append(feature.double().numpy())
    return np.concatenate(predicted), np.concatenate(features)


def load_judge(path, folder):
    """The kept judge and the (mean, covariance) of its features on the real training images; both are made when missing."""
    judge = Judge().eval()
    if path.is_file():
        with np.load(path) as kept:
            judge.load_state_dict({name: torch.from_numpy(kept[f"weights/{name}"]) for name in judge.state_dict()})
            return judge, (kept["train_mean"], kept["train_cov"])
    say(f"training the judge on the real images (once; kept at {path})")
    images, labels = real_images(folder, "train")
    judge = train_judge(images, labels)
    train = gaussian(judged(judge, images)[1])
    arrays = {f"weights/{name}": tensor.numpy() for name, tensor in judge.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.npz")
    np.savez(partial, train_mean=train[0], train_cov=train[1], **arrays)
    partial.replace(path)
    return judge, train


def gaussian(features):
    return features.mean(0), np.cov(features, rowvar=False)


def frechet(a, b):
    """|mean_a - mean_b|² + tr(cov_a + cov_b - 2 (cov_a cov_b)^½), by the symmetric form of the square root."""
    values, vectors = np.linalg.eigh(a[1])
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b[1] @ root).clip(0)).sum()
    return float(((a[0] - b[0]) ** 2).sum() + np.trace(a[1]) + np.trace(b[1]) - 2 * cross)


def class_variance(features, labels):
    """trace(cov) of each class's features [classes]; NaN for a class with fewer than two images."""
    of_class = [features[labels == label] for label in range(len(CLASSES))]
    return np.array([f.var(0, ddof=1).sum() if len(f) > 1 else np.nan for f in of_class])


def draw_samples(args):
    """Has the trainer sample from the run, labels 0 to 9 in turn; returns the file's path."""
    path = args.judge.parent / "samples.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"checkpoint": args.run, "num": args.num, "sampler": args.sampler, "steps": args.steps}
    options |= {"cfg-scale": args.cfg_scale, "seed": args.seed, "out": path}
    command = [str(TRAINER), "sample"] + [text for key, value in options.items() for text in (f"--{key}", str(value))]
    start = time.monotonic()
    if code := subprocess.run(command).returncode:
        sys.exit(f"`{' '.join(command)}` ended with exit code {code}")
    say(f"{args.num} samples drawn in {time.monotonic() - start:.0f} s")
    return path


def read_samples(path):
    """Grey uint8 images [N, 32, 32] and labels int64 [N] of a sample file."""
    try:
        with np.load(path) as file:
            images, labels = file["arr_0"], file["arr_1"]
    except (OSError, KeyError, ValueError) as error:
        sys.exit(f"{path}: {error}; expected an .npz with arr_0 (images) and arr_1 (labels), as `trainer sample` writes it")
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3) or labels.shape != images.shape[:1]:
        sys.exit(
            f"{path}: arr_0 is {images.dtype} {list(images.shape)}, arr_1 {list(labels.shape)}; "
            "expected uint8 [N, 32, 32, 3] and labels [N]"
        )
    if len(labels) < 2 or labels.min() < 0 or labels.max() >= len(CLASSES):
        sys.exit(f"{path}: {len(labels)} labels from {labels.min(initial=0)} to {labels.max(initial=0)}; expected 0 to 9")
    return images.mean(-1).round().astype(np.uint8), labels.astype(np.int64)


def same_counts(labels, wanted):
    """Row numbers of `labels` that hold as many of each class as `wanted` (all there are, where it has more)."""
    counts = np.bincount(wanted, minlength=len(CLASSES))
    return np.concatenate([np.flatnonzero(labels == label)[:n] for label, n in enumerate(counts)])


def write_grid(path, images, labels, columns=10):
    """The first `columns` samples of each class, a class per row, at twice their size."""
    from PIL import Image

    sheet = np.zeros((len(CLASSES) * 32, columns * 32), np.uint8)
    for label in range(len(CLASSES)):
        for column, image in enumerate(images[labels == label][:columns]):
            sheet[label * 32 : (label + 1) * 32, column * 32 : (column + 1) * 32] = image
    Image.fromarray(sheet).resize((sheet.shape[1] * 2, sheet.shape[0] * 2), Image.Resampling.NEAREST).save(path)


def say(text):
    print(text, file=sys.stderr, flush=True)


def main():
    parser = argparse.ArgumentParser(prog="./dev bench quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/quickstart", help="folder or URL of the run to sample from")
    parser.add_argument("--num", type=int, default=1000, help="samples to draw, equally many per class; 0 tests the judge alone")
    parser.add_argument("--sampler", choices=["ddim", "ddpm"], default="ddim")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cfg-scale", type=float, default=1.3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--npz", type=pathlib.Path, help="judge these samples instead")
    parser.add_argument("--images", type=pathlib.Path, default="/usr/share/datasets/fashion-mnist", help="folder of the real images' four IDX files")
    parser.add_argument("--judge", type=pathlib.Path, default=ROOT / f"data/judge/fashion-mnist-{JUDGE_VERSION}.npz", help="where the judge is kept")
    parser.add_argument("--grid", type=pathlib.Path, help="also write a picture of ten samples per class")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    npz = args.npz or (draw_samples(args) if args.num else None)
    samples = read_samples(npz) if npz else None
    judge, train = load_judge(args.judge, args.images)
    test_images, test_labels = real_images(args.images, "t10k")
    predicted, features = judged(judge, test_images)
    accuracy = float((predicted == test_labels).mean())
    say(f"judge: {accuracy:.2%} of the {len(test_labels)} real test images right")
    if accuracy < MIN_ACCURACY:
        sys.exit(f"{args.judge}: a judge needs {MIN_ACCURACY:.0%} on the real test images; remove the file to train another")
    if samples is None:
        print(json.dumps({"judge_test_accuracy": accuracy}))
        return

    images, labels = samples
    said, sampled = judged(judge, images)
    right = said == labels
    real_variance, variance = class_variance(features, test_labels), class_variance(sampled, labels)
    share = variance / real_variance
    floor = frechet(gaussian(features[same_counts(test_labels, labels)]), train)
    result = {
        "samples": len(labels),
        "judge_test_accuracy": accuracy,
        "agreement": float(right.mean()),
        "within_class_variance": float(np.nanmean(variance) / np.nanmean(np.where(np.isnan(variance), np.nan, real_variance))),
        "frechet": frechet(gaussian(sampled), train),
        "frechet_real_test": floor,
    }
    print(f"{'class':<14}{'samples':>8}{'agreement':>11}{'spread':>8}   mostly taken for")
    for label, name in enumerate(CLASSES):
        mine = labels == label
        if not mine.any():
            continue
        wrong = np.bincount(said[mine & ~right], minlength=len(CLASSES))
        taken = f"{CLASSES[wrong.argmax()]} ({wrong.max()})" if wrong.any() else "-"
        print(f"{name:<14}{mine.sum():>8}{right[mine].mean():>11.1%}{share[label]:>8.2f}   {taken}")
    print(f"{'all':<14}{len(labels):>8}{result['agreement']:>11.1%}{result['within_class_variance']:>8.2f}")
    print(f"Fréchet distance {result['frechet']:.2f}; as many real test images: {floor:.2f}")
    if args.grid:
        write_grid(args.grid, images, labels)
        result["grid"] = str(args.grid)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
