// The gradient of a bias: column sums of a bf16 matrix in fp32; see reference.py.
//
// Each thread owns whole columns and adds rows in order, so the result does not depend on the number of threads.

// x [rows, columns] with `stride` elements between rows → sums [columns]

extern "C" void column_sums(const bf16* x, float* sums, int64_t rows, int64_t columns, int64_t stride) {
    constexpr int64_t BLOCK = 128;
    // 1. One block of 128 columns per iteration; its sums (512 bytes) stay in the L1 cache.
#pragma omp parallel for
    for (int64_t first = 0; first < columns; first += BLOCK) {
        const int64_t count = std::min(BLOCK, columns - first);
        float sum[BLOCK] = {};
        // 2. Add the block's part of every row: 256 contiguous bytes.
        for (int64_t row = 0; row < rows; row++) {
            const bf16* entries = x + row * stride + first;
#pragma omp simd
            for (int64_t i = 0; i < count; i++) sum[i] += wide(entries[i]);
        }
        // 3. Write the block's sums once.
        std::copy(sum, sum + count, sums + first);
    }
}
