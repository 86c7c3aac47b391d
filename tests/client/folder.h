// A temporary folder for tests, removed at the end.
#ifndef TERN_TESTS_CLIENT_FOLDER_H_
#define TERN_TESTS_CLIENT_FOLDER_H_

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>

namespace tern::client {

class Folder {
 public:
  Folder() {
    std::string name = (std::filesystem::temp_directory_path() / "tern-client-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp failed");
    path_ = name;
  }
  ~Folder() {
    std::error_code code;
    std::filesystem::remove_all(path_, code);
  }

  // Writes a file, making the folders above it; returns its path.
  std::string Write(const std::string& name, const std::string& bytes) const {
    const std::filesystem::path path = path_ / name;
    std::filesystem::create_directories(path.parent_path());
    std::ofstream(path, std::ios::binary) << bytes;
    return path.string();
  }
  std::string Read(const std::string& name) const {
    std::ifstream file(path_ / name, std::ios::binary);
    std::stringstream text;
    text << file.rdbuf();
    return text.str();
  }
  std::string At(const std::string& name) const { return (path_ / name).string(); }
  std::string path() const { return path_.string(); }

 private:
  std::filesystem::path path_;
};

}  // namespace tern::client

#endif  // TERN_TESTS_CLIENT_FOLDER_H_
