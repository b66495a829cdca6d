"""Decode attention on one GPU, side by side in one process: mustafar over pages at several values of keep, and the dense
attention kernels that torch and FlashInfer have. Prints a table; --json writes every figure.

    MUSTAFAR_LIBRARY=target/release/libmustafar.so python3 benches/compare_gpu.py --json results.json

A run is one decode step: one query token for each sequence. Before every run its contender runs once untimed, so that none
finds its addresses translated and another does not, and then other memory is written and read, so that the L2 cache holds
nothing of use and, as after the weights of a model, nothing that has to be written back; that also keeps the GPU busy while
the host submits. All contenders take turns, round after round; figures are medians with the smallest and the
largest run, in microseconds, between two events on the stream. FlashInfer is left out where it is not installed, and
whatever does not fit in memory. "matmul" is attention as two products with the softmax between them and the KV heads
repeated, which is what papers often call dense. At the end one shape is measured at every sparsity. benches/plot_gpu.py
draws the JSON.
"""

import argparse
import json
import pathlib
import statistics
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "ffi-examples" / "python"))
from mustafar import (  # noqa: E402
    CUDA,
    VALUE_TYPES,
    AppendArgs,
    AppendSide,
    AttendArgs,
    Compressed,
    ContextConfig,
    Dense,
    Format,
    Library,
    Pool,
    Sequences,
    address,
    pointer,
    size,
    tensor,
)
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

PAGE_TOKENS = 64
# (name, query heads, KV heads, head_dim)
MODELS = {
    "llama-3-8b": (32, 8, 128),
    "llama-2-7b": (32, 32, 128),
    "llama-3-70b/8": (8, 1, 128),
    "llama-3-70b": (64, 8, 128),
    "smollm": (9, 3, 64),
    "wide": (16, 4, 256),
}
SPARSITIES = (0.7, 0.5)
EIGHT_BITS = ("int8", "e4m3")
SHAPES = [
    ("llama-3-8b", 8, 32768),
    ("llama-3-8b", 1, 4096),
    ("llama-3-8b", 1, 8192),
    ("llama-3-8b", 1, 32768),
    ("llama-3-8b", 1, 131072),
    ("llama-3-8b", 8, 4096),
    ("llama-3-8b", 8, 8192),
    ("llama-3-8b", 8, 131072),
    ("llama-3-8b", 32, 4096),
    ("llama-3-8b", 32, 8192),
    ("llama-3-8b", 32, 32768),
    ("llama-2-7b", 1, 32768),
    ("llama-2-7b", 8, 8192),
    ("llama-3-70b/8", 8, 32768),
    ("llama-3-70b", 8, 32768),
    ("smollm", 8, 8192),
    ("wide", 8, 8192),
]


class Pages:
    """mustafar's own storage of the same tokens."""

    def __init__(self, library, context, k, v, keep, values):
        self.library, self.context = library, context
        batch, tokens, heads, dim = k.shape
        pages = -(-tokens // PAGE_TOKENS)
        page = Format(value_type=VALUE_TYPES[values], head_dim=dim, page_tokens=PAGE_TOKENS, keep=keep)
        self.bytes = 2 * batch * pages * heads * library.page_bytes(page)
        self.pools = []
        for _ in range(2):
            memory = torch.empty(self.bytes // 2, dtype=torch.uint8, device="cuda")
            self.pools.append(Pool(data=memory, format=page, num_pages=batch * pages, kv_heads=heads))
        # Pages of a sequence lie anywhere.
        self.table = torch.randperm(batch * pages, device="cuda").to(torch.int32).view(batch, pages)
        lens = torch.full((batch,), tokens, dtype=torch.int32, device="cuda")
        self.sequences = Sequences(batch=batch, max_len=tokens, table=self.table, table_stride=pages, lens=lens)
        positions = torch.arange(tokens, device="cuda")
        for b in range(batch):
            slots = self.table[b, positions // PAGE_TOKENS].long() * PAGE_TOKENS + positions % PAGE_TOKENS
            sides = [AppendSide(x=tensor(x[b][None]), pool=pool) for x, pool in zip((k, v), self.pools)]
            library.append(context, AppendArgs(k=sides[0], v=sides[1], slots=slots), stream())
        torch.cuda.synchronize()

    def attend(self, q, split=0):
        batch = q.shape[0]
        q = q.flatten(0, 1)[None]
        self.out = torch.empty_like(q)
        pages = Compressed(k=self.pools[0], v=self.pools[1], sequences=self.sequences)
        args = AttendArgs(q=tensor(q), out=tensor(self.out), batch=batch, compressed=pages, split_tokens=split)
        return Call(self.library, self.context, args)


def attend_window(library, context, q, k, v):
    """The same tokens, all of them dense, through mustafar."""
    batch, tokens = k.shape[:2]
    lens = torch.full((batch,), tokens, dtype=torch.int32, device="cuda")
    q = q[None, :, 0]
    window = Dense(k=tensor(k), v=tensor(v), lens=lens)
    args = AttendArgs(q=tensor(q), out=tensor(torch.empty_like(q)), batch=batch, window=window)
    return Call(library, context, args)


class Call:
    """An attend that is ready to be repeated."""

    def __init__(self, library, context, args):
        self.library, self.context, self.args = library, context, args
        self.workspace = torch.empty(library.workspace_bytes(context, args), dtype=torch.uint8, device="cuda")

    def __call__(self):
        workspace = pointer(address(self.workspace)), size(self.workspace.numel())
        self.library.attend(self.context, self.args, *workspace, stream())


def stream():
    return pointer(torch.cuda.current_stream().cuda_stream)


def of_torch(backend, q, k, v):
    """torch's attention, which wants heads before tokens."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))

    def call():
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return call


def of_matmul(q, k, v):
    """Two batched products over KV heads repeated for every query head."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))

    def call():
        every_k, every_v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.matmul(q, every_k.transpose(2, 3)) / q.shape[3] ** 0.5
        return torch.matmul(torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), every_v)

    return call


def of_flashinfer(q, k, v, dtype):
    """FlashInfer's paged decode over the same tokens, in pages of 64."""
    import flashinfer

    batch, tokens, heads, dim = k.shape
    pages = tokens // PAGE_TOKENS
    cache = torch.stack((k, v), 2).view(batch * pages, PAGE_TOKENS, 2, heads, dim).transpose(1, 2).contiguous().to(dtype)
    scratch = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(scratch, "NHD", use_tensor_cores=True)
    indptr = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * pages
    last = torch.full((batch,), PAGE_TOKENS, dtype=torch.int32, device="cuda")
    indices = torch.randperm(batch * pages, device="cuda").to(torch.int32)
    kinds = {"q_data_type": q.dtype, "kv_data_type": dtype}
    wrapper.plan(indptr, indices, last, q.shape[2], heads, dim, PAGE_TOKENS, **kinds)
    q = q[:, 0].contiguous()
    return lambda: wrapper.run(q, cache)


def measure(calls, rounds, flush):
    """Microseconds of each call, in every round."""
    times = {name: [] for name in calls}
    for round_ in range(rounds + 3):
        events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in calls}
        for _ in range(8):  # a head start for the host
            flush.fill_(round_)
        for name, call in calls.items():
            call()
            for _ in range(2):
                flush.fill_(round_)
            flush.view(torch.int32).sum()
            events[name][0].record()
            call()
            events[name][1].record()
        torch.cuda.synchronize()
        if round_ >= 3:
            for name, (start, end) in events.items():
                times[name].append(start.elapsed_time(end) * 1e3)
    return times


def compare(library, context, shape, options, flush, sparsities=SPARSITIES):
    model, batch, tokens = shape
    q_heads, kv_heads, dim = MODELS[model]
    dtype = getattr(torch, options.dtype)
    make = lambda *s: torch.randn(s, device="cuda", dtype=torch.float16).to(dtype)  # noqa: E731
    q, k, v = make(batch, 1, q_heads, dim), make(batch, tokens, kv_heads, dim), make(batch, tokens, kv_heads, dim)
    dense_bytes = k.nbytes + v.nbytes
    calls, touched = {}, {}
    for sparsity in sparsities:
        keep = dim - int(sparsity * dim)
        for values in [options.dtype, *EIGHT_BITS]:
            pages = Pages(library, context, k, v, keep, values)
            for split in [0, *options.split]:
                name = f"keep {keep}" + (f" {values}" if values in EIGHT_BITS else "") + (f" split {split}" if split else "")
                calls[name], touched[name] = pages.attend(q, split), pages.bytes
    calls["mustafar dense"], touched["mustafar dense"] = attend_window(library, context, q, k, v), dense_bytes
    contenders = {
        "cudnn": lambda: of_torch(SDPBackend.CUDNN_ATTENTION, q, k, v),
        "flash": lambda: of_torch(SDPBackend.FLASH_ATTENTION, q, k, v),
        "matmul": lambda: of_matmul(q, k, v),
    }
    if not options.no_flashinfer:
        contenders["flashinfer"] = lambda: of_flashinfer(q, k, v, dtype)
        contenders["flashinfer fp8"] = lambda: of_flashinfer(q, k, v, torch.float8_e4m3fn)
    for name, prepare in contenders.items():
        try:
            calls[name] = prepare()
            calls[name]()
            touched[name] = dense_bytes // 2 if "fp8" in name else dense_bytes
        except Exception as error:  # noqa: BLE001 - a contender that cannot run here is reported, not fatal
            calls.pop(name, None)
            print(f"{name} left out: {type(error).__name__}: {str(error).splitlines()[0][:150]}", file=sys.stderr)
    source, target = torch.empty(2, 1 << 29, dtype=torch.uint8, device="cuda")
    calls["copy"], touched["copy"] = lambda: target.copy_(source), 2 * source.nbytes
    times = measure(calls, options.rounds, flush)
    copy_gbps = touched["copy"] / statistics.median(times["copy"]) / 1e3
    rows = {}
    for name, us in times.items():
        median = statistics.median(us)
        gbps = touched[name] / median / 1e3
        rows[name] = {"us": median, "min": min(us), "max": max(us), "gbps": gbps, "of_copy": gbps / copy_gbps}
    return {"model": model, "batch": batch, "tokens": tokens, "copy_gbps": copy_gbps, "rows": rows}


def show(result):
    print(f"\n{result['model']}, batch {result['batch']} x {result['tokens']} tokens, copy {result['copy_gbps']:.0f} GB/s")
    rows = result["rows"]
    rivals = [name for name in ("cudnn", "flash", "matmul", "flashinfer", "flashinfer fp8") if name in rows]
    head = "".join(f"{'x ' + name:>18}" for name in rivals)
    print(f"{'':<18}{'us':>9}{'min':>9}{'max':>9}{'of copy':>9}{head}")
    for name, row in rows.items():
        if name == "copy":
            continue
        ratios = "".join(f"{rows[rival]['us'] / row['us']:>18.2f}" for rival in rivals)
        print(f"{name:<18}{row['us']:>9.1f}{row['min']:>9.1f}{row['max']:>9.1f}{row['of_copy']:>9.0%}{ratios}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write every figure to this file")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--shapes", type=int, help="only the first so many shapes")
    parser.add_argument("--split", type=int, nargs="*", default=[], help="values of split_tokens to try as well")
    parser.add_argument("--no-flashinfer", action="store_true")
    options = parser.parse_args()
    library = Library()
    context = library.context(ContextConfig(backend=CUDA, device=torch.cuda.current_device()))
    device = torch.cuda.get_device_properties(0)
    print(f"mustafar {library.version} on {device.name}, torch {torch.__version__}, {options.dtype}")
    flush = torch.empty(2 * max(device.L2_cache_size, 64 << 20), dtype=torch.uint8, device="cuda")
    results = []
    for shape in SHAPES[: options.shapes]:
        results.append(compare(library, context, shape, options, flush))
        show(results[-1])
        torch.cuda.empty_cache()
    every = [tenth / 10 for tenth in range(10)]
    sweep = compare(library, context, SHAPES[0], options, flush, every)
    show(sweep)
    if options.json:
        summary = {"device": device.name, "torch": torch.__version__, "dtype": options.dtype, "results": results, "sweep": sweep}
        pathlib.Path(options.json).write_text(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
