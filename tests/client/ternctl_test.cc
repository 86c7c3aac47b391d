// The real binary against the fake server: forms, JSON keys, exit codes.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>
#include <thread>

#include "tests/client/fake_server.h"
#include "tests/client/folder.h"

namespace tern::client {
namespace {

using nlohmann::json;
using testing::HasSubstr;

struct Output {
  int code = -1;
  std::string out;
  std::string err;

  json Json() const {
    EXPECT_TRUE(json::accept(out)) << out;
    return json::accept(out) ? json::parse(out) : json();
  }
};

class TernctlTest : public testing::Test {
 protected:
  // Runs `ternctl <arguments>`, as a shell would, with the fake server's addresses in the
  // environment.
  Output Run(const std::string& arguments, const std::string& input = "") const {
    folder_.Write("stdin", input);
    const std::string command = "cd '" + folder_.path() + "' && TERN_SERVER=" + fake_.server() +
                                " TERN_ADMIN=" + fake_.admin() + " '" TERNCTL_PATH "' " +
                                arguments + " <stdin >stdout 2>stderr";
    const int status = std::system(command.c_str());
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, folder_.Read("stdout"),
            folder_.Read("stderr")};
  }

  // Ten classes of `per_class` images whose class the fake server sees.
  void MakeImageFolder(const std::string& name, int per_class) const {
    for (int c = 0; c < 10; ++c) {
      for (int i = 0; i < per_class; ++i) {
        folder_.Write(name + "/class" + std::to_string(c) + "/" + std::to_string(i) + ".jpg",
                      std::to_string(c) + " image " + std::to_string(i));
      }
    }
  }

  FakeServer fake_;
  Folder folder_;
};

TEST_F(TernctlTest, ClassifiesOneImage) {
  folder_.Write("cat.jpg", "3");
  const Output text = Run("classify --model demo cat.jpg");
  EXPECT_EQ(text.code, 0) << text.err;
  EXPECT_THAT(text.out, HasSubstr("class-3"));
  EXPECT_THAT(text.out, HasSubstr("0.5000"));
  const Output output = Run("classify --model demo --version 2 --top-k 3 --json cat.jpg");
  EXPECT_EQ(output.code, 0) << output.err;
  const json answer = output.Json();
  EXPECT_EQ(answer["count"], 1);
  EXPECT_EQ(answer["images"][0]["file"], "cat.jpg");
  EXPECT_EQ(answer["images"][0]["classes"].size(), 3u);
  EXPECT_EQ(answer["images"][0]["classes"][0]["index"], 3);
  EXPECT_EQ(answer["images"][0]["version"], 2);
  EXPECT_EQ(fake_.seen().classify.back().top_k(), 3u);
}

TEST_F(TernctlTest, SendsPriorityAccuracyAndLatency) {
  folder_.Write("cat.jpg", "3");
  ASSERT_EQ(Run("classify --model demo cat.jpg").code, 0);
  EXPECT_FALSE(fake_.seen().classify.back().has_priority());
  EXPECT_FALSE(fake_.seen().classify.back().has_min_accuracy());
  EXPECT_FALSE(fake_.seen().classify.back().has_max_latency_us());
  const Output output =
      Run("classify --model demo --priority 1 --min-accuracy 0.75 --max-latency 2.5 cat.jpg");
  EXPECT_EQ(output.code, 0) << output.err;
  const v1::ClassifyRequest request = fake_.seen().classify.back();
  EXPECT_EQ(request.priority(), 1u);
  EXPECT_EQ(request.min_accuracy(), 0.75);
  EXPECT_EQ(request.max_latency_us(), 2500u);
  EXPECT_EQ(Run("classify --model demo --min-accuracy 1.5 cat.jpg").code, 2);
}

TEST_F(TernctlTest, ClassifiesStandardInput) {
  const Output output = Run("classify --model demo --json -", "5 from a pipe");
  EXPECT_EQ(output.code, 0) << output.err;
  EXPECT_EQ(output.Json()["images"][0]["classes"][0]["index"], 5);
}

TEST_F(TernctlTest, ABadImageInAFolderIsReportedAndTheRestAnswered) {
  MakeImageFolder("photos", 2);
  folder_.Write("photos/class4/1.jpg", "x");
  const Output output = Run("classify --model demo --send-labels --json photos");
  EXPECT_EQ(output.code, 1);
  EXPECT_THAT(output.err, HasSubstr("INVALID_ARGUMENT"));
  EXPECT_THAT(output.err, HasSubstr("class4/1.jpg"));
  const json answer = output.Json();
  EXPECT_EQ(answer["count"], 19);
  EXPECT_EQ(answer["errors"], 1);
  ASSERT_EQ(answer["images"].size(), 20u);
  for (size_t i = 0; i < 20; ++i) {
    const json& image = answer["images"][i];
    if (i == 9) {
      EXPECT_EQ(image["error"]["code"], "INVALID_ARGUMENT");
    } else {
      EXPECT_EQ(image["classes"][0]["index"], i / 2);
    }
  }
  EXPECT_EQ(fake_.seen().classify[7].label(), 3u);
}

TEST_F(TernctlTest, EvaluateSendsLabelsAndPrintsItsKeys) {
  MakeImageFolder("test", 3);
  const Output output =
      Run("evaluate --model demo --version 2 --data test --reference-version 1 --json");
  EXPECT_EQ(output.code, 0) << output.err;
  const json answer = output.Json();
  EXPECT_EQ(answer["images"], 30);
  EXPECT_EQ(answer["top1"], 1.0);
  EXPECT_EQ(answer["top5"], 1.0);
  EXPECT_EQ(answer["top1_ci95"].size(), 2u);
  EXPECT_EQ(answer["agreement"], 0.5);
  EXPECT_EQ(answer["agreement_ci95"].size(), 2u);
  EXPECT_EQ(fake_.seen().evaluate.reference_version(), 1u);

  const Output shifted = Run("evaluate --model demo --data test --label-offset 1 --json");
  EXPECT_EQ(shifted.code, 0) << shifted.err;
  EXPECT_EQ(shifted.Json()["top1"], 0.0);
  EXPECT_TRUE(shifted.Json()["agreement"].is_null());

  const Output limited = Run("evaluate --model demo --data test --limit 10 --json");
  EXPECT_EQ(limited.code, 0) << limited.err;
  std::set<uint32_t> classes;
  for (const auto& sample : fake_.seen().samples) classes.insert(sample.label());
  EXPECT_EQ(classes.size(), 10u);
}

TEST_F(TernctlTest, FoldersWithNamesOfLabelsAreThoseClassesForEveryCommand) {
  for (const char* c : {"3", "7"}) {
    for (const char* name : {"0.jpg", "1.jpg"}) {
      folder_.Write(std::string("some/class-") + c + "/" + name, c);
    }
  }
  const auto right = [&] {
    for (const auto& sample : fake_.seen().samples) {
      if (sample.label() != static_cast<uint32_t>(sample.image()[0] - '0')) return false;
    }
    return !fake_.seen().samples.empty();
  };
  const Output evaluate = Run("evaluate --model demo --data some --json");
  EXPECT_EQ(evaluate.code, 0) << evaluate.err;
  EXPECT_EQ(evaluate.Json()["top1"], 1.0);
  EXPECT_EQ(evaluate.err.find("warning"), std::string::npos) << evaluate.err;
  for (const char* command :
       {"compare --model demo --data some --seconds 0.1",
        "quantize --model demo --weights int8 --calibration some --evaluation some",
        "sweep --model demo --calibration some --folds 2 --weights int8"}) {
    const Output output = Run(command);
    EXPECT_EQ(output.code, 0) << command << ": " << output.err;
    EXPECT_TRUE(right()) << command;
  }
  EXPECT_EQ(Run("classify --model demo --send-labels some").code, 0);
  EXPECT_EQ(fake_.seen().classify.back().label(), 7u);

  folder_.Write("some/clas-4/0.jpg", "4");
  const Output refused = Run("evaluate --model demo --data some");
  EXPECT_EQ(refused.code, 1);
  EXPECT_THAT(refused.err, HasSubstr("INVALID_ARGUMENT: some: sub-folder 'clas-4'"));
}

TEST_F(TernctlTest, OtherFoldersThatAreNotAsManyAsTheClassesAreWarnedOfOnce) {
  folder_.Write("some/a/0.jpg", "0");
  folder_.Write("some/b/1.jpg", "1");
  folder_.Write("some/2.jpg", "2");
  const Output output =
      Run("quantize --model demo --weights int8 --calibration some --evaluation some --json");
  EXPECT_EQ(output.code, 0) << output.err;
  output.Json();
  const auto first = output.err.find("sub-folders: 2, classes of the model: 10");
  ASSERT_NE(first, std::string::npos) << output.err;
  EXPECT_EQ(output.err.find("sub-folders: 2", first + 1), std::string::npos) << output.err;
  EXPECT_THAT(output.err, HasSubstr("images beside the sub-folders are left out: 1"));
  EXPECT_THAT(Run("bench --model demo --data some --seconds 0.1 --warmup 0").err,
              HasSubstr("images beside the sub-folders are left out: 1"));
  const Output none = Run("evaluate --model broken --data some");
  EXPECT_EQ(none.code, 1);
  EXPECT_THAT(none.err, HasSubstr("UNAVAILABLE: model broken has no version that is ready"));
}

TEST_F(TernctlTest, NumbersThatAreNoneAreWrongUsage) {
  MakeImageFolder("photos", 1);
  const std::string quantize = "quantize --model demo --weights int8 --calibration photos ";
  for (const std::string& arguments :
       {quantize + "--max-top1-drop nan", quantize + "--max-top1-drop inf",
        quantize + "--calibration-count -1", quantize + "--limit -1", quantize + "--from -1",
        quantize + "--from 18446744073709551616", std::string("report --model demo -v -1"),
        std::string("bench --model demo --data photos --rate nan"),
        std::string("bench --model demo --data photos --seconds nan"),
        std::string("models --timeout nan"), std::string("health --wait inf"),
        std::string("classify --model demo --max-latency nan photos/class0/0.jpg")}) {
    const Output output = Run(arguments);
    EXPECT_EQ(output.code, 2) << arguments << ": " << output.err;
  }
  EXPECT_EQ(fake_.seen().quantizations, 0);
  EXPECT_EQ(Run(quantize + "--max-top1-drop -1 --seed 18446744073709551615").code, 0);
}

TEST_F(TernctlTest, QuantizeSendsTheRecipeAndPrintsItsKeys) {
  MakeImageFolder("train", 20);
  MakeImageFolder("test", 3);
  const Output output =
      Run("quantize --model demo --from 1 --weights ternary --cluster 64 --method corrected "
          "--activations dfp8 --calibration train --calibration-count 50 --evaluation test "
          "--seed 9 --set-default --json");
  EXPECT_EQ(output.code, 0) << output.err;
  const json answer = output.Json();
  EXPECT_EQ(answer["model"], "demo");
  EXPECT_EQ(answer["version"], 3);
  EXPECT_EQ(answer["published"], true);
  EXPECT_EQ(answer["bits_per_weight"], 4.1);
  EXPECT_EQ(answer["bytes"], 123456);
  EXPECT_EQ(answer["multiplications_removed"], 0.7);
  EXPECT_EQ(answer["float_top1"], 0.9);
  EXPECT_EQ(answer["top1"], 0.8);
  EXPECT_EQ(answer["agreement"], 0.85);
  EXPECT_EQ(answer["sqnr_db"], 15.25);
  EXPECT_EQ(answer["layers"][0]["name"], "conv1");
  EXPECT_EQ(answer["report"]["calibration_images"], 50);
  EXPECT_EQ(answer["report"]["evaluation_images"], 30);

  const Seen seen = fake_.seen();
  EXPECT_EQ(seen.quantize.source_version(), 1u);
  EXPECT_TRUE(seen.quantize.set_default());
  EXPECT_EQ(seen.quantize.recipe().weights(), v1::TERNARY_CLUSTER);
  EXPECT_EQ(seen.quantize.recipe().cluster_size(), 64u);
  EXPECT_EQ(seen.quantize.recipe().method(), v1::CORRECTED);
  EXPECT_EQ(seen.quantize.recipe().activations(), v1::DFP8);
  EXPECT_EQ(seen.quantize.recipe().seed(), 9u);
  EXPECT_FALSE(seen.quantize.recipe().has_max_top1_drop());
  std::vector<int> per_class(10, 0);
  for (const auto& sample : seen.samples) {
    EXPECT_NE(sample.calibration(), sample.evaluation());
    if (sample.calibration()) ++per_class[sample.label()];
  }
  EXPECT_THAT(per_class, testing::Each(5));
}

TEST_F(TernctlTest, EvaluateShowsThePairedComparisonAndTheWorstClasses) {
  MakeImageFolder("test", 2);
  const std::string command = "evaluate --model demo --version 2 --data test --reference-version 1";
  const Output text = Run(command);
  EXPECT_EQ(text.code, 0) << text.err;
  EXPECT_THAT(text.out, HasSubstr("10.00 (8.00..12.00)"));
  EXPECT_THAT(text.out, HasSubstr("1: 2, 2: 0 (McNemar p = 0.0001)"));
  EXPECT_THAT(text.out, HasSubstr("0.25000 nats"));
  EXPECT_THAT(text.out, HasSubstr("4 night?]0;ingale?"));
  EXPECT_THAT(text.out, HasSubstr("7 <lark>? (25)"));
  EXPECT_THAT(text.out, HasSubstr("warning: too few?[2J"));
  EXPECT_EQ(text.out.find('\x1b'), std::string::npos);
  const json answer = Run(command + " --json").Json();
  EXPECT_EQ(answer["comparison"]["only_reference_right"], 2);
  EXPECT_EQ(answer["comparison"]["drop"], 0.1);
  EXPECT_EQ(answer["comparison"]["drop_ci95"].size(), 2u);
  EXPECT_EQ(answer["comparison"]["p_value"], 0.0001);
  EXPECT_EQ(answer["divergence"], 0.25);
  EXPECT_EQ(answer["worst_classes"][0]["confused_with"][0]["images"], 25);
  EXPECT_EQ(answer["warnings"].size(), 1u);
  const json alone = Run("evaluate --model demo --data test --json").Json();
  EXPECT_TRUE(alone["comparison"].is_null());
  EXPECT_TRUE(alone["divergence"].is_null());
}

TEST_F(TernctlTest, ADryRunSaysThatItPublishedNothing) {
  MakeImageFolder("photos", 1);
  const Output output = Run(
      "quantize --model demo --weights int8 --calibration photos --evaluation photos --dry-run");
  EXPECT_EQ(output.code, 0) << output.err;
  EXPECT_TRUE(fake_.seen().quantize.dry_run());
  EXPECT_THAT(output.out, HasSubstr("not published (dry run)"));
  EXPECT_THAT(output.out, HasSubstr("10 calibration, 10 evaluation, 1 in both"));
  EXPECT_THAT(output.out, HasSubstr("drop in top-1, points (95 %)"));
}

TEST_F(TernctlTest, MixedPrecisionSendsItsBudgetAndDrawsTheFrontier) {
  MakeImageFolder("photos", 1);
  const std::string command = "quantize --model demo --weights mixed --calibration photos ";
  const Output output =
      Run(command +
          "--target-bits 3.5 --distill blocks --layer conv1=int8 --layer a=b:c=ternary:16 "
          "--layer fc=int4:all --plot frontier.svg");
  EXPECT_EQ(output.code, 0) << output.err;
  const v1::Recipe recipe = fake_.seen().quantize.recipe();
  EXPECT_EQ(recipe.weights(), v1::MIXED);
  EXPECT_EQ(recipe.target_bits(), 3.5);
  EXPECT_FALSE(recipe.has_target_ms());
  EXPECT_EQ(recipe.distillation(), v1::DISTILL_BLOCKS);
  ASSERT_EQ(recipe.layers_size(), 3);
  EXPECT_EQ(recipe.layers(1).layer(), "a=b:c");
  EXPECT_EQ(recipe.layers(1).weights(), v1::TERNARY_CLUSTER);
  EXPECT_EQ(recipe.layers(1).cluster_size(), 16u);
  EXPECT_EQ(recipe.layers(2).cluster_size(), 0u);
  EXPECT_THAT(output.out, HasSubstr("SENSITIVITY OF LAYER"));
  EXPECT_THAT(output.out, HasSubstr("conv1?[2J"));
  EXPECT_THAT(output.out, HasSubstr("FRONTIER"));
  EXPECT_THAT(output.out, HasSubstr("12 ternary N=64 & 30 <int4>"));
  EXPECT_THAT(output.out, HasSubstr("distillation (network): 300 steps"));
  EXPECT_THAT(folder_.Read("frontier.svg"), HasSubstr("mixed precision, loss by size"));
  EXPECT_THAT(folder_.Read("frontier.svg"), HasSubstr("mixed precision, loss by time"));

  const json answer = Run(command + "--max-top1-drop 0.2 --json").Json();
  EXPECT_EQ(answer["report"]["frontier"].size(), 3u);
  EXPECT_EQ(answer["report"]["frontier"][1]["chosen"], true);
  EXPECT_EQ(answer["report"]["frontier"][1]["divergence"], 0.2);
  EXPECT_TRUE(answer["report"]["frontier"][0]["divergence"].is_null());
  EXPECT_EQ(answer["report"]["sensitivity"][0]["cluster_size"], 64);
  EXPECT_EQ(answer["report"]["recipe"]["max_top1_drop"], 0.2);
  const Output nowhere = Run(command + "--target-ms 2 --plot no/such/folder.svg");
  EXPECT_EQ(nowhere.code, 1);
  EXPECT_THAT(nowhere.err, HasSubstr("NOT_FOUND: no/such/folder.svg"));
  EXPECT_EQ(fake_.seen().quantize.recipe().target_ms(), 2);
}

TEST_F(TernctlTest, SweepRunsEveryRecipeOnceAndPublishesNothing) {
  MakeImageFolder("train", 3);
  MakeImageFolder("test", 2);
  const std::string command =
      "sweep --model demo --calibration train --evaluation test --clusters 4,all,4 ";
  const Output text = Run(command);
  EXPECT_EQ(text.code, 0) << text.err;
  EXPECT_EQ(fake_.seen().quantizations, 5);  // ternary and int4 with 4 and all, int8 once
  EXPECT_TRUE(fake_.seen().quantize.dry_run());
  EXPECT_EQ(fake_.seen().quantize.source_version(), 1u);
  EXPECT_EQ(fake_.seen().samples.size(), 50u);
  EXPECT_THAT(text.out, HasSubstr("80.00 % (58.40..91.93)"));  // Wilson, 16 of 20
  EXPECT_THAT(text.out, HasSubstr("20 evaluation images"));
  const json answer = Run(command + "--json").Json();
  ASSERT_EQ(answer["rows"].size(), 5u);
  EXPECT_EQ(answer["source_version"], 1);
  const json& row = answer["rows"][1];
  EXPECT_EQ(row["weights"], "ternary");
  EXPECT_EQ(row["cluster_size"], 0);
  EXPECT_EQ(row["status"], "ok");
  EXPECT_EQ(row["top1"], 0.8);
  EXPECT_EQ(row["comparison"]["only_reference_right"], 3);
  EXPECT_EQ(row["comparison"]["drop"], 0.1);
  EXPECT_EQ(row["multiplications_removed"], 0.7);
  EXPECT_EQ(row["ms_per_image"], 1.5);
  EXPECT_TRUE(answer["rows"][4]["cluster_size"].is_null());

  EXPECT_EQ(Run(command + "--weights int8 --publish --json").Json()["rows"][0]["versions"][0], 3);
}

TEST_F(TernctlTest, SweepOverFoldsEvaluatesEveryImageOnceAndAddsTheCounts) {
  MakeImageFolder("photos", 4);
  const Output text =
      Run("sweep --model demo --calibration photos --folds 2 --weights ternary --clusters 64 "
          "--out study");
  EXPECT_EQ(text.code, 0) << text.err;
  EXPECT_EQ(fake_.seen().quantizations, 2);
  std::set<std::string> calibration, evaluation;
  for (const auto& sample : fake_.seen().samples) {
    EXPECT_NE(sample.calibration(), sample.evaluation());
    (sample.calibration() ? calibration : evaluation).insert(sample.name());
  }
  EXPECT_EQ(calibration.size(), 20u);
  EXPECT_EQ(evaluation.size(), 20u);
  EXPECT_THAT(text.out, HasSubstr("80.00 % (65.24..89.50)"));  // Wilson, 32 of 40
  const json answer = json::parse(folder_.Read("study/sweep.json"));
  EXPECT_EQ(answer["folds"], 2);
  const json& row = answer["rows"][0];
  EXPECT_EQ(row["images"], 40);
  EXPECT_EQ(row["comparison"]["only_reference_right"], 6);
  EXPECT_EQ(row["overlapping_images"], 4);
  ASSERT_EQ(row["folds"].size(), 2u);
  EXPECT_EQ(row["folds"][1]["images"], 20);
}

TEST_F(TernctlTest, SweepReportsARecipeThatFailsAndGoesOn) {
  MakeImageFolder("photos", 2);
  const std::string command =
      "sweep --model demo --calibration photos --evaluation photos --weights ternary "
      "--clusters 4,13,64 ";
  const Output text = Run(command);
  EXPECT_EQ(text.code, 1);
  EXPECT_THAT(text.err, HasSubstr("ternary N=13: INTERNAL: thirteen?[2J"));
  EXPECT_THAT(text.out, HasSubstr("failed"));
  EXPECT_THAT(text.out, HasSubstr("80.00 %"));
  const Output output = Run(command + "--json");
  EXPECT_EQ(output.code, 1);
  const json answer = output.Json();
  EXPECT_EQ(answer["rows"][1]["status"], "failed");
  EXPECT_THAT(answer["rows"][1]["error"].get<std::string>(), HasSubstr("thirteen"));
  EXPECT_EQ(answer["rows"][2]["status"], "ok");
  EXPECT_EQ(
      Run("sweep --model demo --calibration photos --folds 2 --clusters 13 --weights int4").code,
      1);  // none is left
}

TEST_F(TernctlTest, ASecondSweepMeasuresOnlyWhatIsNew) {
  MakeImageFolder("photos", 2);
  const std::string command =
      "sweep --model demo --calibration photos --evaluation photos --out study --weights ternary "
      "--clusters ";
  EXPECT_EQ(Run(command + "4,13").code, 1);
  EXPECT_EQ(fake_.seen().quantizations, 2);
  const json again = Run(command + "4,64 --json").Json();
  EXPECT_EQ(fake_.seen().quantizations, 3);  // 64 only
  EXPECT_EQ(again["rows"][0]["resumed"], true);
  EXPECT_EQ(again["rows"][0]["top1"], 0.8);
  EXPECT_EQ(again["rows"][1]["resumed"], false);
  for (const char* name : {"drop.svg", "bits.svg", "ms.svg"}) {
    EXPECT_THAT(folder_.Read(std::string("study/") + name), HasSubstr("</svg>")) << name;
  }
  // A failure is tried again; another seed or another image is another measurement.
  EXPECT_EQ(Run(command + "13").code, 1);
  EXPECT_EQ(fake_.seen().quantizations, 4);
  EXPECT_EQ(Run(command + "4 --seed 1").code, 0);
  EXPECT_EQ(fake_.seen().quantizations, 5);
  folder_.Write("photos/class3/0.jpg", "3 changed");
  EXPECT_EQ(Run(command + "4").code, 0);
  EXPECT_EQ(fake_.seen().quantizations, 6);
  // A damaged file is measured again.
  for (const auto& entry : std::filesystem::directory_iterator(folder_.At("study/runs"))) {
    std::ofstream(entry.path()) << "{\"model\": ";
  }
  EXPECT_EQ(Run(command + "4").code, 0);
  EXPECT_EQ(fake_.seen().quantizations, 7);
}

TEST_F(TernctlTest, TheSameSeedSendsTheSameImages) {
  MakeImageFolder("train", 20);
  const std::string command =
      "quantize --model demo --weights int4 --cluster all --calibration train "
      "--calibration-count 30 --json --seed ";
  std::vector<std::vector<std::string>> sent;
  for (const char* seed : {"0", "0", "1"}) {
    EXPECT_EQ(Run(command + seed).code, 0);
    EXPECT_EQ(fake_.seen().quantize.recipe().cluster_size(), 0u);
    std::vector<std::string> names;
    for (const auto& sample : fake_.seen().samples) names.push_back(sample.name());
    sent.push_back(names);
  }
  EXPECT_EQ(sent[0], sent[1]);
  EXPECT_NE(sent[0], sent[2]);
}

TEST_F(TernctlTest, AnImageOfBothUsesIsSentOnce) {
  MakeImageFolder("photos", 2);
  const Output output =
      Run("quantize --model demo --weights int8 --calibration photos --evaluation photos --json");
  EXPECT_EQ(output.code, 0) << output.err;
  const Seen seen = fake_.seen();
  EXPECT_EQ(seen.samples.size(), 20u);
  for (const auto& sample : seen.samples) {
    EXPECT_TRUE(sample.calibration());
    EXPECT_TRUE(sample.evaluation());
  }
}

TEST_F(TernctlTest, AGateThatWasNotMetExitsWith3AndPrintsTheReport) {
  MakeImageFolder("photos", 1);
  const std::string command =
      "quantize --model demo --weights int8 --calibration photos --evaluation photos "
      "--max-top1-drop 0.05";
  const Output text = Run(command);
  EXPECT_EQ(text.code, 3);
  EXPECT_THAT(text.out, HasSubstr("conv1"));
  EXPECT_THAT(text.out, HasSubstr("not published"));
  EXPECT_THAT(text.err, HasSubstr("FAILED_PRECONDITION"));
  const Output output = Run(command + " --json");
  EXPECT_EQ(output.code, 3);
  EXPECT_EQ(output.Json()["published"], false);
  EXPECT_EQ(output.Json()["top1"], 0.8);
}

TEST_F(TernctlTest, AJobThatCannotStartExitsWith1) {
  MakeImageFolder("photos", 1);
  const Output output =
      Run("quantize --model demo --from 2 --weights int8 --calibration photos --json");
  EXPECT_EQ(output.code, 1);
  EXPECT_EQ(output.out, "");
  EXPECT_THAT(output.err, HasSubstr("FAILED_PRECONDITION: version 2 is not float"));
}

TEST_F(TernctlTest, WrongUsageExitsWith2) {
  MakeImageFolder("photos", 1);
  for (const char* arguments :
       {"",
        "frobnicate",
        "classify --model demo",
        "classify a.jpg",
        "models --frob",
        "evaluate --model demo --data no-such-folder",
        "quantize --model demo --weights int5 --calibration photos",
        "quantize --model demo --weights int8 --cluster 257 --calibration photos",
        "quantize --model demo --weights int8 --cluster four --calibration photos",
        "quantize --model demo --weights mixed --calibration photos",
        "quantize --model demo --weights mixed --target-bits 3 --target-ms 1 --calibration photos",
        "quantize --model demo --weights mixed --target-bits 3 --max-top1-drop 0 "
        "--calibration photos",
        "quantize --model demo --weights mixed --target-bits 1 --calibration photos",
        "quantize --model demo --weights mixed --target-bits nan --calibration photos",
        "quantize --model demo --weights mixed --target-ms inf --calibration photos",
        "quantize --model demo --weights mixed --target-ms -1 --calibration photos",
        "quantize --model demo --weights int8 --target-ms 1 --calibration photos",
        "quantize --model demo --weights int8 --plot x.svg --calibration photos",
        "quantize --model demo --weights int8 --layer conv1=int4 --calibration photos",
        "quantize --model demo --weights int8 --dry-run --set-default --calibration photos",
        "quantize --model demo --weights int8 --distill maybe --calibration photos",
        "sweep --model demo --calibration photos",
        "sweep --model demo --calibration photos --folds 1",
        "sweep --model demo --calibration photos --evaluation photos --folds 2",
        "sweep --model demo --calibration photos --evaluation photos --clusters 4,0",
        "sweep --model demo --calibration photos --evaluation photos --weights mixed",
        "sweep --model demo --calibration photos --folds 2 --publish",
        "bench --model demo",
        "bench --model demo --data photos --batch 8",
        "bench --model demo --engine --retry",
        "bench --model demo --engine --rate 10",
        "bench --model demo --engine --concurrency 2",
        "bench --model demo --engine -k 1",
        "models --version",
        "bench --model demo --data photos --rate 10 --concurrency 3",
        "delete --model demo",
        "delete --model demo --all --version 1",
        "unload --model demo",
        "export --model demo --output - --json"}) {
    const Output output = Run(arguments);
    EXPECT_EQ(output.code, 2) << arguments << ": " << output.err;
    EXPECT_EQ(output.out, "") << arguments;
    EXPECT_NE(output.err, "") << arguments;
  }
}

TEST_F(TernctlTest, HelpIsNoError) {
  const Output output = Run("--help");
  EXPECT_EQ(output.code, 0);
  EXPECT_THAT(output.out, HasSubstr("Examples"));
  EXPECT_EQ(Run("quantize --help").code, 0);
  const Output version = Run("--version");
  EXPECT_EQ(version.code, 0);
  EXPECT_THAT(version.out, testing::MatchesRegex("ternctl [0-9]+\\.[0-9]+\\.[0-9]+\n"));
}

TEST_F(TernctlTest, FailedCallsNameTheCodeOnStandardErrorOnly) {
  folder_.Write("a.jpg", "1");
  folder_.Write("net.onnx", "bytes");
  MakeImageFolder("photos", 1);
  for (const char* arguments :
       {"models missing", "report --model missing", "load --model missing",
        "unload --model missing --version 1", "set-default --model missing --version 1",
        "delete --model missing --version 1", "evaluate --model missing --data photos",
        "quantize --model missing --weights int8 --calibration photos",
        "sweep --model missing --calibration photos --folds 2",
        "bench --model missing --data photos", "bench --model missing --engine",
        "label --request-id none --label 1", "health --service unknown"}) {
    const Output output = Run(std::string(arguments) + " --json");
    EXPECT_EQ(output.code, 1) << arguments;
    EXPECT_EQ(output.out, "") << arguments;
    EXPECT_THAT(output.err, HasSubstr("ternctl: NOT_FOUND: ")) << arguments;
  }
  const Output classify = Run("classify --model missing a.jpg");
  EXPECT_EQ(classify.code, 1);
  EXPECT_THAT(classify.err, HasSubstr("NOT_FOUND"));
}

TEST_F(TernctlTest, OptionsWinOverTheEnvironment) {
  const Output down = Run("models --admin 127.0.0.1:1");
  EXPECT_EQ(down.code, 1);
  EXPECT_THAT(down.err, HasSubstr("UNAVAILABLE: server at 127.0.0.1:1"));
  const Output before = Run("--server 127.0.0.1:1 health");
  EXPECT_EQ(before.code, 1);
}

TEST_F(TernctlTest, AddressesThatAreNoneAreNamed) {
  for (const char* address : {"127.0.0.1", "127.0.0.1:99999"}) {
    for (const char* option : {"--server ", "--admin "}) {
      const Output output = Run(std::string(option) + address + " health");
      EXPECT_EQ(output.code, 1);
      EXPECT_THAT(output.err, HasSubstr(std::string("got \"") + address + "\", want HOST:PORT"));
    }
  }
}

TEST_F(TernctlTest, SwappedPortsAreTold) {
  folder_.Write("cat.jpg", "3");
  const Output admin = Run("models --admin " + fake_.server());
  EXPECT_EQ(admin.code, 1);
  EXPECT_THAT(admin.err, HasSubstr("UNIMPLEMENTED: " + fake_.server() + " was asked as the admin"));
  EXPECT_THAT(admin.err, HasSubstr("--server"));
  const Output data = Run("classify --model demo cat.jpg --server " + fake_.admin());
  EXPECT_EQ(data.code, 1);
  EXPECT_THAT(data.err,
              HasSubstr("UNIMPLEMENTED: cat.jpg: " + fake_.admin() + " was asked as the data"));
  EXPECT_THAT(data.err, HasSubstr("--admin"));
}

TEST_F(TernctlTest, BenchClosedLoopPrintsItsKeys) {
  MakeImageFolder("photos", 1);
  const Output output =
      Run("bench --model demo --data photos --concurrency 4 --seconds 0.3 --warmup 0.1 --json");
  EXPECT_EQ(output.code, 0) << output.err;
  const json answer = output.Json();
  EXPECT_GT(answer["images_per_second"], 0);
  EXPECT_GT(answer["ms_per_image"], 0);
  EXPECT_LE(answer["p50_ms"], answer["p90_ms"]);
  EXPECT_LE(answer["p90_ms"], answer["p99_ms"]);
  EXPECT_EQ(answer["errors"], 0);
  EXPECT_EQ(answer["mean_batch_size"], 2.0);
  EXPECT_EQ(answer["not_sent"], 0);
  // The server's choice: a model may have fewer classes than any number here.
  EXPECT_EQ(fake_.seen().classify.back().top_k(), 0u);
}

TEST_F(TernctlTest, BenchOpenLoopBeyondWhatIsPossibleEndsInTimeAndSaysSo) {
  folder_.Write("a.jpg", "1");
  const std::string command = "bench --model demo --data a.jpg --rate 1e6 --seconds 0.2 --warmup 0";
  const json answer = Run(command + " --json").Json();
  EXPECT_GT(answer["not_sent"].get<uint64_t>(), 50'000u);
  EXPECT_LT(answer["max_ms"].get<double>(), 5'000);
  EXPECT_THAT(Run(command).out, HasSubstr("requests were due and not sent before the end"));
}

TEST_F(TernctlTest, BenchOpenLoopCountsErrors) {
  folder_.Write("photos/a.jpg", "1");
  folder_.Write("photos/b.jpg", "x");
  // Which of the two comes first, and so is the trial call, depends on the seed.
  Output output;
  for (const char* seed : {"0", "1", "2", "3", "4", "5"}) {
    output = Run(std::string("bench --model demo --data photos --rate 200 --arrivals fixed "
                             "--seconds 0.3 --warmup 0 --json --seed ") +
                 seed);
    if (output.code == 0) break;
    EXPECT_THAT(output.err, HasSubstr("INVALID_ARGUMENT"));
  }
  ASSERT_EQ(output.code, 0) << output.err;
  const json answer = output.Json();
  EXPECT_EQ(answer["mode"], "open");
  EXPECT_NEAR(answer["errors"].get<double>(), 30, 1);
  EXPECT_EQ(answer["errors_by_code"]["INVALID_ARGUMENT"], answer["errors"]);
}

TEST_F(TernctlTest, BenchOfTheEngineAndProfilePrintTheirKeys) {
  const Output engine =
      Run("bench --engine --model demo --version 2 --batch 8 --threads 1 --seconds 5 --json");
  EXPECT_EQ(engine.code, 0) << engine.err;
  const json answer = engine.Json();
  EXPECT_EQ(answer["images_per_second"], 800);
  EXPECT_EQ(answer["ms_per_image"], 1.25);
  EXPECT_EQ(answer["p50_ms"], 10);
  EXPECT_EQ(answer["p90_ms"], 11);
  EXPECT_EQ(answer["p99_ms"], 12);
  EXPECT_EQ(answer["errors"], 0);
  const Output profile = Run("profile --model demo --version 2");
  EXPECT_EQ(profile.code, 0) << profile.err;
  EXPECT_THAT(profile.out, HasSubstr("cluster_avx2"));
  EXPECT_THAT(profile.out, HasSubstr("outside convolutions and fully connected layers: 25"));
  const json profiled = Run("profile --model demo --json").Json();
  EXPECT_EQ(profiled["layers"][0]["ms"], 0.25);
  EXPECT_EQ(profiled["work"][0]["kind"], "reorder");
  EXPECT_EQ(profiled["outside_share"], 0.25);
}

TEST_F(TernctlTest, ImportSendsContractLabelsAndBytes) {
  folder_.Write("net.onnx", "onnx bytes");
  folder_.Write("labels", "cat\ndog\n");
  const Output output =
      Run("import --name demo --onnx net.onnx --preprocess cifar10 --labels labels --json");
  EXPECT_EQ(output.code, 0) << output.err;
  EXPECT_EQ(output.Json()["version"], 1);
  const Seen seen = fake_.seen();
  EXPECT_EQ(seen.imported_bytes, "onnx bytes");
  EXPECT_EQ(seen.import.preprocessing().resize_size(), 32u);
  EXPECT_THAT(seen.import.labels(), testing::ElementsAre("cat", "dog"));
  EXPECT_FALSE(seen.import.preprocessing().jpeg_scaling());
  const Output unknown = Run("import --name demo --onnx net.onnx --preprocess imagnet");
  EXPECT_EQ(unknown.code, 1);
  EXPECT_THAT(unknown.err, HasSubstr("NOT_FOUND: preprocessing 'imagnet'"));
}

TEST_F(TernctlTest, ImportAllowsJpegScalingOnRequest) {
  folder_.Write("net.onnx", "onnx bytes");
  const Output output =
      Run("import --name demo --onnx net.onnx --preprocess imagenet --jpeg-scaling");
  EXPECT_EQ(output.code, 0) << output.err;
  EXPECT_TRUE(fake_.seen().import.preprocessing().jpeg_scaling());
  EXPECT_EQ(fake_.seen().import.preprocessing().resize_size(), 256u);
}

TEST_F(TernctlTest, ImportOfAnArtifactSendsItsBytesAndNoContract) {
  folder_.Write("net.tern", "artifact bytes");
  const Output output = Run("import --name demo --artifact net.tern --set-default --json");
  EXPECT_EQ(output.code, 0) << output.err;
  EXPECT_EQ(output.Json()["version"], 4);
  const Seen seen = fake_.seen();
  EXPECT_EQ(seen.imported_bytes, "artifact bytes");
  EXPECT_TRUE(seen.import.artifact());
  EXPECT_TRUE(seen.import.set_default());
  EXPECT_FALSE(seen.import.has_preprocessing());
  folder_.Write("net.onnx", "onnx bytes");
  EXPECT_EQ(Run("import --name demo --artifact net.tern --onnx net.onnx").code, 2);
  EXPECT_EQ(Run("import --name demo --artifact net.tern --preprocess cifar10").code, 2);
  EXPECT_EQ(Run("import --name demo --artifact net.tern --jpeg-scaling").code, 2);
  EXPECT_EQ(Run("import --name demo --onnx net.onnx").code, 2);
  EXPECT_EQ(Run("import --name demo").code, 2);
}

// A stand-in for tern-finetune: writes its arguments, and its result at the place asked for.
constexpr char kTool[] = R"(#!/bin/sh
echo "$*" > tool_arguments
while [ $# -gt 1 ]; do [ "$1" = --output ] && out=$2; shift; done
)";

class FinetuneTest : public TernctlTest {
 protected:
  Output Finetune(const std::string& ending, const std::string& options = "") const {
    MakeImageFolder("train", 2);
    std::filesystem::permissions(folder_.Write("tool", kTool + ending),
                                 std::filesystem::perms::owner_all);
    return Run("finetune --model demo --data train --tool ./tool " + options);
  }
};

TEST_F(FinetuneTest, TrainsTheFetchedVersionsAndImportsTheResult) {
  const Output output =
      Finetune("echo -n tuned > $out", "--version 2 --epochs 5 --resume --json -- --warmup 0.2");
  EXPECT_EQ(output.code, 0) << output.err;
  const json answer = output.Json();
  EXPECT_EQ(answer["version"], 4);
  EXPECT_EQ(answer["start_version"], 2);
  EXPECT_EQ(answer["fine_tuning"]["start_top1"], 0.8);
  EXPECT_EQ(answer["fine_tuning"]["top1"], 0.85);
  EXPECT_EQ(fake_.seen().imported_bytes, "tuned");
  EXPECT_TRUE(fake_.seen().import.artifact());
  EXPECT_EQ(fake_.seen().import.name(), "demo");
  EXPECT_EQ(folder_.Read("tool_arguments"),
            "--float finetune-demo-2/float.onnx --start finetune-demo-2/start.tern --data train "
            "--output finetune-demo-2/tuned.tern --epochs 5 --resume --warmup 0.2\n");
  EXPECT_TRUE(folder_.Read("finetune-demo-2/start.tern") == FakeServer::ExportedBytes());
  const Output text = Finetune("echo -n tuned > $out", "--version 2");
  EXPECT_THAT(text.out, HasSubstr("85.00 %"));
}

TEST_F(FinetuneTest, AFloatVersionIsQuantisedFirst) {
  const Output output = Finetune("echo -n tuned > $out",
                                 "--version 1 --weights int4 --cluster 16 --calibration-count 7");
  EXPECT_EQ(output.code, 0) << output.err;
  EXPECT_EQ(fake_.seen().quantize.recipe().weights(), v1::INT4_CLUSTER);
  EXPECT_EQ(fake_.seen().quantize.recipe().cluster_size(), 16u);
  EXPECT_EQ(fake_.seen().samples.size(), 7u);
  EXPECT_THAT(output.err, HasSubstr("as version 3"));
  EXPECT_THAT(folder_.Read("tool_arguments"), HasSubstr("finetune-demo-3/start.tern"));
}

TEST_F(FinetuneTest, NothingIsImportedUnlessTheToolEndsWell) {
  const Output failed = Finetune("echo -n half > $out; exit 1", "--version 2");
  EXPECT_EQ(failed.code, 1);
  EXPECT_THAT(failed.err, HasSubstr("nothing was imported"));
  const Output killed = Finetune("kill -KILL $$", "--version 2");
  EXPECT_EQ(killed.code, 128 + 9);
  EXPECT_THAT(killed.err, HasSubstr("signal 9"));
  const Output empty = Finetune("exit 0", "--version 2");
  EXPECT_EQ(empty.code, 1);
  EXPECT_THAT(empty.err, HasSubstr("DATA_LOSS"));
  EXPECT_EQ(fake_.seen().imported_bytes, "");
}

TEST_F(FinetuneTest, NothingIsImportedIntoAModelWhoseSourceWasDeletedMeanwhile) {
  const Output output = Finetune(
      "'" TERNCTL_PATH "' delete --model demo --version 1; echo -n tuned > $out", "--version 2");
  EXPECT_EQ(output.code, 1);
  EXPECT_THAT(output.err, HasSubstr("FAILED_PRECONDITION: the source version 1 of 'demo'"));
  EXPECT_THAT(output.err, HasSubstr("the result is finetune-demo-2/tuned.tern"));
  EXPECT_EQ(fake_.seen().imported_bytes, "");
  EXPECT_EQ(folder_.Read("finetune-demo-2/tuned.tern"), "tuned");
}

TEST_F(FinetuneTest, SignalsReachTheToolAndItsStatusIsPassedOn) {
  const Output terminated = Finetune(
      "trap 'touch $out.checkpoint; exit 143' TERM; kill -TERM $PPID; while :; do sleep 0.01; done",
      "--version 2");
  EXPECT_EQ(terminated.code, 143);
  EXPECT_THAT(terminated.err, HasSubstr("--version 2 --resume"));
  // ternctl leaves the terminal's SIGINT to the tool, which may end well all the same.
  const Output interrupted = Finetune("kill -INT $PPID; echo -n tuned > $out", "--version 2");
  EXPECT_EQ(interrupted.code, 0) << interrupted.err;
}

TEST_F(FinetuneTest, WithoutTheToolItSaysHowToBuildIt) {
  MakeImageFolder("train", 1);
  // A copy, so that a tern-finetune beside the real one is not found.
  const Output absent =
      Run("models >unused; cp '" TERNCTL_PATH
          "' copy; PATH=/nonexistent ./copy finetune --model demo --version 2 --data train");
  EXPECT_EQ(absent.code, 1);
  EXPECT_THAT(absent.err, HasSubstr("NOT_FOUND: tern-finetune"));
  EXPECT_THAT(absent.err, HasSubstr("make finetune"));
  const Output wrong = Run("finetune --model demo --version 2 --data train --tool ./nowhere");
  EXPECT_EQ(wrong.code, 1);
  EXPECT_THAT(wrong.err, HasSubstr("NOT_FOUND: ./nowhere"));
}

TEST_F(TernctlTest, ListsModelsAndShowsReports) {
  const Output models = Run("models");
  EXPECT_EQ(models.code, 0) << models.err;
  EXPECT_THAT(models.out, HasSubstr("ternary-cluster"));
  EXPECT_EQ(Run("models --json").Json()["versions"].size(), 2u);
  EXPECT_THAT(Run("models broken").out,
              testing::ContainsRegex("unavailable +- +- +- +- +- +- +checksum of section 3"));
  const Output report = Run("report --model demo --version 2");
  EXPECT_EQ(report.code, 0) << report.err;
  EXPECT_THAT(report.out, HasSubstr("75.00 %"));
  EXPECT_THAT(report.out, HasSubstr("80.00 % (79.00..81.00)"));
  EXPECT_THAT(report.out, HasSubstr("warning: layer conv1 clips"));
  EXPECT_EQ(Run("report --model demo --version 2 --json").Json()["report"]["bytes"], 123456);
  EXPECT_TRUE(Run("report --model demo --json").Json()["report"].is_null());
}

TEST_F(TernctlTest, CompareMeasuresEveryVersionOnTheSameImages) {
  MakeImageFolder("photos", 1);
  const Output text = Run("compare --model demo --data photos --seconds 0.1");
  EXPECT_EQ(text.code, 0) << text.err;
  EXPECT_THAT(text.out, HasSubstr("ternary-cluster N=4"));
  const json answer = Run("compare --model demo --data photos --seconds 0.1 --json").Json();
  ASSERT_EQ(answer["versions"].size(), 2u);
  for (const json& version : answer["versions"]) {
    EXPECT_EQ(version["accuracy"]["images"], 10);
    EXPECT_EQ(version["accuracy"]["top1"], 1.0);
    EXPECT_EQ(version["accuracy"]["agreement"], 0.5);
    EXPECT_GT(version["speed"]["images_per_second"], 0);
  }
}

TEST_F(TernctlTest, ExportWritesTheWholeFileOrNone) {
  const Output output = Run("export --model demo --version 2 --output copy.tern --json");
  EXPECT_EQ(output.code, 0) << output.err;
  EXPECT_TRUE(folder_.Read("copy.tern") == FakeServer::ExportedBytes());
  EXPECT_EQ(output.Json()["bytes"], FakeServer::ExportedBytes().size());
  const Output to_stdout = Run("export --model demo --output -");
  EXPECT_TRUE(to_stdout.out == FakeServer::ExportedBytes());
  const Output as_onnx = Run("export --model demo --output copy.onnx --format onnx --json");
  EXPECT_EQ(as_onnx.Json()["file_name"], "model.onnx");
  EXPECT_EQ(Run("export --model demo --output copy.onnx --format onnxx").code, 2);

  ASSERT_EQ(::mkfifo(folder_.At("pipe").c_str(), 0600), 0);
  std::string got;
  std::thread reader([&] { got = folder_.Read("pipe"); });
  const Output piped = Run("export --model demo --output pipe --json");
  // Where it was replaced, the reader would wait for ever.
  if (!std::filesystem::is_fifo(folder_.At("pipe"))) std::abort();
  reader.join();
  EXPECT_EQ(piped.code, 0) << piped.err;
  EXPECT_TRUE(piped.Json()["bytes"].is_null());
  EXPECT_TRUE(got == FakeServer::ExportedBytes());

  const Output broken = Run("export --model missing --output half.tern");
  EXPECT_EQ(broken.code, 1);
  EXPECT_THAT(broken.err, HasSubstr("DATA_LOSS"));
  for (const auto& entry : std::filesystem::directory_iterator(folder_.path())) {
    EXPECT_THAT(entry.path().string(), testing::Not(HasSubstr("half.tern")));
  }
}

TEST_F(TernctlTest, VersionCommandsReachTheServer) {
  EXPECT_EQ(Run("set-default --model demo --version 2").code, 0);
  EXPECT_EQ(Run("unload --model demo --version 1").code, 0);
  EXPECT_EQ(Run("load --model demo --version 1 --json").code, 0);
  EXPECT_EQ(Run("delete --model demo --version 2").code, 0);
  const Output all = Run("delete --model demo --all --json");
  EXPECT_EQ(all.Json()["versions_removed"], 2);
  EXPECT_THAT(fake_.seen().calls,
              testing::ElementsAre("SetDefault demo 2", "Unload demo 1", "Load demo 1",
                                   "Delete demo 2", "Delete demo 0"));
}

TEST_F(TernctlTest, HealthAndLabel) {
  const Output health = Run("health");
  EXPECT_EQ(health.code, 0) << health.err;
  EXPECT_EQ(health.out, "SERVING\n");
  EXPECT_EQ(Run("health --service loading").code, 1);
  const Output label = Run("label --request-id r1 --label 3 --json");
  EXPECT_EQ(label.code, 0) << label.err;
  EXPECT_EQ(label.Json()["top1"], true);
}

}  // namespace
}  // namespace tern::client
