// Σ α_m·y_m over representations y_m [size] in one bf16 buffer [pieces, capacity, PIECE]; see reference.py.
//
// One pass over memory forward, one backward for both gradients. Representations are bf16, sums and the newest fp32.

namespace {

constexpr int64_t PIECE = 2048;  // elements per tile: 8 KB of fp32 sums stay in the L1 cache while all y_m are added

// sum [count] += weight · values [count].
inline void add(float* sum, const bf16* values, float weight, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) sum[i] += weight * wide(values[i]);
}

}  // namespace

// Inputs: newest = y_depth [size] in fp32, alpha [depth + 1], values with y_m for m < depth: a piece of all of them is
// contiguous. Outputs: y_depth in values, and mixed [size], x_depth = α_depth·y_depth + Σ over m < depth of α_m·y_m.
extern "C" void depth_mix(bf16* values, const float* newest, const float* alpha, float* mixed, int64_t depth,
                          int64_t capacity, int64_t size) {
#pragma omp parallel for
    for (int64_t first = 0; first < size; first += PIECE) {
        const int64_t count = std::min(PIECE, size - first);
        bf16* piece = values + first * capacity;
        bf16* slot = piece + depth * PIECE;
        float *sum = mixed + first, own = alpha[depth];
        const float* y = newest + first;
        // 1. Store the newest representation in bf16; start the sum from its fp32 value.
#pragma omp simd
        for (int64_t i = 0; i < count; i++) {
            slot[i] = narrow(y[i]);
            sum[i] = own * y[i];
        }
        // 2. Add the older representations: depth · 4 KB, contiguous.
        for (int64_t m = 0; m < depth; m++) add(sum, piece + m * PIECE, alpha[m], count);
    }
}

// Inputs: grad = ∂/∂x_depth [size] in fp32, alphas [capacity, capacity], values with y_m for m ≤ depth and ∂/∂x_m for
// depth < m < count. Outputs: ∂/∂x_depth in place of y_depth in values; grad_newest [size], ∂/∂y_depth = Σ over
// m ≥ depth of α_m,depth·∂/∂x_m; grad_alpha [depth + 1], y_m·∂/∂x_depth. Scratch: parts [threads, depth + 1].
extern "C" void depth_mix_backward(bf16* values, const float* grad, const float* alphas, float* grad_newest,
                                   float* grad_alpha, float* parts, int64_t threads, int64_t depth, int64_t count,
                                   int64_t capacity, int64_t size) {
    std::fill(parts, parts + threads * (depth + 1), 0.0f);
    const int64_t pieces = (size + PIECE - 1) / PIECE;
#pragma omp parallel for schedule(static)
    for (int64_t thread = 0; thread < threads; thread++) {
        // 1. Each thread takes a contiguous range of pieces.
        float* part = parts + thread * (depth + 1);
        for (int64_t index = pieces * thread / threads; index < pieces * (thread + 1) / threads; index++) {
            const int64_t first = index * PIECE, n = std::min(PIECE, size - first);
            bf16* piece = values + first * capacity;
            const float *g = grad + first, own = alphas[depth * capacity + depth];
            // 2. Dot products of this piece with every y_m, before y_depth is overwritten.
            for (int64_t m = 0; m <= depth; m++) {
                const bf16* y = piece + m * PIECE;
                float product = 0.0f;
#pragma omp simd reduction(+ : product)
                for (int64_t i = 0; i < n; i++) product += g[i] * wide(y[i]);
                part[m] += product;
            }
            // 3. Store ∂/∂x_depth in bf16 in the slot of y_depth; start ∂/∂y_depth from its fp32 value.
            float* sum = grad_newest + first;
            bf16* slot = piece + depth * PIECE;
#pragma omp simd
            for (int64_t i = 0; i < n; i++) {
                slot[i] = narrow(g[i]);
                sum[i] = own * g[i];
            }
            // 4. Add the gradients of deeper mixes.
            for (int64_t m = depth + 1; m < count; m++) add(sum, piece + m * PIECE, alphas[m * capacity + depth], n);
        }
    }
    // 5. Add the threads' dot products in the order of the threads.
    for (int64_t m = 0; m <= depth; m++) {
        grad_alpha[m] = 0.0f;
        for (int64_t thread = 0; thread < threads; thread++) grad_alpha[m] += parts[thread * (depth + 1) + m];
    }
}
