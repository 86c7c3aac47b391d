#!/usr/bin/env python3
"""Times whole networks in Tern and in other engines, side by side on this machine.

    tests/interop/onnxruntime/make_venv.sh build/peers openvino matplotlib
    build/peers/bin/python bench/compare_peers.py resnet50.onnx --isa avx2 --json out.json --plot out.svg

Peers, where this Python has them: onnxruntime and openvino, each in float and in int8. The int8 network of both is
what onnxruntime's static quantiser makes of the float one (QDQ, u8 activations, s8 weights per channel), calibrated with
noise: the speed is typical, the accuracy is not. Tern's schemes run in engine_bench from the same ONNX file. So does the
peer onednn: Tern's plan with every int8 layer left to oneDNN (scheme int8:onednn).

Tern and each network of a peer are processes of their own, on the same CPUs with the same number of threads, and stand
still (SIGSTOP) while another one runs. A round runs all of them in a new order: one run that is not timed, then --runs timed ones.
The table goes to stdout as Markdown.

--isa caps Tern and its oneDNN. OpenVINO's oneDNN obeys ONEDNN_MAX_CPU_ISA; OpenVINO's own kernels obey OV_CPU_MAX_ISA in
debug builds only, so the JSON file lists which kernels it says it ran. onnxruntime has no such cap.
"""

import argparse
import collections
import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time

SOURCE = pathlib.Path(__file__).resolve().parents[1]
PEERS = ("onnxruntime", "openvino")
ONEDNN_CAPS = {"native": None, "avx512vnni": "AVX512_CORE_VNNI", "avx2": "AVX2", "scalar": "SSE41"}
CPU_FLAGS = ("avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "amx_int8")


# --- the peers, each in a process of its own ---------------------------------------------------------------------

def onnxruntime_session(spec):
    """(run, description)."""
    import numpy as np
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = spec["threads"]
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(spec["file"], options, providers=["CPUExecutionProvider"])
    declared = session.get_inputs()[0]
    binding = session.io_binding()
    binding.bind_cpu_input(declared.name, noise(np, declared.shape, 2))
    binding.bind_output(session.get_outputs()[0].name)
    return lambda: session.run_with_iobinding(binding), {"version": onnxruntime.__version__}


def openvino_session(spec):
    import numpy as np
    import openvino
    compiled = openvino.Core().compile_model(spec["file"], "CPU", {
        "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": spec["threads"],
        # This process is pinned already; and float means float, where bfloat16 would be the default.
        "ENABLE_CPU_PINNING": False, "INFERENCE_PRECISION_HINT": "f32"})
    request = compiled.create_infer_request()
    data = noise(np, list(compiled.input(0).shape), 2)
    request.set_input_tensor(openvino.Tensor(data, shared_memory=True))
    kernels = collections.Counter()
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        if info["layerType"].astype(str) in ("Convolution", "GroupConvolution", "FullyConnected", "MatMul"):
            kernels[info["primitiveType"].astype(str)] += 1
    return request.infer, {"version": openvino.__version__, "implementations": dict(kernels), "input": data.shape}


def noise(np, shape, seed):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def work(spec):
    """Body of a peer's process: the protocol of `engine_bench --serve`."""
    run, ready = {"onnxruntime": onnxruntime_session, "openvino": openvino_session}[spec["engine"]](spec)
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        run()
        milliseconds = []
        for _ in range(int(line.split()[1])):
            begin = time.perf_counter()
            run()
            milliseconds.append((time.perf_counter() - begin) * 1e3 / spec["batch"])
        print(json.dumps({"ms": milliseconds}), flush=True)


# --- networks for the peers --------------------------------------------------------------------------------------

def input_of(model):
    constants = {tensor.name for tensor in model.graph.initializer}
    return next(value for value in model.graph.input if value.name not in constants)


def with_batch(onnx, source, batch, target):
    """Writes the network with this batch size (None: any) to `target`."""
    model = onnx.load(source)
    for value in (input_of(model), model.graph.output[0]):
        dimension = value.type.tensor_type.shape.dim[0]
        dimension.Clear()
        if batch is None:
            dimension.dim_param = "N"
        else:
            dimension.dim_value = batch
    del model.graph.value_info[:]
    onnx.save(model, target)


def quantised(onnx, network, folder):
    """onnxruntime's int8 form of the network, any batch size; made once per folder and content."""
    import numpy as np
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process
    digest = hashlib.sha256(pathlib.Path(network).read_bytes()).hexdigest()[:16]
    target = folder / f"{pathlib.Path(network).stem}-{digest}-int8.onnx"
    if target.exists():
        return target
    free, prepared, partial = (folder / f"{target.stem}.{part}" for part in ("free", "prepared", "partial"))
    with_batch(onnx, network, None, free)
    quant_pre_process(str(free), str(prepared), skip_symbolic_shape=True)
    value = input_of(onnx.load(prepared))
    shape = [1] + [d.dim_value for d in value.type.tensor_type.shape.dim[1:]]

    class Noise(quantization.CalibrationDataReader):
        def __init__(self):
            self.feeds = iter([{value.name: noise(np, shape, seed)} for seed in range(4)])

        def get_next(self):
            return next(self.feeds, None)

    quantization.quantize_static(
        str(prepared), str(partial), Noise(), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
        activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8)
    partial.rename(target)
    free.unlink()
    prepared.unlink()
    return target


# --- measuring ---------------------------------------------------------------------------------------------------

class Failure(Exception):
    pass


class Process:
    """A program that speaks the protocol; stopped except while it answers."""

    def __init__(self, command, environment, cpus):
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
                                        env={**os.environ, **environment},
                                        preexec_fn=lambda: os.sched_setaffinity(0, cpus))
        try:
            self.ready = self.answer()
        except Failure:
            self.close()
            raise

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            said = self.errors.read().strip().splitlines()
            raise Failure(said[-1] if said else f"ended with status {self.process.returncode}")
        self.process.send_signal(signal.SIGSTOP)
        return json.loads(line)

    def run(self, scheme, runs):
        self.process.send_signal(signal.SIGCONT)
        try:
            self.process.stdin.write(f"{scheme} {runs}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # answer() says why
        return self.answer()["ms"]

    def close(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.errors.close()


Contender = collections.namedtuple("Contender", "engine scheme process")


def measure(contenders, rounds, runs, seed=0):
    """{(engine, scheme): milliseconds per image}, and {(engine, scheme): reason} of those that failed."""
    order = random.Random(seed)
    samples = {(c.engine, c.scheme): [] for c in contenders}
    failures = {}
    for _ in range(rounds):
        for contender in order.sample(contenders, len(contenders)):
            key = (contender.engine, contender.scheme)
            if key in failures:
                continue
            try:
                samples[key] += contender.process.run(contender.scheme, runs)
            except Failure as failure:
                failures[key] = str(failure)
    return {key: ms for key, ms in samples.items() if ms and key not in failures}, failures


def summary(milliseconds):
    ordered = sorted(milliseconds)
    quartiles = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    return {"runs": len(ordered), "min": ordered[0], "q1": quartiles[0], "median": quartiles[1], "q3": quartiles[2]}


def named(engine, scheme):
    """The engine and scheme under which a contender is reported."""
    return ("onednn", scheme.removesuffix(":onednn")) if scheme.endswith(":onednn") else (engine, scheme)


def precision(scheme):
    return scheme if scheme in ("float", "int8") else "low"


def add_ratios(rows):
    """Speed over the best peer (least median) in float and in int8, for the rows of one network and batch size."""
    for kind in ("float", "int8"):
        peers = [row for row in rows if row["engine"] != "tern" and precision(row["scheme"]) == kind]
        if not peers:
            continue
        best = min(peers, key=lambda row: row["median"])
        for row in rows:
            row[f"over_best_{kind}"] = {"peer": best["engine"], "median": best["median"] / row["median"],
                                        "min": min(peer["min"] for peer in peers) / row["min"]}


# --- reporting ---------------------------------------------------------------------------------------------------

def table(report):
    """Markdown."""
    machine = report["machine"]
    lines = [f"{machine['cpu']} ({' '.join(machine['flags'])}), {report['threads']} thread(s) on CPU "
             f"{','.join(map(str, report['cpus']))}, cap {report['isa']}; "
             + ", ".join(f"{name} {version}" for name, version in sorted(report["versions"].items()))
             + f"; load average {machine['load_before']:.1f} before, {machine['load_after']:.1f} after.",
             "Milliseconds per image; ratios by medians, by minima in brackets, above 1 is faster than the best peer.", ""]

    def ratio(row, kind):
        found = row.get(f"over_best_{kind}")
        return f"{found['median']:.2f}x ({found['min']:.2f}x)" if found else ""

    groups = collections.defaultdict(list)
    for row in report["results"]:
        groups[row["network"], row["batch"]].append(row)
    for (network, batch), rows in groups.items():
        lines += [f"**{network}, batch {batch}**", "",
                  "| engine | scheme | median | quartiles | min | over best float peer | over best int8 peer |",
                  "|---|---|---|---|---|---|---|"]
        lines += [f"| {row['engine']} | {row['scheme']} | {row['median']:.3f} | {row['q1']:.3f} - {row['q3']:.3f} | {row['min']:.3f} "
                  f"| {ratio(row, 'float')} | {ratio(row, 'int8')} |" for row in rows]
        lines.append("")
    lines += [f"- {note}" for note in report["notes"]]
    return "\n".join(lines).rstrip() + "\n"


def plot(report, path):
    """Medians with quartiles as bars, one panel per network and batch size; raises ImportError without matplotlib."""
    import matplotlib
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "tern", "svg.fonttype": "none"})
    from matplotlib import pyplot
    groups = collections.defaultdict(list)
    for row in report["results"]:
        groups[row["network"], row["batch"]].append(row)
    colours = {"tern": "tab:blue", "onednn": "tab:red", "onnxruntime": "tab:orange", "openvino": "tab:green"}
    tallest = max(len(rows) for rows in groups.values())
    figure, axes = pyplot.subplots(len(groups), 1, figsize=(7, len(groups) * (0.9 + 0.28 * tallest)), squeeze=False,
                                   layout="constrained")
    for axis, ((network, batch), rows) in zip(axes[:, 0], groups.items()):
        medians = [row["median"] for row in rows]
        spread = [[row["median"] - row["q1"] for row in rows], [row["q3"] - row["median"] for row in rows]]
        axis.barh(range(len(rows)), medians, xerr=spread, color=[colours.get(row["engine"], "tab:gray") for row in rows])
        axis.set_yticks(range(len(rows)), [f"{row['engine']} {row['scheme']}" for row in rows])
        axis.invert_yaxis()
        axis.set_title(f"{network}, batch {batch}, cap {report['isa']}", loc="left")
        axis.set_xlabel("ms per image (median, quartiles)")
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def machine():
    text = pathlib.Path("/proc/cpuinfo").read_text()
    name = re.search(r"^model name\s*:\s*(.*)", text, re.M)
    flags = re.search(r"^flags\s*:\s*(.*)", text, re.M)
    have = flags.group(1).split() if flags else []
    return {"cpu": name.group(1) if name else platform.machine(), "flags": [flag for flag in CPU_FLAGS if flag in have],
            "cpus": os.cpu_count(), "kernel": platform.release(), "load_before": os.getloadavg()[0]}


def revision():
    found = subprocess.run(["git", "-C", str(SOURCE), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def cap_notes(isa, flags):
    if isa == "native":
        return []
    notes = ["OpenVINO: its oneDNN is capped (ONEDNN_MAX_CPU_ISA), its own kernels only in debug builds (OV_CPU_MAX_ISA); "
             "`implementations` in the JSON file says what it ran."]
    if isa in ("avx2", "scalar") and any(flag.startswith(("avx512", "avx_vnni")) for flag in flags):
        notes.append("onnxruntime cannot be capped and may use more than the cap on this CPU: its rows are "
                     "better than on a CPU that has no more.")
    return notes


# --- main --------------------------------------------------------------------------------------------------------

def available():
    found = {}
    for peer in PEERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[peer] = importlib.metadata.version(peer)
    return found


def launches(args, network, batch, peers, folder):
    """(engine, schemes, command, environment) of each process, or (engine, schemes, Failure)."""
    yield ("tern", args.schemes, [args.engine_bench, "--serve", "--expand", "--onnx", network, "--isa", args.isa,
                                  "--batch", str(batch), "--threads", str(args.threads), "--schemes", ",".join(args.schemes)], {})
    cap = ONEDNN_CAPS[args.isa]
    environment = {name: cap for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "OV_CPU_MAX_ISA")} if cap else {}
    for scheme in ("float", "int8"):
        if not peers:
            return
        try:
            import onnx
            source = network if scheme == "float" else quantised(onnx, network, folder)
            file = folder / f"{pathlib.Path(source).stem}-b{batch}.onnx"
            with_batch(onnx, source, batch, file)
        except Exception as error:  # other people's quantiser, on any network
            for peer in peers:
                yield peer, [scheme], Failure(f"no network: {type(error).__name__}: {error}")
            continue
        for peer in peers:
            spec = {"engine": peer, "file": str(file), "threads": args.threads, "batch": batch}
            yield peer, [scheme], [sys.executable, __file__, "--worker", json.dumps(spec)], environment


def compare(args, peers, folder):
    report = {"date": datetime.datetime.now().isoformat(timespec="seconds"), "machine": machine(), "isa": args.isa,
              "threads": args.threads, "cpus": args.cpus, "rounds": args.rounds, "runs": args.runs,
              "versions": {"tern": revision(), **peers}, "results": [], "notes": []}
    notes = report["notes"]
    for peer in PEERS:
        if peer not in peers:
            notes.append(f"{peer} is not installed in {sys.executable}: its rows are left out "
                         "(tests/interop/onnxruntime/make_venv.sh makes an environment).")
    if peers:
        notes += cap_notes(args.isa, report["machine"]["flags"])
    for network in args.networks:
        for batch in args.batch:
            name = pathlib.Path(network).stem
            print(f"{name}, batch {batch}", file=sys.stderr)
            contenders, ready = [], {}
            with contextlib.ExitStack() as running:
                for engine, schemes, *launch in launches(args, network, batch, peers, folder):
                    try:
                        if isinstance(launch[0], Failure):
                            raise launch[0]
                        process = Process(*launch, args.cpus)
                    except (Failure, OSError) as failure:
                        notes.append(f"{engine} {' '.join(schemes)}, {name}, batch {batch}: {failure}")
                        continue
                    running.callback(process.close)
                    ready[engine] = process.ready
                    for scheme in schemes:
                        contenders.append(Contender(engine, scheme, process))
                        ready[engine, scheme] = process.ready.get("schemes", {}).get(scheme, process.ready)
                samples, failures = measure(contenders, args.rounds, args.runs)
            notes += [f"{engine} {scheme}, {name}, batch {batch}: {reason}" for (engine, scheme), reason in failures.items()]
            if "onednn" in ready.get("tern", {}):
                report["versions"]["onednn"] = ready["tern"]["onednn"]
            rows = [{"network": name, "batch": batch, **dict(zip(("engine", "scheme"), named(engine, scheme))), **summary(ms), "ms": ms,
                     "implementations": ready[engine, scheme].get("implementations", {})}
                    for (engine, scheme), ms in samples.items()]
            add_ratios(rows)
            report["results"] += rows
    report["machine"]["load_after"] = os.getloadavg()[0]
    return report


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", help="float ONNX files")
    parser.add_argument("--engine-bench", default=str(SOURCE / "build/release/bin/engine_bench"))
    parser.add_argument("--schemes", default="float,int8,ternary:4,ternary:16,ternary:64,int4:64,int8:onednn",
                        help="Tern's, as for engine_bench; .tern files too")
    parser.add_argument("--peers", default=",".join(PEERS), help="which peers, by name")
    parser.add_argument("--isa", default="native", choices=ONEDNN_CAPS)
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpus", help="CPUs to run on (default: the last ones that this process may use, one per thread)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--runs", type=int, default=3, help="timed runs per round")
    parser.add_argument("--work", help="folder that keeps the quantised networks (default: none)")
    parser.add_argument("--json", help="file for everything that was measured")
    parser.add_argument("--plot", help="SVG file; needs matplotlib")
    args = parser.parse_args(argv)
    args.batch = [int(batch) for batch in args.batch.split(",")]
    args.schemes = args.schemes.split(",")
    args.peers = [peer for peer in args.peers.split(",") if peer]
    if unknown := set(args.peers) - set(PEERS):
        parser.error(f"unknown peers {', '.join(sorted(unknown))}; known: {', '.join(PEERS)}")
    usable = sorted(os.sched_getaffinity(0))
    args.cpus = [int(cpu) for cpu in args.cpus.split(",")] if args.cpus else usable[-args.threads:]
    if min(args.threads, args.rounds, args.runs, *args.batch) < 1:
        parser.error("threads, rounds, runs and batch sizes are positive")
    if len(args.cpus) < args.threads or not set(args.cpus) <= set(usable):
        parser.error(f"{args.threads} threads on CPUs {args.cpus}; usable are {usable}")
    return args


def main(argv):
    if argv[:1] == ["--worker"]:
        work(json.loads(argv[1]))
        return 0
    args = arguments(argv)
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(args.work or stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        report = compare(args, {peer: version for peer, version in available().items() if peer in args.peers}, folder)
    print(table(report), end="")
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    if args.plot and report["results"]:
        try:
            plot(report, args.plot)
        except ImportError as error:
            print(f"no plot: {error}", file=sys.stderr)
    return 0 if report["results"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
