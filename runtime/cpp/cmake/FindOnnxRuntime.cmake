# Finds ONNX Runtime's C API by hand: its own CMake config has been broken since 1.19.
#
#   ONNXRUNTIME_ROOT          folder with include/ and perhaps lib/ (a release archive, or Debian's package unpacked)
#   ONNXRUNTIME_INCLUDE_DIR   folder that holds onnxruntime/onnxruntime_c_api.h, or onnxruntime_c_api.h itself
#   ONNXRUNTIME_LIBRARY       libonnxruntime.so*; optional, the library is opened while the program runs
#
# Gives the target OnnxRuntime::Headers, and OnnxRuntime_FOUND.
find_path(ONNXRUNTIME_INCLUDE_DIR onnxruntime_c_api.h
  HINTS "${ONNXRUNTIME_ROOT}" ENV ONNXRUNTIME_ROOT
  PATH_SUFFIXES include/onnxruntime include include/onnxruntime/core/session onnxruntime)
find_library(ONNXRUNTIME_LIBRARY NAMES onnxruntime libonnxruntime.so.1
  HINTS "${ONNXRUNTIME_ROOT}" ENV ONNXRUNTIME_ROOT PATH_SUFFIXES lib)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(OnnxRuntime REQUIRED_VARS ONNXRUNTIME_INCLUDE_DIR
  REASON_FAILURE_MESSAGE "give -DONNXRUNTIME_ROOT=FOLDER with the headers of ONNX Runtime in FOLDER/include")

if(OnnxRuntime_FOUND AND NOT TARGET OnnxRuntime::Headers)
  add_library(OnnxRuntime::Headers INTERFACE IMPORTED)
  set_target_properties(OnnxRuntime::Headers PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${ONNXRUNTIME_INCLUDE_DIR}")
endif()
