"""
Downloads from the Hugging Face hub and from any web server: continued after an interruption,
checked against a hash, and complete once they are under their name.
"""
import hashlib
import os
import re
import sys
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from data.cli import Progress, UserError, lock


def hub_file(repo, name):
    """Return the path of a model's file from the Hugging Face hub, downloaded at most once.

    HF_ENDPOINT names a mirror, HF_TOKEN opens private files, HF_HOME moves the cache,
    HF_HUB_OFFLINE=1 forbids the network. Files that transformers has downloaded are used in place.
    """
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    hub = os.path.join(os.path.expanduser(home), "hub")
    owner, _, short = repo.partition("/")
    aliases = [repo]
    if owner in ("openai-community", "distilbert"):            # transformers may use the short name
        aliases = [short, repo]
    for alias in aliases:
        folder = f"{hub}/models--{alias.replace('/', '--')}"
        for revision in (current_commit(folder), "main"):
            path = f"{folder}/snapshots/{revision}/{name}"
            if os.path.exists(path):
                return path
    return hub_download(repo, name, path)


def current_commit(folder):
    """The commit that transformers downloaded last, from refs/main; "main" if there is none."""
    try:
        with open(f"{folder}/refs/main", encoding="ascii") as f:
            found = re.fullmatch(r"([0-9a-f]{40})\s*", f.read(60))
    except (OSError, ValueError):
        return "main"
    return found[1] if found else "main"


def hub_download(repo, name, path, show=None):
    """Download a file of the hub to `path`. The repo of a data set starts with "datasets/"."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise FileNotFoundError(f"{path} not found, and HF_HUB_OFFLINE forbids the download: "
                                f"copy {name} of {repo} there")
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if not endpoint.startswith(("http://", "https://")):
        endpoint = f"https://{endpoint}"
    url = f"{endpoint.rstrip('/')}/{repo}/resolve/main/{name}"
    return download(url, path, token=os.environ.get("HF_TOKEN"), show=show)


def download(url, path, sha256=None, token=None, show=None):
    """Download `url` to `path` and return `path`.

    The bytes go to path.part, which a later call continues with a Range request. They are checked
    against `sha256`, or else the hash that the server announces, before the file gets its name.
    show(bytes so far, size or None): progress; by default a line on stderr. Raises ConnectionError,
    or FileNotFoundError where the server has no such file.
    """
    part = f"{path}.part"
    show = show or Progress(os.path.basename(path)).show
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    try:
        with open_session(token) as session:
            size, announced = fetch(session, url, part, show)
    except requests.RequestException as error:                   # its text may contain the token
        problem = type(error).__name__
        raise ConnectionError(f"{url}: the connection failed ({problem}). "
                              + connection_advice(path, part)) from None
    except (ConnectionError, FileNotFoundError):                 # the server's answer
        raise
    except OSError as error:
        raise UserError(f"{part} cannot be written: {error}. {bytes_in(part):,} bytes are kept: "
                        "make room, and run it again to continue") from None
    expected = sha256 or announced
    if expected is None:
        print(f"{os.path.basename(path)}: the server announces no hash; only the size was checked",
              file=sys.stderr)
    got = bytes_in(part)
    wrong_size = size is not None and size != got
    wrong_hash = expected is not None and expected != file_hash(part, expected)
    if wrong_size or wrong_hash:
        os.remove(part)
        raise ConnectionError(f"{url}: the {got:,} bytes that came are not the file that was "
                              f"announced ({size or got:,} bytes, hash {expected}). They were "
                              "discarded: try again")
    os.replace(part, path)
    return path


def open_session(token):
    session = requests.Session()
    retry = Retry(3, backoff_factor=0.5, status_forcelist=(500, 502, 503, 504),
                  raise_on_status=False)
    session.mount("http://", HTTPAdapter(max_retries=retry))
    session.mount("https://", HTTPAdapter(max_retries=retry))
    session.headers["Accept-Encoding"] = "identity"
    if token:                                                   # requests drops it for another host
        session.headers["Authorization"] = f"Bearer {token.strip()}"
    return session


def fetch(session, url, part, show):
    """Append to `part` what is missing of `url`. Returns (size, hash), each None if unknown."""
    have = bytes_in(part)
    wanted = {"Range": f"bytes={have}-"} if have else {}
    with session.get(url, headers=wanted, stream=True, timeout=(10, 30)) as reply:
        size, digest = announcement(reply)
        if reply.status_code == 416:                             # no bytes beyond those in `part`
            if have == size:
                return size, digest
            os.remove(part)
            return fetch(session, url, part, show)
        check_status(reply, url)
        served = reply.headers.get("Content-Range", "")
        if reply.status_code != 206 or not served.startswith(f"bytes {have}-"):
            have = 0                                             # the server sends the whole file
        length = number(reply.headers.get("Content-Length", ""))
        if size is None and length is not None:
            size = have + length
        show(have, size)
        with lock(part) as f:                                    # one run at a time appends
            if have == 0:
                f.truncate(0)
            for chunk in reply.iter_content(1 << 16):
                f.write(chunk)
                have += len(chunk)
                show(have, size)
            f.flush()
            os.fsync(f.fileno())
    return size, digest


def announcement(reply):
    """The (size, hash) that the hub announces, each None if it does not.

    For a large file the hub sends X-Linked-Size and X-Linked-Etag, a sha256, before it redirects to
    another host. A small file comes from the hub itself, and its ETag is git's sha1 of it.
    """
    answers = [*reply.history, reply]
    for answer in answers:
        if "X-Linked-Etag" in answer.headers:
            size = number(answer.headers.get("X-Linked-Size", ""))
            return size, hash_in(answer.headers["X-Linked-Etag"], 64)
    same_host = urlsplit(reply.url).netloc == urlsplit(answers[0].url).netloc
    if reply.ok and same_host:
        return None, hash_in(reply.headers.get("ETag", ""), 40)
    return None, None


def number(text):
    """The number that a header holds; None if it holds something else."""
    if re.fullmatch("[0-9]{1,15}", text):
        return int(text)
    return None


def hash_in(etag, digits):
    """The hash of so many hexadecimal digits that an ETag holds; None if it holds something else"""
    bare = etag.removeprefix("W/").strip('"').lower()
    if re.fullmatch(f"[0-9a-f]{{{digits}}}", bare):
        return bare
    return None


def check_status(reply, url):
    if reply.status_code < 400:
        return
    if reply.status_code == 404:
        raise FileNotFoundError(f"{url}: HTTP 404: there is no such file")
    advice = {401: "it asks for a token: set HF_TOKEN (or the hub has no such model)",
              403: "access is refused: check HF_TOKEN"}
    known = advice.get(reply.status_code, "the server refused: try again later")
    raise ConnectionError(f"{url}: HTTP {reply.status_code}: {known}")


def connection_advice(path, part):
    if bytes_in(part):
        return f"{bytes_in(part):,} bytes are kept: run it again to continue"
    return (f"Without a network, copy the file to {path}. HTTPS_PROXY sets a proxy, HF_ENDPOINT a "
            "mirror of the hub")


def bytes_in(path):
    return os.path.getsize(path) if os.path.exists(path) else 0


def file_hash(path, like):
    """sha256 of a file, or git's sha1 of it if `like` has the length of one."""
    digest = hashlib.sha256()
    if len(like) == 40:
        digest = hashlib.sha1(b"blob %d\0" % os.path.getsize(path))
    with open(path, "rb") as f:
        while chunk := f.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
