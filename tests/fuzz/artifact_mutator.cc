// .tern files stay files with right checksums under most mutations; else every input would end at
// the first of them.
#include <cstring>

#include "tests/artifact/pieces.h"
#include "tests/fuzz/fuzzer.h"
#include "tests/fuzz/mutate_message.h"

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size,
                                          unsigned int seed) {
  using tern::v1::ArtifactHeader;
  std::mt19937 random(seed);
  std::string file(tern::fuzz::Text(data, size));
  const auto pieces = tern::artifact::TakeApart(file);
  if (!pieces.has_value() || random() % 16 == 0) {
    tern::fuzz::MutateBytes(max_size, file);
  } else {
    tern::artifact::Pieces changed = *pieces;
    if (!changed.sections.empty() && random() % 4 == 0) {
      std::string& section = changed.sections[random() % changed.sections.size()];
      // Mostly of the same length, which the header's tensors promise.
      tern::fuzz::MutateBytes(section.size() + (random() % 4 == 0 ? 16 : 1), section);
      if (random() % 4 != 0)
        section.resize(pieces->sections[&section - &changed.sections[0]].size());
    } else {
      // Section entries are renewed when the file is put together.
      changed.header.clear_sections();
      std::string header = changed.header.SerializeAsString();
      tern::fuzz::MutateMessage(*ArtifactHeader::descriptor(), random, header);
      changed.header.ParseFromString(header);
    }
    file = tern::artifact::PutTogether(std::move(changed));
  }
  if (file.size() > max_size) file.resize(max_size);
  std::memcpy(data, file.data(), file.size());
  return file.size();
}
