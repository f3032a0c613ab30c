"""A model of the Hugging Face hub becomes a local folder; any web address, a local file.

HF_HOME and HF_HUB_CACHE move the cache, HF_ENDPOINT names a mirror, HF_TOKEN opens private files,
HF_HUB_OFFLINE=1 forbids the network.
"""
import contextlib
import hashlib
import json
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from data.flags import progress

HUB = {"gpt2": "openai-community/gpt2", "gpt2-medium": "openai-community/gpt2-medium",
       "gpt2-large": "openai-community/gpt2-large", "gpt2-xl": "openai-community/gpt2-xl",
       "distilgpt2": "distilbert/distilgpt2"}
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("meta.json", "tokenizer.json", "vocab.json")  # the first that a model has
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
CHUNK = 1 << 16                                                  # bytes


def local_path(name):
    """The folder or file of a model: `name` itself, or the folder with the files of a model of the
    hub, downloaded at most once. Files that transformers has downloaded are used in place."""
    if os.path.exists(name):
        return name
    repo = HUB.get(name, name)
    is_hub_name = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo)
    if not is_hub_name or repo.endswith((".pt", ".safetensors")):
        raise FileNotFoundError(f"{name!r} was not found: it is no folder, no file, none of "
                                f"{', '.join(HUB)}, and not owner/name of a model of the hub")
    try:
        folder = find_snapshot(repo)
        if not is_complete(folder):
            get_model(repo, folder)
        if name not in HUB:                                      # those have GPT-2's tokenizer
            get_tokenizer(repo, folder)
    except OSError as error:
        raise type(error)(f"{name} is not a folder here, nor a complete model of the hub: "
                          f"{error}") from None
    return str(folder)


def find_snapshot(repo):
    """The folder in the cache that holds a complete model, else the one to download it to."""
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    cache = os.environ.get("HF_HUB_CACHE") or f"{home}/hub"
    aliases = [repo]
    if repo in HUB.values():                                     # transformers also takes "gpt2"
        aliases = [repo.split("/")[1], repo]
    for alias in aliases:
        model = Path(cache).expanduser().resolve() / f"models--{alias.replace('/', '--')}"
        for revision in (current_commit(model), "main"):
            folder = model / "snapshots" / revision
            if is_complete(folder):
                return folder
    return folder


def current_commit(model):
    """The commit that transformers downloaded last; "main" if there is none."""
    with contextlib.suppress(OSError, ValueError):
        commit = (model / "refs/main").read_text().strip()
        if re.fullmatch("[0-9a-f]{40}", commit):
            return commit
    return "main"


def is_complete(folder):
    return all(is_intact(folder / file) for file in model_files(folder))


def model_files(folder):
    """The names of a model's files. The weights are in one, or in several that an index names."""
    index = folder / INDEX
    if not is_intact(index):
        return ["config.json", "model.safetensors"]
    try:
        files = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if all(re.fullmatch(r"[\w-][\w.-]*\.safetensors", file) for file in files):
            return ["config.json", *files]
    except MALFORMED:
        pass
    raise ValueError(f"{index} is damaged: its weight_map must name .safetensors files")


def is_intact(path):
    """Whether a file of the cache is there, and is what its name says."""
    if not path.resolve().is_relative_to(path.parents[3]):
        raise OSError(f"{path} is a link that leads out of the cache: remove it")
    return path.exists() and problem_in(path, path.suffix) is None


def problem_in(path, suffix):
    """What is wrong with a file whose name ends so, such as a web page in its place; or None."""
    try:
        with open(path, "rb") as f:
            if suffix == ".json":
                json.load(f)
            if suffix == ".safetensors":
                size = os.path.getsize(path)
                length = int.from_bytes(f.read(8), "little")
                header = json.loads(f.read(min(length, size)))
                header.pop("__metadata__", None)
                end = max(entry["data_offsets"][1] for entry in header.values())
                if size != 8 + length + end:
                    return f"it has {size:,} bytes in place of {8 + length + end:,}"
    except MALFORMED:
        return f"it is not a {suffix} file"
    return None


def get_model(repo, folder):
    get_file(repo, folder, "config.json")
    if not is_intact(folder / INDEX):
        try:
            return get_file(repo, folder, "model.safetensors")
        except FileNotFoundError:
            get_file(repo, folder, INDEX)
    for file in model_files(folder):
        get_file(repo, folder, file)


def get_file(repo, folder, file):
    if not is_intact(folder / file):
        hub_download(repo, file, folder / file)


def get_tokenizer(repo, folder):
    if any(is_intact(folder / file) for file in TOKENIZER_FILES):
        return
    if is_offline():
        raise OSError("HF_HUB_OFFLINE forbids the download of its tokenizer: copy the model's "
                      f"{' or '.join(TOKENIZER_FILES)} to {folder}")
    for file in TOKENIZER_FILES:
        with contextlib.suppress(FileNotFoundError):
            return hub_download(repo, file, folder / file)


def is_offline():
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def hub_download(repo, file, path):
    """Download a file of the hub to `path`. The repo of a data set starts with "datasets/"."""
    if is_offline():
        raise OSError(f"HF_HUB_OFFLINE forbids the download: copy {file} of {repo} to {path}")
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if "://" not in endpoint:
        endpoint = f"https://{endpoint}"
    url = f"{endpoint.rstrip('/')}/{repo}/resolve/main/{file}"
    download(url, path, token=os.environ.get("HF_TOKEN"))


def download(url, path, sha256=None, token=None):
    """Download `url` to `path`. The file gets this name once it is complete, and has the size and
    the hash that the server announces, or this sha256."""
    part = Path(f"{path}.{os.getpid()}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        size, announced = fetch(url, part, token)
        check(part, url, Path(path).suffix, size, sha256 or announced)
        os.replace(part, path)
    except requests.RequestException as error:                   # its text may contain the token
        raise ConnectionError(f"{url}: the connection failed ({type(error).__name__}). Without a "
                              f"network, copy the file to {path}. HTTPS_PROXY sets a proxy, "
                              "HF_ENDPOINT a mirror of the hub") from None
    except (ConnectionError, FileNotFoundError):                 # the server's answer
        raise
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error}") from None
    finally:
        part.unlink(missing_ok=True)


def fetch(url, part, token):
    """Write what the server sends to `part`. -> (size, hash) as it announces them."""
    retries = Retry(3, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504),
                    raise_on_status=False)
    with requests.Session() as session, open(part, "wb") as f:
        session.mount("http://", HTTPAdapter(max_retries=retries))
        session.mount("https://", HTTPAdapter(max_retries=retries))
        session.headers["Accept-Encoding"] = "identity"
        if token:                                                # requests drops it on another host
            session.headers["Authorization"] = f"Bearer {token.strip()}"
        with session.get(url, stream=True, timeout=(10, 30)) as reply:
            check_status(reply, url)
            size, digest = announcement(reply)
            chunks = reply.iter_content(CHUNK)
            if size:
                chunks = progress(chunks, size / CHUNK, url.rsplit("/", 1)[1])
            f.writelines(chunks)
        f.flush()
        os.fsync(f.fileno())
    return size, digest


def check_status(reply, url):
    if reply.status_code == 404:
        raise FileNotFoundError(f"{url}: HTTP 404: there is no such file")
    if not reply.ok:
        advice = {401: "it asks for a token: set HF_TOKEN (or the hub has no such model)",
                  403: "access is refused: check HF_TOKEN"}
        known = advice.get(reply.status_code, "the server refused: try again later")
        raise ConnectionError(f"{url}: HTTP {reply.status_code}: {known}")


def announcement(reply):
    """-> (size, hash) that the server announces, 0 and None if it does not.

    For a large file the hub sends X-Linked-Size and X-Linked-Etag, a sha256, before it redirects to
    another host. A small file comes from the hub itself, and its ETag is git's sha1 of it.
    """
    answers = [*reply.history, reply]
    size = reply.headers.get("Content-Length", 0)
    etag = ""
    digits = 40
    if urlsplit(answers[0].url).netloc == urlsplit(reply.url).netloc:
        etag = reply.headers.get("ETag", "")
    for answer in answers:
        if "X-Linked-Etag" in answer.headers:
            size = answer.headers.get("X-Linked-Size", 0)
            etag = answer.headers["X-Linked-Etag"]
            digits = 64
    found = re.fullmatch(f'(W/)?"?([0-9a-f]{{{digits}}})"?', etag)
    return int(size), found and found[2]


def check(part, url, suffix, size, digest):
    """Raise ConnectionError if this is not the file that the server announced."""
    got = os.path.getsize(part)
    if size not in (0, got) or digest and digest != file_hash(part, len(digest)):
        raise ConnectionError(f"{url}: the {got:,} bytes that came are not the file that was "
                              f"announced ({size or got:,} bytes, hash {digest}). Try again")
    problem = problem_in(part, suffix)
    if problem:
        raise ConnectionError(f"{url}: what came is not the file: {problem}. A login page of the "
                              "network may have answered. Try again")


def file_hash(path, digits):
    """sha256 of a file, or with 40 digits git's sha1 of it."""
    digest = hashlib.sha256()
    if digits == 40:
        digest = hashlib.sha1(b"blob %d\0" % os.path.getsize(path))
    with open(path, "rb") as f:
        while chunk := f.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
