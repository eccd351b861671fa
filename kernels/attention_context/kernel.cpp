// Softmax of content and position scores, with dropout, forward and backward; see eager.py.
//
// A row of scores [T] stays in the L1 cache from the sum of its three parts to its probabilities. β(i, j) depends on
// i − j alone: along a row, the keys of a bucket are contiguous, and near keys have one bucket each, in descending
// order. So gathering position scores, and summing their gradients, is a loop over such runs. Keys that a query cannot
// see are skipped.

namespace {

constexpr int64_t VECTOR = 16;  // lanes of the widest SIMD unit in fp32 (AVX-512)
// Elements after each scratch row: room for a vector that starts inside the row; and, where T is a power of two, a
// stride that spreads reads from one row per key over the cache's sets.
constexpr int64_t PADDING = 32;

// Contiguous keys that share a bucket, or that have one bucket each, in descending order.
struct Run {
    int64_t first, last;  // distances j − i, half-open
    int64_t bucket;       // of the first key
    bool descends;
};

// buckets [length, length] → the runs that tile distances 1 − length … length − 1.
std::vector<Run> runs_of(const int64_t* buckets, int64_t length) {
    std::vector<Run> runs;
    for (int64_t distance = 1 - length; distance < length; distance++) {
        const int64_t bucket = distance < 0 ? buckets[-distance * length] : buckets[distance];
        if (!runs.empty()) {
            Run& run = runs.back();
            const int64_t count = run.last - run.first;
            if (count == 1 && bucket == run.bucket - 1) run.descends = true;
            if (bucket == (run.descends ? run.bucket - count : run.bucket)) {
                run.last++;
                continue;
            }
        }
        runs.push_back({distance, distance + 1, bucket, false});
    }
    return runs;
}

struct Range {
    int64_t first, last;  // keys, half-open
};

// The smallest range, in multiples of `step`, outside which all entries are zero: a document is often shorter than a
// row. The steps used were fastest: larger ones compute more zeros, smaller ones mispredict more loop exits.
template <int64_t step, typename Entry>
Range nonzero(const Entry* entries, int64_t length) {
    int64_t first = 0, last = length;
    while (first < length && entries[first] == 0) first++;
    while (last > first && entries[last - 1] == 0) last--;
    return {first / step * step, std::min(length, (last + step - 1) / step * step)};
}

// Zero a row outside a range.
inline void clear_outside(bf16* row, const Range& range, int64_t length) {
    std::fill(row, row + range.first, bf16{0});
    std::fill(row + range.last, row + length, bf16{0});
}

// 32 random bits for an element's index, the same as in kernels/dropout/reference.py.
inline uint32_t random_word(uint32_t place, uint32_t seed, uint32_t second) {
    uint32_t word = place * 0x9E3779B1u + seed;
    word = ((word ^ (word >> 15)) * 0x2C1B3C6Du) ^ second;
    word = (word ^ (word >> 16)) * 0x85EBCA6Bu;
    word = (word ^ (word >> 13)) * 0xC2B2AE35u;
    return word ^ (word >> 16);
}

// Keeps an element if its random word, as int32, is ≥ limit; scale is 1/(1 − p).
struct Dropout {
    uint32_t seed, second;
    int32_t limit;
    float scale;

    Dropout(const int32_t* seeds, int64_t limit, float scale)
        : seed(seeds ? seeds[0] : 0), second(seeds ? seeds[1] : 0), limit(limit), scale(scale) {}

    // 0 or `scale`, for the element at an index
    inline float factor(uint32_t place) const {
        int32_t word = static_cast<int32_t>(random_word(place, seed, second));
        return scale * static_cast<float>(word >= limit);
    }
};

}  // namespace

// H = heads, B = batch, T = length, P = positions.
// Inputs: scores [H, B, T, T], by_query [H, B, T, P], by_key [H, P, B, T], buckets [T, T], mask [B, T, T], seeds [2] or
// null. Outputs: probabilities before dropout and after it (`dropped`), both [H, B, T, T]; without seeds `dropped` is
// left unwritten. Softmax in fp32; one thread per matrix [T, T].
extern "C" void attention_weights(const bf16* scores, const bf16* by_query, const bf16* by_key, const int64_t* buckets,
                                  const uint8_t* mask, const int32_t* seeds, int64_t limit, float scale,
                                  bf16* probabilities, bf16* dropped, int64_t heads, int64_t batch, int64_t length,
                                  int64_t positions) {
    const std::vector<Run> runs = runs_of(buckets, length);
    const int64_t stride = length + PADDING;
    const Dropout dropout(seeds, limit, scale);
    std::vector<Range> visible(batch * length);
#pragma omp parallel
    {
        std::vector<float> memory(stride);
        std::vector<bf16> memory_of_keys(positions * stride);
        float* row = memory.data();
        bf16* keys = memory_of_keys.data();
        // 1. Visible keys of each query, [B, T] ranges, shared by all heads.
#pragma omp for
        for (int64_t i = 0; i < batch * length; i++) visible[i] = nonzero<64>(mask + i * length, length);
#pragma omp for
        for (int64_t matrix = 0; matrix < heads * batch; matrix++) {
            const int64_t head = matrix / batch, in_batch = matrix % batch;
            // 2. Copy by_key's rows [P, T] of this matrix to the thread's scratch, [P, T + PADDING].
            for (int64_t p = 0; p < positions; p++)
                std::copy_n(by_key + ((head * positions + p) * batch + in_batch) * length, length, keys + p * stride);
            for (int64_t i = 0; i < length; i++) {
                const int64_t place = (matrix * length + i) * length;
                const bf16 *query = by_query + (matrix * length + i) * positions, *score = scores + place;
                const uint8_t* is_visible = mask + (in_batch * length + i) * length;
                const Range range = visible[in_batch * length + i];
                // 3. row[j] = by_query[β] + by_key[β, j], run by run.
                for (const Run& run : runs) {
                    const int64_t first = std::max(range.first, i + run.first), last = std::min(range.last, i + run.last);
                    if (first >= last) continue;
                    if (run.descends) {
                        for (int64_t j = first, bucket = run.bucket - (first - i - run.first); j < last; j++, bucket--)
                            row[j] = wide(query[bucket]) + wide(keys[bucket * stride + j]);
                        continue;
                    }
                    const float of_query = wide(query[run.bucket]);
                    const bf16* key = keys + run.bucket * stride;
                    // whole vectors: the next runs overwrite elements past the end
                    for (int64_t block = first; block < last; block += VECTOR) {
#pragma omp simd
                        for (int32_t lane = 0; lane < VECTOR; lane++)
                            row[block + lane] = of_query + wide(key[block + lane]);
                    }
                }
                // 4. Add the content score, mask, and take the row's maximum.
                float most = -3.0e38f, sum = 0.0f;
#pragma omp simd reduction(max : most)
                for (int64_t j = range.first; j < range.last; j++) {
                    float total = row[j] + wide(score[j]);
                    total = static_cast<float>(is_visible[j]) > 0.5f ? total : -3.0e38f;
                    row[j] = total;
                    most = most < total ? total : most;
                }
                // 5. Exponentials relative to the maximum, and their sum.
#pragma omp simd reduction(+ : sum)
                for (int64_t j = range.first; j < range.last; j++) {
                    float weight = exponential(row[j] - most) * static_cast<float>(is_visible[j]);
                    row[j] = weight;
                    sum += weight;
                }
                // 6. Normalize and round to bf16; a query that sees no key gets zeros.
                const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
                bf16* probability = probabilities + place;
                clear_outside(probability, range, length);
#pragma omp simd
                for (int64_t j = range.first; j < range.last; j++) probability[j] = narrow(row[j] * inverse);
                // 7. Dropout of the rounded probabilities.
                if (!seeds) continue;
                bf16* out = dropped + place;
                clear_outside(out, range, length);
#pragma omp simd
                for (int64_t j = range.first; j < range.last; j++)
                    out[j] = narrow(wide(probability[j]) * dropout.factor(static_cast<uint32_t>(place + j)));
            }
        }
    }
}

// Inputs: grad [H, B, T, T] of the probabilities after dropout, probabilities [H, B, T, T] before it; others as above.
// Outputs: grad_scores [H, B, T, T], grad_by_query [H, B, T, P], grad_by_key [H, P, B, T], and with seeds `dropped`
// [H, B, T, T], recomputed. With dP = grad · dropout factor: ∂score = P ⊙ (dP − Σ_j P·dP), in fp32.
extern "C" void attention_weights_backward(const bf16* grad, const bf16* probabilities, const int64_t* buckets,
                                           const int32_t* seeds, int64_t limit, float scale, bf16* grad_scores,
                                           bf16* grad_by_query, bf16* grad_by_key, bf16* dropped, int64_t heads,
                                           int64_t batch, int64_t length, int64_t positions) {
    const std::vector<Run> runs = runs_of(buckets, length);
    const int64_t stride = length + PADDING;
    const Dropout dropout(seeds, limit, scale);
#pragma omp parallel
    {
        std::vector<float> memory(stride + positions + positions * stride);
        float *row = memory.data(), *query = row + stride, *keys = query + positions;
#pragma omp for
        for (int64_t matrix = 0; matrix < heads * batch; matrix++) {
            std::fill(keys, keys + positions * stride, 0.0f);
            for (int64_t i = 0; i < length; i++) {
                const int64_t place = (matrix * length + i) * length;
                const bf16 *incoming = grad + place, *probability = probabilities + place;
                const Range range = nonzero<32>(probability, length);
                // 1. row[j] = P·dP, and its sum over j; with dropout, P after dropout is written again.
                float sum = 0.0f;
                if (seeds) {
                    bf16* out = dropped + place;
                    clear_outside(out, range, length);
#pragma omp simd reduction(+ : sum)
                    for (int64_t j = range.first; j < range.last; j++) {
                        float weight = wide(probability[j]) * dropout.factor(static_cast<uint32_t>(place + j));
                        out[j] = narrow(weight);
                        row[j] = weight * wide(incoming[j]);
                        sum += row[j];
                    }
                } else {
#pragma omp simd reduction(+ : sum)
                    for (int64_t j = range.first; j < range.last; j++) {
                        row[j] = wide(probability[j]) * wide(incoming[j]);
                        sum += row[j];
                    }
                }
                // 2. ∂score = P·dP − P·sum, in bf16 to memory, in fp32 for the sums below.
                bf16* outgoing = grad_scores + place;
                clear_outside(outgoing, range, length);
#pragma omp simd
                for (int64_t j = range.first; j < range.last; j++) {
                    row[j] -= wide(probability[j]) * sum;
                    outgoing[j] = narrow(row[j]);
                }
                // 3. Sum ∂score by bucket: over the keys into query [P], over the queries into keys [P, T].
                std::fill(query, query + positions, 0.0f);
                for (const Run& run : runs) {
                    const int64_t first = std::max(range.first, i + run.first), last = std::min(range.last, i + run.last);
                    if (first >= last) continue;
                    if (run.descends) {
                        const int64_t bucket = run.bucket - (first - i - run.first);
#pragma omp simd
                        for (int64_t d = 0; d < last - first; d++) query[bucket - d] += row[first + d];
                        for (int64_t d = 0; d < last - first; d++) keys[(bucket - d) * stride + first + d] += row[first + d];
                        continue;
                    }
                    float *key = keys + run.bucket * stride, sums[VECTOR] = {}, total = 0.0f;
                    // whole vectors here too: most runs are shorter than one, and remainder loops are slow
                    for (int64_t block = first; block < last; block += VECTOR) {
                        const int32_t left = static_cast<int32_t>(last - block);
#pragma omp simd
                        for (int32_t lane = 0; lane < VECTOR; lane++) {
                            float value = lane < left ? row[block + lane] : 0.0f;
                            sums[lane] += value;
                            key[block + lane] += value;
                        }
                    }
#pragma omp simd reduction(+ : total)
                    for (int32_t lane = 0; lane < VECTOR; lane++) total += sums[lane];
                    query[run.bucket] += total;
                }
                // 4. Write this query's sums.
                bf16* of_query = grad_by_query + (matrix * length + i) * positions;
#pragma omp simd
                for (int64_t p = 0; p < positions; p++) of_query[p] = narrow(query[p]);
            }
            // 5. Write the keys' sums over all queries of the matrix.
            const int64_t head = matrix / batch, in_batch = matrix % batch;
            for (int64_t p = 0; p < positions; p++) {
                bf16* of_key = grad_by_key + ((head * positions + p) * batch + in_batch) * length;
#pragma omp simd
                for (int64_t j = 0; j < length; j++) of_key[j] = narrow(keys[p * stride + j]);
            }
        }
    }
}
