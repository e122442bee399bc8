#include "picture/decode.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>

#include "core/error.hpp"

namespace vlmtrim {
namespace {

constexpr unsigned kOrientation = 0x0112;
#ifdef VLMTRIM_WEBP
constexpr const char* kFormats = "a PNG, JPEG or WebP";
#else
constexpr const char* kFormats = "a PNG or JPEG";
#endif

// Numbers of a TIFF structure, in its byte order; nullopt behind its end.
class Tiff {
 public:
  explicit Tiff(std::string_view data) : data_(data), big_(data.substr(0, 2) == "MM") {}

  std::optional<uint32_t> at(size_t place, int bytes) const {
    if (place > data_.size() || data_.size() - place < static_cast<size_t>(bytes)) return std::nullopt;
    uint32_t value = 0;
    for (int i = 0; i < bytes; ++i) {
      const auto byte = static_cast<unsigned char>(data_[place + static_cast<size_t>(big_ ? i : bytes - 1 - i)]);
      value = value << 8 | byte;
    }
    return value;
  }

 private:
  std::string_view data_;
  bool big_;
};

std::string contents(const std::string& path) {
  struct stat found{};
  if (stat(path.c_str(), &found) != 0 || !S_ISREG(found.st_mode)) {
    throw Refusal(said("no picture at ", path, "; give the path of an image file"));
  }
  if (static_cast<size_t>(found.st_size) > kMostBytes) {
    throw Refusal(said(path, " has more than the ", kMostBytes >> 20, " MB that a picture may have"));
  }
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) throw Refusal(said(path, " cannot be read; give another picture"));
  std::string data(static_cast<size_t>(found.st_size), '\0');
  size_t filled = 0;
  for (ssize_t count = 0; filled < data.size(); filled += static_cast<size_t>(count)) {
    count = read(file, data.data() + filled, data.size() - filled);
    if (count <= 0) break;
  }
  close(file);
  data.resize(filled);
  return data;
}

}  // namespace

Picture load_picture(const std::string& path) { return decode_picture(contents(path), path); }

Picture decode_picture(std::string_view data, const std::string& name) {
  if (data.size() > kMostBytes) {
    throw Refusal(said(name, " has more than the ", kMostBytes >> 20, " MB that a picture may have"));
  }
  if (data.substr(0, 3) == "\xff\xd8\xff") return decode_jpeg(data, name);
  if (data.substr(0, 8) == "\x89PNG\r\n\x1a\n") return decode_png(data, name);
  if (data.substr(0, 4) == "RIFF" && data.size() >= 12 && data.substr(8, 4) == "WEBP") {
#ifdef VLMTRIM_WEBP
    return decode_webp(data, name);
#else
    throw Refusal(said(name, " is a WebP picture, and this library was built without libwebp; give ", kFormats));
#endif
  }
  throw Refusal(said(name, " is no picture that is read here; give ", kFormats));
}

Picture from_pixels(const uint8_t* pixels, int width, int height, int64_t stride, int channels) {
  check_size(width, height, "the picture");
  if (pixels == nullptr || (channels != 1 && channels != 3 && channels != 4) ||
      stride < static_cast<int64_t>(width) * channels) {
    throw Refusal(said("a picture is given as ", width, " x ", height, " pixels of ", channels, " bytes, ", stride,
                       " bytes a row; give 1, 3 or 4 bytes a pixel, and rows that are as long"));
  }
  Picture picture(width, height);
  for (int y = 0; y < height; ++y) {
    const uint8_t* pixel = pixels + stride * y;
    uint8_t* made = picture.row(y);
    for (int x = 0; x < width; ++x, pixel += channels, made += 3) {
      for (int c = 0; c < 3; ++c) made[c] = pixel[channels == 1 ? 0 : c];
    }
  }
  return picture;
}

void check_size(int64_t width, int64_t height, const std::string& name) {
  if (width < 1 || height < 1) {
    throw Refusal(said(name, " has ", width, " x ", height, " pixels; give one that has any"));
  }
  if (width > kMostPixels || height > kMostPixels || width * height > kMostPixels) {
    throw Refusal(said(name, " has ", width, " x ", height, " pixels, the limit is ", kMostPixels / 1000000,
                       " million; scale it down first"));
  }
}

std::optional<int> exif_orientation(std::string_view data) {
  if (data.substr(0, 2) != "II" && data.substr(0, 2) != "MM") return std::nullopt;
  const Tiff tiff(data);
  const auto folder = tiff.at(4, 4);
  const auto count = folder ? tiff.at(*folder, 2) : std::nullopt;
  for (uint32_t i = 0; count && i < *count; ++i) {
    const size_t entry = size_t{*folder} + 2 + 12 * size_t{i};
    const auto tag = tiff.at(entry, 2), type = tiff.at(entry + 2, 2), values = tiff.at(entry + 4, 4);
    if (!tag || !type || !values) return std::nullopt;
    if (*tag != kOrientation) continue;
    const int bytes = *type == 1 ? 1 : *type == 3 ? 2 : *type == 4 ? 4 : 0;
    const auto value = bytes != 0 && *values == 1 ? tiff.at(entry + 8, bytes) : std::nullopt;
    return value && *value >= 1 && *value <= 8 ? static_cast<int>(*value) : 1;
  }
  return std::nullopt;
}

std::optional<int> xmp_orientation(std::string_view packet) {
  constexpr std::string_view kName = "tiff:Orientation";
  for (size_t at = packet.find(kName); at != std::string_view::npos; at = packet.find(kName, at + 1)) {
    std::string_view rest = packet.substr(at + kName.size());
    if (rest.substr(0, 2) == "=\"") rest.remove_prefix(2);
    else if (rest.substr(0, 1) == ">") rest.remove_prefix(1);
    else continue;
    if (!rest.empty() && rest[0] >= '0' && rest[0] <= '9') return rest[0] - '0';
  }
  return std::nullopt;
}

Picture turned(Picture in, int orientation) {
  if (orientation < 2 || orientation > 8) return in;
  const bool swaps = orientation >= 5;
  Picture out(swaps ? in.height : in.width, swaps ? in.width : in.height);
  // Where x and y of the result come from: mirrored along one, the other, or both, before or after the swap.
  const bool flip_x = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
  const bool flip_y = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
  for (int y = 0; y < out.height; ++y) {
    for (int x = 0; x < out.width; ++x) {
      const int column = swaps ? y : x, row = swaps ? x : y;
      const int from_x = flip_x ? in.width - 1 - column : column, from_y = flip_y ? in.height - 1 - row : row;
      std::memcpy(out.row(y) + 3 * static_cast<ptrdiff_t>(x), in.row(from_y) + 3 * static_cast<ptrdiff_t>(from_x), 3);
    }
  }
  return out;
}

int on_white(int colour, int alpha) {
  const int sum = (colour * alpha + 255 * (255 - alpha)) * 128 + (0x80 << 7);
  return (((sum >> 8) + sum) >> 8) >> 7;
}

void refuse_damaged(const std::string& name) {
  throw Refusal(said(name, " is damaged, truncated or unreadable; give an intact picture"));
}

}  // namespace vlmtrim
