#!/usr/bin/env python3
"""ternd and the clients that its users have: tritonclient over gRPC and HTTP, reflection, health, and the examples.

    TERN_CLIENTS_PYTHON=VENV/bin/python clients_test.py --ternd T --ternctl C --source S

TERN_CLIENTS_PYTHON is a Python with tritonclient[grpc,http], numpy, grpcio-tools, grpcio-reflection and
grpcio-health-checking (make_venv.sh); without it, and without them in this one, everything is skipped. The oracle is
ternctl, which speaks tern.v1: same image, same scores. TERN_PERF_ANALYZER names a perf_analyzer, which measures the
server for a moment; without it that test is skipped.
"""

import argparse
import json
import os
import pathlib
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
import urllib.request

if os.environ.get("TERN_CLIENTS_PYTHON") and os.environ["TERN_CLIENTS_PYTHON"] != sys.executable:
    os.execv(os.environ["TERN_CLIENTS_PYTHON"], [os.environ["TERN_CLIENTS_PYTHON"], *sys.argv])
try:
    import grpc
    import grpc_tools.protoc
    import numpy as np
    import tritonclient.grpc
    import tritonclient.http
    from google.protobuf.descriptor_pool import DescriptorPool
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
    from tritonclient.utils import InferenceServerException
    MISSING = None
except ImportError as error:
    MISSING = (f"{error.name} is not installed: make an environment with tests/interop/inference/make_venv.sh and set "
               "TERN_CLIENTS_PYTHON")

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "testing"))
import ternd

ARGS = None
PERF_ANALYZER = os.environ.get("TERN_PERF_ANALYZER") or shutil.which("perf_analyzer")
# cifar10's contract: pixels / 255, then these.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photos():
    return sorted(pathlib.Path(ARGS.source, "models/demo/photos").rglob("*.jpg"))[:12]


def encoded(paths):
    return np.array([path.read_bytes() for path in paths], dtype=np.object_)


@unittest.skipIf(MISSING, MISSING)
class Clients(unittest.TestCase):
    """One server with the demo model for all."""

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp(prefix="tern-clients-")
        cls.addClassCleanup(shutil.rmtree, cls.folder, ignore_errors=True)
        cls.server = ternd.Ternd(ARGS.ternd, os.path.join(cls.folder, "models"), "--demo")
        cls.addClassCleanup(cls.stop)
        cls.data = f"127.0.0.1:{cls.server.port}"
        cls.admin = f"127.0.0.1:{cls.server.admin_port}"
        cls.web = f"127.0.0.1:{cls.server.metrics_port}"

    @classmethod
    def stop(cls):
        status = cls.server.stop()
        assert status == 0, f"ternd ended with {status}"

    def grpc_client(self, address=None):
        client = tritonclient.grpc.InferenceServerClient(address or self.data)
        self.addCleanup(client.close)
        return client

    def http_client(self):
        client = tritonclient.http.InferenceServerClient(self.web, network_timeout=60)
        self.addCleanup(client.close)
        return client

    def oracle(self, path):
        """label -> probability of all classes, from tern.v1 by ternctl."""
        result = subprocess.run([ARGS.ternctl, "classify", "--server", self.data, "--model", "demo", "--top-k", "10", "--json",
                                 str(path)], capture_output=True, check=True, timeout=60)
        found = json.loads(result.stdout)
        found = found[0] if isinstance(found, list) else found.get("images", [found])[0]
        return {c["label"]: c["probability"] for c in found["classes"]}

    def labels(self):
        return pathlib.Path(ARGS.source, "models/demo/labels.txt").read_text().split()

    def assert_same_as_oracle(self, rows, paths):
        labels = self.labels()
        self.assertEqual(rows.shape, (len(paths), len(labels)))
        for row, path in zip(rows, paths):
            want = self.oracle(path)
            for label, probability in zip(labels, row):
                self.assertAlmostEqual(float(probability), want[label], places=5, msg=f"{path} {label}")

    def infer(self, module, client, images, outputs=None, **more):
        tensor = module.InferInput("image", [len(images)], "BYTES")
        tensor.set_data_from_numpy(images)
        return client.infer("demo", [tensor], outputs=outputs, **more)

    def test_grpc_images_get_the_scores_of_classify(self):
        paths = photos()[:4]
        answer = self.infer(tritonclient.grpc, self.grpc_client(), encoded(paths), request_id="mine", timeout=5_000_000,
                            priority=1)
        self.assert_same_as_oracle(answer.as_numpy("probabilities"), paths)
        response = answer.get_response()
        self.assertEqual(response.id, "mine")
        self.assertEqual(response.parameters["scheme"].string_param, "fp32")

    def test_http_images_get_the_scores_of_classify(self):
        paths = photos()[:4]
        for binary in (True, False):
            output = tritonclient.http.InferRequestedOutput("probabilities", binary_data=binary)
            answer = self.infer(tritonclient.http, self.http_client(), encoded(paths), [output])
            self.assert_same_as_oracle(answer.as_numpy("probabilities"), paths)

    def test_tensors_get_the_logits_of_the_pixels_they_are_made_of(self):
        pixels = np.random.default_rng(5).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
        network = ((pixels / np.float32(255) - np.float32(MEAN)) / np.float32(DEVIATION)).astype(np.float32)
        network = np.ascontiguousarray(network.transpose(0, 3, 1, 2))
        answers = []
        for module, client in ((tritonclient.grpc, self.grpc_client()), (tritonclient.http, self.http_client())):
            for array, datatype in ((pixels, "UINT8"), (network, "FP32")):
                for form in ({}, {"binary_data": False}) if module is tritonclient.http else ({},):
                    tensor = module.InferInput("image", list(array.shape), datatype)
                    tensor.set_data_from_numpy(array, **form)
                    answer = client.infer("demo", [tensor], outputs=[module.InferRequestedOutput("logits")])
                    answers.append(answer.as_numpy("logits"))
        self.assertEqual(len(answers), 6)
        for answer in answers:
            self.assertEqual(answer.shape, (3, 10))
            np.testing.assert_allclose(answer, answers[0], atol=1e-3)

    def test_classification_names_the_best_classes(self):
        paths = photos()[:2]
        for module, client in ((tritonclient.grpc, self.grpc_client()), (tritonclient.http, self.http_client())):
            outputs = [module.InferRequestedOutput("probabilities", class_count=5)]
            rows = self.infer(module, client, encoded(paths), outputs).as_numpy("probabilities")
            self.assertEqual(rows.shape, (2, 5))
            for row, path in zip(rows, paths):
                found = [element.decode().split(":") for element in row]
                want = sorted(self.oracle(path).items(), key=lambda item: -item[1])[:5]
                self.assertEqual([label for _, _, label in found], [label for label, _ in want])
                for (value, index, label), (_, probability) in zip(found, want):
                    self.assertAlmostEqual(float(value), probability, places=5)
                    self.assertEqual(self.labels()[int(index)], label)

    def test_a_stream_answers_in_order_and_goes_on_after_a_refusal(self):
        client = self.grpc_client()
        answers = queue.Queue()
        client.start_stream(lambda result, error: answers.put((result, error)))
        paths = photos()[:8]
        for i, path in enumerate(paths):
            data = np.array([b"junk" if i == 3 else path.read_bytes()], dtype=np.object_)
            tensor = tritonclient.grpc.InferInput("image", [1], "BYTES")
            tensor.set_data_from_numpy(data)
            client.async_stream_infer("demo", [tensor], request_id=str(i))
        for i, path in enumerate(paths):
            result, error = answers.get(timeout=60)
            if i == 3:
                self.assertIn("INVALID_ARGUMENT", str(error))
                continue
            self.assertIsNone(error)
            self.assertEqual(result.get_response().id, str(i))
            self.assert_same_as_oracle(result.as_numpy("probabilities"), [path])
        client.stop_stream()

    def test_metadata_config_and_readiness_agree_over_both_transports(self):
        web, rpc = self.http_client(), self.grpc_client()
        for client in (web, rpc):
            self.assertTrue(client.is_server_live() and client.is_server_ready() and client.is_model_ready("demo"))
            self.assertFalse(client.is_model_ready("none"))
        self.assertEqual(web.get_server_metadata(), rpc.get_server_metadata(as_json=True))
        metadata = web.get_model_metadata("demo")
        self.assertEqual(metadata["inputs"], [{"name": "image", "datatype": "FP32", "shape": [-1, 3, 32, 32]}])
        self.assertEqual(rpc.get_model_metadata("demo").inputs[0].shape, [-1, 3, 32, 32])
        config = web.get_model_config("demo")
        self.assertEqual(config["input"][0]["format"], "FORMAT_NCHW")
        self.assertEqual(rpc.get_model_config("demo").config.max_batch_size, config["max_batch_size"])
        for extension in ("sequence", "system_shared_memory", "cuda_shared_memory", "trace", "logging"):
            self.assertNotIn(extension, web.get_server_metadata()["extensions"])

    def test_statistics_count_what_was_asked(self):
        web, rpc = self.http_client(), self.grpc_client()
        before = rpc.get_inference_statistics("demo").model_stats[0]
        self.infer(tritonclient.grpc, rpc, encoded(photos()[:3]))
        self.infer(tritonclient.http, web, encoded(photos()[:1]))
        after = rpc.get_inference_statistics("demo").model_stats[0]
        self.assertEqual(after.inference_count - before.inference_count, 4)
        self.assertEqual(after.inference_stats.success.count - before.inference_stats.success.count, 2)
        self.assertEqual(web.get_inference_statistics("demo")["model_stats"][0]["inference_count"], after.inference_count)

    def test_the_repository_is_seen_on_the_data_port_and_changed_on_the_admin_port(self):
        rpc, admin = self.grpc_client(), self.grpc_client(self.admin)
        index = [{"name": "demo", "version": "1", "state": "READY"}]
        self.assertEqual(rpc.get_model_repository_index(as_json=True)["models"], index)
        self.assertEqual([{k: v for k, v in m.items() if v} for m in self.http_client().get_model_repository_index()], index)
        with self.assertRaisesRegex(InferenceServerException, "admin port"):
            rpc.unload_model("demo")
        admin.unload_model("demo")
        self.assertFalse(rpc.is_model_ready("demo"))
        admin.load_model("demo")
        self.assertTrue(rpc.is_model_ready("demo"))

    def test_errors_say_what_is_wrong(self):
        images = encoded(photos()[:1])
        for module, client in ((tritonclient.grpc, self.grpc_client()), (tritonclient.http, self.http_client())):
            with self.assertRaisesRegex(InferenceServerException, "model 'none'"):
                tensor = module.InferInput("image", [1], "BYTES")
                tensor.set_data_from_numpy(images)
                client.infer("none", [tensor])
            with self.assertRaisesRegex(InferenceServerException, "want probabilities or logits"):
                self.infer(module, client, images, [module.InferRequestedOutput("embedding")])
            with self.assertRaisesRegex(InferenceServerException, "image: "):
                self.infer(module, client, np.array([b"junk"], dtype=np.object_))
            with self.assertRaisesRegex(InferenceServerException, r"want \[N,3,32,32\]"):
                tensor = module.InferInput("image", [1, 3, 31, 32], "FP32")
                tensor.set_data_from_numpy(np.zeros((1, 3, 31, 32), np.float32))
                client.infer("demo", [tensor])
        with self.assertRaises(InferenceServerException) as refused:
            self.grpc_client().get_system_shared_memory_status()
        self.assertIn("UNIMPLEMENTED", refused.exception.status())

    def test_one_image_may_be_the_body(self):
        path = photos()[0]
        request = urllib.request.Request(f"http://{self.web}/v2/models/demo/infer", data=path.read_bytes(),
                                         headers={"Inference-Header-Content-Length": "0"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            scores = json.load(answer)["outputs"][0]["data"]
        self.assert_same_as_oracle(np.array([scores]), [path])

    def test_reflection_and_health_answer_python_clients(self):
        with grpc.insecure_channel(self.data) as channel:
            pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
            service = pool.FindServiceByName("inference.GRPCInferenceService")
            self.assertIn("ModelInfer", [method.name for method in service.methods])
            service = pool.FindServiceByName("grpc.health.v1.Health")
            self.assertEqual([method.name for method in service.methods], ["Check", "Watch"])
            health = health_pb2_grpc.HealthStub(channel)
            for name in ("", "demo", "inference.GRPCInferenceService", "tern.v1.ImageClassifier"):
                answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
                self.assertEqual(answer.status, health_pb2.HealthCheckResponse.SERVING)
            watch = health.Watch(health_pb2.HealthCheckRequest(service="demo"), timeout=10)
            self.assertEqual(next(watch).status, health_pb2.HealthCheckResponse.SERVING)
            watch.cancel()

    def test_the_examples_print_the_best_class(self):
        generated = os.path.join(self.folder, "gen")
        os.makedirs(generated, exist_ok=True)
        self.assertEqual(grpc_tools.protoc.main(
            ["protoc", f"-I{ARGS.source}/proto", f"--python_out={generated}", f"--grpc_python_out={generated}",
             "tern/v1/model.proto", "tern/v1/classifier.proto"]), 0)
        paths = photos()[:3]
        for example in ("classify_tritonclient.py", "classify_grpcio.py"):
            result = subprocess.run(
                [sys.executable, f"{ARGS.source}/docs/examples/{example}", "--server", self.data, "--model", "demo",
                 *map(str, paths)], env=dict(os.environ, PYTHONPATH=generated), capture_output=True, text=True, timeout=120)
            self.assertEqual(result.returncode, 0, result.stderr)
            lines = result.stdout.splitlines()
            self.assertEqual(len(lines), len(paths))
            for line, path in zip(lines, paths):
                scores = self.oracle(path)
                label = max(scores, key=scores.get)
                self.assertRegex(line, re.escape(f"{path}: {label} {100 * scores[label]:.1f} %"))

    @unittest.skipUnless(PERF_ANALYZER, "there is no perf_analyzer: set TERN_PERF_ANALYZER")
    def test_perf_analyzer_measures_the_server(self):
        for protocol, address in (("grpc", self.data), ("http", self.web)):
            result = subprocess.run(
                [PERF_ANALYZER, "-m", "demo", "-i", protocol, "-u", address, "--concurrency-range", "2",
                 "--measurement-mode", "count_windows", "--measurement-request-count", "50", "-s", "99", "-b", "2"],
                capture_output=True, text=True, timeout=300)
            self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
            self.assertRegex(result.stdout, r"Throughput: [1-9]")
            self.assertRegex(result.stdout, r"Inference count: [1-9]")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--ternd", required=True)
    parser.add_argument("--ternctl", required=True)
    parser.add_argument("--source", required=True)
    ARGS, rest = parser.parse_known_args()
    unittest.main(argv=[sys.argv[0], *rest], verbosity=2)
