"""
Write text with a trained model.

    python sample.py                                      # the model in out/
    python sample.py --init_from=gpt2 --start="The sea "  # OpenAI's weights
    python sample.py --init_from=FOLDER --num_samples=5   # any checkpoint
    python sample.py --start=FILE:prompt.txt              # a prompt from a file
    echo "def " | python sample.py                        # or from a pipe
"""
import codecs
import glob
import itertools
import os
import signal
import stat
import sys
import time
from dataclasses import dataclass, fields

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)                 # no traceback from an import

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))   # python -P leaves it out
from data.cli import UsageError, UserError, flag, parse_flags, refuse, run_main, usage_errors
from data.prepare import open_text
from data.tokenizer import check_tokenizer, load_tokenizer, replace_surrogates
from model import (
    CONVERTIBLE,
    GPT2,
    SOURCES,
    GPT2Config,
    choose_compile,
    choose_device,
    choose_dtype,
    convert,
    is_pretrained,
    read_pretrained,
)


@dataclass
class Sampling:
    init_from: str = flag("resume", f"resume (the model in out_dir), {SOURCES}")
    out_dir: str = flag("out", "folder of the model that resume reads")
    start: str = flag(None, "prompt; FILE:name reads it from a file; <|endoftext|> starts a new "
                      "document [a line break, if the model knows it]", if_bare="")
    num_samples: int = flag(1, "samples; a single one is printed while it is written", at_least=1,
                            below=2**31)
    max_new_tokens: int = flag(500, "tokens of each sample", at_least=1, below=2**31)
    temperature: float = flag(0.8, "below 1 more likely text, above 1 less; 0 always takes the "
                              "most likely token", at_least=0)
    top_k: int = flag(200, "choose among the k most likely tokens, 0 = all", at_least=0)
    top_p: float = flag(1.0, "choose among the most likely tokens that together have this "
                        "probability", above=0, at_most=1)
    stop_at_eot: bool = flag(False, "end a sample where the model ends the document")
    use_cache: bool = flag(True, "keep keys and values; without it the same text takes longer")
    seed: int = flag(1337, "random seed of the choices", at_least=0)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = flag("auto", "of the weights: auto, float32, bfloat16, float16, or int8 on a CPU",
                      choices=("auto", "float32", "bfloat16", "float16", "int8"))
    compile: str = flag("False", "torch.compile: True, False; starts slowly, then writes faster",
                        if_bare="True", choices=("True", "False"))
    benchmark: bool = flag(False, "time prompts of 32 tokens and of 3/4 block_size, and exit")


# Fields of GPT2Config that may be changed in the weights that are read
CHANGES = CONVERTIBLE - {"dropout"}


def parse_command_line():
    """-> (Sampling, {field of GPT2Config: value}). Raises UsageError for flags without effect."""
    own = {f.name: f for f in fields(Sampling)}
    shape = {f.name: f for f in fields(GPT2Config) if f.name in CHANGES}
    typed, _ = parse_flags(__doc__, {**own, **shape})
    if typed.get("temperature") == 0:
        refuse(typed, ("top_k", "top_p", "seed"), "has no effect at --temperature=0, which always "
               "takes the most likely token")
    if typed.get("benchmark"):
        refuse(typed, ("start", "max_new_tokens", "temperature", "top_k", "top_p", "stop_at_eot",
                       "use_cache", "seed"), "has no effect with --benchmark")
    if typed.get("init_from", "resume") != "resume":
        refuse(typed, ["out_dir"], "has no effect with --init_from=" + typed["init_from"])
    options = Sampling(**{name: value for name, value in typed.items() if name in own})
    return options, {name: value for name, value in typed.items() if name in shape}


def load(options, overrides):
    """-> (model ready to write, its tokenizer, device, name of the dtype)"""
    with usage_errors():
        device, _ = choose_device(options.device)
    if options.dtype == "int8" and device.type != "cpu":
        raise UsageError(f"--dtype=int8 works on a CPU, not on {device}: use bfloat16 there, or "
                         "--device=cpu")
    source = options.init_from
    if source == "resume":
        source = options.out_dir
        if not os.path.exists(f"{source}/config.json"):
            moved = sorted(glob.glob(f"{glob.escape(source)}/run-*"))
            hint = f". Earlier runs: {', '.join(moved)}" if moved else ""
            raise UserError(f"there is no checkpoint in {source}: train one with python train.py, "
                            "name its folder with --out_dir, or use OpenAI's with --init_from=gpt2"
                            + hint)
    elif not is_pretrained(source):
        raise UsageError(f"--init_from={source} is not resume, {SOURCES}")
    config, weights, notes = read_pretrained(source)
    with usage_errors():
        config, weights, changes = convert(config, weights, overrides)
    model = GPT2.from_weights(config, weights)
    for change in notes + changes:
        print(change, file=sys.stderr)                           # stdout is for the text
    tokenizer = load_tokenizer(source)
    check_tokenizer(tokenizer, config.vocab_size, source)
    if options.dtype == "int8":
        with usage_errors():
            model = model.to_int8()
        dtype = torch.int8
    else:
        dtype, _ = choose_dtype(options.dtype, device)
        model = model.to(device, dtype).for_decoding()
    with torch.no_grad():
        logits, _ = model.eval()([0])
    if not logits.isfinite().all():
        raise UserError(f"{source}: its logits are not finite numbers. The weights are damaged, or "
                        f"too large for {dtype}: try --dtype=float32")
    with usage_errors():
        compiled, _ = choose_compile(options.compile, device)
    if compiled:
        model.hidden = torch.compile(model.hidden, dynamic=True)
    return model, tokenizer, device, str(dtype).removeprefix("torch.")


def read_prompt(start):
    """The text of the prompt: `start`, the file that it names, or what is piped in; None or empty
    if there is none."""
    if start is None and is_piped():
        start = sys.stdin.read()
    elif start and start.startswith("FILE:"):
        with open_text(start[5:]) as f:
            start = f.read()
    return start and replace_surrogates(start)


def is_piped():
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, AttributeError):                            # in a notebook, or closed
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def write_one(tokenizer, prompt, stream, stop_token):
    """Print one text while it is written. Returns its number of tokens."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")   # holds back half a character
    print(tokenizer.decode(prompt), end="", flush=True)
    count = 0
    for token in stream:
        ids = token.tolist()
        if ids[0] != stop_token:
            print(decoder.decode(tokenizer.decode_bytes(ids)), end="", flush=True)
            count += 1
    print(decoder.decode(b"", final=True))
    return count


def write_many(tokenizer, prompt, stream, stop_token):
    """Print several texts when they are complete. Returns their number of tokens."""
    columns = [token.tolist() for token in stream]
    count = 0
    for ids in zip(*columns, strict=True):
        text = list(itertools.takewhile(lambda i: i != stop_token, ids))
        print(tokenizer.decode(prompt + text) + "\n" + "-" * 15)
        count += len(text)
    return count


def benchmark(model, samples, new=32):
    """Time reading a prompt, and then each token. Speed does not depend on the weights."""
    for length in (32, model.config.block_size * 3 // 4):
        idx = torch.randint(model.config.vocab_size, (samples, length), device=model.device)
        for _ in range(2):                                       # the first time warms up
            times = [time.perf_counter()]
            for token in model.stream(idx, new + 1, temperature=0):
                token.tolist()                                   # waits for a GPU
                times.append(time.perf_counter())
        seconds = np.diff(times)
        one = float(np.median(seconds[1:]))
        print(f"prompt {length:5}: read at {samples * length / seconds[0]:,.0f} tokens per second, "
              f"then {samples / one:,.1f} tokens per second for {samples} texts")


def main():
    run_main(write, "Use fewer or shorter samples, or a smaller model")


def write():
    options, overrides = parse_command_line()
    model, tokenizer, device, dtype = load(options, overrides)
    if options.benchmark:
        return benchmark(model, options.num_samples)
    stop_token = None
    if options.stop_at_eot:
        stop_token = tokenizer.end_of_text
        if stop_token is None:
            raise UsageError("--stop_at_eot has no effect: this model has no end-of-text token")
    text = read_prompt(options.start) or tokenizer.default_prompt()
    prompt = torch.tensor(tokenizer.encode_prompt(text).tolist())[None]
    stream = model.stream(
        prompt.repeat(options.num_samples, 1).to(device), options.max_new_tokens,
        options.temperature, top_k=options.top_k or None,
        top_p=options.top_p if options.top_p < 1 else None, use_cache=options.use_cache,
        generator=torch.Generator(device).manual_seed(options.seed), stop_token=stop_token)
    began = time.monotonic()
    writer = write_one if options.num_samples == 1 else write_many
    count = writer(tokenizer, prompt[0].tolist(), stream, stop_token)
    seconds = max(time.monotonic() - began, 1e-9)
    print(f"{count:,} tokens in {seconds:.1f} s: {count / seconds:,.1f} tokens per second on "
          f"{device}, {dtype}", file=sys.stderr)


if __name__ == "__main__":
    main()
