/*
 * mustafar: decode attention on a pruned, bitmap-compressed KV cache.
 * SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * Generated from src/capi by `MUSTAFAR_BLESS=1 cargo test --test headers`; do not edit. docs/c-api.md is the manual.
 *
 * - Start a structure from its _INIT macro: it sets struct_size and zeroes the rest, and zero means "default" or
 *   "not given". Structures only grow at the end; programs compiled with an older header keep working.
 * - Data pointers (tensors, pages, arrays in structures, workspace) point into the memory of the context: host memory
 *   on the CPU backend. Structures themselves, sequence numbers, sizes and snapshots are host memory always.
 * - Every call but a few that cannot fail returns a mustafar_status; mustafar_last_error_message() says in words what
 *   was wrong. Unless a call says otherwise, a failing one has written to none of its outputs.
 * - Counts, sizes of dimensions and strides are int64_t so that a negative one is refused, not taken for a huge one.
 */


#ifndef MUSTAFAR_H
#define MUSTAFAR_H

#include <stddef.h>
#include <stdint.h>

/* Define before including to decorate the declarations. */
#ifndef MUSTAFAR_API
#define MUSTAFAR_API
#endif

/* Version of this header; mustafar_version() and mustafar_version_number() give the library's. */
#define MUSTAFAR_VERSION "0.1.0"
#define MUSTAFAR_VERSION_MAJOR 0
#define MUSTAFAR_VERSION_MINOR 1
#define MUSTAFAR_VERSION_PATCH 0
#define MUSTAFAR_VERSION_NUMBER \
    (MUSTAFAR_VERSION_MAJOR * 1000000 + MUSTAFAR_VERSION_MINOR * 1000 + MUSTAFAR_VERSION_PATCH)

/** Version of the page format that this library writes and reads. */
#define MUSTAFAR_FORMAT_VERSION 2

/** Alignment of a page and of each of its sections, in bytes. */
#define MUSTAFAR_PAGE_ALIGN 16

/** `sinks` of a cache that keeps no first tokens dense. 0 asks for the default. */
#define MUSTAFAR_SINKS_NONE 4294967295

/** What a call returns. Numbers never change their meaning and are never reused; new ones may be added. */
enum mustafar_status
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /** Done. */
    MUSTAFAR_STATUS_SUCCESS = 0,
    /** An argument has a value that is never valid, or that contradicts another argument. */
    MUSTAFAR_STATUS_INVALID_ARGUMENT = 1,
    /** A pointer that must point somewhere is NULL. */
    MUSTAFAR_STATUS_NULL_POINTER = 2,
    /** An address, stride or offset is not a multiple of the alignment it needs. */
    MUSTAFAR_STATUS_MISALIGNED = 3,
    /** A product or sum of sizes does not fit. */
    MUSTAFAR_STATUS_OVERFLOW = 4,
    /** A slot, page number, length or other index lies outside what it indexes. */
    MUSTAFAR_STATUS_OUT_OF_RANGE = 5,
    /** A buffer or workspace is smaller than the call needs. */
    MUSTAFAR_STATUS_BUFFER_TOO_SMALL = 6,
    /** A valid request that no kernel serves. */
    MUSTAFAR_STATUS_UNSUPPORTED = 7,
    /** A ragged page cannot hold the values its rows keep. */
    MUSTAFAR_STATUS_PAGE_OVERFLOW = 8,
    /** The cache has no free page or sequence left. */
    MUSTAFAR_STATUS_CACHE_FULL = 9,
    /** The allocator refused. */
    MUSTAFAR_STATUS_OUT_OF_MEMORY = 10,
    /** Page or snapshot bytes violate the format. */
    MUSTAFAR_STATUS_CORRUPT_DATA = 11,
    /** Data or a structure belongs to an incompatible version or configuration. */
    MUSTAFAR_STATUS_VERSION_MISMATCH = 12,
    /** The backend cannot run here. */
    MUSTAFAR_STATUS_UNAVAILABLE = 13,
    /** The CUDA driver refused a call; the message has its code. */
    MUSTAFAR_STATUS_CUDA = 14,
    /** A defect of this library. Outputs are undefined, the process and other objects are intact. */
    MUSTAFAR_STATUS_INTERNAL = 15,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum mustafar_status mustafar_status;
#else
typedef int32_t mustafar_status;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/** Element type of a dense tensor. The discriminants are the codes of the C ABI; they are never reused. */
enum mustafar_dtype
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /** IEEE 754 binary16. */
    MUSTAFAR_DTYPE_F16 = 1,
    /** bfloat16. */
    MUSTAFAR_DTYPE_BF16 = 2,
    /** IEEE 754 binary32; never what is pruned. */
    MUSTAFAR_DTYPE_F32 = 3,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum mustafar_dtype mustafar_dtype;
#else
typedef uint32_t mustafar_dtype;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * Type of the values in a page. The discriminants are the codes of the page format, of the C ABI and of snapshots;
 * they are never reused, and those of the 16-bit types are the codes of these types for tensors.
 */
enum mustafar_value_type
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /** IEEE 754 binary16, as the tensor had it. */
    MUSTAFAR_VALUE_TYPE_F16 = 1,
    /** bfloat16, as the tensor had it. */
    MUSTAFAR_VALUE_TYPE_BF16 = 2,
    /**
     * 8-bit floats with 4 bits of exponent and 3 of fraction (OCP E4M3: no infinities, at most 448), times a bfloat16
     * scale of the row.
     */
    MUSTAFAR_VALUE_TYPE_E4M3 = 16,
    /** 8-bit integers, times a bfloat16 scale of the row. */
    MUSTAFAR_VALUE_TYPE_INT8 = 17,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum mustafar_value_type mustafar_value_type;
#else
typedef uint32_t mustafar_value_type;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * Attention over pages beside attention over the same tokens dense in 16 bits, on the same machine: by cuDNN on CUDA, by this
 * library on the CPU. The discriminants are the codes of the C ABI.
 */
enum mustafar_speed
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /** Faster than dense. */
    MUSTAFAR_SPEED_FASTER = 1,
    /** Within about a tenth of dense; which of the two is faster depends on machine and shape. */
    MUSTAFAR_SPEED_EVEN = 2,
    /** Slower than dense, on some of the machines measured if not on all. */
    MUSTAFAR_SPEED_SLOWER = 3,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum mustafar_speed mustafar_speed;
#else
typedef uint32_t mustafar_speed;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/** How the rows of a page share its values. */
enum mustafar_rows
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /**
     * Every row keeps `keep` values: the size of a page follows from the format alone, and tokens can be appended
     * one at a time.
     */
    MUSTAFAR_ROWS_UNIFORM = 0,
    /** Counts differ; a page has room for `capacity` values. */
    MUSTAFAR_ROWS_RAGGED = 1,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum mustafar_rows mustafar_rows;
#else
typedef uint32_t mustafar_rows;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/** Where ops run, and in which memory data pointers point. */
enum mustafar_backend
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /** On the calling process's processor; all pointers are host pointers. */
    MUSTAFAR_BACKEND_CPU = 0,
    /** On a CUDA device; all data pointers are device pointers. Structures are host memory all the same. */
    MUSTAFAR_BACKEND_CUDA = 1,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum mustafar_backend mustafar_backend;
#else
typedef uint32_t mustafar_backend;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/** Which elements survive pruning. */
enum mustafar_selection
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /** Token direction: the `keep` largest scores of each row; ties go to the lower channel. */
    MUSTAFAR_SELECTION_TOKEN = 0,
    /**
     * Token direction as the original Mustafar prunes: every magnitude of at least the `dropped`-th smallest, so
     * rows with ties keep more.
     */
    MUSTAFAR_SELECTION_TOKEN_REFERENCE_TIES = 1,
    /**
     * Channel direction: in each group of 32 consecutive tokens, each channel keeps its `keep` largest magnitudes;
     * ties go to the older token.
     */
    MUSTAFAR_SELECTION_CHANNEL = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum mustafar_selection mustafar_selection;
#else
typedef uint32_t mustafar_selection;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/** How keys (K) or values (V) are chosen; docs/accuracy.md says what each costs. x is an element of K or V. */
enum mustafar_strategy
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /** KT_MAG for keys, VT_MAG for values. */
    MUSTAFAR_STRATEGY_DEFAULT = 0,
    /** "Kt_Mag": in each row of K the largest abs(x). */
    MUSTAFAR_STRATEGY_KT_MAG = 1,
    /**
     * "Kt_Opa": in each row of K the largest abs(x) * w, w being the mean abs(q) of the last 32 queries, summed over the
     * query heads of the KV head.
     */
    MUSTAFAR_STRATEGY_KT_OPA = 2,
    /** "Kc_Mag": in 32 consecutive tokens, each channel of K keeps its largest abs(x). */
    MUSTAFAR_STRATEGY_KC_MAG = 3,
    /** "think": whole channels of K, chosen once by mean q^2 of the last 32 queries times mean x^2. */
    MUSTAFAR_STRATEGY_THINK = 4,
    /** "Vt_Mag": in each row of V the largest abs(x). */
    MUSTAFAR_STRATEGY_VT_MAG = 5,
    /** "Vt_Opa": in each row of V the largest abs(x) times the token's attention, which is the choice of VT_MAG. */
    MUSTAFAR_STRATEGY_VT_OPA = 6,
    /** "Vc_Mag": in 32 consecutive tokens, each channel of V keeps its largest abs(x). */
    MUSTAFAR_STRATEGY_VC_MAG = 7,
    /**
     * "Vc_Opa": in 32 consecutive tokens, each channel of V keeps its largest abs(x) * a, a being the token's attention,
     * summed over the last 32 queries and the query heads of the KV head.
     */
    MUSTAFAR_STRATEGY_VC_OPA = 8,
    /** "thinv": whole channels of V, chosen once by mean x^2. */
    MUSTAFAR_STRATEGY_THINV = 9,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum mustafar_strategy mustafar_strategy;
#else
typedef uint32_t mustafar_strategy;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/** Whether a cache centres keys before it prunes them. */
enum mustafar_center_mode
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /** Keys are stored as they are. */
    MUSTAFAR_CENTER_MODE_NONE = 0,
    /** Each layer of a sequence subtracts the per-channel median of the first tokens it compresses. */
    MUSTAFAR_CENTER_MODE_MEDIAN = 1,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum mustafar_center_mode mustafar_center_mode;
#else
typedef uint32_t mustafar_center_mode;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * A cache: it owns pages, dense window and sinks. One call at a time: calls on the same cache must not overlap, unless
 * all of them take it const.
 */
typedef struct mustafar_cache mustafar_cache;

/**
 * A backend that is ready to run ops. Immutable: any number of threads may use one at the same time. Not to be used
 * in a child process after fork.
 */
typedef struct mustafar_context mustafar_context;

/**
 * The format of a page: `page_tokens` consecutive tokens of one KV head, K or V. Formats with equal fields have
 * byte-compatible pages. `docs/format.md` describes the bytes.
 */
typedef struct mustafar_format {
    /** sizeof(mustafar_format). */
    size_t struct_size;
    /** A mustafar_rows. */
    uint32_t rows;
    /** A mustafar_value_type. Required. */
    uint32_t value_type;
    /** Channels per row: 64, 96, 128 or 256. Required. */
    uint32_t head_dim;
    /** Tokens per page: 16, 32, 64 or 128; 0 is 64. */
    uint32_t page_tokens;
    /** Uniform pages: values kept per row, 1 to head_dim. Ragged pages: 0. */
    uint32_t keep;
    /** Ragged pages: values a page has room for, 0 to page_tokens * head_dim. Uniform pages: 0. */
    uint32_t capacity;
} mustafar_format;

/** Where the sections of a page lie. All in bytes from its start. */
typedef struct mustafar_page_layout {
    /** sizeof(mustafar_page_layout). */
    size_t struct_size;
    /** Size of a page, a multiple of 16. */
    size_t page_bytes;
    /** Size of the same tokens stored dense in 16 bits. */
    size_t dense_bytes;
    /** Size of the bitmap, which starts the page. */
    size_t bitmap_bytes;
    /** Start of the row offsets; 0 in uniform pages, which have none. */
    size_t offsets_offset;
    /** Start of the scales; 0 in pages of 16-bit values, which have none. */
    size_t scales_offset;
    /** Start of the values. */
    size_t values_offset;
    /** Values a page holds at most. */
    size_t capacity;
    /** Alignment that a page needs. */
    size_t alignment;
} mustafar_page_layout;

/** How to make a context. */
typedef struct mustafar_context_config {
    /** sizeof(mustafar_context_config). */
    size_t struct_size;
    /** A mustafar_backend. */
    uint32_t backend;
    /** CPU: threads one op may use, 1 to 1024; 0 is 1, which keeps every op on the calling thread. CUDA: 0. */
    uint32_t threads;
    /** CUDA: index of the device, as the driver counts them. CPU: 0. */
    uint32_t device;
    /** Must be 0. */
    uint32_t reserved;
} mustafar_context_config;

/**
 * How often the CUDA ops of a context left something undone because of what device arrays held. Nothing else tells:
 * the calls have returned long before.
 */
typedef struct mustafar_device_errors {
    /** sizeof(mustafar_device_errors). */
    size_t struct_size;
    /** Tokens that append skipped: slot or sequence out of range. */
    uint32_t append;
    /** Pages (of one head) that compress left unwritten: too full, or page number out of range. */
    uint32_t compress;
    /**
     * Lengths and page numbers that decompress, spmv_key or spmv_value found out of range, and rows whose bitmap does
     * not fit their values.
     */
    uint32_t read;
    /** Written as 0. */
    uint32_t reserved;
} mustafar_device_errors;

/**
 * A dense tensor [batch, tokens, heads, dim] that is written. Elements of a row of `dim` are adjacent; the other
 * dimensions have strides in elements. Three strides of 0 mean contiguous in this order; otherwise each stride counts
 * as it is. Dimensions of 0 are legal, and `data` may then be NULL. Rows must not overlap each other or an input of
 * the same call.
 */
typedef struct mustafar_tensor_mut {
    /** sizeof(mustafar_tensor_mut). */
    size_t struct_size;
    /** Element [0, 0, 0, 0], aligned to the element type, in the memory of the context (host or device). */
    void *data;
    /** A mustafar_dtype. Required. */
    uint32_t dtype;
    /** Must be 0. */
    uint32_t reserved;
    /** Sequences. */
    int64_t batch;
    /** Tokens per sequence. */
    int64_t tokens;
    /** Heads. */
    int64_t heads;
    /** Elements per row. */
    int64_t dim;
    /** Elements from one sequence to the next; not negative. */
    int64_t batch_stride;
    /** Elements from one token to the next; not negative. */
    int64_t token_stride;
    /** Elements from one head to the next; not negative. */
    int64_t head_stride;
} mustafar_tensor_mut;

/** Arguments of mustafar_prune. */
typedef struct mustafar_prune_args {
    /** sizeof(mustafar_prune_args). */
    size_t struct_size;
    /**
     * f16 or bf16 [batch, tokens, heads, dim], changed in place: dropped elements become +0. Tokens must be a multiple
     * of 32 for the channel direction. Required.
     */
    const struct mustafar_tensor_mut *x;
    /** A mustafar_selection. */
    uint32_t selection;
    /** TOKEN: values kept per row, 1 to dim. CHANNEL: tokens kept per channel and group, 1 to 32. Else 0. */
    uint32_t keep;
    /** TOKEN_REFERENCE_TIES: 1 to dim, max(1, floor(sparsity * dim)). Else 0. */
    uint32_t dropped;
    /** Must be 0. */
    uint32_t reserved;
    /**
     * Selection weights, float [heads, dim], each >= 0 (checked on the CPU only): the score is abs(x) * w. TOKEN only.
     * NULL: plain magnitude.
     */
    const float *weights;
    /**
     * Receives the mask, contiguous [batch, tokens, heads, dim / 8] bytes, bit c % 8 of byte c / 8 for channel c. May
     * be NULL.
     */
    uint8_t *mask;
    /**
     * Token weights, float [batch, tokens, heads], each >= 0 (checked on the CPU only): the score is abs(x) * w.
     * CHANNEL only. NULL: plain magnitude.
     */
    const float *token_weights;
} mustafar_prune_args;

/** As mustafar_tensor_mut, for a tensor that is read. A stride of 0 repeats the same data. */
typedef struct mustafar_tensor {
    /** sizeof(mustafar_tensor). */
    size_t struct_size;
    /** As in mustafar_tensor_mut; never written. */
    const void *data;
    /** A mustafar_dtype. Required. */
    uint32_t dtype;
    /** Must be 0. */
    uint32_t reserved;
    /** Sequences. */
    int64_t batch;
    /** Tokens per sequence. */
    int64_t tokens;
    /** Heads. */
    int64_t heads;
    /** Elements per row. */
    int64_t dim;
    /** Elements from one sequence to the next; not negative. */
    int64_t batch_stride;
    /** Elements from one token to the next; not negative. */
    int64_t token_stride;
    /** Elements from one head to the next; not negative. */
    int64_t head_stride;
} mustafar_tensor;

/** Arguments of mustafar_query_weights. */
typedef struct mustafar_query_weights_args {
    /** sizeof(mustafar_query_weights_args). */
    size_t struct_size;
    /** Queries of one sequence after RoPE, f16, bf16 or f32 [1, tokens, q_heads, dim]; the newest 32 for Kt_Opa. Required. */
    const struct mustafar_tensor *q;
    /** KV heads, a divisor of q_heads. */
    int64_t kv_heads;
    /** Receives float [kv_heads, dim]. Required. */
    float *out;
} mustafar_query_weights_args;

/**
 * Key centre: compressed keys are stored as round16(k - c), and attention adds scale * (q . c) to the score of every
 * compressed token. Pages must be read with the centre they were written with.
 */
typedef struct mustafar_center {
    /** sizeof(mustafar_center). */
    size_t struct_size;
    /** float [batch, kv_heads, head_dim], contiguous, in the memory of the context. */
    const float *values;
    /** 1 (one centre for all sequences) or one per sequence. */
    int64_t batch;
} mustafar_center;

/** Arguments of mustafar_structured_weights. */
typedef struct mustafar_structured_weights_args {
    /** sizeof(mustafar_structured_weights_args). */
    size_t struct_size;
    /** K or V of one sequence, f16 or bf16 [1, tokens, kv_heads, dim]. Required. */
    const struct mustafar_tensor *x;
    /** Centre subtracted before x is judged; batch 1. NULL: none. */
    const struct mustafar_center *center;
    /** Queries as mustafar_query_weights takes them ("think"). NULL: x alone counts ("thinv"). */
    const struct mustafar_tensor *q;
    /** Channels kept of each KV head, 1 to dim. */
    int64_t keep;
    /** Receives float [kv_heads, dim]. Required. */
    float *out;
} mustafar_structured_weights_args;

/** Arguments of mustafar_token_weights. */
typedef struct mustafar_token_weights_args {
    /** sizeof(mustafar_token_weights_args). */
    size_t struct_size;
    /** Queries as mustafar_query_weights takes them. Required. */
    const struct mustafar_tensor *q;
    /** Their natural-log log-sum-exps as mustafar_attend gives them, f32 [1, tokens of q, q_heads, 1]. Required. */
    const struct mustafar_tensor *lse;
    /**
     * Position of the newest query in its sequence; the others stand one before another. With their number below 2^31, as
     * that of the first key with the number of keys.
     */
    int64_t q_position;
    /** Keys as the queries saw them, f16, bf16 or f32 [1, tokens, kv_heads, dim]. Required. */
    const struct mustafar_tensor *k;
    /** Position of the first key. */
    int64_t k_position;
    /** A query sees only this many last positions, its own included; 0: all. */
    int64_t sliding_window;
    /** Factor of q.k; 0 is 1 / sqrt(dim). */
    float scale;
    /** c > 0 turns a score s into c * tanh(s / c); 0: off. */
    float softcap;
    /** Receives float [tokens, kv_heads]. Required. */
    float *out;
} mustafar_token_weights_args;

/**
 * Pages of one side (K or V) that are written: page p of KV head h starts at `data + p * page_stride + h *
 * head_stride` bytes. K and V pages may share slots ([K page | V page]): two pools with the same strides and different
 * `data`.
 */
typedef struct mustafar_pool_mut {
    /** sizeof(mustafar_pool_mut). */
    size_t struct_size;
    /** Page 0 of head 0, aligned to 16 bytes, in the memory of the context. May be NULL in an empty pool. */
    void *data;
    /** Format of every page. Required. */
    const struct mustafar_format *format;
    /** Pages per head. */
    int64_t num_pages;
    /** KV heads. */
    int64_t kv_heads;
    /**
     * Bytes from one page to the next of the same head, a multiple of 16. Both strides 0: [num_pages][kv_heads] pages
     * back to back.
     */
    int64_t page_stride;
    /** Bytes from one head to the next of the same page, a multiple of 16. */
    int64_t head_stride;
} mustafar_pool_mut;

/** One side (K or V) of mustafar_append. */
typedef struct mustafar_append_side {
    /** sizeof(mustafar_append_side). */
    size_t struct_size;
    /**
     * New tokens [1, tokens, kv_heads, head_dim] in the type of the pages' values; for pages of 8-bit
     * values f16 or bf16. Required.
     */
    const struct mustafar_tensor *x;
    /** Destination: uniform pages. Required. */
    const struct mustafar_pool_mut *pool;
    /** Selection weights, float [kv_heads, head_dim], each >= 0 (checked on the CPU only). NULL: plain magnitude. */
    const float *weights;
    /** Centre subtracted before selecting and storing. NULL: none. */
    const struct mustafar_center *center;
} mustafar_append_side;

/** Arguments of mustafar_append: K, V or both, stored at the same slots. */
typedef struct mustafar_append_args {
    /** sizeof(mustafar_append_args). */
    size_t struct_size;
    /** Keys; NULL: none. */
    const struct mustafar_append_side *k;
    /** Values; NULL: none. */
    const struct mustafar_append_side *v;
    /**
     * Slot of each token, int64 [tokens]: page * page_tokens + offset, or -1 to skip the token. On the CPU a slot
     * given twice keeps the later token; on CUDA slots must be distinct, else such a row is a mixture. Required.
     */
    const int64_t *slots;
    /**
     * Sequence of each token, int32 [tokens]: row of a per-sequence centre. Required exactly when a centre has
     * batch > 1.
     */
    const int32_t *sequence;
} mustafar_append_args;

/** Arguments of mustafar_compress. */
typedef struct mustafar_compress_args {
    /** sizeof(mustafar_compress_args). */
    size_t struct_size;
    /**
     * Dense tokens [1, tokens, kv_heads, head_dim] in the type of the pages' values; for pages of 8-bit
     * values f16 or bf16. Required.
     */
    const struct mustafar_tensor *x;
    /**
     * What to keep, contiguous [tokens, kv_heads, head_dim / 8] bytes as mustafar_prune writes them. NULL: everything
     * but +0 and -0.
     */
    const uint8_t *mask;
    /** Destination: ragged pages. Required. */
    const struct mustafar_pool_mut *pool;
    /**
     * Page that receives tokens i * page_tokens and following, int32 [ceil(tokens / page_tokens)], no page twice
     * (checked on the CPU only). Rows of the last page after the last token become empty. Required.
     */
    const int32_t *pages;
    /**
     * Receives how many values each page holds, uint32 [pages, kv_heads]; more than its capacity where it cannot hold
     * them and was not written. May be NULL.
     */
    uint32_t *needed;
} mustafar_compress_args;

/** As mustafar_pool_mut, for pages that are read. */
typedef struct mustafar_pool {
    /** sizeof(mustafar_pool). */
    size_t struct_size;
    /** As in mustafar_pool_mut; never written. */
    const void *data;
    /** Format of every page. Required. */
    const struct mustafar_format *format;
    /** Pages per head. */
    int64_t num_pages;
    /** KV heads. */
    int64_t kv_heads;
    /** Bytes from one page to the next of the same head, a multiple of 16; both strides 0 as in mustafar_pool_mut. */
    int64_t page_stride;
    /** Bytes from one head to the next of the same page, a multiple of 16. */
    int64_t head_stride;
} mustafar_pool;

/**
 * Which pages hold the compressed tokens of each sequence of a batch, and how many tokens that is. Arrays are in the
 * memory of the context.
 */
typedef struct mustafar_sequences {
    /** sizeof(mustafar_sequences). */
    size_t struct_size;
    /** Sequences. */
    int64_t batch;
    /**
     * Upper bound of every length, in tokens. Sizes and launch plans depend on it, never on `lens`, so a captured
     * graph may be replayed with other lengths and tables.
     */
    int64_t max_len;
    /**
     * Page numbers, int32 [batch, >= ceil(max_len / page_tokens)]; entries past a sequence's last page are never
     * used. NULL: sequence b lies in pages b * ceil(max_len / page_tokens) and following.
     */
    const int32_t *table;
    /** Elements from one row of `table` to the next; 0 is ceil(max_len / page_tokens). */
    int64_t table_stride;
    /** Compressed tokens, int32 [batch], or [batch, kv_heads] if lens_per_head; 0 to max_len. */
    const int32_t *lens;
    /** 1 if `lens` has a length per KV head (token-eviction methods), else 0. */
    uint32_t lens_per_head;
    /** Must be 0. */
    uint32_t reserved;
} mustafar_sequences;

/** Arguments of mustafar_decompress. */
typedef struct mustafar_decompress_args {
    /** sizeof(mustafar_decompress_args). */
    size_t struct_size;
    /** Pages, uniform or ragged. Required. */
    const struct mustafar_pool *pool;
    /** Which pages, and how many tokens. Required. */
    const struct mustafar_sequences *sequences;
    /** Centre to add back: every element becomes round(x + c), dropped ones round(c). NULL: dropped elements become +0. */
    const struct mustafar_center *center;
    /**
     * Receives [batch, >= max_len, kv_heads, head_dim] in f16, bf16 or f32. Tokens past a sequence's length are not
     * written. Required.
     */
    const struct mustafar_tensor_mut *out;
} mustafar_decompress_args;

/** Arguments of mustafar_validate. */
typedef struct mustafar_validate_args {
    /** sizeof(mustafar_validate_args). */
    size_t struct_size;
    /** Pages, uniform or ragged. Required. */
    const struct mustafar_pool *pool;
    /** Which pages, and how many rows of them count. Required. */
    const struct mustafar_sequences *sequences;
    /**
     * CUDA: one uint64_t of device memory that holds UINT64_MAX; it is lowered to the record of the first violation,
     * which mustafar_validate_record reads once it has been copied to the host. Required. CPU: NULL.
     */
    uint64_t *record;
} mustafar_validate_args;

/** Dense tokens of a batch: the window after the compressed tokens, or the sinks before them. */
typedef struct mustafar_dense {
    /** sizeof(mustafar_dense). */
    size_t struct_size;
    /**
     * Keys [rows, max_len, kv_heads, k head_dim] in f16, bf16 or f32; never centred. CUDA rounds them to the type of
     * the pages, beside 8-bit values to f16 or bf16. Required.
     */
    const struct mustafar_tensor *k;
    /** Values [rows, max_len, kv_heads, v head_dim]. Required. */
    const struct mustafar_tensor *v;
    /** Valid tokens of each sequence, int32 [batch], 0 to max_len. Required. */
    const int32_t *lens;
    /** Row of the tensors that holds each sequence, int32 [batch]; NULL: row b for sequence b. */
    const int32_t *rows;
} mustafar_dense;

/** The compressed tokens of a batch. */
typedef struct mustafar_compressed {
    /** sizeof(mustafar_compressed). */
    size_t struct_size;
    /** Key pages. Required. */
    const struct mustafar_pool *k;
    /**
     * Value pages: page_tokens, num_pages and kv_heads as in `k`; rows and keep may differ, on the CPU value type and
     * head_dim too. Required.
     */
    const struct mustafar_pool *v;
    /** Which pages, and how many tokens. Required. */
    const struct mustafar_sequences *sequences;
    /** The centre that the key pages were written with; NULL: none. */
    const struct mustafar_center *k_center;
} mustafar_compressed;

/**
 * Arguments of mustafar_attend. The tokens of a sequence are, in order, its sinks, its compressed tokens and its
 * window; positions count from 0. The last query token stands at the last position, the one before it one earlier,
 * and a query sees the positions up to its own.
 */
typedef struct mustafar_attend_args {
    /** sizeof(mustafar_attend_args). */
    size_t struct_size;
    /**
     * Queries [1, total_q, q_heads, k head_dim] in f16, bf16 or f32. q_heads is a multiple of kv_heads; query head h
     * reads KV head h / (q_heads / kv_heads). CUDA rounds them to the type of the pages (without pages: of the window,
     * the sinks or q, the first that is f16 or bf16; for pages of e4m3 to f16, of int8 to integers of 16 bits with a
     * factor for each head). Required.
     */
    const struct mustafar_tensor *q;
    /**
     * Receives [1, total_q, q_heads, v head_dim] in f16, bf16 or f32; 0 where a query sees nothing. On CUDA v head_dim
     * is k head_dim. Required.
     */
    const struct mustafar_tensor_mut *out;
    /**
     * Receives the natural-log log-sum-exp of the scaled (and softcapped) scores, f32 [1, total_q, q_heads, 1]; -inf
     * where a query sees nothing. May be NULL.
     */
    const struct mustafar_tensor_mut *lse;
    /** Sequences in the batch. */
    int64_t batch;
    /**
     * First query token of each sequence, int32 [batch + 1], rising from 0 to total_q. NULL: every sequence has
     * total_q / batch query tokens.
     */
    const int32_t *q_indptr;
    /** Upper bound of the query tokens of a sequence; 0 is total_q / batch, and only without q_indptr. */
    int64_t max_q_len;
    /** First tokens, kept dense; NULL: none. */
    const struct mustafar_dense *sinks;
    /** Compressed tokens; NULL: none. */
    const struct mustafar_compressed *compressed;
    /** Most recent tokens, dense; NULL: none. */
    const struct mustafar_dense *window;
    /** First position of each sequence that may be seen (left padding), int32 [batch]; NULL: 0. */
    const int32_t *first;
    /** A query sees only this many last positions, its own included; 0: all. */
    int64_t sliding_window;
    /**
     * Tokens that one work item covers; CUDA rounds it up to a multiple of 32. A number fixed here makes a sequence's
     * result independent of the rest of the batch, bit for bit. 0: on the CPU a fixed number, on CUDA what is fastest
     * for the batch and the upper bounds, so that results may differ in the last bits between batch sizes.
     */
    int64_t split_tokens;
    /** Factor of q.k; 0 is 1 / sqrt(k head_dim). */
    float scale;
    /** c > 0 turns a score s into c * tanh(s / c); 0: off. */
    float softcap;
} mustafar_attend_args;

/** What to expect of mustafar_attend over pages of two formats. */
typedef struct mustafar_advice {
    /** sizeof(mustafar_advice). */
    size_t struct_size;
    /** A mustafar_speed. */
    uint32_t speed;
    /** Written as 0. */
    uint32_t reserved;
    /** Bytes of a token of one KV head in pages, K and V together; of full pages, ragged ones with all of their room. */
    double bytes_per_token;
    /** The same dense in 16 bits. */
    double dense_bytes_per_token;
    /** Why, and what to do instead where pages are slower: one line of English that is never freed. */
    const char *reason;
} mustafar_advice;

/** Arguments of mustafar_spmv_key. */
typedef struct mustafar_spmv_key_args {
    /** sizeof(mustafar_spmv_key_args). */
    size_t struct_size;
    /** Queries [batch, q_len, q_heads, head_dim] in f16, bf16 or f32; q_heads is a multiple of kv_heads. Required. */
    const struct mustafar_tensor *q;
    /** Key pages. Required. */
    const struct mustafar_pool *pool;
    /** Which pages, and how many tokens. Required. */
    const struct mustafar_sequences *sequences;
    /** The centre that the pages were written with; NULL: none. */
    const struct mustafar_center *center;
    /**
     * Receives scores, f32 [batch, q_len, q_heads, >= max_len]. Tokens past a sequence's length are not written.
     * Required.
     */
    const struct mustafar_tensor_mut *scores;
    /** Factor of q.k; 0 is 1 / sqrt(head_dim). */
    float scale;
    /** Must be 0. */
    uint32_t reserved;
} mustafar_spmv_key_args;

/** Arguments of mustafar_spmv_value. */
typedef struct mustafar_spmv_value_args {
    /** sizeof(mustafar_spmv_value_args). */
    size_t struct_size;
    /** Weights of the tokens, f32 [batch, q_len, q_heads, >= max_len]. Required. */
    const struct mustafar_tensor *weights;
    /** Value pages. Required. */
    const struct mustafar_pool *pool;
    /** Which pages, and how many tokens. Required. */
    const struct mustafar_sequences *sequences;
    /** Receives [batch, q_len, q_heads, head_dim] in f16, bf16 or f32. Required. */
    const struct mustafar_tensor_mut *out;
} mustafar_spmv_value_args;

/** Arguments of mustafar_merge: two results of mustafar_attend for the same queries over different tokens. */
typedef struct mustafar_merge_args {
    /** sizeof(mustafar_merge_args). */
    size_t struct_size;
    /** First partial result [1, tokens, heads, dim] in f16, bf16 or f32. Required. */
    const struct mustafar_tensor *a;
    /** Its log-sum-exp, f32 [1, tokens, heads, 1], natural log; -inf and +inf mean "no tokens". Required. */
    const struct mustafar_tensor *a_lse;
    /** Second partial result. Required. */
    const struct mustafar_tensor *b;
    /** Its log-sum-exp. Required. */
    const struct mustafar_tensor *b_lse;
    /** Receives the result in f16, bf16 or f32. Required. */
    const struct mustafar_tensor_mut *out;
    /** Receives the log-sum-exp over both, f32 [1, tokens, heads, 1]. May be NULL. */
    const struct mustafar_tensor_mut *lse;
} mustafar_merge_args;

/**
 * Formats of the pages of some heads of some layers, in place of those of the whole cache. Heads are left dense by formats
 * that keep everything: dense, not exact, since the value types are the cache's own. In a cache of 8-bit values such heads
 * have 8-bit values too, and in one of 16-bit values they are slower than dense tokens (mustafar_attend_advice).
 */
typedef struct mustafar_cache_head_formats {
    /** sizeof(mustafar_cache_head_formats). */
    size_t struct_size;
    /** Format of key pages; of the cache's own only the number kept may differ. Required. */
    const struct mustafar_format *k;
    /** Format of value pages; likewise. Required. */
    const struct mustafar_format *v;
    /** First layer. */
    uint32_t first_layer;
    /** How many layers, at least 1. */
    uint32_t num_layers;
    /** First KV head. */
    uint32_t first_head;
    /** How many KV heads, at least 1. */
    uint32_t num_heads;
} mustafar_cache_head_formats;

/** Shape and policy of a cache. */
typedef struct mustafar_cache_config {
    /** sizeof(mustafar_cache_config). */
    size_t struct_size;
    /**
     * Format of key pages, which says how many are kept: as mustafar_strategy_format gives it, uniform in token direction,
     * ragged in channel direction. Required.
     */
    const struct mustafar_format *k;
    /** Format of value pages; likewise, page_tokens as in `k`. Required. */
    const struct mustafar_format *v;
    /** Tokens that all live sequences together may have compressed; rounded up to whole pages. */
    int64_t max_tokens;
    /** Layers, at least 1. */
    uint32_t layers;
    /** Query heads, a multiple of kv_heads. */
    uint32_t q_heads;
    /** KV heads, at least 1. */
    uint32_t kv_heads;
    /** Live sequences at most; 0 is 1. */
    uint32_t max_sequences;
    /** R: the newest tokens that are never compressed; 0 is 32. */
    uint32_t window;
    /** Tokens compressed together once the window holds window + group, a multiple of page_tokens; 0 is 256. */
    uint32_t group;
    /** First tokens that stay dense; 0 is 4, MUSTAFAR_SINKS_NONE is none. */
    uint32_t sinks;
    /** A mustafar_center_mode. */
    uint32_t center;
    /**
     * Type of the tokens that pages of 8-bit values are made from: MUSTAFAR_DTYPE_F16 or MUSTAFAR_DTYPE_BF16; 0 is f16.
     * For pages of 16-bit values tokens have the type of these.
     */
    uint32_t scaled_from;
    /** Must be 0. */
    uint32_t reserved;
    /** How keys are chosen: a mustafar_strategy. */
    uint32_t k_strategy;
    /** How values are chosen: a mustafar_strategy. */
    uint32_t v_strategy;
    /** Formats of some heads, [num_overrides] pointers; of several that name a head the last counts. May be NULL. */
    const struct mustafar_cache_head_formats *const *overrides;
    /** How many. */
    int64_t num_overrides;
} mustafar_cache_config;

/** What a cache or a sequence holds, in bytes. */
typedef struct mustafar_cache_bytes_info {
    /** sizeof(mustafar_cache_bytes_info). */
    size_t struct_size;
    /** All tokens of all layers stored dense in the value types; shared ones once per sequence. */
    size_t dense_equivalent;
    /** Pages in use, every layer, K and V. Shared pages count once for a cache, in full for a sequence. */
    size_t pages;
    /** Dense tokens in use: window and sinks. */
    size_t window;
    /** Memory the cache has allocated, used or not. */
    size_t allocated;
} mustafar_cache_bytes_info;

/** Arguments of mustafar_cache_attend: num_sequences sequences with total_q / num_sequences queries each. */
typedef struct mustafar_cache_attend_args {
    /** sizeof(mustafar_cache_attend_args). */
    size_t struct_size;
    /** Sequences in the order of the queries, host memory; no sequence twice. Required. */
    const uint64_t *sequences;
    /** How many. */
    int64_t num_sequences;
    /** Queries [1, total_q, q_heads, k head_dim] in f16, bf16 or f32. Required. */
    const struct mustafar_tensor *q;
    /** Receives [1, total_q, q_heads, v head_dim] in f16, bf16 or f32. Required. */
    const struct mustafar_tensor_mut *out;
    /** Receives the natural-log log-sum-exp, f32 [1, total_q, q_heads, 1]. May be NULL. */
    const struct mustafar_tensor_mut *lse;
    /** A query sees only this many last positions, its own included; 0: all. */
    int64_t sliding_window;
    /** Factor of q.k; 0 is 1 / sqrt(k head_dim). */
    float scale;
    /** c > 0 turns a score s into c * tanh(s / c); 0: off. */
    float softcap;
    /** Layer, 0 to layers - 1. */
    uint32_t layer;
    /** Must be 0. */
    uint32_t reserved;
} mustafar_cache_attend_args;

/** Queries of the newest tokens of each sequence, for mustafar_cache_append_with_queries. */
typedef struct mustafar_cache_queries {
    /** sizeof(mustafar_cache_queries). */
    size_t struct_size;
    /**
     * Queries after RoPE, f16, bf16 or f32 [num_sequences, n, q_heads, k head_dim]: those of the last n tokens appended,
     * 1 to all of them; more than 32 are not needed. Required.
     */
    const struct mustafar_tensor *q;
    /**
     * Their natural-log log-sum-exps, f32 [num_sequences, n, q_heads, 1], over all tokens that each query saw. Required for
     * VC_OPA, else may be NULL.
     */
    const struct mustafar_tensor *lse;
    /** A query sees only this many last positions, its own included; 0: all. */
    int64_t sliding_window;
    /** Factor of q.k; 0 is 1 / sqrt(k head_dim). */
    float scale;
    /** c > 0 turns a score s into c * tanh(s / c); 0: off. */
    float softcap;
} mustafar_cache_queries;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * The version of the library, such as "0.1.0"; compare with MUSTAFAR_VERSION.
 *
 * @return A string that is never freed and never NULL.
 *
 * Async: no. Graph capture: yes. Workspace: none. Deterministic: yes. Thread-safe: yes.
 */
MUSTAFAR_API const char *mustafar_version(void);

/**
 * The version of the library as major * 1000000 + minor * 1000 + patch; compare with MUSTAFAR_VERSION_NUMBER.
 *
 * Async: no. Graph capture: yes. Workspace: none. Deterministic: yes. Thread-safe: yes.
 */
MUSTAFAR_API uint32_t mustafar_version_number(void);

/**
 * The name of a status without its prefix, such as "INVALID_ARGUMENT"; "UNKNOWN" for any other number.
 *
 * @param status  A status of this or a newer version.
 * @return A string that is never freed and never NULL.
 *
 * Async: no. Graph capture: yes. Workspace: none. Deterministic: yes. Thread-safe: yes.
 */
MUSTAFAR_API const char *mustafar_status_name(int32_t status);

/**
 * What went wrong in the last call of this thread that did not return MUSTAFAR_STATUS_SUCCESS: the argument, the
 * value found and what is allowed, as one line of UTF-8 without a final newline.
 *
 * @return Never NULL; empty if no call of this thread has failed. Valid until the next failing call of this
 *         thread, or its end; copy it to keep it. A successful call leaves it alone.
 *
 * Async: no. Graph capture: yes. Workspace: none. Deterministic: yes. Thread-safe: yes.
 */
MUSTAFAR_API const char *mustafar_last_error_message(void);

/**
 * The size of a page of this format.
 *
 * @param format  The format.
 * @param bytes   Receives the size in bytes, a multiple of 16.
 * @return SUCCESS; UNSUPPORTED for a head_dim or page_tokens without kernels; INVALID_ARGUMENT,
 *         NULL_POINTER, MISALIGNED or VERSION_MISMATCH for the structure.
 *
 * Async: no, and needs no context. Graph capture: yes. Workspace: none. Deterministic: yes. Thread-safe: yes.
 */
MUSTAFAR_API mustafar_status mustafar_format_page_bytes(const struct mustafar_format *format, size_t *bytes);

/**
 * Where the sections of a page of this format lie.
 *
 * @param format  The format.
 * @param layout  Receives the layout; its struct_size must be set.
 * @return As mustafar_format_page_bytes.
 *
 * Async: no, and needs no context. Graph capture: yes. Workspace: none. Deterministic: yes. Thread-safe: yes.
 */
MUSTAFAR_API
mustafar_status mustafar_format_layout(const struct mustafar_format *format,
                                       struct mustafar_page_layout *layout);

/**
 * Checks the bytes of one page from an untrusted source (disk, network). mustafar_validate checks pages of a pool.
 *
 * @param format      The format.
 * @param page        Host memory, any alignment.
 * @param page_bytes  Bytes at `page`, at least the size of a page.
 * @param rows        Rows that must be right, 0 to page_tokens; those after may hold anything.
 * @return SUCCESS; CORRUPT_DATA with the first row that violates the format; BUFFER_TOO_SMALL; INVALID_ARGUMENT for
 *         rows; as mustafar_format_page_bytes for the format.
 *
 * Async: no, and needs no context. Graph capture: yes. Workspace: none. Deterministic: yes. Thread-safe: yes.
 */
MUSTAFAR_API
mustafar_status mustafar_format_validate_page(const struct mustafar_format *format,
                                              const void *page,
                                              size_t page_bytes,
                                              uint32_t rows);

/**
 * `n - floor(sparsity * n)`: values kept of n, such as 64 of 128 at 0.5 and 39 at 0.7. The floor is exact for the
 * decimal that was written: 0.7 of 10 drops 7.
 *
 * @param n         Values per row (head_dim), or tokens per group for channel-direction pruning.
 * @param sparsity  Share to drop, 0 <= sparsity < 1.
 * @param keep      Receives the count.
 * @return SUCCESS; INVALID_ARGUMENT for sparsity; NULL_POINTER or MISALIGNED for keep.
 *
 * Async: no, and needs no context. Graph capture: yes. Workspace: none. Deterministic: yes. Thread-safe: yes.
 */
MUSTAFAR_API mustafar_status mustafar_keep_for_sparsity(uint32_t n, double sparsity, uint32_t *keep);

/**
 * `n - max(1, floor(sparsity * n)) + 1`: what the original Mustafar keeps at this sparsity, 65 of 128 at 0.5 and 40
 * at 0.7.
 *
 * @param n         Values per row.
 * @param sparsity  Share to drop, 0 <= sparsity < 1.
 * @param keep      Receives the count.
 * @return As mustafar_keep_for_sparsity.
 *
 * Async: no, and needs no context. Graph capture: yes. Workspace: none. Deterministic: yes. Thread-safe: yes.
 */
MUSTAFAR_API mustafar_status mustafar_reference_keep(uint32_t n, double sparsity, uint32_t *keep);

/**
 * The strategy of a name, such as "Kt_Opa".
 *
 * @param name      Zero-terminated name, as mustafar_strategy lists them.
 * @param strategy  Receives the mustafar_strategy.
 * @return SUCCESS; INVALID_ARGUMENT for an unknown name, with the known ones; NULL_POINTER, MISALIGNED.
 *
 * Async: no, and needs no context. Graph capture: yes. Workspace: none. Deterministic: yes. Thread-safe: yes.
 */
MUSTAFAR_API mustafar_status mustafar_strategy_from_name(const char *name, uint32_t *strategy);

/**
 * The pages that hold what a strategy keeps at a sparsity: uniform ones, or in channel direction ragged ones with room for
 * exactly what is kept of each channel in every 32 tokens.
 *
 * @param strategy     A mustafar_strategy other than DEFAULT.
 * @param value_type   Type of the values.
 * @param head_dim     Channels per row.
 * @param page_tokens  Tokens per page; a multiple of 32 in channel direction.
 * @param sparsity     Share to drop, 0 <= sparsity < 1.
 * @param format       Receives the format; its struct_size must be set.
 * @return SUCCESS; INVALID_ARGUMENT or UNSUPPORTED for an argument; NULL_POINTER, MISALIGNED.
 *
 * Async: no, and needs no context. Graph capture: yes. Workspace: none. Deterministic: yes. Thread-safe: yes.
 */
MUSTAFAR_API
mustafar_status mustafar_strategy_format(uint32_t strategy,
                                         uint32_t value_type,
                                         uint32_t head_dim,
                                         uint32_t page_tokens,
                                         double sparsity,
                                         struct mustafar_format *format);

/**
 * Makes a context. The environment variable MUSTAFAR_CPU (portable, avx2, avx512) caps the instructions that the
 * CPU backend uses; it is read here and by mustafar_attend_advice.
 *
 * CUDA: uses the CUDA context that is current on the calling thread if that belongs to the device (it must then
 * outlive this context), else the device's primary one, which the CUDA runtime and PyTorch use. Loads all kernels and
 * allocates 16 bytes of device memory, so that ops do neither. What is current on a calling thread never changes.
 *
 * @param config   What to make; NULL is the CPU backend on the calling thread.
 * @param context  Receives the handle; mustafar_context_destroy ends it.
 * @return SUCCESS; INVALID_ARGUMENT for a field or MUSTAFAR_CPU; UNAVAILABLE when the backend cannot run here (no CUDA
 *         driver, device or kernels, or too old ones); CUDA when the driver refuses; NULL_POINTER, MISALIGNED or
 *         VERSION_MISMATCH for the pointers.
 *
 * Async: no. Graph capture: no. Workspace: none, allocates. Deterministic: yes. Thread-safe: yes.
 */
MUSTAFAR_API
mustafar_status mustafar_context_create(const struct mustafar_context_config *config,
                                        struct mustafar_context **context);

/**
 * Ends a context. Caches made with it stay usable.
 *
 * @param context  The context; NULL is nothing to do. No call may be using it, and streams must have run its ops.
 * @return SUCCESS; MISALIGNED for a pointer that cannot be a handle.
 *
 * Async: no. Graph capture: no. Workspace: none. Deterministic: yes. Thread-safe: yes, but for this context.
 */
MUSTAFAR_API mustafar_status mustafar_context_destroy(struct mustafar_context *context);

/**
 * Reads and clears what went wrong in finished CUDA ops of a context. Always zeros on the CPU backend, where ops
 * return their errors.
 *
 * @param context  The context.
 * @param errors   Receives the counts; set struct_size before.
 * @return SUCCESS; CUDA when the driver refuses, which is where a fault of an earlier kernel shows; NULL_POINTER,
 *         MISALIGNED or INVALID_ARGUMENT for the pointers, before anything is cleared.
 *
 * Async: no, but it waits for the default stream only: synchronise the streams of the ops first. Graph capture: no.
 * Workspace: none. Deterministic: yes. Thread-safe: yes.
 */
MUSTAFAR_API
mustafar_status mustafar_context_take_device_errors(const struct mustafar_context *context,
                                                    struct mustafar_device_errors *errors);

/**
 * The backend of a context.
 *
 * @param context  The context.
 * @param backend  Receives a mustafar_backend.
 * @return SUCCESS; NULL_POINTER or MISALIGNED.
 *
 * Async: no. Graph capture: yes. Workspace: none. Deterministic: yes. Thread-safe: yes.
 */
MUSTAFAR_API mustafar_status mustafar_context_backend(const struct mustafar_context *context, uint32_t *backend);

/**
 * Zeroes what a selection drops, in place on a dense tensor. Magnitudes compare by bit pattern, so NaN outranks
 * everything and is never dropped silently.
 *
 * @param context  The context.
 * @param args     Tensor, selection and optional weights and mask.
 * @param stream   CUDA stream, NULL the default one; NULL on the CPU backend.
 * @return SUCCESS; UNSUPPORTED for a dtype or dim without kernels; INVALID_ARGUMENT for selection, keep, dropped,
 *         tokens, weights that do not apply or on the CPU are negative or NaN, overlapping rows; NULL_POINTER,
 *         MISALIGNED, OVERFLOW, VERSION_MISMATCH as docs/c-api.md describes.
 *
 * Async: CUDA yes, CPU no. Graph capture: yes. Workspace: none. Deterministic: yes, the same bits on every backend.
 * Thread-safe: yes.
 */
MUSTAFAR_API
mustafar_status mustafar_prune(const struct mustafar_context *context,
                               const struct mustafar_prune_args *args,
                               void *stream);

/**
 * Selection weights of the strategy Kt_Opa for mustafar_append and mustafar_prune: per KV head and channel the mean of
 * abs(q) over the tokens, summed over the query heads of the KV head. A NaN becomes infinity.
 *
 * @param context  The context.
 * @param args     Queries and destination.
 * @param stream   CUDA stream, NULL the default one; NULL on the CPU backend.
 * @return SUCCESS; INVALID_ARGUMENT for shapes, dtypes and ranges; NULL_POINTER, MISALIGNED, OVERFLOW, VERSION_MISMATCH as
 *         docs/c-api.md describes.
 *
 * Async: CUDA yes, CPU no. Graph capture: yes. Workspace: none; on the CPU it allocates sums. Deterministic: yes, the same
 * bits on every backend. Thread-safe: yes.
 */
MUSTAFAR_API
mustafar_status mustafar_query_weights(const struct mustafar_context *context,
                                       const struct mustafar_query_weights_args *args,
                                       void *stream);

/**
 * Selection weights of the strategies think and thinv for mustafar_append and mustafar_prune: infinity for the `keep`
 * channels of the largest mean(q^2) * mean(x^2) of each KV head, 0 for the others. With the same keep, selection takes
 * exactly these channels of every row of finite elements.
 *
 * @param context  The context.
 * @param args     Tokens, queries and destination.
 * @param stream   CUDA stream, NULL the default one; NULL on the CPU backend.
 * @return As mustafar_query_weights.
 *
 * Async: CUDA yes, CPU no. Graph capture: yes. Workspace: none; on the CPU it allocates sums. Deterministic: yes, the same
 * bits on every backend. Thread-safe: yes.
 */
MUSTAFAR_API
mustafar_status mustafar_structured_weights(const struct mustafar_context *context,
                                            const struct mustafar_structured_weights_args *args,
                                            void *stream);

/**
 * Token weights of the strategy Vc_Opa for mustafar_prune: per token and KV head the attention weight exp(score - lse),
 * summed over the queries that see the token and over the query heads of the KV head. A weight below exp(-87.3) counts as
 * 0, one above exp(88) and a NaN as infinity.
 *
 * @param context  The context.
 * @param args     Queries, keys and destination.
 * @param stream   CUDA stream, NULL the default one; NULL on the CPU backend.
 * @return As mustafar_query_weights.
 *
 * Async: CUDA yes, CPU no. Graph capture: yes. Workspace: none; on the CPU it allocates the queries in float.
 * Deterministic: yes, the same bits on every backend. Thread-safe: yes.
 */
MUSTAFAR_API
mustafar_status mustafar_token_weights(const struct mustafar_context *context,
                                       const struct mustafar_token_weights_args *args,
                                       void *stream);

/**
 * Prunes new tokens and stores them into uniform pages: selects `keep` values of each row (ties to the lower channel)
 * and writes bitmap and values at the token's slot. Other slots are untouched.
 *
 * @param context  The context.
 * @param args     Keys, values and slots.
 * @param stream   CUDA stream, NULL the default one; NULL on the CPU backend.
 * @return SUCCESS; on the CPU OUT_OF_RANGE for a slot below -1 or past the pool, or a sequence without centre, and
 *         INVALID_ARGUMENT for negative or NaN weights. On CUDA any negative slot skips its token, and a token whose
 *         slot lies past the pool or whose sequence has no centre is skipped and counted, see
 *         mustafar_context_take_device_errors. INVALID_ARGUMENT for shapes, dtypes or tokens that differ, ragged
 *         pages; NULL_POINTER, MISALIGNED, OVERFLOW, UNSUPPORTED, VERSION_MISMATCH as docs/c-api.md describes.
 *
 * Async: CUDA yes, CPU no. Graph capture: yes. Workspace: none. Deterministic: yes, the same pages on every backend.
 * Thread-safe: yes, for different slots.
 */
MUSTAFAR_API
mustafar_status mustafar_append(const struct mustafar_context *context,
                                const struct mustafar_append_args *args,
                                void *stream);

/**
 * Stores any sparsity pattern into whole ragged pages.
 *
 * @param context  The context.
 * @param args     Tokens, mask and pages.
 * @param stream   CUDA stream, NULL the default one; NULL on the CPU backend.
 * @return SUCCESS; on the CPU PAGE_OVERFLOW for the first page whose rows do not fit, before any page is written,
 *         OUT_OF_RANGE for page numbers and INVALID_ARGUMENT for repeated ones. CUDA leaves a page that is too full or
 *         out of range as it was and counts it, see mustafar_context_take_device_errors; it writes the others.
 *         INVALID_ARGUMENT for shapes or dtypes that differ, uniform pages; NULL_POINTER, MISALIGNED, OVERFLOW,
 *         UNSUPPORTED, VERSION_MISMATCH as docs/c-api.md describes.
 *
 * Async: CUDA yes, CPU no. Graph capture: yes. Workspace: none; on the CPU it allocates a list of its pages.
 * Deterministic: yes, the same pages on every backend. Thread-safe: yes, for different pages.
 */
MUSTAFAR_API
mustafar_status mustafar_compress(const struct mustafar_context *context,
                                  const struct mustafar_compress_args *args,
                                  void *stream);

/**
 * Writes the dense form of compressed tokens.
 *
 * @param context  The context.
 * @param args     Pages and destination.
 * @param stream   CUDA stream, NULL the default one; NULL on the CPU backend.
 * @return SUCCESS; on the CPU OUT_OF_RANGE for lengths and page numbers, and CORRUPT_DATA for rows that leave their
 *         page. CUDA counts them, see mustafar_context_take_device_errors: tokens without a page are not written, rows
 *         whose bitmap does not fit their values become +0. INVALID_ARGUMENT for shapes; NULL_POINTER, MISALIGNED,
 *         OVERFLOW, UNSUPPORTED, VERSION_MISMATCH as docs/c-api.md describes.
 *
 * Async: CUDA yes, CPU no. Graph capture: yes. Workspace: none. Deterministic: yes, the same bits on every backend.
 * Thread-safe: yes.
 */
MUSTAFAR_API
mustafar_status mustafar_decompress(const struct mustafar_context *context,
                                    const struct mustafar_decompress_args *args,
                                    void *stream);

/**
 * Checks untrusted pages of a pool: every row that the sequences reach.
 *
 * @param context  The context.
 * @param args     Pages and sequences.
 * @param stream   CUDA stream, NULL the default one; NULL on the CPU backend.
 * @return SUCCESS; on the CPU CORRUPT_DATA with sequence, head, page and row of the first violation, and OUT_OF_RANGE
 *         for lengths and page numbers, all of which go to args.record on CUDA; INVALID_ARGUMENT for shapes and for a
 *         record on the CPU; NULL_POINTER, MISALIGNED, OVERFLOW, UNSUPPORTED, VERSION_MISMATCH as docs/c-api.md
 *         describes.
 *
 * Async: CUDA yes, CPU no. Graph capture: yes. Workspace: none. Deterministic: yes. Thread-safe: yes.
 */
MUSTAFAR_API
mustafar_status mustafar_validate(const struct mustafar_context *context,
                                  const struct mustafar_validate_args *args,
                                  void *stream);

/**
 * Turns the record of a CUDA mustafar_validate, copied to the host, into a status.
 *
 * @param record   What args.record held after the check.
 * @param pool     The pool of the check; its memory is not looked at.
 * @param max_len  max_len of the sequences of the check.
 * @return SUCCESS when nothing is wrong; CORRUPT_DATA with sequence, head, page of the sequence and row of the first
 *         violation; INVALID_ARGUMENT for a number that is no record; NULL_POINTER, MISALIGNED, OVERFLOW, UNSUPPORTED,
 *         VERSION_MISMATCH for the pool.
 *
 * Async: no, and needs no context. Graph capture: yes. Workspace: none. Deterministic: yes. Thread-safe: yes.
 */
MUSTAFAR_API
mustafar_status mustafar_validate_record(uint64_t record,
                                         const struct mustafar_pool *pool,
                                         int64_t max_len);

/**
 * Bytes of workspace that mustafar_attend needs. Depends on shapes and upper bounds only and never shrinks when one of
 * them grows, so a size taken at the largest batch serves every smaller one with the same split_tokens.
 *
 * @param context  The context.
 * @param args     As for mustafar_attend. Data pointers and arrays are not looked at and required ones may be NULL; an
 *                 optional one counts as given if it is not NULL.
 * @param bytes    Receives the size in bytes; may be 0.
 * @return As mustafar_attend for shapes and bounds.
 *
 * Async: no. Graph capture: yes. Workspace: none. Deterministic: yes. Thread-safe: yes.
 */
MUSTAFAR_API
mustafar_status mustafar_attend_workspace_size(const struct mustafar_context *context,
                                               const struct mustafar_attend_args *args,
                                               size_t *bytes);

/**
 * Decode attention over sinks, compressed pages and dense window in one pass: softmax(scores) . v over all tokens a
 * query sees, accumulated in float32.
 *
 * @param context          The context.
 * @param args             Queries, tokens and destination.
 * @param workspace        Scratch memory of the context, aligned to 16 bytes; its contents do not matter. May be NULL
 *                         if mustafar_attend_workspace_size says 0. Not shared with a call that may run at the same
 *                         time.
 * @param workspace_bytes  Bytes at `workspace`, at least what mustafar_attend_workspace_size says.
 * @param stream           CUDA stream, NULL the default one; NULL on the CPU backend.
 * @return SUCCESS; BUFFER_TOO_SMALL for the workspace; on the CPU OUT_OF_RANGE for q_indptr, lengths, rows, first and
 *         page numbers, which CUDA trusts: it reads or writes wherever wrong ones lead; INVALID_ARGUMENT for
 *         shapes or dtypes that contradict each other, heads, scale and softcap; NULL_POINTER, MISALIGNED, OVERFLOW,
 *         UNSUPPORTED, VERSION_MISMATCH as docs/c-api.md describes. On CUDA UNSUPPORTED where K and V differ in value
 *         type or head_dim.
 *
 * Async: CUDA yes, CPU no. Graph capture: yes. Workspace: mustafar_attend_workspace_size. Deterministic: yes, for the
 * same instruction set or device, and see split_tokens. Thread-safe: yes, with a workspace each.
 */
MUSTAFAR_API
mustafar_status mustafar_attend(const struct mustafar_context *context,
                                const struct mustafar_attend_args *args,
                                void *workspace,
                                size_t workspace_bytes,
                                void *stream);

/**
 * Whether mustafar_attend over pages of these formats is expected to be faster than dense attention, so that nobody takes a
 * slower path unawares: nothing refuses formats for their speed. It looks at the formats alone and needs no GPU. It holds for
 * contexts long enough that reading K and V is most of the work; docs/performance.md has the measurements.
 *
 * @param backend  A mustafar_backend. For the CPU the answer is that for the instructions that a context would use in this
 *                 process.
 * @param k        Format of the key pages.
 * @param v        Format of the value pages.
 * @param advice   Receives the answer; its struct_size must be set.
 * @return SUCCESS; INVALID_ARGUMENT for the backend, MUSTAFAR_CPU, or formats of different page_tokens; UNSUPPORTED for a
 *         pair of formats that mustafar_attend does not take on CUDA; as mustafar_format_page_bytes for each format.
 *
 * Async: no, and needs no context. Graph capture: yes. Workspace: none. Deterministic: yes. Thread-safe: yes.
 */
MUSTAFAR_API
mustafar_status mustafar_attend_advice(uint32_t backend,
                                       const struct mustafar_format *k,
                                       const struct mustafar_format *v,
                                       struct mustafar_advice *advice);

/**
 * Scores of compressed keys, the first half of unfused attention: scores[b, i, h, t] = scale * (q[b, i, h] . k[b, t,
 * h / group]) for every compressed token, without masking. Accumulates in float32.
 *
 * @param context  The context.
 * @param args     Queries, key pages and destination.
 * @param stream   CUDA stream, NULL the default one; NULL on the CPU backend.
 * @return SUCCESS; on the CPU OUT_OF_RANGE for lengths and page numbers. CUDA counts them, see
 *         mustafar_context_take_device_errors: scores of tokens without a page are not written, a damaged row counts
 *         as +0. INVALID_ARGUMENT for shapes, heads and scale; NULL_POINTER, MISALIGNED, OVERFLOW, UNSUPPORTED,
 *         VERSION_MISMATCH as docs/c-api.md describes.
 *
 * Async: CUDA yes, CPU no. Graph capture: yes. Workspace: none. Deterministic: yes, for the same instruction set or
 * device. Thread-safe: yes.
 */
MUSTAFAR_API
mustafar_status mustafar_spmv_key(const struct mustafar_context *context,
                                  const struct mustafar_spmv_key_args *args,
                                  void *stream);

/**
 * Weighted sums of compressed values, the second half of unfused attention: out[b, i, h] = sum over t of weights[b, i,
 * h, t] * v[b, t, h / group]. Accumulates in float32.
 *
 * @param context  The context.
 * @param args     Weights, value pages and destination.
 * @param stream   CUDA stream, NULL the default one; NULL on the CPU backend.
 * @return As mustafar_spmv_key; on CUDA tokens without a page count as no tokens.
 *
 * Async: CUDA yes, CPU no. Graph capture: yes. Workspace: none. Deterministic: yes, for the same instruction set or
 * device. Thread-safe: yes.
 */
MUSTAFAR_API
mustafar_status mustafar_spmv_value(const struct mustafar_context *context,
                                    const struct mustafar_spmv_value_args *args,
                                    void *stream);

/**
 * Combines attention over two disjoint sets of tokens: (exp(a_lse) * a + exp(b_lse) * b) / (exp(a_lse) + exp(b_lse))
 * in float32 and without overflow; 0 and -inf where neither side has tokens.
 *
 * @param context  The context.
 * @param args     The partial results and the destination.
 * @param stream   CUDA stream, NULL the default one; NULL on the CPU backend.
 * @return SUCCESS; INVALID_ARGUMENT for shapes and dtypes; NULL_POINTER, MISALIGNED, OVERFLOW, VERSION_MISMATCH as
 *         docs/c-api.md describes.
 *
 * Async: CUDA yes, CPU no. Graph capture: yes. Workspace: none. Deterministic: yes, for the same instruction set or
 * device. Thread-safe: yes.
 */
MUSTAFAR_API
mustafar_status mustafar_merge(const struct mustafar_context *context,
                               const struct mustafar_merge_args *args,
                               void *stream);

/**
 * Makes an empty cache. Memory for max_tokens and max_sequences is allocated here, on the CPU backend to be committed
 * by the system as it is first used; nothing is allocated for tokens later. On CUDA all calls of a cache that take a
 * stream go to one stream, or to streams that the caller makes wait for each other.
 *
 * @param context  Where the cache works; may be destroyed before the cache.
 * @param config   Shape and policy.
 * @param cache    Receives the handle; mustafar_cache_destroy ends it.
 * @return SUCCESS; INVALID_ARGUMENT or UNSUPPORTED for a field of the configuration (on CUDA also for formats that
 *         mustafar_attend does not serve there); OUT_OF_MEMORY; NULL_POINTER, MISALIGNED, OVERFLOW, VERSION_MISMATCH
 *         as docs/c-api.md describes.
 *
 * Async: no. Graph capture: no. Workspace: none, allocates. Deterministic: yes. Thread-safe: yes.
 */
MUSTAFAR_API
mustafar_status mustafar_cache_create(const struct mustafar_context *context,
                                      const struct mustafar_cache_config *config,
                                      struct mustafar_cache **cache);

/**
 * Ends a cache and frees its memory, with all sequences.
 *
 * @param cache  The cache; NULL is nothing to do. No call may be using it.
 * @return SUCCESS; MISALIGNED for a pointer that cannot be a handle.
 *
 * Async: no. Graph capture: no. Workspace: none. Deterministic: yes. Thread-safe: yes, but for this cache.
 */
MUSTAFAR_API mustafar_status mustafar_cache_destroy(struct mustafar_cache *cache);

/**
 * What the whole cache holds.
 *
 * @param cache  The cache.
 * @param bytes  Receives the sizes; its struct_size must be set.
 * @return SUCCESS; NULL_POINTER, MISALIGNED or INVALID_ARGUMENT for the pointers.
 *
 * Async: no. Graph capture: yes. Workspace: none. Deterministic: yes. Thread-safe: with other calls that take the
 * cache const.
 */
MUSTAFAR_API
mustafar_status mustafar_cache_bytes(const struct mustafar_cache *cache,
                                     struct mustafar_cache_bytes_info *bytes);

/**
 * Attention of the newest query tokens of each sequence over everything appended to the layer, as mustafar_attend.
 *
 * @param cache   The cache.
 * @param args    Sequences, queries and destination.
 * @param stream  CUDA stream, NULL the default one; NULL on the CPU backend.
 * @return SUCCESS; INVALID_ARGUMENT or OUT_OF_RANGE for unknown or repeated sequences, layer, shapes, dtypes;
 *         NULL_POINTER, MISALIGNED, OVERFLOW, UNSUPPORTED, VERSION_MISMATCH as docs/c-api.md describes.
 *
 * Async: CUDA yes, CPU no. Graph capture: no. Workspace: the cache's own, which grows in a call with more than 16
 * query tokens per sequence. Deterministic: yes, for the same instruction set or device, alone and in any batch.
 * Thread-safe: one call at a time.
 */
MUSTAFAR_API
mustafar_status mustafar_cache_attend(struct mustafar_cache *cache,
                                      const struct mustafar_cache_attend_args *args,
                                      void *stream);

/**
 * A new, empty sequence.
 *
 * @param cache     The cache.
 * @param sequence  Receives its number, which this cache never uses again.
 * @return SUCCESS; CACHE_FULL when max_sequences are live; NULL_POINTER, MISALIGNED.
 *
 * Async: no. Graph capture: no. Workspace: none. Deterministic: yes. Thread-safe: one call at a time.
 */
MUSTAFAR_API mustafar_status mustafar_cache_sequence_create(struct mustafar_cache *cache, uint64_t *sequence);

/**
 * A new sequence with the same tokens as another. Full pages are shared, dense tokens copied.
 *
 * @param cache     The cache.
 * @param sequence  The sequence to copy.
 * @param fork      Receives the number of the new one.
 * @return SUCCESS; CACHE_FULL; INVALID_ARGUMENT for an unknown sequence; NULL_POINTER, MISALIGNED.
 *
 * Async: no. Graph capture: no. Workspace: none. Deterministic: yes. Thread-safe: one call at a time.
 */
MUSTAFAR_API
mustafar_status mustafar_cache_sequence_fork(struct mustafar_cache *cache,
                                             uint64_t sequence,
                                             uint64_t *fork);

/**
 * Drops all tokens from position `len` on, in every layer. Tokens that were compressed stay compressed.
 *
 * @param cache     The cache.
 * @param sequence  The sequence.
 * @param len       Tokens to keep, 0 to the length of the shortest layer.
 * @return SUCCESS; INVALID_ARGUMENT or OUT_OF_RANGE for an unknown sequence or len; NULL_POINTER, MISALIGNED.
 *
 * Async: no. Graph capture: no. Workspace: none. Deterministic: yes. Thread-safe: one call at a time.
 */
MUSTAFAR_API
mustafar_status mustafar_cache_sequence_truncate(struct mustafar_cache *cache,
                                                 uint64_t sequence,
                                                 int64_t len);

/**
 * Ends a sequence; its unshared pages become free.
 *
 * @param cache     The cache.
 * @param sequence  The sequence; refused from then on.
 * @return SUCCESS; INVALID_ARGUMENT for an unknown sequence; NULL_POINTER, MISALIGNED.
 *
 * Async: no. Graph capture: no. Workspace: none. Deterministic: yes. Thread-safe: one call at a time.
 */
MUSTAFAR_API mustafar_status mustafar_cache_sequence_free(struct mustafar_cache *cache, uint64_t sequence);

/**
 * Tokens of a layer of a sequence.
 *
 * @param cache       The cache.
 * @param layer       Layer, 0 to layers - 1.
 * @param sequence    The sequence.
 * @param tokens      Receives how many there are.
 * @param compressed  Receives how many of them are compressed; may be NULL.
 * @return SUCCESS; INVALID_ARGUMENT or OUT_OF_RANGE for an unknown sequence or layer; NULL_POINTER, MISALIGNED.
 *
 * Async: no. Graph capture: yes. Workspace: none. Deterministic: yes. Thread-safe: with other calls that take the
 * cache const.
 */
MUSTAFAR_API
mustafar_status mustafar_cache_len(const struct mustafar_cache *cache,
                                   uint32_t layer,
                                   uint64_t sequence,
                                   int64_t *tokens,
                                   int64_t *compressed);

/**
 * What one sequence holds; shared pages count in full.
 *
 * @param cache     The cache.
 * @param sequence  The sequence.
 * @param bytes     Receives the sizes; its struct_size must be set.
 * @return SUCCESS; INVALID_ARGUMENT for an unknown sequence; NULL_POINTER, MISALIGNED.
 *
 * Async: no. Graph capture: yes. Workspace: none. Deterministic: yes. Thread-safe: with other calls that take the
 * cache const.
 */
MUSTAFAR_API
mustafar_status mustafar_cache_sequence_bytes(const struct mustafar_cache *cache,
                                              uint64_t sequence,
                                              struct mustafar_cache_bytes_info *bytes);

/**
 * Appends tokens to one layer of one sequence: a whole prompt after prefill, or what a decode step produced. After the
 * call the newest tokens are dense and the older ones compressed, however they were split over calls. Every layer must
 * receive the same tokens.
 *
 * @param cache     The cache.
 * @param layer     Layer, 0 to layers - 1.
 * @param sequence  The sequence.
 * @param k         Keys [1, tokens, kv_heads, head_dim] in the value type of the key pages, after RoPE.
 * @param v         Values [1, tokens, kv_heads, head_dim] in the value type of the value pages.
 * @param stream    CUDA stream, NULL the default one; NULL on the CPU backend.
 * @return SUCCESS; CACHE_FULL when pages run out; INVALID_ARGUMENT or OUT_OF_RANGE for sequence, layer, shapes,
 *         dtypes; NULL_POINTER, MISALIGNED, OVERFLOW, VERSION_MISMATCH as docs/c-api.md describes. Nothing is appended
 *         then.
 *
 * Async: CUDA yes, CPU no. Graph capture: no. Workspace: none. Deterministic: yes. Thread-safe: one call at a time.
 */
MUSTAFAR_API
mustafar_status mustafar_cache_append(struct mustafar_cache *cache,
                                      uint32_t layer,
                                      uint64_t sequence,
                                      const struct mustafar_tensor *k,
                                      const struct mustafar_tensor *v,
                                      void *stream);

/**
 * Appends the same number of tokens to one layer of several sequences.
 *
 * @param cache          The cache.
 * @param layer          Layer, 0 to layers - 1.
 * @param sequences      Host memory; no sequence twice.
 * @param num_sequences  How many.
 * @param k              Keys [num_sequences, tokens, kv_heads, head_dim].
 * @param v              Values [num_sequences, tokens, kv_heads, head_dim].
 * @param stream         CUDA stream, NULL the default one; NULL on the CPU backend.
 * @return As mustafar_cache_append; on error no sequence has changed.
 *
 * Async: CUDA yes, CPU no. Graph capture: no. Workspace: none. Deterministic: yes. Thread-safe: one call at a time.
 */
MUSTAFAR_API
mustafar_status mustafar_cache_append_batch(struct mustafar_cache *cache,
                                            uint32_t layer,
                                            const uint64_t *sequences,
                                            int64_t num_sequences,
                                            const struct mustafar_tensor *k,
                                            const struct mustafar_tensor *v,
                                            void *stream);

/**
 * As mustafar_cache_append_batch, with the queries of the newest of these tokens: what a caller that has computed their
 * attention itself, as for a prompt, owes strategies that judge by queries (KT_OPA, THINK, VC_OPA). mustafar_cache_attend
 * remembers its own.
 *
 * @param cache          The cache.
 * @param layer          Layer, 0 to layers - 1.
 * @param sequences      Host memory; no sequence twice.
 * @param num_sequences  How many.
 * @param k              Keys [num_sequences, tokens, kv_heads, head_dim].
 * @param v              Values [num_sequences, tokens, kv_heads, head_dim].
 * @param queries        The queries.
 * @param stream         CUDA stream, NULL the default one; NULL on the CPU backend.
 * @return As mustafar_cache_append_batch; INVALID_ARGUMENT for the queries.
 *
 * Async: CUDA yes, CPU no. Graph capture: no. Workspace: none. Deterministic: yes. Thread-safe: one call at a time.
 */
MUSTAFAR_API
mustafar_status mustafar_cache_append_with_queries(struct mustafar_cache *cache,
                                                   uint32_t layer,
                                                   const uint64_t *sequences,
                                                   int64_t num_sequences,
                                                   const struct mustafar_tensor *k,
                                                   const struct mustafar_tensor *v,
                                                   const struct mustafar_cache_queries *queries,
                                                   void *stream);

/**
 * Bytes that mustafar_cache_save writes for a sequence as it is now.
 *
 * @param cache     The cache.
 * @param sequence  The sequence.
 * @param bytes     Receives the size in bytes.
 * @return SUCCESS; INVALID_ARGUMENT for an unknown sequence or layers of different length; NULL_POINTER, MISALIGNED.
 *
 * Async: no. Graph capture: no. Workspace: none. Deterministic: yes. Thread-safe: with other calls that take the cache
 * const.
 */
MUSTAFAR_API
mustafar_status mustafar_cache_save_size(const struct mustafar_cache *cache,
                                         uint64_t sequence,
                                         size_t *bytes);

/**
 * Writes a sequence as bytes that mustafar_cache_restore reads in another process, on any backend.
 *
 * @param cache         The cache.
 * @param sequence      The sequence.
 * @param buffer        Host memory, any alignment.
 * @param buffer_bytes  Bytes at `buffer`, at least what mustafar_cache_save_size says.
 * @param written       Receives how many bytes were written; may be NULL.
 * @return SUCCESS; BUFFER_TOO_SMALL; INVALID_ARGUMENT for an unknown sequence or layers of different length;
 *         NULL_POINTER, MISALIGNED.
 *
 * Async: no. Graph capture: no. Workspace: none. Deterministic: yes. Thread-safe: with other calls that take the cache
 * const.
 */
MUSTAFAR_API
mustafar_status mustafar_cache_save(const struct mustafar_cache *cache,
                                    uint64_t sequence,
                                    void *buffer,
                                    size_t buffer_bytes,
                                    size_t *written);

/**
 * A new sequence from the bytes of mustafar_cache_save.
 *
 * @param cache           A cache of the same shape and formats.
 * @param snapshot        Host memory, any alignment; may come from an untrusted source.
 * @param snapshot_bytes  Bytes at `snapshot`.
 * @param sequence        Receives the number of the new sequence.
 * @return SUCCESS; VERSION_MISMATCH for another version or configuration, with the field; CORRUPT_DATA; CACHE_FULL;
 *         NULL_POINTER, MISALIGNED.
 *
 * Async: no. Graph capture: no. Workspace: none. Deterministic: yes. Thread-safe: one call at a time.
 */
MUSTAFAR_API
mustafar_status mustafar_cache_restore(struct mustafar_cache *cache,
                                       const void *snapshot,
                                       size_t snapshot_bytes,
                                       uint64_t *sequence);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

/* Initialisers: struct_size, and zero for every other field. */
#define MUSTAFAR_FORMAT_INIT {sizeof(mustafar_format), 0, 0, 0, 0, 0, 0}
#define MUSTAFAR_PAGE_LAYOUT_INIT {sizeof(mustafar_page_layout), 0, 0, 0, 0, 0, 0, 0, 0}
#define MUSTAFAR_CONTEXT_CONFIG_INIT {sizeof(mustafar_context_config), 0, 0, 0, 0}
#define MUSTAFAR_DEVICE_ERRORS_INIT {sizeof(mustafar_device_errors), 0, 0, 0, 0}
#define MUSTAFAR_TENSOR_MUT_INIT {sizeof(mustafar_tensor_mut), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
#define MUSTAFAR_PRUNE_ARGS_INIT {sizeof(mustafar_prune_args), 0, 0, 0, 0, 0, 0, 0, 0}
#define MUSTAFAR_TENSOR_INIT {sizeof(mustafar_tensor), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
#define MUSTAFAR_QUERY_WEIGHTS_ARGS_INIT {sizeof(mustafar_query_weights_args), 0, 0, 0}
#define MUSTAFAR_CENTER_INIT {sizeof(mustafar_center), 0, 0}
#define MUSTAFAR_STRUCTURED_WEIGHTS_ARGS_INIT {sizeof(mustafar_structured_weights_args), 0, 0, 0, 0, 0}
#define MUSTAFAR_TOKEN_WEIGHTS_ARGS_INIT {sizeof(mustafar_token_weights_args), 0, 0, 0, 0, 0, 0, 0, 0, 0}
#define MUSTAFAR_POOL_MUT_INIT {sizeof(mustafar_pool_mut), 0, 0, 0, 0, 0, 0}
#define MUSTAFAR_APPEND_SIDE_INIT {sizeof(mustafar_append_side), 0, 0, 0, 0}
#define MUSTAFAR_APPEND_ARGS_INIT {sizeof(mustafar_append_args), 0, 0, 0, 0}
#define MUSTAFAR_COMPRESS_ARGS_INIT {sizeof(mustafar_compress_args), 0, 0, 0, 0, 0}
#define MUSTAFAR_POOL_INIT {sizeof(mustafar_pool), 0, 0, 0, 0, 0, 0}
#define MUSTAFAR_SEQUENCES_INIT {sizeof(mustafar_sequences), 0, 0, 0, 0, 0, 0, 0}
#define MUSTAFAR_DECOMPRESS_ARGS_INIT {sizeof(mustafar_decompress_args), 0, 0, 0, 0}
#define MUSTAFAR_VALIDATE_ARGS_INIT {sizeof(mustafar_validate_args), 0, 0, 0}
#define MUSTAFAR_DENSE_INIT {sizeof(mustafar_dense), 0, 0, 0, 0}
#define MUSTAFAR_COMPRESSED_INIT {sizeof(mustafar_compressed), 0, 0, 0, 0}
#define MUSTAFAR_ATTEND_ARGS_INIT {sizeof(mustafar_attend_args), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
#define MUSTAFAR_ADVICE_INIT {sizeof(mustafar_advice), 0, 0, 0, 0, 0}
#define MUSTAFAR_SPMV_KEY_ARGS_INIT {sizeof(mustafar_spmv_key_args), 0, 0, 0, 0, 0, 0, 0}
#define MUSTAFAR_SPMV_VALUE_ARGS_INIT {sizeof(mustafar_spmv_value_args), 0, 0, 0, 0}
#define MUSTAFAR_MERGE_ARGS_INIT {sizeof(mustafar_merge_args), 0, 0, 0, 0, 0, 0}
#define MUSTAFAR_CACHE_HEAD_FORMATS_INIT {sizeof(mustafar_cache_head_formats), 0, 0, 0, 0, 0, 0}
#define MUSTAFAR_CACHE_CONFIG_INIT {sizeof(mustafar_cache_config), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
#define MUSTAFAR_CACHE_BYTES_INFO_INIT {sizeof(mustafar_cache_bytes_info), 0, 0, 0, 0}
#define MUSTAFAR_CACHE_ATTEND_ARGS_INIT {sizeof(mustafar_cache_attend_args), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
#define MUSTAFAR_CACHE_QUERIES_INIT {sizeof(mustafar_cache_queries), 0, 0, 0, 0, 0}

#endif  /* MUSTAFAR_H */
