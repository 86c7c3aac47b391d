#!/usr/bin/env python3
"""What quantisation costs a network in accuracy: each recipe is quantised by a server and tested on labelled images.

    bench/accuracy.py --bin build/release/bin --onnx r20.onnx --contract cifar10 --calibration train --evaluation test \\
                      --count 1000 --recipe "--weights ternary --cluster 64"
    bench/accuracy.py --bin build/release/bin --onnx mobilenet.onnx --contract mobilenet.textproto --label-offset 1 \\
                      --images sample --folds 5 --recipe "--weights mixed --target-bits 4.3"

With --images the set is split into --folds parts, image i into part i modulo the folds; each part is tested on a network that the
others calibrated, so that every image is tested once and none by a network that has seen it. Prints a Markdown table: the drop
in top-1 against float on the same images with its standard error (paired), by part; agreement with float; the mean
Kullback-Leibler divergence from float's outputs in nats, which is less noisy than either; bits per weight; seconds of
quantisation. --json also writes all of that to a file.
"""

import argparse
import json
import math
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tests" / "testing"))
import ternd  # noqa: E402

IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def labelled(folder):
    """[(file, class index)] of a folder with labels.txt or of one with a sub-folder per class, by the names' order."""
    if (folder / "labels.txt").exists():
        images = []
        for number, line in enumerate((folder / "labels.txt").read_text().splitlines(), 1):
            match = re.fullmatch(r"\s*(\S.*?)\s+(\d+)\s*", line)
            if match:
                images.append((folder / match[1], int(match[2])))
            elif line.strip():
                sys.exit(f"{folder / 'labels.txt'}:{number}: got {line!r}, want `file index`")
        return images
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    return [(path, index) for index, of in enumerate(classes) for path in sorted(of.iterdir()) if path.suffix.lower() in IMAGES]


def write_set(folder, images):
    """The images as a flat folder of links with labels.txt."""
    folder.mkdir()
    lines = []
    for number, (path, index) in enumerate(images):
        link = folder / f"{number:06}{path.suffix}"
        link.symlink_to(path.resolve())
        lines.append(f"{link.name} {index}\n")
    (folder / "labels.txt").write_text("".join(lines))
    return folder


def parts(images, folds):
    """[(calibration, evaluation)] with every image in one evaluation."""
    return [([image for i, image in enumerate(images) if i % folds != part], images[part::folds]) for part in range(folds)]


def pooled(results):
    """One row of all parts together; `results` are (report, evaluation) as ternctl prints them."""
    pairs = [evaluation["comparison"] for _, evaluation in results]
    lost = sum(pair["only_reference_right"] for pair in pairs)
    won = sum(pair["only_candidate_right"] for pair in pairs)
    both = sum(pair["both_right"] for pair in pairs)
    images = lost + won + both + sum(pair["both_wrong"] for pair in pairs)

    def mean(values):
        return sum(value * evaluation["images"] for value, (_, evaluation) in zip(values, results)) / images

    return {
        "images": images,
        "float_top1": (both + lost) / images,
        "drop": (lost - won) / images,
        "standard_error": math.sqrt(max(0.0, lost + won - (lost - won) ** 2 / images)) / images,
        "drops": [evaluation["comparison"]["drop"] for _, evaluation in results],
        "agreement": mean([evaluation["agreement"] for _, evaluation in results]),
        "divergence": mean([evaluation["divergence"] for _, evaluation in results]),
        "bits_per_weight": max(report["bits_per_weight"] for report, _ in results),
        "seconds": sum(report["report"]["seconds"] for report, _ in results),
    }


def line(recipe, row):
    drops = ", ".join(f"{100 * drop:.1f}" for drop in row["drops"])
    return (f"| `{recipe}` | {100 * row['float_top1']:.2f} % | {100 * row['drop']:.2f} ± {100 * row['standard_error']:.2f} | {drops} | "
            f"{100 * row['agreement']:.1f} | {row['divergence']:.4f} | {row['bits_per_weight']:.2f} | {row['seconds']:.0f} |")


class Server:
    def __init__(self, args, folder):
        self.program = str(args.bin / "ternctl")
        self.process = ternd.Ternd(str(args.bin / "ternd"), str(folder))
        self.environment = dict(os.environ, TERN_SERVER=f"127.0.0.1:{self.process.port}",
                                TERN_ADMIN=f"127.0.0.1:{self.process.admin_port}")

    def ctl(self, *words):
        command = [self.program, *map(str, words)]
        result = subprocess.run([*command, "--json", "--quiet"], env=self.environment, capture_output=True, text=True)
        if result.returncode != 0:
            sys.exit(f"{shlex.join(command)}: exit status {result.returncode}: {result.stderr.strip()}")
        return json.loads(result.stdout)

    def measure(self, recipe, calibration, evaluation, args):
        offset = ["--label-offset", args.label_offset]
        report = self.ctl("quantize", "--model", "network", "--from", 1, *shlex.split(recipe), "--calibration", calibration,
                          "--calibration-count", args.count, *offset)
        made = ["--model", "network", "--version", report["version"]]
        result = self.ctl("evaluate", *made, "--reference-version", 1, "--data", evaluation, *offset)
        self.ctl("delete", *made)
        if not result["comparison"]:
            sys.exit(f"{evaluation}: no labelled images to compare with float on")
        return report, result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, required=True, help="folder with ternd and ternctl")
    parser.add_argument("--onnx", type=pathlib.Path, required=True, help="the float network")
    parser.add_argument("--contract", required=True, help="as ternctl import --preprocess")
    parser.add_argument("--recipe", action="append", required=True, help="flags of ternctl quantize (repeatable)")
    parser.add_argument("--label-offset", type=int, default=0)
    parser.add_argument("--count", type=int, default=0, help="calibration images, spread over the classes; 0 = all")
    parser.add_argument("--images", type=pathlib.Path, help="labelled images to split")
    parser.add_argument("--folds", type=int, default=2)
    parser.add_argument("--calibration", type=pathlib.Path, help="instead of --images: a folder that calibrates,")
    parser.add_argument("--evaluation", type=pathlib.Path, help="and a labelled one that tests")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    if bool(args.images) == bool(args.calibration and args.evaluation):
        parser.error("want either --images or both --calibration and --evaluation")
    if args.images and args.folds < 2:
        parser.error(f"--folds: got {args.folds}, want 2 or more")

    for path in (args.bin / "ternd", args.bin / "ternctl", args.onnx, args.images, args.calibration, args.evaluation):
        if path is not None and not path.exists():
            parser.error(f"{path}: there is no such file or folder")

    rows = []
    with tempfile.TemporaryDirectory(prefix="tern-accuracy-") as folder:
        folder = pathlib.Path(folder)
        sets = [(args.calibration, args.evaluation)]
        if args.images:
            images = labelled(args.images)
            if len(images) < args.folds:
                parser.error(f"--images: {len(images)} labelled images in {args.images}, want one per fold")
            sets = [(write_set(folder / f"calibration{part}", calibration), write_set(folder / f"evaluation{part}", evaluation))
                    for part, (calibration, evaluation) in enumerate(parts(images, args.folds))]
        server = Server(args, folder / "repository")
        try:
            server.ctl("import", "--name", "network", "--onnx", args.onnx, "--preprocess", args.contract)
            print("| recipe | float | drop | by part | agreement | divergence | bits per weight | seconds |")
            print("|---|---|---|---|---|---|---|---|", flush=True)
            for recipe in args.recipe:
                results = []
                for part, (calibration, evaluation) in enumerate(sets):
                    results.append(server.measure(recipe, calibration, evaluation, args))
                    if len(sets) > 1:
                        print(f"{recipe}: part {part + 1} of {len(sets)}: {line(recipe, pooled(results[-1:]))}", file=sys.stderr, flush=True)
                row = pooled(results)
                rows.append({"recipe": recipe, **row})
                print(line(recipe, row), flush=True)
        finally:
            server.process.stop()
    if args.json:
        args.json.write_text(json.dumps({"network": args.onnx.name, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
