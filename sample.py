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
import os
import signal
import stat
import sys
import time
from dataclasses import dataclass, field, fields

if __name__ == "__main__":                       # before the imports below, which take seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)                 # Ctrl-C shows no traceback
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)            # nor does `| head`
    sys.stdout.reconfigure(errors="replace")                     # a terminal may lack a character

import torch

from data.flags import add_flags, flag_parser, one_line
from data.hub import local_path
from data.tokenizer import check_tokenizer, load_tokenizer, replace_surrogates
from model import FIXED, GPT2, GPT2Config, choose_device, choose_dtype


@dataclass
class Sampling:
    init_from: str = "resume"   # resume (the model in out_dir), gpt2, gpt2-medium, gpt2-large,
                                # gpt2-xl, distilgpt2, a model of the hub (owner/name), a folder
                                # with a checkpoint, or nanoGPT's ckpt.pt
    out_dir: str = "out"        # folder of the model that resume reads
    start: str = field(default=None, metadata={"bare": ""})
                                # prompt; FILE:name reads it from a file; <|endoftext|> starts a new
                                # document [a line break, if the model knows it]
    num_samples: int = 1        # samples; a single one is printed while it is written
    max_new_tokens: int = 500   # tokens of each sample
    temperature: float = 0.8    # below 1 more likely text, above 1 less; 0 always takes the most
                                # likely token
    top_k: int = 200            # choose among the k most likely tokens, 0 = all
    top_p: float = 1.0          # choose among the most likely tokens that together have this
                                # probability
    stop_at_eot: bool = False   # end a sample where the model ends the document
    use_cache: bool = True      # keep keys and values; without it the same text takes longer
    seed: int = 1337            # random seed of the choices
    device: str = "auto"        # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"         # of the weights: auto, float32, bfloat16, float16
    compile: bool = False       # torch.compile: starts slowly, then writes faster


def main():
    parser = flag_parser(__doc__, Sampling)
    overridable = {f.name for f in fields(GPT2Config)} - FIXED - {"dropout"}
    add_flags(parser, GPT2Config, only=overridable)
    typed = vars(parser.parse_args())
    overrides = {name: typed.pop(name) for name in overridable & typed.keys()}
    options = Sampling(**typed)
    for name in ("num_samples", "max_new_tokens", "top_p"):
        if getattr(options, name) == 0:
            parser.error(f"--{name}=0 must be above 0")
    try:
        device, _ = choose_device(options.device)
        dtype, _ = choose_dtype(options.dtype, device)
    except ValueError as error:
        parser.error(str(error))
    with one_line(OSError, ValueError):
        model, tokenizer = load(options, overrides)
        prompt = read_prompt(options.start, tokenizer)
    model = model.to(device, dtype)
    if options.compile:
        model.hidden = torch.compile(model.hidden, dynamic=True)
    stop_token = None
    if options.stop_at_eot:
        stop_token = tokenizer.end_of_text
        if stop_token is None:
            parser.error("--stop_at_eot: this model has no end-of-text token. Leave it out")
    stream = model.stream(
        torch.tensor([prompt] * options.num_samples, device=device), options.max_new_tokens,
        options.temperature, options.top_k or None, min(1, options.top_p), options.use_cache,
        torch.Generator(device).manual_seed(options.seed), stop_token)
    write = write_many
    if options.num_samples == 1:
        write = write_one
    began = time.perf_counter()
    count = write(tokenizer, prompt, stream, stop_token)
    seconds = time.perf_counter() - began
    print(f"{count:,} tokens in {seconds:.1f} s: {count / seconds:,.1f} tokens per second on "
          f"{device}, {str(dtype).removeprefix('torch.')}", file=sys.stderr)


def load(options, overrides):
    """-> (model, its tokenizer)"""
    source = options.init_from
    if source == "resume":
        source = options.out_dir
        if not os.path.exists(f"{source}/config.json"):
            earlier = ", ".join(sorted(glob.glob(f"{glob.escape(source)}-*")))
            raise FileNotFoundError(
                f"there is no checkpoint in {source}. Train one with python train.py, name its "
                "folder with --out_dir, or use OpenAI's with --init_from=gpt2"
                + (earlier and f". Earlier runs: {earlier}"))
    path = local_path(source)
    model = GPT2.from_pretrained(path, **overrides)
    for change in model.changes:
        print(change, file=sys.stderr)                           # stdout is for the text
    tokenizer = load_tokenizer(path)
    check_tokenizer(tokenizer, model.config.vocab_size, source)
    return model, tokenizer


def read_prompt(start, tokenizer):
    """The ids of the prompt: of `start`, of the file that it names, or of what is piped in."""
    try:
        if start is None and sys.stdin and is_piped():
            start = sys.stdin.read()
        elif start and start.startswith("FILE:"):
            with open(start[5:], encoding="utf-8-sig", newline="") as f:
                start = f.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt is not UTF-8 text ({error}): convert it") from None
    text = replace_surrogates(start or tokenizer.default_prompt())
    return tokenizer.encode_prompt(text).tolist()


def is_piped():
    mode = os.fstat(0).st_mode
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
        if stop_token in ids:
            ids = ids[:ids.index(stop_token)]
        print(tokenizer.decode([*prompt, *ids]) + "\n" + "-" * 15)
        count += len(ids)
    return count


if __name__ == "__main__":
    main()
