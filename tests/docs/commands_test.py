#!/usr/bin/env python3
"""Runs every command that the documents show.

    commands_test.py --bin build/release/bin [--only docs/quickstart.md]

A fenced block marked `sh` in a document is a list of commands, and blocks without a mark hold none (a test looks). Each document's
commands run in order, in a folder that has what they name: small networks and photographs under the documents' names. What cannot
run here (an image build, a cluster, an hour of training) is named in ELSEWHERE with the test that does run it, or only has its flags
checked against the program's own help. A command that is neither fails the test.

Exit status 0, 1, or 77 if this machine lacks what the test needs. TERN_TORCH=1 says that torch and torchvision must be there.
"""

import argparse
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

SOURCE = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(SOURCE / "tests/testing"))
import ternd as harness  # noqa: E402

DEBIAN_PYTHON = "/usr/bin/python3"  # the one that sees Debian's torch
TIMEOUT = 300

# The first words of a command, and the test that runs it (a file) or why none does.
ELSEWHERE = {
    "docker": "tests/deploy/image_test.py",
    "docker compose": "tests/deploy/compose_checks.py",
    "helm": "tests/deploy/manifests_test.py",
    "kubectl": "tests/deploy/manifests_test.py",
    "ternctl finetune": "tests/finetune/job_test.cc",
    "tern-finetune": "tests/finetune/job_test.cc",
    "apt-get": "models/demo/make_photos.py",
    "for": "models/demo/make_photos.py",
}
# Programs whose flags are checked against their help: they take too long, or want data that is not here.
HELP = {"bench/accuracy.py", "bench/compare_peers.py", "bench/overload.py", "bench/scale_out.py", "bench/capacity.py", "tests/bench/overhead_bench.py", "tests/soak/soak.py", "tests/fault/fault_test.py",
        "startup_bench", "engine_bench", "train.py", "export.py", "./make_photos.py"}
# Flags that a library defines and does not list.
LIBRARY_FLAGS = {"--benchmark_min_time"}


def documents():
    found = [SOURCE / "README.md", *sorted((SOURCE / "docs").glob("*.md")), *sorted((SOURCE / "deploy").rglob("*.md")),
             *sorted((SOURCE / "docker").rglob("*.md")), SOURCE / "models/demo/README.md"]
    return [path for path in found if path.exists()]


def blocks(path):
    """(line, language, text) of every fenced block."""
    text = path.read_text()
    for match in re.finditer(r"^```(\w*)\n(.*?)^```", text, re.S | re.M):
        yield text.count("\n", 0, match.start()) + 2, match[1], match[2]


def commands(text):
    """The commands of a block: backslashes, open quotes, open braces and pipes continue a line, # begins a comment."""
    pending = ""
    for line in text.splitlines():
        pending += line + "\n"
        if line.endswith("\\"):
            continue
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:
            continue  # a quote is open
        if words and (words[-1] == "|" or words.count("{") > words.count("}")):
            continue
        if words:
            yield pending.strip(), words
        pending = ""
    if pending.strip():
        raise ValueError(f"does not end: {pending}")


class Failure(Exception):
    pass


class Sandbox:
    """What the documents talk about, in small."""

    def __init__(self, args):
        self.bin = args.bin.resolve()
        self.root = pathlib.Path(tempfile.mkdtemp(prefix="tern-docs-"))
        demo = SOURCE / "models/demo"
        photos = sorted((demo / "photos").glob("*/*.jpg"))
        for folder in ("photos", "val", "train", "test", "half1", "half2", "calibration", "cifar/train", "cifar/test", "data"):
            for photo in photos[::2 if folder == "half1" else 6]:  # mixed precision wants 50
                target = self.root / folder / photo.parent.name
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(photo, target)
        shutil.copy(photos[0], self.root / "cat.jpg")
        for name in ("model", "resnet50", "resnet20-cifar10", "resnet18", "squeezenet", "mobilenet_v2"):
            shutil.copy(demo / "model.onnx", self.root / f"{name}.onnx")
        for name in ("imagenet.txt", "labels.txt"):
            shutil.copy(demo / "labels.txt", self.root / name)
        # Paths of the repository, as the documents write them.
        for name in ("docs", "bench", "tests", "models", "deploy", "docker", "scripts"):
            os.symlink(SOURCE / name, self.root / name)
        self.server = harness.Ternd(str(self.bin / "ternd"), str(self.root / "repository"), "--demo")
        self.env = dict(os.environ, TERN_SERVER=f"127.0.0.1:{self.server.port}", TERN_ADMIN=f"127.0.0.1:{self.server.admin_port}",
                        PATH=f"{self.bin}:{os.environ['PATH']}")
        self.has_torch = subprocess.run([DEBIAN_PYTHON, "-c", "import torchvision"], capture_output=True).returncode == 0
        if os.environ.get("TERN_TORCH") and not self.has_torch:
            raise Failure("torchvision is missing")
        # Versions that documents take up where a reader has them.
        self.shell("ternctl import --name r50 --onnx resnet50.onnx --preprocess cifar10 --labels imagenet.txt --quiet && "
                   "ternctl import --name squeezenet --onnx squeezenet.onnx --preprocess cifar10 --quiet && "
                   "ternctl import --name resnet50 --onnx resnet50.onnx --preprocess cifar10 --quiet && "
                   "for model in r50 demo; do for weights in int8 ternary; do "
                   "ternctl quantize --model $model --weights $weights --method direct --distill off --calibration photos/ --quiet; done; done && "
                   "ternctl export --model r50 --version 2 --format onnx --output r50-int8-qdq.onnx --quiet && "
                   "ternctl export --model demo --version 3 --output tuned.tern --quiet")

    def close(self):
        status = self.server.stop()
        shutil.rmtree(self.root, ignore_errors=True)
        if status != 0:
            raise Failure(f"ternd ended with {status}")

    def shell(self, command):
        result = subprocess.run(["bash", "-c", command], cwd=self.root, env=self.env, capture_output=True, text=True, timeout=TIMEOUT)
        if result.returncode != 0:
            raise Failure(f"exit status {result.returncode}: {(result.stdout + result.stderr)[-2000:]}")
        return result.stdout

    # How each kind of command is run; what was done with it is returned, for the table.
    def run(self, text, words):
        program = words[0]
        for key in (" ".join(words[:2]), program):
            if key in ELSEWHERE:
                if not (SOURCE / ELSEWHERE[key]).exists():
                    raise Failure(f"{ELSEWHERE[key]} is gone")
                return f"by {ELSEWHERE[key]}"
        if program == "make":
            self.dry_make([word for word in words[1:]])
            return "make -n"
        if program.endswith("python") or program == "python3":
            words = words[1:]
            program = words[0]
            if program == "docs/examples/export_torchvision.py":
                return self.export(words)
        if program.endswith("make_venv.sh") or program.startswith("build/fuzz/bin/"):
            wanted = SOURCE / program if program.endswith(".sh") else SOURCE / f"tests/fuzz/{pathlib.Path(program).name}.cc"
            if not wanted.exists():
                raise Failure(f"{wanted} is gone")
            return "exists"
        if program in HELP:
            return self.flags(program, words)
        if program == "input_bench":
            unknown = [word for word in words[1:] if word.split("=")[0] not in LIBRARY_FLAGS]
            if unknown or not (self.bin / program).exists():
                raise Failure(f"unknown: {unknown or program}")
            return "flags"
        if program == "ternd":
            return self.ternd(words)
        if program == "curl" or (program == "{" and "curl" in words):
            return self.curl(text)
        if program == "ternctl":
            text = re.sub(r"--server \S+\.svc:\d+ ", "", text)
            # The small network that stands in for those of the documents takes 32 x 32 pixels.
            text = text.replace("--preprocess imagenet", "--preprocess cifar10")
            # The same steps in less time.
            text = re.sub(r"--seconds [\d.]+", "", text)
            text = re.sub(r"^ternctl (bench|compare)", r"ternctl \1 --seconds 0.3", text)
            if words[1] in ("quantize", "sweep") and "--distill" not in words:
                text = re.sub(r"^ternctl (\w+)", r"ternctl \1 --distill off", text)
            if words[1] == "sweep":
                text = re.sub(r"--clusters \S+", "", text).replace("ternctl sweep", "ternctl sweep --clusters 64", 1)
            begin = time.monotonic()
            self.shell(text)
            return f"run, {time.monotonic() - begin:.1f} s"
        raise Failure("no rule says how to run it")

    def dry_make(self, words):
        result = subprocess.run(["make", "-n", *words], cwd=SOURCE, capture_output=True, text=True)
        if result.returncode != 0:
            raise Failure(result.stderr)

    def export(self, words):
        if not self.has_torch:
            return "skipped: torchvision is missing"
        # Weights of torchvision come from the network.
        self.shell(shlex.join([DEBIAN_PYTHON, *words, "--random"]))
        # The steps after it take seconds with the small network.
        shutil.copy(SOURCE / "models/demo/model.onnx", self.root / words[2])
        return "run, random weights"

    def flags(self, program, words):
        candidates = [self.bin / program, SOURCE / program, SOURCE / "models/demo" / program]
        path = next((path for path in candidates if path.exists()), None)
        if path is None:
            raise Failure(f"{program} is gone")
        if path.is_relative_to(SOURCE) and words[0] == program and not os.access(path, os.X_OK):
            raise Failure(f"{program} is not executable")
        # Scripts that need torch do not get as far as their help: their source names the flags as well.
        known = path.read_text() if path.suffix == ".py" else subprocess.run(
            [path, "--help"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
        for word in words[1:]:
            flag = word.split("=")[0]
            if flag.startswith("--") and not re.search(re.escape(flag) + r"\b", known):
                raise Failure(f"{program} knows no {flag}")
        return "flags"

    def ternd(self, words):
        flags = [word for word in words[1:] if word != "&"]
        kept = []
        while flags:
            flag = flags.pop(0)
            if flag == "--repository":
                flags.pop(0)
            elif not re.match(r"--(repository|host|port|admin_host|admin_port|metrics_host|metrics_port|ports_file)=", flag):
                kept.append(flag)
        server = harness.Ternd(str(self.bin / "ternd"), str(self.root / "another"), *kept)
        status = server.stop()
        if status != 0:
            raise Failure(f"ended with {status}")
        return "run"

    def curl(self, text):
        text = re.sub(r"localhost:8502|[a-z-]+\.NAMESPACE\.svc", f"127.0.0.1:{self.server.metrics_port}", text)
        text = re.sub(r"(^|\|\s*)curl\b", r"\1curl --fail-with-body -sS", text)
        self.shell(text)
        return "run"


def unmarked(path):
    """Command lines in blocks that are not marked as such."""
    programs = ("ternd ", "ternctl ", "make ", "docker ", "helm ", "kubectl ", "curl ", "python3 ", "tern-finetune ", "promtool ")
    for line, language, text in blocks(path):
        if language == "sh":
            continue
        for offset, command in enumerate(text.splitlines()):
            if command.startswith(programs):
                yield f"{path.relative_to(SOURCE)}:{line + offset}: {command}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, required=True, help="folder of the programs")
    parser.add_argument("--only", default="", help="this document alone")
    args = parser.parse_args()
    failures = [f"{what}: a command in a block that is not marked sh" for path in documents() for what in unmarked(path)]
    sandbox = Sandbox(args)
    count = 0
    try:
        for path in documents():
            name = str(path.relative_to(SOURCE))
            if args.only and name != args.only:
                continue
            for line, language, block in blocks(path):
                if language != "sh":
                    continue
                for text, words in commands(block):
                    count += 1
                    try:
                        done = sandbox.run(text, words)
                    except (Failure, OSError, RuntimeError, subprocess.TimeoutExpired) as error:
                        done = f"FAILED: {error}"
                        failures.append(f"{name}:{line}: {text}\n    {error}")
                    print(f"{name}:{line:<5} {text.splitlines()[0][:80]:<80}  {done.splitlines()[0][:60]}", flush=True)
    finally:
        sandbox.close()
    if count == 0:
        failures.append("no command was found")
    print(f"{count} commands, {len(failures)} failures")
    for failure in failures:
        print(failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
