"""Runs the tests that need an object store against real servers, each started here on free loopback ports with throw-away data.

`./dev test --stores` runs this. One line for every server and suite; the exit code is 1 if any failed.
"""

import argparse
import base64
import datetime
import hashlib
import hmac
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

# (what it is, package, test)
SUITES = [
    ("checkpoints", "checkpoint", "a_run_on_a_real_server"),
    ("data sets", "data-loader", "epochs_of_a_real_server"),
    ("a training run, killed and resumed", "ditharos-tests", "a_killed_run_on_a_server_goes_on_to_the_same_bits"),
]
KEY, SECRET, REGION = "test", "testsecret", "us-east-1"
# Azurite's account, the same everywhere: https://learn.microsoft.com/azure/storage/common/storage-connect-azurite
AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

TAKEN = set()  # ports


def free_port():
    """A port that is free and was not given before, like its neighbour 10000 above, which SeaweedFS takes as well."""
    while True:
        with socket.socket() as low, socket.socket() as high:
            low.bind(("127.0.0.1", 0))
            port = low.getsockname()[1]
            if port + 10000 > 65535:
                port -= 20000
            if TAKEN & {port, port + 10000}:
                continue
            try:
                high.bind(("127.0.0.1", port + 10000))
            except OSError:
                continue
            TAKEN.update({port, port + 10000})
            return port


class Server:
    """A server in a process group of its own; `settings` are what a client needs in its environment."""

    def __init__(self, name, command, url, settings, create):
        self.name, self.command, self.url, self.settings, self.create = name, command, url, settings, create

    def __enter__(self):
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(self.command, stdout=self.log, stderr=self.log, start_new_session=True)
        until = time.monotonic() + 120
        while True:
            try:
                self.create()
                return self
            except Exception as error:  # not listening yet, or not ready
                if self.process.poll() is not None or time.monotonic() > until:
                    said = self.said()
                    self.__exit__()
                    raise RuntimeError(f"{self.name} does not start: {error}\n{said}") from error
                time.sleep(0.3)

    def said(self):
        self.log.seek(0)
        return self.log.read().decode(errors="replace")[-3000:]

    def __exit__(self, *_):
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        self.log.close()


def s3_bucket(endpoint):
    def create():
        import boto3
        from botocore.config import Config

        client = boto3.client(
            "s3", endpoint_url=endpoint, aws_access_key_id=KEY, aws_secret_access_key=SECRET, region_name=REGION,
            config=Config(connect_timeout=2, read_timeout=10, retries={"max_attempts": 1}),
        )
        if "bucket" not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
            client.create_bucket(Bucket="bucket")
        client.put_object(Bucket="bucket", Key="ready", Body=b"x")

    return create


def azure_container(endpoint):
    def create():
        date = datetime.datetime.now(datetime.timezone.utc).strftime("%a, %d %b %Y %H:%M:%S GMT")
        headers = {"x-ms-date": date, "x-ms-version": "2021-08-06"}
        named = "".join(f"{key}:{value}\n" for key, value in sorted(headers.items()))
        resource = f"/{AZURE_ACCOUNT}/{AZURE_ACCOUNT}/bucket\nrestype:container"
        signed = hmac.new(base64.b64decode(AZURE_KEY), f"PUT{chr(10) * 12}{named}{resource}".encode(), hashlib.sha256)
        headers["Authorization"] = f"SharedKey {AZURE_ACCOUNT}:{base64.b64encode(signed.digest()).decode()}"
        request = urllib.request.Request(f"{endpoint}/bucket?restype=container", method="PUT", headers=headers)
        try:
            urllib.request.urlopen(request, timeout=5).read()
        except urllib.error.HTTPError as error:
            if error.code != 409:  # it exists
                raise

    return create


def s3_settings(endpoint):
    return {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": REGION,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
    }


def moto(tools, _folder):
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    command = [tools / "bin/moto_server", "-H", "127.0.0.1", "-p", str(port)]
    return Server("moto", command, "s3://bucket/prefix", s3_settings(endpoint), s3_bucket(endpoint))


def seaweedfs(tools, folder):
    ports = {name: free_port() for name in ["master", "volume", "filer", "s3"]}
    endpoint = f"http://127.0.0.1:{ports['s3']}"
    identity = {
        "name": KEY,
        "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    command = [tools / "bin/weed", f"-logdir={folder}", "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += ["-filer", "-s3", f"-s3.config={folder / 's3.json'}"]
    command += [f"-{name}.port={port}" for name, port in ports.items()]
    # What people have who have used other tools: nothing in the environment, all in the profile files.
    (folder / "credentials").write_text(f"[default]\naws_access_key_id={KEY}\naws_secret_access_key={SECRET}\n")
    (folder / "config").write_text(f"[default]\nregion={REGION}\n")
    settings = {
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / "credentials"),
        "AWS_CONFIG_FILE": str(folder / "config"),
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
    }
    return Server("SeaweedFS", command, "s3://bucket/prefix", settings, s3_bucket(endpoint))


def azurite(tools, _folder):
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}/{AZURE_ACCOUNT}"
    command = [tools / "azurite/node_modules/.bin/azurite-blob", "--blobHost", "127.0.0.1", "--blobPort", str(port)]
    command += ["--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry", "--silent"]
    settings = {
        "AZURE_STORAGE_ACCOUNT_NAME": AZURE_ACCOUNT,
        "AZURE_STORAGE_ACCOUNT_KEY": AZURE_KEY,
        "AZURE_STORAGE_ENDPOINT": endpoint,
        "AZURE_ALLOW_HTTP": "true",
    }
    return Server("Azurite", command, "az://bucket/prefix", settings, azure_container(endpoint))


def test(package, name, environment):
    """Runs one test; gives whether it passed, and what it said."""
    nextest = subprocess.run(["cargo", "nextest", "--version"], capture_output=True).returncode == 0
    command = ["cargo"] + (["nextest", "run"] if nextest else ["test"])
    command += ["--release", "--locked", "--workspace", "--no-fail-fast"]
    # The whole workspace, so that nothing is compiled with other features than by the other tests.
    if nextest:
        command += ["--run-ignored", "only", "--no-capture", "-E", f"package({package}) and test(/{name}$/)"]
    else:
        command += [name, "--", "--ignored", "--nocapture"]
    ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900)
    return ran.returncode == 0, ran.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tools", type=pathlib.Path, required=True, help="folder with moto, SeaweedFS and Azurite")
    parser.add_argument("--only", choices=["moto", "seaweedfs", "azurite"], help="only this server")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without ending the server
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "AZURE_", "GOOGLE_", "AZURITE_"))}
    failed = False
    for start in [moto, seaweedfs, azurite]:
        if arguments.only and start.__name__ != arguments.only:
            continue
        folder = pathlib.Path(tempfile.mkdtemp(prefix="ditharos-server-"))
        try:
            with start(arguments.tools, folder) as server:
                for what, package, name in SUITES:
                    began = time.monotonic()
                    passed, said = test(package, name, clean | server.settings | {"DITHAROS_TEST_STORE": server.url})
                    failed |= not passed
                    numbers = [line.strip() for line in said.splitlines() if line.strip().endswith("requests went wrong")]
                    extra = f"; {numbers[-1]}" if numbers else ""
                    print(f"{server.name}: {what}: {'ok' if passed else 'FAILED'} ({time.monotonic() - began:.0f} s{extra})", flush=True)
                    if not passed:
                        print(said[-6000:], file=sys.stderr)
                        print(f"--- {server.name} said:\n{server.said()}", file=sys.stderr)
        except RuntimeError as error:
            failed = True
            print(f"{start.__name__}: FAILED: {error}", flush=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
