"""mustafar alone on one GPU: the tables of docs/performance.md about storing, ragged pages, several query tokens, and every
head_dim, type and group.

    MUSTAFAR_LIBRARY=target/release/libmustafar.so python3 benches/tables_gpu.py --json tables.json

Measured as in compare_gpu.py. A figure without a unit is in microseconds; "of copy" is bytes read and written over time, as a
share of what a device copy in the same table reaches.
"""

import argparse
import ctypes
import itertools
import json
import pathlib
import statistics

import torch
from compare_gpu import PAGE_TOKENS, Pages, measure, stream
from mustafar import (
    CUDA,
    VALUE_TYPES,
    AppendArgs,
    AppendSide,
    ContextConfig,
    Format,
    Library,
    MustafarError,
    Pool,
    Struct,
    fields,
    i64,
    pointer,
    tensor,
    u32,
)

RAGGED = 1  # mustafar_rows
BATCH, HEADS, GROUP, DIM, TOKENS = 8, 8, 4, 128, 32768
LAYERS, PERIOD = 32, 256


class CompressArgs(Struct):
    _fields_ = fields(*((n, pointer) for n in ("x", "mask", "pool", "pages", "needed")))


class CacheConfig(Struct):
    _fields_ = fields(
        ("k", pointer),
        ("v", pointer),
        ("max_tokens", i64),
        *((n, u32) for n in ("layers", "q_heads", "kv_heads", "max_sequences", "window", "group", "sinks", "center")),
        *((n, u32) for n in ("scaled_from", "reserved", "k_strategy", "v_strategy")),
        ("overrides", pointer),
        ("num_overrides", i64),
    )


def random(*shape, dtype=torch.float16):
    return torch.randn(shape, device="cuda", dtype=torch.float16).to(dtype)


class Table:
    """Calls that take turns, each with the bytes it touches and what to print in front of its figures."""

    def __init__(self, bench, title, *columns):
        self.bench, self.title, self.columns = bench, title, columns
        self.calls, self.rows = {}, {}

    def add(self, call, touched, *cells, times=1):
        """`times` runs of the call make up what is reported."""
        name = " ".join(map(str, cells))
        self.calls[name], self.rows[name] = call, {"cells": cells, "bytes": touched, "times": times}

    def finish(self):
        source, target = torch.empty(2, 1 << 29, dtype=torch.uint8, device="cuda")
        self.calls["copy"] = lambda: target.copy_(source)
        us = measure(self.calls, self.bench.rounds, self.bench.flush)
        copy = 2 * source.nbytes / statistics.median(us.pop("copy"))
        print(f"\n{self.title}, copy {copy / 1e3:.0f} GB/s\n")
        print("| " + " | ".join([*self.columns, "us", "min", "max", "GB/s", "of copy"]) + " |")
        print("|" + "---|" * (len(self.columns) + 5))
        for name, row in self.rows.items():
            runs = [row["times"] * x for x in us[name]]
            row.update(us=statistics.median(runs), min=min(runs), max=max(runs))
            row["gbps"] = row["bytes"] / row["us"] / 1e3
            row["of_copy"] = row["gbps"] * 1e3 / copy
            figures = [f"{row[key]:.1f}" for key in ("us", "min", "max")]
            print("| " + " | ".join([*map(str, row["cells"]), *figures, f"{row['gbps']:.0f}", f"{row['of_copy']:.0%}"]) + " |")
        self.bench.results[self.title] = {"copy_gbps": copy / 1e3, "rows": list(self.rows.values())}


class Bench:
    def __init__(self, rounds):
        self.library, self.rounds, self.results = Library(), rounds, {}
        self.context = self.library.context(ContextConfig(backend=CUDA, device=torch.cuda.current_device()))
        l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        self.flush = torch.empty(2 * max(l2_bytes, 64 << 20), dtype=torch.uint8, device="cuda")

    def format(self, values, keep, dim=DIM):
        return Format(value_type=VALUE_TYPES[values], head_dim=dim, page_tokens=PAGE_TOKENS, keep=keep)

    def append_call(self, x, values, keep):
        """An append of K and V `x` to pages that lie anywhere, and the bytes it reads and writes."""
        tokens, heads, dim = x[0].shape
        page = self.format(values, keep, dim)
        pages, page_bytes = tokens // PAGE_TOKENS, self.library.page_bytes(page)
        memory = torch.empty(2, pages * heads * page_bytes, dtype=torch.uint8, device="cuda")
        pools = [Pool(data=side, format=page, num_pages=pages, kv_heads=heads) for side in memory]
        slots = torch.randperm(pages, device="cuda")[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS, device="cuda")
        sides = [AppendSide(x=tensor(side[None]), pool=pool) for side, pool in zip(x, pools)]
        args = AppendArgs(k=sides[0], v=sides[1], slots=slots.flatten())
        return lambda: self.library.append(self.context, args, stream()), x.nbytes + memory.nbytes

    def append(self):
        for tokens in (BATCH * TOKENS, BATCH * PERIOD):
            table = Table(self, f"append, {tokens} tokens, {HEADS} heads, head_dim {DIM}", "values", "keep")
            x = random(2, tokens, HEADS, DIM)
            for values in ("float16", "e4m3", "int8"):
                for keep in (39, 64):
                    table.add(*self.append_call(x, values, keep), values, keep)
            table.finish()

    def cache_call(self, values, keep):
        """Appends PERIOD tokens to every sequence and layer of a cache, each of which makes it compress as many."""
        page, calls = self.format(values, keep), 2 * (self.rounds + 3)
        config = CacheConfig(
            k=page,
            v=page,
            max_tokens=BATCH * PERIOD * (calls + 1),
            layers=LAYERS,
            q_heads=HEADS * GROUP,
            kv_heads=HEADS,
            max_sequences=BATCH,
            group=PERIOD,
        )
        cache, sequences = pointer(), (ctypes.c_uint64 * BATCH)()
        self.library.cache_create(self.context, config, ctypes.byref(cache))
        for i in range(BATCH):
            self.library.cache_sequence_create(cache, ctypes.byref(sequences, 8 * i))
        kv = random(2, BATCH, PERIOD, HEADS, DIM)

        def append(tokens):
            k, v = (tensor(x[:, :tokens]) for x in kv)
            for layer in range(LAYERS):
                self.library.cache_append_batch(cache, u32(layer), sequences, i64(BATCH), k, v, stream())

        append(4 + 32)  # sinks and window
        return lambda: append(PERIOD)

    def compression(self):
        """What a cache spends on compressing, and the attention of the steps it is spread over."""
        table = Table(self, f"compression of {PERIOD} tokens, {LAYERS} layers x {BATCH} sequences", "what", "values", "keep")
        x = random(2, BATCH * PERIOD, HEADS, DIM)
        for values in ("float16", "e4m3", "int8"):
            call, touched = self.append_call(x, values, 39)
            table.add(call, LAYERS * touched, "append", values, 39, times=LAYERS)
            try:
                table.add(self.cache_call(values, 39), LAYERS * touched, "Cache", values, 39)
            except MustafarError as error:
                print(f"left out: {error}")
        q = random(BATCH, 1, HEADS * GROUP, DIM)
        for tokens in (TOKENS, TOKENS // 8):
            k, v = random(2, BATCH, tokens, HEADS, DIM)
            pages = Pages(self.library, self.context, k, v, 39, "float16")
            table.add(pages.attend(q), LAYERS * pages.bytes, f"attention, {tokens} tokens", "float16", 39, times=LAYERS)
        table.finish()

    def ragged_pages(self, k, v, keep, values):
        """Pages whose rows keep what is among the largest of the page: as many values as uniform ones."""
        pages = Pages(self.library, self.context, k, v, keep, values)
        page = Format(
            rows=RAGGED, value_type=VALUE_TYPES[values], head_dim=DIM, page_tokens=PAGE_TOKENS, capacity=PAGE_TOKENS * keep
        )
        page_bytes, number = self.library.page_bytes(page), BATCH * TOKENS // PAGE_TOKENS
        pages.bytes = 2 * number * HEADS * page_bytes
        weights = 2 ** torch.arange(8, device="cuda")
        for side, x in enumerate((k, v)):
            memory = torch.empty(number * HEADS * page_bytes, dtype=torch.uint8, device="cuda")
            pages.pools[side] = Pool(data=memory, format=page, num_pages=number, kv_heads=HEADS)
            for b in range(BATCH):
                by_page = x[b].view(-1, PAGE_TOKENS, HEADS, DIM).transpose(1, 2).flatten(2)
                largest = by_page.abs().topk(PAGE_TOKENS * keep, sorted=False).indices
                kept = torch.zeros_like(by_page, dtype=torch.bool).scatter_(2, largest, True)
                kept = kept.view(-1, HEADS, PAGE_TOKENS, DIM).transpose(1, 2)
                mask = (kept.reshape(-1, HEADS, DIM // 8, 8) * weights).sum(3).to(torch.uint8)
                args = CompressArgs(x=tensor(x[b][None]), mask=mask, pool=pages.pools[side], pages=pages.table[b])
                self.library.compress(self.context, args, stream())
                torch.cuda.synchronize()
        return pages

    def ragged(self):
        table = Table(self, f"ragged pages, {BATCH} x {TOKENS} tokens", "type", "group", "values per row", "pages")
        k, v = random(2, BATCH, TOKENS, HEADS, DIM)
        for values, keep in itertools.product(("float16", "int8"), (39, 64)):
            uniform = Pages(self.library, self.context, k, v, keep, values)
            ragged = self.ragged_pages(k, v, keep, values)
            for group in (4, 8):
                q = random(BATCH, 1, HEADS * group, DIM)
                table.add(uniform.attend(q), uniform.bytes, values, group, keep, "uniform")
                table.add(ragged.attend(q), ragged.bytes, values, group, keep, "ragged")
        table.finish()

    def queries(self):
        table = Table(self, f"several query tokens, {BATCH} x {TOKENS} tokens, keep 39", "query tokens")
        k, v = random(2, BATCH, TOKENS, HEADS, DIM)
        pages = Pages(self.library, self.context, k, v, 39, "float16")
        for n in (1, 2, 4, 8, 16):
            table.add(pages.attend(random(BATCH, n, HEADS * GROUP, DIM)), pages.bytes, n)
        table.finish()

    def shapes(self):
        table = Table(self, f"shapes, dense K and V as large as {BATCH} x {TOKENS} x {HEADS} x {DIM}", "head_dim", "type", "group", "keep")
        shapes = [(dim, dtype, GROUP) for dim in (64, 96, 128, 256) for dtype in ("float16", "bfloat16")]
        shapes += [(DIM, "float16", group) for group in (1, 2, 8, 16)]
        for dim, dtype, group in shapes:
            tokens = TOKENS * DIM // dim // PAGE_TOKENS * PAGE_TOKENS
            k, v = random(2, BATCH, tokens, HEADS, dim, dtype=getattr(torch, dtype))
            for keep in (dim - int(0.7 * dim), dim // 2):
                pages = Pages(self.library, self.context, k, v, keep, dtype)
                q = random(BATCH, 1, HEADS * group, dim, dtype=getattr(torch, dtype))
                table.add(pages.attend(q), pages.bytes, dim, dtype, group, keep)
        table.finish()


TABLES = ("append", "compression", "ragged", "queries", "shapes")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", default=TABLES, metavar="table", help=", ".join(TABLES))
    parser.add_argument("--json", help="write every figure to this file")
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    bench = Bench(options.rounds)
    print(f"mustafar {bench.library.version} on {torch.cuda.get_device_name()}, torch {torch.__version__}")
    for table in options.tables:
        getattr(bench, table)()
        torch.cuda.empty_cache()
    if options.json:
        summary = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "tables": bench.results}
        pathlib.Path(options.json).write_text(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
