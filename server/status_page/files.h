// The files of the status page (files/) as bytes inside the binary.
#ifndef TERN_SERVER_STATUS_PAGE_FILES_H_
#define TERN_SERVER_STATUS_PAGE_FILES_H_

#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace tern::status_page {

struct File {
  absl::string_view name;  // "app.js"; of the page itself ""
  const char* content_type;
  absl::string_view content;
};

// Static storage.
absl::Span<const File> Files();

}  // namespace tern::status_page

#endif  // TERN_SERVER_STATUS_PAGE_FILES_H_
