#include "server/oip/infer.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "server/base/limit_message.h"
#include "server/base/status_macros.h"
#include "server/classify/top_k.h"

namespace tern::oip {
namespace {

using InputTensor = inference::ModelInferRequest::InferInputTensor;
using inference::InferParameter;
using serving::ImageForm;

static_assert(std::endian::native == std::endian::little, "raw contents are little-endian");

// Far above any network's; keeps products of dimensions inside int64.
constexpr int64_t kMaxDimension = int64_t{1} << 20;
// About 31 years: a longer timeout is none.
constexpr int64_t kMaxTimeoutUs = 1'000'000'000'000'000;

std::string ToString(const google::protobuf::RepeatedField<int64_t>& shape) {
  return LimitMessage(absl::StrCat("[", absl::StrJoin(shape, ","), "]"), kMaxQuoteBytes);
}

std::string ToString(const InferParameter& parameter) {
  return LimitMessage(absl::StrCat("{", parameter.ShortDebugString(), "}"), kMaxQuoteBytes);
}

absl::Status Invalid(absl::string_view what) { return absl::InvalidArgumentError(what); }

// An int64 or uint64 parameter that is not negative.
absl::StatusOr<uint64_t> NonNegative(absl::string_view name, const InferParameter& parameter) {
  if (parameter.parameter_choice_case() == InferParameter::kUint64Param)
    return parameter.uint64_param();
  if (parameter.parameter_choice_case() == InferParameter::kInt64Param &&
      parameter.int64_param() >= 0) {
    return static_cast<uint64_t>(parameter.int64_param());
  }
  return Invalid(absl::StrCat("parameters.", name, ": got ", ToString(parameter),
                              ", want a non-negative int64_param or uint64_param"));
}

// An int64, uint64 or double parameter: JavaScript writes 1.0 as 1.
absl::StatusOr<double> Number(absl::string_view name, const InferParameter& parameter) {
  switch (parameter.parameter_choice_case()) {
    case InferParameter::kDoubleParam:
      return parameter.double_param();
    case InferParameter::kInt64Param:
      return static_cast<double>(parameter.int64_param());
    case InferParameter::kUint64Param:
      return static_cast<double>(parameter.uint64_param());
    default:
      return Invalid(absl::StrCat("parameters.", name, ": got ", ToString(parameter),
                                  ", want a double_param"));
  }
}

// UNIMPLEMENTED for tensors whose contents are, or shall be, elsewhere.
absl::Status CheckNoSharedMemory(const inference::ModelInferRequest& request) {
  const auto shared = [](const auto& tensor) {
    return tensor.parameters().contains("shared_memory_region");
  };
  if (std::any_of(request.inputs().begin(), request.inputs().end(), shared) ||
      std::any_of(request.outputs().begin(), request.outputs().end(), shared)) {
    return absl::UnimplementedError("shared_memory_region: shared memory is not supported");
  }
  return absl::OkStatus();
}

// What lies in the pixels' place, form by form.
struct Layout {
  ImageForm form;
  bool batched;
  int64_t images;
};

absl::StatusOr<Layout> ReadShape(const InputTensor& input, const Shape& network) {
  const auto& shape = input.shape();
  for (int64_t dimension : shape) {
    if (dimension < 1 || dimension > kMaxDimension) {
      return Invalid(absl::StrCat("inputs.", input.name(), ".shape: got ", ToString(shape),
                                  ", want dimensions of 1 to ", kMaxDimension));
    }
  }
  Layout layout{ImageForm::kEncoded, true, shape.empty() ? 0 : shape[0]};
  std::vector<int64_t> sample;
  if (input.datatype() == "BYTES") {
    if (shape.size() == 1 || (shape.size() == 2 && shape[1] == 1)) return layout;
    return Invalid(absl::StrCat("inputs.", input.name(), ".shape: got ", ToString(shape),
                                " of BYTES, want [N] or [N,1]"));
  }
  if (input.datatype() == "FP32") {
    layout.form = ImageForm::kTensor;
    sample = {network[0], network[1], network[2]};
  } else if (input.datatype() == "UINT8") {
    layout.form = ImageForm::kPixels;
    sample = {network[1], network[2], network[0]};
  } else {
    return Invalid(absl::StrCat("inputs.", input.name(), ".datatype: got '",
                                LimitMessage(input.datatype(), kMaxQuoteBytes),
                                "', want FP32, UINT8 or BYTES"));
  }
  layout.batched = shape.size() == 4;
  if (!layout.batched) layout.images = 1;
  if ((shape.size() != 3 && shape.size() != 4) ||
      !std::equal(sample.begin(), sample.end(), shape.end() - 3)) {
    const std::string wanted = absl::StrJoin(sample, ",");
    return Invalid(absl::StrCat("inputs.", input.name(), ".shape: got ", ToString(shape), " of ",
                                input.datatype(), ", want [N,", wanted, "] or [", wanted, "]"));
  }
  return layout;
}

// The bytes of each image, from `contents` or from the raw entry. Views into the request, or into
// `converted`, which gets what has to be converted.
absl::StatusOr<std::vector<absl::string_view>> ReadImages(
    const inference::ModelInferRequest& request, const Layout& layout, const Shape& network,
    std::string* converted) {
  const InputTensor& input = request.inputs(0);
  const bool raw = request.raw_input_contents_size() > 0;
  if (raw && input.has_contents()) {
    return Invalid(absl::StrCat("inputs.", input.name(),
                                ".contents: got it together with raw_input_contents, want one of "
                                "them"));
  }
  if (raw && request.raw_input_contents_size() != request.inputs_size()) {
    return Invalid(absl::StrCat("raw_input_contents: got ", request.raw_input_contents_size(),
                                " entries, want ", request.inputs_size(), ", one per input"));
  }
  const auto count = [&](absl::string_view field, int64_t got, int64_t want) {
    if (got == want) return absl::OkStatus();
    return Invalid(absl::StrCat("inputs.", input.name(), ".contents.", field, ": got ", got,
                                " values, want ", want, " for shape ", ToString(input.shape())));
  };
  const inference::InferTensorContents& contents = input.contents();
  if (layout.form == ImageForm::kEncoded) {
    if (raw) return SplitBytes(request.raw_input_contents(0), layout.images);
    TERN_RETURN_IF_ERROR(count("bytes_contents", contents.bytes_contents_size(), layout.images));
    return std::vector<absl::string_view>(contents.bytes_contents().begin(),
                                          contents.bytes_contents().end());
  }
  const int64_t elements = network.elements() * layout.images;
  const int64_t element = layout.form == ImageForm::kTensor ? sizeof(float) : sizeof(uint8_t);
  absl::string_view all;
  if (raw) {
    all = request.raw_input_contents(0);
    if (static_cast<int64_t>(all.size()) != elements * element) {
      return Invalid(absl::StrCat("raw_input_contents[0]: got ", all.size(), " bytes, want ",
                                  elements * element, " for ", input.datatype(), " ",
                                  ToString(input.shape())));
    }
  } else if (layout.form == ImageForm::kTensor) {
    TERN_RETURN_IF_ERROR(count("fp32_contents", contents.fp32_contents_size(), elements));
    all = absl::string_view(reinterpret_cast<const char*>(contents.fp32_contents().data()),
                            elements * sizeof(float));
  } else {
    TERN_RETURN_IF_ERROR(count("uint_contents", contents.uint_contents_size(), elements));
    converted->reserve(elements);
    for (uint32_t value : contents.uint_contents()) {
      if (value > 255) {
        return Invalid(absl::StrCat("inputs.", input.name(), ".contents.uint_contents: got ", value,
                                    ", want 0..255 for UINT8"));
      }
      converted->push_back(static_cast<char>(value));
    }
    all = *converted;
  }
  std::vector<absl::string_view> images;
  const int64_t per_image = network.elements() * element;
  for (int64_t i = 0; i < layout.images; ++i)
    images.push_back(all.substr(i * per_image, per_image));
  return images;
}

absl::StatusOr<std::vector<OutputChoice>> ReadOutputs(const inference::ModelInferRequest& request,
                                                      int64_t classes) {
  std::vector<OutputChoice> outputs;
  std::vector<std::string> seen;
  for (const auto& requested : request.outputs()) {
    OutputChoice output;
    output.logits = requested.name() == kLogits;
    if (!output.logits && requested.name() != kProbabilities) {
      return Invalid(absl::StrCat("outputs: got '", LimitMessage(requested.name(), kMaxQuoteBytes),
                                  "', want ", kProbabilities, " or ", kLogits));
    }
    if (std::find(seen.begin(), seen.end(), requested.name()) != seen.end()) {
      return Invalid(absl::StrCat("outputs: got '", requested.name(), "' twice, want it once"));
    }
    seen.push_back(requested.name());
    const auto parameter = requested.parameters().find("classification");
    if (parameter != requested.parameters().end()) {
      if (parameter->second.parameter_choice_case() != InferParameter::kInt64Param ||
          parameter->second.int64_param() < 1) {
        return Invalid(absl::StrCat("outputs.", requested.name(),
                                    ".parameters.classification: got ", ToString(parameter->second),
                                    ", want an int64_param of 1 or more"));
      }
      output.classes = static_cast<int>(std::min(parameter->second.int64_param(), classes));
    }
    outputs.push_back(output);
  }
  if (outputs.empty()) outputs.push_back(OutputChoice());
  return outputs;
}

void AppendFloats(absl::Span<const float> values, std::string* raw) {
  raw->append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
}

void AppendBytes(absl::string_view element, std::string* raw) {
  const uint32_t size = static_cast<uint32_t>(element.size());
  raw->append(reinterpret_cast<const char*>(&size), sizeof(size));
  raw->append(element.data(), element.size());
}

// One image's part of one output.
void AppendOutput(const OutputChoice& choice, const serving::ClassifyOutput& output,
                  std::string* raw) {
  if (choice.classes == 0) {
    if (choice.logits) return AppendFloats(output.logits, raw);
    return AppendFloats(classify::Softmax(output.logits), raw);
  }
  const std::vector<std::string>& labels = output.model->labels;
  for (const classify::Prediction& best : classify::TopK(output.logits, choice.classes)) {
    const float value = choice.logits ? output.logits[best.index] : best.probability;
    std::string element = absl::StrCat(std::to_string(value), ":", best.index);
    if (static_cast<size_t>(best.index) < labels.size())
      absl::StrAppend(&element, ":", labels[best.index]);
    AppendBytes(element, raw);
  }
}

}  // namespace

absl::StatusOr<uint64_t> ParseVersion(absl::string_view version) {
  uint64_t number = 0;
  if (version.empty()) return number;
  if (!absl::SimpleAtoi(version, &number) || number == 0) {
    return Invalid(absl::StrCat("model version: got '", LimitMessage(version, kMaxQuoteBytes),
                                "', want a positive number, or nothing for the default"));
  }
  return number;
}

absl::StatusOr<std::vector<absl::string_view>> SplitBytes(absl::string_view raw, int64_t count) {
  std::vector<absl::string_view> elements;
  size_t at = 0;
  while (at < raw.size()) {
    if (static_cast<int64_t>(elements.size()) == count) {
      return Invalid(absl::StrCat("BYTES: ", raw.size() - at, " bytes are left after ", count,
                                  " elements, want none"));
    }
    uint32_t size = 0;
    if (raw.size() - at < sizeof(size)) {
      return Invalid(absl::StrCat("BYTES: element ", elements.size(), " has ", raw.size() - at,
                                  " bytes left for its length, want 4"));
    }
    std::memcpy(&size, raw.data() + at, sizeof(size));
    at += sizeof(size);
    if (size > raw.size() - at) {
      return Invalid(absl::StrCat("BYTES: element ", elements.size(), " says ", size, " bytes, ",
                                  raw.size() - at, " are left"));
    }
    elements.push_back(raw.substr(at, size));
    at += size;
  }
  if (static_cast<int64_t>(elements.size()) != count) {
    return Invalid(
        absl::StrCat("BYTES: got ", elements.size(), " elements, want ", count, " by the shape"));
  }
  return elements;
}

absl::StatusOr<InferPlan> ParseInfer(const inference::ModelInferRequest& request,
                                     const repository::LoadedModel& model) {
  const Shape& network = model.plan->input_shape();
  InferPlan plan;
  for (const auto& [name, parameter] : request.parameters()) {
    // Others are for other servers: clients send some of them always.
    if (name == "timeout") {
      TERN_ASSIGN_OR_RETURN(const uint64_t timeout, NonNegative(name, parameter));
      if (timeout > 0 && timeout < kMaxTimeoutUs) plan.timeout = absl::Microseconds(timeout);
    } else if (name == "priority") {
      TERN_ASSIGN_OR_RETURN(const uint64_t priority, NonNegative(name, parameter));
      // The classifier refuses what is beyond its levels.
      plan.priority =
          static_cast<uint32_t>(std::min<uint64_t>(priority, std::numeric_limits<uint32_t>::max()));
    } else if (name == "min_accuracy") {
      TERN_ASSIGN_OR_RETURN(plan.wishes.min_accuracy, Number(name, parameter));
    } else if (name == "max_latency_us") {
      TERN_ASSIGN_OR_RETURN(const uint64_t latency, NonNegative(name, parameter));
      if (latency < kMaxTimeoutUs) plan.wishes.max_latency = absl::Microseconds(latency);
    } else if (name == "sequence_id") {
      return Invalid("parameters.sequence_id: got one, want none: a classifier keeps no state");
    }
  }
  TERN_RETURN_IF_ERROR(CheckNoSharedMemory(request));
  if (request.inputs_size() != 1 || request.inputs(0).name() != kInputName) {
    const std::string names =
        absl::StrJoin(request.inputs(), ", ",
                      [](std::string* out, const InputTensor& input) { *out += input.name(); });
    return Invalid(absl::StrCat("inputs: got [", LimitMessage(names, kMaxQuoteBytes),
                                "], want exactly '", kInputName, "'"));
  }
  TERN_ASSIGN_OR_RETURN(const Layout layout, ReadShape(request.inputs(0), network));
  if (layout.images > kMaxImages) {
    return Invalid(absl::StrCat("inputs.", kInputName, ".shape: got ", layout.images,
                                " images, the limit is ", kMaxImages));
  }
  std::string converted;
  TERN_ASSIGN_OR_RETURN(const std::vector<absl::string_view> images,
                        ReadImages(request, layout, network, &converted));
  TERN_ASSIGN_OR_RETURN(plan.outputs, ReadOutputs(request, model.plan->classes()));
  plan.batched = layout.batched;
  plan.images.resize(images.size());
  for (size_t i = 0; i < images.size(); ++i) {
    plan.images[i].image = std::string(images[i]);
    plan.images[i].form = layout.form;
    plan.images[i].want_logits = true;
  }
  return plan;
}

inference::ModelInferResponse ToResponse(const InferPlan& plan, const std::string& id,
                                         const std::vector<serving::ClassifyOutput>& outputs) {
  const repository::LoadedModel& model = *outputs.front().model;
  inference::ModelInferResponse response;
  response.set_model_name(model.info.model);
  response.set_model_version(absl::StrCat(model.info.version));
  response.set_id(id);
  for (OutputChoice choice : plan.outputs) {
    // The version that answered may have fewer classes than the one that was checked against.
    choice.classes = std::min(choice.classes, static_cast<int>(model.plan->classes()));
    auto* tensor = response.add_outputs();
    tensor->set_name(choice.logits ? kLogits : kProbabilities);
    tensor->set_datatype(choice.classes > 0 ? "BYTES" : "FP32");
    if (plan.batched) tensor->add_shape(outputs.size());
    tensor->add_shape(choice.classes > 0 ? choice.classes : model.plan->classes());
    std::string* raw = response.add_raw_output_contents();
    for (const serving::ClassifyOutput& output : outputs) AppendOutput(choice, output, raw);
  }
  auto& parameters = *response.mutable_parameters();
  parameters["scheme"].set_string_param(model.info.scheme);
  parameters["isa"].set_string_param(model.isa);
  if (outputs.front().degradation != serving::Degradation::kNone)
    parameters["degraded_from"].set_int64_param(outputs.front().degraded_from);
  const auto largest = [&](absl::string_view name, auto value) {
    int64_t most = 0;
    for (const serving::ClassifyOutput& output : outputs)
      most = std::max<int64_t>(most, value(output));
    parameters[std::string(name)].set_int64_param(most);
  };
  using Output = serving::ClassifyOutput;
  largest("batch_size", [](const Output& o) { return o.batch_size; });
  largest("decode_us", [](const Output& o) { return absl::ToInt64Microseconds(o.decode); });
  largest("preprocess_us", [](const Output& o) { return absl::ToInt64Microseconds(o.preprocess); });
  largest("queue_us", [](const Output& o) { return absl::ToInt64Microseconds(o.queue); });
  largest("inference_us", [](const Output& o) { return absl::ToInt64Microseconds(o.inference); });
  largest("total_us", [](const Output& o) { return absl::ToInt64Microseconds(o.total); });
  return response;
}

}  // namespace tern::oip
