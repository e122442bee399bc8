// libFuzzer: bytes are a picture that can be resized, or a sentence.
#include "picture/picture.hpp"

#include <string_view>

#include "core/error.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const auto picture = vlmtrim::decode_picture({reinterpret_cast<const char*>(data), size}, "the picture");
    if (picture.rgb.size() < 1 << 20) vlmtrim::resized(picture, 24, 17, size % 4);
  } catch (const vlmtrim::Refusal&) {
  } catch (const vlmtrim::BundleError&) {
  }
  return 0;
}
