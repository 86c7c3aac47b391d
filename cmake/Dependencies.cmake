# Everything comes from Debian packages (bookworm; trixie's versions work too).
find_package(Threads REQUIRED)
find_package(OpenMP REQUIRED COMPONENTS CXX)
find_package(PkgConfig REQUIRED)
find_package(Protobuf REQUIRED)  # module mode: Debian ships no protobuf-config.cmake
find_package(gRPC CONFIG REQUIRED)
find_package(absl CONFIG REQUIRED)
find_package(dnnl CONFIG REQUIRED)  # needs ocl-icd-opencl-dev on bookworm: its config asks for OpenCL
find_package(ONNX CONFIG REQUIRED)
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

# trixie's ONNX package exports ONNX::onnx_proto, bookworm's onnx_proto.
if(TARGET ONNX::onnx_proto)
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
find_library(OPENCV_CORE opencv_core REQUIRED)
find_library(OPENCV_IMGPROC opencv_imgproc REQUIRED)
add_library(tern_opencv INTERFACE)
target_include_directories(tern_opencv SYSTEM INTERFACE ${OPENCV_INCLUDE_DIR})
target_link_libraries(tern_opencv INTERFACE ${OPENCV_IMGPROC} ${OPENCV_CORE})

if(TERN_FINETUNE)
  find_package(Torch CONFIG REQUIRED)
endif()

if(TERN_BUILD_TESTS)
  find_package(GTest REQUIRED)
endif()
