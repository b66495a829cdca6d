"""mustafar on torch's GPU tensors through ctypes: append and attend on torch's current stream, without a copy, compared
with torch's own attention; then the same two calls in a CUDA graph, replayed with other tokens and lengths.

    MUSTAFAR_LIBRARY=/path/to/libmustafar.so python cuda.py

Needs torch and a GPU; without them it says so and ends with 77.
"""

import sys

from mustafar import (
    CUDA,
    VALUE_TYPES,
    UNAVAILABLE,
    AppendArgs,
    AppendSide,
    AttendArgs,
    Compressed,
    ContextConfig,
    DecompressArgs,
    Dense,
    DeviceErrors,
    Format,
    Library,
    MustafarError,
    Pool,
    Sequences,
    address,
    pointer,
    size,
    tensor,
)


def skip(why):
    print("SKIPPED on CUDA:", why)
    sys.exit(77)


try:
    import torch
except ImportError:
    skip("this example needs torch: python -m pip install torch")

KV_HEADS, Q_HEADS, DIM, PAGE_TOKENS = 4, 16, 128, 64
KEEP_K, KEEP_V = 64, 39  # sparsity 0.5 and 0.7
PAGED = [1000, 640, 64]  # compressed tokens of each sequence at first
WINDOW = [37, 200, 1]
BATCH, MAX_LEN, MAX_WINDOW, SINKS = 3, 1024, 256, 4
MAX_PAGES = MAX_LEN // PAGE_TOKENS


def stream():
    return pointer(torch.cuda.current_stream().cuda_stream)


def int32(values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


class Model:
    """One layer: pages, window, sinks, and the argument structures, which stay as they are."""

    def __init__(self, library, context, dtype):
        self.library, self.context, self.dtype = library, context, dtype
        pages = BATCH * MAX_PAGES
        self.table = torch.randperm(pages, device="cuda").to(torch.int32).view(BATCH, MAX_PAGES)
        self.lens, self.window_lens = int32(PAGED), int32(WINDOW)
        self.sequences = Sequences(batch=BATCH, max_len=MAX_LEN, table=self.table, lens=self.lens)
        self.pools = [self.pool(pages, keep) for keep in (KEEP_K, KEEP_V)]
        # As Hugging Face caches keep them, heads before tokens, so [batch, tokens, heads, dim] is a view.
        self.window = [self.random(BATCH, KV_HEADS, MAX_WINDOW, DIM).transpose(1, 2) for _ in range(2)]
        self.sinks = [self.random(BATCH, KV_HEADS, SINKS, DIM).transpose(1, 2) for _ in range(2)]
        self.q = self.random(1, BATCH, Q_HEADS, DIM)
        self.out = torch.full_like(self.q, float("nan"))
        self.lse = torch.full((1, BATCH, Q_HEADS, 1), float("nan"), device="cuda")
        compressed = Compressed(k=self.pools[0], v=self.pools[1], sequences=self.sequences)
        self.args = AttendArgs(
            q=tensor(self.q),
            out=tensor(self.out),
            lse=tensor(self.lse),
            batch=BATCH,
            sinks=self.dense(self.sinks, int32([SINKS] * BATCH)),
            compressed=compressed,
            window=self.dense(self.window, self.window_lens),
        )
        # The size depends on shapes and upper bounds only, never on lengths.
        self.workspace = torch.empty(library.workspace_bytes(context, self.args), dtype=torch.uint8, device="cuda")

    def random(self, *shape):
        return torch.randn(shape, device="cuda").to(self.dtype)

    def pool(self, pages, keep):
        name = str(self.dtype).removeprefix("torch.")
        page = Format(value_type=VALUE_TYPES[name], head_dim=DIM, page_tokens=PAGE_TOKENS, keep=keep)
        memory = torch.full((pages * KV_HEADS * self.library.page_bytes(page),), 255, dtype=torch.uint8, device="cuda")
        return Pool(data=memory, format=page, num_pages=pages, kv_heads=KV_HEADS)

    @staticmethod
    def dense(tensors, lens):
        return Dense(k=tensor(tensors[0]), v=tensor(tensors[1]), lens=lens)

    def slots(self, sequence, positions):
        """Where tokens at these positions of the compressed part are stored."""
        return self.table[sequence, positions // PAGE_TOKENS].long() * PAGE_TOKENS + positions % PAGE_TOKENS

    def append(self, k, v, slots):
        """Prunes and stores tokens [tokens, heads, dim] of any strides."""
        sides = [AppendSide(x=tensor(x[None]), pool=pool) for x, pool in zip((k, v), self.pools)]
        self.library.append(self.context, AppendArgs(k=sides[0], v=sides[1], slots=slots), stream())

    def attend(self):
        workspace = pointer(address(self.workspace)), size(self.workspace.numel())
        self.library.attend(self.context, self.args, *workspace, stream())

    def pruned(self):
        """Keys and values of all pages, dense: [batch, MAX_LEN, heads, dim] each."""
        dense = [torch.zeros(BATCH, MAX_LEN, KV_HEADS, DIM, dtype=self.dtype, device="cuda") for _ in range(2)]
        for pool, out in zip(self.pools, dense):
            args = DecompressArgs(pool=pool, sequences=self.sequences, out=tensor(out))
            self.library.decompress(self.context, args, stream())
        return dense

    def compare(self):
        """Largest errors of mustafar's output, of torch's dense attention in the same type, and of the log-sum-exp, all
        against torch in float64 on the pruned tensors."""
        worst = [0.0, 0.0, 0.0]
        pruned = self.pruned()
        for b in range(BATCH):
            lens = int(self.lens[b]), int(self.window_lens[b])
            k, v = (
                torch.cat([sinks[b], pages[b, : lens[0]], window[b, : lens[1]]]).transpose(0, 1)[None]
                for sinks, pages, window in zip(self.sinks, pruned, self.window)
            )
            q = self.q[0, b][None, :, None]
            sdpa = torch.nn.functional.scaled_dot_product_attention
            expected = sdpa(q.double(), k.double(), v.double(), enable_gqa=True)[0, :, 0]
            of_torch = sdpa(q, k, v, enable_gqa=True)[0, :, 0]
            all_k = k[0].double().repeat_interleave(Q_HEADS // KV_HEADS, dim=0)
            scores = torch.einsum("hd,htd->ht", q[0, :, 0].double(), all_k) / DIM**0.5
            lse = torch.logsumexp(scores, dim=1)
            differences = (self.out[0, b] - expected, of_torch - expected, self.lse[0, b, :, 0] - lse)
            # NaN must not get lost in a maximum of Python floats.
            worst = [max(w, d.abs().nan_to_num(float("inf")).max().item()) for w, d in zip(worst, differences)]
        return worst

    def check(self, what):
        ours, of_torch, lse = self.compare()
        print(f"{what}: largest error {ours:.2g}, of torch's dense attention {of_torch:.2g}, of log-sum-exp {lse:.2g}")
        if not (ours <= 2 * of_torch and lse < 1e-4):
            sys.exit("the answer is wrong")


def check_pruned(x, dense, keep):
    """What is stored of each row is its `keep` largest magnitudes, bit for bit."""
    kept = dense != 0
    largest_dropped = x.abs().masked_fill(kept, 0).amax(-1)
    smallest_kept = x.abs().masked_fill(~kept, float("inf")).amin(-1)
    right = (dense == x * kept).all() and (kept.sum(-1) == keep).all() and (smallest_kept >= largest_dropped).all()
    if not right:
        sys.exit("the pages hold something else than the largest values")


def run(library, context, dtype):
    name = str(dtype).removeprefix("torch.")
    model = Model(library, context, dtype)
    prompts = [[model.random(KV_HEADS, n, DIM).transpose(0, 1) for _ in range(2)] for n in PAGED]
    for b, prompt in enumerate(prompts):
        model.append(*prompt, model.slots(b, torch.arange(PAGED[b], device="cuda")))
    for i, (dense, keep) in enumerate(zip(model.pruned(), (KEEP_K, KEEP_V))):
        for b, prompt in enumerate(prompts):
            check_pruned(prompt[i], dense[b, : PAGED[b]], keep)
    model.attend()
    model.check(name)

    # A decode step as an engine captures it: one new token of each sequence goes to the pages, then attention. The grid
    # depends on upper bounds only; lengths, slots and tokens are read on the device at every replay.
    new = [model.random(BATCH, KV_HEADS, DIM) for _ in range(2)]
    every = torch.arange(BATCH, device="cuda")
    slots = model.slots(every, model.lens.long())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model.append(*new, slots)
        model.attend()
    for window_lens in ([37, 200, 1], [256, 0, 64]):
        for x in (*new, model.q):
            x.copy_(torch.randn_like(x))
        slots.copy_(model.slots(every, model.lens.long()))
        model.lens += 1
        model.window_lens.copy_(int32(window_lens))
        model.out.fill_(float("nan"))
        graph.replay()
        model.check(f"{name}, graph at lengths {model.lens.tolist()} + {window_lens}")


def main():
    if not torch.cuda.is_available():
        skip("torch finds no GPU")
    library = Library()
    try:
        context = library.context(ContextConfig(backend=CUDA, device=torch.cuda.current_device()))
    except MustafarError as error:
        if error.status == UNAVAILABLE:
            skip(error)
        raise
    torch.manual_seed(1)
    for dtype in (torch.float16, torch.bfloat16):
        run(library, context, dtype)
    torch.cuda.synchronize()
    errors = DeviceErrors()
    library.context_take_device_errors(context, errors)
    if errors.append or errors.read:
        sys.exit(f"left undone: {errors.append} tokens of append, {errors.read} rows of decompress")
    library.context_destroy(context)


if __name__ == "__main__":
    main()
