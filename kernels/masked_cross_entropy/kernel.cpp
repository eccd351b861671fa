// Loss, accuracy and gradient of rows of logits, one pass over memory; see rows.py.

extern "C" void cross_entropy_rows(const bf16* logits, const int64_t* labels, bf16* gradient, const float* scale,
                                   float* losses, float* z_losses, int32_t* corrects, int64_t ignore_index,
                                   float z_loss_weight, int64_t rows, int64_t classes, int64_t stride,
                                   int64_t gradient_stride) {
#pragma omp parallel
    {
        std::vector<float> memory(classes);
        float* row = memory.data();
#pragma omp for
        for (int64_t index = 0; index < rows; index++) {
            const bf16* x = logits + index * stride;
            bf16* out = gradient ? gradient + index * gradient_stride : nullptr;
            const int64_t label = labels[index];
            if (label == ignore_index) {
                losses[index] = z_losses[index] = 0.0f;
                corrects[index] = 0;
                if (out) std::fill(out, out + classes, bf16{0});
                continue;
            }
            float most = -INFINITY;
#pragma omp simd reduction(max : most)
            for (int64_t i = 0; i < classes; i++) {
                float value = wide(x[i]);
                most = most < value ? value : most;
            }
            const float target = wide(x[label]) - most;  // counted from the largest: a small loss stays exact
            // the first of the largest is what the model says; they need not be the same bits, as zeros have a sign
            corrects[index] = target == 0.0f && std::none_of(x, x + label, [&](bf16 y) { return wide(y) == most; });
            double others = 0.0;  // without the label, beside which what a confident row has left would be lost
            for (int64_t first = 0; first < classes; first += 256) {  // few additions in fp32 one after another
                const int64_t last = std::min(classes, first + 256);
                float part = 0.0f;
#pragma omp simd reduction(+ : part)
                for (int64_t i = first; i < last; i++) {
                    row[i] = exponential(wide(x[i]) - most);
                    part += i == label ? 0.0f : row[i];
                }
                others += part;
            }
            const double own = row[label], sum = own + others;
            const double log_sum = target == 0.0f ? std::log1p(others) : std::log(sum), lse = most + log_sum;
            losses[index] = static_cast<float>(log_sum - target);
            z_losses[index] = static_cast<float>(lse * lse);
            if (!out) continue;
            const double of_z_loss = 2.0 * z_loss_weight * lse;
            const float factor = static_cast<float>(*scale * (1.0 + of_z_loss) / sum);
#pragma omp simd
            for (int64_t i = 0; i < classes; i++) out[i] = narrow(row[i] * factor);
            out[label] = narrow(static_cast<float>(*scale * (own * of_z_loss - others) / sum));
        }
    }
}
