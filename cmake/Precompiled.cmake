# What most files include, parsed once instead of three hundred times: a fifth of the time of a build.
#
# A precompiled header serves files that are compiled with its own macros (-pthread and -fopenmp are some) and its own optimisation;
# GCC 12 dies if another level meets it. Files with options of their own go without (SKIP_PRECOMPILE_HEADERS).
option(TERN_PRECOMPILE "Precompile the headers of the standard library, Abseil and GoogleTest" ON)
set(TERN_TEST_OPTIMISATION $<$<CONFIG:Release>:-O1>)
add_compile_options(-pthread)

# tern_precompile(<target> <name>): the target's files begin with the precompiled headers <name>.
function(tern_precompile target name)
  if(TERN_PRECOMPILE)
    target_precompile_headers(${target} REUSE_FROM tern_${name})
  endif()
endfunction()

if(TERN_PRECOMPILE)
  set(headers <algorithm> <cmath> <cstdint> <functional> <limits> <map> <memory> <optional> <string> <utility> <vector>
    <absl/status/statusor.h> <absl/strings/str_cat.h> <absl/time/time.h> <absl/types/span.h>)
  set(names headers openmp_headers)
  if(TERN_BUILD_TESTS)
    list(APPEND names test_headers)
  endif()
  foreach(name ${names})
    file(CONFIGURE OUTPUT ${PROJECT_BINARY_DIR}/gen/${name}.cc CONTENT "")
    add_library(tern_${name} OBJECT ${PROJECT_BINARY_DIR}/gen/${name}.cc)
    target_precompile_headers(tern_${name} PRIVATE ${headers})
    target_link_libraries(tern_${name} PRIVATE absl::statusor absl::strings absl::time absl::span tern_warnings)
  endforeach()
  target_link_libraries(tern_openmp_headers PRIVATE OpenMP::OpenMP_CXX)
  if(TERN_BUILD_TESTS)
    target_precompile_headers(tern_test_headers PRIVATE <filesystem> <fstream> <random> <gmock/gmock.h> <gtest/gtest.h>)
    target_compile_options(tern_test_headers PRIVATE ${TERN_TEST_OPTIMISATION})
    target_link_libraries(tern_test_headers PRIVATE GTest::gtest GTest::gmock)
  endif()
endif()
