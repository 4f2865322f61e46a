"""`./dev bench parity`: a run of Ditharos beside a plain PyTorch loop, loss by loss.

Both start from the same weights and see the same batches, timesteps, noise and dropped labels (`trainer draws` writes
them); everything else is each one's own: model, loss, backward pass, AdamW, learning rate, and on our side lanes, ranks
and the reduction over them. Exit code 1 when the losses of any step differ by more than the tolerance.
"""

import argparse
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile

import torch
from PIL import Image, ImageDraw, ImageFont

from dit_pytorch import DiT, NoiseLoss, read_safetensors

ROOT = pathlib.Path(__file__).resolve().parent.parent
BINARIES = ROOT / "target/release"
SIZES = ("hidden_size", "depth", "num_heads", "patch_size", "input_size", "in_channels", "num_classes", "mlp_ratio", "class_dropout_prob")


def run(*command):
    done = subprocess.run([str(part) for part in command], cwd=ROOT)
    if done.returncode != 0:
        sys.exit(f"exit code {done.returncode}: {' '.join(map(str, command))}")


def refuse_what_the_peer_lacks(config):
    """The loop below knows the official DiT only."""
    expected = {
        ("diffusion", "objective"): "eps",
        ("diffusion", "schedule"): "linear",
        ("diffusion", "timesteps"): 1000,
        ("diffusion", "min_snr_gamma"): None,
        ("diffusion", "beta_start"): None,
        ("model", "learn_sigma"): True,
        ("model", "conditioning"): None,
        ("model", "numerics"): None,
        ("optimizer", "groups"): None,
        ("train", "freeze"): None,
        ("lora", "rank"): None,
    }
    for (section, key), value in expected.items():
        found = config.get(section, {}).get(key)
        if found != value and (value is not None or found):
            sys.exit(f"`{section}.{key}` = {found!r}: the PyTorch loop of this bench has only {value!r}")


def lr_factor(optimizer, total_steps):
    """The learning rate of the step after `done` steps, over `optimizer.lr`."""
    lr, final_lr, warmup = optimizer["lr"], optimizer["final_lr"], optimizer["warmup_steps"]

    def factor(done):
        step = done + 1
        if step <= warmup:
            return step / warmup
        progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
        remaining = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[optimizer["decay"]]
        return 1.0 if optimizer["decay"] == "constant" else (final_lr + (lr - final_lr) * remaining) / lr

    return factor


def pytorch_losses(folder):
    """Trains on what `trainer draws` wrote; the loss of every step before its update."""
    config = json.loads((folder / "config.json").read_text())
    refuse_what_the_peer_lacks(config)
    # Labels are already dropped, and nothing else in the model tells training from evaluation.
    model = DiT(**{key: config["model"][key] for key in SIZES}).eval()
    model.load_state_dict(read_safetensors(folder / "initial.safetensors")[1])
    settings = config["optimizer"]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, settings["lr"], settings["betas"], settings["eps"], settings["weight_decay"])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor(settings, config["train"]["steps"]))
    noise_loss, losses = NoiseLoss(), []
    for path in sorted(folder.glob("draws-*.safetensors")):
        draws = read_safetensors(path)[1]
        for x_start, noise, t, labels in zip(draws["x_start"], draws["noise"], draws["t"], draws["labels"]):
            x_t = noise_loss.add_noise(x_start, t, noise)
            loss = noise_loss(model(x_t, t, labels), x_start, x_t, t, noise).mean()
            optimizer.zero_grad()
            loss.backward()
            if limit := settings.get("clip_grad_norm"):
                torch.nn.utils.clip_grad_norm_(parameters, limit)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"pytorch: step {len(losses)}, loss {losses[-1]:.5f}", file=sys.stderr, flush=True)
    return losses


def our_losses(run_folder):
    events = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if event["event"] == "step"]


class Panel:
    """A plot of values over steps, the y axis linear or logarithmic."""

    def __init__(self, draw, box, title, steps, low, high, log=False):
        self.draw, self.box, self.steps, self.log = draw, box, steps, log
        self.low, self.high = (math.log10(low), math.log10(high)) if log else (low, high)
        left, top, right, bottom = box
        self.font = ImageFont.load_default(15)
        draw.text((left, top - 24), title, "black", ImageFont.load_default(17))
        draw.rectangle(box, outline="#888888")
        ticks = range(math.ceil(self.low), math.floor(self.high) + 1) if log else [low + (high - low) * i / 4 for i in range(5)]
        for tick in ticks:
            y = self.y(10.0**tick if log else tick)
            draw.line([(left, y), (right, y)], "#dddddd")
            draw.text((left - 8, y), f"1e{tick}" if log else f"{tick:.2f}", "black", self.font, anchor="rm")
        for tick in range(0, steps + 1, max(steps // 5, 1)):
            draw.text((self.x(tick), bottom + 6), str(tick), "black", self.font, anchor="mt")

    def x(self, step):
        left, _, right, _ = self.box
        return left + (right - left) * step / self.steps

    def y(self, value):
        _, top, _, bottom = self.box
        value = math.log10(max(value, 1e-300)) if self.log else value
        share = min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)
        return bottom - (bottom - top) * share

    def curve(self, values, colour, width):
        self.draw.line([(self.x(step), self.y(value)) for step, value in enumerate(values, 1)], colour, width)

    def level(self, value, text, colour):
        left, _, right, _ = self.box
        self.draw.line([(left, self.y(value)), (right, self.y(value))], colour, 2)
        self.draw.text((right - 8, self.y(value) - 4), text, colour, self.font, anchor="rb")


def plot(path, ours, theirs, differences, tolerance):
    image = Image.new("RGB", (960, 760), "white")
    draw = ImageDraw.Draw(image)
    steps = len(ours)
    losses = Panel(draw, (80, 40, 930, 400), "loss of every step: PyTorch (wide, orange), Ditharos (thin, blue)", steps, min(ours + theirs), max(ours + theirs))
    losses.curve(theirs, "#ffa040", 6)
    losses.curve(ours, "#1040c0", 2)
    apart = Panel(draw, (80, 470, 930, 720), "relative difference", steps, 1e-8, 1e-2, log=True)
    apart.curve(differences, "#1040c0", 2)
    apart.level(tolerance, f"tolerance {tolerance:g}", "#c02020")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.quantize(32).save(path, optimize=True)


def main():
    parser = argparse.ArgumentParser(prog="./dev bench parity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.toml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a config key, on both sides")
    parser.add_argument("--steps", type=int, default=500, help="length of the run (train.steps)")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="largest relative difference of a step's losses")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch")
    parser.add_argument("--plot", type=pathlib.Path, default=None, help="PNG to write, for example docs/parity.png")
    parser.add_argument("--json", type=pathlib.Path, default=None, help="file for the losses of both")
    args = parser.parse_args()
    if missing := [name for name in ("trainer", "launcher") if not (BINARIES / name).is_file()]:
        sys.exit(f"{BINARIES}/{missing[0]} is missing; run `./dev build`")
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="parity-") as work:
        work = pathlib.Path(work)
        keys = [f"train.steps={args.steps}", f"run.url={work}/run", "log.every_steps=1", "log.tensorboard=false", "sample.every_steps=0"]
        keys += [f"checkpoint.every_steps={args.steps}", "checkpoint.keep_best=0", "validation.every_steps=0", *args.set]
        overrides = [part for key in keys for part in ("--set", key)]
        run(BINARIES / "trainer", "draws", "--config", args.config, *overrides, "--out", work / "draws")
        run(BINARIES / "launcher", "--config", args.config, *overrides)
        ours, theirs = our_losses(work / "run"), pytorch_losses(work / "draws")
    if len(ours) != len(theirs):
        sys.exit(f"Ditharos logged {len(ours)} steps, PyTorch made {len(theirs)}")
    differences = [abs(mine - other) / abs(other) for mine, other in zip(ours, theirs)]
    worst = max(range(len(ours)), key=differences.__getitem__)
    if args.plot:
        plot(args.plot, ours, theirs, differences, args.tolerance)
    if args.json:
        args.json.write_text(json.dumps({"ditharos": ours, "pytorch": theirs}))
    print(f"{len(ours)} steps of {args.config}; loss {theirs[0]:.5f} to {theirs[-1]:.5f}")
    print(f"largest relative difference {differences[worst]:.2e}, at step {worst + 1} ({ours[worst]:.7f} and {theirs[worst]:.7f}); tolerance {args.tolerance:g}")
    print(f"last step {differences[-1]:.2e}, median {sorted(differences)[len(differences) // 2]:.2e}")
    # Written so that a NaN fails.
    sys.exit(0 if all(difference <= args.tolerance for difference in differences) else 1)


if __name__ == "__main__":
    main()
