#!/usr/bin/env python3
"""Averages the weights of several ends (train.py --branch) of one training run.

  average.py --train DIR --networks A/network.pt B/network.pt --out network.pt

Ends that start at the same checkpoint lie close together, and their mean is often better than each
(Wortsman et al. 2022, "Model soups"). The held-out training images decide which of the ends and
their mean is written.
"""

import argparse

import torch

import network as definition
from images import read_folder
from train import accuracy, split


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--train', required=True, help='ImageFolder of training images')
    parser.add_argument('--networks', required=True, nargs='+', help='network.pt files')
    parser.add_argument('--out', required=True, help='file to write')
    parser.add_argument('--held-out', type=int, default=2000, help='as given to train.py')
    parser.add_argument('--seed', type=int, default=0, help='as given to train.py')
    options = parser.parse_args()
    pixels, labels, classes, _ = read_folder(options.train, definition.SIZE)
    _, held = split(labels, options.held_out, len(classes), options.seed)
    held_pixels, held_labels = torch.from_numpy(pixels[held]), torch.from_numpy(labels[held])

    saved = [torch.load(path, map_location='cpu') for path in options.networks]
    mean = dict(saved[0])
    mean['state'] = {
        key: torch.stack([s['state'][key] for s in saved]).mean(0) if value.is_floating_point()
        else value for key, value in saved[0]['state'].items()}
    best, best_score = None, -1.0
    for name, candidate in zip(options.networks + ['mean'], saved + [mean]):
        network = definition.Network(candidate['width'], candidate['blocks'], len(classes))
        network.load_state_dict(candidate['state'])
        score = accuracy(network, held_pixels, held_labels)
        print(f'{name}: held out {score:.4f}', flush=True)
        if score >= best_score:
            best, best_score = candidate, score
    torch.save(best, options.out)


if __name__ == '__main__':
    main()
