#!/usr/bin/env python3
"""The server's image: what is in it, and that it serves with a read-only root and without rights.

    image_test.py --programs FOLDER    builds it with docker/build_image.sh from the ternd and ternctl in FOLDER
    image_test.py --image TAG          one that is there already
    --starts N                         measures N starts instead, prints them and ends

Needs root, buildah, podman and runc (Debian); podman runs the containers, the kernel and the loader inside them say what is so.
Where containers cannot run it says why and ends with 77. Times are printed, never judged.
"""

import argparse
import datetime
import json
import os
import pathlib
import re
import resource
import shutil
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
import unittest

SOURCE = pathlib.Path(__file__).resolve().parents[2]
PODMAN = ["podman", "--cgroup-manager", "cgroupfs", "--runtime", "runc"]
MAX_BYTES = 100_000_000
USER = 65532
READY_SECONDS = 60
IMAGE = None  # tag


def skip(reason):
    print(f"image_test ... skipped 'the image: {reason}'")
    sys.exit(77)


def run(*command, check=True, **options):
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300, **options)
    if check and result.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}: exit status {result.returncode}\n{result.stdout}{result.stderr}")
    return result


def podman(*arguments, **options):
    return run(*PODMAN, *arguments, **options)


def limits():
    """Podman would ask for more than a user without CAP_SYS_RESOURCE may have."""
    words = []
    for name, kind in (("nofile", resource.RLIMIT_NOFILE), ("nproc", resource.RLIMIT_NPROC)):
        hard = resource.getrlimit(kind)[1]
        limit = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
        words += ["--ulimit", f"{name}={limit}:{limit}"]
    return words


def require_containers():
    """Ends with 77 unless this machine can build an image and run a container."""
    if os.geteuid() != 0:
        skip("building and running it needs root")
    for tool in ("buildah", "podman", "runc"):
        if not shutil.which(tool):
            skip(f"{tool} is not installed (scripts/install-deps.sh full)")
    # A root file system with /bin/true and what that loads: fails for the machine's sake only.
    with tempfile.TemporaryDirectory(prefix="tern-image-probe-") as root:
        program = os.path.realpath("/bin/true")
        listed = run("ldd", program).stdout
        for path in {program, *re.findall(r"(/\S+) \(0x", listed)}:
            target = pathlib.Path(root + path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        probe = podman("run", "--rm", "--network=none", *limits(), "--rootfs", root, program, check=False)
        if probe.returncode != 0:
            skip(f"podman cannot run a container here: {(probe.stderr.strip().splitlines() or ['no reason given'])[-1]}")


class Container:
    """One container of the image, as it should run in production: root read-only, no capabilities, models on a volume."""

    def __init__(self, *flags, network="none"):
        self.volume = podman("volume", "create").stdout.strip()
        self.name = podman(
            "create", f"--network={network}", "--read-only", "--read-only-tmpfs=false", "--cap-drop=all",
            "--security-opt=no-new-privileges", *limits(), "-v", f"{self.volume}:/models",
            "-v", f"{SOURCE}/models/demo/photos:/photos:ro", IMAGE, *flags).stdout.strip()

    def start(self):
        podman("start", self.name)

    def models(self):
        """The folder of this machine that the container sees as /models."""
        return pathlib.Path(podman("volume", "inspect", self.volume, "--format", "{{.Mountpoint}}").stdout.strip())

    def inspect(self):
        return json.loads(podman("inspect", self.name).stdout)[0]

    def pid(self):
        return self.inspect()["State"]["Pid"]

    def ternctl(self, *arguments, **options):
        return podman("exec", "-i", self.name, "ternctl", *arguments, **options)

    def log(self):
        result = podman("logs", self.name)
        return result.stdout + result.stderr

    def wait_until_serving(self):
        self.ternctl("health", "--wait", READY_SECONDS)

    def stop(self):
        """SIGTERM; the exit status, 137 if that was not enough."""
        podman("stop", "-t", "45", self.name)
        return self.inspect()["State"]["ExitCode"]

    def remove(self):
        podman("rm", "-f", self.name, check=False)
        podman("volume", "rm", "-f", self.volume, check=False)


def size_table(root):
    """{part: bytes}: the files that make the image large, and the rest by folder."""
    parts = {}
    for path in root.rglob("*"):
        if path.is_symlink() or not path.is_file():
            continue
        name = path.relative_to(root).as_posix()
        size = path.stat().st_size
        if size < 400_000:
            name = "other libraries" if ".so" in path.name else "licences" if name.startswith("usr/share/") else "other files"
        parts[name] = parts.get(name, 0) + size
    return parts


class Contents(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        cls.root = pathlib.Path(podman("image", "mount", IMAGE).stdout.strip())
        cls.addClassCleanup(podman, "image", "unmount", IMAGE)
        cls.files = [p for p in cls.root.rglob("*") if p.is_file() and not p.is_symlink()]
        cls.image = json.loads(podman("image", "inspect", IMAGE).stdout)[0]
        cls.loader, = [p for p in cls.files if re.fullmatch(r"ld-linux.*\.so\.\d+", p.name)]

    def inside(self, path):
        return "/" + path.relative_to(self.root).as_posix()

    def test_all_files_together_take_at_most_100_megabytes(self):
        parts = size_table(self.root)
        total = sum(parts.values())
        print()
        for name, size in sorted(parts.items(), key=lambda part: -part[1]):
            print(f"  {size / 1e6:6.1f} MB  {name}")
        print(f"  {total / 1e6:6.1f} MB  in total")
        self.assertLessEqual(total, MAX_BYTES)

    def test_runs_as_a_user_without_rights_who_owns_only_the_models(self):
        self.assertEqual(self.image["Config"]["User"], f"{USER}:{USER}")
        self.assertRegex((self.root / "etc/passwd").read_text(), rf"(?m)^\w+:x:{USER}:{USER}:")
        self.assertRegex((self.root / "etc/group").read_text(), rf"(?m)^\w+:x:{USER}:")
        owned = [self.inside(p) for p in self.root.rglob("*") if p.lstat().st_uid != 0 or p.lstat().st_gid != 0]
        self.assertEqual(owned, ["/models"])

    def test_has_nothing_to_run_but_the_two_programs(self):
        executable = {self.inside(p) for p in self.files if p.stat().st_mode & 0o111}
        # The C library prints its version when it is run.
        self.assertEqual({p for p in executable if not p.endswith("/libc.so.6")},
                         {"/usr/local/bin/ternd", "/usr/local/bin/ternctl", self.inside(self.loader)})

    def test_no_file_gives_rights_or_is_writable_by_others(self):
        for path in self.root.rglob("*"):
            if not path.is_symlink():
                self.assertEqual(path.stat().st_mode & 0o6002, 0, self.inside(path))

    def test_holds_the_libraries_that_the_programs_load_and_no_others(self):
        loaded = {self.inside(self.loader)}
        for program in ("ternd", "ternctl"):
            # The loader of the image itself, in the image: nothing of this machine can stand in.
            listed = podman("run", "--rm", "--network=none", *limits(), "--entrypoint", self.inside(self.loader), IMAGE,
                            "--list", f"/usr/local/bin/{program}").stdout
            self.assertNotIn("not found", listed)
            loaded |= set(re.findall(r"=> (/\S+) \(0x", listed))
        self.assertEqual({self.inside(p) for p in self.files if ".so" in p.name}, loaded)
        # OpenCV would bring a window system along.
        self.assertFalse({p for p in loaded if re.search(r"/lib(X|xcb|GL)", p)})

    def test_every_part_names_its_package_version_and_licence(self):
        packages = list((self.root / "var/lib/dpkg/status.d").iterdir())
        self.assertGreater(len(packages), 10)
        for package in packages:
            text = package.read_text()
            self.assertRegex(text, rf"(?m)^Package: {re.escape(package.name)}$")
            self.assertRegex(text, r"(?m)^Version: \S+$")
            if not package.name.startswith("libboost"):
                self.assertTrue((self.root / "usr/share/doc" / package.name / "copyright").is_file(), package.name)
        self.assertTrue((self.root / "usr/share/doc/tern/copyright").is_file())
        # What the loader found belongs to one of them.
        names = {p.name for p in packages}
        self.assertLessEqual({"libc6", "libdnnl2", "libssl3", "libgrpc-dev", "libprotobuf-dev", "ca-certificates"}, names)

    def test_trusts_the_usual_certificate_authorities(self):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.root / "etc/ssl/certs/ca-certificates.crt")
        self.assertGreater(context.cert_store_stats()["x509_ca"], 100)

    def test_the_health_check_needs_no_shell(self):
        check = self.image["Healthcheck"]["Test"]
        self.assertEqual(check[:3], ["CMD", "/usr/local/bin/ternctl", "health"])
        without_server = podman("run", "--rm", "--network=none", *limits(), "--entrypoint", check[1], IMAGE, *check[2:],
                                check=False)
        self.assertEqual(without_server.returncode, 1, without_server.stderr)


class Running(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        cls.container = Container("--demo")
        cls.addClassCleanup(cls.container.remove)
        cls.container.start()
        try:
            cls.container.wait_until_serving()
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n{cls.container.log()}") from error

    def test_1_health_is_serving(self):
        self.assertEqual(self.container.ternctl("health").stdout.strip(), "SERVING")
        self.assertEqual(podman("healthcheck", "run", self.container.name, check=False).returncode, 0)

    def test_1_has_no_capability_and_cannot_gain_one(self):
        status = dict(line.split(":\t", 1) for line in
                      pathlib.Path(f"/proc/{self.container.pid()}/status").read_text().splitlines() if ":\t" in line)
        self.assertEqual(set(status["Uid"].split()), {str(USER)})
        for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            self.assertEqual(int(status[name], 16), 0, name)
        self.assertEqual(status["NoNewPrivs"], "1")

    def test_1_root_is_read_only(self):
        mounts = {fields[4]: fields[5].split(",") for fields in
                  map(str.split, pathlib.Path(f"/proc/{self.container.pid()}/mountinfo").read_text().splitlines())}
        self.assertIn("ro", mounts["/"])
        self.assertIn("rw", mounts["/models"])
        self.assertNotIn("/tmp", mounts)

    def test_1_classifies_the_demo_photographs_as_its_card_says(self):
        card = (SOURCE / "models/demo/README.md").read_text()
        count, percent = re.search(r"\| (\d+) photographs in `photos/` \| ([\d.]+) % \|", card).groups()
        images = json.loads(self.container.ternctl("classify", "--model", "demo", "--json", "/photos").stdout)["images"]
        self.assertEqual(len(images), int(count))
        right = sum(pathlib.PurePath(image["file"]).parent.name == image["classes"][0]["label"] for image in images)
        self.assertAlmostEqual(100 * right / len(images), float(percent), delta=1)  # one image

    def test_2_ends_with_0_after_sigterm(self):
        status = self.container.stop()
        self.assertEqual(status, 0, self.container.log())
        self.assertIn("stopped", self.container.log())


def measure_start(container):
    """Seconds until the standard health check says SERVING: since `podman start` was called, since the container ran."""
    import grpc  # only here: the test itself does without
    ports = container.models() / "ports.json"
    ports.unlink(missing_ok=True)
    called = time.time()
    starting = subprocess.Popen([*PODMAN, "start", container.name], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not ports.exists():
        if time.time() - called > READY_SECONDS:
            raise RuntimeError(f"it did not get ready:\n{container.log()}")
        time.sleep(0.001)
    with grpc.insecure_channel(f"127.0.0.1:{json.loads(ports.read_text())['port']}") as channel:
        answer = channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=READY_SECONDS, wait_for_ready=True)
    serving = time.time()
    if answer != b"\x08\x01":
        raise RuntimeError(f"health: {answer}")
    starting.wait()
    started = container.inspect()["State"]["StartedAt"]  # 2030-01-02 03:04:05.678901234 +0000 UTC, or with a T and a Z
    day, clock = re.match(r"(\S{10})[ T]([\d:]{8}\.\d{1,6})", started).groups()
    started = datetime.datetime.fromisoformat(f"{day}T{clock:0<15}+00:00").timestamp()
    container.stop()
    return serving - called, serving - started


def measure_starts(count):
    first, again = [], []
    for _ in range(count):
        # The host's network: this program asks for the health.
        container = Container("--demo", "--host=127.0.0.1", "--metrics_host=127.0.0.1", "--port=0", "--admin_port=0",
                              "--metrics_port=0", "--ports_file=/models/ports.json", network="host")
        try:
            first.append(measure_start(container))
            again.append(measure_start(container))
        finally:
            container.remove()
    for what, times in (("the first start, which publishes the demo model", first), ("a start with the model there", again)):
        for since, column in zip(("`podman start` was called", "the container runs"), zip(*times)):
            milliseconds = [round(1e3 * t) for t in column]
            print(f"{what}: ms from when {since} to SERVING: min {min(milliseconds)}, "
                  f"median {statistics.median(milliseconds)}, all {milliseconds}")


def main():
    global IMAGE
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    image = parser.add_mutually_exclusive_group(required=True)
    image.add_argument("--programs", type=pathlib.Path)
    image.add_argument("--image")
    parser.add_argument("--starts", type=int)
    arguments, rest = parser.parse_known_args()
    require_containers()
    IMAGE = arguments.image
    if arguments.programs:
        IMAGE = f"localhost/tern-image-test-{os.getpid()}"
        run(SOURCE / "docker/build_image.sh", "--programs", arguments.programs.resolve(), IMAGE)
    try:
        if arguments.starts:
            measure_starts(arguments.starts)
        else:
            unittest.main(argv=[sys.argv[0], *rest], verbosity=2)
    finally:
        if arguments.programs:
            podman("rmi", "-f", IMAGE, check=False)


if __name__ == "__main__":
    main()
