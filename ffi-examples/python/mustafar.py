"""The C API of mustafar through ctypes, as much of it as the examples beside this file use. Arrays are numpy's or
torch's; nothing is copied, the library works on their memory."""

import ctypes
import ctypes.util
import os
import sys

size, u32, i64, pointer = ctypes.c_size_t, ctypes.c_uint32, ctypes.c_int64, ctypes.c_void_p
f32 = ctypes.c_float
DTYPES = {"float16": 1, "bfloat16": 2, "float32": 3}  # mustafar_dtype
VALUE_TYPES = {"float16": 1, "bfloat16": 2, "e4m3": 16, "int8": 17}  # mustafar_value_type
CUDA = 1  # mustafar_backend
UNAVAILABLE = 13  # mustafar_status


def address(value):
    """Where the data of an array or a structure is."""
    if isinstance(value, ctypes.Structure):
        return ctypes.addressof(value)
    if hasattr(value, "data_ptr"):
        return value.data_ptr()
    return value.ctypes.data if hasattr(value, "ctypes") else value


class Struct(ctypes.Structure):
    """A structure of the C API: fields by keyword, other structures and arrays by address, the rest zero."""

    def __init__(self, **fields):
        super().__init__(struct_size=ctypes.sizeof(self))
        # ctypes stores addresses only: hold what they point to.
        self.held = list(fields.values())
        for name, value in fields.items():
            setattr(self, name, address(value))


def fields(*typed):
    return [("struct_size", size), *typed]


class ContextConfig(Struct):
    _fields_ = fields(*((n, u32) for n in ("backend", "threads", "device", "reserved")))


class DeviceErrors(Struct):
    _fields_ = fields(*((n, u32) for n in ("append", "compress", "read", "reserved")))


class Format(Struct):
    _fields_ = fields(*((n, u32) for n in ("rows", "value_type", "head_dim", "page_tokens", "keep", "capacity")))


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


class DecompressArgs(Struct):
    _fields_ = fields(("pool", pointer), ("sequences", pointer), ("center", pointer), ("out", pointer))


class Compressed(Struct):
    _fields_ = fields(("k", pointer), ("v", pointer), ("sequences", pointer), ("k_center", pointer))


class Dense(Struct):
    _fields_ = fields(("k", pointer), ("v", pointer), ("lens", pointer), ("rows", pointer))


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
        ("scale", f32),
        ("softcap", f32),
    )


def tensor(array):
    """An array [batch, tokens, heads, dim] of any strides, as the library sees it."""
    dtype = DTYPES[str(array.dtype).removeprefix("torch.")]
    batch, tokens, heads, dim = array.shape
    # numpy counts strides in bytes, torch in elements.
    strides = [s // array.itemsize for s in array.strides] if hasattr(array, "strides") else array.stride()
    assert dim == 1 or strides[3] == 1, "elements of a row must be adjacent"
    names = ("batch_stride", "token_stride", "head_stride")
    return Tensor(
        data=array, dtype=dtype, batch=batch, tokens=tokens, heads=heads, dim=dim, **dict(zip(names, strides[:3]))
    )


class MustafarError(Exception):
    """A call that did not succeed; the text names the argument, its value and what is allowed."""

    def __init__(self, status, text):
        super().__init__(text)
        self.status = status


class Library:
    """The C functions without their prefix, with statuses as exceptions."""

    def __init__(self):
        path = os.environ.get("MUSTAFAR_LIBRARY") or ctypes.util.find_library("mustafar")
        if not path:
            sys.exit("libmustafar.so is not installed; MUSTAFAR_LIBRARY can say where it is")
        self.lib = ctypes.CDLL(path)
        for name in ("mustafar_version", "mustafar_last_error_message", "mustafar_status_name"):
            getattr(self.lib, name).restype = ctypes.c_char_p
        self.version = self.lib.mustafar_version().decode()

    def __getattr__(self, name):
        function = getattr(self.lib, "mustafar_" + name)

        def call(*args):
            status = function(*(a if isinstance(a, ctypes._SimpleCData) else self.argument(a) for a in args))
            if status:
                what = self.lib.mustafar_status_name(status).decode()
                text = f"{what}: {self.lib.mustafar_last_error_message().decode()}"
                raise MustafarError(status, text)

        return call

    @staticmethod
    def argument(value):
        if value is None:
            return pointer()
        return ctypes.byref(value) if isinstance(value, ctypes.Structure) else value

    def context(self, config=None):
        """A context; context_destroy ends it."""
        context = pointer()
        self.context_create(config, ctypes.byref(context))
        return context

    def page_bytes(self, page_format):
        """The size of a page."""
        result = size()
        self.format_page_bytes(page_format, ctypes.byref(result))
        return result.value

    def workspace_bytes(self, context, args):
        """What mustafar_attend needs for these arguments, or for smaller ones."""
        result = size()
        self.attend_workspace_size(context, args, ctypes.byref(result))
        return result.value
