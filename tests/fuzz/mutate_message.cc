#include "tests/fuzz/mutate_message.h"

#include <google/protobuf/unknown_field_set.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "tests/fuzz/fuzzer.h"

// Provided by libFuzzer.
extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

namespace tern::fuzz {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::UnknownField;
using google::protobuf::UnknownFieldSet;

constexpr size_t kLongestName = 64;

// Works on the wire format, where all types of numbers are three and a message is its fields in
// order: a set of unknown fields is just that.
class Mutator {
 public:
  explicit Mutator(std::mt19937& random) : random_(random) {}

  void CollectNames(const Descriptor& type, const std::string& bytes) {
    UnknownFieldSet fields;
    if (!fields.ParseFromString(bytes)) return;
    for (int i = 0; i < fields.field_count() && names_.size() < 1000; ++i) {
      const UnknownField& field = fields.field(i);
      if (field.type() != UnknownField::TYPE_LENGTH_DELIMITED) continue;
      if (const Descriptor* inner = MessageType(type, field)) {
        CollectNames(*inner, field.length_delimited());
      } else if (field.length_delimited().size() <= kLongestName) {
        names_.push_back(field.length_delimited());
      }
    }
  }

  void Mutate(const Descriptor& type, std::string& bytes) {
    UnknownFieldSet fields;
    if (!fields.ParseFromString(bytes)) return MutateBytes(bytes.size() + 16, bytes);
    if (!Descend(type, fields)) Change(type, fields);
    bytes.clear();
    fields.SerializeToString(&bytes);
  }

 private:
  size_t Below(size_t n) { return random_() % n; }

  // The type of a field that is a message; null for any other field.
  static const Descriptor* MessageType(const Descriptor& type, const UnknownField& field) {
    const FieldDescriptor* known = type.FindFieldByNumber(field.number());
    return known == nullptr || field.type() != UnknownField::TYPE_LENGTH_DELIMITED
               ? nullptr
               : known->message_type();
  }

  // Mutates one of the messages inside, the longer the likelier; false if the change is to be made
  // at this level.
  bool Descend(const Descriptor& type, UnknownFieldSet& fields) {
    if (Below(8) == 0) return false;
    const auto weight = [&](int i) {
      const UnknownField& field = fields.field(i);
      return MessageType(type, field) == nullptr
                 ? 0
                 : 4 + std::min<size_t>(field.length_delimited().size(), 1000);
    };
    size_t total = 0;
    for (int i = 0; i < fields.field_count(); ++i) total += weight(i);
    if (total == 0) return false;
    size_t at = Below(total);
    int i = 0;
    for (; at >= weight(i); ++i) at -= weight(i);
    UnknownField& field = *fields.mutable_field(i);
    Mutate(*MessageType(type, field), *field.mutable_length_delimited());
    return true;
  }

  void Change(const Descriptor& type, UnknownFieldSet& fields) {
    const int count = fields.field_count();
    if (count == 0) return Add(type, fields);
    const int i = static_cast<int>(Below(count)), j = static_cast<int>(Below(count));
    switch (Below(10)) {
      case 0:
        return Add(type, fields);
      case 1:
        return fields.DeleteSubrange(i, 1);
      case 2:
        return fields.AddField(UnknownField(fields.field(i)));
      case 3: {  // order matters among repeated fields
        UnknownFieldSet moved;
        for (int k = 0; k < count; ++k) moved.AddField(fields.field(k == i ? j : k == j ? i : k));
        return fields.Swap(&moved);
      }
      default:
        return ChangeValue(*fields.mutable_field(i));
    }
  }

  void ChangeValue(UnknownField& field) {
    switch (field.type()) {
      case UnknownField::TYPE_VARINT:
        return field.set_varint(Integer(field.varint()));
      case UnknownField::TYPE_FIXED32:
        return field.set_fixed32(Float(field.fixed32()));
      case UnknownField::TYPE_FIXED64:
        return field.set_fixed64(Double(field.fixed64()));
      case UnknownField::TYPE_LENGTH_DELIMITED: {
        std::string& text = *field.mutable_length_delimited();
        if (!names_.empty() && text.size() <= kLongestName && Below(2) == 0) {
          text = names_[Below(names_.size())];
        } else {
          MutateBytes(text.size() + 16, text);
        }
        return;
      }
      default:
        return;
    }
  }

  void Add(const Descriptor& type, UnknownFieldSet& fields) {
    if (type.field_count() == 0) return;
    const FieldDescriptor& field = *type.field(static_cast<int>(Below(type.field_count())));
    switch (field.cpp_type()) {
      case FieldDescriptor::CPPTYPE_FLOAT:
        return fields.AddFixed32(field.number(), Float(0));
      case FieldDescriptor::CPPTYPE_DOUBLE:
        return fields.AddFixed64(field.number(), Double(0));
      case FieldDescriptor::CPPTYPE_STRING:
      case FieldDescriptor::CPPTYPE_MESSAGE:
        fields.AddLengthDelimited(field.number());
        return ChangeValue(*fields.mutable_field(fields.field_count() - 1));
      default:
        return fields.AddVarint(field.number(), Integer(0));
    }
  }

  uint64_t Integer(uint64_t old) {
    constexpr int64_t kEdges[] = {-1,        127,       128,       255,       256,
                                  65535,     65536,     1 << 20,   1 << 30,   INT32_MAX,
                                  INT32_MIN, 1ll << 32, 1ll << 40, INT64_MAX, INT64_MIN};
    switch (Below(4)) {
      case 0:
        return old + Below(9) - 4;
      case 1:
        return Below(17);
      case 2:
        return old ^ uint64_t { 1 } << Below(64);
      default:
        return static_cast<uint64_t>(kEdges[Below(std::size(kEdges))]);
    }
  }

  // A bit pattern: flipping any bit reaches every sign and size, infinities and NaN included.
  uint32_t Float(uint32_t old) {
    constexpr uint32_t kEdges[] = {0x00000000, 0x80000000, 0x3f800000, 0xbf800000, 0x7f800000,
                                   0x7fc00000, 0x7f7fffff, 0x00800000, 0x00000001, 0x4f000000};
    return Below(2) == 0 ? old ^ 1u << Below(32) : kEdges[Below(std::size(kEdges))];
  }

  uint64_t Double(uint64_t old) {
    return old ^ uint64_t { 1 } << Below(64);
  }

  std::mt19937& random_;
  std::vector<std::string> names_;
};

}  // namespace

void MutateMessage(const Descriptor& type, std::mt19937& random, std::string& bytes) {
  Mutator mutator(random);
  mutator.CollectNames(type, bytes);
  for (size_t changes = 1 + random() % 3; changes > 0; --changes) mutator.Mutate(type, bytes);
}

void MutateBytes(size_t max_size, std::string& bytes) {
  const size_t size = std::min(bytes.size(), max_size);
  bytes.resize(max_size);
  bytes.resize(LLVMFuzzerMutate(reinterpret_cast<uint8_t*>(bytes.data()), size, max_size));
}

size_t MutateInput(const google::protobuf::Descriptor& type, uint8_t* data, size_t size,
                   size_t max_size, unsigned int seed) {
  std::mt19937 random(seed);
  std::string bytes(Text(data, size));
  if (random() % 8 == 0) {
    MutateBytes(max_size, bytes);
  } else {
    MutateMessage(type, random, bytes);
  }
  if (bytes.size() > max_size) bytes.resize(max_size);
  std::memcpy(data, bytes.data(), bytes.size());
  return bytes.size();
}

}  // namespace tern::fuzz
