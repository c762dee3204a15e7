// Runs a package of torch._inductor.aoti_compile_and_package that calls zipvl's ops, without Python:
//   run_package LIBRARIES PACKAGE.pt2 INPUTS.pt OUTPUTS.pt [DEVICE]
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <exception>

#include "tensors.h"

int main(int argc, char** argv) {
  if (argc < 5) {
    std::fprintf(stderr, "usage: %s LIBRARIES PACKAGE.pt2 INPUTS.pt OUTPUTS.pt [DEVICE]\n", argv[0]);
    return 2;
  }
  try {
    const c10::InferenceMode inference;
    load_op_libraries(argv[1]);
    torch::inductor::AOTIModelPackageLoader package(argv[2]);
    save_tensors(argv[4], package.run(load_tensors(argv[3], argc > 5 ? argv[5] : "cpu")));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
