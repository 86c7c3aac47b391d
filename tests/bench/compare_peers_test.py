#!/usr/bin/env python3
"""bench/compare_peers.py with made-up times: needs no peer, no network and no engine_bench.

    compare_peers_test.py --source SOURCE
"""

import argparse
import contextlib
import importlib.util
import io
import json
import pathlib
import stat
import sys
import tempfile
import time
import unittest
from unittest import mock

compare_peers = None  # loaded in main

# Speaks the protocol of `engine_bench --serve`: the n-th timed run of a scheme takes 10 + n ms, of "fast" 1 ms.
FAKE_ENGINE = """#!{python}
import json, sys
flags = dict(zip(sys.argv[1:], sys.argv[2:]))
schemes = flags["--schemes"].split(",")
if "broken" in schemes:
    sys.exit("engine_bench: unknown scheme broken")
print(json.dumps({{"onednn": "0.0.1", "isa": flags["--isa"],
                  "schemes": {{s: {{"implementations": {{"k:" + s: 2}}}} for s in schemes}}}}), flush=True)
count = 0
for line in sys.stdin:
    scheme, runs = line.split()
    if scheme == "dies":
        sys.exit("out of luck")
    out = []
    for _ in range(int(runs)):
        count += 1
        out.append(1 if scheme == "fast" else 10 + count)
    print(json.dumps({{"ms": out}}), flush=True)
"""


def row(engine, scheme, *milliseconds):
    return {"network": "net", "batch": 1, "engine": engine, "scheme": scheme, "ms": list(milliseconds),
            **compare_peers.summary(milliseconds)}


class Recorder:
    def __init__(self, log, name, fails_at=None):
        self.log, self.name, self.fails_at, self.count = log, name, fails_at, 0

    def run(self, scheme, runs):
        self.count += 1
        if self.count == self.fails_at:
            raise compare_peers.Failure("out of luck")
        self.log.append(self.name)
        return [float(self.count)] * runs


class StatisticsTest(unittest.TestCase):
    def test_a_summary_has_the_minimum_the_median_and_both_quartiles(self):
        self.assertEqual(compare_peers.summary([5, 1, 2, 4, 3]), {"runs": 5, "min": 1, "q1": 2, "median": 3, "q3": 4})
        self.assertEqual(compare_peers.summary([7.0]), {"runs": 1, "min": 7, "q1": 7, "median": 7, "q3": 7})

    def test_ratios_are_over_the_peer_with_the_least_median_of_the_same_precision(self):
        rows = [row("tern", "float", 8, 8, 8), row("tern", "ternary:64", 2, 1, 2), row("onnxruntime", "float", 9, 10, 11),
                row("openvino", "float", 5, 12, 13), row("onnxruntime", "int8", 3, 6, 7), row("openvino", "int8", 4, 4, 4)]
        compare_peers.add_ratios(rows)
        ours = rows[1]
        self.assertEqual(ours["over_best_float"], {"peer": "onnxruntime", "median": 5.0, "min": 5.0})
        self.assertEqual(ours["over_best_int8"], {"peer": "openvino", "median": 2.0, "min": 3.0})
        self.assertEqual(rows[5]["over_best_int8"]["median"], 1.0)

    def test_onednn_alone_is_a_peer(self):
        self.assertEqual(compare_peers.named("tern", "int8:onednn"), ("onednn", "int8"))
        self.assertEqual(compare_peers.named("tern", "int8"), ("tern", "int8"))
        rows = [row("tern", "int8", 10), row("onednn", "int8", 20), row("openvino", "int8", 30)]
        compare_peers.add_ratios(rows)
        self.assertEqual(rows[0]["over_best_int8"], {"peer": "onednn", "median": 2.0, "min": 2.0})

    def test_without_peers_there_are_no_ratios(self):
        rows = [row("tern", "float", 8), row("tern", "int8", 4)]
        compare_peers.add_ratios(rows)
        self.assertNotIn("over_best_float", rows[1])
        self.assertNotIn("over_best_int8", rows[1])


class MeasureTest(unittest.TestCase):
    def test_every_round_runs_every_contender_once_in_a_changing_order(self):
        log = []
        contenders = [compare_peers.Contender(name, "float", Recorder(log, name)) for name in "abcd"]
        samples, failures = compare_peers.measure(contenders, rounds=20, runs=2)
        rounds = [log[i:i + 4] for i in range(0, len(log), 4)]
        self.assertEqual(len(rounds), 20)
        for order in rounds:
            self.assertEqual(sorted(order), list("abcd"))
        self.assertGreater(len(set(map(tuple, rounds))), 5)
        self.assertEqual(samples["a", "float"], [float(i // 2 + 1) for i in range(40)])
        self.assertEqual(failures, {})

    def test_a_contender_that_fails_is_named_and_leaves_the_others_alone(self):
        log = []
        contenders = [compare_peers.Contender("good", "int8", Recorder(log, "good")),
                      compare_peers.Contender("bad", "int8", Recorder(log, "bad", fails_at=3))]
        samples, failures = compare_peers.measure(contenders, rounds=6, runs=1)
        self.assertEqual(failures, {("bad", "int8"): "out of luck"})
        self.assertEqual(list(samples), [("good", "int8")])
        self.assertEqual(len(samples["good", "int8"]), 6)
        self.assertEqual(log.count("bad"), 2)


class WholeTest(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.folder = pathlib.Path(scratch.name)
        self.engine = self.folder / "engine_bench"
        self.engine.write_text(FAKE_ENGINE.format(python=sys.executable))
        self.engine.chmod(self.engine.stat().st_mode | stat.S_IXUSR)

    def compare(self, *flags):
        """(status, what was printed, JSON)."""
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()), \
                mock.patch.object(compare_peers, "available", dict):
            status = compare_peers.main(["net.onnx", "--engine-bench", str(self.engine), "--json", str(self.folder / "out.json"),
                                         *flags])
        return status, out.getvalue(), json.loads((self.folder / "out.json").read_text())

    def test_the_json_file_has_every_run_and_the_machine(self):
        status, _, report = self.compare("--schemes", "float,fast", "--batch", "1,8", "--rounds", "4", "--runs", "3",
                                         "--isa", "avx2")
        self.assertEqual(status, 0)
        self.assertEqual([(r["network"], r["batch"], r["engine"], r["scheme"]) for r in report["results"]],
                         [("net", 1, "tern", "float"), ("net", 1, "tern", "fast"), ("net", 8, "tern", "float"), ("net", 8, "tern", "fast")])
        for result in report["results"]:
            self.assertEqual(len(result["ms"]), 12)
            self.assertEqual(result["implementations"], {"k:" + result["scheme"]: 2})
        self.assertEqual(report["results"][1]["median"], 1)
        self.assertEqual(report["versions"]["onednn"], "0.0.1")
        self.assertEqual((report["isa"], report["threads"], len(report["cpus"])), ("avx2", 1, 1))
        self.assertTrue(report["machine"]["cpu"])

    def test_the_table_has_a_row_per_contender_and_says_which_peers_are_missing(self):
        _, printed, _ = self.compare("--schemes", "float,fast", "--batch", "8", "--rounds", "2")
        self.assertIn("**net, batch 8**", printed)
        self.assertIn("| tern | fast | 1.000 | 1.000 - 1.000 | 1.000 |  |  |", printed)
        for peer in ("onnxruntime", "openvino"):
            self.assertIn(f"- {peer} is not installed", printed)

    def test_an_engine_that_does_not_start_is_a_note_with_its_own_words(self):
        status, printed, report = self.compare("--schemes", "broken", "--batch", "1")
        self.assertEqual((status, report["results"]), (1, []))
        self.assertIn("- tern broken, net, batch 1: engine_bench: unknown scheme broken", printed)

    def test_an_engine_that_dies_loses_its_rows_and_says_why(self):
        _, printed, report = self.compare("--schemes", "dies", "--batch", "1", "--rounds", "2")
        self.assertEqual(report["results"], [])
        self.assertIn("- tern dies, net, batch 1: out of luck", printed)

    def test_a_process_stands_still_between_its_turns(self):
        command = [str(self.engine), "--serve", "--schemes", "float", "--isa", "native"]
        process = compare_peers.Process(command, {}, compare_peers.arguments(["net.onnx"]).cpus)
        try:
            for _ in range(3):
                state, deadline = "", time.monotonic() + 30
                while state != "T":  # the signal's delivery takes a moment
                    state = pathlib.Path(f"/proc/{process.process.pid}/stat").read_text().rsplit(") ")[1][0]
                    self.assertLess(time.monotonic(), deadline, f"in state {state}")
                self.assertEqual(len(process.run("float", 2)), 2)
        finally:
            process.close()

    def test_the_plot_shows_every_contender(self):
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            self.skipTest("matplotlib is not installed: no plot of bench/compare_peers.py")
        rows = [row("tern", "ternary:64", 2, 1, 2), row("openvino", "int8", 4, 4, 4)]
        compare_peers.plot({"isa": "avx2", "results": rows}, self.folder / "plot.svg")
        picture = (self.folder / "plot.svg").read_text()
        for text in ("tern ternary:64", "openvino int8", "net, batch 1, cap avx2"):
            self.assertIn(text, picture)


class CapTest(unittest.TestCase):
    def test_a_cap_that_a_peer_can_break_is_in_the_notes(self):
        self.assertEqual(compare_peers.cap_notes("native", ["avx2", "avx512f"]), [])
        notes = "\n".join(compare_peers.cap_notes("avx2", ["avx2", "avx512f"]))
        self.assertIn("onnxruntime cannot be capped", notes)
        self.assertIn("OpenVINO", notes)
        self.assertNotIn("onnxruntime", "\n".join(compare_peers.cap_notes("avx2", ["avx2", "fma"])))

    def test_the_peers_get_the_cap_in_their_environment(self):
        args = compare_peers.arguments(["net.onnx", "--isa", "avx2"])
        with mock.patch.dict(sys.modules, onnx=mock.MagicMock()), \
                mock.patch.object(compare_peers, "quantised", lambda *_: "net-int8.onnx"), \
                mock.patch.object(compare_peers, "with_batch"):
            launches = list(compare_peers.launches(args, "net.onnx", 1, {"onnxruntime": "1", "openvino": "2"}, pathlib.Path(".")))
        self.assertEqual([(engine, schemes) for engine, schemes, *_ in launches[1:]],
                         [(peer, [scheme]) for scheme in ("float", "int8") for peer in ("onnxruntime", "openvino")])
        self.assertIn("avx2", launches[0][2])
        for *_, environment in launches[1:]:
            self.assertEqual(environment["ONEDNN_MAX_CPU_ISA"], "AVX2")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", required=True)
    arguments, rest = parser.parse_known_args()
    spec = importlib.util.spec_from_file_location("compare_peers", pathlib.Path(arguments.source, "bench/compare_peers.py"))
    compare_peers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compare_peers)
    unittest.main(argv=[sys.argv[0], *rest], verbosity=2)
