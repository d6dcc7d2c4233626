"""Write docs/architectures.md: what the package does with every architecture that is tried.

Run as ``PYTHONPATH=tests:tests/architectures python tests/architectures/table.py``, after which
``git diff docs/architectures.md`` tells what changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from checks import HEADER, row
from kinds import KINDS

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
_ABOUT = """\
# Architectures

Every line is a tiny model with random weights of an architecture that TransformerLens {version} \
lists, tried by `tests/architectures` under that version whenever the tests run. "Exact" means \
equal to what a plain copy of the model gives, which TransformerLens never touched, under torch's \
own hooks, up to rounding in float32:

- **Sites**: the residual stream at every site is that of the plain blocks, with padding on the \
left and on the right too.
- **Decoding**: the last site, normalized and decoded, gives the model's logits.
- **Patching**: the places at which every cell of `patch_layers` is that of a whole forward pass \
with one activation put in, with padding too, and with as many prompts as positions and heads. It \
resumes at the patched *position*, or where blocks keep more than keys and values, at the patched \
*block* (slower, and as exact).
- **Edits**: the places at which changing an activation in all blocks changes the logits as it \
does in the plain copy. The temperature needs `attn_scores`, every other perturbation only the \
residual.

What is refused raises an error that says so; the last column has its first words ("it" is the \
model). An architecture that is not here is held to the same proofs when it is used, and refused \
where one fails.

In models with attention sinks (GptOss) patterns do not sum to 1: the rest goes to no position. \
Falcon with ALiBi is as its "eager" implementation; the default one of transformers gives other \
logits (by 4% in this tiny model).

"""


def lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """The table's lines, its head first."""
    return [f"| {' | '.join(cells)} |" for cells in (HEADER, ["---"] * len(HEADER), *rows)]


def listed() -> dict[tuple[str, str], tuple[str, ...]]:
    """The lines of the page, by architecture and what it stands for."""
    table = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| ")]
    cells = [tuple(line.strip("| ").split(" | ")) for line in table[2:]]
    return {(one[0], one[1]): one for one in cells}


def main() -> None:
    """Try every architecture and write the page."""
    from importlib import metadata

    about = _ABOUT.format(version=metadata.version("transformer-lens"))
    table = lines([row(kind) for kind in KINDS])
    PAGE.write_text(about + "\n".join(table) + "\n", "utf-8")


if __name__ == "__main__":
    main()
