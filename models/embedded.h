// The demo model (models/demo/README.md) as bytes inside the binary.
#ifndef TERN_MODELS_EMBEDDED_H_
#define TERN_MODELS_EMBEDDED_H_

#include "absl/strings/string_view.h"

namespace tern::models {

// The ONNX file. Static storage.
absl::string_view DemoOnnx();
// Ten class names, one per line. Static storage.
absl::string_view DemoLabels();

}  // namespace tern::models

#endif  // TERN_MODELS_EMBEDDED_H_
