#!/usr/bin/env python3
"""What serving costs beyond decoding and the network. Not a test: run it on a quiet machine.

    overhead_bench.py --build build/release [--seconds 10] [--repeat 5] [--network FILE.onnx] [--json FILE]

1. Latency: one client in a closed loop, a JPEG of 100 kB, a network that costs next to nothing. Each call's time at the client minus the
   server's own work on its pixels (decoding and resizing) is what gRPC, validation, batching, the network, top-k and the reply take; the
   wish for the median is at most 0.3 ms. Beside it what gRPC alone takes (rpc_floor): a call of the same size to a server that only keeps a thread busy
   for as long as the pixels take. A CPU that slept for milliseconds wakes up slowly, so that this can be more than the wish.
2. Throughput: a ResNet-50 (random weights, or --network), float and int8, 224x224 JPEGs of 12 kB, clients enough to fill every batch:
   images/s of the server as a share of the engine's alone on the same CPUs (the same batch and number of sessions); the wish is at least 95 %.
   Decoding and the client run on the same CPUs and are part of the difference; the table gives the server's decoding apart.

Server and engine take turns, --repeat times; the table holds the medians. Exit status 0 if both wishes are met, else 1.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "testing"))
import ternd as harness  # noqa: E402

MAX_OVERHEAD_MS = 0.3
MIN_SHARE = 0.95
BATCH = 8


class Bench:
    def __init__(self, args):
        self.args = args
        self.bin = pathlib.Path(args.build, "bin")
        self.folder = tempfile.mkdtemp(prefix="tern-overhead-")
        subprocess.run([self.bin / "overhead_inputs", self.folder], check=True, stdout=subprocess.DEVNULL)
        os.mkdir(self.path("calibration"))
        shutil.copy(self.path("small.jpg"), self.path("calibration"))
        self.server = harness.Ternd(self.bin / "ternd", os.path.join(self.folder, "repository"), f"--max_batch={BATCH}")
        self.env = dict(os.environ, TERN_SERVER=f"127.0.0.1:{self.server.port}",
                        TERN_ADMIN=f"127.0.0.1:{self.server.admin_port}")

    def close(self):
        self.server.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def path(self, name):
        return os.path.join(self.folder, name)

    def ternctl(self, *arguments):
        result = subprocess.run([self.bin / "ternctl", *map(str, arguments), "--json"], env=self.env, capture_output=True)
        if result.returncode != 0:
            raise SystemExit(f"ternctl {' '.join(map(str, arguments))}: {result.stderr.decode()}")
        return json.loads(result.stdout)

    def served(self, model, version, image, concurrency):
        return self.ternctl("bench", "--model", model, "--version", version, "--data", self.path(image), "--concurrency",
                            concurrency, "--seconds", self.args.seconds, "--warmup", 1)

    def engine(self, model, version, sessions):
        return self.ternctl("bench", "--engine", "--model", model, "--version", version, "--batch", BATCH, "--threads", 1,
                            "--sessions", sessions, "--seconds", self.args.seconds)

    def latency(self):
        self.ternctl("import", "--name", "empty", "--onnx", self.path("empty.onnx"), "--preprocess", "cifar10")
        runs = []
        for _ in range(self.args.repeat):
            r = self.served("empty", 1, "photo.jpg", 1)
            runs.append({"p50": r["p50_ms"], "p99": r["p99_ms"], "overhead": r["p50_beside_pixels_ms"], **{
                name: r["mean_stages"][f"{name}_us"] / 1e3 for name in ("decode", "preprocess", "queue", "inference", "total")}})
        row = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        pixels = row["decode"] + row["preprocess"]
        floors = [float(subprocess.run([self.bin / "rpc_floor", str(os.path.getsize(self.path("photo.jpg"))), str(round(1e3 * pixels)),
                                        str(max(100, round(self.args.seconds * 200)))], check=True, capture_output=True).stdout)
                  for _ in range(self.args.repeat)]
        row["grpc"] = statistics.median(floors)
        row["outside"] = row["overhead"] - (row["total"] - pixels)
        return row

    def throughput(self):
        network = self.args.network or self.path("resnet50.onnx")
        self.ternctl("import", "--name", "network", "--onnx", network, "--preprocess", "imagenet")
        quantised = self.ternctl("quantize", "--model", "network", "--weights", "int8", "--method", "direct", "--distill", "off",
                                 "--calibration", self.path("calibration"))
        cpus = len(os.sched_getaffinity(0))
        rows = []
        for scheme, version in (("float", 1), ("int8", quantised["version"])):
            engine, server, decode = [], [], []
            for _ in range(self.args.repeat):
                engine.append(self.engine("network", version, cpus)["images_per_second"])
                served = self.served("network", version, "small.jpg", 4 * BATCH * cpus)
                server.append(served["images_per_second"])
                stages = served["mean_stages"]
                decode.append((stages["decode_us"] + stages["preprocess_us"]) / 1e3)
            e, s = statistics.median(engine), statistics.median(server)
            rows.append({"scheme": scheme, "engine": e, "server": s, "share": s / e,
                         "decode_ms": statistics.median(decode)})
        return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", required=True, help="a build folder")
    parser.add_argument("--seconds", type=float, default=10, help="of each run")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--network", help="an ONNX network for 224x224 images instead of the random ResNet-50")
    parser.add_argument("--json", help="also write the figures here")
    args = parser.parse_args()
    bench = Bench(args)
    try:
        latency = bench.latency()
        print("one client, JPEG of 100 kB, empty network; ms")
        print(f"{'p50':>8} {'p99':>8} {'decode':>8} {'preproc.':>8} {'queue':>8} {'network':>8} {'outside':>8} {'p50-pixels':>11} {'gRPC alone':>11}")
        print(" ".join(f"{latency[n]:8.3f}" for n in ("p50", "p99", "decode", "preprocess", "queue", "inference", "outside")) +
              f" {latency['overhead']:11.3f} {latency['grpc']:11.3f}  (p50-pixels: at most {MAX_OVERHEAD_MS})", flush=True)
        rows = bench.throughput()
        print(f"{'network':8} {'engine/s':>9} {'server/s':>9} {'share':>7} {'decode ms':>10}")
        for r in rows:
            print(f"{r['scheme']:8} {r['engine']:9.2f} {r['server']:9.2f} {r['share']:7.1%} {r['decode_ms']:10.3f}  "
                  f"(at least {MIN_SHARE:.0%})")
    finally:
        bench.close()
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps({"latency": latency, "throughput": rows}, indent=1) + "\n")
    met = latency["overhead"] <= MAX_OVERHEAD_MS and all(r["share"] >= MIN_SHARE for r in rows)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
