// What both programs need: op libraries loaded by path, and lists of tensors in files that torch.save and torch.load
// know.
#pragma once

#include <ATen/core/ivalue.h>
#include <dlfcn.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <fstream>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

// Loads libzipvl_ops.so (and libzipvl_cuda.so) from a list separated by colons: their ops are registered from then on.
inline void load_op_libraries(const std::string& paths) {
  std::istringstream list(paths);
  for (std::string path; std::getline(list, path, ':');) {
    if (dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) {
      throw std::runtime_error("cannot load " + path + ": " + dlerror());
    }
  }
}

// The tensors of a file made by torch.save([...]), on `device`.
inline std::vector<at::Tensor> load_tensors(const std::string& path, const std::string& device) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    throw std::runtime_error("cannot read " + path);
  }
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const c10::IValue list = torch::jit::pickle_load(bytes);
  std::vector<at::Tensor> tensors;
  for (const c10::IValue& value : list.toListRef()) {
    tensors.push_back(value.toTensor().to(at::Device(device)));
  }
  return tensors;
}

// Writes tensors so that torch.load(path) gives a tuple of them.
inline void save_tensors(const std::string& path, const std::vector<at::Tensor>& tensors) {
  std::vector<c10::IValue> values;
  for (const at::Tensor& tensor : tensors) {
    values.emplace_back(tensor.cpu());
  }
  const std::vector<char> bytes = torch::jit::pickle_save(c10::ivalue::Tuple::create(std::move(values)));
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}
