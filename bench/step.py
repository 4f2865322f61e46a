"""`./dev bench step`: one training step of Ditharos beside PyTorch's, on this machine, in turns.

Every implementation warms up, then each takes one turn per round, so that a slow minute of the machine hits all of them
alike. Figures are medians over the rounds; the ratio is Ditharos over the faster of PyTorch eager and torch.compile.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

from dit_pytorch import macs_per_image
from step_peer import add_shape_flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
TRAINER = ROOT / "target/release/trainer"
# Two per multiply-add; the backward pass does twice the work of the forward one.
FLOPS_PER_MAC = 6


def last_json_line(text):
    lines = [line for line in text.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {"error": "printed no JSON line"}


class Peer:
    """A PyTorch process that has warmed up and waits for its turns."""

    def __init__(self, args, dtype, compiled):
        self.impl, self.dtype, self.rounds = "pytorch-compile" if compiled else "pytorch-eager", dtype, []
        command = [sys.executable, str(ROOT / "bench/step_peer.py"), "--serve", "--dtype", dtype, *shape_flags(args)]
        command += ["--steps", str(args.steps), "--warmup", str(args.warmup)] + ["--compile"] * compiled
        env = os.environ | {"OMP_NUM_THREADS": str(args.threads), "PYTHONWARNINGS": "ignore"}
        errors = None if args.verbose else subprocess.DEVNULL
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=env)
        self.error = self.answer().get("error")

    def answer(self):
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": f"ended with exit code {self.process.wait()}; --verbose shows its output"}

    def turn(self):
        try:
            print(file=self.process.stdin, flush=True)
            return self.answer()
        except BrokenPipeError:
            return self.answer()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Ditharos:
    """`trainer bench-step`, run once per turn; it warms up by itself."""

    def __init__(self, args, dtype):
        self.impl, self.dtype, self.rounds, self.error = "ditharos", dtype, [], None
        self.command = [str(TRAINER), "bench-step", *shape_flags(args), "--steps", str(args.steps), "--warmup", str(args.warmup), "--json"]
        if dtype != "fp32":
            self.command += ["--dtype", dtype]
            if "--dtype" not in subprocess.run([str(TRAINER), "bench-step", "--help"], capture_output=True, text=True).stdout:
                self.error = f"`trainer bench-step` has no {dtype} yet"

    def turn(self):
        done = subprocess.run(self.command, capture_output=True, text=True)
        if done.returncode != 0:
            return {"error": f"exit code {done.returncode}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"}
        return last_json_line(done.stdout)

    def close(self):
        pass


def shape_flags(args):
    names = ("hidden_size", "depth", "num_heads", "patch_size", "input_size", "in_channels", "num_classes", "micro_batch", "threads")
    return [text for name in names for text in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]


def say(text):
    print(text, file=sys.stderr, flush=True)


def images_per_s(impl):
    return statistics.median(turn["images_per_s"] for turn in impl.rounds) if impl.rounds else None


def ratio(impls, dtype):
    """Ditharos' images/s over the best PyTorch's; None where either did not run."""
    rates = {impl.impl: images_per_s(impl) for impl in impls if impl.dtype == dtype and not impl.error}
    mine, best = rates.pop("ditharos", None), max(rates.values(), default=None)
    return round(mine / best, 4) if mine and best else None


def main():
    parser = argparse.ArgumentParser(prog="./dev bench step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_flags(parser)
    parser.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="timed steps per turn")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it takes a minute to compile)")
    parser.add_argument("--verbose", action="store_true", help="show what the PyTorch processes print")
    parser.add_argument("--json", action="store_true", help="end with one JSON line of the ratios")
    args = parser.parse_args()
    if not TRAINER.is_file():
        sys.exit(f"{TRAINER} is missing; run `./dev build`")

    impls = []
    for dtype in args.dtypes:
        impls.append(Ditharos(args, dtype))
        for compiled in [False] if args.no_compile else [False, True]:
            say(f"warming up: pytorch {'compile' if compiled else 'eager'} {dtype}")
            impls.append(Peer(args, dtype, compiled))
    for number in range(args.rounds):
        say(f"round {number + 1} of {args.rounds}")
        for impl in impls:
            if impl.error:
                continue
            turn = impl.turn()
            impl.error = turn.get("error")
            if not impl.error:
                impl.rounds.append(turn)
    for impl in impls:
        impl.close()

    gflop = FLOPS_PER_MAC * macs_per_image(args.hidden_size, args.depth, args.patch_size, args.input_size, args.in_channels) / 1e9
    print(
        f"DiT hidden {args.hidden_size} × {args.depth}, {args.num_heads} heads, patch {args.patch_size}, latent {args.in_channels}×{args.input_size}×{args.input_size}, "
        f"micro_batch {args.micro_batch}, {args.threads} thread(s), {args.rounds} rounds of {args.steps} steps"
    )
    print(f"{'':<6}{'implementation':<18}{'step, ms':>10}{'images/s':>10}{'GFLOP/s':>9}{'rounds, lowest to highest images/s':>38}")
    for impl in impls:
        if impl.error:
            print(f"{impl.dtype:<6}{impl.impl:<18} did not run: {impl.error}")
            continue
        rates = [turn["images_per_s"] for turn in impl.rounds]
        median_ms = 1e3 * statistics.median(turn["median_step_s"] for turn in impl.rounds)
        print(f"{impl.dtype:<6}{impl.impl:<18}{median_ms:>10.1f}{images_per_s(impl):>10.2f}{images_per_s(impl) * gflop:>9.1f}{f'{min(rates):.2f} to {max(rates):.2f}':>38}")
    ratios = {f"{dtype}_ratio_to_pytorch_best": ratio(impls, dtype) for dtype in ("fp32", "bf16")}
    for dtype in args.dtypes:
        if (value := ratios[f"{dtype}_ratio_to_pytorch_best"]) is not None:
            print(f"{dtype}: Ditharos runs at {value:.2f} times the best PyTorch")
    if args.json:
        print(json.dumps(ratios))


if __name__ == "__main__":
    main()
