#!/usr/bin/env python3
"""What can be said of the chart and of deploy/kserve without helm: that values, schema, templates, README and flags agree, that
what has another source equals it, and that the script which copies models does what it says."""

import functools
import http.server
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
import threading
import unittest

try:
    import yaml
except ImportError:
    print("chart_checks ... skipped 'python3-yaml is not installed'")
    sys.exit(77)
try:
    import jsonschema
except ImportError:
    jsonschema = None

from manifests import CHART, SOURCE, documents, run, values_files


def templates():
    return sorted(p for p in (CHART / "templates").rglob("*") if p.is_file())


def schema():
    return json.loads((CHART / "values.schema.json").read_text())


def values():
    return documents((CHART / "values.yaml").read_text())[0]


def server_flags():
    return set(re.findall(r"ABSL_FLAG\(\s*[^,]+,\s*(\w+),", (SOURCE / "server/app/main.cc").read_text()))


class Values(unittest.TestCase):

    def test_every_value_that_templates_use_has_a_default(self):
        used = set()
        for path in templates():
            used |= set(re.findall(r"\.Values\.([A-Za-z0-9_.]+)", path.read_text()))
        self.assertGreater(len(used), 40)
        for name in sorted(used):
            node = values()
            for part in name.split("."):
                self.assertIn(part, node, f".Values.{name} has no default in values.yaml")
                node = node[part]

    def test_values_and_schema_name_the_same_things(self):

        def walk(node, allowed, path):
            self.assertIs(allowed.get("additionalProperties"), False, f"{path}: unknown keys would pass")
            optional = {"": {"global"}, "resources.requests.": {"ephemeral-storage"},
                        "resources.limits.": {"ephemeral-storage"}}
            self.assertEqual(set(node), set(allowed["properties"]) - optional.get(path, set()), path)
            for key, value in node.items():
                if "properties" in allowed["properties"][key] and key != "affinity":
                    walk(value, allowed["properties"][key], f"{path}{key}.")

        walk(values(), schema(), "")

    def test_every_leaf_of_the_schema_has_a_type_and_a_description(self):

        def walk(node, path):
            for key, child in node.get("properties", {}).items():
                where = f"{path}{key}"
                self.assertTrue({"type", "oneOf"} & set(child), where)
                self.assertTrue(child.get("description") or "properties" in child, where)
                walk(child, f"{where}.")

        walk(schema(), "")

    def test_the_readme_describes_every_value(self):
        described = set()
        for line in (CHART / "README.md").read_text().splitlines():
            if line.startswith("| `"):
                prefix = ""
                for name in re.findall(r"`([^`]+)`", line.split("|")[1]):
                    # `a.b`, `.c` stands for a.b and a.c.
                    name = prefix + name if name.startswith(".") else name
                    prefix = name.rsplit(".", 1)[0] if "." in name else ""
                    described.add(name)

        def walk(node, path):
            for key, value in node.items():
                where = f"{path}{key}"
                if where in described:
                    continue
                self.assertIsInstance(value, dict, f"README.md does not describe {where}")
                self.assertTrue(value, f"README.md does not describe {where}")
                walk(value, f"{where}.")

        walk(values(), "")

    def test_values_of_the_readme_exist(self):
        for name in re.findall(r"--set(?:-string)? ([A-Za-z.]+)=", (CHART / "README.md").read_text()):
            node = values()
            for part in name.split("."):
                self.assertIn(part, node, name)
                node = node[part]

    @unittest.skipUnless(jsonschema, "python3-jsonschema is not installed")
    def test_defaults_and_the_tests_values_satisfy_the_schema(self):
        jsonschema.Draft7Validator.check_schema(schema())
        jsonschema.validate(values(), schema())
        for path in values_files():
            with self.subTest(values=path.name):
                jsonschema.validate(documents(path.read_text())[0], schema())


class Templates(unittest.TestCase):

    def test_braces_and_blocks_match(self):
        for path in templates():
            text = path.read_text()
            with self.subTest(path=path.name):
                self.assertEqual(text.count("{{"), text.count("}}"))
                opened = len(re.findall(r"{{-? *(?:if|with|range|define)\b", text))
                self.assertEqual(opened, len(re.findall(r"{{-? *end\b", text)))

    def test_flags_of_every_manifest_exist(self):
        flags = server_flags()
        self.assertIn("repository", flags)
        files = [CHART / "templates/deployment.yaml", *(SOURCE / "deploy/kserve").glob("*.yaml"),
                 *(pathlib.Path(__file__).parent / "values").glob("*.yaml")]
        for path in files:
            with self.subTest(path=path.name):
                used = set(re.findall(r"(?<![\w-])--([a-z][a-z0-9_]*)", path.read_text()))
                self.assertLessEqual(used, flags)
        self.assertIn("--health_port", files[0].read_text())

    def test_flags_that_the_chart_sets_cannot_be_set_again(self):
        text = (CHART / "templates/_validate.tpl").read_text()
        refused = set(re.search(r'\^--\(([a-z_|0-9]+)\)', text)[1].split("|"))
        used = set(re.findall(r'- "?--([a-z_0-9]+)', (CHART / "templates/deployment.yaml").read_text()))
        self.assertLessEqual(used, refused)
        self.assertLessEqual(refused, server_flags())

    def test_rules_and_dashboard_are_those_of_deploy(self):
        for copy, source in (("rules.yml", "deploy/prometheus/rules.yml"), ("tern.json", "deploy/grafana/tern.json")):
            with self.subTest(file=copy):
                self.assertEqual((CHART / "files" / copy).read_bytes(), (SOURCE / source).read_bytes(),
                                 f"cp {source} deploy/helm/tern/files/{copy}")


class CopyModels(unittest.TestCase):
    """files/copy-models.sh under busybox, which the chart runs it with, and under this machine's sh."""

    SHELLS = [["sh"]] + ([["busybox", "sh"]] if shutil.which("busybox") else [])

    def setUp(self):
        self.folder = tempfile.TemporaryDirectory(prefix="tern-copy-")
        self.root = pathlib.Path(self.folder.name)
        self.seed = self.root / "seed"
        (self.seed / "demo/1").mkdir(parents=True)
        (self.seed / "demo/1/model.onnx").write_bytes(b"network" * 1000)
        (self.seed / "demo/default").write_text("1\n")
        (self.seed / ".lock").write_text("")

    def tearDown(self):
        self.folder.cleanup()

    def copy(self, **environment):
        """(folder of the models, result) of every shell."""
        environment = {"PATH": os.environ["PATH"], **environment}
        done = []
        for index, shell in enumerate(self.SHELLS):
            models = self.root / f"models{index}"
            models.mkdir(exist_ok=True)
            done.append((models, run(*shell, "-c", (CHART / "files/copy-models.sh").read_text(),
                                     env={"MODELS": str(models), **environment})))
        return done

    def write_sums(self):
        names = ["demo/1/model.onnx", "demo/default"]
        result = run("sha256sum", *names, cwd=self.seed)
        (self.seed / "SHA256SUMS").write_text(result.stdout)

    def archive(self):
        path = self.root / "repository.tar.gz"
        self.assertEqual(run("tar", "-C", self.seed, "-czf", path, "demo").returncode, 0)
        return path, run("sha256sum", path).stdout.split()[0]

    def download(self, path, sha256):
        """copy() of the file at `path`, which a server on loopback has."""

        class Handler(http.server.SimpleHTTPRequestHandler):

            def log_message(self, *_):
                pass

        handler = functools.partial(Handler, directory=str(path.parent))
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            url = f"http://127.0.0.1:{server.server_address[1]}/{path.name}"
            try:
                return self.copy(ARCHIVE_URL=url, ARCHIVE_SHA256=sha256)
            finally:
                server.shutdown()

    def test_models_are_copied_and_the_other_servers_own_files_are_not(self):
        for models, result in self.copy(SEED=str(self.seed)):
            self.assertEqual(result.returncode, 0, result.stderr)
            self.assertEqual([p.name for p in models.iterdir()], ["demo"])
            self.assertEqual((models / "demo/1/model.onnx").read_bytes(), b"network" * 1000)

    def test_copying_again_gives_the_same(self):
        for _ in range(2):
            for models, result in self.copy(SEED=str(self.seed)):
                self.assertEqual(result.returncode, 0, result.stderr)
                self.assertEqual(sorted(p.name for p in models.rglob("*")), ["1", "default", "demo", "model.onnx"])

    def test_an_empty_seed_is_an_error(self):
        (self.root / "empty").mkdir()
        for _, result in self.copy(SEED=str(self.root / "empty")):
            self.assertNotEqual(result.returncode, 0)

    def test_sums_are_checked_and_leave_no_file(self):
        self.write_sums()
        for models, result in self.copy(SEED=str(self.seed)):
            self.assertEqual(result.returncode, 0, result.stderr)
            self.assertEqual([p.name for p in models.iterdir()], ["demo"])

    def test_a_damaged_file_is_an_error(self):
        self.write_sums()
        (self.seed / "demo/1/model.onnx").write_bytes(b"Network" * 1000)
        for _, result in self.copy(SEED=str(self.seed)):
            self.assertNotEqual(result.returncode, 0)
            self.assertIn("model.onnx", result.stdout + result.stderr)

    @unittest.skipUnless(shutil.which("wget"), "wget is not installed")
    def test_an_archive_is_unpacked(self):
        path, sha256 = self.archive()
        for models, result in self.download(path, sha256):
            self.assertEqual(result.returncode, 0, result.stderr)
            self.assertEqual([p.name for p in models.iterdir()], ["demo"])
            self.assertEqual((models / "demo/default").read_text(), "1\n")

    @unittest.skipUnless(shutil.which("wget"), "wget is not installed")
    def test_an_archive_with_another_sum_is_an_error_and_nothing_is_unpacked(self):
        path, _ = self.archive()
        for models, result in self.download(path, "0" * 64):
            self.assertNotEqual(result.returncode, 0)
            self.assertFalse((models / "demo").exists())


if __name__ == "__main__":
    unittest.main(verbosity=2)
