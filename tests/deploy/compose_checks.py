#!/usr/bin/env python3
"""docker/compose.yaml: that its services find each other and the files of deploy/, and give nobody more than they need.

TERN_DEPLOY_TOOLS is the folder that make_tools.sh made: with compose's reader; or the docker here has compose. Without either
that one check is skipped.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
import urllib.parse

try:
    import yaml
except ImportError:
    print("compose_checks ... skipped 'python3-yaml is not installed'")
    sys.exit(77)

SOURCE = pathlib.Path(__file__).resolve().parents[2]


def load(name):
    return yaml.safe_load((SOURCE / name).read_text())


def container_ports(service):
    return {int(port.rsplit(":", 1)[1]) for port in service["ports"]}


def mounts(service):
    """{path in the container: path in the repository, or the name of a volume}"""
    out = {}
    for volume in service["volumes"]:
        host, target = volume.split(":")[:2]
        out[target] = (SOURCE / "docker" / host).resolve() if host.startswith(".") else host
    return out


class Compose(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        cls.compose = load("docker/compose.yaml")
        cls.services = cls.compose["services"]

    def in_repository(self, service, path):
        """The file of the repository that `service` sees as `path`; a folder that is mounted deeper hides others."""
        found = mounts(self.services[service])
        target = max((t for t in found if path == t or path.startswith(t + "/")), key=len)
        self.assertIsInstance(found[target], pathlib.Path, f"{service}: {path} lies on a volume")
        return found[target] / path[len(target):].lstrip("/")

    def test_mounts_what_exists(self):
        for name, service in self.services.items():
            for target, host in mounts(service).items():
                with self.subTest(service=name, target=target):
                    if isinstance(host, pathlib.Path):
                        self.assertTrue(host.exists())
                    else:
                        self.assertIn(host, self.compose["volumes"])

    def test_no_service_has_rights_or_a_writable_root(self):
        for name, service in self.services.items():
            with self.subTest(service=name):
                self.assertIs(service["read_only"], True)
                self.assertEqual(service["cap_drop"], ["ALL"])
                self.assertEqual(service["security_opt"], ["no-new-privileges:true"])
                self.assertFalse({"privileged", "cap_add", "network_mode", "pid", "user"} & set(service))
                for volume in service["volumes"]:
                    self.assertTrue(not volume.startswith(".") or volume.endswith(":ro"), volume)

    def test_only_the_data_port_is_published_beyond_loopback(self):
        beyond = [port for service in self.services.values() for port in service["ports"]
                  if not port.startswith("127.0.0.1:")]
        self.assertEqual(beyond, ["8500:8500"])

    def test_the_server_publishes_the_ports_of_its_image(self):
        exposed = re.search(r"^EXPOSE (.*)$", (SOURCE / "docker/Dockerfile").read_text(), re.M)[1]
        self.assertEqual(container_ports(self.services["tern"]), set(map(int, exposed.split())))
        self.assertEqual(self.services["tern"]["volumes"], ["models:/models"])

    def test_it_may_drain_before_it_is_killed(self):
        drain = int(re.search(r"--drain=(\d+)s", " ".join(self.services["tern"]["command"]))[1])
        grace = int(re.search(r'ABSL_FLAG\([^,]+, grace, absl::Seconds\((\d+)\)',
                              (SOURCE / "server/app/main.cc").read_text())[1])
        self.assertGreaterEqual(int(self.services["tern"]["stop_grace_period"].rstrip("s")), drain + grace + 10)

    def test_prometheus_scrapes_the_server_and_finds_its_rules(self):
        command = " ".join(self.services["prometheus"]["command"])
        config = self.in_repository("prometheus", re.search(r"--config\.file=(\S+)", command)[1])
        self.assertEqual(config, SOURCE / "deploy/prometheus/prometheus.yml")
        self.assertIn(re.search(r"--storage\.tsdb\.path=(\S+)", command)[1], mounts(self.services["prometheus"]))
        config = load("deploy/prometheus/prometheus.yml")
        for name in config["rule_files"]:
            self.assertTrue((SOURCE / "deploy/prometheus" / name).is_file(), name)
        targets = [target for job in config["scrape_configs"] for group in job["static_configs"] for target in group["targets"]]
        self.assertEqual(targets, ["tern:8502"])
        self.assertIn(8502, container_ports(self.services["tern"]))

    def test_grafana_finds_prometheus_and_the_dashboard(self):
        source, = load("docker/grafana/datasources/prometheus.yaml")["datasources"]
        url = urllib.parse.urlsplit(source["url"])
        self.assertIn(url.port, container_ports(self.services[url.hostname]))
        self.assertTrue(source["isDefault"])
        provider, = load("docker/grafana/dashboards/tern.yaml")["providers"]
        self.assertEqual(self.in_repository("grafana", provider["options"]["path"]), SOURCE / "deploy/grafana")
        home = self.services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
        self.assertTrue(self.in_repository("grafana", home).is_file())
        for folder in ("datasources", "dashboards"):
            self.assertTrue(self.in_repository("grafana", f"/etc/grafana/provisioning/{folder}").is_dir())

    def test_compose_itself_reads_the_file_and_refuses_a_wrong_one(self):
        program = shutil.which("compose", path=os.path.join(os.environ.get("TERN_DEPLOY_TOOLS", "/nonexistent"), "bin"))
        if not program:
            try:
                subprocess.run(["docker", "compose", "version"], capture_output=True, check=True)
            except (OSError, subprocess.CalledProcessError):
                self.skipTest("docker compose is not installed and TERN_DEPLOY_TOOLS (make_tools.sh) is not set")

        def read(path):
            command = [program, path] if program else ["docker", "compose", "-f", path, "config"]
            return subprocess.run(command, cwd=SOURCE / "docker", capture_output=True, text=True, timeout=60)

        result = read("compose.yaml")
        self.assertEqual(result.returncode, 0, result.stderr)
        services = yaml.safe_load(result.stdout)["services"]
        self.assertEqual(set(services), set(self.services))
        for name, service in services.items():
            self.assertTrue(service["read_only"], name)
            for volume in service["volumes"]:
                if volume["type"] == "bind":
                    self.assertTrue(pathlib.Path(volume["source"]).is_relative_to(SOURCE / "docker/grafana")
                                    or pathlib.Path(volume["source"]).is_relative_to(SOURCE / "deploy"), volume)
                    self.assertTrue(pathlib.Path(volume["source"]).exists(), volume)
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as wrong:
            wrong.write((SOURCE / "docker/compose.yaml").read_text().replace("read_only", "readonly"))
            wrong.flush()
            result = read(wrong.name)
            self.assertNotEqual(result.returncode, 0)
            self.assertIn("readonly", result.stderr)


if __name__ == "__main__":
    unittest.main(verbosity=2)
