// Aligned text tables and human forms of numbers.
#ifndef TERN_CLIENT_TABLE_H_
#define TERN_CLIENT_TABLE_H_

#include <cstdint>
#include <iosfwd>
#include <string>
#include <vector>

#include "tern/v1/model.pb.h"

namespace tern::client {

// Columns as wide as their widest cell, two spaces apart; numbers belong on the right.
class Table {
 public:
  enum Align { kLeft, kRight };
  struct Column {
    std::string title;
    Align align = kLeft;
  };

  explicit Table(std::vector<Column> columns) : columns_(std::move(columns)) {}

  // Missing cells are empty; surplus ones are dropped.
  void Add(std::vector<std::string> row);
  void Print(std::ostream& out) const;

 private:
  std::vector<Column> columns_;
  std::vector<std::vector<std::string>> rows_;
};

std::string Bytes(uint64_t bytes);              // 273.4 KiB
std::string Count(uint64_t count);              // 41.2 M
std::string Percent(double fraction);           // 86.42 %
std::string Fixed(double value, int digits);    // "-" for NaN and infinities
std::string Interval(const v1::Proportion& p);  // 86.42 % (85.74..87.08), "-" without a total
// 1.30 (0.08..2.52): the drop and its interval.
std::string Points(const v1::PairedComparison& comparison);
// A control character becomes '?': text from a server or a file must not drive the terminal.
std::string Printable(const std::string& text);

}  // namespace tern::client

#endif  // TERN_CLIENT_TABLE_H_
