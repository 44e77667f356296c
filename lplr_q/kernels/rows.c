/* Rows of a coded matrix into floats, and their products with a few activations; compiled at first
   use by lplr_q/native.py. The torch forms in lplr_q/codebooks give the same values. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 8

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4)));

/* ------------------------------------------------------------------ lattice codebooks (E8P) */

typedef struct {
    const uint16_t *first;   /* (m, blocks) codes of the first stage */
    const void *second;      /* (m, blocks) codes of the second, 16 or 8 bits, or NULL */
    int32_t second_bits;     /* 0, 8 or 16 */
    float rho;               /* the second stage's points are divided by it */
    const float *patterns;   /* (256, 8) magnitudes */
    const uint32_t *flips;   /* (256, 8) sign bits: 7 bits of the code, then the pattern's parity */
    const uint32_t *parity;  /* (256) 128 where the sign of coordinate 0 starts as minus, else 0 */
    const float *shorts;     /* (256, 8) points of an 8-bit second stage, or NULL */
    float scale;             /* all points are divided by it */
} Lattice;

static inline __attribute__((always_inline)) floats point(const Lattice *l, uint32_t code)
{
    const uint32_t pattern = code >> 8;
    const uint32_t sign = ((code >> 1) & 127) | l->parity[pattern];
    const words bits = *(const words *)(l->patterns + LANES * pattern)
                       ^ *(const words *)(l->flips + LANES * sign);
    const words shift = (words){0} + (0x3E800000u | code << 31); /* 1/4, sign from bit 0: no jump */
    return (floats)bits + (floats)shift;
}

/* exact: divided as torch divides; otherwise the caller divides the products by `scale`. */
static inline __attribute__((always_inline)) void lattice_row(
    const Lattice *l, int64_t row, int64_t blocks, const int exact, float *out)
{
    const uint16_t *first = l->first + row * blocks;
    const float inverse = 1.0f / l->rho;
    for (int64_t k = 0; k < blocks; k++) {
        floats value = point(l, first[k]);
        if (l->second_bits) {
            floats more;
            if (l->second_bits == 16) more = point(l, ((const uint16_t *)l->second)[row * blocks + k]);
            else more = *(const floats *)(l->shorts
                                          + LANES * ((const uint8_t *)l->second)[row * blocks + k]);
            value += exact ? more / l->rho : more * inverse;
        }
        *(floats *)(out + LANES * k) = exact ? value / l->scale : value;
    }
}

/* ------------------------------------------------------------------ trellis codebooks */

typedef struct {
    const uint8_t *packed;   /* k-bit symbols of all rows, first to last, lowest bit first */
    int64_t bytes;           /* of packed */
    const float *values;     /* 2^(span k): value by the last span symbols, oldest lowest */
    int32_t bits;            /* k */
    int32_t span;            /* symbols a state depends on */
    int32_t tall;            /* rows of a whole tile */
    int32_t wide;            /* columns of a tile */
    float scale;
} Trellis;

/* The symbols of one row of one tile; wide * k <= 32 bits. */
static inline uint64_t segment(const Trellis *t, int64_t row, int64_t block, int64_t blocks)
{
    const int64_t bit = (row * blocks + block) * t->wide * t->bits, byte = bit >> 3;
    uint64_t word = 0;
    if (byte + 8 <= t->bytes) memcpy(&word, t->packed + byte, 8);
    else memcpy(&word, t->packed + byte, (size_t)(t->bytes - byte));
    return (word >> (bit & 7)) & ((1ull << (t->wide * t->bits)) - 1);
}

/* Symbols before row `row` of every tile of this group of rows, newest highest. */
static void history(const Trellis *t, int64_t row, int64_t low, int64_t high, int64_t blocks,
                    uint64_t *past)
{
    const int need = (t->span - 1) * t->bits, step = t->wide * t->bits;
    for (int64_t k = 0; k < blocks; k++) {
        uint64_t word = 0;
        int have = 0;
        for (int64_t back = row; have < need; have += step) {
            back = back == low ? high - 1 : back - 1;
            word |= segment(t, back, k, blocks) << (64 - step) >> have;
        }
        past[k] = need ? word >> (64 - need) : 0;
    }
}

static inline void trellis_row(const Trellis *t, int64_t row, int64_t blocks, uint64_t *past,
                               float *out)
{
    const int k = t->bits, need = (t->span - 1) * k, step = t->wide * k;
    const uint64_t mask = (1ull << (need + k)) - 1, keep = (1ull << need) - 1;
    for (int64_t b = 0; b < blocks; b++) {
        const uint64_t word = past[b] | (segment(t, row, b, blocks) << need);
        for (int j = 0; j < t->wide; j++)
            out[b * t->wide + j] = t->values[(word >> (j * k)) & mask];
        past[b] = (word >> step) & keep;
    }
}

/* ------------------------------------------------------------------ entry points */

static inline __attribute__((always_inline)) float dot(const float *a, const float *b, int64_t n)
{
    floats s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
        s0 += *(const floats *)(a + i) * *(const floats *)(b + i);
        s1 += *(const floats *)(a + i + LANES) * *(const floats *)(b + i + LANES);
        s2 += *(const floats *)(a + i + 2 * LANES) * *(const floats *)(b + i + 2 * LANES);
        s3 += *(const floats *)(a + i + 3 * LANES) * *(const floats *)(b + i + 3 * LANES);
    }
    s0 = (s0 + s1) + (s2 + s3);
    float sum = 0;
    for (int j = 0; j < LANES; j++) sum += s0[j];
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* Rows low..high: into out (high - low, n) when x is NULL, else y (batch, m) = x (batch, n) W^T. */
int lattice_rows(const Lattice *l, int64_t blocks, int64_t m, int64_t low, int64_t high,
                 const float *x, int64_t batch, float *out)
{
    const int64_t n = LANES * blocks;
    float *row = x ? malloc((size_t)n * sizeof(float)) : NULL;
    if (x && !row) return 1;
    for (int64_t i = low; i < high; i++) {
        if (x) lattice_row(l, i, blocks, 0, row);
        else lattice_row(l, i, blocks, 1, out + (i - low) * n);
        for (int64_t b = 0; b < batch; b++) out[b * m + i] = dot(row, x + b * n, n) / l->scale;
    }
    free(row);
    return 0;
}

/* The same for a trellis; low is a multiple of the tiles' height. */
int trellis_rows(const Trellis *t, int64_t blocks, int64_t m, int64_t low, int64_t high,
                 const float *x, int64_t batch, float *out)
{
    const int64_t n = t->wide * blocks;
    float *row = malloc((size_t)n * sizeof(float));
    uint64_t *past = malloc((size_t)blocks * sizeof(uint64_t));
    if (!row || !past) {
        free(row);
        free(past);
        return 1;
    }
    for (int64_t i = low; i < high; i++) {
        const int64_t start = i - i % t->tall, end = start + t->tall < m ? start + t->tall : m;
        if (i == start) history(t, i, start, end, blocks, past);
        trellis_row(t, i, blocks, past, row);
        if (!x)
            for (int64_t j = 0; j < n; j++) out[(i - low) * n + j] = row[j] / t->scale;
        for (int64_t b = 0; b < batch; b++) out[b * m + i] = dot(row, x + b * n, n) / t->scale;
    }
    free(row);
    free(past);
    return 0;
}
