"""The PyTorch side of `./dev bench ddp`, one process a rank: DistributedDataParallel over gloo on dit_pytorch.DiT, with the step of step_peer.

    torchrun --nproc-per-node 2 ddp_peer.py --steps 12 …     rank 0 prints {"images_per_s": …}
"""

import argparse
import json
import os
import statistics

import torch
import torch.distributed
from step_peer import Step, add_shape_flags, measure


def main():
    parser = argparse.ArgumentParser()
    add_shape_flags(parser)
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    args.dtype, args.compile = "fp32", False
    torch.set_num_threads(args.threads)
    torch.distributed.init_process_group("gloo")
    step = Step(args)
    step.forward = torch.nn.parallel.DistributedDataParallel(step.forward)
    seconds = measure(step, args.steps)
    if torch.distributed.get_rank() == 0:
        median = statistics.median(seconds[args.steps // 3 :])
        print(json.dumps({"images_per_s": int(os.environ["WORLD_SIZE"]) * args.micro_batch / median}), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
