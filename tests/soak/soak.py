#!/usr/bin/env python3
"""Mixed load for a long time, every answer checked, while models come and go; then: did memory grow?

    soak.py --ternd build/release/bin/ternd [--minutes 30] [--clients 4] [--growth 2] [--source DIR]

Load: JPEGs of several sizes and PNGs, for a float, an int8 and a ternary version of the demo model and for a second model with another
contract; calls with and without version, top_k and label; streams; and garbage. Meanwhile, without pause: versions are
unloaded and loaded, the default moves, a version is imported and deleted, health and metrics are read. What is right was
asked before the load begins; the receipt says which version answered. Resident memory is compared between two moments of rest,
after a warm-up of a fifth of the time and at the end.

Exit status 0 if memory grew by less than `--growth` per cent and there was no wrong answer and no unexpected error;
1 otherwise; 77 if this machine lacks what the program needs.
"""

import argparse
import collections
import pathlib
import random
import shutil
import struct
import sys
import tempfile
import threading
import time
import zlib

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "testing"))
import ternd as harness  # noqa: E402
from ternd import grpc, metric  # noqa: E402

SKIPPED = 77
# Probabilities of one image may differ by rounding between batch sizes in float versions.
TOLERANCE = 1e-4


def png(width, height, seed):
    """An RGB PNG of smooth colours and noise."""
    noise = random.Random(seed)
    rows = b"".join(b"\0" + bytes((x * 3 + y + c * 80 + noise.randrange(8)) & 255 for x in range(width) for c in range(3))
                    for y in range(height))

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) +
            chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b""))


class Soak:
    def __init__(self, args):
        self.protos = harness.messages(args.source)
        self.repository = tempfile.mkdtemp(prefix="tern-soak-")
        self.server = harness.Ternd(args.ternd, self.repository, "--demo", "--label_memory=2000", "--log_level=warn")
        self.api = harness.Api(self.server, self.protos)
        photos = sorted(pathlib.Path(args.source, "models/demo/photos").rglob("*.jpg"))
        photos.sort(key=lambda p: p.stat().st_size)
        chosen = photos[:: max(1, len(photos) // 20)]
        self.images = [p.read_bytes() for p in chosen] + [png(w, h, w) for w, h in ((32, 32), (97, 61), (300, 500))]
        self.garbage = [b"x", b"", random.Random(1).randbytes(5000), self.images[0][:200], b"\x89PNG\r\n\x1a\n" + bytes(50)]
        self.onnx = pathlib.Path(args.source, "models/demo/model.onnx").read_bytes()
        for weights in ("INT8", "TERNARY_CLUSTER"):
            self.quantize(weights, photos[:20])
        contract = self.protos.model.Preprocessing(resize="EXACT", filter="BICUBIC_ANTIALIAS", scale=1 / 255,
                                                   mean=[0.5] * 3, std=[0.25] * 3, jpeg_scaling=True)
        self.api.upload("other", self.onnx, preprocessing=contract)
        self.steady = [("demo", 1), ("demo", 2), ("demo", 3), ("other", 1)]
        # Version 3 of demo comes and goes; the others always serve.
        self.moving = ("demo", 3)
        self.expected = {(m, v, i): self.classes(self.api.classify(image, m, v))
                         for m, v in self.steady for i, image in enumerate(self.images)}
        self.stop = threading.Event()
        self.rest = threading.Event()
        self.resting = threading.Semaphore(0)
        self.lock = threading.Lock()
        self.outcomes = collections.Counter()
        self.wrong, self.unexpected = [], []

    def quantize(self, weights, photos):
        q = self.protos.quantizer

        def requests():
            yield q.QuantizeRequest(start=q.QuantizeStart(
                model="demo", source_version=1,
                recipe=self.protos.model.Recipe(weights=weights, cluster_size=4, method="DIRECT", distillation="DISTILL_OFF")))
            for photo in photos:
                yield q.QuantizeRequest(image=q.SampleImage(image=photo.read_bytes(), calibration=True))
        call = self.api.admin.stream_stream("/tern.v1.Quantizer/Quantize", q.QuantizeRequest.SerializeToString,
                                            q.QuantizeResponse.FromString)
        for _ in call(requests()):
            pass

    @staticmethod
    def classes(response):
        return [(c.index, c.probability) for c in response.classes]

    def note(self, kind, code, problem=None):
        with self.lock:
            self.outcomes[kind, code] += 1
            if problem is not None and len(self.unexpected) < 20:
                self.unexpected.append(f"{kind}: {problem}")

    def compare(self, kind, response, image):
        """Against what the version in the receipt answered when nothing else ran."""
        want = self.expected.get((response.receipt.model, response.receipt.version, image))
        if want is None:  # a version that was imported meanwhile has the bytes of version 1
            want = self.expected[response.receipt.model, 1, image]
        got = self.classes(response)
        near = all(abs(a[1] - b[1]) < TOLERANCE for a, b in zip(got, want))
        # Classes of equal probability may change places.
        same = all(a[0] == b[0] or abs(a[1] - b[1]) < TOLERANCE for a, b in zip(got, want))
        if near and same:
            return self.note(kind, "OK")
        self.note(kind, "WRONG")
        with self.lock:
            if len(self.wrong) < 20:
                self.wrong.append(f"{kind}: {response.receipt.model} {response.receipt.version}: {got} instead of {want}")

    def client(self, seed):
        """One client in a closed loop, with a connection of its own that it renews now and then."""
        choose = random.Random(seed)
        api = harness.Api(self.server, self.protos)
        while not self.stop.is_set():
            if self.rest.is_set():
                api.close()
                self.resting.release()
                while self.rest.is_set():
                    time.sleep(0.05)
                api = harness.Api(self.server, self.protos)
            if choose.random() < 0.001:
                api.close()
                api = harness.Api(self.server, self.protos)
            self.one(api, choose)
        api.close()
        self.resting.release()

    def one(self, api, choose):
        kind = choose.choices(["version", "default", "moving", "stream", "garbage", "unknown", "label"],
                              [40, 25, 10, 5, 10, 5, 5])[0]
        image = choose.randrange(len(self.images))
        allowed = set()
        try:
            if kind == "version":
                model, version = choose.choice([v for v in self.steady if v != self.moving])
                return self.compare(kind, api.classify(self.images[image], model, version, top_k=5), image)
            if kind == "default":
                return self.compare(kind, api.classify(self.images[image], "demo"), image)
            if kind == "moving":
                allowed = {"UNAVAILABLE"}
                return self.compare(kind, api.classify(self.images[image], *self.moving), image)
            if kind == "stream":
                images = [choose.randrange(len(self.images)) for _ in range(10)]
                answers = list(api.classify_stream(
                    (api.request(self.images[i], "demo", 1, request_id=str(n)) for n, i in enumerate(images)), timeout=60))
                if [a.request_id for a in answers] != [str(n) for n in range(10)]:
                    self.note(kind, "ORDER", "answers are not those of the requests")
                for answer, i in zip(answers, images):
                    self.compare(kind, answer.response, i)
                return None
            if kind == "label":
                response = api.classify(self.images[image], "demo", 2, label=choose.randrange(10))
                return self.compare(kind, response, image)
            if kind == "garbage":
                allowed = {"INVALID_ARGUMENT"}
                api.classify(choose.choice(self.garbage))
            else:
                allowed = {"NOT_FOUND"}
                api.classify(self.images[image], *choose.choice([("nobody", 0), ("demo", 10**6), ("", 0)][:2]))
            return self.note(kind, "OK", "accepted")
        except grpc.RpcError as error:
            code = error.code().name
            return self.note(kind, code, None if code in allowed else f"{code}: {error.details()}")

    def operator(self):
        """Models in motion, one thing after the other."""
        api = harness.Api(self.server, self.protos)
        contract = api.get("demo", 1).preprocessing
        turn, fresh = 0, None
        while not self.stop.is_set():
            if self.rest.is_set():
                self.resting.release()
                while self.rest.is_set():
                    time.sleep(0.05)
            step = turn % 6
            turn += 1
            name = ("unload", "load", "default", "import", "delete", "look")[step]
            try:
                if step == 0:
                    api.version("SetDefault", "demo", 1)
                    api.version("Unload", *self.moving)
                elif step == 1:
                    api.version("Load", *self.moving)
                elif step == 2:
                    api.version("SetDefault", "demo", 2 + turn // 6 % 2)
                elif step == 3:
                    fresh = api.upload("demo", self.onnx, preprocessing=contract, set_default=True)
                elif step == 4:
                    api.version("SetDefault", "demo", 2)
                    if fresh is not None:
                        api.delete("demo", fresh.version)
                        fresh = None
                else:
                    assert api.serving(), "not SERVING"
                    self.server.metrics(timeout=30)
                self.note(name, "OK")
            except (grpc.RpcError, OSError, AssertionError) as error:
                self.note(name, "FAILED", repr(error)[:300])
            self.stop.wait(0.2)
        api.close()
        self.resting.release()

    def pause(self, workers):
        """Resident memory in KiB with no load on the server and all versions loaded."""
        self.rest.set()
        for _ in range(workers):
            self.resting.acquire()
        try:
            self.api.version("Load", *self.moving)
            names = {"tern_inflight_requests", "tern_queue_depth"}
            deadline = time.monotonic() + 30
            while any(metric(self.server.metrics(), name) for name in names) and time.monotonic() < deadline:
                time.sleep(0.1)
            time.sleep(2)
            return self.server.resources()
        finally:
            self.rest.clear()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ternd", required=True)
    parser.add_argument("--source", default=str(pathlib.Path(__file__).resolve().parents[2]))
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--growth", type=float, default=2, help="of resident memory that is allowed, per cent")
    args = parser.parse_args()
    lacks = harness.missing()
    if lacks:
        print(f"soak skipped '{lacks} not installed'")
        return SKIPPED
    soak = Soak(args)
    threads = [threading.Thread(target=soak.client, args=(i,)) for i in range(args.clients)]
    threads.append(threading.Thread(target=soak.operator))
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    seconds = args.minutes * 60
    try:
        time.sleep(seconds / 5)
        before = soak.pause(len(threads))
        counted = sum(soak.outcomes.values())
        while soak.server.alive() and time.monotonic() < begin + seconds:
            time.sleep(min(10, max(0.1, begin + seconds - time.monotonic())))
            print(f"{time.monotonic() - begin:7.0f} s  {sum(soak.outcomes.values()):9} calls  "
                  f"{soak.server.status('VmRSS') >> 10} MiB  {len(soak.wrong)} wrong  {len(soak.unexpected)} unexpected",
                  file=sys.stderr, flush=True)
        after = soak.pause(len(threads))
    finally:
        soak.stop.set()
        soak.rest.clear()
        for thread in threads:
            thread.join()
        soak.api.close()
        status = soak.server.stop()
        shutil.rmtree(soak.repository, ignore_errors=True)

    kinds = sorted({kind for kind, _ in soak.outcomes})
    print(f"{'calls':10} {'count':>9}  outcomes")
    for kind in kinds:
        codes = {code: n for (k, code), n in sorted(soak.outcomes.items()) if k == kind}
        print(f"{kind:10} {sum(codes.values()):9}  " + ", ".join(f"{code} {n}" for code, n in codes.items()))
    growth = 100 * (after.rss_kib / before.rss_kib - 1)
    wrong = sum(n for (_, code), n in soak.outcomes.items() if code == "WRONG")
    print(f"{args.minutes:g} minutes, {sum(soak.outcomes.values())} calls, {sum(soak.outcomes.values()) - counted} between the "
          f"two measurements")
    print(f"resident memory {before.rss_kib / 1024:.1f} -> {after.rss_kib / 1024:.1f} MiB ({growth:+.2f} %, allowed "
          f"{args.growth:g} %), descriptors {before.descriptors} -> {after.descriptors}, threads {before.threads} -> {after.threads}")
    print(f"wrong answers: {wrong}, unexpected errors: {len(soak.unexpected)}, exit status after SIGTERM: {status}")
    for line in soak.wrong + soak.unexpected:
        print("  " + line)
    return 0 if growth < args.growth and not soak.wrong and not soak.unexpected and status == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
