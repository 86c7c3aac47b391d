// Which instruction sets the kernels may use.
#ifndef TERN_SERVER_KERNELS_DISPATCH_H_
#define TERN_SERVER_KERNELS_DISPATCH_H_

#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace tern::kernels {

// In rising order. kAvx2 includes FMA; kAvx512Vnni includes F, BW, VL and VNNI. The spelling of
// IsaName is also the metric label, the flag value and the test suffix.
enum class Isa : int { kScalar = 0, kAvx2 = 1, kAvx512Vnni = 2 };

const char* IsaName(Isa isa);  // "scalar", "avx2", "avx512vnni"

// The best instruction set of this CPU (and operating system) that this build knows.
Isa DetectIsa();

// DetectIsa() lowered to `cap` ("scalar", "avx2", "avx512vnni"; "" or "native" = no cap). A cap can
// only lower the choice, so no setting can crash the server. INVALID_ARGUMENT naming the known
// values if `cap` is none of them.
absl::StatusOr<Isa> SelectIsa(absl::string_view cap);

// Every instruction set that this build has and this CPU runs, scalar first (for tests).
std::vector<Isa> RunnableIsas();

}  // namespace tern::kernels

#endif  // TERN_SERVER_KERNELS_DISPATCH_H_
