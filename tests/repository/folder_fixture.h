// A fresh repository folder for each test, and hands to damage it with.
#ifndef TERN_TESTS_REPOSITORY_FOLDER_FIXTURE_H_
#define TERN_TESTS_REPOSITORY_FOLDER_FIXTURE_H_

#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

namespace tern::repository::testing {

class FolderTest : public ::testing::Test {
 protected:
  FolderTest() {
    std::string pattern =
        (std::filesystem::temp_directory_path() / "tern-repository-XXXXXX").string();
    root_ = ::mkdtemp(pattern.data());
  }
  ~FolderTest() override { std::filesystem::remove_all(root_); }

  std::string Path(const std::string& relative) const { return root_ + "/" + relative; }
  void Write(const std::string& relative, const std::string& content) const {
    std::filesystem::create_directories(std::filesystem::path(Path(relative)).parent_path());
    std::ofstream(Path(relative), std::ios::binary) << content;
  }
  std::string Read(const std::string& relative) const {
    std::ifstream in(Path(relative), std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(in), {});
  }
  bool Exists(const std::string& relative) const {
    return std::filesystem::exists(std::filesystem::symlink_status(Path(relative)));
  }
  // Everything below `relative` whose name begins with '.', the lock aside.
  std::vector<std::string> Leftovers(const std::string& relative = ".") const {
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(Path(relative))) {
      const std::string name = entry.path().filename().string();
      if ((name[0] == '.' && name != ".lock") || name.find(".tmp.") != std::string::npos) {
        names.push_back(entry.path().string());
      }
    }
    return names;
  }

  std::string root_;
};

}  // namespace tern::repository::testing

#endif  // TERN_TESTS_REPOSITORY_FOLDER_FIXTURE_H_
