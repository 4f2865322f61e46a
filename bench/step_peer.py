"""The PyTorch side of `./dev bench step`: measures one training step of dit_pytorch.DiT, eager or compiled.

The step is the usual one on precomputed latents: draw t and noise, forward (bf16 autocast on request), loss in fp32,
backward, fused AdamW, EMA of all parameters by one foreach lerp. Prints one JSON line per measurement:

    {"impl": "pytorch-eager", "dtype": "fp32", "threads": 1, "images_per_s": …, "median_step_s": …, "peak_rss_bytes": …}

With --serve it warms up, prints {"ready": true, …}, then measures once per line that it reads, so that several
implementations can take turns. What cannot run prints {"impl": …, "dtype": …, "error": …} and exits with code 1.
"""

import argparse
import json
import pathlib
import resource
import statistics
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from dit_pytorch import DiT, NoiseLoss


def add_shape_flags(parser):
    """The flags that name a model and its micro-batch: the same ones as `trainer bench-step`."""
    parser.add_argument("--hidden-size", type=int, default=384)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--num-heads", type=int, default=6)
    parser.add_argument("--patch-size", type=int, default=2)
    parser.add_argument("--input-size", type=int, default=32)
    parser.add_argument("--in-channels", type=int, default=4)
    parser.add_argument("--num-classes", type=int, default=1000)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)


class Step:
    """A model with everything that one training step touches."""

    def __init__(self, args):
        torch.manual_seed(0)
        sizes = (args.hidden_size, args.depth, args.num_heads, args.patch_size, args.input_size, args.in_channels, args.num_classes)
        self.model = DiT(*sizes).train()
        self.loss = NoiseLoss()
        self.parameters = list(self.model.parameters())
        self.ema = [parameter.detach().clone() for parameter in self.parameters]
        self.optimizer = torch.optim.AdamW([p for p in self.parameters if p.requires_grad], lr=1e-4, weight_decay=0.0, fused=True)
        self.latents = torch.randn(args.micro_batch, args.in_channels, args.input_size, args.input_size)
        self.labels = torch.randint(0, args.num_classes, (args.micro_batch,))
        self.autocast = args.dtype == "bf16"
        self.forward = torch.compile(self.model) if args.compile else self.model

    def run(self):
        t = torch.randint(0, self.loss.steps, self.labels.shape)
        noise = torch.randn_like(self.latents)
        x_t = self.loss.add_noise(self.latents, t, noise)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            output = self.forward(x_t, t, self.labels)
        loss = self.loss(output.float(), self.latents, x_t, t, noise).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.parameters, 1 - 0.9999)
        return loss.item()


def measure(step, steps):
    """Seconds of each of `steps` steps."""
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step.run()
        seconds.append(time.perf_counter() - start)
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_flags(parser)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--compile", action="store_true", help="through torch.compile (needs g++ and Python's headers)")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--serve", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    about = {"impl": "pytorch-compile" if args.compile else "pytorch-eager", "dtype": args.dtype, "threads": args.threads}

    def emit(**fields):
        print(json.dumps(about | fields), flush=True)

    try:
        step = Step(args)
        measure(step, args.warmup)
    except Exception as error:  # torch.compile raises many kinds; all mean the same here
        emit(error=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}")
        sys.exit(1)

    def report():
        median = statistics.median(measure(step, args.steps))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        emit(images_per_s=args.micro_batch / median, median_step_s=median, peak_rss_bytes=peak)

    if not args.serve:
        report()
        return
    emit(ready=True)
    for _ in sys.stdin:
        report()


if __name__ == "__main__":
    main()
