// LAMB for unsharded fp32 tensors; see reference.py.
//
// Two passes per tensor, moments then update, back to back so that the second reads mostly from the cache. Sums are
// fp64 per chunk and added in chunk order: results do not depend on the number of threads.

namespace {

constexpr int64_t CHUNK = 8192;  // elements per partial sum, 32 KB of fp32

inline int64_t chunks_of(int64_t size) { return (size + CHUNK - 1) / CHUNK; }

// Adam's update with decoupled decay; first = 1/(1 − β1ᵗ) and second = 1/(1 − β2ᵗ) correct the moments' bias.
inline float update_of(float param, float exp_avg, float exp_avg_sq, float first, float second, float eps, float decay) {
    return exp_avg * first / (std::sqrt(exp_avg_sq * second) + eps) + decay * param;
}

}  // namespace

// grads: `count` tensors of `sizes` elements → norm[0] = √Σ gradients², over all of them.
extern "C" void lamb_gradient_norm(const float* const* grads, const int64_t* sizes, double* norm, int64_t count) {
    // 1. One flat list of chunks over all tensors, so that threads share the work evenly.
    std::vector<std::pair<int64_t, int64_t>> places;  // tensor and first element of each chunk
    for (int64_t tensor = 0; tensor < count; tensor++)
        for (int64_t first = 0; first < sizes[tensor]; first += CHUNK) places.emplace_back(tensor, first);
    const int64_t chunks = static_cast<int64_t>(places.size());
    std::vector<double> sums(chunks);
#pragma omp parallel for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        // 2. Sum of squares of a chunk, in fp64.
        const auto [tensor, first] = places[chunk];
        const int64_t last = std::min(sizes[tensor], first + CHUNK);
        const float* grad = grads[tensor];
        double sum = 0.0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = first; i < last; i++) sum += static_cast<double>(grad[i]) * static_cast<double>(grad[i]);
        sums[chunk] = sum;
    }
    // 3. Add the chunks' sums in order.
    norm[0] = 0.0;
    for (double sum : sums) norm[0] += sum;
    norm[0] = std::sqrt(norm[0]);
}

// Updates params, exp_avgs, exp_avg_sqs, averages (or null) and steps in place; each is a list of `count` tensors of
// `sizes` elements. decays [count]; settings [6]: clip, lr, beta1, beta2, eps, average_decay.
extern "C" void lamb_whole(float* const* params, const float* const* grads, float* const* exp_avgs,
                           float* const* exp_avg_sqs, float* const* steps, float* const* averages,
                           const int64_t* sizes, const double* decays, const double* settings, int64_t count) {
    const double lr = settings[1], beta1 = settings[2], beta2 = settings[3];
    const float clip = static_cast<float>(settings[0]), beta1_rest = static_cast<float>(1.0 - beta1);
    const float kept = static_cast<float>(beta2), beta2_rest = static_cast<float>(1.0 - beta2);
    const float eps = static_cast<float>(settings[4]), average_rest = static_cast<float>(1.0 - settings[5]);
    // 1. Offsets of each tensor's partial sums; advance the step counts.
    std::vector<int64_t> first_sums(count + 1, 0);
    for (int64_t tensor = 0; tensor < count; tensor++) {
        first_sums[tensor + 1] = first_sums[tensor] + chunks_of(sizes[tensor]);
        *steps[tensor] += 1.0f;
    }
    std::vector<double> param_sums(first_sums[count]), update_sums(first_sums[count]);
#pragma omp parallel
    for (int64_t tensor = 0; tensor < count; tensor++) {
        const int64_t size = sizes[tensor], chunks = chunks_of(size);
        float *param = params[tensor], *exp_avg = exp_avgs[tensor], *exp_avg_sq = exp_avg_sqs[tensor];
        const float *grad = grads[tensor], decay = static_cast<float>(decays[tensor]);
        // 2. Bias corrections of this tensor's step.
        const double age = *steps[tensor];
        const float first_factor = static_cast<float>(1.0 / (1.0 - std::pow(beta1, age)));
        const float second_factor = static_cast<float>(1.0 / (1.0 - std::pow(beta2, age)));
        double* sums[] = {param_sums.data() + first_sums[tensor], update_sums.data() + first_sums[tensor]};
#pragma omp for schedule(static)
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            // 3. First pass: new moments, and the chunk's ‖p‖² and ‖u‖².
            const int64_t first = chunk * CHUNK, last = std::min(size, first + CHUNK);
            double of_param = 0.0, of_update = 0.0;
#pragma omp simd reduction(+ : of_param, of_update)
            for (int64_t i = first; i < last; i++) {
                const float g = grad[i] * clip, m = exp_avg[i] + beta1_rest * (g - exp_avg[i]);
                const float v = kept * exp_avg_sq[i] + beta2_rest * g * g, p = param[i];
                exp_avg[i] = m;
                exp_avg_sq[i] = v;
                const float update = update_of(p, m, v, first_factor, second_factor, eps, decay);
                of_param += static_cast<double>(p) * static_cast<double>(p);
                of_update += static_cast<double>(update) * static_cast<double>(update);
            }
            sums[0][chunk] = of_param;
            sums[1][chunk] = of_update;
        }  // implicit barrier: all sums are complete
        // 4. Every thread adds the sums and gets the same trust ratio, ‖p‖/‖u‖ or 1.
        double norms[] = {0.0, 0.0};
        for (int64_t chunk = 0; chunk < chunks; chunk++)
            for (int64_t which = 0; which < 2; which++) norms[which] += sums[which][chunk];
        const bool is_scaled = decays[tensor] != 0.0 && norms[0] > 0.0 && norms[1] > 0.0;
        const float step = static_cast<float>(lr * (is_scaled ? std::sqrt(norms[0] / norms[1]) : 1.0));
        float* average = averages ? averages[tensor] : nullptr;
#pragma omp for schedule(static) nowait
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            // 5. Second pass: the update again from the new moments, the parameter, and its moving average.
            const int64_t first = chunk * CHUNK, last = std::min(size, first + CHUNK);
#pragma omp simd
            for (int64_t i = first; i < last; i++)
                param[i] -= step * update_of(param[i], exp_avg[i], exp_avg_sq[i], first_factor, second_factor, eps, decay);
            if (!average) continue;
#pragma omp simd
            for (int64_t i = first; i < last; i++) average[i] += average_rest * (param[i] - average[i]);
        }
    }
}
