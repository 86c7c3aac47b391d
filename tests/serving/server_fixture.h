// A repository with the tiny model and the classify pipeline over it, in a temporary folder.
#ifndef TERN_TESTS_SERVING_SERVER_FIXTURE_H_
#define TERN_TESTS_SERVING_SERVER_FIXTURE_H_

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>

#include "server/metrics/metrics.h"
#include "server/monitoring/label_join.h"
#include "server/repository/repository.h"
#include "server/serving/classify.h"
#include "tests/serving/tiny_model.h"

namespace tern::testing {

class PipelineTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern =
        (std::filesystem::temp_directory_path() / "tern-pipeline-XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    root_ = pattern;
    runner_.metrics = &metrics_;
    runner_.cpu_threads = 2;
    runner_.default_max_delay = absl::Microseconds(200);
    repository::RepositoryOptions options;
    options.root = root_;
    options.metrics = &metrics_;
    options.make_servable = [this](std::shared_ptr<const repository::LoadedModel> model) {
      return serving::ModelRunner::Create(std::move(model), runner_);
    };
    auto repository = repository::Repository::Open(std::move(options));
    ASSERT_TRUE(repository.ok()) << repository.status();
    repository_ = *std::move(repository);
    auto info = repository_->Import("tiny", TinyOnnx(), TinyPreprocessing(),
                                    {"red", "green", "blue"}, true);
    ASSERT_TRUE(info.ok()) << info.status();
    classifier_options_.limits.max_bytes = 100000;
    classifier_options_.limits.max_pixels = 10000;
    classifier_ = std::make_unique<serving::Classifier>(repository_.get(), &labels_, &metrics_,
                                                        classifier_options_);
  }
  void TearDown() override {
    if (repository_ != nullptr) repository_->Shutdown();
    classifier_.reset();
    repository_.reset();
    std::filesystem::remove_all(root_);
  }

  std::string root_;
  metrics::Metrics metrics_;
  monitoring::LabelJoin labels_{1000, &metrics_};
  serving::RunnerOptions runner_;                  // before SetUp
  serving::ClassifierOptions classifier_options_;  // before SetUp
  std::unique_ptr<repository::Repository> repository_;
  std::unique_ptr<serving::Classifier> classifier_;
};

}  // namespace tern::testing

#endif  // TERN_TESTS_SERVING_SERVER_FIXTURE_H_
