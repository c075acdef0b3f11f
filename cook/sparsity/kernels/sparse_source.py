"""The products of `sparse_native.py` in C, and the norm between them.

An export carries this file along. Tiles read lines of inputs where they are: nothing is gathered, and a line once
loaded serves all outputs of a panel.
"""

SOURCE = r"""
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define WIDTH 16 /* floats in a vector register */
#define PANEL 8  /* outputs at once: PANEL x TILE_VECTORS sums, the lines and a weight have to fit into the registers */
#elif defined(__AVX2__)
#define WIDTH 8
#define PANEL 4
#else
#define WIDTH 4
#ifdef __aarch64__
#define PANEL 8
#else
#define PANEL 4
#endif
#endif
/* Vectors of rows at once, at most: in products of tiles, and of single weights. */
#define TILE_VECTORS 3
#define MOST 8
#define INLINE static inline __attribute__((always_inline))
typedef float vec __attribute__((vector_size(4 * WIDTH), aligned(4)));

/* Rows are tokens. In bf16 two inputs lie side by side in 32 bits: a pair, which has one line and one weight. */
typedef struct {
  const void *x; /* [inputs, rows] */
  void *y;       /* [outputs, rows] */
  int64_t inputs, rows, x_stride, y_stride, tiles;
  int64_t paired; /* bf16: `read` names pairs (2i, 2i + 1) of inputs, not inputs */
  /* Of every tile, and where the last one ends: its first weight, its first entry of `read`, its first panel. */
  const int64_t *first_weight, *first_read, *first_panel;
  const void *weights;  /* panel after panel, [inputs or pairs of the tile, outputs of the panel] */
  const int32_t *read;  /* inputs, tile after tile */
  const int32_t *write; /* outputs, panel after panel; -1 for none */
  const float *biases;  /* likewise */
  float *scratch;       /* for every thread `room` floats */
  int64_t room, threads;
} job;

int64_t panel_outputs(void) { return PANEL; }

/* The room that an input takes: of single lines, or in bf16 half of it and half for pairs. */
int64_t tile_room(void) { return TILE_VECTORS * WIDTH; }
int64_t entry_room(void) { return MOST * WIDTH; }

/* nr outputs of nv vectors of rows, `width` rows in all; `lines` holds nv vectors of each of the inputs. */
INLINE void panel(const int nr, const int nv, const job *j, const float *lines, const float *weights,
                  const int32_t *read, int64_t count, int64_t first, int64_t row, int64_t width) {
  vec sums[PANEL][MOST], line[MOST];
  for (int n = 0; n < nr; n++)
    for (int v = 0; v < nv; v++) sums[n][v] = j->biases[first + n] - (vec){};
  for (int64_t r = 0; r < count; r++) {
    for (int v = 0; v < nv; v++) line[v] = *(const vec *)(lines + ((int64_t)read[r] * nv + v) * WIDTH);
    for (int n = 0; n < nr; n++) {
      vec weight = weights[r * nr + n] - (vec){};
      for (int v = 0; v < nv; v++) sums[n][v] += line[v] * weight;
    }
  }
  for (int n = 0; n < nr; n++) {
    if (j->write[first + n] < 0) continue;
    float *out = (float *)j->y + j->write[first + n] * j->y_stride + row;
    if (width == nv * WIDTH)
      for (int v = 0; v < nv; v++) *(vec *)(out + v * WIDTH) = sums[n][v];
    else
      memcpy(out, sums[n], 4 * width);
  }
}

/* Lines of the inputs, nv vectors each, of the block of rows that starts at `row`. */
INLINE void copy(const job *j, float *lines, int64_t nv, int64_t row, int64_t width) {
  for (int64_t k = 0; k < j->inputs; k++, lines += nv * WIDTH) {
    memcpy(lines, (const float *)j->x + k * j->x_stride + row, 4 * width);
    for (int64_t i = width; i < nv * WIDTH; i++) lines[i] = 0;
  }
}

#ifdef __AVX512BF16__
typedef uint16_t half_vec __attribute__((vector_size(2 * WIDTH), aligned(2)));
typedef uint32_t pair_vec __attribute__((vector_size(4 * WIDTH), aligned(4)));

int has_half(void) { return 1; }

/* As `panel`; lines of pairs, one after the other where `read` is null. */
INLINE void half_panel(const int nr, const int nv, const job *j, const uint32_t *lines, const uint32_t *weights,
                       const int32_t *read, int64_t count, int64_t first, int64_t row, int64_t width) {
  __m512 sums[PANEL][TILE_VECTORS];
  __m512i line[TILE_VECTORS];
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
    if (j->write[first + n] < 0) continue;
    uint16_t *out = (uint16_t *)j->y + j->write[first + n] * j->y_stride + row, rounded[TILE_VECTORS * WIDTH];
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

INLINE void half_copy(const job *j, uint16_t *lines, int64_t nv, int64_t row, int64_t width) {
  for (int64_t k = 0; k < j->inputs; k++, lines += nv * WIDTH) {
    memcpy(lines, (const uint16_t *)j->x + k * j->x_stride + row, 2 * width);
    for (int64_t i = width; i < nv * WIDTH; i++) lines[i] = 0;
  }
}
#else
int has_half(void) { return 0; }
INLINE void half_copy(const job *j, void *lines, int64_t nv, int64_t row, int64_t width) {}
INLINE void pair_up(void *pairs, const void *lines, const int32_t *read, int64_t count, int64_t nv) {}
INLINE void half_panel(const int nr, const int nv, const job *j, const void *lines, const void *weights,
                       const int32_t *read, int64_t count, int64_t first, int64_t row, int64_t width) {}
#endif

/* The part of the work that is this thread's. Products are dealt out in order, so that a thread meets few blocks of
   rows. It copies a block once: its lines then stay in the core's cache, and a tile reads those of its inputs there. */
INLINE void part(const int nr, const int most, const int is_half, const job *j, int64_t me, int64_t threads) {
  const int64_t overhead = 8; /* what a panel costs besides its products, in inputs */
  int64_t vectors = (j->rows + WIDTH - 1) / WIDTH, blocks = (vectors + most - 1) / most, work = 0, done = 0;
  int64_t even = (blocks + threads - 1) / threads * threads; /* no two threads copy the same block */
  if (even <= vectors) blocks = even;
  for (int64_t t = 0; t < j->tiles; t++)
    work += (j->first_read[t + 1] - j->first_read[t] + overhead) * (j->first_panel[t + 1] - j->first_panel[t]);
  double begin = (double)work * vectors * me / threads, end = (double)work * vectors * (me + 1) / threads;
  void *lines = j->scratch + me * j->room;
  for (int64_t b = 0; b < blocks; b++) {
    int64_t from = vectors * b / blocks, nv = vectors * (b + 1) / blocks - from, row = from * WIDTH;
    int64_t width = j->rows - row < nv * WIDTH ? j->rows - row : nv * WIDTH;
    if (done + work * nv <= begin || done >= end) {
      done += work * nv;
      continue;
    }
    if (is_half)
      half_copy(j, lines, nv, row, width);
    else
      copy(j, lines, nv, row, width);
    uint32_t *pairs = (uint32_t *)lines + j->room / 2;
    if (is_half && j->paired) pair_up(pairs, lines, 0, j->inputs / 2, nv);
    for (int64_t t = 0; t < j->tiles; t++) {
      int64_t count = j->first_read[t + 1] - j->first_read[t], first = j->first_panel[t], is_paired = j->paired;
      const int32_t *read = j->read + j->first_read[t];
      for (int64_t p = first; p < j->first_panel[t + 1]; p++, done += (count + overhead) * nv) {
        if (done < begin || done >= end) continue;
        if (is_half && !is_paired) pair_up(pairs, lines, read, count / 2, nv);
        is_paired = 1;
        int64_t products = is_half && !j->paired ? count / 2 : count;
        const char *weights = (const char *)j->weights + 4 * (j->first_weight[t] + (p - first) * products * nr);
#pragma GCC unroll 8
        for (int v = 1; v <= most; v++) {
          if (nv != v) continue;
          if (is_half)
            half_panel(nr, v, j, pairs, (const void *)weights, j->paired ? read : 0, products, p * nr, row, width);
          else
            panel(nr, v, j, lines, (const void *)weights, read, count, p * nr, row, width);
        }
      }
    }
  }
}

void product_of_tiles(const job *j) {
#pragma omp parallel num_threads(j->threads)
  part(PANEL, TILE_VECTORS, 0, j, omp_get_thread_num(), omp_get_num_threads());
}

/* In bf16; of the tiles' inputs there is an even number. */
void product_of_half_tiles(const job *j) {
#pragma omp parallel num_threads(j->threads)
  part(PANEL, TILE_VECTORS, 1, j, omp_get_thread_num(), omp_get_num_threads());
}

/* Of tiles that have a single output: more rows at a time, since each line is read for that output alone. */
void product_of_entries(const job *j) {
#pragma omp parallel num_threads(j->threads)
  part(1, MOST, 0, j, omp_get_thread_num(), omp_get_num_threads());
}

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
