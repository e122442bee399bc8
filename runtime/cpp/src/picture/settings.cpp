#include "picture/settings.hpp"

#include <cmath>

#include "core/error.hpp"

namespace vlmtrim {
namespace {

// Factors and colours that no checkpoint comes near; within them every pixel value is finite in float32.
constexpr double kSmallest = 1e-5, kLargest = 1e5;
constexpr int64_t kMostStretched = 16 * 1024 * 1024;  // pixels; of more only what the crop keeps is made

int64_t square_root(int64_t value) {
  auto root = static_cast<int64_t>(std::sqrt(static_cast<double>(value)));
  while (root * root > value) --root;
  while ((root + 1) * (root + 1) <= value) ++root;
  return root;
}

// Whether an input of vision graphs is of the contract's dtype, which their names tell; the others are int64.
bool is_float(const std::string& name) {
  const auto ends = [&](std::string_view end) {
    return name.size() > end.size() && name.compare(name.size() - end.size(), end.size(), end) == 0;
  };
  return ends("_values") || ends("_weights");
}

std::string said_of_input(const std::optional<std::pair<std::string, Shape>>& input) {
  return input ? input->first + " " + said_of(input->second) : "none";
}

}  // namespace

void Normalisation::apply(const Picture& picture, float* target) const {
  const size_t pixels = picture.rgb.size() / 3;
  for (size_t channel = 0; channel < 3; ++channel) {
    float table[256];  // a value has 256 forms at most
    for (int value = 0; value < 256; ++value) {
      table[value] = static_cast<float>(scale ? value * *scale : value);
      if (!mean_std) continue;
      table[value] -= static_cast<float>(mean_std->first[channel]);
      table[value] /= static_cast<float>(mean_std->second[channel]);
    }
    const uint8_t* from = picture.rgb.data() + channel;
    float* to = target + channel * pixels;
    for (size_t i = 0; i < pixels; ++i) to[i] = table[from[3 * i]];
  }
}

ImageSettings ImageSettings::read(const Folder& files) {
  for (const char* name : {"preprocessor_config.json", "processor_config.json"}) {
    if (!files.contains(name)) continue;
    Json raw = files.json(name);
    std::string where = (files.path() / name).string();
    if (std::string(name) == "processor_config.json") {
      const Json part = raw.value("image_processor", Json());
      raw = part.is_null() ? Json::object() : part;
      where += ": image_processor";
    }
    if (!raw.is_object()) throw BundleError(said(where, " is ", shown(raw), "; expected an object"));
    if (!raw.empty()) return {raw, where};
  }
  throw BundleError(said(files.path().string(),
                         " has no image-processor settings (preprocessor_config.json); export the model again"));
}

ImageSettings ImageSettings::of_videos(const Folder& files) {
  const char *const whole = "processor_config.json", *const own = "video_preprocessor_config.json";
  const std::string where = (files.path() / whole).string() + ": video_processor";
  const Json nested = files.contains(whole) ? files.json(whole).value("video_processor", Json()) : Json();
  if (!nested.is_null()) {
    if (!nested.is_object()) throw BundleError(said(where, " is ", shown(nested), "; expected an object"));
    return {nested, where};
  }
  if (!files.contains(own)) return read(files);
  return {files.json(own), (files.path() / own).string()};
}

ImageSettings ImageSettings::part(const char* key) const {
  const Json* found = find(key);
  if (found == nullptr) return {Json::object(), said(where_, ": ", key)};
  if (!found->is_object()) refuse(said(key, " is ", shown(*found), "; expected an object"));
  return {*found, said(where_, ": ", key)};
}

void ImageSettings::refuse(const std::string& problem) const { throw BundleError(where_ + ": " + problem); }

const Json* ImageSettings::find(const char* key) const {
  const auto found = raw_.find(key);
  return found == raw_.end() || found->is_null() ? nullptr : &*found;
}

int64_t ImageSettings::integer(const char* key, int64_t low, int64_t high, std::optional<int64_t> fallback) const {
  const Json* found = find(key);
  const Json value = found != nullptr ? *found : fallback ? Json(*fallback) : Json();
  return vlmtrim::integer(value, said(where_, ": ", key), low, high);
}

double ImageSettings::number(const char* key, double low, double high, double fallback) const {
  const Json* found = find(key);
  return vlmtrim::number(found != nullptr ? *found : Json(fallback), said(where_, ": ", key), low, high);
}

bool ImageSettings::boolean(const char* key, bool fallback) const {
  const Json* found = find(key);
  return found == nullptr ? fallback : vlmtrim::boolean(*found, said(where_, ": ", key));
}

std::map<std::string, int64_t> ImageSettings::sides(const char* key, const std::vector<std::string>& plain,
                                                    int64_t most) const {
  std::map<std::string, int64_t> found;
  const Json* value = find(key);
  if (value == nullptr) return found;
  if (!value->is_object()) {
    const int64_t side = vlmtrim::integer(*value, said(where_, ": ", key), 1, most);
    for (const auto& name : plain) found[name] = side;
    return found;
  }
  for (const auto& [name, side] : value->items()) {
    if (!side.is_null()) found[name] = vlmtrim::integer(side, said(where_, ": ", key, ".", name), 1, most);
  }
  return found;
}

std::vector<std::pair<int64_t, int64_t>> ImageSettings::pairs(const char* key, size_t most) const {
  std::vector<std::pair<int64_t, int64_t>> found;
  const Json* value = find(key);
  if (value == nullptr) return found;
  if (!value->is_array() || value->size() > most) {
    refuse(said(key, " is ", shown(*value), "; expected a list of at most ", most, " sizes"));
  }
  for (size_t i = 0; i < value->size(); ++i) {
    const Json& pair = (*value)[i];
    const std::string where = said(where_, ": ", key, "[", i, "]");
    if (!pair.is_array() || pair.size() != 2) {
      throw BundleError(said(where, " is ", shown(pair), "; expected height and width"));
    }
    found.emplace_back(vlmtrim::integer(pair[0], where, 1, 4096), vlmtrim::integer(pair[1], where, 1, 4096));
  }
  return found;
}

int ImageSettings::resample(int fallback) const {
  return static_cast<int>(integer("resample", kNearest, kHamming, fallback));
}

Normalisation ImageSettings::normalisation() const {
  Normalisation found;
  if (boolean("do_rescale", true)) {
    found.scale = number("rescale_factor", kSmallest, kLargest, 1.0 / 255);
  }
  if (boolean("do_normalize", true)) {
    found.mean_std.emplace(channels("image_mean", -kLargest), channels("image_std", kSmallest));
  }
  return found;
}

Channels ImageSettings::channels(const char* key, double low) const {
  const Json* value = find(key);
  if (value == nullptr || !value->is_array() || value->size() != 3) {
    refuse(said(key, " is ", value == nullptr ? "null" : shown(*value), "; expected a list of three numbers"));
  }
  Channels found{};
  for (size_t i = 0; i < 3; ++i)
    found[i] = vlmtrim::number((*value)[i], said(where_, ": ", key, "[", i, "]"), low, kLargest);
  return found;
}

ImageProcessor ImageProcessor::from_folder(const Folder& files) {
  const ImageSettings settings = ImageSettings::read(files);
  auto size = settings.sides("size", {"shortest_edge"});
  const bool cropping = settings.boolean("do_center_crop", false);
  auto box = cropping ? settings.sides("crop_size", {"height", "width"}) : size;
  if (box.count("height") == 0 || box.count("width") == 0) {
    settings.refuse(said(cropping ? "crop_size" : "size", " gives no fixed height and width"));
  }
  if (!settings.boolean("do_resize", true)) {
    settings.refuse("do_resize is false; a model of fixed size needs its pictures resized");
  }
  ImageProcessor made;
  if (size.count("shortest_edge") > 0) made.shortest_edge = size["shortest_edge"];
  if (!made.shortest_edge && !size.empty() && size != box) {
    settings.refuse("size and crop_size differ; expected a shortest_edge, or the same");
  }
  if (made.shortest_edge && !cropping) {
    settings.refuse("size names a shortest_edge and nothing is cropped; expected height and width");
  }
  if (made.shortest_edge && *made.shortest_edge < std::max(box["height"], box["width"])) {
    settings.refuse(said("size.shortest_edge is ", *made.shortest_edge, ", smaller than the crop of ", box["height"],
                         " x ", box["width"]));
  }
  made.values = settings.normalisation();
  made.height = static_cast<int>(box["height"]);
  made.width = static_cast<int>(box["width"]);
  made.crop = cropping;
  made.pad_to_square = settings.boolean("do_pad", false);
  made.filter = settings.resample();
  return made;
}

Tensor ImageProcessor::stacked(const std::vector<Picture>& pictures) const {
  std::vector<const Picture*> places;
  for (const Picture& picture : pictures) places.push_back(&picture);
  return stacked(places);
}

Tensor ImageProcessor::stacked(const std::vector<const Picture*>& pictures) const {
  Tensor pixels = Tensor::empty(DType::kFloat32, {static_cast<int64_t>(pictures.size()), 3, height, width});
  float* target = pixels.as<float>();
  for (const Picture* picture : pictures) {
    apply(*picture, target);
    target += int64_t{3} * height * width;
  }
  return pixels;
}

Picture ImageProcessor::framed(const Picture& given) const {
  const Picture picture = pad_to_square ? padded(given) : given;
  if (!shortest_edge) return resized(picture, width, height, filter);
  const int64_t edge = *shortest_edge, shorter = std::min(picture.width, picture.height);
  const auto stretched = static_cast<int64_t>(static_cast<double>(edge * std::max(picture.width, picture.height)) /
                                              static_cast<double>(shorter));
  const bool upright = picture.width <= picture.height;
  const int64_t wide = upright ? edge : stretched, high = upright ? stretched : edge;
  const int64_t left = (wide - width) / 2, top = (high - height) / 2;
  if (wide * high > kMostStretched) {
    // A long, thin picture: the same pixels, without making those that the crop leaves out.
    const double across = static_cast<double>(picture.width) / static_cast<double>(wide);
    const double down = static_cast<double>(picture.height) / static_cast<double>(high);
    const double right = std::min(static_cast<double>(left + width) * across, static_cast<double>(picture.width));
    const double bottom = std::min(static_cast<double>(top + height) * down, static_cast<double>(picture.height));
    const Box box{static_cast<float>(static_cast<double>(left) * across),
                  static_cast<float>(static_cast<double>(top) * down), static_cast<float>(right),
                  static_cast<float>(bottom)};
    return resized(picture, width, height, filter, box);
  }
  const Picture whole = resized(picture, static_cast<int>(wide), static_cast<int>(high), filter);
  return cropped(whole, static_cast<int>(left), static_cast<int>(top), width, height);
}

Picture ImageProcessor::padded(const Picture& given) const {
  Picture picture = given;
  int64_t side = std::max(picture.width, picture.height);
  if (side * side > kMostPixels) {  // of a long picture the square would be far larger than the picture
    const double shrink = static_cast<double>(square_root(kMostPixels)) / static_cast<double>(side);
    const int wide = std::max(1, static_cast<int>(picture.width * shrink));
    const int high = std::max(1, static_cast<int>(picture.height * shrink));
    picture = resized(picture, wide, high, filter);
    side = std::max(picture.width, picture.height);
  }
  Picture square(static_cast<int>(side), static_cast<int>(side));
  const Channels mean = values.mean_std ? values.mean_std->first : Channels{0, 0, 0};
  for (size_t i = 0; i < square.rgb.size(); ++i) {
    square.rgb[i] = static_cast<uint8_t>(std::clamp(static_cast<int>(mean[i % 3] * 255), 0, 255));
  }
  paste(square, picture, static_cast<int>(side - picture.width) / 2, static_cast<int>(side - picture.height) / 2);
  return square;
}

void expect_inputs(const Folder& files, const Contract& contract, const std::map<std::string, Shape>& shapes) {
  std::map<std::string, std::pair<std::string, Shape>> made, taken;
  std::set<std::string> names;
  for (const auto& [name, shape] : shapes) {
    made[name] = {is_float(name) ? name_of(contract.dtype) : "int64", shape};
    names.insert(name);
  }
  for (const auto& tensor : contract.graph("vision").inputs) {
    Shape shape;
    for (const auto& dim : tensor.shape) shape.push_back(dim.name.empty() ? dim.size : -1);
    taken[tensor.name] = {name_of(tensor.dtype), shape};
    names.insert(tensor.name);
  }
  const auto of = [](const auto& inputs, const std::string& name) -> std::optional<std::pair<std::string, Shape>> {
    const auto found = inputs.find(name);
    return found == inputs.end() ? std::nullopt : std::make_optional(found->second);
  };
  for (const auto& name : names) {
    if (of(made, name) == of(taken, name)) continue;
    throw BundleError(said(files.path().string(), ": the image-processor settings make ", name, " of ",
                           said_of_input(of(made, name)), ", the vision graph takes ", said_of_input(of(taken, name)),
                           "; take both from one checkpoint and export again"));
  }
}

}  // namespace vlmtrim
