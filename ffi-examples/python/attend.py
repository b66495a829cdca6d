"""mustafar from Python with nothing but ctypes and numpy: prune and store keys and values, attend over the pages, and
compare with the same computation in numpy.

    MUSTAFAR_LIBRARY=/path/to/libmustafar.so python attend.py

Without the variable, the dynamic loader looks for the installed library.
"""

import ctypes
import ctypes.util
import os
import sys

try:
    import numpy as np
except ImportError:
    sys.exit("this example needs numpy: python -m pip install numpy")

c_size, u32, i64, pointer = ctypes.c_size_t, ctypes.c_uint32, ctypes.c_int64, ctypes.c_void_p
F16, F32 = 1, 3  # mustafar_dtype


class Struct(ctypes.Structure):
    """A structure of the C API: fields by keyword, other structures and arrays by address, the rest zero."""

    def __init__(self, **fields):
        super().__init__(struct_size=ctypes.sizeof(self))
        # ctypes stores addresses only: hold what they point to.
        self.held = list(fields.values())
        for name, value in fields.items():
            if isinstance(value, ctypes.Structure):
                value = ctypes.addressof(value)
            elif isinstance(value, np.ndarray):
                value = value.ctypes.data
            setattr(self, name, value)


def fields(*typed):
    return [("struct_size", c_size), *typed]


class Format(Struct):
    _fields_ = fields(*((n, u32) for n in ("rows", "dtype", "head_dim", "page_tokens", "keep", "capacity")))


class Tensor(Struct):
    _fields_ = fields(
        ("data", pointer),
        ("dtype", u32),
        ("reserved", u32),
        *((n, i64) for n in ("batch", "tokens", "heads", "dim", "batch_stride", "token_stride", "head_stride")),
    )


class Pool(Struct):
    _fields_ = fields(
        ("data", pointer),
        ("format", pointer),
        *((n, i64) for n in ("num_pages", "kv_heads", "page_stride", "head_stride")),
    )


class Sequences(Struct):
    _fields_ = fields(
        ("batch", i64),
        ("max_len", i64),
        ("table", pointer),
        ("table_stride", i64),
        ("lens", pointer),
        ("lens_per_head", u32),
        ("reserved", u32),
    )


class AppendSide(Struct):
    _fields_ = fields(("x", pointer), ("pool", pointer), ("weights", pointer), ("center", pointer))


class AppendArgs(Struct):
    _fields_ = fields(("k", pointer), ("v", pointer), ("slots", pointer), ("sequence", pointer))


class Compressed(Struct):
    _fields_ = fields(("k", pointer), ("v", pointer), ("sequences", pointer), ("k_center", pointer))


class AttendArgs(Struct):
    _fields_ = fields(
        ("q", pointer),
        ("out", pointer),
        ("lse", pointer),
        ("batch", i64),
        ("q_indptr", pointer),
        ("max_q_len", i64),
        ("sinks", pointer),
        ("compressed", pointer),
        ("window", pointer),
        ("first", pointer),
        ("sliding_window", i64),
        ("split_tokens", i64),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class MustafarError(Exception):
    """A call that did not succeed; the text names the argument, its value and what is allowed."""


class Library:
    """The C functions, with statuses as exceptions."""

    def __init__(self, path):
        self.lib = ctypes.CDLL(path)
        for name in ("mustafar_version", "mustafar_last_error_message", "mustafar_status_name"):
            getattr(self.lib, name).restype = ctypes.c_char_p

    def __getattr__(self, name):
        function = getattr(self.lib, "mustafar_" + name)

        def call(*args):
            status = function(*(a if isinstance(a, ctypes._SimpleCData) else self.argument(a) for a in args))
            if status:
                what = self.lib.mustafar_status_name(status).decode()
                raise MustafarError(f"{what}: {self.lib.mustafar_last_error_message().decode()}")

        return call

    @staticmethod
    def argument(value):
        if value is None:
            return pointer()
        return ctypes.byref(value) if isinstance(value, ctypes.Structure) else value


def tensor(array):
    """An array [batch, tokens, heads, dim] of any strides, as the library sees it."""
    dtype = {np.dtype(np.float16): F16, np.dtype(np.float32): F32}[array.dtype]
    batch, tokens, heads, dim = array.shape
    strides = [s // array.itemsize for s in array.strides]
    assert dim == 1 or strides[3] == 1, "elements of a row must be adjacent"
    names = ("batch_stride", "token_stride", "head_stride")
    return Tensor(
        data=array, dtype=dtype, batch=batch, tokens=tokens, heads=heads, dim=dim, **dict(zip(names, strides[:3]))
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
    path = os.environ.get("MUSTAFAR_LIBRARY") or ctypes.util.find_library("mustafar")
    if not path:
        sys.exit("libmustafar.so is not installed; MUSTAFAR_LIBRARY can say where it is")
    library = Library(path)
    print("mustafar", library.lib.mustafar_version().decode())
    context = pointer()
    library.context_create(None, ctypes.byref(context))

    tokens, kv_heads, q_heads, dim, page_tokens = 500, 4, 16, 128, 64
    random = np.random.default_rng(1)
    # As Hugging Face caches keep them: heads before tokens. Strides make the layout irrelevant.
    k = random.standard_normal((1, kv_heads, tokens, dim)).astype(np.float16).transpose(0, 2, 1, 3)
    v = random.standard_normal((1, kv_heads, tokens, dim)).astype(np.float16).transpose(0, 2, 1, 3)
    q = random.standard_normal((1, 1, q_heads, dim)).astype(np.float16)

    num_pages = -(-tokens // page_tokens)
    sides, pools, total = [], [], 0
    for x, sparsity in ((k, 0.5), (v, 0.7)):
        keep, size = u32(), c_size()
        library.keep_for_sparsity(u32(dim), ctypes.c_double(sparsity), ctypes.byref(keep))
        page = Format(dtype=F16, head_dim=dim, page_tokens=page_tokens, keep=keep.value)
        library.format_page_bytes(page, ctypes.byref(size))
        total += size.value
        memory = aligned(num_pages * kv_heads * size.value)
        pools.append(Pool(data=memory, format=page, num_pages=num_pages, kv_heads=kv_heads))
        sides.append(AppendSide(x=tensor(x), pool=pools[-1]))
    slots = np.arange(tokens, dtype=np.int64)
    library.append(context, AppendArgs(k=sides[0], v=sides[1], slots=slots), None)
    print(f"pages take {100 * total / (2 * page_tokens * dim * 2):.1f} % of dense")

    lens = np.array([tokens], np.int32)
    pages = Compressed(k=pools[0], v=pools[1], sequences=Sequences(batch=1, max_len=tokens, lens=lens))
    out, lse = np.full((1, 1, q_heads, dim), np.nan, np.float32), np.full((1, 1, q_heads, 1), np.nan, np.float32)
    args = AttendArgs(q=tensor(q), out=tensor(out), lse=tensor(lse), batch=1, compressed=pages)
    size = c_size()
    library.attend_workspace_size(context, args, ctypes.byref(size))
    workspace = aligned(size.value)
    library.attend(context, args, pointer(workspace.ctypes.data), size, None)

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
        library.attend(context, args, pointer(workspace.ctypes.data), c_size(0), None)
        sys.exit("a workspace of 0 bytes was accepted")
    except MustafarError as error:
        print("as it should be refused:", error)
    library.context_destroy(context)


if __name__ == "__main__":
    main()
