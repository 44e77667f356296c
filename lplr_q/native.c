/* Kernels of the encoders, compiled at first use by lplr_q/native.py; the torch forms give the same
   codes. Compile with -ffp-contract=off: sums and products are rounded as torch rounds them. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 8 /* sequences worked on side by side: one SIMD register of floats */

#define ALONE 5 /* so many left-over sequences are searched one by one */

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint8_t bytes __attribute__((vector_size(LANES), aligned(1)));

/* ------------------------------------------------------------------ bitshift trellis (L, k) */

/* Best path through `length` samples of LANES sequences; see lplr_q/codebooks/trellis.py.
   x (length, LANES); overlap: the low L-k bits before the first and after the last symbol of each
   lane, or NULL for free ends; path receives the states from position `stop` on, (length, LANES).
   metric, updated: (2^L, LANES); chosen: (length, 2^(L-k), LANES). */
static inline __attribute__((always_inline)) void best_path(
    const float *x, int64_t length, const float *table, int window, const int bits,
    const int32_t *overlap, int64_t stop, float *metric, float *updated, uint8_t *chosen,
    int32_t *path)
{
    const int64_t branches = 1 << bits, low = (int64_t)1 << (window - bits);
    for (int64_t t = 0; t < length; t++) {
        const floats sample = *(const floats *)(x + t * LANES);
        for (int64_t p = 0; p < low; p++) {
            floats best;
            if (t) {
                ints first = {0};
                best = *(const floats *)(metric + p * LANES);
                for (int32_t a = 1; a < branches; a++) {
                    const floats other = *(const floats *)(metric + (a * low + p) * LANES);
                    const ints nearer = other < best;
                    first = (nearer & a) | (~nearer & first);
                    best = (floats)((nearer & (ints)other) | (~nearer & (ints)best));
                }
                *(bytes *)(chosen + (t * low + p) * LANES) = __builtin_convertvector(first, bytes);
            } else {
                for (int i = 0; i < LANES; i++)
                    best[i] = overlap && overlap[i] != p ? __builtin_inff() : 0.0f;
            }
            for (int64_t b = 0; b < branches; b++) {
                const floats off = sample - table[p * branches + b];
                *(floats *)(updated + (p * branches + b) * LANES) = off * off + best;
            }
        }
        float *swap = metric;
        metric = updated;
        updated = swap;
    }
    for (int i = 0; i < LANES; i++) {
        const int64_t step = overlap ? low : 1;
        int64_t state = overlap ? overlap[i] : 0;
        for (int64_t s = state + step; s < low * branches; s += step)
            if (metric[s * LANES + i] < metric[state * LANES + i]) state = s;
        for (int64_t t = length - 1;; t--) {
            path[t * LANES + i] = (int32_t)state;
            if (t == stop) break;
            const int64_t p = state >> bits;
            state = chosen[(t * low + p) * LANES + i] * low + p;
        }
    }
}

/* The same for one sequence, SIMD over states: state p 2^k + b is stored at (b, p), so that the
   predecessors (b, a, rest) of all p = (rest, b) lie side by side. Needs 2^(L-2k) >= LANES.
   values: the table as (b, p); metric: 2^L; least, best: 2^(L-k). */
static inline __attribute__((always_inline)) void best_single_path(
    const float *x, int64_t length, const float *values, int window, const int bits,
    int32_t overlap, int64_t stop, float *metric, float *least, float *best, uint8_t *chosen,
    int32_t *path)
{
    const int64_t branches = 1 << bits, low = (int64_t)1 << (window - bits), rest = low >> bits;
    for (int64_t p = 0; p < low; p++) best[p] = overlap < 0 || overlap == p ? 0 : __builtin_inff();
    for (int64_t t = 0; t < length; t++) {
        if (t) {
            for (int64_t b = 0; b < branches; b++)
                for (int64_t r = 0; r < rest; r += LANES) {
                    const float *from = metric + b * low + r;
                    ints first = {0};
                    floats nearest = *(const floats *)from;
                    for (int32_t a = 1; a < branches; a++) {
                        const floats other = *(const floats *)(from + a * rest);
                        const ints nearer = other < nearest;
                        first = (nearer & a) | (~nearer & first);
                        nearest = (floats)((nearer & (ints)other) | (~nearer & (ints)nearest));
                    }
                    *(floats *)(least + b * rest + r) = nearest;
                    *(bytes *)(chosen + t * low + b * rest + r) =
                        __builtin_convertvector(first, bytes);
                }
            for (int64_t r = 0; r < rest; r++)
                for (int64_t b = 0; b < branches; b++) best[r * branches + b] = least[b * rest + r];
        }
        const float sample = x[t];
        for (int64_t b = 0; b < branches; b++)
            for (int64_t p = 0; p < low; p += LANES) {
                const floats off = sample - *(const floats *)(values + b * low + p);
                *(floats *)(metric + b * low + p) = off * off + *(const floats *)(best + p);
            }
    }
    const int64_t step = overlap < 0 ? 1 : low;
    int64_t state = overlap < 0 ? 0 : overlap;
    float found = metric[(state & (branches - 1)) * low + (state >> bits)];
    for (int64_t s = state + step; s < low * branches; s += step) {
        const float here = metric[(s & (branches - 1)) * low + (s >> bits)];
        if (here < found) found = here, state = s;
    }
    for (int64_t t = length - 1;; t--) {
        path[t] = (int32_t)state;
        if (t == stop) break;
        const int64_t p = state >> bits;
        state = chosen[t * low + (p & (branches - 1)) * rest + (p >> bits)] * low + p;
    }
}

/* Symbols of closed paths near each of `count` sequences, in two passes. Returns 0, or 1 when there
   is no memory. x, symbols: (count, length). */
static inline __attribute__((always_inline)) int closed_paths(
    const float *x, int64_t count, int64_t length, const float *table, int window, const int bits,
    uint8_t *symbols)
{
    const int64_t states = (int64_t)1 << window, low = states >> bits, half = length / 2;
    float *metric = malloc(2 * states * LANES * sizeof(float));
    float *samples = malloc(2 * length * LANES * sizeof(float));
    uint8_t *chosen = malloc(length * low * LANES);
    int32_t *path = malloc(length * LANES * sizeof(int32_t));
    const int missing = !metric || !samples || !chosen || !path;
    float *turned = samples + length * LANES;
    int64_t first = 0;
    for (; first < count && !missing; first += LANES) {
        if (count - first <= ALONE && low >> bits >= LANES) break;
        const int64_t lanes = count - first < LANES ? count - first : LANES;
        for (int64_t t = 0; t < length; t++)
            for (int i = 0; i < LANES; i++) { /* idle lanes repeat the last sequence */
                const int64_t row = first + (i < lanes ? i : lanes - 1);
                samples[t * LANES + i] = x[row * length + t];
                turned[t * LANES + i] = x[row * length + (t + half) % length];
            }
        const int64_t middle = length - half - 1;
        int32_t overlap[LANES];
        best_path(turned, length, table, window, bits, NULL, middle, metric,
                  metric + states * LANES, chosen, path);
        for (int i = 0; i < LANES; i++) overlap[i] = path[middle * LANES + i] & (int32_t)(low - 1);
        best_path(samples, length, table, window, bits, overlap, 0, metric,
                  metric + states * LANES, chosen, path);
        for (int64_t i = 0; i < lanes; i++)
            for (int64_t t = 0; t < length; t++)
                symbols[(first + i) * length + t] =
                    (uint8_t)(path[t * LANES + i] & ((1 << bits) - 1));
    }
    float *values = metric + states, *least = metric + 2 * states, *best = least + low;
    if (first < count && !missing) /* few are left: one by one */
        for (int64_t s = 0; s < states; s++)
            values[(s & ((1 << bits) - 1)) * low + (s >> bits)] = table[s];
    for (; first < count && !missing; first++) {
        const int64_t middle = length - half - 1;
        for (int64_t t = 0; t < length; t++) turned[t] = x[first * length + (t + half) % length];
        best_single_path(turned, length, values, window, bits, -1, middle, metric, least, best,
                         chosen, path);
        best_single_path(x + first * length, length, values, window, bits,
                         path[middle] & (int32_t)(low - 1), 0, metric, least, best, chosen, path);
        for (int64_t t = 0; t < length; t++)
            symbols[first * length + t] = (uint8_t)(path[t] & ((1 << bits) - 1));
    }
    free(metric);
    free(samples);
    free(chosen);
    free(path);
    return missing;
}

int trellis_circles(const float *x, int64_t count, int64_t length, const float *table, int window,
                    int bits, uint8_t *symbols)
{
    switch (bits) { /* constants let the compiler unroll the branches */
    case 1: return closed_paths(x, count, length, table, window, 1, symbols);
    case 2: return closed_paths(x, count, length, table, window, 2, symbols);
    case 3: return closed_paths(x, count, length, table, window, 3, symbols);
    case 4: return closed_paths(x, count, length, table, window, 4, symbols);
    default: return 2;
    }
}

/* Values of the states of closed paths: codes and points (m, blocks, columns), tiles of `rows` rows.
   state: room for `blocks` integers. */
void trellis_points(const int64_t *codes, int64_t m, int64_t blocks, int64_t columns, int64_t rows,
                    const float *table, int window, int bits, int32_t *state, float *points)
{
    const int32_t mask = (int32_t)(((int64_t)1 << window) - 1);
    const int64_t width = blocks * columns;
    const int64_t warm = (window + bits * columns - 1) / (bits * columns); /* rows in a state */
    for (int64_t low = 0; low < m; low += rows) {
        const int64_t height = m - low < rows ? m - low : rows;
        for (int64_t b = 0; b < blocks; b++) state[b] = 0;
        for (int64_t step = -warm; step < height; step++) {
            const int64_t row = low + ((step % height) + height) % height;
            const int64_t *read = codes + row * width;
            float *write = points + row * width;
            for (int64_t b = 0; b < blocks; b++) {
                int32_t s = state[b];
                for (int64_t j = 0; j < columns; j++) {
                    s = (int32_t)(((uint32_t)s << bits) | (uint32_t)read[b * columns + j]) & mask;
                    if (step >= 0) write[b * columns + j] = table[s];
                }
                state[b] = s;
            }
        }
    }
}

/* ------------------------------------------------------------------------------------ E8P */

/* Nearest signed pattern to y: maximises 2 |y|.s - |s|^2, minus 4 min |y_i| s_i where the signs of y
   make the coordinate sum odd and that coordinate has to be flipped. The 227 patterns of norm 2 to
   10 are the permutations of seven: 3/2 at the k = 0 .. 4 largest |y_i| and 1/2 elsewhere, 5/2 at
   the largest, 5/2 and 3/2 at the two largest. The 29 others are scored where the best score that
   any of them could have is higher. Returns the index; point receives the signed pattern. */
static int32_t e8p_search(const float *y, const float *patterns, const int16_t *lookup,
                          float *point)
{
    float a[8], left[8], top[4], total = 0, least = __builtin_inff();
    int place[4], odd = 0;
    for (int i = 0; i < 8; i++) {
        a[i] = left[i] = __builtin_fabsf(y[i]);
        total += a[i];
        least = a[i] < least ? a[i] : least;
        odd ^= y[i] < 0;
    }
    for (int k = 0; k < 4; k++) {
        int best = 0;
        for (int i = 1; i < 8; i++) best = left[i] > left[best] ? i : best;
        place[k] = best, top[k] = left[best], left[best] = -1;
    }
    /* sums of s: 4 + k, 6, 7; with an odd number of negative signs an even one is wrong */
    const float even = odd ? 2 * least : 0, uneven = odd ? 0 : 2 * least;
    const float best_of[7] = {
        total - 2 - even,
        total + 2 * top[0] - 4 - uneven,
        total + 2 * (top[0] + top[1]) - 6 - even,
        total + 2 * (top[0] + top[1] + top[2]) - 8 - uneven,
        total + 2 * (top[0] + top[1] + top[2] + top[3]) - 10 - even,
        total + 4 * top[0] - 8 - even,
        total + 4 * top[0] + 2 * top[1] - 10 - uneven,
    };
    int kind = 0;
    for (int c = 1; c < 7; c++) kind = best_of[c] > best_of[kind] ? c : kind;
    float magnitude[8], best = best_of[kind], bottom = 0;
    for (int i = 0; i < 8; i++) magnitude[i] = 0.5f;
    for (int k = 0; k < (kind < 5 ? kind : kind - 4); k++) magnitude[place[k]] = 1.5f;
    if (kind > 4) magnitude[place[0]] = 2.5f;

    float low[3] = {__builtin_inff(), __builtin_inff(), __builtin_inff()}; /* three smallest */
    for (int i = 0; i < 8; i++) {
        float value = a[i];
        for (int k = 0; k < 3; k++) {
            const float larger = value > low[k] ? value : low[k];
            low[k] = value < low[k] ? value : low[k];
            value = larger;
        }
    }
    bottom = low[0] + low[1] + low[2];
    if (3 * total - 2 * bottom - 12 > best)
        for (int s = 227; s < 256; s++) { /* the sum of these is 9 */
            float score = -12, cheapest = __builtin_inff();
            for (int i = 0; i < 8; i++) {
                const float product = a[i] * patterns[8 * s + i];
                score += 2 * product;
                cheapest = product < cheapest ? product : cheapest;
            }
            if (!odd) score -= 4 * cheapest;
            if (score > best) {
                best = score;
                memcpy(magnitude, patterns + 8 * s, sizeof magnitude);
            }
        }
    float sum = 0, cheapest = __builtin_inff();
    int flipped = 0, key = 0, power = 1;
    for (int i = 0; i < 8; i++) {
        const float cost = a[i] * magnitude[i];
        sum += magnitude[i];
        if (cost < cheapest) cheapest = cost, flipped = i;
        point[i] = __builtin_signbit(y[i]) ? -magnitude[i] : magnitude[i];
        key += power * (magnitude[i] < 1 ? 0 : magnitude[i] < 2 ? 1 : 2);
        power *= 3;
    }
    if (((int)sum ^ odd) & 1) point[flipped] = -point[flipped];
    return lookup[key];
}

/* Codes of the nearest E8P points of `count` vectors, as lplr_q/codebooks/e8p.py finds them.
   lookup: index of the pattern with magnitudes 1/2 + d_i, at sum d_i 3^i, or -1. */
void e8p_encode(const float *x, int64_t count, const float *patterns, const int16_t *lookup,
                int64_t *codes)
{
    for (int64_t n = 0; n < count; n++) {
        float y[2][8], point[2][8], distance[2];
        int32_t pattern[2];
        for (int side = 0; side < 2; side++) {
            float sum = 0, largest = -1;
            int place = 0, key = 0, power = 1, inside = 1;
            for (int i = 0; i < 8; i++) {
                y[side][i] = x[8 * n + i] - (side ? -0.25f : 0.25f);
                point[side][i] = __builtin_floorf(y[side][i]) + 0.5f;
                const float off = __builtin_fabsf(y[side][i] - point[side][i]);
                sum += point[side][i];
                if (off > largest) largest = off, place = i;
            }
            if (sum - 2 * __builtin_floorf(sum / 2) != 0) /* odd: the other neighbour, there */
                point[side][place] += y[side][place] - point[side][place] < 0 ? -1.0f : 1.0f;
            distance[side] = 0;
            for (int i = 0; i < 8; i++) {
                const float off = y[side][i] - point[side][i];
                const float magnitude = __builtin_fabsf(point[side][i]);
                distance[side] += off * off;
                inside &= magnitude < 3;
                key += power * (magnitude < 1 ? 0 : magnitude < 2 ? 1 : 2);
                power *= 3;
            }
            pattern[side] = inside ? lookup[key] : -1;
        }
        const int missing[2] = {pattern[0] < 0, pattern[1] < 0};
        float offered[2];
        for (int side = 0; side < 2; side++)
            offered[side] = missing[side] ? __builtin_inff() : distance[side];
        const float known[2] = {offered[1], offered[0]}; /* what the other side offers */
        for (int side = 0; side < 2; side++)
            if (missing[side] && distance[side] < known[side]) {
                pattern[side] = e8p_search(y[side], patterns, lookup, point[side]);
                offered[side] = 0;
                for (int i = 0; i < 8; i++) {
                    const float off = y[side][i] - point[side][i];
                    offered[side] += off * off;
                }
            }
        const int second = offered[1] < offered[0];
        int64_t code = ((int64_t)pattern[second] << 8) + second;
        for (int i = 1; i < 8; i++) code += (int64_t)(point[second][i] < 0) << i;
        codes[n] = code;
    }
}
