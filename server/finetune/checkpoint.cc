#include "server/finetune/checkpoint.h"

#include <cstring>
#include <map>
#include <type_traits>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "server/base/file.h"
#include "server/base/status_macros.h"

namespace tern::finetune {
namespace {

// "TERNFT" and the format's version, then the CRC-32C of what follows. Numbers are as the machine
// holds them: checkpoints stay on the machine that wrote them.
constexpr absl::string_view kMagic = "TERNFT01";

class Packer {
 public:
  template <typename T>
  void Put(T value) {
    static_assert(std::is_arithmetic_v<T>);
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof(value));
  }
  void Put(const std::string& text) {
    Put(static_cast<uint64_t>(text.size()));
    bytes_ += text;
  }
  template <typename... T>
  void operator()(const T&... values) {
    (Put(values), ...);
  }
  void Map(const std::map<std::string, std::string>& map) {
    Put(static_cast<uint64_t>(map.size()));
    for (const auto& [name, value] : map) (*this)(name, value);
  }
  template <typename T, typename F>
  void List(const std::vector<T>& list, F fields) {
    Put(static_cast<uint64_t>(list.size()));
    for (const T& item : list) fields(item);
  }
  const std::string& bytes() const { return bytes_; }

 private:
  std::string bytes_;
};

// Reads what Packer wrote; after a short read everything is zero and ok() false.
class Unpacker {
 public:
  explicit Unpacker(absl::string_view bytes) : bytes_(bytes) {}
  template <typename T>
  void Get(T& value) {
    static_assert(std::is_arithmetic_v<T>);
    value = T{};
    if (!Has(sizeof(T))) return;
    std::memcpy(&value, bytes_.data(), sizeof(T));
    bytes_.remove_prefix(sizeof(T));
  }
  void Get(std::string& text) {
    uint64_t size = 0;
    Get(size);
    text.clear();
    if (!Has(size)) return;
    text = std::string(bytes_.substr(0, size));
    bytes_.remove_prefix(size);
  }
  template <typename... T>
  void operator()(T&... values) {
    (Get(values), ...);
  }
  void Map(std::map<std::string, std::string>& map) {
    uint64_t count = 0;
    Get(count);
    for (uint64_t i = 0; i < count && ok_; ++i) {
      std::string name;
      Get(name);
      Get(map[name]);
    }
  }
  template <typename T, typename F>
  void List(std::vector<T>& list, F fields) {
    uint64_t count = 0;
    Get(count);
    for (uint64_t i = 0; i < count && ok_; ++i) fields(list.emplace_back());
  }
  bool done() const { return ok_ && bytes_.empty(); }

 private:
  bool Has(uint64_t size) {
    ok_ = ok_ && size <= bytes_.size();
    return ok_;
  }
  absl::string_view bytes_;
  bool ok_ = true;
};

// Every field in the file's order; `archive` is a Packer and `c` const, or an Unpacker.
template <typename Archive, typename C>
void Fields(Archive& archive, C& c) {
  archive.Map(c.settings);
  archive(c.epoch, c.step, c.loss_sum, c.right, c.seen, c.unreadable, c.seconds);
  archive.List(c.epochs, [&](auto& epoch) {
    archive(epoch.epoch, epoch.loss, epoch.accuracy, epoch.held_out_top1);
  });
  archive(c.best, c.best_epoch, c.torch);
}

}  // namespace

absl::Status WriteCheckpoint(const Checkpoint& c, const std::string& path) {
  Packer packer;
  Fields(packer, c);
  const uint32_t crc = Crc32c(packer.bytes());
  const absl::string_view parts[] = {
      kMagic, absl::string_view(reinterpret_cast<const char*>(&crc), sizeof(crc)), packer.bytes()};
  return WriteFileAtomically(path, parts);
}

absl::StatusOr<Checkpoint> ReadCheckpoint(const std::string& path) {
  const absl::StatusOr<std::string> file = ReadFile(path);
  if (!file.ok()) return file.status();
  const absl::string_view bytes = *file;
  uint32_t crc = 0;
  if (bytes.size() < kMagic.size() + sizeof(crc) || !absl::StartsWith(bytes, kMagic)) {
    return absl::DataLossError(absl::StrCat(path, ": not a checkpoint of this program"));
  }
  std::memcpy(&crc, bytes.data() + kMagic.size(), sizeof(crc));
  const absl::string_view content = bytes.substr(kMagic.size() + sizeof(crc));
  if (Crc32c(content) != crc) return absl::DataLossError(absl::StrCat(path, ": checksum"));
  Unpacker unpacker(content);
  Checkpoint c;
  Fields(unpacker, c);
  if (!unpacker.done()) return absl::DataLossError(absl::StrCat(path, ": cut off"));
  return c;
}

}  // namespace tern::finetune
