"""Reads ImageFolder directories (one sub-folder per class) into memory."""

import os

import numpy
from PIL import Image

SUFFIXES = ('.jpg', '.jpeg', '.png')


def read_image(path, size):
    """RGB array [size, size, 3] of bytes: shorter side to `size`, antialiased; centre crop.

    The same as torchvision's Resize(size) and CenterCrop(size) on a PIL image.
    """
    with Image.open(path) as image:
        image = image.convert('RGB')
        width, height = image.size
        if (width, height) != (size, size):
            if width <= height:
                resized = (size, int(size * height / width))
            else:
                resized = (int(size * width / height), size)
            image = image.resize(resized, Image.BILINEAR)
            left = int(round((resized[0] - size) / 2.0))
            top = int(round((resized[1] - size) / 2.0))
            image = image.crop((left, top, left + size, top + size))
        return numpy.asarray(image)


def read_folder(directory, size):
    """(images [n, size, size, 3] bytes, labels [n] int64, class names, paths), in sorted order."""
    classes = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir())
    if not classes:
        raise SystemExit(f'{directory}: wanted one sub-folder per class, found none')
    images, labels, paths = [], [], []
    for label, name in enumerate(classes):
        for file in sorted(os.listdir(os.path.join(directory, name))):
            if file.lower().endswith(SUFFIXES):
                paths.append(os.path.join(directory, name, file))
                images.append(read_image(paths[-1], size))
                labels.append(label)
    if not images:
        raise SystemExit(f'{directory}: no JPEG or PNG file in {len(classes)} sub-folders')
    return numpy.stack(images), numpy.array(labels, numpy.int64), classes, paths
