"""Checkpoint folders on disk: written whole or not at all, verified before they are used.

`AuxPipelineEngine.save_checkpoint` and `load_checkpoint` fill and read them, `train.py --resume`, `dsaux.export` and
`--eval_only` find them. One run folder:

    checkpoint/
        latest                          name of the newest checkpoint
        step_00000120/
            manifest.json               what the checkpoint is, size and SHA-256 of each file
            manifest.json.sha256        SHA-256 of the manifest
            layer_00-model_states.pt    weights and buffers of a layer, DeepSpeed's name for it
            layer_00-optim_states.pt    its optimizer state and float32 master weights, whatever ZeRO and replicas
            aux_net-model_states.pt     the AuxNet
            aux_net-optim_states.pt     its optimizer, schedule and running variances
            head_05-model_states.pt     under `local` the head at the cut before layer 5; its -optim_states beside it
            stage_00-states.pt          schedule and counts of a stage, the caller's own state
            rank_000-states.pt          random states of a rank, its batches under way

A checkpoint grows in `.<name>.partial` beside the others. When every rank's files are on disk and have been read back,
rank 0 writes the manifest, renames the folder and only then moves `latest`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from dsaux.config_rules import ConfigError

CHECKPOINT_FOLDER = "checkpoint"
LATEST_FILE = "latest"
MANIFEST_FILE = "manifest.json"
SEAL_FILE = MANIFEST_FILE + ".sha256"
FORMAT = 1
_BEFORE = ".before"
_CHUNK_BYTES = 1 << 20


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or a file of it is not what was written."""


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint.

    Attributes:
        name: file name inside the folder.
        size_bytes: its size.
        sha256: its digest, hexadecimal.
    """

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class FoundCheckpoint:
    """A checkpoint whose files are all what was written.

    Attributes:
        path: its folder.
        content: what its writer said of it: "step", "schedule", "bounds" and so on.
        files: its files by name.
        skipped: a sentence for each newer checkpoint that was passed over.
    """

    path: Path
    content: Mapping[str, Any]
    files: Mapping[str, FileEntry]
    skipped: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.content["step"])

    def load(self, name: str, *, device: Any = "cpu") -> Any:
        """The object in one of the files; its bytes are compared with the manifest, and nothing is executed.

        Args:
            name: file name.
            device: where tensors are put.

        Raises:
            CheckpointError: if the file is missing, differs from the manifest or holds other than plain data.
        """
        import torch

        if name not in self.files:
            raise CheckpointError(f"{self.path} has no {name}; its {MANIFEST_FILE} does not name it.")
        try:
            data = (self.path / name).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{self.path / name} cannot be read: {error.strerror or error}.") from error
        _compare(self.files[name], size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), path=self.path)
        try:
            return torch.load(io.BytesIO(data), map_location=device, weights_only=True)
        except Exception as error:
            raise CheckpointError(
                f"{self.path / name} does not hold plain tensors and numbers ({type(error).__name__}). Give "
                "another checkpoint."
            ) from error


def layer_model_file(index: int) -> str:
    """Weights and buffers of a layer, by its index in the whole network; DeepSpeed's name for the file."""
    return f"layer_{index:02d}-model_states.pt"


# ---- writing --------------------------------------------------------------------------------------------------------


def partial_folder(folder: Path, name: str) -> Path:
    """Where a checkpoint grows."""
    return folder / f".{name}.partial"


def write_file(path: Path, state: Any) -> FileEntry:
    """Write one object, force it to the disk and read it back.

    Args:
        path: the file to write.
        state: tensors, numbers, strings, lists, tuples and dicts of them.

    Returns:
        Its entry in the manifest.

    Raises:
        OSError: if the disk is full or the folder cannot be written.
        CheckpointError: if what is read back differs, or holds what `torch.load(weights_only=True)` refuses.
    """
    import torch

    with path.open("wb") as raw:
        file = _HashingFile(raw)
        try:
            torch.save(state, cast("IO[bytes]", file))
        except RuntimeError:
            if file.error is not None:  # PyTorch's writer hides why it could not write
                raise file.error from None
            raise
        raw.flush()
        os.fsync(raw.fileno())
    entry = FileEntry(path.name, file.size_bytes, file.digest.hexdigest())
    size_bytes, sha256 = _measure(path)
    _compare(entry, size_bytes=size_bytes, sha256=sha256, path=path.parent)
    try:
        torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path.name} holds an object that a checkpoint cannot hold: {error}. Give save_checkpoint tensors, "
            "numbers, strings, and lists and dicts of them."
        ) from error
    return entry


def publish(folder: Path, name: str, *, entries: Iterable[FileEntry], content: Mapping[str, Any], latest: bool) -> Path:
    """Turn a partial checkpoint, whose files are all on disk, into a whole one. Rank 0 calls it.

    Args:
        folder: where the checkpoints of a run are.
        name: of this checkpoint.
        entries: the files of all ranks.
        content: what the manifest says of the checkpoint.
        latest: let `latest` name it.

    Returns:
        The folder of the checkpoint.

    Raises:
        OSError: if the disk is full or the folder cannot be written.
        CheckpointError: if a rank wrote its files to a disk that this one does not see.
    """
    partial, path = partial_folder(folder, name), folder / name
    listing = sorted(entries, key=lambda entry: entry.name)
    for entry in listing:
        file = partial / entry.name
        if not file.is_file() or file.stat().st_size != entry.size_bytes:
            raise CheckpointError(
                f"{file} was written by another rank but is not there for rank 0. Put the run folder on a file system "
                "that all hosts share."
            )
    document = {"format": FORMAT, **content, "files": [vars(entry) for entry in listing]}
    data = (json.dumps(document, indent=1) + "\n").encode()
    _write_bytes(partial / MANIFEST_FILE, data)
    _write_bytes(partial / SEAL_FILE, _seal(data))
    _sync_folder(partial)
    before = folder / f"{name}{_BEFORE}"
    if (
        path.exists()
    ):  # of a run that was resumed from an earlier step; whole under its other name, until it is replaced
        shutil.rmtree(before, ignore_errors=True)
        path.rename(before)
    partial.rename(path)
    _sync_folder(folder)
    shutil.rmtree(before, ignore_errors=True)
    if latest:
        temporary = folder / f".{LATEST_FILE}.partial"
        _write_bytes(temporary, f"{name}\n".encode())
        temporary.rename(folder / LATEST_FILE)
        _sync_folder(folder)
    return path


def clear_partial(folder: Path) -> None:
    """Remove what unfinished checkpoints have left behind."""
    for path in folder.glob(".*.partial"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def keep_newest(folder: Path, count: int) -> None:
    """Remove all checkpoints but the one that `latest` names and those before it.

    Later ones, of a run that was resumed from an earlier step, are left alone.

    Args:
        folder: where the checkpoints of a run are.
        count: how many to keep, `latest` included.
    """
    latest = _read_latest(folder)
    names = [path.name for path in _newest_first(folder)]
    if latest not in names:
        return
    for name in names[names.index(latest) + count :]:
        # The seal first: what is half removed must not pass for whole.
        (folder / name / SEAL_FILE).unlink(missing_ok=True)
        shutil.rmtree(folder / name, ignore_errors=True)


# ---- finding --------------------------------------------------------------------------------------------------------


def find_checkpoint(path: Path) -> FoundCheckpoint:
    """The newest whole checkpoint of a run: that of `latest`, or the one before it, and so on.

    Args:
        path: a run folder, the folder of its checkpoints, or one checkpoint, which then is the only candidate.

    Returns:
        The checkpoint; all its files have been read and compared with their digests.

    Raises:
        ConfigError: if there is none, with what is wrong with each candidate.
    """
    candidates = _candidates(path)
    skipped: list[str] = []
    for candidate in candidates:
        try:
            found = verify(candidate)
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        return FoundCheckpoint(found.path, found.content, found.files, tuple(skipped))
    if skipped:
        raise ConfigError(f"{path} has no checkpoint that is whole. {' '.join(skipped)} Give another run.")
    raise ConfigError(
        f"{path} holds no checkpoint. Give the folder of a run that has saved one (with a {MANIFEST_FILE} in each "
        f"folder under {CHECKPOINT_FOLDER}/)."
    )


def has_checkpoint(path: Path) -> bool:
    """Whether there is anything that looks like a checkpoint, whole or not; reads no file."""
    return bool(_candidates(path))


def peek(path: Path) -> Mapping[str, Any] | None:
    """What the newest checkpoint says of itself, its files unread; None if no manifest is whole."""
    for candidate in _candidates(path):
        try:
            return _read_manifest(candidate)
        except CheckpointError:
            continue
    return None


def verify(path: Path) -> FoundCheckpoint:
    """Read a whole checkpoint and compare it with its manifest.

    Raises:
        CheckpointError: names the file that is missing or has been cut or altered.
    """
    manifest = _read_manifest(path)
    files = {entry["name"]: FileEntry(**entry) for entry in manifest.pop("files")}
    for name, entry in files.items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing.")
        try:
            size_bytes, sha256 = _measure(path / name)
        except OSError as error:
            raise CheckpointError(f"{path / name} cannot be read: {error.strerror or error}.") from error
        _compare(entry, size_bytes=size_bytes, sha256=sha256, path=path)
    return FoundCheckpoint(path, manifest, files)


def _candidates(path: Path) -> list[Path]:
    if (path / MANIFEST_FILE).exists() or (path / SEAL_FILE).exists():
        return [path]
    folder = path / CHECKPOINT_FOLDER if (path / CHECKPOINT_FOLDER).is_dir() else path
    found = _newest_first(folder)
    names = [item.name for item in found]
    latest = _read_latest(folder)
    # `latest` first, then those before it; a later one is of a run that went back to an earlier step, or of one that
    # ended just before it moved `latest`.
    start = names.index(latest) if latest in names else 0
    return [*found[start:], *reversed(found[:start])]


def _newest_first(folder: Path) -> list[Path]:
    """Folders that hold a manifest or are named like checkpoints, by the number in their names."""
    try:
        items = [item for item in folder.iterdir() if item.is_dir() and not item.name.startswith(".")]
    except OSError:
        return []
    marked = [item for item in items if (item / MANIFEST_FILE).exists() or (item / SEAL_FILE).exists()]
    return sorted(marked, key=lambda item: (_number(item.name), item.name), reverse=True)


def _number(name: str) -> int:
    digits = "".join(mark if mark.isdigit() and mark.isascii() else " " for mark in name).split()
    return int(digits[-1][-18:]) if digits else -1


def _read_latest(folder: Path) -> str | None:
    try:
        name = (folder / LATEST_FILE).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return name if name and name == Path(name).name and "\0" not in name else None


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        data, seal = (path / MANIFEST_FILE).read_bytes(), (path / SEAL_FILE).read_bytes()
    except OSError as error:
        name = Path(error.filename).name if error.filename else MANIFEST_FILE
        raise CheckpointError(f"{path / name} cannot be read: {error.strerror or error}.") from error
    if seal != _seal(data):
        raise CheckpointError(f"{path / MANIFEST_FILE} or {SEAL_FILE} has been altered: one does not fit the other.")
    try:
        manifest = json.loads(data)
        version = manifest["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path / MANIFEST_FILE} is no manifest of dsaux.") from error
    if version != FORMAT:
        raise CheckpointError(
            f"{path / MANIFEST_FILE} has format {version}; this version of dsaux reads format {FORMAT}. Take the "
            "version that wrote it."
        )
    for key, is_right in _CONTENT.items():
        if not is_right(manifest.get(key)):
            raise CheckpointError(f"{path / MANIFEST_FILE} has a wrong entry {key!r}: it was not written by dsaux.")
    return dict(manifest)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_layout(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("schedule"), str):
        return False
    bounds = value.get("bounds")
    return (
        all(_is_count(value.get(key)) and value[key] > 0 for key in ("stages", "replicas", "micro_batches"))
        and isinstance(bounds, list)
        and len(bounds) == value["stages"] + 1
        and all(_is_count(bound) for bound in bounds)
    )


def _is_listing(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(entry, dict)
        and entry.keys() == {"name", "size_bytes", "sha256"}
        and isinstance(entry["name"], str)
        and entry["name"] == Path(entry["name"]).name  # never a path out of the folder
        and _is_count(entry["size_bytes"])
        and isinstance(entry["sha256"], str)
        for entry in value
    )


_CONTENT: Mapping[str, Callable[[Any], bool]] = {
    "step": _is_count,
    "num_layers": _is_count,
    "is_drained": lambda value: isinstance(value, bool),
    "layout": _is_layout,
    "files": _is_listing,
}
"""Entries that every manifest has."""


# ---- bytes ----------------------------------------------------------------------------------------------------------


class _HashingFile:
    """A file that is only written to, front to back, and knows the digest of what went through it."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self.digest = hashlib.sha256()
        self.size_bytes = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            self._raw.write(view)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(view)
        self.size_bytes += len(view)
        return len(view)

    def flush(self) -> None:
        self._raw.flush()


def _measure(path: Path) -> tuple[int, str]:
    digest, size_bytes = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size_bytes += len(chunk)
    return size_bytes, digest.hexdigest()


def _compare(entry: FileEntry, *, size_bytes: int, sha256: str, path: Path) -> None:
    if size_bytes != entry.size_bytes:
        raise CheckpointError(
            f"{path / entry.name} has {size_bytes} bytes where {entry.size_bytes} were written: it was cut or altered."
        )
    if sha256 != entry.sha256:
        raise CheckpointError(f"{path / entry.name} has been altered: its SHA-256 is not the one that was written.")


def _seal(data: bytes) -> bytes:
    """The form of sha256sum, so that `sha256sum -c` reads it."""
    return f"{hashlib.sha256(data).hexdigest()}  {MANIFEST_FILE}\n".encode()


def _write_bytes(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    # Not every file system can; the names are then as safe as it makes them.
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def describe_failure(errors: Sequence[str | None]) -> str | None:
    """The first rank's reason why a checkpoint was not written; None if all ranks wrote their part.

    Args:
        errors: what each rank says, by global rank; None where all went well.
    """
    for rank, error in enumerate(errors):
        if error is not None:
            return f"rank {rank}: {error}"
    return None
