"""`./dev bench reduction`: invariant, fast and fast bf16 sums of gradients, on several ranks, in turns.

    ./dev bench reduction [--model quickstart|DiT-S/2] [--ranks 2] [--rounds 3] [--steps 60] [--json]

Every mode takes one turn per round, a run of its own from the same seed with four lanes; the first third of its steps warms up. Figures are
medians over the rounds; ratios are taken round by round, since a busy minute slows all of a round.
"""

import argparse
import json
import os
import statistics
import tempfile

import runs

MODES = {
    "invariant": ["reduction=invariant"],
    "fast": ["reduction=fast"],
    "fast bf16": ["reduction=fast", "reduction_dtype=bf16"],
}


def main():
    parser = argparse.ArgumentParser(prog="./dev bench reduction", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs.add_model_flag(parser, "quickstart")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    args = parser.parse_args()
    if args.ranks < 2 or args.rounds < 1 or args.steps < 3:
        parser.error("at least 2 ranks, 1 round and 3 steps")
    turns = {name: [] for name in MODES}
    with tempfile.TemporaryDirectory(prefix="ditharos-bench-") as folder:
        config = runs.experiment(folder, runs.MODELS[args.model], 4)
        for number in range(args.rounds):
            runs.say(f"round {number + 1} of {args.rounds}")
            for name, overrides in MODES.items():
                started = runs.start(config, f"{name}-{number}", args.steps, ["--procs-per-node", args.ranks], overrides)
                turns[name].append(runs.finish(started))
    print(f"{args.model}, {args.ranks} ranks, {args.rounds} rounds of {args.steps} steps, {os.cpu_count()} cores")
    print(f"{'':<12}{'images/s':>10}{'overlap':>10}{'last loss':>12}{'step time, of invariant':>25}{'rounds':>16}")
    result = {}
    for name in MODES:
        rate, overlap, loss = (statistics.median(each[key] for each in turns[name]) for key in ("images_per_s", "overlap", "loss"))
        of_invariant = runs.ratios(turns, "invariant", name, "images_per_s")
        ratio = statistics.median(of_invariant)
        result[name] = {"images_per_s": rate, "overlap": overlap, "loss": loss, "step_time_over_invariant": ratio}
        print(f"{name:<12}{rate:>10.1f}{overlap:>10.1%}{loss:>12.5f}{ratio:>25.3f}{f'{min(of_invariant):.3f}–{max(of_invariant):.3f}':>16}")
    if args.json:
        print(json.dumps({"model": args.model, "ranks": args.ranks, **result}))


if __name__ == "__main__":
    main()
