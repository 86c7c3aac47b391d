"""End to end: the real ternd and ternctl on loopback, with the demo model and photographs."""

import argparse
import http.client
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.request
import xml.etree.ElementTree

ARGS = None


class Server:
    """One ternd on free loopback ports over `repository`."""

    def __init__(self, repository, *flags):
        self.folder = tempfile.mkdtemp(prefix="tern-e2e-")
        self.repository = repository
        self.log = open(os.path.join(self.folder, "log"), "w+")
        ports = os.path.join(self.folder, "ports.json")
        self.process = subprocess.Popen(
            [ARGS.ternd, "--repository", repository, "--host", "127.0.0.1", "--admin_host", "127.0.0.1",
             "--metrics_host", "127.0.0.1", "--port=0", "--admin_port=0", "--metrics_port=0",
             "--ports_file", ports, *flags], stderr=self.log)
        deadline = time.monotonic() + 120
        while not os.path.exists(ports):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError("ternd did not get ready:\n" + self.log_text())
            time.sleep(0.02)
        with open(ports) as f:
            self.ports = json.load(f)
        self.env = dict(os.environ, TERN_SERVER=f"127.0.0.1:{self.ports['port']}",
                        TERN_ADMIN=f"127.0.0.1:{self.ports['admin_port']}")

    def log_text(self):
        with open(os.path.join(self.folder, "log")) as f:
            return f.read()

    def run(self, *args, stdin=None, timeout=300):
        return subprocess.run([ARGS.ternctl, *args], env=self.env, input=stdin, capture_output=True,
                              timeout=timeout)

    def json(self, *args):
        result = self.run(*args, "--json")
        if result.returncode != 0:
            raise AssertionError(f"ternctl {args}: {result.returncode}\n{result.stderr.decode()}")
        return json.loads(result.stdout)

    def start(self, *args):
        return subprocess.Popen([ARGS.ternctl, *args], env=self.env, stdout=subprocess.DEVNULL,
                                stderr=subprocess.DEVNULL)

    def metrics(self):
        url = f"http://127.0.0.1:{self.ports['metrics_port']}/metrics"
        with urllib.request.urlopen(url, timeout=10) as reply:
            return reply.read().decode()

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.stop()

    def stop(self):
        """SIGTERM; returns the exit status. Shows the log of a server that failed: the reports of sanitizers are there."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(timeout=60)
            if status > 0 and not self.log.closed:
                print(self.log_text()[-10000:], file=sys.stderr)
            return status
        finally:
            self.log.close()
            shutil.rmtree(self.folder, ignore_errors=True)


def metric(text, name, **labels):
    """The summed value of the samples of `name` that carry `labels`; None if there is none."""
    total = None
    for line in text.splitlines():
        if line.startswith(name + "{") or line.startswith(name + " "):
            if all(f'{key}="{value}"' in line for key, value in labels.items()):
                total = (total or 0) + float(line.rsplit(" ", 1)[1])
    return total


def photos():
    return os.path.join(ARGS.source, "models/demo/photos")


def calibration():
    return os.path.join(ARGS.source, "models/demo/calibration")


def one_photo():
    return str(sorted(pathlib.Path(photos()).rglob("*.jpg"))[0])


class MainJob(unittest.TestCase):
    """One server for the whole class; the demo model in four quantised versions."""

    @classmethod
    def setUpClass(cls):
        cls.repository = tempfile.mkdtemp(prefix="tern-e2e-repository-")
        cls.server = Server(cls.repository, "--demo", "--max_image_bytes=1000000")
        cls.reports = {}
        for version, (weights, cluster) in enumerate(
                [("int8", 1), ("int4", 16), ("ternary", 4), ("ternary", 64)], start=2):
            cls.reports[version] = cls.server.json(
                "quantize", "--model", "demo", "--from", "1", "--weights", weights, "--cluster", str(cluster),
                "--method", "compensated", "--activations", "affine", "--calibration", calibration(),
                "--calibration-count", "60", "--evaluation", photos(), "--seed", "0")

    @classmethod
    def tearDownClass(cls):
        status = cls.server.stop()
        shutil.rmtree(cls.repository)
        assert status == 0, f"ternd exited with {status} after SIGTERM"

    def test_quantize_publishes_one_version_per_recipe(self):
        for version, report in self.reports.items():
            self.assertEqual(report["version"], version)
            self.assertEqual(report["model"], "demo")
        listed = {v["version"]: v for v in self.server.json("models")["versions"]}
        self.assertEqual(sorted(v for v in listed if v <= 5), [1, 2, 3, 4, 5])
        self.assertLess(self.reports[4]["bytes"], self.reports[2]["bytes"])
        self.assertLess(self.reports[2]["bytes"], listed[1]["bytes"])

    def test_int8_agrees_with_float_on_the_photographs(self):
        self.assertGreaterEqual(self.reports[2]["agreement"], 0.93)
        self.assertGreaterEqual(self.reports[3]["agreement"], 0.85)

    def test_ternary_bits_and_multiplications_follow_the_definition(self):
        self.assertLess(self.reports[5]["bits_per_weight"], self.reports[4]["bits_per_weight"])
        self.assertLess(self.reports[4]["bits_per_weight"], 3.0)
        self.assertGreater(self.reports[4]["multiplications_removed"], 0.8)

    def test_evaluate_counts_the_photographs(self):
        count = len(list(pathlib.Path(photos()).rglob("*.jpg")))
        result = self.server.json("evaluate", "--model", "demo", "--version", "2", "--data", photos(),
                                  "--reference-version", "1")
        self.assertEqual(result["images"], count)
        self.assertAlmostEqual(result["agreement"], self.reports[2]["agreement"], places=6)
        self.assertAlmostEqual(result["top1"], self.reports[2]["top1"], places=6)
        low, high = result["top1_ci95"]
        self.assertTrue(low <= result["top1"] <= high)

    def test_classify_answers_every_version_and_from_stdin(self):
        with open(one_photo(), "rb") as f:
            image = f.read()
        for version in "12345":
            result = self.server.run("classify", "--model", "demo", "--version", version, "--json", "-", stdin=image)
            self.assertEqual(result.returncode, 0, result.stderr)

    def test_bad_image_unknown_model_and_oversized_input_are_told_apart(self):
        bad = self.server.run("classify", "--model", "demo", "-", stdin=b"not an image")
        self.assertEqual(bad.returncode, 1)
        self.assertIn(b"INVALID_ARGUMENT", bad.stderr)
        unknown = self.server.run("classify", "--model", "nobody", one_photo())
        self.assertIn(b"NOT_FOUND", unknown.stderr)
        self.assertIn(b"demo", unknown.stderr)  # says what exists
        version = self.server.run("classify", "--model", "demo", "--version", "77", one_photo())
        self.assertIn(b"NOT_FOUND", version.stderr)
        big = self.server.run("classify", "--model", "demo", "-", stdin=b"\xff\xd8" + b"0" * 1000100)
        self.assertIn(b"RESOURCE_EXHAUSTED", big.stderr)
        photo = pathlib.Path(one_photo()).read_bytes()
        half = self.server.run("classify", "--model", "demo", "-", stdin=photo[: len(photo) // 2])
        self.assertIn(b"INVALID_ARGUMENT", half.stderr)
        self.assertEqual(self.server.run("classify", "--model", "demo", one_photo()).returncode, 0)

    def test_labels_feed_live_accuracy(self):
        before = metric(self.server.metrics(), "tern_labelled_predictions_total", model="demo", version="3") or 0
        self.server.json("evaluate", "--model", "demo", "--version", "3", "--data", photos(), "--limit", "5")
        self.assertEqual(metric(self.server.metrics(), "tern_labelled_predictions_total", model="demo", version="3")
                         or 0, before)  # evaluation is not live traffic
        first = self.server.run("classify", "--model", "demo", "--version", "3", "--json", one_photo())
        answer = json.loads(first.stdout)
        request_id = answer["images"][0]["request_id"]
        self.assertEqual(self.server.run("label", "--request-id", request_id, "--label", "0").returncode, 0)
        self.assertEqual(metric(self.server.metrics(), "tern_labelled_predictions_total", model="demo", version="3"),
                         before + 1)
        again = self.server.run("label", "--request-id", request_id, "--label", "0")
        self.assertIn(b"ALREADY_EXISTS", again.stderr)
        self.assertIn(b"NOT_FOUND", self.server.run("label", "--request-id", "no-such-id", "--label", "0").stderr)

    def test_metrics_show_requests_stages_and_the_report(self):
        self.server.run("classify", "--model", "demo", "--version", "2", one_photo())
        text = self.server.metrics()
        for name in ["tern_requests_total", "tern_request_duration_seconds_count", "tern_images_total",
                     "tern_batch_size_count", "tern_model_ready", "tern_model_bytes", "tern_quantization_sqnr_db"]:
            self.assertIsNotNone(metric(text, name), name)
        for stage in ["decode", "preprocess", "queue", "inference", "postprocess"]:
            self.assertGreater(metric(text, "tern_stage_duration_seconds_count", stage=stage), 0)

    def test_accuracy_gate_refuses_to_publish(self):
        before = len(self.server.json("models")["versions"])
        gate = self.server.run("quantize", "--model", "demo", "--from", "1", "--weights", "ternary", "--cluster", "64",
                               "--method", "direct", "--calibration", calibration(), "--calibration-count", "20",
                               "--evaluation", photos(), "--max-top1-drop", "0.0", "--json")
        self.assertEqual(gate.returncode, 3, gate.stderr)
        self.assertFalse(json.loads(gate.stdout)["published"])
        self.assertEqual(len(self.server.json("models")["versions"]), before)

    def test_sweep_over_folds_measures_every_image_once_and_resumes(self):
        before = len(self.server.json("models")["versions"])
        with tempfile.TemporaryDirectory() as folder:
            arguments = ("sweep", "--model", "demo", "--calibration", photos(), "--folds", "2", "--limit", "16",
                         "--weights", "ternary,int8", "--clusters", "4,64", "--methods", "direct", "--out", folder)
            result = self.server.json(*arguments)
            self.assertEqual([(r["weights"], r["cluster_size"], r["status"], r["resumed"]) for r in result["rows"]],
                             [("ternary", 4, "ok", False), ("ternary", 64, "ok", False), ("int8", None, "ok", False)])
            for row in result["rows"]:
                self.assertEqual(row["images"], 16)
                self.assertEqual([fold["images"] for fold in row["folds"]], [8, 8])
                self.assertEqual(row["overlapping_images"], 0)
                self.assertGreater(row["ms_per_image"], 0)
                self.assertAlmostEqual(row["comparison"]["drop"], row["float_top1"] - row["top1"], places=9)
                low, high = row["comparison"]["drop_ci95"]
                self.assertTrue(low <= row["comparison"]["drop"] <= high)
            ternary = result["rows"]
            self.assertLess(ternary[0]["multiplications_removed"], ternary[1]["multiplications_removed"])
            self.assertGreater(ternary[0]["bits_per_weight"], ternary[1]["bits_per_weight"])
            for name in ("drop.svg", "bits.svg", "ms.svg"):
                root = xml.etree.ElementTree.parse(os.path.join(folder, name)).getroot()
                self.assertEqual(root.tag, "{http://www.w3.org/2000/svg}svg")
            again = self.server.json(*arguments)
            self.assertTrue(all(row["resumed"] for row in again["rows"]))
            self.assertEqual([row["top1"] for row in again["rows"]], [row["top1"] for row in result["rows"]])
        self.assertEqual(len(self.server.json("models")["versions"]), before)

    def test_bench_reports_rates_for_server_and_engine(self):
        served = self.server.json("bench", "--model", "demo", "--version", "2", "--data", photos(), "--concurrency", "4",
                                  "--seconds", "1")
        engine = self.server.json("bench", "--engine", "--model", "demo", "--version", "2", "--batch", "2",
                                  "--threads", "1", "--seconds", "0.5")
        for result in (served, engine):
            self.assertGreater(result["images_per_second"], 0)
            self.assertGreaterEqual(result["p99_ms"], result["p50_ms"])
            self.assertEqual(result["errors"], 0)

    def test_exported_artifact_is_the_stored_file(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "m.tern")
            self.assertEqual(self.server.run("export", "--model", "demo", "--version", "4", "--output", path).returncode, 0)
            stored = os.path.join(self.repository, "demo/4/model.tern")
            self.assertEqual(pathlib.Path(path).read_bytes(), pathlib.Path(stored).read_bytes())

    def test_health_answers_for_server_and_model(self):
        self.assertEqual(self.server.run("health").returncode, 0)
        self.assertEqual(self.server.run("health", "--service", "demo").returncode, 0)
        self.assertNotEqual(self.server.run("health", "--service", "nobody").returncode, 0)


class Crashes(unittest.TestCase):
    """kill -9 and damage: what was published is served, nothing partial ever is."""

    def setUp(self):
        self.repository = tempfile.mkdtemp(prefix="tern-e2e-repository-")
        self.addCleanup(shutil.rmtree, self.repository)

    def states(self, server):
        return {(v["model"], v["version"]): v["state"] for v in server.json("models")["versions"]}

    def test_damaged_and_half_written_versions_are_marked_and_others_serve(self):
        server = Server(self.repository, "--demo")
        server.json("quantize", "--model", "demo", "--weights", "int8", "--calibration", calibration(),
                    "--calibration-count", "10")
        server.json("quantize", "--model", "demo", "--weights", "ternary", "--cluster", "4", "--method", "direct",
                    "--calibration", calibration(), "--calibration-count", "10")
        self.assertEqual(server.stop(), 0)
        artifact = pathlib.Path(self.repository, "demo/2/model.tern")
        content = bytearray(artifact.read_bytes())
        content[len(content) // 2] ^= 1
        artifact.write_bytes(content)
        half = pathlib.Path(self.repository, "demo/9")
        half.mkdir()
        half.joinpath("model.tern").write_bytes(bytes(content[: len(content) // 3]))
        pathlib.Path(self.repository, "demo/11").mkdir()
        server = Server(self.repository, "--demo")
        try:
            states = self.states(server)
            self.assertEqual(states[("demo", 1)], "ready")
            self.assertEqual(states[("demo", 3)], "ready")
            for version in (2, 9, 11):
                self.assertEqual(states[("demo", version)], "unavailable")
            refused = server.run("classify", "--model", "demo", "--version", "2", one_photo())
            self.assertIn(b"UNAVAILABLE", refused.stderr)
            self.assertEqual(server.run("classify", "--model", "demo", "--version", "3", one_photo()).returncode, 0)
        finally:
            self.assertEqual(server.stop(), 0)

    def test_kill_during_quantize_and_import_loses_nothing_and_leaves_nothing_partial(self):
        server = Server(self.repository, "--demo")
        server.json("quantize", "--model", "demo", "--weights", "int8", "--calibration", calibration(),
                    "--calibration-count", "10")
        server.kill()
        onnx = os.path.join(ARGS.source, "models/demo/model.onnx")
        for delay in (0.05, 0.2, 0.5, 1.0, 1.5):
            server = Server(self.repository, "--demo")
            quantize = server.start("quantize", "--model", "demo", "--weights", "ternary", "--cluster", "4",
                                    "--calibration", calibration(), "--calibration-count", "40")
            importer = server.start("import", "--name", "other", "--onnx", onnx, "--preprocess", "cifar10")
            time.sleep(delay)
            server.kill()
            quantize.wait()
            importer.wait()
        server = Server(self.repository, "--demo")
        try:
            states = self.states(server)
            self.assertEqual(states[("demo", 1)], "ready")
            self.assertEqual(states[("demo", 2)], "ready")
            self.assertEqual(set(states.values()), {"ready"})
            for model, version in states:
                answer = server.run("classify", "--model", model, "--version", str(version), one_photo())
                self.assertEqual(answer.returncode, 0, answer.stderr)
            leftovers = [p for p in pathlib.Path(self.repository).rglob(".tmp-*")]
            self.assertEqual(leftovers, [])
        finally:
            self.assertEqual(server.stop(), 0)

    def test_sigterm_lets_running_requests_finish(self):
        server = Server(self.repository, "--demo")
        bench = subprocess.Popen([ARGS.ternctl, "bench", "--model", "demo", "--data", photos(), "--concurrency", "4",
                                  "--warmup", "0", "--seconds", "5", "--json"], env=server.env, stdout=subprocess.PIPE,
                                 stderr=subprocess.DEVNULL)
        # The load is on once images have been answered.
        deadline = time.monotonic() + 60
        while (metric(server.metrics(), "tern_images_total", model="demo") or 0) < 20:
            self.assertLess(time.monotonic(), deadline, "no load")
            time.sleep(0.05)
        self.assertEqual(server.stop(), 0)
        result = json.loads(bench.communicate(timeout=60)[0])
        # What had been accepted was answered; what came later was told to go elsewhere. gRPC resets a call that
        # arrives while the port closes, before any handler has seen it: CANCELLED, at most one per request in flight.
        self.assertGreater(result["images_per_second"], 0)
        self.assertLessEqual(set(result["errors_by_code"]), {"UNAVAILABLE", "CANCELLED"})
        self.assertLessEqual(result["errors_by_code"].get("CANCELLED", 0), 4)

    def test_a_second_server_on_the_same_repository_is_refused(self):
        server = Server(self.repository, "--demo")
        try:
            second = subprocess.run([ARGS.ternd, "--repository", self.repository, "--port=0", "--admin_port=0",
                                     "--metrics_port=0"], capture_output=True, timeout=60)
            self.assertEqual(second.returncode, 1)
            self.assertIn(b"FAILED_PRECONDITION", second.stderr)
        finally:
            server.stop()

    def test_wrong_flags_end_with_one_line(self):
        for flag, words in {"--max_isa=avx9": b"avx2", "--port=99999": b"--port: got 99999, want 0 to 65535",
                            "--health_port=-2": b"want -1 to 65535", "--target_p99=-5ms": b"--target_p99",
                            "--log_format=xml": b"text or json", "--threads=100000": b"want 0 to 256",
                            "--profile_every=-1": b"--profile_every", "--drain=-5s": b"--drain", "--grace=-1s": b"--grace",
                            "--max_pixels=0": b"--max_pixels", "--max_waiting=0": b"--max_waiting",
                            "--shadow_fraction=nan": b"--shadow_fraction", "--max_connection_age=1ms": b"want 1s to 24h",
                            "--nosuch": b"nosuch", "--port=abc": b"abc", "--max_delay=5": b"max_delay"}.items():
            with self.subTest(flag):
                absent = self.repository + "-absent"
                result = subprocess.run([ARGS.ternd, "--repository", absent, flag], capture_output=True, timeout=60)
                self.assertEqual(result.returncode, 2)
                self.assertIn(words, result.stderr.splitlines()[-1])
                self.assertFalse(os.path.exists(absent), "nothing is made before the flags are known to be good")
        result = subprocess.run([ARGS.ternd, "--repository", self.repository, "--tls_cert=/absent"], capture_output=True,
                                timeout=60)
        self.assertEqual(result.returncode, 2)
        self.assertIn(b"a certificate and its key", result.stderr.splitlines()[-1])

    def test_help_and_version_are_answers(self):
        for flag, words in {"--help": b"--repository", "--helpshort": b"--max_connection_age", "--version": b"ternd "}.items():
            result = subprocess.run([ARGS.ternd, flag], capture_output=True, timeout=60)
            self.assertEqual(result.returncode, 0, flag)
            self.assertIn(words, result.stdout)

    def test_a_closed_standard_error_gets_no_file(self):
        ports = os.path.join(self.repository, "ports.json")
        process = subprocess.Popen(["sh", "-c", 'exec "$@" 2>&-', "sh", ARGS.ternd, "--repository", self.repository, "--demo",
                                    "--port=0", "--admin_port=0", "--metrics_port=0", "--ports_file", ports])
        deadline = time.monotonic() + 120
        while not os.path.exists(ports) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.terminate()
        self.assertEqual(process.wait(timeout=60), 0)
        self.assertEqual(os.path.getsize(os.path.join(self.repository, ".lock")), 0)

    def test_a_signal_while_the_models_load_ends_it_at_once(self):
        server = Server(self.repository, "--demo")
        self.assertEqual(server.stop(), 0)
        for i in range(200):
            shutil.copytree(os.path.join(self.repository, "demo"), os.path.join(self.repository, f"copy{i}"))
        for number in (signal.SIGTERM, signal.SIGINT):
            process = subprocess.Popen([ARGS.ternd, "--repository", self.repository, "--port=0", "--admin_port=0",
                                        "--metrics_port=0", "--warm_up", "--max_isa=scalar"], stderr=subprocess.PIPE)
            self.assertIn(b"CPU budget", process.stderr.readline())
            process.send_signal(number)
            log = process.communicate(timeout=60)[1]
            self.assertEqual(process.returncode, 0, log)
            self.assertIn(b"ends before it was ready", log)
            self.assertNotIn(b"ready: data port", log)

    def test_http_calls_are_answered_while_an_idle_connection_takes_the_grace(self):
        server = Server(self.repository, "--demo", "--grace=3s")
        idle = socket.create_connection(("127.0.0.1", server.ports["port"]))
        self.addCleanup(idle.close)
        with open(one_photo(), "rb") as f:
            photo = f.read()
        head = json.dumps({"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES",
                                       "parameters": {"binary_data_size": len(photo) + 4}}]}).encode()
        body = head + len(photo).to_bytes(4, "little") + photo
        outcomes = []
        closing = []  # when SIGTERM was sent

        def load():
            while True:
                begin = time.monotonic()
                connection = http.client.HTTPConnection("127.0.0.1", server.ports["metrics_port"], timeout=30)
                try:
                    connection.connect()
                except OSError:
                    return  # closed: nothing was taken
                try:
                    connection.request("POST", "/v2/models/demo/infer", body,
                                       {"Inference-Header-Content-Length": str(len(head))})
                    outcomes.append(connection.getresponse().status)
                except (ConnectionError, http.client.HTTPException) as error:
                    # Around SIGTERM it may have been in the backlog of the port; later the port must not have taken it.
                    if not closing or begin > closing[0] + 1:
                        outcomes.append(repr(error))
                    return
                finally:
                    connection.close()

        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60
        while len(outcomes) < 20 and time.monotonic() < deadline:
            time.sleep(0.02)
        closing.append(time.monotonic())
        self.assertEqual(server.stop(), 0)
        for thread in threads:
            thread.join()
        self.assertGreaterEqual(len(outcomes), 20)
        self.assertEqual(set(outcomes), {200})


@unittest.skipUnless(shutil.which("openssl"), "the program openssl is not installed")
class Security(unittest.TestCase):
    """TLS, client certificates and tokens between the real programs; certificates by openssl."""

    def setUp(self):
        self.folder = tempfile.mkdtemp(prefix="tern-e2e-security-")
        self.addCleanup(shutil.rmtree, self.folder)
        for authority in ("ca", "client-ca", "other-ca"):
            self.openssl("req", "-x509", *self.new_key(authority), "-out", self.path(authority + ".crt"))
        with open(self.path("san"), "w") as f:
            f.write("subjectAltName=DNS:tern.test,IP:127.0.0.1\n")
        self.issue("ca", "server")
        self.issue("client-ca", "client")
        with open(self.path("tokens"), "w") as f:
            f.write("ops:correct-horse-battery\n")

    def path(self, name):
        return os.path.join(self.folder, name)

    def openssl(self, *words):
        subprocess.run(["openssl", *words], check=True, capture_output=True, timeout=60)

    def new_key(self, name):
        return ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", f"/CN={name}", "-keyout",
                self.path(name + ".key")]

    def issue(self, authority, name):
        self.openssl("req", *self.new_key(name), "-out", self.path("csr"))
        self.openssl("x509", "-req", "-in", self.path("csr"), "-CA", self.path(authority + ".crt"), "-CAkey",
                     self.path(authority + ".key"), "-CAcreateserial", "-days", "2", "-extfile", self.path("san"), "-out",
                     self.path(name + ".crt"))

    def refused(self, server, code, *words):
        result = server.run(*words)
        self.assertEqual(result.returncode, 1, result.stdout)
        self.assertIn(code.encode(), result.stderr)

    def test_ternctl_brings_certificate_and_token_and_checks_the_server(self):
        server = Server(self.path("models"), "--demo", "--tls_cert", self.path("server.crt"), "--tls_key",
                        self.path("server.key"), "--admin_tls_client_ca", self.path("client-ca.crt"),
                        "--admin_token_file", self.path("tokens"), "--health_port=0")
        try:
            tls = ["--tls-ca", self.path("ca.crt")]
            certificate = ["--tls-cert", self.path("client.crt"), "--tls-key", self.path("client.key")]
            token = ["--token-file", self.path("tokens")]
            photo = str(next(pathlib.Path(photos()).rglob("*.jpg")))
            classify = ["classify", "--model", "demo", photo]
            self.assertEqual(server.run(*classify, *tls).returncode, 0)
            self.assertEqual(server.run(*classify, *tls, "--tls-server-name", "tern.test").returncode, 0)
            self.assertEqual(server.run("models", *tls, *certificate, *token).returncode, 0)
            self.refused(server, "UNAUTHENTICATED", "models", *tls, *certificate)
            self.refused(server, "UNAVAILABLE", "models", *tls, *token)
            self.refused(server, "UNAVAILABLE", *classify)
            self.refused(server, "UNAVAILABLE", *classify, "--tls-ca", self.path("other-ca.crt"))
            self.refused(server, "UNAVAILABLE", *classify, *tls, "--tls-server-name", "wrong.test")
            # A list of endpoints: the second never answers, and the certificate is checked for the first.
            both = ["--server", f"127.0.0.1:{server.ports['port']},127.0.0.1:1"]
            self.assertEqual(server.run(*classify, *tls, *both).returncode, 0)
            # Probes need neither.
            health = ["health", "--server", f"127.0.0.1:{server.ports['health_port']}"]
            self.assertEqual(server.run(*health).returncode, 0)
            log = server.log_text()
            self.assertIn('caller="token:ops"', log)
            self.assertNotIn("correct-horse", log)
        finally:
            self.assertEqual(server.stop(), 0)

    def test_new_connections_use_a_rotated_certificate(self):
        server = Server(self.path("models"), "--demo", "--tls_cert", self.path("server.crt"), "--tls_key",
                        self.path("server.key"))
        try:
            address = f"127.0.0.1:{server.ports['port']}"

            def serial():
                shown = subprocess.run(["openssl", "s_client", "-connect", address, "-alpn", "h2"], input=b"",
                                       capture_output=True, timeout=60)
                return subprocess.run(["openssl", "x509", "-noout", "-serial"], input=shown.stdout, check=True,
                                      capture_output=True, timeout=60).stdout

            before = serial()
            self.issue("ca", "server")
            deadline = time.monotonic() + 60
            while serial() == before:
                self.assertLess(time.monotonic(), deadline, "the old certificate is still in use")
                time.sleep(0.2)
        finally:
            self.assertEqual(server.stop(), 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--ternd", required=True)
    parser.add_argument("--ternctl", required=True)
    parser.add_argument("--source", required=True)
    ARGS, rest = parser.parse_known_args()
    unittest.main(argv=[sys.argv[0], *rest], verbosity=2)
