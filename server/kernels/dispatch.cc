#include "server/kernels/dispatch.h"

#include <algorithm>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace tern::kernels {
namespace {

Isa Detect() {
#if TERN_HAVE_AVX2
  // __builtin_cpu_supports also asks the operating system (XGETBV): a CPU with AVX under a
  // kernel that does not save the upper register halves is reported as without.
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::kScalar;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512vnni")) {
    return Isa::kAvx2;
  }
  return Isa::kAvx512Vnni;
#else
  return Isa::kScalar;
#endif
}

}  // namespace

const char* IsaName(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return "scalar";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512Vnni:
      return "avx512vnni";
  }
  return "?";
}

Isa DetectIsa() {
  static const Isa isa = Detect();
  return isa;
}

absl::StatusOr<Isa> SelectIsa(absl::string_view cap) {
  if (cap.empty() || cap == "native") return DetectIsa();
  for (Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512Vnni}) {
    if (cap == IsaName(isa)) return std::min(isa, DetectIsa());
  }
  return absl::InvalidArgumentError(absl::StrCat("unknown instruction set \"", cap,
                                                 "\"; known: native, scalar, avx2, avx512vnni"));
}

std::vector<Isa> RunnableIsas() {
  std::vector<Isa> isas;
  for (Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512Vnni}) {
    if (isa <= DetectIsa()) isas.push_back(isa);
  }
  return isas;
}

}  // namespace tern::kernels
