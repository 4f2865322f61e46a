"""`./dev bench startup`: from the command to the first finished step on several ranks, beside `torchrun` with a minimal DDP script, in turns.

    ./dev bench startup [--ranks 2] [--rounds 5] [--json]

`launcher --config configs/quickstart.toml` as it is (new run folder, a log line every step), until log.jsonl holds step 1; and torchrun with
bench/startup_peer.py, the same model and images a step, gloo, one thread a rank, until rank 0 says that all have made a step. Both are then ended. A
round that is not counted comes first, so that files are read from memory. Ratios are taken round by round, since a busy minute slows both.
"""

import argparse
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs/quickstart.toml"
LATENT = (8, 4)  # side and channels of data/quickstart
CLASSES = 10
LONGEST_S = 120


def seconds_until(command, is_there, env=None):
    """Starts `command`, waits until `is_there()` and ends it with all that it has started."""
    with tempfile.TemporaryFile("w+") as said:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        try:
            while not is_there(said):
                took = time.monotonic() - started
                if took > LONGEST_S or process.poll() is not None:
                    said.seek(0)
                    sys.exit(f"{command[0]}: no first step after {took:.0f} s\n{said.read()}")
                time.sleep(0.005)
            return time.monotonic() - started
        finally:
            # Both end their ranks when they are asked; the launcher when it is asked twice.
            for _ in range(2):
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
                    time.sleep(0.2)
            process.wait(60)


def ditharos(args):
    with tempfile.TemporaryDirectory(prefix="ditharos-bench-") as folder:
        log = pathlib.Path(folder) / "run/log.jsonl"
        command = [ROOT / "target/release/launcher", "--config", CONFIG, "--procs-per-node", args.ranks]
        command += ["--set", f"run.url={folder}/run", "--set", "log.every_steps=1"]
        return seconds_until([str(word) for word in command], lambda _: log.exists() and '"event":"step"' in log.read_text())


def torchrun(args, config):
    model, train = config["model"], config["train"]
    sizes = [model["hidden_size"], model["depth"], model["num_heads"], model["patch_size"], *LATENT, CLASSES]
    batch = train["lanes"] * train["micro_batch"] // args.ranks
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", args.ranks, ROOT / "bench/startup_peer.py"]
    command += ["--sizes", *sizes, "--batch", batch]

    def is_there(said):
        said.flush()
        return b"step 1" in os.pread(said.fileno(), 1 << 20, 0)

    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return seconds_until([str(word) for word in command], is_there, env)


def main():
    parser = argparse.ArgumentParser(prog="./dev bench startup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, choices=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("at least 1 round")
    config = tomllib.loads(CONFIG.read_text())
    rounds = []
    for number in range(args.rounds + 1):
        print(f"round {number} of {args.rounds}" if number else "warming up", file=sys.stderr, flush=True)
        rounds.append((ditharos(args), torchrun(args, config)))
    rounds = rounds[1:]
    mine, other = (statistics.median(column) for column in zip(*rounds))
    ratio = statistics.median(first / second for first, second in rounds)
    print(f"quickstart model, {args.ranks} ranks × 1 thread, from the command to the first step, {args.rounds} rounds, {os.cpu_count()} cores")
    print(f"launcher {mine:.2f} s, torchrun {other:.2f} s; ratio, round by round: {ratio:.2f} ({min(a / b for a, b in rounds):.2f} to {max(a / b for a, b in rounds):.2f})")
    if args.json:
        print(json.dumps({"launcher_s": mine, "torchrun_s": other, "ratio": ratio, "rounds": rounds}))


if __name__ == "__main__":
    main()
