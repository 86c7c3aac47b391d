"""A kube-apiserver over etcd on loopback, without a cluster: it decodes, validates and admits objects as any other, and nothing
ever runs. Programs: kube-apiserver (make_tools.sh --apiserver) and etcd (Debian: etcd-server)."""

import http.client
import json
import pathlib
import secrets
import shutil
import socket
import ssl
import subprocess
import tempfile
import time

from manifests import documents


def free_ports(count):
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in held]
    for s in held:
        s.close()
    return ports


class Refused(Exception):
    pass


class KubeApi:
    """Ends with close(). Definitions of custom resources are those of the folder `apis`."""

    def __init__(self, kube_apiserver, etcd, apis):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="tern-kube-"))
        self.processes = []
        self.token = secrets.token_hex(16)
        client, peer, self.port = free_ports(3)
        (self.folder / "tokens").write_text(f"{self.token},admin,1,system:masters\n")
        key = self.folder / "service-accounts.pem"
        subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
        try:
            self.start("etcd", etcd, f"--data-dir={self.folder}/etcd", f"--listen-client-urls=http://127.0.0.1:{client}",
                       f"--advertise-client-urls=http://127.0.0.1:{client}",
                       f"--listen-peer-urls=http://127.0.0.1:{peer}",
                       f"--initial-advertise-peer-urls=http://127.0.0.1:{peer}",
                       f"--initial-cluster=default=http://127.0.0.1:{peer}", "--unsafe-no-fsync")
            self.start("kube-apiserver", kube_apiserver, f"--etcd-servers=http://127.0.0.1:{client}",
                       f"--secure-port={self.port}", "--bind-address=127.0.0.1", f"--cert-dir={self.folder}/certificates",
                       f"--token-auth-file={self.folder}/tokens", "--authorization-mode=AlwaysAllow",
                       "--service-account-issuer=https://kubernetes.default.svc", f"--service-account-key-file={key}",
                       f"--service-account-signing-key-file={key}", "--service-cluster-ip-range=10.0.0.0/24",
                       # Its tokens come from a controller that does not run here.
                       "--disable-admission-plugins=ServiceAccount")
            self.wait(lambda: self.call("GET", "/readyz")[0] == 200, 180)
            for path in sorted(apis.glob("*.yaml")):
                for definition in documents(path.read_text()):
                    self.create(definition)
            self.wait(lambda: all(self.established(item) for item in self.call(
                "GET", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions")[1]["items"]), 60)
        except BaseException:
            self.close()
            raise

    def start(self, name, program, *flags):
        with open(self.folder / f"{name}.log", "w") as log:
            self.processes.append((name, subprocess.Popen([program, *flags], stdout=log, stderr=log)))

    def wait(self, what, seconds):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for name, process in self.processes:
                if process.poll() is not None:
                    break
            else:
                try:
                    if what():
                        return
                except OSError:
                    pass
                time.sleep(0.2)
                continue
            break
        tails = [f"{name}:\n" + (self.folder / f"{name}.log").read_text()[-3000:] for name, _ in self.processes]
        raise RuntimeError("the API did not get ready\n" + "\n".join(tails))

    @staticmethod
    def established(definition):
        return any(c["type"] == "Established" and c["status"] == "True"
                   for c in definition.get("status", {}).get("conditions") or [])

    def call(self, method, path, body=None):
        """(status, JSON or text, texts of warnings)."""
        # Its certificate is its own, made at the start.
        context = ssl._create_unverified_context()
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, context=context, timeout=60)
        try:
            connection.request(method, path, None if body is None else json.dumps(body),
                               {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"})
            reply = connection.getresponse()
            text = reply.read().decode()
            return reply.status, json.loads(text) if text.startswith("{") else text, reply.headers.get_all("Warning") or []
        finally:
            connection.close()

    def path(self, o, namespace):
        group = "/apis/" + o["apiVersion"] if "/" in o["apiVersion"] else "/api/" + o["apiVersion"]
        resources = self.call("GET", group)[1]
        for resource in resources.get("resources", []):
            if resource["kind"] == o["kind"] and "/" not in resource["name"]:
                return f"{group}/namespaces/{namespace}/{resource['name']}" if resource["namespaced"] else \
                    f"{group}/{resource['name']}"
        raise Refused(f"the API has no {o['apiVersion']} {o['kind']}")

    def create(self, o, namespace="default", dry_run=False):
        """What the API makes of `o`, in which a field that it does not know is an error. Refused with its reason."""
        query = "?fieldValidation=Strict" + ("&dryRun=All" if dry_run else "")
        status, reply, warnings = self.call("POST", self.path(o, namespace) + query, o)
        if status not in (200, 201):
            raise Refused(reply["message"] if isinstance(reply, dict) else reply)
        if warnings:
            raise Refused("; ".join(warnings))
        return reply

    def kubeconfig(self):
        path = self.folder / "kubeconfig"
        path.write_text(json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": f"https://127.0.0.1:{self.port}",
                                                      "insecure-skip-tls-verify": True}}],
            "users": [{"name": "test", "user": {"token": self.token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}]}))
        return path

    def close(self):
        for _, process in reversed(self.processes):
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
