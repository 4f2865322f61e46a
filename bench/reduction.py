"""`./dev bench reduction`: the quickstart model with invariant, fast and fast bf16 sums of gradients, on several ranks, in turns.

    ./dev bench reduction [--ranks 2] [--rounds 3] [--steps 60] [--json]

Every mode takes one turn per round, a run of its own from the same seed; the first third of its steps warms up. Figures are medians
over the rounds; ratios are taken round by round, since a busy minute slows all of a round.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODES = [
    ("invariant", ["reduction=invariant"]),
    ("fast", ["reduction=fast"]),
    ("fast bf16", ["reduction=fast", "reduction_dtype=bf16"]),
]
# Nothing but steps.
QUIET = ["checkpoint.every_steps=1000000", "checkpoint.keep_best=0", "validation.every_steps=0", "sample.every_steps=0", "log.every_steps=1"]
QUIET += ["log.tensorboard=false", "optimizer.warmup_steps=0"]


def turn(overrides, args):
    """Images per second, overlap and the last loss of one run."""
    with tempfile.TemporaryDirectory(prefix="ditharos-bench-") as folder:
        command = [ROOT / "target/release/launcher", "--config", ROOT / "configs/quickstart.toml", "--procs-per-node", args.ranks]
        for pair in [f"run.url={folder}/run", f"train.steps={args.steps}", *QUIET, *overrides]:
            command += ["--set", pair]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{' '.join(overrides)}: exit code {done.returncode}\n{done.stderr}")
        lines = (pathlib.Path(folder) / "run/log.jsonl").read_text().splitlines()
    steps = [event for event in map(json.loads, lines) if event["event"] == "step"]
    measured = steps[args.steps // 3 :]
    rate, overlap = (statistics.median(step[key] for step in measured) for key in ("images_per_s", "overlap"))
    return {"images_per_s": rate, "overlap": overlap, "loss": steps[-1]["loss"]}


def main():
    parser = argparse.ArgumentParser(prog="./dev bench reduction", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    args = parser.parse_args()
    if args.ranks < 2 or args.rounds < 1 or args.steps < 3:
        parser.error("at least 2 ranks, 1 round and 3 steps")
    turns = {name: [] for name, _ in MODES}
    for number in range(args.rounds):
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
        for name, overrides in MODES:
            turns[name].append(turn(overrides, args))
    print(f"quickstart model, {args.ranks} ranks, {args.rounds} rounds of {args.steps} steps, {os.cpu_count()} cores")
    print(f"{'':<12}{'images/s':>10}{'overlap':>10}{'last loss':>12}{'over invariant':>16}")
    result = {}
    for name, _ in MODES:
        rate, overlap, loss = (statistics.median(each[key] for each in turns[name]) for key in ("images_per_s", "overlap", "loss"))
        pairs = zip(turns[name], turns["invariant"])
        ratio = statistics.median(mine["images_per_s"] / other["images_per_s"] for mine, other in pairs)
        result[name] = {"images_per_s": rate, "overlap": overlap, "loss": loss, "ratio": ratio}
        print(f"{name:<12}{rate:>10.0f}{overlap:>10.1%}{loss:>12.5f}{ratio:>16.3f}")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
