"""Training runs of the launcher that do nothing but steps, on data made up for them: what the benches of several ranks measure."""

import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAUNCHER = ROOT / "target/release/launcher"
ROWS = 512


@dataclasses.dataclass(frozen=True)
class Model:
    """A DiT, and how many samples a rank takes at a time in these benches."""

    hidden_size: int
    depth: int
    num_heads: int
    patch_size: int
    input_size: int
    num_classes: int
    micro_batch: int
    in_channels: int = 4

    def shape(self):
        return [self.in_channels, self.input_size, self.input_size]


MODELS = {
    "quickstart": Model(192, 6, 3, 2, 8, 10, 32),
    "DiT-S/2": Model(384, 12, 6, 2, 32, 1000, 4),
    # As many blocks as DiT-XL/2.
    "28-blocks": Model(384, 28, 6, 2, 32, 1000, 4),
}


def add_model_flag(parser, default):
    parser.add_argument("--model", choices=list(MODELS), default=default)


def experiment(folder, model, lanes, micro_batch=None, **overrides):
    """Writes a config without an end (see `run`) and its data set into `folder`; gives the config's path."""
    import pyarrow
    import pyarrow.parquet

    folder = pathlib.Path(folder)
    data = folder / f"latents-{model.input_size}"
    if not data.exists():
        data.mkdir()
        numel = model.in_channels * model.input_size**2
        latents = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(normal_halves(ROWS * numel)), numel)
        labels = pyarrow.array([row % model.num_classes for row in range(ROWS)], pyarrow.int64())
        metadata = {"ditharos.latent_shape": json.dumps(model.shape()), "ditharos.num_classes": str(model.num_classes)}
        table = pyarrow.table({"latent": latents, "label": labels}).replace_schema_metadata(metadata)
        pyarrow.parquet.write_table(table, data / "latents.parquet", row_group_size=64)
    keys = {
        "run.url": str(folder / "run"), "data.url": str(data), "model.class_dropout_prob": 0.1, "train.lanes": lanes, "train.threads_per_rank": 1,
        "train.micro_batch": micro_batch or model.micro_batch, "checkpoint.every_steps": 1_000_000, "log.every_steps": 1, "log.tensorboard": False,
    }
    keys |= {f"model.{key}": getattr(model, key) for key in ("hidden_size", "depth", "num_heads", "patch_size")} | overrides
    path = folder / f"config-{model.input_size}-{lanes}.toml"
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items()))
    return path


def normal_halves(count):
    import numpy

    return numpy.random.default_rng(0).standard_normal(count, numpy.float32).astype(numpy.float16)


def start(config, name, steps, options=(), overrides=(), before=()):
    """Starts a run of its own in the folder `name` beside the config; `before`: words before the launcher's."""
    url = config.parent / name
    command = [*before, LAUNCHER, "--config", config, *options]
    for pair in [f"run.url={url}", f"train.steps={steps}", *overrides]:
        command += ["--set", pair]
    return url, subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(started):
    """Medians over the last two thirds of the steps: images_per_s and overlap; and the last loss, and the peak resident memory of the largest process."""
    url, process = started
    message = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"{' '.join(process.args)}: exit code {os.waitstatus_to_exitcode(status)}\n{message}")
    events = [json.loads(line) for line in (url / "log.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    measured = steps[len(steps) // 3 :]
    median = {key: statistics.median(step[key] for step in measured) for key in ("images_per_s", "overlap") if key in measured[0]}
    return median | {"loss": steps[-1]["loss"], "peak_rss_bytes": usage.ru_maxrss * 1024}


def ratios(turns, mine, other, key):
    """Of each round: a busy minute slows all of a round."""
    return [a[key] / b[key] for a, b in zip(turns[mine], turns[other])]


def say(text):
    print(text, file=sys.stderr, flush=True)
