// What tokenizers know of Unicode: letters, numbers, white space, NFC; and UTF-8.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace vlmtrim {

bool is_letter(uint32_t code);  // \p{L}
bool is_number(uint32_t code);  // \p{N}
bool is_space(uint32_t code);   // \s, the property White_Space

// The next code point of valid UTF-8, moving `at` behind it.
uint32_t next_code(std::string_view text, size_t& at);
void append_code(std::string& text, uint32_t code);
// Code points of UTF-8.
size_t characters_of(std::string_view text);
// Bytes of the character that begins with this one.
size_t length_of(char lead);

// Canonical composition.
std::string nfc(std::string_view text);

// As Python's str.strip, at the left end, the right end, or both.
std::string_view strip_left(std::string_view text);
std::string_view strip_right(std::string_view text);

// Valid UTF-8 of any bytes: what is none becomes U+FFFD, one for each longest beginning of a character.
std::string lossy_utf8(std::string_view bytes);

}  // namespace vlmtrim
