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

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from data.flags import progress

HUB = {"gpt2": "openai-community/gpt2", "gpt2-medium": "openai-community/gpt2-medium",
       "gpt2-large": "openai-community/gpt2-large", "gpt2-xl": "openai-community/gpt2-xl",
       "distilgpt2": "distilbert/distilgpt2"}
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"                           # where they are in several files
DAMAGE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
TOKENIZERS = ("meta.json", "tokenizer.json", "vocab.json")       # one of them tells which it is


def local_path(name):
    """The folder or file of a model: `name` itself, or the folder with the files of a model of the
    hub, downloaded at most once. Files that transformers has downloaded are used in place. Raises
    OSError."""
    if os.path.exists(name):
        return name
    repo = HUB.get(name, name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(?<!\.pt)(?<!\.safetensors)", repo):
        raise FileNotFoundError(f"{name!r} was not found: it is no folder, no file, none of "
                                f"{', '.join(HUB)}, and not owner/name of a model of the hub")
    folder = cached_folder(repo)
    try:
        get(repo, folder, "config.json")
        if name not in HUB:                                      # those have GPT-2's tokenizer
            get_tokenizer(repo, folder)
        get_weights(repo, folder)                                # last: they make it complete
    except OSError as error:
        raise type(error)(f"{name} is not a folder here, nor a complete model of the hub: "
                          f"{error}") from None
    return str(folder)


def cached_folder(repo):
    """The folder in the cache that holds a model, else the one to download it to."""
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
    aliases = [repo.split("/")[1], repo] if repo in HUB.values() else [repo]
    for alias in aliases:                                        # transformers also takes "gpt2"
        model = cache / f"models--{alias.replace('/', '--')}"
        for revision in (current_commit(model), "main"):
            folder = model / "snapshots" / revision
            if (folder / WEIGHTS).exists() or (folder / INDEX).exists():
                return folder
    return folder


def current_commit(model):
    """The commit that transformers downloaded last; "main" if there is none."""
    with contextlib.suppress(OSError, ValueError):
        commit = (model / "refs/main").read_text().strip()
        if re.fullmatch("[0-9a-f]{40}", commit):
            return commit
    return "main"


def get(repo, folder, file):
    """Download a file of a model, unless it is there. Returns its path."""
    path = folder / file
    if not path.exists() or problem_in(path, path.suffix):
        hub_download(repo, file, path)
    return path


def get_weights(repo, folder):
    if not (folder / INDEX).exists():
        try:
            return get(repo, folder, WEIGHTS)
        except FileNotFoundError:                                # they are in several files
            pass
    index = get(repo, folder, INDEX)
    try:
        files = set(map(os.path.basename, json.loads(index.read_bytes())["weight_map"].values()))
    except DAMAGE as error:
        raise OSError(f"{index} is damaged: {error!r:.100}") from None
    for file in sorted(files):
        get(repo, folder, file)


def get_tokenizer(repo, folder):
    here = [folder / file for file in TOKENIZERS if (folder / file).exists()]
    if any(problem_in(path, ".json") is None for path in here):
        return
    for file in TOKENIZERS:
        with contextlib.suppress(FileNotFoundError):
            return hub_download(repo, file, folder / file)


def problem_in(path, suffix):
    """What is wrong with a file whose name ends so, such as a web page in its place; or None."""
    try:
        with open(path, "rb") as f:
            if suffix == ".json":
                json.load(f)
            if suffix == ".safetensors":
                length = int.from_bytes(f.read(8), "little")
                header = json.loads(f.read(min(length, os.path.getsize(path))))
                header.pop("__metadata__", None)
                end = max(entry["data_offsets"][1] for entry in header.values())
                if os.path.getsize(path) != 8 + length + end:
                    return "it is truncated"
    except DAMAGE:
        return f"it is not a {suffix} file"


def hub_download(repo, file, path):
    """Download a file of the hub to `path`. The repo of a data set starts with "datasets/"."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise OSError(f"HF_HUB_OFFLINE forbids the download: copy {file} of {repo} to {path}")
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if "://" not in endpoint:
        endpoint = f"https://{endpoint}"
    url = f"{endpoint.rstrip('/')}/{repo}/resolve/main/{file}"
    download(url, path, token=os.environ.get("HF_TOKEN"))


def download(url, path, sha256=None, token=None):
    """Download `url` to `path`. The file gets this name once it is complete and sound, with the
    sha256 that the server announces, or this one."""
    part = Path(f"{path}.{os.getpid()}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        fetch(url, part, sha256, token)
        problem = problem_in(part, Path(path).suffix)
        if problem:
            raise ConnectionError(f"{url}: what came is not the file: {problem}. A login page of "
                                  "the network may have answered. Try again")
        os.replace(part, path)
    except requests.RequestException as error:                   # its text may contain the token
        raise ConnectionError(f"{url}: the connection failed ({type(error).__name__}). Without a "
                              f"network, copy the file to {path}. HTTPS_PROXY sets a proxy, "
                              "HF_ENDPOINT a mirror of the hub") from None
    finally:
        part.unlink(missing_ok=True)


def fetch(url, part, sha256, token):
    """Write what the server sends to `part`, and compare its hash."""
    retries = Retry(3, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504),
                    raise_on_status=False)
    headers = {"Accept-Encoding": "identity"}
    if token:                                                    # requests drops it on another host
        headers["Authorization"] = f"Bearer {token.strip()}"
    digest = hashlib.sha256()
    with requests.Session() as session, open(part, "wb") as f:
        session.mount(url.split("//")[0] + "//", HTTPAdapter(max_retries=retries))
        with session.get(url, headers=headers, stream=True, timeout=(10, 30)) as reply:
            check_status(reply, url)
            size = int(reply.headers.get("Content-Length", 0))
            for answer in [*reply.history, reply]:               # the hub announces, then redirects
                etag = answer.headers.get("X-Linked-Etag", "").strip('"')
                sha256 = sha256 or etag
            for chunk in progress(reply.iter_content(1 << 16), size, part.name, len):
                f.write(chunk)
                digest.update(chunk)
        f.flush()
        os.fsync(f.fileno())
    if sha256 not in (None, "", digest.hexdigest()):
        raise ConnectionError(f"{url}: the {size:,} bytes that came are not the file that was "
                              f"announced, of sha256 {sha256}. Try again")


def check_status(reply, url):
    if reply.status_code == 404:
        raise FileNotFoundError(f"{url}: HTTP 404: there is no such file")
    if not reply.ok:
        advice = {401: "it asks for a token: set HF_TOKEN (or the hub has no such model)",
                  403: "access is refused: check HF_TOKEN"}
        known = advice.get(reply.status_code, "the server refused: try again later")
        raise ConnectionError(f"{url}: HTTP {reply.status_code}: {known}")
