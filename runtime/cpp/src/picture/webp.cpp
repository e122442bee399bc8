// WebP by libwebp. As in Pillow, of an animation the first frame counts, on a canvas that is transparent, or black in a
// file without transparency, where the frame has no part of it.
#include <webp/decode.h>
#include <webp/demux.h>

#include <memory>

#include "core/error.hpp"
#include "picture/decode.hpp"

namespace vlmtrim {
namespace {

using Demuxer = std::unique_ptr<WebPDemuxer, decltype(&WebPDemuxDelete)>;

constexpr std::string_view kExif("Exif\0\0", 6);

std::string_view chunk_of(const WebPDemuxer* file, const char* name) {
  WebPChunkIterator found{};
  if (WebPDemuxGetChunk(file, name, 1, &found) == 0) return {};
  const std::string_view data(reinterpret_cast<const char*>(found.chunk.bytes), found.chunk.size);
  WebPDemuxReleaseChunkIterator(&found);  // the data are the file's
  return data;
}

std::optional<int> orientation_of(const WebPDemuxer* file) {
  std::string_view exif = chunk_of(file, "EXIF");
  for (int i = 0; i < 2 && exif.substr(0, kExif.size()) == kExif; ++i) exif.remove_prefix(kExif.size());
  const auto orientation = exif_orientation(exif);
  return orientation ? orientation : xmp_orientation(chunk_of(file, "XMP "));
}

// The first frame at its place, RGBA.
std::vector<uint8_t> canvas_of(const WebPDemuxer* file, int width, int height, const std::string& name) {
  const size_t row = size_t{4} * static_cast<size_t>(width);
  std::vector<uint8_t> canvas(row * static_cast<size_t>(height));
  WebPIterator frame{};
  if (WebPDemuxGetFrame(file, 1, &frame) == 0) refuse_damaged(name);
  const size_t place = row * static_cast<size_t>(frame.y_offset) + size_t{4} * static_cast<size_t>(frame.x_offset);
  const bool inside = frame.x_offset >= 0 && frame.y_offset >= 0 && frame.width <= width - frame.x_offset &&
                      frame.height <= height - frame.y_offset;
  const bool whole = inside && WebPDecodeRGBAInto(frame.fragment.bytes, frame.fragment.size, canvas.data() + place,
                                                  canvas.size() - place, static_cast<int>(row)) != nullptr;
  WebPDemuxReleaseIterator(&frame);
  if (!whole) refuse_damaged(name);
  return canvas;
}

}  // namespace

Picture decode_webp(std::string_view data, const std::string& name) {
  const WebPData bytes{reinterpret_cast<const uint8_t*>(data.data()), data.size()};
  const Demuxer file(WebPDemux(&bytes), WebPDemuxDelete);
  if (!file) refuse_damaged(name);
  const int64_t width = WebPDemuxGetI(file.get(), WEBP_FF_CANVAS_WIDTH);
  const int64_t height = WebPDemuxGetI(file.get(), WEBP_FF_CANVAS_HEIGHT);
  check_size(width, height, name);
  WebPBitstreamFeatures features{};
  const bool known = WebPGetFeatures(bytes.bytes, bytes.size, &features) == VP8_STATUS_OK;
  const bool transparent = !known || features.has_alpha != 0;
  Picture picture(static_cast<int>(width), static_cast<int>(height));
  const std::vector<uint8_t> canvas = canvas_of(file.get(), picture.width, picture.height, name);
  uint8_t* made = picture.rgb.data();
  for (size_t i = 0; i < canvas.size(); i += 4) {
    for (size_t c = 0; c < 3; ++c) {
      const int colour = canvas[i + c];
      *made++ = static_cast<uint8_t>(transparent ? on_white(colour, canvas[i + 3]) : colour);
    }
  }
  return turned(std::move(picture), orientation_of(file.get()).value_or(1));
}

}  // namespace vlmtrim
