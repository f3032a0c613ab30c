"""
Writes text with a trained model.

    python sample.py                                      # the model in out/
    python sample.py --init_from=gpt2 --start="The sea "  # OpenAI's weights
    python sample.py --init_from=FOLDER --num_samples=5   # any checkpoint
    python sample.py --start=FILE:prompt.txt              # a prompt from a file
    echo "def " | python sample.py                        # or from a pipe
"""
import codecs
import itertools
import math
import os
import stat
import sys
import time

import numpy as np
import torch

from data.prepare import Tokenizer, command_line, guarded, open_text, refuse
from model import GPT2, SIZES, GPT2Config, complete

OPTIONS = {
    "init_from": (str, "resume", f"resume (the checkpoint in out_dir), {', '.join(SIZES)}, or a folder with a checkpoint"),
    "out_dir": (str, "out", "folder of the checkpoint that resume reads"),
    "start": (str, None, "the prompt; FILE:name reads it from a file; <|endoftext|> begins a new document [a line break]"),
    "num_samples": (int, 1, "texts; a single one is shown as it is made"),
    "max_new_tokens": (int, 500, "tokens of each text"),
    "temperature": (float, 0.8, "below 1.0 safer, above 1.0 wilder, 0 always the likeliest token"),
    "top_k": (int, 200, "choose among the k likeliest tokens, 0 = all"),
    "top_p": (float, 1.0, "choose among the likeliest tokens that together have this probability"),
    "stop_at_eot": (bool, False, "end a text where the model ends the document"),
    "use_cache": (bool, True, "keep keys and values; without, the same text takes longer"),
    "seed": (int, 1337, "of the choices"),
    "device": (str, "auto", "auto, cpu, cuda, cuda:1, mps"),
    "dtype": (str, "auto", "of the weights: auto, float32, bfloat16, float16, or int8 on a CPU"),
    "compile": (bool, False, "torch.compile: a slow start, then faster"),
    "benchmark": (bool, False, "time prompts of 32 tokens and of 3/4 block_size, and stop"),
}
CHANGES = ("block_size", "rope", "rope_theta", "gqa", "n_kv_head", "sliding_window", "window_size", "flash")


def piped():
    try:
        return stat.S_IFMT(os.fstat(sys.stdin.fileno()).st_mode) in (stat.S_IFIFO, stat.S_IFREG)
    except (OSError, AttributeError):                                      # as in a notebook, or closed
        return False


def read_prompt(given):
    start = given.get("start")
    if start is None and piped():
        start = sys.stdin.read()
    elif start and start.startswith("FILE:"):
        with open_text(start[5:]) as f:
            start = f.read()
    return start or "\n"


def encode_prompt(tokenizer, text):
    """-> ids (1, T). Here, unlike in data, <|endoftext|> means the token, if the tokenizer has one."""
    if tokenizer.end_of_text is None:
        return torch.from_numpy(tokenizer.encode(text).astype(np.int64))[None]
    parts = [tokenizer.encode(part).astype(np.int64) for part in text.split("<|endoftext|>")]
    ids = parts[0]
    for part in parts[1:]:
        ids = np.concatenate((ids, [tokenizer.end_of_text], part))
    return torch.from_numpy(ids)[None]


def benchmark(model, samples, new=32):
    """Times reading a prompt and then each token, with random weights' text or a trained model's alike."""
    weights = sum(p.numel() * p.element_size() for p in (*model.parameters(), *model.buffers()))
    device = next(model.parameters()).device
    for length in (32, model.config.block_size * 3 // 4):
        idx = torch.randint(model.config.vocab_size, (samples, length), device=device)
        times = []
        for _ in range(2):                                                 # the first warms up
            last = time.perf_counter()
            for token in model.stream(idx, new + 1, temperature=0):
                token.tolist()                                             # waits for a GPU
                now = time.perf_counter()
                times.append(now - last)
                last = now
        prompt, one = times[new + 1], float(np.median(times[new + 2:]))
        print(f"prompt {length:5}: read at {samples * length / prompt:,.0f} tokens per second, then {samples / one:,.1f} "
              f"tokens per second for {samples} texts; {weights / one / 1e9:,.1f} GB/s of weights")


def main():
    config_options = {name: (GPT2Config.__dataclass_fields__[name]) for name in CHANGES}
    options = OPTIONS | {name: (bool if "bool" in str(f.type) else float if "float" in str(f.type) else int, None,
                                "as in train.py; changes the weights that are read") for name, f in config_options.items()}
    given, _ = command_line(__doc__, options)
    run = {name: default for name, (_, default, _) in OPTIONS.items()} | given
    for name, ok, limit in (
            *((name, 1 <= run[name] < 2**31, "at least 1 and below 2^31") for name in ("num_samples", "max_new_tokens")),
            ("temperature", 0 <= run["temperature"] < math.inf, "0 or more"), ("top_k", run["top_k"] >= 0, "0 or more"),
            ("top_p", 0 < run["top_p"] <= 1, "above 0 and at most 1"),
            ("seed", 0 <= run["seed"] < 2**63, "at least 0 and below 2^63"),
            ("dtype", run["dtype"] in ("auto", "float32", "bfloat16", "float16", "int8"),
             "auto, float32, bfloat16, float16 or int8")):
        if not ok:
            refuse(f"--{name}={run[name]} must be {limit}")
    if run["temperature"] == 0:
        for name in given.keys() & {"top_k", "top_p", "seed"}:
            refuse(f"--{name} has no effect at --temperature=0, which always takes the likeliest token")
    device = run["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):                                 # not in this machine, or not in this torch
        refuse(f"--device={device} is not there: use auto, cpu, cuda, cuda:N or mps")
    half = torch.bfloat16 if device.startswith("cuda") and torch.cuda.is_bf16_supported() else torch.float32
    dtype = half if run["dtype"] == "auto" else getattr(torch, run["dtype"])
    if dtype == torch.int8 and device != "cpu":
        refuse(f"--dtype=int8 is for the CPU, not for {device}: use bfloat16 there, or --device=cpu")

    source = complete(run["out_dir"] if run["init_from"] == "resume" else run["init_from"])
    if run["init_from"] == "resume" and not os.path.exists(os.path.join(source, "config.json")):
        raise FileNotFoundError(f"there is no checkpoint in {source}: train one with python train.py, name its folder with "
                                "--out_dir, or use OpenAI's with --init_from=gpt2")
    if source not in SIZES and not os.path.isdir(source):
        refuse(f"--init_from={source} is neither resume, one of {', '.join(SIZES)}, nor a folder")
    model = GPT2.from_pretrained(source, **{name: given[name] for name in CHANGES if name in given})
    for change in model.changes:
        print(change, file=sys.stderr)                                     # stdout is for the text
    tokenizer = Tokenizer.load(source) if os.path.isdir(source) else Tokenizer("gpt2")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"{source}: the tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, the model "
                         f"{model.config.vocab_size}: its meta.json is missing or of another model")
    if run["stop_at_eot"] and tokenizer.end_of_text is None:
        refuse("--stop_at_eot has no effect: this model's text has no end-of-text token")
    model = model.to_int8() if dtype == torch.int8 else model.to(device, dtype).for_decoding()
    if run["benchmark"]:
        return benchmark(model, run["num_samples"])
    prompt = encode_prompt(tokenizer, read_prompt(given))
    if run["compile"]:
        try:
            torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
        except Exception as e:                                             # no Triton, no compiler: many things, many names
            refuse("--compile does not work here ({}): leave it out".format(f"{type(e).__name__}: {e}".split("\n")[0][:100]))
        model.hidden = torch.compile(model.hidden, dynamic=True)

    arguments = dict(temperature=run["temperature"], top_k=run["top_k"] or None, top_p=run["top_p"] if run["top_p"] < 1 else None,
                     use_cache=run["use_cache"], generator=torch.Generator(device).manual_seed(run["seed"]),
                     stop_token=tokenizer.end_of_text if run["stop_at_eot"] else None)
    idx = prompt.repeat(run["num_samples"], 1).to(device)
    began, columns, count, stop = time.time(), [], 0, arguments["stop_token"]
    streaming, decoder = len(idx) == 1, codecs.getincrementaldecoder("utf-8")("replace")
    if streaming:
        print(tokenizer.decode(prompt[0].tolist()), end="", flush=True)
    for tokens in model.stream(idx, run["max_new_tokens"], **arguments):
        tokens = tokens.tolist()                                           # waits for a GPU, so only once
        if not streaming:
            columns.append(tokens)
        elif tokens[0] != stop:                                            # half a character is held back
            print(decoder.decode(tokenizer.decode_bytes(tokens)), end="", flush=True)
            count += 1
    seconds = time.time() - began
    if streaming:
        print(decoder.decode(b"", final=True))
    for text in zip(*columns, strict=True):
        text = list(itertools.takewhile(lambda token: token != stop, text))
        print(tokenizer.decode(prompt[0].tolist() + text) + "\n" + "-" * 15)
        count += len(text)
    print(f"{count:,} tokens in {seconds:.1f} s: {count / max(seconds, 1e-9):,.1f} tokens per second on {device}, "
          f"{str(dtype).removeprefix('torch.')}")


if __name__ == "__main__":
    guarded(main)
