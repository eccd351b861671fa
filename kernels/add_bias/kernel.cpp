// Sums over rows, in fp32; see __init__.py. Each thread takes whole columns, so the order of additions is always the same.

extern "C" void column_sums(const bf16* x, float* sums, int64_t rows, int64_t columns, int64_t stride) {
    constexpr int64_t BLOCK = 128;
#pragma omp parallel for
    for (int64_t first = 0; first < columns; first += BLOCK) {
        const int64_t count = std::min(BLOCK, columns - first);
        float sum[BLOCK] = {};
        for (int64_t row = 0; row < rows; row++) {
            const bf16* entries = x + row * stride + first;
#pragma omp simd
            for (int64_t i = 0; i < count; i++) sum[i] += wide(entries[i]);
        }
        std::copy(sum, sum + count, sums + first);
    }
}
