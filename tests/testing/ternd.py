"""A ternd process for tests and its API: what the fault and the soak program share.

The API needs Debian's python3-grpcio and python3-protobuf; messages are generated from proto/ by protoc at run time.
"""

import collections
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request

try:
    import grpc
except ImportError:
    grpc = None


def missing():
    """What this machine lacks for Api; empty if nothing."""
    lacks = []
    if grpc is None:
        lacks.append("python3-grpcio")
    try:
        importlib.import_module("google.protobuf")
    except ImportError:
        lacks.append("python3-protobuf")
    if shutil.which("protoc") is None:
        lacks.append("protobuf-compiler")
    return ", ".join(lacks)


def metric(text, name, **labels):
    """The summed value of the samples of `name` that carry `labels`; None if there is none."""
    total = None
    for line in text.splitlines():
        if line.startswith(name + "{") or line.startswith(name + " "):
            if all(f'{key}="{value}"' in line for key, value in labels.items()):
                total = (total or 0) + float(line.rsplit(" ", 1)[1])
    return total


def cpu_seconds(pid):
    """User and system time that a process has taken so far, in units of 1 / SC_CLK_TCK (10 ms)."""
    with open(f"/proc/{pid}/stat") as f:
        fields = f.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def poll(condition, seconds, what, error=AssertionError):
    """Waits until `condition` returns something true; its value. Raises `error` with `what`, a text or what makes one."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise error(what() if callable(what) else what)
        time.sleep(0.05)


Resources = collections.namedtuple("Resources", "rss_kib descriptors threads")


class Ternd:
    """One ternd on free loopback ports over `repository`; `wrapper` is a command that ends in exec."""

    def __init__(self, program, repository, *flags, wrapper=()):
        self.folder = tempfile.mkdtemp(prefix="ternd-")
        self.log = open(os.path.join(self.folder, "log"), "w+")
        ports = os.path.join(self.folder, "ports.json")
        self.process = subprocess.Popen(
            [*wrapper, program, "--repository", repository, "--host=127.0.0.1", "--admin_host=127.0.0.1",
             "--metrics_host=127.0.0.1", "--port=0", "--admin_port=0", "--metrics_port=0", "--ports_file", ports, *flags],
            stderr=self.log)
        deadline = time.monotonic() + 120
        while not os.path.exists(ports):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("ternd did not get ready:\n" + self.log_text())
            time.sleep(0.02)
        with open(ports) as f:
            found = json.load(f)
        self.port, self.admin_port, self.metrics_port = found["port"], found["admin_port"], found["metrics_port"]

    @property
    def pid(self):
        return self.process.pid

    def log_text(self):
        with open(os.path.join(self.folder, "log"), errors="replace") as f:
            return f.read()

    def metrics(self, timeout=10):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=timeout) as reply:
            return reply.read().decode()

    def status(self, field):
        """A number of /proc/PID/status: VmRSS and VmHWM in KiB, Threads."""
        with open(f"/proc/{self.pid}/status") as f:
            for line in f:
                if line.startswith(field + ":"):
                    return int(line.split()[1])
        raise OSError(f"/proc/{self.pid}/status has no {field}: the process has ended")

    def peak_kib(self):
        """The most memory that was ever resident."""
        with open(f"/proc/{self.pid}/status") as f:
            return next(int(line.split()[1]) for line in f if line.startswith("VmHWM"))

    def resources(self):
        return Resources(self.status("VmRSS"), len(os.listdir(f"/proc/{self.pid}/fd")), self.status("Threads"))

    def reset_peak(self):
        """VmHWM counts from here."""
        with open(f"/proc/{self.pid}/clear_refs", "w") as f:
            f.write("5")

    def alive(self):
        return self.process.poll() is None

    def stop(self):
        """SIGTERM; returns the exit status. Shows the log of a server that failed: the reports of sanitizers are there."""
        if self.alive():
            self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(timeout=60)
            if status > 0 and not self.log.closed:
                print(self.log_text()[-10000:], file=sys.stderr)
            return status
        finally:
            if self.alive():
                self.process.kill()
                self.process.wait()
            self.log.close()
            shutil.rmtree(self.folder, ignore_errors=True)


def messages(source):
    """The modules of proto/tern/v1, as attributes: messages(source).classifier.ClassifyRequest."""
    out = tempfile.mkdtemp(prefix="tern-proto-")
    names = ["model", "classifier", "registry", "quantizer", "profiler"]
    try:
        subprocess.run(["protoc", "-I", os.path.join(source, "proto"), f"--python_out={out}",
                        *(f"tern/v1/{name}.proto" for name in names)], cwd=source, check=True)
        sys.path.insert(0, out)
        modules = {name: importlib.import_module(f"tern.v1.{name}_pb2") for name in names}
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return collections.namedtuple("Messages", names)(**modules)


class Api:
    """Calls of one server; every method raises grpc.RpcError."""

    CHUNK = 1 << 20

    def __init__(self, server, protos):
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1),
                   ("grpc.use_local_subchannel_pool", 1)]
        self.protos = protos
        self.data = grpc.insecure_channel(f"127.0.0.1:{server.port}", options)
        self.admin = grpc.insecure_channel(f"127.0.0.1:{server.admin_port}", options)
        c = protos.classifier
        self.classify_call = self.data.unary_unary(
            "/tern.v1.ImageClassifier/Classify", c.ClassifyRequest.SerializeToString, c.ClassifyResponse.FromString)
        self.classify_stream = self.data.stream_stream(
            "/tern.v1.ImageClassifier/ClassifyStream", c.ClassifyRequest.SerializeToString,
            c.ClassifyStreamResponse.FromString)
        self.health_call = self.data.unary_unary("/grpc.health.v1.Health/Check")

    def close(self):
        self.data.close()
        self.admin.close()

    def request(self, image, model="demo", version=0, **fields):
        return self.protos.classifier.ClassifyRequest(model=model, version=version, image=image, **fields)

    def classify(self, image, model="demo", version=0, timeout=30, **fields):
        return self.classify_call(self.request(image, model, version, **fields), timeout=timeout)

    def serving(self, timeout=10):
        return self.health_call(b"", timeout=timeout) == b"\x08\x01"

    def registry(self, method, request, response, timeout=120):
        return self.admin.unary_unary(f"/tern.v1.ModelRegistry/{method}", type(request).SerializeToString,
                                      response.FromString)(request, timeout=timeout)

    def version(self, method, model, version):
        """Load, Unload or SetDefault."""
        r = self.protos.registry
        return self.registry(method, r.VersionRequest(model=model, version=version), r.ModelVersion)

    def get(self, model, version):
        r = self.protos.registry
        return self.registry("Get", r.GetRequest(model=model, version=version), r.ModelVersion)

    def delete(self, model, version):
        r = self.protos.registry
        return self.registry("Delete", r.VersionRequest(model=model, version=version), r.DeleteResponse)

    def versions(self, model=""):
        r = self.protos.registry
        return self.registry("List", r.ListRequest(model=model), r.ListResponse).versions

    def upload(self, name, content, **start):
        """Imports `content` as a new version of `name`; `start` are other fields of ImportStart."""
        r = self.protos.registry

        def requests():
            yield r.ImportRequest(start=r.ImportStart(name=name, **start))
            for at in range(0, len(content), self.CHUNK):
                yield r.ImportRequest(chunk=content[at:at + self.CHUNK])
        return self.admin.stream_unary("/tern.v1.ModelRegistry/Import", r.ImportRequest.SerializeToString,
                                       r.ImportResponse.FromString)(requests(), timeout=120).version
