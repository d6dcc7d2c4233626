"""The one module that knows TransformerLens: hook names, model classes, norms and decoding.

Everything else sees a :class:`ModelAdapter`: sites, attention patterns, the final norm and the
unembedding of a ``HookedTransformer`` (TransformerLens 2 and 3) or a ``TransformerBridge``
(TransformerLens 3 and 4), without knowing which it is. Encoders (BERT, RoBERTa) have one too.
"""

from mspgt_lens.models.access import as_adapter, cache_reader, needed_hooks
from mspgt_lens.models.adapter import (
    ModelAdapter,
    NormKind,
    Part,
    PartHook,
    PatternHook,
    SiteHook,
)
from mspgt_lens.models.attending import PatternBlocks, own_attention, pattern_blocks
from mspgt_lens.models.building import (
    bridge_class,
    bridge_from_huggingface,
    hooked_llama_from_huggingface,
)
from mspgt_lens.models.differentiating import differentiable
from mspgt_lens.models.editing import CannotEdit, Change, Edit, edited, edited_logits, require_acted
from mspgt_lens.models.generating import RowEdits, Rows, check_generation, decode_text, generate
from mspgt_lens.models.listening import listening
from mspgt_lens.models.patching_results import SweptValues, patching_result, read_patching_result
from mspgt_lens.models.placing import has_float64, in_float64, ran_out_of_memory
from mspgt_lens.models.reading import provenance, unembedding_rows, weight_digest
from mspgt_lens.models.resuming import PatchPlace, RecordedRun

__all__ = [
    "CannotEdit",
    "Change",
    "Edit",
    "ModelAdapter",
    "NormKind",
    "Part",
    "PartHook",
    "PatchPlace",
    "PatternBlocks",
    "PatternHook",
    "RecordedRun",
    "RowEdits",
    "Rows",
    "SiteHook",
    "SweptValues",
    "as_adapter",
    "bridge_class",
    "bridge_from_huggingface",
    "cache_reader",
    "check_generation",
    "decode_text",
    "differentiable",
    "edited",
    "edited_logits",
    "generate",
    "has_float64",
    "hooked_llama_from_huggingface",
    "in_float64",
    "listening",
    "needed_hooks",
    "own_attention",
    "patching_result",
    "pattern_blocks",
    "provenance",
    "ran_out_of_memory",
    "read_patching_result",
    "require_acted",
    "unembedding_rows",
    "weight_digest",
]
