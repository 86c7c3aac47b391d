#include "models/embedded.h"

// The assembler reads the files: no generated array of a million numbers to compile.
asm(R"(
    .section .rodata
    .balign 64
tern_demo_onnx_begin:
    .incbin ")" TERN_DEMO_ONNX R"("
tern_demo_onnx_end:
tern_demo_labels_begin:
    .incbin ")" TERN_DEMO_LABELS R"("
tern_demo_labels_end:
    .byte 0
    .text
)");

extern "C" {
extern const char tern_demo_onnx_begin[];
extern const char tern_demo_onnx_end[];
extern const char tern_demo_labels_begin[];
extern const char tern_demo_labels_end[];
}

namespace tern::models {

absl::string_view DemoOnnx() {
  return absl::string_view(tern_demo_onnx_begin, tern_demo_onnx_end - tern_demo_onnx_begin);
}

absl::string_view DemoLabels() {
  return absl::string_view(tern_demo_labels_begin, tern_demo_labels_end - tern_demo_labels_begin);
}

}  // namespace tern::models
