#!/usr/bin/env python3
"""Writes a torchvision classifier as an ONNX network that Tern imports, and its class names.

    export_torchvision.py resnet18 resnet18.onnx [--labels labels.txt] [--state FILE] [--random]

Weights: torchvision's pretrained ones (it downloads them), a state_dict of your own (--state; --classes if there are not 1,000),
or random ones (--random), which only show that the road is open. Needs torch and torchvision.
"""

import argparse
import pathlib

import torch
import torchvision


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", help="a name of torchvision.models")
    parser.add_argument("onnx")
    parser.add_argument("--labels", help="also write the class names, one a line")
    parser.add_argument("--state", help="a state_dict, as torch.save writes it")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--random", action="store_true")
    args = parser.parse_args()

    names = [f"class {i}" for i in range(args.classes)]
    if args.state or args.random:
        network = torchvision.models.get_model(args.network, weights=None, num_classes=args.classes)
        if args.state:
            network.load_state_dict(torch.load(args.state, map_location="cpu"))
    else:
        weights = torchvision.models.get_model_weights(args.network).DEFAULT
        network = torchvision.models.get_model(args.network, weights=weights)
        names = weights.meta["categories"]
    network.eval()
    # The batch is the only axis that may vary. Opset 13 has what every network of torchvision wants.
    torch.onnx.export(network, torch.zeros(1, 3, 224, 224), args.onnx, opset_version=13, input_names=["image"],
                      output_names=["logits"], dynamic_axes={"image": {0: "n"}, "logits": {0: "n"}})
    if args.labels:
        pathlib.Path(args.labels).write_text("".join(f"{name}\n" for name in names))
    print(f"{args.onnx}: {args.network}, {len(names)} classes")


if __name__ == "__main__":
    main()
