#include "server/onnx/attributes.h"

#include <set>

#include "absl/strings/str_cat.h"

namespace tern::onnx {

using ::onnx::AttributeProto;

namespace {

// Before IR version 3 of the format the type was not written; a float then looks like this.
AttributeProto::AttributeType TypeOf(const AttributeProto& attribute) {
  if (attribute.type() != AttributeProto::UNDEFINED) return attribute.type();
  if (attribute.has_f()) return AttributeProto::FLOAT;
  if (attribute.has_i()) return AttributeProto::INT;
  if (attribute.has_s()) return AttributeProto::STRING;
  if (attribute.has_t()) return AttributeProto::TENSOR;
  if (attribute.floats_size() > 0) return AttributeProto::FLOATS;
  if (attribute.ints_size() > 0) return AttributeProto::INTS;
  return AttributeProto::UNDEFINED;
}

}  // namespace

Attributes::Attributes(::onnx::NodeProto& node) : node_(node), read_(node.attribute_size()) {
  std::set<std::string> names;
  for (const AttributeProto& attribute : node.attribute()) {
    if (!names.insert(attribute.name()).second) {
      status_ = absl::InvalidArgumentError(
          absl::StrCat("attribute '", attribute.name(), "' is given twice"));
    }
  }
}

AttributeProto* Attributes::Find(absl::string_view name, AttributeProto::AttributeType type) {
  for (int i = 0; i < node_.attribute_size(); ++i) {
    if (absl::string_view(node_.attribute(i).name()) != name) continue;
    read_[i] = true;
    if (TypeOf(node_.attribute(i)) == type) return node_.mutable_attribute(i);
    status_ = absl::InvalidArgumentError(absl::StrCat("attribute '", name, "' has type ",
                                                      node_.attribute(i).type(), ", wanted ",
                                                      static_cast<int>(type)));
    return nullptr;
  }
  return nullptr;
}

bool Attributes::Has(absl::string_view name) const {
  for (const AttributeProto& attribute : node_.attribute()) {
    if (absl::string_view(attribute.name()) == name) return true;
  }
  return false;
}

int64_t Attributes::Int(absl::string_view name, int64_t otherwise) {
  const AttributeProto* attribute = Find(name, AttributeProto::INT);
  return attribute == nullptr ? otherwise : attribute->i();
}

float Attributes::Float(absl::string_view name, float otherwise) {
  const AttributeProto* attribute = Find(name, AttributeProto::FLOAT);
  return attribute == nullptr ? otherwise : attribute->f();
}

std::string Attributes::String(absl::string_view name, absl::string_view otherwise) {
  const AttributeProto* attribute = Find(name, AttributeProto::STRING);
  return attribute == nullptr ? std::string(otherwise) : attribute->s();
}

std::vector<int64_t> Attributes::Ints(absl::string_view name, std::vector<int64_t> otherwise) {
  const AttributeProto* attribute = Find(name, AttributeProto::INTS);
  if (attribute == nullptr) return otherwise;
  return {attribute->ints().begin(), attribute->ints().end()};
}

std::vector<float> Attributes::Floats(absl::string_view name) {
  const AttributeProto* attribute = Find(name, AttributeProto::FLOATS);
  if (attribute == nullptr) return {};
  return {attribute->floats().begin(), attribute->floats().end()};
}

::onnx::TensorProto* Attributes::Tensor(absl::string_view name) {
  AttributeProto* attribute = Find(name, AttributeProto::TENSOR);
  return attribute == nullptr ? nullptr : attribute->mutable_t();
}

void Attributes::Ignore(absl::string_view name) {
  for (int i = 0; i < node_.attribute_size(); ++i) {
    if (absl::string_view(node_.attribute(i).name()) == name) read_[i] = true;
  }
}

absl::Status Attributes::Finish() const {
  if (!status_.ok()) return status_;
  for (int i = 0; i < node_.attribute_size(); ++i) {
    if (!read_[i]) {
      return absl::UnimplementedError(
          absl::StrCat("attribute '", node_.attribute(i).name(), "' is not supported"));
    }
  }
  return absl::OkStatus();
}

}  // namespace tern::onnx
