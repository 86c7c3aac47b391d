#include "server/status_page/files.h"

// The assembler reads the files, as in models/embedded.cc.
#define TERN_EMBED(symbol, name)                                                             \
  asm("    .section .rodata\n"                                                               \
      "tern_status_" #symbol                                                                 \
      "_begin:\n"                                                                            \
      "    .incbin \"" TERN_STATUS_FILES name                                                \
      "\"\n"                                                                                 \
      "tern_status_" #symbol                                                                 \
      "_end:\n"                                                                              \
      "    .byte 0\n"                                                                        \
      "    .text\n");                                                                        \
  extern "C" {                                                                               \
  extern const char tern_status_##symbol##_begin[];                                          \
  extern const char tern_status_##symbol##_end[];                                            \
  }                                                                                          \
  static absl::string_view symbol() {                                                        \
    return {tern_status_##symbol##_begin,                                                    \
            static_cast<size_t>(tern_status_##symbol##_end - tern_status_##symbol##_begin)}; \
  }

TERN_EMBED(index_html, "index.html")
TERN_EMBED(style_css, "style.css")
TERN_EMBED(icon_svg, "icon.svg")
TERN_EMBED(app_js, "app.js")
TERN_EMBED(chart_js, "chart.js")
TERN_EMBED(classify_js, "classify.js")
TERN_EMBED(dom_js, "dom.js")
TERN_EMBED(metrics_js, "metrics.js")
TERN_EMBED(models_js, "models.js")

namespace tern::status_page {

absl::Span<const File> Files() {
  static constexpr char kScript[] = "text/javascript; charset=utf-8";
  static const File kFiles[] = {
      {"", "text/html; charset=utf-8", index_html()},
      {"style.css", "text/css; charset=utf-8", style_css()},
      {"icon.svg", "image/svg+xml", icon_svg()},
      {"app.js", kScript, app_js()},
      {"chart.js", kScript, chart_js()},
      {"classify.js", kScript, classify_js()},
      {"dom.js", kScript, dom_js()},
      {"metrics.js", kScript, metrics_js()},
      {"models.js", kScript, models_js()},
  };
  return kFiles;
}

}  // namespace tern::status_page
