#!/usr/bin/env python3
"""Makes the demo's photographs from photographs that Debian packages carry.

  make_photos.py [--root DIR] [--out DIR]

photos.tsv names every labelled photograph: class, name, package, path inside the package (a path
after '!' is an entry of a Qt resource file) and the part of the image to keep as fractions
"left top right bottom" ('-': all of it). calibration.tsv names the photographs of which one random
crop each becomes an unlabelled calibration image; none of them is in photos.tsv.

Writes OUT/photos/<class>/<name>.jpg, OUT/calibration/NNN.jpg and an ATTRIBUTION.md in both. The
packages must be installed, or unpacked below DIR (`apt-get download PACKAGE`,
`dpkg-deb -x FILE DIR`). Needs PIL with WebP. The same inputs give the same bytes with one version
of PIL.
"""

import argparse
import csv
import io
import os
import random
import shutil
import struct
import sys
import zlib

from PIL import Image

HERE = os.path.dirname(os.path.abspath(__file__))
PHOTO_SIDE = 160  # Longer side of a photograph in pixels.
CALIBRATION_SIDE = 48  # Side of a square calibration image in pixels.
MARGIN = 0.06  # White border around a cut-out, as a share of the square's side.

# package: (version, licence, authors as the package's copyright file names them)
PACKAGES = {
    'darknet': ('0.0.0+git20180914.61c9d02e-2+b4', 'GPL-3.0-or-later or MIT or WTFPL',
                'Joseph Redmon'),
    'gambas3-examples': ('3.18.0-4', 'GPL-2.0-or-later', 'Benoit Minisini'),
    'gcompris-qt-data': ('3.1-2', 'GPL-3.0-or-later',
                         'Bruno Coudoin, Franck Doucet and the GCompris developers'),
    'gimp-help-en': ('2.10.34-2', 'GFDL-1.2-or-later, no invariant sections',
                     'The GIMP Documentation Team'),
    'kphotoalbum': ('5.9.1-1', 'GPL-2.0-or-later', 'Jesper K. Pedersen'),
    'libelementary-data': ('1.26.3-1', 'BSD-2-Clause', 'Enlightenment developers'),
    'lomiri-wallpapers-16.04': ('20.04.0-2', 'CC-BY-4.0', 'Aitzol Berasategi'),
    'lomiri-wallpapers-20.04': ('20.04.0-2', 'CC-BY-SA-3.0', 'Lukas Baubkus'),
    'mate-backgrounds': ('1.26.0-1', 'GPL-2.0-or-later',
                         'Charles Barbin, Lennart Poettering, Andrea Cimitan, Marco Cogoni, '
                         'Hylke Bons, Jens Ansorg, Timothy Schellhase, Lapo Calamandrei, '
                         'blackcombwhistler07, Sergey Nazarov'),
    'opencv-doc': ('4.6.0+dfsg-12', 'Apache-2.0', 'OpenCV Foundation and contributors'),
    'python-kivy-examples': ('2.1.0-1', 'MIT', 'Kivy Team and other contributors'),
    'python3-skimage': ('0.19.3-8', 'CC0-1.0', 'Stefan van der Walt'),
    'tuxpaint-stamps-default': ('2022.06.04-1', 'GPL-2.0-or-later',
                                'Bill Kendrick and the Tux Paint contributors'),
    'wx3.2-examples': ('3.2.2+dfsg-2', 'wxWindows Library Licence 3.1', 'wxWidgets contributors'),
}


def read_resource(data, wanted):
    """The bytes of entry `wanted` of a Qt resource file (format of Qt's rcc, versions 1 to 3)."""
    if data[:4] != b'qres':
        raise ValueError('not a Qt resource file')
    version, tree, contents, names = struct.unpack('>4I', data[4:20])
    node_size = 14 if version == 1 else 22

    def node(index):
        start = tree + index * node_size
        name_at, flags = struct.unpack('>IH', data[start:start + 6])
        length, = struct.unpack('>H', data[names + name_at:names + name_at + 2])
        name = data[names + name_at + 6:names + name_at + 6 + 2 * length].decode('utf-16-be')
        return start, flags, name

    current = 0
    for part in wanted.split('/'):
        start, flags, _ = node(current)
        if not flags & 2:
            raise KeyError(wanted)
        count, first = struct.unpack('>II', data[start + 6:start + 14])
        current = next((i for i in range(first, first + count) if node(i)[2] == part), None)
        if current is None:
            raise KeyError(wanted)
    start, flags, _ = node(current)
    begin = contents + struct.unpack('>I', data[start + 10:start + 14])[0]
    size, = struct.unpack('>I', data[begin:begin + 4])
    content = data[begin + 4:begin + 4 + size]
    if flags & 4:
        raise ValueError(f'{wanted}: compressed with zstd, which is not read here')
    return zlib.decompress(content[4:]) if flags & 1 else content


def open_photo(root, path):
    """The image at `path` below `root` in RGB; a transparent one as a square on white."""
    file, _, entry = path.partition('!')
    with open(os.path.join(root, file), 'rb') as stream:
        data = stream.read()
    image = Image.open(io.BytesIO(read_resource(data, entry) if entry else data))
    if image.mode in ('P', 'LA', 'PA'):
        image = image.convert('RGBA')
    if image.mode != 'RGBA' or image.getextrema()[3][0] == 255:
        return image.convert('RGB')
    image = image.crop(image.getchannel('A').point(lambda a: 255 * (a > 8)).getbbox())
    side = round(max(image.size) * (1 + 2 * MARGIN))
    square = Image.new('RGB', (side, side), 'white')
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2), image)
    return square


def save(image, path):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    image.save(path, 'JPEG', quality=88, optimize=True)


def read_list(name):
    with open(os.path.join(HERE, name), encoding='ascii', newline='') as stream:
        return list(csv.DictReader(stream, delimiter='\t'))


def write_attribution(path, introduction, rows):
    """`rows`: (file, package, path inside the package)."""
    used = sorted({package for _, package, _ in rows})
    with open(path, 'w', encoding='ascii') as out:
        out.write(introduction + '\n\n| Debian package | version | licence | authors |\n'
                  '|---|---|---|---|\n')
        for package in used:
            out.write('| ' + ' | '.join((package,) + PACKAGES[package]) + ' |\n')
        out.write('\n| file | Debian package | path in the package |\n|---|---|---|\n')
        for row in rows:
            out.write('| ' + ' | '.join(row) + ' |\n')


CHANGES = ('Made by `models/demo/make_photos.py` from photographs in Debian 12 packages: cropped, '
           'scaled down, cut-outs put on white, saved as JPEG. Each remains under the licence of '
           'its package, as the copyright file of the package states it; texts of the licences: '
           '`models/demo/licences/` and https://creativecommons.org/licenses/.')


def make_photos(root, out):
    rows = []
    for item in read_list('photos.tsv'):
        image = open_photo(root, item['path'])
        if item['crop'] != '-':
            left, top, right, bottom = (float(value) for value in item['crop'].split())
            width, height = image.size
            image = image.crop((round(left * width), round(top * height),
                                round(right * width), round(bottom * height)))
        image.thumbnail((PHOTO_SIDE, PHOTO_SIDE), Image.LANCZOS, reducing_gap=3.0)
        name = f"{item['class']}/{item['name']}.jpg"
        save(image, os.path.join(out, name))
        rows.append((name, item['package'], item['path']))
    photographs = len({path for _, _, path in rows})
    write_attribution(
        os.path.join(out, 'ATTRIBUTION.md'),
        f'# {len(rows)} labelled photographs\n\n{CHANGES}\n\n{len(rows)} images from {photographs} '
        'photographs: where one path is listed more than once, the images show different animals '
        'of one photograph.', rows)
    return len(rows)


def make_calibration(root, out):
    generator = random.Random(0)
    rows = []
    for index, item in enumerate(read_list('calibration.tsv')):
        image = open_photo(root, item['path'])
        side = round(min(image.size) * generator.uniform(0.7, 1.0))
        left = generator.randint(0, image.width - side)
        top = generator.randint(0, image.height - side)
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((CALIBRATION_SIDE, CALIBRATION_SIDE), Image.LANCZOS)
        name = f'{index:03d}.jpg'
        save(image, os.path.join(out, name))
        rows.append((name, item['package'], item['path']))
    write_attribution(
        os.path.join(out, 'ATTRIBUTION.md'),
        f'# {len(rows)} unlabelled calibration images\n\n{CHANGES} One random square of each '
        'photograph; none of these photographs is among the labelled ones.', rows)
    return len(rows)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--root', default='/', help='where the packages are installed or unpacked')
    parser.add_argument('--out', default=HERE, help='where photos/ and calibration/ are written')
    options = parser.parse_args()
    both = read_list('photos.tsv') + read_list('calibration.tsv')
    missing = {item['package'] for item in both
               if not os.path.exists(os.path.join(options.root, item['path'].split('!')[0]))}
    if missing:
        sys.exit('not installed below ' + options.root + ': ' + ' '.join(sorted(missing)))
    for name, make in (('photos', make_photos), ('calibration', make_calibration)):
        folder = os.path.join(options.out, name)
        shutil.rmtree(folder, ignore_errors=True)
        print(name + ':', make(options.root, folder), 'images')


if __name__ == '__main__':
    main()
