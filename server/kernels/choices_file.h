// The kernel choices of conv_kernel.h in a file, so that a server measures a layer once and not
// at every start.
#ifndef TERN_SERVER_KERNELS_CHOICES_FILE_H_
#define TERN_SERVER_KERNELS_CHOICES_FILE_H_

#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace tern::kernels {

// Adds the choices in `path` if the file is whole, and was written on this CPU model by this
// `version` of the program. NOT_FOUND if there is none; FAILED_PRECONDITION if another CPU or
// version wrote it; DATA_LOSS if it is damaged; ReadFile's errors. Nothing is added on an error.
absl::Status ReadChoices(const std::string& path, absl::string_view version);

// Writes what is known now, unless the file holds just that. WriteFileAtomically's errors.
absl::Status WriteChoices(const std::string& path, absl::string_view version);

}  // namespace tern::kernels

#endif  // TERN_SERVER_KERNELS_CHOICES_FILE_H_
