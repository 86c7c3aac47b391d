# The helpers every CMakeLists.txt of the project uses. Sources are always listed by hand.

# Warnings for our own code; errors only in the ci preset (TERN_WERROR).
add_library(tern_warnings INTERFACE)
target_compile_options(tern_warnings INTERFACE -Wall -Wextra -Wno-unused-parameter -Wno-missing-field-initializers)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  # GCC 12 warns about std::string's own memcpy (GCC bug 105651).
  target_compile_options(tern_warnings INTERFACE -Wno-restrict)
endif()
if(TERN_WERROR)
  target_compile_options(tern_warnings INTERFACE -Werror)
endif()

# TERN_SANITIZED: the presets asan-ubsan, tsan and fuzz. Programs take up to twenty times as long, own malloc, keep what was freed
# and must be loaded before every other library, which a few tests have to know.
# TERN_TIMEOUT: the seconds after which a test counts as hanging.
if(CMAKE_CXX_FLAGS MATCHES "-fsanitize=")
  set(TERN_SANITIZED ON)
  set(TERN_TIMEOUT 3600)
else()
  set(TERN_SANITIZED OFF)
  set(TERN_TIMEOUT 900)
endif()

# tern_use_archives(<namespace>...)
# The imported targets of these namespaces link the archive that lies beside their shared library, where
# there is one.
function(tern_use_archives)
  get_property(targets DIRECTORY ${PROJECT_SOURCE_DIR} PROPERTY IMPORTED_TARGETS)
  foreach(target ${targets})
    string(REGEX REPLACE "::.*" "" namespace ${target})
    if(NOT namespace IN_LIST ARGV)
      continue()
    endif()
    get_target_property(configurations ${target} IMPORTED_CONFIGURATIONS)
    foreach(configuration ${configurations})
      get_target_property(library ${target} IMPORTED_LOCATION_${configuration})
      string(REGEX REPLACE "\\.so[.0-9]*$" ".a" archive "${library}")
      if(NOT archive STREQUAL library AND EXISTS ${archive})
        set_target_properties(${target} PROPERTIES IMPORTED_LOCATION_${configuration} ${archive})
      endif()
    endforeach()
  endforeach()
endfunction()

# tern_library(NAME <folder> SRCS ... [DEPS ...] [PRIVATE_DEPS ...])
# One library per folder: target tern_<folder>, alias tern::<folder>.
function(tern_library)
  cmake_parse_arguments(ARG "" "NAME" "SRCS;DEPS;PRIVATE_DEPS" ${ARGN})
  if(ARG_UNPARSED_ARGUMENTS OR NOT ARG_NAME)
    message(FATAL_ERROR "tern_library: bad arguments: ${ARGN}")
  endif()
  set(target tern_${ARG_NAME})
  if(ARG_SRCS)
    add_library(${target} STATIC ${ARG_SRCS})
    target_include_directories(${target} PUBLIC ${PROJECT_SOURCE_DIR})
    target_link_libraries(${target} PUBLIC ${ARG_DEPS} PRIVATE ${ARG_PRIVATE_DEPS} tern_warnings)
  else()
    add_library(${target} INTERFACE)
    target_include_directories(${target} INTERFACE ${PROJECT_SOURCE_DIR})
    target_link_libraries(${target} INTERFACE ${ARG_DEPS})
  endif()
  add_library(tern::${ARG_NAME} ALIAS ${target})
endfunction()

# tern_isa_source(<folder> <source> <ISA> "<flags>")
# Compiles one file of a library with its own instruction-set flags and defines
# TERN_HAVE_<ISA>=1 for the library; 0 on other architectures, where the file is left out.
function(tern_isa_source folder source isa flags)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    target_sources(tern_${folder} PRIVATE ${source})
    separate_arguments(flag_list UNIX_COMMAND "${flags}")
    # Clang takes minutes per file to check the unrolled arithmetic of intrinsics, which cannot overflow in C++'s sense;
    # bounds are still AddressSanitizer's.
    if(TERN_FUZZ)
      list(APPEND flag_list -fno-sanitize=undefined)
    endif()
    set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${flag_list}")
    target_compile_definitions(tern_${folder} PUBLIC TERN_HAVE_${isa}=1)
  else()
    target_compile_definitions(tern_${folder} PUBLIC TERN_HAVE_${isa}=0)
  endif()
endfunction()

# tern_proto_library(NAME <name> PROTOS a.proto ... [GRPC] [DEPS ...])
# Paths are relative to proto/. Own command instead of protobuf_generate(): its output
# folder differs between CMake 3.25 and 3.31.
function(tern_proto_library)
  cmake_parse_arguments(ARG "GRPC" "NAME" "PROTOS;DEPS" ${ARGN})
  if(ARG_UNPARSED_ARGUMENTS OR NOT ARG_NAME)
    message(FATAL_ERROR "tern_proto_library: bad arguments: ${ARGN}")
  endif()
  set(out ${PROJECT_BINARY_DIR}/gen)
  file(MAKE_DIRECTORY ${out})
  set(sources)
  foreach(proto ${ARG_PROTOS})
    string(REGEX REPLACE "\\.proto$" "" base ${proto})
    set(outputs ${out}/${base}.pb.cc ${out}/${base}.pb.h)
    set(args --cpp_out=${out})
    if(ARG_GRPC)
      list(APPEND outputs ${out}/${base}.grpc.pb.cc ${out}/${base}.grpc.pb.h)
      list(APPEND args --grpc_out=${out} --plugin=protoc-gen-grpc=$<TARGET_FILE:gRPC::grpc_cpp_plugin>)
    endif()
    add_custom_command(
      OUTPUT ${outputs}
      COMMAND protobuf::protoc -I ${PROJECT_SOURCE_DIR}/proto ${args} ${PROJECT_SOURCE_DIR}/proto/${proto}
      DEPENDS ${PROJECT_SOURCE_DIR}/proto/${proto}
      COMMENT "protoc ${proto}" VERBATIM)
    list(APPEND sources ${outputs})
  endforeach()
  add_library(tern_${ARG_NAME} STATIC ${sources})
  target_include_directories(tern_${ARG_NAME} SYSTEM PUBLIC ${out})
  target_link_libraries(tern_${ARG_NAME} PUBLIC protobuf::libprotobuf ${ARG_DEPS})
  if(ARG_GRPC)
    target_link_libraries(tern_${ARG_NAME} PUBLIC gRPC::grpc++)
  endif()
  add_library(tern::${ARG_NAME} ALIAS tern_${ARG_NAME})
endfunction()

# tern_test(NAME <name> SRCS ... [DEPS ...] [LABELS unit|kernel|integration|e2e ...])
function(tern_test)
  cmake_parse_arguments(ARG "" "NAME" "SRCS;DEPS;LABELS" ${ARGN})
  if(ARG_UNPARSED_ARGUMENTS OR NOT ARG_NAME)
    message(FATAL_ERROR "tern_test: bad arguments: ${ARGN}")
  endif()
  if(NOT ARG_LABELS)
    set(ARG_LABELS unit)
  endif()
  add_executable(${ARG_NAME} ${ARG_SRCS})
  target_include_directories(${ARG_NAME} PRIVATE ${PROJECT_SOURCE_DIR})
  target_link_libraries(${ARG_NAME} PRIVATE ${ARG_DEPS} GTest::gtest GTest::gmock GTest::gtest_main tern_warnings)
  # A third less time to compile. Kernel tests have their oracles in loops, and run on an emulated CPU too.
  if(NOT "kernel" IN_LIST ARG_LABELS)
    target_compile_options(${ARG_NAME} PRIVATE $<$<CONFIG:Release>:-O1>)
  endif()
  add_test(NAME ${ARG_NAME} COMMAND ${ARG_NAME} --gtest_brief=0)
  set_tests_properties(${ARG_NAME} PROPERTIES LABELS "${ARG_LABELS}" TIMEOUT ${TERN_TIMEOUT}
    ENVIRONMENT "TERN_SOURCE_DIR=${PROJECT_SOURCE_DIR};TERN_BUILD_DIR=${PROJECT_BINARY_DIR}")
endfunction()
