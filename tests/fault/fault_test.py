#!/usr/bin/env python3
"""Faults, one after the other, against one running ternd: after each the server must be healthy and as it was.

    fault_test.py --ternd build/release/bin/ternd [--scale 0.01] [--only bombs,cancels] [--source DIR]

Each case runs once at a tenth, to warm up what it uses, and once at full size. After it, within a minute: the health service
says SERVING, a photograph is classified as at the start, no call is in flight, no image queued, and there are as many
descriptors and threads as before; resident memory grew by less than GROWTH_KIB in the full run, which at full size is a
quarter of a kilobyte per request. A case that runs a server of its own says so. Exit status 0 if all cases passed, 1 if
not, 77 if this machine lacks what the program needs.
"""

import argparse
import collections
import concurrent.futures
import functools
import os
import pathlib
import random
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib

try:
    import h2.config
    import h2.connection
    import h2.events
    import h2.exceptions
except ImportError:
    h2 = None

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "testing"))
import ternd as harness  # noqa: E402
from ternd import grpc, metric  # noqa: E402

GROWTH_KIB = 24 << 10
# Where messages and images have tens of megabytes, the allocator keeps some of theirs; a leak of one in ten is more.
LARGE_GROWTH_KIB = 160 << 10
# The server's own threads come and go: gRPC's pollers and timers.
SPARE_THREADS = 8
SPARE_DESCRIPTORS = 4
SKIPPED = 77

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
CASES = {}


class Skip(Exception):
    pass


class Failure(Exception):
    pass


def case(own_server=False, growth_kib=GROWTH_KIB):
    """Registers a case. One with a server of its own leaves the shared one alone and runs once."""
    def register(function):
        function.own_server = own_server
        function.growth_kib = growth_kib
        CASES[function.__name__] = function
        return function
    return register


def check(holds, what):
    if not holds:
        raise Failure(what)


poll = functools.partial(harness.poll, error=Failure)


class Context:
    """The server that all cases share, what they send, and how much of it."""

    def __init__(self, args):
        self.args = args
        self.random = random.Random(1)
        self.protos = harness.messages(args.source)
        self.repository = tempfile.mkdtemp(prefix="tern-fault-")
        # A short memory for labels, so that it is full before anything is measured.
        self.server = harness.Ternd(args.ternd, self.repository, "--demo", "--label_memory=1000")
        self.api = harness.Api(self.server, self.protos)
        photos = sorted(pathlib.Path(args.source, "models/demo/photos").rglob("*.jpg"))
        self.photo = photos[0].read_bytes()
        self.photos = [p.read_bytes() for p in photos[:20]]
        self.expected = self.answer()

    def close(self):
        self.api.close()
        status = self.server.stop()
        shutil.rmtree(self.repository, ignore_errors=True)
        return status

    def check_bound(self, holds, what):
        """A bound of memory or of one image's time: of programs without a sanitizer, which keeps freed memory and is slow."""
        check(holds or self.args.sanitized, what)

    def answer(self, api=None):
        return [c.index for c in (api or self.api).classify(self.photo).classes]

    def connect(self, port=None, timeout=10):
        return socket.create_connection(("127.0.0.1", port or self.server.port), timeout=timeout)

    def bytes(self, n):
        return self.random.randbytes(n)

    def count(self, n):
        """`n` at the chosen scale, at least 10."""
        return max(10, int(n * self.scale))

    def outcomes(self, call, inputs, window=64, cancel_after=None):
        """Counts codes of `call` (a multicallable) over `inputs`, `window` at a time."""
        codes = collections.Counter()
        free = threading.Semaphore(window)
        lock = threading.Lock()

        def done(future):
            code = future.code().name
            with lock:
                codes[code] += 1
            free.release()

        for n, request in enumerate(inputs):
            free.acquire()
            future = call.future(request, timeout=60)
            future.add_done_callback(done)
            if cancel_after is not None:
                threading.Timer(cancel_after(n), future.cancel).start()
        for _ in range(window):
            free.acquire()
        return codes


def only(codes, *allowed):
    extra = set(codes) - set(allowed)
    check(not extra, f"unexpected codes: {dict((c, codes[c]) for c in extra)}")


# ---------------------------------------------------------------- what hostile clients send


@case()
def garbage_bytes(context):
    """Random bytes, HTTP/1, and broken HTTP/2 frames on the data port: 50,000 connections."""
    n = context.count(50_000)
    for i in range(n):
        with context.connect() as s:
            kind = i % 5
            if kind == 0:
                s.sendall(context.bytes(1 + i % 300))
            elif kind == 1:
                s.sendall(b"POST /v2/models/demo/infer HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n" + context.bytes(50))
            elif kind == 2:
                s.sendall(PREFACE + context.bytes(100))
            elif kind == 3:
                frame = struct.pack(">I", context.random.randrange(1 << 14))[1:] + context.bytes(6)
                s.sendall(PREFACE + SETTINGS + frame + context.bytes(200))
            else:
                s.sendall(PREFACE[: i % len(PREFACE)])
            if i % 2:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset
    return f"{n} connections"


@case()
def garbage_http(context):
    """Requests on the HTTP port that are none, too long, cut off, or for nothing that exists: 10,000."""
    n = context.count(10_000)
    codes = collections.Counter()
    for i in range(n):
        kind = i % 8
        body = context.bytes(i % 500)
        data = [b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n",
                b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + body,
                context.bytes(1 + i % 300),
                b"GET /" + b"a" * (i % 20000) + b" HTTP/1.1\r\n\r\n",
                b"GET /metrics HTTP/1.1\r\n" + b"X-%d: y\r\n" % i * (i % 300) + b"\r\n",
                b"POST /v2/models/demo/infer HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) +
                body,
                b"POST /v2/models/demo/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n" + body,
                b"GET /../../etc/passwd HTTP/9.9\r\n\r\n"][kind]
        with context.connect(context.server.metrics_port) as s:
            try:
                s.sendall(data)
                if kind in (0, 5, 7):
                    codes[s.recv(64).split(b" ", 2)[1].decode()] += 1
            except (OSError, IndexError):
                codes["closed"] += 1
    check(codes["200"] == 0, f"garbage was answered with 200: {dict(codes)}")
    return dict(codes)


@case()
def garbage_requests(context):
    """Well-formed calls with bytes that are no message, no image, or no request: 50,000."""
    n = context.count(50_000)
    request = context.protos.classifier.ClassifyRequest

    def made(i):
        kind = i % 8
        if kind == 0:
            return context.bytes(i % 400)
        if kind == 1:
            return request(model="demo", image=context.bytes(1 + i % 2000)).SerializeToString()
        if kind == 2:  # begins like a photograph
            cut = 3 + i % (len(context.photo) - 100)
            return request(model="demo", image=context.photo[:cut]).SerializeToString()
        if kind == 3:
            image = bytearray(context.photo)
            for _ in range(20):
                image[context.random.randrange(2, len(image))] = context.random.randrange(256)
            return request(model="demo", image=bytes(image)).SerializeToString()
        if kind == 4:
            return request(model="../../etc/passwd\0", image=context.photo).SerializeToString()
        if kind == 5:
            return request(model="demo", version=2**64 - 1 - i, image=b"BM").SerializeToString()
        if kind == 6:
            return request(model="demo", image=context.photo, top_k=2**32 - 1 - i).SerializeToString()
        return request(model="demo", image=b"x", request_id="i" * (129 + i % 999)).SerializeToString()

    raw = context.api.data.unary_unary("/tern.v1.ImageClassifier/Classify")
    codes = context.outcomes(raw, (made(i) for i in range(n)))
    # UNIMPLEMENTED is gRPC's own word for bytes that are no message; damaged photographs may still be images.
    only(codes, "OK", "INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED", "RESOURCE_EXHAUSTED")
    check(codes["INVALID_ARGUMENT"] > n // 2, f"few refusals: {dict(codes)}")
    check(codes["OK"] + codes["UNIMPLEMENTED"] <= n // 4 + 8, f"garbage was accepted: {dict(codes)}")
    infer = context.api.data.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    # Field 1 is the model's name; what follows is anything.
    others = context.outcomes(infer, ((b"\x0a\x04demo" if i % 2 else b"") + context.bytes(i % 300) for i in range(n // 5)))
    only(others, "INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED")
    return dict(codes + others)


@case()
def connections(context):
    """10,000 connections opened and closed, half of them after a handshake."""
    n = context.count(10_000)
    for i in range(n):
        with context.connect() as s:
            if i % 2:
                s.sendall(PREFACE + SETTINGS)
                s.recv(9)
    return f"{n} connections"


@case()
def slow_clients(context):
    """Slow-loris and half-open clients on the data and the HTTP port while others are served."""
    n = context.count(200)
    held = []
    try:
        for i in range(n):
            s = context.connect()
            # None; a part of the preface; a handshake and then silence; a call whose body does not come.
            s.sendall([b"", PREFACE[:7], PREFACE + SETTINGS, PREFACE + SETTINGS + b"\x00\x00\x10\x01\x04\x00\x00\x00\x01"][i % 4])
            held.append(s)
            h = context.connect(context.server.metrics_port)
            h.sendall([b"", b"GET /metr", b"GET /metrics HTTP/1.1\r\nHost: x\r\nX-Slow: ",
                       b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"][i % 4])
            held.append(h)
        for s in held[::7]:
            try:
                s.sendall(b"P")  # one byte now and then
            except OSError:
                pass  # the server may have closed it already
        begin = time.monotonic()
        for _ in range(20):
            check(context.answer() == context.expected, "a wrong answer beside slow clients")
        served = time.monotonic() - begin
        begin = time.monotonic()
        try:
            context.server.metrics(timeout=20)
        except OSError as error:
            raise Failure(f"metrics cannot be read beside slow clients: {error}")
        return f"{len(held)} held; 20 answers in {served:.2f} s, metrics in {time.monotonic() - begin:.2f} s"
    finally:
        for s in held:
            s.close()


def unfinished(address, streams, size, seconds):
    """A connection with calls whose messages of `size` bytes never end. Returns the bytes sent and the calls that the server ended."""
    connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
    connection.initiate_connection()
    left = {}
    for _ in range(streams):
        stream = connection.get_next_available_stream_id()
        connection.send_headers(stream, [(":method", "POST"), (":scheme", "http"), (":authority", "x"),
                                         (":path", "/tern.v1.ImageClassifier/Classify"), ("te", "trailers"),
                                         ("content-type", "application/grpc")])
        connection.send_data(stream, b"\0" + struct.pack(">I", size))
        left[stream] = size - 1000
    sent = ended = 0
    end = time.monotonic() + seconds
    with socket.create_connection(address, timeout=5) as s:
        while left and time.monotonic() < end:
            for stream in left:
                room = min(connection.local_flow_control_window(stream), connection.max_outbound_frame_size, left[stream])
                if room > 0:
                    connection.send_data(stream, bytes(room))
                    left[stream] -= room
                    sent += room
            try:
                s.settimeout(5)
                s.sendall(connection.data_to_send())
                s.settimeout(0.2)
                received = s.recv(1 << 16)
            except socket.timeout:
                continue
            except OSError:
                received = b""
            if not received:
                return sent, ended + len(left)
            try:
                events = connection.receive_data(received)
            except h2.exceptions.ProtocolError:  # h2 wants no frame behind the one that ends the connection
                return sent, ended + len(left)
            for event in events:
                if isinstance(event, (h2.events.StreamReset, h2.events.StreamEnded)):
                    ended += left.pop(event.stream_id, None) is not None
                elif isinstance(event, h2.events.ConnectionTerminated):
                    return sent, ended + len(left)
    return sent, ended


@case(own_server=True)
def unfinished_requests(context):
    """Own server that may hold 64 MiB of unfinished requests: 64 calls that stop just before the end of 8 MB each."""
    if h2 is None:
        raise Skip("python3-h2 is missing")
    repository = tempfile.mkdtemp(prefix="tern-fault-")
    server = harness.Ternd(context.args.ternd, repository, "--demo", f"--max_image_bytes={8 << 20}", f"--max_receive_bytes={64 << 20}")
    try:
        before = server.resources().rss_kib
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            results = list(pool.map(lambda _: unfinished(("127.0.0.1", server.port), 4, 8_000_000, 10), range(16)))
        most = server.peak_kib() - before
        sent, ended = (sum(column) for column in zip(*results))
        check(sent > 100e6, f"only {sent} bytes could be sent")
        # What lies in buffers between the check and the reset comes on top.
        context.check_bound(most < 160 << 10, f"{most} KiB for unfinished requests, {sent} bytes sent")
        api = harness.Api(server, context.protos)
        check(context.answer(api) == context.expected, "a wrong answer afterwards")
        api.close()
        check(server.stop() == 0, "the server did not stop in order")
        return f"{sent / 1e6:.0f} MB sent, {most / 1024:.0f} MiB held at most, {ended} calls ended by the server"
    finally:
        server.stop()
        shutil.rmtree(repository, ignore_errors=True)


@case()
def cancels(context):
    """Clients that give up while their image is decoded, queued, computed and answered: 4,000."""
    n = max(200, context.count(4_000))
    begin = time.monotonic()
    for _ in range(10):
        context.answer()
    usual = (time.monotonic() - begin) / 10
    large = png(2500, 2000)  # tens of milliseconds to decode
    requests = (context.api.request(large if i % 10 == 0 else context.photos[i % len(context.photos)])
                for i in range(n))
    before = metric(context.server.metrics(), "tern_rejected_total", reason="cancelled") or 0
    codes = context.outcomes(context.api.classify_call, requests, window=128,
                             cancel_after=lambda i: context.random.uniform(0, 64 * usual))
    only(codes, "OK", "CANCELLED", "RESOURCE_EXHAUSTED")
    check(codes["CANCELLED"] > 0, "nothing was cancelled")
    dropped = (metric(context.server.metrics(), "tern_rejected_total", reason="cancelled") or 0) - before
    # Streams that end in the middle, and calls whose connection breaks.
    for i in range(n // 40):
        stream = context.api.classify_stream(iter([context.api.request(context.photo)] * 20))
        for _ in range(i % 4):
            next(stream)
        stream.cancel()
    for i in range(n // 40):
        api = harness.Api(context.server, context.protos)
        api.classify_call.future(context.api.request(large))
        time.sleep(0.002 * (i % 10))
        api.close()
    return f"{dict(codes)}, {int(dropped)} dropped before computing"


# ---------------------------------------------------------------- bombs


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, data=None, extra=b""):
    """A grey PNG; `data` replaces its compressed rows."""
    if data is None:
        deflate = zlib.compressobj(1)
        row = bytes(1 + width)
        data = b"".join(deflate.compress(row) for _ in range(height)) + deflate.flush()
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)) + extra +
            chunk(b"IDAT", data) + chunk(b"IEND", b""))


def progressive_jpeg(width, height, scans):
    """A grey progressive JPEG of one DC scan and `scans` AC scans that say almost nothing, and cost a pass each."""
    def segment(marker, body):
        return b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body
    blocks = -(-width // 8) * -(-height // 8)
    # Tables of one code each: DC category 0 is "0"; AC "0" is a run of 16384 + bits end-of-block.
    tables = segment(0xC4, b"\x00" + bytes([1] + [0] * 15) + b"\x00") + segment(0xC4, b"\x10" + bytes([1] + [0] * 15) + b"\xe0")
    dc = bytes((blocks + 7) // 8)
    runs = -(-blocks // 16384)
    ac = bytes(-(-runs * 15 // 8))
    head = (b"\xff\xd8" + segment(0xDB, b"\x00" + bytes([1] * 64)) +
            segment(0xC2, struct.pack(">BHHB", 8, height, width, 1) + b"\x01\x11\x00") + tables)
    body = segment(0xDA, b"\x01\x01\x00\x00\x00\x00") + dc
    for i in range(scans):
        band = 1 + i % 63
        body += segment(0xDA, b"\x01\x01\x00" + bytes([band, band, 0])) + ac
    return head + body + b"\xff\xd9"


def patched_jpeg(photo, width, height):
    """`photo` with other sides in its frame header."""
    at = 2
    while photo[at + 1] not in (0xC0, 0xC2):
        at += 2 + struct.unpack(">H", photo[at + 2:at + 4])[0]
    return photo[:at + 5] + struct.pack(">HH", height, width) + photo[at + 9:]


def webp(width, height):
    """A lossless WebP header of that size and no pixels worth the name."""
    body = b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14) + bytes(16)
    data = b"VP8L" + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", 4 + len(data)) + b"WEBP" + data


def bmp(width, height):
    return (b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) +
            struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0))


@case(growth_kib=LARGE_GROWTH_KIB)
def bombs(context):
    """Images of huge sides, and small files that unpack to much: refused by the header or bounded in memory and time."""
    zeros = zlib.compress(bytes(32 << 20), 9)
    refused = {
        "png sides": png(60000, 60000, data=b"x"),
        "png 2^31": png(0x7FFFFFFF, 0x7FFFFFFF, data=b"x"),
        "png without rows": png(6000, 6000, data=zlib.compress(b"")),
        "jpeg sides": patched_jpeg(context.photo, 65500, 65500),
        "jpeg without rows": patched_jpeg(context.photo, 6000, 6000),
        "webp sides": webp(16383, 16383),
        "bmp sides": bmp(30000, 30000),
        "bmp negative": bmp(-5, -2**31),
        "webp lies": webp(6000, 6000),
        "scans": progressive_jpeg(6200, 6200, 3000),
    }
    accepted = {
        "png text": png(32, 32, extra=chunk(b"zTXt", b"k\0\0" + zeros)),
        "png profile": png(32, 32, extra=chunk(b"iCCP", b"k\0\0" + zeros)),
        "png of zeros": png(6200, 6200),
    }
    context.server.reset_peak()
    before = context.server.status("VmRSS")
    slowest, name_of_slowest, codes = 0, "", collections.Counter()
    for _ in range(max(1, int(5 * context.scale))):
        for name, image in {**refused, **accepted}.items():
            begin = time.monotonic()
            try:
                context.api.classify(image, timeout=300)
                code = "OK"
            except grpc.RpcError as error:
                code = error.code().name
            took = time.monotonic() - begin
            codes[code] += 1
            check(code in (("OK",) if name in accepted else ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED")),
                  f"{name}: {code}")
            if took > slowest:
                slowest, name_of_slowest = took, name
    peak = (context.server.status("VmHWM") - before) >> 10
    # One image of 40 million pixels, decoded (3 bytes each) and once more as rows of the codec.
    context.check_bound(peak < 400, f"the peak was {peak} MiB above what was resident")
    context.check_bound(slowest < 10, f"{name_of_slowest} took {slowest:.1f} s")
    return f"{dict(codes)}, slowest {name_of_slowest} {slowest:.2f} s, peak +{peak} MiB"


@case()
def compressed_messages(context):
    """Messages of zeros, a thousand times smaller on the wire: refused before they are inflated, with or without a token."""
    context.server.reset_peak()
    before = context.server.status("VmRSS")
    codes = collections.Counter()
    for port, method in ((context.server.port, "/grpc.health.v1.Health/Check"),
                         (context.server.port, "/tern.v1.ImageClassifier/Classify"),
                         (context.server.admin_port, "/tern.v1.ModelRegistry/List")):
        with grpc.insecure_channel(f"127.0.0.1:{port}", compression=grpc.Compression.Gzip,
                                   options=[("grpc.max_send_message_length", -1)]) as channel:
            try:
                channel.unary_unary(method)(bytes(100 << 20), timeout=300)
                codes["OK"] += 1
            except grpc.RpcError as error:
                codes[error.code().name] += 1
    only(codes, "UNIMPLEMENTED")
    peak = (context.server.status("VmHWM") - before) >> 10
    context.check_bound(peak < 60, f"the peak was {peak} MiB above what was resident")
    return f"{dict(codes)}, peak +{peak} MiB"


@case(growth_kib=LARGE_GROWTH_KIB)
def json_values(context):
    """JSON bodies of a million empty values, more at once than there are threads for HTTP: others are answered meanwhile."""
    context.server.reset_peak()
    before = context.server.status("VmRSS")
    n = max(100_000, int(1_000_000 * context.scale))
    bodies = [b'{"inputs":[' + b",".join([value] * n) + b"]}" for value in (b"{}", b"[]", b"0", b'{"a":{}}')]
    senders = []
    for body in bodies * 2:
        s = context.connect(context.server.metrics_port, timeout=300)
        s.sendall(b"POST /v2/models/demo/infer HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
                  b"Content-Length: %d\r\n\r\n" % len(body) + body)
        senders.append(s)
    begin = time.monotonic()
    check("tern_requests_total" in context.server.metrics(), "no metrics")
    waited = time.monotonic() - begin
    codes = collections.Counter()
    for s in senders:
        with s:
            codes[s.recv(64).split(b" ", 2)[1].decode()] += 1
    took = time.monotonic() - begin
    check(set(codes) <= {"400", "413"}, f"unexpected: {dict(codes)}")
    peak = (context.server.status("VmHWM") - before) >> 10
    context.check_bound(peak < 300, f"the peak was {peak} MiB above what was resident")
    context.check_bound(waited < 5, f"metrics took {waited:.1f} s")
    context.check_bound(took < 5 + 10 * n / 1e6, f"the bodies took {took:.1f} s")
    return f"{dict(codes)} in {took:.2f} s, metrics after {waited:.2f} s, peak +{peak} MiB"


@case(growth_kib=LARGE_GROWTH_KIB)
def oversized(context):
    """Messages and images over the limit; length prefixes that promise gigabytes."""
    n = context.count(50)
    codes = context.outcomes(context.api.classify_call,
                             (context.api.request(bytes((16 << 20) + 1 + i % 2 * (8 << 20))) for i in range(n)), window=4)
    only(codes, "RESOURCE_EXHAUSTED")
    raw = context.api.data.unary_unary("/tern.v1.ImageClassifier/Classify")
    # Field 3 (image) of 2^31 bytes, of which three come.
    lies = context.outcomes(raw, (b"\x1a\x80\x80\x80\x80\x08abc" for _ in range(n)))
    only(lies, "UNIMPLEMENTED")
    return f"{dict(codes + lies)}"


# ---------------------------------------------------------------- artifacts and disks


def quantized(context):
    """The bytes of an int8 version of the demo model, made once."""
    if not hasattr(context, "artifact"):
        q = context.protos.quantizer
        r = context.protos.registry

        def requests():
            yield q.QuantizeRequest(start=q.QuantizeStart(
                model="demo", source_version=1, recipe=context.protos.model.Recipe(
                    weights=context.protos.model.INT8, method=context.protos.model.DIRECT)))
            for photo in context.photos[:10]:
                yield q.QuantizeRequest(image=q.SampleImage(image=photo, calibration=True))

        answers = context.api.admin.stream_stream(
            "/tern.v1.Quantizer/Quantize", q.QuantizeRequest.SerializeToString, q.QuantizeResponse.FromString)
        version = [a.result.version for a in answers(requests()) if a.WhichOneof("message") == "result"][-1]
        export = context.api.admin.unary_stream(
            "/tern.v1.ModelRegistry/Export", r.ExportRequest.SerializeToString, r.ExportResponse.FromString)
        context.artifact = b"".join(
            part.chunk for part in export(r.ExportRequest(model="demo", version=version)))
        context.artifact_version = version
    return context.artifact


def position_classes(context, content):
    """Name -> offsets: one class for every kind of byte that FORMAT.md knows."""
    header_bytes, = struct.unpack("<Q", content[8:16])
    classes = {"magic": range(0, 4), "version": range(4, 8), "header length": range(8, 16), "file length": range(16, 24),
               "header checksum": range(24, 28), "preamble checksum": range(28, 32)}
    end = 32 + header_bytes
    classes["header"] = [32, 33, 32 + header_bytes // 3, 32 + header_bytes // 2, end - 1]
    padding, first, middle, last = [], [], [], []
    at = end
    # Sections are found by walking the header's last field as FORMAT.md lays them out.
    for offset, size in sections(content[32:end]):
        if offset > at:
            padding += [at, offset - 1]
        first.append(offset)
        middle.append(offset + size // 2)
        last.append(offset + size - 1)
        at = offset + size
    check(at == len(content), f"sections end at {at} of {len(content)} bytes")
    pick = max(1, len(first) // max(2, int(40 * context.scale)))
    classes.update({"padding": padding[::pick], "section begins": first[::pick], "section middle": middle[::pick],
                    "section ends": last[::pick]})
    return classes


def sections(header):
    """(offset, bytes) of each ArtifactSection, read from the wire: field 7 of the header, fields 1 and 2 of each."""
    def varint(data, at):
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value, at

    def fields(data):
        at = 0
        while at < len(data):
            tag, at = varint(data, at)
            if tag & 7 == 0:
                value, at = varint(data, at)
            elif tag & 7 == 2:
                size, at = varint(data, at)
                value, at = data[at:at + size], at + size
            else:
                size = {1: 8, 5: 4}[tag & 7]
                value, at = data[at:at + size], at + size
            yield tag >> 3, value
    for number, value in fields(header):
        if number == 7:
            entry = dict(fields(value))
            yield entry.get(1, 0), entry.get(2, 0)


@case()
def damaged_artifacts(context):
    """A flipped bit in every class of byte of a .tern file, and files cut or lengthened: refused when imported and when
    loaded from disk."""
    content = quantized(context)
    damaged = {}
    for name, offsets in position_classes(context, content).items():
        for offset in offsets:
            changed = bytearray(content)
            changed[offset] ^= 1 << context.random.randrange(8)
            damaged[f"{name} at {offset}"] = bytes(changed)
    for length in sorted({0, 1, 31, 32, 33, len(content) // 2, len(content) - 1}):
        damaged[f"cut to {length}"] = content[:length]
    damaged["a byte more"] = content + b"\0"
    codes = collections.Counter()
    before = len(context.api.versions("demo"))
    for name, bad in damaged.items():
        try:
            context.api.upload("demo", bad, artifact=True)
            raise Failure(f"{name}: imported")
        except grpc.RpcError as error:
            codes[error.code().name] += 1
            check(error.code().name in ("DATA_LOSS", "INVALID_ARGUMENT"), f"{name}: {error.code().name} {error.details()}")
    check(len(context.api.versions("demo")) == before, "an import that failed left a version")
    # From disk, as after a failing disk: a file that was good when it was published.
    good = context.api.upload("demo", content, artifact=True)
    path = pathlib.Path(context.repository, "demo", str(good.version), "model.tern")
    for name in list(damaged)[::max(1, len(damaged) // max(2, int(12 * context.scale)))]:
        context.api.version("Unload", "demo", good.version)
        path.write_bytes(damaged[name])
        try:
            context.api.version("Load", "demo", good.version)
            raise Failure(f"{name}: loaded")
        except grpc.RpcError as error:
            codes[f"load {error.code().name}"] += 1
        path.write_bytes(content)
        check(context.api.version("Load", "demo", good.version).state == context.protos.registry.READY,
              "the repaired version does not load")
    context.api.delete("demo", good.version)
    return dict(codes)


@case(own_server=True)
def full_disk(context):
    """Own server: its repository's file system is full while an artifact is written; then there is room again."""
    content = quantized(context)
    folder = tempfile.mkdtemp(prefix="tern-full-")
    # A file system of its own in a mount namespace of its own: nothing to unmount, whatever happens.
    unshare = ["unshare", "--mount"] + ([] if os.geteuid() == 0 else ["--map-root-user"])
    mount = f"mount -t tmpfs -o size=12m tern-full {folder} && exec \"$@\""
    if subprocess.run([*unshare, "sh", "-c", mount, "sh", "true"], capture_output=True).returncode != 0:
        os.rmdir(folder)
        raise Skip("a file system cannot be mounted here (needs root or user namespaces)")
    server = harness.Ternd(context.args.ternd, folder, "--demo", wrapper=[*unshare, "sh", "-c", mount, "sh"])
    api = harness.Api(server, context.protos)
    try:
        inside = pathlib.Path(f"/proc/{server.pid}/root{folder}")
        room = os.statvfs(inside)
        filler = inside / "filler"
        with open(filler, "wb", buffering=0) as f:
            f.write(bytes(room.f_bavail * room.f_frsize - len(content) // 2))
        codes = collections.Counter()
        for _ in range(10):
            try:
                api.upload("demo", content, artifact=True)
                raise Failure("an artifact was published on a full disk")
            except grpc.RpcError as error:
                codes[error.code().name] += 1
                check(error.code().name == "RESOURCE_EXHAUSTED", f"{error.code().name}: {error.details()}")
        left = [str(p.relative_to(inside)) for p in inside.rglob("*")
                if p.name.startswith((".tmp-", ".trash-")) or ".tmp." in p.name]
        check(not left, f"left behind: {left}")
        check([v.version for v in api.versions("demo")] == [1], "another version appeared")
        check(context.answer(api) == context.expected, "a wrong answer on a full disk")
        filler.unlink()
        made = api.upload("demo", content, artifact=True)
        check(made.state == context.protos.registry.READY, "no version after there was room again")
        return f"{dict(codes)}, then version {made.version}"
    finally:
        api.close()
        check(server.stop() == 0, "the server did not stop in order")
        os.rmdir(folder)


@case(own_server=True)
def no_descriptors(context):
    """Own server with 128 descriptors: more clients than it can take, and afterwards it accepts again."""
    repository = tempfile.mkdtemp(prefix="tern-fault-")
    server = harness.Ternd(context.args.ternd, repository, "--demo", wrapper=["sh", "-c", "ulimit -n 128; exec \"$@\"", "sh"])
    try:
        held = []
        for _ in range(300):
            try:
                held.append(context.connect(server.port, timeout=2))
            except OSError:
                break
        time.sleep(1)
        for s in held:
            s.close()
        check(server.alive(), "the server ended")

        def again():
            api = harness.Api(server, context.protos)
            try:
                return context.answer(api) == context.expected
            except grpc.RpcError:
                return False
            finally:
                api.close()
        poll(again, 30, "it accepts no connection any more")
        check(server.stop() == 0, "the server did not stop in order")
        return f"{len(held)} clients"
    finally:
        server.stop()
        shutil.rmtree(repository, ignore_errors=True)


@case(own_server=True)
def clock_jumps(context):
    """Own server: the system's clock is set an hour ahead, an hour back and a day ahead under calls with deadlines."""
    if context.args.sanitized:
        raise Skip("a sanitizer's runtime must be loaded before libfaketime")
    libraries = sorted(pathlib.Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    if not libraries:
        raise Skip("libfaketime is not installed")
    folder = tempfile.mkdtemp(prefix="tern-clock-")
    setting = pathlib.Path(folder, "clock")
    setting.write_text("+0")
    # Only the time of day is faked, as when somebody sets it; monotonic clocks go on.
    server = harness.Ternd(context.args.ternd, os.path.join(folder, "repository"), "--demo", "--label_memory=1000", wrapper=[
        "env", f"LD_PRELOAD={libraries[0]}", f"FAKETIME_TIMESTAMP_FILE={setting}", "FAKETIME_NO_CACHE=1",
        "FAKETIME_DONT_FAKE_MONOTONIC=1"])
    api = harness.Api(server, context.protos)
    stop = threading.Event()
    codes, longest, wrong = collections.Counter(), [0], [0]

    def load():
        while not stop.is_set():
            try:
                answer = api.classify(context.photo, timeout=20)
                codes["OK"] += 1
                wrong[0] += [c.index for c in answer.classes] != context.expected
                timing = answer.receipt.timing
                longest[0] = max(longest[0], timing.decode_us, timing.preprocess_us, timing.queue_us, timing.inference_us,
                                 timing.total_us)
            except grpc.RpcError as error:
                codes[error.code().name] += 1

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for jump in ("+3600", "-3600", "+86400", "+0"):
            time.sleep(1)
            shown = setting.with_suffix(".new")
            shown.write_text(jump)
            shown.rename(setting)
        time.sleep(1)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        text = server.metrics()
        api.close()
        status = server.stop()
        shutil.rmtree(folder, ignore_errors=True)
    only(codes, "OK")
    check(codes["OK"] > 0 and not wrong[0], f"{wrong[0]} of {codes['OK']} answers are wrong")
    check(longest[0] < 60e6, f"a receipt shows {longest[0] / 1e6:.0f} s")
    total = metric(text, "tern_request_duration_seconds_sum", method="Classify")
    check(0 <= total < 600, f"the requests took {total} s together")
    check(status == 0, f"exit status {status}")
    return f"{dict(codes)}, longest time in a receipt {longest[0] / 1e3:.0f} ms"


# ---------------------------------------------------------------- running them


def settle(context, before):
    """Waits until the server is as it was; its resources then."""
    def in_flight():
        text = context.server.metrics()
        return {name: metric(text, name) or 0 for name in ("tern_inflight_requests", "tern_queue_depth")}

    check(context.server.alive(), "the server ended:\n" + context.server.log_text()[-3000:])
    poll(lambda: not any(in_flight().values()), 60, lambda: f"still there: {in_flight()}")
    poll(lambda: context.server.resources().descriptors <= before.descriptors + SPARE_DESCRIPTORS, 60,
         lambda: f"descriptors: {before.descriptors} before, {context.server.resources().descriptors} after")
    poll(lambda: context.server.resources().threads <= before.threads + SPARE_THREADS, 60,
         lambda: f"threads: {before.threads} before, {context.server.resources().threads} after")
    check(context.api.serving(), "the health service does not say SERVING")
    check(context.answer() == context.expected, "another answer than at the start")
    return context.server.resources()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ternd", required=True)
    parser.add_argument("--source", default=str(pathlib.Path(__file__).resolve().parents[2]))
    parser.add_argument("--scale", type=float, default=1.0, help="of the counts; 1 is 100,000 garbage requests")
    parser.add_argument("--sanitized", action="store_true",
                        help="ternd has a sanitizer: bounds of memory and time are not checked, no library is preloaded")
    parser.add_argument("--only", default="", help="names of cases, separated by commas: " + ", ".join(CASES))
    args = parser.parse_args()
    lacks = harness.missing()
    if lacks:
        print(f"fault_test skipped '{lacks} not installed'")
        return SKIPPED
    names = args.only.split(",") if args.only else list(CASES)
    unknown = [name for name in names if name not in CASES]
    if unknown:
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}")

    context = Context(args)
    failed = []
    if args.sanitized:
        print("fault_test skipped 'clock_jumps, bounds of memory and time: a sanitizer is loaded first, keeps freed memory and is slow'")
    print(f"{'case':18} {'result':8} {'seconds':>8} {'RSS MiB':>15} {'descriptors':>12} {'threads':>9}  outcome", flush=True)
    try:
        for name in names:
            begin = time.monotonic()
            before = after = context.server.resources()
            try:
                if not CASES[name].own_server:
                    context.scale = args.scale / 10
                    CASES[name](context)
                    before = settle(context, before)
                context.scale = args.scale
                outcome = CASES[name](context)
                after = settle(context, before)
                context.check_bound(after.rss_kib - before.rss_kib < CASES[name].growth_kib,
                                    f"resident memory grew by {(after.rss_kib - before.rss_kib) >> 10} MiB: {outcome}")
                result = "passed"
            except Skip as skip:
                result, outcome = "skipped", str(skip)
            except (Failure, grpc.RpcError, OSError) as failure:
                result, outcome = "FAILED", str(failure)
                failed.append(name)
            if context.server.alive():
                after = context.server.resources()
            pair = lambda a, b: f"{a} -> {b}"  # noqa: E731
            print(f"{name:18} {result:8} {time.monotonic() - begin:8.1f} "
                  f"{pair(before.rss_kib >> 10, after.rss_kib >> 10):>15} "
                  f"{pair(before.descriptors, after.descriptors):>12} {pair(before.threads, after.threads):>9}  {outcome}",
                  flush=True)
            if not context.server.alive():
                print(f"the server ended with status {context.server.process.returncode}:\n" +
                      context.server.log_text()[-3000:])
                return 1
    finally:
        status = context.close()
    if status != 0:
        failed.append(f"exit status {status} after SIGTERM")
    print("failed: " + ", ".join(failed) if failed else "all as before")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
