#!/usr/bin/env python3
"""The manifests: the chart rendered by helm for each file in values/ and as the documents install it, and deploy/kserve.

Are they what Kubernetes takes (kubeconform and, where there is one, a real kube-apiserver, with the custom resources' own
definitions), do they keep the security rules, and does a wrong or contradictory value say so? The tools are those that make_tools.sh
makes, in TERN_DEPLOY_TOOLS, or on the path. A tool that is not there skips its tests and says so; without helm the exit status is 77.
"""

import copy
import functools
import json
import os
import pathlib
import re
import shlex
import shutil
import sys
import tempfile
import unittest

try:
    import yaml
except ImportError:
    print("manifests_test ... skipped 'python3-yaml is not installed'")
    sys.exit(77)

import api_schemas
import kube_api
import manifests
from manifests import CHART, SOURCE, by_name, documents, helm_template, run, settings, tool, values_files

sys.path.insert(0, str(SOURCE / "tests/docs"))
import commands_test  # noqa: E402


@functools.lru_cache(maxsize=None)
def rendered(name):
    """Objects of the chart with values/<name>.yaml, and what NOTES.txt says."""
    result = helm_template("--values", values_files()[0].parent / f"{name}.yaml")
    if result.returncode != 0:
        raise RuntimeError(f"helm template with {name}.yaml: {result.stderr}")
    return by_name(documents(result.stdout))


def rendered_with(*arguments):
    result = helm_template(*arguments)
    if result.returncode != 0:
        raise RuntimeError(f"helm template {arguments}: {result.stderr}")
    return by_name(documents(result.stdout))


def names():
    return [path.stem for path in values_files()]


def pods(objects):
    """(name, spec) of everything that becomes a pod."""
    for (kind, name), o in objects.items():
        if kind == "Deployment":
            yield f"Deployment {name}", o["spec"]["template"]["spec"]
        elif kind == "Pod":
            yield f"Pod {name}", o["spec"]


def containers(spec):
    return spec.get("initContainers", []) + spec["containers"]


def server(objects):
    return objects["Deployment", "release-tern"]["spec"]["template"]["spec"]["containers"][0]


class Security(unittest.TestCase):
    """Of every values file."""

    def each_pod(self):
        for name in names():
            for pod, spec in pods(rendered(name)):
                yield f"{name}: {pod}", spec

    def test_pods_are_restricted(self):
        seen = 0
        for pod, spec in self.each_pod():
            seen += 1
            with self.subTest(pod=pod):
                context = spec["securityContext"]
                self.assertIs(context["runAsNonRoot"], True)
                self.assertGreaterEqual(context["runAsUser"], 10000)
                self.assertEqual(context["seccompProfile"], {"type": "RuntimeDefault"})
                self.assertIs(spec["automountServiceAccountToken"], False)
                self.assertIs(spec["enableServiceLinks"], False)
                for forbidden in ("hostNetwork", "hostPID", "hostIPC"):
                    self.assertNotIn(forbidden, spec)
                for container in containers(spec):
                    self.assertEqual(container["securityContext"],
                                     {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
                                      "capabilities": {"drop": ["ALL"]}})
                    for port in container.get("ports", []):
                        self.assertNotIn("hostPort", port)
        self.assertGreater(seen, len(names()))

    def test_no_volume_reaches_the_node(self):
        allowed = {"configMap", "emptyDir", "image", "persistentVolumeClaim", "secret"}
        for pod, spec in self.each_pod():
            for volume in spec.get("volumes", []):
                self.assertLessEqual(set(volume) - {"name"}, allowed, pod)
                if "emptyDir" in volume:
                    self.assertIn("sizeLimit", volume["emptyDir"], pod)

    def test_secrets_and_sources_are_mounted_read_only(self):
        for pod, spec in self.each_pod():
            volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
            for container in containers(spec):
                for mount in container.get("volumeMounts", []):
                    if "secret" in volumes[mount["name"]] or mount["name"] == "seed":
                        self.assertIs(mount["readOnly"], True, pod)

    def test_the_admin_port_is_behind_loopback_or_tokens_or_certificates(self):
        for name in names():
            with self.subTest(values=name):
                objects = rendered(name)
                arguments = server(objects)["args"]
                services = [o for (kind, _), o in objects.items() if kind == "Service"]
                exposing = [s for s in services if any(p["targetPort"] in ("grpc-admin", 8501) for p in s["spec"]["ports"])]
                if not exposing:
                    self.assertIn("--admin_host=127.0.0.1", arguments)
                    continue
                self.assertEqual([s["spec"]["type"] for s in exposing], ["ClusterIP"])
                self.assertTrue(any(a.startswith(("--admin_token_file", "--tls_client_ca")) for a in arguments))

    def test_only_the_data_port_leaves_the_cluster(self):
        types = set()
        for name in names():
            for (kind, service), o in rendered(name).items():
                if kind == "Service" and o["spec"]["type"] != "ClusterIP":
                    types.add(o["spec"]["type"])
                    self.assertEqual([p["targetPort"] for p in o["spec"]["ports"]], ["grpc"], f"{name}: {service}")
        self.assertEqual(types, {"LoadBalancer"})

    def test_the_network_policy_closes_the_admin_port_and_all_egress(self):
        opened = []
        for name in names():
            if name == "plain":
                continue
            with self.subTest(values=name):
                objects = rendered(name)
                policy = objects["NetworkPolicy", "release-tern"]["spec"]
                labels = objects["Deployment", "release-tern"]["spec"]["template"]["metadata"]["labels"]
                self.assertLessEqual(policy["podSelector"]["matchLabels"].items(), labels.items())
                self.assertEqual(policy["policyTypes"], ["Ingress", "Egress"])
                for rule in policy["ingress"]:
                    self.assertEqual(len(rule["ports"]), 1)
                    if rule["ports"][0]["port"] == "grpc-admin":
                        self.assertTrue(rule["from"])
                        opened.append(name)
                if name == "copy-archive":
                    self.assertEqual(policy["egress"], [{}])
                else:
                    self.assertEqual(policy["egress"], [])
        self.assertEqual(opened, ["mutual-tls-admin"])
        self.assertNotIn(("NetworkPolicy", "release-tern"), rendered("plain"))

    def test_the_network_policy_lets_the_pod_of_helm_test_in(self):
        objects = rendered("tls-tokens")
        data, = [rule for rule in objects["NetworkPolicy", "release-tern"]["spec"]["ingress"] if rule["ports"] == [{"port": "grpc"}]]
        selectors = [peer["podSelector"]["matchLabels"] for peer in data["from"] if "podSelector" in peer]
        labels = objects["Pod", "release-tern-test"]["metadata"]["labels"]
        self.assertTrue(any(selector.items() <= labels.items() for selector in selectors))
        # There is no such pod where clients need a certificate.
        objects = rendered_with(*settings(["tls.secret=a", "tls.clientCertificates=true",
                                           "networkPolicy.dataFrom[0].ipBlock.cidr=10.0.0.0/8",
                                           "networkPolicy.metricsFrom[0].ipBlock.cidr=10.0.0.0/8"]))
        self.assertEqual(objects["NetworkPolicy", "release-tern"]["spec"]["ingress"][0]["from"], [{"ipBlock": {"cidr": "10.0.0.0/8"}}])

    def test_requests_equal_limits_with_whole_cpus(self):
        for name in names():
            if name == "plain":
                continue
            spec = rendered(name)["Deployment", "release-tern"]["spec"]["template"]["spec"]
            for container in containers(spec):
                with self.subTest(values=name, container=container["name"]):
                    resources = container["resources"]
                    self.assertEqual(resources["requests"], resources["limits"])
                    self.assertEqual(set(resources["limits"]), {"cpu", "memory"})
                    self.assertRegex(str(resources["limits"]["cpu"]), r"^[1-9][0-9]*$")


class Rendered(unittest.TestCase):

    def test_lint(self):
        result = run(tool("helm"), "lint", "--strict", CHART, "--kube-version", manifests.KUBERNETES)
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)

    def test_the_package_has_rules_dashboard_and_script(self):
        objects = rendered("monitoring")
        rules = documents((SOURCE / "deploy/prometheus/rules.yml").read_text())[0]
        self.assertEqual(objects["PrometheusRule", "release-tern"]["spec"], rules)
        dashboard = objects["ConfigMap", "release-tern-dashboard"]
        self.assertEqual(json.loads(dashboard["data"]["tern.json"]),
                         json.loads((SOURCE / "deploy/grafana/tern.json").read_text()))
        self.assertEqual(dashboard["metadata"]["labels"]["grafana_dashboard"], "1")
        script = rendered("copy-claim")["Deployment", "release-tern"]["spec"]["template"]["spec"]["initContainers"][0]
        self.assertEqual(script["command"][2].strip(), (CHART / "files/copy-models.sh").read_text().strip())

    def test_objectives_and_runbooks_can_be_set(self):
        rules = (SOURCE / "deploy/prometheus/rules.yml").read_text()
        for was, is_ in (("vector(0.999)", "vector(0.99)"), ("vector(0.99)\n\n", "vector(0.95)\n\n"),
                         ("runbook_url: docs/", "runbook_url: https://git.example/tern/blob/main/docs/")):
            self.assertIn(was, rules)
            rules = rules.replace(was, is_)
        prefix = "metrics.prometheusRule"
        objects = rendered_with(*settings([f"{prefix}.enabled=true", f"{prefix}.objectives.availability=0.99",
                                           f"{prefix}.runbookPrefix=https://git.example/tern/blob/main/"]),
                                "--set-json", f"{prefix}.objectives.latency=0.95")
        self.assertEqual(objects["PrometheusRule", "release-tern"]["spec"], documents(rules)[0])

    def test_a_rollout_waits_for_clients(self):
        for name in names():
            with self.subTest(values=name):
                deployment = rendered(name)["Deployment", "release-tern"]["spec"]
                recreated = deployment["strategy"]["type"] == "Recreate"
                self.assertEqual(deployment.get("minReadySeconds"), None if recreated else 35)
        deployment = rendered_with("--set", "minReadySeconds=0")["Deployment", "release-tern"]["spec"]
        self.assertEqual(deployment["minReadySeconds"], 0)

    def test_pods_that_are_not_ready_do_not_block_a_drain(self):
        budget = rendered("minimal")["PodDisruptionBudget", "release-tern"]["spec"]
        self.assertEqual(budget["unhealthyPodEvictionPolicy"], "AlwaysAllow")

    def test_names_of_pods_are_as_the_autoscaler_asks_for_them(self):
        for name in ("tern", "t" * 46, "t" * 47, "t" * 63):
            with self.subTest(length=len(name)):
                objects = rendered_with("--values", values_files()[0].parent / "autoscaled-keda.yaml", "--set", f"fullnameOverride={name}")
                (_, deployment), = [key for key in objects if key[0] == "Deployment"]
                (_, scaled), = [key for key in objects if key[0] == "ScaledObject"]
                query = objects["ScaledObject", scaled]["spec"]["triggers"][0]["metadata"]["query"]
                # Kubernetes cuts what goes before the last five characters at 58.
                pod = f"{deployment}-{'7' * 10}-"[:58] + "abcde"
                for pattern in set(re.findall(r'pod=~"([^"]+)"', query)):
                    self.assertRegex(pod, f"^(?:{pattern})$")

    def test_names_and_labels_stay_strings(self):
        objects = rendered_with("--set-string", "nameOverride=123,fullnameOverride=true,auth.dataTokensSecret=1,tls.secret=2",
                                "--set", "autoscaling.enabled=true")

        def walk(node, where):
            if isinstance(node, dict):
                for key, value in node.items():
                    if key in ("labels", "matchLabels") or (key == "selector" and "Service" in where):
                        for label, text in value.items():
                            if isinstance(text, dict):
                                continue
                            self.assertIsInstance(text, str, f"{where}.{key}.{label}")
                    if key in ("name", "secretName", "serviceAccountName"):
                        self.assertIsInstance(value, str, f"{where}.{key}")
                    walk(value, f"{where}.{key}")
            elif isinstance(node, list):
                for value in node:
                    walk(value, where)

        for (kind, name), o in objects.items():
            walk(o, f"{kind} {name}")

    def test_all_ports_listen_on_the_given_address(self):
        self.assertLessEqual({"--host=0.0.0.0", "--metrics_host=0.0.0.0"}, set(server(rendered("minimal"))["args"]))
        objects = rendered_with("--values", values_files()[0].parent / "mutual-tls-admin.yaml", "--set", "server.host=::")
        self.assertLessEqual({"--host=::", "--metrics_host=::", "--admin_host=::"}, set(server(objects)["args"]))

    def test_probes_ask_the_health_port(self):
        for name in names():
            container = server(rendered(name))
            with self.subTest(values=name):
                self.assertIn("--health_port=8503", container["args"])
                self.assertIn({"name": "health", "containerPort": 8503}, container["ports"])
                for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                    self.assertEqual(container[probe]["grpc"]["port"], 8503)
        for name, model in (("copy-claim", {"service": "resnet50"}), ("minimal", {"service": "demo"}), ("mount-claim", {})):
            self.assertEqual(server(rendered(name))["readinessProbe"]["grpc"], {"port": 8503, **model})

    def test_the_grace_period_outlasts_drain_and_grace(self):
        for name, wanted in (("minimal", 35), ("tls-tokens", 85)):
            pod = rendered(name)["Deployment", "release-tern"]["spec"]["template"]["spec"]
            self.assertEqual(pod["terminationGracePeriodSeconds"], wanted)
            seconds = [int(re.search(rf"--{flag}=(\d+)s", " ".join(pod["containers"][0]["args"]))[1])
                       for flag in ("drain", "grace")]
            self.assertEqual(sum(seconds) + 10, wanted)

    def test_numbers_stay_integers(self):
        self.assertIn("--max_pixels=40000000", server(rendered("minimal"))["args"])  # not 4e+07

    def test_services_select_the_pods_and_name_their_ports(self):
        for name in names():
            objects = rendered(name)
            template = objects["Deployment", "release-tern"]["spec"]["template"]
            ports = {p["name"] for p in template["spec"]["containers"][0]["ports"]}
            for (kind, service), o in objects.items():
                if kind != "Service":
                    continue
                with self.subTest(values=name, service=service):
                    self.assertLessEqual(o["spec"]["selector"].items(), template["metadata"]["labels"].items())
                    self.assertLessEqual({p["targetPort"] for p in o["spec"]["ports"]}, ports)
                    if ("Pod", "release-tern-test") in objects:
                        test = objects["Pod", "release-tern-test"]["metadata"]["labels"]
                        self.assertFalse(o["spec"]["selector"].items() <= test.items())

    def test_the_headless_service_has_no_address(self):
        self.assertEqual(rendered("minimal")["Service", "release-tern-headless"]["spec"]["clusterIP"], "None")

    def test_tls_and_tokens_are_mounted_where_the_flags_look(self):
        pod = rendered("tls-tokens")["Deployment", "release-tern"]["spec"]["template"]["spec"]
        container = pod["containers"][0]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        secrets = {v["name"]: v["secret"]["secretName"] for v in pod["volumes"] if "secret" in v}
        self.assertEqual(secrets, {"tls": "tern-tls", "admin-tokens": "tern-admin-tokens",
                                   "data-tokens": "tern-data-tokens"})
        for flag in (f"--tls_cert={mounts['tls']}/tls.crt", f"--tls_key={mounts['tls']}/tls.key",
                     f"--admin_token_file={mounts['admin-tokens']}/tokens",
                     f"--data_token_file={mounts['data-tokens']}/tokens"):
            self.assertIn(flag, container["args"])
        self.assertIn(f"--tls_client_ca={mounts['tls']}/ca.crt", server(rendered("mutual-tls-admin"))["args"])

    def test_a_digest_pins_the_image(self):
        self.assertRegex(server(rendered("tls-tokens"))["image"], r"^registry\.example/tern:0\.1\.0@sha256:[0-9a-f]{64}$")

    def test_every_source_of_models_reaches_the_script(self):
        wanted = {"copy-claim": {"SEED": "/seed"}, "copy-image": {"SEED": "/seed/models"},
                  "copy-image-container": {"SEED": "/repository"},
                  "copy-archive": {"ARCHIVE_URL": "https://models.example/repository.tar.gz",
                                   "ARCHIVE_SHA256": "0123456789abcdef" * 4}}
        for name, environment in wanted.items():
            with self.subTest(values=name):
                pod = rendered(name)["Deployment", "release-tern"]["spec"]["template"]["spec"]
                container = pod["initContainers"][0]
                self.assertEqual({e["name"]: e["value"] for e in container["env"]}, {**environment, "MODELS": "/models"})
                volumes = {volume["name"]: volume for volume in pod["volumes"]}
                self.assertEqual("seed" in volumes, environment.get("SEED", "").startswith("/seed"))
                for mount in container["volumeMounts"]:
                    self.assertIn(mount["name"], volumes)
        self.assertEqual(rendered("copy-image-container")["Deployment", "release-tern"]["spec"]["template"]["spec"]
                         ["initContainers"][0]["image"], "registry.example/models:7")

    def test_a_mounted_source_is_served_read_only(self):
        for name, repository in (("mount-claim", None), ("mount-image", "--repository=/models/repository")):
            with self.subTest(values=name):
                pod = rendered(name)["Deployment", "release-tern"]["spec"]["template"]["spec"]
                container = pod["containers"][0]
                self.assertNotIn("initContainers", pod)
                self.assertIn("--read_only", container["args"])
                self.assertEqual([a for a in container["args"] if a.startswith("--repository")],
                                 [repository] if repository else [])
                mount = {m["name"]: m for m in container["volumeMounts"]}["models"]
                self.assertEqual(mount, {"name": "models", "mountPath": "/models", "readOnly": True})
                self.assertEqual([v["name"] for v in pod["volumes"]].count("models"), 1)
        self.assertIn("--poll_interval=5s", server(rendered("mount-claim"))["args"])

    def test_a_claim_belongs_to_one_server(self):
        objects = rendered("claim")
        deployment = objects["Deployment", "release-tern"]["spec"]
        self.assertEqual(deployment["strategy"], {"type": "Recreate"})
        claim = deployment["template"]["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"]
        self.assertEqual(objects["PersistentVolumeClaim", claim]["metadata"]["annotations"],
                         {"helm.sh/resource-policy": "keep"})

    def test_autoscalers_own_the_number_of_replicas(self):
        for name, kind in (("autoscaled-hpa", "HorizontalPodAutoscaler"), ("autoscaled-keda", "ScaledObject")):
            objects = rendered(name)
            self.assertNotIn("replicas", objects["Deployment", "release-tern"]["spec"])
            self.assertEqual([k for k, _ in objects if k in ("HorizontalPodAutoscaler", "ScaledObject")], [kind])
            self.assertEqual(objects[kind, "release-tern"]["spec"]["scaleTargetRef"]["name"], "release-tern")

    def test_the_autoscaler_reads_what_the_adapter_offers(self):
        adapter = documents((SOURCE / "deploy/prometheus/adapter.yml").read_text())[0]
        offered = {rule["name"]["as"] for rule in adapter["rules"]}
        metrics = rendered("autoscaled-hpa")["HorizontalPodAutoscaler", "release-tern"]["spec"]["metrics"]
        wanted = {m["pods"]["metric"]["name"]: m["pods"]["target"]["averageValue"] for m in metrics if m["type"] == "Pods"}
        self.assertEqual(wanted, {"tern_queue_wait_seconds": "20m", "tern_images_per_worker": "4"})
        self.assertEqual(set(wanted), offered)

    def test_one_scrape_of_each_pod(self):
        annotations = rendered("minimal")["Deployment", "release-tern"]["spec"]["template"]["metadata"]["annotations"]
        self.assertEqual(annotations["prometheus.io/port"], "8502")
        objects = rendered("monitoring")
        self.assertEqual(objects["Deployment", "release-tern"]["spec"]["template"]["metadata"]["annotations"],
                         {"example.org/team": "vision"})
        monitor = objects["ServiceMonitor", "release-tern"]["spec"]["selector"]["matchLabels"]
        matched = [name for (kind, name), o in objects.items()
                   if kind == "Service" and monitor.items() <= o["metadata"]["labels"].items()]
        self.assertEqual(matched, ["release-tern-metrics"])

    def test_helm_test_does_what_it_can(self):
        wanted = {"minimal": ["health", "classify"], "copy-claim": ["health", "classify"], "claim": ["health"],
                  "tls-tokens": ["health"]}
        for name, calls in wanted.items():
            pod = rendered(name)["Pod", "release-tern-test"]["spec"]
            self.assertEqual([c["name"] for c in pod["containers"]], calls, name)
            for container in pod["containers"]:
                self.assertEqual(container["command"][:2], ["/usr/local/bin/ternctl", container["name"]])
        pod = rendered("tls-tokens")["Pod", "release-tern-test"]["spec"]
        environment = {e["name"]: e["value"] for e in pod["containers"][0]["env"]}
        self.assertEqual(environment["TERN_TLS_SERVER_NAME"], "tern.example.org")
        # Without the authority's certificate it starts, too, and says so.
        volume, = [v["secret"] for v in pod["volumes"] if "secret" in v]
        self.assertEqual((volume["optional"], [item["key"] for item in volume["items"]]), (True, ["ca.crt"]))
        self.assertNotIn(("Pod", "release-tern-test"), rendered("mutual-tls-admin"))

    def notes(self, name, *values):
        """helm shows NOTES.txt only where it installs: a template that includes it shows it here."""
        with tempfile.TemporaryDirectory(prefix="tern-chart-") as folder:
            chart = pathlib.Path(folder) / "tern"
            shutil.copytree(CHART, chart)
            (chart / "templates/notes.yaml").write_text(
                'notes: {{ include (print .Template.BasePath "/NOTES.txt") . | quote }}\n')
            result = run(tool("helm"), "template", "release", chart, "--show-only", "templates/notes.yaml",
                         "--values", values_files()[0].parent / f"{name}.yaml", *settings(values), "--kube-version",
                         manifests.KUBERNETES)
            self.assertEqual(result.returncode, 0, result.stderr)
            return documents(result.stdout)[0]["notes"]

    def test_notes_say_what_to_run_and_warn(self):
        for name, wanted, unwanted in (("minimal", ["ternctl classify --model demo", "is lost"], ["WARNING"]),
                                       ("claim", ["ternctl import"], ["is lost", "WARNING"]),
                                       ("plain", ["WARNING: the pods do not get", "WARNING: no NetworkPolicy"], []),
                                       ("autoscaled-hpa", ["custom.metrics.k8s.io", "keeps the one that it finds"], ["WARNING"]),
                                       ("mount-image", ["WARNING: readinessProbe.model"], ["dashboard"]),
                                       ("monitoring", [], ["WARNING"])):
            notes = self.notes(name)
            for text in wanted:
                self.assertIn(text, notes, name)
            for text in unwanted:
                self.assertNotIn(text, notes, name)
        self.assertIn("WARNING: the dashboard's panels", self.notes("monitoring", "metrics.prometheusRule.enabled=false"))


@unittest.skipUnless(tool("promtool"), "promtool is not installed")
class Scaling(unittest.TestCase):
    """What the autoscalers read, by promtool: two pods of the release, one busy and one idle, beside a pod of another."""

    BUSY, IDLE, OTHER = "release-tern-7d4b9c-abcde", "release-tern-7d4b9c-fghij", "other-tern-7d4b9c-abcde"

    def series(self):

        def of(name, pod, values, more=""):
            labels = f'namespace="serving",pod="{pod}"{more}'
            return {"series": f"{name}{{{labels}}}", "values": values}

        made = []
        # A delay of 10 ms is chosen: of 60 ms of waiting 50 are the load's.
        for pod, seconds, images, waiting in ((self.BUSY, "0+0.6x20", "0+10x20", 6), (self.IDLE, "0+0x20", "0+0x20", 2),
                                              (self.OTHER, "0+90x20", "0+10x20", 99)):
            for stage, factor in (("queue", ""), ("inference", "7")):
                more = f',model="m",version="1",stage="{stage}"'
                made.append(of("tern_stage_duration_seconds_sum", pod, seconds.replace("+", f"+{factor}"), more))
                made.append(of("tern_stage_duration_seconds_count", pod, images, more))
            made.append(of("tern_batch_delay_seconds", pod, "0.01x20", ',model="m",version="1"'))
            made.append(of("tern_waiting_images", pod, f"{waiting}x20"))
            made.append(of("tern_cpu_budget_threads", pod, "2x20"))
        return made

    def evaluates_to(self, expression, samples, series=None):
        """With two samples of each series in two minutes, whatever the moment of the scrapes."""
        case = {"interval": "1m", "input_series": self.series() if series is None else series,
                "promql_expr_test": [{"expr": f"round({expression}, 1e-6)", "eval_time": "4m30s", "exp_samples": samples}]}
        with tempfile.NamedTemporaryFile("w", suffix=".yml") as file:
            yaml.safe_dump({"rule_files": [], "evaluation_interval": "15s", "tests": [case]}, file)
            file.flush()
            result = run(tool("promtool"), "test", "rules", file.name)
            self.assertEqual(result.returncode, 0, result.stdout + result.stderr)

    def adapted(self, rule):
        """The query as the adapter asks for two pods of a namespace."""
        query = rule["metricsQuery"].replace("<<.GroupBy>>", "pod").replace(
            "<<.LabelMatchers>>", f'namespace="serving",pod=~"{self.BUSY}|{self.IDLE}"')
        self.assertNotIn("<<", query)
        return query

    def test_the_adapter_offers_figures_of_each_pod(self):
        wanted = {"tern_queue_wait_seconds": (0.05, 0), "tern_images_per_worker": (3, 1)}
        rules = documents((SOURCE / "deploy/prometheus/adapter.yml").read_text())[0]["rules"]
        self.assertEqual({rule["name"]["as"] for rule in rules}, set(wanted))
        for rule in rules:
            with self.subTest(metric=rule["name"]["as"]):
                busy, idle = wanted[rule["name"]["as"]]
                self.evaluates_to(self.adapted(rule), [{"labels": f'{{pod="{self.BUSY}"}}', "value": busy},
                                          {"labels": f'{{pod="{self.IDLE}"}}', "value": idle}])

    def test_keda_reads_one_figure_of_the_releases_own_pods(self):
        triggers = rendered("autoscaled-keda")["ScaledObject", "release-tern"]["spec"]["triggers"]
        queries = {t["name"]: t["metadata"] for t in triggers if t["type"] == "prometheus"}
        self.assertEqual({name: q["threshold"] for name, q in queries.items()},
                         {"queue-wait": "0.02", "images-per-worker": "2.5"})
        self.evaluates_to(queries["queue-wait"]["query"], [{"labels": "{}", "value": 0.05}])
        self.evaluates_to(queries["images-per-worker"]["query"], [{"labels": "{}", "value": 2}])

    def test_no_images_are_no_wait(self):
        query = rendered("autoscaled-keda")["ScaledObject", "release-tern"]["spec"]["triggers"][0]["metadata"]["query"]
        for kept in ("tern_waiting_images", ""):  # before the first image, and with an image in the past alone
            idle = [s for s in self.series() if self.IDLE in s["series"] and s["series"].startswith(kept)]
            self.evaluates_to(query, [{"labels": "{}", "value": 0}], series=idle)

    def test_no_series_are_no_figure_but_an_error(self):
        triggers = rendered("autoscaled-keda")["ScaledObject", "release-tern"]["spec"]["triggers"]
        for trigger in triggers:
            if trigger["type"] == "prometheus":
                self.assertEqual(trigger["metadata"]["ignoreNullValues"], "false")
                self.evaluates_to(trigger["metadata"]["query"], [],
                                  series=[s for s in self.series() if self.OTHER in s["series"]])

    def test_the_delay_in_force_is_no_wait(self):
        # An idle server whose images all wait for the delay of 10 ms, and one whose batches are full before.
        for seconds in ("0+0.1x20", "0+0.02x20"):
            series = [{**s, "values": seconds} if "_seconds_sum" in s["series"] else s for s in self.series() if self.BUSY in s["series"]]
            query = rendered("autoscaled-keda")["ScaledObject", "release-tern"]["spec"]["triggers"][0]["metadata"]["query"]
            self.evaluates_to(query, [{"labels": "{}", "value": 0}], series=series)
            rule = documents((SOURCE / "deploy/prometheus/adapter.yml").read_text())[0]["rules"][0]
            self.evaluates_to(self.adapted(rule), [{"labels": f'{{pod="{self.BUSY}"}}', "value": 0}], series=series)


class Documents(unittest.TestCase):
    """What the documents say to install, as tests/docs reads them."""

    def commands(self, *wanted):
        """(document, words) of the commands that begin with `wanted`."""
        for path in commands_test.documents():
            for _, language, block in commands_test.blocks(path):
                for _, words in commands_test.commands(block) if language == "sh" else ():
                    if tuple(words[:len(wanted)]) == wanted:
                        yield path, words

    def test_what_helm_installs_can_be_rendered(self):
        releases = set()
        for path, (_, _, *words) in self.commands("helm", "install"):
            with self.subTest(document=path.name, command=shlex.join(words)):
                result = run(tool("helm"), "template", *words, "--kube-version", manifests.KUBERNETES, cwd=SOURCE)
                self.assertEqual(result.returncode, 0, result.stderr)
                hooks = [o["metadata"]["annotations"]["helm.sh/hook"] for o in documents(result.stdout)
                         if "helm.sh/hook" in o["metadata"].get("annotations", {})]
                if "test" in hooks:
                    releases.add((path, words[0]))
        self.assertTrue(releases)
        self.assertEqual({(path, words[2]) for path, words in self.commands("helm", "test")}, releases)

    def test_what_kubectl_applies_is_checked_here(self):
        applied = {words[words.index("-f") + 1] for _, words in self.commands("kubectl", "apply")}
        self.assertTrue(applied)
        self.assertLessEqual(applied, {name for name, _ in kserve()})

    def test_no_other_command_of_helm_and_kubectl_is_shown(self):
        shown = {tuple(words[:2]) for program in ("helm", "kubectl") for _, words in self.commands(program)}
        self.assertEqual(shown, {("helm", "install"), ("helm", "test"), ("kubectl", "apply")})


def kserve():
    """(file, objects) of deploy/kserve."""
    return [(f"deploy/kserve/{path.name}", documents(path.read_text()))
            for path in sorted((SOURCE / "deploy/kserve").glob("*.yaml"))]


def apis():
    folder = pathlib.Path(os.environ.get("TERN_DEPLOY_TOOLS", "/nonexistent")) / "apis"
    return folder if (folder / "swagger.json").exists() else None


def everything():
    """(name, objects) of every values file and of deploy/kserve."""
    return [(f"values/{name}.yaml", list(rendered(name).values())) for name in names()] + kserve()


def mistaken():
    """Objects with one mistake each, which a check that means anything finds."""
    deployment = copy.deepcopy(rendered("minimal")["Deployment", "release-tern"])
    deployment["spec"]["strategy"]["rollingUpdate"]["maxSurg"] = 1
    yield "maxSurg", deployment
    scaled = copy.deepcopy(rendered("autoscaled-keda")["ScaledObject", "release-tern"])
    scaled["spec"]["minReplicaCount"] = "two"
    yield "minReplicaCount", scaled
    service = copy.deepcopy(dict(kserve())["deploy/kserve/inferenceservice.yaml"][0])
    service["spec"]["predictor"]["model"]["storageURI"] = "pvc://x"
    yield "storageURI", service


@unittest.skipUnless(tool("kubeconform") and apis(), "kubeconform or the API's types are not there: make_tools.sh")
class Types(unittest.TestCase):
    """kubeconform, with strict schemas made of Kubernetes' OpenAPI document and the custom resources' definitions."""

    @classmethod
    def setUpClass(cls):
        cls.schemas = tempfile.TemporaryDirectory(prefix="tern-schemas-")
        api_schemas.write(apis(), pathlib.Path(cls.schemas.name))

    @classmethod
    def tearDownClass(cls):
        cls.schemas.cleanup()

    def check(self, objects):
        text = yaml.safe_dump_all(objects)
        result = run(tool("kubeconform"), "-strict", "-output", "json", "-verbose", "-schema-location",
                     self.schemas.name + "/{{.ResourceKind}}{{.KindSuffix}}.json", "-", input=text)
        return [(r["kind"], r["name"], r["status"], r["msg"]) for r in json.loads(result.stdout)["resources"]]

    def test_every_manifest_is_valid(self):
        for name, objects in everything():
            with self.subTest(manifests=name):
                results = self.check(objects)
                self.assertEqual(len(results), len(objects))
                self.assertEqual([r for r in results if r[2] != "statusValid"], [])
                print(f"  kubeconform {manifests.KUBERNETES}, {name}: " + ", ".join(sorted(r[0] for r in results)))

    def test_mistakes_are_found(self):
        for word, o in mistaken():
            with self.subTest(mistake=word):
                (_, _, status, message), = self.check([o])
                self.assertEqual(status, "statusInvalid")
                self.assertIn(word, message)


@unittest.skipUnless(tool("kube-apiserver") and tool("etcd") and apis(),
                     "kube-apiserver or etcd is not there: make_tools.sh --apiserver, etcd-server")
class Api(unittest.TestCase):
    """A real kube-apiserver: a dry run of every object, in a namespace that enforces the `restricted` standard."""

    NAMESPACE, INSTALLED = "serving", "installed"

    @classmethod
    def setUpClass(cls):
        cls.api = kube_api.KubeApi(tool("kube-apiserver"), tool("etcd"), apis())
        # values/claim.yaml names it.
        cls.api.create({"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": "serving"},
                        "value": 1000})
        levels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
        for name in (cls.NAMESPACE, cls.INSTALLED):
            cls.api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": levels}})

    @classmethod
    def tearDownClass(cls):
        cls.api.close()

    def dry_run(self, o):
        return self.api.create(o, self.NAMESPACE, dry_run=True)

    def assert_kept(self, sent, got, where):
        """A field whose feature gate is closed is dropped without a word."""
        if isinstance(sent, dict):
            for key, value in sent.items():
                if value in ({}, [], None, False, "", 0):
                    continue
                self.assertIn(key, got, where)
                self.assert_kept(value, got[key], f"{where}.{key}")
        elif isinstance(sent, list):
            self.assertEqual(len(sent), len(got), where)
            for index, (a, b) in enumerate(zip(sent, got)):
                self.assert_kept(a, b, f"{where}[{index}]")

    def test_every_manifest_is_taken(self):
        version = self.api.call("GET", "/version")[1]["gitVersion"]
        for name, objects in everything():
            for o in objects:
                with self.subTest(manifests=name, kind=o["kind"], name=o["metadata"]["name"]):
                    self.assert_kept(o, self.dry_run(o), o["kind"])
            print(f"  kube-apiserver {version}, {name}: " + ", ".join(sorted(o["kind"] for o in objects)))

    def test_pods_are_admitted_where_the_restricted_standard_is_enforced(self):
        for name in names():
            for pod, spec in pods(rendered(name)):
                with self.subTest(values=name, pod=pod):
                    made = self.dry_run({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec})
                    if pod.startswith("Deployment") and name != "plain":
                        self.assertEqual(made["status"]["qosClass"], "Guaranteed")

    def test_kserves_pods_are_admitted_there_too(self):
        for name, objects in kserve():
            for o in objects:
                if o["kind"] == "ClusterServingRuntime":
                    self.dry_run({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"},
                                  "spec": {"containers": o["spec"]["containers"]}})

    def test_a_pod_that_is_not_restricted_is_refused(self):
        spec = copy.deepcopy(rendered("minimal")["Deployment", "release-tern"]["spec"]["template"]["spec"])
        del spec["containers"][0]["securityContext"]["capabilities"]
        with self.assertRaisesRegex(kube_api.Refused, "unrestricted capabilities"):
            self.dry_run({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec})

    def test_mistakes_are_found(self):
        for word, o in mistaken():
            with self.subTest(mistake=word), self.assertRaisesRegex(kube_api.Refused, word):
                self.dry_run(o)

    def test_a_release_can_be_installed_and_upgraded(self):
        environment = dict(os.environ, KUBECONFIG=str(self.api.kubeconfig()))
        folder = values_files()[0].parent
        for name in ("minimal", "tls-tokens", "autoscaled-keda", "mount-claim"):
            result = run(tool("helm"), "upgrade", "--install", "release", CHART, "--namespace", self.INSTALLED, "--values",
                         folder / f"{name}.yaml", env=environment)
            self.assertEqual(result.returncode, 0, result.stderr)
            self.assertIn("NOTES:", result.stdout)
            if name == "autoscaled-keda":  # those of tls-tokens
                path = f"/apis/apps/v1/namespaces/{self.INSTALLED}/deployments/release-tern"
                self.assertEqual(self.api.call("GET", path)[1]["spec"]["replicas"], 2)
        status, deployment, _ = self.api.call("GET", f"/apis/apps/v1/namespaces/{self.INSTALLED}/deployments/release-tern")
        self.assertEqual(status, 200)
        self.assertEqual(deployment["spec"]["replicas"], 3)


class Refused(unittest.TestCase):

    def refused(self, word, *values, kubernetes=manifests.KUBERNETES):
        with self.subTest(values=values):
            result = helm_template(*settings(values), kubernetes=kubernetes)
            self.assertNotEqual(result.returncode, 0, "it was rendered")
            self.assertIn(word, result.stderr)

    def test_unknown_keys(self):
        self.refused("replicas", "replicas=2")
        self.refused("portt", "service.portt=1")
        self.refused("gpu", "resources.limits.gpu=1")
        self.refused("seedClaim", "repository.seedClaim=models")
        self.refused("namespaces", "networkPolicy.dataFrom[0].namespaces=x")

    def test_names_that_kubernetes_refuses(self):
        self.refused("fullnameOverride", "fullnameOverride=Tern_X")
        self.refused("nameOverride", "nameOverride=a.b")
        self.refused("set fullnameOverride", "fullnameOverride=1st")

    def test_wrong_types(self):
        self.refused("replicaCount", "replicaCount=two")
        self.refused("drainSeconds", "server.drainSeconds=5s")
        self.refused("tolerations", "tolerations=x")
        self.refused("demo", "server.demo=maybe")

    def test_values_out_of_range(self):
        self.refused("maxIsa", "server.maxIsa=avx9")
        self.refused("port", "metrics.port=0")
        self.refused("maxUnavailable", "podDisruptionBudget.maxUnavailable=0")
        self.refused("sha256", "repository.source.archive.url=https://x/y", "repository.source.archive.sha256=abc")
        self.refused("extraArgs", "server.extraArgs[0]=-v")
        self.refused("type", "service.type=ExternalName")
        self.refused("minReadySeconds", "minReadySeconds=600")
        self.refused("host", "server.host=localhost")
        self.refused("availability", "metrics.prometheusRule.objectives.availability=1")
        self.refused("latency", "metrics.prometheusRule.objectives.latency=99%")
        self.refused("runbookPrefix", "metrics.prometheusRule.runbookPrefix=wiki")

    def test_contradictions(self):
        claim = "repository.persistence.enabled=true"
        self.refused("repository.source for several", claim, "replicaCount=2")
        self.refused("repository.source for several", claim, "autoscaling.enabled=true")
        self.refused("exclude each other", claim, "repository.source.claim=models")
        self.refused("exclude each other", "repository.source.claim=a", "repository.source.image.reference=b")
        self.refused("wants repository.source.claim", "repository.source.mode=mount")
        self.refused("can only copy", "repository.source.mode=mount", "repository.source.image.reference=a",
                     "repository.source.image.as=container")
        self.refused("mount forbids it", "repository.source.mode=mount", "repository.source.claim=a", "server.demo=true")
        self.refused("nothing without repository.persistence.enabled", "repository.persistence.existingClaim=a")
        self.refused("url and sha256", "repository.source.archive.url=https://x/y")
        self.refused("auth.adminTokensSecret or tls.clientCertificates", "admin.service.enabled=true")
        self.refused("adminFrom is empty", "admin.service.enabled=true", "auth.adminTokensSecret=a")
        self.refused("nothing without admin.service.enabled", "networkPolicy.adminFrom[0].podSelector.matchLabels.a=b")
        self.refused("networkPolicy.dataFrom without networkPolicy.metricsFrom", "networkPolicy.dataFrom[0].ipBlock.cidr=10.0.0.0/8")
        self.refused("need tls.secret", "tls.clientCertificates=true")
        for port in (8500, 8501, 8503):
            self.refused("metrics.port is", f"metrics.port={port}")
        for label in ("name", "instance", "version"):
            self.refused("podLabels: app.kubernetes.io", rf"podLabels.app\.kubernetes\.io/{label}=a")
        self.refused("podAnnotations: prometheus.io/port", r"podAnnotations.prometheus\.io/port=x")
        self.refused("more than maxReplicas", "autoscaling.enabled=true", "autoscaling.minReplicas=9")
        self.refused("all are 0", "autoscaling.enabled=true", "autoscaling.queueWaitMilliseconds=0",
                     "autoscaling.cpuUtilizationPercent=0")
        self.refused("prometheusAddress", "autoscaling.enabled=true", "autoscaling.type=keda")
        self.refused("--drain=1s is the chart's to set", "server.extraArgs[0]=--drain=1s")
        self.refused("use container", "repository.source.image.reference=a", kubernetes="1.30.0")

    def test_a_cluster_that_is_too_old(self):
        self.refused("kubeVersion", kubernetes="1.26.0")


if __name__ == "__main__":
    if tool("helm") is None:
        print("manifests_test ... skipped 'helm is not there: tests/deploy/make_tools.sh, or on the path'")
        sys.exit(77)
    unittest.main(verbosity=2)
