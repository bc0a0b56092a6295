// Run a bundle for ONNX Runtime on one image and print each output: features BUNDLE IMAGE.ppm
//
//   g++ -std=c++17 -O2 features.cpp -I onnxruntime/include -L onnxruntime/lib -lonnxruntime -o features
#include <onnxruntime_cxx_api.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <numeric>

#include "bundle.hpp"

namespace {

// The tensor reads its values from rgb or images, which outlive it.
Ort::Value image_tensor(const deploykit::Manifest& manifest, std::vector<std::uint8_t>& rgb,
                        std::vector<float>& images) {
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const std::int64_t channels = manifest.channels, height = manifest.height, width = manifest.width;
  if (manifest.pixels) {
    const std::array<std::int64_t, 4> shape{1, height, width, channels};
    return Ort::Value::CreateTensor<std::uint8_t>(memory, rgb.data(), rgb.size(), shape.data(), shape.size());
  }
  images = deploykit::normalize(rgb, manifest);
  const std::array<std::int64_t, 4> shape{1, channels, height, width};
  return Ort::Value::CreateTensor<float>(memory, images.data(), images.size(), shape.data(), shape.size());
}

void print_output(const deploykit::Manifest& manifest, const std::string& name, const Ort::Value& value) {
  const auto info = value.GetTensorTypeAndShapeInfo();
  const float* values = value.GetTensorData<float>();
  const std::size_t count = info.GetElementCount();
  const double squares = std::inner_product(values, values + count, values, 0.0);
  std::string shape;
  for (const std::int64_t side : info.GetShape()) shape += (shape.empty() ? "" : " x ") + std::to_string(side);
  const deploykit::Level* level = manifest.level(name);
  std::printf("%-8s %-18s rms %.5f", name.c_str(), shape.c_str(), std::sqrt(squares / static_cast<double>(count)));
  std::printf(level ? "  stride %d\n" : "\n", level ? level->stride : 0);
}

void run(const std::filesystem::path& bundle, const std::filesystem::path& image) {
  const deploykit::Manifest manifest = deploykit::read_manifest(bundle);
  if (manifest.runtime != "onnxruntime") throw std::runtime_error("the bundle is for " + manifest.runtime);
  if (manifest.batch != 1) throw std::runtime_error("the engine takes " + std::to_string(manifest.batch) + " images");
  std::vector<std::uint8_t> rgb = deploykit::read_ppm(image, manifest);
  std::vector<float> images;

  Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "features");
  Ort::Session session(env, (manifest.folder / manifest.engine).c_str(), Ort::SessionOptions{});
  const Ort::Value input = image_tensor(manifest, rgb, images);
  const char* input_name = manifest.input.c_str();
  std::vector<const char*> names;
  for (const std::string& output : manifest.outputs) names.push_back(output.c_str());
  const auto outputs = session.Run(Ort::RunOptions{}, &input_name, &input, 1, names.data(), names.size());
  for (std::size_t place = 0; place < names.size(); ++place)
    print_output(manifest, manifest.outputs[place], outputs[place]);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) {
    std::fprintf(stderr, "usage: features BUNDLE IMAGE.ppm\n");
    return 2;
  }
  try {
    run(arguments[1], arguments[2]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "features: %s\n", error.what());
    return 1;
  }
  return 0;
}
