// What a bundle says of its engine, read from manifest.json: the input, the preprocessing, the levels. C++17 alone.
#pragma once

#include <cctype>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace deploykit {

// A JSON value. Escapes of \u are kept as they are: no name in a manifest needs one.
class Json {
 public:
  static Json parse(const std::string& text) {
    Reader reader{text, 0};
    Json value = reader.value(0);
    reader.end();
    return value;
  }

  bool is_null() const { return kind_ == Kind::null; }
  bool is_number() const { return kind_ == Kind::number; }
  double number() const { return expect(Kind::number, "a number").number_; }
  int integer() const { return static_cast<int>(number()); }
  const std::string& text() const { return expect(Kind::text, "a string").text_; }
  const std::vector<Json>& items() const { return expect(Kind::list, "a list").items_; }
  const Json& operator[](const std::string& key) const {
    const auto found = expect(Kind::object, "an object").fields_.find(key);
    if (found == fields_.end()) throw std::runtime_error("manifest.json has no " + key);
    return found->second;
  }

 private:
  enum class Kind { null, boolean, number, text, list, object };

  struct Reader {
    const std::string& text;
    std::size_t at;

    Json value(int depth) {
      if (depth > 64) fail("nested too deeply");
      Json json;
      const char first = next();
      if (first == '{') {
        json.kind_ = Kind::object;
        ++at;
        while (next() != '}') {
          const std::string key = string();
          take(':');
          json.fields_[key] = value(depth + 1);
          if (next() != '}') take(',');
        }
        ++at;
      } else if (first == '[') {
        json.kind_ = Kind::list;
        ++at;
        while (next() != ']') {
          json.items_.push_back(value(depth + 1));
          if (next() != ']') take(',');
        }
        ++at;
      } else if (first == '"') {
        json.kind_ = Kind::text;
        json.text_ = string();
      } else if (!word("null")) {
        json.kind_ = Kind::boolean;
        if (!word("true") && !word("false")) json = number();
      }
      return json;
    }

    Json number() {
      Json json;
      json.kind_ = Kind::number;
      char* end = nullptr;
      json.number_ = std::strtod(text.c_str() + at, &end);
      if (end == text.c_str() + at) fail("not a value");
      at = static_cast<std::size_t>(end - text.c_str());
      return json;
    }

    std::string string() {
      take('"');
      std::string result;
      while (at < text.size() && text[at] != '"') {
        if (text[at] == '\\') {
          if (++at >= text.size()) fail("ends in a string");
          if (text[at] == 'u') result += '\\';
        }
        result += text[at++];
      }
      take('"');
      return result;
    }

    char next() {
      while (at < text.size() && std::isspace(static_cast<unsigned char>(text[at]))) ++at;
      if (at >= text.size()) fail("ends too early");
      return text[at];
    }

    void take(char expected) {
      if (next() != expected) fail(std::string("expected ") + expected);
      ++at;
    }

    bool word(const std::string& expected) {
      if (text.compare(at, expected.size(), expected) != 0) return false;
      at += expected.size();
      return true;
    }

    void end() {
      while (at < text.size() && std::isspace(static_cast<unsigned char>(text[at]))) ++at;
      if (at != text.size()) fail("goes on behind its end");
    }

    [[noreturn]] void fail(const std::string& reason) const {
      throw std::runtime_error("manifest.json is damaged at byte " + std::to_string(at) + ": " + reason);
    }
  };

  const Json& expect(Kind kind, const char* name) const {
    if (kind_ != kind) throw std::runtime_error(std::string("manifest.json: expected ") + name);
    return *this;
  }

  Kind kind_ = Kind::null;
  double number_ = 0;
  std::string text_;
  std::vector<Json> items_;
  std::map<std::string, Json> fields_;
};

// A feature level: stride in pixels of the image.
struct Level {
  std::string name;
  int index, channels, stride;
};

struct Manifest {
  std::filesystem::path folder;
  std::string runtime, engine, precision;
  std::string input;              // the engine's input
  bool pixels = false;            // it takes uint8 (N, H, W, C) and normalises by itself; else float32 (N, C, H, W)
  int batch = 1;                  // 1 where it is dynamic
  int channels = 0, height = 0, width = 0;
  std::vector<float> mean, std;   // of RGB in 0 to 1
  std::string interpolation, crop_mode;
  double crop_pct = 1;            // resize to size / crop_pct, then crop to size
  std::vector<Level> levels;
  std::vector<std::string> outputs;

  // The level that an output has; null for logits and embeddings.
  const Level* level(const std::string& output) const {
    for (const Level& each : levels)
      if (each.name == output) return &each;
    return nullptr;
  }
};

inline Manifest read_manifest(const std::filesystem::path& folder) {
  std::ifstream file(folder / "manifest.json", std::ios::binary);
  if (!file) throw std::runtime_error(folder.string() + " has no manifest.json: give a folder of deploykit export");
  const Json json = Json::parse({std::istreambuf_iterator<char>(file), {}});
  if (json["schema_version"].integer() != 1) throw std::runtime_error("the bundle is of a newer deploykit");
  const Json &input = json["input"], &how = input["preprocessing"];
  if (!input["height"].is_number()) throw std::runtime_error("the engine takes a range of image sizes");

  Manifest manifest;
  manifest.folder = folder;
  manifest.runtime = json["runtime"].text();
  manifest.engine = json["engine"].text();
  manifest.precision = json["precision"].text();
  manifest.input = input["name"].text();
  manifest.pixels = input["dtype"].text() == "uint8";
  manifest.batch = input["batch"].is_number() ? input["batch"].integer() : 1;
  manifest.channels = input["channels"].integer();
  manifest.height = input["height"].integer();
  manifest.width = input["width"].integer();
  for (const Json& value : how["mean"].items()) manifest.mean.push_back(static_cast<float>(value.number()));
  for (const Json& value : how["std"].items()) manifest.std.push_back(static_cast<float>(value.number()));
  manifest.interpolation = how["interpolation"].text();
  manifest.crop_mode = how["crop_mode"].text();
  manifest.crop_pct = how["crop_pct"].number();
  for (const Json& each : json["backbone"]["levels"].items())
    manifest.levels.push_back(
        {each["name"].text(), each["index"].integer(), each["channels"].integer(), each["stride"].integer()});
  for (const Json& each : json["outputs"].items()) manifest.outputs.push_back(each["name"].text());
  return manifest;
}

// Turn RGB pixels (H, W, C) of the engine's size into (C, H, W), normalised, as the weights were trained.
inline std::vector<float> normalize(const std::vector<std::uint8_t>& rgb, const Manifest& manifest) {
  const std::size_t area = static_cast<std::size_t>(manifest.height) * manifest.width, channels = manifest.channels;
  if (rgb.size() != area * channels) throw std::runtime_error("the image is not of the engine's size");
  std::vector<float> images(rgb.size());
  for (std::size_t channel = 0; channel < channels; ++channel) {
    const float mean = manifest.mean[channel % manifest.mean.size()];
    const float std = manifest.std[channel % manifest.std.size()];
    for (std::size_t place = 0; place < area; ++place)
      images[channel * area + place] = (static_cast<float>(rgb[place * channels + channel]) / 255.0f - mean) / std;
  }
  return images;
}

// Read a binary PPM (P6), which ImageMagick and ffmpeg write. An app resizes and crops with its own image library.
inline std::vector<std::uint8_t> read_ppm(const std::filesystem::path& path, const Manifest& manifest) {
  std::ifstream file(path, std::ios::binary);
  std::string kind;
  int width = 0, height = 0, most = 0;
  if (!(file >> kind >> width >> height >> most) || kind != "P6" || most != 255)
    throw std::runtime_error(path.string() + " is not a binary PPM of 8 bits");
  if (width != manifest.width || height != manifest.height || manifest.channels != 3)
    throw std::runtime_error(path.string() + " is " + std::to_string(width) + "x" + std::to_string(height) +
                             "; the engine takes " + std::to_string(manifest.width) + "x" +
                             std::to_string(manifest.height) + " in RGB: resize and crop it before");
  file.get();
  std::vector<std::uint8_t> rgb(static_cast<std::size_t>(width) * height * 3);
  if (!file.read(reinterpret_cast<char*>(rgb.data()), static_cast<std::streamsize>(rgb.size())))
    throw std::runtime_error(path.string() + " ends too early");
  return rgb;
}

}  // namespace deploykit
