"""Writes the trained network of a run to a file for other programs, and checks it.

python -m dsaux.export runs/quickstart --out model.pt
python -m dsaux.export runs/quickstart --out model.onnx --checkpoint step_00000120

One process, no GPU. The file appears under its name only when it has been loaded back and computes what the network
computes, and when the network is the one that the run has evaluated.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.text import Text
from torch import Tensor

from dsaux.command import Parser, console, run, show_summary
from dsaux.config_rules import ConfigError
from dsaux.data import test_batches
from dsaux.display_text import count, memory
from dsaux.model_file import FORMATS, ModelCard, Scorer, choose_format, load_model
from dsaux.models.network import Network
from dsaux.trained import Figures, Trained, evaluate_alone, load_trained

__all__ = ["ExportError", "Exported", "export_run", "load_model"]

TOLERANCE = 1e-5
"""Largest difference of the file's scores, relative to the largest score, and of the loss from the run's own."""
LARGEST_LOSS_DIFFERENCE = 0.05
"""Of the loss from the run's own, relative: more is not rounding in bf16 or on a GPU, but another network."""
NUM_CHECKED, NUM_AGAIN = 32, 3
"""Test images whose scores are compared, and how many of them once more in a batch of another size."""


class ExportError(RuntimeError):
    """The file, or the network that was to be written, is not what it should be."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file.
        format: a name in `dsaux.model_file.FORMATS`.
        trained: the network and where it comes from.
        parameters: number of its parameters.
        size_bytes: size of the file.
        difference: largest difference of the file's scores, relative to the largest score.
        evaluation: of the network in this process, over the whole test set.
    """

    path: Path
    format: str
    trained: Trained
    parameters: int
    size_bytes: int
    difference: float
    evaluation: Figures

    @property
    def is_as_recorded(self) -> bool:
        """Whether the run's own evaluation is on record and gave the same accuracy and, to `TOLERANCE`, loss."""
        recorded = self.trained.recorded
        return (
            recorded is not None
            and recorded.top1 == self.evaluation.top1
            and _loss_difference(self.evaluation, recorded) <= TOLERANCE
        )


def export_run(
    run_dir: Path,
    out: Path,
    *,
    format: str | None = None,
    checkpoint: str | None = None,
    reestimate: bool | None = None,
    force: bool = False,
) -> Exported:
    """Write the trained network of a run.

    Args:
        run_dir: the run folder.
        out: the file to write.
        format: torch, safetensors or onnx; None goes by the ending of `out`.
        checkpoint: name of a checkpoint of the run; None takes the newest that is whole.
        reestimate: estimate BatchNorm's statistics anew; None does so where the run has not.
        force: replace `out` if it is there.

    Raises:
        ConfigError: if an argument is wrong.
        CheckpointError: if the checkpoint does not fit the run's configuration.
        ExportError: if the network is not the one that the run has evaluated, or the file does not compute what the
            network computes.
    """
    form = choose_format(format, out)
    _check_out(out, force=force)
    trained = load_trained(run_dir, checkpoint=checkpoint, reestimate=reestimate)
    evaluation = _evaluate(trained)
    partial = out.with_name(f".{out.name}.partial")
    try:
        FORMATS[form].write(trained.network, trained.card, partial)
        difference = check_file(partial, form, trained.network, card=trained.card, images=_images(trained))
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    parameters = sum(parameter.numel() for parameter in trained.network.parameters())
    return Exported(out, form, trained, parameters, out.stat().st_size, difference, evaluation)


def check_file(path: Path, form: str, network: Network, *, card: ModelCard, images: Tensor) -> float:
    """Load a file back and compare what it says and computes with the network in memory.

    Args:
        path: the file.
        form: its format.
        network: in eval mode.
        card: what the file has to say.
        images: normalised, shape (B, C, H, W).

    Returns:
        Largest difference of the scores, relative to the largest score.

    Raises:
        ExportError: if it is greater than `TOLERANCE` or no number, or the card is another one.
    """
    found, scorer = FORMATS[form].read(path)
    if found != card:
        raise ExportError(f"the {form} file says {found} where {card} was written; it was removed.")
    difference = max(_difference(scorer, network, images), _difference(scorer, network, images[:NUM_AGAIN]))
    if not difference <= TOLERANCE:
        raise ExportError(
            f"the scores of the {form} file, loaded back by {FORMATS[form].reader}, differ from the network's by "
            f"{difference:.2g} of the largest score, more than {TOLERANCE:g}; it was removed. Try another --format."
        )
    return difference


def show(exported: Exported) -> None:
    """Print what was written and how the checks went."""
    trained, out = exported.trained, console()
    for warning in trained.warnings:
        out.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)
    rows: list[tuple[str, Text | str]] = [
        ("network", f"{trained.card.model} on {trained.dataset.name}, {count(trained.card.step, 'step')}"),
        ("checkpoint", str(trained.checkpoint.path)),
        ("parameters", f"{exported.parameters:,}"),
        (
            "size",
            memory(exported.size_bytes) if exported.size_bytes >= 2**20 else f"{exported.size_bytes / 1024:.0f} KiB",
        ),
        ("BatchNorm", trained.batchnorm),
        ("test set", _evaluation_line(exported)),
        ("file", _file_line(exported)),
    ]
    show_summary(out, f"{exported.path}: {exported.format}", rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Raises:
        ConfigError: if the command line is wrong.
    """
    arguments = _parse(argv)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, which the evaluation's module imports, looks for a GPU
    exported = export_run(
        arguments.run_dir,
        arguments.out,
        format=arguments.format,
        checkpoint=arguments.checkpoint,
        reestimate=arguments.reestimate,
        force=arguments.force,
    )
    show(exported)
    return 0


# ---- parts ----------------------------------------------------------------------------------------------------------


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m dsaux.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of a run, such as runs/quickstart")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write")
    parser.add_argument("--format", metavar="NAME", help=f"{', '.join(FORMATS)} (default: by the ending of --out)")
    parser.add_argument("--checkpoint", metavar="NAME", help="such as step_00000120 (default: the newest whole one)")
    parser.add_argument(
        "--reestimate",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="estimate BatchNorm's statistics anew on training images (default: where the run has not)",
    )
    parser.add_argument("--force", action="store_true", help="replace --out if it is there")
    return parser.parse_args(argv)


def _check_out(out: Path, *, force: bool) -> None:
    if not out.parent.is_dir():
        raise ConfigError(f"--out is {out} but there is no folder {out.parent}. Make it, or give another path.")
    if out.is_dir():
        raise ConfigError(f"--out is {out}, which is a folder. Give the path of a file in it.")
    if out.exists() and not force:
        raise ConfigError(f"--out {out} is there already. Give another path, or --force to replace it.")
    if not os.access(out.parent, os.W_OK):
        raise ConfigError(f"--out is {out} but the folder {out.parent} cannot be written. Give another path.")


def _evaluate(trained: Trained) -> Figures:
    """Evaluate the network; refuse one that cannot be what the run has evaluated."""
    where, step, recorded = trained.checkpoint.path, trained.card.step, trained.recorded
    found = evaluate_alone(trained.network, trained.dataset, batch_size=trained.config.dsaux.run.eval_batch_size)
    if not math.isfinite(found.loss):
        raise ExportError(
            f"the loss of the network in {where} is {found.loss} on the test set: the run had gone astray. Nothing was "
            "written. Give an earlier --checkpoint."
        )
    if recorded is not None and not _loss_difference(found, recorded) <= LARGEST_LOSS_DIFFERENCE:
        raise ExportError(
            f"the network in {where} has top-1 {found.top1:.4f} and loss {found.loss:.4f} on the test set, but the "
            f"run's own evaluation at step {step} gave {recorded.top1:.4f} and {recorded.loss:.4f}: the weights or "
            "BatchNorm's statistics are not those of that evaluation. Nothing was written. Try --reestimate, or "
            "another --checkpoint."
        )
    return found


def _images(trained: Trained) -> Tensor:
    """Some normalised test images."""
    batches = test_batches(
        trained.dataset, loader="torch", replica=0, num_replicas=1, batch_size=NUM_CHECKED, device="cpu"
    )
    images, _ = next(iter(batches))
    return images


def _difference(scorer: Scorer, network: Network, images: Tensor) -> float:
    with torch.no_grad():
        expected, found = network(images), scorer(images)
    if found.shape != expected.shape:
        raise ExportError(f"the file gives scores of shape {tuple(found.shape)}, not {tuple(expected.shape)}.")
    scale = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((found - expected).abs().max() / scale)


def _loss_difference(one: Figures, other: Figures) -> float:
    """Relative to the loss, or to 1 where it is less."""
    return abs(one.loss - other.loss) / max(1.0, abs(other.loss))


def _evaluation_line(exported: Exported) -> Text:
    found, recorded = exported.evaluation, exported.trained.recorded
    unit = exported.trained.dataset.input_spec.unit
    line = Text(f"top-1 {found.top1:.4f}, loss {found.loss:.6g} ({found.samples:,} {unit}): ")
    if recorded is None:
        return line.append("no evaluation at this step is on record", style="yellow")
    if exported.is_as_recorded:
        return line.append("equal to the run's own evaluation", style="green")
    precision = [key for key in ("bf16", "fp16") if exported.trained.config.deepspeed.get(key, {}).get("enabled")]
    reason = f" in {precision[0]}" if precision else ""
    text = f"the run's own evaluation{reason} gave top-1 {recorded.top1:.4f}, loss {recorded.loss:.6g}"
    return line.append(text, style="yellow")


def _file_line(exported: Exported) -> Text:
    text = f"loaded back by {FORMATS[exported.format].reader}: "
    same = "equal scores" if exported.difference == 0.0 else f"scores equal to {exported.difference:.1e} of the largest"
    return Text(text).append(same, style="green")


if __name__ == "__main__":
    sys.exit(run(main))
