"""`./dev bench memory`: peak memory of ranks as `launcher plan` predicts it and as Linux counts it, for models and settings of every kind.

    ./dev bench memory [--only TEXT] [--time [--rounds 3] [--steps 30]] [--json]

Every case is a run of a few steps with a checkpoint at its end, on latents that are made up; measured is VmHWM, the most memory that a
rank ever had resident. With --time the sharding levels are timed as well, in turns, as ratios to level 1.
"""

import argparse
import glob
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAUNCHER = ROOT / "target/release/launcher"
SMALL = ["model.patch_size=2", "model.hidden_size=192", "model.depth=6", "model.num_heads=3", "train.micro_batch=32"]
S2 = ["model.preset=DiT-S/2", "train.micro_batch=4"]
WIDE = ["model.hidden_size=768", "model.depth=6", "model.num_heads=12", "model.patch_size=4", "train.micro_batch=4"]
FROZEN = ['train.freeze=["?_embedder.*", "blocks.[0-5].*"]']
# Name, side of the latents, ranks, overrides.
CASES = [
    ("the quickstart's model", 8, 1, SMALL),
    ("the quickstart's model", 8, 2, SMALL),
    ("DiT-S/2", 32, 1, S2),
    ("DiT-S/2, activation checkpointing 1", 32, 1, [*S2, "train.activation_checkpointing=1"]),
    ("DiT-S/2, bf16", 32, 1, [*S2, "train.precision=bf16"]),
    ("DiT-S/2, sharding 0", 32, 2, [*S2, "train.sharding=0"]),
    ("DiT-S/2, sharding 1", 32, 2, S2),
    ("DiT-S/2, sharding 2", 32, 2, [*S2, "train.sharding=2"]),
    ("DiT-S/2, sharding 3", 32, 2, [*S2, "train.sharding=3"]),
    ("DiT-S/2, sharding 3, checkpointing 1", 32, 2, [*S2, "train.sharding=3", "train.activation_checkpointing=1"]),
    ("the same, validating between steps", 32, 2, [*S2, "train.sharding=3", "train.activation_checkpointing=1", "validation.url={data}", "validation.batch=16",
     "validation.rows=32", "validation.every_steps=2", "validation.bins=4"]),
    ("12 heads of 64, 6 blocks, sharding 1", 32, 2, WIDE),
    ("12 heads of 64, sharding 3, checkpointing 1, bf16", 32, 2,
     [*WIDE, "train.sharding=3", "train.activation_checkpointing=1", "train.precision=bf16"]),
    ("DiT-B/8, 4 ranks in groups of 2", 32, 4, ["model.preset=DiT-B/8", "train.micro_batch=16", "train.sharding_ranks=2"]),
    ("DiT-S/2, in-context", 32, 1, [*S2, "model.conditioning=in-context"]),
    ("DiT-S/2, cross-attention, bf16", 32, 1, [*S2, "model.conditioning=cross-attention", "train.precision=bf16"]),
    ("DiT-S/2, the first half frozen", 32, 1, [*S2, *FROZEN]),
    ("DiT-S/2, flow, two averages, fast bf16 sums", 32, 2,
     [*S2, "diffusion.objective=flow", "model.learn_sigma=false", "ema.further_decays=[0.99]", "reduction=fast", "reduction_dtype=bf16"]),
]
# What is timed, on two ranks; the second is what the others are compared with.
WAYS = [
    ("sharding 0", ["train.sharding=0"]),
    ("sharding 1", []),
    ("sharding 2", ["train.sharding=2"]),
    ("sharding 3", ["train.sharding=3"]),
    ("sharding 1, checkpointing 1", ["train.activation_checkpointing=1"]),
    ("sharding 3, checkpointing 1", ["train.sharding=3", "train.activation_checkpointing=1"]),
]
QUIET = ["checkpoint.every_steps=1000000", "checkpoint.keep_best=0", "log.every_steps=1", "log.tensorboard=false", "train.lanes=4"]


def data_set(folder, side):
    """Latents that say nothing, with labels."""
    import numpy
    import pyarrow
    import pyarrow.parquet

    rows, numel = 256, 4 * side * side
    values = numpy.random.default_rng(0).standard_normal(rows * numel).astype(numpy.float32)
    latents = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values), numel)
    table = pyarrow.table({"latent": latents, "label": pyarrow.array(numpy.arange(rows) % 10)})
    keys = {"ditharos.latent_shape": json.dumps([4, side, side]), "ditharos.num_classes": "10"}
    folder.mkdir(parents=True)
    pyarrow.parquet.write_table(table.replace_schema_metadata(keys), folder / "part.parquet")


def command(folder, side, ranks, overrides, steps):
    config = folder / "run.toml"
    config.write_text("[train]\nsteps = 3\nlanes = 4\nmicro_batch = 8\n")
    words = [LAUNCHER, "--config", config, "--procs-per-node", ranks]
    dims = [f"model.input_size={side}", "model.in_channels=4", "model.num_classes=10"]
    overrides = [pair.replace("{data}", f"{folder}/data-{side}") for pair in overrides]
    for pair in [f"run.url={folder}/run", f"data.url={folder}/data-{side}", f"train.steps={steps}", *QUIET, *dims, *overrides]:
        words += ["--set", pair]
    return [str(word) for word in words]


def trainers(folder):
    """Process ids of the run's ranks."""
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            words = pathlib.Path(path).read_bytes().split(b"\0")
        except OSError:
            continue
        if words[0].endswith(b"/trainer") and any(str(folder).encode() in word for word in words):
            yield path.split("/")[2]


def peaks(folder, side, ranks, overrides, steps=2):
    """The most resident memory of every rank, in bytes, and the run's step events."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    with open(folder / "output", "w") as output:
        process = subprocess.Popen(command(folder, side, ranks, overrides, steps), stdout=output, stderr=output)
        seen = {}
        while process.poll() is None:
            for pid in trainers(folder):
                try:
                    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
                except OSError:
                    continue
                seen.update({pid: int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")})
            time.sleep(0.02)
    if process.returncode != 0:
        sys.exit(f"{' '.join(overrides)}: exit code {process.returncode}\n{(folder / 'output').read_text()}")
    events = [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]
    return sorted(seen.values()), [event for event in events if event["event"] == "step"]


def predicted(folder, side, ranks, overrides, steps=2):
    words = command(folder, side, ranks, overrides, steps) + ["--dry-run", "--json"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr)
    return json.loads(done.stdout).get("memory")


def memory(folder, cases):
    result = []
    for name, side, ranks, overrides in cases:
        plan = predicted(folder, side, ranks, overrides)
        measured, _ = peaks(folder, side, ranks, overrides)
        expected = plan["peak_bytes"] if plan else 0
        ratio = expected / max(measured)
        parts = plan["categories"] if plan else []
        result.append({"case": name, "ranks": ranks, "predicted": expected, "measured": measured, "ratio": ratio, "categories": parts})
        sizes = "  ".join(f"{part['name']} {part['bytes'] / 1e6:.0f}" for part in parts)
        print(f"{name:<46}{ranks:>6}{expected / 1e6:>11.0f}{max(measured) / 1e6:>10.0f}{ratio:>8.2f}   {sizes}", flush=True)
    return result


def timed(folder, rounds, steps):
    """Images per second of every way as ratios to sharding 1, round by round, and the most memory of a rank."""
    turns = {name: [] for name, _ in WAYS}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        for name, overrides in WAYS:
            measured, events = peaks(folder, 8, 2, [*SMALL, *overrides], steps)
            rate = statistics.median(event["images_per_s"] for event in events[steps // 3 :])
            turns[name].append((rate, max(measured)))
    print(f"\nthe quickstart's model, 2 ranks, {rounds} rounds of {steps} steps, {os.cpu_count()} cores")
    print(f"{'':<30}{'images/s':>10}{'over sharding 1':>17}{'MB per rank':>13}")
    result = {}
    for name, _ in WAYS:
        rate, most = (statistics.median(turn[index] for turn in turns[name]) for index in (0, 1))
        ratio = statistics.median(mine[0] / other[0] for mine, other in zip(turns[name], turns["sharding 1"]))
        result[name] = {"images_per_s": rate, "ratio": ratio, "bytes": most}
        print(f"{name:<30}{rate:>10.0f}{ratio:>17.3f}{most / 1e6:>13.0f}")
    return result


def main():
    parser = argparse.ArgumentParser(prog="./dev bench memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--time", action="store_true", help="the sharding levels' time as well")
    parser.add_argument("--rounds", type=int, default=3, help="of timing")
    parser.add_argument("--steps", type=int, default=30, help="of a timed run")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    args = parser.parse_args()
    cases = [case for case in CASES if args.only in case[0]]
    with tempfile.TemporaryDirectory(prefix="ditharos-bench-") as name:
        folder = pathlib.Path(name)
        for side in (8, 32):
            data_set(folder / f"data-{side}", side)
        print(f"{'MB per rank':<46}{'ranks':>6}{'predicted':>11}{'measured':>10}{'ratio':>8}   of the prediction")
        result = {"memory": memory(folder, cases)}
        if args.time:
            result["time"] = timed(folder, args.rounds, args.steps)
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
