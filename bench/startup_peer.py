"""The PyTorch side of `./dev bench startup`: the least that trains dit_pytorch.DiT on several ranks, up to its first step.

torchrun starts it. It prints "step 1" on rank 0 when all ranks have finished their first step, and then waits to be ended. It reads no data set
and writes nothing, both of which Ditharos does.
"""

import argparse
import pathlib
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from dit_pytorch import DiT, NoiseLoss


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs=7, required=True, help="hidden, depth, heads, patch, input, channels, classes")
    parser.add_argument("--batch", type=int, required=True, help="images of a rank")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    *_, size, channels, classes = args.sizes
    model = DistributedDataParallel(DiT(*args.sizes).train())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    loss = NoiseLoss()
    latents, labels = torch.randn(args.batch, channels, size, size), torch.randint(0, classes, (args.batch,))
    t, noise = torch.randint(0, loss.steps, labels.shape), torch.randn_like(latents)
    x_t = loss.add_noise(latents, t, noise)
    loss(model(x_t, t, labels), latents, x_t, t, noise).mean().backward()
    optimizer.step()
    dist.barrier()
    if dist.get_rank() == 0:
        print("step 1", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main()
