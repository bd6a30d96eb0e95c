"""Writes the index beside each WebDataset shard, in the format of DALI's wds2idx.

python -m dsaux.data.index data/imagenet/train/*.tar
"""

from __future__ import annotations

import argparse
import os
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from dsaux.command import Parser, run
from dsaux.config_rules import ConfigError, show
from dsaux.data.shards import VERSION, Member, index_path


def write_index(shard: Path) -> int:
    """Write NAME.idx beside NAME.tar; it appears whole or not at all.

    Returns:
        Number of samples.

    Raises:
        ConfigError: if the shard is no tar file, holds no sample, or the index cannot be written.
    """
    samples = list_samples(shard)
    lines = [f"{VERSION} {len(samples)}"]
    lines += [" ".join(" ".join(map(str, member)) for member in members) for members in samples]
    path = index_path(shard)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogateescape")
        os.replace(partial, path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}. Give the folder the right to.") from error
    return len(samples)


def list_samples(shard: Path) -> list[list[Member]]:
    """The files of a shard, those of one sample together: neighbours whose names agree up to the first dot.

    Raises:
        ConfigError: if the shard is no tar file, a name has a space, or there is no sample.
    """
    samples: list[list[Member]] = []
    last_key = None
    try:
        with tarfile.open(shard, "r:") as archive:  # not compressed: offsets would mean nothing
            for info in archive:
                folder, _, name = info.name.rpartition("/")
                stem, _, ending = name.partition(".")
                if not info.isreg() or not stem:
                    continue
                if len(info.name.split()) != 1 or not ending:
                    raise ConfigError(
                        f"{shard} has a member {show(info.name)}; a name must be key.ending, without spaces. Write the "
                        "shard anew."
                    )
                key = (folder, stem)
                if key != last_key:
                    samples.append([])
                    last_key = key
                samples[-1].append(Member(ending, info.offset_data, info.size, info.name))
    except (tarfile.TarError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{shard} cannot be read as a plain tar file: {reason}. Give a whole one.") from error
    if not samples:
        raise ConfigError(f"{shard} holds no samples. Remove it.")
    return samples


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Raises:
        ConfigError: for the first shard without a good index.
    """
    parser = Parser(
        prog="python -m dsaux.data.index",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("shards", type=Path, nargs="+", metavar="SHARD", help="tar files")
    for shard in parser.parse_args(argv).shards:
        if shard.suffix != ".tar":
            raise ConfigError(f"{shard} does not end in .tar. Give the shards, such as data/imagenet/train/*.tar.")
        print(f"{index_path(shard)}: {write_index(shard)} samples")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
