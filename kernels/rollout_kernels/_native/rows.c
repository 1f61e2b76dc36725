/* The rows of a rollout from stored maps: w <- w * rownorm(residual I + attention F), from the top layer down.
 *
 * Each row of a map is read once: its heads are fused in registers, 32 columns at a time, into a buffer in the first
 * cache, which is then summed and added to the result. The rows of a sample are cut into chunks, each with a result of
 * its own, added in order where the next layer begins; a chunk is a task, whichever thread takes it. So bits hang on a
 * sample's length and the method, never on threads, batch or processor: no operations are contracted.
 *
 * Letters as in rollout_kernels: B batch, L layers, H heads, S sequence length, R start rows; n is a sample's length.
 */

#include <stdint.h>
#include <string.h>

#if !defined(__GNUC__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "this file needs the vectors of GCC or Clang, and little-endian numbers; without it the torch backend serves"
#endif

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define FOR_EACH_PROCESSOR
#endif
#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

enum { LANES = 16, BLOCK = 8, BLOCK_FLOATS = 4096, CHUNKS = 8, SHORTEST_CHUNK = 64 };
enum { FLOAT32, BFLOAT16, FLOAT16 };
enum { MEAN, MAX, MIN, WEIGHTS };

typedef float floats __attribute__((vector_size(64)));
typedef int32_t integers __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));

typedef struct {
    const char *data;       /* entry [0, 0, 0, 0] of the maps [B, H, S, S], columns dense */
    const char *end;        /* of the memory they lie in */
    const float *weights;   /* [H], read by WEIGHTS only */
    int64_t stride_batch, stride_head, stride_row; /* elements */
    int64_t heads, type;
    float attention;        /* the weight of the fused heads, as they are fused here: MEAN leaves the sum */
} layer_t;

typedef struct {
    const layer_t *layers;  /* [L], input side first */
    const int64_t *lengths; /* [B], or NULL for S */
    const float *start;     /* [B, R, S], start weights, or NULL for a start row */
    const int64_t *rows;    /* [B], that of each sample, or NULL for `row`; a negative one counts from the end */
    float *result;          /* [B, R, S] */
    float *sums;            /* [2, B, CHUNKS, R, S_pad], what each chunk adds to a layer's result */
    float *scaled;          /* [2, B, R, S_pad], a layer's start weights over its row sums */
    float *scratch;         /* [workers, scratch_floats]: BLOCK_FLOATS, or S_pad where that is more, and BLOCK * R */
    int64_t row, batch, depth, seq, padded, starts, chunks, scratch_floats;
    int64_t fusion, renormalize, together;
    float residual;
} job_t;

typedef struct {
    const job_t *job;
    int64_t first, last; /* layers done, from the top down; -1 is the result */
    int64_t next;        /* task that nobody has taken */
} region_t;

/* libtorch's torch_parallel_for: one pool of threads, torch's */
typedef int32_t (*parallel_t)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void *), void *);

INLINE floats choose(integers which, floats yes, floats no)
{
    return (floats)((which & (integers)yes) | (~which & (integers)no));
}

/* Sixteen-bit numbers, in the low half of each word; the high half is 0. */
INLINE floats widen(words bits, int64_t type)
{
    if (type == BFLOAT16)
        return (floats)(bits << 16);
    /* The exponents are 112 apart; one of all ones stays so, and below the normal numbers a subtraction is exact. */
    const words sign = (bits & 0x8000) << 16, magnitude = (bits & 0x7fff) << 13;
    const words infinite = (words)(magnitude >= (31u << 23)) & (255u << 23);
    const words normal = (magnitude + (112u << 23)) | infinite, shifted = magnitude + (113u << 23);
    const floats subnormal = (floats)shifted - (floats)((words){0} + (113u << 23));
    return (floats)((words)choose((integers)(magnitude < (1u << 23)), subnormal, (floats)normal) | sign);
}

INLINE floats load_lanes(const char *at, int64_t type)
{
    if (type == FLOAT32) {
        floats values;
        memcpy(&values, at, sizeof values);
        return values;
    }
    halves packed;
    memcpy(&packed, at, sizeof packed);
    return widen(__builtin_convertvector(packed, words), type);
}

/* The first `count` lanes, 0 beyond; what lies beyond is loaded where there is memory, and dropped. */
INLINE floats load_some(const char *at, int64_t type, int64_t count, const char *end)
{
    const int64_t size = type == FLOAT32 ? 4 : 2;
    const integers lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    if (end - at >= LANES * size)
        return (floats)((integers)load_lanes(at, type) & (lane < (int32_t)count));
    char copy[LANES * 4] = {0};
    memcpy(copy, at, count * size);
    return load_lanes(copy, type);
}

/* Two times LANES columns: in order, or of sixteen-bit numbers those with even places and those with odd ones. */
INLINE void load_pair(const char *at, int64_t type, floats pair[2])
{
    if (type == FLOAT32) {
        memcpy(pair, at, 2 * sizeof *pair);
        return;
    }
    words both;
    memcpy(&both, at, sizeof both);
    pair[0] = widen(both & 0xffff, type);
    pair[1] = type == BFLOAT16 ? (floats)(both & 0xffff0000) : widen(both >> 16, type);
}

INLINE void store_pair(float *at, int64_t type, const floats pair[2])
{
    floats a = pair[0], b = pair[1];
    if (type != FLOAT32) {
        a = __builtin_shufflevector(pair[0], pair[1], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        b = __builtin_shufflevector(pair[0], pair[1], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
    memcpy(at, &a, sizeof a);
    memcpy(at + LANES, &b, sizeof b);
}

/* One more head; NaN stays. */
INLINE floats fuse(floats fused, floats head, int64_t fusion, float weight)
{
    if (fusion == MAX)
        return choose((fused > head) | (fused != fused), fused, head);
    if (fusion == MIN)
        return choose((fused < head) | (fused != fused), fused, head);
    return fusion == WEIGHTS ? fused + weight * head : fused + head;
}

/* A row [n] of F, in `fused`, 0 up to a whole number of lanes; its sum. */
INLINE float fuse_row(const layer_t *layer, const char *row, int64_t n, float *fused, int64_t type, int64_t fusion)
{
    const int64_t size = type == FLOAT32 ? 4 : 2, next = layer->stride_head * size, heads = layer->heads;
    const float *weights = layer->weights;
    floats total = {0}, other = {0};
    int64_t j = 0;

    for (; j + 2 * LANES <= n; j += 2 * LANES) {
        const char *at = row + j * size;
        floats pair[2], head[2];
        load_pair(at, type, pair);
        if (fusion == WEIGHTS)
            pair[0] *= weights[0], pair[1] *= weights[0];
        for (int64_t h = 1; h < heads; h++) {
            const float weight = fusion == WEIGHTS ? weights[h] : 0;
            at += next;
            load_pair(at, type, head);
            pair[0] = fuse(pair[0], head[0], fusion, weight);
            pair[1] = fuse(pair[1], head[1], fusion, weight);
        }
        store_pair(fused + j, type, pair);
        total += pair[0], other += pair[1];
    }
    for (; j < n; j += LANES) {
        const int64_t count = n - j < LANES ? n - j : LANES;
        const char *at = row + j * size;
        floats a = load_some(at, type, count, layer->end);
        if (fusion == WEIGHTS)
            a *= weights[0];
        for (int64_t h = 1; h < heads; h++) {
            at += next;
            a = fuse(a, load_some(at, type, count, layer->end), fusion, fusion == WEIGHTS ? weights[h] : 0);
        }
        memcpy(fused + j, &a, sizeof a);
        total += a;
    }
    total += other;
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++)
        sum += total[lane];
    return sum;
}

#define FUSE_ROW(type)                                                                                                 \
    switch (fusion) {                                                                                                  \
    case MEAN: return fuse_row(layer, row, n, fused, type, MEAN);                                                      \
    case MAX: return fuse_row(layer, row, n, fused, type, MAX);                                                        \
    case MIN: return fuse_row(layer, row, n, fused, type, MIN);                                                        \
    default: return fuse_row(layer, row, n, fused, type, WEIGHTS);                                                     \
    }

INLINE float fuse_any_row(const layer_t *layer, int64_t b, int64_t i, int64_t n, float *fused, int64_t fusion)
{
    const int64_t size = layer->type == FLOAT32 ? 4 : 2;
    const char *row = layer->data + (b * layer->stride_batch + i * layer->stride_row) * size;
    switch (layer->type) {
    case FLOAT32: FUSE_ROW(FLOAT32)
    case BFLOAT16: FUSE_ROW(BFLOAT16)
    default: FUSE_ROW(FLOAT16)
    }
}

/* sums [R, S_pad] += coefficients [R, count] * fused [count, width]; a block of rows is added up before it is added. */
INLINE void add_block(const job_t *job, const float *fused, const float *coefficients, int64_t count, int64_t width,
                      float *sums)
{
    for (int64_t r = 0; r < job->starts; r++, coefficients += BLOCK, sums += job->padded)
        for (int64_t j = 0; j < width; j += LANES) {
            floats added = {0}, before;
            for (int64_t k = 0; k < count; k++) {
                floats values;
                memcpy(&values, fused + k * width + j, sizeof values);
                added += coefficients[k] * values;
            }
            memcpy(&before, sums + j, sizeof before);
            before += added;
            memcpy(sums + j, &before, sizeof before);
        }
}

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

INLINE int64_t rows_of_chunk(int64_t n)
{
    return larger((n + CHUNKS - 1) / CHUNKS, SHORTEST_CHUNK);
}

INLINE int64_t chunks_of(int64_t n)
{
    return larger(1, (n + rows_of_chunk(n) - 1) / rows_of_chunk(n));
}

INLINE float *sums_of(const job_t *job, int64_t layer, int64_t b, int64_t chunk, int64_t r)
{
    return job->sums + ((((layer & 1) * job->batch + b) * job->chunks + chunk) * job->starts + r) * job->padded;
}

INLINE float *scaled_of(const job_t *job, int64_t layer, int64_t b, int64_t r)
{
    return job->scaled + (((layer & 1) * job->batch + b) * job->starts + r) * job->padded;
}

/* Entries i0 to i1 of start row r as the layers above `layer` leave it. */
INLINE void load_weights(const job_t *job, int64_t layer, int64_t b, int64_t r, int64_t n, int64_t i0, int64_t i1,
                         float *weights)
{
    const int64_t above = layer + 1, count = i1 - i0;
    if (above == job->depth) {
        int64_t row = job->rows ? job->rows[b] : job->row;
        row += row < 0 ? n : 0;
        if (job->start)
            memcpy(weights, job->start + (b * job->starts + r) * job->seq + i0, count * sizeof *weights);
        else
            for (int64_t i = 0; i < count; i++)
                weights[i] = i0 + i == row;
        return;
    }
    const float attention = job->layers[above].attention, *scaled = scaled_of(job, above, b, r) + i0;
    const float *first = sums_of(job, above, b, 0, r) + i0;
    for (int64_t i = 0; i < count; i++)
        weights[i] = first[i];
    for (int64_t chunk = 1; chunk < chunks_of(n); chunk++) {
        const float *more = sums_of(job, above, b, chunk, r) + i0;
        for (int64_t i = 0; i < count; i++)
            weights[i] += more[i];
    }
    /* The residual is added after the product: accumulated first, a large weight would swallow the small terms. */
    for (int64_t i = 0; i < count; i++)
        weights[i] = attention * weights[i] + job->residual * scaled[i];
}

INLINE void do_layer(const job_t *job, int64_t l, int64_t b, int64_t n, int64_t chunk, float *scratch)
{
    const layer_t *layer = job->layers + l;
    const int64_t i0 = chunk * rows_of_chunk(n), i1 = smaller(n, i0 + rows_of_chunk(n));
    const int64_t width = (n + LANES - 1) / LANES * LANES, block = smaller(BLOCK, larger(1, BLOCK_FLOATS / width));
    float *sums = sums_of(job, l, b, chunk, 0), *coefficients = scratch, *fused = scratch + BLOCK * job->starts;
    int64_t held = 0;

    memset(sums, 0, job->starts * job->padded * sizeof *sums);
    for (int64_t r = 0; r < job->starts; r++)
        load_weights(job, l, b, r, n, i0, i1, scaled_of(job, l, b, r) + i0);
    for (int64_t i = i0; i < i1; i++) {
        int wanted = 0;
        for (int64_t r = 0; r < job->starts; r++)
            wanted |= scaled_of(job, l, b, r)[i] != 0;
        if (!wanted)
            continue;
        const float sum = fuse_any_row(layer, b, i, n, fused + held * width, job->fusion);
        const float divisor = job->renormalize ? job->residual + layer->attention * sum : 1;
        for (int64_t r = 0; r < job->starts; r++)
            coefficients[r * BLOCK + held] = scaled_of(job, l, b, r)[i] /= divisor;
        if (++held == block) {
            add_block(job, fused, coefficients, held, width, sums);
            held = 0;
        }
    }
    add_block(job, fused, coefficients, held, width, sums);
}

/* The rows of the result that the chunk owns, and 0 on the padding. */
INLINE void finish(const job_t *job, int64_t b, int64_t n, int64_t chunk)
{
    const int64_t i0 = chunk * rows_of_chunk(n), i1 = smaller(n, i0 + rows_of_chunk(n));
    for (int64_t r = 0; r < job->starts; r++) {
        float *result = job->result + (b * job->starts + r) * job->seq;
        load_weights(job, -1, b, r, n, i0, i1, result + i0);
        if (i1 == n)
            memset(result + n, 0, (job->seq - n) * sizeof *result);
    }
}

INLINE void do_chunk(const job_t *job, int64_t layer, int64_t b, int64_t n, int64_t chunk, float *scratch)
{
    if (layer >= 0)
        do_layer(job, layer, b, n, chunk, scratch);
    else
        finish(job, b, n, chunk);
}

/* What one thread does: tasks that nobody has taken, until there are none. A task is a sample with all its chunks and
 * layers, or one chunk of one layer. */
FOR_EACH_PROCESSOR
static void work(int64_t worker, int64_t end, void *context)
{
    region_t *region = context;
    const job_t *job = region->job;
    const int64_t chunks = job->together ? 1 : job->chunks;
    float *scratch = job->scratch + worker * job->scratch_floats;
    (void)end;
    for (;;) {
        const int64_t task = __atomic_fetch_add(&region->next, 1, __ATOMIC_RELAXED);
        if (task >= job->batch * chunks)
            return;
        const int64_t b = task / chunks, first = task % chunks;
        const int64_t n = job->lengths ? larger(0, smaller(job->seq, job->lengths[b])) : job->seq;
        const int64_t last = job->together ? chunks_of(n) : smaller(first + 1, chunks_of(n));
        for (int64_t layer = region->first; layer >= region->last; layer--)
            for (int64_t chunk = first; chunk < last; chunk++)
                do_chunk(job, layer, b, n, chunk, scratch);
    }
}

/* The layout that a caller must know, as a number. */
EXPORT int64_t rollout_rows_layout(void) { return 1000 * sizeof(layer_t) + sizeof(job_t); }

/* Do a job on `workers` threads of torch's pool; 0 when done. */
EXPORT int32_t rollout_rows(const job_t *job, int64_t workers, parallel_t parallel)
{
    int32_t failed = 0;
    for (int64_t layer = job->depth - 1; layer >= -1 && !failed; layer = job->together ? -2 : layer - 1) {
        region_t region = {job, layer, job->together ? -1 : layer, 0};
        failed = parallel(0, workers, 1, work, &region);
    }
    return failed;
}
