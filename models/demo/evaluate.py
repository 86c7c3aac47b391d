#!/usr/bin/env python3
"""Float accuracy of the demo network on an ImageFolder directory.

  evaluate.py --model model.onnx|network.pt --data DIR [--wrong]

Images are decoded by PIL, their shorter side is resized to 32 (antialiased bilinear), the centre
square is taken. An ONNX file is run node by node with torch; only the operators that export.py
writes are known.
"""

import argparse
import math

import numpy
import onnx
import torch
from onnx import numpy_helper
from torch.nn import functional

import network as definition
from images import read_folder


def run_onnx(model, batch):
    """The first output of `model` for `batch` as its first input."""
    values = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy())
              for tensor in model.graph.initializer}
    values[next(i.name for i in model.graph.input if i.name not in values)] = batch
    for node in model.graph.node:
        inputs = [values[name] if name else None for name in node.input]
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == 'Conv':
            pads = attributes.get('pads', [0, 0, 0, 0])
            result = functional.conv2d(
                functional.pad(inputs[0], (pads[1], pads[3], pads[0], pads[2])), inputs[1],
                inputs[2] if len(inputs) > 2 else None, attributes.get('strides', 1), 0,
                attributes.get('dilations', 1), attributes.get('group', 1))
        elif node.op_type == 'Relu':
            result = functional.relu(inputs[0])
        elif node.op_type == 'Add':
            result = inputs[0] + inputs[1]
        elif node.op_type == 'GlobalAveragePool':
            result = inputs[0].mean((2, 3), keepdim=True)
        elif node.op_type == 'Flatten':
            result = inputs[0].flatten(attributes.get('axis', 1))
        elif node.op_type == 'Gemm' and attributes.get('transB', 0):
            result = functional.linear(inputs[0], inputs[1], inputs[2])
        else:
            raise SystemExit(f'operator {node.op_type} of node {node.name} is not known here')
        values[node.output[0]] = result
    return values[model.graph.output[0].name]


def interval(right, count):
    """95 % Wilson score interval of the share right / count."""
    z = 1.959964
    share = right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(
        share * (1 - share) / count + z * z / (4 * count * count))
    return middle - half, middle + half


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', required=True, help='ONNX file or network.pt of train.py')
    parser.add_argument('--data', required=True, help='ImageFolder of labelled images')
    parser.add_argument('--wrong', action='store_true', help='list the images classified wrongly')
    options = parser.parse_args()
    pixels, labels, classes, paths = read_folder(options.data, definition.SIZE)
    if options.model.endswith('.onnx'):
        model = onnx.load(options.model)
        run = lambda batch: run_onnx(model, batch)
    else:
        run, _ = definition.load(options.model)
    mean = torch.tensor(definition.MEAN) * 255
    scale = 1 / (torch.tensor(definition.STD) * 255)
    answers = []
    with torch.no_grad():
        for start in range(0, len(pixels), 250):
            batch = torch.from_numpy(pixels[start:start + 250]).float()
            answers.append(run(((batch - mean) * scale).permute(0, 3, 1, 2)).argmax(1).numpy())
    answers = numpy.concatenate(answers)
    if int(answers.max()) >= len(classes):
        raise SystemExit(f'{options.data}: {len(classes)} classes, the network has more')
    right = answers == labels
    low, high = interval(int(right.sum()), len(right))
    print(f'{len(right)} images, top-1 {right.mean():.4f} (95 %: {low:.4f} to {high:.4f})')
    shares = []
    for label, name in enumerate(classes):
        here = right[labels == label]
        if len(here):
            shares.append(here.mean())
            print(f'  {name:12} {int(here.sum()):5} of {len(here):5}')
    print(f'mean over classes {numpy.mean(shares):.4f}')
    if options.wrong:
        for index in numpy.flatnonzero(~right):
            print(f'{paths[index]}: {classes[answers[index]]}')


if __name__ == '__main__':
    main()
