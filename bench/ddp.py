"""`./dev bench ddp`: data-parallel training beside PyTorch's DistributedDataParallel over gloo, in turns.

    ./dev bench ddp [--model quickstart|DiT-S/2] [--ranks 2] [--rounds 3] [--steps 15] [--json]

The same model, samples a rank and step, one thread a rank, float32, fused AdamW and an EMA on both sides; Ditharos runs as users run it
(invariant sums, sharded moments and EMA, a lane a rank, data from parquet), PyTorch on two tensors that it keeps. The first third
of the steps warms up. Peak memory is that of the largest process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

import runs


def ddp(args, model):
    flags = [f"--{key.replace('_', '-')}={getattr(model, key)}" for key in ("hidden_size", "depth", "num_heads", "patch_size", "input_size", "num_classes", "micro_batch")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks), str(runs.ROOT / "bench/ddp_peer.py")]
    process = subprocess.Popen(
        [*command, *flags, f"--steps={args.steps}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    )
    text, message = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"torchrun: exit code {os.waitstatus_to_exitcode(status)}\n{message}")
    return json.loads(text.splitlines()[-1]) | {"peak_rss_bytes": usage.ru_maxrss * 1024}


def main():
    parser = argparse.ArgumentParser(prog="./dev bench ddp", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs.add_model_flag(parser, "DiT-S/2")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    args = parser.parse_args()
    model = runs.MODELS[args.model]
    turns = {"ditharos": [], "ddp gloo": []}
    with tempfile.TemporaryDirectory(prefix="ditharos-bench-") as folder:
        config = runs.experiment(folder, model, args.ranks)
        for number in range(args.rounds):
            runs.say(f"round {number + 1} of {args.rounds}")
            turns["ditharos"].append(runs.finish(runs.start(config, f"run-{number}", args.steps, ["--procs-per-node", args.ranks])))
            turns["ddp gloo"].append(ddp(args, model))
    print(f"{args.model}, {args.ranks} ranks × 1 thread, {model.micro_batch} samples a rank, {args.rounds} rounds of {args.steps} steps")
    print(f"{'':<12}{'step, ms':>10}{'images/s':>10}{'peak, MB':>10}")
    for name, each in turns.items():
        rate, peak = (statistics.median(turn[key] for turn in each) for key in ("images_per_s", "peak_rss_bytes"))
        print(f"{name:<12}{1000 * args.ranks * model.micro_batch / rate:>10.0f}{rate:>10.1f}{peak / 1e6:>10.0f}")
    times = runs.ratios(turns, "ddp gloo", "ditharos", "images_per_s")
    memory = statistics.median(runs.ratios(turns, "ditharos", "ddp gloo", "peak_rss_bytes"))
    print(f"Ditharos over DDP: step time {statistics.median(times):.3f} ({min(times):.3f} to {max(times):.3f}), peak memory {memory:.3f}")
    if args.json:
        print(json.dumps({"model": args.model, "ranks": args.ranks, "step_time_over_ddp": statistics.median(times), "peak_memory_over_ddp": memory}))


if __name__ == "__main__":
    main()
