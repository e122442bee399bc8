#!/usr/bin/env bash
# Brings Debian's Chromium and its driver, which the tests of serve-vlm's page drive. Quick where they are there.
set -euo pipefail

missing=()
[ -x /usr/bin/chromium ] || missing+=(chromium)
[ -x /usr/bin/chromedriver ] || missing+=(chromium-driver)
((${#missing[@]})) || exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "installing ${missing[*]} ..." >&2
  install=(apt-get install -y -qq --no-install-recommends "${missing[@]}")
  "${install[@]}" >/dev/null 2>&1 && exit 0
  apt-get update -qq && "${install[@]}" >/dev/null && exit 0
fi
echo "browser.sh: the tests of the page need ${missing[*]}; install with: sudo apt-get install ${missing[*]}" >&2
exit 1
