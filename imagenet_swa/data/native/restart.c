/* Restart-marker copies of JPEGs, and the taking of the segments under a window. Section numbers: ITU-T T.81.

   A copy holds the coefficients of its original, but its entropy-coded data are cut by restart markers into segments of
   a few MCUs that can be decoded alone. The segments never straddle two rows of MCUs, so that those under a window,
   with a header of their own, are again a JPEG. Where they lie is told by a private APP9 segment:

       FF E9, length (2 bytes), "SWARST\0", version 1 (1 byte), restart interval R in MCUs (2 bytes),
       then for each segment of the scan its length in bytes without the marker that ends it (2 bytes each);
       all numbers with the high byte first, as everywhere in a JPEG (B.1.1.1).

   A scan of more than 32,761 segments does not fit in one APP9; such an image gets no copy.

   Every read is bounded: the input may be anything. */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
    SOF0 = 0xC0, SOF1 = 0xC1, DHT = 0xC4, JPG = 0xC8, DAC = 0xCC, RST0 = 0xD0, SOI = 0xD8, EOI = 0xD9, SOS = 0xDA,
    DQT = 0xDB, DRI = 0xDD, APP0 = 0xE0, APP9 = 0xE9, APP14 = 0xEE, APP15 = 0xEF, COM = 0xFE,
};
enum { MAX_COMPONENTS = 4, MAX_BLOCKS_PER_MCU = 10, TABLE_HEADER = 10, MAX_SEGMENTS = (65533 - TABLE_HEADER) / 2 };
static const uint8_t TABLE_NAME[8] = "SWARST\0\1";

static int read16(const uint8_t *bytes) { return bytes[0] << 8 | bytes[1]; }

static void write16(uint8_t *bytes, int value)
{
    bytes[0] = (uint8_t)(value >> 8);
    bytes[1] = (uint8_t)value;
}

static int divide_up(int a, int b) { return (a + b - 1) / b; }

/* ------------------------------------------------------------------------------------------------------- header */

typedef struct {
    const uint8_t *next, *end;
} Reader;

typedef struct {
    int marker;
    const uint8_t *payload; /* what follows the two bytes of the length */
    int length;             /* of the payload */
} Segment;

static bool starts_as_jpeg(const uint8_t *image, int64_t size) { return size >= 2 && image[0] == 0xFF && image[1] == SOI; }

/* The next marker segment with a length (B.1.1.4); false at the end of the bytes and at whatever else stands there. */
static bool next_segment(Reader *reader, Segment *segment)
{
    while (reader->end - reader->next >= 2 && reader->next[0] == 0xFF && reader->next[1] == 0xFF)
        reader->next++; /* fill bytes (B.1.1.2) */
    if (reader->end - reader->next < 4 || reader->next[0] != 0xFF)
        return false;
    int marker = reader->next[1], length = read16(reader->next + 2);
    if (marker < SOF0 || (marker >= RST0 && marker <= EOI) || length < 2 || length > reader->end - reader->next - 2)
        return false;
    *segment = (Segment){marker, reader->next + 4, length - 2};
    reader->next += 2 + length;
    return true;
}

static bool is_frame_header(int marker)
{
    return marker >= SOF0 && marker <= 0xCF && marker != DHT && marker != JPG && marker != DAC;
}

static bool is_table(const Segment *s)
{
    return s->marker == APP9 && s->length >= TABLE_HEADER && memcmp(s->payload, TABLE_NAME, sizeof TABLE_NAME) == 0;
}

typedef struct {
    int height, width, num_components;
    int h_max, v_max;             /* sampling factors of an MCU */
    int mcu_height, mcu_width;    /* in pixels */
    int num_rows, mcus_per_row;   /* of MCUs */
    uint8_t identifier[MAX_COMPONENTS], num_blocks[MAX_COMPONENTS]; /* of each component in an MCU */
} Frame;

/* A frame header of 8 bits a sample (B.2.2). */
static bool read_frame(const Segment *s, Frame *frame)
{
    const uint8_t *p = s->payload;
    if (s->length < 6 || p[0] != 8 || p[5] < 1 || p[5] > MAX_COMPONENTS || s->length != 6 + 3 * p[5])
        return false;
    *frame = (Frame){.height = read16(p + 1), .width = read16(p + 3), .num_components = p[5], .h_max = 1, .v_max = 1};
    if (frame->height == 0 || frame->width == 0) /* a height of 0 is told later, by DNL (B.2.5) */
        return false;
    int total = 0;
    for (int c = 0; c < frame->num_components; c++) {
        const uint8_t *component = p + 6 + 3 * c;
        int h = component[1] >> 4, v = component[1] & 15;
        if (h < 1 || h > 4 || v < 1 || v > 4)
            return false;
        if (frame->num_components == 1) /* not interleaved: one block is an MCU, whatever the factors say (A.2.2) */
            h = v = 1;
        frame->identifier[c] = component[0];
        frame->num_blocks[c] = (uint8_t)(h * v);
        total += h * v;
        frame->h_max = h > frame->h_max ? h : frame->h_max;
        frame->v_max = v > frame->v_max ? v : frame->v_max;
    }
    frame->mcu_height = 8 * frame->v_max;
    frame->mcu_width = 8 * frame->h_max;
    frame->num_rows = divide_up(frame->height, frame->mcu_height);
    frame->mcus_per_row = divide_up(frame->width, frame->mcu_width);
    return total <= MAX_BLOCKS_PER_MCU;
}

/* Heights and widths of n images, both 0 where an image is not a JPEG whose header gives them. */
void restart_sizes(const uint8_t *const *images, const int64_t *sizes, int64_t n, int64_t *heights, int64_t *widths)
{
    for (int64_t i = 0; i < n; i++) {
        heights[i] = widths[i] = 0;
        if (!starts_as_jpeg(images[i], sizes[i]))
            continue;
        Reader reader = {images[i] + 2, images[i] + sizes[i]};
        Segment s;
        while (next_segment(&reader, &s) && s.marker != SOS)
            if (is_frame_header(s.marker)) {
                if (s.length >= 6 && read16(s.payload + 1) && read16(s.payload + 3)) {
                    heights[i] = read16(s.payload + 1);
                    widths[i] = read16(s.payload + 3);
                }
                break;
            }
    }
}

/* ------------------------------------------------------------------------------------------------------- gather */

typedef struct {
    Frame frame;
    int interval, segments_per_row;
    const uint8_t *lengths; /* two bytes each, in the APP9 */
    const uint8_t *scan, *end;
} Copy;

/* What a copy's header says; false for an image without a table that fits its frame. */
static bool read_copy(const uint8_t *image, int64_t size, Copy *copy)
{
    if (!starts_as_jpeg(image, size))
        return false;
    Reader reader = {image + 2, image + size};
    Segment s, table = {0};
    int num_frames = 0, num_tables = 0, interval = 0;
    do {
        if (!next_segment(&reader, &s))
            return false;
        if (s.marker == SOF0 || s.marker == SOF1) {
            num_frames++;
            if (!read_frame(&s, &copy->frame))
                return false;
        } else if (is_frame_header(s.marker)) {
            return false;
        } else if (s.marker == DRI && s.length == 2) {
            interval = read16(s.payload);
        } else if (is_table(&s)) {
            num_tables++;
            table = s;
        }
    } while (s.marker != SOS);
    if (num_frames != 1 || num_tables != 1 || interval == 0 || s.length != 4 + 2 * copy->frame.num_components)
        return false;
    if (interval != read16(table.payload + 8) || copy->frame.mcus_per_row % interval)
        return false;
    copy->interval = interval;
    copy->segments_per_row = copy->frame.mcus_per_row / interval;
    copy->lengths = table.payload + TABLE_HEADER;
    copy->scan = reader.next;
    copy->end = reader.end;
    return table.length == TABLE_HEADER + 2 * (int64_t)copy->frame.num_rows * copy->segments_per_row;
}

typedef struct {
    int first_row, end_row, first_column, end_column; /* of segments, a row of them being a row of MCUs */
} Part;

static int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }

/* The segments that decide about the pixels of a window; false where it does not lie in the image or needs all of it.

   A decoder draws a subsampled component larger with the help of the neighbouring sample, and at an edge without.
   One such sample around the window keeps the part's edges, where they are not the image's, out of it. libjpeg has a
   second rule: it does not smooth what is less than 5 pixels wide. So nothing is cut as narrow as that. */
static bool find_part(const Copy *copy, const int64_t *window, Part *part)
{
    const Frame *frame = &copy->frame;
    int64_t top = window[0], left = window[1], height = window[2], width = window[3];
    if (top < 0 || left < 0 || height < 1 || width < 1 || top > frame->height - height || left > frame->width - width)
        return false;
    int segment_width = copy->interval * frame->mcu_width;
    int v_margin = frame->v_max > 1 ? frame->v_max : 0, h_margin = frame->h_max > 1 ? frame->h_max : 0;
    int64_t bottom = at_most(top + height + v_margin, frame->height);
    int64_t right = at_most(left + width + h_margin, frame->width);
    part->first_row = top > v_margin ? (int)(top - v_margin) / frame->mcu_height : 0;
    part->end_row = divide_up((int)bottom, frame->mcu_height);
    part->first_column = left > h_margin ? (int)(left - h_margin) / segment_width : 0;
    part->end_column = divide_up((int)right, segment_width);
    if (part->first_column > 0 && frame->width - part->first_column * segment_width < 8)
        part->first_column--;
    int num_rows = part->end_row - part->first_row, num_columns = part->end_column - part->first_column;
    return num_rows < frame->num_rows || num_columns < copy->segments_per_row;
}

static uint8_t *append(uint8_t *out, const void *bytes, size_t size)
{
    memcpy(out, bytes, size);
    return out + size;
}

/* Whether a decoder needs a segment of the header to get the pixels, its colour transform included. */
static bool decides_pixels(const Segment *s)
{
    switch (s->marker) {
    case SOF0: case SOF1: case DHT: case DQT: case DRI: case SOS:
        return true;
    case APP0:
        return s->length >= 5 && memcmp(s->payload, "JFIF", 5) == 0;
    case APP14:
        return s->length >= 5 && memcmp(s->payload, "Adobe", 5) == 0;
    default:
        return false;
    }
}

/* The header of the part: the copy's own segments, with the part's size. */
static uint8_t *write_part_header(const uint8_t *image, const Copy *copy, const Part *part, uint8_t *out)
{
    const Frame *frame = &copy->frame;
    int segment_width = copy->interval * frame->mcu_width;
    int64_t bottom = at_most((int64_t)part->end_row * frame->mcu_height, frame->height);
    int64_t right = at_most((int64_t)part->end_column * segment_width, frame->width);
    Reader reader = {image + 2, copy->scan};
    Segment s;
    out = append(out, image, 2);
    while (next_segment(&reader, &s)) {
        if (!decides_pixels(&s))
            continue;
        uint8_t *start = out;
        out = append(out, s.payload - 4, (size_t)s.length + 4);
        if (s.marker == SOF0 || s.marker == SOF1) {
            write16(start + 5, (int)(bottom - (int64_t)part->first_row * frame->mcu_height));
            write16(start + 7, (int)(right - (int64_t)part->first_column * segment_width));
        }
    }
    return out;
}

/* Bytes of n segments with the markers that end them. */
static int64_t sum_lengths(const uint8_t *lengths, int n)
{
    uint32_t sum = 0; /* at most 32,761 lengths of 65,535: no overflow */
    for (int i = 0; i < n; i++)
        sum += (uint32_t)read16(lengths + 2 * i);
    return (int64_t)sum + 2 * n;
}

static bool is_marker(const uint8_t *bytes, int marker) { return bytes[0] == 0xFF && bytes[1] == marker; }

/* Checks that each of the part's segments in one row ends with the marker that is due, and numbers it anew. */
static bool renumber(uint8_t *out, const uint8_t *lengths, int num, int first, int total, int *written)
{
    for (int i = 0; i < num; i++) {
        out += read16(lengths + 2 * i);
        if (!is_marker(out, first + i == total - 1 ? EOI : RST0 + (first + i) % 8))
            return false;
        out[1] = (uint8_t)(RST0 + (*written)++ % 8);
        out += 2;
    }
    return true;
}

/* Writes the part's segments, each with its marker; NULL where the table does not agree with the data. */
static uint8_t *write_part_scan(const Copy *copy, const Part *part, uint8_t *out)
{
    int per_row = copy->segments_per_row, total = per_row * copy->frame.num_rows, written = 0;
    int num = part->end_column - part->first_column;
    const uint8_t *lengths = copy->lengths, *source = copy->scan;
    for (int row = 0; row < copy->frame.num_rows; row++, lengths += 2 * per_row) {
        int64_t before = sum_lengths(lengths, part->first_column);
        int64_t size = sum_lengths(lengths + 2 * part->first_column, num);
        int64_t after = sum_lengths(lengths + 2 * part->end_column, per_row - part->end_column);
        if (before + size + after > copy->end - source)
            return NULL;
        if (row >= part->first_row && row < part->end_row) {
            int first = row * per_row + part->first_column;
            const uint8_t *start = source + before;
            if (first > 0 && !is_marker(start - 2, RST0 + (first - 1) % 8))
                return NULL;
            memcpy(out, start, (size_t)size);
            if (!renumber(out, lengths + 2 * part->first_column, num, first, total, &written))
                return NULL;
            out += size;
        }
        source += before + size + after;
    }
    if (!is_marker(source - 2, EOI))
        return NULL;
    out[-1] = EOI;
    return out;
}

/* The part of an image under a window; its size, 0 where the image is to be taken as it is. `out` has room for the image. */
static int64_t gather_one(const uint8_t *image, int64_t size, int64_t *window, uint8_t *out)
{
    Copy copy;
    Part part;
    if (!read_copy(image, size, &copy) || !find_part(&copy, window, &part))
        return 0;
    uint8_t *end = write_part_scan(&copy, &part, write_part_header(image, &copy, &part, out));
    if (end == NULL)
        return 0;
    window[0] -= (int64_t)part.first_row * copy.frame.mcu_height;
    window[1] -= (int64_t)part.first_column * copy.interval * copy.frame.mcu_width;
    return end - out;
}

/* For each of n images the smallest JPEG with the pixels of its window (top, left, height, width), one after the other
   in `arena`, which has room for all the images; `part_sizes` their sizes. Windows are moved to where they lie in the
   parts. Size 0 and the window as it was: take the image itself, since it has no table, or the wrong one, or all of it is
   needed, or the window does not lie in it. */
void restart_gather(const uint8_t *const *images, const int64_t *sizes, int64_t n, int64_t *windows, uint8_t *arena,
                    int64_t *part_sizes)
{
    for (int64_t i = 0; i < n; i++) {
        part_sizes[i] = gather_one(images[i], sizes[i], windows + 4 * i, arena);
        arena += part_sizes[i];
    }
}

/* ------------------------------------------------------------------------------------------------ Huffman tables */

typedef struct {
    uint8_t counts[16]; /* of codes of 1..16 bits (B.2.4.2) */
    uint8_t symbols[256];
    int num_symbols;
} Huffman;

enum { LOOKAHEAD = 10 };

typedef struct {
    uint16_t quick[1 << LOOKAHEAD]; /* length << 8 | symbol of the code that these bits start with; 0 if it is longer */
    int32_t end_code[17];           /* of each length, the first code that is none */
    int32_t first_index[17];        /* where a length's symbols start, minus its first code */
    const uint8_t *symbols;
} Decoder;

typedef struct {
    uint16_t code[256];
    uint8_t length[256]; /* 0: no code */
} Encoder;

/* The codes of a table (annex C); false where they do not fit, or take the code of all ones that is reserved (K.2). */
static bool make_encoder(const Huffman *table, Encoder *encoder)
{
    memset(encoder, 0, sizeof *encoder);
    int code = 0, index = 0;
    for (int length = 1; length <= 16; length++, code <<= 1) {
        for (int i = 0; i < table->counts[length - 1]; i++, index++, code++) {
            encoder->code[table->symbols[index]] = (uint16_t)code;
            encoder->length[table->symbols[index]] = (uint8_t)length;
        }
        if (code >= 1 << length)
            return false;
    }
    return true;
}

/* F.2.2.3, with a look-up for the short codes. The table's codes must fit, see make_encoder. */
static void make_decoder(const Huffman *table, Decoder *decoder)
{
    memset(decoder->quick, 0, sizeof decoder->quick);
    decoder->symbols = table->symbols;
    int code = 0, index = 0;
    for (int length = 1; length <= 16; length++, code <<= 1) {
        decoder->first_index[length] = index - code;
        for (int i = 0; i < table->counts[length - 1]; i++, index++, code++) {
            int rest = LOOKAHEAD - length;
            for (int k = 0; rest >= 0 && k < 1 << rest; k++)
                decoder->quick[(code << rest) + k] = (uint16_t)(length << 8 | table->symbols[index]);
        }
        decoder->end_code[length] = code;
    }
}

/* K.2, figures K.1 and K.2: code lengths from frequencies, one more symbol (256) taking the code of all ones. */
static void find_code_lengths(const int64_t counts[256], int lengths[257])
{
    int64_t frequency[257];
    int other[257];
    memcpy(frequency, counts, 256 * sizeof *counts);
    frequency[256] = 1;
    for (int i = 0; i < 257; i++) {
        lengths[i] = 0;
        other[i] = -1;
    }
    for (;;) {
        int least = -1, second = -1; /* of equal frequencies the larger symbol */
        for (int i = 0; i < 257; i++) {
            if (frequency[i] == 0)
                continue;
            if (least < 0 || frequency[i] <= frequency[least]) {
                second = least;
                least = i;
            } else if (second < 0 || frequency[i] <= frequency[second]) {
                second = i;
            }
        }
        if (second < 0)
            return;
        frequency[least] += frequency[second];
        frequency[second] = 0;
        int last = least;
        for (lengths[last]++; other[last] >= 0; lengths[last]++)
            last = other[last];
        other[last] = second;
        for (last = second; last >= 0; last = other[last])
            lengths[last]++;
    }
}

/* The best table for symbols that occur this often, K.2: figure K.3 keeps codes to 16 bits, K.4 sorts the symbols. */
static void make_optimal(const int64_t counts[256], Huffman *table)
{
    int lengths[257], bits[258] = {0};
    find_code_lengths(counts, lengths);
    for (int i = 0; i < 257; i++)
        if (lengths[i])
            bits[lengths[i]]++;
    for (int i = 257; i > 16; i--)
        while (bits[i] > 0) {
            int j = i - 2;
            while (bits[j] == 0)
                j--;
            bits[i] -= 2;
            bits[i - 1]++;
            bits[j + 1] += 2;
            bits[j]--;
        }
    int longest = 16;
    while (bits[longest] == 0)
        longest--;
    bits[longest]--; /* the reserved code */
    table->num_symbols = 0;
    for (int length = 1; length <= 257; length++)
        for (int symbol = 0; symbol < 256; symbol++)
            if (lengths[symbol] == length)
                table->symbols[table->num_symbols++] = (uint8_t)symbol;
    for (int i = 0; i < 16; i++)
        table->counts[i] = (uint8_t)bits[i + 1];
}

/* ------------------------------------------------------------------------------------------------- reading a scan */

enum { NUM_TABLES = 8 }; /* DC tables 0..3, then AC tables 0..3 */

typedef struct {
    Frame frame;
    int interval; /* of restart, in MCUs; 0 for none */
    Huffman tables[NUM_TABLES];
    uint8_t dc[MAX_COMPONENTS], ac[MAX_COMPONENTS]; /* which of the tables */
    bool used[NUM_TABLES];
    Segment scan_header;
    const uint8_t *scan, *end;
} Source;

/* B.2.4.2; a segment may define several tables. */
static bool read_tables(const Segment *s, Huffman tables[NUM_TABLES])
{
    const uint8_t *p = s->payload, *end = p + s->length;
    while (p < end) {
        if (end - p < 17 || p[0] >> 4 > 1 || (p[0] & 15) > 3)
            return false;
        Huffman *table = &tables[(p[0] >> 4) * 4 + (p[0] & 15)];
        int total = 0;
        for (int i = 0; i < 16; i++) {
            table->counts[i] = p[1 + i];
            total += p[1 + i];
        }
        if (total > 256 || total > end - p - 17)
            return false;
        table->num_symbols = total;
        memcpy(table->symbols, p + 17, (size_t)total);
        p += 17 + total;
    }
    return true;
}

/* B.2.3: one scan that holds all of every component. */
static bool read_scan_header(const Segment *s, Source *source)
{
    const uint8_t *p = s->payload;
    int n = source->frame.num_components;
    if (s->length != 4 + 2 * n || p[0] != n || p[1 + 2 * n] != 0 || p[2 + 2 * n] != 63 || p[3 + 2 * n] != 0)
        return false;
    for (int c = 0; c < n; c++) {
        int dc = p[2 + 2 * c] >> 4, ac = p[2 + 2 * c] & 15;
        if (p[1 + 2 * c] != source->frame.identifier[c] || dc > 3 || ac > 3)
            return false;
        source->dc[c] = (uint8_t)dc;
        source->ac[c] = (uint8_t)(4 + ac);
        source->used[source->dc[c]] = source->used[source->ac[c]] = true;
    }
    for (int t = 0; t < NUM_TABLES; t++)
        if (source->used[t] && source->tables[t].num_symbols == 0)
            return false;
    source->scan_header = *s;
    return true;
}

/* The header of a sequential Huffman JPEG; false for every other kind. */
static bool read_source(const uint8_t *image, int64_t size, Source *source)
{
    memset(source, 0, sizeof *source);
    if (!starts_as_jpeg(image, size))
        return false;
    Reader reader = {image + 2, image + size};
    Segment s;
    bool good = true;
    while (good && next_segment(&reader, &s)) {
        if (s.marker == SOF0 || s.marker == SOF1)
            good = source->frame.num_components == 0 && read_frame(&s, &source->frame);
        else if (s.marker == DHT)
            good = read_tables(&s, source->tables);
        else if (s.marker == DRI && s.length == 2)
            source->interval = read16(s.payload);
        else if (s.marker == SOS) {
            source->scan = reader.next;
            source->end = reader.end;
            return source->frame.num_components > 0 && read_scan_header(&s, source);
        } else
            good = s.marker == DQT || s.marker == COM || (s.marker >= APP0 && s.marker <= APP15);
    }
    return false;
}

typedef struct {
    const uint8_t *next, *end;
    uint64_t bits; /* the next one is the highest; below the last one zeros */
    int num_bits;
} BitReader;

/* At least 56 bits, if there are so many before the next marker (F.2.2.5). */
static void fill_bits(BitReader *reader)
{
    while (reader->num_bits <= 56 && reader->next < reader->end) {
        int byte = *reader->next;
        if (byte == 0xFF) {
            if (reader->end - reader->next < 2 || reader->next[1] != 0)
                return;
            reader->next++;
        }
        reader->next++;
        reader->bits |= (uint64_t)byte << (56 - reader->num_bits);
        reader->num_bits += 8;
    }
}

/* The next n <= 16 bits as a number; nothing checks here that there are so many, see read_symbol. */
static int take_bits(BitReader *reader, int n)
{
    int value = (int)(reader->bits >> 32 >> (32 - n));
    reader->bits <<= n;
    reader->num_bits -= n;
    return value;
}

/* A symbol and the bits that belong to it, as many as its lower four bits say; the symbol, -1 where there is none. */
static int read_symbol(BitReader *reader, const Decoder *decoder, int *extra)
{
    if (reader->num_bits < 32)
        fill_bits(reader);
    int symbol, length, quick = decoder->quick[reader->bits >> (64 - LOOKAHEAD)];
    if (quick) {
        length = quick >> 8;
        symbol = quick & 255;
    } else {
        int code;
        length = LOOKAHEAD;
        do {
            if (++length > 16)
                return -1;
            code = (int)(reader->bits >> (64 - length));
        } while (code >= decoder->end_code[length]);
        symbol = decoder->symbols[code + decoder->first_index[length]];
    }
    if (length + (symbol & 15) > reader->num_bits)
        return -1;
    take_bits(reader, length);
    *extra = take_bits(reader, symbol & 15);
    return symbol;
}

/* The end of a segment: less than a byte of bits is left, and the marker follows. */
static bool read_marker(BitReader *reader, int marker)
{
    fill_bits(reader);
    if (reader->num_bits >= 8)
        return false;
    reader->bits = 0;
    reader->num_bits = 0;
    while (reader->end - reader->next >= 2 && reader->next[0] == 0xFF && reader->next[1] == 0xFF)
        reader->next++;
    if (reader->end - reader->next < 2 || !is_marker(reader->next, marker))
        return false;
    reader->next += 2;
    return true;
}

/* Bits to a signed number (F.2.2.1, EXTEND). */
static int extend(int extra, int size) { return size && extra < 1 << (size - 1) ? extra - (1 << size) + 1 : extra; }

typedef struct {
    uint16_t extra;
    uint8_t symbol, table; /* table END_OF_SEGMENT: a restart marker or, last, EOI */
} Record;
enum { END_OF_SEGMENT = NUM_TABLES };

/* What a scan says: its symbols, with DC differences for the wanted restart interval, and a hash of its coefficients. */
typedef struct {
    Record *records;
    size_t num_records, capacity;
    int64_t counts[NUM_TABLES][256];
    uint64_t hash;
    const uint8_t *end; /* behind EOI */
} Symbols;

static bool reserve_records(Symbols *symbols)
{
    enum { ONE_MCU = MAX_BLOCKS_PER_MCU * 64 + 1 };
    if (symbols->capacity - symbols->num_records >= ONE_MCU)
        return true;
    size_t capacity = symbols->capacity * 2 + 16 * ONE_MCU;
    Record *records = realloc(symbols->records, capacity * sizeof *records);
    if (records == NULL)
        return false;
    symbols->records = records;
    symbols->capacity = capacity;
    return true;
}

static void add_symbol(Symbols *symbols, int table, int symbol, int extra)
{
    symbols->records[symbols->num_records++] = (Record){(uint16_t)extra, (uint8_t)symbol, (uint8_t)table};
    symbols->counts[table][symbol]++;
}

static void add_to_hash(Symbols *symbols, int position, int value)
{
    uint64_t mixed = (symbols->hash ^ ((uint64_t)position << 32 | (uint32_t)value)) * 0x9E3779B97F4A7C15u;
    symbols->hash = mixed ^ mixed >> 29;
}

/* The difference that brings the new predictor to `value`, coded as in F.1.2.1; false above 8-bit data's category 11. */
static bool add_dc(Symbols *symbols, int table, int difference)
{
    int size = 0, magnitude = abs(difference);
    while (magnitude >> size)
        size++;
    if (size > 11)
        return false;
    add_symbol(symbols, table, size, difference < 0 ? difference + (1 << size) - 1 : difference);
    return true;
}

/* The AC coefficients of a block (F.2.2.2), copied as they are. */
static bool read_ac(BitReader *bits, const Decoder *decoder, int table, Symbols *symbols)
{
    for (int k = 1; k < 64; k++) {
        int extra, symbol = read_symbol(bits, decoder, &extra);
        if (symbol < 0)
            return false;
        int run = symbol >> 4, size = symbol & 15;
        if (size == 0 && run != 0 && run != 15)
            return false;
        k += run;
        if (k > 63)
            return false;
        add_symbol(symbols, table, symbol, extra);
        if (symbol == 0)
            return true;
        if (size)
            add_to_hash(symbols, k, extend(extra, size));
        else if (k == 63) /* sixteen zeros to the end, for which there is a symbol of its own */
            return false;
    }
    return true;
}

typedef struct {
    int source[MAX_COMPONENTS], result[MAX_COMPONENTS];
} Predictors;

static bool read_mcu(const Source *source, const Decoder *decoders, BitReader *bits, Predictors *predictors, Symbols *symbols)
{
    for (int c = 0; c < source->frame.num_components; c++)
        for (int block = 0; block < source->frame.num_blocks[c]; block++) {
            int extra, size = read_symbol(bits, &decoders[source->dc[c]], &extra);
            if (size < 0 || size > 11)
                return false;
            int value = predictors->source[c] += extend(extra, size);
            if (!add_dc(symbols, source->dc[c], value - predictors->result[c]))
                return false;
            predictors->result[c] = value;
            add_to_hash(symbols, 0, value);
            if (!read_ac(bits, &decoders[source->ac[c]], source->ac[c], symbols))
                return false;
        }
    return true;
}

/* The whole scan (annex E.2), cut anew every `interval` MCUs. The caller frees symbols->records, whatever is returned. */
static bool read_scan(const Source *source, int interval, Symbols *symbols)
{
    Decoder decoders[NUM_TABLES];
    Encoder unused;
    for (int t = 0; t < NUM_TABLES; t++)
        if (source->used[t]) {
            if (!make_encoder(&source->tables[t], &unused))
                return false;
            make_decoder(&source->tables[t], &decoders[t]);
        }
    BitReader bits = {source->scan, source->end, 0, 0};
    Predictors predictors = {0};
    int64_t total = (int64_t)source->frame.num_rows * source->frame.mcus_per_row, num_restarts = 0;
    for (int64_t mcu = 0; mcu < total; mcu++) {
        if (source->interval && mcu && mcu % source->interval == 0) {
            if (!read_marker(&bits, (int)(RST0 + num_restarts++ % 8)))
                return false;
            memset(predictors.source, 0, sizeof predictors.source);
        }
        if (mcu % interval == 0)
            memset(predictors.result, 0, sizeof predictors.result);
        if (!reserve_records(symbols) || !read_mcu(source, decoders, &bits, &predictors, symbols))
            return false;
        if ((mcu + 1) % interval == 0)
            symbols->records[symbols->num_records++] = (Record){0, 0, END_OF_SEGMENT};
    }
    if (!read_marker(&bits, EOI))
        return false;
    symbols->end = bits.next;
    return true;
}

/* ------------------------------------------------------------------------------------------------ writing a copy */

/* Bytes that grow; after a failed allocation nothing is written any more. */
typedef struct {
    uint8_t *bytes;
    size_t size, capacity;
    bool failed;
} Buffer;

static bool reserve(Buffer *buffer, size_t more)
{
    if (buffer->failed || buffer->capacity - buffer->size >= more)
        return !buffer->failed;
    size_t capacity = 2 * buffer->capacity + more;
    uint8_t *bytes = realloc(buffer->bytes, capacity);
    buffer->failed = bytes == NULL;
    if (!buffer->failed) {
        buffer->bytes = bytes;
        buffer->capacity = capacity;
    }
    return !buffer->failed;
}

static void put(Buffer *buffer, const void *bytes, size_t size)
{
    if (reserve(buffer, size)) {
        memcpy(buffer->bytes + buffer->size, bytes, size);
        buffer->size += size;
    }
}

/* A marker, its length and the start of its payload. */
static void put_marker(Buffer *buffer, int marker, int payload_length)
{
    uint8_t bytes[4] = {0xFF, (uint8_t)marker};
    write16(bytes + 2, payload_length + 2);
    put(buffer, bytes, 4);
}

typedef struct {
    uint32_t bits; /* the lowest num_bits of them are not written yet */
    int num_bits;
} BitWriter;

/* The lowest n <= 16 bits of value; after a byte FF comes a 00 (F.1.2.3). The buffer has room. */
static void put_bits(Buffer *buffer, BitWriter *writer, int value, int n)
{
    writer->bits = writer->bits << n | (uint32_t)value;
    writer->num_bits += n;
    while (writer->num_bits >= 8) {
        writer->num_bits -= 8;
        uint8_t byte = (uint8_t)(writer->bits >> writer->num_bits);
        buffer->bytes[buffer->size++] = byte;
        if (byte == 0xFF)
            buffer->bytes[buffer->size++] = 0;
    }
}

/* The number of MCUs in a segment: a divisor of a row's, the largest that is not wider than so many pixels. Where that
   is not a quarter as wide (47 MCUs a row: 1), markers would cost up to 30 % more bytes; then the next larger divisor. */
static int choose_interval(const Frame *frame, int pixels)
{
    int per_row = frame->mcus_per_row, interval = per_row;
    while (interval > 1 && (per_row % interval || interval * frame->mcu_width > pixels))
        interval--;
    if (4 * interval * frame->mcu_width > pixels || interval == per_row)
        return interval;
    do
        interval++;
    while (per_row % interval);
    return interval;
}

/* The best tables for the copy. The source's own may lack the DC categories that restarts need. */
static bool choose_tables(const Source *source, const Symbols *symbols, Huffman *tables, Encoder *encoders)
{
    for (int t = 0; t < NUM_TABLES; t++)
        if (source->used[t]) {
            make_optimal(symbols->counts[t], &tables[t]);
            if (!make_encoder(&tables[t], &encoders[t]))
                return false;
        }
    return true;
}

static void put_tables(Buffer *buffer, const Source *source, const Huffman *tables)
{
    int length = 0;
    for (int t = 0; t < NUM_TABLES; t++)
        length += source->used[t] ? 17 + tables[t].num_symbols : 0;
    put_marker(buffer, DHT, length);
    for (int t = 0; t < NUM_TABLES; t++)
        if (source->used[t]) {
            uint8_t where = (uint8_t)((t / 4) << 4 | t % 4);
            put(buffer, &where, 1);
            put(buffer, tables[t].counts, 16);
            put(buffer, tables[t].symbols, (size_t)tables[t].num_symbols);
        }
}

/* All up to the scan; where the lengths of its segments go is returned. */
static size_t put_header(Buffer *buffer, const uint8_t *image, const Source *source, const Huffman *tables, int interval,
                         int num_segments)
{
    Reader reader = {image + 2, source->scan};
    Segment s;
    put(buffer, image, 2);
    while (next_segment(&reader, &s) && s.marker != SOS)
        if (s.marker != DHT && s.marker != DRI && !is_table(&s))
            put(buffer, s.payload - 4, (size_t)s.length + 4);
    uint8_t two_bytes[2];
    write16(two_bytes, interval);
    put_marker(buffer, APP9, TABLE_HEADER + 2 * num_segments);
    put(buffer, TABLE_NAME, sizeof TABLE_NAME);
    put(buffer, two_bytes, 2);
    size_t lengths = buffer->size;
    if (reserve(buffer, 2 * (size_t)num_segments))
        buffer->size += 2 * (size_t)num_segments;
    put_tables(buffer, source, tables);
    put_marker(buffer, DRI, 2);
    put(buffer, two_bytes, 2);
    put(buffer, source->scan_header.payload - 4, (size_t)source->scan_header.length + 4);
    return lengths;
}

/* The scan, its lengths filled in at `lengths`; false where a segment has more than 65,535 bytes. */
static bool put_scan(Buffer *buffer, const Symbols *symbols, const Encoder *encoders, size_t lengths)
{
    BitWriter writer = {0, 0};
    size_t start = buffer->size;
    int num_segments = 0;
    for (size_t i = 0; i < symbols->num_records; i++) {
        Record record = symbols->records[i];
        if (!reserve(buffer, 16))
            return false;
        if (record.table == END_OF_SEGMENT) {
            put_bits(buffer, &writer, (1 << (7 & -writer.num_bits)) - 1, 7 & -writer.num_bits); /* ones (F.1.2.3) */
            if (buffer->size - start > 65535)
                return false;
            write16(buffer->bytes + lengths + 2 * (size_t)num_segments, (int)(buffer->size - start));
            bool last = i + 1 == symbols->num_records;
            buffer->bytes[buffer->size++] = 0xFF;
            buffer->bytes[buffer->size++] = (uint8_t)(last ? EOI : RST0 + num_segments % 8);
            num_segments++;
            start = buffer->size;
        } else {
            const Encoder *encoder = &encoders[record.table];
            put_bits(buffer, &writer, encoder->code[record.symbol], encoder->length[record.symbol]);
            put_bits(buffer, &writer, record.extra, record.symbol & 15);
        }
    }
    return true;
}

static bool write_copy(const uint8_t *image, int64_t size, const Source *source, const Symbols *symbols, int interval,
                       Buffer *buffer)
{
    Huffman tables[NUM_TABLES];
    Encoder encoders[NUM_TABLES];
    if (!choose_tables(source, symbols, tables, encoders))
        return false;
    int num_segments = source->frame.num_rows * (source->frame.mcus_per_row / interval);
    size_t lengths = put_header(buffer, image, source, tables, interval, num_segments);
    if (buffer->failed || !put_scan(buffer, symbols, encoders, lengths))
        return false;
    put(buffer, symbols->end, (size_t)(image + size - symbols->end)); /* some cameras put more behind EOI */
    return !buffer->failed;
}

/* Whether the copy, read from its bytes, has these coefficients. */
static bool has_coefficients(const Buffer *copy, int interval, uint64_t hash)
{
    Source source;
    Symbols symbols = {0};
    bool same = read_source(copy->bytes, (int64_t)copy->size, &source) && source.interval == interval &&
                read_scan(&source, interval, &symbols) && symbols.hash == hash;
    free(symbols.records);
    return same;
}

/* The copy of an image, its size in *copy_size, to be freed by restart_free; NULL where there is none to be had: not a
   sequential Huffman JPEG of 8 bits in one scan, damaged, more segments than the table holds, no memory. */
uint8_t *restart_copy(const uint8_t *image, int64_t size, int64_t pixels, int64_t *copy_size)
{
    Source source;
    if (!read_source(image, size, &source))
        return NULL;
    int interval = choose_interval(&source.frame, (int)at_most(pixels > 0 ? pixels : 0, 1 << 20));
    if ((int64_t)source.frame.num_rows * (source.frame.mcus_per_row / interval) > MAX_SEGMENTS)
        return NULL;
    Symbols symbols = {0};
    Buffer buffer = {0};
    bool good = read_scan(&source, interval, &symbols) &&
                write_copy(image, size, &source, &symbols, interval, &buffer) &&
                has_coefficients(&buffer, interval, symbols.hash);
    free(symbols.records);
    if (!good) {
        free(buffer.bytes);
        return NULL;
    }
    *copy_size = (int64_t)buffer.size;
    return buffer.bytes;
}

void restart_free(uint8_t *copy) { free(copy); }
