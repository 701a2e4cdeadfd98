// The kernels of the instruction set that this file is compiled for: FASTATTN_ISA names it.
#include "kernels.h"

#include "backward.h"
#include "few_queries.h"
#include "forward.h"

#define FASTATTN_JOINED(a, b) a##b
#define FASTATTN_KERNELS_OF(isa) FASTATTN_JOINED(isa, _kernels)
#define FASTATTN_TEXT(x) #x
#define FASTATTN_NAME(isa) FASTATTN_TEXT(isa)

namespace fastattn {
namespace {

void words_of_rows(unsigned* words, unsigned long long seed, int b, int h, int rows, int row) {
    random_words(words, seed, b, h, 0, rows, 0, row);
}

void exp2_in_place(float* x, long count) {
    for (long i = 0; i < count; i += kLanes) store(x + i, exp2(load(x + i)));
}

constexpr CpuKernels kKernels = {
    FASTATTN_NAME(FASTATTN_ISA),
    kBlockM,
    kBlockN,
    kChunk,
    kFewQueries,
    forward_scratch,
    backward_scratch,
    {attend<float>, attend<Float16>, attend<Bfloat16>},
    {attend_few<float>, attend_few<Float16>, attend_few<Bfloat16>},
    {attend_backward<float>, attend_backward<Float16>, attend_backward<Bfloat16>},
    words_of_rows,
    exp2_in_place,
};

}  // namespace

const CpuKernels* FASTATTN_KERNELS_OF(FASTATTN_ISA)() { return &kKernels; }

}  // namespace fastattn
