// Makes JPEGs for tests.
#ifndef TERN_TESTS_IMAGE_ENCODE_JPEG_H_
#define TERN_TESTS_IMAGE_ENCODE_JPEG_H_

#include <turbojpeg.h>

#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

namespace tern::image::testing {

// `pixels` is [height, width, channels], dense, 8 bits, as the TJPF_ `format` says; `subsampling`
// is one of TJSAMP_. Aborts if libjpeg refuses.
inline std::string EncodeJpeg(const std::vector<uint8_t>& pixels, int width, int height,
                              int quality, int subsampling = TJSAMP_420, int format = TJPF_RGB) {
  unsigned char* out = nullptr;
  unsigned long size = 0;
  const tjhandle handle = tjInitCompress();
  if (tjCompress2(handle, pixels.data(), width, 0, height, format, &out, &size, subsampling,
                  quality, 0) != 0) {
    std::abort();
  }
  std::string bytes(reinterpret_cast<char*>(out), size);
  tjFree(out);
  tjDestroy(handle);
  return bytes;
}

// 64 x 64, without loss to speak of: of every eight columns the two in the middle are red, the rest
// is black. OpenCV's INTER_LINEAR to 8 x 8 reads only the red ones; at 1/8 every pixel is the mean
// of a block, a quarter of the red.
inline std::string StripedJpeg() {
  std::vector<uint8_t> pixels(64 * 64 * 3);
  for (int i = 0; i < 64 * 64; ++i) {
    if (i % 8 == 3 || i % 8 == 4) pixels[3 * i] = 255;
  }
  return EncodeJpeg(pixels, 64, 64, 100, TJSAMP_444);
}

}  // namespace tern::image::testing

#endif  // TERN_TESTS_IMAGE_ENCODE_JPEG_H_
