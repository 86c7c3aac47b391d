#!/usr/bin/env python3
"""Checks of deploy/prometheus, deploy/grafana and docker/: syntax, names of metrics and flags, and what promtool says. A tool
that is not installed skips its checks and says so."""

import argparse
import json
import pathlib
import re
import shutil
import subprocess
import sys
import unittest

try:
    import yaml
except ImportError:
    yaml = None

SOURCE = None  # pathlib.Path of the repository
needs_yaml = unittest.skipUnless(yaml, "python3-yaml is not installed")


def needs(tool):
    return unittest.skipUnless(shutil.which(tool), f"{tool} is not installed")


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def load_yaml(path):
    with open(path) as f:
        return list(yaml.load_all(f, UniqueKeyLoader))


if yaml:

    class UniqueKeyLoader(yaml.SafeLoader):
        """YAML takes the last of two equal keys without a word; Kubernetes does not."""

        def construct_mapping(self, node, deep=False):
            keys = [self.construct_object(key, deep=deep) for key, _ in node.value if not key.tag.endswith(":merge")]
            for key in keys:
                if keys.count(key) > 1:
                    raise yaml.constructor.ConstructorError(None, None, f"key {key!r} twice", node.start_mark)
            return super().construct_mapping(node, deep)


def known_metrics():
    """Names in docs/metrics.md, with the suffixes of histograms."""
    names = set()
    for line in (SOURCE / "docs/metrics.md").read_text().splitlines():
        match = re.match(r"\| `([a-z0-9_]+)` \| (\w+) \|", line)
        if match:
            names.add(match[1])
            if match[2] == "histogram":
                names |= {match[1] + suffix for suffix in ("_bucket", "_sum", "_count")}
    return names


def metrics_in(expression):
    return set(re.findall(r"\b(?:tern|process)_[a-z0-9_]+\b", expression))


def rules():
    return [rule for group in load_yaml(SOURCE / "deploy/prometheus/rules.yml")[0]["groups"] for rule in group["rules"]]


class Metrics(unittest.TestCase):

    def test_the_list_of_names_was_read(self):
        self.assertIn("tern_requests_total", known_metrics())
        self.assertIn("tern_request_duration_seconds_bucket", known_metrics())

    @needs_yaml
    def test_rules_use_metrics_that_exist(self):
        recorded = {rule["record"] for rule in rules() if "record" in rule}
        for rule in rules():
            name = rule.get("record") or rule["alert"]
            with self.subTest(rule=name):
                self.assertLessEqual(metrics_in(rule["expr"]), known_metrics())
                used = set(re.findall(r"\btern:[a-z0-9_:]+", rule["expr"]))
                self.assertLessEqual(used, recorded)

    def test_the_dashboard_uses_metrics_that_exist(self):
        dashboard = json.loads((SOURCE / "deploy/grafana/tern.json").read_text())
        expressions = [t["expr"] for p in dashboard["panels"] for t in p.get("targets", [])]
        expressions += [v["definition"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
        self.assertGreater(len(expressions), 20)
        for expression in expressions:
            with self.subTest(expression=expression):
                self.assertTrue(metrics_in(expression))
                self.assertLessEqual(metrics_in(expression), known_metrics())
                self.assertEqual(expression.count("("), expression.count(")"))

    def test_dashboard_panels_do_not_overlap(self):
        dashboard = json.loads((SOURCE / "deploy/grafana/tern.json").read_text())
        seen = {}
        for panel in dashboard["panels"]:
            box = panel["gridPos"]
            self.assertLessEqual(box["x"] + box["w"], 24)
            for x in range(box["x"], box["x"] + box["w"]):
                for y in range(box["y"], box["y"] + box["h"]):
                    self.assertNotIn((x, y), seen, f"{panel['title']} lies on {seen.get((x, y))}")
                    seen[(x, y)] = panel["title"]
        ids = [panel["id"] for panel in dashboard["panels"]]
        self.assertEqual(len(ids), len(set(ids)))

    @needs("promtool")
    @needs_yaml
    def test_promtool_parses_the_dashboard_expressions(self):
        dashboard = json.loads((SOURCE / "deploy/grafana/tern.json").read_text())
        group = {"name": "dashboard", "rules": []}
        for panel in dashboard["panels"]:
            for target in panel.get("targets", []):
                expression = target["expr"].replace("$__rate_interval", "1m")
                group["rules"].append({"record": f"d:r{len(group['rules'])}", "expr": expression})
        text = yaml.safe_dump({"groups": [group]})
        result = run("promtool", "check", "rules", "/dev/stdin", input=text)
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)

    @needs("promtool")
    def test_promtool_accepts_the_configuration(self):
        result = run("promtool", "check", "config", str(SOURCE / "deploy/prometheus/prometheus.yml"))
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)

    @needs("promtool")
    def test_alerts_fire_when_they_should(self):
        result = run("promtool", "test", "rules", "rules_test.yml", cwd=SOURCE / "deploy/prometheus")
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)


class Container(unittest.TestCase):

    @needs_yaml
    def test_plain_yaml_parses(self):
        for path in [*(SOURCE / "deploy/prometheus").glob("*.yml"), *(SOURCE / "docker").rglob("*.yaml")]:
            with self.subTest(path=path.name):
                self.assertTrue(load_yaml(path))

    def test_flags_of_the_containers_exist(self):
        flags = set(re.findall(r"ABSL_FLAG\(\s*[^,]+,\s*(\w+),", (SOURCE / "server/app/main.cc").read_text()))
        entry = re.search(r"^ENTRYPOINT .*$", (SOURCE / "docker/Dockerfile").read_text(), re.M)[0]
        command = re.search(r"^    command: .*$", (SOURCE / "docker/compose.yaml").read_text(), re.M)[0]
        used = set(re.findall(r"--([a-z_]+)", entry + command))
        self.assertIn("repository", used)
        self.assertLessEqual(used, flags)

    def test_the_image_is_minimal_and_not_root(self):
        text = (SOURCE / "docker/Dockerfile").read_text()
        runtime = text[text.rindex("\nFROM "):]
        self.assertRegex(runtime, r"\nUSER 65532")
        self.assertNotIn("-dev", runtime)
        self.assertNotIn("VOLUME", runtime)
        self.assertRegex(runtime, r"\nEXPOSE 8500 8501 8502\n")

    def test_every_folder_that_the_build_copies_passes_the_ignore_file(self):
        copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (SOURCE / "docker/Dockerfile").read_text(), re.M)
        kept = set(re.findall(r"^!(\S+)", (SOURCE / "docker/Dockerfile.dockerignore").read_text(), re.M))
        for name in " ".join(copied).split():
            self.assertTrue({name, name.split("/")[0]} & kept, name)
            self.assertTrue((SOURCE / name).exists(), name)

    def test_scripts_parse(self):
        for script in ("build_image.sh", "rootfs.sh"):
            result = run("bash", "-n", str(SOURCE / "docker" / script))
            self.assertEqual(result.returncode, 0, result.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", required=True, type=pathlib.Path)
    arguments, rest = parser.parse_known_args()
    SOURCE = arguments.source.resolve()
    unittest.main(argv=[sys.argv[0], *rest], verbosity=2)
