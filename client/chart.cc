#include "client/chart.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "client/json.h"
#include "client/table.h"

namespace tern::client {
namespace {

// Pixels of one chart.
constexpr double kWidth = 760, kHeight = 400;
constexpr double kLeft = 72, kTop = 46, kBottom = 58;
constexpr double kLetter = 6.6;  // width of a letter of 12 pixels, about
constexpr size_t kLongestName = 28;
constexpr int kColours = 6;

constexpr char kStyle[] = R"(<style>
text{font:12px system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif;fill:#24292f}
.title{font-size:15px;font-weight:600}.small{font-size:11px;fill:#57606a;stroke:#ffffff;stroke-width:3;paint-order:stroke}
.page{fill:#ffffff}.grid{stroke:#d8dee4}.axis{stroke:#57606a}.level{stroke:#57606a;stroke-dasharray:6 4}
.line{fill:none;stroke-width:2}.bar{stroke-width:1.3}
.s0{stroke:#0072b2}.s1{stroke:#d55e00}.s2{stroke:#009e73}.s3{stroke:#cc79a7}.s4{stroke:#b8860b}.s5{stroke:#56b4e9}
.f0{fill:#0072b2}.f1{fill:#d55e00}.f2{fill:#009e73}.f3{fill:#cc79a7}.f4{fill:#b8860b}.f5{fill:#56b4e9}
@media (prefers-color-scheme:dark){text{fill:#e6edf3}.small{fill:#9da7b3;stroke:#0d1117}.page{fill:#0d1117}.grid{stroke:#30363d}
.axis,.level{stroke:#9da7b3}.s0{stroke:#4ea8de}.f0{fill:#4ea8de}.s1{stroke:#ff8c42}.f1{fill:#ff8c42}
.s2{stroke:#2fc99a}.f2{fill:#2fc99a}.s4{stroke:#e6b422}.f4{fill:#e6b422}}
</style>
)";

// Valid UTF-8 without the characters that XML 1.0 has no place for, escaped.
std::string Xml(const std::string& text) {
  const std::string valid =
      Json::parse(Json(text).dump(-1, ' ', false, Json::error_handler_t::replace));
  return absl::StrReplaceAll(Printable(valid), {{"&", "&amp;"},
                                                {"<", "&lt;"},
                                                {">", "&gt;"},
                                                {"\"", "&quot;"},
                                                {"\xef\xbf\xbe", "?"},
                                                {"\xef\xbf\xbf", "?"}});
}

std::string Shortened(const std::string& text) {
  return text.size() <= kLongestName ? text : absl::StrCat(text.substr(0, kLongestName - 2), "..");
}

struct Range {
  double low = std::numeric_limits<double>::infinity();
  double high = -std::numeric_limits<double>::infinity();

  void Include(double value) {
    if (!std::isfinite(value)) return;
    low = std::min(low, value);
    high = std::max(high, value);
  }
  bool empty() const { return low > high; }
  // Some room on both sides; a range of one value gets a width.
  void Widen(double share) {
    const double room = high > low ? (high - low) * share : std::max(std::fabs(high) * 0.1, 0.5);
    low -= room;
    high += room;
  }
};

struct Box {
  double left, top, right, bottom;
  bool Overlaps(const Box& other) const {
    return left < other.right && other.left < right && top < other.bottom && other.top < bottom;
  }
};

// "0.05", as many digits as the step between ticks needs.
std::string TickText(double value, double step) {
  if (step <= 0) return absl::StrFormat("%g", value);
  const int digits = std::clamp(static_cast<int>(std::ceil(-std::log10(step) - 1e-9)), 0, 9);
  return absl::StrFormat("%.*f", digits, value == 0 ? 0.0 : value);
}

class Drawing {
 public:
  Drawing(const Chart& chart, double top) : chart_(chart), top_(top) {
    size_t longest = 0;
    for (const Chart::Series& s : chart.series) longest = std::max(longest, s.name.size());
    for (const Chart::Level& l : chart.levels) longest = std::max(longest, l.name.size());
    const double legend =
        longest == 0 ? 24 : 56 + kLetter * static_cast<double>(std::min(longest, kLongestName));
    plot_ = {kLeft, top + kTop, kWidth - legend, top + kHeight - kBottom};
  }

  std::string Draw() {
    Text((plot_.left + plot_.right) / 2, top_ + 26, "middle", chart_.title, "title");
    SetRanges();
    if (y_.empty() || (x_.empty() && chart_.categories.empty())) {
      Text((plot_.left + plot_.right) / 2, (plot_.top + plot_.bottom) / 2, "middle",
           "no measurements", "small");
      return std::move(svg_);
    }
    Axes();
    for (const Chart::Level& level : chart_.levels) {
      if (!Drawn(level.y)) continue;
      Line(plot_.left, Y(level.y), plot_.right, Y(level.y), "level");
    }
    for (size_t i = 0; i < chart_.series.size(); ++i) Bars(i);
    for (size_t i = 0; i < chart_.series.size(); ++i) Points(i);
    Labels();
    Legend();
    return std::move(svg_);
  }

 private:
  bool Drawn(double y) const { return std::isfinite(y) && (!chart_.log_y || y > 0); }
  bool Drawn(const Chart::Point& p) const {
    if (!chart_.categories.empty() &&
        !(p.x >= 0 && p.x < static_cast<double>(chart_.categories.size()))) {
      return false;
    }
    return std::isfinite(p.x) && Drawn(p.y);
  }
  double Scaled(double y) const { return chart_.log_y ? std::log10(y) : y; }

  void SetRanges() {
    for (const Chart::Series& series : chart_.series) {
      for (const Chart::Point& p : series.points) {
        if (!Drawn(p)) continue;
        x_.Include(p.x);
        for (double y : {p.y, p.low, p.high}) {
          if (Drawn(y)) y_.Include(Scaled(y));
        }
      }
    }
    for (const Chart::Level& level : chart_.levels) {
      if (Drawn(level.y)) y_.Include(Scaled(level.y));
    }
    if (!chart_.categories.empty()) {
      x_.low = -0.5;
      x_.high = static_cast<double>(chart_.categories.size()) - 0.5;
    } else if (!x_.empty()) {
      x_.Widen(0.06);
    }
    if (!y_.empty()) y_.Widen(0.06);
  }

  double X(double x) const {
    return plot_.left + (x - x_.low) / (x_.high - x_.low) * (plot_.right - plot_.left);
  }
  double Y(double y) const {
    return plot_.bottom - (Scaled(y) - y_.low) / (y_.high - y_.low) * (plot_.bottom - plot_.top);
  }
  // Series that share a category stand beside each other.
  double X(const Chart::Point& p, size_t series) const {
    if (chart_.categories.empty()) return X(p.x);
    const double shift =
        static_cast<double>(series) - (static_cast<double>(chart_.series.size()) - 1) / 2;
    return X(p.x) + 9 * shift;
  }

  void Axes() {
    if (chart_.categories.empty()) {
      const std::vector<double> ticks = RoundTicks(x_.low, x_.high, 8);
      const double step = ticks.size() > 1 ? ticks[1] - ticks[0] : 0;
      for (double tick : ticks) XTick(X(tick), TickText(tick, step));
    } else {
      for (size_t i = 0; i < chart_.categories.size(); ++i) {
        XTick(X(static_cast<double>(i)), Shortened(chart_.categories[i]));
      }
    }
    if (chart_.log_y) {
      const auto decades = [this](std::vector<double> mantissas) {
        std::vector<double> ticks;
        for (double k = std::floor(y_.low); k <= y_.high; ++k) {
          for (double m : mantissas) {
            const double tick = m * std::pow(10, k);
            if (Scaled(tick) >= y_.low && Scaled(tick) <= y_.high) ticks.push_back(tick);
          }
        }
        return ticks;
      };
      std::vector<double> ticks = decades({1, 2, 5});
      if (ticks.size() > 8) ticks = decades({1});
      for (double tick : ticks) YTick(Y(tick), absl::StrFormat("%g", tick));
    } else {
      const std::vector<double> ticks = RoundTicks(y_.low, y_.high, 6);
      const double step = ticks.size() > 1 ? ticks[1] - ticks[0] : 0;
      for (double tick : ticks) YTick(Y(tick), TickText(tick, step));
    }
    Line(plot_.left, plot_.bottom, plot_.right, plot_.bottom, "axis");
    Line(plot_.left, plot_.top, plot_.left, plot_.bottom, "axis");
    Text((plot_.left + plot_.right) / 2, plot_.bottom + 42, "middle", chart_.x_label, "");
    const double middle = (plot_.top + plot_.bottom) / 2;
    absl::StrAppendFormat(&svg_,
                          "<text x=\"18\" y=\"%.1f\" text-anchor=\"middle\" "
                          "transform=\"rotate(-90 18 %.1f)\">%s</text>\n",
                          middle, middle, Xml(chart_.y_label));
  }
  void XTick(double x, const std::string& text) {
    Line(x, plot_.bottom, x, plot_.bottom + 5, "axis");
    Text(x, plot_.bottom + 20, "middle", text, "small");
  }
  void YTick(double y, const std::string& text) {
    Line(plot_.left, y, plot_.right, y, "grid");
    Text(plot_.left - 8, y + 4, "end", text, "small");
  }

  void Bars(size_t i) {
    const std::string colour = absl::StrCat("bar s", i % kColours);
    for (const Chart::Point& p : chart_.series[i].points) {
      if (!Drawn(p) || !Drawn(p.low) || !Drawn(p.high)) continue;
      const double x = X(p, i);
      Line(x, Y(p.low), x, Y(p.high), colour);
      Line(x - 4, Y(p.low), x + 4, Y(p.low), colour);
      Line(x - 4, Y(p.high), x + 4, Y(p.high), colour);
    }
  }

  void Points(size_t i) {
    const Chart::Series& series = chart_.series[i];
    std::string path;
    for (const Chart::Point& p : series.points) {
      if (!Drawn(p)) continue;
      absl::StrAppendFormat(&path, "%s%.1f %.1f", path.empty() ? "M" : "L", X(p, i), Y(p.y));
    }
    if (series.line && !path.empty()) {
      absl::StrAppendFormat(&svg_, "<path class=\"line s%d\" d=\"%s\"/>\n", i % kColours, path);
    }
    for (const Chart::Point& p : series.points) {
      if (Drawn(p)) Marker(X(p, i), Y(p.y), i, series.large ? 7 : 4.5);
    }
  }

  void Marker(double x, double y, size_t series, double r) {
    const int colour = static_cast<int>(series % kColours);
    switch (series % 4) {
      case 0:
        absl::StrAppendFormat(&svg_, "<circle class=\"f%d\" cx=\"%.1f\" cy=\"%.1f\" r=\"%.1f\"/>\n",
                              colour, x, y, r);
        return;
      case 1:
        absl::StrAppendFormat(
            &svg_, "<rect class=\"f%d\" x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\"/>\n",
            colour, x - 0.9 * r, y - 0.9 * r, 1.8 * r, 1.8 * r);
        return;
      case 2:
        absl::StrAppendFormat(
            &svg_, "<path class=\"f%d\" d=\"M%.1f %.1fL%.1f %.1fL%.1f %.1fZ\"/>\n", colour, x,
            y - 1.2 * r, x + 1.1 * r, y + 0.8 * r, x - 1.1 * r, y + 0.8 * r);
        return;
      default:
        absl::StrAppendFormat(
            &svg_, "<path class=\"f%d\" d=\"M%.1f %.1fL%.1f %.1fL%.1f %.1fL%.1f %.1fZ\"/>\n",
            colour, x, y - 1.3 * r, x + 1.3 * r, y, x, y + 1.3 * r, x - 1.3 * r, y);
    }
  }

  // Beside its point, in the first of four places that is free; nowhere if none is.
  void Labels() {
    std::vector<Box> taken;
    for (size_t i = 0; i < chart_.series.size(); ++i) {
      for (const Chart::Point& p : chart_.series[i].points) {
        if (!Drawn(p)) continue;
        const double x = X(p, i), y = Y(p.y);
        taken.push_back({x - 5, y - 5, x + 5, y + 5});
      }
    }
    for (size_t i = 0; i < chart_.series.size(); ++i) {
      for (const Chart::Point& p : chart_.series[i].points) {
        if (!Drawn(p) || p.label.empty()) continue;
        const std::string text = Shortened(p.label);
        const double width = kLetter * static_cast<double>(text.size());
        const double x = X(p, i), y = Y(p.y);
        for (const auto& [right, up] :
             {std::pair{true, true}, {true, false}, {false, true}, {false, false}}) {
          const double left = right ? x + 7 : x - 7 - width, base = up ? y - 6 : y + 14;
          const Box box = {left, base - 10, left + width, base + 2};
          if (box.left < plot_.left || box.right > plot_.right || box.top < plot_.top ||
              box.bottom > plot_.bottom ||
              std::any_of(taken.begin(), taken.end(),
                          [&](const Box& b) { return b.Overlaps(box); })) {
            continue;
          }
          Text(left, base, "start", text, "small");
          taken.push_back(box);
          break;
        }
      }
    }
  }

  void Legend() {
    const double x = plot_.right + 18;
    double y = plot_.top + 8;
    for (size_t i = 0; i < chart_.series.size(); ++i, y += 22) {
      if (chart_.series[i].line) Line(x, y, x + 22, y, absl::StrCat("line s", i % kColours));
      Marker(x + 11, y, i, 4.5);
      Text(x + 30, y + 4, "start", Shortened(chart_.series[i].name), "");
    }
    for (const Chart::Level& level : chart_.levels) {
      if (!Drawn(level.y)) continue;
      Line(x, y, x + 22, y, "level");
      Text(x + 30, y + 4, "start", Shortened(level.name), "");
      y += 22;
    }
  }

  void Line(double x1, double y1, double x2, double y2, const std::string& style) {
    absl::StrAppendFormat(&svg_,
                          "<line class=\"%s\" x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\"/>\n",
                          style, x1, y1, x2, y2);
  }
  void Text(double x, double y, const std::string& anchor, const std::string& text,
            const std::string& style) {
    absl::StrAppendFormat(&svg_,
                          "<text class=\"%s\" x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\">%s</text>\n",
                          style, x, y, anchor, Xml(text));
  }

  const Chart& chart_;
  const double top_;
  Box plot_;
  Range x_, y_;  // y in its scale
  std::string svg_;
};

}  // namespace

std::vector<double> RoundTicks(double low, double high, int count) {
  if (!(high > low)) return {low};
  const double rough = (high - low) / std::max(count, 1);
  const double power = std::pow(10, std::floor(std::log10(rough)));
  const double ratio = rough / power;  // 1..10; bounds are the geometric means of two steps
  const double step = power * (ratio < 1.414 ? 1 : ratio < 3.162 ? 2 : ratio < 7.071 ? 5 : 10);
  std::vector<double> ticks;
  const double first = std::ceil(low / step - 1e-9);
  for (double i = first; i * step <= high + 1e-9 * step && ticks.size() < 100; ++i) {
    ticks.push_back(i * step);
  }
  return ticks;
}

std::string RenderSvg(const std::vector<Chart>& charts) {
  const double height = kHeight * static_cast<double>(charts.size());
  std::string svg = absl::StrFormat(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %.0f %.0f\" width=\"%.0f\" "
      "height=\"%.0f\" role=\"img\">\n",
      kWidth, height, kWidth, height);
  if (!charts.empty()) absl::StrAppend(&svg, "<title>", Xml(charts[0].title), "</title>\n");
  absl::StrAppend(&svg, kStyle);
  absl::StrAppendFormat(&svg, "<rect class=\"page\" width=\"%.0f\" height=\"%.0f\"/>\n", kWidth,
                        height);
  for (size_t i = 0; i < charts.size(); ++i) {
    absl::StrAppend(&svg, Drawing(charts[i], kHeight * static_cast<double>(i)).Draw());
  }
  absl::StrAppend(&svg, "</svg>\n");
  return svg;
}

}  // namespace tern::client
