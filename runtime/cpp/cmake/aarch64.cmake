# Cross-compiles for 64-bit ARM with Debian's tools: g++-aarch64-linux-gnu, and libjpeg-dev:arm64, libpng-dev:arm64 of
# the foreign architecture (dpkg --add-architecture arm64), or an unpacked copy of them in CMAKE_SYSROOT; libwebp-dev:arm64
# for WebP.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_LIBRARY_ARCHITECTURE aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
