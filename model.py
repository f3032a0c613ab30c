"""
GPT-2, from the attention formula up, in one file that needs only torch.

    python model.py                        # the example use, and what each flag costs

    model = GPT2(GPT2Config(n_layer=4, n_head=4, n_embd=128))
    logits, _ = model(idx)                 # idx (B, T) token ids -> logits (B, T, vocab_size)
    _, loss = model(idx, targets)          # targets (B, T), -1 = not counted -> mean loss in nats
    model = GPT2.from_pretrained("gpt2")   # OpenAI's weights, or a folder with a checkpoint
    model.generate(idx, 100)               # (B, T + 100)

Three changes to the attention, each one boolean flag that combines with the others: `rope` (rotary
positions), `gqa` (grouped-query attention) and `sliding_window`. Without them this is GPT-2.

Letters in the shape comments: B batch, T tokens, C = n_embd, H = n_head, K = key/value heads,
D = C / H head size, S = keys, W = window_size, V = vocab_size.
"""
import contextlib
import json
import math
import mmap
import os
import pickle
import re
import sys
import warnings
import weakref
from dataclasses import asdict, dataclass, field, fields, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# --------------------------------------------------------------------------------------------------
# Configuration


def flag(default, text, **metadata):
    """Return a dataclass field whose help text is `text`."""
    return field(default=default, metadata={"help": text, **metadata})


def check_type(f, value):
    """Raise ValueError unless `value` is one that the field f of GPT2Config can have."""
    shown = f"{f.name}={value!r:.50}"
    if value is None and f.default is None:
        return
    if f.type is bool and type(value) is not bool:
        raise ValueError(f"{shown} must be True or False")
    if f.type is float and type(value) not in (int, float):
        raise ValueError(f"{shown} must be a number")
    whole = type(value) is int and 0 < value <= 2**24
    if f.type not in (bool, float) and not whole:
        raise ValueError(f"{shown} must be a whole number from 1 to 16,777,216")


# {switch: the field that has an effect only with it}
SWITCHES = {"rope": "rope_theta", "gqa": "n_kv_head", "sliding_window": "window_size"}


@dataclass
class GPT2Config:
    """The shape of the model. The defaults are GPT-2 124M.

    With any value of a field marked `in_gpt2` the model is still a GPT-2. Another field makes it a
    different one, unless the field has its default. Raises ValueError for values that are out of
    range or contradict each other.
    """
    block_size: int = flag(1024, "context length in tokens", in_gpt2=True)
    vocab_size: int = flag(50257, "size of the vocabulary [that of the data]", in_gpt2=True)
    n_layer: int = flag(12, "number of transformer blocks", in_gpt2=True)
    n_head: int = flag(12, "number of attention heads", in_gpt2=True)
    n_embd: int = flag(768, "width of the model", in_gpt2=True)
    dropout: float = flag(0.0, "dropout: embeddings, attention, residuals", in_gpt2=True)
    bias: bool = flag(True, "biases in every Linear and LayerNorm")
    rope: bool = flag(False, "rotary positions (arXiv 2104.09864) instead of learned ones")
    rope_theta: float = flag(10000.0, "base of the rotary wavelengths")
    gqa: bool = flag(False, "grouped-query attention (arXiv 2305.13245)")
    n_kv_head: int | None = flag(
        None, "key/value heads [with gqa: the largest divisor of n_head up to n_head / 3]")
    sliding_window: bool = flag(
        False, "a token sees only the last window_size tokens, itself included (arXiv 2310.06825)")
    window_size: int | None = flag(None, "window in tokens [with sliding_window: block_size / 4]")
    flash: bool = flag(True, "torch's fused attention; False runs the written-out formula",
                       in_gpt2=True)

    def __post_init__(self):
        for f in fields(self):
            check_type(f, getattr(self, f.name))
        for switch, name in SWITCHES.items():
            value = getattr(self, name)
            if value != getattr(GPT2Config, name) and not getattr(self, switch):
                raise ValueError(f"{name}={value} has no effect without {switch}: add --{switch}")
        heads = self.n_head
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")
        if self.n_embd % heads:
            near = max(1, round(self.n_embd / heads)) * heads
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={heads}: try "
                             f"n_embd={near}")
        if self.rope and self.head_dim % 2:
            raise ValueError(f"rope rotates pairs, so the head size n_embd/n_head={self.head_dim} "
                             f"must be even: try n_embd={(self.head_dim + 1) * heads}")
        if not 1 < self.rope_theta <= 1e12:
            raise ValueError(f"rope_theta={self.rope_theta} must be above 1 and at most 1e12")
        divisors = [d for d in range(1, heads + 1) if heads % d == 0]
        if self.gqa and self.n_kv_head is None:
            self.n_kv_head = max(d for d in divisors if d <= max(1, heads // 3))
        if self.gqa and self.n_kv_head not in divisors:
            raise ValueError(f"n_head={heads} is not divisible by n_kv_head={self.n_kv_head}: try "
                             f"one of {divisors}")
        if self.sliding_window and self.window_size is None:
            self.window_size = max(1, self.block_size // 4)
        if self.sliding_window and self.window_size > self.block_size:
            raise ValueError(f"window_size={self.window_size} is longer than block_size="
                             f"{self.block_size}: choose at most {self.block_size}, or leave out "
                             "sliding_window")

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def kv_heads(self):
        return self.n_kv_head or self.n_head

    @property
    def qkv_sizes(self):
        """Widths of the queries, keys and values of all heads: the parts of c_attn's output."""
        kv_size = self.kv_heads * self.head_dim
        return [self.n_embd, kv_size, kv_size]

    @property
    def endless(self):
        """Whether text has no length limit: nothing depends on the distance to its start."""
        return self.rope and self.sliding_window

    @property
    def beyond_gpt2(self):
        """{name: value} of every field in which this model differs from plain GPT-2."""
        return {f.name: getattr(self, f.name) for f in fields(self)
                if "in_gpt2" not in f.metadata and getattr(self, f.name) != f.default}

    def cache_bytes(self, tokens=1, bytes_per_number=4):
        """Size in bytes of the key/value cache for one sequence of `tokens` tokens."""
        if self.sliding_window:
            tokens = min(tokens, self.window_size)
        return 2 * self.n_layer * self.kv_heads * self.head_dim * tokens * bytes_per_number

    def flops_per_token(self):
        """Floating point operations of a forward pass per token, averaged over a sequence of
        block_size tokens: 2 for each weight of a matrix and 4 C per layer for each key that a token
        sees. Training costs 3 times as many. (Kaplan et al. 2020, arXiv 2001.08361, table 1, but
        only keys that the mask lets through are counted.)"""
        T = self.block_size
        W = self.window_size or T
        C = self.n_embd
        keys = (W * (W + 1) / 2 + (T - W) * W) / T               # mean over i of min(i + 1, W)
        attention = C * (C + 2 * self.kv_heads * self.head_dim) + C * C
        feed_forward = 8 * C * C
        matrices = self.n_layer * (attention + feed_forward) + self.vocab_size * C
        return 2 * matrices + 4 * self.n_layer * C * keys


SIZES = {                                        # of OpenAI's models, all with block_size=1024
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600)}


SHAPE_FIELDS = {f.name for f in fields(GPT2Config)}


# --------------------------------------------------------------------------------------------------
# Attention


def scaled_dot_product_attention(q, k, v, mask=None, dropout_p=0.0):
    """softmax(q kᵀ / √D + mask) v  (Vaswani et al. 2017, arXiv 1706.03762, equation 1).

    q (..., T, D), k and v (..., S, D) -> (..., T, D). `mask` broadcasts to (..., T, S): boolean,
    True where a query may see a key, or numbers to add to the scores.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))     # (..., T, S)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask
    return F.dropout(scores.softmax(dim=-1), dropout_p) @ v


def visible(q_pos, k_pos, window=None):
    """Which keys each query may see: those up to its own position and, with a window, only the last
    `window` of them, its own included. Positions q_pos (T,), k_pos (S,) -> boolean (T, S)."""
    q_pos = q_pos[:, None]
    seen = k_pos <= q_pos
    if window is not None:
        seen &= k_pos > q_pos - window
    return seen


def rotary_tables(positions, head_dim, theta):
    """cos and sin of the angles position · theta^(-2i/D), each (T, D/2) in float32 (arXiv
    2104.09864, section 3.2.2). The angles are float64 where the device has it: in float32 they are
    off by 0.06 at position 1,000,000."""
    dtype = torch.float32 if positions.device.type == "mps" else torch.float64
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=dtype) / head_dim
    angles = positions.to(dtype)[:, None] * theta ** -exponents
    return angles.cos().float(), angles.sin().float()


def rotate(x, cos, sin):
    """Rotate the pairs (x_i, x_{i + D/2}) of x (..., T, D). This is the half-split pairing of
    Hugging Face's Llama and Mistral; checkpoints of the paper's interleaved pairing do not fit."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class KVCache:
    """The keys and values that one layer has seen, (..., K, size, D), allocated once.

    With a window it is a ring: position p is stored at p % size, so size = window_size is enough
    for a text of any length.
    """

    def __init__(self, size, ring=False):
        self.size = size
        self.ring = ring
        self.seen = 0                                            # tokens so far
        self.k = None
        self.v = None

    def extend(self, k, v):
        """Add k and v (..., K, T, D). Returns the keys and values that the new tokens may attend
        to, (..., K, S, D), oldest first. For T = 1 they come in ring order, which is fine because
        that token sees all of them."""
        end = self.seen + k.size(-2)
        if not self.ring and end > self.size:
            raise ValueError(f"{end} tokens do not fit a key/value cache of {self.size}")
        if self.k is None:
            self.k = k.new_empty(*k.shape[:-2], self.size, k.size(-1))
            self.v = v.new_empty(*v.shape[:-2], self.size, v.size(-1))
        keys = self._extend(self.k, k)
        values = self._extend(self.v, v)
        self.seen = end
        return keys, values

    def _extend(self, kept, new):
        """Write `new` into `kept`, and return what the new tokens may attend to."""
        T = new.size(-2)
        start = self.seen
        end = start + T
        # With gradients a chunk overwrites nothing: backward may need what an earlier one returned.
        in_place = end <= self.size and not new.requires_grad
        if T <= 1 or in_place:
            at = start % self.size                               # replaces what left the window
            kept.narrow(-2, at, T).copy_(new)
            return kept.narrow(-2, 0, min(end, self.size))
        # In a full ring the last new tokens replace keys that the first ones still see: read those
        # before writing.
        positions = torch.arange(max(0, start - self.size), end, device=new.device)
        slots = positions % self.size
        before = kept[..., slots[:-T], :]                        # the up to `size` keys before new
        both = torch.cat((before, new), dim=-2) if start else new
        last = slots[-min(T, self.size):]
        kept[..., last, :] = new[..., -len(last):, :]
        return both


class AttentionHead(nn.Module):
    """All that one head does with its q, k and v: rotate, read and extend the cache, mask, attend.

    It owns no weights and broadcasts over leading dimensions: one head (B, T, D) and all heads at
    once (B, H, T, D) run the same code.
    """

    def __init__(self, config):
        super().__init__()
        self.window = config.window_size                         # None: all tokens
        self.flash = config.flash
        self.dropout = config.dropout

    def forward(self, q, k, v, rotary=None, cache=None):
        """q (B, T, D) or (B, H, T, D), k and v (B, T, D) or (B, K, T, D) -> the shape of q.

        rotary: the tables for these T positions. cache: the KVCache of the tokens before these; it
        is extended. The queries are always the last T of the S keys' positions.
        """
        if rotary is not None:
            q = rotate(q, *rotary)
            k = rotate(k, *rotary)
        if cache is not None:
            k, v = cache.extend(k, v)
        if q.size(-2) == 1:                                      # it may see all keys, which the
            return self.attend(q, k, v)                          # cache returns in any order
        if self.window is not None and k.size(-2) > self.window:
            return attend_in_window(self.attend, q, k, v, self.window)
        return self.attend(q, k, v, causal=True)

    def attend(self, q, k, v, mask=None, causal=False):
        """Attention of q (B, H, T, D) to k and v (B, K, S, D), or all of them without heads.
        causal: the queries are the last T of the S positions, and none sees a later key."""
        T = q.size(-2)
        S = k.size(-2)
        dropout_p = self.dropout if self.training else 0.0
        grouped = q.dim() > 3 and q.size(-3) > k.size(-3)
        if causal and T == S and self.flash:                     # needs no mask
            return F.scaled_dot_product_attention(q, k, v, None, dropout_p, is_causal=True,
                                                  enable_gqa=grouped)
        if causal:
            positions = torch.arange(S, device=q.device)
            mask = visible(positions[S - T:], positions)
        if grouped:
            return attend_in_groups(self.attend, q, k, v, mask)
        if self.flash:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout_p)
        return scaled_dot_product_attention(q, k, v, mask, dropout_p)


class Linear(nn.Linear):
    """nn.Linear, with a faster product for few vectors on a CPU (see `linear`)."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


class MultiHeadAttention(nn.Module):
    """H query heads. With gqa they share K key/value heads, each of which serves H/K neighbours."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.sizes = config.qkv_sizes
        self.head_dim = config.head_dim
        self.c_attn = Linear(C, sum(self.sizes), bias=config.bias)
        self.c_proj = Linear(C, C, bias=config.bias)
        self.head = AttentionHead(config)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, rotary=None, cache=None):
        qkv = self.c_attn(x)                                     # (B, T, C + 2·K·D)
        dtype = qkv.dtype
        # On a CPU torch's attention is slow in half precision.
        if on_cpu(qkv) and dtype.itemsize == 2:
            qkv = qkv.float()
        q, k, v = (self.split_heads(part) for part in qkv.split(self.sizes, dim=-1))
        y = self.head(q, k, v, rotary, cache)                    # (B, H, T, D)
        y = y.transpose(1, 2).flatten(2).to(dtype)               # (B, T, C)
        return self.resid_dropout(self.c_proj(y))

    def split_heads(self, x):
        """(B, T, H·D) -> (B, H, T, D)"""
        heads = x.size(-1) // self.head_dim
        return x.view(*x.shape[:-1], heads, self.head_dim).transpose(1, 2)


# --------------------------------------------------------------------------------------------------
# Feed-forward and block


class PointwiseFeedForward(nn.Module):
    """The same two-layer network at every position. GELU is GPT-2's tanh approximation (Hendrycks &
    Gimpel 2016, arXiv 1606.08415, section 2); with the exact one OpenAI's logits change by 3e-3."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")             # (B, T, 4C)
        return self.dropout(self.c_proj(x))                      # (B, T, C)


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


# --------------------------------------------------------------------------------------------------
# The model


def empty_embedding(rows, width):
    """nn.Embedding without initial values. Its own constructor draws random numbers, which takes a
    second of imports on the meta device."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class GPT2(nn.Module):
    """Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".

    Parameters have Hugging Face's names. The output projection is the token embedding itself
    (tied), so there is no lm_head.
    """

    def __init__(self, config, seed=None):
        """seed: the weights are a function of it; None uses torch's global generator."""
        super().__init__()
        self.config = config
        self.cross_entropy = linear_cross_entropy                # train.py may compile it
        self.grad_checkpoint = False     # recompute blocks in backward: less memory, a third slower
        self.changes = []                # what from_pretrained changed in the weights
        embeddings = dict(wte=empty_embedding(config.vocab_size, config.n_embd))
        if not config.rope:
            embeddings["wpe"] = empty_embedding(config.block_size, config.n_embd)
        self.transformer = nn.ModuleDict(dict(
            **embeddings,
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias),
        ))
        for name, _ in self.named_buffers():
            raise TypeError(f"checkpoints do not hold the buffer {name}: compute it in forward")
        if not self.transformer.wte.weight.is_meta:
            parameters = dict(self.named_parameters())
            with torch.no_grad():
                for name, tensor in self.initial_weights(seed):
                    parameters[name].copy_(tensor)

    def initial_weights(self, seed=None):
        """Yield (name, tensor) of GPT-2's initialisation (section 2.3), one at a time.

        Linear and Embedding: normal with standard deviation 0.02, or 0.02/√(2·n_layer) where a
        projection adds to the residual stream; biases 0. Norms: weight 1. The tensors
        are made on the CPU, so that a model spread over devices starts with the same weights.
        Raises TypeError for a parameter without a rule.
        """
        generator = None
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
        for path, module in self.named_modules():
            for name, p in module.named_parameters(recurse=False):
                tensor = torch.empty(p.shape, device="cpu")
                if isinstance(module, nn.LayerNorm | nn.Linear) and name == "bias":
                    tensor.zero_()
                elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
                    tensor.fill_(1)
                elif isinstance(module, nn.Linear | nn.Embedding):
                    std = 0.02
                    if path.endswith("c_proj"):                  # adds to the residual stream
                        std /= math.sqrt(2 * self.config.n_layer)
                    tensor.normal_(0, std, generator=generator)
                else:
                    raise TypeError(f"{path}.{name}: GPT2.initial_weights has no rule for the "
                                    f"{name} of a {type(module).__name__}; add one")
                yield f"{path}.{name}", tensor

    @property
    def device(self):
        return self.transformer.wte.weight.device

    def num_parameters(self):
        return sum(p.numel() for p in self.parameters())

    def forward(self, idx, targets=None, cache=None, at=..., return_logits=False):
        """idx (B, T) token ids, or those of one text as an array or a list -> (logits (B, T, V),
        None).

        With targets like idx, -1 where not counted: (None, mean cross-entropy in nats), and with
        return_logits both. cache: from new_cache; idx then continues the text that the cache has
        seen. at: an index of the (B, T) positions whose logits are asked for. Raises ValueError for
        a text longer than block_size, unless `rope` is on.
        """
        x = self.hidden(token_ids(idx, self.device), cache)
        logits = None
        if targets is None or return_logits:
            logits = self.project(x[at])
        if targets is None:
            return logits, None
        targets = token_ids(targets, self.device).flatten()
        if isinstance(self.transformer.wte, Int8):
            scores = self.project(x).float().flatten(0, 1)
            return logits, F.cross_entropy(scores, targets, ignore_index=-1)
        wte = self.transformer.wte.weight
        return logits, self.cross_entropy(x.flatten(0, 1), wte, targets)

    def hidden(self, idx, cache=None):
        """The final hidden states (B, T, C) of idx (B, T)."""
        config = self.config
        start = cache[0].seen if cache else 0
        end = start + idx.size(1)
        positions = torch.arange(start, end, device=idx.device)
        x = self.transformer.wte(idx)
        rotary = None
        if config.rope:
            rotary = rotary_tables(positions, config.head_dim, config.rope_theta)
        elif end > config.block_size:
            raise ValueError(f"a text of {end} tokens is longer than block_size="
                             f"{config.block_size}, where learned positions end: shorten it, or "
                             "train with rope")
        else:
            x = x + self.transformer.wpe(positions)
        x = self.transformer.drop(x)
        for i, block in enumerate(self.transformer.h):
            if self.grad_checkpoint and self.training:
                x = checkpoint(block, x, rotary, use_reentrant=False)
            else:
                x = block(x, rotary, cache[i] if cache else None)
        return self.transformer.ln_f(x)

    @torch.no_grad()
    def inspect(self, idx):
        """Look inside the model: idx (B, T) -> (hidden states, attention weights).

        The hidden states are n_layer + 1 tensors (B, T, C): what each block reads, and the final
        one. The attention weights are n_layer tensors (B, H, T, T).
        """
        idx = token_ids(idx, self.device)
        was_training = self.training
        self.eval()                                              # no dropout
        states = []
        weights = []

        def keep_state(block, inputs):
            states.append(inputs[0])

        def keep_weights(head, inputs, y):
            q, k, v, *rotary = inputs
            # Attention returns weights @ values: with the identity as values, the weights.
            identity = torch.eye(k.size(-2), dtype=v.dtype, device=v.device)
            values = identity.expand(*k.shape[:-1], -1)
            weights.append(head.forward(q, k, values, *rotary))
        hooks = []
        for block in self.transformer.h:
            hooks.append(block.register_forward_pre_hook(keep_state))
            hooks.append(block.attn.head.register_forward_hook(keep_weights))
        try:
            states.append(self.hidden(idx))
        finally:
            for hook in hooks:
                hook.remove()
            self.train(was_training)
        return states, weights

    def project(self, x):
        """Hidden states (..., C) -> logits (..., V)."""
        wte = self.transformer.wte
        if isinstance(wte, Int8):
            return wte(x)
        return linear(x, wte.weight)

    def new_cache(self, size=None):
        """An empty key/value cache for `size` tokens (default: block_size), one KVCache a layer.
        With a window it needs only window_size of them."""
        config = self.config
        if config.sliding_window:
            return [KVCache(config.window_size, ring=True) for _ in range(config.n_layer)]
        return [KVCache(size or config.block_size) for _ in range(config.n_layer)]

    @torch.no_grad()
    def for_decoding(self):
        """Copy the matrices into the row order in which decoding reads them: in a Hugging Face file
        most are stored transposed. Returns the model."""
        for p in self.parameters():
            p.data = p.data.contiguous()
        return self

    def to_int8(self):
        """Round the matrices to int8 in place, for decoding on an x86 CPU. The rest becomes
        float32. Returns the model."""
        for module in list(self.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, Int8(child.weight, child.bias))
        self.transformer.wte = Int8(self.transformer.wte.weight, lookup=True)
        return self.float().requires_grad_(False)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None,
                 use_cache=True, generator=None, stop_token=None):
        """idx (B, T), or the ids of one text as an array or a list -> (B, T + max_new_tokens).
        A list of texts of any lengths -> a list of their tensors, each what the text alone gives
        (at temperature 0; else the random numbers differ). The other arguments are those of
        `stream`. A text that has reached its stop_token is filled up with it."""
        several = isinstance(idx, list) and bool(idx) and hasattr(idx[0], "__len__")
        texts = [token_ids(text, self.device)[0]
                 for text in (idx if several else token_ids(idx, self.device))]
        prompts = [self.recent(text[None])[0] for text in texts]
        # All prompts are read together up to the end of the shortest one. From there on each step
        # takes the next token of a longer prompt, or the model's.
        shortest = min(map(len, prompts))
        start = torch.stack([prompt[:shortest] for prompt in prompts])
        rest = nn.utils.rnn.pad_sequence([prompt[shortest:] for prompt in prompts],
                                         batch_first=True, padding_value=-1)
        check_sampling(start, max_new_tokens, temperature, top_k, top_p)
        steps = rest.size(1) + max_new_tokens
        columns = list(self.stream(start, steps, temperature, top_k, top_p, use_cache, generator,
                                   stop_token, rest))
        columns += (steps - len(columns)) * [torch.full_like(start[:, 0], stop_token or 0)]
        rows = torch.cat((start, torch.stack(columns, dim=1)), dim=1) if columns else start
        results = [torch.cat((text, row[len(prompt):len(prompt) + max_new_tokens]))
                   for text, prompt, row in zip(texts, prompts, rows, strict=True)]
        return results if several else torch.stack(results)

    def recent(self, text):
        """text (B, T), or its last block_size/2 tokens if it is too long to be read whole."""
        limit = self.config.block_size
        if self.config.endless or text.size(1) <= limit:
            return text
        return text[:, -max(1, limit // 2):]

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None,
               use_cache=True, generator=None, stop_token=None, rest=None):
        """Yield the next token of each text, (B,), max_new_tokens times, or until all texts have
        reached `stop_token`.

        temperature: 0 takes the most likely token. top_k: only the k most likely tokens. top_p:
        only the most likely tokens that together reach this probability (nucleus sampling,
        arXiv 1904.09751). use_cache: keep keys and values; without it the same tokens take longer.
        generator: a torch.Generator on the model's device. rest: (B, R) ids with which the texts
        begin, then -1 where the model continues a text: so texts of several lengths run together.

        With rope and sliding_window a text has no length limit. Otherwise, when it reaches
        block_size, the model continues from its last block_size/2 tokens.
        """
        text = idx = token_ids(idx, self.device)
        check_sampling(idx, max_new_tokens, temperature, top_k, top_p)
        config = self.config
        cache = None
        stopped = torch.zeros_like(idx[:, 0], dtype=torch.bool)
        was_training = self.training
        self.eval()
        try:
            for i in range(max_new_tokens):
                left = max_new_tokens - i
                if self.recent(text) is not text:
                    text = self.recent(text)
                    cache = None
                unread = text if cache is None else text[:, -1:]
                if use_cache and cache is None:
                    cache = self.new_cache(min(config.block_size, text.size(1) + left))
                logits, _ = self(unread, cache=cache, at=(slice(None), -1))
                token = sample_token(logits, temperature, top_k, top_p, generator)
                written = torch.ones_like(stopped)               # by the model
                if rest is not None and i < rest.size(1):
                    written = rest[:, i] < 0
                    token = torch.where(written, token, rest[:, i])
                if stop_token is not None:
                    token = token.masked_fill(stopped, stop_token)
                    stopped |= written & (token == stop_token)
                if config.endless and use_cache:
                    text = token[:, None]                      # earlier tokens are never read again
                else:
                    text = torch.cat((text, token[:, None]), dim=1)
                yield token
                if stop_token is not None and stopped.all():
                    return
        finally:
            self.train(was_training)

    def save_pretrained(self, folder, tokenizer=None):
        """Write config.json and model.safetensors, and the files of the tokenizer, for
        from_pretrained, transformers and other tools. Raises ValueError for int8."""
        if isinstance(self.transformer.wte, Int8):
            raise ValueError("an int8 model cannot be saved: save it before to_int8")
        os.makedirs(folder, exist_ok=True)
        write_pretrained(folder, self.config, self.parameters(), tokenizer)

    @classmethod
    def from_pretrained(cls, name, **overrides):
        """Load a folder with a GPT-2 or a StarCoder2, a model of the hub ("gpt2", "owner/name"), or
        nanoGPT's ckpt.pt; returns the model in evaluation mode. `overrides` are fields of
        GPT2Config (see `convert`), and `model.changes` lists what they changed. The weights are
        mapped from the file: they take memory as they are used. Raises ValueError for a damaged
        file or another model, OSError for a missing file."""
        config, weights, notes = read_pretrained(str(name))
        config, weights, changes = convert(config, weights, overrides)
        return cls.from_weights(config, weights, notes + changes)

    @classmethod
    def from_weights(cls, config, weights, changes=()):
        """The model with these weights, {name: tensor}, in evaluation mode."""
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(weights, assign=True)
        model.changes = list(changes)
        return model.requires_grad_().eval()


def token_ids(ids, device):
    """Token ids as a tensor (B, T): a tensor, or one text's ids as a list or an array."""
    if isinstance(ids, torch.Tensor) and ids.dim() == 2:
        return ids
    if isinstance(ids, str) or isinstance(ids, list) and any(isinstance(x, str) for x in ids):
        raise TypeError("the model takes token ids, not text: use load_tokenizer(FOLDER).encode("
                        "text), from data.tokenizer, with the folder of the model")
    ids = torch.as_tensor(ids, device=device).long()
    if ids.dim() not in (1, 2):
        raise ValueError(f"idx has shape {tuple(ids.shape)}; idx must be (B, T), or (T,)")
    return ids if ids.dim() == 2 else ids[None]


def check_sampling(idx, max_new_tokens, temperature, top_k, top_p):
    """Raise ValueError for an argument of `stream` that is out of range."""
    if idx.dim() != 2 or idx.size(1) == 0:
        raise ValueError(f"idx has shape {tuple(idx.shape)}; idx must be (B, T) with T at least 1")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be 0 or more")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be 0 or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1")


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """One token (B,) for each row of logits (B, V)."""
    if temperature < 1e-6:                                       # a division by it would overflow
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is None and top_p is None:
        return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]
    k = min(top_k or logits.size(-1), logits.size(-1))
    logits, ids = logits.topk(k)                                # exactly k, whatever ties there are
    probabilities = logits.softmax(dim=-1)
    if top_p is not None:
        more_likely = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(more_likely >= top_p, 0)
    choice = torch.multinomial(probabilities, 1, generator=generator)
    return ids.gather(-1, choice)[:, 0]


# --------------------------------------------------------------------------------------------------
# Device, dtype and compile: what train.py and sample.py choose, each with the reason


def choose_device(name="auto"):
    """-> (torch.device, why). name: auto, cpu, mps, cuda or cuda:N."""
    why = "as given"
    if name == "auto":
        name = "cpu"
        if torch.backends.mps.is_available():
            name = "mps"
        if torch.cuda.is_available():
            name = "cuda"
        why = "found no GPU" if name == "cpu" else "found a GPU"
    try:
        torch.empty(0, device=name)
        found = name.split(":")[0] in ("cpu", "cuda", "mps")
    except (RuntimeError, AssertionError):                       # AssertionError: no CUDA in torch
        found = False
    if not found:
        raise ValueError(f"--device={name} was not found: use auto, cpu, cuda, cuda:N or mps")
    if name.startswith("cuda"):
        why += f", {torch.cuda.get_device_name(name)}"
    return torch.device(name), why


def choose_dtype(name, device, float16=True):
    """-> (torch.dtype, why). name: auto or a dtype. float16=False: auto never chooses it."""
    if name != "auto":
        return getattr(torch, name), "as given"
    if device.type != "cuda":
        return torch.float32, f"exact, on {device.type}"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "this GPU supports it"
    if float16:
        return torch.float16, "this GPU has no bfloat16"
    return torch.float32, "this GPU has no bfloat16, and FSDP has no loss scaling for float16"


def choose_compile(name, device):
    """-> (bool, why). name: auto (only on CUDA), True or False. Raises ValueError if True is given
    and torch.compile does not work."""
    if name == "False":
        return False, "as given"
    if name == "auto" and device.type != "cuda":
        return False, f"no benefit on {device.type}"
    try:
        torch.compile(torch.sin)(torch.zeros(1, device=device))
    except Exception as error:                   # no Triton, no compiler: each raises its own kind
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:100]
        if name == "True":
            raise ValueError(f"--compile does not work here ({reason}): leave it out") from None
        return False, f"it does not work here ({reason})"
    return True, "as given" if name == "True" else "it works here"


def cpu_supports(dtype):
    """Whether this CPU has instructions for products in this half-precision dtype."""
    if not torch.backends.mkldnn.is_available():                 # not known: leave it to torch
        return True
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


def on_cpu(tensor):
    """Whether the fast paths of a CPU serve this tensor. .github/scale.py replaces it."""
    return tensor.is_cpu


# --------------------------------------------------------------------------------------------------
# Fast paths: each computes the line of torch that its docstring shows


def linear(x, weight, bias=None):
    """F.linear(x, weight, bias).

    For few vectors on a CPU, reading the weights takes all the time, and F.linear reads them with
    one core. bmm gives every core blocks of their rows. For more than a few, a CPU that multiplies
    half precision in software takes several times as long as in float32.
    """
    K = x.size(-1)
    vectors = x.numel() // K
    if not on_cpu(x):
        return F.linear(x, weight, bias)
    if x.dtype.itemsize == 2 and vectors > 8 and not cpu_supports(x.dtype):
        bias = None if bias is None else bias.float()
        return F.linear(x.float(), weight.float(), bias).to(x.dtype)
    if x.dtype != torch.float32 or vectors > 32 or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    count = number_of_blocks(weight.size(0))
    blocks = weight.view(count, -1, K).mT                        # (count, K, N / count)
    rows = x.reshape(1, vectors, K).expand(count, -1, -1)        # (count, vectors, K)
    if bias is None:
        y = torch.bmm(rows, blocks)
    else:
        y = torch.baddbmm(bias.view(count, 1, -1), rows, blocks)
    return y.transpose(0, 1).reshape(*x.shape[:-1], weight.size(0))


def number_of_blocks(rows):
    """The largest divisor of `rows` up to 32."""
    return next(count for count in range(32, 0, -1) if rows % count == 0)


def attend_in_groups(attend, q, k, v, mask=None):
    """attend(q, k.repeat_interleave(H // K, dim=1), v.repeat_interleave(H // K, dim=1), mask).

    No key is copied: the queries of a group become further positions of the head that they share.
    """
    T = q.size(-2)
    group = q.size(-3) // k.size(-3)
    q = q.unflatten(-3, (-1, group)).flatten(-3, -2)             # (B, K, H/K · T, D)
    if mask is not None:
        mask = mask.repeat(group, 1)
    y = attend(q, k, v, mask)
    return y.unflatten(-2, (group, T)).flatten(-4, -3)           # (B, H, T, D)


def attend_in_window(attend, q, k, v, window):
    """attend(q, k, v, visible(torch.arange(S)[-T:], torch.arange(S), window)), where S > window and
    at most `window` keys are older than the first query.

    Time and memory grow with T · W instead of T · S. The queries are cut, from the end, into blocks
    of W. A block sees only its own W keys and the W before them, through one mask for all blocks.
    What is left at the start has fewer keys. For T = S = 11 and W = 4 (#: the query sees the key):

              key 0 1 2 3 4 5 6 7 8 9 10
        query 0   #                         full queries, fewer than W: they see every earlier key
              1   # #
              2   # # #
              3   # # # #                   first block: W queries, fewer than W keys before them
              4     # # # #
              5       # # # #
              6         # # # #
              7           # # # #           whole blocks: W queries, W keys before them
              8             # # # #
              9               # # # #
             10                 # # # #
    """
    T = q.size(-2)
    S = k.size(-2)
    W = window
    whole_blocks = min(T, S - W) // W
    first_queries = T - whole_blocks * W                         # all that are not in whole blocks
    first_keys = S - whole_blocks * W                            # below 2 W
    full_queries = max(0, first_queries - W)
    positions = torch.arange(2 * W, device=q.device)
    mask = visible(positions[W:], positions, W)                  # (W, 2W)
    parts = []
    if full_queries:
        keys = first_keys - first_queries + full_queries
        parts.append(attend(q[..., :full_queries, :], k[..., :keys, :], v[..., :keys, :],
                            causal=True))
    if first_queries:
        rows = first_queries - full_queries
        parts.append(attend(q[..., full_queries:first_queries, :], k[..., :first_keys, :],
                            v[..., :first_keys, :], mask[W - rows:, 2 * W - first_keys:]))
    if whole_blocks:
        block_q = cut_into_blocks(q[..., first_queries:, :], W, W)
        block_k = cut_into_blocks(k[..., first_keys - W:, :], 2 * W, W)
        block_v = cut_into_blocks(v[..., first_keys - W:, :], 2 * W, W)
        y = attend(block_q.flatten(0, 1), block_k.flatten(0, 1), block_v.flatten(0, 1), mask)
        y = y.unflatten(0, block_q.shape[:2])
        parts.append(y.transpose(1, -3).flatten(-3, -2))
    return torch.cat(parts, dim=-2)


def cut_into_blocks(x, size, step):
    """x (B, ..., T, D) -> (B, blocks, ..., size, D): runs of `size` positions, `step` apart. They
    are views: overlapping runs are not copied."""
    return x.unfold(-2, size, step).transpose(-1, -2).transpose(1, -3)


def linear_cross_entropy(x, weight, targets):
    """F.cross_entropy((x @ weight.t()).float(), targets, ignore_index=-1).

    x (N, C), weight (V, C), targets (N,) -> scalar, float32. The N x V logits would be the largest
    tensor of a training step. They are made a few rows at a time, and these rows' gradients are
    computed at once, so that nothing is kept or computed twice.
    """
    return LinearCrossEntropy.apply(x, weight, targets, torch.is_grad_enabled())


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, keep_gradients):
        loss = x.new_zeros((), dtype=torch.float32)
        count = (targets >= 0).sum().clamp(min=1)
        if keep_gradients:
            grad_x = torch.empty_like(x)
            grad_weight = torch.zeros_like(weight)
        numbers = 1 << (24 if on_cpu(x) else 27)                 # logits held at a time
        rows = max(1, numbers // weight.size(0))
        for at in range(0, len(x), rows):
            part = x[at:at + rows]
            target = targets[None, at:at + rows]
            logits = (weight @ part.t()).float()                 # (V, rows), faster than (rows, V)
            highest = logits.amax(dim=0, keepdim=True)
            counted = target >= 0
            target = target.clamp(min=0)
            chosen = logits.gather(0, target) - highest
            total = logits.sub_(highest).exp_().sum(dim=0, keepdim=True)
            loss += (total.log() - chosen).masked_fill(~counted, 0).sum()
            if keep_gradients:                                   # softmax - one hot
                logits.mul_(counted / total).scatter_add_(0, target, -counted.float())
                logits = logits.to(part.dtype)
                grad_x[at:at + rows] = logits.t() @ weight
                grad_weight.addmm_(logits, part)
        if keep_gradients:
            ctx.save_for_backward(grad_x, grad_weight, count)
        return loss / count

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise NotImplementedError("this loss has no second derivatives: give model."
                                      "cross_entropy a function of (x, weight, targets) that does")
        grad_x, grad_weight, count = ctx.saved_tensors
        scale = grad / count
        return grad_x.mul_(scale), grad_weight.mul_(scale), None, None     # in place to save memory


class Int8(nn.Module):
    """F.linear(x, weight, bias) or F.embedding(x, weight) with integers, for decoding on an x86
    CPU: a quarter of the bytes to read.

    The weight (N, K) is rounded to -63 .. 63 and x to -127 .. 127, with one scale a row. FBGEMM's
    kernel adds two neighbouring products in 16 bits; larger weights would overflow them.
    """

    def __init__(self, weight, bias=None, lookup=False):
        super().__init__()
        weight = weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 63
        rounded = (weight / scale[:, None]).round().to(torch.int8)
        self.packed = pack_int8(rounded, scale)
        self.rows = len(rounded)
        self.number = len(INT8)
        INT8.append(weakref.ref(self))
        self.bias = bias
        if lookup:
            self.register_buffer("weight", rounded)
            self.register_buffer("scale", scale)

    def forward(self, x):
        if not x.is_floating_point():                            # token ids: rows of the embedding
            return self.weight[x] * self.scale[x][..., None]
        largest = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12)
        if torch.compiler.is_compiling():
            y = int8_product(x / largest, self.number, self.rows)
        else:
            y = self.product(x / largest)
        if self.bias is None:
            return y * largest
        return torch.addcmul(self.bias, y, largest)

    def product(self, x):
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
        return multiply(x, 1 / 127, 128, self.packed)


# torch.compile cannot put FBGEMM's packed matrix into a graph. The graph calls an operation with a
# number instead, and the operation finds the matrix.
INT8 = []                                                        # a weak reference to each Int8
INT8_LIBRARY = torch.library.Library(f"gpt2_{id(INT8)}", "DEF")  # a new name if loaded again
INT8_LIBRARY.define("product(Tensor x, int number, int rows) -> Tensor")
INT8_LIBRARY.impl("product", lambda x, number, rows: INT8[number]().product(x), "CPU")
INT8_LIBRARY.impl("product", lambda x, number, rows: x.new_empty(*x.shape[:-1], rows), "Meta")
int8_product = getattr(torch.ops, INT8_LIBRARY.ns).product


def pack_int8(rounded, scale):
    """The matrix rounded · scale in the layout of FBGEMM. Raises ValueError on another CPU. Selects
    FBGEMM for all of this process, as torch packs for the engine that is selected."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        raise ValueError("int8 needs an x86 CPU: use bfloat16")
    torch.backends.quantized.engine = "fbgemm"
    zero = torch.zeros(len(scale), dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                          # torch will drop its qint8 dtype
        matrix = torch._make_per_channel_quantized_tensor(rounded, scale.double(), zero, 0)
    return torch.ops.quantized.linear_prepack(matrix, None)


# --------------------------------------------------------------------------------------------------
# Checkpoint format: a Hugging Face folder with config.json and model.safetensors. Where one of
# transformers' architectures computes the same, `gpt2` or with rope `starcoder2`, it is written as
# that one, and every tool opens it. Elsewhere it is a `gpt2-variant`, which other tools refuse. A
# fourth architecture, `nanogpt`, is only read.

HUB = {"gpt2": "openai-community/gpt2", "gpt2-medium": "openai-community/gpt2-medium",
       "gpt2-large": "openai-community/gpt2-large", "gpt2-xl": "openai-community/gpt2-xl",
       "distilgpt2": "distilbert/distilgpt2"}                    # short name: model of the hub
SOURCES = (", ".join(HUB) + ", a model of the hub (owner/name), a folder with a checkpoint, or a "
           "ckpt.pt of nanoGPT")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
          "I64": torch.int64, "I32": torch.int32, "BOOL": torch.bool}
TOKENIZER_FILES = {"meta.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
                   "merges.txt"}
MASKS = (".attn.bias", ".attn.masked_bias")                      # constants in old files of GPT-2

# The differences from plain GPT-2 that an architecture can express, some of them by `widen`
EXPRESSES = {"gpt2": {"bias", "gqa", "n_kv_head"}}
EXPRESSES["starcoder2"] = EXPRESSES["gpt2"] | {"rope", "rope_theta", "sliding_window",
                                               "window_size"}
# Its names for our fields in config.json
FIELDS = {
    "gpt2": {"block_size": "n_positions", "vocab_size": "vocab_size", "n_layer": "n_layer",
             "n_head": "n_head", "n_embd": "n_embd"},
    "starcoder2": {"block_size": "max_position_embeddings", "vocab_size": "vocab_size",
                   "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
                   "n_embd": "hidden_size", "window_size": "sliding_window"},
}
FIELDS["gpt2-variant"] = FIELDS["gpt2"]
# GPT-2 has our names for the weights, and stores four of them as (in, out).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
STARCODER2 = {"transformer.wte": "model.embed_tokens", "transformer.h.": "model.layers.",
              "transformer.ln_f": "model.norm", "ln_1": "input_layernorm",
              "ln_2": "post_attention_layernorm", "attn.c_attn": "self_attn.{}_proj",
              "attn.c_proj": "self_attn.o_proj"}                 # {}: q, k and v


def choose_architecture(config):
    """The architecture in which a model is saved."""
    name = "starcoder2" if config.rope else "gpt2"
    return name if config.beyond_gpt2.keys() <= EXPRESSES[name] else "gpt2-variant"


def fixed_fields(config, architecture):
    """{field of config.json: values} that a model with this config can have in it. The first value
    is written; any of them is read, and so is a file without the field."""
    fixed = {name: (getattr(config, ours),) for ours, name in FIELDS[architecture].items()}
    fixed["tie_word_embeddings"] = (True,)
    if architecture == "starcoder2":
        rope = {"rope_type": "default", "rope_theta": config.rope_theta}
        return {**fixed, "num_key_value_heads": (config.kv_heads,), "use_bias": (True,),
                "intermediate_size": (4 * config.n_embd,), "hidden_act": ("gelu_pytorch_tanh",),
                "norm_epsilon": (1e-5,), "rope_theta": (config.rope_theta, None),
                "rope_parameters": (rope, None), "rope_scaling": (None,),
                "head_dim": (config.head_dim, None)}
    return {**fixed, "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "layer_norm_epsilon": (1e-5,), "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
            "n_inner": (None, 4 * config.n_embd)}


def config_to_json(config, end_of_text=None):
    """The content of Hugging Face's config.json. The field gpt2_flags holds what the architecture's
    own fields do not say about the model."""
    architecture = choose_architecture(config)
    classes = {"gpt2": "GPT2LMHeadModel", "starcoder2": "Starcoder2ForCausalLM"}
    dropouts = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
    if architecture == "starcoder2":
        dropouts = ("embedding_dropout", "attention_dropout", "residual_dropout")
    saved = {
        "model_type": architecture, "architectures": [classes.get(architecture, "GPT2")],
        **{name: values[0] for name, values in fixed_fields(config, architecture).items()},
        **dict.fromkeys(dropouts, config.dropout), "initializer_range": 0.02, "dtype": "float32",
        "n_ctx": config.block_size, "bos_token_id": end_of_text, "eos_token_id": end_of_text,
    }
    told = asdict(config_from_json(saved)[0])                    # without gpt2_flags
    saved["gpt2_flags"] = {f.name: getattr(config, f.name) for f in fields(config)
                           if getattr(config, f.name) != told.get(f.name, f.default)}
    return saved


def config_from_json(saved):
    """The inverse of config_to_json, for any config.json of a GPT-2 or a StarCoder2.

    Returns (GPT2Config, architecture). Raises ValueError for what this model does not compute, and
    for a flag that this version does not know."""
    if not isinstance(saved, dict):
        raise ValueError("config.json does not hold a JSON object")
    architecture = saved.get("model_type", "gpt2")
    if not isinstance(architecture, str) or architecture not in FIELDS:
        raise ValueError(f"config.json says model_type={architecture!r:.50}; only gpt2 and "
                         "starcoder2 are supported")
    values = {ours: saved[name] for ours, name in FIELDS[architecture].items() if name in saved}
    if architecture == "starcoder2":
        values.update(starcoder2_flags(saved, values))
    else:                                                        # here older versions put the flags
        values.update((name, saved[name]) for name in SHAPE_FIELDS & saved.keys())
    flags = saved.get("gpt2_flags", {})
    if not isinstance(flags, dict):
        raise ValueError(f"config.json says gpt2_flags={flags!r:.50}, which is no JSON object")
    for name in flags.keys() - SHAPE_FIELDS:
        raise ValueError(f"config.json has the flag {name!r:.50}, which this version does not "
                         "know: the model would compute something else")
    config = GPT2Config(**{**values, **flags})
    for name, allowed in fixed_fields(config, architecture).items():
        if name in saved and saved[name] not in allowed:
            raise ValueError(f"config.json says {name}={saved[name]!r:.80}; this model computes "
                             f"only {name}={allowed[0]}")
    return config, architecture


def starcoder2_flags(saved, values):
    """The flags of GPT2Config that the config.json of a StarCoder2 implies. values: those of its
    fields that FIELDS names."""
    for name in (*FIELDS["starcoder2"].values(), "num_key_value_heads"):
        if name not in saved and name != "sliding_window":
            raise ValueError(f"config.json lacks {name}")
    rope = saved.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"config.json says rope_parameters={rope!r:.50}, which is no JSON object")
    flags = {"rope": True, "rope_theta": rope.get("rope_theta", saved.get("rope_theta", 10000.0)),
             "sliding_window": values.get("window_size") is not None}
    if saved["num_key_value_heads"] != values["n_head"]:
        flags.update(gqa=True, n_kv_head=saved["num_key_value_heads"])
    return flags


def is_pretrained(name):
    """Whether `read_pretrained` may find a model by this name."""
    return name in HUB or os.path.isdir(name) or is_hub_name(name) or name.endswith(".pt")


def is_hub_name(name):
    """Whether this has the form owner/name of a model of the hub."""
    return (re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None
            and not name.endswith((".pt", ".safetensors")))


def read_pretrained(name):
    """-> (GPT2Config, {parameter name: float32 tensor}, [what to know about them, one line each]).

    name: a folder, a model of the hub (owner/name, or a name in HUB), or nanoGPT's ckpt.pt.
    """
    if name.endswith(".pt") and os.path.isfile(name):
        return read_nanogpt(name)
    config_path = find_file(name, "config.json")
    paths = weight_files(name)
    with open(config_path, "rb") as f:
        try:
            config, architecture = config_from_json(json.load(f))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{config_path}: {error}") from None
    tensors = {}
    for path in paths:
        part, _ = read_safetensors(path)
        for twice in sorted(part.keys() & tensors.keys()):
            raise ValueError(f"{path} holds {twice!r:.80}, which another file of the model holds")
        tensors.update(part)
    try:
        return config, weights_from_file(config, architecture, tensors), []
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def find_file(name, file):
    """The path of a file of the model `name`. Raises FileNotFoundError if the model has none."""
    if os.path.isdir(name):
        if os.path.exists(f"{name}/{file}"):
            return f"{name}/{file}"
        raise FileNotFoundError(f"{name}/{file} not found" + advice_on_pickles(name))
    if name not in HUB and not is_hub_name(name):
        raise FileNotFoundError(f"{name!r} was not found: it is none of {SOURCES}")
    from data.download import hub_file
    try:
        return hub_file(HUB.get(name, name), file)
    except OSError as error:
        raise type(error)(f"{name} is no folder here, and the hub does not help: {error}") from None


def weight_files(name):
    """The paths of the files with the weights of the model `name`: one, or several with an index"""
    try:
        return [find_file(name, "model.safetensors")]
    except FileNotFoundError as error:
        missing = error
    try:
        path = find_file(name, "model.safetensors.index.json")
    except FileNotFoundError:
        raise missing from None
    with open(path, "rb") as f:
        try:
            files = sorted(set(json.load(f)["weight_map"].values()))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            files = []
    if not files or not all(re.fullmatch(r"[\w-][\w.-]*\.safetensors", str(f)) for f in files):
        raise ValueError(f"{path} is damaged: its weight_map must name .safetensors files")
    return [find_file(name, file) for file in files]


def read_nanogpt(path):
    """`read_pretrained` of a checkpoint that nanoGPT wrote: a pickle, of which torch loads nothing
    but tensors and plain values, so that no code in it runs."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        config = GPT2Config(**saved["model_args"])
        tensors = {name.removeprefix("_orig_mod."): tensor
                   for name, tensor in saved["model"].items() if not name.endswith(MASKS)}
        weights = weights_from_file(config, "nanogpt", tensors)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, EOFError,
            pickle.UnpicklingError) as error:
        reason = f"{error}".split("\n")[0]
        raise ValueError(f"{path} is damaged, or not a checkpoint of nanoGPT, the only pickle that "
                         f"is read ({type(error).__name__}: {reason:.150})") from None
    return config, weights, ["gelu: nanoGPT computes the exact one, this model GPT-2's tanh "
                             "approximation; OpenAI's logits differ by 3e-3"]


def advice_on_pickles(folder):
    for name in sorted(os.listdir(folder)):
        if name == "ckpt.pt":
            return f". To open nanoGPT's checkpoint there, name the file: {folder}/{name}"
        if name.endswith((".bin", ".pt", ".pth", ".ckpt")):
            return (f". {name} is a pickle, which could run code, so it is not read: convert it "
                    "with transformers' save_pretrained")
    return ""


# On the way to a file a parameter of ours is widened (`widen` adds the bias that we leave out and
# repeats key/value heads), then named and transposed (`to_file`). On the way back, the last step is
# `narrow`. `stored` is the config of the widened model.


def stored_model(config, architecture):
    """-> (config of the same model as the architecture stores it, {name: parameter without
    numbers}). Dropped biases are stored as zeros, and GPT-2 has each key/value head as often as
    query heads share it."""
    stored = config
    if architecture in EXPRESSES:
        stored = replace(stored, bias=True)
    if architecture == "gpt2":
        stored = replace(stored, gqa=False, n_kv_head=None)
    with torch.device("meta"):
        return stored, dict(GPT2(stored).named_parameters())


def to_file(stored, architecture, name, tensor):
    """[(name, tensor)] under which an architecture stores a parameter of a model with the config
    `stored`."""
    if architecture == "starcoder2":
        for ours, theirs in STARCODER2.items():
            name = name.replace(ours, theirs)
        if "{}" not in name:
            return [(name, tensor)]
        parts = tensor.split(stored.qkv_sizes)
        return [(name.format(letter), part) for letter, part in zip("qkv", parts, strict=True)]
    if name.endswith(TRANSPOSED) and architecture != "nanogpt":
        tensor = tensor.t()
    return [(name, tensor)]


def rows_of_heads(config):
    """For each row of c_attn with a key/value head for each query head, the row of ours: with gqa
    the heads of a group share one."""
    heads = [config.n_head, config.kv_heads, config.kv_heads]
    group = config.n_head // config.kv_heads
    q, k, v = torch.arange(sum(heads) * config.head_dim).view(-1, config.head_dim).split(heads)
    return torch.cat((q, k.repeat_interleave(group, 0), v.repeat_interleave(group, 0))).flatten()


def weights_from_file(config, architecture, tensors):
    """Pick the model's parameters from a file's tensors, and check their names and shapes. What is
    built here is limited by what the file holds, not by what config claims."""
    found = {}
    for name, tensor in tensors.items():
        name = short_name(name)
        if name in found:
            raise ValueError(f"holds {name!r:.80} twice, with and without its prefix")
        found[name] = tensor
    if config.n_layer > len(found):
        raise ValueError(f"config.json asks for {config.n_layer} layers, the file has {len(found)} "
                         "tensors")
    stored, parameters = stored_model(config, architecture)
    wanted = {name: [(short_name(part), x.shape) for part, x in
                     to_file(stored, architecture, name, p)] for name, p in parameters.items()}
    check_tensors(found, dict(part for parts in wanted.values() for part in parts))
    weights = {}
    for name, parts in wanted.items():
        if len(parts) > 1:
            tensor = torch.cat([found[part] for part, _ in parts])
        else:                                                    # transposing undoes itself
            ((_, tensor),) = to_file(stored, architecture, name, found[parts[0][0]])
        weights[name] = narrow(stored, config, name, tensor.float())
    return {name: tensor for name, tensor in weights.items() if tensor is not None}


def short_name(name):
    """A tensor's name without the prefix that some files leave out."""
    return name.removeprefix("transformer.").removeprefix("model.")


def check_tensors(found, shapes):
    """Raise ValueError unless a file's tensors {name: tensor} have these names and shapes."""
    missing = [name for name in shapes if name not in found]
    unknown = [name for name in found if name not in shapes and name != "lm_head.weight"]
    if missing:
        raise ValueError(f"lacks {missing[0]} ({len(missing)} missing, {len(unknown)} unknown)")
    if unknown:
        raise ValueError(f"holds an unknown {unknown[0]!r:.80} ({len(unknown)} unknown)")
    for name, shape in shapes.items():
        if found[name].shape != shape:
            raise ValueError(f"{name} has shape {tuple(found[name].shape)}, config.json asks for "
                             f"{tuple(shape)}")
    wte = found[next(iter(shapes))]
    head = found.get("lm_head.weight")
    if head is not None and (head.dtype != wte.dtype or not torch.equal(head, wte)):
        raise ValueError("lm_head.weight differs from the token embedding; here they are the same")


def widen(stored, config, parameters, tensors):
    """Yield the value of each of the `parameters` of a model with the config `stored`, from the
    `tensors` of the same model with `config`: zeros for a dropped bias, a copy of a key/value head
    for each head of its group."""
    tensors = iter(tensors)
    for name, p in parameters.items():
        if name.endswith("bias") and not config.bias and stored.bias:
            yield torch.zeros(p.shape)
        elif "c_attn" in name and stored.kv_heads > config.kv_heads:
            yield next(tensors)[rows_of_heads(config)]
        else:
            yield next(tensors)


def narrow(stored, config, name, wide):
    """The inverse of `widen` for one parameter; None for a dropped bias. Raises ValueError if
    `widen` could not have made it."""
    tensor = wide
    same = True
    if name.endswith("bias") and not config.bias and stored.bias:
        tensor = None
        same = not wide.any()
    elif "c_attn" in name and stored.kv_heads > config.kv_heads:
        rows = rows_of_heads(config)
        tensor = wide.new_empty(rows.max() + 1, *wide.shape[1:])
        tensor[rows] = wide                                      # of the copies of a head, any one
        same = torch.equal(tensor[rows], wide)
    if not same:
        raise ValueError(f"{name} contradicts the gpt2_flags in config.json: other software has "
                         "trained this model. Delete gpt2_flags to open it without these flags")
    return tensor


def write_pretrained(folder, config, tensors, tokenizer=None, metadata=None):
    """Write a folder for `read_pretrained` and other tools: config.json, the files of the
    tokenizer, and last the weights as float32, which make it complete. tensors: the parameters of
    the model in order; an iterator keeps one of them in memory at a time."""
    end_of_text = 50256 if config.vocab_size > 50256 else None
    files = {}
    if tokenizer is not None:
        end_of_text = tokenizer.end_of_text
        files = tokenizer.files()
        for name in TOKENIZER_FILES - files.keys():              # of another tokenizer
            with contextlib.suppress(FileNotFoundError):
                os.remove(f"{folder}/{name}")
    files["config.json"] = json.dumps(config_to_json(config, end_of_text), indent=2).encode()
    for name, content in files.items():
        with atomic_write(f"{folder}/{name}") as f:
            f.write(content)
    architecture = choose_architecture(config)
    stored, parameters = stored_model(config, architecture)
    entries = {part: (torch.float32, x.shape) for name, p in parameters.items()
               for part, x in to_file(stored, architecture, name, p)}
    values = zip(parameters, widen(stored, config, parameters, tensors), strict=True)
    parts = (part for name, tensor in values
             for _, part in to_file(stored, architecture, name, tensor))
    with atomic_write(f"{folder}/model.safetensors") as f:
        write_safetensors(f, entries, parts, metadata)


def convert(saved, weights, overrides):
    """Fit the weights of a model with config `saved` to a config with the fields in `overrides`.

    Returns (GPT2Config, weights, [what changed, one line each]). Overrides may set what the weights
    leave open (dropout, flash, a shorter block_size, a window) and change the attention: gqa
    averages the key and value heads of each group (arXiv 2305.13245, section 2.1), rope drops wpe.
    Raises ValueError for what the weights cannot follow.
    """
    overrides = {name: value for name, value in overrides.items() if value is not None}
    check_overrides(saved, overrides)
    if overrides.get("sliding_window") is False:
        overrides["window_size"] = None
    if saved.sliding_window and "block_size" in overrides:
        overrides.setdefault("window_size", min(saved.window_size, overrides["block_size"]))
    config = replace(saved, **overrides)
    if config.block_size > saved.block_size and not config.rope:
        raise ValueError(f"block_size={config.block_size} exceeds the checkpoint's "
                         f"{saved.block_size} positions")
    weights = dict(weights)
    changes = []
    convert_positions(saved, config, weights, changes)
    convert_heads(saved, config, weights, changes)
    note_window(saved, config, changes)
    return config, weights, changes


# What `convert` can change; it refuses any other field.
CONVERTIBLE = {"block_size", "dropout", "flash", "rope", "rope_theta", "gqa", "n_kv_head",
               "sliding_window", "window_size"}


def check_overrides(saved, overrides):
    """Raise ValueError for an override that the weights of a model with config `saved` rule out."""
    fixed = SHAPE_FIELDS - CONVERTIBLE
    if saved.rope:
        fixed = fixed | {"rope_theta"}
    for name in sorted(fixed & overrides.keys()):
        value = getattr(saved, name)
        if overrides[name] != value:
            raise ValueError(f"{name}={overrides[name]} contradicts the checkpoint, which has "
                             f"{name}={value}")
    for name in ("rope", "gqa"):
        if getattr(saved, name) and overrides.get(name) is False:
            raise ValueError(f"the checkpoint was trained with {name}, which cannot be removed")


def convert_positions(saved, config, weights, changes):
    """Convert the weights in place, and append to `changes` what changed."""
    if config.rope and not saved.rope:
        del weights["transformer.wpe.weight"]
        changes.append("rope: the learned positions (wpe) are dropped; fine-tune the model to "
                       "recover its quality")
    if config.rope and config.block_size != saved.block_size:
        changes.append(f"block_size: texts of up to {config.block_size} tokens; the weights were "
                       f"trained on texts of {saved.block_size}")
    elif config.block_size < saved.block_size:
        wpe = weights["transformer.wpe.weight"]
        weights["transformer.wpe.weight"] = wpe[:config.block_size]
        changes.append(f"block_size: the first {config.block_size} of {saved.block_size} positions "
                       "are kept")


def convert_heads(saved, config, weights, changes):
    """Convert the weights in place, and append to `changes` what changed."""
    if config.kv_heads == saved.kv_heads:
        return
    if saved.kv_heads % config.kv_heads:
        raise ValueError(f"n_kv_head={config.kv_heads} does not divide the checkpoint's "
                         f"{saved.kv_heads}")
    for name in weights:
        if "c_attn" in name:
            q, k, v = weights[name].split(saved.qkv_sizes)
            weights[name] = torch.cat((q, average_heads(k, config), average_heads(v, config)))
    changes.append(f"gqa: {saved.kv_heads} key/value heads are averaged to {config.kv_heads}; "
                   "fine-tune the model to recover its quality")


def average_heads(x, config):
    """The rows of config's key or value heads, each the mean of a group of those in x."""
    heads = x.unflatten(0, (config.kv_heads, -1, config.head_dim))
    return heads.double().mean(dim=1).flatten(0, 1).float()      # float64: equal heads stay exact


def note_window(saved, config, changes):
    """Append to `changes` how the window changed. The weights are the same with any window."""
    limit = math.inf if config.rope else config.block_size
    before = min(saved.window_size or limit, limit)
    after = min(config.window_size or limit, limit)
    if after < before:
        changes.append("sliding_window: the weights are used as they are, with a window of "
                       f"{after}; fine-tune the model to recover its quality")
    elif saved.sliding_window and after > before:
        change = "widened" if config.sliding_window else "removed"
        changes.append(f"sliding_window: {change}; the weights were trained with a window of "
                       f"{before}; fine-tune the model to recover its quality")


@contextlib.contextmanager
def atomic_write(path):
    """Open path.part for writing bytes. At the end it is flushed to the disk and renamed to `path`;
    after an error it is removed, and a file that was at `path` is untouched."""
    part = f"{path}.part"
    try:
        with open(part, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(part)
        raise


def write_safetensors(f, entries, tensors, metadata=None):
    """Write the safetensors format: 8 bytes with the length N of the header, N bytes of JSON
    {name: {dtype, shape, data_offsets}}, then the numbers of all tensors without a gap.

    entries: {name: (dtype, shape)}. tensors: the values in the same order; an iterator keeps one of
    them in memory at a time. metadata: {text: text}.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, (dtype, shape) in entries.items():
        end = offset + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                              # aligns the numbers
    f.write(len(text).to_bytes(8, "little") + text)
    for (dtype, shape), tensor in zip(entries.values(), tensors, strict=True):
        tensor = tensor.detach().to("cpu", dtype).contiguous()
        if list(tensor.shape) != list(shape):
            raise ValueError(f"a tensor has shape {tuple(tensor.shape)}, not {tuple(shape)}")
        f.write(tensor.flatten().view(torch.uint8).numpy().data)


def read_safetensors(path):
    """-> ({name: tensor}, {metadata}). The tensors are mapped from the file, copy-on-write. Raises
    ValueError for a damaged file: nothing in it is executed, and no size that it claims is used."""
    with open(path, "rb") as f:
        try:
            header, start = read_header(f)
            metadata = header.pop("__metadata__", {})
            if not isinstance(metadata, dict) or not all(type(v) is str for v in metadata.values()):
                raise ValueError("its __metadata__ is damaged: it must map text to text")
            mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
            return map_tensors(header, mapped, start), metadata
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def read_header(f):
    """-> (the header of a safetensors file as a dict, the position of the first tensor)"""
    size = os.fstat(f.fileno()).st_size
    start = f.read(8)
    brace = f.read(1)
    length = int.from_bytes(start, "little")
    if len(start) < 8:
        raise ValueError(f"is truncated: {size} bytes")
    if brace != b"{" and start.startswith((b"PK", b"\x80")):
        raise ValueError("is a pickle, which could run code, so it is not read")
    if brace != b"{" or not 0 < length <= min(size - 8, 100_000_000):
        raise ValueError(f"is damaged or truncated: its header claims {length:,} bytes, the file "
                         f"has {size:,}")
    try:
        return json.loads(brace + f.read(length - 1)), 8 + length
    except (ValueError, RecursionError):
        raise ValueError("is damaged: its header is not JSON") from None


def map_tensors(header, mapped, start):
    """-> {name: tensor} of the entries in a safetensors header. `mapped`: the file's bytes."""
    end = start
    tensors = {}
    for name, entry in header.items():
        if not is_entry(entry):
            raise ValueError(f"{name!r:.80} has a wrong dtype, shape or data_offsets")
    for name in sorted(header, key=lambda name: header[name]["data_offsets"]):
        shape = header[name]["shape"]
        begin, after = (start + offset for offset in header[name]["data_offsets"])
        if begin != end:
            raise ValueError(f"{name!r:.80} begins at byte {begin}, the one before ends at {end}")
        if not begin <= after <= len(mapped):
            raise ValueError(f"{name!r:.80} reaches beyond the end of the file: it is truncated")
        end = after
        if name.endswith(MASKS):                                 # bytes or booleans in old files
            continue
        dtype = DTYPES.get(header[name]["dtype"])
        if dtype is None:
            raise ValueError(f"{name!r:.80} has dtype {header[name]['dtype']!r:.20}; known are "
                             f"{', '.join(DTYPES)}")
        count = math.prod(shape)
        if count * dtype.itemsize != end - begin:
            raise ValueError(f"{name!r:.80} has {end - begin} bytes for shape {str(shape):.80}")
        if count == 0:
            tensors[name] = torch.empty(shape, dtype=dtype)
        elif begin % dtype.itemsize:                             # unaligned numbers are copied
            tensors[name] = torch.frombuffer(bytearray(mapped[begin:end]), dtype=dtype).view(shape)
        else:
            flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=begin)
            tensors[name] = flat.view(shape)
    if end != len(mapped):
        raise ValueError(f"holds {len(mapped) - end} bytes that belong to no tensor")
    return tensors


def is_entry(entry):
    """Whether an entry of the header has the fields that it must have."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape = entry.get("shape")
    offsets = entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list):
        return False
    whole = all(type(n) is int and n >= 0 for n in shape + offsets)
    if not whole or len(offsets) != 2 or len(shape) > 8:
        return False
    return math.prod(max(n, 1) for n in shape) < 2**62           # as far as torch can count


# --------------------------------------------------------------------------------------------------
# Example use


def main():
    config = GPT2Config(block_size=64, vocab_size=1000, n_layer=2, n_head=4, n_embd=64)
    model = GPT2(config, seed=1337)
    generator = torch.Generator().manual_seed(1337)
    input_ids = torch.randint(config.vocab_size, (2, 16), generator=generator)
    logits, _ = model(input_ids)
    _, loss = model(input_ids[:, :-1], input_ids[:, 1:])
    continuation = model.generate(input_ids[:1], 8, temperature=0)[0, 16:]
    print(config)
    print(f"input_ids {tuple(input_ids.shape)} -> logits {tuple(logits.shape)}, "
          f"standard deviation {logits.std():.4f}")
    print(f"loss {loss:.4f} nats (uniform guess over {config.vocab_size} tokens: "
          f"{math.log(config.vocab_size):.4f})")
    print(f"greedy continuation: {continuation.tolist()}\n")
    print_costs()


def print_costs():
    """What each flag costs in the shape of GPT-2 124M."""
    variants = {"plain": GPT2Config(), "rope": GPT2Config(rope=True), "gqa": GPT2Config(gqa=True),
                "sliding_window": GPT2Config(sliding_window=True),
                "all three": GPT2Config(rope=True, gqa=True, sliding_window=True)}
    print("GPT-2 124M at 1024 tokens: parameters, key/value cache of one text in bfloat16\n"
          "(as on a GPU), FLOPs of a forward pass\n")
    print(f"{'':16}{'parameters':>13}{'cache, B/token':>16}{'cache, full':>13}{'MFLOPs/token':>14}")
    for name, config in variants.items():
        with torch.device("meta"):                               # shapes without numbers
            parameters = GPT2(config).num_parameters()
        full = config.cache_bytes(config.block_size, 2) / 1e6
        print(f"{name:16}{parameters:13,}{config.cache_bytes(1, 2):16,}{full:10.2f} MB"
              f"{config.flops_per_token() / 1e6:14.1f}")
    print(f"\ngqa: {variants['gqa'].n_kv_head} key/value heads for 12 query heads; "
          f"sliding_window: {variants['sliding_window'].window_size} tokens")


if __name__ == "__main__":
    if sys.argv[1:]:
        print(f"model.py: unknown argument {sys.argv[1]}: the example takes none", file=sys.stderr)
        sys.exit(2)
    main()
