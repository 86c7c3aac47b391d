// What the engine makes of images, and small networks with the reference executor's results: the
// C++ half of onnxruntime_test.py. All tensors are f32 little-endian; images and logits lie one
// after the other, images as NCHW.
//
//   engine_logits run MODEL CONFIG IMAGES OUT
//     MODEL is a .tern or .onnx file, CONFIG the model's config.textproto, IMAGES a file with one
//     path per line. Writes OUT.input and OUT.logits; prints JSON: images, shape, classes and the
//     plan's layers.
//   engine_logits zoo FOLDER
//     Writes NAME.onnx, NAME.input (2 images) and NAME.logits for every network of the export test
//     in every scheme; prints a JSON list of name, shape and classes.
#include <google/protobuf/text_format.h>

#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "server/artifact/artifact.h"
#include "server/base/file.h"
#include "server/base/status_macros.h"
#include "server/engine/plan.h"
#include "server/image/image.h"
#include "server/onnx/export.h"
#include "server/onnx/import.h"
#include "tests/onnx/export_zoo.h"

namespace tern {
namespace {

absl::Status WriteFloats(const std::string& path, absl::Span<const float> values) {
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(values.data()),
             static_cast<std::streamsize>(values.size() * sizeof(float)));
  return file.good() ? absl::OkStatus() : absl::DataLossError(path);
}

absl::StatusOr<graph::Graph> ReadGraph(const std::string& path) {
  if (absl::EndsWith(path, ".tern")) {
    TERN_ASSIGN_OR_RETURN(artifact::Artifact artifact, artifact::Read(path));
    return std::move(artifact.graph);
  }
  TERN_ASSIGN_OR_RETURN(const std::string bytes, ReadFile(path));
  TERN_ASSIGN_OR_RETURN(graph::Graph graph, onnx::Import(bytes));
  graph::Optimize(graph);
  return graph;
}

absl::StatusOr<nlohmann::json> Execute(const std::string& model, const std::string& config_path,
                                       const std::string& list, const std::string& out) {
  TERN_ASSIGN_OR_RETURN(const graph::Graph graph, ReadGraph(model));
  TERN_ASSIGN_OR_RETURN(const std::string text, ReadFile(config_path));
  v1::ModelConfig config;
  if (!google::protobuf::TextFormat::ParseFromString(text, &config)) {
    return absl::InvalidArgumentError(config_path);
  }
  engine::PlanOptions options;
  options.max_batch = 8;
  TERN_ASSIGN_OR_RETURN(const std::shared_ptr<const engine::Plan> plan,
                        engine::Plan::Create(graph, options));
  TERN_ASSIGN_OR_RETURN(engine::Session session, plan->NewSession(1));
  const Shape shape = plan->input_shape();
  const int64_t pixels = shape[1] * shape[2], elements = shape.elements();
  std::vector<float> inputs, logits;
  int batch = 0;
  int64_t images = 0;
  const auto flush = [&]() -> absl::Status {
    if (batch == 0) return absl::OkStatus();
    TERN_ASSIGN_OR_RETURN(const absl::Span<const float> result, session.Run(batch));
    logits.insert(logits.end(), result.begin(), result.begin() + batch * plan->classes());
    batch = 0;
    return absl::OkStatus();
  };
  TERN_ASSIGN_OR_RETURN(const std::string paths, ReadFile(list));
  std::istringstream lines(paths);
  for (std::string path; std::getline(lines, path); ++images) {
    TERN_ASSIGN_OR_RETURN(const std::string bytes, ReadFile(path));
    const auto& contract = config.preprocessing();
    TERN_ASSIGN_OR_RETURN(
        const image::Image image,
        image::Decode(bytes, {}, contract, static_cast<int>(shape[1]), static_cast<int>(shape[2])));
    const absl::Span<float> nhwc = session.input().subspan(batch * elements, elements);
    TERN_RETURN_IF_ERROR(image::Preprocess(image, contract, static_cast<int>(shape[1]),
                                           static_cast<int>(shape[2]), nhwc));
    for (int64_t c = 0; c < shape[0]; ++c) {
      for (int64_t p = 0; p < pixels; ++p) inputs.push_back(nhwc[p * shape[0] + c]);
    }
    if (++batch == plan->max_batch()) TERN_RETURN_IF_ERROR(flush());
  }
  TERN_RETURN_IF_ERROR(flush());
  TERN_RETURN_IF_ERROR(WriteFloats(out + ".input", inputs));
  TERN_RETURN_IF_ERROR(WriteFloats(out + ".logits", logits));
  nlohmann::json json{{"images", images}, {"shape", shape.dims()}, {"classes", plan->classes()}};
  json["layers"] = nlohmann::json::array();
  for (const engine::LayerInfo& layer : plan->layers()) {
    json["layers"].push_back({{"name", layer.name},
                              {"op", layer.op},
                              {"scheme", layer.scheme},
                              {"implementation", layer.implementation}});
  }
  return json;
}

absl::StatusOr<nlohmann::json> WriteZoo(const std::string& folder) {
  nlohmann::json list = nlohmann::json::array();
  for (const auto& named : onnx::testing::ExportZoo()) {
    const graph::Graph plain = onnx::testing::Flattened(named.graph);
    const Tensor input = onnx::testing::RandomInput(plain, 2);
    for (const int scheme : {-1, 0, 1, 2}) {
      const graph::Graph graph =
          scheme < 0 ? plain
                     : onnx::testing::Quantised(plain, input, static_cast<WeightScheme>(scheme));
      const std::string name = absl::StrCat(
          named.name, "-", scheme < 0 ? "fp32" : Name(static_cast<WeightScheme>(scheme)));
      TERN_ASSIGN_OR_RETURN(const std::string bytes, onnx::Export(graph, {}));
      std::ofstream(folder + "/" + name + ".onnx", std::ios::binary) << bytes;
      TERN_ASSIGN_OR_RETURN(const std::vector<Tensor> values,
                            scheme < 0 ? reference::ExecuteFloat(graph, input)
                                       : reference::ExecuteQuantized(graph, input));
      TERN_RETURN_IF_ERROR(WriteFloats(folder + "/" + name + ".input", input.data<float>()));
      TERN_RETURN_IF_ERROR(
          WriteFloats(folder + "/" + name + ".logits", values[graph.output].data<float>()));
      list.push_back({{"name", name},
                      {"scheme", scheme < 0 ? "fp32" : Name(static_cast<WeightScheme>(scheme))},
                      {"shape", plain.shape(plain.input).dims()},
                      {"classes", graph.classes()}});
    }
  }
  return list;
}

int Main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  absl::StatusOr<nlohmann::json> json = absl::InvalidArgumentError(
      "usage: engine_logits run MODEL CONFIG IMAGES OUT | engine_logits zoo FOLDER");
  if (mode == "run" && argc == 6) json = Execute(argv[2], argv[3], argv[4], argv[5]);
  if (mode == "zoo" && argc == 3) json = WriteZoo(argv[2]);
  if (!json.ok()) {
    std::cerr << json.status() << "\n";
    return 1;
  }
  std::cout << *json << "\n";
  return 0;
}

}  // namespace
}  // namespace tern

int main(int argc, char** argv) { return tern::Main(argc, argv); }
