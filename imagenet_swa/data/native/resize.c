#ifndef LANES

/* Pillow's antialiased resize (Image.resize with BILINEAR or BICUBIC), with crop, mirror and normalisation in one pass.
 *
 * The same integers as Pillow's libImaging/Resample.c: weights in double, rounded to 22 bits; the horizontal pass first,
 * rounded and clamped to bytes; then the vertical one. Sums are taken modulo 2^32, in which the true ones fit, so that
 * their order, and with it the processor's vector width, does not matter. Only what lies under the crop is computed.
 *
 * The passes stand at the end. The file includes itself to compile them for vectors of 8 and of 16 words.
 */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && !defined(RESIZE_NO_CLONES)
#define CLONES
#endif

#define PRECISION 22
#define HALF (1u << (PRECISION - 1))
#define PREFETCHED 4 /* rows before their turn are fetched into the cache: decoded images lie in memory */
#define MOST_ROWS 4 /* input rows that the horizontal pass takes at a time, with 16 lanes */
#define MOST_BLOCK 48 /* words of the vertical pass that are summed in registers, with 16 lanes */
#define MANY_TAPS 4096 /* beside so many, the rounding of the weights could add up to a grey level */

enum { BILINEAR = 0, BICUBIC = 1 };
enum { DONE = 0, NO_MEMORY = 1, BAD_GEOMETRY = 2 };

typedef float float4 __attribute__((vector_size(16), may_alias));
typedef int32_t signed4 __attribute__((vector_size(16), may_alias));

/* Output i sums `num_taps` inputs from first[i] on, of which the last may lie past the end with weight 0. */
typedef struct {
    int64_t num_taps;
    int64_t low, high; /* the inputs that any output needs */
    int64_t *first;
    int32_t *weights; /* (outputs, num_taps) */
} Axis;

/* ------------------------------------------------------------------------------------------------------- weights */

static double filter_value(int filter, double x) {
    const double a = -0.5;
    if (x < 0.0) x = -x;
    if (filter == BILINEAR) return x < 1.0 ? 1.0 - x : 0.0;
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
    return x < 2.0 ? (((x - 5.0) * x + 8.0) * x - 4.0) * a : 0.0;
}

static double filter_support(int filter, int64_t size, int64_t resized) {
    double scale = (double)size / (double)resized;
    return (filter == BILINEAR ? 1.0 : 2.0) * (scale < 1.0 ? 1.0 : scale);
}

static int64_t most_taps(int filter, int64_t size, int64_t resized) {
    double support = filter_support(filter, size, resized);
    int64_t whole = (int64_t)support;
    return (whole + ((double)whole < support)) * 2 + 1;
}

/* One output's weights, as Pillow's precompute_coeffs and normalize_coeffs_8bpc; returns how many, zeros at the end left out. */
static int64_t weigh(int filter, int64_t size, int64_t resized, int64_t output, int64_t *first, double *exact, int32_t *rounded) {
    double scale = (double)size / (double)resized;
    double support = filter_support(filter, size, resized);
    double per_pixel = 1.0 / (scale < 1.0 ? 1.0 : scale);
    double centre = ((double)output + 0.5) * scale;
    int64_t low = (int64_t)(centre - support + 0.5);
    int64_t high = (int64_t)(centre + support + 0.5);
    if (low < 0) low = 0;
    if (high > size) high = size;
    int64_t count = high - low;
    double sum = 0.0;
    for (int64_t k = 0; k < count; k++) {
        exact[k] = filter_value(filter, ((double)(k + low) - centre + 0.5) * per_pixel);
        sum += exact[k];
    }
    for (int64_t k = 0; k < count; k++) {
        double weight = (sum != 0.0 ? exact[k] / sum : exact[k]) * (double)(1 << PRECISION);
        rounded[k] = (int32_t)(weight + (weight < 0.0 ? -0.5 : 0.5));
    }
    while (count > 1 && rounded[count - 1] == 0) count--;
    *first = low; /* with any zeros there: the vertical pass relies on its not going back */
    return count;
}

/* The weights of outputs offset .. offset + num_outputs - 1, in mirrored order if asked. */
static void weigh_axis(
    Axis *axis, int filter, int64_t size, int64_t resized, int64_t offset, int64_t num_outputs, int mirrored, double *exact
) {
    int64_t room = most_taps(filter, size, resized);
    axis->num_taps = 1;
    axis->low = size;
    axis->high = 0;
    for (int64_t i = 0; i < num_outputs; i++) {
        int64_t to = mirrored ? num_outputs - 1 - i : i;
        int32_t *weights = axis->weights + to * room;
        int64_t count = weigh(filter, size, resized, offset + i, &axis->first[to], exact, weights);
        memset(weights + count, 0, (size_t)(room - count) * sizeof *weights);
        if (count > axis->num_taps) axis->num_taps = count;
        if (axis->first[to] < axis->low) axis->low = axis->first[to];
        if (axis->first[to] + count > axis->high) axis->high = axis->first[to] + count;
    }
    for (int64_t i = 1; i < num_outputs; i++) /* close up */
        memmove(axis->weights + i * axis->num_taps, axis->weights + i * room, (size_t)axis->num_taps * sizeof *axis->weights);
}

/* ------------------------------------------------------------------------------------------------------- images */

typedef struct {
    Axis across, down;
    int overshoots;        /* whether sums can leave 0..255 */
    double *exact;         /* weights of one output */
    uint32_t *pixels;      /* the input rows that the horizontal pass takes, interleaved */
    uint32_t *ring;        /* input rows after that pass, as many as an output row needs and those taken with the last */
    const uint32_t **rows; /* those that the next output row needs */
    uint32_t *row;         /* one output row */
    float *scale, *bias;   /* for one output row, NULL if bytes are wanted */
    int64_t row_size;      /* words of a row in `ring` and `row` */
} Scratch;

/* Four floats to where the caller looks at them much later: past the cache, which would read the memory first. */
INLINE void store_past_cache(float *to, float4 value) {
#ifdef __SSE2__
    _mm_stream_ps(to, (__m128)value);
#else
    memcpy(to, &value, sizeof value);
#endif
}

INLINE void store_floats(const uint32_t *row, const float *scale, const float *bias, int64_t num_words, float *to) {
    int64_t i = 0;
    for (; i < num_words && (uintptr_t)(to + i) % sizeof(float4) != 0; i++) to[i] = (float)(int32_t)row[i] * scale[i] + bias[i];
    for (; i + 4 <= num_words; i += 4) {
        signed4 grey;
        float4 factor, summand;
        memcpy(&grey, row + i, sizeof grey);
        memcpy(&factor, scale + i, sizeof factor);
        memcpy(&summand, bias + i, sizeof summand);
        store_past_cache(to + i, __builtin_convertvector(grey, float4) * factor + summand);
    }
    for (; i < num_words; i++) to[i] = (float)(int32_t)row[i] * scale[i] + bias[i];
}

INLINE void store_bytes(const uint32_t *restrict row, int64_t num_words, uint8_t *restrict to) {
    for (int64_t i = 0; i < num_words; i++) to[i] = (uint8_t)row[i];
}

#define JOIN(name, lanes) name##lanes
#define WITH(name, lanes) JOIN(name, lanes)
#define words WITH(words, LANES)
#define signed_words WITH(signed_words, LANES)
#define to_grey WITH(to_grey, LANES)
#define widen_rows WITH(widen_rows, LANES)
#define sum_pixels WITH(sum_pixels, LANES)
#define horizontal_pass WITH(horizontal_pass, LANES)
#define vertical_pass WITH(vertical_pass, LANES)
#define fill_ring WITH(fill_ring, LANES)
#define resize_rows WITH(resize_rows, LANES)
#define resize_image WITH(resize_image, LANES)

#ifdef CLONES
#define TARGET __attribute__((target("avx512f")))
#define LANES 16
#include "resize.c"
#undef LANES
#undef TARGET
/* The loader of glibc picks the clone that the processor can run. */
#define TARGET __attribute__((target_clones("avx2", "default")))
#define LANES 8
#else
#define TARGET
#ifdef RESIZE_LANES
#define LANES RESIZE_LANES
#else
#define LANES 8
#endif
#endif
#include "resize.c"

typedef void Resize(const Scratch *, const uint8_t *image, int64_t stride, int64_t height, int64_t width, void *out);

static Resize *fastest(void) {
#ifdef CLONES
    if (__builtin_cpu_supports("avx512f")) return resize_image16;
#endif
    return resize_image; /* of the passes compiled last */
}

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* Takes the next `size` bytes of the block, from a multiple of 64 on; with no block, only counts. */
static void *take(uint8_t *block, size_t *used, int64_t count, size_t size) {
    void *start = block ? block + *used : NULL;
    *used += ((size_t)count * size + 63) / 64 * 64;
    return start;
}

static void share_out(
    Scratch *s, uint8_t *block, size_t *used, int64_t height, int64_t width, int64_t taps_down, int64_t taps_across,
    int64_t columns
) {
    s->row_size = (3 * width + 1 + MOST_BLOCK - 1) / MOST_BLOCK * MOST_BLOCK;
    s->across.first = take(block, used, width, sizeof(int64_t));
    s->across.weights = take(block, used, width * taps_across, sizeof(int32_t));
    s->down.first = take(block, used, height, sizeof(int64_t));
    s->down.weights = take(block, used, height * taps_down, sizeof(int32_t));
    s->exact = take(block, used, larger(taps_down, taps_across), sizeof(double));
    s->pixels = take(block, used, columns + taps_across, MOST_ROWS * 4 * sizeof(uint32_t));
    s->ring = take(block, used, (taps_down + MOST_ROWS - 1) * s->row_size, sizeof(uint32_t));
    s->rows = take(block, used, taps_down, sizeof(uint32_t *));
    s->row = take(block, used, s->row_size, sizeof(uint32_t));
    s->scale = take(block, used, 3 * width, sizeof(float));
    s->bias = take(block, used, 3 * width, sizeof(float));
}

/* Image i, at images[i] with sizes[i] = (height, width) and strides[i] bytes a row, is resized to resized[i] = (height, width);
 * of that, out[i] (height, width, 3) is the crop at offsets[i] = (top, left), mirrored if flips[i]. Bytes, or, where scale
 * and bias (3) are given, floats: byte * scale + bias. Returns DONE, NO_MEMORY or BAD_GEOMETRY, then with nothing written. */
int imagenet_swa_resize_batch(
    int64_t num_images, const uint8_t *const *images, const int64_t *sizes, const int64_t *strides, const int64_t *resized,
    const int64_t *offsets, const uint8_t *flips, int64_t height, int64_t width, int filter, const float *scale,
    const float *bias, void *out
) {
    const int64_t most = 1 << 24; /* what Pillow's float boxes hold exactly */
    int64_t taps_down = 1, taps_across = 1, columns = 1;
    if (height < 1 || width < 1 || height > most || width > most) return BAD_GEOMETRY;
    if (filter != BILINEAR && filter != BICUBIC) return BAD_GEOMETRY;
    for (int64_t i = 0; i < num_images; i++) {
        const int64_t *size = sizes + 2 * i, *to = resized + 2 * i, *offset = offsets + 2 * i;
        for (int axis = 0; axis < 2; axis++)
            if (size[axis] < 1 || size[axis] > most || to[axis] < 1 || to[axis] > most) return BAD_GEOMETRY;
        if (offset[0] < 0 || offset[1] < 0 || offset[0] > to[0] - height || offset[1] > to[1] - width) return BAD_GEOMETRY;
        taps_down = larger(taps_down, most_taps(filter, size[0], to[0]));
        taps_across = larger(taps_across, most_taps(filter, size[1], to[1]));
        columns = larger(columns, size[1]);
    }
    Resize *resize = fastest();
    Scratch s;
    size_t needed = 0, used = 0;
    share_out(&s, NULL, &needed, height, width, taps_down, taps_across, columns);
    uint8_t *memory = calloc(needed + 64, 1);
    if (!memory) return NO_MEMORY;
    uint8_t *block = memory + (64 - (uintptr_t)memory % 64);
    share_out(&s, block, &used, height, width, taps_down, taps_across, columns);
    for (int64_t x = 0; scale && x < 3 * width; x++) {
        s.scale[x] = scale[x % 3];
        s.bias[x] = bias[x % 3];
    }
    if (!scale) s.scale = s.bias = NULL;
    size_t image_size = (size_t)(3 * height * width) * (scale ? sizeof(float) : 1);
    for (int64_t i = 0; i < num_images; i++) {
        const int64_t *size = sizes + 2 * i, *to = resized + 2 * i, *offset = offsets + 2 * i;
        weigh_axis(&s.down, filter, size[0], to[0], offset[0], height, 0, s.exact);
        weigh_axis(&s.across, filter, size[1], to[1], offset[1], width, flips[i], s.exact);
        s.overshoots = filter == BICUBIC || larger(s.down.num_taps, s.across.num_taps) > MANY_TAPS;
        resize(&s, images[i], strides[i], height, width, (uint8_t *)out + (size_t)i * image_size);
    }
#ifdef __SSE2__
    _mm_sfence(); /* what went past the cache, before what follows */
#endif
    free(memory);
    return DONE;
}

#else
/* ------------------------------------------------------------------------------- passes, with vectors of LANES words */

#undef ROWS
#undef BLOCK
#define ROWS (LANES / 4)
#define BLOCK (3 * LANES)

typedef uint32_t words __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t signed_words __attribute__((vector_size(4 * LANES)));

/* Sums to 0..255: the rounding is in the sums' start value. Without comparisons, which the compiler translates badly. */
INLINE void to_grey(words *sums, int overshoots) {
    if (overshoots) {
        signed_words value = (signed_words)*sums >> PRECISION;
        value &= ~(value >> 31);
        signed_words below_white = 255 - value;
        below_white &= ~(below_white >> 31);
        *sums = (words)(255 - below_white);
    } else {
        *sums >>= PRECISION;
    }
}

/* ROWS rows side by side as LANES words a pixel: red, green, blue and one unused of each row. */
INLINE void widen_rows(const uint8_t *const *rows, int64_t num_pixels, words *pixels) {
    words colours[ROWS] = {{0}}, shifts = {0}; /* where in a pixel's four bytes each lane finds its own */
    for (int lane = 0; lane < LANES; lane++) {
        shifts[lane] = 8 * (lane % 4);
        if (lane % 4 < 3) colours[lane / 4][lane] = 255u << shifts[lane];
    }
    for (int64_t x = 0; x < num_pixels - 1; x++) {
        words packed = {0};
        for (int r = 0; r < ROWS; r++) {
            uint32_t pixel; /* and the next one's red */
            memcpy(&pixel, rows[r] + 3 * x, sizeof pixel);
            packed |= colours[r] & pixel;
        }
        pixels[x] = packed >> shifts;
    }
    uint32_t *last = (uint32_t *)(pixels + num_pixels - 1); /* without what follows the row */
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < 3; c++) last[4 * r + c] = rows[r][3 * (num_pixels - 1) + c];
}

/* One output row of each of ROWS input rows; writes a word past the last pixel. */
INLINE void sum_pixels(
    const words *pixels, const Axis *axis, int64_t num_taps, int overshoots, int64_t num_outputs, uint32_t *const *out
) {
    const int32_t *weights = axis->weights;
    for (int64_t i = 0; i < num_outputs; i++, weights += num_taps) {
        const words *from = pixels + (axis->first[i] - axis->low);
        words sums = HALF - (words){0};
        for (int64_t k = 0; k < num_taps; k++) sums += from[k] * (uint32_t)weights[k];
        to_grey(&sums, overshoots);
        for (int r = 0; r < ROWS; r++) memcpy(out[r] + 3 * i, (uint32_t *)&sums + 4 * r, 16);
    }
}

INLINE void horizontal_pass(const words *pixels, const Axis *axis, int overshoots, int64_t num_outputs, uint32_t *const *out) {
    switch (axis->num_taps) { /* constants, so that the compiler unrolls */
    case 1: sum_pixels(pixels, axis, 1, overshoots, num_outputs, out); break;
    case 2: sum_pixels(pixels, axis, 2, overshoots, num_outputs, out); break;
    case 3: sum_pixels(pixels, axis, 3, overshoots, num_outputs, out); break;
    case 4: sum_pixels(pixels, axis, 4, overshoots, num_outputs, out); break;
    case 5: sum_pixels(pixels, axis, 5, overshoots, num_outputs, out); break;
    case 6: sum_pixels(pixels, axis, 6, overshoots, num_outputs, out); break;
    default: sum_pixels(pixels, axis, axis->num_taps, overshoots, num_outputs, out);
    }
}

/* One output row from `num_taps` rows; all have room for whole blocks. */
INLINE void vertical_pass(
    const uint32_t *const *rows, const int32_t *weights, int64_t num_taps, int overshoots, int64_t num_words, uint32_t *out
) {
    for (int64_t x = 0; x < num_words; x += BLOCK) {
        words a = HALF - (words){0}, b = a, c = a;
        for (int64_t k = 0; k < num_taps; k++) {
            const words *from = (const words *)(rows[k] + x);
            uint32_t weight = (uint32_t)weights[k];
            a += from[0] * weight;
            b += from[1] * weight;
            c += from[2] * weight;
        }
        words *to = (words *)(out + x);
        to_grey(&a, overshoots), to_grey(&b, overshoots), to_grey(&c, overshoots);
        to[0] = a, to[1] = b, to[2] = c;
    }
}

/* The horizontal pass of input rows y .. y + ROWS - 1; for those that no output needs, of the last needed one again. */
INLINE void fill_ring(const Scratch *s, const uint8_t *image, int64_t stride, int64_t y, int64_t width, int overshoots) {
    const Axis *across = &s->across, *down = &s->down;
    int64_t num_columns = across->high - across->low, ring_rows = down->num_taps + ROWS - 1;
    const uint8_t *left = image + 3 * across->low, *from[ROWS];
    uint32_t *to[ROWS];
    for (int r = 0; r < ROWS; r++) {
        int64_t row = y + r < down->high ? y + r : down->high - 1;
        from[r] = left + row * stride;
        to[r] = s->ring + row % ring_rows * s->row_size;
    }
    for (int64_t row = y + PREFETCHED; row < y + PREFETCHED + ROWS && row < down->high; row++)
        for (int64_t x = 0; x < 3 * num_columns; x += 64) __builtin_prefetch(left + row * stride + x);
    widen_rows(from, num_columns, (words *)s->pixels);
    horizontal_pass((const words *)s->pixels, across, overshoots, width, to);
}

INLINE void resize_rows(
    const Scratch *s, const uint8_t *image, int64_t stride, int64_t height, int64_t width, int overshoots, void *out
) {
    const Axis *down = &s->down;
    int64_t num_words = 3 * width, ring_rows = down->num_taps + ROWS - 1, done = down->low;
    for (int64_t y = 0; y < height; y++) {
        int64_t first = down->first[y], num_taps = down->num_taps;
        if (num_taps > down->high - first) num_taps = down->high - first;
        for (; done < first + num_taps; done += ROWS) fill_ring(s, image, stride, done, width, overshoots);
        for (int64_t k = 0; k < num_taps; k++) s->rows[k] = s->ring + (first + k) % ring_rows * s->row_size;
        vertical_pass(s->rows, down->weights + y * down->num_taps, num_taps, overshoots, num_words, s->row);
        if (s->scale) store_floats(s->row, s->scale, s->bias, num_words, (float *)out + y * num_words);
        else store_bytes(s->row, num_words, (uint8_t *)out + y * num_words);
    }
}

TARGET
static void resize_image(const Scratch *s, const uint8_t *image, int64_t stride, int64_t height, int64_t width, void *out) {
    if (s->overshoots) resize_rows(s, image, stride, height, width, 1, out); /* a constant, so that the compiler specialises */
    else resize_rows(s, image, stride, height, width, 0, out);
}

#endif
