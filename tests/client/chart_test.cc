#include "client/chart.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <limits>

#include "tests/client/folder.h"

namespace tern::client {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::Not;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Parsed by an XML parser that is not ours, Python's.
bool IsXml(const std::string& text) {
  const Folder folder;
  const std::string path = folder.Write("chart.svg", text);
  return std::system(("python3 -c 'import sys, xml.etree.ElementTree as tree; "
                      "assert tree.parse(sys.argv[1]).getroot().tag.endswith(\"svg\")' '" +
                      path + "'")
                         .c_str()) == 0;
}

size_t Count(const std::string& text, const std::string& part) {
  size_t count = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++count;
  return count;
}

Chart Example() {
  Chart chart;
  chart.title = "accuracy";
  chart.x_label = "N";
  chart.y_label = "points";
  chart.categories = {"4", "64", "all"};
  chart.series = {{.name = "ternary",
                   .points = {{.x = 0, .y = 1.5, .low = 1, .high = 2, .label = "first"},
                              {.x = 1, .y = 2.5, .low = 2, .high = 3},
                              {.x = 2, .y = 3}}},
                  {.name = "int4", .points = {{.x = 0, .y = 0.5}}}};
  chart.levels = {{"float", 0}};
  return chart;
}

TEST(RoundTicksTest, AreRoundNumbersInsideTheRange) {
  EXPECT_THAT(RoundTicks(0, 10, 5), ElementsAre(0, 2, 4, 6, 8, 10));
  EXPECT_THAT(RoundTicks(-0.3, 0.9, 6),
              ElementsAre(testing::DoubleNear(-0.2, 1e-12), 0, testing::DoubleNear(0.2, 1e-12),
                          testing::DoubleNear(0.4, 1e-12), testing::DoubleNear(0.6, 1e-12),
                          testing::DoubleNear(0.8, 1e-12)));
  EXPECT_THAT(RoundTicks(9876, 12345, 5), ElementsAre(10000, 10500, 11000, 11500, 12000));
  EXPECT_THAT(RoundTicks(3, 3, 5), ElementsAre(3));
  for (double scale : {1e-12, 1e-3, 1.0, 1e9}) {
    const auto ticks = RoundTicks(1.1 * scale, 7.3 * scale, 6);
    EXPECT_GE(ticks.size(), 4u);
    EXPECT_LE(ticks.size(), 9u);
  }
  EXPECT_LE(RoundTicks(-1e308, 1e308, 5).size(), 100u);
}

TEST(RenderSvgTest, DrawsPointsBarsLinesAndNames) {
  const std::string svg = RenderSvg({Example()});
  EXPECT_TRUE(IsXml(svg)) << svg;
  EXPECT_EQ(Count(svg, "<circle"), 3u + 1);           // three points and the legend's
  EXPECT_EQ(Count(svg, "class=\"bar s0\""), 2u * 3);  // two error bars of three strokes
  EXPECT_EQ(Count(svg, "<path class=\"line"), 2u);
  EXPECT_EQ(Count(svg, "class=\"level\""), 1u + 1);
  for (const char* text : {">accuracy<", ">N<", ">points<", ">4<", ">64<", ">all<", ">ternary<",
                           ">int4<", ">float<", ">first<"}) {
    EXPECT_THAT(svg, HasSubstr(text));
  }
  EXPECT_THAT(svg, HasSubstr("prefers-color-scheme:dark"));
}

// The places come from the definition: a range widened by 6 % on both sides, from the bottom up.
TEST(RenderSvgTest, HigherValuesStandHigher) {
  Chart chart;
  chart.series = {{.name = "a", .points = {{.x = 0, .y = 0}, {.x = 10, .y = 100}}, .line = false}};
  const std::string svg = RenderSvg({chart});
  const auto number = [&](const std::string& key, size_t from) {
    return std::stod(svg.substr(svg.find(key, from) + key.size()));
  };
  const size_t first = svg.find("<circle"), second = svg.find("<circle", first + 1);
  EXPECT_LT(number("cx=\"", first), number("cx=\"", second));
  EXPECT_GT(number("cy=\"", first), number("cy=\"", second));
}

TEST(RenderSvgTest, AnyTextStaysXml) {
  Chart chart = Example();
  chart.title = "a<b & \"c\" > d' \x1b[2J \x01 \x7f caf\xe9 \xef\xbf\xbf \xc3\xa9 ]]>";
  chart.series[0].name = "<script>alert(1)</script>";
  chart.series[0].points[0].label = "</text>&amp;";
  chart.categories[0] = std::string("nul\0byte", 8);
  chart.levels[0].name = std::string(300, '&');
  chart.x_label = "\xc3";
  const std::string svg = RenderSvg({chart});
  EXPECT_TRUE(IsXml(svg)) << svg;
  EXPECT_THAT(svg, Not(HasSubstr("<script")));
  EXPECT_THAT(svg, HasSubstr("a&lt;b &amp; &quot;c&quot; &gt; d"));
  EXPECT_THAT(svg, HasSubstr("\xc3\xa9"));
}

TEST(RenderSvgTest, WhatIsNoNumberIsLeftOut) {
  Chart chart = Example();
  chart.series[0].points = {{.x = 0, .y = std::nan("")},
                            {.x = kInfinity, .y = 1},
                            {.x = 7, .y = 1},  // no such category
                            {.x = 1, .y = 2, .low = -kInfinity, .high = 3}};
  chart.levels[0].y = kInfinity;
  const std::string svg = RenderSvg({chart});
  EXPECT_TRUE(IsXml(svg));
  EXPECT_EQ(Count(svg, "<circle"), 1u + 1);
  EXPECT_EQ(Count(svg, "class=\"bar"), 0u);
  EXPECT_THAT(svg, Not(HasSubstr("nan")));
  EXPECT_THAT(svg, Not(HasSubstr("inf\"")));
}

TEST(RenderSvgTest, NothingToDrawIsSaid) {
  Chart chart = Example();
  chart.series.clear();
  chart.levels.clear();
  const std::string svg = RenderSvg({chart, Chart()});
  EXPECT_TRUE(IsXml(svg));
  EXPECT_EQ(Count(svg, "no measurements"), 2u);
  EXPECT_TRUE(IsXml(RenderSvg({})));
}

TEST(RenderSvgTest, ALogarithmicAxisSkipsWhatIsNotPositive) {
  Chart chart;
  chart.log_y = true;
  chart.series = {
      {.name = "loss",
       .points = {{.x = 1, .y = 0.001}, {.x = 2, .y = 0}, {.x = 3, .y = -1}, {.x = 4, .y = 1}}}};
  const std::string svg = RenderSvg({chart});
  EXPECT_TRUE(IsXml(svg));
  EXPECT_EQ(Count(svg, "<circle"), 2u + 1);
  for (const char* tick : {">0.001<", ">0.01<", ">0.1<", ">1<"}) EXPECT_THAT(svg, HasSubstr(tick));
}

}  // namespace
}  // namespace tern::client
