// Writes the seeds of the fuzz targets that have no fixtures elsewhere: small networks with every
// operator as ONNX and .tern files, requests, and configs.
//
//     make_fuzz_seeds tests/fuzz/corpus
//
// The other files of the corpus are finds of the fuzzer; see docs/testing.md.
#include <filesystem>
#include <iostream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "inference/grpc_service.pb.h"
#include "server/artifact/artifact.h"
#include "server/base/file.h"
#include "server/graph/fixed_point.h"
#include "server/onnx/export.h"
#include "tests/onnx/export_zoo.h"

namespace tern {
namespace {

// Every seed is mutated and executed thousands of times; the longest of the zoo add nothing.
constexpr size_t kMostBytes = 1800;

constexpr char kConfig[] = R"(preprocessing {
  color_order: BGR
  resize: SHORTER_SIDE
  resize_size: 256
  filter: BICUBIC_ANTIALIAS
  center_crop: true
  scale: 0.003921569
  mean: [0.485, 0.456, 0.406]
  std: [0.229, 0.224, 0.225]
  jpeg_scaling: true
}
labels_file: "labels.txt"
batching { max_batch_size: 16 max_delay_us: 2000 max_queue: 64 }
instances: 1
)";

class Folder {
 public:
  explicit Folder(std::string path) : path_(std::move(path)) {
    std::filesystem::create_directories(path_);
  }
  void Put(absl::string_view name, absl::string_view bytes) {
    if (bytes.size() > kMostBytes) return;
    const std::string path = absl::StrCat(path_, "/", name);
    if (const absl::Status s = WriteFileAtomically(path, {bytes}); !s.ok()) {
      std::cerr << s << "\n";
      std::exit(1);
    }
  }

 private:
  std::string path_;
};

void PutNetworks(Folder& onnx, Folder& artifacts) {
  for (const auto& [name, graph] : onnx::testing::ExportZoo()) {
    onnx.Put(absl::StrCat("seed_", name), onnx::Export(graph, {}).value());
    const Tensor input = onnx::testing::RandomInput(graph, 1);
    for (const auto scheme : {WeightScheme::kInt8, WeightScheme::kInt4Cluster,
                              WeightScheme::kInt3Cluster, WeightScheme::kTernaryCluster}) {
      artifact::Artifact artifact;
      artifact.graph = onnx::testing::Quantised(graph, input, scheme);
      if (scheme == WeightScheme::kInt4Cluster && !graph::RoundToFixedPoint(artifact.graph).ok()) {
        continue;  // not every network of the zoo has such a form
      }
      const std::string file = absl::StrCat("seed_", name, "_", Name(scheme));
      artifact.preprocessing.set_resize(v1::Preprocessing::EXACT);
      artifacts.Put(file, artifact::Serialize(artifact));
      if (scheme == WeightScheme::kInt8 || scheme == WeightScheme::kTernaryCluster) {
        onnx.Put(file, onnx::Export(artifact.graph, {}).value());
      }
    }
  }
}

// One for each form of input; the network of infer_fuzzer.cc takes 3 x 2 x 3.
void PutRequests(Folder& folder) {
  inference::ModelInferRequest request;
  request.set_model_name("m");
  request.set_model_version("1");
  request.set_id("id");
  (*request.mutable_parameters())["timeout"].set_int64_param(1000);
  auto* input = request.add_inputs();
  input->set_name("image");
  const auto put = [&](const char* name, const char* type, std::vector<int64_t> shape) {
    input->set_datatype(type);
    input->clear_shape();
    for (int64_t dimension : shape) input->add_shape(dimension);
    folder.Put(name, request.SerializeAsString());
  };
  request.add_raw_input_contents(std::string(72, '\x3f'));
  put("seed_fp32_raw", "FP32", {1, 3, 2, 3});
  *request.mutable_raw_input_contents(0) = std::string(36, 'x');
  auto* output = request.add_outputs();
  output->set_name("probabilities");
  (*output->mutable_parameters())["classification"].set_int64_param(3);
  request.add_outputs()->set_name("logits");
  put("seed_uint8_raw", "UINT8", {2, 2, 3, 3});
  *request.mutable_raw_input_contents(0) = std::string("\3\0\0\0abc\0\0\0\0", 11);
  put("seed_bytes_raw", "BYTES", {2, 1});
  request.clear_raw_input_contents();
  for (const char* bytes : {"abc", ""}) input->mutable_contents()->add_bytes_contents(bytes);
  put("seed_bytes", "BYTES", {2});
  input->mutable_contents()->Clear();
  for (int i = 0; i < 18; ++i) input->mutable_contents()->add_fp32_contents(0.5f);
  put("seed_fp32", "FP32", {3, 2, 3});
  input->mutable_contents()->Clear();
  for (int i = 0; i < 18; ++i) input->mutable_contents()->add_uint_contents(i);
  put("seed_uint8", "UINT8", {2, 3, 3});
}

// The same over HTTP, and bodies of very many values.
void PutBodies(Folder& folder) {
  const auto put = [&](const char* name, absl::string_view type, absl::string_view shape,
                       absl::string_view data, absl::string_view more = "") {
    folder.Put(name, absl::StrCat(R"({"inputs":[{"name":"image","data":)", data, R"(,"datatype":")",
                                  type, R"(","shape":)", shape, "}]", more, "}"));
  };
  put("seed_json_fp32", "FP32", "[1,3,2,3]",
      "[[[[0.5,-1,2],[1e3,0,1]],[[1,2,3],[4,5,6]],[[1,2,3],[4,5,6]]]]",
      R"(,"id":"id","parameters":{"timeout":1000,"min_accuracy":0.5,"binary_data_output":true})");
  put("seed_json_uint8", "UINT8", "[2,3,3]", "[0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,255]",
      R"(,"outputs":[{"name":"probabilities","parameters":{"classification":3}},)"
      R"({"name":"logits","parameters":{"binary_data":true}}])");
  put("seed_json_bytes", "BYTES", "[2,1]", R"([["YWJj"],[{"b64":""}]])");
  folder.Put("seed_json_binary",
             absl::StrCat(R"({"inputs":[{"name":"image","datatype":"BYTES","shape":[1],)"
                          R"("parameters":{"binary_data_size":7}}]})",
                          absl::string_view("\0\3\0\0\0abc", 8)));
  const auto many = [](absl::string_view piece) {
    std::string array = absl::StrCat("[", piece);
    for (int i = 1; i < 500; ++i) absl::StrAppend(&array, ",", piece);
    return array + "]";
  };
  folder.Put("seed_json_objects", absl::StrCat(R"({"inputs":)", many("{}"), "}"));
  folder.Put("seed_json_arrays", absl::StrCat(R"({"inputs":)", many("[]"), "}"));
  put("seed_json_empty_arrays", "FP32", "[3,2,3]", many("[]"));
  put("seed_json_strings", "BYTES", "[64]", many(R"("")"));
  folder.Put("seed_json_deep",
             absl::StrCat(R"({"id":)", std::string(800, '['), std::string(800, ']'), "}"));
}

}  // namespace
}  // namespace tern

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: make_fuzz_seeds FOLDER\n";
    return 2;
  }
  const auto folder = [&](const char* name) {
    return tern::Folder(absl::StrCat(argv[1], "/", name));
  };
  tern::Folder onnx = folder("onnx"), artifacts = folder("artifact"), config = folder("config");
  tern::PutNetworks(onnx, artifacts);
  tern::Folder infer = folder("infer");
  tern::PutRequests(infer);
  tern::PutBodies(infer);
  const std::string labels("cat\r\ndog\nK\xc3\xa4se\n\n");
  config.Put("seed_full", absl::StrCat(tern::kConfig, std::string(1, '\0'), labels));
  config.Put("seed_empty", std::string(1, '\0'));
  return 0;
}
