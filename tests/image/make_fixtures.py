#!/usr/bin/env python3
"""Writes fixtures/: tiny images in every accepted format, each with the pixels Pillow sees.

NAME.EXT is the encoded image, NAME.EXT.ppm what Pillow's convert("RGB") makes of it (with its EXIF orientation applied). The files are
committed; run this again only to add a case (python3-pil, python3-numpy):

    python3 tests/image/make_fixtures.py
"""

import io
import pathlib
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps

FOLDER = pathlib.Path(__file__).resolve().parent / "fixtures"
W, H = 19, 13


def picture(channels, height=H, width=W):
    """Smooth but asymmetric in both directions and in the channels, so that no turn or swap looks right."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    planes = [40 + 10 * x, 20 + 17 * y, 230 - 5 * x - 8 * y, 255 - 9 * x][:channels]
    return np.clip(np.stack(planes, axis=-1), 0, 255).astype(np.uint8)


def write(name, data, expected=None):
    """`expected`: pixels [h, w, 3] where Pillow is not the judge."""
    if expected is None:
        expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    (FOLDER / name).write_bytes(data)
    h, w = expected.shape[:2]
    (FOLDER / f"{name}.ppm").write_bytes(b"P6 %d %d 255\n" % (w, h) + expected.astype(np.uint8).tobytes())


def saved(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png(width, height, depth, color, rows_of_passes, extra=b""):
    """A PNG from raw rows; `rows_of_passes` is one list of rows, or seven for Adam7."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    interlace = 0 if len(rows_of_passes) == 1 else 1
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlace)
    raw = b"".join(b"\0" + row for rows in rows_of_passes for row in rows)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(raw)) +
            chunk(b"IEND", b""))


def bmp(width, height, bits, compression, palette, masks, pixels):
    offset = 14 + 40 + len(masks) + len(palette)
    return (b"BM" + struct.pack("<IHHI", offset + len(pixels), 0, 0, offset) +
            struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(pixels), 2835, 2835,
                        len(palette) // 4, 0) + masks + palette + pixels)


def main():
    FOLDER.mkdir(exist_ok=True)
    rgb = picture(3)
    rgba = picture(4)
    image = Image.fromarray(rgb)

    write("rgb_444.jpg", saved(image, "JPEG", quality=92, subsampling=0))
    write("rgb_420.jpg", saved(image, "JPEG", quality=85, subsampling=2))
    write("progressive.jpg", saved(image, "JPEG", quality=90, progressive=True))
    write("grey.jpg", saved(image.convert("L"), "JPEG", quality=90))
    write("cmyk.jpg", saved(Image.fromarray(rgba, "CMYK"), "JPEG", quality=95))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        write(f"orientation_{orientation}.jpg", saved(image, "JPEG", quality=92, subsampling=0, exif=exif))

    write("rgb.png", saved(image, "PNG"))
    write("rgba.png", saved(Image.fromarray(rgba), "PNG"))
    write("grey.png", saved(image.convert("L"), "PNG"))
    write("grey_alpha.png", saved(image.convert("LA"), "PNG"))
    write("bilevel.png", saved(image.convert("1"), "PNG"))
    write("palette_8.png", saved(image.quantize(60), "PNG"))
    write("palette_2.png", saved(image.quantize(4), "PNG", bits=2))
    write("palette_transparent.png", saved(image.quantize(16), "PNG", transparency=3))
    exif = Image.Exif()
    exif[0x0112] = 6
    write("orientation_6.png", saved(image, "PNG", exif=exif))
    low = (rgb.astype(np.uint16) * 7 + 3) % 256
    deep = rgb.astype(np.uint16) * 256 + low
    write("rgb_16.png", png(W, H, 16, 2, [[row.astype(">u2").tobytes() for row in deep]]), rgb)
    # Pillow clips 16-bit grey to white instead of scaling it; the high byte is what is meant.
    write("grey_16.png", png(W, H, 16, 0, [[row.astype(">u2").tobytes() for row in deep[:, :, 1]]]),
          np.repeat(rgb[:, :, 1:2], 3, axis=2))
    adam7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    passes = [[row.tobytes() for row in rgb[y::dy, x::dx]] if rgb[y::dy, x::dx].size else [] for x, y, dx, dy in adam7]
    write("interlaced.png", png(W, H, 8, 2, passes))

    write("lossless.webp", saved(image, "WEBP", lossless=True))
    write("lossy.webp", saved(image, "WEBP", quality=90))
    write("alpha.webp", saved(Image.fromarray(rgba), "WEBP", lossless=True, exact=True))
    exif = Image.Exif()
    exif[0x0112] = 8
    write("orientation_8.webp", saved(image, "WEBP", lossless=True, exif=exif))
    write("animated.webp", saved(image, "WEBP", lossless=True, save_all=True, duration=50,
                                 append_images=[Image.fromarray(255 - rgb), Image.fromarray(rgb[:, ::-1].copy())]))

    write("rgb_24.bmp", saved(image, "BMP"))
    write("rgba_32.bmp", saved(Image.fromarray(rgba), "BMP"))
    write("palette_8.bmp", saved(image.quantize(50), "BMP"))
    write("grey_8.bmp", saved(image.convert("L"), "BMP"))
    bgr_rows = [row.tobytes() + bytes(-3 * W % 4) for row in rgb[:, :, ::-1]]
    write("top_down.bmp", bmp(W, -H, 24, 0, b"", b"", b"".join(bgr_rows)))
    rgbx = np.concatenate([rgb, np.zeros((H, W, 1), np.uint8)], axis=2)[::-1]
    write("masks_32.bmp", bmp(W, H, 32, 3, b"", struct.pack("<III", 0xff, 0xff00, 0xff0000), rgbx.tobytes()), rgb)


if __name__ == "__main__":
    main()
