"""mustafar from Python with nothing but ctypes and numpy: prune and store keys and values, attend over the pages, and
compare with the same computation in numpy.

    MUSTAFAR_LIBRARY=/path/to/libmustafar.so python attend.py

Without the variable, the dynamic loader looks for the installed library.
"""

import ctypes
import sys

try:
    import numpy as np
except ImportError:
    sys.exit("this example needs numpy: python -m pip install numpy")

from mustafar import (
    VALUE_TYPES,
    AppendArgs,
    AppendSide,
    AttendArgs,
    Compressed,
    Format,
    Library,
    MustafarError,
    Pool,
    Sequences,
    address,
    pointer,
    size,
    tensor,
    u32,
)


def aligned(bytes_needed):
    """Zeroed bytes on a 16-byte boundary."""
    memory = np.zeros(bytes_needed + 16, np.uint8)
    start = -memory.ctypes.data % 16
    return memory[start : start + bytes_needed]


def pruned(x, keep):
    """x with all but the `keep` largest magnitudes of each row zeroed; ties go to the lower channel."""
    order = np.argsort(-np.abs(x.astype(np.float32)), axis=-1, kind="stable")
    mask = np.zeros(x.shape, bool)
    np.put_along_axis(mask, order[..., :keep], True, axis=-1)
    return np.where(mask, x, np.float16(0))


def main():
    library = Library()
    print("mustafar", library.version)
    context = library.context()

    tokens, kv_heads, q_heads, dim, page_tokens = 500, 4, 16, 128, 64
    random = np.random.default_rng(1)
    # As Hugging Face caches keep them: heads before tokens. Strides make the layout irrelevant.
    k = random.standard_normal((1, kv_heads, tokens, dim)).astype(np.float16).transpose(0, 2, 1, 3)
    v = random.standard_normal((1, kv_heads, tokens, dim)).astype(np.float16).transpose(0, 2, 1, 3)
    q = random.standard_normal((1, 1, q_heads, dim)).astype(np.float16)

    num_pages = -(-tokens // page_tokens)
    sides, pools, total = [], [], 0
    for x, sparsity in ((k, 0.5), (v, 0.7)):
        keep = u32()
        library.keep_for_sparsity(u32(dim), ctypes.c_double(sparsity), ctypes.byref(keep))
        page = Format(value_type=VALUE_TYPES["float16"], head_dim=dim, page_tokens=page_tokens, keep=keep.value)
        page_bytes = library.page_bytes(page)
        total += page_bytes
        memory = aligned(num_pages * kv_heads * page_bytes)
        pools.append(Pool(data=memory, format=page, num_pages=num_pages, kv_heads=kv_heads))
        sides.append(AppendSide(x=tensor(x), pool=pools[-1]))
    slots = np.arange(tokens, dtype=np.int64)
    library.append(context, AppendArgs(k=sides[0], v=sides[1], slots=slots), None)
    print(f"pages take {100 * total / (2 * page_tokens * dim * 2):.1f} % of dense")

    lens = np.array([tokens], np.int32)
    pages = Compressed(k=pools[0], v=pools[1], sequences=Sequences(batch=1, max_len=tokens, lens=lens))
    out, lse = np.full((1, 1, q_heads, dim), np.nan, np.float32), np.full((1, 1, q_heads, 1), np.nan, np.float32)
    args = AttendArgs(q=tensor(q), out=tensor(out), lse=tensor(lse), batch=1, compressed=pages)
    workspace = aligned(library.workspace_bytes(context, args))
    library.attend(context, args, pointer(address(workspace)), size(len(workspace)), None)

    group = q_heads // kv_heads
    dense_k = np.repeat(pruned(k, 64)[0].astype(np.float64), group, axis=1)
    dense_v = np.repeat(pruned(v, 39)[0].astype(np.float64), group, axis=1)
    scores = np.einsum("hd,thd->ht", q[0, 0].astype(np.float64), dense_k) / np.sqrt(dim)
    largest = scores.max(axis=1, keepdims=True)
    weights = np.exp(scores - largest)
    sums = weights.sum(axis=1, keepdims=True)
    expected = np.einsum("ht,thd->hd", weights / sums, dense_v)
    difference = max(np.abs(out[0, 0] - expected).max(), np.abs(lse[0, 0] - (largest + np.log(sums))).max())
    print(f"largest difference from numpy: {difference:.2g}")
    if not difference < 1e-4:
        sys.exit("the answer is wrong")

    try:
        library.attend(context, args, pointer(address(workspace)), size(0), None)
        sys.exit("a workspace of 0 bytes was accepted")
    except MustafarError as error:
        print("as it should be refused:", error)
    library.context_destroy(context)


if __name__ == "__main__":
    main()
