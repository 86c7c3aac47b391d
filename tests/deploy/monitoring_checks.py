#!/usr/bin/env python3
"""Checks of deploy/prometheus and deploy/grafana: names of metrics, what promtool says, a runbook and tests for each
alert. A tool that is not installed skips its checks and says so; with --require-promtool it skips everything (status 77)."""

import argparse
import functools
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


def promtool(test, *arguments, **options):
    """Runs it, and wants success."""
    if not shutil.which("promtool"):
        test.skipTest("promtool is not installed")
    result = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=300, **options)
    test.assertEqual(result.returncode, 0, result.stdout + result.stderr)


@functools.lru_cache(None)
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
    return set(re.findall(r"(?<!:)\b(?:tern|process)_[a-z0-9_]+\b", expression))


def recorded_in(expression):
    return set(re.findall(r"\btern:[a-z0-9_:]+", expression))


@functools.lru_cache(None)
def rules():
    text = (SOURCE / "deploy/prometheus/rules.yml").read_text()
    return [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]


def rule_tests():
    return sorted((SOURCE / "deploy/prometheus").glob("*_test.yml"))


def alerts():
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


@functools.lru_cache(None)
def recorded():
    return {rule["record"] for rule in rules() if "record" in rule}


@functools.lru_cache(None)
def dashboard():
    return json.loads((SOURCE / "deploy/grafana/tern.json").read_text())


class Rules(unittest.TestCase):

    def test_the_list_of_names_was_read(self):
        self.assertIn("tern_requests_total", known_metrics())
        self.assertIn("tern_request_duration_seconds_bucket", known_metrics())

    @needs_yaml
    def test_rules_use_metrics_that_exist(self):
        for rule in rules():
            with self.subTest(rule=rule.get("record") or rule["alert"]):
                self.assertLessEqual(metrics_in(rule["expr"]), known_metrics())
                self.assertLessEqual(recorded_in(rule["expr"]), recorded())

    @needs_yaml
    def test_every_recorded_series_is_read(self):
        readers = " ".join(rule["expr"] for rule in rules())
        readers += (SOURCE / "deploy/grafana/tern.json").read_text() + (SOURCE / "docs/operations.md").read_text()
        for name in recorded():
            self.assertIn(name, recorded_in(readers))

    @needs_yaml
    def test_every_alert_says_how_bad_it_is_and_what_to_do(self):
        headings = re.findall(r"^#+ (.+)$", (SOURCE / "docs/operations.md").read_text(), re.M)
        anchors = {re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings}
        for name, rule in alerts().items():
            with self.subTest(alert=name):
                self.assertIn(rule["labels"]["severity"], {"critical", "warning", "info"})
                self.assertEqual(rule["annotations"].keys(), {"summary", "description", "runbook_url"})
                self.assertEqual(rule["annotations"]["runbook_url"], f"docs/operations.md#{name.lower()}")
                self.assertIn(name.lower(), anchors, "docs/operations.md has no runbook of that name")
        described = {heading for heading in headings if re.fullmatch(r"Tern[A-Z]\w+", heading)}
        self.assertEqual(described, set(alerts()), "runbooks and alerts")

    @needs_yaml
    def test_every_alert_is_tested_firing_and_silent(self):
        cases = [case for file in rule_tests() for test in yaml.safe_load(file.read_text())["tests"]
                 for case in test.get("alert_rule_test", [])]
        for name in alerts():
            with self.subTest(alert=name):
                expected = [bool(case["exp_alerts"]) for case in cases if case["alertname"] == name]
                self.assertEqual(set(expected), {True, False})

    def test_promtool_accepts_the_configuration(self):
        promtool(self, "check", "config", str(SOURCE / "deploy/prometheus/prometheus.yml"))

    def test_alerts_fire_when_they_should(self):
        promtool(self, "test", "rules", *map(str, rule_tests()))


class Dashboard(unittest.TestCase):

    def test_it_is_what_its_script_writes(self):
        written = subprocess.run([sys.executable, "-B", SOURCE / "deploy/grafana/dashboard.py", "-"], capture_output=True,
                                 text=True, check=True).stdout
        self.assertEqual(written, (SOURCE / "deploy/grafana/tern.json").read_text(), "run deploy/grafana/dashboard.py")

    @needs_yaml
    def test_it_uses_metrics_that_exist(self):
        expressions = [t["expr"] for p in dashboard()["panels"] for t in p.get("targets", [])]
        expressions += [v["definition"] for v in dashboard()["templating"]["list"] if v["type"] == "query"]
        self.assertGreater(len(expressions), 50)
        for expression in expressions:
            with self.subTest(expression=expression):
                self.assertLessEqual(metrics_in(expression), known_metrics())
                self.assertLessEqual(recorded_in(expression), recorded())
                self.assertTrue(metrics_in(expression) or recorded_in(expression) or "ALERTS" in expression)

    @needs_yaml
    def test_every_metric_is_shown(self):
        # Recorded series stand for the metrics that they are made of.
        text = " ".join(t["expr"] for p in dashboard()["panels"] for t in p.get("targets", []))
        for rule in rules():
            if rule.get("record") in recorded_in(text):
                text += " " + rule["expr"]
        shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in metrics_in(text)}
        histograms = {name[:-len("_bucket")] for name in known_metrics() if name.endswith("_bucket")}
        plain = {name for name in known_metrics() if not any(name.startswith(h + "_") for h in histograms)}
        self.assertEqual(plain - shown, set())

    def test_panels_do_not_overlap(self):
        seen = {}
        for panel in dashboard()["panels"]:
            box = panel["gridPos"]
            self.assertLessEqual(box["x"] + box["w"], 24)
            for x in range(box["x"], box["x"] + box["w"]):
                for y in range(box["y"], box["y"] + box["h"]):
                    self.assertNotIn((x, y), seen, f"{panel['title']} lies on {seen.get((x, y))}")
                    seen[(x, y)] = panel["title"]
        ids = [panel["id"] for panel in dashboard()["panels"]]
        self.assertEqual(len(ids), len(set(ids)))

    def test_its_variables_are_defined(self):
        text = (SOURCE / "deploy/grafana/tern.json").read_text()
        used = set(re.findall(r"\$\{?([a-z]\w*)", text)) | {"datasource"}
        self.assertEqual(used, {v["name"] for v in dashboard()["templating"]["list"]})

    @needs_yaml
    def test_promtool_parses_its_expressions(self):
        group = {"name": "dashboard", "rules": []}
        for panel in dashboard()["panels"]:
            for target in panel.get("targets", []):
                expression = target["expr"].replace("$__rate_interval", "1m")
                group["rules"].append({"record": f"d:r{len(group['rules'])}", "expr": expression})
        promtool(self, "check", "rules", "/dev/stdin", input=yaml.safe_dump({"groups": [group]}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", required=True, type=pathlib.Path)
    parser.add_argument("--require-promtool", action="store_true")
    arguments, rest = parser.parse_known_args()
    SOURCE = arguments.source.resolve()
    if arguments.require_promtool and not shutil.which("promtool"):
        print("monitoring_checks ... skipped 'promtool is not installed: Debian's package prometheus (scripts/install-deps.sh full)'")
        sys.exit(77)
    unittest.main(argv=[sys.argv[0], *rest], verbosity=2)
