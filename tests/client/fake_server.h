// A server with the real interfaces and made-up answers, for tests of the client. It needs no
// images: the first byte of an "image" is its class as a digit ('3' -> class 3); an image that
// begins with 'x' is a bad one.
#ifndef TERN_TESTS_CLIENT_FAKE_SERVER_H_
#define TERN_TESTS_CLIENT_FAKE_SERVER_H_

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "tern/v1/classifier.pb.h"
#include "tern/v1/quantizer.pb.h"
#include "tern/v1/registry.pb.h"

namespace tern::client {

// What the server was asked, for the tests to look at.
struct Seen {
  std::vector<v1::ClassifyRequest> classify;  // image included
  std::vector<v1::SampleImage> samples;       // of the last Quantize or Evaluate
  v1::QuantizeStart quantize;
  int quantizations = 0;
  v1::EvaluateStart evaluate;
  v1::ImportStart import;
  std::string imported_bytes;
  std::vector<std::string> calls;  // "Unload demo 2"
};

// Models: "demo" with versions 1 (fp32, default) and 2 (ternary-cluster, with a report), whose
// labels are "class-0" to "class-9". Model "missing" is NOT_FOUND everywhere, "broken" has a
// version that cannot be served. Quantize publishes version 3 with top-1 0.80 of float 0.90, unless
// max_top1_drop is below 0.1; from version 2 it is FAILED_PRECONDITION without a result, and with
// cluster size 13 INTERNAL. A report of MIXED weights has a frontier. With a reference, every tenth
// labelled image is one that only the reference gets right. Get does not find what was deleted.
class FakeServer {
 public:
  FakeServer();
  ~FakeServer();

  std::string server() const;  // 127.0.0.1:port
  std::string admin() const;
  Seen seen() const;  // a copy

  // The version that an imported artifact becomes; its report has a part on fine-tuning.
  static constexpr uint64_t kImportedArtifact = 4;
  // The bytes that Export gives.
  static std::string ExportedBytes();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace tern::client

#endif  // TERN_TESTS_CLIENT_FAKE_SERVER_H_
