"""
Every promise of this project, tried on the CPU without the internet: python -m pytest (under a minute or two), and
python -m pytest -m slow for the long ones. A test's docstring names the bug that it would catch.
"""
import contextlib
import ctypes
import gzip
import hashlib
import http.server
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import string
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree
from collections import Counter
from dataclasses import fields, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DistributedSampler

import sample
import train
from data import prepare
from model import (
    GPT2,
    AttentionHead,
    GELULinear,
    GPT2Config,
    KVCache,
    Linear,
    LinearCrossEntropy,
    MultiHeadAttention,
    download,
    gelu,
    pick,
    read_pretrained,
    read_safetensors,
    rotary_tables,
    rotate,
    scaled_dot_product_attention,
    write_safetensors,
)

transformers = pytest.importorskip("transformers", reason="the tests compare with it: pip install transformers")
safetensors = pytest.importorskip("safetensors.torch", reason="the tests compare with it: pip install safetensors")
load_file, save_file = safetensors.load_file, safetensors.save_file
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

FLAGS = [f.name for f in fields(GPT2Config) if f.type is bool]
MATRIX = [dict(zip(FLAGS, values, strict=True)) for values in itertools.product((False, True), repeat=len(FLAGS))]
every_flag_setting = pytest.mark.parametrize("flags", MATRIX, ids=lambda flags: "+".join(k for k in flags if flags[k]))


def small_config(**fields):
    windowed = dict(window_size=4) if fields.get("sliding_window") else {}
    return GPT2Config(**dict(block_size=16, vocab_size=61, n_layer=2, n_head=6, n_embd=48) | windowed | fields)


@torch.no_grad()
def loud(model, scale, seed=0):
    """Weights scaled up and biases that are not 0, so that nothing about them can go wrong unseen."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.mul_(scale) if p.dim() > 1 else p.add_(torch.empty_like(p).normal_(0, 0.1, generator=generator))
    return model.eval()


def small_model(**fields):
    return loud(GPT2(small_config(**fields), seed=0), 12)


def tokens(*shape, vocab_size=61, seed=0):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def assert_close(a, b, tolerance):
    assert a.shape == b.shape and (difference := (a - b).abs().max()) <= tolerance, f"off by {difference:.2e}"


# ---------------------------------------------------------------------------------------------------------------------
# Model


@every_flag_setting
def test_config_comes_back_from_json(flags):
    """A field that is not saved, or not read: the checkpoint of a variant would come back as another model."""
    config = small_config(dropout=0.1, **flags, **(dict(rope_theta=500.0) if flags["rope"] else {}))
    assert GPT2Config.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("wrong, words", [
    (dict(n_layer=0), "n_layer=0 1"), (dict(block_size=1.5), "block_size=1.5 whole"),
    (dict(n_head=True), "n_head=True whole"), (dict(n_embd="48"), "n_embd='48' whole"),
    (dict(vocab_size=2**40), "vocab_size=1099511627776 16,777,216"), (dict(dropout=math.nan), "dropout=nan"),
    (dict(dropout=1.0), "dropout=1.0 below 1"), (dict(dropout=-0.1), "dropout=-0.1 0"),
    (dict(bias=1), "bias=1 True or False"), (dict(n_embd=50), "n_embd=50 n_head=6 n_embd=48"),
    (dict(rope_theta=5.0), "rope_theta=5.0 --rope"), (dict(rope=True, rope_theta=1), "rope_theta=1 above 1"),
    (dict(rope=True, rope_theta=math.inf), "rope_theta=inf"), (dict(rope=True, n_embd=42), "7 even n_embd=48"),
    (dict(n_kv_head=2), "n_kv_head=2 --gqa"), (dict(gqa=True, n_kv_head=4), "n_head=6 n_kv_head=4 [1, 2, 3, 6]"),
    (dict(gqa=True, n_kv_head=0), "n_kv_head=0"), (dict(window_size=4), "window_size=4 --sliding_window"),
    (dict(sliding_window=True, window_size=0), "window_size=0"),
    (dict(sliding_window=True, window_size=17), "window_size=17 block_size=16"),
], ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_contradictions_are_refused(wrong, words):
    """A wrong value that is accepted, corrected in silence, or refused without value, limit and cure."""
    with pytest.raises(ValueError) as e:
        small_config(**wrong)
    for word in words.split():
        assert word in str(e.value), f"{word} is not in: {e.value}"


def test_defaults_of_the_flags():
    """A flag alone that fails, or picks a number of heads or a window nobody would expect."""
    assert GPT2Config(gqa=True).n_kv_head == 4 and GPT2Config(sliding_window=True).window_size == 256
    assert [GPT2Config(n_head=h, n_embd=8 * h, gqa=True).n_kv_head for h in (1, 2, 7, 16, 25)] == [1, 1, 1, 4, 5]


def test_sizes_and_costs_by_hand():
    """A parameter, a FLOP or a cache byte that is forgotten or counted twice (the tied embedding, grouped heads)."""
    with torch.device("meta"):
        assert GPT2(GPT2Config()).num_parameters() == 124_439_808
        assert GPT2(GPT2Config(n_layer=24, n_head=16, n_embd=1024)).num_parameters() == 354_823_168
    plain = GPT2Config(block_size=8, vocab_size=10, n_layer=3, n_head=4, n_embd=16)
    variant = replace(plain, gqa=True, n_kv_head=2, sliding_window=True, window_size=4)
    # a layer: 16·16 for each of q, k, v and out, 16·64 twice; the logits 16·10; keys seen on average (1 + ... + 8) / 8
    assert plain.flops_per_token() == 2 * (3 * (4 * 256 + 2 * 1024) + 160) + 3 * 4 * 16 * 4.5
    # k and v are 16·8 now; keys seen: 1, 2, 3 and then 4 five times
    assert variant.flops_per_token() == 2 * (3 * (2 * 256 + 2 * 128 + 2 * 1024) + 160) + 3 * 4 * 16 * 26 / 8
    assert plain.cache_bytes(8, 2) == 3 * 2 * 16 * 8 * 2 and variant.cache_bytes(8, 2) == 3 * 2 * 8 * 4 * 2


def test_initialisation():
    """A group of weights with the wrong spread, residual projections not scaled down, or a seed that is not used."""
    model = GPT2(GPT2Config(block_size=64, vocab_size=256, n_layer=3, n_head=4, n_embd=128), seed=5)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == (1 if "ln_" in name and "weight" in name else 0)).all(), name
        else:
            assert p.std().item() == pytest.approx(0.02 / (math.sqrt(6) if "c_proj" in name else 1), rel=0.03), name
            assert abs(p.mean()) < 5e-4
    same, other, unseeded = (GPT2(model.config, seed=seed).transformer.wpe.weight for seed in (5, 6, None))
    assert torch.equal(model.transformer.wpe.weight, same) and not torch.equal(same, other)
    assert not torch.equal(unseeded, GPT2(model.config).transformer.wpe.weight)


def test_loss_is_the_mean_over_counted_targets():
    """Targets that are shifted once too often, or ignored ones that count in the mean."""
    model, idx, targets = small_model(), tokens(2, 9), tokens(2, 9, seed=1)
    targets[0, :4] = -1
    logits, no_loss = model(idx)
    no_logits, loss = model(idx, targets)
    log_p = logits.log_softmax(-1)
    by_hand = -sum(log_p[b, t, targets[b, t]] for b in range(2) for t in range(9) if targets[b, t] != -1) / 14
    assert no_loss is None and no_logits is None
    assert_close(loss, by_hand, 1e-5)
    with torch.no_grad():
        assert_close(model(idx, targets)[1], by_hand, 1e-5)


@pytest.mark.parametrize("dtype, rows, tolerance", [(torch.float32, 450, 1e-4), (torch.bfloat16, 50, 2e-2)])
def test_joined_loss_is_the_plain_loss(dtype, rows, tolerance):
    """A gradient that forgets rows, ignored targets, a scaled loss, or what lies beyond one chunk of 16M logits."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 4, generator=generator).to(dtype).requires_grad_() for n in (rows, 40_000))
    targets = torch.randint(-1, 40_000, (rows,), generator=generator)
    targets[::5] = -1
    expected = F.cross_entropy(x.double() @ w.double().t(), targets, ignore_index=-1).float()
    loss = LinearCrossEntropy.apply(x, w, targets, True)
    assert_close(loss, expected, tolerance)
    for a, b in zip(torch.autograd.grad(7 * loss, (x, w)), torch.autograd.grad(7 * expected, (x, w)), strict=True):
        assert_close(a.float(), b.float(), tolerance * b.abs().max().item())


@pytest.mark.parametrize("bias", [True, False])
def test_gelu_is_the_tanh_one(bias):
    """The exact GELU, or gradients that are off: against torch in float64, from the flat side to the straight one."""
    x = torch.linspace(-12, 12, 1002).view(2, 167, 3).requires_grad_()
    w = torch.randn(4, 3, requires_grad=True)
    b = torch.randn(4, requires_grad=True) if bias else None
    inputs = (x, w, b)[:2 + bias]
    got = GELULinear.apply(x, w, b)
    expected = F.linear(F.gelu(x.double(), approximate="tanh"), w.double(), b.double() if bias else None)
    assert_close(got, expected.float(), 3e-6 * expected.abs().max().item())
    weights = torch.randn(got.shape)
    for ours, theirs in zip(torch.autograd.grad(got, inputs, weights), torch.autograd.grad(expected, inputs, weights.double()),
                            strict=True):
        assert_close(ours, theirs, 3e-6 * theirs.abs().max().item())
    far = torch.tensor([-1e4, 0, 1e4])
    assert GELULinear.apply(far, torch.eye(3), None).tolist() == gelu(far).tolist() == [0, 0, 1e4]


@pytest.mark.parametrize("flash", [False, True])
def test_dropout_only_in_training(flash):
    """Dropout that is left on in evaluation, or missing after the embeddings, in the attention or on a branch."""
    model, idx = small_model(dropout=0.5, flash=flash), tokens(1, 8)
    places = [m for m in model.modules() if isinstance(m, (AttentionHead, torch.nn.Dropout))]
    assert len(places) == 1 + 2 * 3
    for place in places:                                                   # each by itself
        for other in places:
            setattr(other, "dropout" if isinstance(other, AttentionHead) else "p", 0.5 if other is place else 0.0)
        kept, (dropped, again) = model.eval()(idx)[0], (model.train()(idx)[0] for _ in range(2))
        assert torch.equal(kept, model.eval()(idx)[0]) and not torch.equal(dropped, again)


@every_flag_setting
def test_cache_changes_no_token(flags):
    """A cache that is one off, overwrites what is still seen, or turns keys twice; a text past block_size that is
    re-read from another place. Prompts shorter and longer than the window, greedy and sampled."""
    model, seen = small_model(**flags), set()
    for length, arguments in ((1, dict(temperature=0)), (6, dict(top_k=20, top_p=0.95)), (19, dict())):
        cached, uncached = (model.generate(tokens(2, length), 16, use_cache=use_cache, **arguments,
                                           generator=torch.Generator().manual_seed(1)) for use_cache in (True, False))
        assert torch.equal(cached, uncached)
        seen.update(cached[:, length:].flatten().tolist())
    assert len(seen) > 16                                                  # or the test would show nothing


@every_flag_setting
def test_a_text_may_be_read_in_chunks(flags):
    """A chunk that sees its own future, misses what came before, or pushes out keys that its first tokens still see."""
    model, idx = small_model(**flags), tokens(2, 16)
    whole = model(idx)[0]
    for chunks in ((16,), (1, 15), (3, 1, 5, 7), (5, 5, 1, 1, 4), (3, 9, 4)):
        cache = model.new_cache()
        pieces = [model(piece, cache=cache)[0] for piece in idx.split(chunks, dim=1)]
        assert_close(torch.cat(pieces, dim=1), whole, 1e-5)
        assert model(idx[:, :0], cache=cache)[0].shape == (2, 0, 61)


@every_flag_setting
def test_gradients_flow_through_a_cache(flags):
    """Keys that autograd keeps, written over by the next chunk."""
    model, idx, found = small_model(**flags), tokens(2, 16), []
    for pieces in idx.split(16, dim=1), idx.split((3, 9, 4), dim=1):
        cache = model.new_cache()
        out = torch.cat([model.hidden(piece, cache) for piece in pieces], dim=1)
        found += torch.autograd.grad(out[..., 0].sum(), model.transformer.h[0].attn.c_attn.weight)
    assert_close(found[0] / found[0].std(), found[1] / found[0].std(), 1e-3)


def bytes_held(cache):
    return sum(x.untyped_storage().nbytes() for layer in cache for x in (layer.k, layer.v))


@every_flag_setting
def test_bytes_in_the_cache(flags):
    """A cache that holds all query heads, more than the window, or other than config.cache_bytes and the table say."""
    model = small_model(**flags)
    for length in (4, 7, 16):
        model(tokens(1, length), cache=(cache := model.new_cache(length)))
        assert bytes_held(cache) == model.config.cache_bytes(length)


@torch.no_grad()
@pytest.mark.parametrize("convert", [GPT2.bfloat16, GPT2.to_int8])
def test_half_precision_attends_in_float32(convert):
    """Keys and values that are rounded to half precision, or turned from it to float32 anew for each token."""
    model = convert(small_model(gqa=True, rope=True))
    model(tokens(1, 15), cache=(cache := model.new_cache()))
    with Largest() as seen:
        x = model.hidden(tokens(1, 1), cache)
    assert x.dtype == torch.bfloat16 and cache[0].k.dtype == torch.float32
    assert seen.turned == 48                                               # a token's C numbers, never the cache
    assert bytes_held(cache) == model.config.cache_bytes(16)


def test_a_full_cache_is_refused():
    """Writing past the end of the cache, over its beginning."""
    model = small_model()
    model(tokens(1, 5), cache=(cache := model.new_cache(5)))
    with pytest.raises(ValueError, match="6 tokens do not fit a key/value cache of 5"):
        model(tokens(1, 1), cache=cache)
    with pytest.raises(ValueError, match="17 tokens is longer than block_size=16"):
        model(tokens(1, 17))


@pytest.mark.parametrize("rows, bias", [(1, True), (32, False), (33, True)])
def test_products_with_few_vectors(rows, bias):
    """oneDNN's product, which is taken only without gradients and for up to 32 vectors, against torch's Linear."""
    layer, x = Linear(24, 40, bias=bias), torch.randn(rows, 1, 24)
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    assert layer(x).requires_grad
    with torch.no_grad():
        assert_close(layer(x), expected, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("flags", [{}, dict(rope=True, gqa=True, sliding_window=True)], ids=["plain", "all three"])
def test_compiled(flags):
    """An operation that torch.compile cannot lower on a CPU (oneDNN's product is one), or a graph that is another model's.
    Compilers take a minute; so here is what they are given."""
    torch.compiler.reset()
    model, given = small_model(n_layer=1, **flags), []
    compiled = torch.compile(model.hidden, dynamic=True, backend=lambda graph, _: given.append(graph) or graph)
    for length in (3, 11):
        assert_close(compiled(tokens(1, length)), model.hidden(tokens(1, length)), 1e-4)
    assert given and not any("mkldnn" in str(node.target) for graph in given for node in graph.graph.nodes)


@torch.no_grad()
@every_flag_setting
def test_int8(flags):
    model, idx = small_model(**flags), tokens(2, 13)
    before, exact = model(idx)[0], model(idx, idx)[1]
    row = model.transformer.wte.weight[5].clone()
    model.to_int8()
    after = model(idx)[0].float()
    assert all(p.dim() == 1 or "wpe" in name for name, p in model.named_parameters())   # no matrix is left as it was
    assert (row - model.transformer.wte(torch.tensor(5))).abs().max() <= 0.01 * row.abs().max()  # 1/254, and bfloat16
    assert 0 < ((after - before).std() / before.std()).item() < 0.05
    assert abs(model(idx, idx)[1].float() - exact) < 0.05
    assert torch.equal(model.generate(idx, 3, temperature=0)[:, :13], idx)
    with torch.enable_grad():
        assert torch.equal(model(idx)[0], after.bfloat16())
    with pytest.raises(ValueError, match="n_embd=40 is not divisible by 16"):
        small_model(n_embd=40, n_head=4, n_kv_head=None).to_int8()


def test_endless_text(monkeypatch):
    """Angles or ring positions that go wrong past block_size, or a cache that grows: 20 times block_size."""
    model, caches = small_model(rope=True, sliding_window=True, gqa=True), []
    new_cache = model.new_cache
    monkeypatch.setattr(model, "new_cache", lambda size: caches.append(new_cache(size)) or caches[-1])
    text = model.generate(tokens(1, 7), 20 * 16, generator=torch.Generator().manual_seed(0))
    uncached = model.generate(tokens(1, 7), 20 * 16, use_cache=False, generator=torch.Generator().manual_seed(0))
    assert torch.equal(text, uncached) and len(caches) == 1
    assert [layer.k.shape for layer in caches[0]] == 2 * [(1, 2, 4, 8)] and caches[0][0].length == 326
    with Largest() as seen:                                                # room for all the tokens would be 8 TB
        assert len(list(itertools.islice(model.stream(tokens(1, 1), 10**12), 300))) == 300 > seen.numel


@pytest.mark.parametrize("flags", [{}, dict(rope=True), dict(sliding_window=True)])
def test_text_past_block_size_is_read_anew(flags):
    """Another place to re-read from than the last half of block_size, or tokens before it that still count."""
    model, idx = small_model(**flags), tokens(1, 19)
    text = model.generate(idx, 12, temperature=0)
    for n in range(19, 31):
        start = n - 8 if n == 19 else 11 if n <= 27 else 20               # read anew at 19 and 28 tokens
        assert text[0, n] == model(text[:, start:n])[0][0, -1].argmax()


def test_generate_picks_as_asked():
    """top_k that ties widen, top_p that drops the token it ends on or does not renormalise, temperature upside down."""
    def shares(probabilities, **arguments):
        logits = torch.tensor(probabilities).log().expand(20000, -1)
        ids = pick(logits, generator=torch.Generator().manual_seed(0), **arguments)
        return (ids.bincount(minlength=len(probabilities)) / 20000).tolist()
    p = [0.15, 0.5, 0.05, 0.3]
    for arguments, expected in (
            ({}, p), (dict(temperature=0), [0, 1, 0, 0]), (dict(temperature=1e-45), [0, 1, 0, 0]),
            (dict(temperature=0.5), [x * x / 0.365 for x in p]), (dict(top_k=1), [0, 1, 0, 0]), (dict(top_k=9), p),
            (dict(top_k=2), [0, 0.625, 0, 0.375]), (dict(top_p=0.49), [0, 1, 0, 0]), (dict(top_p=1.0), p),
            (dict(top_p=0.51), [0, 0.625, 0, 0.375]), (dict(top_p=0.81), [0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95]),
            (dict(top_k=2, top_p=0.6), [0, 1, 0, 0])):
        assert shares(p, **arguments) == pytest.approx(expected, abs=0.012), arguments
    assert sum(x > 0 for x in shares([0.2] * 5, top_k=2)) == 2


def test_generate_stops_each_text_by_itself():
    """A text that goes on after its stop token, or is stopped by its neighbour's."""
    model, idx = small_model(), tokens(2, 3)
    def run(**kw):
        return model.generate(idx, 12, generator=torch.Generator().manual_seed(3), **kw)
    free = run()
    stop = next(t for t in free[0, 3:9].tolist() if t not in free[1, 3:])
    expected, at = free.clone(), 3 + free[0, 3:].tolist().index(stop)
    expected[0, at:] = stop
    assert torch.equal(run(stop_token=stop), expected) and torch.equal(run(), free)
    first = model.generate(idx[:1], 1, temperature=0)[0, 3].item()
    assert len(list(model.stream(idx[:1], 12, temperature=0, stop_token=first))) == 1  # nothing once all have stopped


def test_generate_leaves_the_model_as_it_was():
    """Evaluation mode that stays on after sampling inside a training loop, even when the sampling is broken off."""
    model = small_model(dropout=0.5)
    for mode in (True, False):
        model.train(mode)
        assert torch.equal(*(model.generate(tokens(1, 3), 5, temperature=0) for _ in range(2)))  # without dropout
        stream = model.stream(tokens(1, 3), 5)
        next(stream)
        assert torch.is_grad_enabled() and not model.training
        stream.close()
        assert model.training is mode and all(m.training is mode for m in model.modules())


@pytest.mark.parametrize("wrong", [
    dict(temperature=-1), dict(temperature=math.nan), dict(temperature=math.inf), dict(top_k=0), dict(top_p=0),
    dict(top_p=1.1), dict(max_new_tokens=-1), dict(idx=tokens(1, 0)), dict(idx=tokens(3))], ids=str)
def test_generate_refuses(wrong):
    """A value out of range that samples nonsense or dies in a tensor operation."""
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}.* must be"):
        small_model().generate(**dict(idx=tokens(1, 3), max_new_tokens=2) | wrong)


# ---------------------------------------------------------------------------------------------------------------------
# Attention variants


def by_formula(q, k, v, window=None):
    """Attention from its definition, in float64 and with a mask made one entry at a time."""
    T, group = q.size(-2), q.size(1) // k.size(1)
    seen = torch.tensor([[0 <= i - j < (window or T) for j in range(T)] for i in range(T)])
    q, k, v = q.double(), *(x.double().repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.size(-1))
    return torch.einsum("bhij,bhjd->bhid", scores.masked_fill(~seen, -math.inf).softmax(-1), v).float()


def random_qkv(T, K, H=6, D=8, B=2):
    generator = torch.Generator().manual_seed(T)
    return [torch.randn(B, heads, T, D, generator=generator, requires_grad=True) for heads in (H, K, K)]


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("T, window", [(1, None), (7, None), (1, 4), (3, 4), (4, 4), (5, 4), (8, 4), (17, 4), (9, 1),
                                       (13, 5), (10, 9), (10, 10), (10, 16)])
def test_attention_is_the_formula(T, window, flash):
    """Blocks of a window that are cut one off, padding that is seen, groups that are not contiguous heads, a gradient
    that is wrong: for whole and odd lengths, shorter and longer than the window."""
    config = small_config(flash=flash, **(dict(sliding_window=True, window_size=window) if window else {}))
    for K in (6, 2, 1):
        qkv, g = random_qkv(T, K), torch.randn(2, 6, T, 8)
        y, expected = AttentionHead(config)(*qkv), by_formula(*qkv, window)
        assert_close(y, expected, 1e-5)
        for a, b in zip(torch.autograd.grad(y, qkv, g), torch.autograd.grad(expected, qkv, g), strict=True):
            assert_close(a, b, 1e-5)


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("window", [None, 1, 2, 4, 5, 9, 16])
def test_attention_after_a_prefix_is_the_formula(window, flash):
    """The same after every prefix that a cache holds: what was seen before is in the wrong order, or one off."""
    config = small_config(flash=flash, **(dict(sliding_window=True, window_size=window) if window else {}))
    head, qkv = AttentionHead(config), [x.detach() for x in random_qkv(16, 2)]
    expected = by_formula(*qkv, window)
    for a, b in itertools.combinations(range(1, 17), 2):
        cache, cuts = KVCache(window or 16, ring=window is not None), (0, a, b, 16)
        y = [head(*(x[:, :, i:j] for x in qkv), cache=cache) for i, j in itertools.pairwise(cuts) if i < j]
        assert_close(torch.cat(y, dim=2), expected, 1e-5)


def test_the_written_out_formula():
    """A missing scale, or a mask that is added where it should be selected, in the formula as users may call it."""
    q, k, v = random_qkv(5, 6)
    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    assert_close(scaled_dot_product_attention(q, k, v, seen), by_formula(q, k, v), 1e-5)
    added = torch.zeros(5, 5).masked_fill(~seen, -math.inf)
    assert_close(scaled_dot_product_attention(q, k, v, added), by_formula(q, k, v), 1e-5)
    assert_close(scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v), 1e-5)


@every_flag_setting
def test_heads_one_by_one_equal_all_at_once(flags):
    """A head that depends on its neighbours: in the masks, the groups, the rotation or the cache."""
    config = small_config(**flags)
    head, (q, k, v) = AttentionHead(config), random_qkv(14, config.kv_heads)
    together, caches = KVCache(16, config.sliding_window), [KVCache(16, config.sliding_window) for _ in range(6)]
    for steps in (range(0, 9), range(9, 10), range(10, 14)):               # from the start, one token, a chunk
        x = [t[:, :, steps.start:steps.stop] for t in (q, k, v)]
        rotary = rotary_tables(torch.tensor(steps), 8, 10000.0) if config.rope else None
        y = head(*x, rotary, together)
        for h in range(6):
            of = h // (6 // config.kv_heads)
            assert_close(head(x[0][:, h], x[1][:, of], x[2][:, of], rotary, caches[h]), y[:, h], 1e-5)


@pytest.mark.parametrize("variant, fields", [
    ("llama", dict(rope=True)), ("llama", dict(rope=True, rope_theta=500.0, gqa=True)),
    ("mistral", dict(rope=True, gqa=True, sliding_window=True, bias=False))], ids=["rope", "rope+gqa", "all three"])
def test_attention_of_other_code(variant, fields):
    """Interleaved rotation, another base, other groups or a window of W + 1: the attention of transformers' Llama and
    Mistral, with their own masks, is the witness."""
    ours = MultiHeadAttention(config := small_config(**fields))
    loud(ours, 5)
    Config, Model, extra = dict(
        llama=(transformers.LlamaConfig, transformers.LlamaModel, dict(attention_bias=True)),
        mistral=(transformers.MistralConfig, transformers.MistralModel, dict(sliding_window=config.window_size))
    )[variant]
    theirs = Model(Config(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=config.kv_heads, vocab_size=61,
        intermediate_size=8, rope_parameters=dict(rope_type="default", rope_theta=config.rope_theta), **extra)).eval()
    attention, seen = theirs.layers[0].self_attn, {}
    with torch.no_grad():
        for part, w in (("weight", ours.c_attn.weight), ("bias", ours.c_attn.bias)):
            for name, rows in zip("qkv", w.split(ours.sizes) if w is not None else (), strict=w is not None):
                getattr(getattr(attention, name + "_proj"), part).copy_(rows)
        attention.o_proj.load_state_dict(ours.c_proj.state_dict())
        attention.register_forward_hook(lambda _, args, kwargs, out: seen.update(x=kwargs["hidden_states"], y=out[0]),
                                        with_kwargs=True)
        theirs(inputs_embeds=torch.randn(2, 23, 48, generator=torch.Generator().manual_seed(0)))
        y = ours(seen["x"], rotary_tables(torch.arange(23), 8, config.rope_theta))
    assert_close(y, seen["y"], 1e-4 * seen["y"].std())


def test_rotation_depends_on_distance_alone():
    """Angles that are not proportional to the position, or queries turned the other way round than keys."""
    q, k, v = (x.detach() for x in random_qkv(9, 6))
    def tables(shift):
        return rotary_tables(torch.arange(shift, shift + 9), 8, 10000.0)
    head = AttentionHead(small_config(rope=True))
    for shift in (1020, 30_000_000):                                       # where float32 no longer tells neighbours apart
        assert_close(head(q, k, v, tables(0)), head(q, k, v, tables(shift)), 1e-5)
    assert (head(q, k, v, tables(0)) - head(q, k, v)).abs().max() > 0.1
    assert_close(rotate(q, *tables(1020)).norm(dim=-1), q.norm(dim=-1), 1e-5)
    assert torch.equal(rotate(q, *tables(0))[..., 0, :], q[..., 0, :])
    half = rotate(q.bfloat16(), *tables(3000))
    assert half.dtype == torch.bfloat16
    assert_close(half.float(), rotate(q.bfloat16().float(), *tables(3000)).bfloat16().float(), 1e-6)


@pytest.mark.parametrize("n_layer", [1, 3])
@pytest.mark.parametrize("fields", [{}, dict(flash=False), dict(rope=True), dict(gqa=True)], ids=str)
def test_window_edges(n_layer, fields):
    """A window of W - 1 or W + 1: through n layers a token is felt for n·(W - 1) positions, and not at the next."""
    model = small_model(n_layer=n_layer, sliding_window=True, **fields).double()
    idx = tokens(1, 16)
    other = idx.clone()
    other[0, 2] = (other[0, 2] + 1) % 61
    changed = (model(idx)[0] != model(other)[0]).any(-1)[0].tolist()
    assert changed == [2 <= i <= 2 + n_layer * 3 for i in range(16)]


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation, forward or backward, puts out; of them the largest turned to a dtype."""
    numel = turned = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
        if function is torch.ops.aten._to_copy.default:
            self.turned = max(self.turned, out.numel())
        return out


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("gqa", [False, True])
def test_a_window_builds_nothing_of_T_by_T(flash, gqa):
    """A mask or scores of T x T: the cost of full attention, or more, for a window."""
    def largest(T):
        model = GPT2(GPT2Config(T, 61, 1, 2, 16, rope=True, gqa=gqa, sliding_window=True, window_size=8, flash=flash))
        with Largest() as mode:
            model(tokens(1, T), tokens(1, T))[1].backward()
            with torch.no_grad():
                for prefix in (1, 20):
                    model(tokens(1, prefix), cache=(cache := model.new_cache()))
                    model(tokens(1, T), cache=cache)
        return mode.numel
    assert largest(1024) == 2 * largest(512) < 512 * 512


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def hf_gpt2(quiet=False, **fields):
    """transformers' GPT-2 with random weights three times as large as usual, which shows a wrong GELU; `quiet`: with a
    residual stream so small that a wrong epsilon shows in each LayerNorm."""
    config = transformers.GPT2Config(**dict(n_positions=32, vocab_size=97, n_layer=2, n_head=3, n_embd=24) | fields)
    torch.manual_seed(0)
    model = loud(transformers.GPT2LMHeadModel(config), 3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if quiet and re.search("wte|wpe|c_proj", name):
                p.mul_(0.02)
    return model


def write_folder(folder, tensors, config):
    folder.mkdir(exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
@pytest.mark.parametrize("shape", [
    dict(n_layer=2, n_head=12, n_embd=768), dict(n_layer=2, n_head=12, n_embd=768, quiet=True),
    dict(n_layer=1, n_head=16, n_embd=1024), dict(n_layer=1, n_head=20, n_embd=1280),
    dict(n_layer=1, n_head=25, n_embd=1600)], ids=["gpt2", "gpt2-quiet", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_logits_equal_transformers(tmp_path, shape):
    """Exact GELU, another epsilon, a weight not transposed, heads split otherwise, on the way in and on the way out."""
    theirs, idx = hf_gpt2(**shape), tokens(2, 32, vocab_size=97)
    theirs.save_pretrained(tmp_path / "a")
    ours, expected = GPT2.from_pretrained(tmp_path / "a"), theirs(idx).logits
    assert_close(ours(idx)[0], expected, 1e-4 * expected.std())
    ours.save_pretrained(tmp_path / "b")
    a, b = (load_file(tmp_path / x / "model.safetensors") for x in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "b").eval()
    assert torch.equal(again(idx).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_dialects_of_the_same_checkpoint(tmp_path, dtype, prefix):
    """OpenAI's own upload (no prefix, masks as weights), a half precision file, or one with the tied head repeated,
    that is refused, or whose c_attn.bias is taken for the mask attn.bias."""
    theirs, idx = hf_gpt2().to(dtype), tokens(2, 32, vocab_size=97)
    tensors = {prefix + name: t for name, t in theirs.transformer.state_dict().items()}
    tensors["lm_head.weight"] = theirs.transformer.wte.weight.clone()
    for i in range(2):
        tensors[f"{prefix}h.{i}.attn.bias"] = torch.ones(1, 1, 32, 32, dtype=torch.uint8).tril()
        tensors[f"{prefix}h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    ours = GPT2.from_pretrained(write_folder(tmp_path, tensors, theirs.config.to_dict()))
    assert {p.dtype for p in ours.parameters()} == {torch.float32} and not ours.training
    expected = theirs.float()(idx).logits
    assert_close(ours(idx)[0], expected, 1e-4 * expected.std())
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    with pytest.raises(ValueError, match="lm_head.weight differs from wte.weight"):
        GPT2.from_pretrained(write_folder(tmp_path, tensors, theirs.config.to_dict()))


@every_flag_setting
def test_save_and_load(tmp_path, flags):
    """A variant that is not saved whole, cannot be trained on after loading, or is written over the very file its
    weights are mapped from."""
    model, idx = small_model(**flags), tokens(2, 16)
    model.save_pretrained(tmp_path)
    for _ in range(2):
        again = GPT2.from_pretrained(str(tmp_path))
        assert again.config == model.config and torch.equal(again(idx)[0], model(idx)[0])
        again.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    again(idx, idx)[1].backward()
    with torch.no_grad():
        for p in again.parameters():
            p -= p.grad
    assert torch.equal(GPT2.from_pretrained(tmp_path)(idx)[0], model(idx)[0])  # the file did not change with them


@pytest.mark.parametrize("flag", ["rope", "gqa", "sliding_window"])
def test_transformers_refuses_what_is_not_gpt2(tmp_path, flag):
    """A variant that another GPT-2 reader would load and run as if it were GPT-2."""
    small_model(**{flag: True}).save_pretrained(tmp_path)
    for reader in (transformers.AutoConfig, transformers.AutoModelForCausalLM):
        with pytest.raises(ValueError, match="gpt2-variant"):
            reader.from_pretrained(tmp_path)


@pytest.mark.parametrize("field, value", [
    ("activation_function", "gelu"), ("layer_norm_epsilon", 1e-6), ("n_inner", 25), ("tie_word_embeddings", False),
    ("scale_attn_by_inverse_layer_idx", True), ("scale_attn_weights", False), ("model_type", "llama"),
    ("n_layer", 3), ("n_layer", 1), ("n_embd", 27), ("n_positions", 16), ("vocab_size", 96), ("n_layer", 10**7)])
def test_other_models_are_refused(tmp_path, field, value):
    """A config.json that asks for what this model does not compute, or that does not fit the weights, loaded."""
    hf_gpt2().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{field}=|config.json asks for|lacks|holds an unknown"):
        GPT2.from_pretrained(tmp_path)


def test_conversion_changes_nothing_that_it_need_not(tmp_path):
    """Grouping into as many groups as there are heads, or a window of the whole context, that moves even one bit."""
    plain, idx = small_model(), tokens(2, 16)
    plain.save_pretrained(tmp_path)
    for overrides in (dict(gqa=True, n_kv_head=6), dict(sliding_window=True, window_size=16),
                      dict(gqa=True, n_kv_head=6, sliding_window=True, window_size=16)):
        model = GPT2.from_pretrained(tmp_path, **overrides)
        assert torch.equal(model(idx)[0], plain(idx)[0]) and read_pretrained(tmp_path, **overrides)[2] == []
        for use_cache in (True, False):
            assert torch.equal(*(m.generate(idx, 9, temperature=0, use_cache=use_cache) for m in (model, plain)))


def test_pooling_repeated_heads_gives_back_the_original(tmp_path):
    """Groups that are not neighbouring heads, a bias that is not pooled, queries that are."""
    grouped, repeated, idx = small_model(gqa=True), small_model(), tokens(2, 16)
    state = grouped.state_dict()
    for name in state:
        if "c_attn" in name:
            q, k, v = state[name].split(grouped.transformer.h[0].attn.sizes)
            k, v = (x.unflatten(0, (2, 8)).repeat_interleave(3, dim=0).flatten(0, 1) for x in (k, v))
            state[name] = torch.cat((q, k, v))
    repeated.load_state_dict(state)
    assert_close(repeated(idx)[0], grouped(idx)[0], 1e-5)
    repeated.save_pretrained(tmp_path)
    config, weights, notes = read_pretrained(tmp_path, gqa=True, n_kv_head=2)
    assert config == grouped.config and len(notes) == 1 and "gqa: 6 key/value heads mean-pooled to 2" in notes[0]
    assert all(torch.equal(weights[name], p) for name, p in grouped.named_parameters())
    small_model().save_pretrained(tmp_path)                                # and heads that differ: their mean
    k = read_pretrained(tmp_path)[1]["transformer.h.1.attn.c_attn.bias"][48:96].view(2, 3, 8)
    pooled = read_pretrained(tmp_path, gqa=True, n_kv_head=2)[1]["transformer.h.1.attn.c_attn.bias"]
    assert_close(pooled[48:64].view(2, 8), (k[:, 0] + k[:, 1] + k[:, 2]) / 3, 1e-6)


def test_other_conversions(tmp_path):
    """wpe kept beside rope, positions cut from the wrong end, an override that is lost, a change without a word."""
    plain, idx = small_model(), tokens(2, 8)
    plain.save_pretrained(tmp_path)
    config, weights, notes = read_pretrained(tmp_path, rope=True, rope_theta=500.0, block_size=64)
    assert "transformer.wpe.weight" not in weights and config.rope_theta == 500 and "wpe" in notes[0]
    assert len(GPT2.from_pretrained(tmp_path, rope=True).generate(idx[:1], 40)[0]) == 48
    short = GPT2.from_pretrained(tmp_path, block_size=8, dropout=0.25, flash=False)
    assert (short.config.block_size, short.config.dropout, short.config.flash) == (8, 0.25, False)
    assert_close(short(idx)[0], plain(idx)[0], 1e-5)
    assert read_pretrained(tmp_path, block_size=8)[2] == ["block_size: the first 8 of 16 positions are kept"]
    assert "window of 4" in read_pretrained(tmp_path, sliding_window=True)[2][0]
    windowed = GPT2.from_pretrained(tmp_path, sliding_window=True, window_size=4)
    assert torch.equal(windowed(idx)[0], small_model(sliding_window=True)(idx)[0])
    windowed.save_pretrained(tmp_path)
    assert torch.equal(GPT2.from_pretrained(tmp_path, sliding_window=False)(idx)[0], plain(idx)[0])
    assert "taken out, where the weights come from a window of 4" in read_pretrained(tmp_path, sliding_window=False)[2][0]
    assert "widened, where the weights come from a window of 4" in read_pretrained(tmp_path, window_size=9)[2][0]
    assert GPT2.from_pretrained(tmp_path, block_size=3).config.window_size == 3
    small_model(rope=True).save_pretrained(tmp_path)
    for window, said in (None, 0), (40, 1), (64, 1):                       # with rope no text ends at block_size
        notes = read_pretrained(tmp_path, block_size=64, sliding_window=bool(window), window_size=window)[2]
        assert notes[0] == "block_size: texts of up to 64 tokens; the weights come from texts of 16" and len(notes) == 1 + said
        assert all(f"with a window of {window}; the model wants further training" in note for note in notes[1:])
    small_model(rope=True, sliding_window=True).save_pretrained(tmp_path)
    assert "with a window of 3;" in read_pretrained(tmp_path, block_size=3)[2][1]


@pytest.mark.parametrize("saved, overrides, words", [
    ({}, dict(n_layer=3), "n_layer=3 contradicts.*n_layer=2"), ({}, dict(n_embd=60), "n_embd=60"),
    ({}, dict(vocab_size=7), "vocab_size=7"), ({}, dict(n_head=3), "n_head=3"), ({}, dict(bias=False), "bias=False"),
    ({}, dict(block_size=17), "17 exceeds the checkpoint's 16"),
    ({}, dict(n_kv_head=2), "no effect without gqa"), ({}, dict(window_size=2), "no effect without sliding_window"),
    (dict(gqa=True), dict(n_kv_head=3), "n_kv_head=3 does not divide the checkpoint's 2"),
    (dict(gqa=True), dict(gqa=False), "made with gqa"), (dict(rope=True), dict(rope=False), "made with rope"),
    (dict(rope=True), dict(rope_theta=5.0), "rope_theta=5.0 contradicts")], ids=str)
def test_conversions_that_contradict(tmp_path, saved, overrides, words):
    """An override that the weights cannot follow, ignored or applied all the same."""
    small_model(**saved).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words):
        GPT2.from_pretrained(tmp_path, **overrides)


def test_safetensors_both_ways(tmp_path):
    """A file that the safetensors package does not read, reads otherwise, or writes and we cannot read."""
    theirs = {"a": torch.randn(3, 5), "h.0.attn.c_attn.weight": torch.randn(2, 6).bfloat16(),
              "b": torch.randn(7).half(), "scalar": torch.tensor(3.0), "one": torch.randn(1)}
    save_file(theirs, tmp_path / "theirs", metadata={"step": "7"})
    raw = (tmp_path / "theirs").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    for pad in (0, 1, 2, 3):                                               # a header that leaves the numbers unaligned
        shifted = (length + pad).to_bytes(8, "little") + raw[8:8 + length] + b" " * pad + raw[8 + length:]
        (tmp_path / "shifted").write_bytes(shifted)
        ours, metadata = read_safetensors(tmp_path / "shifted")
        assert metadata == {"step": "7"} and ours.keys() == theirs.keys()
        for name, t in theirs.items():
            assert ours[name].dtype == t.dtype and torch.equal(ours[name], t)
            assert ours[name].data_ptr() % t.element_size() == 0           # not every processor reads across words
    for step in ("8", "88", "888"):
        write_safetensors(str(tmp_path / "ours"), ours, iter(ours.values()), {"step": step})
        assert (tmp_path / "ours").read_bytes()[0] % 8 == 0 and read_safetensors(tmp_path / "ours")[1]["step"] == step
    for name, t in load_file(tmp_path / "ours").items():
        assert torch.equal(t, ours[name].float().t() if "c_attn" in name else ours[name].float())
    for name_length in range(500, 640):                                    # a header of 640 bytes starts like a pickle
        save_file({"x" * name_length: torch.ones(2)}, tmp_path / "long")
        assert len(read_safetensors(tmp_path / "long")[0]) == 1


def damaged():
    """name -> (what to do to the bytes of a good file, words of the error)."""
    def header(change):
        def changed(raw):
            n = 8 + int.from_bytes(raw[:8], "little")
            entries = json.loads(raw[8:n])
            text = change(entries) or json.dumps(entries)
            return len(text).to_bytes(8, "little") + text.encode() + raw[n:]
        return changed

    def field(**values):
        return header(lambda entries: entries["transformer.ln_f.bias"].update(values))
    shape, after, end = "wrong dtype, shape or data_offsets", "begins at byte", "reaches beyond the end"
    return {
        "empty": (lambda raw: b"", "cut short: 0 bytes"), "seven bytes": (lambda raw: raw[:7], "cut short: 7 bytes"),
        "cut": (lambda raw: raw[:-1], end), "cut header": (lambda raw: raw[:99], "header claims"),
        "longer": (lambda raw: raw + b"1234", "4 bytes that belong to no tensor"),
        "header": (lambda raw: (2**63).to_bytes(8, "little") + raw[8:], "header claims 9,223,372,036,854,775,808"),
        "no header": (lambda raw: bytes(8) + raw[8:], "header claims 0 bytes"),
        "no JSON": (header(lambda entries: "{no JSON}"), "not JSON"), "list": (header(lambda e: "[1, 2]"), "damaged"),
        "deep": (header(lambda entries: '{"a":' + 10**5 * "[" + 10**5 * "]" + "}"), "not JSON"),
        "not UTF-8": (lambda raw: raw.replace(b"transformer.wte", b"transformer\xffwte"), "not JSON"),
        "metadata": (header(lambda entries: entries.update(__metadata__={"step": 7})), "__metadata__"),
        "integers": (field(dtype="I64"), "dtype 'I64'; read are F32, F16, BF16"), "no dtype": (field(dtype=[]), shape),
        "wrong dtype": (field(dtype="F16"), "192 bytes for"), "huge": (field(shape=[2**62, 2**62]), "192 bytes for"),
        "negative": (field(shape=[-48]), shape), "float shape": (field(shape=[48.0]), shape),
        "no shape": (field(shape=None), shape), "bool offset": (field(data_offsets=[False, True]), shape),
        "no entry": (header(lambda e: e.update(x=7)), shape), "one offset": (field(data_offsets=[0]), shape),
        "overlap": (field(data_offsets=[0, 192]), after),
        "backwards": (field(data_offsets=[192, 0]), after), "far": (field(data_offsets=[2**70, 2**71]), after),
        "missing": (header(lambda e: e.update({"transformer.x": e.pop("transformer.ln_f.bias")})), "lacks ln_f.bias"),
        "pickle": (lambda raw: pickle.dumps({"a": 1}), "pickle"), "zip": (lambda raw: b"PK\x03\x04" + raw, "pickle"),
    }


@pytest.mark.parametrize("what", damaged())
def test_damaged_weights_are_refused(tmp_path, what):
    """A damaged file that is read, crashes the reader, or makes it allocate what the header claims."""
    small_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    change, words = damaged()[what]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=words) as e:
        GPT2.from_pretrained(tmp_path)
    assert str(path) in str(e.value) and len(str(e.value)) < 400


def test_a_pickle_is_never_read(tmp_path):
    """Code inside a checkpoint that runs, or a message that does not say what to do instead."""
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)
    small_model().save_pretrained(tmp_path)
    torch.save(Bomb(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is a pickle, which could run code"):
        GPT2.from_pretrained(tmp_path)
    os.rename(tmp_path / "model.safetensors", tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="model.safetensors is not there; pytorch_model.bin is a pickle"):
        GPT2.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="'gpt3' is no folder; the names known are gpt2, gpt2-medium"):
        GPT2.from_pretrained("gpt3")
    assert not (tmp_path / "ran").exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 70) | st.integers() | st.floats() | st.text(max_size=5) |
    st.sampled_from([0, -1, 2**24, 2**31, 2**62, 2**63, 2**64, 10**300, 1e308, "F32", "BF16", "gpt2", "gpt2-variant"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6)
EDITS = st.lists(st.tuples(st.integers(0, 2**20), st.sampled_from(["set", "cut", "insert"]),
                           st.binary(min_size=1, max_size=9)), max_size=4)


def mutate(raw, edits, limit):
    """Edits in the first `limit` bytes, and cuts anywhere."""
    for at, kind, new in edits:
        at %= (len(raw) if kind == "cut" else min(limit, len(raw))) + 1
        raw = raw[:at] + (b"" if kind == "cut" else new + raw[at + len(new) * (kind == "set"):])
    return raw


def check_mutations(folder, examples):
    GPT2(GPT2Config(4, 5, 1, 2, 4, rope=True, sliding_window=True), seed=0).save_pretrained(folder)
    paths = [folder / "config.json", folder / "model.safetensors"]
    config, weights = (path.read_bytes() for path in paths)
    n = 8 + int.from_bytes(weights[:8], "little")
    header, fields, outcomes = json.loads(weights[8:n]), json.loads(config), Counter()
    keys = st.sampled_from(["dtype", "shape", "data_offsets", None])

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(st.sampled_from(sorted(fields)), JSON, max_size=2), EDITS,
           st.lists(st.tuples(st.sampled_from(sorted(header)), keys, JSON), max_size=2), EDITS)
    def run(new_fields, config_edits, entries, edits):
        paths[0].write_bytes(mutate(json.dumps(fields | new_fields).encode(), config_edits, len(config)))
        changed = json.loads(weights[8:n])
        for name, key, value in entries:
            if key and isinstance(changed[name], dict):
                changed[name][key] = value
            else:
                changed[name] = value
        text = json.dumps(changed).encode()
        paths[1].write_bytes(mutate(len(text).to_bytes(8, "little") + text + weights[n:], edits, 8 + len(text)))
        with contextlib.suppress(ValueError):
            outcomes["weights"] += 1
            read_safetensors(paths[1])
            outcomes["weights read"] += 1
        with contextlib.suppress(ValueError):
            outcomes["all"] += 1
            GPT2.from_pretrained(folder)
            outcomes["all read"] += 1
    run()
    assert 0 < outcomes["all read"] < outcomes["weights read"] < outcomes["all"], outcomes


def test_mutated_checkpoints(tmp_path):
    """Any exception but ValueError, whatever bytes or fields of weights and config.json are changed."""
    check_mutations(tmp_path, 300)


@pytest.mark.slow
def test_many_mutated_checkpoints(tmp_path):
    """The same, 20,000 times."""
    check_mutations(tmp_path, 20_000)


# ---------------------------------------------------------------------------------------------------------------------
# Downloads


class Hub:
    """The Hugging Face hub on loopback: answers of the hub itself, and a CDN under another name and port that holds the
    large files. `log` has (server, method, path, headers) of every request; the other attributes make it misbehave."""

    def __init__(self, files):
        self.files, self.log, self.status, self.cut_at, self.ranges, self.headers = files, [], 200, None, True, {}
        self.redirect, self.damage = None, False

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                cdn = self.server is hub.servers[1]
                hub.log.append(("cdn" if cdn else "hub", self.command, self.path, self.headers))
                hub.answer(self, cdn, os.path.basename(self.path.split("?")[0]))
            do_HEAD = do_GET
        hub = self
        self.servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
        self.url, self.cdn = (f"http://{name}:{server.server_port}" for name, server in
                              zip(("127.0.0.1", "localhost"), self.servers, strict=True))
        for server in self.servers:
            threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()

    def answer(self, to, cdn, name):
        data = self.files.get(name)
        status = self.status if self.status != 200 else 404 if data is None else 200
        if status != 200:
            return self.send(to, status, {}, b"no")
        sha256, sha1 = hashlib.sha256(data).hexdigest(), hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        if cdn:
            begin = re.fullmatch(r"bytes=(\d+)-", to.headers.get("Range", "")) if self.ranges else None
            at = int(begin[1]) if begin else 0
            if at and at >= len(data):
                return self.send(to, 416, {}, b"")
            served = {"Content-Range": f"bytes {at}-{len(data) - 1}/{len(data)}"} if begin else {}
            self.send(to, 206 if begin else 200, {"ETag": f'"{sha256[::-1]}"', **served}, data[at:], self.cut_at)
        elif name.endswith((".safetensors", ".bin")):
            self.send(to, 302, {"Location": self.redirect or f"{self.cdn}/blob/{name}?signature=x", "ETag": f'"{sha1}"',
                                "X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(data)), **self.headers})
        elif "resolve-cache" in to.path:
            self.send(to, 200, {"ETag": f'W/"{sha1}"', **self.headers}, data)
        else:
            self.send(to, 307, {"Location": f"/api/resolve-cache/{name}", **self.headers})

    def send(self, to, status, headers, body=b"", cut_at=None):
        to.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            to.send_header(name, value)
        to.end_headers()
        if to.command == "GET":
            to.wfile.write((body[:-1] + b"?" if self.damage else body)[:cut_at])

    def asked(self):
        """What was asked for since the last call."""
        log, self.log[:] = [(*x[:2], os.path.basename(x[2].split("?")[0])) for x in self.log], []
        return log


@pytest.fixture
def hub(tmp_path, monkeypatch):
    small_model().save_pretrained(tmp_path / "served")
    files = {name: (tmp_path / "served" / name).read_bytes() for name in ("config.json", "model.safetensors")}
    hub = Hub(files)
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    yield hub
    for server in hub.servers:
        server.shutdown()
        server.server_close()


def files_under(folder):
    return sorted(os.path.relpath(os.path.join(at, name), folder) for at, _, names in os.walk(folder) for name in names)


CACHED = ["hub/models--openai-community--gpt2/snapshots/main/" + name for name in ("config.json", "model.safetensors")]


def test_download_once_then_offline(hub, tmp_path, monkeypatch):
    """A name that does not lead to its files, a second download of what is there, a cache that offline does not use."""
    idx = tokens(2, 16)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set and .*config.json is not there"):
        GPT2.from_pretrained("gpt2")
    assert hub.asked() == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert torch.equal(GPT2.from_pretrained("gpt2")(idx)[0], small_model()(idx)[0])
    assert files_under(tmp_path / "home") == CACHED and {name for _, _, name in hub.asked()} == set(hub.files)
    for offline in ("", "1"):
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        GPT2.from_pretrained("gpt2")
    assert hub.asked() == []


@pytest.mark.parametrize("repo", ["gpt2", "openai-community--gpt2"])
def test_the_cache_of_transformers_is_used(hub, tmp_path, repo):
    """Files that transformers fetched, fetched again; or an older revision of them used."""
    folder = tmp_path / "home" / "hub" / ("models--" + repo)
    (folder / "refs").mkdir(parents=True)
    for commit in (40 * "a", 40 * "b"):
        small_model(sliding_window=commit[0] == "a").save_pretrained(folder / "snapshots" / commit)
    (folder / "refs" / "main").write_text(40 * "b" + "\n")
    assert not GPT2.from_pretrained("gpt2").config.sliding_window and hub.asked() == []


@pytest.mark.parametrize("content", [b"", b"main", b"../../../../served", b"\xff\xfe", 41 * b"a", None])
def test_odd_caches(hub, tmp_path, content):
    """A damaged refs/main that ends in a traceback, or that leads out of the cache."""
    ref = tmp_path / "home" / "hub" / "models--openai-community--gpt2" / "refs" / "main"
    ref.parent.mkdir(parents=True)
    ref.write_bytes(content) if content is not None else ref.mkdir()
    GPT2.from_pretrained("gpt2")
    assert set(CACHED) <= set(files_under(tmp_path / "home"))


def test_a_cache_that_cannot_be_written(hub, tmp_path, monkeypatch):
    """A cache on a read-only or odd place that ends in anything but an OSError."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match="file"):
        GPT2.from_pretrained("gpt2")


def test_cut_downloads_resume(hub, tmp_path):
    """A cut connection that loses what came, or whose pieces do not make the file; a server that ignores Range."""
    data = hub.files["big.safetensors"] = os.urandom(1_000_000)
    url, kept = hub.url + "/r/resolve/main/big.safetensors", 300_000 // 2**16 * 2**16
    hub.cut_at = 300_000
    assert open(download(url, str(tmp_path / "x")), "rb").read() == data
    ranges = [headers.get("Range") for server, method, _, headers in hub.log if (server, method) == ("cdn", "GET")]
    assert ranges == [None, *(f"bytes={i * kept}-" for i in (1, 2, 3))]
    hub.ranges = False
    with pytest.raises(ConnectionError, match=f"{kept:,} bytes are kept, run it again"):
        download(url, str(tmp_path / "y"))
    assert sorted(os.listdir(tmp_path)) == ["served", "x", "y.part"]
    hub.cut_at = None
    assert open(download(url, str(tmp_path / "y")), "rb").read() == data


def test_parts_of_another_file(hub, tmp_path):
    """A .part of another version, or longer than the file, that is completed, kept for ever, or moved into place."""
    data, url, path = hub.files["model.safetensors"], hub.url + "/r/resolve/main/model.safetensors", tmp_path / "x"
    for part in (b"old", bytes(len(data)), bytes(len(data) + 1)):
        (tmp_path / "x.part").write_bytes(part)
        if len(part) <= len(data):
            with pytest.raises(ConnectionError, match="is not what was announced .*discarded, try again"):
                download(url, str(path))
        assert not path.exists()
        assert open(download(url, str(path)), "rb").read() == data
        path.unlink()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_wrong_hash(hub, tmp_path, name):
    """Damaged bytes of the right length that reach the cache: git's sha1 for small files, sha256 for large ones."""
    good, url, path = hub.files[name], f"{hub.url}/r/resolve/main/{name}", str(tmp_path / "x")
    hub.damage = True
    with pytest.raises(ConnectionError, match="is not what was announced"):
        download(url, path)
    hub.damage = False
    with pytest.raises(ConnectionError, match=64 * "0"):
        download(url, path, sha256=64 * "0")
    assert os.listdir(tmp_path) == ["served"]
    assert open(download(url, path, sha256=hashlib.sha256(good).hexdigest()), "rb").read() == good


@pytest.mark.parametrize("status, cure", [(404, "no such file"), (401, "set HF_TOKEN"), (403, "is HF_TOKEN right"),
                                          (503, "try again later"), (None, "HTTPS_PROXY names a proxy")])
def test_hub_errors(hub, tmp_path, monkeypatch, status, cure):
    """An error page saved as the file, or a failure that does not say what to do; None: nothing listens at the port."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.status = status
    if status is None:
        hub.servers[0].shutdown()
        hub.servers[0].server_close()
    with pytest.raises(ConnectionError, match=f"config.json.*{cure}") as e:
        GPT2.from_pretrained("gpt2")
    assert "secret" not in str(e.value) and files_under(tmp_path / "home") == []


def test_the_token_stays_with_the_hub(hub, monkeypatch):
    """HF_TOKEN sent on to the host that the hub redirects to, missing where it is needed, or quoted in an error."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    GPT2.from_pretrained("gpt2")
    assert {server for server, *_ in hub.log} == {"hub", "cdn"}
    for server, _, _, headers in hub.log:
        assert headers.get("Authorization") == ("Bearer hf_secret" if server == "hub" else None)
        assert server == "hub" or "hf_secret" not in str(headers)
    for token in ("hf_se\ncret", "hf_secret\u20ac"):
        with pytest.raises((OSError, ValueError)) as e:
            download(hub.url + "/r/resolve/main/config.json", "never", token=token)
        assert "hf_se" not in str(e.value)


@pytest.mark.parametrize("location", ["/../../../evil", "//evil/..", "file:///etc/passwd", "http://", "..", "http://["])
def test_answers_do_not_choose_the_place(hub, tmp_path, location):
    """A header of the server that chooses which file is written, or read, on this machine."""
    before = files_under(tmp_path)
    hub.headers = {"X-Repo-Commit": "../../../../evil", "Content-Disposition": "attachment; filename=/tmp/evil"}
    GPT2.from_pretrained("gpt2")
    assert files_under(tmp_path) == sorted([*before, *("home/" + name for name in CACHED)])
    hub.redirect = location
    with pytest.raises((OSError, ValueError)):
        download(hub.url + "/r/resolve/main/model.safetensors", str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_a_server_without_hashes(hub, tmp_path, capsys):
    """A mirror that announces no hash, refused, or trusted without a word; or a size that is no number."""
    url = hub.cdn + "/model.safetensors"
    assert open(download(url, str(tmp_path / "x")), "rb").read() == hub.files["model.safetensors"]
    assert "x: the server announces no hash, so only the size was checked" in capsys.readouterr().err
    hub.headers = {"X-Linked-Size": "\u00b2"}
    download(hub.url + "/r/resolve/main/model.safetensors", str(tmp_path / "y"))
    assert (tmp_path / "y").read_bytes() == hub.files["model.safetensors"]


HERE = pathlib.Path(__file__).resolve().parent
SHARED = HERE.parent / "shared"
os.environ["OMP_NUM_THREADS"] = "1"                                        # of the processes started here
torch.set_num_threads(1)
if (SHARED / "tiktoken_cache").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
needs_bpe = pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ,
                               reason="needs GPT-2's tokenizer files: set TIKTOKEN_CACHE_DIR")
SHAKESPEARE = SHARED / "data/tinyshakespeare.txt"
needs_shakespeare = pytest.mark.skipif(not SHAKESPEARE.exists(), reason=f"needs {SHAKESPEARE}")

TINY = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=2, max_iters=9, eval_interval=3, eval_iters=3,
            log_interval=1, learning_rate=2e-3, warmup_iters=2, device="cpu")
ALL = dict(rope=True, gqa=True, sliding_window=True, n_head=4, n_kv_head=2, window_size=8)


def flags(**changes):
    return [f"--{name}={value}" for name, value in {**TINY, **changes}.items()]


# Importing torch takes seconds. So most processes are forked from one that has done that and nothing else.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "train", "sample", __name__])
SCRIPTS = {"train": train, "sample": sample, "prepare": prepare}


def child(script, argv, env, folder, log, before):
    for number, path in ((0, os.devnull), (1, log + ".out"), (2, log + ".err")):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    sys.stdin = open(0)
    os.environ.update(env)
    os.chdir(folder)
    sys.argv = [script + ".py", *argv]
    if before:
        before()
    prepare.guarded(SCRIPTS[script].main)


def start(script, *argv, ranks=0, folder=None, before=None):
    """Starts `python SCRIPT.py ARGV`, or as many of it as torchrun would; `before` is called first in each."""
    processes, port = [], free_port()
    for rank in range(ranks or 1):
        place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks,
                     MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        env = {name: str(value) for name, value in place.items()} if ranks else {}
        where, log = folder[rank] if isinstance(folder, list) else folder or LOGS, os.path.join(LOGS, str(next(COUNT)))
        process = FORKS.Process(target=child, args=(script, [str(a) for a in argv], env, where, log, before))
        process.log = log
        process.start()
        processes.append(process)
    return processes


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def finish(processes, timeout=60):
    """Waits -> the exit codes, negative for signals; what the first printed; what all of them wrote to stderr."""
    deadline = time.time() + timeout
    for p in processes:
        p.join(max(0, deadline - time.time()))
    late = [p for p in processes if p.is_alive()]
    for p in late:
        p.kill()
        p.join()
    out, err = ("".join(pathlib.Path(p.log + kind).read_text() for p in processes) for kind in (".out", ".err"))
    assert not late, f"{len(late)} of {len(processes)} processes hang after {timeout} s\n{out}\n{err}"
    return SimpleNamespace(codes=[p.exitcode for p in processes], out=out, err=err)


def run(*args, code=0, timeout=60, **how):
    done = finish(start(*args, **how), timeout)
    assert set(done.codes) == {code}, (done.codes, done.out, done.err)
    return done


LOGS, COUNT = None, itertools.count()


@pytest.fixture(scope="session", autouse=True)
def logs(tmp_path_factory):
    global LOGS
    LOGS = str(tmp_path_factory.mktemp("logs"))


def here(capsys, script, *argv):
    """What `python SCRIPT.py ARGV` does, in this process -> (exit code, stdout, stderr)."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    code, before = 0, sys.argv
    sys.argv = [script + ".py", *map(str, argv)]
    try:
        prepare.guarded(SCRIPTS[script].main)
    except SystemExit as e:
        code = e.code or 0
    finally:
        sys.argv = before
        for number, handler in handlers.items():
            signal.signal(number, handler)
    out, err = capsys.readouterr()
    return (1, out, f"{err}{code}\n") if isinstance(code, str) else (code, out, err)


def one_line(err, *words):
    assert err.count("\n") == 1 and "Traceback" not in err and all(word in err for word in words), err


WORDS = ["".join(random.Random(i).choices("abcdefghij", k=i % 6 + 1)) for i in range(40)]
TEXT = "\n".join(" ".join(random.Random(i).choices(WORDS, k=8)) for i in range(200))


def write_set(folder, *texts):
    """A data set by characters, of a text to train on and another for validation."""
    os.makedirs(folder)
    t, counts = prepare.Tokenizer("char", "".join(sorted(set("".join(texts))))), {}
    for split, text in zip(("train", "val"), texts, strict=True):
        t.encode(text).tofile(os.path.join(folder, f"{split}.bin"))
        counts[split] = len(text)
    pathlib.Path(folder, "meta.json").write_text(json.dumps({**t.to_json(), "tokens": counts}))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A data set of 53 training and 5 validation windows: numbers that do not divide evenly."""
    folder = str(tmp_path_factory.mktemp("data") / "set")
    write_set(folder, TEXT[:1700], TEXT[1700:1870])
    return folder


def curve(out):
    """metrics.jsonl without what depends on the machine."""
    records = train.read_metrics(str(out))
    return [{k: v for k, v in r.items() if k not in ("tokens_per_second", "memory")} for r in records]


def same_run(a, b):
    """Two finished runs are equal to the bit: every line of the metrics, the weights, the optimizer and the rest."""
    assert curve(a) == curve(b) and contents(a) == contents(b)


def contents(out):
    """The bytes of a checkpoint, short: {file: hash}."""
    return {name: hash((out / name).read_bytes()) for name in train.FILES}


def agree(a, b, tolerance=2e-5):
    """Largest relative difference of two runs' losses and gradient norms."""
    a, b = curve(a), curve(b)
    assert [(r["step"], r.keys()) for r in a] == [(r["step"], r.keys()) for r in b]
    worst = max(abs(x[k] - y[k]) / (abs(y[k]) or 1) for x, y in zip(a, b, strict=True) for k in x)
    assert worst <= tolerance, worst
    return worst


# ---------------------------------------------------------------------------------------------------------------------
# Data


def read_bin(folder, split):
    return np.fromfile(os.path.join(folder, f"{split}.bin"), dtype="<u2")


@needs_shakespeare
def test_shakespeare_char_is_nanogpts(tmp_path):
    """Another split, vocabulary or order of characters than nanoGPT's, whose losses could then not be compared."""
    prepare.shakespeare_char(str(tmp_path / "s"), SHAKESPEARE)
    text = SHAKESPEARE.read_text()
    ids = {c: i for i, c in enumerate(sorted(set(text)))}
    assert len(ids) == prepare.Tokenizer.load(tmp_path / "s").vocab_size == 65
    cut = int(len(text) * 0.9)
    for split, part, size in (("train", text[:cut], 1_003_854), ("val", text[cut:], 111_540)):
        tokens = read_bin(tmp_path / "s", split)
        assert len(tokens) == size and tokens.tolist() == [ids[c] for c in part]


@needs_shakespeare
@needs_bpe
def test_shakespeare_is_tiktokens(tmp_path):
    """Byte pairs other than GPT-2's, or a split other than nanoGPT's."""
    import tiktoken
    prepare.shakespeare(str(tmp_path / "s"), SHAKESPEARE)
    text, encode = SHAKESPEARE.read_text(), tiktoken.get_encoding("gpt2").encode_ordinary
    cut = int(len(text) * 0.9)
    for split, part, size in (("train", text[:cut], 301_966), ("val", text[cut:], 36_059)):
        assert read_bin(tmp_path / "s", split).tolist() == (encoded := encode(part)) and len(encoded) == size


@pytest.mark.parametrize("tokenizer", ["char", pytest.param("gpt2", marks=needs_bpe)])
def test_own_files(tmp_path, capsys, monkeypatch, tokenizer):
    """A document lost, doubled, glued to the next one, or taken from a hidden or binary file."""
    texts = {f"{i}.txt": f"text {i} says näh.\n\n" * (i + 1) for i in range(12)}
    (tmp_path / "in/deep").mkdir(parents=True)
    for i, (name, text) in enumerate(texts.items()):
        if i % 2:
            (tmp_path / "in" / name).write_text(text)
        else:
            (tmp_path / "in/deep" / (name + ".gz")).write_bytes(gzip.compress(text.encode()))
    lines = [f"a line {i}" for i in range(8)]
    (tmp_path / "in/x.jsonl").write_text("".join(json.dumps({"body": line}) + "\n" for line in lines))
    (tmp_path / "in/.hidden").write_text("hidden")
    (tmp_path / "in/image.png").write_bytes(b"\x89PNG\0\1\2")
    (tmp_path / "in/empty.txt").write_text("")
    monkeypatch.chdir(tmp_path)                                            # the split depends on the paths given
    argv = ["in", f"--name={tmp_path}/set", f"--tokenizer={tokenizer}", "--field=body", "--val_frac=0.3"]
    code, out, _ = here(capsys, "prepare", *argv)
    assert code == 0 and "1 files that are not text" in out and "image.png" in out
    t = prepare.Tokenizer.load("set")
    assert t.name == tokenizer and t.end_of_text == t.vocab_size - 1
    got = {split: t.decode(read_bin("set", split)).split("<|endoftext|>") for split in ("train", "val")}
    assert sorted(got["train"] + got["val"]) == sorted([*texts.values(), *lines]) and len(got["val"]) > 1
    assert train.token_counts("set") == {split: len(read_bin("set", split)) for split in got}


@pytest.mark.parametrize("texts", [["a" * 9000, "b" * 100], ["a" * 100, "b" * 9000]])
def test_few_documents(tmp_path, monkeypatch, texts):
    """Two files, of which the hash of the name gives the large one, or a hundredth, to validation."""
    monkeypatch.chdir(tmp_path)
    for name, text in zip(names := ["4.txt", "5.txt"], texts, strict=True):  # 5.txt is for validation
        pathlib.Path(name).write_text(text)
    prepare.own(str(tmp_path / "set"), names, "char")
    train, val = (read_bin("set", split).tolist() for split in ("train", "val"))
    assert prepare.Tokenizer.load("set").decode(train + val) == "<|endoftext|>".join(texts) and len(val) == 911


@needs_bpe
@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("ab'st1.é日🎉 \n\r\t\u00a0\u2028\x1c\x0b"), max_size=60), st.integers(1, 12))
def test_pieces_give_the_tokens_of_the_whole(text, size):
    """A cut where GPT-2's tokenizer would not cut: other tokens in files of more than one piece."""
    encode = prepare.Tokenizer("gpt2").encode
    with open(os.path.join(LOGS, "text"), "w", encoding="utf-8", newline="") as f:
        f.write(text)
    with open(f.name, encoding="utf-8", newline="") as f:
        pieces = list(prepare.read_pieces(f, size))
    assert "".join(pieces) == text
    assert [i for piece in pieces for i in encode(piece)] == encode(text).tolist()


@pytest.mark.parametrize("ending", ["\n", "\r\n", " "])
def test_pieces_stay_small(tmp_path, ending):
    """Text with Windows' line ends, or without any, read into memory as a whole."""
    (tmp_path / "text").write_bytes(f"word{ending}".encode() * 3000)
    with open(tmp_path / "text", newline="") as f:
        assert max(map(len, prepare.read_pieces(f, 1000))) < 2100


def test_character_table():
    """An id that means another character after loading, or an unknown character taken for a known one."""
    t = prepare.Tokenizer("char", "\n abé日", 6)
    assert t.encode("b é日\n").tolist() == [3, 1, 4, 5, 0] and t.decode([3, 1, 6, 5]) == "b <|endoftext|>日"
    assert t.vocab_size == 7 and prepare.Tokenizer("char", "ab").vocab_size == 2
    with pytest.raises(ValueError, match="'z' is not among the 6"):
        t.encode("abz")
    for wrong in (("char", "aa"), ("char", ""), ("char", None), ("char", "ab", 5), ("bpe",)):
        with pytest.raises(ValueError):
            prepare.Tokenizer(*wrong)


def test_stdlib_needs_no_network(tmp_path, monkeypatch):
    """A default data set that cannot be made offline, or that trains on what it validates."""
    for name in ["test/test_os.py", "site-packages/x.py", "uni.py", "json/x.py"] + [f"m{i}.py" for i in range(31)]:
        (tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / name).write_text(f"# {name}\n" + ("é" if name == "uni.py" else "") + "x = 1\n" * 20)
    monkeypatch.setattr(socket, "socket", None)
    prepare.stdlib(str(tmp_path / "s"), tmp_path / "lib")
    t = prepare.Tokenizer.load(tmp_path / "s")
    texts = [t.decode(read_bin(tmp_path / "s", split)).split("<|endoftext|>") for split in ("train", "val")]
    assert len(texts[0]) + len(texts[1]) == 32 and len(texts[1]) >= 1 and not set(texts[0]) & set(texts[1])
    assert t.characters.isascii() and not any("site-packages" in text or "test_os" in text for text in sum(texts, []))


def shard(tokens, magic=20240520, version=1, claimed=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if claimed is None else claimed
    return header.tobytes() + np.array(tokens, "<u2").tobytes()


GOOD = list(range(50)) * 4


@pytest.mark.parametrize("content", [shard(GOOD, magic=0), shard(GOOD, magic=1)[:700] + b"x" + shard(GOOD)[701:], shard(GOOD)[:8],
                                     shard(GOOD)[:2], b""])
def test_damaged_shards_are_no_raw_tokens(tmp_path, content):
    """A file with the name of llm.c's shards, but its header damaged, taken for raw tokens."""
    (tmp_path / "fineweb_train_000001.bin").write_bytes(content)
    with pytest.raises(ValueError, match="fineweb_train_000001.bin.*fetch it anew"):
        train.Tokens([str(tmp_path / "fineweb_train_000001.bin")], 8, 50)


@pytest.mark.parametrize("content, meta, words", [
    (b"", None, "empty"),
    (np.array(GOOD, "<u2").tobytes()[:-1], None, "half written (399 bytes)"),
    (np.array(GOOD[:32], "<u2").tobytes(), None, "fewer than one window of block_size=32 and one more"),
    (np.array([*GOOD[:170], 777, *GOOD[171:]], "<u2").tobytes(), None, "token 777, beyond the vocabulary of 50"),
    (np.array(GOOD[:150], "<u2").tobytes(), {"tokens": {"train": 200}}, "holds 150 tokens, meta.json says 200"),
    (shard(GOOD)[:-2], None, "cut short"),
    (shard(GOOD, claimed=100), None, "cut short or damaged"),
    (shard(GOOD, version=2), None, "version 2"),
])
def test_damaged_token_files(tmp_path, content, meta, words):
    """Training on whatever a damaged file happens to hold."""
    (tmp_path / "train.bin").write_bytes(content)
    if meta:
        (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=re.escape(words)):
        train.Tokens([str(tmp_path / "train.bin")], 32, 50, train.token_counts(tmp_path).get("train"))


def test_windows(tmp_path):
    """A window that starts at the wrong token, spans two files, or has y out of step with x."""
    (tmp_path / "a.bin").write_bytes(np.arange(0, 10, dtype="<u2").tobytes())  # 2 windows, and a token left over
    (tmp_path / "b.bin").write_bytes(shard(range(100, 113)))               # 3 windows
    data = train.Tokens([str(tmp_path / name) for name in ("a.bin", "b.bin")], 4, 200)
    assert len(data) == 5 and data.tokens == 23
    assert [(x.tolist(), y.tolist()) for x, y in (data[i] for i in range(5))] == [
        (list(range(s, s + 4)), list(range(s + 1, s + 5))) for s in (0, 4, 100, 104, 108)]
    x, y = data.__getitems__([4, 0])
    assert x.dtype == torch.int64 and x.tolist() == [[108, 109, 110, 111], [0, 1, 2, 3]] and y[0, -1] == 112


@settings(max_examples=200, deadline=None)
@given(n=st.integers(1, 40), ranks=st.integers(1, 6), seed=st.integers(0, 5), consumed=st.integers(0, 100))
def test_order(n, ranks, seed, consumed):
    """A window seen twice or never in an epoch, by two ranks, or in another step when the number of ranks changes."""
    def order(rank, size, consumed=0):
        return iter(train.Order(range(n), SimpleNamespace(rank=rank, size=size), seed, consumed))
    line = list(itertools.islice(order(0, 1), 4 * n + 200))
    for epoch in range(3):
        torchs = DistributedSampler(range(n), 1, 0, seed=seed)
        torchs.set_epoch(epoch)
        assert line[epoch * n:(epoch + 1) * n] == list(torchs) and sorted(torchs) == list(range(n))
    whole = n // ranks * ranks                                             # beyond it, torch's repeats some windows
    for rank in range(ranks):
        torchs = list(DistributedSampler(range(n), ranks, rank, seed=seed))
        assert list(itertools.islice(order(rank, ranks), whole // ranks)) == torchs[:whole // ranks]
    each = [list(itertools.islice(order(rank, ranks, consumed - consumed % ranks), 10)) for rank in range(ranks)]
    assert [i for step in zip(*each, strict=True) for i in step] == line[consumed - consumed % ranks:][:10 * ranks]
    assert list(itertools.islice(order(0, 1, consumed), 10)) == line[consumed:consumed + 10]


def test_data_larger_than_memory_is_mapped(tmp_path):
    """Token files read into memory."""
    with open(tmp_path / "train.bin", "wb") as f:
        f.truncate(200 << 30)
    if os.stat(f.name).st_blocks:
        pytest.skip("this file system has no sparse files")
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.time()
    data = train.Tokens([f.name], 1024, 50)
    assert data.tokens == 100 << 30 and data[len(data) - 1][0].sum() == 0 and data.fingerprint()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000 and time.time() - began < 5


def test_a_name_is_not_a_path(data, tmp_path, monkeypatch):
    """A folder of notes that is called like the data set made of them, and is taken for it; or a path that is not."""
    monkeypatch.setattr(train, "DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "set", tmp_path / "data/set", tmp_path / "other"):
        shutil.copytree(data, folder)
    for name, folder in {"set": tmp_path / "data/set", "./set": "./set", "other": "other", data: data}.items():
        assert train.find_data(name)[0] == str(folder)


def test_prepare_leaves_other_files_alone(tmp_path, capsys):
    """A data set prepared over a folder that holds something else, which is then lost."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/input.txt").write_text(TEXT)
    code, _, err = here(capsys, "prepare", tmp_path / "mine/input.txt", f"--name={tmp_path}/mine")
    assert code == 1 and (tmp_path / "mine/input.txt").read_text() == TEXT and os.listdir(tmp_path) == ["mine"]
    one_line(err, "input.txt", "--name")
    for _ in range(2):                                                     # but its own files are replaced
        argv = [tmp_path / "mine/input.txt", f"--name={tmp_path}/other", "--tokenizer=char"]
        assert here(capsys, "prepare", *argv)[0] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Training


def at_step(step, number, rank=None):
    """To be called in a process before train.main: it sends itself a signal while it computes `step`."""
    formula, first = train.learning_rate, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"

    def learning_rate(run, done):
        if first and done + 1 == step and rank in (None, os.environ.get("RANK")):
            os.kill(os.getpid(), number)
        return formula(run, done)
    train.learning_rate = learning_rate


@pytest.fixture(scope="session")
def straight(data, tmp_path_factory):
    """whole: a run with dropout, across an epoch's end. cut: the same, killed two steps after its first checkpoint."""
    folder, how = tmp_path_factory.mktemp("straight"), dict(dataset=data, dropout=0.1)
    run("train", *flags(out_dir=folder / "whole", **how))
    run("train", *flags(out_dir=folder / "cut", **how), before=partial(at_step, 5, signal.SIGKILL), code=-9)
    return folder


def resume(straight, out, *argv, **how):
    shutil.copytree(straight / "cut", out)
    return run("train", *flags(out_dir=out), "--init_from=resume", *argv, **how)


def test_learning_rate():
    """A schedule other than nanoGPT's, or off by one step."""
    made = dict(learning_rate=3.0, min_lr=1.0, warmup_iters=4, lr_decay_iters=10, max_iters=20)

    def nanogpts(it):
        if it < 4:
            return 3.0 * (it + 1) / (4 + 1)
        if it > 10:
            return 1.0
        return 1.0 + 0.5 * (1.0 + math.cos(math.pi * (it - 4) / (10 - 4))) * (3.0 - 1.0)
    for it in range(20):
        assert train.learning_rate(train.Run(**made), it) == pytest.approx(nanogpts(it), rel=1e-12)
    assert train.learning_rate(train.Run(**made), 7) == pytest.approx(2.0)
    default = train.Run(learning_rate=3.0, warmup_iters=0, max_iters=50)
    assert train.learning_rate(default, 0) == 3.0 and train.learning_rate(default, 50) == pytest.approx(0.3)
    assert train.learning_rate(train.Run(learning_rate=3.0, decay_lr=False), 1) == 3.0


def test_equals_a_loop_written_by_hand(data, tmp_path):
    """A step or evaluation that is not as documented: decay on biases, a wrong mean, clip, rate, order or window."""
    changes = dict(weight_decay=0.5, grad_clip=0.5, max_iters=10, eval_interval=5, eval_iters=100)
    run("train", *flags(dataset=data, out_dir=tmp_path / "out", **changes))
    splits = {split: train.Tokens([f"{data}/{split}.bin"], 32, 50) for split in ("train", "val")}
    model = GPT2(GPT2Config(block_size=32, vocab_size=12, n_layer=2, n_head=2, n_embd=32), seed=1337)
    named = dict(model.named_parameters())
    no_decay = [name for name in named if name.endswith("bias") or "ln_" in name]
    optimizer = torch.optim.AdamW([{"params": [named[name] for name in no_decay], "weight_decay": 0.0},
                                   {"params": [named[name] for name in named.keys() - no_decay], "weight_decay": 0.5}],
                                  betas=(0.9, 0.99), foreach=False, fused=False)
    order, rows = [], []
    for epoch in range(2):
        sampler = DistributedSampler(splits["train"], 1, 0, seed=1337)
        sampler.set_epoch(epoch)
        order += list(sampler)
    for step in range(11):
        if step % 5 == 0:
            rows.append([step, *(np.mean([model(*split.__getitems__([i]))[1].item() for i in range(len(split))])
                                 for split in splits.values())])
        if step == 10:
            break
        lr = 2e-3 * (step + 1) / 3 if step < 2 else 2e-4 + 9e-4 * (1 + math.cos(math.pi * (step - 2) / 8))
        for group in optimizer.param_groups:
            group["lr"] = lr
        _, loss = model(*splits["train"].__getitems__(order[8 * step:8 * step + 8]))   # the four batches of two as one
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        rows.append([step + 1, loss.item(), lr, norm.item()])
    for record, row in zip(curve(tmp_path / "out"), rows, strict=True):
        assert [v for k, v in record.items() if k != "tokens"] == pytest.approx(row, rel=2e-5)


def test_evaluation_changes_nothing(data, straight, tmp_path):
    """An evaluation that draws random numbers, or data, that the training then misses."""
    run("train", *flags(dataset=data, dropout=0.1, out_dir=tmp_path / "out", eval_interval=100))
    a, b = ([r for r in curve(out) if "loss" in r] for out in (straight / "whole", tmp_path / "out"))
    assert len(a) == 9 and a == b


def test_what_a_run_leaves(straight, tmp_path, capsys, monkeypatch):
    """A step missing or doubled in metrics.jsonl, a picture no browser opens, a comparison over a run's own curve."""
    records = train.read_metrics(str(straight / "whole"))
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 10))
    assert [r["step"] for r in records if "val_loss" in r] == [0, 3, 6, 9]
    assert all(r["tokens_per_second"] > 0 for r in records if "loss" in r)
    shutil.copytree(straight / "whole", odd := tmp_path / "a<b>&\"c'")
    with open(odd / "metrics.jsonl", "a") as f:
        f.writelines(f'{{"step": {i}, "loss": 1.5}}\n' for i in range(10, 30_000))
    own = (odd / "loss.svg").read_bytes()
    monkeypatch.chdir(tmp_path)
    code, out, _ = here(capsys, "train", f"--plot={odd},{straight / 'whole'}")
    assert code == 0 and out.strip() == "comparison.svg" and (odd / "loss.svg").read_bytes() == own
    assert os.path.getsize("comparison.svg") < 20_000
    assert f"--{odd}-".replace("&", "&amp;").replace("<", "&lt;")[2:-1][-60:] in pathlib.Path("comparison.svg").read_text()
    for wrong in ('{"step": 5, "loss": "1.0"}', '{"step": 5, "loss": NaN}', '{"step": 5, "val_loss": [1]}', '[1]', '{"step'):
        with open(odd / "metrics.jsonl", "a") as f:
            f.write(wrong + "\n")
    assert here(capsys, "train", f"--plot={odd}")[0] == 0 and "nan" not in (odd / "loss.svg").read_text()
    (tmp_path / "metrics.jsonl").write_text(wrong)
    one_line(here(capsys, "train", f"--out_dir={tmp_path}", "--plot")[2], "holds no losses to draw: train first")
    for path in (odd / "loss.svg", "comparison.svg"):
        assert xml.etree.ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_looking_changes_nothing(straight, tmp_path):
    """--eval_only that trains, writes, or measures something else than the evaluation during training."""
    out = resume(straight, tmp_path / "a", "--eval_only").out
    assert f"{next(r['val_loss'] for r in curve(tmp_path / 'a') if r['step'] == 3 and 'val_loss' in r):.4f}" in out
    assert curve(tmp_path / "a") == curve(straight / "cut")


@pytest.mark.parametrize("worse", [True, False])
def test_best_only(straight, tmp_path, worse):
    """--always_save_checkpoint=False that loses the best model, or at Ctrl-C what came after it."""
    only = ["--always_save_checkpoint=False", *worse * ["--learning_rate=1", "--min_lr=1"]]
    resume(straight, tmp_path / "whole", *only)
    resume(straight, out := tmp_path / "cut", *only, before=partial(at_step, 4, signal.SIGTERM), code=143)
    done = run("train", *flags(out_dir=out), "--init_from=resume", *only, before=partial(at_step, 5, signal.SIGTERM), code=143)
    assert f"stopped at step 5, saved in {out}/stopped; the best checkpoint, of step 3, stays in {out}." in done.out
    assert [train.load_state(str(folder))["step"] for folder in (out, out / "stopped")] == [3, 5]
    run("train", *flags(out_dir=out), "--init_from=auto", *only)
    same_run(out, tmp_path / "whole")
    assert train.load_state(str(out))["step"] == (3 if worse else 9) and (out / "stopped").exists() == worse


def test_no_step_is_better(data, straight, tmp_path):
    """A fine-tuning run that only made it worse, and leaves nothing; or one that cannot go on from its step 0."""
    how = dict(dataset=data, out_dir=tmp_path, learning_rate=1, min_lr=1, init_from=straight / "whole")
    done = run("train", *flags(**how), "--always_save_checkpoint=False")
    assert f"no step made the validation loss lower: the checkpoint in {tmp_path} is the model" in done.out
    weights = (straight / "whole/model.safetensors", tmp_path / "model.safetensors")
    assert all(map(torch.equal, *(load_file(path).values() for path in weights)))
    done = run("train", *flags(out_dir=tmp_path, learning_rate=1e-5), "--init_from=resume")
    assert "moved to" not in done.out and [r["step"] for r in curve(tmp_path)] == [0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9]


@pytest.mark.parametrize("eval_interval", [100, 1])                        # the step fails, or the evaluation after it
def test_stops_where_the_loss_is_not_finite(straight, tmp_path, eval_interval):
    """Training on for hours after the loss is nan, or saving such weights over good ones."""
    changes = ["--learning_rate=1e38", "--grad_clip=0", f"--eval_interval={eval_interval}"]
    err = resume(straight, tmp_path / "out", *changes, code=1).err
    one_line(err, f"step {4 if eval_interval == 1 else 5} is", "e+37: stopped", "step 3", f"--out_dir={tmp_path}/out")
    assert contents(tmp_path / "out") == contents(straight / "cut")
    assert all(math.isfinite(v) for r in curve(tmp_path / "out") for v in r.values())


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(data, straight, tmp_path, number, code):
    """Work lost at Ctrl-C or when a cluster takes the machine back."""
    out = tmp_path / "a folder"
    done = run("train", *flags(dataset=data, dropout=0.1, out_dir=out), before=partial(at_step, 5, number), code=code)
    assert f"stopped at step 5, saved in {out}. Go on with" in done.out and not done.err
    assert done.out.splitlines()[-1].strip() == f"python train.py --init_from=resume --out_dir='{out}'"
    assert len(curve(out)) == 2 + 5 and train.load_state(str(out))["step"] == 5
    run("train", "--init_from=resume", f"--out_dir={out}", "--device=cpu")
    same_run(out, straight / "whole")


def test_dropout_differs_per_rank_and_repeats_per_seed(tmp_path):
    """All ranks with the same dropout mask, which halves its worth; or a run that cannot be repeated."""
    write_set(tmp_path / "set", *["abcdefgh" * 50] * 2)                    # all windows are equal

    def first_loss(name, ranks, dropout=0.5, seed=1):
        how = dict(max_iters=1, batch_size=1, gradient_accumulation_steps=ranks or 1, dropout=dropout, seed=seed)
        run("train", *flags(dataset=tmp_path / "set", out_dir=tmp_path / name, **how), ranks=ranks)
        return next(r["loss"] for r in curve(tmp_path / name) if "loss" in r)
    assert first_loss("a", 0, dropout=0) == pytest.approx(first_loss("b", 2, dropout=0), rel=1e-6)
    assert first_loss("c", 2) == first_loss("d", 2) != first_loss("e", 2, seed=2)
    assert abs(first_loss("f", 0) - first_loss("c", 2)) > 1e-3             # rank 0 alone has the mask of rank 0


# ---------------------------------------------------------------------------------------------------------------------
# Distributed


@pytest.fixture(scope="session")
def alone(data, tmp_path_factory):
    """Runs of one process, dropout off: plain GPT-2 and all three flags."""
    folder = tmp_path_factory.mktemp("alone")
    for name, changes in {"plain": {}, "all": ALL}.items():
        run("train", *flags(dataset=data, out_dir=folder / name, **changes))
    return folder


@pytest.mark.parametrize("fsdp", [False, True])
@pytest.mark.parametrize("name, changes", [("plain", {}), ("all", ALL)])
def test_two_processes_train_as_one(data, alone, tmp_path, name, changes, fsdp):
    """Gradients summed instead of averaged, a norm of one shard only, data or evaluation that differ with the mode."""
    run("train", *flags(dataset=data, out_dir=tmp_path / "out", **changes), *["--fsdp"] * fsdp, ranks=2)
    agree(tmp_path / "out", alone / name)


@pytest.mark.slow
@pytest.mark.parametrize("name, changes", [("plain", {}), ("all", ALL)])
def test_all_modes_over_50_steps(data, tmp_path, name, changes):
    """A difference between the modes that grows."""
    how = dict(dataset=data, max_iters=50, eval_interval=1, gradient_accumulation_steps=8, batch_size=1, **changes)
    run("train", *flags(out_dir=tmp_path / "1", **how))
    for mode, ranks in itertools.product(("ddp", "fsdp"), (2, 4)):
        run("train", *flags(out_dir=tmp_path / f"{mode}{ranks}", **how), *["--fsdp"] * (mode == "fsdp"), ranks=ranks, timeout=300)
        print(f"{name}, {mode} on {ranks}: {agree(tmp_path / f'{mode}{ranks}', tmp_path / '1'):.1e} at 50 steps")


def torchrun(*argv, hook="", nproc=2, options=("--standalone",), tmp):
    """Starts torchrun on train.py, in each process of which `hook` is run first."""
    script = HERE / "train.py"
    if hook:
        script = tmp / "train.py"
        script.write_text(f"import signal, sys\nsys.path.insert(0, {str(HERE)!r})\nimport train\n"
                          f"import {__name__}\n{__name__}.{hook}\ntrain.guarded(train.main)\n")
    command = [sys.executable, "-m", "torch.distributed.run", *options, f"--nproc_per_node={nproc}", script, *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp)


def test_torchrun(data, alone, tmp_path):
    """The card's third command, as it is typed."""
    process = torchrun(*flags(dataset=data, out_dir=tmp_path / "out"), "--fsdp", tmp=tmp_path)
    out, _ = process.communicate(timeout=90)
    assert process.returncode == 0 and "fsdp: torchrun started 2 processes" in out and "Warning" not in out, out
    agree(tmp_path / "out", alone / "plain")


@pytest.mark.parametrize("first, then", [(["--fsdp"], ([], 0)), ([], (["--fsdp"], 2)), (["--fsdp"], ([], 2))])
def test_checkpoints_cross_modes(data, alone, tmp_path, first, then):
    """A checkpoint that only the mode which wrote it can read; a SIGTERM to one rank that the others do not hear of."""
    stop = partial(at_step, 5, signal.SIGTERM, "1")
    run("train", *flags(dataset=data, out_dir=tmp_path / "out"), *first, ranks=2, before=stop, code=143)
    run("train", *flags(out_dir=tmp_path / "out"), "--init_from=resume", *then[0], ranks=then[1])
    agree(tmp_path / "out", alone / "plain")


def weigh(folder):
    """Writes down, after a step, the bytes of this process's weights, gradients and optimizer state."""
    def hook(optimizer, *_):
        held = [t for g in optimizer.param_groups for p in g["params"] for t in (p, p.grad, *optimizer.state[p].values())]
        local = (t.to_local() if hasattr(t, "to_local") else t for t in held)
        pathlib.Path(folder, os.environ["RANK"]).write_text(str(sum(t.numel() * t.element_size() for t in local)))
    sys.modules["torch.optim.optimizer"].register_optimizer_step_post_hook(hook)


@pytest.mark.parametrize("ranks", [2, 4])
def test_fsdp_holds_its_share(data, tmp_path, ranks):
    """Sharding that leaves whole weights, gradients or moments in every process."""
    shape = dict(n_embd=64, block_size=32, n_layer=2, n_head=2)
    argv = [*flags(dataset=data, out_dir=tmp_path / "out", max_iters=1, **shape), "--fsdp"]
    run("train", *argv, ranks=ranks, before=partial(weigh, tmp_path))
    whole = 16 * GPT2.from_pretrained(tmp_path / "out").num_parameters()
    shares = [int(pathlib.Path(tmp_path, str(rank)).read_text()) / whole for rank in range(ranks)]
    assert max(shares) <= 1.1 / ranks and sum(shares) >= 1, shares


def watch_memory(folder):
    """weigh, and writes down by how much the process grows while weights are loaded and while a checkpoint is saved.
    The pages of a mapped file do not count: they are the disk cache's, one copy however many processes read them."""
    ctypes.CDLL(None).mallopt(-3, 1 << 18)                                 # what is freed shall be given back at once
    weigh(folder)
    phase, first, peak = "start", {}, Counter()

    def look():
        held = int(re.search(r"RssAnon:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
        peak[phase] = max(peak[phase], held - first.setdefault(phase, held))

    def entering(name, function):
        def entered(*args):
            nonlocal phase
            phase = name
            look()
            result = function(*args)
            pathlib.Path(folder, "grown" + os.environ["RANK"]).write_text(json.dumps(peak))
            return result
        return entered
    train.choose_model = entering("load", train.choose_model)
    train.Team.wrap = entering("train", train.Team.wrap)
    train.save = entering("save", train.save)
    threading.Thread(target=lambda: [look() for _ in iter(lambda: time.sleep(0.001), 0)], daemon=True).start()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_no_copies_of_the_whole(data, tmp_path, ranks):
    """Loading under FSDP that builds the whole model or optimizer, or a save that gathers it, in every process."""
    config = GPT2Config(n_layer=8, n_head=8, n_embd=512, block_size=64, vocab_size=prepare.Tokenizer.load(data).vocab_size)
    GPT2(config, seed=0).save_pretrained(tmp_path / "weights")
    shutil.copy(f"{data}/meta.json", tmp_path / "weights")
    whole = os.path.getsize(tmp_path / "weights/model.safetensors")
    argv = dict(dataset=data, out_dir=tmp_path / "out", init_from=tmp_path / "weights", device="cpu", always_save_checkpoint=True,
                max_iters=1, batch_size=1, gradient_accumulation_steps=ranks, eval_iters=1)
    argv = ["--fsdp", *(f"--{name}={value}" for name, value in argv.items())]
    run("train", *argv, ranks=ranks, before=partial(watch_memory, tmp_path))
    grown = [json.loads((tmp_path / f"grown{rank}").read_text()) for rank in range(ranks)]
    load, save = (sum(g[phase] for g in grown) / whole for phase in ("load", "save"))
    held = [int((tmp_path / str(rank)).read_text()) / whole for rank in range(ranks)]
    print(f"{ranks} processes: {load:.2f} times the weights to load, {save:.2f} to save, {max(held):.2f} in a step")
    assert load < 1.3 and save < 3                                         # to save, one process has both moments whole
    assert max(held) < 4.4 / ranks


@pytest.mark.parametrize("ranks, argv, words", [
    (3, [], ["--gradient_accumulation_steps=4", "among 3", "use 3 or 6", "--nproc_per_node=2"]),
    (2, ["--backend=foo"], ["--backend=foo does not serve cpu: use gloo"]),
    (2, ["--device=cuda:1"], ["--device=cuda:1 names one GPU"]),
    (2, ["--init_from=resume", "--block_size=16"], ["--block_size=16 contradicts the checkpoint", "block_size=32"])])
def test_refused_under_torchrun(data, straight, tmp_path, ranks, argv, words):
    """A global batch silently made smaller, a line from each process, or processes that linger for others."""
    out = straight / "whole" if "--init_from=resume" in argv else tmp_path / "out"
    one_line(run("train", *flags(dataset=data, out_dir=out), *argv, ranks=ranks, code=2, timeout=20).err, *words)


def test_ranks_that_see_other_things(data, tmp_path):
    """Two machines with unlike data, or of which one has no checkpoint: a hang, or a model trained on a mixture."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        shutil.copytree(data, folder / "set")
    run("train", *flags(dataset="set", out_dir="out"), folder=folders[0])
    err = run("train", *flags(dataset="set", out_dir="out"), "--init_from=auto", ranks=2, folder=folders, code=1).err
    one_line(err, "a checkpoint in out", "process 1 of 2 has False, process 0 has True")
    tokens = read_bin(data, "train")
    tokens[::17] = 0
    tokens.tofile(folders[1] / "set/train.bin")
    err = run("train", *flags(dataset="set", out_dir=tmp_path / "out"), ranks=2, folder=folders, code=1).err
    one_line(err, "the data in set", "process 1 of 2 has", "process 0 has")
    assert not (tmp_path / "out").exists()


def named_data(folder):
    def stdlib(where):
        with open(os.path.join(folder, "calls"), "a") as f:
            f.write("prepared\n")
        time.sleep(0.5)
        write_set(where, TEXT[:800], TEXT[800:900])
    prepare.DATA = train.DATA = folder
    train.DATASETS["stdlib"] = stdlib


def test_ranks_prepare_data_once(tmp_path):
    """Four processes that write the same files at the same time."""
    run("train", *flags(max_iters=1, out_dir=tmp_path / "out"), ranks=4, before=partial(named_data, str(tmp_path)))
    assert (tmp_path / "calls").read_text() == "prepared\n" and not (tmp_path / "stdlib.part").exists()


@pytest.mark.parametrize("mode, dead", [([], 1), (["--fsdp"], 1), ([], 0)])
def test_others_end_quietly(data, tmp_path, mode, dead):
    """A traceback from each process that had waited for the dead one, which hides what that one said."""
    die = partial(at_step, 5, signal.SIGKILL, str(dead))
    done = finish(start("train", *flags(dataset=data, out_dir=tmp_path / "out"), *mode, ranks=2, before=die))
    assert done.codes[dead] == -9 and done.codes[1 - dead] == 1
    if dead == 1:
        one_line(done.err, "train.py: another process of this run has ended")
    else:
        assert not done.err


@pytest.mark.slow
@pytest.mark.parametrize("mode", [[], ["--fsdp"]])
@pytest.mark.parametrize("hook", ["at_step(5, signal.SIGKILL, '2')", "fails_at_once('2')"])
def test_a_dead_rank_ends_the_run(data, tmp_path, mode, hook):
    """The other ranks wait for it for ever."""
    began = time.time()
    process = torchrun(*flags(dataset=data, out_dir=tmp_path / "out"), *mode, hook=hook, nproc=4, tmp=tmp_path)
    out, _ = process.communicate(timeout=120)
    assert process.returncode and re.search(r"rank\s*:\s*2 ", out), out
    print(f"{hook} {mode}: torchrun ended after {time.time() - began:.0f} s")
    assert time.time() - began < 60


def fails_at_once(rank):
    if os.environ["RANK"] == rank:
        raise RuntimeError("before the first collective")


def rendezvous():
    return ("--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--local_addr=127.0.0.1")


@pytest.mark.slow
@pytest.mark.parametrize("mode, nodes", [([], 1), (["--fsdp"], 1), ([], 2)])
def test_a_dead_rank_is_restarted(data, alone, tmp_path, monkeypatch, mode, nodes):
    """--max-restarts with --init_from=auto that begins anew, goes on from other numbers, or finds the dead in the store."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", str(nodes - 1))
    options = ("--max-restarts=2", *(rendezvous() if nodes == 2 else ["--standalone"]))
    argv = [*flags(dataset=data, out_dir=tmp_path / "out"), "--init_from=auto", *mode]
    how = dict(options=options, hook="at_step(5, signal.SIGKILL, '2')", nproc=4 // nodes, tmp=tmp_path)
    for agent in [torchrun(*argv, **how) for _ in range(nodes)]:
        out, _ = agent.communicate(timeout=180)
        assert agent.returncode == 0, out
    agree(tmp_path / "out", alone / "plain")


@pytest.mark.slow
@pytest.mark.parametrize("mode", [[], ["--fsdp"]])
@pytest.mark.parametrize("static", [True, False])
def test_two_nodes(data, alone, tmp_path, mode, static):
    """What only shows with two torchrun agents, by the README's line (static) or c10d: ranks taken for local ranks."""
    argv = [*flags(dataset=data, out_dir=tmp_path / "out"), *mode]
    line = re.search(r"^torchrun (--nnodes=2 .*) train\.py", (HERE / "README.md").read_text(), re.MULTILINE)[1]
    line = line.replace("10.0.0.1", "127.0.0.1").replace("29500", str(free_port()))
    nodes = [line.replace("=N", f"={node}").split() for node in range(2)] if static else [rendezvous()] * 2
    for agent in [torchrun(*argv, options=options, tmp=tmp_path) for options in nodes]:
        out, _ = agent.communicate(timeout=180)
        assert agent.returncode == 0, out
    agree(tmp_path / "out", alone / "plain")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of a run


def nothing_mapped():
    """A save fails where the checkpoint that the run went on from is still mapped: Windows could not replace its files."""
    def checked(*args, save=train.save):
        maps = pathlib.Path("/proc/self/maps")
        assert not maps.exists() or not re.search(r"training_state\.pt|\.safetensors", maps.read_text())
        save(*args)
    train.save = checked


@pytest.mark.parametrize("mode, ranks", [([], 0), ([], 2), (["--fsdp"], 2)])
def test_resume_to_the_bit(data, tmp_path, mode, ranks):
    """A resume that loses the moments, the place in the data, dropout's stream or the schedule, or doubles a step."""
    def go(out, *argv, **how):
        run("train", *flags(dataset=data, dropout=0.1, out_dir=tmp_path / out), *mode, *argv, ranks=ranks, **how)
    go("whole")
    for step in (5, 8):                                                    # in the first epoch and in the second
        go("cut", "--init_from=auto", before=partial(at_step, step, signal.SIGKILL), code=-9)
    go("cut", "--init_from=auto", before=nothing_mapped)
    same_run(tmp_path / "cut", tmp_path / "whole")


def test_transformers_opens_it(data, straight):
    """A checkpoint that Hugging Face's reader refuses, or reads as another model than the one that was evaluated."""
    from transformers import GPT2LMHeadModel
    x, y = train.Tokens([f"{data}/val.bin"], 32, 50).__getitems__(range(5))
    with torch.no_grad():
        theirs = GPT2LMHeadModel.from_pretrained(straight / "whole").eval()(x).logits
        ours, _ = GPT2.from_pretrained(str(straight / "whole"))(x)
    assert (theirs - ours).abs().max() < 1e-4 * theirs.std()
    loss = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), y.flatten()).item()
    assert curve(straight / "whole")[-1]["val_loss"] == pytest.approx(loss, rel=2e-5)


class Watched:
    """A file whose writes are watched. The one at which something happens gets only half of its bytes out."""

    def __init__(self, f, due):
        self.f, self.due = f, due

    def __getattr__(self, name):
        return getattr(self.f, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.f.close()

    def write(self, data):
        def half():
            self.f.write(data[:len(data) // 2])
            self.f.flush()
        self.due("write", half)
        return self.f.write(data)


def at_disk_call(n, act, calls=None):
    """To be called in a process before train.main: the n-th time that the save of step 6 turns to the disk, it is
    killed ("kill"), finds the disk full ("full") or from then on read-only ("sealed"). `calls`: a file for the names of
    the calls."""
    import model
    names, on = [], []

    def due(name, first=lambda: None):
        if on:
            names.append(name)
            if act == "sealed" and len(names) >= n:
                raise OSError(30, "Read-only file system")
            if len(names) == n:
                first()
                if act == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(28, "No space left on device")

    def watch(name, function):
        def watched(*args, **how):
            due(name)
            return function(*args, **how)
        setattr(os, name, watched)
    for name in ("fsync", "rename", "replace", "link", "remove", "rmdir", "makedirs"):
        watch(name, getattr(os, name))
    train.open = model.open = lambda *args, **how: Watched(open(*args, **how), due) if on else open(*args, **how)
    whole_save = train.save

    def save(*args):
        on.extend([1] * (args[-1]["step"] == 6))
        whole_save(*args)
        on.clear()
        if calls:
            pathlib.Path(calls).write_text(" ".join(names))
    train.save = save


@pytest.mark.parametrize("act", ["kill", "full", "sealed"])
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_save_loses_anything(straight, tmp_path, act, every):
    """A moment in a save at which a kill, or a disk that is full or read-only, leaves no checkpoint, or one of two steps."""
    resume(straight, tmp_path / "counted", before=partial(at_disk_call, 0, "none", tmp_path / "calls"))
    same_run(tmp_path / "counted", straight / "whole")
    names = (tmp_path / "calls").read_text().split()
    done = names.index("rename")                                           # which completes the save
    numbers = list(range(len(names)) if every else (1, done // 2, done - 1, done, done + 1, done + 4, len(names) - 1))
    for first in range(0, len(numbers), 8):
        outs, started = {i: tmp_path / str(i) for i in numbers[first:first + 8]}, []
        for i, out in outs.items():
            shutil.copytree(straight / "cut", out)
            how = partial(at_disk_call, i + 1, act)
            started.append(start("train", *flags(out_dir=out), "--init_from=resume", before=how))
        for i, processes in zip(outs, started, strict=True):
            done = finish(processes)
            if act == "kill":
                assert done.codes == [-9], (i, names[i], done.err)
            elif act == "sealed" or names[i] != "link":                    # where there are no links, files are moved
                assert done.codes == [1], (i, names[i], done.err)
                one_line(done.err, "step 6 cannot be saved in", "Read-only" if act == "sealed" else "No space left")
        started = [start("train", *flags(out_dir=out), "--init_from=auto") for out in outs.values()]
        for i, processes in zip(outs, started, strict=True):
            done = finish(processes)
            assert done.codes == [0], (i, names[i], done.err)
            same_run(outs[i], straight / "whole")
            shutil.rmtree(outs[i])
    print(f"{act}: {len(numbers)} moments in a save of {len(names)} calls")


SAVING = ["checkpoint of step 6 cannot be saved in", "File too large; the one before it is untouched"]
METRICS = ["metrics.jsonl cannot be written"]


@pytest.mark.parametrize("size, ranks, words", [(50_000, 0, SAVING), (150_000, 0, SAVING), (150_000, 2, SAVING),
                                                (900, 0, METRICS), (900, 2, METRICS)])
def test_disk_full(straight, tmp_path, size, ranks, words):
    """A traceback, of one process or of those that wait for it, or the good checkpoint lost, where the weights, the
    state or the metrics cannot grow any further."""
    limit = partial(files_up_to, size)
    done = resume(straight, tmp_path / "out", before=limit, code=1, ranks=ranks)
    one_line(done.err, *words)
    assert contents(tmp_path / "out") == contents(straight / "cut") and not (tmp_path / "out/.saving").exists()
    run("train", *flags(out_dir=tmp_path / "out"), "--init_from=auto")
    same_run(tmp_path / "out", straight / "whole")


def files_up_to(size):
    if size < 2000:                                                        # less than what is printed, into a file
        sys.stdout = io.StringIO()
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


class Malicious:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("damage, words", [
    ("two steps", "the weights are of step 6, training_state.pt is of step 9"), ("no weights", "No such file"),
    ("short model.safetensors", "cut short"), ("short training_state.pt", "training_state.pt is damaged"),
    ("short meta.json", "meta.json is damaged"), ("short config.json", "config.json"),
    ("pickle", "training_state.pt is damaged"), ("torch.save", "training_state.pt is damaged"),
    ("empty", "training_state.pt is damaged"), ("optimizer", "training_state.pt has no optimizer state")])
def test_damaged_checkpoints(straight, tmp_path, capsys, damage, words):
    """Training on from a mixture, a traceback, or code in a pickle that is run."""
    shutil.copytree(straight / "whole", out := tmp_path / "out")
    state = out / "training_state.pt"
    if damage == "two steps":
        shutil.copy(out / "previous/model.safetensors", out)
    elif damage.startswith("short "):
        path = out / damage[6:]
        path.write_bytes(path.read_bytes()[:-50])
    elif damage == "no weights":
        (out / "model.safetensors").unlink()
    elif damage == "pickle":
        state.write_bytes(pickle.dumps(Malicious(str(tmp_path / "ran"))))
    elif damage == "torch.save":
        torch.save({"step": 9, "run": Malicious(str(tmp_path / "ran"))}, state)
    elif damage == "optimizer":
        saved = torch.load(state, weights_only=True)
        del saved["optimizer"]["transformer.wte.weight"]["exp_avg"]
        torch.save(saved, state)
    else:
        state.write_bytes(b"")
    for init_from in ("resume", "auto"):
        argv = [f"--out_dir={out}", f"--init_from={init_from}", "--max_iters=20", "--device=cpu"]
        code, _, err = here(capsys, "train", *argv)
        assert code == 1 and not (tmp_path / "ran").exists()
        one_line(err, words)
        assert f"is in {out}/previous" in err or damage in ("short meta.json", "short config.json", "optimizer")


def test_a_new_run_does_not_destroy_the_old_one(data, straight, tmp_path):
    """`python train.py` typed once too often over a finished run."""
    out = tmp_path / "out"
    shutil.copytree(straight / "whole", out)
    done = run("train", *flags(dataset=data, out_dir=out, seed=2))
    assert f"moved to {out}/previous_run" in " ".join(done.out.split())
    same_run(out / "previous_run", straight / "whole")
    assert curve(out)[-1]["step"] == 9 and curve(out) != curve(straight / "whole")
    assert "moved to" not in run("train", *flags(out_dir=out), "--init_from=resume", "--max_iters=10").out


@pytest.mark.slow
def test_100_kills(data, tmp_path):
    """An instant at which kill -9 loses something, inside a save or outside."""
    chance, inside, killed = random.Random(0), 0, 0
    for mode, ranks, kills in (([], 0, 80), ([], 2, 10), (["--fsdp"], 2, 10)):
        def go(out, mode=mode, ranks=ranks, **how):
            argv = [*flags(dataset=data, dropout=0.1, out_dir=out), "--init_from=auto", *mode]
            return start("train", *argv, ranks=ranks, **how)
        began = time.time()
        finish(go(whole := tmp_path / f"whole{len(mode)}{ranks}", before=slow_disk))
        seconds = time.time() - began
        for kill in range(kills):
            out = tmp_path / f"{len(mode)}{ranks}{kill}"
            processes = go(out, before=slow_disk)
            if kill % 2:                                                   # at any time
                time.sleep(chance.uniform(0, seconds))
            else:                                                          # in a save
                nth, seen = chance.randrange(3), False
                while any(p.is_alive() for p in processes) and nth >= 0:
                    now = (out / ".saving").exists() or (out / ".saved").exists()
                    nth, seen = nth - (now and not seen), now
                    time.sleep(0.001)
                time.sleep(chance.uniform(0, 0.25))
            killed += any(p.is_alive() for p in processes)
            for p in processes:
                p.kill()
            for p in processes:
                p.join()
            inside += (out / ".saving").exists() or (out / ".saved").exists()  # left by an unfinished save
            done = finish(go(out))
            assert set(done.codes) == {0}, done.err
            same_run(out, whole)
            shutil.rmtree(out)
    print(f"{killed} kills, {inside} of them inside a save")
    assert killed >= 90 and inside >= 30


def slow_disk():
    for name in ("fsync", "rename", "replace", "link", "rmdir"):
        def slowly(call, *args, **how):
            time.sleep(0.02)
            return call(*args, **how)
        setattr(os, name, partial(slowly, getattr(os, name)))


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


SAMPLED = r"(?s)(.*)\n([\d,]+) tokens in [\d.]+ s: [\d,.]+ tokens per second on cpu, float32\n"


def sampled(capsys, out, *argv):
    """The text that sample.py prints, and the number of tokens on its last line."""
    code, text, err = here(capsys, "sample", f"--out_dir={out}", "--device=cpu", *argv)
    assert code == 0 and not err, err
    return re.fullmatch(SAMPLED, text).groups()


def generated(out, prompt, *size, **how):
    t, model = prepare.Tokenizer.load(out), GPT2.from_pretrained(str(out))
    idx = torch.from_numpy(t.encode(prompt).astype(np.int64)).repeat(size[0], 1)
    return [t.decode(row.tolist()) for row in model.generate(idx, size[1], **how)]


@pytest.mark.parametrize("argv, words", [
    (["--gqa", "--n_kv_head=1"], "gqa: 4 key/value heads mean-pooled to 1; the model wants further training"),
    (["--sliding_window", "--window_size=4"], "sliding_window: the weights are used as they are, with a window of 4; the"),
    (["--rope"], "rope: the learned positions (wpe) are left out; the model wants"), ([], "")])
def test_changed_weights_are_told(straight, tmp_path, capsys, argv, words):
    """Weights that were changed on the way in, and nobody says so; or a note where nothing was."""
    GPT2(GPT2Config(n_layer=1, n_head=4, n_embd=32, block_size=32, vocab_size=50)).save_pretrained(tmp_path / "w")
    shutil.copy(straight / "whole/meta.json", tmp_path / "w")
    code, out, err = here(capsys, "sample", f"--init_from={tmp_path / 'w'}", "--start=a", "--max_new_tokens=2", *argv)
    assert code == 0 and (words in err if words else not err) and "training" not in out


def test_sample_equals_generate(straight, tmp_path, capsys):
    """Text by another tokenizer than the checkpoint's, tokens lost or doubled, a seed or flag without effect."""
    shutil.copytree(straight / "whole", out := tmp_path / "alone")         # no data set in sight
    greedy = sampled(capsys, out, "--start=ab c", "--max_new_tokens=60", "--temperature=0")
    assert greedy == (*generated(out, "ab c", 1, 60, temperature=0), "60")
    how = dict(temperature=0.7, top_k=5, top_p=0.9)
    expected = generated(out, "ab c", 3, 9, generator=torch.Generator().manual_seed(7), **how)
    (tmp_path / "prompt").write_text("ab c")
    argv = [f"--start=FILE:{tmp_path}/prompt", "--num_samples=3", "--max_new_tokens=9", "--seed=7"]
    texts, count = sampled(capsys, out, *argv, *(f"--{name}={value}" for name, value in how.items()))
    assert texts + "\n" == "".join(text + "\n" + "-" * 15 + "\n" for text in expected) and count == "27"
    assert len({sampled(capsys, out, "--start=a", f"--seed={seed}") for seed in (1, 1, 2)}) == 2


@needs_bpe
def test_streams_whole_characters(tmp_path, capsys, monkeypatch):
    """Half a character printed as �, or nothing printed before the end."""
    GPT2(GPT2Config(n_layer=1, n_head=1, n_embd=8, block_size=16)).save_pretrained(tmp_path / "m")
    text, pieces = "naïve 日本語 🎉🏳️‍🌈 Ελλάδα!", []
    tokens = prepare.Tokenizer("gpt2").encode(text).tolist()
    monkeypatch.setattr(GPT2, "stream", lambda self, idx, n, **how: (torch.tensor([i]) for i in tokens))
    monkeypatch.setattr(sample, "print", lambda *a, **how: pieces.append(a[0]), raising=False)
    assert here(capsys, "sample", f"--init_from={tmp_path}/m", "--start=ö", "--device=cpu")[0] == 0
    assert "".join(pieces[:-1]) == "ö" + text and "�" not in "".join(pieces) and len([p for p in pieces if p]) > 10


@pytest.mark.parametrize("streaming", [True, False])
def test_stop_at_eot(tmp_path, capsys, monkeypatch, streaming):
    """Text after the end of the document, the token itself in it, or one text of a batch that stops the others."""
    GPT2(GPT2Config(n_layer=1, n_head=1, n_embd=8, block_size=16, vocab_size=10)).save_pretrained(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps(prepare.Tokenizer("char", "abcdefg", 7).to_json()))
    columns = [[0, 1], [7, 2], [7, 9], [7, 7]]                             # 9: an id that the tokenizer lacks

    def stream(self, idx, n, stop_token, **how):
        assert stop_token == 7
        return (torch.tensor(column[:len(idx)]) for column in columns)
    monkeypatch.setattr(GPT2, "stream", stream)
    text, count = sampled(capsys, tmp_path, "--start=g", "--stop_at_eot", f"--num_samples={2 - streaming}")
    line = "-" * 15
    assert (text, count) == (("ga", "1") if streaming else (f"ga\n{line}\ngbc\n{line}", "4"))


def interrupted(after):
    stream = GPT2.stream

    def watched(*args, **how):
        for i, token in enumerate(stream(*args, **how)):
            if i == after:
                os.kill(os.getpid(), signal.SIGINT)
            yield token
    GPT2.stream = watched


def test_ctrl_c_while_sampling(straight):
    """A traceback for a person who has read enough."""
    argv = [f"--out_dir={straight / 'whole'}", "--start=a", "--device=cpu"]
    done = run("sample", *argv, before=partial(interrupted, 9), code=130)
    assert done.err == "" and done.out.startswith("a") and "tokens per second" not in done.out


def test_prompts(tmp_path, monkeypatch):
    """A piped text that is taken for a file's name, or a traceback where there is no standard input (<&-)."""
    (tmp_path / "prompt").write_text("FILE:b")
    with open(tmp_path / "prompt") as f:
        monkeypatch.setattr(sys, "stdin", f)
        assert sample.read_prompt({}) == "FILE:b"
    monkeypatch.setattr(sys, "stdin", None)
    assert sample.read_prompt({}) == "\n" and sample.read_prompt({"start": f"FILE:{tmp_path}/prompt"}) == "FILE:b"


def test_as_typed(straight, tmp_path):
    """What works only in the tests' own process: a piped prompt, a reader that leaves, a run from another folder."""
    script, out = f"{sys.executable} {HERE}/", f"--out_dir={straight / 'whole'} --device=cpu"
    lines = [f"printf 'ab c' | {script}sample.py {out} --max_new_tokens=5", f"{script}sample.py {out} | head -c 9",
             f"{script}train.py --out_dri=x", f"{script}data/prepare.py", f"{script}model.py --foo"]
    how = dict(cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes = [subprocess.Popen(["bash", "-c", line], **how) for line in lines]
    (piped, no_err), (begun, no_err2), *wrong = [p.communicate(timeout=120) for p in processes]
    assert re.fullmatch(SAMPLED, piped)[1].startswith("ab c") and len(re.fullmatch(SAMPLED, piped)[1]) == 9
    assert begun[0] == "\n" and len(begun) == 9 and no_err == no_err2 == ""
    one_line(wrong[0][1], "did you mean --out_dir")
    one_line(wrong[1][1], "say what to prepare")
    one_line(wrong[2][1], "model.py: --foo is not understood")
    assert [p.returncode for p in processes[2:]] == [2, 2, 2]
    assert not os.listdir(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


@pytest.fixture(scope="session")
def bad(data, straight, tmp_path_factory):
    """Files and folders of which each has something wrong."""
    tmp = tmp_path_factory.mktemp("bad")
    for name in ("empty", "nanogpt", "half", "wide", "counts", "pickle", "short", "bpe", "nometa"):
        (tmp / name).mkdir()
    tokens = read_bin(data, "train")
    for name in ("nanogpt", "half", "wide", "counts"):
        for split in ("train", "val"):
            shutil.copy(f"{data}/{split}.bin", tmp / name)
    (tmp / "nanogpt/meta.pkl").write_bytes(b"")
    shutil.copy(f"{data}/meta.json", tmp / "half")
    tokens[:-100].tofile(tmp / "half/train.bin")
    shutil.copy(f"{data}/meta.json", tmp / "wide")
    np.where(np.arange(len(tokens)) == 5, 999, tokens).astype("<u2").tofile(tmp / "wide/train.bin")
    for name in ("pickle", "short", "bpe", "nometa"):
        for file in ("config.json", "model.safetensors", "meta.json"):
            shutil.copy(straight / "whole" / file, tmp / name)
    (tmp / "pickle/model.safetensors").write_bytes(pickle.dumps(list(range(9))))
    (tmp / "short/model.safetensors").write_bytes((tmp / "short/model.safetensors").read_bytes()[:-9])
    (tmp / "bpe/meta.json").write_text('{"tokenizer": "gpt2"}')
    (tmp / "counts/meta.json").write_text('{"tokenizer": "gpt2", "tokens": 5}')
    (tmp / "nometa/meta.json").unlink()
    packed = gzip.compress(random.Random(0).randbytes(99999).hex().encode())
    for name, content in {"file": b"", "text": TEXT.encode(), "late": b"a" * 99999 + b"\xff", "cut.gz": packed[:-9],
                          "wrong.gz": packed[:70000] + bytes(99) + packed[70099:],
                          "latin.jsonl": b'{"text": "caf\xe9"}', "x.jsonl": b'{"text": "a"}\n{"txt": "b"}\n'}.items():
        (tmp / name).write_bytes(content)
    return tmp


NANOGPT = """out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint init_from dataset
    gradient_accumulation_steps batch_size block_size n_layer n_head n_embd dropout bias learning_rate max_iters
    weight_decay beta1 beta2 grad_clip decay_lr warmup_iters lr_decay_iters min_lr
    backend device dtype compile""".split()


def test_flags(capsys, monkeypatch):
    """A field without its flag, a flag without help, help wider than 80 columns, a boolean that cannot be switched off."""
    monkeypatch.setenv("COLUMNS", "80")
    for script, names in dict(train=[*train.RUN, *train.SHAPE, *NANOGPT], sample=[*sample.OPTIONS, *sample.CHANGES],
                              prepare=["name", "tokenizer", "val_frac", "field", "source"]).items():
        code, out, err = here(capsys, script, "--help")
        assert code == 0 and not err and max(map(len, out.splitlines())) <= 80
        for name in names:
            assert re.search(rf"^  --{name} .*\n?.*\w", out, re.MULTILINE), name
    options = train.options()
    for name in (name for name, (kind, _, _) in options.items() if kind is bool):
        for flag in f"--{name}", f"--{name}=True", f"--{name}=False", f"--no-{name}":
            on = "False" not in flag and "--no-" not in flag
            assert prepare.command_line("", options, argv=[flag]) == ({name: on}, [])


BAD = """
train    2  --n_layr=2                                             did you mean --n_layer?
train    2  --zzz                                                  there is no flag --zzz
train    2  --tokenizer                                            there is no flag --tokenizer (
train    2  --n_layer=two                                          --n_layer: invalid int value: 'two'
train    2  --rope=maybe                                           neither True nor False
train    2  config/train_gpt2.py                                   config files are not run
train    2  --n_embd=30 --n_head=4                                 n_embd=30 is not divisible by n_head=4: try n_embd=32
train    2  --gqa --n_head=4 --n_kv_head=3                         not divisible by n_kv_head=3: try one of [1, 2, 4]
train    2  --rope --n_embd=30                                     must be even, so try n_embd=32
train    2  --n_kv_head=1                                          add --gqa
train    2  --window_size=8                                        add --sliding_window
train    2  --rope_theta=5                                         add --rope
train    2  --sliding_window --window_size=0                       window_size=0
train    2  --sliding_window --window_size=64                      at most 32
train    2  --dropout=nan                                          dropout=nan
train    2  --vocab_size=5                                         too small
train    2  --fsdp                                                 torchrun --standalone --nproc_per_node=2 train.py
train    2  --backend=gloo                                         --backend has no effect
train    2  --device=mps                                           use --device=cpu
train    2  --benchmark --eval_only                                leave one out
train    2  --device=gpu                                           use auto, cpu, cuda
train    2  --device=meta                                          use auto, cpu, cuda
train    2  --device=xpu                                           use auto, cpu, cuda
train    2  --device=cuda:99                                       GPUs
train    2  --dtype=int8                                           float32, bfloat16
train    2  --dtype=float16                                        use bfloat16 or float32
train    2  --compile=maybe                                        auto, True or False
train    2  --learning_rate=nan                                    --learning_rate=nan
train    2  --max_iters=-1                                         --max_iters=-1
train    2  --batch_size=0                                         --batch_size=0
train    2  --beta2=1.0                                            --beta2=1.0
train    2  --seed=-1                                              --seed=-1
train    2  --seed=18446744073709551616                            --seed=18446744073709551616
train    2  --decay_lr=False                                       no effect without --decay_lr
train    1  --dataset=nowhere                                      python data/prepare.py PATH... --name=nowhere
train    1  --dataset={bad}/empty                                  no train.bin
train    1  --dataset={bad}/nanogpt                                meta.pkl, a pickle
train    1  --dataset={bad}/counts                                 counts/meta.json is damaged: its tokens
train    1  --dataset={bad}/half                                   half written
train    1  --dataset={bad}/wide                                   token 999, beyond the vocabulary
train    1  --block_size=512                                       smaller --block_size
train    2  --init_from=gpt3                                       neither scratch, resume, auto
train    1  --init_from=resume                                     there is no checkpoint in
train    1  --init_from=gpt2                                       without a network bring the file to
train    2  --init_from={run} --n_head=4                           n_head=4 contradicts
train    2  --init_from=resume --out_dir={run} --n_layer=3         contradicts the checkpoint
train    2  --init_from=resume --out_dir={run} --dataset=stdlib    contradicts the checkpoint
train    2  --init_from=resume --out_dir={run} --dropout=2         dropout=2
train    1  --init_from={bad}/pickle                               could run code
train    1  --init_from={bad}/short                                cut short
train    1  --init_from={bad}/bpe                                  choose or prepare one with its tokenizer
train    1  --out_dir={bad}/file                                   file cannot be written
train    1  --wandb                                                --wandb cannot begin: division by zero
train    2  --out_dir=                                             --out_dir is empty
train    2  --plot={bad}/empty                                     has no effect with --plot
sample   2  --strat=x                                              did you mean --start?
sample   2  --top_p=0.0                                            --top_p=0.0
sample   2  --top_k=-1                                             --top_k=-1
sample   2  --temperature=-1.0                                     --temperature=-1.0
sample   2  --num_samples=0                                        --num_samples=0
sample   2  --max_new_tokens=0                                     --max_new_tokens=0
sample   2  --max_new_tokens=99999999999                           below 2^31
sample   2  --dtype=int4                                           --dtype=int4
sample   2  --seed=18446744073709551616                            --seed=18446744073709551616
sample   2  --device=gpu                                           --device=gpu
sample   2  --device=meta                                          use auto, cpu, cuda
sample   2  --init_from=                                           --init_from is empty
sample   2  --device=cuda:99                                       --device=cuda:99
sample   2  --temperature=0 --top_k=5                              no effect at --temperature=0
sample   2  --stop_at_eot                                          no end-of-text
sample   2  --init_from=gpt3                                       neither resume
sample   1  --init_from=gpt2                                       gpt2/resolve/main/config.json
sample   1  --init_from={bad}/pickle                               could run code
sample   1  --init_from={bad}/short                                cut short
sample   1  --init_from={bad}/nometa                               meta.json is missing
sample   1  --out_dir={bad}/empty                                  no checkpoint in
sample   1  --block_size=99                                        the checkpoint's 32 positions
sample   1  --start=abZ                                            'Z' is not among the 12
sample   1  --start=FILE:{bad}/none                                none
sample   1  --start=FILE:{bad}/latin.jsonl                         latin.jsonl
prepare  2                                                         say what to prepare
prepare  2  shakespeare_chr                                        did you mean shakespeare_char?
prepare  2  {bad}/text                                             --name=NAME
prepare  2  {bad}/text --nam=x                                     did you mean --name?
prepare  2  {bad}/text --name=stdlib                               choose another
prepare  2  {bad}/text --name=x --val_frac=2                       between 0 and 1
prepare  2  {bad}/text --name=x --tokenizer=bpe                    gpt2 or char
prepare  2  {bad}/text --name=x --source={bad}/text                no effect on your own files
prepare  2  stdlib --tokenizer=char                                no effect on stdlib
prepare  2  shakespeare --source={bad}/none                        is not there
prepare  1  {bad}/none --name=x                                    neither a file
prepare  1  {bad}/file --name=x --tokenizer=char                   no text
prepare  1  {bad}/latin.jsonl --name=x --tokenizer=char            convert it to UTF-8
prepare  2  stdlib {bad}/x.jsonl                                   stdlib is a data set of its own
prepare  1  {bad}/late --name=x --tokenizer=char                   late cannot be read
prepare  1  {bad}/cut.gz --name=x --tokenizer=char                 cut.gz cannot be read
prepare  1  {bad}/wrong.gz --name=x --tokenizer=char               wrong.gz
prepare  1  {bad}/x.jsonl --name=x --tokenizer=char                x.jsonl, line 2: no JSON object with a text 'text'
prepare  1  {bad}/text --name=file --tokenizer=char                file
prepare  1  shakespeare_char                                       is the proxy that HTTPS_PROXY names right?
prepare  1  {bad}/text --name=x                                    6d1cbeee0f20b3d9449abfede4726ed8212e3aee
""".strip().splitlines()


@pytest.mark.parametrize("script, code, argv, words", [(s[:9].strip(), int(s[9]), s[12:66].strip(), s[67:])
                                                        for s in BAD])
def test_bad_input(data, straight, tmp_path, bad, capsys, monkeypatch, script, code, argv, words):
    """A traceback, a wrong exit code, a message without a cure, or something left behind."""
    def files():
        return {path: path.stat().st_mtime_ns for path in bad.rglob("*") if path.is_file()}
    before, nobody = files(), "http://127.0.0.1:9"
    for name, value in dict(HF_ENDPOINT=nobody, HTTPS_PROXY=nobody, https_proxy=nobody, HF_HOME=tmp_path / "hub",
                            TIKTOKEN_CACHE_DIR=tmp_path / "bpe").items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(prepare, "gpt2_bpe", prepare.gpt2_bpe.__wrapped__)
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **how: 1 / 0))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)               # between attempts to download
    monkeypatch.setattr(prepare, "DATA", str(bad))
    monkeypatch.setattr(train, "DATA", str(bad))
    first = {"train": flags(dataset=data, out_dir=tmp_path / "out"), "prepare": [],
             "sample": [f"--out_dir={straight / 'whole'}", "--start=a"]}[script]
    got, _, err = here(capsys, script, *first, *argv.format(bad=bad, run=straight / "whole").split())
    one_line(err, words)
    assert got == code and err.startswith(script + ".py: ")
    assert files() == before and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# README


def readme_commands():
    """The lines of README.md's shell blocks, without comments; left out is what CI itself runs, and the two machines."""
    text = (HERE / "README.md").read_text()
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    return [line for line in lines if not re.match(r"pip |ruff |python -m pytest|torchrun --nnodes|python \.github/", line)]


@needs_bpe
def test_readme_commands(tmp_path):
    """A command in the README that does not run, with other values only where it would take long or need a network."""
    (tmp_path / "book.txt").write_text(TEXT)
    for name, tokenizer in (("chars", "char"), ("shakespeare", "gpt2")):
        prepare.own(str(tmp_path / name), [str(tmp_path / "book.txt")], tokenizer)
    GPT2(GPT2Config(n_layer=1, n_head=4, n_embd=32, block_size=32)).save_pretrained(tmp_path / "weights")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text(TEXT)
    ran = 0
    for line in readme_commands():
        command, _, piped = line.partition("|")
        words = shlex.split(piped or command, comments=True)
        prompt = shlex.split(command)[1] if piped else None
        ranks = min(4, int(re.search(r"--nproc_per_node=(\d+)", line)[1])) if words[0] == "torchrun" else 0
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        script, argv = pathlib.Path(words[at]).stem, words[at + 1:]
        if script == "model":
            continue                                                       # its output is tested above
        replaced = {"--init_from=gpt2": f"--init_from={tmp_path / 'weights'}", "--name=mine": f"--name={tmp_path / 'mine'}",
                    "--dataset=mine": f"--dataset={tmp_path / 'mine'}",
                    "--dataset=shakespeare_char": f"--dataset={tmp_path / 'chars'}",
                    "--dataset=shakespeare": f"--dataset={tmp_path / 'shakespeare'}", "--start=def ": "--start=ab",
                    "--dataset=fineweb": f"--dataset={tmp_path / 'chars'}", "--eval_stride=64": "--eval_stride=8"}
        argv = [replaced.get(word, word) for word in argv]
        joined = " ".join(argv)
        short = dict(max_iters=2, eval_interval=1, eval_iters=1, batch_size=1, gradient_accumulation_steps=4)
        if script == "train" and "--help" not in argv and "--plot" not in joined:
            if "init_from" not in joined:
                short |= dict(block_size=32, n_layer=1, n_head=4, n_embd=32)
                short |= {} if "dataset" in joined else dict(dataset=tmp_path / "chars")
            argv += [f"--{name}={value}" for name, value in short.items()]
            if "init_from" in joined and ("resume" not in joined or "mine" in joined):
                argv += [f"--out_dir={tmp_path / 'tuned'}"]
            argv += ["--max_iters=3"] if "resume" in joined else []
        argv += ["--max_new_tokens=4"] if script == "sample" else []
        if prompt is not None:
            (tmp_path / "piped").write_text("a")
            argv += [f"--start=FILE:{tmp_path / 'piped'}"]
        run(script, *argv, folder=tmp_path, ranks=ranks)
        ran += 1
    assert ran >= 15


def test_evidence(tmp_path, monkeypatch, capsys):
    """The README's other command, on models of nothing: a table or a picture that is not made, or holds other numbers."""
    spec = importlib.util.spec_from_file_location("evidence", HERE / ".github/evidence.py")
    evidence = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(evidence)
    (tmp_path / "book.txt").write_text(TEXT)
    prepare.own(str(tmp_path / "chars"), [str(tmp_path / "book.txt")], "char")
    tiny = dict(n_layer=1, n_head=4, n_embd=32)
    small = [*flags(dataset=tmp_path / "chars", block_size=8, batch_size=2, **tiny), "--gradient_accumulation_steps=1"]
    for name, value in (
            ("HERE", str(tmp_path)), ("TEXT", str(tmp_path / "chars/val.bin")), ("SEEDS", (1, 2)), ("DEFAULT", small),
            ("RECIPE", [*small, *flags(max_iters=3, eval_interval=3, eval_iters=1, init_from="auto")]),
            ("VARIANTS", {"plain": [], "all three": ["rope", "gqa", "sliding_window"]}),
            ("GPT2Config", lambda **given: GPT2Config(**given | tiny | dict(vocab_size=50)))):
        monkeypatch.setattr(evidence, name, value)
    for name, arguments in (("over_size", dict(shapes=[(1, 4, 32)])), ("over_processes", dict(modes=[(1, ())])),
                            ("over_window", dict(contexts=(300,))),
                            ("over_context", dict(contexts=(32, 64))), ("medians", dict(rounds=1))):
        monkeypatch.setattr(evidence, name, partial(getattr(evidence, name), **arguments))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evidence.py"])
    evidence.main()
    tables = [[[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
              for block in capsys.readouterr().out.split("\n\n")[1:]]
    costs, losses, window, size, processes, context = tables
    assert [len(t) for t in tables] == [4, 4, 3, 3, 3, 4] and {len({len(row) for row in t}) for t in tables} == {1}
    for row, (name, options) in zip(losses[2:], evidence.VARIANTS.items(), strict=True):
        trained = [GPT2.from_pretrained(f"out-evidence/{name.replace(' ', '-')}-{seed}").config for seed in (1, 2)]
        assert row[0] == name and all(c.rope == c.gqa == c.sliding_window == bool(options) for c in trained)
        assert (row[2:] == ["cannot"] * 2) == (not options)
        assert abs(float(row[1].split()[0]) - math.log(trained[0].vocab_size)) < 0.5
    plain, changed = costs[2:]
    assert plain[3] == f"{2 * 32 * 2:,} B" and changed[3] == f"{2 * 8 * 2:,} B" and float(processes[2][3].split()[0]) == 1
    assert all(float(cell.split()[0]) > 0 for cell in window[2][:4])
    for picture in ("variants.svg", "context.svg"):
        xml.etree.ElementTree.parse(tmp_path / picture)


def test_readme_is_whole():
    """A link to a file that is not there, or a place left to be filled."""
    text = (HERE / "README.md").read_text()
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    assert links and all((HERE / link).exists() for link in links) and not re.search(r"^[A-Z_]{5,}", text, re.MULTILINE)


# ---------------------------------------------------------------------------------------------------------------------
# Text to tokens


@pytest.fixture
def texts(tmp_path):
    """A folder of each kind of file, some of it more than a portion -> what the documents are."""
    words = [f"{w} it's\n\n  naïve  東京 {w * 7}\r\n" for w in range(9000)]
    long, other = "".join(words), "".join(words[5:3000])
    lines = ["", "first", "a<|endoftext|>b", "half \ud83d of a pair", "", "x" * 5, " "] * 40
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_text("".join(json.dumps({"text": line, "n": 1}) + "\n" for line in lines))
    (tmp_path / "in/b.txt").write_text(long, newline="")
    (tmp_path / "in/c.txt.gz").write_bytes(gzip.compress(other.encode()))
    (tmp_path / "in/d.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "last"}).encode()))
    return lines + [long, other, "last"]


def by_hand(documents):
    """The rule in its plainest words: the end of text stands between documents, and none before the first token."""
    bpe, ids = prepare.gpt2_bpe(), []
    for text in documents:
        ids += [50256] * bool(ids) + bpe.encode_ordinary(text)
    return ids


@needs_bpe
def test_threads_give_the_tokens_of_one(texts, tmp_path, capsys):
    """Portions that come back in another order, a lost or doubled end of text, cuts that change tokens."""
    code, out, err = here(capsys, "prepare", tmp_path / "in", f"--name={tmp_path}/set", "--val_frac=1")
    assert code == 0 and "\r" not in out + err
    assert read_bin(tmp_path / "set", "val").tolist() == by_hand(texts) and not len(read_bin(tmp_path / "set", "train"))
    assert sorted(os.listdir(tmp_path / "set")) == ["meta.json", "train.bin", "val.bin"]


@needs_bpe
@pytest.mark.parametrize("changed", [None, "read", "to come"])
def test_preparing_goes_on(texts, tmp_path, capsys, monkeypatch, changed):
    """A stop, or a bad line far on, that costs all the work done; a portion doubled, lost or of a source now changed."""
    monkeypatch.setattr(prepare, "JOURNAL_EVERY", 0)
    monkeypatch.setattr(prepare, "PORTION", 20_000)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    encode, calls, fuse = prepare.Tokenizer.encode, [], 330                # all lines, and some of the long text

    def fused(self, text):
        calls.append(text)
        if len(calls) > fuse:
            raise KeyboardInterrupt
        return encode(self, text)
    monkeypatch.setattr(prepare.Tokenizer, "encode", fused)
    command = ["prepare", tmp_path / "in", f"--name={tmp_path}/set", "--val_frac=1"]
    assert here(capsys, *command)[0] == 130 and (tmp_path / "set.part/journal.json").exists()
    calls[:], fuse = [], 10**9
    if changed == "read":
        (tmp_path / "in/a.jsonl").write_text('{"text": "new"}\n')
        texts[:280] = ["new"]
    elif changed:
        (tmp_path / "in/e.jsonl").write_text('{"text": "new"}\n' * 9 + '{"text": "ne')
        code, _, err = here(capsys, *command)
        assert code == 1 and "e.jsonl, line 10: no JSON object" in err and calls == [""]
        (tmp_path / "in/e.jsonl").write_text('{"text": "new"}')
        texts.append("new")
    with open(tmp_path / "set.part/val.bin", "ab") as f:                   # written, but not in the journal yet
        f.write(b"half a portion")
    code, out, _ = here(capsys, *command)
    assert code == 0 and ("goes on" if changed != "read" else "begins anew") in out and "first" not in calls
    assert read_bin(tmp_path / "set", "val").tolist() == by_hand(texts) and not (tmp_path / "set.part").exists()


def test_reading_does_not_run_ahead():
    """A reader faster than the encoders, and so the whole source in memory."""
    read = []
    items = (read.append(i) or i for i in range(100))
    for taken, (item, result) in enumerate(prepare.in_order(lambda i: i * i, items)):
        assert (item, result) == (taken, taken**2) and len(read) - taken <= 2 * os.cpu_count() + 1


@needs_bpe
@pytest.mark.parametrize("white", "\n\u3000")
def test_white_space_without_end(white):
    """A million line breaks, at which tiktoken's regular expression gives up: the end of a night's work."""
    text, encode = "a" + white * 1_000_000 + "b c", prepare.gpt2_bpe().encode_ordinary
    assert prepare.Tokenizer("gpt2").encode(text).tolist() == encode(text[:-4]) + encode(text[-4:])


# ---------------------------------------------------------------------------------------------------------------------
# FineWeb's shards


def shard_file(count, seed=0, magic=20240520, version=1, claimed=None, vocab_size=50257):
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, claimed or count
    return header.tobytes() + np.random.default_rng(seed).integers(0, vocab_size, count, dtype="<u2").tobytes()


NAMES = ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]


def test_fineweb(hub, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Shards fetched twice, or anew after a stop; a display for each; a screen of 80 columns that it does not fit."""
    monkeypatch.setattr(prepare, "DATA", str(tmp_path))
    clock = itertools.count()
    hub.files.update({name: shard_file(4000, i) for i, name in enumerate(NAMES[:2])})
    (tmp_path / "fineweb").mkdir()
    (tmp_path / "fineweb" / (NAMES[1] + ".part")).write_bytes(hub.files[NAMES[1]][:5000])
    code, _, err = here(capsys, "prepare", "fineweb", "--shards=2")
    assert code == 1 and NAMES[2] in err and "404" in err
    assert hub.log[0][2] == f"/datasets/kjj0/fineweb10B-gpt2/resolve/main/{NAMES[0]}"
    assert {headers["Range"] for *_, headers in hub.log if "Range" in headers} == {"bytes=5000-"}
    hub.asked()
    hub.files[NAMES[2]] = shard_file(2_000_000, 2)
    with monkeypatch.context() as patch:
        patch.setattr("time.time", lambda: next(clock))                    # every call comes a second after the last
        patch.setattr(sys.stderr, "isatty", lambda: True)
        code, out, err = here(capsys, "prepare", "fineweb", "--shards=2")
    assert code == 0 and "2,004,000 tokens to train on in 2 shards, 4,000 to validate" in out
    assert {name for _, _, name in hub.asked()} == {NAMES[2]}
    assert [(tmp_path / "fineweb" / name).read_bytes() for name in NAMES] == [hub.files[name] for name in NAMES]
    lines = re.split("[\r\n]", err.strip())
    assert len(lines) > 1 and all("fineweb, file 3 of 3" in line and len(line) < 80 for line in lines)
    assert err.count("\n") == 1
    (tmp_path / "fineweb" / NAMES[1]).write_bytes(b"<html>a mirror's login</html>" * 100)
    hub.asked()
    code, _, _ = here(capsys, "prepare", "fineweb", "--shards=1")          # a damaged one is fetched anew
    assert code == 0 and {name for _, _, name in hub.asked()} == {NAMES[1]}
    assert (tmp_path / "fineweb" / NAMES[1]).read_bytes() == hub.files[NAMES[1]]
    hub.files[NAMES[1]] = b"<html>a mirror's login</html>" * 100
    (tmp_path / "fineweb" / NAMES[1]).unlink()
    code, _, err = here(capsys, "prepare", "fineweb", "--shards=1")
    assert code == 1 and f"{NAMES[1]} has magic" in err


@pytest.mark.parametrize("content, words", [
    (shard_file(90, magic=20240801), "magic 20240801"), (shard_file(90, version=3), "version 3"), (shard_file(90)[:-1], "1,203"),
    (shard_file(90, claimed=91), "91 tokens has 1,206 bytes, not 1,204"), (shard_file(90)[:900], "900"),
    (shard_file(90)[1:], "half")])
def test_damaged_shards_are_named(tmp_path, content, words):
    """A header taken for tokens, and a shard that is short trained on, unseen."""
    paths = [str(tmp_path / f"{i}.bin") for i in range(2)]
    for path, each in zip(paths, (shard_file(90), content), strict=True):
        pathlib.Path(path).write_bytes(each)
    with pytest.raises(ValueError, match=f"1.bin.*{words}"):
        train.Tokens(paths, 16, 50257)


class Windows:
    def __init__(self, *ends):
        self.ends = np.array(ends)

    def __len__(self):
        return int(self.ends[-1])


def order(windows, count, rank=0, size=1, seed=3, consumed=0):
    return list(itertools.islice(train.Order(windows, SimpleNamespace(rank=rank, size=size), seed, consumed), count))


def test_order_over_shards(monkeypatch):
    """A window left out or read twice; epochs alike; reads all over the disk; another order on resume or more ranks."""
    windows, largest, randperm = Windows(7, 7, 20, 33), [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda n, **how: largest.append(n) or randperm(n, **how))
    line = order(windows, 99)
    files = [[int(i >= 7) + int(i >= 20) for i in line[at:at + 33]] for at in (0, 33, 66)]
    assert all(sorted(line[at:at + 33]) == list(range(33)) for at in (0, 33, 66)) and line[:33] != line[33:66]
    assert all(len(list(itertools.groupby(epoch))) == 3 for epoch in files) and len(set(map(tuple, files))) > 1
    assert line[:33] != order(windows, 33, seed=4) and max(largest) == 13
    for size, at in itertools.product((1, 2, 3, 5), (0, 1, 6, 7, 8, 32, 33, 34, 50)):
        ranks = [order(windows, 8, rank, size, consumed=at) for rank in range(size)]
        assert [ranks[(at + i) % size][i // size] for i in range(8 * size)] == line[at:at + 8 * size]


def test_training_on_shards(tmp_path):
    """Shards that ranks read in different orders; one added before a resume, which goes on in another order unseen."""
    for name, tokens in zip(NAMES, (100, 400, 300), strict=True):
        (tmp_path / name).write_bytes(shard_file(tokens, vocab_size=26))
    (tmp_path / "meta.json").write_text(json.dumps({"tokenizer": "char", "characters": string.ascii_lowercase}))
    for ranks in (0, 2):
        run("train", *flags(dataset=tmp_path, max_iters=4, out_dir=tmp_path / f"{ranks}"), ranks=ranks)
    agree(tmp_path / "0", tmp_path / "2")
    for added, words in (("fineweb_train_000003.bin", ["train data", "700 tokens", "now 800"]), (NAMES[0], ["val data"])):
        (tmp_path / added).write_bytes(shard_file(100, seed=9, vocab_size=26))
        err = run("train", "--init_from=resume", f"--out_dir={tmp_path}/0", "--device=cpu", "--max_iters=5", code=1).err
        one_line(err, *words, f"--init_from={tmp_path}/0")
        (tmp_path / added).unlink()


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


DOCUMENTS = ["a bad dab\n\n  cab é  日本\u3000ab", "dead\u00a0beef 日", "", " fade  abc" * 9]
SHAPE = dict(n_layer=2, n_head=2, n_embd=32)


@pytest.fixture(scope="module", params=["transformers", "all flags"])
def judged(request, tmp_path_factory):
    """A data set and a model of its characters -> (its folder, function of tokens to logits)."""
    folder = tmp_path_factory.mktemp("judged")
    documents = [(str(i), None, [text]) for i, text in enumerate(DOCUMENTS)]
    prepare.write_tokens(str(folder / "set"), [__file__], lambda path, f: documents, "char", val_frac=1)
    vocab_size = prepare.Tokenizer.load(folder / "set").vocab_size
    if request.param == "transformers":
        torch.manual_seed(0)
        config = transformers.GPT2Config(n_positions=16, vocab_size=vocab_size, **SHAPE)
        model = transformers.GPT2LMHeadModel(config).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(4 if p.dim() > 1 else 1)                            # or all tokens are as likely
    else:
        model = GPT2(GPT2Config(16, vocab_size, **SHAPE, rope=True, gqa=True, sliding_window=True, window_size=5), 0)
    model.save_pretrained(folder / "model")
    (folder / "model/meta.json").write_text((folder / "set/meta.json").read_text())
    return folder, lambda ids: (model(ids).logits if request.param == "transformers" else model(ids)[0])[0]


@pytest.mark.parametrize("ranks, stride", [(0, None), (0, 1), (0, 5), (2, 5)])
def test_eval_only(judged, tmp_path, ranks, stride):
    """Tokens scored twice, never, or with less before them than promised; the token between documents taken for text;
    ranks that count a window for another; an evaluation that leaves files."""
    folder, logits = judged
    given = [f"--eval_stride={stride}"] * bool(stride) + ["--fsdp"] * bool(ranks)
    done = run("train", f"--init_from={folder}/model", f"--dataset={folder}/set", "--eval_only", "--device=cpu",
               "--batch_size=4", *given, ranks=ranks, folder=tmp_path)
    ids, T, S, nats = torch.from_numpy(read_bin(folder / "set", "val").astype(np.int64)), 16, stride or 16, 0.0
    for t in range(1, len(ids)):                                           # by the first window that reaches token t
        begin = S * max(0, math.ceil((t - T) / S))
        with torch.no_grad():
            nats -= logits(ids[None, begin:t])[-1].log_softmax(-1)[ids[t]].item()
    tokens, (size, words) = len(ids) - 1, (sum(len(f(text)) for text in DOCUMENTS) - 1 for f in (str.encode, str.split))
    told = re.search(r"loss (\S+) nats per token, of (\S+) tokens\nperplexity (\S+) per token, (\S+) per word, of (\S+)"
                     r" words\nbits per byte (\S+), of (\S+) bytes\n$", done.out)
    bits, perplexities = nats / math.log(2), [math.exp(nats / n) for n in (tokens, words)]
    right = [nats / tokens, tokens, *perplexities, words, bits / size, size]
    assert [float(number.replace(",", "")) for number in told.groups()] == pytest.approx(right, rel=5e-4)
    assert float(told[1]) == pytest.approx(nats / tokens, abs=6e-5) and os.listdir(tmp_path) == []


@needs_bpe
@given(st.lists(st.text(st.sampled_from("a 日é\n\u3000\u00a0🎉"), max_size=12), min_size=1), st.sets(st.integers(1, 9)))
def test_bytes_and_words_are_those_of_the_text(texts, cuts):  # noqa: F811
    """Words cut, joined or lost where windows meet, in the middle of a character too."""
    ids = np.array(by_hand(texts), dtype=np.uint16)
    edges = [0, *sorted(cut for cut in cuts if cut < len(ids)), len(ids)]
    spans = np.array([(0, 0, a, b) for a, b in itertools.pairwise(edges)])
    assert train.text_size(SimpleNamespace(files=[ids]), prepare.Tokenizer("gpt2"), spans) == (
        sum(len(text.encode()) for text in texts), sum(len(text.split()) for text in texts))


@pytest.mark.parametrize("wrong, word", [
    ("--eval_stride=4", "--eval_only"), ("--eval_only --eval_stride=17", "=16"), ("--eval_only --eval_stride=0", "1")])
def test_refused_strides(judged, capsys, wrong, word):
    """A flag without effect, or tokens that no window scores."""
    folder, _ = judged
    code, _, err = here(capsys, "train", f"--init_from={folder}/model", f"--dataset={folder}/set", *wrong.split())
    assert code == 2 and word in err and err.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# What a person sees


def little_memory():
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30),) * 2)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is limited by way of /proc")
def test_out_of_memory(data, tmp_path):  # noqa: F811
    """A traceback of the allocator's, or an advice that makes another run of it."""
    common = dict(dataset=data, out_dir=tmp_path / "out")
    err = run("train", *flags(**common, batch_size=2**15), before=little_memory, code=1).err
    assert err.count("\n") == 1 and "--batch_size=16384 --gradient_accumulation_steps=8 --eval_iters=6" in err
    common |= dict(batch_size=6, max_iters=3)
    run("train", *flags(**common))
    advice = train.cure(train.Run(batch_size=6, eval_iters=3), {}, SimpleNamespace(distributed=False))
    run("train", *flags(**common | dict(out_dir=tmp_path / "less")), *re.findall(r"--\S+", advice))
    assert "--batch_size=3" in advice
    agree(tmp_path / "out", tmp_path / "less")


def test_only_memory_is_taken_for_memory(capsys, monkeypatch):
    """An error of ours shown as one of memory, or a GPU's out of memory as a traceback."""
    def fit(*_):
        raise errors.pop()
    monkeypatch.setattr(train, "fit", fit)
    errors = [RuntimeError("shapes"), torch.OutOfMemoryError("CUDA: 2 GB"), RuntimeError("MPS backend out of memory")]
    for _ in range(2):
        code, _, err = here(capsys, "train", "--batch_size=1", "--device=cpu")
        assert code == 1 and err.count("\n") == 1 and "--grad_checkpoint" in err
    with pytest.raises(RuntimeError, match="shapes"):
        here(capsys, "train", "--batch_size=1", "--device=cpu")
    monkeypatch.setattr(sample, "complete", fit)
    errors = [RuntimeError("shapes"), torch.OutOfMemoryError("CUDA: 2 GB"), RuntimeError("can't allocate memory")]
    for _ in range(2):
        one_line(here(capsys, "sample", "--device=cpu")[2], "sample.py: out of memory: fewer or shorter texts")
    with pytest.raises(RuntimeError, match="shapes"):
        here(capsys, "sample", "--device=cpu")


@pytest.mark.parametrize("script", ["train", "sample"])
def test_no_compiler(straight, capsys, monkeypatch, script):
    """A traceback of the compiler's where there is no Triton; --compile=True that is then ignored."""
    def compile(*_):
        raise RuntimeError("Cannot find a working triton installation.\nmore")
    monkeypatch.setattr(torch, "compile", compile)
    why = "does not work here (RuntimeError: Cannot find a working triton installation.)"
    assert train.choose_compile(train.Run(), torch.device("cuda")) == (False, "it " + why)
    code, _, err = here(capsys, script, "--compile=True", f"--out_dir={straight / 'whole'}", "--device=cpu")
    one_line(err, why)
    assert code == 2


def test_other_consoles(straight, capsys, monkeypatch):
    """A sample that stops at a character which the console lacks; a notebook, whose standard input is no file."""
    assert sampled(capsys, straight / "whole", "--max_new_tokens=3")[0][0] == "\n"
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    prepare.guarded(lambda: print("a日"))
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue() == b"a?\n"


def test_lines_fit(data, tmp_path, capsys, monkeypatch):  # noqa: F811
    """A live line that wraps in 80 columns, and so never renews itself; carriage returns in a log file; a wide banner."""
    wide = flags(dataset=os.path.basename(data), gradient_accumulation_steps=9000, max_iters=0, **ALL)
    out = run("train", *wide, ranks=2, folder=os.path.dirname(data)).out
    assert out.count("\n") >= 8 and "in each" in out and max(map(len, out.splitlines())) <= 80
    out = run("train", *flags(dataset=data, out_dir=tmp_path / "out", max_iters=2)).out
    lines = re.findall(r"^step \d/2  loss \S+  lr \S+  norm \S+ .* tok/s  \S+ left  .* GB$", out, re.MULTILINE)
    assert len(lines) == 2 and "\r" not in out and all(line.index(" left") < 75 for line in lines)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    log = train.Log(train.Run(out_dir=str(tmp_path / "log")), GPT2Config(), 0)
    log.line(f"{lines[0]}  mfu 45.1%  and more  of this  and that", stay=False)
    assert len(shown := capsys.readouterr().out) < 81 and "left" in shown and "that" not in shown
