"""What the package needs of a TransformerLens model: hook names, norms and decoding."""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mspgt_lens.estimates import CannotMeasure
from mspgt_lens.models.probes import changes, probe_tokens, without_hooks
from mspgt_lens.models.weights import (
    count_block_weights,
    count_weights,
    drawn_anew,
    first_float,
    unpacked,
)
from mspgt_lens.products import faster_layers

NormKind = Literal["rms", "layer"]
Place = Literal["resid_pre", "resid_post", "attn_out", "mlp_out", "z", "attn_scores", "pattern"]
# The one table of hook names: what is at each place of a block.
_HOOKS: dict[str, str] = {
    "resid_pre": "hook_resid_pre",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "z": "attn.hook_z",
    "attn_scores": "attn.hook_attn_scores",
    "pattern": "attn.hook_pattern",
}
SiteHook = Callable[[int, Float[Tensor, "prompt pos d_model"]], None]
PatternHook = Callable[[int, Float[Tensor, "prompt head query key"]], None]
Part = Literal["attn_out", "mlp_out"]
PARTS: tuple[Part, ...] = get_args(Part)
PartHook = Callable[[int, Part, Float[Tensor, "prompt pos d_model"]], None]
# Whether each model's predictions were seen to depend on later tokens.
_SEES_AHEAD: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


class _LastSiteReached(Exception):  # noqa: N818 - a signal, not an error
    """Ends a forward pass once the last site has been read: the logits are not needed."""


def answer_in_float32(
    module: Any, rows: Float[Tensor, "*batch d_in"], dtype: torch.dtype
) -> Float[Tensor, "*batch d_out"]:
    """What a module makes of rows, in float32 or wider also where its weights are narrower.

    Rounded to bfloat16, logits near 20 are .06 off: predictions would move by more than by many an
    effect.
    """
    weights = list(itertools.chain(module.named_parameters(), module.named_buffers()))
    # Weights that accelerate brings for each call only are there inside of the call.
    if dtype.itemsize >= 4 or any(weight.is_meta for _, weight in weights):
        answer: Tensor = module(rows.to(dtype))
    else:
        wide = {name: weight.float() for name, weight in weights if weight.is_floating_point()}
        answer = torch.func.functional_call(module, wide, (rows.float(),))
    return answer if answer.dtype == torch.float64 else answer.float()


def device_of(module: Any) -> torch.device:
    """Where a module computes, also where accelerate brings its weights for each call only."""
    weights: Tensor | None = next(itertools.chain(module.parameters(), module.buffers()), None)
    if weights is not None and not weights.is_meta:
        return weights.device
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return torch.device("cpu") if weights is None else weights.device


class ModelAdapter:
    """What the package needs of a TransformerLens model, under one set of names.

    Attributes:
        model: The TransformerLens model itself.
        name: Its name.
        n_layers: Number of blocks, L.
        d_model: Width of the residual stream.
        d_vocab: Size of the vocabulary.
        n_ctx: Longest prompt in tokens.
        pad_id: The id that the tokenizer pads with; None where there is none.
        prefix: Ids put before every prompt: BOS, where the model takes one.
        suffix: Ids put after every prompt; none but for encoders.
        mask_id: The id that stands for a hidden token; None but for encoders.
        norm_kind: ``"rms"`` or ``"layer"``: the kind of the model's final norm.
    """

    reads_both_ways: ClassVar[bool] = False
    parts: ClassVar[tuple[str, ...]] = (
        "run_with_hooks",
        "hook_dict",
        "blocks",
        "ln_final",
        "unembed",
        "W_E",
    )

    def __init__(self, model: Any) -> None:
        cfg: Any = getattr(model, "cfg", None)
        missing = [f"model.{name}" for name in self.parts if getattr(model, name, None) is None]
        missing += [
            f"model.cfg.{name}"
            for name in ("n_layers", "d_model", "d_vocab", "n_ctx", "eps")
            if getattr(cfg, name, None) is None
        ]
        if missing:
            raise TypeError(
                "model must be a TransformerLens HookedTransformer or TransformerBridge; "
                f"{type(model).__name__} lacks {', '.join(missing)}"
            )
        self.model = model
        self.cfg = cfg
        self.n_layers = int(cfg.n_layers)
        self.d_model = int(cfg.d_model)
        self.d_vocab = int(cfg.d_vocab)
        self.n_ctx = int(cfg.n_ctx)
        self.name = str(getattr(cfg, "model_name", None) or type(model).__name__)
        absent = [
            name for name in self.site_hooks + self.pattern_hooks if name not in model.hook_dict
        ]
        if absent:
            raise TypeError(
                f"model: {self.name} lacks the hooks {', '.join(absent[:4])}"
                f"{' and more' if len(absent) > 4 else ''}; every block needs a residual stream "
                "and an attention pattern"
            )
        tokenizer = getattr(model, "tokenizer", None)
        pad = getattr(tokenizer, "pad_token_id", None)
        self.pad_id = None if pad is None else int(pad)
        bos = getattr(tokenizer, "bos_token_id", None)
        self.prefix: tuple[int, ...] = ()
        if bos is not None and getattr(cfg, "default_prepend_bos", False):
            self.prefix = (int(bos),)
        self.suffix: tuple[int, ...] = ()
        self.mask_id: int | None = None
        self._scale, self._shift, self.norm_kind = self._probe_final_norm()

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Token ids of this vocabulary that are no ordinary text.

        BOS, EOS, padding and the like; added tokens that the tokenizer calls special; and ids that
        stand for no text at all: a vocabulary is often padded beyond the tokenizer's.
        """
        tokenizer: Any = getattr(self.model, "tokenizer", None)
        ids = {int(i) for i in (getattr(tokenizer, "all_special_ids", None) or ())}
        added = getattr(tokenizer, "added_tokens_decoder", None) or {}
        ids |= {int(i) for i, token in added.items() if getattr(token, "special", False)}
        if hasattr(tokenizer, "get_vocab"):
            texts = {int(i) for piece, i in tokenizer.get_vocab().items() if piece}
            ids |= set(range(self.d_vocab)) - texts
        return frozenset(i for i in ids if 0 <= i < self.d_vocab)

    @property
    def device(self) -> torch.device:
        """Where tokens go in: the input embedding's. Of a model on one device, all of it.

        Other parts may be elsewhere (``device_map``), so what meets an activation follows it there.
        """
        return device_of(getattr(self.model, "embed", None) or self.model)

    @property
    def unembedding_device(self) -> torch.device:
        """Where final residuals become logits."""
        return device_of(self.model.unembed)

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's weights; where they are quantized, of the first that are not."""
        return first_float(self.model)

    @property
    def site_hooks(self) -> list[str]:
        """The hook of each site, 0 ... L."""
        return [self.hook("resid_pre", block) for block in range(self.n_layers)] + [
            self.hook("resid_post", self.n_layers - 1)
        ]

    @property
    def pattern_hooks(self) -> list[str]:
        """The hook of each block's attention pattern, 0 ... L - 1."""
        return [self.hook("pattern", block) for block in range(self.n_layers)]

    @property
    def part_hooks(self) -> list[tuple[int, Part, str]]:
        """Block, part and hook of what attention and MLP of every block add.

        Raises:
            CannotMeasure: If a block has no such hooks, as where it is attention alone.
        """
        hooks = [
            (block, part, self.hook(part, block))
            for block in range(self.n_layers)
            for part in PARTS
        ]
        absent = [name for _, _, name in hooks if name not in self.model.hook_dict]
        if absent:
            raise CannotMeasure(
                f"model: {self.name} has no hook {absent[0]}, so what attention and MLP add cannot "
                "be told apart; leave attention_ratio, mlp_ratio, attention_cosine and mlp_cosine "
                "out of signals="
            )
        return hooks

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP of a block read the same stream: nothing lies between them."""
        between = f"blocks.{self.n_layers - 1}.hook_resid_mid"
        return between not in self.model.hook_dict

    def hook(self, place: Place, block: int) -> str:
        """The name of the hook at a place of a block.

        Args:
            place: ``"resid_pre"`` and ``"resid_post"`` (the residual stream before and after the
                block), ``"attn_out"``, ``"mlp_out"`` (what its parts add), ``"z"`` (what its heads
                read, before the output map), ``"attn_scores"`` (before the softmax) or
                ``"pattern"`` (after it).
            block: The block, 0 ... L - 1.

        Raises:
            ValueError: If there is no such place or block.
        """
        if place not in _HOOKS:
            raise ValueError(f"place must be one of {', '.join(_HOOKS)}, got {place!r}")
        if not 0 <= block < self.n_layers:
            raise ValueError(f"block must be 0 to {self.n_layers - 1} in {self.name}, got {block}")
        return f"blocks.{block}.{_HOOKS[place]}"

    @property
    def n_heads(self) -> int:
        """Attention heads of a block."""
        return int(self.cfg.n_heads)

    @property
    def n_parameters(self) -> int | None:
        """Number of weights; one that serves twice (tied embeddings) counts once.

        Quantized ones count as those that they stand for; None where nothing says how many.
        """
        return count_weights(self.model)

    @property
    def family(self) -> str | None:
        """What the architecture calls itself, such as ``"Llama"``; None where it says nothing."""
        names = (getattr(self.cfg, n, None) for n in ("original_architecture", "architecture"))
        name = next((str(n) for n in names if n), None)
        return None if name is None else re.sub(r"(For|LMHead|Model)[A-Za-z]*$", "", name)

    @property
    def n_forward_weights(self) -> int:
        """Weights that a forward pass multiplies per token: the blocks' and the unembedding's."""
        return count_block_weights(self.model) + self.d_model * self.d_vocab

    @property
    def weight_processing(self) -> str:
        """Whether the norms' weights are folded into their neighbors, as a short phrase.

        Folding and centering change the residual stream, so curves of the two differ.
        """
        folded = str(getattr(self.cfg, "normalization_type", "")).endswith("Pre") or getattr(
            self.model, "compatibility_mode", False
        )
        return f"{type(self.model).__name__}, norms {'folded' if folded else 'not folded'}"

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, without any special token.

        Raises:
            ValueError: If the model has no tokenizer, or the text holds half of a surrogate pair.
        """
        tokenizer = getattr(self.model, "tokenizer", None)
        if tokenizer is None:
            raise ValueError(
                f"model: {self.name} has no tokenizer; build the prompts with "
                "PromptDataset.from_tokens"
            )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            excerpt = text[max(0, error.start - 20) : error.start + 20]
            raise ValueError(
                "texts must be Unicode that UTF-8 can hold; there is half of a surrogate pair at "
                f"character {error.start}, in {excerpt!r}: mend the file that it came from, or "
                "replace it with text.encode('utf-8', 'replace').decode()"
            ) from error
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def token_texts(self, ids: Iterable[int]) -> list[str]:
        """The text of each token on its own; its number where the model has no tokenizer."""
        tokenizer = getattr(self.model, "tokenizer", None)
        if tokenizer is None:
            return [str(int(i)) for i in ids]
        return [_token_text(tokenizer, int(i)) for i in ids]

    def embedding(self) -> Float[Tensor, "vocab d_model"]:
        """The input embedding (detached).

        Raises:
            CannotMeasure: If it is quantized, and only its module knows what it stands for; or if
                it was offloaded, and is brought into memory for its own calls only.
        """
        held: Tensor = self.model.W_E.detach()
        if held.is_meta:
            raise CannotMeasure(
                f"model: the input embedding of {self.name} is not in memory (it was offloaded), "
                "and tokens are told apart by it; let devices take more (max_memory=), so that "
                "blocks are offloaded at most"
            )
        weights = unpacked(held)
        if weights is None or weights.shape[-1] != self.d_model:
            raise CannotMeasure(
                f"model: the input embedding of {self.name} is quantized ({held.dtype}, shape "
                f"{tuple(held.shape)}), and tokens are told apart by it; load the model with its "
                "embedding left as it is (its blocks may be quantized)"
            )
        return weights

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Evaluation mode without gradients; the model's modes are restored on leaving."""
        modes = [(module, module.training) for module in self.model.modules()]
        if any(training for _, training in modes):
            self.model.eval()  # Recurses through a bridge's modules several times over.
        try:
            with torch.no_grad():
                yield
        finally:
            for module, training in modes:
                module.training = training

    @contextmanager
    def random_weights(self, seed: int = 0) -> Iterator[None]:
        """Weights as before any training; the trained ones are put back on leaving.

        Matrices are drawn from a Gaussian with the mean and deviation that matrices of the same
        kind have over all blocks together, and vectors in blocks (norm scales, biases) take their
        kind's mean: nothing that training did to one depth and not to another survives. What is
        one matrix stays one: views show what was drawn, and tied embeddings stay tied. A copy of
        the weights is kept in the CPU's memory meanwhile.

        Raises:
            CannotMeasure: If weights are quantized, or not in memory.
        """
        self.require_ordinary_weights("control='random_weights'")
        with drawn_anew(self.model, self.name, seed):
            yield

    def run(
        self,
        tokens: Int[Tensor, "prompt pos"],
        mask: Bool[Tensor, "prompt pos"],
        on_site: SiteHook,
        on_pattern: PatternHook | None = None,
        on_part: PartHook | None = None,
        *,
        cached: bool = False,
    ) -> None:
        """One forward pass up to the last site; the unembedding is never computed.

        Args:
            tokens: Token ids, padded on the right.
            mask: True where a token is not padding.
            on_site: Called with each site's number and residual stream, in order.
            on_pattern: Called with each block's number and attention pattern.
            on_part: Called with each block's number, the part, and what it adds.
            cached: Let the model keep keys and values, as it does by default.

        Whatever happens inside, every hook that this call added is removed.
        """

        def site_hook(site: int) -> Callable[..., None]:
            def read(activation: Tensor, hook: Any) -> None:
                on_site(site, activation)
                if site == self.n_layers:
                    raise _LastSiteReached

            return read

        def pattern_hook(block: int) -> Callable[..., None]:
            def read(activation: Tensor, hook: Any) -> None:
                assert on_pattern is not None
                seen.add(block)
                on_pattern(block, activation)

            return read

        def part_hook(block: int, part: Part) -> Callable[..., None]:
            assert on_part is not None
            take = on_part
            return lambda activation, hook: take(block, part, activation)

        hooks = [(name, site_hook(site)) for site, name in enumerate(self.site_hooks)]
        if on_pattern is not None:
            hooks += [(name, pattern_hook(block)) for block, name in enumerate(self.pattern_hooks)]
        if on_part is not None:
            hooks += [(name, part_hook(block, part)) for block, part, name in self.part_hooks]
        seen: set[int] = set()
        try:
            self.model.run_with_hooks(
                tokens.to(self.device),
                **self._run_arguments(mask, cached=cached),
                return_type=None,
                fwd_hooks=hooks,
            )
        except _LastSiteReached:
            if on_pattern is not None and len(seen) < self.n_layers:
                raise RuntimeError(
                    f"model: {self.name} never forms the attention pattern of block "
                    f"{min(set(range(self.n_layers)) - seen)} under its hook; load it with "
                    "attn_implementation='eager'"
                ) from None
            return
        raise RuntimeError(
            f"model: {self.name} finished without reaching {self.site_hooks[-1]}; "
            "its hooks do not fire, so nothing can be read"
        )

    def normalize(self, residual: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d"]:
        """The residual as a reader sees it: the model's kind of norm without its learned scale.

        RMS: ``h / rms(h)``. LayerNorm: centered, then divided by its standard deviation. Always in
        float32 or wider.
        """
        residual = residual if residual.dtype == torch.float64 else residual.float()
        if self.norm_kind == "layer":
            residual = residual - residual.mean(dim=-1, keepdim=True)
        power = residual.pow(2).mean(dim=-1, keepdim=True)
        return residual * torch.rsqrt(power + self.cfg.eps)

    def decode(self, normalized: Float[Tensor, "position d_model"]) -> Float[Tensor, "position v"]:
        """Logits of normalized final residuals: the final norm's learned part, then unembedding."""
        return self.finished_logits(self._unembedded(normalized))

    def finished_logits(self, unembedded: Float[Tensor, "*batch v"]) -> Float[Tensor, "*batch v"]:
        """The model's logits from what its unembedding gives: its constant factor, then its cap."""
        logits = unembedded if self.logit_factor == 1.0 else unembedded * self.logit_factor
        cap = self._logit_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @cached_property
    def logit_factor(self) -> float:
        """The constant that the model multiplies its unembedding's output with; 1 for most.

        Some architectures scale their logits, each under another name: it is measured on a short
        run, once. Whether the logits are no more than that is for :meth:`check_decoding` to say.
        """
        tokens = probe_tokens(self.d_vocab, self.n_ctx, self.special_ids)
        with self.inference(), without_hooks(self.model):
            logits, final = self._logits_and_final(tokens)
            decoded = self._unembedded(self.normalize(final))
        if self._logit_cap is None:
            logits, decoded = (x - x.mean(dim=-1, keepdim=True) for x in (logits, decoded))
        else:
            # Before the cap, where it is not so flat that rounding decides.
            share = logits / self._logit_cap
            known = share.abs() < 0.9
            logits, decoded = (self._logit_cap * torch.atanh(share))[known], decoded[known]
        factor = float((logits * decoded).sum() / (decoded * decoded).sum())
        # What is not finite is named by the pass over the prompts.
        return factor if math.isfinite(factor) and abs(factor - 1.0) > 0.01 else 1.0

    def check_decoding(self, tokens: Int[Tensor, " pos"]) -> None:
        """Prove on one short prompt that :meth:`decode` gives the model's own logits.

        Raises:
            CannotMeasure: If the logits differ by more than a shift that is the same for all tokens
                of the vocabulary.
        """
        with self.inference():
            logits, final = self._logits_and_final(tokens)
            decoded = self.decode(self.normalize(final))
        if not torch.isfinite(final).all():
            return  # The pass over the prompts names the site and the prompt.
        logits, decoded = (x - x.mean(dim=-1, keepdim=True) for x in (logits, decoded))
        error = float((logits - decoded).norm() / logits.norm())
        half = self.dtype in (torch.float16, torch.bfloat16)
        if not error < (0.05 if half else 1e-3):
            raise CannotMeasure(
                f"model: the logits of {self.name} are not its final norm followed by its "
                f"unembedding (relative error {error:.2g}), so relevance cannot be read"
            )

    def require_causal(self, what: str) -> None:
        """Raise :class:`CannotMeasure` for a model that reads in both directions.

        Its class and its settings may say so; whatever they say, a short run tells whether the last
        token moves what is predicted before it.

        Args:
            what: What needs a causal model, such as ``"patching"``.
        """
        says = self.reads_both_ways or getattr(self.cfg, "attention_dir", "causal") != "causal"
        if says or self._sees_ahead():
            raise CannotMeasure(
                f"model: {self.name} attends in both directions; {what} needs a causal model"
            )

    def require_every_logit(self, what: str) -> None:
        """Raise :class:`CannotMeasure` unless there is a logit for every token.

        Args:
            what: What needs them, such as ``"relevance in tokens"``.
        """
        if self.d_vocab_out != self.d_vocab:
            raise CannotMeasure(
                f"model: {self.name} reads {self.d_vocab} tokens and has logits of "
                f"{self.d_vocab_out} (d_vocab, d_vocab_out); {what} needs a logit for every token: "
                f"give its unembedding {self.d_vocab} columns"
            )

    @property
    def d_vocab_out(self) -> int:
        """Number of logits at each position; that of tokens but for models of special tasks."""
        with self.inference():
            device = self.unembedding_device
            nothing = torch.zeros(1, 1, self.d_model, dtype=self.dtype, device=device)
            return int(self.model.unembed(nothing).shape[-1])

    @property
    def _logit_cap(self) -> float | None:
        cap = getattr(self.cfg, "output_logits_soft_cap", None) or -1.0
        return float(cap) if cap > 0 else None

    def _unembedded(
        self, normalized: Float[Tensor, "position d_model"]
    ) -> Float[Tensor, "position v"]:
        wide = torch.promote_types(self.dtype, torch.float32)
        scaled = normalized.to(self.unembedding_device, wide) * self._scale + self._shift
        # A position axis of its own: unembedding modules expect [prompt, pos, d_model].
        with faster_layers():
            return answer_in_float32(self.model.unembed, scaled[None], self.dtype)[0]

    def _logits_and_final(
        self, tokens: Int[Tensor, " pos"]
    ) -> tuple[Float[Tensor, "pos v"], Float[Tensor, "pos d_model"]]:
        """Logits of one prompt without padding, and the residual stream at the last site."""
        final: list[Tensor] = []

        def keep(activation: Tensor, hook: Any) -> None:
            final.append(activation.detach())

        logits = self.model.run_with_hooks(
            tokens[None].to(self.device),
            **self._run_arguments(torch.ones(1, len(tokens), dtype=torch.bool)),
            return_type="logits",
            fwd_hooks=[(self.site_hooks[-1], keep)],
        )
        wide = torch.promote_types(logits.dtype, torch.float32)
        return logits[0].to(self.unembedding_device, wide), final[0][0]

    def _sees_ahead(self) -> bool:
        if self.model not in _SEES_AHEAD:
            prompt = probe_tokens(self.d_vocab, self.n_ctx, self.special_ids).to(self.device)
            tokens = prompt.repeat(3, 1)
            tokens[0, -1] = prompt[0]
            mask = torch.ones_like(tokens, dtype=torch.bool)
            with self.inference(), without_hooks(self.model):
                logits = self.model(tokens, **self._run_arguments(mask), return_type="logits")
            moved, rounding = changes(logits[:, :-1])
            _SEES_AHEAD[self.model] = bool(moved[0] > rounding)
        return _SEES_AHEAD[self.model]

    def require_ordinary_weights(self, what: str) -> None:
        """Raise :class:`CannotMeasure` for a model that was made under ``torch.inference_mode``.

        Args:
            what: What writes to weights or differentiates through them.
        """
        if any(parameter.is_inference() for parameter in self.model.parameters()):
            raise CannotMeasure(
                f"model: {self.name} was made under torch.inference_mode, so torch lets nobody "
                f"write to its weights or differentiate through them; {what} needs that: load it "
                "outside of inference mode (no_grad is fine)"
            )

    def _run_arguments(
        self, mask: Bool[Tensor, "prompt pos"], *, cached: bool = False
    ) -> dict[str, Any]:
        """Keyword arguments of a forward pass: what tells padding apart, and no cache by default.

        Models of transformers keep the keys and values of every block unless they are told not to,
        which nothing here reads: a gigabyte for 8,192 tokens of a model of 8 billion weights.
        """
        arguments: dict[str, Any] = {"attention_mask": mask.to(self.device, torch.long)}
        return arguments if cached else arguments | self._without_cache

    @cached_property
    def _without_cache(self) -> dict[str, bool]:
        inner = getattr(self.model, "original_model", None)
        known = () if inner is None else inspect.signature(inner.forward).parameters
        return {"use_cache": False} if "use_cache" in known else {}

    def _probe_final_norm(self) -> tuple[Tensor, Tensor, NormKind]:
        """Scale, shift and kind of the final norm, read off its outputs.

        Every model class stores them under other names (and some as ``1 + weight``), but all answer
        to ``ln_final``: a vector of unit variance comes back scaled, a zero vector gives the shift,
        and a constant added to the input changes nothing under LayerNorm only.
        """
        dtype, device = self.dtype, self.unembedding_device

        def final_norm(vector: Tensor) -> Tensor:
            out = self.model.ln_final(vector.to(device_of(self.model.ln_final), dtype)[None, None])
            read: Tensor = out[0, 0].to(device, torch.float32)
            return read

        with self.inference():
            signs = torch.ones(self.d_model, device=device)
            signs[1::2] = -1.0
            if self.d_model % 2:
                signs[-1] = 0.0  # Keeps the mean at zero; the rolled probe covers the last entry.
            shift = final_norm(torch.zeros_like(signs))
            scale = torch.zeros_like(signs)
            for probe in (signs, signs.roll(1)):
                spread = torch.sqrt(probe.pow(2).mean() + self.cfg.eps)
                read = (final_norm(probe) - shift) * spread
                scale = torch.where(probe != 0, read / probe, scale)
            moved = final_norm(signs + 1.0) - final_norm(signs)
            kind: NormKind = "layer" if moved.norm() < 0.1 * scale.norm() else "rms"
        return scale, shift, kind


def _token_text(tokenizer: Any, token: int) -> str:
    text = str(tokenizer.decode([token]))
    # Decoders of SentencePiece's kind drop the space that begins a text: here it is the token's.
    piece = str(getattr(tokenizer, "convert_ids_to_tokens", lambda _: "")(token))
    return f" {text}" if piece.startswith("\u2581") and not text.startswith(" ") else text
