#!/usr/bin/env python3
"""Trains the demo network on an ImageFolder directory of small images.

  train.py --train DIR [--test DIR] --out DIR [--epochs N] [--width W] [--seed S] [--resume]

Writes OUT/checkpoint.pt after every epoch (--resume continues from it) and, at the end,
OUT/network.pt (read by export.py and evaluate.py) and OUT/result.json. A share of the training
images is held out; only it decides between the last and the averaged weights. The test images are
read after that decision and classified once.

Needs torch 1.13 or newer, numpy and PIL. All images are kept in memory; augmentation works on whole
batches. On CPUs with AVX-512 BF16 the convolutions run in bfloat16 (--bf16 off: never).
"""

import argparse
import copy
import json
import os
import time

import numpy
import torch
from torch.nn import functional

from images import read_folder
from network import MEAN, SIZE, STD, Network

PADDING = 4  # Pixels of reflected border from which random crops are taken.


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--train', required=True, help='ImageFolder of training images')
    parser.add_argument('--test', help='ImageFolder of test images')
    parser.add_argument('--out', required=True, help='directory for checkpoint, weights, result')
    parser.add_argument('--epochs', type=int, default=25)
    parser.add_argument('--max-minutes', type=float, default=0,
                        help='shorten the learning-rate schedule to end within this wall time '
                        '(0: no limit)')
    parser.add_argument('--width', type=int, default=32, help='channels of the first stage')
    parser.add_argument('--blocks', default='1,2,2', help='residual blocks per stage')
    parser.add_argument('--batch', type=int, default=128)
    parser.add_argument('--rate', type=float, default=0.2, help='highest learning rate')
    parser.add_argument('--decay', type=float, default=5e-4, help='weight decay')
    parser.add_argument('--smoothing', type=float, default=0.1, help='label smoothing')
    parser.add_argument('--small', type=int, default=24, help='image size in the first part')
    parser.add_argument('--small-share', type=float, default=0.45,
                        help='share of the schedule that uses --small')
    parser.add_argument('--held-out', type=int, default=2000, help='training images held out')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--bf16', choices=('auto', 'on', 'off'), default='auto')
    parser.add_argument('--resume', action='store_true', help='continue from OUT/checkpoint.pt')
    parser.add_argument('--branch', type=int, default=0,
                        help='with --resume: other random numbers than the run that made the '
                        'checkpoint, to try several ends of one run')
    return parser.parse_args()


def has_bf16():
    """Whether the CPU multiplies bfloat16 natively; emulation would be slower than float."""
    try:
        with open('/proc/cpuinfo', encoding='ascii', errors='replace') as info:
            return 'avx512_bf16' in info.read()
    except OSError:
        return False


def split(labels, held_out, classes, seed):
    """Indices (kept, held out); the held-out ones have the same number of every class."""
    generator = numpy.random.RandomState(seed)
    kept, held = [], []
    for label in range(classes):
        indices = generator.permutation(numpy.flatnonzero(labels == label))
        count = held_out // classes
        held.append(indices[:count])
        kept.append(indices[count:])
    return numpy.concatenate(kept), numpy.concatenate(held)


def normalise(pixels):
    """Bytes [n, h, w, 3] to normalised float [n, 3, h, w] in channels-last memory order."""
    mean = torch.tensor(MEAN) * 255
    scale = 1 / (torch.tensor(STD) * 255)
    return ((pixels.float() - mean) * scale).permute(0, 3, 1, 2)


def augment(padded, indices, size):
    """A training batch: random crop, flip, brightness, contrast and tint, cut-out, rescale.

    `padded` holds bytes [n, SIZE + 2 * PADDING, ..., 3]. Three batches in ten use crops that are a
    little smaller or larger than SIZE, so that the network sees other object sizes.
    """
    count = len(indices)
    crop = SIZE
    if torch.rand(()) < 0.3:
        crop += int(torch.randint(-5, 2 * PADDING // 2 + 1, ()))
    steps = torch.arange(crop)
    room = padded.shape[1] - crop + 1
    rows = torch.randint(0, room, (count, 1)) + steps
    columns = torch.randint(0, room, (count, 1)) + steps
    flip = torch.rand(count, 1) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    batch = normalise(padded[indices[:, None, None], rows[:, :, None], columns[:, None, :]])
    changed = (torch.rand(count, 1, 1, 1) < 0.5).float()
    gain = 1 + changed * 0.25 * torch.randn(count, 1, 1, 1).clamp(-2, 2)
    shift = changed * (0.25 * torch.randn(count, 1, 1, 1) + 0.1 * torch.randn(count, 3, 1, 1))
    batch = batch * gain + shift
    if crop != size:
        batch = functional.interpolate(batch, size=(size, size), mode='bilinear',
                                       align_corners=False, antialias=True)
    cut = size // 4
    top = torch.randint(-cut // 2, size - cut // 2, (count, 1))
    left = torch.randint(-cut // 2, size - cut // 2, (count, 1))
    along = torch.arange(size)
    inside_rows = (along >= top) & (along < top + cut)
    inside_columns = (along >= left) & (along < left + cut)
    batch = batch.masked_fill(
        (inside_rows[:, :, None] & inside_columns[:, None, :])[:, None], 0.0)
    return batch.contiguous(memory_format=torch.channels_last)


def accuracy(network, pixels, labels):
    """Share of `pixels` (bytes [n, h, w, 3]) classified as `labels`, in float arithmetic."""
    network.eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(pixels), 500):
            batch = normalise(pixels[start:start + 500])
            batch = batch.contiguous(memory_format=torch.channels_last)
            right += int((network(batch).argmax(1) == labels[start:start + 500]).sum())
    return right / len(pixels)


def rate_at(progress, highest):
    """Linear warm-up over the first 15 % of the schedule, then linear to zero."""
    return highest * min(progress / 0.15, (1 - progress) / 0.85)


def update_average(average, network, decay):
    """Moves the averaged weights and batch-norm statistics towards the network's."""
    with torch.no_grad():
        for mean, value in zip(average.state_dict().values(), network.state_dict().values()):
            if mean.dtype.is_floating_point:
                mean.lerp_(value, 1 - decay)
            else:
                mean.copy_(value)


def save(path, content):
    """Writes all of `content` or nothing: a run that is killed leaves the former checkpoint."""
    torch.save(content, path + '.part')
    os.replace(path + '.part', path)


def main():
    options = parse_arguments()
    os.makedirs(options.out, exist_ok=True)
    checkpoint_path = os.path.join(options.out, 'checkpoint.pt')
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    bf16 = has_bf16() if options.bf16 == 'auto' else options.bf16 == 'on'

    pixels, labels, classes, _ = read_folder(options.train, SIZE)
    kept, held = split(labels, options.held_out, len(classes), options.seed)
    padded = torch.from_numpy(numpy.pad(
        pixels[kept], ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0)), 'reflect'))
    kept_labels = torch.from_numpy(labels[kept])
    held_pixels = torch.from_numpy(pixels[held])
    held_labels = torch.from_numpy(labels[held])
    print(f'{len(kept)} training images, {len(held)} held out, {len(classes)} classes; '
          f'torch {torch.__version__}, {options.threads} threads, '
          f'{"bfloat16" if bf16 else "float"} convolutions', flush=True)

    blocks = tuple(int(count) for count in options.blocks.split(','))
    network = Network(options.width, blocks, len(classes)).to(memory_format=torch.channels_last)
    average = copy.deepcopy(network)
    weights = [p for p in network.parameters() if p.dim() > 1]
    others = [p for p in network.parameters() if p.dim() == 1]
    optimizer = torch.optim.SGD(
        [{'params': weights, 'weight_decay': options.decay}, {'params': others, 'weight_decay': 0}],
        lr=0.01, momentum=0.9, nesterov=True)
    epoch, progress, spent = 0, 0.0, 0.0
    if options.resume and os.path.exists(checkpoint_path):
        saved = torch.load(checkpoint_path, map_location='cpu')
        network.load_state_dict(saved['network'])
        average.load_state_dict(saved['average'])
        optimizer.load_state_dict(saved['optimizer'])
        torch.set_rng_state(saved['random'])
        if options.branch:
            torch.manual_seed(options.seed + options.branch)
        epoch, progress, spent = saved['epoch'], saved['progress'], saved['spent']
        print(f'resumed after epoch {epoch}', flush=True)
    print(f'{sum(p.numel() for p in network.parameters())} parameters', flush=True)

    # Progress runs from 0 to 1 and sets the learning rate. A step is an equal share of it, or more
    # where a time limit is given and the steps left, at the present pace, would not fit into it.
    batches = len(kept) // options.batch
    step_share = 1 / (batches * options.epochs)
    limit = options.max_minutes * 60
    clock = time.time() - spent
    pace = 0.0  # Smoothed seconds per step.
    scores = None
    while progress < 1 - step_share / 2:
        network.train()
        epoch += 1
        order = torch.randperm(len(kept))
        total, right, seen = 0.0, 0, 0
        began = time.time()
        for start in range(0, batches * options.batch, options.batch):
            share = step_share
            if limit:
                remaining = limit - (time.time() - clock)
                share = max(share, (1 - progress) * pace / max(remaining, pace))
            step_began = time.time()
            progress = min(1.0, progress + share)
            for group in optimizer.param_groups:
                group['lr'] = max(1e-5, rate_at(progress, options.rate))
            indices = order[start:start + options.batch]
            size = options.small if progress < options.small_share else SIZE
            batch = augment(padded, indices, size)
            wanted = kept_labels[indices]
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast('cpu', dtype=torch.bfloat16, enabled=bf16):
                logits = network(batch)
            loss = functional.cross_entropy(
                logits.float(), wanted, label_smoothing=options.smoothing)
            loss.backward()
            optimizer.step()
            update_average(average, network, 0.995 ** (options.batch / 128))
            total += float(loss)
            right += int((logits.argmax(1) == wanted).sum())
            seen += len(indices)
            took = time.time() - step_began
            pace += (took - pace) * (0.02 if pace else 1)
            if progress >= 1:
                break
        spent = time.time() - clock
        scores = [accuracy(n, held_pixels, held_labels) for n in (network, average)]
        print(f'epoch {epoch}  size {size}  rate {rate_at(progress, options.rate):.4f}  '
              f'loss {total * options.batch / seen:.4f}  '
              f'train {right / seen:.4f}  held out {scores[0]:.4f}, averaged {scores[1]:.4f}  '
              f'{time.time() - began:.0f} s  {progress:.1%} done, '
              f'{spent / progress * (1 - progress) / 60:.1f} min left', flush=True)
        save(checkpoint_path, {
            'network': network.state_dict(), 'average': average.state_dict(),
            'optimizer': optimizer.state_dict(), 'random': torch.get_rng_state(),
            'epoch': epoch, 'progress': progress, 'spent': spent})

    scores = scores or [accuracy(n, held_pixels, held_labels) for n in (network, average)]
    best = average if scores[1] > scores[0] else network
    state = {key: value.contiguous() for key, value in best.state_dict().items()}
    save(os.path.join(options.out, 'network.pt'), {
        'state': state, 'width': options.width, 'blocks': blocks, 'classes': classes})
    result = {'held_out': max(scores), 'epochs': epoch, 'minutes': round(spent / 60, 1),
              'torch': torch.__version__, 'bf16': bf16}
    if options.test:
        test_pixels, test_labels, test_classes, _ = read_folder(options.test, SIZE)
        if test_classes != classes:
            raise SystemExit(f'{options.test}: classes {test_classes}, wanted {classes}')
        result['top1'] = accuracy(
            best, torch.from_numpy(test_pixels), torch.from_numpy(test_labels))
        result['images'] = len(test_pixels)
    print(json.dumps(result), flush=True)
    with open(os.path.join(options.out, 'result.json'), 'w', encoding='ascii') as file:
        json.dump(result, file, indent=1)
        file.write('\n')


if __name__ == '__main__':
    main()
