// The attributes of one ONNX node.
#ifndef TERN_SERVER_ONNX_ATTRIBUTES_H_
#define TERN_SERVER_ONNX_ATTRIBUTES_H_

#include <onnx/onnx_pb.h>

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace tern::onnx {

// Reads attributes by name and remembers which were read, so that one that Tern does not
// know is reported instead of ignored. The getters return the default if the attribute is
// absent, or if it has another type; the latter makes status() an error. Refers to the node,
// which must outlive it.
class Attributes {
 public:
  explicit Attributes(::onnx::NodeProto& node);

  bool Has(absl::string_view name) const;
  int64_t Int(absl::string_view name, int64_t otherwise);
  float Float(absl::string_view name, float otherwise);
  std::string String(absl::string_view name, absl::string_view otherwise);
  std::vector<int64_t> Ints(absl::string_view name, std::vector<int64_t> otherwise = {});
  std::vector<float> Floats(absl::string_view name);
  // Null if absent.
  ::onnx::TensorProto* Tensor(absl::string_view name);
  // Marks an attribute as harmless whatever its value.
  void Ignore(absl::string_view name);

  // INVALID_ARGUMENT: an attribute read so far has the wrong type, or a name is given twice.
  const absl::Status& status() const { return status_; }
  // status(); UNIMPLEMENTED if nobody has read one.
  absl::Status Finish() const;

 private:
  ::onnx::AttributeProto* Find(absl::string_view name, ::onnx::AttributeProto::AttributeType type);

  ::onnx::NodeProto& node_;
  std::vector<bool> read_;
  absl::Status status_;
};

}  // namespace tern::onnx

#endif  // TERN_SERVER_ONNX_ATTRIBUTES_H_
