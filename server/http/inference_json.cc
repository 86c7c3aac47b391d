#include "server/http/inference_json.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <type_traits>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"
#include "server/base/limit_message.h"
#include "server/base/status_macros.h"
#include "server/oip/infer.h"

namespace tern::http {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using inference::InferParameter;
using nlohmann::json;
using Parameters = google::protobuf::Map<std::string, InferParameter>;

// Of a body without the arrays in "data": a parameter of an input lies on level 4. What writes and
// destroys JSON recurses once per level.
constexpr int kMaxJsonLevels = 16;
// Of a body without the numbers in "data"; 64 images as {"b64": string} are 128. Each takes far
// more than its text: an empty array 40 bytes, an empty object 64.
constexpr int kMaxJsonValues = 4096;
constexpr int kMaxDepth = 4;  // of nested arrays in "data": no tensor has more dimensions

absl::Status Invalid(absl::string_view what) { return absl::InvalidArgumentError(what); }

std::string Dump(const json& value) {
  return value.dump(-1, ' ', false, json::error_handler_t::replace);
}

// How a value looks in an error message.
std::string Short(const json& value) { return LimitMessage(Dump(value), kMaxQuoteBytes); }

// An input's "data". Arrays may be nested as the shape or flat: the order is the same.
struct Elements {
  google::protobuf::RepeatedField<float> numbers;
  json not_uint8;               // the first number that is none of 0 to 255; null = all are
  json others = json::array();  // what is no number
  int depth = 1;
};

// A body as JSON, but for the elements of its inputs' "data": the numbers of a tensor, which may be
// millions, take four bytes each. Time is proportional to the text. Of equal names in an object the
// last one holds.
class BodyReader final : public nlohmann::json_sax<json> {
 public:
  // INVALID_ARGUMENT unless `text` is one JSON object.
  absl::Status Read(absl::string_view text) {
    const bool whole = json::sax_parse(text.begin(), text.end(), this);
    TERN_RETURN_IF_ERROR(status_);
    if (!whole || !root_.is_object()) return Invalid("body: is not a JSON object");
    return absl::OkStatus();
  }

  // What was read. An input's "data" that is an array is empty here.
  const json& object() const { return root_; }
  // The elements of that array.
  Elements& DataOf(size_t input) { return data_[input]; }

  bool null() override { return Add(nullptr) != nullptr; }
  bool boolean(bool value) override { return Add(value) != nullptr; }
  bool number_integer(number_integer_t value) override { return AddNumber(value); }
  bool number_unsigned(number_unsigned_t value) override { return AddNumber(value); }
  bool number_float(number_float_t value, const string_t&) override { return AddNumber(value); }
  bool string(string_t& value) override { return Add(std::move(value)) != nullptr; }
  bool binary(binary_t&) override { return false; }  // JSON text has none
  bool start_object(size_t) override { return Open(json::object()); }
  bool key(string_t& name) override {
    if (open_.size() == 1) member_ = name;
    key_ = std::move(name);
    return true;
  }
  bool end_object() override {
    open_.pop_back();
    return true;
  }
  bool start_array(size_t) override {
    if (InElements()) {
      elements_->depth = std::max(elements_->depth, ++depth_);
      return true;
    }
    const bool data = open_.size() == 3 && member_ == "inputs" && open_[1]->is_array() &&
                      open_[2]->is_object() && key_ == "data";
    if (!Open(json::array())) return false;
    if (data) {
      elements_ = &(data_[open_[1]->size() - 1] = Elements());
      open_.back() = &elements_->others;
      depth_ = 1;
    }
    return true;
  }
  bool end_array() override {
    if (InElements()) {
      if (--depth_ > 0) return true;
      elements_ = nullptr;
    }
    open_.pop_back();
    return true;
  }
  bool parse_error(size_t, const std::string&, const json::exception&) override { return false; }

 private:
  // In "data", and not in an object there.
  bool InElements() const { return elements_ != nullptr && open_.back() == &elements_->others; }

  // `value` in its place; null if it is one too many.
  json* Add(json value) {
    if (++values_ > kMaxJsonValues) {
      status_ = Invalid(absl::StrCat("body: more than ", kMaxJsonValues,
                                     " values of JSON besides the numbers in \"data\""));
      return nullptr;
    }
    if (open_.empty()) return &(root_ = std::move(value));
    json& parent = *open_.back();
    if (parent.is_object()) return &(parent[key_] = std::move(value));
    parent.push_back(std::move(value));
    return &parent.back();
  }

  template <typename T>
  bool AddNumber(T value) {
    if (!InElements()) return Add(value) != nullptr;
    elements_->numbers.Add(static_cast<float>(value));
    const bool uint8 = std::is_unsigned_v<T> && value <= 255;
    if (!uint8 && elements_->not_uint8.is_null()) elements_->not_uint8 = value;
    return true;
  }

  bool Open(json container) {
    if (open_.size() == kMaxJsonLevels) {
      status_ = Invalid(absl::StrCat("body: more than ", kMaxJsonLevels, " levels of JSON"));
      return false;
    }
    json* const opened = Add(std::move(container));
    if (opened != nullptr) open_.push_back(opened);
    return opened != nullptr;
  }

  absl::Status status_;
  json root_;
  int values_ = 0;
  std::vector<json*> open_;          // objects and arrays, the innermost last
  std::string key_, member_;         // the latest name, and the latest one of the root
  std::map<size_t, Elements> data_;  // by input
  Elements* elements_ = nullptr;     // of the "data" that is open
  int depth_ = 0;                    // of arrays in it
};

json ToJson(const Message& message);

json ValueOf(const Message& message, const FieldDescriptor* field, int index) {
  const auto* reflection = message.GetReflection();
  const bool repeated = index >= 0;
  switch (field->cpp_type()) {
    case FieldDescriptor::CPPTYPE_INT32:
      return repeated ? reflection->GetRepeatedInt32(message, field, index)
                      : reflection->GetInt32(message, field);
    case FieldDescriptor::CPPTYPE_INT64:
      return repeated ? reflection->GetRepeatedInt64(message, field, index)
                      : reflection->GetInt64(message, field);
    case FieldDescriptor::CPPTYPE_UINT32:
      return repeated ? reflection->GetRepeatedUInt32(message, field, index)
                      : reflection->GetUInt32(message, field);
    case FieldDescriptor::CPPTYPE_UINT64:
      return repeated ? reflection->GetRepeatedUInt64(message, field, index)
                      : reflection->GetUInt64(message, field);
    case FieldDescriptor::CPPTYPE_DOUBLE:
      return repeated ? reflection->GetRepeatedDouble(message, field, index)
                      : reflection->GetDouble(message, field);
    case FieldDescriptor::CPPTYPE_FLOAT:
      return repeated ? reflection->GetRepeatedFloat(message, field, index)
                      : reflection->GetFloat(message, field);
    case FieldDescriptor::CPPTYPE_BOOL:
      return repeated ? reflection->GetRepeatedBool(message, field, index)
                      : reflection->GetBool(message, field);
    case FieldDescriptor::CPPTYPE_ENUM:
      return (repeated ? reflection->GetRepeatedEnum(message, field, index)
                       : reflection->GetEnum(message, field))
          ->name();
    case FieldDescriptor::CPPTYPE_STRING:
      return repeated ? reflection->GetRepeatedString(message, field, index)
                      : reflection->GetString(message, field);
    case FieldDescriptor::CPPTYPE_MESSAGE:
      return ToJson(repeated ? reflection->GetRepeatedMessage(message, field, index)
                             : reflection->GetMessage(message, field));
  }
  return nullptr;
}

json ToJson(const Message& message) {
  json object = json::object();
  const auto* descriptor = message.GetDescriptor();
  const auto* reflection = message.GetReflection();
  for (int i = 0; i < descriptor->field_count(); ++i) {
    const FieldDescriptor* field = descriptor->field(i);
    json& value = object[field->name()];
    if (field->is_map()) {
      value = json::object();
      const FieldDescriptor* content = field->message_type()->FindFieldByName("value");
      const FieldDescriptor* key = field->message_type()->FindFieldByName("key");
      for (int k = 0; k < reflection->FieldSize(message, field); ++k) {
        const Message& entry = reflection->GetRepeatedMessage(message, field, k);
        value[entry.GetReflection()->GetString(entry, key)] = ValueOf(entry, content, -1);
      }
    } else if (field->is_repeated()) {
      value = json::array();
      for (int k = 0; k < reflection->FieldSize(message, field); ++k)
        value.push_back(ValueOf(message, field, k));
    } else if (field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE &&
               !reflection->HasField(message, field)) {
      object.erase(field->name());
    } else {
      value = ValueOf(message, field, -1);
    }
  }
  return object;
}

// Null if there is no such member; clients write null for one that they leave out.
const json* Member(const json& object, const char* name) {
  const auto found = object.find(name);
  return found == object.end() || found->is_null() ? nullptr : &*found;
}

absl::StatusOr<std::string> StringOf(const json& object, const char* name,
                                     absl::string_view where) {
  const json* const found = Member(object, name);
  if (found == nullptr) return std::string();
  if (found->is_string()) return found->get<std::string>();
  return Invalid(absl::StrCat(where, name, ": got ", Short(*found), ", want a string"));
}

// Whether a number like 3.0 is an integer; some clients write all of theirs so.
bool IsWhole(double value) {
  return value >= -0x1p63 && value < 0x1p63 && std::trunc(value) == value;
}

// Bool, integer, number or string; others are refused.
absl::Status ReadParameters(const json& object, absl::string_view where, Parameters* parameters) {
  const json* const found = Member(object, "parameters");
  if (found == nullptr) return absl::OkStatus();
  if (!found->is_object()) {
    return Invalid(absl::StrCat(where, "parameters: got ", Short(*found), ", want an object"));
  }
  for (const auto& [name, value] : found->items()) {
    InferParameter& parameter = (*parameters)[name];
    if (value.is_boolean()) {
      parameter.set_bool_param(value.get<bool>());
    } else if (value.is_number_unsigned() &&
               value.get<uint64_t>() > uint64_t{std::numeric_limits<int64_t>::max()}) {
      parameter.set_uint64_param(value.get<uint64_t>());
    } else if (value.is_number_integer()) {
      parameter.set_int64_param(value.get<int64_t>());
    } else if (value.is_number() && IsWhole(value.get<double>())) {
      parameter.set_int64_param(static_cast<int64_t>(value.get<double>()));
    } else if (value.is_number()) {
      parameter.set_double_param(value.get<double>());
    } else if (value.is_string()) {
      parameter.set_string_param(value.get<std::string>());
    } else {
      return Invalid(absl::StrCat(where, "parameters.", LimitMessage(name, kMaxQuoteBytes),
                                  ": got ", Short(value),
                                  ", want a boolean, a number or a string"));
    }
  }
  return absl::OkStatus();
}

bool IsTrue(const Parameters& parameters, const char* name) {
  const auto found = parameters.find(name);
  return found != parameters.end() && found->second.bool_param();
}

absl::Status BadElement(absl::string_view got, absl::string_view want) {
  return Invalid(absl::StrCat("data: got ", got, ", want ", want));
}

// Into the field of `datatype`.
absl::Status TakeElements(Elements& data, const std::string& datatype,
                          inference::InferTensorContents* contents) {
  if (data.depth > kMaxDepth)
    return Invalid(absl::StrCat("data: arrays in more than ", kMaxDepth, " levels"));
  if (datatype == "FP32") {
    if (!data.others.empty()) return BadElement(Short(data.others[0]), "a number");
    contents->mutable_fp32_contents()->Swap(&data.numbers);
  } else if (datatype == "UINT8") {
    if (!data.others.empty() || !data.not_uint8.is_null()) {
      return BadElement(Short(data.others.empty() ? data.not_uint8 : data.others[0]),
                        "an integer of 0 to 255");
    }
    contents->mutable_uint_contents()->Add(data.numbers.begin(), data.numbers.end());
  } else if (datatype == "BYTES") {
    constexpr char kWant[] = "base64 as a string or as {\"b64\": string}";
    if (!data.numbers.empty()) return BadElement(absl::StrCat(data.numbers[0]), kWant);
    for (const json& value : data.others) {
      const bool object = value.is_object() && value.size() == 1 && value.contains("b64");
      const json& text = object ? value["b64"] : value;
      std::string bytes;
      if (!text.is_string() || !absl::Base64Unescape(text.get_ref<const std::string&>(), &bytes))
        return BadElement(Short(value), kWant);
      contents->add_bytes_contents(std::move(bytes));
    }
  } else {
    return Invalid(absl::StrCat("datatype: got '", LimitMessage(datatype, kMaxQuoteBytes),
                                "', want FP32, UINT8 or BYTES"));
  }
  return absl::OkStatus();
}

absl::Status ReadShape(const json& input, google::protobuf::RepeatedField<int64_t>* shape) {
  const auto found = input.find("shape");
  if (found == input.end() || !found->is_array() || found->size() > kMaxDepth) {
    return Invalid(absl::StrCat("shape: got ", found == input.end() ? "nothing" : Short(*found),
                                ", want an array of at most ", kMaxDepth, " integers"));
  }
  for (const json& dimension : *found) {
    if (!dimension.is_number_integer())
      return Invalid(absl::StrCat("shape: got ", Short(*found), ", want integers"));
    shape->Add(dimension.get<int64_t>());
  }
  return absl::OkStatus();
}

// `elements` are those of "data"; `rest` loses what belongs to this input.
absl::Status ReadInput(const json& input, Elements& elements, absl::string_view* rest,
                       inference::ModelInferRequest* request) {
  if (!input.is_object()) return Invalid(absl::StrCat("got ", Short(input), ", want an object"));
  auto* tensor = request->add_inputs();
  TERN_ASSIGN_OR_RETURN(*tensor->mutable_name(), StringOf(input, "name", ""));
  TERN_ASSIGN_OR_RETURN(*tensor->mutable_datatype(), StringOf(input, "datatype", ""));
  TERN_RETURN_IF_ERROR(ReadShape(input, tensor->mutable_shape()));
  TERN_RETURN_IF_ERROR(ReadParameters(input, "", tensor->mutable_parameters()));
  // Its contents are elsewhere; the server, which has no shared memory, says so as it does for gRPC.
  if (tensor->parameters().contains("shared_memory_region")) return absl::OkStatus();
  const auto size = tensor->parameters().find("binary_data_size");
  const auto data = input.find("data");
  if (size == tensor->parameters().end()) {
    if (data == input.end()) {
      return Invalid("got neither \"data\" nor the parameter binary_data_size, want one of them");
    }
    if (!data->is_array())
      return Invalid(absl::StrCat("data: got ", Short(*data), ", want an array"));
    return TakeElements(elements, tensor->datatype(), tensor->mutable_contents());
  }
  if (data != input.end()) {
    return Invalid("got \"data\" and the parameter binary_data_size, want one of them");
  }
  const InferParameter& parameter = size->second;
  if (parameter.parameter_choice_case() != InferParameter::kInt64Param ||
      parameter.int64_param() < 0 ||
      static_cast<uint64_t>(parameter.int64_param()) > rest->size()) {
    return Invalid(absl::StrCat("parameters.binary_data_size: got {",
                                LimitMessage(parameter.ShortDebugString(), kMaxQuoteBytes), "}, ",
                                rest->size(), " bytes follow the JSON"));
  }
  request->add_raw_input_contents(std::string(rest->substr(0, parameter.int64_param())));
  rest->remove_prefix(parameter.int64_param());
  return absl::OkStatus();
}

absl::StatusOr<const json*> ArrayOf(const json& object, const char* name) {
  static const json* const kNone = new json(json::array());
  const json* const found = Member(object, name);
  if (found == nullptr) return kNone;
  if (!found->is_array())
    return Invalid(absl::StrCat(name, ": got ", Short(*found), ", want an array"));
  return found;
}

// A body that is one image.
InferBody OneImage(absl::string_view body) {
  InferBody parsed;
  auto* input = parsed.request.add_inputs();
  input->set_name(oip::kInputName);
  input->set_datatype("BYTES");
  input->add_shape(1);
  input->mutable_contents()->add_bytes_contents(std::string(body));
  parsed.binary = {false};
  return parsed;
}

json ValueOf(const InferParameter& parameter) {
  switch (parameter.parameter_choice_case()) {
    case InferParameter::kBoolParam:
      return parameter.bool_param();
    case InferParameter::kInt64Param:
      return parameter.int64_param();
    case InferParameter::kStringParam:
      return parameter.string_param();
    case InferParameter::kDoubleParam:
      return parameter.double_param();
    case InferParameter::kUint64Param:
      return parameter.uint64_param();
    case InferParameter::PARAMETER_CHOICE_NOT_SET:
      return nullptr;
  }
  return nullptr;
}

// The elements of a raw tensor; it is our own, so it is what it says. INTERNAL for numbers that
// JSON has not.
absl::StatusOr<json> ElementsOf(const std::string& datatype, const std::string& raw) {
  json data = json::array();
  for (size_t at = 0; at + sizeof(uint32_t) <= raw.size();) {
    if (datatype == "BYTES") {
      uint32_t size = 0;
      std::memcpy(&size, raw.data() + at, sizeof(size));
      data.push_back(raw.substr(at + sizeof(size), size));
      at += sizeof(size) + size;
    } else {
      float value = 0;
      std::memcpy(&value, raw.data() + at, sizeof(value));
      if (!std::isfinite(value)) {
        return absl::InternalError(
            absl::StrCat("element ", data.size(), " is ", value, ", want a finite number"));
      }
      data.push_back(value);
      at += sizeof(value);
    }
  }
  return data;
}

}  // namespace

std::string MessageToJson(const Message& message) { return Dump(ToJson(message)); }

std::string IndexToJson(const inference::RepositoryIndexResponse& index) {
  return Dump(ToJson(index)["models"]);
}

absl::StatusOr<bool> ParseIndexBody(absl::string_view body) {
  if (body.empty()) return false;
  BodyReader reader;
  TERN_RETURN_IF_ERROR(reader.Read(body));
  const json& object = reader.object();
  const auto ready = object.find("ready");
  if (ready == object.end()) return false;
  if (!ready->is_boolean())
    return Invalid(absl::StrCat("ready: got ", Short(*ready), ", want a boolean"));
  return ready->get<bool>();
}

absl::StatusOr<InferBody> ParseInferBody(absl::string_view body,
                                         std::optional<uint64_t> json_bytes) {
  if (json_bytes == uint64_t{0}) return OneImage(body);
  if (json_bytes.has_value() && *json_bytes > body.size()) {
    return Invalid(absl::StrCat("Inference-Header-Content-Length: got ", *json_bytes,
                                ", the body has ", body.size(), " bytes"));
  }
  const absl::string_view text = body.substr(0, json_bytes.value_or(body.size()));
  absl::string_view rest = body.substr(text.size());
  BodyReader reader;
  TERN_RETURN_IF_ERROR(reader.Read(text));
  const json& object = reader.object();
  InferBody parsed;
  inference::ModelInferRequest& request = parsed.request;
  TERN_ASSIGN_OR_RETURN(*request.mutable_id(), StringOf(object, "id", ""));
  TERN_RETURN_IF_ERROR(ReadParameters(object, "", request.mutable_parameters()));
  TERN_ASSIGN_OR_RETURN(const json* inputs, ArrayOf(object, "inputs"));
  for (size_t i = 0; i < inputs->size(); ++i) {
    TERN_RETURN_IF_ERROR(Annotate(ReadInput((*inputs)[i], reader.DataOf(i), &rest, &request),
                                  absl::StrCat("inputs[", i, "]")));
  }
  if (!rest.empty()) {
    return Invalid(
        absl::StrCat("body: ", rest.size(), " bytes are left after JSON and inputs, want none"));
  }
  const bool all_binary = IsTrue(request.parameters(), "binary_data_output");
  TERN_ASSIGN_OR_RETURN(const json* outputs, ArrayOf(object, "outputs"));
  for (const json& output : *outputs) {
    if (!output.is_object())
      return Invalid(absl::StrCat("outputs: got ", Short(output), ", want an object"));
    auto* requested = request.add_outputs();
    TERN_ASSIGN_OR_RETURN(*requested->mutable_name(), StringOf(output, "name", "outputs."));
    TERN_RETURN_IF_ERROR(ReadParameters(output, "outputs.", requested->mutable_parameters()));
    const bool says = requested->parameters().contains("binary_data");
    parsed.binary.push_back(says ? IsTrue(requested->parameters(), "binary_data") : all_binary);
  }
  if (parsed.binary.empty()) parsed.binary.push_back(all_binary);
  return parsed;
}

absl::StatusOr<InferAnswer> FormatInferAnswer(const inference::ModelInferResponse& response,
                                              const std::vector<bool>& binary) {
  json object = {{"model_name", response.model_name()},
                 {"model_version", response.model_version()}};
  if (!response.id().empty()) object["id"] = response.id();
  for (const auto& [name, parameter] : response.parameters())
    object["parameters"][name] = ValueOf(parameter);
  InferAnswer answer;
  std::string tail;
  bool any_binary = false;
  object["outputs"] = json::array();
  for (int i = 0; i < response.outputs_size(); ++i) {
    const auto& tensor = response.outputs(i);
    const std::string& raw = response.raw_output_contents(i);
    json output = {{"name", tensor.name()}, {"datatype", tensor.datatype()}};
    for (int64_t dimension : tensor.shape()) output["shape"].push_back(dimension);
    if (static_cast<size_t>(i) < binary.size() && binary[i]) {
      output["parameters"]["binary_data_size"] = raw.size();
      tail += raw;
      any_binary = true;
    } else {
      absl::StatusOr<json> elements = ElementsOf(tensor.datatype(), raw);
      TERN_RETURN_IF_ERROR(Annotate(elements.status(), absl::StrCat("outputs.", tensor.name())));
      output["data"] = *std::move(elements);
    }
    object["outputs"].push_back(std::move(output));
  }
  answer.body = Dump(object);
  if (any_binary) answer.json_bytes = answer.body.size();
  answer.body += tail;
  return answer;
}

}  // namespace tern::http
