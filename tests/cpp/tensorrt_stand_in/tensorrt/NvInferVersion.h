// The version that the stand-in of TensorRT gives itself.
#pragma once

#define NV_TENSORRT_MAJOR 10
#define NV_TENSORRT_MINOR 15
#define NV_TENSORRT_PATCH 1
#define NV_TENSORRT_BUILD 29
