#include "client/table.h"

#include <algorithm>
#include <cmath>
#include <ostream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace tern::client {
namespace {

// Code points of UTF-8 text; names in other scripts then stay aligned well enough.
size_t Width(const std::string& text) {
  return static_cast<size_t>(std::count_if(text.begin(), text.end(), [](char c) {
    return (static_cast<unsigned char>(c) & 0xc0) != 0x80;
  }));
}

}  // namespace

void Table::Add(std::vector<std::string> row) {
  row.resize(columns_.size());
  for (std::string& cell : row) cell = Printable(cell);
  rows_.push_back(std::move(row));
}

void Table::Print(std::ostream& out) const {
  std::vector<size_t> widths;
  for (size_t c = 0; c < columns_.size(); ++c) {
    size_t width = Width(columns_[c].title);
    for (const auto& row : rows_) width = std::max(width, Width(row[c]));
    widths.push_back(width);
  }
  const auto print = [&](const auto& cell_of) {
    std::string line;
    for (size_t c = 0; c < columns_.size(); ++c) {
      const std::string& cell = cell_of(c);
      const std::string gap(widths[c] - Width(cell), ' ');
      if (c > 0) line += "  ";
      line += columns_[c].align == kRight ? gap + cell : cell + gap;
    }
    line.erase(line.find_last_not_of(' ') + 1);
    out << line << "\n";
  };
  print([&](size_t c) -> const std::string& { return columns_[c].title; });
  for (const auto& row : rows_) print([&](size_t c) -> const std::string& { return row[c]; });
}

std::string Bytes(uint64_t bytes) {
  if (bytes < 1024) return absl::StrCat(bytes, " B");
  static constexpr const char* kUnits[] = {"KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes) / 1024;
  size_t unit = 0;
  while (value >= 1024 && unit + 1 < std::size(kUnits)) {
    value /= 1024;
    ++unit;
  }
  return absl::StrFormat("%.1f %s", value, kUnits[unit]);
}

std::string Count(uint64_t count) {
  if (count < 10'000) return absl::StrCat(count);
  static constexpr const char* kUnits[] = {"k", "M", "G", "T"};
  double value = static_cast<double>(count) / 1000;
  size_t unit = 0;
  while (value >= 1000 && unit + 1 < std::size(kUnits)) {
    value /= 1000;
    ++unit;
  }
  return absl::StrFormat("%.1f %s", value, kUnits[unit]);
}

std::string Percent(double fraction) {
  return std::isfinite(fraction) ? absl::StrFormat("%.2f %%", 100 * fraction) : "-";
}

std::string Fixed(double value, int digits) {
  return std::isfinite(value) ? absl::StrFormat("%.*f", digits, value) : "-";
}

std::string Interval(const v1::Proportion& p) {
  if (p.total() == 0) return "-";
  return absl::StrFormat("%.2f %% (%.2f..%.2f)", 100 * p.value(), 100 * p.low(), 100 * p.high());
}

std::string Points(const v1::PairedComparison& comparison) {
  return absl::StrFormat("%.2f (%.2f..%.2f)", 100 * comparison.drop(), 100 * comparison.drop_low(),
                         100 * comparison.drop_high());
}

std::string Printable(const std::string& text) {
  std::string clean = text;
  for (char& c : clean) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  }
  return clean;
}

}  // namespace tern::client
