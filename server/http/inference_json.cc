#include "server/http/inference_json.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"
#include "server/base/status_macros.h"
#include "server/oip/infer.h"

namespace tern::http {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using inference::InferParameter;
using nlohmann::json;
using Parameters = google::protobuf::Map<std::string, InferParameter>;

// Of a whole body: a tensor's innermost array lies on level 7. What writes and destroys JSON
// recurses once per level.
constexpr int kMaxJsonLevels = 16;
constexpr int kMaxDepth = 4;  // of nested arrays in "data": no tensor has more dimensions

absl::Status Invalid(absl::string_view what) { return absl::InvalidArgumentError(what); }

std::string Dump(const json& value) {
  return value.dump(-1, ' ', false, json::error_handler_t::replace);
}

// How a value looks in an error message.
std::string Short(const json& value) { return Dump(value).substr(0, 60); }

absl::StatusOr<json> ParseObject(absl::string_view text) {
  bool deep = false;
  json object = json::parse(
      text.begin(), text.end(),
      [&](int depth, json::parse_event_t, json&) {
        deep |= depth > kMaxJsonLevels;
        return !deep;
      },
      /*allow_exceptions=*/false);
  if (deep) {
    return Invalid(absl::StrCat("body: more than ", kMaxJsonLevels, " levels of JSON"));
  }
  if (!object.is_object()) return Invalid("body: is not a JSON object");
  return object;
}

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

absl::StatusOr<std::string> StringOf(const json& object, const char* name,
                                     absl::string_view where) {
  const auto found = object.find(name);
  if (found == object.end()) return std::string();
  if (found->is_string()) return found->get<std::string>();
  return Invalid(absl::StrCat(where, name, ": got ", Short(*found), ", want a string"));
}

// Bool, integer, number or string; others are refused.
absl::Status ReadParameters(const json& object, absl::string_view where, Parameters* parameters) {
  const auto found = object.find("parameters");
  if (found == object.end()) return absl::OkStatus();
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
    } else if (value.is_number()) {
      parameter.set_double_param(value.get<double>());
    } else if (value.is_string()) {
      parameter.set_string_param(value.get<std::string>());
    } else {
      return Invalid(absl::StrCat(where, "parameters.", name, ": got ", Short(value),
                                  ", want a boolean, a number or a string"));
    }
  }
  return absl::OkStatus();
}

bool IsTrue(const Parameters& parameters, const char* name) {
  const auto found = parameters.find(name);
  return found != parameters.end() && found->second.bool_param();
}

// One element of "data" into the field of `datatype`.
absl::Status AddElement(const json& value, const std::string& datatype,
                        inference::InferTensorContents* contents) {
  if (datatype == "FP32") {
    if (!value.is_number())
      return Invalid(absl::StrCat("data: got ", Short(value), ", want a number"));
    contents->add_fp32_contents(value.get<float>());
  } else if (datatype == "UINT8") {
    if (!value.is_number_unsigned() || value.get<uint64_t>() > 255)
      return Invalid(absl::StrCat("data: got ", Short(value), ", want an integer of 0 to 255"));
    contents->add_uint_contents(value.get<uint32_t>());
  } else if (datatype == "BYTES") {
    const json* text = &value;
    if (value.is_object() && value.size() == 1 && value.contains("b64")) text = &value["b64"];
    std::string bytes;
    if (!text->is_string() || !absl::Base64Unescape(text->get_ref<const std::string&>(), &bytes)) {
      return Invalid(absl::StrCat("data: got ", Short(value),
                                  ", want base64 as a string or as {\"b64\": string}"));
    }
    contents->add_bytes_contents(std::move(bytes));
  } else {
    return Invalid(absl::StrCat("datatype: got '", datatype, "', want FP32, UINT8 or BYTES"));
  }
  return absl::OkStatus();
}

// Arrays may be nested as the shape or flat: the order is the same.
absl::Status AddElements(const json& data, const std::string& datatype, int depth,
                         inference::InferTensorContents* contents) {
  if (!data.is_array()) return AddElement(data, datatype, contents);
  if (depth == kMaxDepth)
    return Invalid(absl::StrCat("data: arrays in more than ", kMaxDepth, " levels"));
  for (const json& element : data)
    TERN_RETURN_IF_ERROR(AddElements(element, datatype, depth + 1, contents));
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

// `rest` loses what belongs to this input.
absl::Status ReadInput(const json& input, absl::string_view* rest,
                       inference::ModelInferRequest* request) {
  if (!input.is_object()) return Invalid(absl::StrCat("got ", Short(input), ", want an object"));
  auto* tensor = request->add_inputs();
  TERN_ASSIGN_OR_RETURN(*tensor->mutable_name(), StringOf(input, "name", ""));
  TERN_ASSIGN_OR_RETURN(*tensor->mutable_datatype(), StringOf(input, "datatype", ""));
  TERN_RETURN_IF_ERROR(ReadShape(input, tensor->mutable_shape()));
  TERN_RETURN_IF_ERROR(ReadParameters(input, "", tensor->mutable_parameters()));
  const auto size = tensor->parameters().find("binary_data_size");
  const auto data = input.find("data");
  if (size == tensor->parameters().end()) {
    if (data == input.end()) {
      return Invalid("got neither \"data\" nor the parameter binary_data_size, want one of them");
    }
    if (!data->is_array())
      return Invalid(absl::StrCat("data: got ", Short(*data), ", want an array"));
    return AddElements(*data, tensor->datatype(), 0, tensor->mutable_contents());
  }
  if (data != input.end()) {
    return Invalid("got \"data\" and the parameter binary_data_size, want one of them");
  }
  const InferParameter& parameter = size->second;
  if (parameter.parameter_choice_case() != InferParameter::kInt64Param ||
      parameter.int64_param() < 0 ||
      static_cast<uint64_t>(parameter.int64_param()) > rest->size()) {
    return Invalid(absl::StrCat("parameters.binary_data_size: got {", parameter.ShortDebugString(),
                                "}, ", rest->size(), " bytes follow the JSON"));
  }
  request->add_raw_input_contents(std::string(rest->substr(0, parameter.int64_param())));
  rest->remove_prefix(parameter.int64_param());
  return absl::OkStatus();
}

absl::StatusOr<const json*> ArrayOf(const json& object, const char* name) {
  static const json* const kNone = new json(json::array());
  const auto found = object.find(name);
  if (found == object.end()) return kNone;
  if (!found->is_array())
    return Invalid(absl::StrCat(name, ": got ", Short(*found), ", want an array"));
  return &*found;
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

// The elements of a raw tensor; it is our own, so it is what it says.
json ElementsOf(const std::string& datatype, const std::string& raw) {
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
  TERN_ASSIGN_OR_RETURN(const json object, ParseObject(body));
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
  TERN_ASSIGN_OR_RETURN(const json object, ParseObject(text));
  InferBody parsed;
  inference::ModelInferRequest& request = parsed.request;
  TERN_ASSIGN_OR_RETURN(*request.mutable_id(), StringOf(object, "id", ""));
  TERN_RETURN_IF_ERROR(ReadParameters(object, "", request.mutable_parameters()));
  TERN_ASSIGN_OR_RETURN(const json* inputs, ArrayOf(object, "inputs"));
  for (size_t i = 0; i < inputs->size(); ++i) {
    TERN_RETURN_IF_ERROR(
        Annotate(ReadInput((*inputs)[i], &rest, &request), absl::StrCat("inputs[", i, "]")));
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

InferAnswer FormatInferAnswer(const inference::ModelInferResponse& response,
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
      output["data"] = ElementsOf(tensor.datatype(), raw);
    }
    object["outputs"].push_back(std::move(output));
  }
  answer.body = Dump(object);
  if (any_binary) answer.json_bytes = answer.body.size();
  answer.body += tail;
  return answer;
}

}  // namespace tern::http
