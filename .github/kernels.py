"""
Time the kernels that decide how fast GPT-2 124M trains on a GPU: milliseconds of a forward and a
backward pass in bfloat16, medians of 10.

    python .github/kernels.py              # on CUDA: 16 x 1,024 tokens
    python .github/kernels.py cpu          # a dry run in small: numbers without meaning

`window` is the block form of model.py; `cudnn`, `varlen` and `flex` are what torch offers beside it
and run on CUDA only.
"""
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import attend_in_window, linear_cross_entropy  # noqa: E402

DEVICE = sys.argv[1] if len(sys.argv) > 1 else "cuda"
ON_GPU = DEVICE == "cuda"
TOKENS = 16384 if ON_GPU else 512                # in a batch
LENGTHS = (1024, 4096, 16384) if ON_GPU else (128, 512)
W = 256 if ON_GPU else 32


def main():
    x, weight = make(TOKENS, 768), make(50257, 768)
    padded = make(50304, 768)
    targets = torch.randint(50257, (TOKENS,), device=DEVICE)
    show("loss, model.py", partial(linear_cross_entropy, targets=targets), x, weight)
    show("loss, model.py compiled", partial(torch.compile(linear_cross_entropy, dynamic=False),
                                            targets=targets), x, weight)
    show("loss, F.cross_entropy, vocabulary of 50304", partial(plain_loss, targets), x, padded)
    for T in LENGTHS:
        q, k, v = (make(TOKENS // T, 12, T, 64) for _ in range(3))
        show(f"T={T}: flash", partial(sdpa, SDPBackend.FLASH_ATTENTION), q, k, v)
        show(f"T={T}: window {W}", partial(attend_in_window, F.scaled_dot_product_attention,
                                           window=W), q, k, v)
        if ON_GPU:
            show(f"T={T}: cudnn", partial(sdpa, SDPBackend.CUDNN_ATTENTION), q, k, v)
            mask = create_block_mask(in_window, None, None, T, T, device=DEVICE)
            flex = torch.compile(flex_attention, dynamic=False)
            show(f"T={T}: flex, window {W}", partial(flex, block_mask=mask), q, k, v)
            starts = torch.arange(0, TOKENS + 1, T, dtype=torch.int32, device=DEVICE)
            flat = (make(TOKENS, 12, 64) for _ in range(3))
            show(f"T={T}: varlen, window {W}", partial(varlen, starts, T), *flat)


def make(*shape):
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)


def plain_loss(targets, x, weight):
    return F.cross_entropy((x @ weight.t()).float(), targets)


def sdpa(backend, q, k, v):
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def in_window(b, h, q, k):
    return (k <= q) & (k > q - W)


def varlen(starts, T, q, k, v):
    from torch.nn.attention.varlen import varlen_attn
    return varlen_attn(q, k, v, starts, starts, T, T, window_size=(W - 1, 0))


def show(name, function, *inputs):
    """Print the time of function(*inputs), or why it does not run."""
    times = []
    try:
        for _ in range(13):
            began = time.perf_counter()
            function(*inputs).float().sum().backward()
            if ON_GPU:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        print(f"{name:48}{1e3 * statistics.median(times[3:]):9.2f} ms", flush=True)
    except Exception as error:                                   # go on with the next
        print(f"{name:48}{type(error).__name__}: {str(error)[:100]}", flush=True)


if __name__ == "__main__":
    main()
