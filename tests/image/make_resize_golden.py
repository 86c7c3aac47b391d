#!/usr/bin/env python3
"""Prints the table of tests/image/resize_golden.inc: hashes of what Pillow's Image.resize makes of a fixed image.

    python3 tests/image/make_resize_golden.py > tests/image/resize_golden.inc
"""

import numpy as np
import PIL
from PIL import Image

CASES = [  # width, height -> width, height
    (64, 48, 32, 24), (64, 48, 33, 25), (61, 47, 224, 173), (224, 224, 32, 32), (500, 375, 341, 256),
    (37, 91, 37, 40), (37, 91, 20, 91), (3, 2, 50, 70), (1, 1, 5, 4), (300, 7, 11, 9), (7, 300, 9, 11), (96, 64, 96, 64),
]


def noise(width, height):
    """A linear congruential generator's high bytes over a gradient: the same in C++."""
    state = 12345
    out = np.empty(width * height * 3, dtype=np.uint8)
    for i in range(out.size):
        state = (state * 1664525 + 1013904223) % 2**32
        out[i] = ((state >> 24) + i // 3 % width) % 256
    return out.reshape(height, width, 3)


def fnv1a(data):
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def main():
    print(f"// Written by make_resize_golden.py with Pillow {PIL.__version__}.")
    for width, height, out_width, out_height in CASES:
        image = Image.fromarray(noise(width, height))
        for name, pillow in (("kTriangle", Image.BILINEAR), ("kCubic", Image.BICUBIC)):
            result = image.resize((out_width, out_height), pillow)
            print(f"{{{width}, {height}, {out_width}, {out_height}, Kernel::{name}, 0x{fnv1a(result.tobytes()):016x}u}},")


if __name__ == "__main__":
    main()
