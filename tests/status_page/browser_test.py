#!/usr/bin/env python3
"""The status page in Chromium, over a real ternd.

    browser_test.py --ternd T --ternctl C --source S

The oracle of its answers is ternctl. TERN_AXE names axe-core's axe.min.js (npm); without it the check of its rules is
skipped. Exit status 77 if Chromium is missing.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "testing"))
import chromium
import ternd

ARGS = None
SKIPPED = 77
AXE = os.environ.get("TERN_AXE")
ROWS = "document.querySelectorAll('#models-table tbody tr').length"
CARDS = "document.querySelectorAll('#answers article').length"


def photos():
    return sorted(pathlib.Path(ARGS.source, "models/demo/photos").rglob("*.jpg"))


def text(selector):
    return f"document.querySelector({json.dumps(selector)}).textContent"


class StatusPage(unittest.TestCase):
    """One browser and one server with two versions of the demo model for all."""

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp(prefix="tern-page-")
        cls.addClassCleanup(shutil.rmtree, cls.folder, ignore_errors=True)
        cls.server = ternd.Ternd(ARGS.ternd, os.path.join(cls.folder, "models"), "--demo", "--profile_every=2")
        cls.addClassCleanup(cls.server.stop)
        cls.ternctl("quantize", "--model", "demo", "--from", "1", "--weights", "int8", "--distill", "off",
                    "--calibration", os.path.join(ARGS.source, "models/demo/calibration"), "--calibration-count", "16",
                    "--evaluation", os.path.join(ARGS.source, "models/demo/photos"))
        cls.page = chromium.Page()
        cls.addClassCleanup(cls.page.close)

    @classmethod
    def environment(cls):
        return dict(os.environ, TERN_SERVER=f"127.0.0.1:{cls.server.port}", TERN_ADMIN=f"127.0.0.1:{cls.server.admin_port}")

    @classmethod
    def ternctl(cls, *words):
        done = subprocess.run([ARGS.ternctl, *words], env=cls.environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def setUp(self):
        self.page.resize(1280, 900)
        self.page.media(prefers_color_scheme="light")

    def tearDown(self):
        self.page.stub()

    def start(self, *flags, name):
        server = ternd.Ternd(ARGS.ternd, os.path.join(self.folder, name), *flags)
        self.addCleanup(server.stop)
        return server

    def open(self, server=None, rows=True):
        server = server or self.server
        self.page.open("about:blank")
        self.page.errors.clear()
        self.page.requests.clear()
        self.page.open(f"http://127.0.0.1:{server.metrics_port}/")
        if rows:
            self.page.wait(ROWS, "the models")

    def answers(self):
        """What the cards say: [{version, classes: [[label, percent]]}]."""
        return self.page.run("""[...document.querySelectorAll('#answers article')].map(card => ({
            version: card.querySelector('h3').firstChild.textContent,
            classes: [...card.querySelectorAll('li')].map(row => [
                row.querySelector('.label').textContent, parseFloat(row.querySelector('.probability').textContent)])}))""")

    def expected(self, photo, version):
        found = json.loads(self.ternctl("classify", "--model", "demo", "--version", str(version), "--top-k", "5", "--json",
                                        str(photo)))
        return [[c["label"], 100 * c["probability"]] for c in found["images"][0]["classes"]]

    def expect_answers(self, photo):
        self.page.wait(f"{CARDS} === 2", "two answers")
        answers = self.answers()
        self.assertEqual([a["version"] for a in answers], ["demo/1", "demo/2"])
        for version, answer in enumerate(answers, 1):
            expected = self.expected(photo, version)
            self.assertEqual([label for label, _ in answer["classes"]], [label for label, _ in expected])
            for (_, got), (_, want) in zip(answer["classes"], expected):
                self.assertAlmostEqual(got, want, delta=0.06)  # one decimal is shown

    def test_loads_without_errors_or_outside_requests(self):
        self.open()
        self.page.wait(f"{text('#connection')} === 'Connected'")
        self.assertEqual(self.page.run("location.pathname"), "/status/")
        self.assertEqual(self.page.errors, [])
        origin = f"http://127.0.0.1:{self.server.metrics_port}/"
        for url in self.page.requests:
            self.assertTrue(url.startswith(origin) or url == "about:blank", url)
        rows = self.page.run("[...document.querySelectorAll('#models-table tbody tr')].map(row => row.textContent)")
        self.assertEqual(len(rows), 2)
        self.assertIn("default", rows[0])
        self.assertIn("int8", rows[1])

    def test_figures_move_under_load(self):
        self.open()
        load = subprocess.Popen([ARGS.ternctl, "bench", "--model", "demo", "--version", "2", "--concurrency", "4", "--data",
                                 os.path.join(ARGS.source, "models/demo/photos"), "--seconds", "60"],
                                env=self.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            tiles = self.page.wait("""(() => {
                const tiles = Object.fromEntries([...document.querySelectorAll('#tiles > div')].map(
                    tile => [tile.children[0].textContent, tile.children[1].textContent]));
                return parseFloat(tiles['Images/s']) > 0 && parseFloat(tiles.p99) > 0 && tiles})()""", "load")
        finally:
            load.kill()
            load.wait()
        self.assertGreater(float(tiles["Memory"].split()[0]), 0)
        lines = self.page.run("[...document.querySelectorAll('path.line')].map(line => line.getAttribute('d'))")
        self.assertTrue(all(lines), lines)
        self.assertTrue(self.page.run("[...document.querySelectorAll('rect.bar')].some(b => b.getAttribute('height') > 0)"))
        label = self.page.run("document.querySelector('figure svg').getAttribute('aria-label')")
        self.assertRegex(label, r"Images per second, last 5 minutes: now [\d.,]+, most [\d.,]+")
        self.page.wait("[...document.querySelectorAll('#models-table tbody tr')][1].children[6].textContent > '0'")
        self.assertEqual(self.page.errors, [])

    def test_reads_the_text_format_and_percentiles_as_prometheus_does(self):
        self.open()
        self.page.run("""import('./metrics.js').then(m => { window.m = m;
            const text = (a, b, c) => `# HELP h x\\nh_bucket{k="v",le="1"} ${a}\\nh_bucket{k="v",le="2"} ${b}\\n` +
                `h_bucket{k="v",le="4"} ${c}\\nh_bucket{k="v",le="+Inf"} ${c + 1}\\n` +
                'odd{name="a\\\\"},{b=\\\\\\\\",other="line\\\\nbreak"} 1e3\\nplain 7\\n';
            window.first = new m.Reading(text(10, 10, 10), 0);
            window.second = new m.Reading(text(12, 16, 20), 5);
        }).then(() => 1)""")
        self.assertEqual(self.page.run("second.series('odd')[0].labels"), {"name": 'a"},{b=\\', "other": "line\nbreak"})
        self.assertEqual(self.page.run("[second.sum('odd'), second.sum('plain'), second.sum('none')]"), [1000, 7, 0])
        self.assertEqual(self.page.run("m.buckets(first, second, 'h').map(b => b.count)"), [2, 4, 4, 0])
        # Rank 5 of 10 is the third of four in 1..2; rank 9 the third of four in 2..4.
        self.assertEqual(self.page.run("m.quantile(0.5, m.buckets(first, second, 'h'))"), 1.75)
        self.assertEqual(self.page.run("m.quantile(0.9, m.buckets(first, second, 'h'))"), 3.5)
        self.assertEqual(self.page.run("m.quantile(0.5, [{le: 1, count: 0}, {le: Infinity, count: 3}])"), 1)
        self.assertTrue(self.page.run("isNaN(m.quantile(0.5, []))"))
        self.assertEqual(self.page.run("m.rate(first, second, 'h_bucket', l => l.le === '4')"), 2)
        # A counter that fell has started at 0.
        self.assertEqual(self.page.run("m.increase(second, first, 'h_bucket', l => l.le === '4')"), 10)

    def test_an_image_chosen_or_dropped_gets_the_answers_of_ternctl(self):
        self.open()
        first, second = photos()[0], photos()[40]
        self.page.choose_file("#file", str(first))
        self.expect_answers(first)
        self.page.drop_file(str(second))
        self.page.wait(f"{CARDS} < 2 || !{text('#verdict')}.startsWith('Asking')")
        self.page.wait(f"document.getElementById('picture').alt.includes('{second.name}')")
        self.expect_answers(second)
        self.page.wait(f"!{text('#verdict')}.startsWith('Asking')")
        labels = [answer["classes"][0][0] for answer in self.answers()]
        self.assertIn("All 2 versions say" if len(set(labels)) == 1 else "The versions differ",
                      self.page.run(text("#verdict")))
        self.assertEqual(self.page.errors, [])

    def test_what_is_no_image_gets_the_servers_words(self):
        self.open()
        path = os.path.join(self.folder, "text.jpg")
        pathlib.Path(path).write_text("no image")
        self.page.choose_file("#file", path)
        self.page.wait(f"{text('#verdict')} === 'No version answered.'")
        self.assertIn("image", self.page.run(text("#answers .error")))

    def test_too_large_an_image_is_not_sent(self):
        server = self.start("--demo", "--max_image_bytes=500", name="small")
        self.open(server)
        self.assertIn("at most 500 B", self.page.run(text("#limits")))
        self.page.choose_file("#file", str(photos()[0]))
        self.page.wait(f"{text('#verdict')}.includes('the limit is 500 B')")
        self.assertFalse([url for url in self.page.requests if "/v2/" in url])

    def test_asks_for_a_token_only_where_the_server_does_and_keeps_it_in_memory(self):
        tokens = os.path.join(self.folder, "tokens")
        pathlib.Path(tokens).write_text("me:correct-horse-battery\n")
        server = self.start("--demo", f"--data_token_file={tokens}", name="guarded")
        self.open(server)
        hidden = "document.getElementById('token-form').hidden"
        self.assertTrue(self.page.run(hidden))
        self.page.choose_file("#file", str(photos()[0]))
        self.page.wait(f"!{hidden}", "the form")
        self.assertEqual(self.page.run("document.activeElement.id"), "token")
        self.page.call("Input.insertText", text="a-wrong-token-of-mine")
        self.page.press("Enter")
        self.page.wait(f"{text('#verdict')}.startsWith('The token was refused')")
        self.page.call("Input.insertText", text="correct-horse-battery")
        self.page.press("Enter")
        self.page.wait(f"{CARDS} === 1 && {hidden}", "an answer")
        self.assertEqual(self.page.run("document.getElementById('token').value"), "")
        self.assertEqual(self.page.run("localStorage.length + sessionStorage.length + document.cookie.length"), 0)
        self.assertFalse([url for url in self.page.requests if "horse" in url])
        self.open(server)
        self.page.choose_file("#file", str(photos()[0]))
        self.page.wait(f"!{hidden}", "the form again: the token is gone")

    def test_names_are_text(self):
        hostile = "<img src=x onerror=window.hacked=1><b>\"'&:0:1"
        labels = os.path.join(self.folder, "labels.txt")
        pathlib.Path(labels).write_text("".join(f"{hostile}{i}\n" for i in range(10)))
        self.ternctl("import", "--name", "hostile", "--onnx", os.path.join(ARGS.source, "models/demo/model.onnx"),
                     "--preprocess", "cifar10", "--labels", labels)
        self.addCleanup(self.ternctl, "delete", "--model", "hostile", "--all")
        self.open()
        self.page.run("document.querySelectorAll('#pick input').forEach(box => "
                      "{ if (box.checked !== (box.value === 'hostile/1')) box.click(); })")
        self.page.choose_file("#file", str(photos()[0]))
        self.page.wait(f"{CARDS} === 1 && !{text('#verdict')}.startsWith('Asking')")
        self.assertTrue(self.answers()[0]["classes"][0][0].startswith(hostile))
        self.assertIn(hostile, self.page.run(text("#verdict")))
        version = {"model": "<i>x</i>", "version": 1, "default": True, "state": "ready", "scheme": "<u>s", "classes": 2,
                   "report": {"source_model": "<s>m", "source_version": 1, "warnings": ["<em>w"], "isa": "<b>"}}
        layer = {"name": "<script>window.hacked=1</script>", "kind": "<b>", "scheme": "<b>", "implementation": "<b>"}
        self.page.stub(**{"/status/models": json.dumps({"versions": [version]}),
                          "/status/models/%3Ci%3Ex%3C%2Fi%3E/versions/1": json.dumps({"layers": [layer]})})
        self.open()
        self.page.run("document.querySelector('#models-table button').click()")
        self.page.wait("document.querySelector('#layers tbody')", "the layers")
        self.assertEqual(self.page.run("document.querySelector('#layers tbody th').textContent"), layer["name"])
        self.assertEqual(self.page.run("document.querySelectorAll('main i, main u, main s, main em, main script').length"), 0)
        self.assertFalse(self.page.run("'hacked' in window"))

    def test_details_show_the_report_and_the_layers(self):
        self.open()
        self.ternctl("classify", "--model", "demo", "--version", "2", str(photos()[0]), str(photos()[1]))
        self.page.run("document.querySelector('[data-version=\"demo/2\"]').click()")
        self.page.wait("document.querySelector('#layers tbody')", "the layers")
        self.assertEqual(self.page.run("document.activeElement.id"), "details-title")
        self.assertIn("Top-1", self.page.run(text("#report")))
        columns = self.page.run("[...document.querySelectorAll('#layers thead th')].map(cell => cell.textContent)")
        rows = self.page.run("[...document.querySelectorAll('#layers tbody tr')].map(row => [...row.cells].map(c => c.textContent))")
        profile = json.loads(self.ternctl("profile", "--model", "demo", "--version", "2", "--json"))
        self.assertEqual([row[0] for row in rows], [layer["name"] for layer in profile["layers"]])
        implementation = columns.index("Implementation")
        self.assertEqual([row[implementation] for row in rows], [layer["implementation"] for layer in profile["layers"]])
        shares = [float(row[columns.index("Time")].split()[0]) for row in rows]
        self.assertAlmostEqual(sum(shares), 100, delta=1)

    def test_no_models_and_a_hundred_versions(self):
        empty = self.start(name="empty")
        self.open(empty, rows=False)
        self.page.wait(f"{text('#models-note')}.includes('no models yet')")
        self.assertEqual(self.page.run(text("#pick")), "No version is ready.")
        self.page.choose_file("#file", str(photos()[0]))
        self.page.wait(f"{text('#verdict')} === 'Choose at least one version.'")
        self.assertEqual(self.page.errors, [])
        versions = [{"model": f"model-{i % 10}", "version": i + 1, "default": i < 10,
                     "state": "unavailable" if i == 99 else "ready", "scheme": "int8", "bits_per_weight": 8, "bytes": 1e6,
                     "classes": 10} for i in range(100)]
        self.page.stub(**{"/status/models": json.dumps({"versions": versions})})
        self.open()
        self.assertEqual(self.page.run(ROWS), 100)
        self.assertIn("unavailable", self.page.run(text("#models-table")))
        self.assertEqual(self.page.run("document.querySelectorAll('#pick label').length"), 99)
        self.page.run("document.querySelector('#models-filter input').focus()")
        self.page.call("Input.insertText", text="model-3/")
        self.page.wait("[...document.querySelectorAll('#models-table tbody tr')].filter(row => !row.hidden).length === 10")
        self.page.resize(360, 740, mobile=True)
        self.assertLessEqual(self.page.run("document.documentElement.scrollWidth"), 360)

    def test_says_when_the_server_is_gone_and_back(self):
        first = self.start("--demo", name="restarted")
        port = first.metrics_port
        self.open(first)
        self.page.wait(f"{text('#connection')} === 'Connected'")
        first.stop()
        self.page.wait(f"{text('#connection')}.startsWith('No answer since')", "the loss")
        self.start("--demo", f"--metrics_port={port}", name="restarted")
        self.page.wait(f"{text('#connection')}.startsWith('The server was started again')", "the return")
        self.assertEqual(self.page.run(ROWS), 1)

    def test_a_phone_needs_no_sideways_scrolling(self):
        self.open()
        self.page.resize(360, 740, mobile=True)
        self.page.choose_file("#file", str(photos()[0]))
        self.page.wait(f"{CARDS} === 2")
        self.page.run("document.querySelector('[data-version=\"demo/2\"]').click()")
        self.page.wait("document.querySelector('#layers tbody')")
        self.assertLessEqual(self.page.run("document.documentElement.scrollWidth"), 360)

    def test_the_keyboard_reaches_everything(self):
        self.open()
        self.page.wait(f"{text('#connection')} === 'Connected'")
        wanted = self.page.run("""[...document.querySelectorAll('a[href], button, input, [tabindex="0"]')].filter(
            e => e.checkVisibility()).map((e, i) => { e.dataset.tab = i; return i; })""")
        reached = []
        for _ in range(len(wanted) + 5):
            self.page.press("Tab")
            at = self.page.run("document.activeElement.dataset.tab")
            if at is None:
                break
            reached.append(int(at))
            self.assertTrue(self.page.run("""(() => { const e = document.activeElement;
                return getComputedStyle(e.closest('.button') ?? e).outlineStyle !== 'none'; })()"""), f"no focus ring at {at}")
        self.assertEqual(reached, wanted, "in the order of the page")
        self.page.run("document.querySelector('#pause').focus()")
        self.page.press(" ")
        self.page.wait("document.querySelector('#pause').getAttribute('aria-pressed') === 'true'")
        self.page.run("document.querySelector('[data-version=\"demo/2\"]').focus()")
        self.page.press("Enter")
        self.page.wait("document.activeElement.id === 'details-title'")

    @unittest.skipUnless(AXE, "TERN_AXE does not name axe-core's axe.min.js")
    def test_axe_finds_no_violations(self):
        for scheme, width in (("light", 1280), ("dark", 360)):
            self.page.resize(width, 900)
            self.page.media(prefers_color_scheme=scheme)
            self.open()
            self.page.choose_file("#file", str(photos()[0]))
            self.page.wait(f"{CARDS} === 2")
            self.page.run("document.querySelector('[data-version=\"demo/2\"]').click()")
            self.page.wait("document.querySelector('#layers tbody')")
            self.page.run("document.getElementById('token-form').hidden = false")
            self.page.run(pathlib.Path(AXE).read_text() + "; 1")
            violations = self.page.run("""axe.run().then(result => result.violations.map(
                v => `${v.id}: ${v.help}: ${v.nodes.map(n => n.target).join(' ')}`))""")
            self.assertEqual(violations, [], scheme)


def main():
    global ARGS
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ternd", required=True)
    parser.add_argument("--ternctl", required=True)
    parser.add_argument("--source", required=True)
    parser.add_argument("--only", help="tests whose names hold this")
    ARGS = parser.parse_args()
    ARGS.source = os.path.abspath(ARGS.source)
    if chromium.PROGRAM is None:
        print("browser_test skipped 'chromium is not installed'")
        return SKIPPED
    loader = unittest.TestLoader()
    if ARGS.only:
        loader.testNamePatterns = [f"*{ARGS.only}*"]
    result = unittest.TextTestRunner(verbosity=2).run(loader.loadTestsFromTestCase(StatusPage))
    return 0 if result.wasSuccessful() else 1


if __name__ == "__main__":
    sys.exit(main())
