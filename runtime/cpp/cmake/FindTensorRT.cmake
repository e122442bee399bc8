# Finds headers of TensorRT and of TensorRT-RTX, whichever roots are given, and CUDA's runtime.
#
#   TENSORRT_ROOT, TENSORRT_RTX_ROOT   folders with include/NvInferRuntime.h and perhaps lib/; optional, the libraries are
#                                      opened while the program runs
#   CUDA_ROOT                          folder of the CUDA toolkit, 12 or later (default /usr/local/cuda)
#
# Gives TENSORRT_NAMES (tensorrt, tensorrt_rtx), TENSORRT_INCLUDE_DIR, TENSORRT_LIBRARY, the same of TENSORRT_RTX,
# CUDA_INCLUDE_DIR, CUDA_RUNTIME_LIBRARY, and TensorRT_FOUND. CUDA's runtime is linked, as a static library where there
# is one: such a program starts without a driver and says what is missing.
set(TENSORRT_NAMES "")
foreach(name tensorrt tensorrt_rtx)
  string(TOUPPER ${name} upper)
  if(NOT ${upper}_ROOT)
    continue()
  endif()
  list(APPEND TENSORRT_NAMES ${name})
  find_path(${upper}_INCLUDE_DIR NvInferRuntime.h HINTS "${${upper}_ROOT}" PATH_SUFFIXES include NO_DEFAULT_PATH)
  find_library(${upper}_LIBRARY NAMES nvinfer tensorrt_rtx libtensorrt_rtx.so.1 HINTS "${${upper}_ROOT}"
    PATH_SUFFIXES lib lib64 NO_DEFAULT_PATH)
  list(APPEND TENSORRT_NEEDED ${upper}_INCLUDE_DIR)
  if(NOT ${upper}_LIBRARY)
    set(${upper}_LIBRARY "")
  endif()
endforeach()

if(TENSORRT_NAMES)
  set(CUDA_ROOT "/usr/local/cuda" CACHE PATH "folder of the CUDA toolkit")
  find_path(CUDA_INCLUDE_DIR cuda_runtime_api.h HINTS "${CUDA_ROOT}" PATH_SUFFIXES include)
  find_library(CUDA_RUNTIME_LIBRARY NAMES libcudart_static.a cudart HINTS "${CUDA_ROOT}" PATH_SUFFIXES lib64 lib)
  include(FindPackageHandleStandardArgs)
  find_package_handle_standard_args(TensorRT REQUIRED_VARS ${TENSORRT_NEEDED} CUDA_INCLUDE_DIR CUDA_RUNTIME_LIBRARY
    REASON_FAILURE_MESSAGE "give folders with include/NvInferRuntime.h, and CUDA_ROOT, the folder of the CUDA toolkit")
  if(NOT TensorRT_FOUND)
    message(FATAL_ERROR "TENSORRT_ROOT or TENSORRT_RTX_ROOT is given, and not all of it is found")
  endif()
endif()
