"""
GPT-2, from the attention formula up, in one file that needs only torch (and requests, to fetch OpenAI's weights).

    python model.py                        # the example use: build it, run it, see what each flag costs

    model = GPT2(GPT2Config(n_layer=4, n_head=4, n_embd=128))
    logits, _ = model(idx)                 # idx (B, T) token ids -> logits (B, T, vocab_size)
    _, loss = model(idx, targets)          # targets (B, T), -1 = not counted -> mean cross-entropy in nats
    model = GPT2.from_pretrained("gpt2")   # OpenAI's weights, or a folder written by save_pretrained
    model.generate(idx, 100)               # (B, T + 100)

Three changes to the attention, each one boolean flag, free to combine: `rope` (rotary positions), `gqa` (grouped-query
attention) and `sliding_window`. With none of them this is GPT-2 to the last detail.

Letters in the shape comments: B batch, T tokens, C = n_embd, H = n_head, K = key/value heads, D = C / H head size,
S = keys attended to, W = window_size, V = vocab_size.
"""
import hashlib
import json
import math
import mmap
import os
import re
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from urllib.parse import urljoin

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------------------------------------------------------
# Configuration


def flag(default, text, **more):
    """A field of a configuration, with what --help says of it."""
    return field(default=default, metadata={"help": text, **more})


@dataclass
class GPT2Config:
    """The shape of the model. The defaults are GPT-2 124M. ValueError where the fields contradict each other."""
    block_size: int = flag(1024, "the longest text the model is trained on, tokens")
    vocab_size: int = flag(50257, "tokens the model knows [those of the data]")
    n_layer: int = flag(12, "transformer blocks")
    n_head: int = flag(12, "attention heads")
    n_embd: int = flag(768, "width of the model")
    dropout: float = flag(0.0, "after the embeddings, on attention weights and on both residual branches")
    bias: bool = flag(True, "in every Linear and LayerNorm")
    rope: bool = flag(False, "rotary positions (Su et al. 2021, arXiv 2104.09864) in place of the learned ones")
    rope_theta: float = flag(10000.0, "base of the rotation's wavelengths")
    gqa: bool = flag(False, "grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245)")
    n_kv_head: int | None = flag(None, "key/value heads [with gqa: the largest divisor of n_head up to a third of it]")
    sliding_window: bool = flag(False, "a token sees only the last window_size, itself included (Mistral, arXiv 2310.06825)")
    window_size: int | None = flag(None, "tokens [with sliding_window: a quarter of block_size]")
    flash: bool = flag(True, "torch's fused attention kernel; False runs the formula as written out")

    def __post_init__(self):
        def need(ok, message):
            if not ok:
                raise ValueError(message)
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is bool:
                need(type(value) is bool, f"{f.name}={value!r:.50} must be True or False")
            elif f.type is float:
                need(type(value) in (int, float), f"{f.name}={value!r:.50} must be a number")
            elif value is not None or f.default is not None:
                need(type(value) is int and 0 < value <= 2**24,
                     f"{f.name}={value!r:.50} must be a whole number from 1 to 16,777,216")
        for flag, name in (("rope", "rope_theta"), ("gqa", "n_kv_head"), ("sliding_window", "window_size")):
            value = getattr(self, name)
            need(getattr(self, flag) or value == getattr(GPT2Config, name),
                 f"{name}={value} has no effect without {flag}: add --{flag}")
        need(0 <= self.dropout < 1, f"dropout={self.dropout} must be at least 0 and below 1")
        need(self.n_embd % self.n_head == 0, f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: "
             f"try n_embd={max(1, round(self.n_embd / self.n_head)) * self.n_head}")
        need(not self.rope or self.head_dim % 2 == 0, f"rope turns pairs: the head size n_embd/n_head={self.head_dim} "
             f"must be even, so try n_embd={(self.head_dim + 1) * self.n_head}")
        need(1 < self.rope_theta <= 1e12, f"rope_theta={self.rope_theta} must be above 1, and 1e12 at most")
        if self.gqa:
            divisors = [d for d in range(1, self.n_head + 1) if self.n_head % d == 0]
            if self.n_kv_head is None:
                self.n_kv_head = max(d for d in divisors if d == 1 or d <= self.n_head // 3)
            need(self.n_kv_head in divisors, f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}: "
                 f"try one of {divisors}")
        if self.sliding_window:
            if self.window_size is None:
                self.window_size = max(1, self.block_size // 4)
            need(self.window_size <= self.block_size, f"window_size={self.window_size} is longer than block_size="
                 f"{self.block_size}: choose at most {self.block_size}, or leave out sliding_window")

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def kv_heads(self):
        return self.n_kv_head if self.gqa else self.n_head

    @property
    def endless(self):
        """Whether text can go on for ever: nothing in the model depends on how far a token is from the start."""
        return self.rope and self.sliding_window

    def cache_bytes(self, tokens=1, bytes_per_number=4):
        """Size of the key/value cache of one sequence of `tokens` tokens, in bytes."""
        kept = min(tokens, self.window_size) if self.sliding_window else tokens
        return 2 * self.n_layer * self.kv_heads * self.head_dim * kept * bytes_per_number

    def flops_per_token(self, tokens=None):
        """Floating point operations of a forward pass per token, averaged over a text of `tokens` (default block_size):
        2 for each weight of a matrix, 4·C per layer for each key that is seen. Training costs 3 times that.
        (As Kaplan et al. 2020, arXiv 2001.08361, table 1, but counting only keys the mask lets through.)"""
        T, C = tokens or self.block_size, self.n_embd
        W = min(self.window_size, T) if self.sliding_window else T
        keys = (W * (W + 1) / 2 + (T - W) * W) / T                         # mean over i of min(i + 1, W)
        block = C * (C + 2 * self.kv_heads * self.head_dim) + C * C + 8 * C * C
        return 2 * (self.n_layer * block + self.vocab_size * C) + 4 * self.n_layer * C * keys

    def to_json(self):
        """As Hugging Face's config.json. What GPT-2 cannot express goes under another model_type, so that a reader
        that knows only GPT-2 refuses the folder instead of loading it wrongly."""
        plain = self.bias and not (self.rope or self.gqa or self.sliding_window)
        end = 50256 if self.vocab_size > 50256 else None                   # GPT-2's end-of-text token, if there is one
        return {
            "model_type": "gpt2" if plain else "gpt2-variant",
            "architectures": ["GPT2LMHeadModel" if plain else "GPT2"],
            "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
            "n_positions": self.block_size, "n_ctx": self.block_size,
            "embd_pdrop": self.dropout, "attn_pdrop": self.dropout, "resid_pdrop": self.dropout,
            "initializer_range": 0.02, "dtype": "float32",
            "bos_token_id": end, "eos_token_id": end,
            **{name: value for name, value in asdict(self).items() if name != "block_size"},
        }

    @classmethod
    def from_json(cls, saved):
        """The inverse of to_json, for any GPT-2 config.json. ValueError for a model that is not GPT-2."""
        if not isinstance(saved, dict):
            raise ValueError("config.json does not hold a JSON object")
        model_type = saved.get("model_type", "gpt2")
        if model_type not in ("gpt2", "gpt2-variant"):
            raise ValueError(f"config.json says model_type={model_type!r:.50}: only GPT-2 can be loaded")
        known = {f.name for f in fields(cls)} - {"block_size"}
        config = cls(block_size=saved.get("n_positions", 1024), **{k: saved[k] for k in known if k in saved})
        for name, allowed in dict(
                activation_function=("gelu_new", "gelu_pytorch_tanh"), layer_norm_epsilon=(1e-5,),
                tie_word_embeddings=(True,), n_inner=(4 * config.n_embd, None), scale_attn_weights=(True,),
                scale_attn_by_inverse_layer_idx=(False,), add_cross_attention=(False,)).items():
            if name in saved and saved[name] not in allowed:
                raise ValueError(f"config.json says {name}={saved[name]!r:.50}: this model computes only {allowed[0]}")
        return config


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def scaled_dot_product_attention(q, k, v, mask=None, dropout_p=0.0):
    """softmax(q kᵀ / √D + mask) v  (Vaswani et al. 2017, arXiv 1706.03762, equation 1).

    q (..., T, D), k and v (..., S, D) -> (..., T, D). `mask` broadcasts to (..., T, S): boolean, True = may be seen,
    or numbers to add to the scores."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))                # (..., T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return F.dropout(scores.softmax(dim=-1), dropout_p) @ v


def visible(q_pos, k_pos, window=None):
    """The one rule of who sees whom, from positions q_pos (T,) and k_pos (S,): (T, S), True where the key is not in the
    future and, with a window, among the last `window` positions, the token itself included."""
    q_pos = q_pos[:, None]
    return k_pos <= q_pos if window is None else (k_pos <= q_pos) & (k_pos > q_pos - window)


def rotary_tables(positions, head_dim, theta):
    """cos and sin, each (T, D/2) in float32, of the angles position · theta^(-2i/D) (arXiv 2104.09864, 3.2.2). The angles
    are float64, where there is such a thing: in float32 they are off by 0.06 at position 1,000,000."""
    exact = torch.float32 if positions.device.type == "mps" else torch.float64
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=exact) / head_dim)
    angle = positions.to(exact)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


def rotate(x, cos, sin):
    """Turns the pairs (x_i, x_{i + D/2}) of x (..., T, D): the half-split pairing of Hugging Face's Llama and Mistral,
    not the interleaved one of the paper; checkpoints of the two are not interchangeable."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class KVCache:
    """The keys and values one layer has seen, (..., K, size, D), allocated once. With a window it is a ring: position p
    lies at p % size, so `size` = window_size holds all that can still be seen, however long the text."""

    def __init__(self, size, ring=False):
        self.size, self.ring = size, ring
        self.length = 0                                                    # positions seen so far
        self.k = self.v = None

    def extend(self, k, v):
        """Adds k and v (..., K, T, D). Returns the keys and values to attend to, (..., K, S, D): the oldest first, the new
        ones last. Only for T = 1 are they in the ring's order, which makes no difference where all of them are seen."""
        T, start = k.size(-2), self.length
        if not self.ring and start + T > self.size:
            raise ValueError(f"{start + T} tokens do not fit a key/value cache of {self.size}")
        if self.k is None:
            self.k, self.v = (x.new_empty(*x.shape[:-2], self.size, x.size(-1)) for x in (k, v))
        self.length += T
        if T <= 1 or self.length <= self.size and not k.requires_grad:     # what autograd keeps must not be written to later
            # The slot that a ring writes over held the position that has just left the window. No copy.
            at, n = start % self.size, min(self.length, self.size)
            self.k[..., at:at + T, :], self.v[..., at:at + T, :] = k, v
            return self.k[..., :n, :], self.v[..., :n, :]
        # Read the old keys and only then write: writing first would drop keys that the first of the new tokens still see.
        slots = torch.arange(max(0, start - self.size), self.length, device=k.device) % self.size
        old, new = slots[:-T], slots[-min(T, self.size):]
        all_k, all_v = (torch.cat((x[..., old, :], y), dim=-2) if start else y for x, y in ((self.k, k), (self.v, v)))
        self.k[..., new, :], self.v[..., new, :] = k[..., -len(new):, :], v[..., -len(new):, :]
        return all_k, all_v


class AttentionHead(nn.Module):
    """All that a head does with its q, k and v: rotate, read and extend the cache, mask, attend. It owns no weights and
    broadcasts over leading dimensions: one head (B, T, D) and all heads at once (B, H, T, D) are the same code."""

    def __init__(self, config):
        super().__init__()
        self.window = config.window_size if config.sliding_window else None
        self.flash = config.flash
        self.dropout = config.dropout

    def forward(self, q, k, v, rotary=None, cache=None):
        """q (B, T, D) or (B, H, T, D), k and v (B, T, D) or (B, K, T, D) -> the shape of q.
        `rotary`: the tables of these T positions. `cache`: the KVCache of what came before them, extended here."""
        if q.device.type == "cpu" and q.dtype.itemsize == 2:               # torch's kernel is slow in half precision on a CPU:
            return self(q.float(), k.float(), v.float(), rotary, cache).to(q.dtype)  # there even the cache is float32
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.extend(k, v)
        if q.size(-2) == 1:
            return self.attend(q, k, v)                                    # a cache holds just what this token may see
        if self.window is not None and k.size(-2) > self.window:
            return self.attend_window(q, k, v)
        return self.attend(q, k, v, causal=True)

    def attend_window(self, q, k, v):
        """Sliding window attention of the last T of S > W positions, S - T <= W, in time and memory that grow with T · W.
        The queries are cut into blocks of W from the end. A block sees only its own keys and the W before them, through
        one mask of (W, 2W) for all. These runs of 2W keys overlap in place: nothing is copied for a single text. At the
        beginning remain a block with fewer keys before it, and fewer than W queries that see all that was before them."""
        T, S, W = q.size(-2), k.size(-2), self.window
        n, here = min(T, S - W) // W, torch.arange(2 * W, device=q.device)  # whole blocks
        mask, t, s = visible(here[W:], here, W), T - n * W, S - n * W      # the first t queries, the first s keys: s < 2W
        r, y = max(0, t - W), []
        if r:
            y.append(self.attend(q[..., :r, :], *(x[..., :s - t + r, :] for x in (k, v)), causal=True))
        if t:
            y.append(self.attend(q[..., r:t, :], *(x[..., :s, :] for x in (k, v)), mask=mask[r - t:, -s:]))
        if n:
            blocks = [q[..., t:, :].unfold(-2, W, W), *(x[..., s - W:, :].unfold(-2, 2 * W, W) for x in (k, v))]
            blocks = [x.transpose(-1, -2).transpose(1, -3) for x in blocks]  # (B, n, ..., W or 2W, D)
            rest = self.attend(*(x.flatten(0, 1) for x in blocks), mask=mask)
            y.append(rest.view(blocks[0].shape).transpose(1, -3).flatten(-3, -2))
        return torch.cat(y, dim=-2)

    def attend(self, q, k, v, mask=None, causal=False):
        """q (B, H, T, D), k and v (B, K, S, D), or all without heads: torch's fused kernel or, with flash=False, the
        formula. `causal`: the queries are the last T of the S positions, and none sees its future."""
        p, T, S = self.dropout if self.training else 0.0, q.size(-2), k.size(-2)
        if causal and (T < S or not self.flash):                           # the fused kernel knows only T = S
            here = torch.arange(S, device=q.device)
            mask, causal = visible(here[S - T:], here), False
        groups = q.size(-3) // k.size(-3) if q.dim() > 3 else 1
        if groups > 1 and not causal:
            # The queries of a group share their keys as if they were positions of one head: no key is copied.
            q = q.unflatten(-3, (-1, groups)).flatten(-3, -2)              # (..., K, H/K · T, D)
            mask = mask.repeat(groups, 1) if mask is not None else None
            return self.attend(q, k, v, mask).unflatten(-2, (groups, T)).flatten(-4, -3)
        if self.flash:
            return F.scaled_dot_product_attention(q, k, v, mask, p, is_causal=causal, enable_gqa=groups > 1)
        return scaled_dot_product_attention(q, k, v, mask, p)


def linear(x, weight, bias=None):
    """x weightᵀ + bias. For a few vectors the reading of the weights is all the time it takes: on a CPU oneDNN reads twice
    as fast as MKL, which torch's own Linear calls for float32."""
    few = x.numel() <= 32 * x.size(-1) and x.device.type == "cpu" and x.dtype == torch.float32
    if few and not (torch.is_grad_enabled() or torch.compiler.is_compiling()) and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


class MultiHeadAttention(nn.Module):
    """H query heads; with gqa they share K key/value heads, each serving a run of H/K neighbouring query heads."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.sizes = [C, config.kv_heads * config.head_dim, config.kv_heads * config.head_dim]
        self.head_dim = config.head_dim
        self.c_attn = Linear(C, sum(self.sizes), bias=config.bias)
        self.c_proj = Linear(C, C, bias=config.bias)
        self.head = AttentionHead(config)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, rotary=None, cache=None):
        q, k, v = self.c_attn(x).split(self.sizes, dim=-1)                 # (B, T, C), (B, T, K·D), (B, T, K·D)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (q, k, v))  # (B, H or K, T, D)
        y = self.head(q, k, v, rotary, cache)                              # (B, H, T, D)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))  # (B, T, C)


def gelu(x):
    """GPT-2's GELU, the tanh approximation (Hendrycks & Gimpel 2016, arXiv 1606.08415, section 2). The exact one puts
    OpenAI's logits off by 3e-3."""
    return F.gelu(x, approximate="tanh")


class GELULinear(torch.autograd.Function):
    """gelu(x) weightᵀ + bias for training on a CPU. x/2 · (1 + tanh u), u = √(2/π) (x + 0.044715 x³), is x · σ(2u), which
    is faster than torch's kernel, whose tanh is slow. Of the activations x alone is kept for the backward pass."""
    a, b = 2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715   # 2u = x (a + b x²)

    @staticmethod
    def gate(x):
        return torch.mul(x, x).mul_(GELULinear.b).add_(GELULinear.a).mul_(x).sigmoid_()

    @staticmethod
    def forward(ctx, x, weight, bias):
        """x (..., K), weight (N, K), bias (N,) or None -> (..., N)."""
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return F.linear(GELULinear.gate(x).mul_(x), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        s, rows = GELULinear.gate(x), grad.flatten(0, -2)
        grad_weight = rows.t() @ torch.mul(s, x).flatten(0, -2)
        d = torch.mul(x, x).mul_(3 * GELULinear.b).add_(GELULinear.a).mul_(x)  # x d2u/dx; σ + x σ' = σ (1 + (1 - σ) d)
        grad_x = d.addcmul_(d, s, value=-1).add_(1).mul_(s).mul_(grad @ weight.to(grad.dtype))
        return grad_x, grad_weight, rows.sum(0) if ctx.biased else None


class PointwiseFeedForward(nn.Module):
    """The same two-layer network at every position."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = self.c_fc(x)                                                   # (B, T, 4C)
        if x.device.type == "cpu" and x.requires_grad and not torch.compiler.is_compiling():
            return self.dropout(GELULinear.apply(x, self.c_proj.weight, self.c_proj.bias))
        return self.dropout(self.c_proj(gelu(x)))                          # (B, T, C)


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.attn = MultiHeadAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.mlp = PointwiseFeedForward(config)

    def forward(self, x, rotary=None, cache=None):
        x = x + self.attn(self.ln_1(x), rotary, cache)
        return x + self.mlp(self.ln_2(x))


# ---------------------------------------------------------------------------------------------------------------------
# The model


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of softmax(x weightᵀ) with the output projection in it. The logits of a vocabulary of 50257
    are the largest tensor of the whole step by far. Here they exist for a few rows at a time: the gradients of these
    rows are computed while their logits are at hand, so nothing is kept and nothing computed twice."""

    @staticmethod
    def forward(ctx, x, weight, targets, keep_gradients):
        """x (N, C), weight (V, C), targets (N,), -1 where not counted -> scalar, float32."""
        loss, count = x.new_zeros((), dtype=torch.float32), (targets >= 0).sum()
        grad_x, grad_weight = (torch.empty_like(x), torch.zeros_like(weight)) if keep_gradients else (None, None)
        rows = max(1, (1 << (24 if x.device.type == "cpu" else 27)) // weight.size(0))
        for at in range(0, x.size(0), rows):
            part, target = x[at:at + rows], targets[None, at:at + rows]
            logits = (weight @ part.t()).float()                           # (V, rows): faster on a CPU this way round
            highest = logits.amax(dim=0, keepdim=True)
            known, target = target >= 0, target.clamp(min=0)
            chosen = logits.gather(0, target) - highest
            total = logits.sub_(highest).exp_().sum(dim=0, keepdim=True)
            loss += (total.log() - chosen).masked_fill(~known, 0).sum()
            if keep_gradients:                                             # d loss / d logits = softmax - one hot
                logits.mul_(known / total).scatter_add_(0, target, -known.float())
                logits = logits.to(part.dtype)
                grad_x[at:at + rows] = logits.t() @ weight
                grad_weight.addmm_(logits, part)
        if keep_gradients:
            ctx.save_for_backward(grad_x, grad_weight, count)
        return loss / count

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_weight, count = ctx.saved_tensors
        scale = grad / count
        return grad_x.mul_(scale), grad_weight.mul_(scale), None, None     # in place: the second is as large as wte


class Int8(nn.Module):
    """A matrix (N, K) in int8, with a scale for each row, for decoding on a CPU: a quarter of the bytes to read. Token ids
    pick rows of it, as in an Embedding; vectors are multiplied with all rows, as in a Linear."""

    def __init__(self, weight, bias=None):
        super().__init__()
        scale = weight.detach().float().abs().amax(dim=1).clamp(min=1e-12) / 127
        self.register_buffer("weight", (weight.detach().float() / scale[:, None]).round().to(torch.int8).contiguous())
        self.register_buffer("scale", scale.bfloat16())
        self.bias = bias

    def forward(self, x):
        if not x.is_floating_point():
            return self.weight[x] * self.scale[x][..., None]
        y = torch._weight_int8pack_mm(x.flatten(0, -2).contiguous(), self.weight, self.scale).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class GPT2(nn.Module):
    """Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". Parameters have Hugging Face's names.
    The output projection is the token embedding itself (tied), so there is no lm_head to keep in step with it."""

    def __init__(self, config, seed=None):
        """`seed`: the weights are a function of it; without one they come from torch's global generator."""
        super().__init__()
        self.config = config
        self.grad_checkpoint = False       # recompute each block in the backward pass: less memory, a third more work

        def embedding(rows):               # the plain constructor would draw numbers, on the meta device with 1 s of imports
            return nn.Embedding.from_pretrained(torch.empty(rows, config.n_embd), freeze=False)
        self.transformer = nn.ModuleDict(dict(
            wte=embedding(config.vocab_size),
            **({} if config.rope else dict(wpe=embedding(config.block_size))),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias),
        ))
        if not self.transformer.wte.weight.is_meta:
            with torch.no_grad():
                for parameter, (_, value) in zip(self.parameters(), self.initial_weights(seed), strict=True):
                    parameter.copy_(value)

    def initial_weights(self, seed=None):
        """GPT-2's initialisation, (name, tensor) one at a time, on the CPU, so that a model that is spread over devices
        starts out equal to one that is not: normal with std 0.02, and 0.02/√(2·n_layer) for the projections that add to
        the residual stream (section 2.3); biases 0; LayerNorm 1."""
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 1:
                yield name, torch.full(p.shape, float("ln_" in name and name.endswith("weight")), device="cpu")
            else:
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 0.02
                yield name, torch.empty(p.shape, device="cpu").normal_(0, std, generator=generator)

    def num_parameters(self):
        return sum(p.numel() for p in self.parameters())

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) token ids -> (logits (B, T, V), None), or with `targets` (B, T), -1 where not counted,
        (None, mean cross-entropy in nats). `cache`: see new_cache; idx is then what follows what the cache has seen.
        ValueError for a text longer than block_size, unless `rope` is on."""
        x = self.hidden(idx, cache)
        if targets is None:
            return self.project(x), None
        weight, keep = self.transformer.wte.weight, torch.is_grad_enabled()
        if isinstance(self.transformer.wte, Int8):
            return None, F.cross_entropy(self.project(x).float().flatten(0, 1), targets.flatten(), ignore_index=-1)
        return None, LinearCrossEntropy.apply(x.flatten(0, 1), weight, targets.flatten(), keep)

    def hidden(self, idx, cache=None):
        """The final hidden states (B, T, C) of idx (B, T)."""
        config, T, start = self.config, idx.size(1), cache[0].length if cache else 0
        positions = torch.arange(start, start + T, device=idx.device)
        x, rotary = self.transformer.wte(idx), None
        if config.rope:
            rotary = rotary_tables(positions, config.head_dim, config.rope_theta)
        elif start + T > config.block_size:
            raise ValueError(f"a text of {start + T} tokens is longer than block_size={config.block_size}, and learned "
                             f"positions end there: shorten it, or train with rope")
        else:
            x = x + self.transformer.wpe(positions)
        x = self.transformer.drop(x)
        for i, block in enumerate(self.transformer.h):
            if self.grad_checkpoint and self.training:
                x = checkpoint(block, x, rotary, use_reentrant=False)
            else:
                x = block(x, rotary, cache[i] if cache else None)
        return self.transformer.ln_f(x)

    def project(self, x):
        """Hidden states (..., C) -> logits (..., V)."""
        wte = self.transformer.wte
        return wte(x) if isinstance(wte, Int8) else linear(x, wte.weight)

    def new_cache(self, size=None):
        """An empty key/value cache for `size` tokens (default block_size); a window needs only window_size of them."""
        c = self.config
        if c.sliding_window:
            return [KVCache(c.window_size, ring=True) for _ in range(c.n_layer)]
        return [KVCache(size or c.block_size) for _ in range(c.n_layer)]

    @torch.no_grad()
    def for_decoding(self):
        """Lays the matrices out row by row, as decoding reads them: in a file of Hugging Face's most lie the other way."""
        for p in self.parameters():
            p.data = p.data.contiguous()
        return self

    def to_int8(self):
        """Rounds the matrices to int8 in place, for decoding on a CPU; the rest becomes bfloat16. ValueError for a width that
        is not a multiple of 16: torch's kernel reads beyond such rows."""
        if self.config.n_embd % 16:
            raise ValueError(f"n_embd={self.config.n_embd} is not divisible by 16, as int8 needs it: use bfloat16")
        for module in list(self.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear) or name == "wte":
                    setattr(module, name, Int8(child.weight, getattr(child, "bias", None)))
        return self.to(torch.bfloat16).requires_grad_(False)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, use_cache=True, generator=None,
                 stop_token=None):
        """idx (B, T) -> (B, T + max_new_tokens). Arguments as in `stream`. A text that reached its stop_token is filled
        up with it."""
        new = list(self.stream(idx, max_new_tokens, temperature, top_k, top_p, use_cache, generator, stop_token))
        new += [torch.full_like(idx[:, 0], stop_token)] * (max_new_tokens - len(new)) if stop_token is not None else []
        return torch.cat((idx, *(column[:, None] for column in new)), dim=1)

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, use_cache=True, generator=None,
               stop_token=None):
        """Yields the next token of each text, (B,), max_new_tokens times, or until all have met `stop_token`.

        temperature: 0 takes the likeliest token. top_k: only the k likeliest. top_p: only the likeliest that together
        reach this probability (nucleus sampling, arXiv 1904.09751). generator: a torch.Generator on the model's device.
        use_cache: keep keys and values; the tokens are the same without, only later.

        With rope and sliding_window a text goes on for ever. Otherwise, where it would outgrow block_size, its last
        block_size/2 tokens are read anew, as if the text began there."""
        for name, value, ok, limit in (
                ("idx.shape", tuple(idx.shape), idx.dim() == 2 and idx.size(1) > 0, "(B, T), with a token at least"),
                ("max_new_tokens", max_new_tokens, max_new_tokens >= 0, "0 or more"),
                ("temperature", temperature, 0 <= temperature < math.inf, "0 or more"),
                ("top_k", top_k, top_k is None or top_k >= 1, "1 or more"),
                ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0, at most 1")):
            if not ok:
                raise ValueError(f"{name}={value} must be {limit}")
        config, text, cache = self.config, idx, None
        stopped = torch.zeros_like(idx[:, 0], dtype=torch.bool)
        was_training = self.training
        self.eval()
        try:
            for left in range(max_new_tokens, 0, -1):
                if not config.endless and text.size(1) > config.block_size:
                    text, cache = text[:, -max(1, config.block_size // 2):], None
                if not use_cache:
                    x = self.hidden(text)
                elif cache is None:
                    cache = self.new_cache(min(config.block_size, text.size(1) + left))
                    x = self.hidden(text, cache)
                else:
                    x = self.hidden(text[:, -1:], cache)
                token = pick(self.project(x[:, -1]), temperature, top_k, top_p, generator)
                if stop_token is not None:
                    token = token.masked_fill(stopped, stop_token)
                    stopped |= token == stop_token
                # only what may be read again is kept
                text = token[:, None] if config.endless and use_cache else torch.cat((text, token[:, None]), dim=1)
                yield token
                if stop_token is not None and stopped.all():
                    return
        finally:
            self.train(was_training)

    def save_pretrained(self, folder):
        """Writes config.json and model.safetensors, in Hugging Face's layout, for from_pretrained and transformers."""
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "config.json"), "w") as f:
            json.dump(self.config.to_json(), f, indent=2)
        parameters = dict(self.named_parameters())
        write_safetensors(os.path.join(folder, "model.safetensors"), parameters, parameters.values())

    @classmethod
    def from_pretrained(cls, name_or_folder, **overrides):
        """"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl" or a folder -> the model, in evaluation mode. `overrides` are
        fields of GPT2Config (see read_pretrained). The weights are mapped from the file, not read: they take memory as
        they are used. What the overrides did to them stands in `.changes`, a line each. ValueError for a file that is
        damaged or not GPT-2; OSError where there is none."""
        config, weights, changes = read_pretrained(name_or_folder, **overrides)
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(weights, assign=True)
        model.changes = changes
        return model.requires_grad_().eval()


def pick(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """One token (B,) for each row of logits (B, V)."""
    if temperature < 1e-6:                                                 # next to 0 is 0, and overflows nothing
        return logits.argmax(dim=-1)
    logits, ids = logits.float() / temperature, None
    if top_k is not None or top_p is not None:                             # by rank, so that ties do not widen it
        logits, ids = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))
    probabilities = logits.softmax(dim=-1)
    if top_p is not None:
        before = probabilities.cumsum(dim=-1) - probabilities              # what the likelier ones hold already
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    choice = torch.multinomial(probabilities, 1, generator=generator)
    return (choice if ids is None else ids.gather(-1, choice))[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: Hugging Face's folder with config.json and model.safetensors

SIZES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # kept as (in, out)
IGNORED = (".attn.bias", ".attn.masked_bias", "lm_head.weight")            # two constant masks, and the tied embedding


def complete(folder):
    """Where the checkpoint of a folder lies: train.py's first one may be whole in .saved, but not yet moved into place."""
    saved = os.path.join(folder, ".saved")
    return saved if os.path.isdir(saved) and not os.path.exists(os.path.join(folder, "model.safetensors")) else folder


def read_pretrained(name_or_folder, **overrides):
    """-> (config, {parameter: tensor in float32}, [what was changed, in words]).

    Overrides may change what the weights leave open: dropout, flash, a shorter block_size, a window; and convert:
    gqa mean-pools the key and value heads of each group (arXiv 2305.13245, section 2.1), rope leaves out wpe."""
    files = ("config.json", "model.safetensors")
    name_or_folder = complete(name_or_folder)
    if os.path.isdir(name_or_folder):
        paths = [os.path.join(name_or_folder, name) for name in files]
        pickles = [name for name in os.listdir(name_or_folder) if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        if not os.path.exists(paths[1]):
            raise FileNotFoundError(f"{paths[1]} is not there" + (f"; {pickles[0]} is a pickle, which could run code: "
                                    "convert it with transformers' save_pretrained" if pickles else ""))
    elif name_or_folder in SIZES:
        paths = [hub_file("openai-community/" + name_or_folder, name) for name in files]
    else:
        raise FileNotFoundError(f"{name_or_folder!r} is no folder; the names known are {', '.join(SIZES)}")
    with open(paths[0], "rb") as f:
        try:
            saved = GPT2Config.from_json(json.load(f))
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{paths[0]}: {e}") from None
    return convert(saved, named_weights(saved, read_safetensors(paths[1])[0], paths[1]), overrides)


def named_weights(config, tensors, path):
    """Picks by name, checks against the shapes that `config` asks for, and turns into (out, in). What is built here is
    bounded by what the file holds, whatever config.json claims."""
    tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    if config.n_layer > len(tensors):
        raise ValueError(f"{path}: config.json asks for {config.n_layer} layers, the file has {len(tensors)} tensors")
    with torch.device("meta"):
        wanted = {name.removeprefix("transformer."): p.shape for name, p in GPT2(config).named_parameters()}
    missing = [name for name in wanted if name not in tensors]
    extra = [name for name in tensors if name not in wanted and not name.endswith(IGNORED)]
    if missing or extra:
        raise ValueError(f"{path}: {'lacks ' + missing[0] if missing else f'holds an unknown {extra[0]!r:.80}'}"
                         f" ({len(missing)} missing, {len(extra)} unknown)")
    head, wte = tensors.get("lm_head.weight"), tensors["wte.weight"]
    if head is not None and (head.dtype != wte.dtype or not torch.equal(head, wte)):
        raise ValueError(f"{path}: lm_head.weight differs from wte.weight, but in GPT-2 they are one")
    weights = {}
    for name, shape in wanted.items():
        t = tensors[name].t() if name.endswith(TRANSPOSED) and tensors[name].dim() == 2 else tensors[name]
        if t.shape != shape:
            raise ValueError(f"{path}: {name} has shape {tuple(t.shape)}, config.json asks for {tuple(shape)}")
        weights["transformer." + name] = t.float()
    return weights


def convert(saved, weights, overrides):
    """Fits weights of a model `saved` to the config that `overrides` ask for; see read_pretrained."""
    overrides = {name: value for name, value in overrides.items() if value is not None}
    for name in ("n_layer", "n_head", "n_embd", "vocab_size", "bias", *(["rope_theta"] if saved.rope else [])):
        has = getattr(saved, name)
        if overrides.get(name, has) != has:
            raise ValueError(f"{name}={overrides[name]} contradicts the checkpoint, which has {name}={has}")
    for name in ("rope", "gqa"):
        if getattr(saved, name) and overrides.get(name) is False:
            raise ValueError(f"the checkpoint was made with {name}, which cannot be taken out again")
    if overrides.get("sliding_window") is False:
        overrides.setdefault("window_size", None)
    if saved.sliding_window and "block_size" in overrides and "window_size" not in overrides:
        overrides["window_size"] = min(saved.window_size, overrides["block_size"])
    config, notes, wants = replace(saved, **overrides), [], "; the model wants further training to make up for it"
    if config.block_size > saved.block_size and not config.rope:
        raise ValueError(f"block_size={config.block_size} exceeds the checkpoint's {saved.block_size} positions")
    if config.rope and not saved.rope:
        del weights["transformer.wpe.weight"]
        notes.append("rope: the learned positions (wpe) are left out" + wants)
    if config.rope and config.block_size != saved.block_size:
        notes.append(f"block_size: texts of up to {config.block_size} tokens; the weights come from texts of {saved.block_size}")
    elif config.block_size < saved.block_size:
        weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:config.block_size]
        notes.append(f"block_size: the first {config.block_size} of {saved.block_size} positions are kept")
    if config.kv_heads != saved.kv_heads:
        if saved.kv_heads % config.kv_heads:
            raise ValueError(f"n_kv_head={config.kv_heads} does not divide the checkpoint's {saved.kv_heads}")
        for name in [name for name in weights if "c_attn" in name]:
            q, k, v = weights[name].split([saved.n_embd] + 2 * [saved.kv_heads * saved.head_dim])
            k, v = (x.unflatten(0, (config.kv_heads, -1, config.head_dim)).double().mean(1).flatten(0, 1) for x in (k, v))
            weights[name] = torch.cat((q, k.float(), v.float()))           # so the mean of equal heads is exact
        notes.append(f"gqa: {saved.kv_heads} key/value heads mean-pooled to {config.kv_heads}" + wants)
    far = math.inf if config.rope else config.block_size                   # how far a token sees without a window
    before, after = (min(c.window_size or far, far) for c in (saved, config))
    if after < before:
        notes.append(f"sliding_window: the weights are used as they are, with a window of {after}" + wants)
    elif saved.sliding_window and after > before:
        notes.append(f"sliding_window: {'widened' if config.sliding_window else 'taken out'}, where the weights come from a "
                     f"window of {before}" + wants)
    return config, weights, notes


def read_safetensors(path):
    """-> ({name: tensor}, {metadata}); the tensors are mapped from the file, copy-on-write. The format: 8 bytes with
    the header's length N, N bytes of JSON {name: {dtype, shape, data_offsets}}, then the numbers without a gap.
    ValueError for a file that is damaged in any way; nothing in it is ever run or allocated on its word."""
    def need(ok, message):
        if not ok:
            raise ValueError(f"{path}: {message}")
    with open(path, "rb") as f:
        size, start = os.fstat(f.fileno()).st_size, f.read(8)
        need(len(start) == 8, f"is cut short: {size} bytes")
        length = int.from_bytes(start, "little")
        brace = f.read(1)
        need(brace == b"{" or not start.startswith((b"PK", b"\x80")), "is a pickle, which could run code: not read")
        need(brace == b"{" and 0 < length <= min(size - 8, 100_000_000),
             f"is damaged or cut short: its header claims {length:,} bytes, the file has {size:,}")
        try:
            header = json.loads(brace + f.read(length - 1))
        except (ValueError, RecursionError):
            need(False, "its header is not JSON: the file is damaged")
        mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
    metadata, tensors, at = header.pop("__metadata__", {}), {}, 0
    need(isinstance(metadata, dict) and all(type(v) is str for v in metadata.values()), "its __metadata__ is no text")
    for name, entry in header.items():
        entry = entry if isinstance(entry, dict) else {}
        shape, offsets = entry.get("shape"), entry.get("data_offsets")
        need(isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2 and len(shape) <= 8
             and all(type(n) is int and n >= 0 for n in shape + offsets) and isinstance(entry.get("dtype"), str),
             f"{name!r:.80} has a wrong dtype, shape or data_offsets")
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        (begin, end), shape, dtype = entry["data_offsets"], entry["shape"], DTYPES.get(entry["dtype"])
        need(begin == at, f"{name!r:.80} begins at byte {begin}, but what comes before it ends at {at}")
        need(begin < end <= size - 8 - length, f"{name!r:.80} reaches beyond the end of the file: it is cut short")
        at, place = end, 8 + length + begin
        if name.endswith(IGNORED[:2]):                                     # old exports keep masks as bytes or booleans
            continue
        need(dtype, f"{name!r:.80} has dtype {entry['dtype']!r:.20}; read are {', '.join(DTYPES)}")
        count = math.prod(shape)
        need(count * dtype.itemsize == end - begin, f"{name!r:.80} has {end - begin} bytes for shape {str(shape):.80}")
        # a header may leave the numbers unaligned: then they are copied
        raw, place = (bytearray(mapped[place:place + end - begin]), 0) if place % dtype.itemsize else (mapped, place)
        tensors[name] = torch.frombuffer(raw, dtype=dtype, count=count, offset=place).view(shape)
    need(at == size - 8 - length, f"holds {size - 8 - length - at} bytes that belong to no tensor")
    return tensors, metadata


def write_safetensors(path, shapes, tensors, metadata=None):
    """Writes `tensors`, one at a time in the order of `shapes` ({parameter: anything with a .shape}), as float32 in
    Hugging Face's layout. An iterator keeps memory at one tensor. Ends with the bytes on the disk, and only then takes
    the place of an older file, which these very tensors may be mapped from."""
    header, offset = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
    for name, like in shapes.items():
        shape = list(like.shape)[::-1] if name.endswith(TRANSPOSED) else list(like.shape)
        end = offset + 4 * math.prod(shape)
        header[name], offset = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}, end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                                        # so that the numbers are aligned
    with open(path + ".part", "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in zip(shapes, tensors, strict=True):
            tensor = tensor.detach().float().cpu()
            f.write((tensor.t() if name.endswith(TRANSPOSED) else tensor).contiguous().numpy().data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".part", path)


# ---------------------------------------------------------------------------------------------------------------------
# Downloads


class Progress:
    """One line that renews itself in a terminal; a log file gets a new one every ten seconds. None if quick."""

    def __init__(self, name, unit="MB", scale=1e6):
        self.name, self.unit, self.scale, self.began, self.over = name, unit, scale, None, False
        self.digits = int(scale > 1)

    def show(self, seen, size=None):
        """The first call says where it begins."""
        now, tty = time.time(), sys.stderr.isatty()
        if self.began is None:
            self.began, self.shown, self.first = now, now, seen
        last = seen == size and self.shown > self.began
        if not self.over and (last or now - self.shown > (0.2 if tty else 10)):
            self.shown, self.over, rate = now, seen == size, max(seen - self.first, 1) / max(now - self.began, 1e-9)
            numbers = [f"{n / self.scale:,.{self.digits}f}" for n in (seen, size) if n is not None]
            line = f"{self.name[:30]}  {' of '.join(numbers)} {self.unit}  {rate / self.scale:,.1f} {self.unit}/s"
            line += f"  {seen / size:4.0%}  {(size - seen) / rate:,.0f} s left" if size and not self.over else ""
            end = "\r" if tty and not self.over else "\n"
            print(line.ljust(79) if tty else line, end=end, file=sys.stderr, flush=True)


def hub_file(repo, name):
    """The path of a file of a model on the Hugging Face hub, downloaded at most once. HF_ENDPOINT names a mirror,
    HF_TOKEN opens private files, HF_HOME moves the cache, HF_HUB_OFFLINE=1 forbids the network. Files that transformers
    has already fetched are used where they lie."""
    hub = os.path.join(os.path.expanduser(os.environ.get("HF_HOME") or "~/.cache/huggingface"), "hub")
    for alias in (repo.split("/")[-1], repo):                              # transformers may know it by the short name
        folder = os.path.join(hub, "models--" + alias.replace("/", "--"))
        try:
            with open(os.path.join(folder, "refs", "main"), encoding="ascii") as f:
                commit = re.match(r"[0-9a-f]{40}$|", f.read(41)).group()
        except (OSError, ValueError):
            commit = ""
        for path in (os.path.join(folder, "snapshots", revision, name) for revision in (commit or "main", "main")):
            if os.path.exists(path):
                return path
    return hub_download(repo, name, path)


def hub_download(repo, name, path, show=None):
    """Fetches a file of the hub to `path`. The repo of a data set begins with "datasets/"."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise FileNotFoundError(f"HF_HUB_OFFLINE is set and {path} is not there: copy {name} of {repo} to that place")
    endpoint = re.sub("^(?!https?://)", "https://", os.environ.get("HF_ENDPOINT") or "huggingface.co").rstrip("/")
    return download(f"{endpoint}/{repo}/resolve/main/{name}", path, token=os.environ.get("HF_TOKEN"), show=show)


def download(url, path, sha256=None, token=None, tries=3, show=None):
    """Fetches url to `path` and returns `path`. The bytes go to path.part, which a later try or call continues with a
    Range request; they are checked against `sha256`, or the hash that the hub announces, and moved into place whole.
    ConnectionError (an OSError) where the server cannot be reached or what it sends is wrong. `show`: in place of the
    progress line, called with the bytes so far and the size or None."""
    import requests
    part, failures, show = path + ".part", 0, show or Progress(os.path.basename(path)).show
    session = requests.Session()
    session.headers["Accept-Encoding"] = "identity"
    if token:                                                              # requests takes it off for another host
        session.headers["Authorization"] = f"Bearer {token.strip()}"
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    while True:
        had = bytes_in(part)
        try:
            size, announced = announcement(session, url)
            if had != size:
                size = fetch(session, url, part, size, show)
            if size is None or bytes_in(part) >= size:
                break
            problem = f"it ended after {bytes_in(part):,} of {size:,} bytes"
        except requests.RequestException as e:
            problem = type(e).__name__                                     # its message may quote the token
        failures = 1 if bytes_in(part) > had else failures + 1
        if failures == tries:
            raise ConnectionError(f"{url}: the connection failed ({problem}): " + (
                f"{bytes_in(part):,} bytes are kept, run it again to go on" if bytes_in(part) else
                "is the proxy that HTTPS_PROXY names right?" if problem == "ProxyError" else
                f"without a network bring the file to {path}; HTTPS_PROXY names a proxy, HF_ENDPOINT a mirror of the hub"))
        time.sleep(failures / 4)
    expected, got = sha256 or announced, bytes_in(part)
    if expected is None:
        print(f"{os.path.basename(path)}: the server announces no hash, so only the size was checked", file=sys.stderr)
    if size not in (None, got) or expected and file_hash(part, expected) != expected:
        os.remove(part)
        raise ConnectionError(f"{url}: what came ({got:,} bytes) is not what was announced ({size or got:,} bytes, "
                              f"hash {expected}): it was discarded, try again")
    os.replace(part, path)
    return path


def bytes_in(path):
    return os.path.getsize(path) if os.path.exists(path) else 0


def announcement(session, url):
    """-> (size or None, hash or None), asked before the redirect to another host, where alone the hub tells them:
    X-Linked-Etag is a file's sha256; the ETag of a small file is git's sha1 of it."""
    for _ in range(5):
        reply = session.head(url, allow_redirects=False, timeout=(10, 30))
        check_status(reply, url)
        linked, location = "X-Linked-Etag" in reply.headers, reply.headers.get("Location", "")
        if linked or not re.match(r"/[^/]", location):
            size = reply.headers.get("X-Linked-Size" if linked or location else "Content-Length", "")
            etag = reply.headers.get("X-Linked-Etag" if linked else "ETag", "").removeprefix("W/").strip('"').lower()
            return (int(size) if re.fullmatch(r"[0-9]{1,15}", size) else None,
                    etag if re.fullmatch(r"[0-9a-f]{64}" if linked else r"[0-9a-f]{40}", etag) else None)
        url = urljoin(url, location)                                       # a relative redirect stays on this host
    raise ConnectionError(f"{url}: too many redirects")


def fetch(session, url, part, size, show):
    """Appends to `part` what is missing of url. Returns the size, if only now it is known."""
    have = bytes_in(part)
    with session.get(url, headers={"Range": f"bytes={have}-"} if have else {}, stream=True, timeout=(10, 30)) as reply:
        if reply.status_code == 416 and have:                              # our part is no beginning of this file
            os.remove(part)
            return fetch(session, url, part, size, show)
        check_status(reply, url)
        length, served = reply.headers.get("Content-Length", ""), reply.headers.get("Content-Range", "")
        if reply.status_code != 206 or not served.startswith(f"bytes {have}-"):
            have = 0                                                       # the server starts over, and so do we
        if size is None and re.fullmatch(r"[0-9]{1,15}", length):
            size = have + int(length)
        show(have, size)
        with open(part, "ab" if have else "wb") as f:
            for chunk in reply.iter_content(1 << 16):                      # what a cut connection can lose
                f.write(chunk)
                have += len(chunk)
                show(have, size)
            f.flush()
            os.fsync(f.fileno())
    return size


def check_status(reply, url):
    if reply.status_code >= 400:
        cure = {401: "it asks for a token: set HF_TOKEN", 403: "access is refused: is HF_TOKEN right?",
                404: "there is no such file"}.get(reply.status_code, "the server refused: try again later")
        raise ConnectionError(f"{url}: HTTP {reply.status_code}: {cure}")


def file_hash(path, expected):
    """sha256 of a file, or git's blob sha1 where `expected` is of that length."""
    digest = hashlib.sha256() if len(expected) == 64 else hashlib.sha1(b"blob %d\0" % os.path.getsize(path))
    with open(path, "rb") as f:
        while chunk := f.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Example use


def main():
    config = GPT2Config(block_size=64, vocab_size=1000, n_layer=2, n_head=4, n_embd=64)
    model = GPT2(config, seed=1337)
    input_ids = torch.randint(config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(1337))
    logits, _ = model(input_ids)
    _, loss = model(input_ids[:, :-1], input_ids[:, 1:])
    print(config)
    print(f"input_ids {tuple(input_ids.shape)} -> logits {tuple(logits.shape)}, standard deviation {logits.std():.4f}")
    print(f"loss {loss:.4f} nats (an even guess over {config.vocab_size} tokens: {math.log(config.vocab_size):.4f})")
    print(f"greedy continuation: {model.generate(input_ids[:1], 8, temperature=0)[0, 16:].tolist()}\n")

    print("GPT-2 124M at 1024 tokens, what each flag changes: cache of one text in bfloat16\n"
          "(as on a GPU), FLOPs of a forward pass\n")
    print(f"{'':16}{'parameters':>13}{'cache, B/token':>16}{'cache, full':>13}{'MFLOPs/token':>14}")
    flags = {"plain": {}, "rope": dict(rope=True), "gqa": dict(gqa=True), "sliding_window": dict(sliding_window=True)}
    flags["all three"] = {**flags["rope"], **flags["gqa"], **flags["sliding_window"]}
    for name, flag in flags.items():
        config = GPT2Config(**flag)
        with torch.device("meta"):                                         # shapes without numbers
            parameters = GPT2(config).num_parameters()
        full = config.cache_bytes(config.block_size, 2) / 1e6
        print(f"{name:16}{parameters:13,}{config.cache_bytes(1, 2):16,}{full:10.2f} MB"
              f"{config.flops_per_token() / 1e6:14.1f}")
    print(f"\ngqa: {GPT2Config(gqa=True).n_kv_head} key/value heads for 12 query heads; "
          f"sliding_window: {GPT2Config(sliding_window=True).window_size} tokens")


if __name__ == "__main__":
    if sys.argv[1:]:
        print(f"model.py: {sys.argv[1]} is not understood: the example use takes no flags", file=sys.stderr)
        sys.exit(2)
    main()
