#!/usr/bin/env python3
"""Exports the network that train.py saved to ONNX (opset 13) and checks the file.

  export.py --network OUT/network.pt --onnx model.onnx --labels labels.txt

Input `input`: float32 [N, 3, 32, 32] with N dynamic, preprocessed as network.py says. Output
`logits`: float32 [N, classes]. torch's exporter folds batch normalisation into the convolutions.
"""

import argparse

import onnx
import torch

import evaluate
import network as definition


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--network', required=True, help='network.pt of train.py')
    parser.add_argument('--onnx', required=True, help='ONNX file to write')
    parser.add_argument('--labels', required=True, help='label file to write, one name a line')
    options = parser.parse_args()
    network, classes = definition.load(options.network)
    example = torch.zeros(2, 3, definition.SIZE, definition.SIZE)
    torch.onnx.export(network, example, options.onnx, opset_version=13, input_names=['input'],
                      output_names=['logits'],
                      dynamic_axes={'input': {0: 'N'}, 'logits': {0: 'N'}})
    model = onnx.load(options.onnx)
    onnx.checker.check_model(model, full_check=True)

    torch.manual_seed(0)
    batch = torch.randn(5, 3, definition.SIZE, definition.SIZE)
    with torch.no_grad():
        wanted = network(batch)
        got = evaluate.run_onnx(model, batch)
    error = float((wanted - got).abs().max() / wanted.abs().max())
    if error > 1e-4:
        raise SystemExit(f'{options.onnx}: logits differ from torch by {error:.1e}')
    with open(options.labels, 'w', encoding='ascii') as file:
        file.write('\n'.join(classes) + '\n')
    print(f'{options.onnx}: {len(model.graph.node)} nodes, logits within {error:.1e} of torch')


if __name__ == '__main__':
    main()
