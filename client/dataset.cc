#include "client/dataset.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <map>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "client/random.h"
#include "client/status.h"

namespace tern::client {
namespace {

namespace fs = std::filesystem;

bool Hidden(const fs::path& path) {
  const std::string name = path.filename().string();
  return !name.empty() && name[0] == '.';
}

bool IsImageName(const fs::path& path) {
  if (Hidden(path)) return false;
  const std::string extension = absl::AsciiStrToLower(path.extension().string());
  return extension == ".jpg" || extension == ".jpeg" || extension == ".png" ||
         extension == ".webp" || extension == ".bmp";
}

absl::Status Unreadable(const fs::path& path, const std::error_code& code) {
  return absl::NotFoundError(absl::StrCat(path.string(), ": ", code.message()));
}

// Paths of the images under `folder`, sorted; every depth if `deep`. Links to folders are not
// followed, so a loop of links ends.
absl::StatusOr<std::vector<std::string>> FindImages(const fs::path& folder, bool deep) {
  std::vector<std::string> found;
  std::error_code code;
  fs::recursive_directory_iterator it(folder, code);
  if (code) return Unreadable(folder, code);
  for (const fs::recursive_directory_iterator end; it != end;) {
    const bool is_folder = it->is_directory(code);
    if (is_folder && (!deep || Hidden(it->path()))) it.disable_recursion_pending();
    if (!is_folder && IsImageName(it->path()) && it->is_regular_file(code)) {
      found.push_back(it->path().string());
    }
    it.increment(code);
    if (code) return Unreadable(folder, code);
  }
  std::sort(found.begin(), found.end());
  return found;
}

absl::StatusOr<uint32_t> Shift(uint64_t label, int offset, const std::string& where) {
  const int64_t shifted = static_cast<int64_t>(label) + offset;
  if (shifted < 0 || shifted > std::numeric_limits<uint32_t>::max()) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": label ", label, " with offset ",
                                                   offset, " is ", shifted, ", want 0 or more"));
  }
  return static_cast<uint32_t>(shifted);
}

absl::StatusOr<std::vector<ImageFile>> FromLabelsFile(const fs::path& folder, int offset) {
  const fs::path list = folder / "labels.txt";
  std::ifstream file(list);
  if (!file) return absl::NotFoundError(absl::StrCat(list.string(), ": cannot be opened"));
  std::vector<ImageFile> images;
  std::string line;
  for (int number = 1; std::getline(file, line); ++number) {
    const std::string text(absl::StripAsciiWhitespace(line));
    if (text.empty()) continue;
    const std::string where = absl::StrCat(list.string(), ":", number);
    // The name may contain spaces: the index is the last word.
    const size_t space = text.find_last_of(" \t");
    uint32_t label = 0;
    if (space == std::string::npos || !absl::SimpleAtoi(text.substr(space + 1), &label)) {
      return absl::InvalidArgumentError(
          absl::StrCat(where, ": got '", text, "', want `file index` with an index of 0 or more"));
    }
    const fs::path path =
        folder / std::string(absl::StripTrailingAsciiWhitespace(text.substr(0, space)));
    std::error_code code;
    if (!fs::is_regular_file(path, code)) {
      return absl::NotFoundError(absl::StrCat(where, ": no file ", path.string()));
    }
    TERN_CLIENT_ASSIGN_OR_RETURN(const uint32_t shifted, Shift(label, offset, where));
    images.push_back({path.string(), shifted});
  }
  if (file.bad()) return absl::DataLossError(absl::StrCat("reading ", list.string(), " failed"));
  return images;
}

// The class of each sub-folder of `root` by its name; nothing if they count by their place.
absl::StatusOr<std::vector<uint32_t>> NamedClasses(const std::string& root,
                                                   const std::vector<std::string>& names,
                                                   const Labelling& labelling) {
  std::vector<uint32_t> classes;
  if (!labelling.classes) return classes;
  TERN_CLIENT_ASSIGN_OR_RETURN(const Classes model, labelling.classes());
  std::multimap<std::string, uint32_t> labels;
  for (const std::string& label : model.labels) {
    labels.emplace(label, static_cast<uint32_t>(labels.size()));
  }
  const auto warn = [&](const auto&... text) {
    if (labelling.warn) labelling.warn(absl::StrCat(root, ": ", text...));
  };
  std::string stranger;
  for (const std::string& name : names) {
    const auto [first, end] = labels.equal_range(name);
    if (first == end) {
      stranger = name;
      continue;
    }
    if (const auto second = std::next(first); second != end) {
      return absl::InvalidArgumentError(
          absl::StrCat(root, ": sub-folder '", name, "' is the label of classes ", first->second,
                       " and ", second->second, ": give the indices in a labels.txt"));
    }
    classes.push_back(first->second);
  }
  if (classes.empty()) {
    const auto count = static_cast<int64_t>(names.size());
    if (model.count > 0 && count + labelling.offset != static_cast<int64_t>(model.count)) {
      warn("sub-folders: ", count, ", classes of the model: ", model.count,
           "; they count as classes ", labelling.offset, " to ", count - 1 + labelling.offset,
           " in the order of their names, which are no labels of the model");
    }
  } else if (!stranger.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(root, ": sub-folder '", stranger,
                                                   "' is none of the model's labels, others are"));
  } else if (labelling.offset != 0) {
    warn("the sub-folders have the names of labels of the model: the label offset of ",
         labelling.offset, " is not used");
  }
  return classes;
}

void Shuffle(std::vector<size_t>& items, Random& random) {
  for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[random.Below(i)]);
}

}  // namespace

absl::StatusOr<std::vector<ImageFile>> ListImages(const std::string& path,
                                                  const Labelling& labelling) {
  std::error_code code;
  const fs::path root(path);
  if (!fs::exists(root, code)) {
    if (code) return Unreadable(root, code);
    return absl::NotFoundError(absl::StrCat(path, ": no such file or folder"));
  }
  if (!fs::is_directory(root, code)) return std::vector<ImageFile>{{path, std::nullopt}};

  std::vector<ImageFile> images;
  if (fs::exists(root / "labels.txt", code)) {
    TERN_CLIENT_ASSIGN_OR_RETURN(images, FromLabelsFile(root, labelling.offset));
  } else {
    std::vector<std::string> names;
    fs::directory_iterator it(root, code);
    if (code) return Unreadable(root, code);
    for (const fs::directory_iterator end; it != end;) {
      if (it->is_directory(code) && !Hidden(it->path())) {
        names.push_back(it->path().filename().string());
      }
      it.increment(code);
      if (code) return Unreadable(root, code);
    }
    std::sort(names.begin(), names.end());
    std::vector<std::vector<std::string>> found(names.size());
    bool any = false;
    for (size_t i = 0; i < names.size(); ++i) {
      TERN_CLIENT_ASSIGN_OR_RETURN(found[i], FindImages(root / names[i], true));
      any |= !found[i].empty();
    }
    TERN_CLIENT_ASSIGN_OR_RETURN(std::vector<std::string> beside, FindImages(root, false));
    if (any) {
      TERN_CLIENT_ASSIGN_OR_RETURN(const std::vector<uint32_t> named,
                                   NamedClasses(path, names, labelling));
      for (size_t i = 0; i < names.size(); ++i) {
        if (found[i].empty()) continue;
        uint32_t label = 0;
        if (named.empty()) {
          TERN_CLIENT_ASSIGN_OR_RETURN(
              label,
              Shift(i, labelling.offset, absl::StrCat(path, ": sub-folder '", names[i], "'")));
        } else {
          label = named[i];
        }
        for (std::string& name : found[i]) images.push_back({std::move(name), label});
      }
      if (!beside.empty() && labelling.warn) {
        labelling.warn(
            absl::StrCat(path, ": images beside the sub-folders are left out: ", beside.size()));
      }
    } else {
      for (std::string& name : beside) images.push_back({std::move(name), std::nullopt});
    }
  }
  if (images.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(
        path, " has no images (*.jpg, *.jpeg, *.png, *.webp, *.bmp), neither directly nor one ",
        "sub-folder per class, nor a labels.txt that lists any"));
  }
  return images;
}

std::vector<ImageFile> ChooseImages(const std::vector<ImageFile>& images, size_t count,
                                    uint64_t seed) {
  if (count == 0 || count > images.size()) count = images.size();
  std::map<int64_t, std::vector<size_t>> by_class;  // -1: no label
  for (size_t i = 0; i < images.size(); ++i) {
    by_class[images[i].label ? int64_t{*images[i].label} : -1].push_back(i);
  }
  std::vector<std::vector<size_t>> classes;
  for (auto& [label, members] : by_class) {
    Random random(seed ^ (0xd1342543de82ef95u * static_cast<uint64_t>(label + 2)));
    Shuffle(members, random);
    classes.push_back(std::move(members));
  }
  std::vector<size_t> order(classes.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  Random random(seed);
  Shuffle(order, random);

  std::vector<ImageFile> chosen;
  chosen.reserve(count);
  for (size_t round = 0; chosen.size() < count; ++round) {
    for (size_t i = 0; i < order.size() && chosen.size() < count; ++i) {
      const std::vector<size_t>& members = classes[order[i]];
      if (round < members.size()) chosen.push_back(images[members[round]]);
    }
  }
  return chosen;
}

}  // namespace tern::client
