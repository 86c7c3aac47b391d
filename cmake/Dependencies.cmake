# Everything comes from Debian packages (bookworm; trixie's versions work too).
find_package(Threads REQUIRED)
find_package(OpenMP REQUIRED COMPONENTS CXX)
find_package(PkgConfig REQUIRED)
if(TERN_STATIC_DEPS)
  set(Protobuf_USE_STATIC_LIBS ON)
endif()
find_package(Protobuf REQUIRED)  # module mode: Debian ships no protobuf-config.cmake
find_package(gRPC CONFIG REQUIRED)
find_package(absl CONFIG REQUIRED)
if(TERN_STATIC_DEPS)
  tern_use_archives(gRPC absl)
endif()
find_package(dnnl CONFIG REQUIRED)  # needs ocl-icd-opencl-dev on bookworm: its config asks for OpenCL
find_package(ONNX CONFIG REQUIRED)
find_package(Boost REQUIRED)  # headers: Asio and Beast
find_package(prometheus-cpp CONFIG REQUIRED)
find_package(spdlog CONFIG REQUIRED)
find_package(nlohmann_json CONFIG REQUIRED)
find_package(CLI11 CONFIG REQUIRED)
find_package(Eigen3 CONFIG REQUIRED)
find_package(OpenSSL REQUIRED)
pkg_check_modules(turbojpeg REQUIRED IMPORTED_TARGET libturbojpeg)
pkg_check_modules(png REQUIRED IMPORTED_TARGET libpng)
pkg_check_modules(webp REQUIRED IMPORTED_TARGET libwebp libwebpdemux)
pkg_check_modules(exif REQUIRED IMPORTED_TARGET libexif)
pkg_check_modules(isal REQUIRED IMPORTED_TARGET libisal)

# The package's own library of this message is a shared one over the shared protobuf, of which a program
# can only have one: with archives the message is compiled here, from the package's definition.
if(TERN_STATIC_DEPS)
  find_path(ONNX_PROTO_DIR onnx/onnx.proto REQUIRED)
  set(onnx_out ${PROJECT_BINARY_DIR}/gen)
  file(MAKE_DIRECTORY ${onnx_out})
  add_custom_command(
    OUTPUT ${onnx_out}/onnx/onnx.pb.cc ${onnx_out}/onnx/onnx.pb.h
    COMMAND protobuf::protoc -I ${ONNX_PROTO_DIR} --cpp_out=${onnx_out} ${ONNX_PROTO_DIR}/onnx/onnx.proto
    DEPENDS ${ONNX_PROTO_DIR}/onnx/onnx.proto COMMENT "protoc onnx.proto" VERBATIM)
  add_library(tern_onnx_proto STATIC ${onnx_out}/onnx/onnx.pb.cc ${onnx_out}/onnx/onnx.pb.h)
  target_include_directories(tern_onnx_proto SYSTEM BEFORE PUBLIC ${onnx_out})
  target_link_libraries(tern_onnx_proto PUBLIC protobuf::libprotobuf)
elseif(TARGET ONNX::onnx_proto)  # trixie's name; bookworm's is onnx_proto
  add_library(tern_onnx_proto INTERFACE)
  target_link_libraries(tern_onnx_proto INTERFACE ONNX::onnx_proto)
else()
  add_library(tern_onnx_proto INTERFACE)
  target_link_libraries(tern_onnx_proto INTERFACE onnx_proto)
endif()

# OpenCV core and imgproc only: OpenCVConfig.cmake comes with libopencv-dev, which pulls
# in 250 packages, so the two libraries are looked up directly. SYSTEM silences the
# -Wdeprecated-enum-enum-conversion of its headers under C++20.
find_path(OPENCV_INCLUDE_DIR opencv2/imgproc.hpp PATH_SUFFIXES opencv4 REQUIRED)
add_library(tern_opencv INTERFACE)
target_include_directories(tern_opencv SYSTEM INTERFACE ${OPENCV_INCLUDE_DIR})
if(TERN_STATIC_DEPS)
  # What cv::resize reaches needs none of LAPACK, which the shared library brings along.
  find_library(OPENCV_CORE_ARCHIVE libopencv_core.a REQUIRED)
  find_library(OPENCV_IMGPROC_ARCHIVE libopencv_imgproc.a REQUIRED)
  find_library(TBB_LIBRARY tbb REQUIRED)
  target_link_libraries(tern_opencv INTERFACE ${OPENCV_IMGPROC_ARCHIVE} ${OPENCV_CORE_ARCHIVE} ${TBB_LIBRARY}
    OpenCL::OpenCL ZLIB::ZLIB dl)
else()
  find_library(OPENCV_CORE opencv_core REQUIRED)
  find_library(OPENCV_IMGPROC opencv_imgproc REQUIRED)
  target_link_libraries(tern_opencv INTERFACE ${OPENCV_IMGPROC} ${OPENCV_CORE})
endif()

if(TERN_FINETUNE)
  find_package(Torch CONFIG REQUIRED)
endif()

if(TERN_BUILD_TESTS)
  find_package(GTest REQUIRED)
endif()
