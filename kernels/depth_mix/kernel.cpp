// Σ α_m·y_m over representations y_m [size] that stand in one buffer of bf16; see reference.py.

namespace {

constexpr int64_t PIECE = 2048;  // entries of a sum that stay in the first cache while all y_m add to it

inline void add(float* sum, const bf16* values, float weight, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) sum[i] += weight * wide(values[i]);
}

}  // namespace

// values [pieces, capacity, PIECE], so that what is read for a piece stands side by side: writes y_depth, and
// x_depth = α_depth·y_depth + Σ over m < depth of α_m·y_m
extern "C" void depth_mix(bf16* values, const float* newest, const float* alpha, float* mixed, int64_t depth,
                          int64_t capacity, int64_t size) {
#pragma omp parallel for
    for (int64_t first = 0; first < size; first += PIECE) {
        const int64_t count = std::min(PIECE, size - first);
        bf16* piece = values + first * capacity;
        bf16* slot = piece + depth * PIECE;
        float *sum = mixed + first, own = alpha[depth];
        const float* y = newest + first;
#pragma omp simd
        for (int64_t i = 0; i < count; i++) {
            slot[i] = narrow(y[i]);
            sum[i] = own * y[i];
        }
        for (int64_t m = 0; m < depth; m++) add(sum, piece + m * PIECE, alpha[m], count);
    }
}

// values as above: y_m for m ≤ depth, ∂/∂x_m for depth < m < count; alphas [capacity, capacity].
// Writes ∂/∂x_depth in the place of y_depth, ∂/∂y_depth = Σ over m ≥ depth of α_m,depth·∂/∂x_m, and for m ≤ depth
// ∂/∂α_depth,m = y_m·∂/∂x_depth, of which each thread's part is added up in the order of the threads.
extern "C" void depth_mix_backward(bf16* values, const float* grad, const float* alphas, float* grad_newest,
                                   float* grad_alpha, float* parts, int64_t threads, int64_t depth, int64_t count,
                                   int64_t capacity, int64_t size) {
    std::fill(parts, parts + threads * (depth + 1), 0.0f);
    const int64_t pieces = (size + PIECE - 1) / PIECE;
#pragma omp parallel for schedule(static)
    for (int64_t thread = 0; thread < threads; thread++) {
        float* part = parts + thread * (depth + 1);
        for (int64_t index = pieces * thread / threads; index < pieces * (thread + 1) / threads; index++) {
            const int64_t first = index * PIECE, n = std::min(PIECE, size - first);
            bf16* piece = values + first * capacity;
            const float *g = grad + first, own = alphas[depth * capacity + depth];
            for (int64_t m = 0; m <= depth; m++) {
                const bf16* y = piece + m * PIECE;
                float product = 0.0f;
#pragma omp simd reduction(+ : product)
                for (int64_t i = 0; i < n; i++) product += g[i] * wide(y[i]);
                part[m] += product;
            }
            float* sum = grad_newest + first;
            bf16* slot = piece + depth * PIECE;
#pragma omp simd
            for (int64_t i = 0; i < n; i++) {
                slot[i] = narrow(g[i]);
                sum[i] = own * g[i];
            }
            for (int64_t m = depth + 1; m < count; m++) add(sum, piece + m * PIECE, alphas[m * capacity + depth], n);
        }
    }
    for (int64_t m = 0; m <= depth; m++) {
        grad_alpha[m] = 0.0f;
        for (int64_t thread = 0; thread < threads; thread++) grad_alpha[m] += parts[thread * (depth + 1) + m];
    }
}
