#include <cstdio>

#include "core/error.hpp"
#include "text/prompter.hpp"

namespace vlmtrim {

// The directives that prompt.json may hold, in English whatever the locale is.
std::string Conversation::date(const std::string& format) const {
  static const char* const kDays[] = {"Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"};
  static const char* const kMonths[] = {"January", "February", "March",     "April",   "May",      "June",
                                        "July",    "August",   "September", "October", "November", "December"};
  const auto number = [](int value, int width) {
    char text[16];
    std::snprintf(text, sizeof text, "%0*d", width, value);
    return std::string(text);
  };
  const std::string day = kDays[began_.tm_wday], month = kMonths[began_.tm_mon];
  std::string made;
  for (size_t i = 0; i < format.size(); ++i) {
    if (format[i] != '%' || i + 1 == format.size()) {
      made += format[i];
      continue;
    }
    switch (format[++i]) {
      case 'a':
        made += day.substr(0, 3);
        break;
      case 'A':
        made += day;
        break;
      case 'b':
        made += month.substr(0, 3);
        break;
      case 'B':
        made += month;
        break;
      case 'd':
        made += number(began_.tm_mday, 2);
        break;
      case 'e':
        made += (began_.tm_mday < 10 ? " " : "") + number(began_.tm_mday, 1);
        break;
      case 'D':
        made += number(began_.tm_mon + 1, 2) + "/" + number(began_.tm_mday, 2) + "/" + number(began_.tm_year % 100, 2);
        break;
      case 'H':
        made += number(began_.tm_hour, 2);
        break;
      case 'I':
        made += number((began_.tm_hour + 11) % 12 + 1, 2);
        break;
      case 'j':
        made += number(began_.tm_yday + 1, 3);
        break;
      case 'M':
        made += number(began_.tm_min, 2);
        break;
      case 'm':
        made += number(began_.tm_mon + 1, 2);
        break;
      case 'p':
        made += began_.tm_hour < 12 ? "AM" : "PM";
        break;
      case 'S':
        made += number(began_.tm_sec, 2);
        break;
      case 'y':
        made += number(began_.tm_year % 100, 2);
        break;
      case 'Y':
        made += number(began_.tm_year + 1900, 1);
        break;
      case '%':
        made += '%';
        break;
      default:
        throw BundleError(said(prompter_.where_, " writes a date as ", shown(format)));
    }
  }
  return made;
}

}  // namespace vlmtrim
