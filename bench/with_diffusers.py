"""Exports a checkpoint for Hugging Face diffusers and compares what diffusers computes with what the trainer computes.

    ./dev bench diffusers [--run URL] [--vae DIR] [--num 10] [--npz PREFIX] [--keep DIR]

1. `trainer export --format diffusers`; DiTPipeline.from_pretrained loads the folder and samples from it, with guidance, as it
   is shipped and patched with the one line that the export prints.
2. The transformer of diffusers, as shipped and with each deviation corrected, and the plain PyTorch DiT of bench/dit_pytorch.py
   run on fixed inputs. Inputs, outputs and both sets of weights go into a bundle; verify-bundle runs the trainer's model on it and
   compares names and outputs with all of them.
3. diffusers saves the pipeline again; `trainer export` reads that folder. Every tensor must come back bit for bit.

Exit code 0 only when the patched transformer is within 1e-5 of the PyTorch DiT, verify-bundle agrees and the round trip is exact.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"   # everything is on this machine

import diffusers
import numpy as np
import torch
from dit_pytorch import DiT, read_safetensors
from safetensors.torch import load_file, save_file

ROOT = pathlib.Path(__file__).resolve().parent.parent
BIN = ROOT / "target/release"
TOLERANCE = 1e-5
LOAD = {"low_cpu_mem_usage": False}   # the other way needs the package accelerate
# (name in the bundle, norm_eps, frequency shift)
VARIANTS = [
    ("stock", 1e-5, 1),
    ("freqshift0", 1e-5, 0),
    ("normeps1e-6", 1e-6, 1),
    ("normeps1e-6_freqshift0", 1e-6, 0),
]


def command(*words):
    words = [str(word) for word in words]
    print("$ " + " ".join(words).replace(f"{BIN}/", ""), flush=True)
    if (code := subprocess.run(words, check=False).returncode) != 0:
        sys.exit(f"exit code {code} of: {' '.join(words)}")


def checkpoint(wanted, scratch):
    """The run to export: the one asked for, else a trained one, else one that is trained here, briefly."""
    if wanted:
        return wanted
    for name in ("fashion-mnist", "quickstart"):
        if list((ROOT / "runs" / name).glob("checkpoints/step-*/manifest*.json")):
            return ROOT / "runs" / name
    command(ROOT / "dev", "data", "quickstart")
    sets = {"run.url": scratch / "run", "train.steps": 40, "optimizer.warmup_steps": 10, "sample.every_steps": 0}
    command(BIN / "launcher", "--config", ROOT / "configs/quickstart.toml", *(f"--set={key}={value}" for key, value in sets.items()))
    return scratch / "run"


def patch(pipe):
    for block in pipe.transformer.transformer_blocks: block.norm1.emb.time_proj.downscale_freq_shift = 0


def sample(pipe, num, npz, name):
    """`num` images, guided; fails unless they are finite and of different classes different."""
    classes = len(pipe.labels)
    labels = [index % classes for index in range(num)]
    generator, images = torch.Generator().manual_seed(0), []
    pipe.set_progress_bar_config(disable=True)
    for start in range(0, num, 100):
        of_batch = labels[start : start + 100]
        images.append(pipe(of_batch, guidance_scale=1.5, num_inference_steps=50, generator=generator, output_type="np").images)
    images = np.concatenate(images)
    if not np.isfinite(images).all() or images.std() < 0.01:
        sys.exit(f"{name}: the pipeline's images are not finite or all alike")
    print(f"{name}: {num} images {images.shape[1:]}, mean {images.mean():.3f}, spread {images.std():.3f}")
    if npz:
        pixels = (images * 255).round().astype(np.uint8)
        pixels = np.repeat(pixels, 3, axis=3) if pixels.shape[3] == 1 else pixels
        np.savez(f"{npz}-{name}.npz", arr_0=pixels, arr_1=np.array(labels))


def transformer(folder, norm_eps, shift):
    model = diffusers.DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer", norm_eps=norm_eps, **LOAD).eval()
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = shift
    return model


def official(weights, config, classes):
    """The plain PyTorch DiT with the same weights."""
    model = DiT(
        hidden_size=config["num_attention_heads"] * config["attention_head_dim"],
        depth=config["num_layers"],
        num_heads=config["num_attention_heads"],
        patch_size=config["patch_size"],
        input_size=config["sample_size"],
        in_channels=config["in_channels"],
        num_classes=classes,
    )
    model.load_state_dict(weights)
    return model.eval()


def compare(folder, weights, bundle):
    """Writes the bundle; true when the corrected transformer agrees with the PyTorch DiT."""
    config = json.loads((folder / "transformer/config.json").read_text())
    classes = weights["y_embedder.embedding_table.weight"].shape[0] - 1
    random = torch.Generator().manual_seed(1)
    side, n = config["sample_size"], 8
    x = torch.randn(n, config["in_channels"], side, side, generator=random)
    t = torch.tensor([0, 1, 20, 250, 500, 750, 980, 999])
    y = torch.tensor([index % (classes + 1) for index in range(n - 1)] + [classes])   # the last one: no class
    reference = official(weights, config, classes)(x, t, y)
    tensors = {"in/x": x, "in/t": t, "in/y": y, "out/official": reference}
    print(f"\nlargest difference from the PyTorch DiT, whose outputs reach {reference.abs().max():.2f} (rms {reference.square().mean().sqrt():.2f}):")
    for name, norm_eps, shift in VARIANTS:
        output = transformer(folder, norm_eps, shift)(x, timestep=t, class_labels=y).sample
        tensors[f"out/diffusers_{name}"] = output
        gap = (output - reference).abs()
        print(f"  diffusers, norm_eps {norm_eps:.0e}, frequencies 10000^(-i/{128 - shift}): {gap.max():.2e} (rms {gap.square().mean().sqrt():.2e})")
    tensors |= {f"weights/{name}": tensor for name, tensor in weights.items()}
    tensors |= {f"diffusers/{name}": tensor for name, tensor in load_file(folder / "transformer/diffusion_pytorch_model.safetensors").items()}
    dimensions = {
        "input_size": side,
        "patch_size": config["patch_size"],
        "in_channels": config["in_channels"],
        "hidden_size": config["num_attention_heads"] * config["attention_head_dim"],
        "depth": config["num_layers"],
        "num_heads": config["num_attention_heads"],
        "mlp_ratio": 4.0,
        "class_dropout_prob": 0.1,
        "num_classes": classes,
        "learn_sigma": "true",
    }
    # As shipped is with the default norm_eps, not with the one that the export wrote.
    shipped = {key: value for key, value in config.items() if key != "norm_eps" and not key.startswith("_")}
    spec = {"kind": "diffusers_dit", "diffusers_config": json.dumps(shipped)}
    spec |= {f"model.{key}": str(value) for key, value in dimensions.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, bundle, metadata={"spec": json.dumps(spec)})
    return (tensors["out/diffusers_normeps1e-6_freqshift0"] - reference).abs().max().item() <= TOLERANCE


def identical(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="run or checkpoint; runs/fashion-mnist, runs/quickstart or a new small one when not given")
    parser.add_argument("--vae", default=ROOT / "assets/vae/fashion-kl-f4", help="AutoencoderKL folder (default: the quickstart's)")
    parser.add_argument("--num", type=int, default=10, help="images to draw with each pipeline")
    parser.add_argument("--npz", help="keep the images, as PREFIX-stock.npz and PREFIX-patched.npz for ./dev bench quality --npz")
    parser.add_argument("--keep", type=pathlib.Path, help="keep exports and bundle in this folder")
    options = parser.parse_args()
    diffusers.logging.set_verbosity_error()   # it doubts that JSON has integer keys, in id2label
    diffusers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="bench-diffusers-") as scratch:
        work = pathlib.Path(scratch)
        if options.keep:
            work = options.keep
            work.mkdir(parents=True, exist_ok=True)
        run = checkpoint(options.run, work)
        folder, again = work / "pipeline", work / "saved-by-diffusers"
        command(BIN / "trainer", "export", "--checkpoint", run, "--format", "diffusers", "--vae", options.vae, "--out", folder)
        command(BIN / "trainer", "export", "--checkpoint", run, "--format", "safetensors", "--out", work / "official.safetensors")
        weights = read_safetensors(work / "official.safetensors")[1]

        print(f"\ndiffusers {diffusers.__version__}, torch {torch.__version__}")
        pipe = diffusers.DiTPipeline.from_pretrained(folder, **LOAD)
        sample(pipe, options.num, options.npz, "stock")
        patch(pipe)
        sample(pipe, options.num, options.npz, "patched")

        good = compare(folder, weights, work / "diffusers_dit.safetensors")
        print(flush=True)
        verified = subprocess.run([BIN / "verify-bundle", work / "diffusers_dit.safetensors"], check=False).returncode == 0

        pipe.save_pretrained(again)
        command(BIN / "trainer", "export", "--checkpoint", again, "--format", "safetensors", "--out", work / "back.safetensors")
        back = identical(read_safetensors(work / "back.safetensors")[1], weights)

    print(f"patched diffusers within {TOLERANCE:.0e} of the PyTorch DiT: {'yes' if good else 'NO'}")
    print(f"the trainer's model within the tolerances of verify-bundle: {'yes' if verified else 'NO'}")
    print(f"trainer -> diffusers -> trainer bit-identical ({len(weights)} tensors): {'yes' if back else 'NO'}")
    sys.exit(0 if good and verified and back else 1)


if __name__ == "__main__":
    main()
