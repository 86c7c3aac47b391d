#!/usr/bin/env python3
"""Offers a server more than it can do, and shows what comes out.

    bench/overload.py --bin build/ci/bin --data models/demo/photos --server-cpus 0 --client-cpus 1

Starts a ternd of its own with the demo model (or a copy of --repository) and --ternd-flags, finds its peak with closed loops,
then offers multiples of that in an open loop with Poisson arrivals. Per load: what was answered, as a share of the peak;
percentiles of the answered requests from the time at which each was due; refusals by code. The queue bound is --max-queue
images at the peak's pace, the time after which a full queue has been served. The table goes to stdout as Markdown, and after it the flags
with which bench/capacity.py simulates the same on one CPU: the learned batch times, and the processor time per image beside them.

Client and server need CPUs of their own, or the client's work counts as the server's.
"""

import argparse
import contextlib
import json
import math
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tests" / "testing"))
import ternd  # noqa: E402


def pinned(cpus, command):
    return ["taskset", "-c", cpus, *command] if cpus else command


@contextlib.contextmanager
def started(args):
    """A ternd with its own copy of the repository."""
    folder = tempfile.mkdtemp(prefix="tern-overload-")
    repository = os.path.join(folder, "repository")
    if args.repository:
        shutil.copytree(args.repository, repository, ignore=shutil.ignore_patterns(".*"))
    server = None
    try:
        server = ternd.Ternd(str(args.bin / "ternd"), repository, *([] if args.repository else ["--demo"]),
                             f"--max_queue={args.max_queue}", *args.ternd_flags, wrapper=pinned(args.server_cpus, []))
        yield server
    finally:
        if server:
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def learn_batches(server, args, known):
    """Into `known` ({version: {images: seconds}}): the least that the server's scheduler has learned."""
    for line in server.metrics().splitlines():
        match = re.match(r'tern_batch_learned_seconds\{(?=.*batch_size="(\d+)")(?=.*model="([^"]*)")(?=.*version="(\d+)").*\} (\S+)$', line)
        if match and match[2] == args.model:
            times = known.setdefault(match[3], {})
            times[int(match[1])] = min(float(match[4]), times.get(int(match[1]), math.inf))


def bench(server, args, *flags):
    command = [str(args.bin / "ternctl"), "bench", "--model", args.model, "--data", str(args.data), "--seconds",
               str(args.seconds), "--channels", "4", "--quiet", "--json", *flags]
    env = dict(os.environ, TERN_SERVER=f"127.0.0.1:{server.port}", TERN_ADMIN=f"127.0.0.1:{server.admin_port}")
    result = subprocess.run(pinned(args.client_cpus, command), env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
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

    with started(args) as server:
        answered, cpu = server.metrics(), ternd.cpu_seconds(server.pid)
        closed = {c: bench(server, args, "--concurrency", str(c))["images_per_second"] for c in (8, 32, 128)}
        cpu = ternd.cpu_seconds(server.pid) - cpu
        images = ternd.metric(server.metrics(), "tern_images_total") - (ternd.metric(answered, "tern_images_total") or 0)
        learned = {}
        learn_batches(server, args, learned)
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
            learn_batches(server, args, learned)
        batches = max(learned.values(), key=len)
        largest = max(batches)
        image_ms = max(0.0, 1e3 * (cpu / images - batches[largest] / largest))
        print(f"\nThe same by bench/capacity.py: simulate --batch-ms {','.join(f'{n}:{1e3 * s:.2f}' for n, s in sorted(batches.items()))} "
              f"--image-ms {image_ms:.2f} --max-queue {args.max_queue} --loads {args.loads}")


if __name__ == "__main__":
    main()
