// libFuzzer: a contract.json of any bytes is a contract whose parts agree, or a sentence.
#include "core/contract.hpp"

#include <string>

#include "core/error.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const auto contract =
        vlmtrim::Contract::from_json(std::string(reinterpret_cast<const char*>(data), size), "contract.json");
    vlmtrim::check_agreement(contract, "contract.json");
  } catch (const vlmtrim::BundleError&) {
  }
  return 0;
}
