// PNG by libpng without its transformations: what becomes of samples and transparency is done here, as Pillow and the
// Python runtime do it.
#include <png.h>

#include <cstring>

#include "core/error.hpp"
#include "picture/decode.hpp"

namespace vlmtrim {
namespace {

struct Source {
  std::string_view data;
  size_t at = 0;
};

void give(png_structp png, png_bytep target, size_t size) {
  auto* source = static_cast<Source*>(png_get_io_ptr(png));
  if (size > source->data.size() - source->at) png_error(png, "truncated");
  std::memcpy(target, source->data.data() + source->at, size);
  source->at += size;
}

void leave(png_structp png, png_const_charp /*message*/) { png_longjmp(png, 1); }
void say_nothing(png_structp /*png*/, png_const_charp /*message*/) {}

// What a decoding that may jump out leaves behind.
struct Decoded {
  png_uint_32 width = 0, height = 0;
  int bits = 0, kind = 0, channels = 0;
  bool too_large = false;
  size_t row = 0;               // bytes
  std::vector<uint8_t> values;  // samples of a byte, or two from the high one on
  std::vector<png_bytep> rows;
  std::string exif, xmp;
  std::vector<uint8_t> palette, alphas;  // of colours: 3 bytes, 1 byte each
  bool has_key = false;                  // a colour is transparent
  int key[3] = {0, 0, 0};
};

void keep_extras(png_structp png, png_infop info, Decoded& found) {
  png_bytep exif = nullptr;
  png_uint_32 size = 0;
  if (png_get_eXIf_1(png, info, &size, &exif) != 0 && exif != nullptr) {
    found.exif.assign(reinterpret_cast<const char*>(exif), size);
  }
  png_textp texts = nullptr;
  const int count = png_get_text(png, info, &texts, nullptr);
  for (int i = 0; i < count; ++i) {
    if (texts[i].text == nullptr || std::strcmp(texts[i].key, "XML:com.adobe.xmp") != 0) continue;
    found.xmp.assign(texts[i].text, texts[i].itxt_length > 0 ? texts[i].itxt_length : texts[i].text_length);
  }
  png_colorp colours = nullptr;
  int number = 0;
  if (png_get_PLTE(png, info, &colours, &number) != 0) {
    for (int i = 0; i < number; ++i) {
      found.palette.insert(found.palette.end(), {colours[i].red, colours[i].green, colours[i].blue});
    }
  }
  png_bytep alphas = nullptr;
  png_color_16p key = nullptr;
  if (png_get_tRNS(png, info, &alphas, &number, &key) == 0) return;
  if (found.kind == PNG_COLOR_TYPE_PALETTE && alphas != nullptr) found.alphas.assign(alphas, alphas + number);
  if (found.kind == PNG_COLOR_TYPE_PALETTE || key == nullptr) return;
  found.has_key = true;
  const bool grey = found.kind == PNG_COLOR_TYPE_GRAY;
  found.key[0] = grey ? key->gray : key->red;
  found.key[1] = grey ? key->gray : key->green;
  found.key[2] = grey ? key->gray : key->blue;
}

// False where the file is damaged. Nothing here needs a destructor, as libpng jumps out of it.
bool decode(png_structp png, png_infop info, Source& source, Decoded& found) {
  if (setjmp(png_jmpbuf(png)) != 0) return false;
  png_set_user_limits(png, 0x7FFFFFFF, 0x7FFFFFFF);
  png_set_read_fn(png, &source, give);
  png_read_info(png, info);
  int interlaced = 0;
  png_get_IHDR(png, info, &found.width, &found.height, &found.bits, &found.kind, &interlaced, nullptr, nullptr);
  found.too_large = static_cast<uint64_t>(found.width) * found.height > static_cast<uint64_t>(kMostPixels);
  if (found.too_large) return true;
  if (found.bits < 8) png_set_packing(png);
  png_set_interlace_handling(png);
  png_read_update_info(png, info);
  found.channels = png_get_channels(png, info);
  found.row = png_get_rowbytes(png, info);
  found.values.resize(found.row * found.height);
  found.rows.resize(found.height);
  for (png_uint_32 y = 0; y < found.height; ++y) found.rows[y] = found.values.data() + found.row * y;
  png_read_image(png, found.rows.data());
  png_read_end(png, info);
  keep_extras(png, info, found);
  return true;
}

struct Pixel {
  int colour[3];
  int alpha;
};

class Samples {
 public:
  explicit Samples(const Decoded& found) : found_(found), wide_(found.bits == 16) {
    const bool grey = found.kind == PNG_COLOR_TYPE_GRAY;
    stretch_ = grey && found.bits < 8 ? 255 / ((1 << found.bits) - 1) : 1;
    // 16-bit grey is scaled to 8 bits, which loses its transparent colour; of other samples the high byte counts.
    rounds_ = grey && wide_;
    transparent_ = found.kind == PNG_COLOR_TYPE_GRAY_ALPHA || found.kind == PNG_COLOR_TYPE_RGB_ALPHA ||
                   !found.alphas.empty() || (found.has_key && !rounds_);
    for (int c = 0; c < 3; ++c) key_[c] = grey && found.bits == 1 && found.key[c] != 0 ? 255 : found.key[c];
  }

  bool transparent() const { return transparent_; }

  Pixel at(png_uint_32 x, png_uint_32 y) const {
    const uint8_t* sample =
        found_.values.data() + found_.row * y + static_cast<size_t>(x) * found_.channels * (wide_ ? 2 : 1);
    if (found_.kind == PNG_COLOR_TYPE_PALETTE) return of_palette(sample[0]);
    const bool grey = (found_.kind & PNG_COLOR_MASK_COLOR) == 0;
    Pixel pixel{{value(sample, 0), value(sample, grey ? 0 : 1), value(sample, grey ? 0 : 2)}, 255};
    if ((found_.kind & PNG_COLOR_MASK_ALPHA) != 0) pixel.alpha = value(sample, grey ? 1 : 3);
    if (found_.has_key && !rounds_ && pixel.colour[0] == key_[0] && pixel.colour[1] == key_[1] &&
        pixel.colour[2] == key_[2]) {
      pixel.alpha = 0;
    }
    return pixel;
  }

 private:
  int value(const uint8_t* sample, int channel) const {
    if (!wide_) return sample[channel] * stretch_;
    const uint8_t* pair = sample + 2 * static_cast<ptrdiff_t>(channel);
    return rounds_ ? ((pair[0] << 8 | pair[1]) + 128) / 257 : pair[0];
  }

  Pixel of_palette(size_t index) const {
    Pixel pixel{{0, 0, 0}, index < found_.alphas.size() ? found_.alphas[index] : 255};
    for (size_t c = 0; c < 3 && 3 * index + c < found_.palette.size(); ++c) {
      pixel.colour[c] = found_.palette[3 * index + c];
    }
    return pixel;
  }

  const Decoded& found_;
  bool wide_, rounds_ = false, transparent_ = false;
  int stretch_ = 1;
  int key_[3] = {0, 0, 0};
};

}  // namespace

Picture decode_png(std::string_view data, const std::string& name) {
  png_structp png = png_create_read_struct(PNG_LIBPNG_VER_STRING, nullptr, leave, say_nothing);
  png_infop info = png != nullptr ? png_create_info_struct(png) : nullptr;
  Source source{data};
  Decoded found;
  const bool whole = info != nullptr && decode(png, info, source, found);
  png_destroy_read_struct(&png, &info, nullptr);
  if (!whole) refuse_damaged(name);
  check_size(found.width, found.height, name);
  const Samples samples(found);
  Picture picture(static_cast<int>(found.width), static_cast<int>(found.height));
  uint8_t* made = picture.rgb.data();
  for (png_uint_32 y = 0; y < found.height; ++y) {
    for (png_uint_32 x = 0; x < found.width; ++x) {
      const Pixel pixel = samples.at(x, y);
      for (const int colour : pixel.colour) {
        *made++ = static_cast<uint8_t>(samples.transparent() ? on_white(colour, pixel.alpha) : colour);
      }
    }
  }
  auto orientation = exif_orientation(found.exif);
  if (!orientation) orientation = xmp_orientation(found.xmp);
  return turned(std::move(picture), orientation.value_or(1));
}

}  // namespace vlmtrim
