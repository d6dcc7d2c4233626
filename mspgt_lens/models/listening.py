"""Reading a model while its user runs it: every site and pattern of every forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from jaxtyping import Int
from torch import Tensor

from mspgt_lens.models.adapter import ModelAdapter, Part, PartHook, PatternHook, SiteHook
from mspgt_lens.models.editing import install_hook

TokensHook = Callable[[Int[Tensor, "prompt pos"]], None]


@contextmanager
def listening(
    adapter: ModelAdapter,
    on_tokens: TokensHook,
    on_site: SiteHook,
    on_pattern: PatternHook | None = None,
    on_part: PartHook | None = None,
) -> Iterator[None]:
    """Watch whatever runs of the model for the time of a ``with`` block, and change nothing.

    What is seen of a site or a pattern is what the model goes on with: the user's own hooks have
    acted before.

    Args:
        adapter: The model.
        on_tokens: Called with the token ids as each forward pass begins.
        on_site: Called with each site's number and residual stream, in order.
        on_pattern: Called with each block's number and attention pattern, before the site after it;
            None leaves patterns alone.
        on_part: Called with each block's number, the part, and what it adds, before the site after
            the block; None leaves parts alone.
    """
    points = adapter.model.hook_dict

    def site_hook(site: int) -> Callable[..., None]:
        return lambda activation, hook: on_site(site, activation)

    def pattern_hook(block: int) -> Callable[..., None]:
        assert on_pattern is not None
        hear = on_pattern
        return lambda activation, hook: hear(block, activation)

    def part_hook(block: int, part: Part) -> Callable[..., None]:
        assert on_part is not None
        hear = on_part
        return lambda activation, hook: hear(block, part, activation)

    with ExitStack() as outer:
        hooks = outer.enter_context(ExitStack())

        def begin(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tokens: Tensor = args[0] if args else next(iter(kwargs.values()))
            on_tokens(tokens)
            # Anew in every pass: hooks act in the order in which they came, and those that
            # run_with_hooks brings come just before.
            hooks.close()
            for site, name in enumerate(adapter.site_hooks):
                install_hook(hooks, points[name], site_hook(site))
            for block, name in enumerate(adapter.pattern_hooks if on_pattern else ()):
                install_hook(hooks, points[name], pattern_hook(block))
            for block, part, name in adapter.part_hooks if on_part else ():
                install_hook(hooks, points[name], part_hook(block, part))

        handle = adapter.model.embed.register_forward_pre_hook(begin, with_kwargs=True)
        outer.callback(handle.remove)
        yield
