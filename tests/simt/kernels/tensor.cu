// Tensor cores by inline PTX, one warp: c += a @ b. SHAPE, ELEMENT and INSTRUCTION come by -D; m16n8k16 and m16n8k8
// read their operands by ldmatrix, m8n8k4 computes four products at once.
#include "platform.h"

struct TensorParams {
    const ELEMENT *a, *b;  // (16, kInner), (kInner, 8); or (4, 8, 4), (4, 4, 8)
    float* c;              // (16, 8); or (4, 8, 8)
};

__device__ unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }
__device__ unsigned two(const ELEMENT* p) { return *reinterpret_cast<const unsigned*>(p); }

#if SHAPE == 884
extern "C" __global__ void multiply(const TensorParams p) {
    const int lane = threadIdx.x, group = lane / 4 % 4, row = lane % 4 + (lane < 16 ? 0 : 4);
    const ELEMENT *a = p.a + group * 32 + row * 4, *b = p.b + group * 32 + lane % 4 * 8 + (lane < 16 ? 0 : 4);
    float c[8], *out[8];
    for (int i = 0; i < 8; ++i) {
        const int m = lane % 2 + (i & 2) + (lane < 16 ? 0 : 4), n = (i & 4) + (lane & 2) + (i & 1);
        out[i] = p.c + group * 64 + m * 8 + n;
        c[i] = *out[i];
    }
    asm volatile(INSTRUCTION " {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9}, {%10,%11}, {%0,%1,%2,%3,%4,%5,%6,%7};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7])
                 : "r"(two(a)), "r"(two(a + 2)), "r"(two(b)), "r"(two(b + 2)));
    for (int i = 0; i < 8; ++i) *out[i] = c[i];
}
#else
constexpr int kInner = SHAPE % 100;

extern "C" __global__ void multiply(const TensorParams p) {
    __shared__ __align__(16) ELEMENT a[16][24], b[kInner][8];  // rows of a that avoid bank conflicts: a gap at the end
    const int lane = threadIdx.x;
    for (int i = lane; i < 16 * kInner; i += 32) a[i / kInner][i % kInner] = p.a[i];
#ifdef COPY_LATER  // 16 bytes, one row of b
    if (lane < kInner)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(b[lane])), "l"(p.b + 8 * lane));
    asm volatile("cp.async.commit_group;");
#ifndef NEVER_WAIT
    asm volatile("cp.async.wait_group 0;" ::: "memory");
#endif
#else
    for (int i = lane; i < 8 * kInner; i += 32) b[i / 8][i % 8] = p.b[i];
#endif
#ifndef NEVER_SYNC
    __syncwarp();
#endif
    unsigned fa[4], fb[2];
    float c[4];
    for (int i = 0; i < 4; ++i) c[i] = p.c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2];
    const unsigned at_a = shared_address(&a[lane % 16][lane / 16 * 8]), at_b = shared_address(b[lane % kInner]);
#if SHAPE == 1616
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(fa[0]), "=r"(fa[1]), "=r"(fa[2]), "=r"(fa[3])
                 : "r"(at_a));
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(fb[0]), "=r"(fb[1])
                 : "r"(at_b));
    asm volatile(INSTRUCTION " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[0]), "r"(fb[1]));
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(fa[0]), "=r"(fa[1]) : "r"(at_a));
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(fb[0]) : "r"(at_b));
    asm volatile(INSTRUCTION " {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(fa[0]), "r"(fa[1]), "r"(fb[0]));
#endif
    for (int i = 0; i < 4; ++i) p.c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = c[i];
}
#endif
