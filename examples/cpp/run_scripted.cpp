// Runs a TorchScript module that calls zipvl's ops, without Python:
//   run_scripted LIBRARIES MODULE.pt INPUTS.pt OUTPUTS.pt [DEVICE]
#include <c10/core/InferenceMode.h>
#include <torch/csrc/jit/serialization/import.h>

#include <cstdio>
#include <exception>

#include "tensors.h"

int main(int argc, char** argv) {
  if (argc < 5) {
    std::fprintf(stderr, "usage: %s LIBRARIES MODULE.pt INPUTS.pt OUTPUTS.pt [DEVICE]\n", argv[0]);
    return 2;
  }
  try {
    const c10::InferenceMode inference;
    const std::string device = argc > 5 ? argv[5] : "cpu";
    load_op_libraries(argv[1]);
    torch::jit::Module module = torch::jit::load(argv[2], at::Device(device));
    std::vector<c10::IValue> inputs;
    for (const at::Tensor& tensor : load_tensors(argv[3], device)) {
      inputs.emplace_back(tensor);
    }
    const c10::IValue output = module.forward(inputs);
    std::vector<at::Tensor> tensors;
    if (output.isTensor()) {
      tensors.push_back(output.toTensor());
    } else {
      for (const c10::IValue& value : output.toTupleRef().elements()) {
        tensors.push_back(value.toTensor());
      }
    }
    save_tensors(argv[4], tensors);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
