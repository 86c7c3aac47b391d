#!/usr/bin/env python3
"""Checks of deploy/ and docker/: syntax, the chart's values against its schema and templates, names of metrics and
flags, and what helm and promtool say. A tool that is not installed skips its checks and says so."""

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
try:
    import jsonschema
except ImportError:
    jsonschema = None

SOURCE = None  # pathlib.Path of the repository
needs_yaml = unittest.skipUnless(yaml, "python3-yaml is not installed")


def needs(tool):
    return unittest.skipUnless(shutil.which(tool), f"{tool} is not installed")


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def chart():
    return SOURCE / "deploy/helm/tern"


def templates():
    return sorted(p for p in (chart() / "templates").rglob("*") if p.is_file())


def load_yaml(path):
    with open(path) as f:
        return list(yaml.load_all(f, UniqueKeyLoader))


if yaml:

    class UniqueKeyLoader(yaml.SafeLoader):
        """YAML takes the last of two equal keys without a word; Kubernetes does not."""

        def construct_mapping(self, node, deep=False):
            keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
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


class Chart(unittest.TestCase):

    @needs_yaml
    def test_plain_yaml_parses(self):
        for path in [chart() / "Chart.yaml", chart() / "values.yaml", *(SOURCE / "deploy/prometheus").glob("*.yml"),
                     *(SOURCE / "docker").rglob("*.yaml")]:
            with self.subTest(path=path.name):
                self.assertTrue(load_yaml(path))

    @needs_yaml
    def test_every_value_that_templates_use_has_a_default(self):
        values = load_yaml(chart() / "values.yaml")[0]
        used = set()
        for path in templates():
            used |= set(re.findall(r"\.Values\.([A-Za-z0-9_.]+)", path.read_text()))
        self.assertGreater(len(used), 30)
        for name in sorted(used):
            node = values
            for part in name.split("."):
                self.assertIn(part, node, f".Values.{name} has no default in values.yaml")
                node = node[part]

    @needs_yaml
    def test_every_value_is_in_the_schema_and_the_readme(self):
        schema = json.loads((chart() / "values.schema.json").read_text())
        readme = (chart() / "README.md").read_text()

        def walk(values, node, path):
            for key, value in values.items():
                self.assertIn(key, node["properties"], f"{path}{key} is not in values.schema.json")
                if isinstance(value, dict) and "properties" in node["properties"][key]:
                    walk(value, node["properties"][key], f"{path}{key}.")

        values = load_yaml(chart() / "values.yaml")[0]
        walk(values, schema, "")
        for key in values:
            self.assertIn(key, readme)

    @unittest.skipUnless(yaml and jsonschema, "python3-yaml or python3-jsonschema is not installed")
    def test_defaults_satisfy_the_schema_and_mistakes_do_not(self):
        schema = json.loads((chart() / "values.schema.json").read_text())
        jsonschema.Draft7Validator.check_schema(schema)
        values = load_yaml(chart() / "values.yaml")[0]
        jsonschema.validate(values, schema)
        for mistake in ({"replicas": 2}, {"replicaCount": "two"}, {"server": {"maxIsa": "avx9"}},
                        {"server": {"drain": "5"}}, {"metrics": {"port": 0}}):
            with self.subTest(mistake=mistake), self.assertRaises(jsonschema.ValidationError):
                jsonschema.validate(mistake, schema)

    def test_braces_of_templates_match(self):
        for path in templates():
            text = path.read_text()
            with self.subTest(path=path.name):
                self.assertEqual(text.count("{{"), text.count("}}"))
                opened = len(re.findall(r"{{-? *(?:if|with|range|define)\b", text))
                self.assertEqual(opened, len(re.findall(r"{{-? *end\b", text)))

    def test_flags_of_the_container_exist(self):
        flags = set(re.findall(r"ABSL_FLAG\([^,]+, (\w+),", (SOURCE / "server/app/main.cc").read_text()))
        self.assertIn("repository", flags)
        container = (chart() / "templates/deployment.yaml").read_text()
        entry = re.search(r"^ENTRYPOINT .*$", (SOURCE / "docker/Dockerfile").read_text(), re.M)[0]
        command = re.search(r"^    command: .*$", (SOURCE / "docker/compose.yaml").read_text(), re.M)[0]
        used = set(re.findall(r"--([a-z_]+)", container + entry + command))
        self.assertIn("admin_port", used)
        self.assertLessEqual(used, flags)

    def test_drain_and_grace_fit_the_termination_period(self):
        text = (chart() / "values.yaml").read_text()
        seconds = {key: int(re.search(rf"\b{key}: (\d+)s?\b", text)[1])
                   for key in ("drain", "grace", "terminationGracePeriodSeconds")}
        # Stopping the metrics listener takes up to two seconds besides.
        self.assertGreaterEqual(seconds["terminationGracePeriodSeconds"], seconds["drain"] + seconds["grace"] + 10)


@needs("helm")
@needs_yaml
class Helm(unittest.TestCase):

    def render(self, *settings):
        arguments = [word for setting in settings for word in ("--set", setting)]
        result = run("helm", "template", "release", str(chart()), *arguments)
        self.assertEqual(result.returncode, 0, result.stderr)
        documents = [d for d in yaml.load_all(result.stdout, UniqueKeyLoader) if d]
        return {(d["kind"], d["metadata"]["name"]): d for d in documents}

    def test_lint(self):
        result = run("helm", "lint", "--strict", str(chart()))
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)

    def test_defaults(self):
        objects = self.render()
        pod = objects["Deployment", "release-tern"]["spec"]["template"]["spec"]
        container = pod["containers"][0]
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            self.assertEqual(container[probe]["grpc"], {"port": 8500, "service": ""})
        self.assertTrue(container["securityContext"]["readOnlyRootFilesystem"])
        self.assertEqual(container["securityContext"]["capabilities"]["drop"], ["ALL"])
        self.assertFalse(container["securityContext"]["allowPrivilegeEscalation"])
        self.assertTrue(pod["securityContext"]["runAsNonRoot"])
        self.assertEqual(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault")
        self.assertEqual(pod["terminationGracePeriodSeconds"], 45)
        self.assertIn("--max_pixels=40000000", container["args"])  # not 4e+07
        self.assertIn("emptyDir", pod["volumes"][0])
        self.assertNotIn("--demo", container["args"])
        for name in ("release-tern", "release-tern-metrics"):
            self.assertEqual(objects["Service", name]["spec"]["type"], "ClusterIP")
        self.assertNotIn(("Service", "release-tern-admin"), objects)
        self.assertIn("--admin_host=127.0.0.1", container["args"])
        self.assertEqual([p["name"] for p in objects["Service", "release-tern"]["spec"]["ports"]], ["grpc"])

    def test_services_select_the_pods_and_name_their_ports(self):
        objects = self.render("service.headless=true", "admin.service.enabled=true", "networkPolicy.enabled=true")
        template = objects["Deployment", "release-tern"]["spec"]["template"]
        ports = {p["name"] for p in template["spec"]["containers"][0]["ports"]}
        services = [o for (kind, _), o in objects.items() if kind == "Service"]
        self.assertEqual(len(services), 4)
        for service in services:
            self.assertLessEqual(service["spec"]["selector"].items(), template["metadata"]["labels"].items())
            for port in service["spec"]["ports"]:
                self.assertIn(port["targetPort"], ports)
        test = objects["Pod", "release-tern-test"]["metadata"]["labels"]
        self.assertFalse(services[0]["spec"]["selector"].items() <= test.items())

    def test_the_admin_port_is_never_exposed(self):
        objects = self.render("service.type=LoadBalancer", "admin.service.enabled=true",
                              "auth.adminTokensSecret=tokens")
        self.assertEqual(objects["Service", "release-tern"]["spec"]["type"], "LoadBalancer")
        self.assertEqual(objects["Service", "release-tern-admin"]["spec"]["type"], "ClusterIP")

    def test_the_admin_service_needs_tokens_or_a_network_policy(self):
        result = run("helm", "template", "release", str(chart()), "--set", "admin.service.enabled=true")
        self.assertNotEqual(result.returncode, 0)
        self.assertIn("auth.adminTokensSecret", result.stderr)

    def test_tls_moves_the_probes_to_the_health_port(self):
        objects = self.render("tls.secret=cert", "tls.clientCertificates=true")
        pod = objects["Deployment", "release-tern"]["spec"]["template"]["spec"]
        container = pod["containers"][0]
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            self.assertEqual(container[probe]["grpc"]["port"], 8503)
        mount = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}["tls"]
        for flag in (f"--tls_cert={mount}/tls.crt", f"--tls_key={mount}/tls.key", f"--tls_client_ca={mount}/ca.crt",
                     "--health_port=8503"):
            self.assertIn(flag, container["args"])

    def test_tokens_are_mounted_where_the_flags_look(self):
        objects = self.render("auth.adminTokensSecret=a", "auth.dataTokensSecret=d")
        pod = objects["Deployment", "release-tern"]["spec"]["template"]["spec"]
        container = pod["containers"][0]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        secrets = {v["name"]: v["secret"]["secretName"] for v in pod["volumes"] if "secret" in v}
        self.assertEqual(secrets, {"admin-tokens": "a", "data-tokens": "d"})
        self.assertIn(f"--admin_token_file={mounts['admin-tokens']}/tokens", container["args"])
        self.assertIn(f"--data_token_file={mounts['data-tokens']}/tokens", container["args"])

    def test_everything_on(self):
        objects = self.render("autoscaling.enabled=true", "repository.seedClaim=models",
                              "podDisruptionBudget.enabled=true", "networkPolicy.enabled=true",
                              "metrics.serviceMonitor.enabled=true", "server.demo=true",
                              "networkPolicy.adminFrom[0].podSelector.matchLabels.role=admin")
        kinds = {kind for kind, _ in objects}
        self.assertLessEqual({"HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy", "ServiceMonitor",
                              "ServiceAccount"}, kinds)
        deployment = objects["Deployment", "release-tern"]["spec"]
        self.assertNotIn("replicas", deployment)
        self.assertEqual(deployment["strategy"]["type"], "RollingUpdate")
        self.assertIn("--demo", deployment["template"]["spec"]["containers"][0]["args"])
        self.assertEqual(objects["HorizontalPodAutoscaler", "release-tern"]["apiVersion"], "autoscaling/v2")
        pod = deployment["template"]["spec"]
        names = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"] + pod["initContainers"]:
            self.assertLessEqual({mount["name"] for mount in container["volumeMounts"]}, names)
            self.assertTrue(container["securityContext"]["readOnlyRootFilesystem"])

    def test_a_claim_belongs_to_one_server(self):
        objects = self.render("repository.persistence.enabled=true")
        deployment = objects["Deployment", "release-tern"]["spec"]
        self.assertEqual(deployment["strategy"], {"type": "Recreate"})
        claim = deployment["template"]["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"]
        self.assertIn(("PersistentVolumeClaim", claim), objects)
        for setting in ("replicaCount=2", "autoscaling.enabled=true", "repository.seedClaim=models"):
            result = run("helm", "template", "release", str(chart()), "--set", "repository.persistence.enabled=true",
                         "--set", setting)
            self.assertNotEqual(result.returncode, 0, setting)
            self.assertIn("repository", result.stderr)

    def test_bad_values_are_refused(self):
        result = run("helm", "template", "release", str(chart()), "--set", "server.maxIsa=avx9")
        self.assertNotEqual(result.returncode, 0)
        self.assertIn("maxIsa", result.stderr)


class Container(unittest.TestCase):

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

    @needs_yaml
    def test_compose_mounts_what_exists(self):
        compose = load_yaml(SOURCE / "docker/compose.yaml")[0]
        for name, service in compose["services"].items():
            for volume in service.get("volumes", []):
                host = volume.split(":")[0]
                if host.startswith("."):
                    self.assertTrue((SOURCE / "docker" / host).exists(), f"{name}: {host}")
                else:
                    self.assertIn(host, compose["volumes"])
        self.assertTrue(compose["services"]["tern"]["read_only"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", required=True, type=pathlib.Path)
    arguments, rest = parser.parse_known_args()
    SOURCE = arguments.source.resolve()
    unittest.main(argv=[sys.argv[0], *rest], verbosity=2)
