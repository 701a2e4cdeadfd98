"""Downloads that go on where they stopped, and are checked before they are used."""

from __future__ import annotations

import hashlib
import os
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from .corpora import Download

ATTEMPTS = 5
PAUSE = 2.0  # seconds before the second attempt; doubles with each
TIMEOUT = 60.0  # seconds without a byte
_BLOCK = 2**20


def fetch(download: Download, folder: Path) -> Path:
    """The file in `folder`, downloaded unless it is there already.

    What an interrupted download left, `{name}.part`, is continued if the server can do that.

    Raises:
        ValueError: a file that is not what it should be; it stays, as {name}.wrong if it was downloaded just now.
        OSError: the server refuses, or the connection broke too often.
    """
    path = folder / download.name
    if path.exists():
        check(download, path)
        return path
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    _transfer_in_attempts(download.url, part)
    try:
        check(download, part)
    except ValueError as error:
        wrong = path.with_name(f"{path.name}.wrong")
        part.replace(wrong)
        raise ValueError(f"{error}; it is now {wrong}") from None
    part.replace(path)
    return path


def check(download: Download, path: Path) -> None:
    """Raises ValueError unless size and checksum of the file are those known of the download."""
    size = path.stat().st_size
    if download.size is not None and size != download.size:
        raise ValueError(f"{path}: must have {download.size:,} bytes as {download.url} has, got {size:,}")
    if download.checksum is not None:
        algorithm, _, expected = download.checksum.partition(":")
        if (actual := checksum(path, algorithm)) != expected:
            raise ValueError(f"{path}: its {algorithm} must be {expected} as that of {download.url}, got {actual}")


def checksum(path: Path, algorithm: str = "sha256") -> str:
    """The hexadecimal digest of a file."""
    digest = hashlib.new(algorithm)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _transfer_in_attempts(url: str, part: Path) -> None:
    for attempt in range(ATTEMPTS):
        try:
            return _transfer(url, part)
        except urllib.error.HTTPError as error:
            if error.code < 500:
                raise OSError(f"{url}: the server answers {error.code} {error.reason}") from None
            problem: Exception = error
        except (OSError, HTTPException) as error:
            problem = error
        if attempt + 1 < ATTEMPTS:
            time.sleep(PAUSE * 2**attempt)
    raise OSError(f"{url}: failed {ATTEMPTS} times, at last with: {problem}; run the command again to go on")


def _transfer(url: str, part: Path) -> None:
    """One attempt to download the rest of a file."""
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # range not satisfiable: the part is complete, or of another file
            raise
        if error.headers.get("Content-Range") == f"bytes */{start}":
            return
        part.unlink()
        raise ConnectionError("the server's file is shorter than the part downloaded before") from None
    with answer:
        if answer.status != 206:
            start = 0
        rest = answer.headers.get("Content-Length")
        total = None if rest is None else start + int(rest)
        with (
            part.open("ab" if start else "wb") as file,
            tqdm(total=total, initial=start, desc=part.stem, unit="B", unit_scale=True) as bar,
        ):
            while block := answer.read(_BLOCK):
                file.write(block)
                bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())
    if total is not None and part.stat().st_size != total:
        raise ConnectionError(f"the connection ended after {part.stat().st_size:,} of {total:,} bytes")
