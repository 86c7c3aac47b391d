#include "server/rpc/trace_context.h"

#include <algorithm>

namespace tern::rpc {
namespace {

// version "-" trace-id "-" parent-id "-" flags
constexpr size_t kTraceIdAt = 3, kTraceIdSize = 32;
constexpr size_t kParentIdAt = 36, kParentIdSize = 16;
constexpr size_t kFlagsAt = 53, kSize = 55;
constexpr size_t kMaxSize = 512;  // of later versions, which may append fields

bool IsHex(absl::string_view text) {
  return std::all_of(text.begin(), text.end(),
                     [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); });
}

bool IsZero(absl::string_view text) {
  return text.find_first_not_of('0') == absl::string_view::npos;
}

}  // namespace

absl::string_view TraceIdOf(absl::string_view traceparent) {
  if (traceparent.size() < kSize || traceparent.size() > kMaxSize) return "";
  const absl::string_view version = traceparent.substr(0, 2);
  const absl::string_view trace_id = traceparent.substr(kTraceIdAt, kTraceIdSize);
  const absl::string_view parent_id = traceparent.substr(kParentIdAt, kParentIdSize);
  for (const size_t dash : {kTraceIdAt - 1, kParentIdAt - 1, kFlagsAt - 1}) {
    if (traceparent[dash] != '-') return "";
  }
  if (!IsHex(version) || version == "ff" || !IsHex(trace_id) || IsZero(trace_id) ||
      !IsHex(parent_id) || IsZero(parent_id) || !IsHex(traceparent.substr(kFlagsAt, 2))) {
    return "";
  }
  if (traceparent.size() > kSize && (version == "00" || traceparent[kSize] != '-')) return "";
  return trace_id;
}

}  // namespace tern::rpc
