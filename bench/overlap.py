"""`./dev bench overlap`: two ranks on two nodes with a slow network between them (network namespaces of this machine; root).

    ./dev bench overlap [--model DiT-S/2] [--shares 0.5 0.8 1.0] [--rounds 3] [--steps 9] [--json]

compute        step time over the same network without a limit: the mean of a run before and one after the limited one, since the machine's
               speed changes
communication  the bytes that a rank sends in a step (its part of the sums, and the weights that come back: 4 × parameters × (ranks − 1) / ranks for
               each) over the rate of the link, which is measured by TCP streams in both directions between the two nodes
share          communication over compute: the link's rate is chosen for it
"""

import argparse
import contextlib
import json
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import runs

NODES = runs.ROOT / "tests/cluster/nodes"
PORT = 7311
PROBE_SECONDS = 4.0


def nodes(*words):
    done = subprocess.run([str(NODES), *map(str, words)], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"nodes {words}: {done.stderr}")


def exchange(connection):
    """Sends and receives as fast as the link lets it; bytes received per second."""
    import threading

    def send():
        block, end = bytes(1 << 16), time.monotonic() + PROBE_SECONDS + 1
        with contextlib.suppress(OSError):
            while time.monotonic() < end:
                connection.sendall(block)

    threading.Thread(target=send, daemon=True).start()
    time.sleep(0.5)   # the bucket's first burst
    received, began = 0, None
    while True:
        part = connection.recv(1 << 20)
        began = began or time.monotonic()
        received += len(part)
        spent = time.monotonic() - began
        if spent > PROBE_SECONDS or not part:
            return received / spent


def probe(role):
    """One end of the measurement of the link."""
    if role == "listen":
        with socket.create_server(("0.0.0.0", PORT)) as server:
            print("ready", flush=True)
            connection, _ = server.accept()
    else:
        connection = socket.create_connection((role, PORT))
    print(exchange(connection), flush=True)


def link_rate():
    """Bytes per second in each direction while both are used."""
    command = [sys.executable, __file__, "--probe"]
    listener = subprocess.Popen([str(NODES), "run", "dn0", *command, "listen"], stdout=subprocess.PIPE, text=True)
    listener.stdout.readline()
    other = subprocess.run([str(NODES), "run", "dn1", *command, "dn0"], capture_output=True, text=True, check=True)
    return min(float(other.stdout), float(listener.communicate()[0]))


def turn(config, args, name):
    shell = runs.ROOT / "tests/cluster/node-shell"
    options = ["--nodes", 2, "--hosts", "dn0,dn1", "--procs-per-node", 1]
    overrides = ["cluster.interface=eth0", f"cluster.remote_shell={shell}"]
    return runs.finish(runs.start(config, name, args.steps, options, overrides, [NODES, "run", "dn0"]))


def free(config, args, name, batch):
    """Seconds of a step over the network without a limit."""
    for node in ("dn0", "dn1"):
        nodes("shape", node, "off")
    return batch / turn(config, args, name)["images_per_s"]


def main():
    parser = argparse.ArgumentParser(prog="./dev bench overlap", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs.add_model_flag(parser, "DiT-S/2")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.8, 1.0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.probe:
        return probe(args.probe)
    model = runs.MODELS[args.model]
    batch, rows = 2 * model.micro_batch, []
    nodes("down")
    nodes("up", 2)
    try:
        with tempfile.TemporaryDirectory(prefix="ditharos-bench-") as folder:
            config = runs.experiment(folder, model, 2)
            numel = trained_numel(model)
            sent = 2 * 4 * numel / 2
            for number in range(args.rounds):
                for share in args.shares:
                    runs.say(f"round {number + 1} of {args.rounds}, share {share}")
                    before = free(config, args, f"before-{number}-{share}", batch)
                    rate = sent / (share * before)
                    for node in ("dn0", "dn1"):
                        nodes("shape", node, int(8 * rate / 1000))
                    communication = sent / link_rate()
                    slow = turn(config, args, f"slow-{number}-{share}")
                    compute = (before + free(config, args, f"after-{number}-{share}", batch)) / 2
                    rows.append({"share": share, "compute_s": compute, "communication_s": communication, "step_s": batch / slow["images_per_s"], "overlap": slow["overlap"]})
    finally:
        nodes("down")
    print(f"{args.model}, {numel / 1e6:.1f} M parameters, {sent / 1e6:.0f} MB a rank and step, {args.rounds} rounds of {args.steps} steps")
    print(f"{'share':>6}{'compute, s':>12}{'wire, s':>9}{'step, s':>9}{'of the larger':>15}{'of the sum':>12}{'overlap':>9}")
    results = []
    for share in args.shares:
        own = [row for row in rows if row["share"] == share]
        median = {key: statistics.median(row[key] for row in own) for key in own[0]}
        median["over_larger"] = statistics.median(row["step_s"] / max(row["compute_s"], row["communication_s"]) for row in own)
        median["over_sum"] = statistics.median(row["step_s"] / (row["compute_s"] + row["communication_s"]) for row in own)
        results.append(median)
        print(
            f"{share:>6.2f}{median['compute_s']:>12.3f}{median['communication_s']:>9.3f}{median['step_s']:>9.3f}"
            f"{median['over_larger']:>15.3f}{median['over_sum']:>12.3f}{median['overlap']:>9.1%}"
        )
    if args.json:
        print(json.dumps({"model": args.model, "bytes_sent": sent, "shares": results}))


def trained_numel(model):
    """Parameters of the model, without the fixed position table."""
    from dit_pytorch import DiT

    dit = DiT(model.hidden_size, model.depth, model.num_heads, model.patch_size, model.input_size, model.in_channels, model.num_classes)
    return sum(parameter.numel() for parameter in dit.parameters() if parameter.requires_grad)


if __name__ == "__main__":
    main()
