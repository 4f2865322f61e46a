"""`./dev bench data`: how fast latents come from a local disk, beside other loaders, on this machine, in turns.

    ./dev bench data [--gb 2] [--rounds 3] [--seconds 4] [--json] [--clean]

Makes one data set of 4×32×32 float16 latents (8 KiB a sample) below ~/.cache/ditharos/bench-data in three forms: parquet,
MosaicML MDS, and one .npy per sample. Then each loader takes one turn per round, for micro-batches of 256 in a shuffled
order, from the page cache; figures are medians over the rounds. The .npy form holds the first 16,384 samples only: what a
file costs does not depend on how many there are, and a million small files would take the disk an hour. memcpy is the bound:
the parquet files' bytes from memory into micro-batches, one block after the other.

--clean deletes the data (4.5 GB) afterwards; otherwise they stay for the next time.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
LATENTS = ROOT / "target/release/latents"
SHAPE = (4, 32, 32)
ROW_BYTES = 8192
GROUP_ROWS = 4096
FILE_ROWS = 65536
NPY_ROWS = 16384
CLASSES = 1000
# (name, what it is, threads or worker processes)
LOADERS = [
    ("ditharos 1", "latents bench, 1 thread", 1),
    ("ditharos 2", "latents bench, 2 threads", 2),
    ("npy", ".npy per sample, DataLoader, 2 workers (fast-DiT)", 2),
    ("arrow", "pyarrow row groups, DataLoader, 2 workers", 2),
    ("mds", "MosaicML Streaming (MDS), DataLoader, 2 workers", 2),
    ("memcpy 1", "memcpy, 1 thread", 1),
    ("memcpy 2", "memcpy, 2 threads", 2),
]


def say(text):
    print(text, file=sys.stderr, flush=True)


def groups(rows):
    """Row groups of latents and labels: noise, the same for every form."""
    blocks = [np.random.default_rng(seed).standard_normal((GROUP_ROWS, *SHAPE), np.float32).astype(np.float16) for seed in range(4)]
    for number in range(rows // GROUP_ROWS):
        labels = np.random.default_rng(1000 + number).integers(0, CLASSES, GROUP_ROWS, np.int64)
        yield number, np.roll(blocks[number % len(blocks)], number, axis=0), labels


def make_parquet(folder, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("latent", pa.list_(pa.field("element", pa.float16(), False), ROW_BYTES // 2)), ("label", pa.int64())])
    schema = schema.with_metadata({"ditharos.latent_shape": json.dumps(SHAPE), "ditharos.num_classes": str(CLASSES)})
    files = -(-rows // FILE_ROWS)
    writer = None
    for number, latents, labels in groups(rows):
        if number * GROUP_ROWS % FILE_ROWS == 0:
            if writer:
                writer.close()
            name = f"part-{number * GROUP_ROWS // FILE_ROWS:05}-of-{files:05}.parquet"
            writer = pq.ParquetWriter(folder / name, schema, compression="none", use_dictionary=["label"], write_statistics=False)
        lists = pa.FixedSizeListArray.from_arrays(pa.array(latents.reshape(-1)), type=schema.field("latent").type)
        writer.write_table(pa.table([lists, pa.array(labels)], schema=schema), row_group_size=GROUP_ROWS)
    writer.close()


def make_mds(folder, rows):
    os.environ["HF_HUB_OFFLINE"] = "1"
    from streaming import MDSWriter

    columns = {"latent": "ndarray:float16:" + ",".join(map(str, SHAPE)), "label": "int"}
    with MDSWriter(out=str(folder), columns=columns, exist_ok=True) as writer:
        for _, latents, labels in groups(rows):
            for latent, label in zip(latents, labels):
                writer.write({"latent": latent, "label": int(label)})


def make_npy(folder, rows):
    for name in ("features", "labels"):
        (folder / name).mkdir()
    for number, latents, labels in groups(min(rows, NPY_ROWS)):
        for row, (latent, label) in enumerate(zip(latents, labels)):
            name = f"{number * GROUP_ROWS + row}.npy"
            np.save(folder / "features" / name, latent)
            np.save(folder / "labels" / name, np.array([label]))


def make(data, rows):
    for name, write in (("parquet", make_parquet), ("mds", make_mds), ("npy", make_npy)):
        done = data / name / ".complete"
        if done.exists() and done.read_text() == str(rows):
            continue
        say(f"making {rows} samples as {name}")
        shutil.rmtree(data / name, ignore_errors=True)
        (data / name).mkdir(parents=True)
        write(data / name, rows)
        done.write_text(str(rows))


def turn(name, threads, data, args):
    if name.startswith("ditharos"):
        command = [LATENTS, "bench", data / "parquet", "--threads", threads, "--seconds", args.seconds, "--json"]
    else:
        command = [sys.executable, ROOT / "bench/data_peer.py", name.split()[0], data, "--workers", threads, "--seconds", args.seconds]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not lines:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return json.loads(lines[-1])


def warm(data):
    """Reads everything once, so that all loaders find it in the page cache."""
    for path in sorted(data.rglob("*")):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.read(16 << 20):
                    pass


def main():
    parser = argparse.ArgumentParser(prog="./dev bench data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2, help="GiB of latents")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4, help="length of a turn, after a second of warming up")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument("--clean", action="store_true", help="delete the data afterwards")
    args = parser.parse_args()
    rows = max(1, round(args.gb * 2**30 / ROW_BYTES / GROUP_ROWS)) * GROUP_ROWS
    data = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "ditharos/bench-data"
    make(data, rows)
    rates, peaks, errors = ({name: [] for name, _, _ in LOADERS} for _ in range(3))
    for number in range(args.rounds):
        say(f"round {number + 1} of {args.rounds}")
        warm(data)
        for name, _, threads in LOADERS:
            found = turn(name, threads, data, args)
            if "error" in found:
                errors[name].append(found["error"])
            else:
                rates[name].append(found["samples_per_s"])
                peaks[name].append(found["peak_rss_bytes"] or 0)
    if args.clean:
        shutil.rmtree(data)

    median = {name: statistics.median(values) for name, values in rates.items() if values}
    print(f"{rows} samples of 8 KiB ({rows * ROW_BYTES / 1e9:.2f} GB), micro-batches of 256, {args.rounds} rounds of {args.seconds:g} s, {os.cpu_count()} cores")
    print(f"{'':<52}{'samples/s':>12}{'MB/s':>9}{'peak RSS, MB':>14}{'rounds, lowest to highest':>28}")
    for name, what, _ in LOADERS:
        if name not in median:
            print(f"{what:<52} did not run: {errors[name][-1]}")
            continue
        span = f"{min(rates[name]):.0f} to {max(rates[name]):.0f}"
        print(f"{what:<52}{median[name]:>12.0f}{median[name] * ROW_BYTES / 1e6:>9.0f}{max(peaks[name]) / 1e6:>14.0f}{span:>28}")
    ratios = {}
    for ours, peer in (("ditharos 2", "npy"), ("ditharos 2", "arrow"), ("ditharos 2", "mds"), ("ditharos 2", "memcpy 2"), ("ditharos 2", "memcpy 1"), ("ditharos 1", "memcpy 1")):
        # Round by round, since a busy minute slows all of a round.
        pairs = [mine / other for mine, other in zip(rates[ours], rates[peer])]
        if pairs:
            ratios[f"{ours} / {peer}"] = round(statistics.median(pairs), 3)
            print(f"{ours} over {peer}: {ratios[f'{ours} / {peer}']:g} (median of the rounds)")
    if args.json:
        print(json.dumps({"samples_per_s": median, "peak_rss_bytes": {name: max(values) for name, values in peaks.items() if values}, "ratios": ratios}))
    sys.exit(0 if len(median) == len(LOADERS) else 1)


if __name__ == "__main__":
    main()
