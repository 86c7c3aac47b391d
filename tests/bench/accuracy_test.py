#!/usr/bin/env python3
"""bench/accuracy.py: its parts and its statistics, with made-up results: needs no server.

    accuracy_test.py --source SOURCE
"""

import argparse
import importlib.util
import pathlib
import random
import sys
import tempfile
import unittest

accuracy = None  # loaded in main


def result(pairs, agreement=0.5, divergence=0.1, bits=2.0):
    """A report and an evaluation of images that are [(float is right, quantised is right)]."""
    count = {key: sum(pair == key for pair in pairs) for key in ((1, 1), (1, 0), (0, 1), (0, 0))}
    comparison = {"both_right": count[1, 1], "only_reference_right": count[1, 0], "only_candidate_right": count[0, 1],
                  "both_wrong": count[0, 0], "drop": (count[1, 0] - count[0, 1]) / len(pairs)}
    return ({"bits_per_weight": bits, "report": {"seconds": 7.0}},
            {"images": len(pairs), "comparison": comparison, "agreement": agreement, "divergence": divergence})


class AccuracyTest(unittest.TestCase):
    def test_every_image_is_tested_once_and_never_by_what_it_calibrated(self):
        for count, folds in ((10, 2), (11, 5), (5, 5)):
            parts = accuracy.parts(list(range(count)), folds)
            self.assertEqual(sorted(image for _, evaluation in parts for image in evaluation), list(range(count)))
            for calibration, evaluation in parts:
                self.assertEqual(sorted(calibration + evaluation), list(range(count)))

    def test_parts_are_pooled_as_if_they_were_one(self):
        rng = random.Random(3)
        pairs = [(int(rng.random() < 0.8), int(rng.random() < 0.7)) for _ in range(300)]
        row = accuracy.pooled([result(pairs[:100]), result(pairs[100:])])
        differences = [before - after for before, after in pairs]
        mean = sum(differences) / 300
        variance = sum((value - mean) ** 2 for value in differences) / 300
        self.assertEqual(row["images"], 300)
        self.assertAlmostEqual(row["float_top1"], sum(before for before, _ in pairs) / 300)
        self.assertAlmostEqual(row["drop"], mean)
        self.assertAlmostEqual(row["standard_error"], (variance / 300) ** 0.5)

    def test_means_weigh_parts_by_their_images_and_costs_add_up(self):
        row = accuracy.pooled([result([(1, 1)] * 30, agreement=1.0, divergence=0.0, bits=3.0),
                               result([(1, 0)] * 10, agreement=0.0, divergence=0.4, bits=3.2)])
        self.assertAlmostEqual(row["agreement"], 0.75)
        self.assertAlmostEqual(row["divergence"], 0.1)
        self.assertEqual((row["bits_per_weight"], row["seconds"], row["drops"]), (3.2, 14.0, [0.0, 1.0]))

    def test_both_layouts_of_a_folder_are_read_and_written_sets_read_back(self):
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            for name in ("b/1.jpg", "a/2.PNG", "a/1.jpg", "a/notes.txt"):
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(name)
            images = accuracy.labelled(folder)
            self.assertEqual(images, [(folder / "a/1.jpg", 0), (folder / "a/2.PNG", 0), (folder / "b/1.jpg", 1)])
            written = accuracy.labelled(accuracy.write_set(folder / "flat", images))
            self.assertEqual([(path.read_text(), index) for path, index in written], [("a/1.jpg", 0), ("a/2.PNG", 0), ("b/1.jpg", 1)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", type=pathlib.Path, required=True)
    args, rest = parser.parse_known_args()
    spec = importlib.util.spec_from_file_location("accuracy", args.source / "bench/accuracy.py")
    accuracy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(accuracy)
    unittest.main(argv=[sys.argv[0], *rest])
