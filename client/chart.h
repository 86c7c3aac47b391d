// Small line and scatter charts as SVG.
//
// Text is escaped and made valid XML whatever bytes it holds; values that are not finite are left
// out. The page has its own background, light or dark as the viewer prefers, so that it can be read
// in both. Colours are those of Okabe and Ito, which the colour-blind can tell apart; markers
// differ too.
#ifndef TERN_CLIENT_CHART_H_
#define TERN_CLIENT_CHART_H_

#include <limits>
#include <string>
#include <vector>

namespace tern::client {

struct Chart {
  struct Point {
    double x = 0;  // with `categories`: an index into them
    double y = 0;
    double low = std::numeric_limits<double>::quiet_NaN();  // of the error bar; NaN: none
    double high = std::numeric_limits<double>::quiet_NaN();
    std::string label;  // drawn beside the point where there is room
  };
  struct Series {
    std::string name;
    std::vector<Point> points;
    bool line = true;  // joins the points, in their order
    bool large = false;
  };
  struct Level {
    std::string name;
    double y = 0;  // a dashed line from side to side
  };

  std::string title;
  std::string x_label;
  std::string y_label;
  std::vector<std::string> categories;  // of the x axis; empty: it is a number
  bool log_y = false;                   // then points with y <= 0 are left out
  std::vector<Series> series;
  std::vector<Level> levels;
};

// The charts of `charts`, one below the other, as one SVG document.
std::string RenderSvg(const std::vector<Chart>& charts);

// Multiples of 1, 2 or 5 times a power of ten that lie in low..high (low <= high, both finite),
// about `count` of them and at least one for a range that holds one.
std::vector<double> RoundTicks(double low, double high, int count);

}  // namespace tern::client

#endif  // TERN_CLIENT_CHART_H_
