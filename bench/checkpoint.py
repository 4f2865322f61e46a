"""`./dev bench checkpoint`: what a checkpoint costs the step loop, and how fast it is written and read, beside PyTorch.

The same number of bytes (a DiT-B/2 with moments and EMA: weights, EMA and two moments in float32, about 2 GB) is saved and loaded
by Ditharos, `torch.save`, `torch.distributed.checkpoint.async_save` (as it is, and with a stager that keeps its memory) and, as
the bound, a plain sequential write or read of a buffer. Each takes one turn per round, in an order that moves on; figures are medians.

stall   from the end of a step to when the next one may begin
save    until everything is on the disk (fsync of files and folders for all of them)
load    into memory that is there; warm: files in the page cache; cold: they were dropped from it (posix_fadvise)
"""

import argparse
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
TRAINER, LAUNCHER = ROOT / "target/release/trainer", ROOT / "target/release/launcher"
PARTIES = ("ditharos", "torch.save", "dcp", "dcp-kept-stager", "plain")
FIGURES = ("stall_s", "save_s", "warm_load_s", "cold_load_s")


class Process:
    """A party's process, which answers every line with one of JSON."""

    def __init__(self, command, environment):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment)
        self.ready = self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.process.args[0]} ended with exit code {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            sys.exit(f"{self.process.args[0]}: {answer['error']}")
        return answer

    def ask(self, *words):
        print(*words, file=self.process.stdin, flush=True)
        return self.answer()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def drop_from_cache(folder):
    for path in pathlib.Path(folder).rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def say(text):
    print(text, file=sys.stderr, flush=True)


def turn(party, process, folder):
    """One save and two loads; nothing of it stays on the disk."""
    os.sync()
    words = (party, str(folder))
    saved = process.ask("save", *words)
    warm = process.ask("load", *words)
    drop_from_cache(folder)
    cold = process.ask("load", *words)
    shutil.rmtree(folder)
    times = (saved["stall_s"], saved["total_s"], warm["total_s"], cold["total_s"])
    return dict(zip(FIGURES, times)) | {key: value for key, value in saved.items() if key.startswith("memory_")}


def first_resumed_step(args, folder):
    """Seconds from the command to the first step of a resumed run, and the share of it before the ranks were up."""
    data = args.data or ROOT / "data/quickstart"
    if not pathlib.Path(data).is_dir():
        return None
    keys = {
        "run.url": str(folder / "run"), "data.url": str(data), "model.hidden_size": args.hidden_size, "model.depth": args.depth,
        "model.num_heads": args.num_heads, "model.patch_size": args.patch_size, "train.lanes": 1, "train.micro_batch": 1,
        "train.threads_per_rank": args.threads, "log.every_steps": 1, "log.tensorboard": "false",
    }
    config = folder / "config.toml"
    config.write_text("".join(f"{key} = {json.dumps(value) if isinstance(value, str) and value != 'false' else value}\n" for key, value in keys.items()) + "train.steps = 1\n")
    command = [str(LAUNCHER), "--config", str(config), "--procs-per-node", "1"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    runs = []
    for number in range(args.rounds):
        started = time.time()
        subprocess.run([*command, "--set", f"train.steps={number + 2}"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        events = [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]
        start = next(event for event in reversed(events) if event["event"] == "start")
        step = next(event for event in reversed(events) if event["event"] == "step")
        runs.append((step["time"] - started, start["time"] - started))
    return {"first_resumed_step_s": statistics.median(run[0] for run in runs), "ranks_up_s": statistics.median(run[1] for run in runs)}


def main():
    parser = argparse.ArgumentParser(prog="./dev bench checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, value in (("--hidden-size", 768), ("--depth", 12), ("--num-heads", 12), ("--patch-size", 2)):
        parser.add_argument(flag, type=int, default=value)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the step loop of each party")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="on the disk to be measured [default: the system's temporary folder]")
    parser.add_argument("--data", help="a data set for the time to the first resumed step [default: data/quickstart, if it is there]")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    args = parser.parse_args()
    if not TRAINER.is_file():
        sys.exit(f"{TRAINER} is missing; run `./dev build`")

    shape = [text for name in ("hidden_size", "depth", "num_heads", "patch_size", "threads") for text in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    rounds = {party: [] for party in PARTIES}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        folder = pathlib.Path(folder)
        ours = Process([str(TRAINER), "bench-checkpoint", *shape], {})
        numel, bytes_ = ours.ready["numel"], ours.ready["bytes"]
        peers = [sys.executable, str(ROOT / "bench/checkpoint_peer.py"), "--numel", str(numel), "--threads", str(args.threads)]
        theirs = Process(peers, {"OMP_NUM_THREADS": str(args.threads), "PYTHONWARNINGS": "ignore"})
        for number in range(-1, args.rounds):
            say("warming up" if number < 0 else f"round {number + 1} of {args.rounds}")
            for party in PARTIES[number % len(PARTIES) :] + PARTIES[: number % len(PARTIES)]:
                times = turn(party, ours if party == "ditharos" else theirs, folder / party)
                if number >= 0:
                    rounds[party].append(times)
        ours.close()
        theirs.close()
        say("the first resumed step")
        resumed = first_resumed_step(args, folder)

    median = {party: {figure: statistics.median(turn[figure] for turn in turns) for figure in turns[0]} for party, turns in rounds.items()}
    print(f"{numel / 1e6:.1f} M parameters, {bytes_ / 1e9:.2f} GB, {args.threads} thread(s), {args.rounds} rounds; GB/s in brackets, lowest to highest stall at the end")
    print(f"{'':<18}{'stall, s':>10}{'save, s':>18}{'load warm, s':>18}{'load cold, s':>18}")
    for party, times in median.items():
        cells = "".join(f"{f'{times[figure]:.2f} ({bytes_ / 1e9 / times[figure]:.2f})':>18}" for figure in FIGURES[1:])
        stalls = [turn["stall_s"] for turn in rounds[party]]
        print(f"{party:<18}{times['stall_s']:>10.3f}{cells}   {min(stalls):.3f} to {max(stalls):.3f}")
    own, plain = median["ditharos"], median["plain"]
    dcp = min(median["dcp"]["stall_s"], median["dcp-kept-stager"]["stall_s"])
    ratios = {
        "stall_over_torch_save": own["stall_s"] / median["torch.save"]["stall_s"],
        "stall_over_dcp": own["stall_s"] / median["dcp"]["stall_s"],
        "stall_over_best_dcp": own["stall_s"] / dcp,
        "write_share_of_plain": plain["save_s"] / own["save_s"],
        "warm_load_share_of_plain": plain["warm_load_s"] / own["warm_load_s"],
        "cold_load_share_of_plain": plain["cold_load_s"] / own["cold_load_s"],
        "snapshot_share_of_memcpy": own["memory_memcpy_s"] / own["memory_snapshot_s"],
    }
    for name, ratio in ratios.items():
        print(f"{name:<28}{ratio:.2f}")
    if resumed:
        print(f"from the command to the first resumed step: {resumed['first_resumed_step_s']:.2f} s, of which {resumed['ranks_up_s']:.2f} s until the ranks are up")
    if args.json:
        print(json.dumps({"bytes": bytes_, "median": median, **{name: round(ratio, 4) for name, ratio in ratios.items()}, **(resumed or {})}))


if __name__ == "__main__":
    main()
