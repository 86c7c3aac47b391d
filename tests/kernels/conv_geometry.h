// Geometries for the tests of convolution kernels.
#ifndef TERN_TESTS_KERNELS_CONV_GEOMETRY_H_
#define TERN_TESTS_KERNELS_CONV_GEOMETRY_H_

#include <array>

#include "server/kernels/cluster_conv.h"

namespace tern::kernels::testing {

// With the output size that the padding gives. Pads: top, left, bottom, right.
inline ConvGeometry Geometry(int ih, int iw, int ic, int oc, int kh, int kw, int stride_h = 1,
                             int stride_w = 1, std::array<int, 4> pads = {0, 0, 0, 0},
                             int dilation_h = 1, int dilation_w = 1) {
  ConvGeometry g;
  g.ih = ih;
  g.iw = iw;
  g.ic = ic;
  g.oc = oc;
  g.kh = kh;
  g.kw = kw;
  g.stride_h = stride_h;
  g.stride_w = stride_w;
  g.pad_top = pads[0];
  g.pad_left = pads[1];
  g.dilation_h = dilation_h;
  g.dilation_w = dilation_w;
  g.oh = (ih + pads[0] + pads[2] - dilation_h * (kh - 1) - 1) / stride_h + 1;
  g.ow = (iw + pads[1] + pads[3] - dilation_w * (kw - 1) - 1) / stride_w + 1;
  return g;
}

}  // namespace tern::kernels::testing

#endif  // TERN_TESTS_KERNELS_CONV_GEOMETRY_H_
