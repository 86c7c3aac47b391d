#!/usr/bin/env python3
"""Offers a server more than it can do, and shows what comes out.

    bench/overload.py --bin build/ci/bin --data models/demo/photos --server-cpus 0 --client-cpus 1

Starts a ternd of its own with the demo model (or a copy of --repository) and --ternd-flags, finds its peak with closed loops,
then offers multiples of that in an open loop with Poisson arrivals. Per load: what was answered, as a share of the peak;
percentiles of the answered requests from the time at which each was due; refusals by code. The queue bound is --max-queue
images at the peak's pace, the time after which a full queue has been served. The table goes to stdout as Markdown.

Client and server need CPUs of their own, or the client's work counts as the server's.
"""

import argparse
import json
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time


def pinned(cpus, command):
    return ["taskset", "-c", cpus, *command] if cpus else command


class Server:
    """A ternd on free loopback ports; a context manager."""

    def __init__(self, args):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="tern-overload-"))
        repository = self.folder / "repository"
        if args.repository:
            shutil.copytree(args.repository, repository, ignore=shutil.ignore_patterns(".*"))
        ports = self.folder / "ports.json"
        self.log = open(self.folder / "log", "w")
        self.process = subprocess.Popen(
            pinned(args.server_cpus, [
                str(args.bin / "ternd"), "--repository", str(repository), *([] if args.repository else ["--demo"]),
                "--host=127.0.0.1", "--admin_host=127.0.0.1", "--metrics_host=127.0.0.1", "--port=0", "--admin_port=0",
                "--metrics_port=0", f"--max_queue={args.max_queue}", "--ports_file", str(ports), *args.ternd_flags]),
            stderr=self.log)
        while not ports.exists():
            if self.process.poll() is not None:
                sys.exit(f"ternd ended with {self.process.returncode}: {(self.folder / 'log').read_text()}")
            time.sleep(0.05)
        known = json.loads(ports.read_text())
        self.env = dict(os.environ, TERN_SERVER=f"127.0.0.1:{known['port']}", TERN_ADMIN=f"127.0.0.1:{known['admin_port']}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def bench(server, args, *flags):
    command = [str(args.bin / "ternctl"), "bench", "--model", args.model, "--data", str(args.data), "--seconds",
               str(args.seconds), "--channels", "4", "--quiet", "--json", *flags]
    result = subprocess.run(pinned(args.client_cpus, command), env=server.env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                            timeout=args.seconds * 10 + 60)
    if not result.stdout:
        sys.exit(f"{' '.join(command)}: exit status {result.returncode}")
    return json.loads(result.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, required=True, help="folder with ternd and ternctl")
    parser.add_argument("--data", type=pathlib.Path, required=True, help="images, or a folder of them")
    parser.add_argument("--repository", type=pathlib.Path, help="models to serve; default: the demo model")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--loads", default="0.5,0.9,1,2,5", help="multiples of the peak")
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--max-queue", type=int, default=256)
    parser.add_argument("--server-cpus", default="", help="as taskset -c; empty = all")
    parser.add_argument("--client-cpus", default="")
    parser.add_argument("--bench-flags", default="", help="more flags of ternctl bench, separated by spaces")
    parser.add_argument("--ternd-flags", default="", help="more flags of ternd, separated by spaces")
    args = parser.parse_args()
    args.ternd_flags = args.ternd_flags.split()
    more = args.bench_flags.split()

    with Server(args) as server:
        closed = {c: bench(server, args, "--concurrency", str(c))["images_per_second"] for c in (8, 32, 128)}
        peak = max(closed.values())
        bound_ms = 1e3 * args.max_queue / peak
        print(f"{platform.node() or 'this machine'}, server on CPUs {args.server_cpus or 'all'}, client on "
              f"{args.client_cpus or 'all'}; peak {peak:.0f} images/s ("
              + ", ".join(f"{c} in flight: {rate:.0f}" for c, rate in closed.items())
              + f"); queue bound {args.max_queue} images = {bound_ms:.0f} ms\n")
        print("| load | offered/s | answered/s | of the peak | p50 ms | p99 ms | p99 / bound | mean batch | refused |")
        print("|---|---|---|---|---|---|---|---|---|")
        for load in (float(x) for x in args.loads.split(",")):
            run = bench(server, args, "--rate", f"{load * peak:.1f}", *more)
            refused = ", ".join(f"{count} {code}" for code, count in sorted(run["errors_by_code"].items())) or "none"
            print(f"| {load:g} | {load * peak:.0f} | {run['images_per_second']:.0f} | "
                  f"{100 * run['images_per_second'] / peak:.0f} % | {run['p50_ms']:.1f} | {run['p99_ms']:.1f} | "
                  f"{run['p99_ms'] / bound_ms:.2f} | {run['mean_batch_size']:.1f} | {refused} |", flush=True)


if __name__ == "__main__":
    main()
