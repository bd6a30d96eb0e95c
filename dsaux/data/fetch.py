"""Fetches the archive of a data set, once for all ranks and hosts that share a file system.

`dsaux.data.cifar` calls it before any process group, where files are missing. Whoever gets the lock downloads and
unpacks into a temporary folder and renames; the others wait for the lock, find the folder and go on. A rename is whole
or not at all, so a download that is killed leaves nothing that looks like data.
"""

from __future__ import annotations

import contextlib
import http.client
import shutil
import socket
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

LOCK_TIMEOUT_S = 1800.0
"""How long to wait for another process that downloads."""

SILENCE_TIMEOUT_S = 60.0
"""How long a server may say nothing."""


def fetch_archive(url: str, *, md5: str, into: Path, folder: str, is_there: Callable[[], bool]) -> None:
    """Brings the folder of an archive to `into`, unless another process has done so in the meantime.

    Args:
        url: of the archive.
        md5: of the archive.
        into: folder that gets the archive's folder; made if it is missing.
        folder: name of the folder in the archive.
        is_there: whether the data is there.

    Raises:
        OSError: if it cannot be had; its text is the reason.
    """
    from filelock import FileLock, Timeout

    into.mkdir(parents=True, exist_ok=True)
    lock = into / f".{folder}.lock"
    try:
        with FileLock(lock, timeout=LOCK_TIMEOUT_S):
            if not is_there():
                try:
                    _fetch(url, md5=md5, into=into, folder=folder)
                except OSError:
                    if not is_there():  # another host was first, where the file system's locks do not reach
                        raise
    except Timeout as error:
        raise OSError(
            f"another process has kept {lock} for {LOCK_TIMEOUT_S:g} s, so its download hangs or is slow"
        ) from error
    except (RuntimeError, NotImplementedError) as error:  # of torchvision: a wrong sum; of filelock: no locks here
        raise OSError(str(error).rstrip(".")) from error
    except (tarfile.TarError, zlib.error, EOFError, http.client.HTTPException) as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def _fetch(url: str, *, md5: str, into: Path, folder: str) -> None:
    from torchvision.datasets.utils import download_url, extract_archive

    print(f"dsaux: fetching {url} into {into}", file=sys.stderr, flush=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder}.", dir=into))
    try:
        with _silence_limited(SILENCE_TIMEOUT_S):
            download_url(url, temporary, filename="archive.tar.gz", md5=md5)
        extract_archive(str(temporary / "archive.tar.gz"), str(temporary / "unpacked"))
        source = temporary / "unpacked" / folder
        if not source.is_dir():
            raise OSError(f"the archive has no folder {folder}")
        source.rename(into / folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _silence_limited(seconds: float) -> Iterator[None]:
    """torchvision's downloader gives its connections no time limit of their own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
