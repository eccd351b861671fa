// Loss, accuracy and gradient of rows of bf16 logits, in two passes over a cached row; see eager.py. And fp32
// accumulation of bf16 products.

// Inputs: logits [rows, classes] with `stride` elements between rows, labels [rows], segments [rows] with
// `segment_stride` elements between them, of each row the index of its scale, scales [S], bias [classes] or null.
// Outputs: gradient [rows, classes] of scale · (loss + z_loss_weight · z_loss), null if not needed, may be `logits`;
// losses, z_losses, corrects [rows]. Online softmax: each block of 512 classes is exponentiated relative to its own
// maximum while it is in the L1 cache; e^(block maximum − row maximum) is a factor of the block in the second pass.
extern "C" void cross_entropy_rows(const bf16* logits, const int64_t* labels, const int64_t* segments,
                                   const float* scales, const float* bias, bf16* gradient, float* losses,
                                   float* z_losses, int32_t* corrects, int64_t ignore_index, float z_loss_weight,
                                   int64_t rows, int64_t classes, int64_t stride, int64_t gradient_stride,
                                   int64_t segment_stride) {
    constexpr int64_t BLOCK = 512;  // 2 KB of fp32; bounds the length of fp32 sums
    const int64_t blocks = (classes + BLOCK - 1) / BLOCK;
    const std::vector<float> zeros(bias ? 0 : classes);
    if (!bias) bias = zeros.data();
#pragma omp parallel
    {
        std::vector<float> memory(classes), largest(blocks), sums(blocks);
        float* row = memory.data();
#pragma omp for
        for (int64_t index = 0; index < rows; index++) {
            const bf16* x = logits + index * stride;
            bf16* out = gradient ? gradient + index * gradient_stride : nullptr;
            const int64_t label = labels[index];
            // 1. Ignored row: zeros.
            if (label == ignore_index) {
                losses[index] = z_losses[index] = 0.0f;
                corrects[index] = 0;
                if (out) std::fill(out, out + classes, bf16{0});
                continue;
            }
            float own = 0.0f;  // the label's entry, kept out of the sums: beside it, small ones would be rounded away
            // 2. Block by block: widen, add the bias, find the maximum; exponentiate; sum all but the label.
            for (int64_t block = 0; block < blocks; block++) {
                const int64_t first = block * BLOCK, count = std::min(BLOCK, classes - first);
                float* entries = row + first;
                float most = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : most)
                for (int64_t i = 0; i < count; i++) {
                    const float value = wide(x[first + i]) + bias[first + i];
                    entries[i] = value;
                    most = most < value ? value : most;
                }
                largest[block] = most;
                const float shift = most == -INFINITY ? 0.0f : most;
#pragma omp simd
                for (int64_t i = 0; i < count; i++) entries[i] = exponential(entries[i] - shift);
                if (label / BLOCK == block) std::swap(own, row[label]);
#pragma omp simd reduction(+ : sum)
                for (int64_t i = 0; i < count; i++) sum += entries[i];
                sums[block] = sum;
            }
            // 3. The row's maximum; sums of the blocks relative to it, in fp64.
            const float most = *std::max_element(largest.begin(), largest.end());
            const float target = wide(x[label]) + bias[label] - most;  // ≤ 0; a confident row's small loss stays exact
            double others = 0.0;
            for (int64_t block = 0; block < blocks; block++) {
                largest[block] = exponential(largest[block] - most);
                others += static_cast<double>(sums[block]) * largest[block];
            }
            // 4. Correct if the label is the first maximum; by value, since −0 equals +0.
            bool is_first = target == 0.0f;
            for (int64_t i = 0; i < label && is_first; i++) is_first = wide(x[i]) + bias[i] != most;
            corrects[index] = is_first;
            // 5. Loss = log Σ − (x_label − maximum), by log1p where the label is the maximum; z-loss = logsumexp².
            const double own_share = static_cast<double>(own) * largest[label / BLOCK], sum = own_share + others;
            const double log_sum = target == 0.0f ? std::log1p(others) : std::log(sum), lse = most + log_sum;
            losses[index] = static_cast<float>(log_sum - target);
            z_losses[index] = static_cast<float>(lse * lse);
            if (!out) continue;
            // 6. Gradient: one factor per block; the label's entry from the sum of the others, without cancellation.
            const float scale = scales[segments[index * segment_stride]];
            const double of_z_loss = 2.0 * z_loss_weight * lse;
            const float factor = static_cast<float>(scale * (1.0 + of_z_loss) / sum);
            for (int64_t block = 0; block < blocks; block++) {
                const int64_t first = block * BLOCK, count = std::min(BLOCK, classes - first);
                const float of_block = factor * largest[block];
#pragma omp simd
                for (int64_t i = first; i < first + count; i++) out[i] = narrow(row[i] * of_block);
            }
            out[label] = narrow(static_cast<float>(scale * (own_share * of_z_loss - others) / sum));
        }
    }
}

// Adds product [size], bf16, to total [size], fp32; if is_first, overwrites total.
extern "C" void accumulate_product(float* total, const bf16* product, int64_t size, int64_t is_first) {
    constexpr int64_t BLOCK = 4096;
#pragma omp parallel for
    for (int64_t first = 0; first < size; first += BLOCK) {
        const int64_t last = std::min(size, first + BLOCK);
        if (is_first) {
#pragma omp simd
            for (int64_t i = first; i < last; i++) total[i] = wide(product[i]);
        } else {
#pragma omp simd
            for (int64_t i = first; i < last; i++) total[i] += wide(product[i]);
        }
    }
}
