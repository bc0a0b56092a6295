// Print what examples/hosts/bundle.hpp reads: print_bundle BUNDLE [IMAGE.ppm TENSOR], which gets the floats.
#include "bundle.hpp"

#include <iostream>

int main(int count, char** arguments) try {
  const deploykit::Manifest manifest = deploykit::read_manifest(arguments[1]);
  std::cout << manifest.runtime << ' ' << manifest.engine << ' ' << manifest.precision << '\n'
            << manifest.input << ' ' << manifest.batch << ' ' << manifest.channels << ' ' << manifest.height << ' '
            << manifest.width << ' ' << (manifest.pixels ? "uint8" : "float32") << '\n'
            << manifest.interpolation << ' ' << manifest.crop_mode << ' ' << manifest.crop_pct << '\n';
  for (const std::string& output : manifest.outputs) {
    const deploykit::Level* level = manifest.level(output);
    std::cout << output;
    if (level) std::cout << ' ' << level->index << ' ' << level->channels << ' ' << level->stride;
    std::cout << '\n';
  }
  if (count > 3) {
    const std::vector<float> images = deploykit::normalize(deploykit::read_ppm(arguments[2], manifest), manifest);
    const auto bytes = static_cast<std::streamsize>(images.size() * sizeof(float));
    std::ofstream(arguments[3], std::ios::binary).write(reinterpret_cast<const char*>(images.data()), bytes);
  }
  return 0;
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
