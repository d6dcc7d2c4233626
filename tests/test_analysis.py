"""One model in one call: every step, going on after an interruption, files, reports."""

from dataclasses import replace

import pytest
from browser import open_page
from tiny import as_text, random_tokens, tiny_model, tiny_tokenizer

import mspgt_lens as ml
from mspgt_lens.studies import analysis as module
from mspgt_lens.theory.evaluation import RIVALS, THEORIES

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be told from 0")
N_TEXTS = 24
SMALL = {"n_documents": 4, "n_control_documents": 12, "n_tokens": 200, "progress": False}


def texts(n=N_TEXTS, length=130):
    return [as_text(row) for row in random_tokens(n, length)]


@pytest.fixture(scope="module")
def model():
    model = tiny_model("llama", n_layers=6)
    model.tokenizer = tiny_tokenizer()
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("analysis")


@pytest.fixture(scope="module")
def found(model, folder):
    return ml.analyze(model, texts(), folder=folder, **SMALL)


def test_every_step_is_taken(found, model):
    assert found.profile.n_groups == N_TEXTS
    assert found.partition.n_layers == 6
    assert found.random_weights.model_name.endswith("(random weights)")
    assert found.shuffled_tokens.settings["n_groups"] == 12
    assert found.brittleness.settings["n_groups"] == 4
    # The first four tokens, BOS among them, are left alone.
    assert found.brittleness.settings["n_positions"] == 4 * (48 - 4)
    assert found.effects.controls.shape[2] == 5
    assert (found.family, found.n_parameters) == (
        "Llama",
        sum(p.numel() for p in model.parameters()),
    )
    # A class of tokens may be empty on random weights: then the step says so.
    assert (found.dissociation is None) == ("dissociation" in found.skipped)
    assert set(found.skipped) <= {"dissociation"}


def test_results_are_those_of_the_functions_themselves(found, model):
    prompts = ml.PromptDataset.from_texts(model, texts(), max_length=256)
    asked = [*ml.extending.SIGNALS, "first_norm", "prompt_entropy", "intrinsic_dimension"]
    profile = ml.profile_layers(model, prompts, signals=asked, progress=False)
    assert profile == found.profile
    assert ml.detect_scales(profile=profile) == found.partition
    # The control documents: 12, every other of the 24.
    labels = list(range(0, N_TEXTS, 2))
    some = ml.PromptDataset.from_texts(model, texts()[::2], groups=labels, max_length=256)
    settings = {"signals": asked, "control": "random_weights", "progress": False}
    assert ml.profile_layers(model, some, **settings) == found.random_profile
    assert ml.detect_scales(profile=found.random_profile) == found.random_weights
    results = found.results
    assert results.name == "tiny-llama"
    assert set(results.brittleness) == {"covariance", "isotropic"}
    assert len(ml.evaluate_predictions(results)) > 5


def test_one_call_decides_the_predictions_of_every_theory(found):
    """Where something was not measured, a prediction has no verdict of this one model."""
    verdicts = ml.evaluate_predictions(found.results)
    assert tuple(verdicts.theories) == THEORIES
    for prediction in RIVALS:
        assert prediction.measured([found.results]) == [found.results], prediction.name
        assert verdicts[prediction.name].n_models == 1


def test_signals_of_other_theories_move_no_boundary(found, model):
    prompts = ml.PromptDataset.from_texts(model, texts(), max_length=256)
    plain = ml.profile_layers(model, prompts, progress=False)
    assert ml.detect_scales(profile=plain) == found.partition


def test_what_is_saved_comes_back(found, folder, tmp_path):
    for path in (folder, found.save(tmp_path / "copy")):
        again = ml.results.Analysis.load(path)
        for name in found.parts:
            one, other = getattr(again, name), getattr(found, name)
            assert one.to_dataframe().equals(other.to_dataframe())
        assert (again.family, again.n_parameters, dict(again.skipped)) == (
            found.family,
            found.n_parameters,
            dict(found.skipped),
        )


def test_an_interrupted_analysis_goes_on_where_it_stopped(found, model, tmp_path, monkeypatch):
    found.save(tmp_path)
    for name in ("effects", "dissociation"):
        (tmp_path / f"{name}.safetensors").unlink(missing_ok=True)
    (tmp_path / "analysis.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no saved Analysis"):
        ml.results.Analysis.load(tmp_path)

    def again(*args, **kwargs):
        raise AssertionError("a step that was there is taken again")

    for name in ("profile_layers", "detect_scales", "measure_brittleness", "classify_tokens"):
        monkeypatch.setattr(module, name, again)
    rest = ml.analyze(model, texts(), folder=tmp_path, **SMALL)
    assert rest.effects.to_dataframe().equals(found.effects.to_dataframe())
    assert rest.profile == found.profile


@pytest.mark.parametrize("changed", ["texts", "settings", "model"])
def test_a_folder_of_another_analysis_is_refused(found, folder, model, changed):
    given, settings, one = texts(), SMALL, model
    if changed == "texts":
        given = texts(N_TEXTS + 1)
    elif changed == "settings":
        settings = SMALL | {"seed": 1}
    else:
        one = tiny_model("llama", n_layers=6, seed=1)
        one.tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="another model, other prompts or other settings"):
        ml.analyze(one, given, folder=folder, **settings)


def test_a_folder_that_save_wrote_is_gone_on_with(found, model, tmp_path, monkeypatch):
    found.save(tmp_path / "copy")
    monkeypatch.setattr(module, "profile_layers", lambda *_, **__: pytest.fail("taken again"))
    again = ml.analyze(model, texts(), folder=tmp_path / "copy", **SMALL)
    assert again.profile == found.profile
    with pytest.raises(ValueError, match="another model, other prompts or other settings"):
        ml.analyze(model, texts(), folder=tmp_path / "copy", **SMALL | {"seed": 1})
    # What came back from files, and goes into others, is the same analysis.
    ml.results.Analysis.load(tmp_path / "copy").save(tmp_path / "twice")
    assert ml.analyze(model, texts(), folder=tmp_path / "twice", **SMALL).profile == found.profile


def test_only_what_cannot_be_measured_is_skipped(model, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("operands could not be broadcast together")

    monkeypatch.setattr(module, "measure_brittleness", fail)
    with pytest.raises(ValueError, match="could not be broadcast"):
        ml.analyze(model, texts(), folder=tmp_path, **SMALL)
    monkeypatch.undo()
    # Nothing was noted down, so the step is taken once it can be.
    found = ml.analyze(model, texts(), folder=tmp_path, **SMALL)
    assert found.brittleness is not None


def test_an_interruption_leaves_what_is_done(model, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "detect_scales", stop)
    with pytest.raises(KeyboardInterrupt):
        ml.analyze(model, texts(), folder=tmp_path, **SMALL)
    assert (tmp_path / "profile.safetensors").exists()
    with pytest.raises(FileNotFoundError, match="was not finished: it has no partition"):
        ml.results.Analysis.load(tmp_path)
    assert not any(hook for point in model.hook_dict.values() for hook in point.fwd_hooks)


def test_what_an_encoder_does_not_admit_is_skipped_and_said(tmp_path):
    model = tiny_model("bert", n_layers=6)
    model.tokenizer = tiny_tokenizer()
    settings = SMALL | {"n_control_documents": 60}
    found = ml.analyze(model, texts(60, 60), family="mine", **settings)
    assert found.family == "mine"
    assert found.brittleness is None
    for step in ("brittleness", "token_classes", "effects"):
        assert "attends in both directions" in found.skipped[step]
    verdicts = ml.evaluate_predictions(found.results)
    assert all(v.verdict == "inconclusive" for v in verdicts.theories["MSPGT"])
    # What the profile alone decides is decided.
    assert verdicts["R4 entropy valley"].statistic is not None
    assert "half-depth transition" not in verdicts.theories
    html = ml.write_report(tmp_path / "r.html", found, verdicts).read_text()
    assert "brittleness was skipped: model: tiny-bert attends in both directions" in html


def test_bad_arguments_are_named(model, tmp_path):
    with pytest.raises(ValueError, match="n_documents must be at least 3, got 2"):
        ml.analyze(model, texts(), n_documents=2)
    with pytest.raises(ValueError, match="prompts holds no prompt"):
        ml.analyze(model, [], progress=False)
    shallow = tiny_model("gpt2", n_layers=4)
    shallow.tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="at least 6 blocks"):
        ml.analyze(shallow, texts(), progress=False)


def test_the_report_of_an_analysis_holds_everything(found, tmp_path):
    verdicts = ml.evaluate_predictions(found.results)
    html = ml.write_report(tmp_path / "report.html", found, verdicts).read_text()
    for words in (
        "What was asked",
        "In short",
        "Predictions of several theories",
        "Scale boundaries",
        "tiny-llama (random weights)",
        "Curves over depth",
        "Slopes and half levels",
        "Every kind of perturbation",
        "weights_digest",
        "prompts_fingerprint",
        "version of transformer-lens",
    ):
        assert words in html
    assert html.count("plotly.js v") == 1


def test_models_side_by_side_in_one_report(found, tmp_path):
    other = replace(found, profile=replace(found.profile, model_name="other"))
    results = [found.results, other.results]
    compared, verdicts = ml.studies.compare_models(results), ml.evaluate_predictions(results)
    html = ml.write_report(tmp_path / "report.html", compared, verdicts).read_text()
    assert "2 models: the theory&#39;s predictions, measured" in html
    assert "Models side by side" in html
    with pytest.raises(ValueError, match="one Comparison at most, got 2"):
        ml.write_report(tmp_path / "report.html", compared, compared)
    with pytest.raises(TypeError, match="results must be results of this package"):
        ml.write_report(tmp_path / "report.html", "profile")
    with pytest.raises(ValueError, match="at least one result"):
        ml.write_report(tmp_path / "report.html")


def test_the_report_shows_hostile_names_as_text_and_works_in_a_browser(found, tmp_path):
    name = "<script>alert(1)</script> \"quoted\" 'name' שלום &amp;"
    hostile = replace(
        found,
        **{
            step: replace(getattr(found, step), model_name=name)
            for step in ("profile", "partition", "brittleness", "effects")
        },
        skipped={"dissociation": "<img src=x onerror=alert(2)>"},
    )
    verdicts = ml.evaluate_predictions(hostile.results)
    page = open_page(ml.write_report(tmp_path / "r.html", hostile, verdicts), tmp_path)
    assert page.console == []
    assert page.requests == []
    assert page.plots == page.drawn == page.hovered >= 5
    assert "<script>alert(1)" not in page.html
    assert "<img src=x" not in page.html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page.html
    assert "שלום" in page.html
