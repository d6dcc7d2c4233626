"""Options that several subcommands take, each declared once, and the prompts they stand for."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mspgt_lens.cli.arguments import MOST_SEED, new_file, new_folder, new_result, whole_number
from mspgt_lens.cli.placing import add_placing
from mspgt_lens.models import as_adapter
from mspgt_lens.prompts import PromptDataset, load_passages

MODEL_HELP = "a hub name, a local folder or GGUF file, or 'demo' (SmolLM2-135M)"
DEFAULT_LENGTH = 384


def add_model(command: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add the model."""
    command.add_argument("model", metavar="MODEL", nargs=None if required else "?", help=MODEL_HELP)


def add_prompts(command: argparse.ArgumentParser) -> None:
    """Add the prompts."""
    command.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="UTF-8 text with one document per line, or per block between blank lines; or JSON "
        "records with a 'text' field and, if you like, a 'group' field, one per line (.jsonl) or "
        "in one array; what was read is printed; default: the built-in passages",
    )


def add_documents(
    command: argparse.ArgumentParser, *, least: int, default: int | None = None
) -> None:
    """Add how many documents are read."""
    command.add_argument(
        "--n-documents",
        type=whole_number(least),
        default=default,
        metavar="N",
        help="read N documents at most, evenly spaced (default: "
        f"{'all' if default is None else default})",
    )


def add_length(
    command: argparse.ArgumentParser,
    *,
    least: int = 2,
    default: int = DEFAULT_LENGTH,
    said: str = "longest window in tokens",
) -> None:
    """Add how many tokens of a document are taken at a time."""
    command.add_argument(
        "--max-length",
        type=whole_number(least),
        default=default,
        metavar="N",
        help=f"{said} (default: %(default)s, or the model's context if shorter)",
    )


def add_files(command: argparse.ArgumentParser, out: str, saved: str) -> None:
    """Add where the report goes, and the numbers.

    Args:
        command: The subcommand.
        out: The report's name by default.
        saved: What can be saved beside it.
    """
    command.add_argument(
        "--out",
        type=new_file,
        default=out,
        metavar="HTML",
        help="where the report goes (default: %(default)s)",
    )
    command.add_argument(
        "--save",
        type=new_result,
        metavar="PATH",
        help=f"also save the {saved}; .safetensors is added where it is missing",
    )


def add_checkpoint(command: argparse.ArgumentParser) -> None:
    """Add where sums are kept."""
    command.add_argument(
        "--checkpoint",
        type=new_folder,
        metavar="FOLDER",
        help="keep sums there every few minutes: started again in the same way, a pass that was "
        "stopped goes on; delete it once you have the report",
    )


def add_run(command: argparse.ArgumentParser) -> None:
    """Add what everything that runs a model takes: seed, devices, precision, progress."""
    command.add_argument(
        "--seed",
        type=whole_number(0, MOST_SEED),
        default=0,
        metavar="N",
        help="decides everything that is drawn (default: %(default)s)",
    )
    add_placing(command)
    command.add_argument("--no-progress", action="store_true", help="no progress bar")


def prompts_for(
    options: argparse.Namespace, model: Any, n_documents: int | None = None
) -> PromptDataset:
    """The prompts that the options say, as the model's tokens.

    Args:
        options: Of the command, its file of prompts read already.
        model: The model.
        n_documents: Most documents to take, evenly spaced; None takes all.
    """
    max_length = min(options.max_length, as_adapter(model).n_ctx)
    if options.prompts is None:
        texts = [passage.text for passage in load_passages()]
        chosen = texts if n_documents is None else _spaced(texts, len(texts), n_documents)
        return PromptDataset.from_texts(model, chosen, max_length=max_length)
    rows = options.prompts
    return PromptDataset.from_huggingface(
        model,
        rows if n_documents is None else _spaced(rows, rows.number, n_documents),
        group_column="group",
        max_length=max_length,
    )


def _spaced(documents: Iterable[Any], number: int, wanted: int) -> list[Any]:
    """As many documents as wanted, evenly spaced: neighbors in a file may be alike."""
    kept = {i * number // wanted for i in range(wanted)}
    return [document for i, document in enumerate(documents) if i in kept]
