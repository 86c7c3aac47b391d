// A network whose answer is plain to see: logits = 10 x mean red, green, blue of an 8x8 image; or
// `gain` times those, moved on by `rotate` classes.
#ifndef TERN_TESTS_SERVING_TINY_MODEL_H_
#define TERN_TESTS_SERVING_TINY_MODEL_H_

#include <onnx/onnx_pb.h>

#include <cstdint>
#include <string>
#include <vector>

#include "tern/v1/model.pb.h"

namespace tern::testing {

inline std::string TinyOnnx(float gain = 10, int rotate = 0) {
  ::onnx::ModelProto model;
  model.set_ir_version(7);
  model.add_opset_import()->set_version(13);
  ::onnx::GraphProto* graph = model.mutable_graph();
  graph->set_name("tiny");
  const auto value = [](::onnx::ValueInfoProto* info, const std::string& name,
                        std::vector<int64_t> dims) {
    info->set_name(name);
    auto* type = info->mutable_type()->mutable_tensor_type();
    type->set_elem_type(::onnx::TensorProto::FLOAT);
    type->mutable_shape()->add_dim()->set_dim_param("n");
    for (int64_t dim : dims) type->mutable_shape()->add_dim()->set_dim_value(dim);
  };
  value(graph->add_input(), "input", {3, 8, 8});
  value(graph->add_output(), "logits", {3});
  const auto weights = [&](const std::string& name, std::vector<int64_t> dims,
                           std::vector<float> data) {
    ::onnx::TensorProto* tensor = graph->add_initializer();
    tensor->set_name(name);
    tensor->set_data_type(::onnx::TensorProto::FLOAT);
    for (int64_t dim : dims) tensor->add_dims(dim);
    for (float x : data) tensor->add_float_data(x);
  };
  weights("w0", {3, 3, 1, 1}, {1, 0, 0, 0, 1, 0, 0, 0, 1});
  weights("w1", {3, 3, 1, 1}, {1, 0, 0, 0, 1, 0, 0, 0, 1});
  std::vector<float> last(9, 0.0f);  // [class, colour]
  for (int colour = 0; colour < 3; ++colour) last[(colour + rotate) % 3 * 3 + colour] = gain;
  weights("fc", {3, 3}, last);
  weights("b", {3}, {0, 0, 0});
  const auto node = [&](const std::string& op, std::vector<std::string> inputs,
                        const std::string& output) {
    ::onnx::NodeProto* n = graph->add_node();
    n->set_op_type(op);
    n->set_name(op + "_" + output);
    for (const std::string& input : inputs) n->add_input(input);
    n->add_output(output);
    return n;
  };
  node("Conv", {"input", "w0"}, "c0");
  node("Relu", {"c0"}, "r0");
  node("Conv", {"r0", "w1"}, "c1");
  node("Relu", {"c1"}, "r1");
  node("GlobalAveragePool", {"r1"}, "g");
  node("Flatten", {"g"}, "f");
  ::onnx::NodeProto* gemm = node("Gemm", {"f", "fc", "b"}, "logits");
  ::onnx::AttributeProto* trans = gemm->add_attribute();
  trans->set_name("transB");
  trans->set_type(::onnx::AttributeProto::INT);
  trans->set_i(1);
  return model.SerializeAsString();
}

// pixel / 255, exact size.
inline v1::Preprocessing TinyPreprocessing() {
  v1::Preprocessing preprocessing;
  preprocessing.set_resize(v1::Preprocessing::EXACT);
  preprocessing.set_scale(1.0f / 255);
  return preprocessing;
}

// An uncompressed 24-bit BMP of one colour.
inline std::string SolidBmp(int width, int height, uint8_t red, uint8_t green, uint8_t blue) {
  const int stride = (width * 3 + 3) / 4 * 4;
  std::string bmp(54 + stride * height, '\0');
  const auto put = [&](int at, uint32_t v) {
    for (int i = 0; i < 4; ++i) bmp[at + i] = static_cast<char>(v >> (8 * i));
  };
  bmp[0] = 'B', bmp[1] = 'M';
  put(2, bmp.size()), put(10, 54), put(14, 40), put(18, width), put(22, height);
  bmp[26] = 1, bmp[28] = 24;
  put(34, stride * height);
  for (int y = 0; y < height; ++y) {
    for (int x = 0; x < width; ++x) {
      char* p = &bmp[54 + y * stride + x * 3];
      p[0] = static_cast<char>(blue), p[1] = static_cast<char>(green),
      p[2] = static_cast<char>(red);
    }
  }
  return bmp;
}

}  // namespace tern::testing

#endif  // TERN_TESTS_SERVING_TINY_MODEL_H_
