#!/usr/bin/env python3
"""The pictures of the status page in docs/images, taken from a real server under load.

    status_screenshots.py BUILD [OUT]

Starts ternd on free ports, quantises the demo model twice, sends it photographs for a while and takes three pictures with
Chromium: the page on a desktop, and on a phone in the dark its figures and an image's answers.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import time

SOURCE = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(SOURCE / "tests/testing"))
import chromium
import ternd

SECONDS = 150  # of load, so that the charts have something to show
PHOTOS = SOURCE / "models/demo/photos"


def main():
    build = pathlib.Path(sys.argv[1]).resolve()
    out = pathlib.Path(sys.argv[2] if len(sys.argv) > 2 else SOURCE / "docs/images")
    out.mkdir(parents=True, exist_ok=True)
    ternctl = str(build / "bin/ternctl")
    with tempfile.TemporaryDirectory(prefix="tern-screenshots-") as folder:
        server = ternd.Ternd(str(build / "bin/ternd"), os.path.join(folder, "models"), "--demo", "--profile_every=20")
        environment = dict(os.environ, TERN_SERVER=f"127.0.0.1:{server.port}", TERN_ADMIN=f"127.0.0.1:{server.admin_port}")
        page = load = None
        try:
            for recipe in (["--weights", "int8"], ["--weights", "int4", "--cluster", "16"],
                           ["--weights", "ternary", "--cluster", "4"]):
                subprocess.run([ternctl, "quantize", "--model", "demo", "--from", "1", *recipe, "--distill", "off", "--seed", "0",
                                "--calibration", str(SOURCE / "models/demo/calibration"), "--evaluation", str(PHOTOS)],
                               env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            page = chromium.Page(1280, 960)
            page.open(f"http://127.0.0.1:{server.metrics_port}/")
            # Three rates one after another, so that the lines have a shape.
            for rate, version in ((40, 1), (120, 2), (80, 4)):
                load = subprocess.Popen([ternctl, "bench", "--model", "demo", "--version", str(version), "--data", str(PHOTOS),
                                         "--rate", str(rate), "--seconds", str(SECONDS // 3)],
                                        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                if version != 4:
                    load.wait()
            time.sleep(SECONDS // 3 - 20)
            page.choose_file("#file", str(sorted(PHOTOS.rglob("*.jpg"))[0]))
            page.wait("document.querySelectorAll('#answers article').length === 4")
            page.resize(1280, 960)
            page.screenshot(out / "status-desktop.png")
            page.media(prefers_color_scheme="dark")
            page.resize(360, 740, mobile=True, scale=1.5)
            page.run("document.querySelector('#live').scrollIntoView()")
            time.sleep(3)
            page.screenshot(out / "status-phone.png")
            page.run("document.querySelector('#drop').scrollIntoView()")
            time.sleep(1)
            page.screenshot(out / "status-phone-classify.png")
        finally:
            if load is not None:
                load.kill()
                load.wait()
            if page is not None:
                page.close()
            server.stop()
    for picture in sorted(out.glob("status-*.png")):
        print(picture, picture.stat().st_size)


if __name__ == "__main__":
    main()
