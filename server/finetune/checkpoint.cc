#include "server/finetune/checkpoint.h"

#include <cstring>
#include <type_traits>

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
  bool ok() const { return ok_; }
  bool done() const { return ok_ && bytes_.empty(); }

 private:
  bool Has(uint64_t size) {
    ok_ = ok_ && size <= bytes_.size();
    return ok_;
  }
  absl::string_view bytes_;
  bool ok_ = true;
};

}  // namespace

absl::Status WriteCheckpoint(const Checkpoint& c, const std::string& path) {
  Packer packer;
  packer.Put(static_cast<uint64_t>(c.settings.size()));
  for (const auto& [name, value] : c.settings) {
    packer.Put(name);
    packer.Put(value);
  }
  packer.Put(c.epoch);
  packer.Put(c.step);
  packer.Put(c.loss_sum);
  packer.Put(c.right);
  packer.Put(c.seen);
  packer.Put(c.unreadable);
  packer.Put(c.seconds);
  packer.Put(static_cast<uint64_t>(c.epochs.size()));
  for (const EpochResult& epoch : c.epochs) {
    packer.Put(epoch.epoch);
    packer.Put(epoch.loss);
    packer.Put(epoch.accuracy);
    packer.Put(epoch.held_out_top1);
  }
  packer.Put(c.best);
  packer.Put(c.best_epoch);
  packer.Put(c.torch);
  const uint32_t crc = Crc32c(packer.bytes());
  const absl::string_view parts[] = {
      kMagic, absl::string_view(reinterpret_cast<const char*>(&crc), sizeof(crc)), packer.bytes()};
  return WriteFileAtomically(path, parts);
}

absl::StatusOr<Checkpoint> ReadCheckpoint(const std::string& path) {
  TERN_ASSIGN_OR_RETURN(const std::string file, ReadFile(path));
  const absl::string_view bytes = file;
  uint32_t crc = 0;
  if (bytes.size() < kMagic.size() + sizeof(crc) || bytes.substr(0, kMagic.size()) != kMagic) {
    return absl::DataLossError(absl::StrCat(path, ": not a checkpoint of this program"));
  }
  std::memcpy(&crc, bytes.data() + kMagic.size(), sizeof(crc));
  const absl::string_view content = bytes.substr(kMagic.size() + sizeof(crc));
  if (Crc32c(content) != crc) return absl::DataLossError(absl::StrCat(path, ": checksum"));
  Unpacker unpacker(content);
  Checkpoint c;
  uint64_t count = 0;
  unpacker.Get(count);
  for (uint64_t i = 0; i < count && unpacker.ok(); ++i) {
    std::string name;
    unpacker.Get(name);
    unpacker.Get(c.settings[name]);
  }
  unpacker.Get(c.epoch);
  unpacker.Get(c.step);
  unpacker.Get(c.loss_sum);
  unpacker.Get(c.right);
  unpacker.Get(c.seen);
  unpacker.Get(c.unreadable);
  unpacker.Get(c.seconds);
  unpacker.Get(count);
  for (uint64_t i = 0; i < count && unpacker.ok(); ++i) {
    EpochResult epoch;
    unpacker.Get(epoch.epoch);
    unpacker.Get(epoch.loss);
    unpacker.Get(epoch.accuracy);
    unpacker.Get(epoch.held_out_top1);
    c.epochs.push_back(epoch);
  }
  unpacker.Get(c.best);
  unpacker.Get(c.best_epoch);
  unpacker.Get(c.torch);
  if (!unpacker.done()) return absl::DataLossError(absl::StrCat(path, ": cut off"));
  return c;
}

}  // namespace tern::finetune
