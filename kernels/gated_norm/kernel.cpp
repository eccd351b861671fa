// LayerNorm(linear · GELU(gate)), one pass over memory forward and one backward; see reference.py.
//
// A row [D] has `groups` groups of `width` elements. They are contiguous in the gate; in `linear` they are strided, as
// in attention's context [heads, rows, width]. The fp32 row stays in the L1 cache.

namespace {

struct Gelu {
    float share;  // Φ(x): GELU(x) = x · share
    float slope;  // GELU'(x)
};

// By (1 + tanh z)/2 = 1/(1 + e^(−2z)), z = √(2/π)·(x + 0.044715·x³).
inline Gelu gelu_tanh(float x) {
    const float scale = 1.5957691216057308f, cubic = 0.044715f;  // 2·√(2/π)
    float share = 1.0f / (1.0f + exponential(-scale * (x + cubic * x * x * x)));
    return {share, share + x * share * (1.0f - share) * scale * (1.0f + 3.0f * cubic * x * x)};
}

// The normal distribution function by Abramowitz & Stegun 7.1.26, absolute error 1.5e-7.
inline Gelu gelu_exact(float x) {
    float magnitude = __builtin_fabsf(x) * 0.70710678f, bell = exponential(-magnitude * magnitude);
    float t = 1.0f / (1.0f + 0.3275911f * magnitude);
    float series = 1.061405429f;
    series = series * t - 1.453152027f;
    series = series * t + 1.421413741f;
    series = series * t - 0.284496736f;
    series = series * t + 0.254829592f;
    float tail = 0.5f * series * t * bell;
    float share = x > 0.0f ? 1.0f - tail : tail;
    return {share, share + x * bell * 0.39894228f};
}

// linear, gate → normalized [rows, D] in bf16, means and inverse_stds [rows] in fp32. *_row and *_group are strides
// in elements.
template <Gelu (*gelu)(float)>
void forward(const bf16* linear, const bf16* gate, bf16* normalized, float* means, float* inverse_stds, int64_t rows,
             int64_t groups, int64_t width, int64_t linear_row, int64_t linear_group, int64_t gate_row, float eps) {
    const int64_t size = groups * width;
#pragma omp parallel
    {
        std::vector<float> values(size);
#pragma omp for
        for (int64_t row = 0; row < rows; row++) {
            // 1. v = linear · GELU(gate), group by group, and its sum.
            float sum = 0.0f;
            for (int64_t group = 0; group < groups; group++) {
                const bf16 *l = linear + row * linear_row + group * linear_group, *g = gate + row * gate_row + group * width;
                float* v = values.data() + group * width;
#pragma omp simd reduction(+ : sum)
                for (int64_t i = 0; i < width; i++) {
                    float x = wide(g[i]);
                    v[i] = wide(l[i]) * x * gelu(x).share;
                    sum += v[i];
                }
            }
            // 2. Mean, then variance around it, from the cached row.
            float *v = values.data(), mean = sum / size, squares = 0.0f;
#pragma omp simd reduction(+ : squares)
            for (int64_t i = 0; i < size; i++) squares += (v[i] - mean) * (v[i] - mean);
            float inverse_std = 1.0f / std::sqrt(squares / size + eps);
            // 3. Normalize, round to bf16, and keep the row's statistics for the backward.
            bf16* out = normalized + row * size;
#pragma omp simd
            for (int64_t i = 0; i < size; i++) out[i] = narrow((v[i] - mean) * inverse_std);
            means[row] = mean;
            inverse_stds[row] = inverse_std;
        }
    }
}

// grad [rows, D] of the normalized product, and the forward's inputs and statistics → grad_linear, grad_gate in their
// inputs' layouts, and the normalized product [rows, D], recomputed for the weight's gradient.
template <Gelu (*gelu)(float)>
void backward(const bf16* grad, const bf16* linear, const bf16* gate, const float* means, const float* inverse_stds,
              bf16* grad_linear, bf16* grad_gate, bf16* normalized, int64_t rows, int64_t groups, int64_t width,
              int64_t linear_row, int64_t linear_group, int64_t gate_row, int64_t grad_linear_row,
              int64_t grad_linear_group, int64_t grad_gate_row) {
    const int64_t size = groups * width;
#pragma omp parallel
    {
        std::vector<float> memory(3 * size);
        float *shares = memory.data(), *slopes = shares + size, *values = slopes + size;
#pragma omp for
        for (int64_t row = 0; row < rows; row++) {
            const float mean = means[row], inverse_std = inverse_stds[row];
            // 1. Recompute GELU, its slope and the normalized product x̂; sum dy and dy·x̂ over the row.
            float sum = 0.0f, along = 0.0f;
            for (int64_t group = 0; group < groups; group++) {
                const bf16 *l = linear + row * linear_row + group * linear_group, *g = gate + row * gate_row + group * width;
                const bf16* dy = grad + row * size + group * width;
                bf16* out = normalized + row * size + group * width;
                float *share = shares + group * width, *slope = slopes + group * width, *value = values + group * width;
#pragma omp simd reduction(+ : sum, along)
                for (int64_t i = 0; i < width; i++) {
                    float x = wide(g[i]);
                    Gelu activation = gelu(x);
                    share[i] = x * activation.share;
                    slope[i] = activation.slope;
                    value[i] = (wide(l[i]) * share[i] - mean) * inverse_std;
                    out[i] = narrow(value[i]);
                    sum += wide(dy[i]);
                    along += wide(dy[i]) * value[i];
                }
            }
            // 2. ∂v = inverse_std · (dy − mean(dy) − x̂ · mean(dy·x̂)), then the product rule for linear and gate.
            sum /= size;
            along /= size;
            for (int64_t group = 0; group < groups; group++) {
                const bf16 *l = linear + row * linear_row + group * linear_group, *dy = grad + row * size + group * width;
                bf16* dl = grad_linear + row * grad_linear_row + group * grad_linear_group;
                bf16* dg = grad_gate + row * grad_gate_row + group * width;
                float *share = shares + group * width, *slope = slopes + group * width, *value = values + group * width;
#pragma omp simd
                for (int64_t i = 0; i < width; i++) {
                    float product = inverse_std * (wide(dy[i]) - sum - value[i] * along);
                    dl[i] = narrow(product * share[i]);
                    dg[i] = narrow(product * wide(l[i]) * slope[i]);
                }
            }
        }
    }
}

}  // namespace

extern "C" void gated_norm(const bf16* linear, const bf16* gate, bf16* normalized, float* means, float* inverse_stds,
                           int64_t rows, int64_t groups, int64_t width, int64_t linear_row, int64_t linear_group,
                           int64_t gate_row, int64_t is_tanh, float eps) {
    (is_tanh ? forward<gelu_tanh> : forward<gelu_exact>)(linear, gate, normalized, means, inverse_stds, rows, groups,
                                                         width, linear_row, linear_group, gate_row, eps);
}

extern "C" void gated_norm_backward(const bf16* grad, const bf16* linear, const bf16* gate, const float* means,
                                    const float* inverse_stds, bf16* grad_linear, bf16* grad_gate, bf16* normalized,
                                    int64_t rows, int64_t groups, int64_t width, int64_t linear_row,
                                    int64_t linear_group, int64_t gate_row, int64_t grad_linear_row,
                                    int64_t grad_linear_group, int64_t grad_gate_row, int64_t is_tanh) {
    (is_tanh ? backward<gelu_tanh> : backward<gelu_exact>)(
        grad, linear, gate, means, inverse_stds, grad_linear, grad_gate, normalized, rows, groups, width, linear_row,
        linear_group, gate_row, grad_linear_row, grad_linear_group, grad_gate_row);
}
