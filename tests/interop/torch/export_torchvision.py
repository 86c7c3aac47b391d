#!/usr/bin/python3
"""Exports torchvision's classification networks as ONNX with inputs and logits to compare with.

Needs Debian's python3-torch and python3-torchvision (and libopenblas0-pthread to be quick);
no network, no pretrained weights: weights are random under a fixed seed. For every network
<out>/<name>.onnx, <name>.input.f32 and <name>.logits.f32 (raw little-endian float32, NCHW
and [n, classes]) are written, and <out>/manifest.json lists them:

  {"networks": [{"name", "onnx", "input", "logits", "input_shape": [2,3,h,w], "classes",
                 "opset", "options"}, ...]}

A network that the manifest lists under the same options is kept as it is.
"""

import argparse
import json
import pathlib
import sys
import time
import warnings

import torch
import torchvision

NETWORKS = [
    "alexnet", "vgg11", "vgg11_bn", "resnet18", "resnet50", "resnext50_32x4d", "squeezenet1_0",
    "squeezenet1_1", "densenet121", "inception_v3", "googlenet", "mobilenet_v2",
    "mobilenet_v3_small", "mobilenet_v3_large", "shufflenet_v2_x1_0", "mnasnet0_5",
    "efficientnet_b0", "regnet_x_400mf", "regnet_y_400mf",
]
BATCH = 2
MEASURED = 8  # images behind the batch normalisation's statistics
SIDE = {"inception_v3": 299}  # others 224


def build(name, seed):
    """A network in eval mode with random weights and non-trivial batch normalisation."""
    torch.manual_seed(seed)
    options = {}
    if name in ("inception_v3", "googlenet"):
        # As the pretrained ones are built: re-normalises the channels inside the network.
        options = {"transform_input": True, "init_weights": False}
    model = getattr(torchvision.models, name)(weights=None, **options)
    model.eval()
    side = SIDE.get(name, 224)
    # Running statistics near those of real activations, else a deep random network's signal
    # dies or explodes on its way to the logits, and with it the comparison: random scales and
    # shifts first, one pass that measures, then a little noise on what was measured.
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.7, 1.4)
            norm.bias.normal_(0.0, 0.2)
            norm.momentum = 1.0
            norm.train()
        if norms:
            model(torch.randn(MEASURED, 3, side, side))
        for norm in norms:
            norm.eval()
            deviation = norm.running_var.sqrt()
            norm.running_mean += 0.05 * deviation * torch.randn_like(deviation)
            norm.running_var *= torch.empty_like(deviation).uniform_(0.9, 1.1)
        image = torch.randn(BATCH, 3, side, side)
        logits = model(image)
    if not torch.isfinite(logits).all() or logits.std() < 1e-4:
        sys.exit(f"{name}: logits are not usable: standard deviation {logits.std():g}")
    return model, image, logits


def export(name, args, options):
    model, image, logits = build(name, args.seed)
    entry = {
        "name": name,
        "onnx": f"{name}.onnx",
        "input": f"{name}.input.f32",
        "logits": f"{name}.logits.f32",
        "input_shape": list(image.shape),
        "classes": logits.shape[1],
        "opset": args.opset,
        "options": options,
    }
    mode = torch.onnx.TrainingMode.PRESERVE if args.keep_batch_norm else torch.onnx.TrainingMode.EVAL
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, image, str(args.out / entry["onnx"]), opset_version=args.opset, training=mode,
            do_constant_folding=not args.no_constant_folding, input_names=["input"],
            output_names=["logits"],
            dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}})
    image.numpy().astype("<f4").tofile(args.out / entry["input"])
    logits.numpy().astype("<f4").tofile(args.out / entry["logits"])
    return entry


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path, help="directory to write to")
    parser.add_argument("--only", help="comma-separated names (any of torchvision.models)")
    parser.add_argument("--opset", type=int, default=13, help="ONNX operator set (default 13)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep-batch-norm", action="store_true",
                        help="keep BatchNormalization nodes, which torch folds by default")
    parser.add_argument("--no-constant-folding", action="store_true",
                        help="keep torch's constant expressions in the file")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    manifest = args.out / "manifest.json"
    known = {}
    if manifest.exists():
        known = {entry["name"]: entry for entry in json.loads(manifest.read_text())["networks"]}
    options = (f"opset={args.opset} seed={args.seed} keep_batch_norm={args.keep_batch_norm} "
               f"no_constant_folding={args.no_constant_folding} torch={torch.__version__}")
    for name in args.only.split(",") if args.only else NETWORKS:
        entry = known.get(name)
        if entry and entry["options"] == options and all(
                (args.out / entry[key]).exists() for key in ("onnx", "input", "logits")):
            print(f"{name}: kept")
            continue
        start = time.monotonic()
        known[name] = export(name, args, options)
        # After each network, so that an interrupted run is resumed.
        manifest.write_text(json.dumps({"networks": list(known.values())}, indent=1) + "\n")
        print(f"{name}: {time.monotonic() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
