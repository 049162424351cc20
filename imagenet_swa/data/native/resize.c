/* Pillow's antialiased resize (Image.resize with BILINEAR or BICUBIC), with crop, mirror and normalisation in one pass.
 *
 * The same integers as Pillow's libImaging/Resample.c: weights in double, rounded to 22 bits; the horizontal pass first,
 * rounded and clamped to bytes; then the vertical one. Sums are taken modulo 2^32, in which the true ones fit, so that
 * their order, and with it the processor's vector width, does not matter. Only what lies under the crop is computed.
 */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

/* The loader of glibc picks the clone that the processor can run; elsewhere there is one. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && !defined(RESIZE_NO_CLONES)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("avx2", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

#define PRECISION 22
#define HALF (1u << (PRECISION - 1))
#define START {HALF, HALF, HALF, HALF, HALF, HALF, HALF, HALF}
#define BLOCK 32 /* columns of the vertical pass that are summed in registers */

enum { BILINEAR = 0, BICUBIC = 1 };
enum { DONE = 0, NO_MEMORY = 1, BAD_GEOMETRY = 2 };

typedef uint32_t words8 __attribute__((vector_size(32), may_alias));
typedef int32_t signed8 __attribute__((vector_size(32)));

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

/* -------------------------------------------------------------------------------------------------------- passes */

/* Sums to 0..255: the rounding is in the sums' start value. */
INLINE void clamp(words8 *sums) {
    signed8 value = (signed8)*sums >> PRECISION;
    value &= ~(value >> 31);
    signed8 above = value > 255;
    *sums = (words8)((value & ~above) | (above & 255));
}

/* Two rows side by side as 8 words a pixel: three of the first row, one unused, three of the second, one unused. */
INLINE void widen_rows(const uint8_t *one, const uint8_t *two, int64_t num_pixels, uint8_t *bytes, words8 *out) {
    for (int64_t x = 0; x < num_pixels - 1; x++) {
        memcpy(bytes + 8 * x, one + 3 * x, 4);
        memcpy(bytes + 8 * x + 4, two + 3 * x, 4);
    }
    int64_t last = num_pixels - 1; /* never past the row's end */
    memcpy(bytes + 8 * last, one + 3 * last, 3);
    memcpy(bytes + 8 * last + 4, two + 3 * last, 3);
    uint32_t *restrict words = (uint32_t *)out;
    for (int64_t i = 0; i < 8 * num_pixels; i++) words[i] = bytes[i];
}

/* One output row of each of two input rows; writes a word past the last pixel. */
INLINE void sum_pixels(
    const words8 *pixels, const Axis *axis, int64_t num_taps, int64_t num_outputs, uint32_t *one, uint32_t *two
) {
    const int32_t *weights = axis->weights;
    for (int64_t i = 0; i < num_outputs; i++, weights += num_taps) {
        const words8 *from = pixels + (axis->first[i] - axis->low);
        words8 sums = START;
        for (int64_t k = 0; k < num_taps; k++) sums += from[k] * (uint32_t)weights[k];
        clamp(&sums);
        memcpy(one + 3 * i, (uint32_t *)&sums, 16);
        memcpy(two + 3 * i, (uint32_t *)&sums + 4, 16);
    }
}

INLINE void horizontal_pass(const words8 *pixels, const Axis *axis, int64_t num_outputs, uint32_t *one, uint32_t *two) {
    switch (axis->num_taps) { /* constants, so that the compiler unrolls */
    case 1: sum_pixels(pixels, axis, 1, num_outputs, one, two); break;
    case 2: sum_pixels(pixels, axis, 2, num_outputs, one, two); break;
    case 3: sum_pixels(pixels, axis, 3, num_outputs, one, two); break;
    case 4: sum_pixels(pixels, axis, 4, num_outputs, one, two); break;
    case 5: sum_pixels(pixels, axis, 5, num_outputs, one, two); break;
    case 6: sum_pixels(pixels, axis, 6, num_outputs, one, two); break;
    default: sum_pixels(pixels, axis, axis->num_taps, num_outputs, one, two);
    }
}

/* One output row from `num_taps` rows; all have room for whole blocks. */
INLINE void vertical_pass(
    const uint32_t *const *rows, const int32_t *weights, int64_t num_taps, int64_t num_words, uint32_t *out
) {
    for (int64_t x = 0; x < num_words; x += BLOCK) {
        words8 a = START, b = START, c = START, d = START;
        for (int64_t k = 0; k < num_taps; k++) {
            const words8 *from = (const words8 *)(rows[k] + x);
            uint32_t weight = (uint32_t)weights[k];
            a += from[0] * weight;
            b += from[1] * weight;
            c += from[2] * weight;
            d += from[3] * weight;
        }
        words8 *to = (words8 *)(out + x);
        clamp(&a), clamp(&b), clamp(&c), clamp(&d);
        to[0] = a, to[1] = b, to[2] = c, to[3] = d;
    }
}

/* ------------------------------------------------------------------------------------------------------- images */

typedef struct {
    Axis across, down;
    double *exact;         /* weights of one output */
    uint8_t *bytes;        /* two input rows, interleaved */
    words8 *pixels;        /* and widened */
    uint32_t *ring;        /* input rows after the horizontal pass, as many as an output row needs and one more */
    const uint32_t **rows; /* those that the next output row needs */
    uint32_t *row;         /* one output row */
    float *scale, *bias;   /* for one output row, NULL if bytes are wanted */
    int64_t row_size;      /* words of a row in `ring` and `row` */
} Scratch;

FOR_EACH_PROCESSOR
static void resize_image(const Scratch *s, const uint8_t *image, int64_t stride, int64_t height, int64_t width, void *out) {
    const Axis *across = &s->across, *down = &s->down;
    int64_t num_columns = across->high - across->low, num_words = 3 * width;
    int64_t ring_rows = down->num_taps + 1, done = down->low;
    for (int64_t y = 0; y < height; y++) {
        int64_t first = down->first[y], num_taps = down->num_taps;
        if (num_taps > down->high - first) num_taps = down->high - first;
        for (; done < first + num_taps; done += 2) {
            int64_t next = done + 1 < down->high ? done + 1 : done;
            const uint8_t *from = image + 3 * across->low;
            widen_rows(from + done * stride, from + next * stride, num_columns, s->bytes, s->pixels);
            uint32_t *one = s->ring + done % ring_rows * s->row_size;
            uint32_t *two = s->ring + next % ring_rows * s->row_size;
            horizontal_pass(s->pixels, across, width, one, two);
        }
        for (int64_t k = 0; k < num_taps; k++) s->rows[k] = s->ring + (first + k) % ring_rows * s->row_size;
        vertical_pass(s->rows, down->weights + y * down->num_taps, num_taps, num_words, s->row);
        if (s->scale) {
            float *to = (float *)out + y * num_words;
            for (int64_t i = 0; i < num_words; i++) to[i] = (float)(int32_t)s->row[i] * s->scale[i] + s->bias[i];
        } else {
            uint8_t *to = (uint8_t *)out + y * num_words;
            for (int64_t i = 0; i < num_words; i++) to[i] = (uint8_t)s->row[i];
        }
    }
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
    s->row_size = (3 * width + 1 + BLOCK - 1) / BLOCK * BLOCK;
    s->across.first = take(block, used, width, sizeof(int64_t));
    s->across.weights = take(block, used, width * taps_across, sizeof(int32_t));
    s->down.first = take(block, used, height, sizeof(int64_t));
    s->down.weights = take(block, used, height * taps_down, sizeof(int32_t));
    s->exact = take(block, used, larger(taps_down, taps_across), sizeof(double));
    s->bytes = take(block, used, columns, 8);
    s->pixels = take(block, used, columns + taps_across, sizeof(words8));
    s->ring = take(block, used, (taps_down + 1) * s->row_size, sizeof(uint32_t));
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
        resize_image(&s, images[i], strides[i], height, width, (uint8_t *)out + (size_t)i * image_size);
    }
    free(memory);
    return DONE;
}
