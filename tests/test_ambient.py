"""Whatever state torch and numpy are in: the same numbers, and the state is left as it was."""

from __future__ import annotations

import inspect
import random
import re
import warnings
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from types import FunctionType

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from tiny import as_text, random_tokens, tiny_config, tiny_model, tiny_tokenizer
from torch import Tensor

import mspgt_lens as ml
from mspgt_lens import ambient as ambient_module
from mspgt_lens.ambient import in_own_state

BANDS = {"local": (1, 1), "intermediate": (2, 4)}
FAR = BANDS | {"global": (5, 9)}
QUICK = {"bands": BANDS, "n_folds": 3}
PART = (2, 4)
QUIET = {"progress": False}
BACKENDS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


def _set(setter, value, old):
    def enter(stack):
        stack.callback(setter, old())
        setter(value)

    return enter


def _entered(make):
    return lambda stack: stack.enter_context(make())


def _reduced(stack):
    for backend in BACKENDS:
        stack.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
        backend.fp32_precision = "tf32" if backend is BACKENDS[0] else "bf16"


STATES = {
    "no gradients": _set(torch.set_grad_enabled, False, torch.is_grad_enabled),
    "inference mode": _entered(torch.inference_mode),
    "float64": _set(torch.set_default_dtype, torch.float64, torch.get_default_dtype),
    "bfloat16": _set(torch.set_default_dtype, torch.bfloat16, torch.get_default_dtype),
    "autocast": _entered(lambda: torch.autocast("cpu", torch.bfloat16)),
    "device": _entered(lambda: torch.device("meta")),
    "reduced products": _reduced,
    "deterministic": _set(
        torch.use_deterministic_algorithms, True, torch.are_deterministic_algorithms_enabled
    ),
    "numpy raises": _entered(lambda: np.errstate(all="raise")),
    "warnings are errors": lambda stack: (
        stack.enter_context(warnings.catch_warnings()),
        warnings.simplefilter("error"),
    ),
}
# Each state is in one of them; what works in all of its states at once works in each.
TOGETHER = {
    "notebook": ("no gradients", "float64", "autocast", "deterministic", "numpy raises"),
    "server": ("inference mode", "bfloat16", "device", "reduced products", "warnings are errors"),
}


@contextmanager
def ambient(names):
    with ExitStack() as stack:
        for name in names:
            STATES[name](stack)
        yield


def state():
    """All that a caller could find changed."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
        tuple(backend.fp32_precision for backend in BACKENDS),
        tuple(np.geterr().items()),
        torch.random.get_rng_state().numpy().tobytes(),
        str(np.random.get_state()),
        random.getstate(),
        tuple(warnings.filters),
    )


def written(model, n_pos):
    """Tokens that the model wrote itself, so that perturbing it raises their loss."""
    generator = torch.Generator().manual_seed(0)
    tokens = random_tokens(12, 3)
    with torch.no_grad():
        while tokens.shape[1] < n_pos:
            weights = model(tokens, return_type="logits")[:, -1].mul(1.5).softmax(-1)
            weights[:, :4] = 0.0
            tokens = torch.cat([tokens, torch.multinomial(weights, 1, generator=generator)], dim=1)
    return tokens


class Things:
    """Arguments of the public functions, each made once, when it is first asked for."""

    def __init__(self, folder):
        self.folder = folder
        self.model = tiny_model("llama", n_layers=6)
        self.model.tokenizer = tiny_tokenizer()
        self.tokens = written(self.model, 40)
        self.prompts = ml.PromptDataset.from_tokens(self.tokens)
        self.few = ml.PromptDataset.from_tokens(self.tokens[:4, :16])
        self.texts = [as_text(row) for row in self.tokens]
        self.rows = np.random.default_rng(0).standard_normal((2, 120, 2))
        self.rows[1] += self.rows[0]
        self.depths = np.array([[3, 7], [5, 12], [4, 9], [8, 16], [3, 6], [7, 11]])
        self.n_layers = np.array([12, 24, 16, 32, 12, 24])
        self.rates = {
            "betas": np.array([1.0, 2.0, 3.0]),
            "kappas": np.array([0.2, 0.3, 0.4]),
            "distortions": np.array([1.0, 1.0, 2.0]),
        }
        self.cache = dict(
            self.model.run_with_cache(
                self.tokens, names_filter=ml.needed_hooks(self.model), return_type=None
            )[1]
        )
        self.made = {}

    def __getitem__(self, name):
        if name not in self.made:
            self.made[name] = CALLS[name](self)
        return self.made[name]


def information(estimator):
    return lambda t: ml.mutual_information(
        torch.from_numpy(t.rows[0]), t.rows[1], estimator=estimator
    )


def ablated(things):
    """Of a model that writes something massive, by a hook of its user."""

    def write(activation, hook):
        activation = activation.clone()
        activation[:, 0, :3] += 300.0
        return activation

    with things.model.hooks(fwd_hooks=[("blocks.2.hook_resid_post", write)]):
        return ml.studies.ablate_massive(things.model, things.few, **QUIET)


DRAWS = {"n_bootstraps": 20}
UNIQUE = re.compile("[0-9a-f]{8}-[0-9a-f-]{27}")  # Plotly's names of figures.
TASKS = ("indirect_objects", "subject_verb_agreement", "capitals", "topic_cue", "induction")
# These need a vocabulary of English.
WORD_TASKS = {f"tasks.{name}" for name in TASKS if name != "induction"}
CALLS = {
    "ablate_massive": ablated,
    "analyze": lambda t: (
        ml.analyze(
            t.model,
            [f"{text} {text} {text}" for text in t.texts],
            n_documents=3,
            n_control_documents=12,
            n_tokens=100,
            progress=False,
        ).profile
    ),
    "block_effects": lambda t: ml.studies.block_effects(t.model, t.few, n_places=1, **QUIET),
    "bottleneck_frontier": lambda t: ml.arrays.bottleneck_frontier(*t.rows),
    "boundary_signals": lambda t: ml.arrays.boundary_signals(t["profile_layers"]),
    "channel_rate": lambda t: ml.arrays.channel_rate(np.cov(t.rows[0].T)),
    "compare_models": lambda t: ml.studies.compare_models(t["synthetic_models"]),
    "compare_places": lambda t: ml.theory.compare_places(t["detect_scales"], t["profile_layers"]),
    "depth_variation": lambda t: ml.theory.depth_variation(t.depths / t.n_layers[:, None]),
    "detect_scales": lambda t: ml.detect_scales(profile=t["profile_layers"], **DRAWS),
    "emergence": lambda t: ml.studies.emergence(
        [(0, t.model), (1, t.model)], t.prompts, profile_settings=QUICK, progress=False, **DRAWS
    ),
    "evaluate_predictions": lambda t: ml.evaluate_predictions(t["synthetic_models"]),
    "fit_hvib": lambda t: ml.fit_hvib(
        t.model, t.prompts, betas=(3.0, 12.0), bands=BANDS, sites=(1, 3), n_steps=20, **QUIET
    ),
    "fit_hvib_arrays": lambda t: ml.arrays.fit_hvib_arrays(
        t.rows[:1], {"y": t.rows[1]}, betas=(3.0, 12.0), n_steps=20, **QUIET
    ),
    "fit_lens": lambda t: ml.fit_lens(t.model, t.prompts, n_folds=3, **QUIET),
    "fit_water_filling": lambda t: ml.theory.fit_water_filling(t.depths, t.n_layers),
    "generation_effects": lambda t: ml.generation_effects(
        t.model,
        [text[:60] for text in t.texts[:4]],
        PART,
        perturbations=[ml.Perturbation("noise"), ml.Perturbation("temperature")],
        n_new=4,
        target_kl=0.05,
        n_controls=1,
        **QUIET,
    ),
    "held_out_errors": lambda t: ml.theory.held_out_errors(t.depths, t.n_layers),
    "load_demo_model": None,  # Of the real model: below.
    "load_model": lambda t: [p.detach() for p in ml.load_model(str(t.folder)).parameters()],
    "load_passages": lambda t: ml.load_passages(),
    "load_result": lambda t: ml.load_result(t["profile_layers"].save(t.folder / "profile")),
    "measure_brittleness": lambda t: ml.measure_brittleness(
        t.model, t.few, PART, levels=(0.1, 0.2), **QUIET
    ),
    **{
        f"mutual_information {name}": information(name)
        for name in ("gaussian", "copula", "vib", "infonce", "ksg", "renyi")
    },
    "needed_hooks": lambda t: ml.needed_hooks(t.model),
    "patch_layers": lambda t: ml.patch_layers(t.model, t["pairs"], **QUIET),
    "patch_layers attribution": lambda t: ml.patch_layers(
        t.model, t["pairs"], method="attribution", **QUIET
    ),
    "patch_scales": lambda t: ml.patch_scales(t.model, t["pairs"], t["detect_scales"], **QUIET),
    "from_transformer_lens": lambda t: ml.results.PatchSweep.from_transformer_lens(
        t["to_transformer_lens"], place="resid_pre", clean=t["patch_layers"].clean_by_pair
    ),
    "to_transformer_lens": lambda t: t["patch_layers"].to_transformer_lens(),
    "perturb_scales": lambda t: ml.perturb_scales(t.model, t.few, PART, n_controls=2, **QUIET),
    "plan_profile": lambda t: ml.studies.plan_profile(tiny_config("llama"), 100, 100).summary(),
    "plot_class_counts": lambda t: ml.plots.plot_class_counts(t["classify_tokens"]),
    "plot_table": lambda t: ml.plots.plot_table(t["fit_water_filling"]),
    "plot_block_effects": lambda t: ml.plots.plot_block_effects(t["block_effects"]),
    "plot_boundaries": lambda t: ml.plot_boundaries(t["detect_scales"]),
    "plot_brittleness": lambda t: ml.plots.plot_brittleness(t["measure_brittleness"]),
    "plot_comparison": lambda t: ml.plots.plot_comparison(t["compare_models"]),
    "plot_effects": lambda t: ml.plots.plot_effects(t["perturb_scales"]),
    "plot_effects texts": lambda t: ml.plots.plot_effects(t["generation_effects"]),
    "plot_emergence": lambda t: ml.plots.plot_emergence(t["emergence"]),
    "explore": lambda t: ml.plots.explore(t["profile_layers"]),
    "plot_hvib": lambda t: ml.plots.plot_hvib(t["fit_hvib"]),
    "plot_information_plane": lambda t: ml.plots.plot_information_plane(t["profile_layers"]),
    "plot_lens": lambda t: ml.plot_lens(t["fit_lens"], t.model, t.texts[0]),
    "plot_lens_reading": lambda t: ml.plots.plot_lens_reading(t["lens read"], color="rank"),
    "plot_lens_scores": lambda t: ml.plots.plot_lens_scores(t["fit_lens"]),
    "plot_massive_ablation": lambda t: ml.plots.plot_massive_ablation(t["ablate_massive"]),
    "plot_patching": lambda t: ml.plots.plot_patching(t["patch_layers"]),
    "plot_places": lambda t: ml.plots.plot_places(t["compare_places"]),
    "plot_profile": lambda t: ml.plot_profile(t["profile_layers"]),
    "plot_scale_map": lambda t: ml.plots.plot_scale_map(t["profile_layers"]),
    "plot_scale_patch": lambda t: ml.plots.plot_scale_patch(t["patch_scales"]),
    "plot_stability": lambda t: ml.plots.plot_stability(t["stability"]),
    "plot_dissociation": lambda t: ml.plots.plot_dissociation(t["measure_dissociation"]),
    "power": lambda t: ml.synthetic.power(8, 3, n_simulations=2),
    "profile_cache": lambda t: ml.profile_cache(t.model, t.cache, t.tokens, **QUICK),
    "profile_layers": lambda t: ml.profile_layers(t.model, t.prompts, **QUICK, **QUIET),
    "profile_layers random": lambda t: ml.profile_layers(
        t.model, t.prompts, control="random_weights", logit_lens=True, **QUICK, **QUIET
    ),
    "plot_rate_distortion": lambda t: ml.plot_rate_distortion(t["rate_distortion"]),
    "rate_distortion": lambda t: ml.rate_distortion(
        t.model, t.prompts, bands=BANDS, sites=(1, 6), distortions=(0.1,), n_targets=2, **QUIET
    ),
    "residual_statistics": lambda t: ml.residual_statistics(t.model, t.few),
    "measure_dissociation": lambda t: ml.measure_dissociation(
        t.model,
        t.prompts,
        PART,
        t["classify_tokens"],
        perturbation=ml.Perturbation("skip"),
        **QUIET,
    ),
    "segment_blocks": lambda t: ml.segment_blocks(t["synthetic_signals"].signals, **DRAWS),
    "stability": lambda t: ml.studies.stability(
        t.model, [t.prompts], halves=False, profile_settings=QUICK, seeds=(0, 1), **QUIET, **DRAWS
    ),
    "synthetic_models": lambda t: ml.synthetic.synthetic_models(2, 4),
    "synthetic_signals": lambda t: ml.synthetic.synthetic_signals(12),
    "tasks.induction": lambda t: ml.tasks.induction(t.model, 4),
    "classify_tokens": lambda t: ml.classify_tokens(
        t.model, t.prompts, bands=FAR, threshold=0.1, **QUIET
    ),
    "variance_shares": lambda t: ml.theory.variance_shares(
        t.depths / t.n_layers[:, None], list("aaabbb"), [1, 2, 3, 4, 5, 6], n_permutations=19
    ),
    "water_fill": lambda t: ml.theory.water_fill(12, **t.rates),
    "water_fill_whole": lambda t: ml.theory.water_fill_whole(12, **t.rates),
    "write_report": lambda t: UNIQUE.sub(
        "",
        ml.write_report(
            t.folder / "report.html", t["profile_layers"], t["measure_brittleness"]
        ).read_text(),
    ),
    # Not functions, but they compute.
    "PromptDataset": lambda t: [p.tokens for p in ml.PromptDataset.from_texts(t.model, t.texts)],
    "PromptDataset tokens": lambda t: [
        p.tokens for p in ml.PromptDataset.from_tokens(t.tokens, t.tokens > 0)
    ],
    "pairs": lambda t: ml.PromptPairs.from_tokens(
        t.tokens[:4, :8], t.tokens[4:8, :8], t.tokens[:4, 9], t.tokens[4:8, 9]
    ),
    "pairs texts": lambda t: ml.PromptPairs.from_texts(
        t.model, ["w5 w6", "w7 w8"], ["w5 w9", "w7 w9"], ["w10", "w11"], ["w12", "w13"]
    ),
    "half_depth": lambda t: t["profile_layers"].predicted["intermediate"].half_depth(),
    "log_brittleness": lambda t: t["measure_brittleness"].log_brittleness(),
    "lens attach": lambda t: (
        ml.load_result(t["fit_lens"].save(t.folder / "lens"))
        .attach(t.model)
        .logits(2, t.cache["blocks.2.hook_resid_pre"])
    ),
    "lens read": lambda t: t["fit_lens"].read(t.texts[0]),
    "half_level": lambda t: t["measure_brittleness"].half_level("local", "isotropic"),
    "ratios": lambda t: t["measure_brittleness"].ratios(),
    "frontier": lambda t: t["profile_layers"].frontier(2, "intermediate").to_dataframe(),
}


def same(one, other):
    """Whether two results hold exactly the same."""
    if isinstance(one, Tensor | np.ndarray):
        one, other = np.asarray(one), np.asarray(other)
        return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=True)
    if isinstance(one, pd.DataFrame):
        return one.equals(other)
    if isinstance(one, go.Figure):
        return one.to_json() == other.to_json()
    if is_dataclass(one):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    return bool(one == other) or (one != one and other != other)


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    made = Things(tmp_path_factory.mktemp("things"))
    inner = tiny_model("llama", n_layers=6).original_model
    type(inner)(inner.config).save_pretrained(made.folder)
    tiny_tokenizer().save_pretrained(made.folder)
    return made


@pytest.mark.simulation
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("names", TOGETHER.values(), ids=list(TOGETHER))
@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if call])
def test_the_numbers_are_the_same_and_the_state_is_left(things, name, names):
    before = things[name]
    with ambient(names):
        # What the package itself warns of would be an error too, as the caller asked.
        warnings.filterwarnings("ignore", module="test_ambient|jaxtyping")
        found = state()
        again = CALLS[name](things)
        left = state()
    assert left == found
    assert same(again, before)


def test_every_public_function_is_called_here_and_has_its_own_state():
    spaces = (ml, ml.arrays, ml.plots, ml.results, ml.studies, ml.synthetic, ml.theory)
    public = {name: getattr(space, name) for space in spaces for name in space.__all__}
    public |= {f"tasks.{name}": getattr(ml.tasks, name) for name in TASKS}
    functions = {name for name, value in public.items() if isinstance(value, FunctionType)}
    # The caller's own code runs inside it, in the caller's state.
    functions -= {"recording"}
    assert {name.split()[0] for name in CALLS} >= functions - WORD_TASKS
    for name in functions:
        source = inspect.getsource(inspect.unwrap(public[name]))
        assert source.startswith("@in_own_state\n"), f"{name}: decorate it"


@pytest.mark.parametrize("name", STATES)
def test_each_state_is_put_aside_and_put_back(name):
    with ambient([name]):
        found = state()
        with pytest.raises(ZeroDivisionError):
            _works_as_usual_and_fails()
        assert state() == found


@in_own_state
def _works_as_usual_and_fails():
    product = torch.ones(2, requires_grad=True) @ torch.full((2,), 0.1)
    product.backward()
    assert (product.dtype, product.device.type) == (torch.float32, "cpu")
    assert np.float64(1e-300) * np.float64(1e-300) == 0.0
    assert torch.get_float32_matmul_precision() == "highest"
    raise ZeroDivisionError


@pytest.mark.simulation
@pytest.mark.filterwarnings("ignore")
def test_models_made_in_inference_mode_are_read_and_what_cannot_be_says_so(things):
    with torch.inference_mode():
        model = tiny_model("llama", n_layers=6)
    model.tokenizer = things.model.tokenizer
    other, things.model = things.model, model
    try:
        reading = (
            "profile_layers",
            "fit_lens",
            "profile_cache",
            "fit_hvib",
            "patch_layers",
            "perturb_scales",
        )
        for name in (*reading, "measure_brittleness", "generation_effects", "classify_tokens"):
            assert same(CALLS[name](things), things[name]), name
        for name in ("profile_layers random", "patch_layers attribution", "rate_distortion"):
            with pytest.raises(ml.CannotMeasure, match=r"was made under torch\.inference_mode"):
                CALLS[name](things)
    finally:
        things.model = other


@pytest.mark.real_model
def test_the_demo_model_is_loaded_in_any_state(demo_model):
    tokens = torch.arange(100, 110)[None]
    with torch.no_grad():
        expected = demo_model(tokens)
    for names in TOGETHER.values():
        with ambient(names):
            found = state()
            again = ml.load_demo_model()
            assert state() == found
        with torch.no_grad():
            torch.testing.assert_close(again(tokens), expected)


def test_warnings_name_the_line_that_called():
    inside = {"__name__": "mspgt_lens.made", "tell": inspect.unwrap(ambient_module.tell)}
    exec("def inner(): tell('note')\ndef outer(): inner()", inside)
    with pytest.warns(UserWarning, match="note") as noted:
        inside["outer"]()
    assert [one.filename for one in noted] == [__file__]
