#!/usr/bin/env python3
"""Classifies image files with NVIDIA's tritonclient over gRPC.

    pip install 'tritonclient[grpc]' numpy
    classify_tritonclient.py --server localhost:8500 --model demo cat.jpg dog.png
"""

from __future__ import annotations

import argparse
import pathlib
from typing import NamedTuple, Sequence

import numpy as np
import tritonclient.grpc as triton


class Score(NamedTuple):
    probability: float
    index: int
    label: str


def classify(client: triton.InferenceServerClient, model: str, images: Sequence[bytes],
             classes: int = 5, timeout: float = 10.0) -> list[list[Score]]:
    """The `classes` best classes of each encoded image, best first. Raises InferenceServerException."""
    tensor = triton.InferInput("image", [len(images)], "BYTES")
    tensor.set_data_from_numpy(np.array(images, dtype=np.object_))
    output = triton.InferRequestedOutput("probabilities", class_count=classes)
    answer = client.infer(model, [tensor], outputs=[output], client_timeout=timeout)
    rows = []
    for row in answer.as_numpy("probabilities"):
        fields = [element.decode().split(":", 2) for element in row]  # value:index, and :label if the model has labels
        rows.append([Score(float(value), int(index), label[0] if label else index) for value, index, *label in fields])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", default="localhost:8500")
    parser.add_argument("--model", required=True)
    parser.add_argument("images", nargs="+", type=pathlib.Path)
    args = parser.parse_args()
    with triton.InferenceServerClient(args.server) as client:
        rows = classify(client, args.model, [path.read_bytes() for path in args.images])
    for path, scores in zip(args.images, rows):
        best = scores[0]
        print(f"{path}: {best.label} {100 * best.probability:.1f} %")


if __name__ == "__main__":
    main()
