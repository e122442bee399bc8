// The version that the stand-in of TensorRT-RTX gives itself.
#pragma once

#define TRT_MAJOR_RTX 1
#define NV_TENSORRT_MAJOR 1
#define NV_TENSORRT_MINOR 7
#define NV_TENSORRT_PATCH 1
#define NV_TENSORRT_BUILD 116
