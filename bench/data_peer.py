"""One loader of `./dev bench data`, measured for a while: prints one JSON line with samples/s and the memory of all its processes.

    npy     one .npy file per latent and one per label, as fast-DiT keeps them; DataLoader, shuffled
    arrow   row groups read by pyarrow in worker processes, shuffled inside; whole micro-batches from DataLoader
    mds     MosaicML Streaming, shuffled, from a local folder
    memcpy  the same bytes copied from memory into micro-batches, over a ring as long as the loader's read-ahead
"""

import argparse
import json
import os
import pathlib
import resource
import threading
import time

import numpy as np

RING_BYTES = 64 << 20


def npy(args):
    import torch
    from torch.utils.data import DataLoader, Dataset

    class Folder(Dataset):
        def __init__(self, folder):
            self.features, self.labels = folder / "features", folder / "labels"
            self.names = sorted(os.listdir(self.features))

        def __len__(self):
            return len(self.names)

        def __getitem__(self, index):
            name = self.names[index]
            return torch.from_numpy(np.load(self.features / name)), torch.from_numpy(np.load(self.labels / name))

    loader = DataLoader(Folder(args.data / "npy"), batch_size=args.micro_batch, shuffle=True, num_workers=args.workers, drop_last=True, persistent_workers=True)
    return endless(loader)


def arrow(args):
    import pyarrow.parquet as pq
    import torch
    from torch.utils.data import DataLoader, IterableDataset, get_worker_info

    class RowGroups(IterableDataset):
        def __iter__(self):
            files = [pq.ParquetFile(path, memory_map=True) for path in sorted((args.data / "parquet").glob("*.parquet"))]
            groups = [(file, number) for file in files for number in range(file.num_row_groups)]
            # The same order in every worker, which takes every second one.
            np.random.default_rng(0).shuffle(groups)
            worker = get_worker_info()
            draw = np.random.default_rng(worker.id)
            for file, number in groups[worker.id :: worker.num_workers]:
                table = file.read_row_group(number, ["latent", "label"], use_threads=False)
                latents = table["latent"].combine_chunks().flatten().to_numpy().reshape(-1, 4, 32, 32)
                labels = table["label"].to_numpy()
                order = draw.permutation(len(labels))
                for first in range(0, len(order), args.micro_batch):
                    rows = order[first : first + args.micro_batch]
                    yield torch.from_numpy(latents[rows]), torch.from_numpy(labels[rows])

    return endless(DataLoader(RowGroups(), batch_size=None, num_workers=args.workers, persistent_workers=True))


def mds(args):
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    os.environ["HF_HUB_OFFLINE"] = "1"
    dataset = StreamingDataset(local=str(args.data / "mds"), shuffle=True, batch_size=args.micro_batch)
    return endless(DataLoader(dataset, batch_size=args.micro_batch, num_workers=args.workers, drop_last=True, persistent_workers=True))


def endless(loader):
    while True:
        yield from (len(batch["label"] if isinstance(batch, dict) else batch[1]) for batch in loader)


def memcpy(args):
    """Samples copied per second by `args.workers` threads, for `args.seconds`."""
    source = np.concatenate([np.fromfile(path, np.uint8) for path in sorted((args.data / "parquet").glob("*.parquet"))])
    step = args.micro_batch * args.row_bytes
    blocks = len(source) // step
    counts = [0] * args.workers
    stop = threading.Event()

    def copy(worker):
        ring = np.ones((max(2, RING_BYTES // step // args.workers), step), np.uint8)
        block, at = worker * blocks // args.workers, 0
        while not stop.is_set():
            np.copyto(ring[at], source[block * step : (block + 1) * step])
            block, at, counts[worker] = (block + 1) % blocks, (at + 1) % len(ring), counts[worker] + 1

    threads = [threading.Thread(target=copy, args=(worker,)) for worker in range(args.workers)]
    [thread.start() for thread in threads]
    time.sleep(args.warmup)
    before, started = sum(counts), time.monotonic()
    time.sleep(args.seconds)
    after, seconds = sum(counts), time.monotonic() - started
    stop.set()
    [thread.join() for thread in threads]
    return (after - before) * args.micro_batch / seconds


def measure(batches, args):
    """Samples that come out per second, after a warm-up that begins with the first micro-batch."""
    next(batches)
    warm = time.monotonic()
    while time.monotonic() - warm < args.warmup:
        next(batches)
    samples, started = 0, time.monotonic()
    while time.monotonic() - started < args.seconds:
        samples += next(batches)
    return samples / (time.monotonic() - started)


def peak_rss():
    """The most memory of this process and of those that it started, each for itself; shared pages count in each."""
    total = 0
    for status in pathlib.Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        except OSError:
            continue
        if "VmHWM" in fields and int(fields["Tgid"]) == os.getpid() or "VmHWM" in fields and int(fields["PPid"]) == os.getpid():
            total += int(fields["VmHWM"].split()[0]) * 1024
    return total or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loader", choices=["npy", "arrow", "mds", "memcpy"])
    parser.add_argument("data", type=pathlib.Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, default=256)
    parser.add_argument("--row-bytes", type=int, default=8192)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--warmup", type=float, default=1)
    args = parser.parse_args()
    if args.loader == "memcpy":
        rate = memcpy(args)
    else:
        import torch

        torch.set_num_threads(1)
        rate = measure({"npy": npy, "arrow": arrow, "mds": mds}[args.loader](args), args)
    print(json.dumps({"samples_per_s": rate, "peak_rss_bytes": peak_rss()}), flush=True)
    # Worker processes that still read ahead need no farewell.
    os._exit(0)


if __name__ == "__main__":
    main()
