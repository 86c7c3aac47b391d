#!/usr/bin/env python3
"""Tern and onnxruntime on the same networks and images, in both directions.

    TERN_ORT_PYTHON=VENV/bin/python onnxruntime_test.py --ternd T --ternctl C --engine-logits E --source S

Out: versions that Tern quantised, exported as ONNX, give onnxruntime the engine's answers. In: networks that
onnxruntime's quantize_static made are imported and run in the integer engine with onnxruntime's answers.
Always with the demo model; with TERN_SHARED_DATA also MobileNet v2 and SqueezeNet, with TERN_CIFAR_DIR
ResNet-20. TERN_ORT_PYTHON is a Python with onnxruntime, onnx and numpy (make_venv.sh); without it, and without
them in this one, everything is skipped. Images are prepared by Tern, so only the networks differ.
"""

import argparse
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest

if os.environ.get("TERN_ORT_PYTHON") and os.environ["TERN_ORT_PYTHON"] != sys.executable:
    os.execv(os.environ["TERN_ORT_PYTHON"], [os.environ["TERN_ORT_PYTHON"], *sys.argv])
try:
    import numpy as np
    import onnxruntime
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process
    MISSING = None
except ImportError as error:
    MISSING = f"{error.name} is not installed: make an environment with tests/interop/onnxruntime/make_venv.sh and set TERN_ORT_PYTHON"

ARGS = None
SHARED = os.environ.get("TERN_SHARED_DATA")
CIFAR = os.environ.get("TERN_CIFAR_DIR")
# Same top-1 on this share of the evaluation images: of what Tern quantised, and of what onnxruntime did. Its optimiser
# replaces floats by integers (biases become multiples of input scale x weight step), which turns a few near ties.
OUT_AGREEMENT, OUT_OPTIMISED_AGREEMENT, IN_AGREEMENT = 0.995, 0.97, 0.99
# Among the 1000 classes of ImageNet near ties are common, and the sample has only 250 images (0.4 % each).
IMAGENET_SLACK = 0.01
# Difference of logits over the largest logit: mean and worst. onnxruntime computes the same network, but rounds
# sums in another order, so a few codes differ by one.
MEAN_DIFFERENCE, WORST_DIFFERENCE = 0.01, 0.15

IMAGENET_BGR = """resize: SHORTER_SIDE resize_size: 256 center_crop: true scale: 1
mean: 104 mean: 117 mean: 123 color_order: BGR"""
IMAGENET_HALF = """resize: SHORTER_SIDE resize_size: 256 center_crop: true scale: 0.0078125
mean: 1 mean: 1 mean: 1"""


class Images:
    """Paths for calibration and evaluation; labels (class indices, or None) of the latter."""

    def __init__(self, calibration, evaluation, labels, slack=0.0):
        self.slack = slack
        self.calibration, self.evaluation, self.labels = calibration, evaluation, labels


def tree(folder, classes, least=0, most=None):
    """(path, class index) of images least..most of each class folder."""
    return [(str(path), i) for i, name in enumerate(classes)
            for path in sorted(pathlib.Path(folder, name).glob("*.jpg"))[least:most]]


def demo_images():
    labels = (pathlib.Path(ARGS.source) / "models/demo/labels.txt").read_text().splitlines()
    evaluation = tree(f"{ARGS.source}/models/demo/photos", labels)
    calibration = sorted(map(str, pathlib.Path(ARGS.source, "models/demo/calibration").rglob("*.jpg")))
    # The same answer needs no label, and one near tie among 101 photographs alone would be a whole percent.
    evaluation += [(path, None) for path in calibration]
    return Images(calibration, [p for p, _ in evaluation], [label for _, label in evaluation])


def cifar_images():
    classes = sorted(os.listdir(f"{CIFAR}/test"))
    evaluation = tree(f"{CIFAR}/test", classes, 0, 100)
    return Images([p for p, _ in tree(f"{CIFAR}/train", classes, 0, 20)],
                  [p for p, _ in evaluation], [label for _, label in evaluation])


def imagenet_images(offset):
    lines = [line.split() for line in (pathlib.Path(SHARED) / "imagenet-sample/labels.txt").read_text().splitlines()]
    samples = [(f"{SHARED}/imagenet-sample/{name}", int(label) + offset) for name, label in lines]
    evaluation = samples[1::2]
    return Images([p for p, _ in samples[0::5]], [p for p, _ in evaluation], [label for _, label in evaluation],
                  IMAGENET_SLACK)


class Server:
    """One ternd on free loopback ports."""

    def __init__(self):
        self.folder = tempfile.mkdtemp(prefix="tern-ort-")
        self.repository = f"{self.folder}/models"
        self.log = open(f"{self.folder}/log", "w+")
        ports = f"{self.folder}/ports.json"
        self.process = subprocess.Popen(
            [ARGS.ternd, "--repository", self.repository, "--demo", "--host", "127.0.0.1", "--admin_host", "127.0.0.1",
             "--metrics_host", "127.0.0.1", "--port=0", "--admin_port=0", "--metrics_port=0", "--ports_file", ports],
            stderr=self.log)
        deadline = time.monotonic() + 120
        while not os.path.exists(ports):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError("ternd did not get ready: " + pathlib.Path(self.folder, "log").read_text())
            time.sleep(0.02)
        found = json.loads(pathlib.Path(ports).read_text())
        self.env = dict(os.environ, TERN_SERVER=f"127.0.0.1:{found['port']}",
                        TERN_ADMIN=f"127.0.0.1:{found['admin_port']}")

    def run(self, *args):
        return subprocess.run([ARGS.ternctl, *map(str, args)], env=self.env, capture_output=True, text=True)

    def json(self, *args):
        result = self.run(*args, "--json")
        if result.returncode != 0:
            raise AssertionError(f"ternctl {args}: {result.returncode}\n{result.stderr}")
        return json.loads(result.stdout)

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=60)
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def infer(path, inputs, optimise=True, batch=16):
    """onnxruntime's logits."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 3
    # Without VNNI its u8 x s8 products saturate in pairs unless told to be exact.
    options.add_session_config_entry("session.x64quantprecision", "1")
    if not optimise:  # every operator as it is written
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: inputs[i:i + batch]})[0] for i in range(0, len(inputs), batch)])


class Comparison:
    def __init__(self, engine, other, labels):
        self.images = len(engine)
        self.agreement = float(np.mean(engine.argmax(1) == other.argmax(1)))
        largest = np.abs(engine).max()
        self.mean = float(np.abs(engine - other).mean() / largest)
        self.worst = float(np.abs(engine - other).max() / largest)
        known = [i for i, label in enumerate(labels) if label is not None]
        self.top1 = [float(np.mean(logits.argmax(1)[known] == [labels[i] for i in known])) for logits in (engine, other)]

    def __str__(self):
        return (f"{self.images} images, same top-1 {100 * self.agreement:.2f} %, difference of logits over the largest: mean "
                f"{self.mean:.2e}, worst {self.worst:.2e}, top-1 Tern {100 * self.top1[0]:.2f} % onnxruntime "
                f"{100 * self.top1[1]:.2f} %")


class Reader(quantization.CalibrationDataReader if MISSING is None else object):
    def __init__(self, name, inputs):
        self.feeds = iter([{name: inputs[i:i + 1]} for i in range(len(inputs))])

    def get_next(self):
        return next(self.feeds, None)


@unittest.skipIf(MISSING, MISSING)
class OperatorTest(unittest.TestCase):
    def test_every_operator_and_attribute_means_the_same_to_onnxruntime(self):
        with tempfile.TemporaryDirectory() as folder:
            networks = json.loads(subprocess.run([ARGS.engine_logits, "zoo", folder], check=True,
                                                 capture_output=True).stdout)
            self.assertGreater(len(networks), 60)
            for network in networks:
                with self.subTest(network["name"]):
                    base = f"{folder}/{network['name']}"
                    inputs = np.fromfile(base + ".input", "<f4").reshape([2, *network["shape"]])
                    wanted = np.fromfile(base + ".logits", "<f4").reshape([2, network["classes"]])
                    largest = np.abs(wanted).max()
                    for optimise in (False, True):
                        got = infer(base + ".onnx", inputs, optimise).reshape(wanted.shape)
                        difference = np.abs(got - wanted) / largest
                        if network["scheme"] == "fp32":
                            self.assertLess(difference.max(), 1e-5)
                        else:  # a code on the edge of rounding may fall to either side
                            self.assertLess(difference.mean(), 0.005)
                            self.assertLess(difference.max(), 0.1)


@unittest.skipIf(MISSING, MISSING)
class NetworkTest(unittest.TestCase):
    """One server; each test brings its network into it."""

    @classmethod
    def setUpClass(cls):
        cls.server = Server()
        cls.scratch = tempfile.mkdtemp(prefix="tern-ort-scratch-")

    @classmethod
    def tearDownClass(cls):
        cls.server.stop()
        shutil.rmtree(cls.scratch)

    def path(self, name):
        return f"{self.scratch}/{self._testMethodName}-{name}"

    def folder(self, name, paths):
        """A folder of links, as ternctl wants images (labels are not needed)."""
        folder = pathlib.Path(self.path(name))
        folder.mkdir()
        for i, path in enumerate(paths):
            (folder / f"{i:05d}.jpg").symlink_to(os.path.abspath(path))
        return folder

    def engine(self, model, file, paths):
        """Inputs and logits of the engine, and the plan's layers."""
        listing, out = self.path("images.txt"), self.path("out")
        pathlib.Path(listing).write_text("".join(os.path.abspath(p) + "\n" for p in paths))
        found = subprocess.run([ARGS.engine_logits, "run", file, f"{self.server.repository}/{model}/config.textproto",
                                listing, out], capture_output=True, text=True)
        self.assertEqual(found.returncode, 0, found.stderr)
        info = json.loads(found.stdout)
        return (np.fromfile(out + ".input", "<f4").reshape([len(paths), *info["shape"]]),
                np.fromfile(out + ".logits", "<f4").reshape([len(paths), info["classes"]]), info["layers"])

    def import_float(self, model, onnx, preprocess):
        if "\n" in preprocess or ":" in preprocess:
            text = self.path(f"{model}.textproto")
            pathlib.Path(text).write_text(preprocess)
            preprocess = text
        self.server.json("import", "--name", model, "--onnx", onnx, "--preprocess", preprocess)

    def check_export(self, model, images, recipes):
        calibration = self.folder("calibration", images.calibration)
        for weights, cluster, activations in recipes:
            name = f"{model} {weights} N={cluster} {activations}"
            with self.subTest(name):
                # Nearest codes do where they answer sensibly: a file's meaning does not depend on how its codes were found. Ternary
                # ones do not, nor do MobileNet's, which lose two points with int8 already: more answers are near a tie.
                method = "compensated" if weights == "ternary" or model == "mobilenet" else "direct"
                version = self.server.json("quantize", "--distill", "off", "--model", model, "--from", 1, "--weights", weights, "--cluster",
                                           cluster, "--activations", activations, "--calibration", calibration,
                                           "--method", method, "--seed", 0)["version"]
                stored, exported = self.path(f"{version}.tern"), self.path(f"{version}.onnx")
                self.server.json("export", "--model", model, "--version", version, "--output", stored)
                self.server.json("export", "--model", model, "--version", version, "--output", exported,
                                 "--format", "onnx")
                inputs, logits, _ = self.engine(model, stored, images.evaluation)
                outputs = {optimise: infer(exported, inputs, optimise) for optimise in (False, True)}
                # How far onnxruntime's optimiser moves onnxruntime's own answers: the engine need not follow it further.
                itself = Comparison(outputs[False], outputs[True], images.labels).agreement
                for optimise, output in outputs.items():
                    comparison = Comparison(logits, output, images.labels)
                    print(f"out: {name}, onnxruntime {'optimised' if optimise else 'as written'}: {comparison}"
                          + (f", onnxruntime itself {100 * itself:.2f} %" if optimise else ""), flush=True)
                    wanted = min(OUT_OPTIMISED_AGREEMENT, itself) if optimise else OUT_AGREEMENT
                    self.assertGreaterEqual(comparison.agreement, wanted - images.slack)
                    self.assertLess(comparison.mean, MEAN_DIFFERENCE)
                    self.assertLess(comparison.worst, WORST_DIFFERENCE)
                again = self.server.run("import", "--name", model, "--onnx", exported, "--preprocess",
                                        self.contract(model), "--json")
                self.assertEqual(again.returncode, 0, again.stderr)
                # Products of scale and code fit int8 but for 4-bit weights in fixed point.
                scheme = "int4-cluster" if (weights, activations) == ("int4", "dfp8") else "int8"
                self.assertEqual(json.loads(again.stdout)["scheme"], scheme)
                _, back, _ = self.engine(model, exported, images.evaluation)
                if activations == "affine":
                    np.testing.assert_array_equal(back, logits)
                else:  # pools and the float epilogue round a few codes to the other side
                    self.assertGreaterEqual(Comparison(logits, back, images.labels).agreement, OUT_AGREEMENT)

    def contract(self, model):
        """The model's contract as a file of its own."""
        config = pathlib.Path(f"{self.server.repository}/{model}/config.textproto").read_text()
        inner = config[config.index("preprocessing {") + len("preprocessing {"):]
        text = self.path(f"{model}-contract.textproto")
        pathlib.Path(text).write_text(inner[:inner.index("}")])
        return text

    def check_import(self, model, float_onnx, images, variants):
        inputs, _, _ = self.engine(model, float_onnx, images.calibration)
        calibration = self.folder("one", images.calibration[:1])
        prepared = self.path("prepared.onnx")
        quant_pre_process(str(float_onnx), prepared, skip_symbolic_shape=True)
        name = onnxruntime.InferenceSession(prepared, providers=["CPUExecutionProvider"]).get_inputs()[0].name
        for label, options in variants.items():
            with self.subTest(f"{model} {label}"):
                file = self.path(f"{label.replace(' ', '-')}.onnx")
                quantization.quantize_static(prepared, file, Reader(name, inputs),
                                             quant_format=quantization.QuantFormat.QDQ, **options)
                version = self.server.json("import", "--name", model, "--onnx", file, "--preprocess",
                                           self.contract(model))
                self.assertEqual(version["scheme"], "int8")
                refused = self.server.run("quantize", "--distill", "off", "--model", model, "--from", version["version"], "--weights", "int8",
                                          "--calibration", calibration)
                self.assertNotEqual(refused.returncode, 0)
                self.assertIn("was imported quantised (int8), want a float version", refused.stderr)
                evaluation, logits, layers = self.engine(model, file, images.evaluation)
                weighted = [layer for layer in layers if layer["op"] in ("Conv", "FullyConnected")]
                self.assertEqual({layer["scheme"] for layer in weighted}, {"int8"})
                islands = [layer["name"] for layer in layers if "float-island" in layer["implementation"]]
                self.assertEqual(islands, [])
                comparison = Comparison(logits, infer(file, evaluation), images.labels)
                print(f"in: {model} {label}: {comparison}, {len(weighted)} integer layers", flush=True)
                self.assertGreaterEqual(comparison.agreement, IN_AGREEMENT - images.slack)
                self.assertAlmostEqual(*comparison.top1, delta=0.01)

    def variants(self):
        kinds = quantization.QuantType
        return {
            "u8 per channel": dict(activation_type=kinds.QUInt8, weight_type=kinds.QInt8, per_channel=True),
            "u8 per tensor": dict(activation_type=kinds.QUInt8, weight_type=kinds.QInt8, per_channel=False),
            "s8 per channel": dict(activation_type=kinds.QInt8, weight_type=kinds.QInt8, per_channel=True),
            "u8 reduced range": dict(activation_type=kinds.QUInt8, weight_type=kinds.QInt8, per_channel=True,
                                     reduce_range=True),
            "u8 weights": dict(activation_type=kinds.QUInt8, weight_type=kinds.QUInt8, per_channel=False,
                               extra_options={"WeightSymmetric": True}),
        }

    RECIPES = [("int8", 1, "affine"), ("int4", 16, "affine"), ("ternary", 4, "affine"), ("ternary", 4, "dfp8")]

    def test_demo_export(self):
        self.check_export("demo", demo_images(), self.RECIPES + [("int4", 16, "dfp8")])

    def test_demo_import(self):
        self.check_import("demo", f"{ARGS.source}/models/demo/model.onnx", demo_images(), self.variants())

    @unittest.skipUnless(SHARED and CIFAR, "TERN_SHARED_DATA and TERN_CIFAR_DIR are not both set")
    def test_resnet20(self):
        images = cifar_images()
        onnx = f"{SHARED}/models/resnet20-cifar10.onnx"
        self.import_float("resnet20", onnx, "cifar10")
        self.check_export("resnet20", images, self.RECIPES)
        variants = self.variants()
        self.check_import("resnet20", onnx, images, {k: variants[k] for k in ("u8 per channel", "s8 per channel")})

    @unittest.skipUnless(SHARED, "TERN_SHARED_DATA is not set")
    def test_squeezenet(self):
        images = imagenet_images(0)
        onnx = f"{SHARED}/models/squeezenet1.1-imagenet.onnx"
        self.import_float("squeezenet", onnx, IMAGENET_BGR)
        self.check_export("squeezenet", images, [("int8", 1, "affine")])

    @unittest.skipUnless(SHARED, "TERN_SHARED_DATA is not set")
    def test_mobilenet(self):
        images = imagenet_images(1)
        onnx = f"{SHARED}/models/mobilenet_v2-imagenet.onnx"
        self.import_float("mobilenet", onnx, IMAGENET_HALF)
        self.check_export("mobilenet", images, [("int8", 1, "affine")])
        self.check_import("mobilenet", onnx, images, {"u8 per channel": self.variants()["u8 per channel"]})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for argument in ("ternd", "ternctl", "engine-logits", "source"):
        parser.add_argument("--" + argument, required=True)
    ARGS, rest = parser.parse_known_args()
    unittest.main(argv=[sys.argv[0], "-v", *rest])
