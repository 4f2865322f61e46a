"""One party of `./dev bench checkpoint` that is not Ditharos. Makes a state of the same size, then waits: for every line on
stdin it takes one turn and answers with a line of JSON. All parties write to the folder that the line names.

    save PARTY FOLDER      stall_s: until the step loop may go on; total_s: until all is on the disk
    load PARTY FOLDER      total_s
"""

import argparse
import json
import mmap
import os
import pathlib
import shutil
import sys
import time

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

BLOCK_BYTES = 16 << 20


def sync_tree(folder):
    """What makes a checkpoint survive a power cut; our own does it by itself."""
    for path in [*pathlib.Path(folder).rglob("*"), pathlib.Path(folder)]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


class Parties:
    def __init__(self, numel, tensors):
        """`numel` elements in each of four sections, as a model of that many tensors has them."""
        sizes = [numel // tensors] * (tensors - 1) + [numel - numel // tensors * (tensors - 1)]
        sections = ("model", "ema", "exp_avg", "exp_avg_sq")
        self.state = {f"{section}.{i}": torch.rand(size) for section in sections for i, size in enumerate(sizes)}
        self.bytes = 4 * numel * len(sections)
        # A stager that is kept, with its memory: what async_save does by itself is to allocate anew every time.
        self.stager = DefaultStager(StagingOptions(False, False, False, False))
        self.plain = mmap.mmap(-1, self.bytes)
        view, block = memoryview(self.plain), os.urandom(BLOCK_BYTES)
        for start in range(0, self.bytes, BLOCK_BYTES):
            end = min(start + BLOCK_BYTES, self.bytes)
            view[start:end] = block[: end - start]

    def save(self, party, folder):
        os.makedirs(folder)
        started = time.perf_counter()
        if party == "plain":
            handle = os.open(f"{folder}/plain", os.O_WRONLY | os.O_CREAT, 0o644)
            view = memoryview(self.plain)
            for start in range(0, self.bytes, BLOCK_BYTES):
                os.write(handle, view[start : start + BLOCK_BYTES])
            os.fsync(handle)
            os.close(handle)
            stalled = time.perf_counter()
        elif party == "torch.save":
            torch.save(self.state, f"{folder}/state.pt")
            stalled = time.perf_counter()
        else:
            stager = {"dcp": None, "dcp-kept-stager": self.stager}[party]
            saving = dcp.async_save(self.state, checkpoint_id=f"{folder}/dcp", async_stager=stager, no_dist=True)
            stalled = time.perf_counter()
            saving.result()
        sync_tree(folder)
        return {"stall_s": stalled - started, "total_s": time.perf_counter() - started}

    def load(self, party, folder):
        started = time.perf_counter()
        if party == "plain":
            handle = os.open(f"{folder}/plain", os.O_RDONLY)
            view = memoryview(self.plain)
            done = 0
            while done < self.bytes:
                done += os.readv(handle, [view[done : done + BLOCK_BYTES]])
            os.close(handle)
        elif party == "torch.save":
            loaded = torch.load(f"{folder}/state.pt", weights_only=True)
            for name, value in self.state.items():
                value.copy_(loaded[name])
        else:
            dcp.load(self.state, checkpoint_id=f"{folder}/dcp", no_dist=True)
        return {"total_s": time.perf_counter() - started}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, required=True, help="parameters of the model")
    parser.add_argument("--tensors", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    parties = Parties(args.numel, args.tensors)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    print(json.dumps({"ready": True, "bytes": parties.bytes}), file=answers, flush=True)
    for line in sys.stdin:
        what, party, folder = line.rstrip("\n").split(" ", 2)
        try:
            if what == "save":
                shutil.rmtree(folder, ignore_errors=True)
            answer = getattr(parties, what)(party, folder)
        except Exception as error:  # reported by the bench
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
