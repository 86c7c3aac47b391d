#!/usr/bin/env python3
"""Several servers side by side: what they do together, and what their restart or loss costs their callers.

    bench/scale_out.py --bin build/release/bin --data models/demo/photos --replicas 1,2 --json scale.json

For each number of replicas and each front (the balancing client itself, or HAProxy before it) a closed loop measures images/s and
the processor time per image of servers, front and client. Then, with the largest number and under load,

- restart: every replica gets SIGTERM, must exit with status 0, is started again on the same port, and must have answered a call before
  the next one gets its SIGTERM;
- kill: one replica gets SIGKILL and is not started again;

each with a client that retries and with one that does not. The tables go to stdout as Markdown, everything to --json.

Every replica listens on a loopback address of its own (127.0.0.2, ...; Linux answers on all of them), so that no outgoing connection can take
its port while it is down. Replica i has the CPUs i*k .. i*k+k-1 (k = --cpus-per-replica) of those that this program may use; front and
client have what is left. With too few CPUs for that they share, which the output says: the client's work then counts against the servers.

HAProxy is Debian's `haproxy`; without it its rows are left out, and the output says so.
"""

import argparse
import json
import os
import pathlib
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tests" / "testing"))
import ternd  # noqa: E402

FRONTS = ("client", "haproxy")
BACK_WITHIN_S = 15  # a restarted replica gets calls again; gRPC looks for lost servers after 1 to 5 s


def pinned(cpus):
    return ["taskset", "-c", ",".join(map(str, cpus))]


class Cpus:
    """Which CPUs the replicas, and front and client, run on."""

    def __init__(self, replicas, each):
        available = sorted(os.sched_getaffinity(0))
        self.shared = replicas * each >= len(available)
        wanted = replicas * each
        spread = [available[i % len(available)] for i in range(wanted)]
        self.replicas = [sorted(set(spread[i * each:(i + 1) * each])) for i in range(replicas)]
        self.rest = available if self.shared else available[wanted:]

    def describe(self):
        own = "; ".join(",".join(map(str, cpus)) for cpus in self.replicas)
        return f"{own}; client {','.join(map(str, self.rest))}" + (" (shared)" if self.shared else "")


class Replica:
    """A ternd with a repository, an address and, from its first start on, a port that stay the same."""

    def __init__(self, args, number, cpus):
        self.args, self.cpus = args, cpus
        self.address = f"127.0.0.{number + 2}"
        self.port = 0
        self.folder = tempfile.mkdtemp(prefix="tern-replica-")
        self.repository = os.path.join(self.folder, "repository")
        if args.repository:
            shutil.copytree(args.repository, self.repository, ignore=shutil.ignore_patterns(".*"))
        self.server = None
        self.start()

    def start(self):
        """Returns when it is ready."""
        self.server = ternd.Ternd(
            str(self.args.bin / "ternd"), self.repository, *([] if self.args.repository else ["--demo"]), f"--host={self.address}",
            f"--port={self.port}", f"--drain={self.args.drain}s", *self.args.ternd_flags, wrapper=pinned(self.cpus))
        self.port = self.server.port

    def endpoint(self):
        return f"{self.address}:{self.port}"

    def answered(self):
        return ternd.metric(self.server.metrics(), "tern_requests_total", method="Classify", code="OK") or 0

    def close(self):
        if self.server:
            self.server.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


def health_check_bytes():
    """grpc.health.v1.Health/Check as a client's first bytes on a connection (RFC 9113): preface, SETTINGS, HEADERS, DATA."""
    def frame(kind, flags, stream, payload):
        return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload

    headers = [(":method", "POST"), (":scheme", "http"), (":path", "/grpc.health.v1.Health/Check"), (":authority", "tern"),
               ("content-type", "application/grpc"), ("te", "trailers")]
    # Literal fields without indexing and without Huffman (RFC 7541 section 6.2.2); all lengths are below 127.
    block = b"".join(b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode() for name, value in headers)
    empty_message = bytes(5)
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"") + frame(1, 4, 1, block) + frame(0, 1, 1, empty_message)


def haproxy_config(replicas, descriptor):
    """HTTP/2 to every replica; gRPC health checks; what reached no replica, or got no answer from one, is sent to another."""
    serving = "00000000020801"  # a message of two bytes: HealthCheckResponse{status: SERVING}
    servers = "\n".join(f"  server r{i} {replica.endpoint()} proto h2 check check-proto none inter 200ms fall 1 rise 1"
                        for i, replica in enumerate(replicas))
    # A request can only be sent again while all of it is in the buffer, 16 kB unless tune.bufsize says more.
    return f"""global
  maxconn 4096
  tune.bufsize 131072
defaults
  mode http
  timeout connect 1s
  timeout client 60s
  timeout server 60s
  timeout check 400ms
frontend calls
  bind fd@{descriptor} proto h2
  default_backend tern
backend tern
  balance roundrobin
  http-reuse always
  retries 4
  option redispatch 1
  retry-on conn-failure empty-response junk-response
  option tcp-check
  tcp-check connect
  tcp-check send-binary {health_check_bytes().hex()}
  tcp-check expect binary {serving}
{servers}
"""


class Haproxy:
    """HAProxy on a free loopback port before `replicas`; a context manager."""

    def __init__(self, replicas, cpus):
        self.folder = tempfile.mkdtemp(prefix="tern-haproxy-")
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)  # handed over, so that nobody can take the port
        self.endpoint = f"127.0.0.1:{listener.getsockname()[1]}"
        config = os.path.join(self.folder, "haproxy.cfg")
        with open(config, "w") as f:
            f.write(haproxy_config(replicas, listener.fileno()))
        self.log = open(os.path.join(self.folder, "log"), "w+")
        self.process = subprocess.Popen([*pinned(cpus), haproxy_program(), "-db", "-f", config], pass_fds=[listener.fileno()],
                                        stdout=self.log, stderr=self.log)
        listener.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(30)
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def haproxy_program():
    return shutil.which("haproxy", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


class Load:
    """`ternctl bench` on an endpoint or a list of them."""

    def __init__(self, args, endpoint, cpus, concurrency, seconds, warmup=0.0, retry=False):
        self.seconds = seconds + warmup
        command = [*pinned(cpus), str(args.bin / "ternctl"), "--server", endpoint, "--json", "--quiet", "bench", "--model", args.model,
                   "--version", str(args.version), "--data", str(args.data), "--concurrency", str(concurrency), "--channels", "2",
                   "--seconds", str(seconds), "--warmup", str(warmup), *(["--retry"] if retry else [])]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def running(self):
        return self.process.poll() is None

    def result(self):
        out, err = self.process.communicate(timeout=self.seconds + 120)
        if not out:
            raise RuntimeError(f"ternctl bench ended with {self.process.returncode}: {err}")
        return json.loads(out)


class Fleet:
    """`count` replicas behind one front; a context manager."""

    def __init__(self, args, count, front):
        self.args, self.front = args, front
        self.cpus = Cpus(count, args.cpus_per_replica)
        self.replicas, self.proxy = [], None
        try:
            for i in range(count):
                self.replicas.append(Replica(args, i, self.cpus.replicas[i]))
            if front == "haproxy":
                self.proxy = Haproxy(self.replicas, self.cpus.rest)
        except BaseException:
            self.__exit__()
            raise
        self.endpoint = self.proxy.endpoint if self.proxy else ",".join(r.endpoint() for r in self.replicas)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.proxy:
            self.proxy.__exit__()
        for replica in self.replicas:
            replica.close()

    def load(self, concurrency, seconds, **options):
        return Load(self.args, self.endpoint, self.cpus.rest, concurrency, seconds, **options)

    def wait_for_answers(self, replica):
        """Seconds until `replica` has answered a call."""
        start = time.monotonic()
        while replica.answered() == 0:
            if time.monotonic() - start > BACK_WITHIN_S:
                raise RuntimeError(f"{replica.endpoint()} got no call within {BACK_WITHIN_S} s of its start")
            time.sleep(0.05)
        return time.monotonic() - start


def throughput(args, count, front):
    with Fleet(args, count, front) as fleet:
        fleet.load(args.concurrency, 1).result()  # connections, page cache
        before = [ternd.cpu_seconds(r.server.pid) for r in fleet.replicas], [r.answered() for r in fleet.replicas]
        proxy_before = ternd.cpu_seconds(fleet.proxy.process.pid) if fleet.proxy else 0
        client_before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run = fleet.load(args.concurrency * count, args.seconds).result()
        client_after = resource.getrusage(resource.RUSAGE_CHILDREN)
        answered = [r.answered() - b for r, b in zip(fleet.replicas, before[1])]
        total = sum(answered)
        client_cpu = sum(getattr(client_after, f) - getattr(client_before, f) for f in ("ru_utime", "ru_stime"))
        return {
            "replicas": count, "front": front, "cpus": fleet.cpus.describe(), "shared": fleet.cpus.shared,
            "images_per_second": run["images_per_second"], "p50_ms": run["p50_ms"], "p99_ms": run["p99_ms"], "errors": run["errors"],
            "mean_batch_size": run["mean_batch_size"], "answered_by_replica": answered,
            "server_cpu_ms_per_image":
                1e3 * sum(ternd.cpu_seconds(r.server.pid) - b for r, b in zip(fleet.replicas, before[0])) / total,
            "front_cpu_ms_per_image": 1e3 * (ternd.cpu_seconds(fleet.proxy.process.pid) - proxy_before) / total if fleet.proxy else 0,
            "client_cpu_ms_per_image": 1e3 * client_cpu / total,
        }


def restart(fleet):
    """Each replica in turn; returns the seconds from each one's start to its first answer."""
    back = []
    for replica in fleet.replicas:
        status = replica.server.stop()
        if status != 0:
            raise RuntimeError(f"{replica.endpoint()} ended with status {status} after SIGTERM")
        replica.start()
        back.append(fleet.wait_for_answers(replica))
    return back


def kill(fleet):
    """The first replica; returns the seconds until the kernel had ended it. Until then its connections are open, and calls wait in it."""
    start = time.monotonic()
    fleet.replicas[0].server.process.kill()
    fleet.replicas[0].server.process.wait()
    dead = time.monotonic() - start
    time.sleep(3)
    return [dead]


# Seconds of load that cover the event on a busy machine, too.
EVENTS = {"restart": (restart, lambda args, count: 5 + count * (args.drain + 9)), "kill": (kill, lambda args, count: 20)}


def failures(args, count, front, event, retry):
    """Calls and failed calls during an event."""
    act, seconds = EVENTS[event]
    with Fleet(args, count, front) as fleet:
        fleet.load(args.concurrency, 0.5).result()
        load = fleet.load(args.concurrency, seconds(args, count), retry=retry)
        for replica in fleet.replicas:
            fleet.wait_for_answers(replica)
        time.sleep(1)
        after = act(fleet)
        if not load.running():
            raise RuntimeError(f"{event}: the load of {load.seconds:.0f} s ended before the event did")
        run = load.result()
    return {"replicas": count, "front": front, "event": event, "retry": retry, "calls": run["images"] + run["errors"],
            "failed": run["errors"], "errors_by_code": run["errors_by_code"], "p50_ms": run["p50_ms"], "p99_ms": run["p99_ms"],
            "max_ms": run["max_ms"], "after_s": after}


def print_header(*columns):
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|", flush=True)


def print_throughput(row, one):
    """`one`: the row of a single replica behind the same front, None if there is none."""
    of_one = f"{row['images_per_second'] / one['images_per_second']:.2f}x" if one else "-"
    print(f"| {row['replicas']} | {row['front']} | {row['images_per_second']:.0f} | {of_one} | {row['p50_ms']:.1f} | "
          f"{row['p99_ms']:.1f} | {row['mean_batch_size']:.1f} | {row['server_cpu_ms_per_image']:.2f}, "
          f"{row['front_cpu_ms_per_image']:.2f}, {row['client_cpu_ms_per_image']:.2f} | {row['cpus']} |", flush=True)


def print_failures(row):
    codes = ", ".join(f"{count} {code}" for code, count in sorted(row["errors_by_code"].items()))
    print(f"| {row['event']} | {row['replicas']} | {row['front']} | {'yes' if row['retry'] else 'no'} | {row['calls']} | "
          f"{row['failed']}{f' ({codes})' if codes else ''} | {row['p50_ms']:.1f} | {row['p99_ms']:.1f} | {row['max_ms']:.0f} | "
          f"{', '.join(f'{s:.1f}' for s in row['after_s'])} |", flush=True)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, required=True, help="folder with ternd and ternctl")
    parser.add_argument("--data", type=pathlib.Path, required=True, help="images, or a folder of them")
    parser.add_argument("--repository", type=pathlib.Path, help="models to serve; default: the demo model")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--version", type=int, default=0, help="0 = the default")
    parser.add_argument("--replicas", default="1,2", help="numbers of replicas to measure")
    parser.add_argument("--fronts", default="client,haproxy")
    parser.add_argument("--events", default="restart,kill", help="with the largest number of replicas; empty: none")
    parser.add_argument("--retry", choices=("yes", "no", "both"), default="both", help="whether the client retries, in events")
    parser.add_argument("--cpus-per-replica", type=int, default=1)
    parser.add_argument("--concurrency", type=int, default=16, help="requests in flight per replica, in events in all")
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement of throughput; 0: none")
    parser.add_argument("--drain", type=float, default=1, help="ternd --drain, in seconds")
    parser.add_argument("--ternd-flags", default="", help="more flags of ternd, separated by spaces")
    parser.add_argument("--json", type=pathlib.Path, help="file for all figures")
    args = parser.parse_args(argv)
    args.ternd_flags = args.ternd_flags.split()
    args.counts = [int(n) for n in args.replicas.split(",")]
    args.fronts = args.fronts.split(",")
    args.events = [event for event in args.events.split(",") if event]
    if min(args.counts) < 1 or max(args.counts) > 200:
        parser.error(f"--replicas: got {args.replicas}, want numbers of 1 to 200")
    if not set(args.fronts) <= set(FRONTS):
        parser.error(f"--fronts: got {','.join(args.fronts)}, want some of {','.join(FRONTS)}")
    if not set(args.events) <= set(EVENTS):
        parser.error(f"--events: got {','.join(args.events)}, want some of {','.join(EVENTS)}")
    if args.events and max(args.counts) < 2:
        parser.error("--events needs at least two replicas, or --events=")
    return args


def main():
    args = parse()
    if "haproxy" in args.fronts and not haproxy_program():
        args.fronts.remove("haproxy")
        print("haproxy is not installed (Debian package haproxy): its rows are left out\n")
    retries = {"yes": [True], "no": [False], "both": [True, False]}[args.retry]
    report = {"machine": platform.node(), "cpus": len(os.sched_getaffinity(0)), "throughput": [], "events": []}
    if args.seconds > 0:
        print_header("replicas", "front", "images/s", "of one", "p50 ms", "p99 ms", "mean batch", "CPU ms per image: servers, front, client",
                     "CPUs")
        for front in args.fronts:
            one = None
            for count in args.counts:
                row = throughput(args, count, front)
                one = row if count == 1 else one
                print_throughput(row, one)
                report["throughput"].append(row)
        print()
    if args.events:
        print_header("event", "replicas", "front", "client retries", "calls", "failed", "p50 ms", "p99 ms", "slowest ms",
                     "calls again, or dead, after s")
        for event in args.events:
            for front in args.fronts:
                for retry in retries:
                    report["events"].append(failures(args, max(args.counts), front, event, retry))
                    print_failures(report["events"][-1])
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
