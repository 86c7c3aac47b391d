#!/usr/bin/env python3
"""Rules and dashboard against the real Prometheus: two servers under mixed load, scraped every second.

    dashboard_test.py --ternd T --ternctl C [--table FILE] [--image FILE [--seconds N]]

Every rule must be evaluated without an error, every query of every panel and every variable must give data, every metric
of docs/metrics.md must be live, and what was done wrong on purpose must raise its alert. Prints a table of the panels'
queries (--table: also to FILE). --image draws the dashboard after N seconds of load (scripts/render_dashboard.py). Needs
Debian's prometheus; without it the test says so and ends with 77.
"""

import argparse
import json
import math
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.error
import urllib.parse
import urllib.request

try:
    import yaml
except ImportError:
    yaml = None

SOURCE = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(SOURCE / "tests/testing"))
import ternd  # noqa: E402

ARGS = None
PHOTOS = SOURCE / "models/demo/photos"
CALIBRATION = SOURCE / "models/demo/calibration"
TOKEN = "dashboard-test-token"


def skip(reason):
    print(f"dashboard_test ... skipped 'the dashboard: {reason}'")
    sys.exit(77)


def wait_for(what, condition, seconds=60):
    return ternd.poll(condition, seconds, f"{what}: not within {seconds} s")


class Prometheus:
    """The real one, with the rules and the configuration of deploy/prometheus and other targets."""

    def __init__(self, folder, targets):
        config = yaml.safe_load((SOURCE / "deploy/prometheus/prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(SOURCE / "deploy/prometheus" / name) for name in config["rule_files"]]
        config["scrape_configs"][0]["static_configs"] = [{"targets": targets, "labels": {"namespace": "test"}}]
        file = folder / "prometheus.yml"
        file.write_text(yaml.safe_dump(config))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.log = open(folder / "prometheus.log", "w+")
        self.process = subprocess.Popen(
            ["prometheus", f"--config.file={file}", f"--storage.tsdb.path={folder / 'tsdb'}", "--log.level=warn",
             f"--web.listen-address={self.address}"], stderr=self.log, stdout=self.log)
        wait_for("prometheus", self.ready)

    def ready(self):
        if self.process.poll() is not None:
            self.log.seek(0)
            raise AssertionError("prometheus ended: " + self.log.read())
        try:
            with urllib.request.urlopen(f"http://{self.address}/-/ready", timeout=5) as reply:
                return reply.status == 200
        except OSError:
            return False

    def get(self, path, **arguments):
        url = f"http://{self.address}/api/v1/{path}?" + urllib.parse.urlencode(arguments, doseq=True)
        try:
            with urllib.request.urlopen(url, timeout=30) as reply:
                return json.load(reply)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} {arguments}: {error.read().decode()}") from error

    def query(self, expression):
        """[(labels, value)], without those that are no number."""
        found = [(item["metric"], float(item["value"][1])) for item in self.get("query", query=expression)["result"]]
        return [(labels, value) for labels, value in found if not math.isnan(value)]

    def stop(self):
        self.process.terminate()
        self.process.wait(timeout=30)
        self.log.close()


class Server(ternd.Ternd):
    """With its ternctl."""

    def __init__(self, repository, *flags, client=()):
        super().__init__(ARGS.ternd, str(repository), "--demo", *flags)
        self.repository = repository
        self.client = [ARGS.ternctl, f"--server=127.0.0.1:{self.port}", f"--admin=127.0.0.1:{self.admin_port}", *client]

    def ctl(self, *words, fails=False):
        result = subprocess.run([*self.client, *map(str, words)], capture_output=True, text=True, timeout=300)
        if (result.returncode != 0) != fails:
            raise AssertionError(f"ternctl {words}: exit status {result.returncode}: {result.stderr[-1000:]}")
        return result.stdout

    def bench(self, seconds, *words):
        return subprocess.Popen([*self.client, "bench", "--model", "demo", "--data", str(PHOTOS), "--seconds", str(seconds),
                                 "--warmup", "0", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def post(self, path, body, headers):
        """The status of the answer."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.metrics_port}{path}", data=body, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                return reply.status
        except urllib.error.HTTPError as error:
            return error.code


def serve(folder):
    """A server in plain text that quantises, watches and compares; one behind TLS and tokens. And what stops them."""
    plain = Server(folder / "plain", "--shadow_fraction=1", "--profile_every=10", "--count_codes_every=5",
                   "--poll_interval=100ms", "--max_queue=24", "--max_image_bytes=1000000")
    cert, key, tokens = folder / "cert.pem", folder / "key.pem", folder / "tokens"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, "-days", "30",
                    "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    tokens.write_text(f"test:{TOKEN}\n")
    (folder / "token").write_text(TOKEN)
    secured = Server(folder / "secured", f"--tls_cert={cert}", f"--tls_key={key}", f"--data_token_file={tokens}",
                     client=(f"--tls-ca={cert}", f"--token-file={folder / 'token'}"))
    return plain, secured


def load(plain, secured, folder, seconds):
    """Makes every metric of the two servers live."""
    photo = sorted(PHOTOS.rglob("*.jpg"))[0]
    for weights in (["int8"], ["ternary", "--distill", "off"]):
        plain.ctl("quantize", "--model", "demo", "--from", 1, "--weights", *weights, "--calibration", CALIBRATION,
                  "--calibration-count", 40, "--evaluation", PHOTOS, "--quiet")
    plain.ctl("set-default", "--model", "demo", "--version", 2)
    # By what 100 photographs can promise, no version is accurate enough for less.
    with open(plain.repository / "demo/config.textproto", "a") as config:
        config.write("brownout { max_top1_drop: 1 queue_wait_us: 1000 }\n")
    plain.ctl("load", "--model", "demo", "--version", 2)

    steady = [plain.bench(seconds, "--rate", "40"), secured.bench(seconds, "--rate", "5")]
    # Answers with labels, of every version; a label that comes later.
    for version in (0, 1, 3):
        plain.ctl("classify", "--model", "demo", "--version", version, "--send-labels", "--window", 4, PHOTOS)
    answer = json.loads(plain.ctl("classify", "--model", "demo", photo, "--json"))["images"][0]
    plain.ctl("label", "--request-id", answer["request_id"], "--label", 0)
    # Another version than the default, because the request wants more accuracy (what is known of the versions is up to a
    # second old). Then an overload.
    wanted = ternd.metric(plain.metrics(), "tern_quantization_top1_low", version="2")
    plain.ctl("set-default", "--model", "demo", "--version", 3)
    wait_for("a degraded answer", lambda: plain.ctl("classify", "--model", "demo", "--min-accuracy", wanted, photo)
             and ternd.metric(plain.metrics(), "tern_degraded_total"))
    plain.ctl("set-default", "--model", "demo", "--version", 2)
    plain.bench(4, "--concurrency", "64", "--channels", "2").wait()
    # Mistakes of callers.
    (folder / "text.jpg").write_text("no image")
    (folder / "large.jpg").write_bytes(b"\xff\xd8" + bytes(1_000_001))
    for wrong in ("text.jpg", "large.jpg"):
        plain.ctl("classify", "--model", "demo", folder / wrong, fails=True)
    plain.ctl("classify", "--model", "nobody", photo, fails=True)
    (folder / "token").write_text("not-the-right-token")
    secured.ctl("classify", "--model", "demo", photo, fails=True)
    (folder / "token").write_text(TOKEN)
    header = {"Inference-Header-Content-Length": "0"}
    statuses = [plain.post("/v2/models/demo/infer", body, header) for body in (photo.read_bytes(), b"no image")]
    assert statuses == [200, 400], statuses
    # Mistakes of operators: tokens that cannot be used, a version that is damaged. A good one, too.
    (folder / "tokens").write_text("short\n")
    wait_for("a look at the tokens", lambda: secured.ctl("classify", "--model", "demo", photo) and ternd.metric(
        secured.metrics(), "tern_fallbacks_total", reason="stale_tokens"))
    for version in ("8", "9"):
        part = plain.repository / "demo" / (version + ".part")
        shutil.copytree(plain.repository / "demo/3", part)
        if version == "9":
            (part / "model.tern").write_bytes(bytes(1000))
        part.rename(part.with_suffix(""))
    wait_for("the watch", lambda: ternd.metric(plain.metrics(), "tern_watch_events_total", event="loaded") and ternd.metric(
        plain.metrics(), "tern_watch_events_total", event="load_failed"))
    plain.ctl("quantize", "--model", "demo", "--from", 1, "--weights", "int8", "--calibration", CALIBRATION,
              "--calibration-count", 10, "--dry-run", "--quiet")
    plain.ctl("evaluate", "--model", "demo", "--data", PHOTOS, "--limit", 20, "--quiet")
    for process in steady:
        process.wait()
    # Comparisons are made while no image waits.
    wait_for("shadow comparisons", lambda: plain.ctl("classify", "--model", "demo", photo) and ternd.metric(
        plain.metrics(), "tern_live_comparisons", version="2"))


def dashboard():
    return json.loads((SOURCE / "deploy/grafana/tern.json").read_text())


def rules():
    text = (SOURCE / "deploy/prometheus/rules.yml").read_text()
    return [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]


def selectors(expression):
    """The series that it reads, whatever it does with them."""
    return set(re.findall(r"(?:\b(?:tern|process)_\w+|\btern:[\w:]+|\bup\b)(?:{[^}]*})?", expression))


class DashboardTest(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        folder = tempfile.mkdtemp(prefix="tern-dashboard-")
        cls.addClassCleanup(shutil.rmtree, folder, ignore_errors=True)
        folder = pathlib.Path(folder)
        cls.servers = serve(folder)
        for server in cls.servers:
            cls.addClassCleanup(server.stop)
        cls.prometheus = Prometheus(folder, [f"127.0.0.1:{server.metrics_port}" for server in cls.servers])
        cls.addClassCleanup(cls.prometheus.stop)
        # A counter's first value must have been seen, or its first increase is none.
        wait_for("both servers scraped", lambda: len(cls.prometheus.query("tern_build_info")) == 2)
        load(*cls.servers, folder, ARGS.seconds)
        scraped = time.time()
        wait_for("a scrape and an evaluation after the load", lambda: all(
            value > scraped + 1 for _, value in cls.prometheus.query("timestamp(tern:memory_used:ratio)")))
        cls.exposed = {}  # name -> its samples on all servers
        for server in cls.servers:
            for line in server.metrics().splitlines():
                if not line.startswith("#"):
                    cls.exposed.setdefault(re.match(r"\w+", line)[0], []).append(line)
        cls.values = {}

    def substitute(self, query):
        """As Grafana does, with everything chosen. Rates are over all that happened, however slow this machine is."""
        query = query.replace("$__rate_interval", "1h")
        for name, value in self.values.items():
            query = query.replace(f"${name}", value)
        return query

    def choose_everything(self):
        for variable in dashboard()["templating"]["list"]:
            if variable["type"] != "query":
                continue
            match = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["definition"])
            with self.subTest(variable=variable["name"]):
                self.assertIsNotNone(match, variable["definition"])
                found = self.prometheus.get(f"label/{match[2]}/values", **{"match[]": self.substitute(match[1])})
                self.assertTrue(found, f"{variable['definition']} has no values")
                chosen = "|".join(map(re.escape, found)).replace("\\", "\\\\")  # inside a string of PromQL
                self.values[variable["name"]] = variable.get("allValue") or f"({chosen})"

    def setUp(self):
        self.choose_everything()

    def test_every_query_of_every_panel_has_data(self):
        lines = []
        for panel in dashboard()["panels"]:
            if panel["type"] == "row":
                lines.append(f"\n{panel['title']}")
            for target in panel.get("targets", []):
                with self.subTest(panel=panel["title"], query=target["expr"]):
                    found = self.prometheus.query(self.substitute(target["expr"]))
                    self.assertTrue(found, "no data")
                    labels, value = found[0]
                    named = ",".join(f"{k}={v}" for k, v in sorted(labels.items())
                                     if k not in ("__name__", "namespace", "job", "instance"))
                    query = re.sub(r"{[^{}]*}", "", target["expr"]).replace("$__rate_interval", "_")
                    lines.append(f"{panel['title'][:38]:38} | {query[:95]:95} | {len(found):3} | {named[:40]} {value:.4g}")
        text = "\n".join(["panel | query without its matchers | series | one sample", *lines])
        print(text, flush=True)
        if ARGS.table:
            pathlib.Path(ARGS.table).write_text(text + "\n")

    def test_every_rule_is_evaluated(self):
        groups = self.prometheus.get("rules")["groups"]
        evaluated = [rule for group in groups for rule in group["rules"]]
        self.assertEqual(len(evaluated), len(rules()))
        for rule in evaluated:
            with self.subTest(rule=rule["name"]):
                self.assertEqual(rule["health"], "ok", rule.get("lastError"))
                if rule["type"] == "recording":
                    self.assertTrue(self.prometheus.query(rule["name"]), "nothing was recorded")

    def test_every_rule_reads_series_that_exist(self):
        for rule in rules():
            for selector in selectors(rule["expr"]):
                with self.subTest(rule=rule.get("record") or rule["alert"], selector=selector):
                    self.assertTrue(self.prometheus.query(f"count({selector})"))

    def test_what_is_documented_is_what_is_served(self):
        documented = {}
        for line in (SOURCE / "docs/metrics.md").read_text().splitlines():
            row = re.match(r"\| `(\w+)` \| (\w+) \| ([a-z0-9_, ]*) ?\|.*\| `(.+)` \|$", line)
            if row is None:
                continue
            suffixes = ("_bucket", "_sum", "_count") if row[2] == "histogram" else ("",)
            documented.update({row[1] + suffix: set(filter(None, row[3].strip().split(", "))) for suffix in suffixes})
            with self.subTest(example=row[4]):
                self.prometheus.query(row[4])  # can be parsed and computed; may well find nothing
        self.assertEqual(set(documented), set(self.exposed))
        for name, labels in documented.items():
            with self.subTest(metric=name):
                for sample in self.exposed[name]:
                    found = set(re.findall(r'[{,](\w+)="', sample)) - {"le"}
                    self.assertEqual(found, labels, sample)

    def test_promtool_finds_nothing_wrong_with_the_metrics(self):
        for server in self.servers:
            result = subprocess.run(["promtool", "check", "metrics"], input=server.metrics(), capture_output=True, text=True)
            self.assertEqual((result.returncode, result.stdout + result.stderr), (0, ""))

    def test_every_name_is_one_that_the_servers_expose(self):
        queries = [t["expr"] for p in dashboard()["panels"] for t in p.get("targets", [])]
        queries += [v["definition"] for v in dashboard()["templating"]["list"] if v["type"] == "query"]
        queries += [rule["expr"] for rule in rules()]
        names = {name for query in queries for name in re.findall(r"(?<!:)\b(?:tern|process)_\w+", query)}
        self.assertGreater(len(names), 60)
        self.assertEqual(names - set(self.exposed), set())

    def test_mistakes_raise_their_alerts(self):
        firing = {alert["labels"]["alertname"] for alert in self.prometheus.get("alerts")["alerts"]
                  if alert["state"] == "firing"}
        self.assertLessEqual({"TernReloadFailed", "TernWatchTrouble"}, firing)
        self.assertNotIn("TernSelfTestFailed", firing)

    def test_z_the_dashboard_can_be_drawn(self):
        if not ARGS.image:
            self.skipTest("no --image was asked for")
        subprocess.run(["/usr/bin/python3", SOURCE / "scripts/render_dashboard.py", "--rows", "Users,Quality", "--prometheus",
                        f"http://{self.prometheus.address}", "--minutes", str(1 + ARGS.seconds / 60), "--output", ARGS.image],
                       check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ternd", required=True)
    parser.add_argument("--ternctl", required=True)
    parser.add_argument("--table")
    parser.add_argument("--image")
    parser.add_argument("--seconds", type=int, default=15, help="of steady load")
    ARGS, rest = parser.parse_known_args()
    for tool in ("prometheus", "openssl"):
        if not shutil.which(tool):
            skip(f"{tool} is not installed (scripts/install-deps.sh full)")
    if yaml is None:
        skip("python3-yaml is not installed (scripts/install-deps.sh full)")
    unittest.main(argv=[sys.argv[0], *rest], verbosity=2)
