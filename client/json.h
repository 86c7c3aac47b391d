// The JSON that ternctl --json prints: keys in snake_case, accuracies as fractions, null for
// what was not measured, confidence intervals as [low, high].
#ifndef TERN_CLIENT_JSON_H_
#define TERN_CLIENT_JSON_H_

#include <nlohmann/json.hpp>
#include <string>

#include "client/load_generator.h"
#include "tern/v1/classifier.pb.h"
#include "tern/v1/profiler.pb.h"
#include "tern/v1/quantizer.pb.h"
#include "tern/v1/registry.pb.h"

namespace tern::client {

using Json = nlohmann::ordered_json;

Json ToJson(const v1::Preprocessing& contract);
Json ToJson(const v1::LayerReport& layer);
Json ToJson(const v1::PairedComparison& comparison);
Json ToJson(const v1::FineTuningReport& report);
Json ToJson(const v1::QuantizationReport& report);
// With the report's main figures beside it: bits_per_weight, bytes, top1, layers, ...
Json ToJson(const v1::QuantizeResult& result);
Json ToJson(const v1::EvaluateResult& result);
// Without the report and the labels.
Json ToJson(const v1::ModelVersion& version);
Json ToJson(const v1::ClassifyResponse& response);
Json ToJson(const v1::BenchmarkResponse& response);
Json ToJson(const v1::ProfileResponse& response);
Json ToJson(const LoadResult& result);

// Text of two-space indent (one line if `indent` is negative); invalid UTF-8, as in a file's name,
// is replaced.
std::string Dump(const Json& json, int indent = 2);

}  // namespace tern::client

#endif  // TERN_CLIENT_JSON_H_
