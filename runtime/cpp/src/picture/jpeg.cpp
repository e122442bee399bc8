// JPEG by libjpeg-turbo, with the settings that Pillow has, so that pixels are equal.
#include <csetjmp>
#include <cstddef>
#include <cstdio>
// jpeglib.h needs the two above.
#include <jpeglib.h>

#include "core/error.hpp"
#include "picture/decode.hpp"

namespace vlmtrim {
namespace {

// A progressive file is decoded once for every scan: without a limit 1 MB keeps a processor busy for minutes.
constexpr int kMostScans = 64;
constexpr std::string_view kExif("Exif\0\0", 6), kXmp("http://ns.adobe.com/xap/1.0/\0", 29);

void check_scans(std::string_view data, const std::string& name) {
  int scans = 0;
  for (size_t at = 0; (at = data.find('\xff', at)) != std::string_view::npos;) {
    while (at < data.size() && data[at] == '\xff') ++at;
    if (at >= data.size()) return;
    const auto marker = static_cast<unsigned char>(data[at]);
    if (marker <= 1 || (marker >= 0xD0 && marker <= 0xD8)) continue;  // of no length, or in pixels
    if (marker == 0xD9) return;
    if (marker == 0xDA && ++scans > kMostScans) {
      throw Refusal(said(name, " is a JPEG of more than ", kMostScans, " scans; save it again"));
    }
    if (at + 2 >= data.size()) return;
    at += 1 + (static_cast<size_t>(static_cast<unsigned char>(data[at + 1])) << 8 |
               static_cast<unsigned char>(data[at + 2]));
  }
}

struct Errors {
  jpeg_error_mgr base;
  std::jmp_buf back;
};

void leave(j_common_ptr info) { std::longjmp(reinterpret_cast<Errors*>(info->err)->back, 1); }
void say_nothing(j_common_ptr /*info*/) {}
// All of the file is in memory: where more is wanted, it is truncated.
boolean no_more(j_decompress_ptr info) {
  leave(reinterpret_cast<j_common_ptr>(info));
  return FALSE;
}

// What a decoding that may jump out leaves behind.
struct Decoded {
  int width = 0, height = 0, channels = 0;
  bool adobe = false, too_large = false;
  std::string exif, xmp;
  std::vector<uint8_t> values;
};

void keep_markers(const jpeg_decompress_struct& info, Decoded& found) {
  for (const jpeg_marker_struct* marker = info.marker_list; marker != nullptr; marker = marker->next) {
    const std::string_view data(reinterpret_cast<const char*>(marker->data), marker->data_length);
    if (data.substr(0, kExif.size()) == kExif) found.exif += data.substr(kExif.size());
    if (data.substr(0, kXmp.size()) == kXmp) found.xmp = data.substr(kXmp.size());
  }
}

// False where the file is damaged. Nothing here needs a destructor, as libjpeg jumps out of it.
bool decode(std::string_view data, jpeg_decompress_struct& info, Errors& errors, Decoded& found) {
  info.err = jpeg_std_error(&errors.base);
  errors.base.error_exit = leave;
  errors.base.output_message = say_nothing;
  if (setjmp(errors.back) != 0) return false;
  jpeg_create_decompress(&info);
  jpeg_mem_src(&info, reinterpret_cast<const unsigned char*>(data.data()), data.size());
  info.src->fill_input_buffer = no_more;
  jpeg_save_markers(&info, JPEG_APP0 + 1, 0xFFFF);
  if (jpeg_read_header(&info, TRUE) != JPEG_HEADER_OK) return false;
  keep_markers(info, found);
  found.width = static_cast<int>(info.image_width);
  found.height = static_cast<int>(info.image_height);
  found.adobe = info.saw_Adobe_marker != FALSE;
  found.too_large = static_cast<int64_t>(found.width) * found.height > kMostPixels;
  if (found.too_large) return true;
  info.out_color_space = info.num_components == 1 ? JCS_GRAYSCALE : info.num_components == 4 ? JCS_CMYK : JCS_RGB;
  jpeg_start_decompress(&info);
  found.channels = info.output_components;
  const size_t row = static_cast<size_t>(found.width) * static_cast<size_t>(found.channels);
  found.values.resize(row * static_cast<size_t>(found.height));
  while (info.output_scanline < info.output_height) {
    JSAMPROW line = found.values.data() + row * info.output_scanline;
    jpeg_read_scanlines(&info, &line, 1);
  }
  return true;
}

// A product of shares of 255, rounded.
int share(int a, int b) {
  const int product = a * b + 128;
  return ((product >> 8) + product) >> 8;
}

Picture to_rgb(const Decoded& found) {
  Picture picture(found.width, found.height);
  if (found.channels == 3) {
    picture.rgb = found.values;
    return picture;
  }
  uint8_t* made = picture.rgb.data();
  for (size_t i = 0; i < found.values.size(); i += static_cast<size_t>(found.channels), made += 3) {
    const uint8_t* pixel = found.values.data() + i;
    const int flip = found.adobe ? 255 : 0;  // Adobe's inks are stored inverted
    for (int c = 0; c < 3; ++c) {
      if (found.channels == 1) {
        made[c] = pixel[0];
        continue;
      }
      const int light = 255 - (pixel[3] ^ flip);
      made[c] = static_cast<uint8_t>(light - share(pixel[c] ^ flip, light));
    }
  }
  return picture;
}

}  // namespace

Picture decode_jpeg(std::string_view data, const std::string& name) {
  check_scans(data, name);
  jpeg_decompress_struct info{};
  Errors errors{};
  Decoded found;
  const bool whole = decode(data, info, errors, found);
  jpeg_destroy_decompress(&info);
  if (whole) check_size(found.width, found.height, name);
  if (!whole) refuse_damaged(name);
  if (found.channels != 1 && found.channels != 3 && found.channels != 4) refuse_damaged(name);
  auto orientation = exif_orientation(found.exif);
  if (!orientation) orientation = xmp_orientation(found.xmp);
  return turned(to_rgb(found), orientation.value_or(1));
}

}  // namespace vlmtrim
