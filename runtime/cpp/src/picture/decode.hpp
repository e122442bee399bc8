// What the decoders of files share.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "picture/picture.hpp"

namespace vlmtrim {

// EXIF's number of a turn, 1 to 8; nullopt where the data (behind "Exif\0\0") name none, or are damaged.
std::optional<int> exif_orientation(std::string_view tiff);
// The same of an XMP packet.
std::optional<int> xmp_orientation(std::string_view packet);
// A picture turned as its EXIF says.
Picture turned(Picture picture, int orientation);

// Contents of a file with the signature of its format; `name` is for messages. All throw Refusal.
Picture decode_jpeg(std::string_view data, const std::string& name);
Picture decode_png(std::string_view data, const std::string& name);
// Where this library was built with libwebp.
Picture decode_webp(std::string_view data, const std::string& name);

// A colour with an alpha laid on white, in Pillow's arithmetic.
int on_white(int colour, int alpha);

[[noreturn]] void refuse_damaged(const std::string& name);

}  // namespace vlmtrim
