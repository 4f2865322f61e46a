"""`./dev bench scaling`: two ranks beside two runs of one rank each at the same time, in turns.

    ./dev bench scaling [--model DiT-S/2] [--rounds 5] [--steps 12] [--json]

The work of a rank is the same in both (a lane, one thread), and so is what else the cores have to do: what is left is the price of being one run.
"""

import argparse
import json
import statistics
import tempfile

import runs


def main():
    parser = argparse.ArgumentParser(prog="./dev bench scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs.add_model_flag(parser, "DiT-S/2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    args = parser.parse_args()
    model, turns = runs.MODELS[args.model], {"together": [], "apart": []}
    with tempfile.TemporaryDirectory(prefix="ditharos-bench-") as folder:
        two, one = runs.experiment(folder, model, 2), runs.experiment(folder, model, 1)
        for number in range(args.rounds):
            runs.say(f"round {number + 1} of {args.rounds}")
            turns["together"].append(runs.finish(runs.start(two, f"two-{number}", args.steps, ["--procs-per-node", 2])))
            both = [runs.start(one, f"one-{number}-{index}", args.steps, ["--procs-per-node", 1]) for index in range(2)]
            turns["apart"].append({"images_per_s": sum(runs.finish(started)["images_per_s"] for started in both)})
    shares = runs.ratios(turns, "together", "apart", "images_per_s")
    share = statistics.median(shares)
    rates = {name: statistics.median(turn["images_per_s"] for turn in each) for name, each in turns.items()}
    print(f"{args.model}, {model.micro_batch} samples a rank and step, {args.rounds} rounds of {args.steps} steps")
    print(f"one run of two ranks {rates['together']:.2f} images/s, two runs of one rank {rates['apart']:.2f}: {share:.1%} ({min(shares):.1%} to {max(shares):.1%})")
    if args.json:
        print(json.dumps({"model": args.model, "share_of_independent": share, "images_per_s": rates}))


if __name__ == "__main__":
    main()
