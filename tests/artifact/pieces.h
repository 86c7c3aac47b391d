// .tern files by hand, from FORMAT.md: taken apart, changed, and put together with checksums that
// are right again, so that a change reaches what lies behind them.
#ifndef TERN_TESTS_ARTIFACT_PIECES_H_
#define TERN_TESTS_ARTIFACT_PIECES_H_

#include <cstdint>
#include <cstring>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/base/file.h"
#include "tern/v1/artifact.pb.h"

namespace tern::artifact {

struct Pieces {
  v1::ArtifactHeader header;
  std::vector<std::string> sections;
};

inline std::string Little(uint64_t value, int size) {
  std::string out;
  for (int i = 0; i < size; ++i) out.push_back(static_cast<char>(value >> (8 * i)));
  return out;
}

// Nothing if `file` has no header or sections outside itself; checksums are not looked at.
inline std::optional<Pieces> TakeApart(const std::string& file) {
  if (file.size() < 32) return std::nullopt;
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, file.data() + 8, 8);
  if (header_bytes > file.size() - 32) return std::nullopt;
  Pieces pieces;
  if (!pieces.header.ParseFromString(file.substr(32, header_bytes))) return std::nullopt;
  for (const auto& section : pieces.header.sections()) {
    if (section.offset() > file.size()) return std::nullopt;
    pieces.sections.push_back(file.substr(section.offset(), section.bytes()));
  }
  return pieces;
}

// Preamble and checksums for any header bytes, followed by `rest`.
inline std::string Seal(const std::string& header, const std::string& rest, uint32_t version = 2) {
  std::string preamble =
      absl::StrCat("TERN", Little(version, 4), Little(header.size(), 8),
                   Little(32 + header.size() + rest.size(), 8), Little(Crc32c(header), 4));
  preamble += Little(Crc32c(preamble), 4);
  return preamble + header + rest;
}

// A file whose checksums are right, whatever the header says. Section entries are renewed; `touch`
// then changes the header once more.
inline std::string PutTogether(Pieces pieces,
                               const std::function<void(v1::ArtifactHeader&)>& touch = nullptr,
                               uint32_t version = 2) {
  std::string header;
  for (int round = 0; round < 5; ++round) {
    uint64_t end = 32 + header.size();
    pieces.header.clear_sections();
    for (const std::string& section : pieces.sections) {
      auto* entry = pieces.header.add_sections();
      entry->set_offset((end + 63) / 64 * 64);
      entry->set_bytes(section.size());
      entry->set_crc32c(Crc32c(section));
      end = entry->offset() + section.size();
    }
    if (touch) touch(pieces.header);
    header = pieces.header.SerializeAsString();
  }
  std::string rest;
  for (const std::string& section : pieces.sections) {
    rest.resize((32 + header.size() + rest.size() + 63) / 64 * 64 - 32 - header.size());
    rest += section;
  }
  return Seal(header, rest, version);
}

}  // namespace tern::artifact

#endif  // TERN_TESTS_ARTIFACT_PIECES_H_
