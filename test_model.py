"""
Every promise of this project, tried on the CPU without the internet: python -m pytest (under a minute or two), and
python -m pytest -m slow for the long ones. A test's docstring names the bug that it would catch.
"""
import contextlib
import hashlib
import http.server
import itertools
import json
import math
import os
import pickle
import re
import threading
import time
from collections import Counter
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from model import (
    GPT2,
    AttentionHead,
    GPT2Config,
    KVCache,
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

torch.set_num_threads(1)
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


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_joined_loss_is_the_plain_loss(dtype, tolerance):
    """A gradient that forgets rows, ignored targets, a scaled loss, or what lies beyond one chunk of 16M logits."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 4, generator=generator).to(dtype).requires_grad_() for n in (450, 40_000))
    targets = torch.randint(-1, 40_000, (450,), generator=generator)
    targets[::5] = -1
    expected = F.cross_entropy(x.double() @ w.double().t(), targets, ignore_index=-1).float()
    loss = LinearCrossEntropy.apply(x, w, targets, True)
    assert_close(loss, expected, tolerance)
    for a, b in zip(torch.autograd.grad(7 * loss, (x, w)), torch.autograd.grad(7 * expected, (x, w)), strict=True):
        assert_close(a.float(), b.float(), tolerance * b.abs().max().item())


def test_gelu_is_the_tanh_one():
    """The exact GELU, or a slope that is off: against torch in float64, from the flat side to the straight one."""
    x = torch.cat((torch.linspace(-12, 12, 999), torch.tensor([-1e4, 0, 1e4]))).requires_grad_()
    y, expected = gelu(x), F.gelu(x.double(), approximate="tanh")
    assert_close(y[:999], expected[:999].float(), 2e-6)
    slope, expected_slope = (torch.autograd.grad(z.sum(), x)[0] for z in (y, expected))
    assert_close(slope, expected_slope, 2e-6)
    assert y[999:].tolist() == [0, 0, 1e4]


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
    for chunks in ((16,), (1, 15), (3, 1, 5, 7), (5, 5, 1, 1, 4)):
        cache = model.new_cache()
        pieces = [model(piece, cache=cache)[0] for piece in idx.split(chunks, dim=1)]
        assert_close(torch.cat(pieces, dim=1), model(idx)[0], 1e-5)


@every_flag_setting
def test_bytes_in_the_cache(flags):
    """A cache that holds all query heads, more than the window, or other than config.cache_bytes and the table say."""
    model = small_model(**flags)
    for length in (4, 7, 16):
        model(tokens(1, length), cache=(cache := model.new_cache(length)))
        assert sum(x.untyped_storage().nbytes() for layer in cache for x in (layer.k, layer.v)) == \
            model.config.cache_bytes(length)


def test_a_full_cache_is_refused():
    """Writing past the end of the cache, over its beginning."""
    model = small_model()
    model(tokens(1, 5), cache=(cache := model.new_cache(5)))
    with pytest.raises(ValueError, match="6 tokens do not fit a key/value cache of 5"):
        model(tokens(1, 1), cache=cache)
    with pytest.raises(ValueError, match="17 tokens is longer than block_size=16"):
        model(tokens(1, 17))


@every_flag_setting
def test_laid_out_for_decoding(flags):
    """A matrix that is transposed and not only laid out otherwise, or a checkpoint written from such a model."""
    model, idx = small_model(**flags), tokens(2, 16)
    before, logits = {name: p.clone() for name, p in model.named_parameters()}, model(idx)[0]
    assert_close(model.for_decoding()(idx)[0], logits, 1e-5)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_endless_text(monkeypatch):
    """Angles or ring positions that go wrong past block_size, or a cache that grows: 20 times block_size."""
    model, caches = small_model(rope=True, sliding_window=True, gqa=True), []
    new_cache = model.new_cache
    monkeypatch.setattr(model, "new_cache", lambda size: caches.append(new_cache(size)) or caches[-1])
    text = model.generate(tokens(1, 7), 20 * 16, generator=torch.Generator().manual_seed(0))
    uncached = model.generate(tokens(1, 7), 20 * 16, use_cache=False, generator=torch.Generator().manual_seed(0))
    assert torch.equal(text, uncached) and len(caches) == 1
    assert [layer.k.shape for layer in caches[0]] == 2 * [(1, 2, 4, 8)] and caches[0][0].length == 326


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
    assert_close(head(q, k, v, tables(0)), head(q, k, v, tables(1020)), 1e-3)
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
    """Notes the largest tensor that any operation, forward or backward, puts out."""
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
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
                model(tokens(1, T), cache=model.new_cache())
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
    assert config == grouped.config and notes == ["gqa: 6 key/value heads mean-pooled to 2"]
    for name, p in grouped.named_parameters():
        assert_close(weights[name], p, 1e-6)
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
    assert GPT2.from_pretrained(tmp_path, block_size=3).config.window_size == 3


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
    write_safetensors(str(tmp_path / "ours"), ours, iter(ours.values()), {"step": "8"})
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


@pytest.mark.parametrize("content", [b"", b"main", b"../../../served", b"\xff\xfe", 41 * b"a", None])
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
                                          (503, "try again later"), (None, "set HTTPS_PROXY or HF_ENDPOINT")])
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
    assert "100%" in capsys.readouterr().err
