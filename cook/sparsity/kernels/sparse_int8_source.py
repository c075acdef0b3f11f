"""The layers of an encoder with int8 weights, in C: `sparse_int8.py` calls it.

An export carries this file along.

Tokens come in blocks, as many as four registers of floats have. Activations of a block are `[features, tokens]`: a line
per feature, in fp32, and in 8 bits for the products. A product puts the lines of four inputs of a tile together, four
bytes per token, as the instructions for int8 want them. Activations are rounded per token: x ~ low + step * q, q from 0
to LEVELS. So the product with a row of weights, w ~ scale * r, is scale * (step * sum(q * r) + low * sum(r)).

Packing bytes works inside 128 bits of a register, and so does putting lines together, which undoes it. In between, the
tokens of a line of bytes are in the order that the packing makes.

Threads have sequences of their own where there are enough. Else they share those of a chunk, and wait for each other
after each step.
"""

SOURCE = r"""
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

/* WIDTH: floats in a register. OUTPUTS, FLOATS: outputs of a product in int8, in fp32, for a block of tokens at once.
   LEVELS: without instructions for int8, pairs of products are added in 16 bits, which hold 2 * 127 * 127. */
#if defined(__AVX512BW__)
#include <immintrin.h>
#define WIDTH 16
#define OUTPUTS 6
#define FLOATS 6
#define OP(name) _mm512_##name
#define LOAD(from) _mm512_loadu_si512(from)
#define STORE(to, x) _mm512_storeu_si512(to, x)
typedef __m512i bytes;
#ifdef __AVX512VNNI__
#define IS_DOT "vpdpbusd %2, %1, %0"
#endif
#elif defined(__AVX2__)
#include <immintrin.h>
#define WIDTH 8
#define OUTPUTS 2
#define FLOATS 3
#define OP(name) _mm256_##name
#define LOAD(from) _mm256_loadu_si256((const __m256i *)(from))
#define STORE(to, x) _mm256_storeu_si256((__m256i *)(to), x)
typedef __m256i bytes;
#ifdef __AVXVNNI__
#define IS_DOT "%{vex%} vpdpbusd %2, %1, %0" /* plain braces would choose between dialects */
#endif
#endif

#ifdef WIDTH
#ifdef IS_DOT
#define LEVELS 255
#else
#define LEVELS 127
#endif
#define BLOCK (4 * WIDTH) /* tokens */
#define AT_ONCE 128       /* tokens that go through all layers together, at least a sequence */
#define SHARE (1 << 15)   /* bytes of weights that stay in the first cache, or the second, from block to block */
#define SHARES 4          /* that a product is cut into per thread */
#define INLINE static inline __attribute__((always_inline))
#define APART static __attribute__((noinline, noclone)) /* once in the library, which is built at the first call */
typedef float vec __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef int32_t ints __attribute__((vector_size(4 * WIDTH), aligned(4)));
#define LEAST(a, b) ((vec)OP(min_ps)(a, b))
#define MOST(a, b) ((vec)OP(max_ps)(a, b))
#define ALL(x) ((x) - (vec){})

/* sum + x * w, four unsigned bytes of x times signed ones of w to every sum. */
INLINE bytes dot(bytes sum, bytes x, bytes w) {
#ifdef IS_DOT
  __asm__(IS_DOT : "+v"(sum) : "v"(x), "v"(w)); /* for the intrinsic GCC 12 copies every sum */
  return sum;
#else
  return OP(add_epi32)(sum, OP(madd_epi16)(OP(maddubs_epi16)(x, w), OP(set1_epi16)(1)));
#endif
}

typedef struct {
  int64_t inputs, outputs, panels;
  /* Of every panel, and where the last one ends: its first weight, and its first entry of `write` and of the next
     three. */
  const int64_t *first_weight, *first_output;
  const int64_t *first_read, *reads; /* of every panel: where the inputs of its tile begin in `read`; multiples of 4 */
  const int8_t *weights;             /* panel after panel, [inputs / 4, outputs of the panel, 4] */
  const int32_t *read, *write;       /* inputs, tile after tile; outputs, panel after panel */
  const float *scales, *sums, *biases; /* of every output; `sums`: of its weights, times the scale */
} matrix;

typedef struct {
  matrix qkv, attention_output, intermediate, output;
  int64_t heads;
  float scale, attention_eps, output_eps;
  const float *attention_weight, *attention_bias, *output_weight, *output_bias; /* of the norms */
} layer;

typedef struct {
  const layer *layers;
  int64_t count;
  float *x;          /* [batch, tokens, hidden], written over */
  const float *mask; /* added to the scores: null, or [batch, keys, queries], `queries` being 1 or whole blocks */
  int64_t batch, tokens, hidden, queries;
  int64_t widest_input, widest_output, head; /* of all matrices; the largest size of a head */
  int64_t threads;
  char *scratch; /* room() bytes */
} job;

/* How a batch is cut into chunks of sequences, and what memory these need. */
typedef struct {
  int64_t per, chunks, blocks, phases, padded;
  int apart; /* each thread has chunks of its own */
  int64_t shared_room, own_room;
} plan;

typedef struct {
  int64_t size; /* threads */
  int32_t *taken;
  float *x, *y, *wide, *low, *step;
  uint8_t *q;
  char *lines;  /* of this thread */
  float *head;
} team;

int64_t int8_levels(void) { return LEVELS; }
int64_t panel_outputs(void) { return OUTPUTS; }
int64_t block_tokens(void) { return BLOCK; }

static plan planned(const job *j) {
  plan p;
  int64_t at_once = AT_ONCE / j->tokens, each = j->batch / j->threads;
  p.per = at_once < each ? at_once : each;
  if (p.per < 1) p.per = 1;
  p.chunks = (j->batch + p.per - 1) / p.per;
  p.apart = j->threads == 1 || p.chunks >= 4 * j->threads || p.chunks % j->threads == 0;
  if (!p.apart) {
    p.per = at_once < 1 ? 1 : at_once * 2 < j->batch ? at_once * 2 : j->batch;
    p.chunks = (j->batch + p.per - 1) / p.per;
  }
  p.blocks = (p.per * j->tokens + BLOCK - 1) / BLOCK;
  p.padded = (j->tokens + BLOCK - 1) / BLOCK * BLOCK;
  p.phases = 9 * j->count + 2;
  int64_t wide = j->hidden > j->widest_input ? j->hidden : j->widest_input;
  p.shared_room = p.blocks * BLOCK * (4 * (j->hidden + wide + j->widest_output + 2) + j->widest_input + 64);
  p.own_room = BLOCK * (j->widest_input + 4) + 4 * (p.padded * (3 * j->head + BLOCK) + BLOCK * j->head) + 64;
  return p;
}

static int64_t counters(const plan *p) { return (p->chunks * (p->phases + 1) * 4 + 4 + 63) / 64 * 64; }

int64_t room(const job *j) {
  plan p = planned(j);
  return counters(&p) + (p.apart ? j->threads : 1) * p.shared_room + j->threads * p.own_room;
}

/* The next item of a step, whichever thread asks; and the end of the step. */
INLINE int64_t take(team *t) { return __atomic_fetch_add(t->taken, 1, __ATOMIC_RELAXED); }
#define EACH(i, count) for (int64_t i; (i = take(t)) < (count);)
static void meet(team *t) {
  t->taken++;
  if (t->size > 1) {
#pragma omp barrier
  }
}

/* x times the normal distribution's integral, an error of 5e-5 at most up to |x| = 12: a polynomial in x * x within
   4.5 standard deviations. */
APART void gelu(float *line, int64_t nv) {
  for (int64_t v = 0; v < nv; v++) {
    vec x = *(vec *)(line + v * WIDTH), z = LEAST(MOST(x, ALL(-4.5f)), ALL(4.5f)), s = z * z;
    vec r = ALL(2.999995738e-11f);
    r = r * s - 3.283902219e-09f;
    r = r * s + 1.580253439e-07f;
    r = r * s - 4.431677242e-06f;
    r = r * s + 8.120962843e-05f;
    r = r * s - 1.036252756e-03f;
    r = r * s + 9.580651620e-03f;
    r = r * s - 6.597726694e-02f;
    r = r * s + 3.987085723e-01f;
    *(vec *)(line + v * WIDTH) = x * (z * r + 0.5f);
  }
}

/* e to the power of x, which is not positive; a relative error of 3e-6. */
INLINE vec power(vec x) {
  vec t = MOST(x * 1.44269504f, ALL(-100.0f)), shifted = t + 12582912.0f; /* rounds to an integer in the low bits */
  vec f = t - (shifted - 12582912.0f), r = ALL(9.569856161e-03f);
  r = r * f + 5.591737497e-02f;
  r = r * f + 2.402474597e-01f;
  r = r * f + 6.931218795e-01f;
  r = r * f + 9.999992630e-01f;
  return (vec)((ints)r + ((ints)shifted << 23));
}

/* A block's lines in 8 bits, and their lowest values and steps per token. */
APART void quantize(const float *x, int64_t features, uint8_t *q, float *low, float *step) {
  vec least[4], most[4], inverse[4];
  for (int v = 0; v < 4; v++) least[v] = most[v] = features ? *(const vec *)(x + v * WIDTH) : (vec){};
  for (int64_t k = 0; k < features; k++)
    for (int v = 0; v < 4; v++) {
      vec value = *(const vec *)(x + k * BLOCK + v * WIDTH);
      least[v] = LEAST(value, least[v]);
      most[v] = MOST(value, most[v]);
    }
  for (int v = 0; v < 4; v++) {
    vec range = most[v] - least[v];
    *(vec *)(low + v * WIDTH) = least[v];
    *(vec *)(step + v * WIDTH) = range * (1.0f / LEVELS);
    inverse[v] = (vec)((ints)(LEVELS / range) & (range > 0));
  }
  for (int64_t k = 0; k < features; k++) {
    bytes value[4];
    for (int v = 0; v < 4; v++)
      value[v] = OP(cvttps_epi32)((*(const vec *)(x + k * BLOCK + v * WIDTH) - least[v]) * inverse[v] + 0.5f);
    STORE(q + k * BLOCK,
          OP(packus_epi16)(OP(packs_epi32)(value[0], value[1]), OP(packs_epi32)(value[2], value[3])));
  }
}

/* The lines of a tile's inputs, four together. */
APART void put_together(const uint8_t *q, const int32_t *read, int64_t count, char *lines) {
  for (int64_t r = 0; r < count; r += 4, lines += 4 * BLOCK) {
    bytes a = LOAD(q + (int64_t)read[r] * BLOCK), b = LOAD(q + (int64_t)read[r + 1] * BLOCK);
    bytes c = LOAD(q + (int64_t)read[r + 2] * BLOCK), d = LOAD(q + (int64_t)read[r + 3] * BLOCK);
    bytes low_ab = OP(unpacklo_epi8)(a, b), high_ab = OP(unpackhi_epi8)(a, b);
    bytes low_cd = OP(unpacklo_epi8)(c, d), high_cd = OP(unpackhi_epi8)(c, d);
    STORE(lines, OP(unpacklo_epi16)(low_ab, low_cd));
    STORE(lines + BLOCK, OP(unpackhi_epi16)(low_ab, low_cd));
    STORE(lines + 2 * BLOCK, OP(unpacklo_epi16)(high_ab, high_cd));
    STORE(lines + 3 * BLOCK, OP(unpackhi_epi16)(high_ab, high_cd));
  }
}

/* nr outputs of nv registers of tokens. */
INLINE void panel(const int nr, const int nv, const matrix *m, const char *lines, const int8_t *weights, int64_t fours,
                  int64_t first, const float *low, const float *step, float *y) {
  bytes sums[OUTPUTS][4], line[4];
  for (int n = 0; n < nr; n++)
    for (int v = 0; v < nv; v++) sums[n][v] = (bytes){};
  for (int64_t r = 0; r < fours; r++) {
    for (int v = 0; v < nv; v++) line[v] = LOAD(lines + (r * 4 + v) * BLOCK);
    for (int n = 0; n < nr; n++) {
      int32_t four;
      memcpy(&four, weights + (r * nr + n) * 4, 4);
      bytes weight = OP(set1_epi32)(four);
      for (int v = 0; v < nv; v++) sums[n][v] = dot(sums[n][v], line[v], weight);
    }
  }
  for (int n = 0; n < nr; n++) {
    float *to = y + (int64_t)m->write[first + n] * BLOCK;
    float scale = m->scales[first + n], sum = m->sums[first + n], bias = m->biases[first + n];
    for (int v = 0; v < nv; v++) {
      vec rest = *(const vec *)(low + v * WIDTH) * sum + bias;
      *(vec *)(to + v * WIDTH) = OP(cvtepi32_ps)(sums[n][v]) * (*(const vec *)(step + v * WIDTH) * scale) + rest;
    }
  }
}

/* How many registers of the four to compute for that many tokens: 1, 2 or 4. */
INLINE int64_t registers(int64_t tokens) { return tokens > 2 * WIDTH ? 4 : tokens > WIDTH ? 2 : 1; }

/* From `t->q` to y, [blocks, outputs, BLOCK]. */
APART void product(team *t, const matrix *m, int64_t rows, float *y, int is_gelu) {
  int64_t blocks = (rows + BLOCK - 1) / BLOCK, shares = 1 + m->first_weight[m->panels] / SHARE;
  if (t->size > 1 && shares < SHARES * t->size) shares = SHARES * t->size;
  if (shares > m->panels) shares = m->panels;
  EACH(i, shares * blocks) {
    int64_t s = i / blocks, b = i % blocks, read = -1, nv = registers(rows - b * BLOCK);
    const uint8_t *q = t->q + b * m->inputs * BLOCK;
    float *to = y + b * m->outputs * BLOCK, *low = t->low + b * BLOCK, *step = t->step + b * BLOCK;
    for (int64_t p = m->panels * s / shares; p < m->panels * (s + 1) / shares; p++) {
      int64_t first = m->first_output[p], outputs = m->first_output[p + 1] - first, count = m->reads[p];
      if (m->first_read[p] != read) put_together(q, m->read + m->first_read[p], count, t->lines);
      read = m->first_read[p];
#pragma GCC unroll 8
      for (int n = 1; n <= OUTPUTS; n++)
#pragma GCC unroll 8
        for (int v = 0; v <= 2; v++)
          if (outputs == n && nv == 1 << v)
            panel(n, 1 << v, m, t->lines, m->weights + m->first_weight[p], count / 4, first, low, step, to);
      for (int64_t n = 0; is_gelu && n < outputs; n++) gelu(to + (int64_t)m->write[first + n] * BLOCK, nv);
    }
  }
  meet(t);
}

/* Sums over `count` lines of floats, for nr outputs: weight n of line r is weights[r * along + n * across]. */
INLINE void floats(const int nr, const int nv, const float *lines, int64_t stride, int64_t count, const float *weights,
                   int64_t along, int64_t across, float *out) {
  vec sums[FLOATS][4];
  for (int n = 0; n < nr; n++)
    for (int v = 0; v < nv; v++) sums[n][v] = (vec){};
  for (int64_t r = 0; r < count; r++, lines += stride, weights += along) {
    vec line[4];
    for (int v = 0; v < nv; v++) line[v] = *(const vec *)(lines + v * WIDTH);
    for (int n = 0; n < nr; n++) {
      vec weight = ALL(weights[n * across]);
      for (int v = 0; v < nv; v++) sums[n][v] += line[v] * weight;
    }
  }
  for (int n = 0; n < nr; n++)
    for (int v = 0; v < nv; v++) *(vec *)(out + n * BLOCK + v * WIDTH) = sums[n][v];
}

APART void float_product(int64_t outputs, int64_t nv, const float *lines, int64_t stride, int64_t count,
                          const float *weights, int64_t along, int64_t across, float *out) {
  for (int64_t start = 0; start < outputs; start += FLOATS) {
    int64_t nr = outputs - start < FLOATS ? outputs - start : FLOATS;
#pragma GCC unroll 8
    for (int n = 1; n <= FLOATS; n++)
#pragma GCC unroll 8
      for (int v = 0; v <= 2; v++)
        if (nr == n && nv == 1 << v)
          floats(n, 1 << v, lines, stride, count, weights + start * across, along, across, out + start * BLOCK);
  }
}

/* Softmax over the keys without the division; returns one over the sums in `share`. */
APART void softmax(float *scores, int64_t keys, int64_t nv, const float *mask, int64_t queries, float *share) {
  for (int64_t v = 0; v < nv; v++) {
    float *at = scores + v * WIDTH;
    vec most = ALL(-INFINITY), sum = {};
    for (int64_t k = 0; k < keys; k++) {
      vec score = *(vec *)(at + k * BLOCK);
      if (mask && queries == 1)
        *(vec *)(at + k * BLOCK) = score += mask[k];
      else if (mask)
        *(vec *)(at + k * BLOCK) = score += *(const vec *)(mask + k * queries + v * WIDTH);
      most = MOST(score, most);
    }
    for (int64_t k = 0; k < keys; k++) sum += *(vec *)(at + k * BLOCK) = power(*(vec *)(at + k * BLOCK) - most);
    *(vec *)(share + v * WIDTH) = 1.0f / sum;
  }
}

/* A feature's values of the tokens from `token` on, which can lie in several blocks. */
INLINE float *place(float *x, int64_t features, int64_t feature, int64_t token) {
  return x + (token / BLOCK * features + feature) * BLOCK + token % BLOCK;
}
INLINE int64_t piece(int64_t token, int64_t count) {
  return BLOCK - token % BLOCK < count ? BLOCK - token % BLOCK : count;
}

/* Attention of a head in a sequence, from `t->wide` to `t->y`. */
APART void attend(team *t, const job *j, const layer *l, const plan *p, int64_t sequence, int64_t own, int64_t head) {
  int64_t size = l->attention_output.inputs / l->heads, all = l->heads * size, start = own * j->tokens;
  float *parts[3] = {t->head, t->head + size * p->padded, t->head + 2 * size * p->padded};
  float *scores = parts[2] + size * p->padded, *mixed = scores + p->padded * BLOCK, share[BLOCK];
  for (int which = 0; which < 3; which++)
    for (int64_t e = 0; e < size; e++) {
      float *to = parts[which] + e * p->padded;
      for (int64_t i = 0, n; i < j->tokens; i += n) {
        n = piece(start + i, j->tokens - i);
        memcpy(to + i, place(t->wide, 3 * all, which * all + head * size + e, start + i), 4 * n);
      }
      if (which == 0)
        for (int64_t i = 0; i < j->tokens; i++) to[i] *= l->scale;
      memset(to + j->tokens, 0, 4 * (p->padded - j->tokens));
    }
  for (int64_t i = 0; i < j->tokens; i += BLOCK) {
    int64_t count = j->tokens - i < BLOCK ? j->tokens - i : BLOCK, nv = registers(count);
    const float *mask = j->mask;
    if (mask) mask += sequence * j->tokens * j->queries + (j->queries > 1 ? i : 0);
    float_product(j->tokens, nv, parts[0] + i, p->padded, size, parts[1], p->padded, 1, scores);
    softmax(scores, j->tokens, nv, mask, j->queries, share);
    float_product(size, nv, scores, BLOCK, j->tokens, parts[2], 1, p->padded, mixed);
    for (int64_t e = 0; e < size; e++) {
      for (int64_t v = 0; v < nv; v++) *(vec *)(mixed + e * BLOCK + v * WIDTH) *= *(vec *)(share + v * WIDTH);
      for (int64_t at = 0, n; at < count; at += n) {
        n = piece(start + i + at, count - at);
        memcpy(place(t->y, all, head * size + e, start + i + at), mixed + e * BLOCK + at, 4 * n);
      }
    }
  }
}

/* LayerNorm of x + y over the features of a block, written over x. */
APART void norm(float *x, const float *y, int64_t features, const float *weight, const float *bias, float eps) {
  vec mean[4] = {}, scale[4] = {};
  for (int64_t k = 0; k < features; k++)
    for (int v = 0; v < 4; v++) {
      float *at = x + k * BLOCK + v * WIDTH;
      mean[v] += *(vec *)at += *(const vec *)(y + k * BLOCK + v * WIDTH);
    }
  for (int v = 0; v < 4; v++) mean[v] *= 1.0f / features;
  for (int64_t k = 0; k < features; k++)
    for (int v = 0; v < 4; v++) {
      vec away = *(vec *)(x + k * BLOCK + v * WIDTH) - mean[v];
      scale[v] += away * away;
    }
  for (int v = 0; v < 4; v++) scale[v] = 1.0f / (vec)OP(sqrt_ps)(scale[v] * (1.0f / features) + eps);
  for (int64_t k = 0; k < features; k++)
    for (int v = 0; v < 4; v++) {
      float *at = x + k * BLOCK + v * WIDTH;
      *(vec *)at = (*(vec *)at - mean[v]) * (scale[v] * weight[k]) + bias[k];
    }
}

/* Between [tokens, features] and the lines of a block. */
APART void turn(float *x, float *lines, int64_t features, int64_t count, int is_back) {
  if (!is_back && count < BLOCK) memset(lines, 0, 4 * features * BLOCK);
  for (int64_t start = 0; start < features; start += 16)
    for (int64_t i = 0; i < count; i++)
      for (int64_t k = start; k < features && k < start + 16; k++)
        if (is_back)
          x[i * features + k] = lines[k * BLOCK + i];
        else
          lines[k * BLOCK + i] = x[i * features + k];
}

static void norms(team *t, const job *j, int64_t blocks, const float *y, const float *weight, const float *bias,
                  float eps) {
  EACH(b, blocks) {
    float *x = t->x + b * j->hidden * BLOCK;
    norm(x, y + b * j->hidden * BLOCK, j->hidden, weight, bias, eps);
    quantize(x, j->hidden, t->q + b * j->hidden * BLOCK, t->low + b * BLOCK, t->step + b * BLOCK);
  }
  meet(t);
}

static void rounded(team *t, int64_t blocks, const float *x, int64_t features) {
  EACH(b, blocks)
  quantize(x + b * features * BLOCK, features, t->q + b * features * BLOCK, t->low + b * BLOCK, t->step + b * BLOCK);
  meet(t);
}

/* All layers for a chunk of sequences. */
static void through(team *t, const job *j, const plan *p, int64_t c) {
  int64_t first = c * p->per, own = j->batch - first < p->per ? j->batch - first : p->per, rows = own * j->tokens;
  int64_t blocks = (rows + BLOCK - 1) / BLOCK;
  float *x = j->x + first * j->tokens * j->hidden;
  EACH(b, blocks) {
    float *lines = t->x + b * j->hidden * BLOCK;
    turn(x + b * BLOCK * j->hidden, lines, j->hidden, rows - b * BLOCK < BLOCK ? rows - b * BLOCK : BLOCK, 0);
    quantize(lines, j->hidden, t->q + b * j->hidden * BLOCK, t->low + b * BLOCK, t->step + b * BLOCK);
  }
  meet(t);
  for (const layer *l = j->layers; l < j->layers + j->count; l++) {
    product(t, &l->qkv, rows, t->wide, 0);
    EACH(i, own * l->heads) attend(t, j, l, p, first + i / l->heads, i / l->heads, i % l->heads);
    meet(t);
    rounded(t, blocks, t->y, l->attention_output.inputs);
    product(t, &l->attention_output, rows, t->wide, 0);
    norms(t, j, blocks, t->wide, l->attention_weight, l->attention_bias, l->attention_eps);
    product(t, &l->intermediate, rows, t->wide, 1);
    rounded(t, blocks, t->wide, l->intermediate.outputs);
    product(t, &l->output, rows, t->y, 0);
    norms(t, j, blocks, t->y, l->output_weight, l->output_bias, l->output_eps);
  }
  EACH(b, blocks)
  turn(x + b * BLOCK * j->hidden, t->x + b * j->hidden * BLOCK, j->hidden,
       rows - b * BLOCK < BLOCK ? rows - b * BLOCK : BLOCK, 1);
  meet(t);
}

static char *cut(char **at, int64_t size) {
  char *found = *at;
  *at += (size + 63) / 64 * 64;
  return found;
}

void encode(const job *j) {
  plan p = planned(j);
  int32_t *taken = (int32_t *)j->scratch;
  memset(taken, 0, counters(&p));
#pragma omp parallel num_threads(j->threads)
  {
    int64_t me = omp_get_thread_num(), teams = p.apart ? j->threads : 1, c;
    char *shared = j->scratch + counters(&p) + (p.apart ? me : 0) * p.shared_room;
    char *mine = j->scratch + counters(&p) + teams * p.shared_room + me * p.own_room;
    int64_t tokens = p.blocks * BLOCK, wide = j->hidden > j->widest_input ? j->hidden : j->widest_input;
    team t = {.size = p.apart ? 1 : omp_get_num_threads()};
    t.x = (float *)cut(&shared, 4 * tokens * j->hidden);
    t.y = (float *)cut(&shared, 4 * tokens * wide);
    t.wide = (float *)cut(&shared, 4 * tokens * j->widest_output);
    t.low = (float *)cut(&shared, 4 * tokens);
    t.step = (float *)cut(&shared, 4 * tokens);
    t.q = (uint8_t *)cut(&shared, tokens * j->widest_input);
    t.lines = cut(&mine, BLOCK * (j->widest_input + 4));
    t.head = (float *)mine;
    for (c = 0; p.apart ? (c = __atomic_fetch_add(taken, 1, __ATOMIC_RELAXED)) < p.chunks : c < p.chunks; c++) {
      t.taken = taken + 1 + c * p.phases;
      through(&t, j, &p, c);
    }
  }
}

int64_t product_room(int64_t inputs, int64_t outputs) {
  return BLOCK * (4 * (inputs > outputs ? inputs : outputs) + 8 + 2 * inputs + 4);
}

/* One product, from x, [rows, inputs], to y, [rows, outputs]; `scratch`: product_room() bytes for every thread. */
void multiply(const matrix *m, float *x, int64_t rows, float *y, int is_gelu, char *scratch, int64_t threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t row = 0; row < rows; row += BLOCK) {
    int64_t count = rows - row < BLOCK ? rows - row : BLOCK;
    int32_t taken[2] = {0};
    char *at = scratch + omp_get_thread_num() * product_room(m->inputs, m->outputs);
    float *lines = (float *)cut(&at, 4 * BLOCK * (m->inputs > m->outputs ? m->inputs : m->outputs));
    team t = {.size = 1, .taken = taken, .low = (float *)cut(&at, 4 * BLOCK), .step = (float *)cut(&at, 4 * BLOCK)};
    t.q = (uint8_t *)cut(&at, BLOCK * m->inputs);
    t.lines = at;
    turn(x + row * m->inputs, lines, m->inputs, count, 0);
    quantize(lines, m->inputs, t.q, t.low, t.step);
    product(&t, m, count, lines, is_gelu);
    turn(y + row * m->outputs, lines, m->outputs, count, 1);
  }
}
#else
int64_t int8_levels(void) { return 0; }
#endif
"""
