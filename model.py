"""
GPT-2, from the attention formula up, in one file that needs only torch.

    python model.py                        # the example use

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
import pathlib
from dataclasses import asdict, dataclass, fields, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# --------------------------------------------------------------------------------------------------
# Configuration


@dataclass
class GPT2Config:
    """The shape of the model. The defaults are GPT-2 124M. The comment beside a field is the help
    text of its flag. Raises ValueError for values that are out of range or contradict each other.
    """
    block_size: int = 1024           # context length in tokens
    vocab_size: int = 50257          # number of different tokens
    n_layer: int = 12                # transformer blocks
    n_head: int = 12                 # attention heads
    n_embd: int = 768                # width of the model
    dropout: float = 0.0             # dropout: embeddings, attention, residuals
    bias: bool = True                # biases in every Linear and LayerNorm
    rope: bool = False               # rotary positions (arXiv 2104.09864) instead of learned ones
    rope_theta: float = 10000.0      # with rope: base of the rotary wavelengths
    gqa: bool = False                # grouped-query attention (arXiv 2305.13245)
    n_kv_head: int | None = None     # with gqa: key/value heads [the largest divisor of n_head up
                                     # to n_head / 3]
    sliding_window: bool = False     # a token sees only the last window_size tokens, with itself
                                     # (arXiv 2310.06825)
    window_size: int | None = None   # with sliding_window: tokens [block_size / 4]
    flash: bool = True               # torch's fused attention; False runs the written-out formula

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is float and type(value) is int:
                value = float(value)
            true_as_1 = type(value) is bool and f.type is not bool
            if not isinstance(value, f.type) or true_as_1:
                raise ValueError(f"{f.name}={value!r:.50} is not of type {f.type}")
            if type(value) is int and not 0 < value <= 2**24:
                raise ValueError(f"{f.name}={value} must be from 1 to 16,777,216")
        for switch, name in (("rope", "rope_theta"), ("gqa", "n_kv_head"),
                             ("sliding_window", "window_size")):
            value = getattr(self, name)
            if value != getattr(GPT2Config, name) and not getattr(self, switch):
                raise ValueError(f"{name}={value} has no effect without {switch}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        if self.rope and self.head_dim % 2:
            raise ValueError(f"rope rotates pairs: the head size n_embd / n_head = {self.head_dim} "
                             "must be even")
        if not 1 < self.rope_theta <= 1e12:
            raise ValueError(f"rope_theta={self.rope_theta} must be above 1 and at most 1e12")
        if self.gqa and self.n_kv_head is None:
            self.n_kv_head = next(n for n in range(max(1, self.n_head // 3), 0, -1)
                                  if self.n_head % n == 0)
        if self.gqa and self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}")
        if self.sliding_window and self.window_size is None:
            self.window_size = max(1, self.block_size // 4)
        if self.sliding_window and self.window_size > self.block_size:
            raise ValueError(f"window_size={self.window_size} is longer than "
                             f"block_size={self.block_size}")

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

    def window(self, layer):
        """How many tokens a token sees in a layer, itself included. None: all before it."""
        return self.window_size

    @property
    def endless(self):
        """Whether text has no length limit: rope has no last position, and every layer keeps only a
        window."""
        return self.rope and all(map(self.window, range(self.n_layer)))

    def flops_per_token(self):
        """Floating point operations of a forward pass per token, averaged over a sequence of
        block_size tokens: 2 for each weight of a matrix and 4 C per layer for each key that a token
        sees. Training costs 3 times as many. (Kaplan et al. 2020, arXiv 2001.08361, table 1, but
        only keys that the mask lets through are counted.)"""
        T = self.block_size
        C = self.n_embd
        block = C * sum(self.qkv_sizes) + C * C + 8 * C * C      # c_attn, c_proj, feed-forward
        flops = 2 * (self.n_layer * block + self.vocab_size * C)
        for layer in range(self.n_layer):
            W = self.window(layer) or T
            keys = (W * (W + 1) / 2 + (T - W) * W) / T           # mean over i of min(i + 1, W)
            flops += 4 * C * keys
        return flops


SIZES = {                                        # of OpenAI's models, all with block_size=1024
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600)}


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
    """The keys and values that one layer has seen. For decoding, without gradients.

    Without a window they are kept in (..., K, size, D), allocated once. With a window only the last
    `window` are kept, which is enough for a text of any length.
    """

    def __init__(self, size, window=None):
        self.size = size
        self.window = window
        self.seen = 0                                            # tokens so far
        self.k = None
        self.v = None

    def extend(self, k, v):
        """Add k and v (..., K, T, D). Returns the keys and values that the new tokens may attend
        to, (..., K, S, D), oldest first."""
        start = self.seen
        self.seen += k.size(-2)
        if self.window is not None:
            return self.slide(k, v)
        if self.seen > self.size:
            raise ValueError(f"{self.seen} tokens do not fit a key/value cache of {self.size}")
        if start == 0:
            self.k = k.new_empty(*k.shape[:-2], self.size, k.size(-1))
            self.v = torch.empty_like(self.k)
        self.k[..., start:self.seen, :] = k
        self.v[..., start:self.seen, :] = v
        return self.k[..., :self.seen, :], self.v[..., :self.seen, :]

    def slide(self, k, v):
        """Drop what leaves the window. The first new token sees window - 1 older ones."""
        needed = k.size(-2) + self.window - 1
        if self.k is not None:
            k = torch.cat((self.k, k), dim=-2)[..., -needed:, :]
            v = torch.cat((self.v, v), dim=-2)[..., -needed:, :]
        self.k = k[..., -self.window:, :]
        self.v = v[..., -self.window:, :]
        return k, v


class AttentionHead(nn.Module):
    """Attention without weights: rotate q and k, read and extend the cache, mask, attend.

    It broadcasts over leading dimensions: one head (B, T, D) and all heads at once (B, H, T, D) run
    the same code.
    """

    def __init__(self, config, layer=0):
        super().__init__()
        self.window = config.window(layer)
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
        if causal and T > 1:                                     # a single query sees all keys
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

    def __init__(self, config, layer=0):
        super().__init__()
        C = config.n_embd
        self.sizes = config.qkv_sizes
        self.head_dim = config.head_dim
        self.c_attn = Linear(C, sum(self.sizes), bias=config.bias)
        self.c_proj = Linear(C, C, bias=config.bias)
        self.head = AttentionHead(config, layer)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, rotary=None, cache=None):
        qkv = self.c_attn(x)                                     # (B, T, C + 2·K·D)
        dtype = qkv.dtype
        if qkv.is_cpu and dtype.itemsize == 2:
            qkv = qkv.float()            # torch's attention on a CPU is slow in half precision
        q, k, v = (self.split_heads(part) for part in qkv.split(self.sizes, dim=-1))
        y = self.head(q, k, v, rotary, cache)                    # (B, H, T, D)
        y = y.transpose(1, 2).flatten(2).to(dtype)               # (B, T, C)
        return self.resid_dropout(self.c_proj(y))

    def split_heads(self, x):
        """(B, T, H·D) -> (B, H, T, D)"""
        x = x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return x.contiguous() if x.device.type == "mps" else x   # wrong there else (issue 181133)


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
    """Pre-norm attention and feed-forward, each added to the residual stream. `layer` counts the
    blocks from 0, for changes that differ by layer."""

    def __init__(self, config, layer=0):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.attn = MultiHeadAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.mlp = PointwiseFeedForward(config)

    def forward(self, x, rotary=None, cache=None):
        x = x + self.attn(self.ln_1(x), rotary, cache)
        return x + self.mlp(self.ln_2(x))


# --------------------------------------------------------------------------------------------------
# The model


class GPT2(nn.Module):
    """Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".

    Parameters have Hugging Face's names. The output projection is the token embedding itself
    (tied), so there is no lm_head.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.cross_entropy = linear_cross_entropy                # train.py may compile it
        self.grad_checkpoint = False     # recompute blocks in backward: less memory, a third slower
        self.changes = []                # what from_pretrained changed in the weights
        embeddings = dict(wte=empty_embedding(config.vocab_size, config.n_embd))
        if not config.rope:
            embeddings["wpe"] = empty_embedding(config.block_size, config.n_embd)
        blocks = [TransformerBlock(config, layer) for layer in range(config.n_layer)]
        self.transformer = nn.ModuleDict(dict(
            **embeddings,
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(blocks),
            ln_f=nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias),
        ))
        if not self.device.type == "meta":
            self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's initialisation (section 2.3): matrices are normal with standard deviation 0.02,
        or 0.02/√(2·n_layer) where a projection adds to the residual stream. Biases are 0. Other
        vectors keep what their module gave them: the weights of a norm are 1."""
        for name, p in self.named_parameters():
            if p.dim() > 1:
                std = 0.02
                if name.endswith("c_proj.weight"):
                    std /= math.sqrt(2 * self.config.n_layer)
                p.normal_(0, std)
            elif name.endswith("bias"):
                p.zero_()

    @property
    def device(self):
        return self.transformer.wte.weight.device

    def num_parameters(self):
        return sum(p.numel() for p in self.parameters())

    def forward(self, idx, targets=None, cache=None, last=False):
        """idx (B, T) token ids -> (logits (B, T, V), None), or with last=True (logits (B, V) of the
        last position, None). With targets (B, T), -1 where not counted -> (None, mean cross-entropy
        in nats). There are no logits then: they would be the largest tensor of a training step.

        cache: from new_cache; idx then continues the text that the cache has seen. The ids of one
        text may also be a list or an array. Raises ValueError for a text longer than block_size,
        unless `rope` is on.
        """
        x = self.hidden(token_ids(idx, self.device), cache)
        wte = self.transformer.wte.weight
        if targets is not None:
            targets = token_ids(targets, self.device)
            return None, self.cross_entropy(x.flatten(0, 1), wte, targets.flatten())
        if last:
            x = x[:, -1]
        return linear(x, wte), None

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
        x = x.to(compute_dtype(x))                               # the residual stream has it
        for i, block in enumerate(self.transformer.h):
            if cache:
                x = block(x, rotary, cache[i])
            elif self.grad_checkpoint and self.training:
                x = checkpoint(block, x, rotary, use_reentrant=False)
            else:
                x = block(x, rotary)
        return self.transformer.ln_f(x)

    def new_cache(self):
        """An empty key/value cache for block_size tokens, or with a window for any number: one
        KVCache a layer."""
        size = self.config.block_size
        return [KVCache(size, block.attn.head.window) for block in self.transformer.h]

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None,
                 use_cache=True, generator=None, stop_token=None):
        """idx (B, T) -> (B, T + max_new_tokens). The arguments are those of `stream`. A text that
        has reached stop_token is padded with it."""
        idx = token_ids(idx, self.device)
        length = idx.size(1) + max_new_tokens
        written = self.stream(idx, max_new_tokens, temperature, top_k, top_p, use_cache, generator,
                              stop_token)
        text = torch.cat([idx, *(token[:, None] for token in written)], dim=1)
        return F.pad(text, (0, length - text.size(1)), value=stop_token or 0)

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None,
               use_cache=True, generator=None, stop_token=None):
        """Yield the next token of each text, (B,), max_new_tokens times, or until all texts have
        reached `stop_token`.

        temperature: 0 takes the most likely token. top_k: only the k most likely tokens. top_p:
        only the most likely tokens that together reach this probability (nucleus sampling,
        arXiv 1904.09751). use_cache: keep keys and values; without it the same tokens take longer.
        generator: a torch.Generator on the model's device. Raises ValueError for other values.

        With rope and sliding_window a text has no length limit. Otherwise, when it reaches
        block_size, the model continues from its last block_size/2 tokens.
        """
        text = token_ids(idx, self.device)
        if text.size(1) == 0:
            raise ValueError("the text is empty: the model continues at least one token")
        if not temperature >= 0 or max_new_tokens < 0:
            raise ValueError(f"temperature={temperature} and max_new_tokens={max_new_tokens} must "
                             "be 0 or more")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p={top_p} must be above 0 and at most 1")
        config = self.config
        cache = None
        stopped = torch.zeros_like(text[:, 0], dtype=torch.bool)
        was_training = self.training
        self.eval()
        try:
            for _ in range(max_new_tokens):
                if text.size(1) > config.block_size and not config.endless:
                    text = text[:, -max(1, config.block_size // 2):]
                    cache = None
                unread = text
                if cache:
                    unread = text[:, -1:]
                elif use_cache:
                    cache = self.new_cache()
                logits, _ = self(unread, cache=cache, last=True)
                token = sample_token(logits, temperature, top_k, top_p, generator)
                if stop_token is not None:
                    token = token.masked_fill(stopped, stop_token)
                    stopped |= token == stop_token
                if cache and config.endless:
                    text = token[:, None]                        # the cache has seen the rest
                else:
                    text = torch.cat((text, token[:, None]), dim=1)
                yield token
                if stopped.all():
                    return
        finally:
            self.train(was_training)

    def save_pretrained(self, folder, tokenizer=None):
        """Write config.json, model.safetensors, and the files of the tokenizer, for from_pretrained
        and other tools. Raises ValueError if the folder holds another tokenizer."""
        os.makedirs(folder, exist_ok=True)
        write_pretrained(folder, self.config, self.state_dict(), tokenizer)

    @classmethod
    def from_pretrained(cls, name, **overrides):
        """Load a folder with a GPT-2, a model of the Hugging Face hub ("gpt2", "owner/name"), or
        nanoGPT's ckpt.pt; returns the model in evaluation mode. `overrides` are fields of
        GPT2Config (see `convert`), and `model.changes` lists what they changed, one line each.
        Raises ValueError for a damaged file or another model, OSError for a missing file."""
        config, weights, changes = read_pretrained(str(name))
        config, weights = convert(config, weights, overrides, changes)
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(weights, assign=True)
        model.changes = changes
        return model.requires_grad_().eval()                     # the weights came without


def empty_embedding(rows, width):
    """nn.Embedding without initial values. On the meta device drawing them takes a second, in which
    torch imports what it needs for it."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


def token_ids(ids, device):
    """Token ids as a tensor (B, T): such a tensor itself, or one text's ids in any form."""
    ids = torch.as_tensor(ids, device=device).long()
    return ids[None] if ids.dim() == 1 else ids


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """One token (B,) for each row of logits (B, V)."""
    if temperature < 1e-6:                                       # a division by it would overflow
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is None and top_p is None:
        return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]
    k = min(top_k or logits.size(-1), logits.size(-1))
    logits, ids = logits.topk(k)                                 # exactly k, even with ties
    probabilities = logits.softmax(dim=-1)
    if top_p is not None:
        more_likely = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(more_likely >= top_p, 0)
    choice = torch.multinomial(probabilities, 1, generator=generator)
    return ids.gather(-1, choice)[:, 0]


# --------------------------------------------------------------------------------------------------
# Device and precision, for train.py and sample.py: what to use, and why


def choose_device(name="auto"):
    """-> (torch.device, why). name: auto, cpu, mps, cuda or cuda:N. Raises ValueError for a device
    that is not there."""
    why = "as given"
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        name = found.type if found else "cpu"
        why = "found a GPU" if found else "found no GPU"
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError):                       # the second: torch without CUDA
        raise ValueError(f"device {name} was not found: use auto, cpu, cuda or mps") from None
    if name.startswith("cuda"):
        why += f", {torch.cuda.get_device_name(name)}"
    return torch.device(name), why


def choose_dtype(name, device):
    """-> (torch.dtype, why). name: auto, float32, bfloat16 or float16; else raises ValueError."""
    if name in ("float32", "bfloat16", "float16"):
        return getattr(torch, name), "as given"
    if name != "auto":
        raise ValueError(f"dtype {name} is not one of auto, float32, bfloat16, float16")
    if device.type != "cuda":
        return torch.float32, f"exact, on {device.type}"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "this GPU supports it"
    return torch.float16, "this GPU has no bfloat16"


def compute_dtype(x):
    """The dtype of products with x: autocast's where it is on, else that of x."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


# --------------------------------------------------------------------------------------------------
# Fast paths: each computes the line of torch that its docstring shows


def linear(x, weight, bias=None):
    """F.linear(x, weight, bias).

    For few vectors on a CPU, reading the weights takes all the time, and F.linear reads them with
    one core. bmm gives every core blocks of their rows.
    """
    N, K = weight.shape
    vectors = x.numel() // K
    if not x.is_cpu or x.dtype != torch.float32 or vectors > 32 or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    count = next(n for n in range(32, 0, -1) if N % n == 0)      # of blocks
    blocks = weight.view(count, -1, K).mT                        # (count, K, N / count)
    rows = x.reshape(1, vectors, K).expand(count, -1, -1)        # (count, vectors, K)
    y = torch.bmm(rows, blocks).transpose(0, 1).reshape(*x.shape[:-1], N)
    return y if bias is None else y + bias


def attend_in_groups(attend, q, k, v, mask=None):
    """attend(q, k.repeat_interleave(H // K, dim=1), v.repeat_interleave(H // K, dim=1), mask).

    No key is copied: the queries of a group become further positions of the head that they share.
    """
    T = q.size(-2)
    group = q.size(-3) // k.size(-3)
    q = q.unflatten(-3, (-1, group)).flatten(-3, -2)             # (B, K, H/K · T, D)
    if mask is not None:
        mask = torch.cat([mask] * group, dim=-2)
    y = attend(q, k, v, mask)
    return y.unflatten(-2, (group, T)).flatten(-4, -3)           # (B, H, T, D)


def attend_in_window(attend, q, k, v, window):
    """attend(q, k, v, visible(torch.arange(S)[-T:], torch.arange(S), window)), with S > window.

    Time and memory grow with T · W instead of T · S: the queries are cut, from the end, into blocks
    of W, and a block attends to its own W keys and the W before them. Padding on the left fills the
    first block. For T = S = 11 and W = 4 (#: the query sees the key):

              key - - - - - 0 1 2 3 4 5 6 7 8 9 10
        query -                                      padding, dropped at the end
              0             #
              1             # #
              2             # # #                    first block
              3             # # # #
              4               # # # #
              5                 # # # #
              6                   # # # #            second block: keys 0 to 6 and one of padding
              7                     # # # #
              8                       # # # #
              9                         # # # #
             10                           # # # #
    """
    T = q.size(-2)
    W = window
    count = math.ceil(T / W)                                     # of blocks
    pad_q = count * W - T
    pad_k = (count + 1) * W - k.size(-2)                         # negative: drops the oldest keys
    shape = q.shape[:-2]
    q = cut_into_blocks(F.pad(q, (0, 0, pad_q, 0)), W)           # (count, B·H, W, D)
    k = with_block_before(cut_into_blocks(F.pad(k, (0, 0, pad_k, 0)), W))     # (count, B·K, 2W, D)
    v = with_block_before(cut_into_blocks(F.pad(v, (0, 0, pad_k, 0)), W))
    positions = torch.arange((count + 1) * W, device=q.device)
    real_key = with_block_before((positions >= pad_k).view(-1, 1, W, 1)).mT   # (count, 1, 1, 2W)
    padding = (positions[:count * W] < pad_q).view(-1, 1, W, 1)
    mask = visible(positions[W:2 * W], positions[:2 * W], W)     # (W, 2W), in every block
    # Padding sees padding: a query without any key would give nan.
    y = attend(q, k, v, mask & real_key | padding)
    y = y.unflatten(1, shape).movedim(0, -3).flatten(-3, -2)     # (B, H, count·W, D)
    return y[..., pad_q:, :]


def cut_into_blocks(x, size):
    """(B, H, blocks · size, D) -> (blocks, B·H, size, D), and without heads likewise."""
    return x.unflatten(-2, (-1, size)).movedim(-3, 0).flatten(1, -3)


def with_block_before(x):
    """Each block but the first, with the block before it: (n + 1, ..., W, D) -> (n, ..., 2W, D)"""
    return torch.cat((x[:-1], x[1:]), dim=-2)


def linear_cross_entropy(x, weight, targets):
    """F.cross_entropy((x @ weight.t()).float(), targets, ignore_index=-1).

    x (N, C), weight (V, C), targets (N,) -> scalar, float32. The N x V logits would be the largest
    tensor of a training step. They are made a few rows at a time, and these rows' gradients are
    computed at once, so that nothing is kept or computed twice. There are no second derivatives.
    """
    return LinearCrossEntropy.apply(x, weight, targets, torch.is_grad_enabled())


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, keep_gradients):
        dtype = compute_dtype(x)
        x_half = x.to(dtype)
        weight_half = weight.to(dtype)
        loss = x.new_zeros((), dtype=torch.float32)
        count = (targets >= 0).sum().clamp(min=1)
        if keep_gradients:
            grad_x = torch.empty_like(x)
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        numbers = 2**27 if x.is_cuda else 2**26 // dtype.itemsize            # logits at a time
        rows = max(1, numbers // len(weight) // 128) * 128       # a multiple that GPUs like
        for at in range(0, len(x), rows):
            part = x_half[at:at + rows]
            counted = targets[at:at + rows] >= 0
            target = targets[at:at + rows].clamp(min=0)
            column = torch.arange(len(part), device=x.device)
            logits = (weight_half @ part.t()).float()            # (V, rows), faster than (rows, V)
            highest = logits.amax(dim=0)
            chosen = logits[target, column] - highest
            total = logits.sub_(highest).exp_().sum(dim=0)
            loss += (total.log() - chosen).masked_fill(~counted, 0).sum()
            if keep_gradients:                                   # softmax - one hot
                grad = logits.mul_(counted / total).to(dtype)
                grad[target, column] = ((chosen.exp() / total - 1) * counted).to(dtype)
                grad_x[at:at + rows] = grad.t() @ weight_half
                if dtype == torch.float32:
                    grad_weight.addmm_(grad, part)
                else:                                            # sum the chunks in float32
                    grad_weight += grad @ part
        if keep_gradients:
            ctx.save_for_backward(grad_x, grad_weight, count)
        return loss / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grad_x, grad_weight, count = ctx.saved_tensors
        scale = grad / count
        return grad_x.mul_(scale), grad_weight.mul_(scale), None, None     # in place to save memory


# --------------------------------------------------------------------------------------------------
# Checkpoint format: a Hugging Face folder with config.json and model.safetensors. Where
# transformers computes the same model, as its `gpt2` or with rope its `starcoder2`, it is saved as
# that, and every tool opens it. Any other is a `gpt2-variant`, which other tools refuse.

SOURCES = ("gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2, a model of the hub (owner/name), a "
           "folder with a checkpoint, or a ckpt.pt of nanoGPT")
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
MASKS = (".attn.bias", ".attn.masked_bias")      # constants among the weights of old GPT-2 files

# The fields of GPT2Config that transformers' GPT-2 can express: a dropped bias is a bias of 0, a
# shared key/value head is repeated. And those that its StarCoder2 can.
GPT2_FIELDS = {"block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "flash",
               "bias", "gqa", "n_kv_head"}
STARCODER2_FIELDS = GPT2_FIELDS | {"rope", "rope_theta", "sliding_window", "window_size"}
# Other software's names for GPT-2's GELU: the same within 2.4e-7.
TANH_GELUS = ("gelu_pytorch_tanh", "gelu_fast", "gelu_accurate", "gelu_python_tanh")
# GPT-2 stores four weights as (in, out). StarCoder2 has its own names for some.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
STARCODER2_NAMES = {"transformer.wte": "model.embed_tokens", "transformer.h.": "model.layers.",
                    "transformer.ln_f": "model.norm", "ln_1": "input_layernorm",
                    "ln_2": "post_attention_layernorm", "attn.c_attn": "self_attn.{}_proj",
                    "attn.c_proj": "self_attn.o_proj"}           # {}: q, k and v


def model_type(config):
    """The architecture as which a model is saved."""
    changed = {f.name for f in fields(config) if getattr(config, f.name) != f.default}
    if changed <= GPT2_FIELDS:
        return "gpt2"
    if config.rope and changed <= STARCODER2_FIELDS:
        return "starcoder2"
    return "gpt2-variant"


def stock_fields(config):
    """The fields of config.json from which transformers builds the same model."""
    kind = model_type(config)
    if kind == "starcoder2":
        return {"model_type": kind, "max_position_embeddings": config.block_size,
                "vocab_size": config.vocab_size, "num_hidden_layers": config.n_layer,
                "num_attention_heads": config.n_head, "num_key_value_heads": config.kv_heads,
                "hidden_size": config.n_embd, "intermediate_size": 4 * config.n_embd,
                "sliding_window": config.window_size, "rope_theta": config.rope_theta,
                "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
                "hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 1e-5, "use_bias": True,
                "tie_word_embeddings": True}
    return {"model_type": kind, "n_positions": config.block_size, "vocab_size": config.vocab_size,
            "n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd,
            "n_inner": None, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
            "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False, "tie_word_embeddings": True}


def config_to_json(config, end_of_text=None):
    """The content of config.json. Beside the fields of transformers, gpt2_flags has all of ours."""
    classes = {"gpt2": "GPT2LMHeadModel", "starcoder2": "Starcoder2ForCausalLM"}
    dropouts = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout)
    return {**stock_fields(config), "architectures": [classes.get(model_type(config), "GPT2")],
            **dropouts, "bos_token_id": end_of_text, "eos_token_id": end_of_text,
            "gpt2_flags": asdict(config)}


def config_from_json(saved):
    """The GPT2Config of a config.json, ours or that of a GPT-2. Raises ValueError for what this
    model does not compute, and for a flag that this version does not know."""
    flags = saved.get("gpt2_flags", {})
    names = {"n_positions": "block_size", "vocab_size": "vocab_size", "n_layer": "n_layer",
             "n_head": "n_head", "n_embd": "n_embd"}
    values = {ours: saved[theirs] for theirs, ours in names.items() if theirs in saved}
    for name in flags.keys() - {f.name for f in fields(GPT2Config)}:
        raise ValueError(f"this version does not know the flag {name!r:.50}: the model would "
                         "compute something else")
    config = GPT2Config(**{**values, **flags})
    saved = dict(saved)
    if saved.get("activation_function") in TANH_GELUS:
        saved["activation_function"] = "gelu_new"
    if saved.get("n_inner") == 4 * config.n_embd:
        saved["n_inner"] = None
    for name, computed in stock_fields(config).items():
        if saved.get(name, computed) != computed:
            raise ValueError(f"it says {name}={saved[name]!r:.80}; this model computes only "
                             f"{computed!r}")
    return config


def read_pretrained(name):
    """-> (GPT2Config, {parameter name: float32 tensor}, [what to know about them, one line each]).

    name: a folder, a model of the hub, or nanoGPT's ckpt.pt. Raises ValueError or OSError.
    """
    if not os.path.exists(name):
        from data.hub import local_path  # here, so that this file alone needs only torch
        name = local_path(name)
    if os.path.isfile(name):
        return read_nanogpt(name)
    path = f"{name}/config.json"
    if not os.path.exists(path) and os.path.exists(f"{name}/ckpt.pt"):
        raise FileNotFoundError(f"{path} not found. Name nanoGPT's checkpoint: {name}/ckpt.pt")
    with open(path, encoding="utf-8") as f, damage(path):
        config = config_from_json(json.load(f))
    tensors = {}
    for path in weight_files(name):
        with damage(path):
            more = read_safetensors(path)
            for twice in tensors.keys() & more.keys():
                raise ValueError(f"{twice!r:.80} is in another file of the model, too")
            tensors.update(more)
    return config, checked_weights(name, config, tensors), []


@contextlib.contextmanager
def damage(path):
    """Turn an error inside into a ValueError that names the file."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        if type(error).__name__ == "UnpicklingError":            # whose advice is to run the code
            reason = "it holds more than tensors and plain values, which could run code"
        raise ValueError(f"{path} is damaged, or another model: {reason:.300}") from error


def weight_files(folder):
    """The paths of the files with the weights: one, or several with an index."""
    index = f"{folder}/model.safetensors.index.json"
    if os.path.exists(f"{folder}/model.safetensors") or not os.path.exists(index):
        return [f"{folder}/model.safetensors"]
    with open(index, encoding="utf-8") as f, damage(index):
        names = sorted(set(json.load(f)["weight_map"].values()))
        return [os.path.join(folder, os.path.basename(name)) for name in names]


def read_nanogpt(path):
    """`read_pretrained` of a checkpoint that nanoGPT wrote: a pickle, of which torch loads nothing
    but tensors and plain values, so that no code in it runs."""
    with damage(path):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        config = GPT2Config(**saved["model_args"])
        tensors = {name.removeprefix("_orig_mod."): t for name, t in saved["model"].items()}
        tensors = add_biases(tensors)
        for name in tensors:
            if name.endswith(TRANSPOSED):
                tensors[name] = tensors[name].t()
    weights = checked_weights(path, config, tensors)
    return config, weights, ["gelu: nanoGPT computes the exact one, this model GPT-2's tanh "
                             "approximation; OpenAI's logits differ by 3e-3"]


def file_names(kind, name):
    """The names under which an architecture stores a parameter."""
    if kind == "starcoder2":
        for ours, theirs in STARCODER2_NAMES.items():
            name = name.replace(ours, theirs)
        if "{}" in name:
            return [name.format(letter) for letter in "qkv"]
    return [name]


def to_file(config, weights):
    """{parameter name: tensor} -> {name: tensor} as the model's architecture stores them."""
    kind = model_type(config)
    if kind != "gpt2-variant":
        weights = add_biases(weights)
    stored = {}
    for name, tensor in weights.items():
        if "c_attn" in name and config.gqa and kind == "gpt2":
            tensor = repeat_heads(config, tensor)
        if name.endswith(TRANSPOSED) and kind != "starcoder2":
            tensor = tensor.t()
        names = file_names(kind, name)
        parts = tensor.split(config.qkv_sizes) if len(names) == 3 else [tensor]
        stored.update(zip(names, parts, strict=True))
    return stored


def add_biases(weights):
    """`weights` with zeros for the biases that a model with bias=False leaves out."""
    complete = {}
    for name, tensor in weights.items():
        complete[name] = tensor
        bias = name.replace(".weight", ".bias")
        embedding = ".wte." in name or ".wpe." in name or name == "lm_head.weight"
        if bias not in weights and not embedding:
            complete[bias] = tensor.new_zeros(tensor.size(0))
    return complete


def repeat_heads(config, tensor):
    """c_attn's rows with each key/value head as often as query heads share it."""
    q, k, v = tensor.split(config.qkv_sizes)
    heads = torch.cat((k, v)).unflatten(0, (-1, config.head_dim))
    group = config.n_head // config.kv_heads
    return torch.cat((q, heads.repeat_interleave(group, dim=0).flatten(0, 1)))


def average_heads(config, tensor):
    """c_attn's rows with config's key/value heads, each the mean of a group of those in `tensor`.
    In float64, so that the mean of equal heads is exact."""
    q = tensor[:config.n_embd]
    heads = tensor[config.n_embd:].unflatten(0, (2 * config.kv_heads, -1, config.head_dim))
    return torch.cat((q, heads.double().mean(dim=1).flatten(0, 1).float()))


def checked_weights(path, config, tensors):
    """The weights of a model with this config, from the tensors of a file. Raises ValueError with
    its path if they do not fit."""
    with damage(path):
        if config.n_layer > len(tensors):                        # to build so many would take hours
            raise ValueError(f"the config asks for {config.n_layer} layers, but there are "
                             f"{len(tensors)} tensors")
    with torch.device("meta"):                                   # outside: a bug shows its place
        model = GPT2(config)
    with damage(path):
        return from_file(model, tensors)


def from_file(model, tensors):
    """The inverse of to_file, for a model on the meta device. Raises ValueError if the tensors are
    not those of such a model."""
    config = model.config
    kind = model_type(config)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(MASKS)}
    head = tensors.pop("lm_head.weight", None)
    if kind != "starcoder2":             # OpenAI's own files leave out the first part of the names
        named = {f"transformer.{name.removeprefix('transformer.')}": tensor
                 for name, tensor in tensors.items()}
        if len(named) < len(tensors):
            raise ValueError("a tensor is there with and without transformer. before its name")
        tensors = named
    wanted = to_file(config, dict(model.named_parameters()))
    for name in sorted(wanted.keys() ^ tensors.keys()):
        raise ValueError(f"{name!r:.80} is {'missing' if name in wanted else 'unknown'}")
    if head is not None and not torch.equal(head, tensors[next(iter(wanted))]):
        raise ValueError("lm_head.weight differs from the token embedding; here they are the same")
    weights = {}
    for name, _ in model.named_parameters():
        tensor = torch.cat([tensors[part].float() for part in file_names(kind, name)])
        if name.endswith(TRANSPOSED) and kind != "starcoder2":
            tensor = tensor.t().contiguous()
        if "c_attn" in name and config.gqa and kind == "gpt2":
            tensor = average_heads(config, tensor)
        weights[name] = tensor
    model.load_state_dict(weights, assign=True)                  # checks the shapes
    for name, tensor in to_file(config, weights).items():        # are the others copies and zeros?
        if not torch.equal(tensor, tensors[name].float()):
            raise ValueError(f"{name} contradicts gpt2_flags: other software has trained this "
                             "model. Delete gpt2_flags from config.json to open it without them")
    return weights


def write_pretrained(folder, config, weights, tokenizer=None):
    """Write the folder that read_pretrained reads: the files of the tokenizer, config.json, and
    last the weights as float32, which make it complete. Raises ValueError rather than mix two
    tokenizers."""
    end_of_text = 50256 if config.vocab_size > 50256 else None
    files = {}
    if tokenizer is not None:
        end_of_text = tokenizer.end_of_text
        files = tokenizer.files()
        meta = pathlib.Path(folder, "meta.json")
        foreign = [name for name in ("tokenizer.json", "vocab.json")
                   if os.path.exists(f"{folder}/{name}")]
        if meta.exists():
            foreign = json.loads(meta.read_bytes()) != tokenizer.to_json()
        if foreign:
            raise ValueError(f"{folder} has the files of another tokenizer, or of other software: "
                             "save to another folder")
    files["config.json"] = json.dumps(config_to_json(config, end_of_text), indent=2).encode()
    for name, content in files.items():
        with atomic_write(f"{folder}/{name}") as f:
            f.write(content)
    write_safetensors(f"{folder}/model.safetensors", to_file(config, weights))


# Fields that the weights fix: `convert` can change the others.
FIXED = {"vocab_size", "n_layer", "n_head", "n_embd", "bias"}


def convert(saved, weights, overrides, changes):
    """Fit the weights of a model with config `saved` to a config with the fields in `overrides`.
    Returns (GPT2Config, weights), and appends to `changes` what changed, one line each.

    Overrides may set what the weights leave open (dropout, flash, a shorter block_size, a window)
    and change the attention: gqa averages the key and value heads of each group (arXiv 2305.13245,
    section 2.1), rope drops wpe. Raises ValueError for what the weights cannot follow.
    """
    for name, value in overrides.items():
        before = getattr(saved, name)
        fixed = name in FIXED or name == "rope_theta" and saved.rope
        removed = name in ("rope", "gqa") and before and not value
        if removed or fixed and value != before:
            raise ValueError(f"{name}={value} contradicts the model, which has {name}={before}")
    overrides = dict(overrides)
    if overrides.get("sliding_window") is False:
        overrides["window_size"] = None
    if saved.sliding_window and "block_size" in overrides:
        overrides.setdefault("window_size", min(saved.window_size, overrides["block_size"]))
    config = replace(saved, **overrides)
    weights = dict(weights)
    convert_positions(saved, config, weights, changes)
    convert_heads(saved, config, weights, changes)
    limit = math.inf if config.rope else config.block_size
    before = min(saved.window_size or limit, limit)
    after = min(config.window_size or limit, limit)
    if before != after:
        changes.append(f"sliding_window: the weights were trained with a window of {before}, now "
                       f"{after}; fine-tune the model to recover its quality")
    return config, weights


def convert_positions(saved, config, weights, changes):
    """Convert the weights in place, and append to `changes` what changed."""
    if config.block_size > saved.block_size and not config.rope:
        raise ValueError(f"block_size={config.block_size} exceeds the checkpoint's "
                         f"{saved.block_size} positions")
    if config.rope and not saved.rope:
        del weights["transformer.wpe.weight"]
        changes.append("rope: the learned positions (wpe) are dropped; fine-tune the model to "
                       "recover its quality")
    if config.block_size == saved.block_size:
        return
    if config.rope:
        changes.append(f"block_size: texts of up to {config.block_size} tokens; the weights were "
                       f"trained on texts of {saved.block_size}")
    else:
        wpe = weights["transformer.wpe.weight"]
        weights["transformer.wpe.weight"] = wpe[:config.block_size].clone()
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
            weights[name] = average_heads(config, weights[name])
    changes.append(f"gqa: {saved.kv_heads} key/value heads are averaged to {config.kv_heads}; "
                   "fine-tune the model to recover its quality")


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


def write_safetensors(path, tensors):
    """Write {name: tensor} as float32 in the safetensors format: 8 bytes with the length N of the
    header, N bytes of JSON {name: {dtype, shape, data_offsets}}, then the numbers of all tensors
    without a gap."""
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin = end
        end += 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                              # aligns the numbers
    with atomic_write(path) as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            f.write(tensor.detach().cpu().float().contiguous().numpy().data)


def read_safetensors(path):
    """{name: tensor} of a safetensors file, without the masks of old GPT-2 files. Raises ValueError
    for a damaged one: nothing in it is executed, and no size that it claims is believed."""
    with open(path, "rb") as f:
        mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    if mapped[:2] in (b"PK", b"\x80\x02"):
        raise ValueError("it is a pickle, which could run code, so it is not read. Convert it with "
                         "transformers' save_pretrained")
    start = 8 + int.from_bytes(mapped[:8], "little")
    header = json.loads(mapped[8:start])
    header.pop("__metadata__", None)
    begins = sorted(entry["data_offsets"][0] for entry in header.values())
    ends = sorted(entry["data_offsets"][1] for entry in header.values())
    if [*begins, len(mapped) - start] != [0, *ends]:
        raise ValueError("its tensors do not lie side by side up to the end of the file")
    tensors = {}
    for name, entry in header.items():
        if name.endswith(MASKS):
            continue
        begin, end = entry["data_offsets"]
        if entry["dtype"] not in FLOATS:
            raise ValueError(f"{name!r:.80} has dtype {entry['dtype']!r:.20}; weights are floats")
        numbers = bytearray(mapped[start + begin:start + end])
        tensors[name] = torch.frombuffer(numbers, dtype=FLOATS[entry["dtype"]]).view(entry["shape"])
    return tensors


# --------------------------------------------------------------------------------------------------
# Example use


def main():
    torch.manual_seed(1337)
    config = GPT2Config(block_size=64, vocab_size=1000, n_layer=2, n_head=4, n_embd=64)
    model = GPT2(config)
    input_ids = torch.randint(config.vocab_size, (2, 16))
    logits, _ = model(input_ids)
    _, loss = model(input_ids[:, :-1], input_ids[:, 1:])
    continuation = model.generate(input_ids[:1], 8, temperature=0)[0, 16:]
    print(config)
    print(f"input_ids {tuple(input_ids.shape)} -> logits {tuple(logits.shape)}, "
          f"standard deviation {logits.std():.4f}")
    print(f"loss {loss:.4f} nats (uniform guess over {config.vocab_size} tokens: "
          f"{math.log(config.vocab_size):.4f})")
    print(f"greedy continuation: {continuation.tolist()}")


if __name__ == "__main__":
    main()
