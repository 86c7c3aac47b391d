#!/usr/bin/env python3
"""Classifies image files with plain grpcio and Tern's own API.

    pip install grpcio protobuf grpcio-tools
    python -m grpc_tools.protoc -I proto --python_out=gen --grpc_python_out=gen tern/v1/model.proto tern/v1/classifier.proto
    PYTHONPATH=gen classify_grpcio.py --server localhost:8500 --model demo cat.jpg dog.png
"""

from __future__ import annotations

import argparse
import pathlib
from typing import Iterable, Iterator

import grpc
from tern.v1 import classifier_pb2, classifier_pb2_grpc


def classify(channel: grpc.Channel, model: str, images: Iterable[bytes], top_k: int = 5,
             timeout: float = 10.0) -> Iterator[classifier_pb2.ClassifyResponse]:
    """The answers in the order of the images, over one stream. Raises grpc.RpcError, and ValueError for a refused image."""
    stub = classifier_pb2_grpc.ImageClassifierStub(channel)
    requests = (classifier_pb2.ClassifyRequest(model=model, image=image, top_k=top_k) for image in images)
    for answer in stub.ClassifyStream(requests, timeout=timeout):
        if answer.HasField("error"):
            raise ValueError(answer.error.message)
        yield answer.response


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", default="localhost:8500")
    parser.add_argument("--model", required=True)
    parser.add_argument("images", nargs="+", type=pathlib.Path)
    args = parser.parse_args()
    with grpc.insecure_channel(args.server) as channel:
        answers = classify(channel, args.model, (path.read_bytes() for path in args.images))
        for path, answer in zip(args.images, answers):
            best = answer.classes[0]
            print(f"{path}: {best.label or best.index} {100 * best.probability:.1f} %, "
                  f"{answer.receipt.timing.total_us / 1000:.1f} ms in the server")


if __name__ == "__main__":
    main()
