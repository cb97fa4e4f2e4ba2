// What the CPU kernels and the CUDA kernels share.
#pragma once
#include <cstdint>

namespace ifr {

enum class DType : int { f32, f64, bf16, f16, e5m2 };

// As ifr_fast.solution.Status. A sample of status MAX_ITER still runs.
enum Status : int64_t { CONVERGED = 0, MAX_ITER = 1, DIVERGED = 2, NONFINITE = 3 };

enum class Method : int { broyden, anderson, picard };

// Defines a struct from the list of its fields, LIST: a macro that says FIELD(type, name) for each of them.
// Python gives every field by its name (fields.h), so no value can land in another field.
#define IFR_STRUCT(Struct, LIST)   \
  struct Struct {                  \
    LIST(IFR_MEMBER)               \
    template <typename Visit>      \
    void each_field(Visit visit) { \
      LIST(IFR_VISIT)              \
    }                              \
  };
#define IFR_MEMBER(type, name) type name;
#define IFR_VISIT(type, name) visit(#name, name);

}  // namespace ifr
