#!/usr/bin/env python3
"""What deploy/kserve promises, on running servers: two replicas, started with the arguments of runtime.yaml, share a repository
that another server writes. Only addresses and the folder differ from the cluster's."""

import argparse
import contextlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.error
import urllib.request

try:
    from manifests import SOURCE, documents
except ImportError:
    print("kserve_test ... skipped 'python3-yaml is not installed'")
    sys.exit(77)

sys.path.insert(0, str(SOURCE / "tests/testing"))
from ternd import Ternd  # noqa: E402

ARGS = None
PHOTO = sorted((SOURCE / "models/demo/photos").rglob("*.jpg"))[0]


def runtime_container():
    return documents((SOURCE / "deploy/kserve/runtime.yaml").read_text())[0]["spec"]["containers"][0]


def runtime_flags():
    """The runtime's own flags, without the folder and the ports."""
    return [a for a in runtime_container()["args"] if not re.match(r"--(repository|port|metrics_port)=", a)]


def wait_until(what, seconds=60):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if what():
            return True
        time.sleep(0.05)
    return False


class Server(Ternd):

    def ternctl(self, *arguments):
        environment = dict(os.environ, TERN_SERVER=f"127.0.0.1:{self.port}", TERN_ADMIN=f"127.0.0.1:{self.admin_port}")
        return subprocess.run([ARGS.ternctl, *arguments], env=environment, capture_output=True, text=True, timeout=120)

    def http(self, path, body=None, headers=None):
        """(status, JSON or text)."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.metrics_port}{path}", data=body, headers=headers or {})
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                text = reply.read().decode()
                return reply.status, json.loads(text) if text.startswith(("{", "[")) else text
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def answers_with_version(self, path="/v2/models/demo/infer"):
        status, reply = self.http(path, PHOTO.read_bytes(), {"Inference-Header-Content-Length": "0"})
        return reply["model_version"] if status == 200 else status


class KServe(unittest.TestCase):

    def setUp(self):
        self.root = pathlib.Path(tempfile.mkdtemp(prefix="tern-kserve-"))
        self.stack = contextlib.ExitStack()
        self.stack.callback(shutil.rmtree, self.root)
        self.repository = self.root / "models"
        self.writer = self.server("--demo", "--grace=1s")

    def tearDown(self):
        self.stack.close()

    def server(self, *flags):
        server = Server(ARGS.ternd, str(self.repository), *flags)
        self.stack.callback(server.stop)
        return server

    def replicas(self):
        # A cluster looks every five seconds and drains for five.
        flags = [re.sub(r"^--(poll_interval|drain)=.*", r"--\1=1s", flag) for flag in runtime_flags()]
        self.assertEqual(len(flags), len(runtime_flags()))
        return [self.server(*flags) for _ in range(2)]

    def test_replicas_share_a_repository_and_follow_its_default(self):
        replicas = self.replicas()
        ready = runtime_container()["readinessProbe"]["httpGet"]["path"]
        for replica in replicas:
            self.assertEqual(replica.http(ready)[0], 200)
            self.assertEqual(replica.http(runtime_container()["livenessProbe"]["httpGet"]["path"])[0], 200)
            self.assertEqual(replica.answers_with_version(), "1")
            result = replica.ternctl("classify", "--model", "demo", str(PHOTO))
            self.assertEqual(result.returncode, 0, result.stderr)

        # A second version, by the server that writes: those that name it get it, the others do not.
        onnx = self.repository / "demo/1/model.onnx"
        result = self.writer.ternctl("import", "--name", "demo", "--onnx", str(onnx), "--preprocess", "cifar10")
        self.assertEqual(result.returncode, 0, result.stderr)
        for replica in replicas:
            self.assertTrue(wait_until(lambda: replica.http("/v2/models/demo/versions/2/ready")[0] == 200))
            self.assertEqual(replica.answers_with_version("/v2/models/demo/versions/2/infer"), "2")
            self.assertEqual(replica.answers_with_version(), "1")

        # The pointer moves and goes back, and every replica with it.
        for version in ("2", "1"):
            self.assertEqual(self.writer.ternctl("set-default", "--model", "demo", "--version", version).returncode, 0)
            for replica in replicas:
                self.assertTrue(wait_until(lambda: replica.answers_with_version() == version), version)

    def test_a_replica_refuses_changes_and_reports_that_it_drains(self):
        replica = self.replicas()[0]
        result = replica.ternctl("set-default", "--model", "demo", "--version", "1")
        self.assertEqual(result.returncode, 1)
        self.assertIn("read-only", result.stderr)
        result = replica.ternctl("quantize", "--model", "demo", "--weights", "int8", "--calibration",
                                 str(SOURCE / "models/demo/calibration"))
        self.assertIn("read-only", result.stderr)
        replica.process.terminate()
        ready = runtime_container()["readinessProbe"]["httpGet"]["path"]
        self.assertTrue(wait_until(lambda: replica.http(ready)[0] == 503, 10))
        self.assertEqual(replica.process.wait(timeout=30), 0)

    def test_a_demo_cannot_be_put_into_a_read_only_repository(self):
        result = subprocess.run([ARGS.ternd, f"--repository={self.repository}", "--read_only", "--demo"],
                                capture_output=True, text=True, timeout=60)
        self.assertEqual(result.returncode, 2)
        self.assertIn("--read_only", result.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--ternd", required=True)
    parser.add_argument("--ternctl", required=True)
    ARGS, rest = parser.parse_known_args()
    unittest.main(argv=[sys.argv[0], *rest], verbosity=2)
