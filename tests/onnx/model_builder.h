// Builds small ONNX models for tests through ONNX's own protobuf classes.
#ifndef TERN_TESTS_ONNX_MODEL_BUILDER_H_
#define TERN_TESTS_ONNX_MODEL_BUILDER_H_

#include <onnx/onnx_pb.h>

#include <string>
#include <utility>
#include <vector>

namespace tern::testing {

using Dims = std::vector<int64_t>;

// One attribute; the constructors choose the type. Lists of one number need Dims{n}.
struct Attribute {
  Attribute(const char* name, int64_t value) : name(name) {
    proto.set_type(::onnx::AttributeProto::INT);
    proto.set_i(value);
  }
  Attribute(const char* name, int value) : Attribute(name, int64_t{value}) {}
  Attribute(const char* name, float value) : name(name) {
    proto.set_type(::onnx::AttributeProto::FLOAT);
    proto.set_f(value);
  }
  Attribute(const char* name, const char* value) : name(name) {
    proto.set_type(::onnx::AttributeProto::STRING);
    proto.set_s(value);
  }
  Attribute(const char* name, std::vector<int64_t> values) : name(name) {
    proto.set_type(::onnx::AttributeProto::INTS);
    for (int64_t value : values) proto.add_ints(value);
  }
  Attribute(const char* name, ::onnx::TensorProto tensor) : name(name) {
    proto.set_type(::onnx::AttributeProto::TENSOR);
    *proto.mutable_t() = std::move(tensor);
  }
  std::string name;
  ::onnx::AttributeProto proto;
};

inline ::onnx::TensorProto Floats(std::vector<int64_t> dims, const std::vector<float>& values) {
  ::onnx::TensorProto tensor;
  tensor.set_data_type(::onnx::TensorProto::FLOAT);
  for (int64_t dim : dims) tensor.add_dims(dim);
  tensor.set_raw_data(values.data(), values.size() * sizeof(float));
  return tensor;
}

inline ::onnx::TensorProto Ints(std::vector<int64_t> dims, const std::vector<int64_t>& values) {
  ::onnx::TensorProto tensor;
  tensor.set_data_type(::onnx::TensorProto::INT64);
  for (int64_t dim : dims) tensor.add_dims(dim);
  for (int64_t value : values) tensor.add_int64_data(value);
  return tensor;
}
// int8 or uint8.
inline ::onnx::TensorProto Bytes(::onnx::TensorProto::DataType type, std::vector<int64_t> dims,
                                 const std::vector<int>& values) {
  ::onnx::TensorProto tensor;
  tensor.set_data_type(type);
  for (int64_t dim : dims) tensor.add_dims(dim);
  for (int value : values) tensor.mutable_raw_data()->push_back(static_cast<char>(value));
  return tensor;
}
inline ::onnx::TensorProto Ints32(std::vector<int64_t> dims, const std::vector<int>& values) {
  ::onnx::TensorProto tensor;
  tensor.set_data_type(::onnx::TensorProto::INT32);
  for (int64_t dim : dims) tensor.add_dims(dim);
  for (int value : values) tensor.add_int32_data(value);
  return tensor;
}
inline ::onnx::TensorProto List(const std::vector<int64_t>& values) {
  return Ints({static_cast<int64_t>(values.size())}, values);
}

// One input "input" [N,c,h,w]; Finish flattens a value to the output "logits".
class ModelBuilder {
 public:
  explicit ModelBuilder(int opset, std::vector<int64_t> sample) {
    model.set_ir_version(8);
    model.add_opset_import()->set_version(opset);
    graph().set_name("test");
    auto* input = graph().add_input();
    input->set_name("input");
    auto* type = input->mutable_type()->mutable_tensor_type();
    type->set_elem_type(::onnx::TensorProto::FLOAT);
    type->mutable_shape()->add_dim()->set_dim_param("N");
    for (int64_t dim : sample) type->mutable_shape()->add_dim()->set_dim_value(dim);
  }

  ::onnx::GraphProto& graph() { return *model.mutable_graph(); }

  ModelBuilder& Weight(const std::string& name, ::onnx::TensorProto tensor) {
    tensor.set_name(name);
    *graph().add_initializer() = std::move(tensor);
    return *this;
  }

  ModelBuilder& Node(const std::string& type, std::vector<std::string> inputs,
                     std::vector<std::string> outputs, std::vector<Attribute> attributes = {}) {
    auto* node = graph().add_node();
    node->set_op_type(type);
    node->set_name(type + "_" + std::to_string(graph().node_size()));
    for (auto& input : inputs) node->add_input(std::move(input));
    for (auto& output : outputs) node->add_output(std::move(output));
    for (auto& attribute : attributes) {
      attribute.proto.set_name(attribute.name);
      *node->add_attribute() = std::move(attribute.proto);
    }
    return *this;
  }

  std::string Finish(const std::string& value) {
    Node("Flatten", {value}, {"logits"});
    graph().add_output()->set_name("logits");
    return model.SerializeAsString();
  }

  ::onnx::ModelProto model;
};

}  // namespace tern::testing

#endif  // TERN_TESTS_ONNX_MODEL_BUILDER_H_
