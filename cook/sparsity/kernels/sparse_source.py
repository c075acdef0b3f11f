"""The products of `sparse_native.py` in C, and the norm between them.

An export carries this file along. Tiles read lines of inputs where they are: nothing is gathered, and a line once
loaded serves all outputs of a panel.

A panel is a few outputs of a tile, whose sums fit into the registers for a block of rows. Blocks come in groups, whose
lines fit into a core's cache: a panel's weights are read once per group. Threads take panels of a group as they come,
so a thread that loses its core to another process holds up no more than the panels that it has.
"""

SOURCE = r"""
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

/* WIDTH: floats in a vector register. PANEL: outputs at once. VECTORS: vectors of rows at once. The PANEL x VECTORS
   sums, the lines and a weight have to fit into the registers. */
#if defined(__AVX512F__)
#define INSTRUCTIONS "AVX-512"
#define WIDTH 16
#define PANEL 8
#define VECTORS 3
#elif defined(__AVX2__)
#define INSTRUCTIONS "AVX2"
#define WIDTH 8
#define PANEL 6
#define VECTORS 2 /* a line is 64 bytes, just what a cache moves at a time */
#elif defined(__aarch64__)
#define INSTRUCTIONS "NEON"
#define WIDTH 4
#define PANEL 8
#define VECTORS 3
#else
#define INSTRUCTIONS "128-bit vectors"
#define WIDTH 4
#define PANEL 4
#define VECTORS 3
#endif
#define MOST 8          /* vectors of rows at once in products of single weights */
#define AHEAD 8         /* inputs, that the next ones' memory is asked for before it is copied */
#define SHARE (1 << 15) /* bytes of weights that stay in the first cache, or the second, from block to block */
#define SHARES 8        /* that a thread's work is cut into, at least, when there are others */
#define INLINE static inline __attribute__((always_inline))
typedef float vec __attribute__((vector_size(4 * WIDTH), aligned(4)));

/* Rows are tokens. In bf16 two inputs lie side by side in 32 bits: a pair, which has one line and one weight. */
typedef struct {
  const void *x; /* [inputs, rows] */
  void *y;       /* [outputs, rows] */
  int64_t inputs, rows, x_stride, y_stride, panels;
  int64_t paired; /* bf16: `read` names pairs (2i, 2i + 1) of inputs, not inputs */
  /* Of every panel, and where the last one ends: its first weight, its first entry of `write` and of `biases`. */
  const int64_t *first_weight, *first_output;
  const int64_t *first_read, *reads; /* of every panel: where the inputs of its tile begin in `read`, and how many */
  const void *weights;               /* panel after panel, [inputs or pairs of the tile, outputs of the panel] */
  const int32_t *read;               /* inputs, tile after tile */
  const int32_t *write;              /* outputs, panel after panel */
  const float *biases;               /* likewise */
  float *scratch;                    /* for every thread `room` floats, and as many as there are rows */
  int64_t room, threads;
} job;

const char *instructions(void) { return INSTRUCTIONS; }
int64_t panel_outputs(void) { return PANEL; }

/* Vectors of rows in a group of blocks: their lines, or in bf16 half as much and half for pairs, take a quarter of the
   second cache. */
static int64_t group_vectors(int64_t inputs, int64_t most) {
  int64_t cache = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
  cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
  if (cache <= 0) cache = 1 << 19;
  int64_t blocks = cache / 4 / (4 * WIDTH * most * (inputs + 1));
  return blocks > 1 ? blocks * most : most;
}

int64_t tile_room(int64_t inputs) { return (inputs + 1) * group_vectors(inputs, VECTORS) * WIDTH; }
int64_t entry_room(int64_t inputs) { return (inputs + 1) * group_vectors(inputs, MOST) * WIDTH; }

/* nr outputs of nv vectors of rows, `width` rows in all; `lines` holds nv vectors of each of the inputs. */
INLINE void panel(const int nr, const int nv, const job *j, const float *lines, const float *weights,
                  const int32_t *read, int64_t count, int64_t first, int64_t row, int64_t width) {
  vec sums[PANEL][MOST], line[MOST];
  for (int n = 0; n < nr; n++)
    for (int v = 0; v < nv; v++) sums[n][v] = j->biases[first + n] - (vec){};
  for (int64_t r = 0; r < count; r++) {
    const float *at = lines + (int64_t)read[r] * (nv * WIDTH);
    for (int v = 0; v < nv; v++) line[v] = *(const vec *)(at + v * WIDTH);
    for (int n = 0; n < nr; n++) {
      vec weight = weights[r * nr + n] - (vec){};
      for (int v = 0; v < nv; v++) sums[n][v] += line[v] * weight;
    }
  }
  for (int n = 0; n < nr; n++) {
    float *out = (float *)j->y + j->write[first + n] * j->y_stride + row;
    if (width == nv * WIDTH)
      for (int v = 0; v < nv; v++) *(vec *)(out + v * WIDTH) = sums[n][v];
    else
      memcpy(out, sums[n], 4 * width);
  }
}

#ifdef __AVX512BF16__
typedef uint16_t half_vec __attribute__((vector_size(2 * WIDTH), aligned(2)));
typedef uint32_t pair_vec __attribute__((vector_size(4 * WIDTH), aligned(4)));

int has_half(void) { return 1; }

/* As `panel`; lines of pairs, one after the other where `read` is null. */
INLINE void half_panel(const int nr, const int nv, const job *j, const uint32_t *lines, const uint32_t *weights,
                       const int32_t *read, int64_t count, int64_t first, int64_t row, int64_t width) {
  __m512 sums[PANEL][VECTORS];
  __m512i line[VECTORS];
  for (int n = 0; n < nr; n++)
    for (int v = 0; v < nv; v++) sums[n][v] = _mm512_set1_ps(j->biases[first + n]);
  for (int64_t r = 0; r < count; r++) {
    const uint32_t *at = lines + (read ? read[r] : r) * nv * WIDTH;
    for (int v = 0; v < nv; v++) line[v] = _mm512_loadu_si512(at + v * WIDTH);
    for (int n = 0; n < nr; n++) {
      __m512i weight = _mm512_set1_epi32(weights[r * nr + n]);
      for (int v = 0; v < nv; v++) sums[n][v] = _mm512_dpbf16_ps(sums[n][v], (__m512bh)line[v], (__m512bh)weight);
    }
  }
  for (int n = 0; n < nr; n++) {
    uint16_t *out = (uint16_t *)j->y + j->write[first + n] * j->y_stride + row, rounded[VECTORS * WIDTH];
    uint16_t *to = width == nv * WIDTH ? out : rounded;
    for (int v = 0; v < nv; v++)
      _mm256_storeu_si256((__m256i *)(to + v * WIDTH), (__m256i)_mm512_cvtneps_pbh(sums[n][v]));
    if (to != out) memcpy(out, rounded, 2 * width);
  }
}

/* Lines of `count` pairs from single lines: of neighbours, or of what `read` names two by two. */
INLINE void pair_up(uint32_t *pairs, const uint16_t *lines, const int32_t *read, int64_t count, int64_t nv) {
  for (int64_t r = 0; r < count; r++)
    for (int64_t v = 0; v < nv; v++) {
      const uint16_t *one = lines + ((read ? read[2 * r] : 2 * r) * nv + v) * WIDTH;
      const uint16_t *two = lines + ((read ? read[2 * r + 1] : 2 * r + 1) * nv + v) * WIDTH;
      *(pair_vec *)(pairs + (r * nv + v) * WIDTH) = __builtin_convertvector(*(const half_vec *)one, pair_vec)
          | __builtin_convertvector(*(const half_vec *)two, pair_vec) << 16;
    }
}
#else
int has_half(void) { return 0; }
INLINE void pair_up(void *pairs, const void *lines, const int32_t *read, int64_t count, int64_t nv) {}
INLINE void half_panel(const int nr, const int nv, const job *j, const void *lines, const void *weights,
                       const int32_t *read, int64_t count, int64_t first, int64_t row, int64_t width) {}
#endif

/* Where a block begins: the group's vectors of rows from `start` to `stop` are dealt out to its blocks. */
INLINE int64_t edge(int64_t start, int64_t stop, int64_t blocks, int64_t b) {
  return start + (stop - start) * b / blocks;
}

/* Lines of the inputs, block after block, a line apart: blocks of 2^n bytes would meet in the same few places of a
   cache. */
INLINE void copy(const int is_half, const job *j, char *lines, int64_t start, int64_t stop, int64_t blocks) {
  const int64_t size = is_half ? 2 : 4, whole = j->rows / WIDTH, rest = j->rows % WIDTH * size;
  for (int64_t k = 0; k < j->inputs; k++) {
    const char *x = (const char *)j->x + k * j->x_stride * size;
    if (k + AHEAD < j->inputs)
      for (int64_t at = start * WIDTH * size; at < stop * WIDTH * size; at += 64)
        __builtin_prefetch(x + AHEAD * j->x_stride * size + at);
    for (int64_t b = 0, from = start, to; b < blocks; b++, from = to) {
      to = edge(start, stop, blocks, b + 1);
      char *line = lines + ((from - start) * (j->inputs + 1) + k * (to - from)) * WIDTH * size;
      for (int64_t i = from; i < to; i++, line += WIDTH * size)
        if (i < whole) {
          memcpy(line, x + i * WIDTH * size, WIDTH * size);
        } else {
          memset(line, 0, WIDTH * size);
          memcpy(line, x + i * WIDTH * size, rest);
        }
    }
  }
}

/* The panels `from` to `to`, for nv vectors of rows from `row` on. `pairs` holds all pairs, or those of the tile that
   reads from `paired_up` on. */
INLINE void panels(const int most_outputs, const int most, const int is_half, const job *j, const void *lines,
                   uint32_t *pairs, int64_t paired_up, int64_t from, int64_t to, int64_t nv, int64_t row,
                   int64_t width) {
  for (int64_t p = from; p < to; p++) {
    int64_t first = j->first_output[p], outputs = j->first_output[p + 1] - first, count = j->reads[p];
    const int32_t *read = j->read + j->first_read[p];
    const void *weights = (const char *)j->weights + 4 * j->first_weight[p];
    if (is_half && !j->paired) {
      count /= 2;
      if (j->first_read[p] != paired_up) pair_up(pairs, lines, read, count, nv);
      paired_up = j->first_read[p];
    }
#pragma GCC unroll 8
    for (int n = 1; n <= most_outputs; n++)
#pragma GCC unroll 8
      for (int v = 1; v <= most; v++) {
        if (outputs != n || nv != v) continue;
        if (is_half)
          half_panel(n, v, j, pairs, weights, j->paired ? read : 0, count, first, row, width);
        else
          panel(n, v, j, lines, weights, read, count, first, row, width);
      }
  }
}

/* What this thread does. It starts with groups of its own, and then helps with those of the others. It copies a
   group's blocks once: their lines then stay in the core's cache, and a tile reads those of its inputs there. */
INLINE void part(const int most_outputs, const int most, const int is_half, const job *j, int64_t me, int64_t threads) {
  int64_t vectors = (j->rows + WIDTH - 1) / WIDTH, at_once = group_vectors(j->inputs, most);
  int64_t groups = (vectors + at_once - 1) / at_once, even = (groups + threads - 1) / threads * threads;
  if (even <= vectors) groups = even;
  int64_t shares = 1 + 4 * j->first_weight[j->panels] / SHARE;
  if (threads > 1 && shares < SHARES * threads / groups) shares = SHARES * threads / groups;
  if (shares > j->panels) shares = j->panels;
  char *lines = (char *)(j->scratch + me * j->room);
  uint32_t *pairs = (uint32_t *)(j->scratch + me * j->room + j->room / 2);
  int32_t *taken = (int32_t *)(j->scratch + j->threads * j->room); /* shares, of every group */
  for (int64_t i = 0; i < groups; i++) {
    int64_t g = (me * groups / threads + i) % groups, start = vectors * g / groups, stop = vectors * (g + 1) / groups;
    int64_t blocks = (stop - start + most - 1) / most, is_copied = 0, paired_up = -1;
    for (int64_t s; (s = __atomic_fetch_add(taken + g, 1, __ATOMIC_RELAXED)) < shares; is_copied = 1) {
      int64_t first = j->panels * s / shares, end = j->panels * (s + 1) / shares;
      if (!is_copied) copy(is_half, j, lines, start, stop, blocks);
      for (int64_t b = 0; b < blocks; b++) {
        int64_t from = edge(start, stop, blocks, b), nv = edge(start, stop, blocks, b + 1) - from, row = from * WIDTH;
        int64_t width = j->rows - row < nv * WIDTH ? j->rows - row : nv * WIDTH;
        void *own_lines = lines + (is_half ? 2 : 4) * (from - start) * WIDTH * (j->inputs + 1);
        uint32_t *own_pairs = pairs + (from - start) * WIDTH * ((j->inputs + 1) / 2);
        if (!is_copied && is_half && j->paired) pair_up(own_pairs, own_lines, 0, j->inputs / 2, nv);
        panels(most_outputs, most, is_half, j, own_lines, own_pairs, paired_up, first, end, nv, row, width);
      }
      paired_up = j->first_read[end - 1];
    }
  }
}

#define PRODUCT(name, most_outputs, most, is_half)                                           \
  void name(const job *j) {                                                                  \
    memset(j->scratch + j->threads * j->room, 0, 4 * j->rows);                               \
    _Pragma("omp parallel num_threads(j->threads)")                                          \
    part(most_outputs, most, is_half, j, omp_get_thread_num(), omp_get_num_threads());       \
  }

PRODUCT(product_of_tiles, PANEL, VECTORS, 0)
PRODUCT(product_of_half_tiles, PANEL, VECTORS, 1) /* in bf16; tiles read even numbers of inputs */
PRODUCT(product_of_entries, 1, MOST, 0)           /* of panels that have a single output: more rows at a time */

#define COLUMNS 64 /* rows at once in a norm */

int64_t norm_room(void) { return COLUMNS; } /* of a feature */

INLINE float widened(const void *x, int64_t i, const int is_half) {
  if (!is_half) return ((const float *)x)[i];
  uint32_t bits = (uint32_t)((const uint16_t *)x)[i] << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

INLINE void stored(void *x, int64_t i, float value, const int is_half) {
  uint32_t bits;
  if (!is_half) {
    ((float *)x)[i] = value;
    return;
  }
  memcpy(&bits, &value, 4);
  ((uint16_t *)x)[i] = (bits + 0x7fff + (bits >> 16 & 1)) >> 16; /* to nearest, ties to even */
}

/* LayerNorm of x + y over the features, for `width` rows from `row` on, written over x. */
INLINE void norm_block(const int is_half, const int64_t width, void *x, const void *y, int64_t features, int64_t rows,
                       int64_t row, const float *weight, const float *bias, float eps, float *sums) {
  float mean[COLUMNS] = {0}, scale[COLUMNS] = {0};
  for (int64_t k = 0; k < features; k++)
    for (int64_t i = 0; i < width; i++) {
      int64_t at = k * rows + row + i;
      mean[i] += sums[k * COLUMNS + i] = widened(x, at, is_half) + widened(y, at, is_half);
    }
  for (int64_t i = 0; i < width; i++) mean[i] /= features;
  for (int64_t k = 0; k < features; k++)
    for (int64_t i = 0; i < width; i++) {
      float away = sums[k * COLUMNS + i] -= mean[i];
      scale[i] += away * away;
    }
  for (int64_t i = 0; i < width; i++) scale[i] = 1 / sqrtf(scale[i] / features + eps);
  for (int64_t k = 0; k < features; k++)
    for (int64_t i = 0; i < width; i++)
      stored(x, k * rows + row + i, sums[k * COLUMNS + i] * scale[i] * weight[k] + bias[k], is_half);
}

/* `scratch`: for every thread COLUMNS floats a feature. */
void add_and_norm(int is_half, void *x, const void *y, int64_t features, int64_t rows, const float *weight,
                  const float *bias, float eps, float *scratch, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; row += COLUMNS) {
    float *sums = scratch + omp_get_thread_num() * features * COLUMNS;
    if (row + COLUMNS > rows)
      norm_block(is_half, rows - row, x, y, features, rows, row, weight, bias, eps, sums);
    else if (is_half)
      norm_block(1, COLUMNS, x, y, features, rows, row, weight, bias, eps, sums);
    else
      norm_block(0, COLUMNS, x, y, features, rows, row, weight, bias, eps, sums);
  }
}
"""
