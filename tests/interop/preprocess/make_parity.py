#!/usr/bin/env python3
"""Writes what torchvision makes of photographs, for preprocess_parity_test.

    /usr/bin/python3 make_parity.py IMAGES OUT [--count 60]

IMAGES is searched for JPEGs, at most --count of them are taken, spread evenly over the sorted list. OUT gets an
`index.txt` of lines "<contract> <side> <tensor file> <image path>" and the tensors: f32 little-endian, [side, side, 3], RGB,
normalised: torchvision's Resize, CenterCrop, ToTensor, Normalize on Pillow images.
"""

import argparse
import pathlib

import numpy as np
from PIL import Image, ImageOps
from torchvision import transforms

MEAN = [0.485, 0.456, 0.406]
STD = [0.229, 0.224, 0.225]
CONTRACTS = {"imagenet": (256, 224), "cifar10": (32, 32)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--count", type=int, default=60)
    arguments = parser.parse_args()

    paths = sorted(p for p in arguments.images.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        parser.error(f"no JPEGs under {arguments.images}")
    count = min(arguments.count, len(paths))
    paths = [paths[i * len(paths) // count] for i in range(count)]
    arguments.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, path in enumerate(paths):
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        for name, (resize, side) in CONTRACTS.items():
            pipeline = transforms.Compose([transforms.Resize(resize), transforms.CenterCrop(side),
                                           transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
            tensor = pipeline(image).numpy().transpose(1, 2, 0)
            file = f"{i:03d}_{name}.f32"
            np.ascontiguousarray(tensor, dtype="<f4").tofile(arguments.out / file)
            lines.append(f"{name} {side} {file} {path.resolve()}\n")
    (arguments.out / "index.txt").write_text("".join(lines))
    print(f"{count} photographs, {len(lines)} tensors in {arguments.out}")


if __name__ == "__main__":
    main()
