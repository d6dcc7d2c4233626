"""The command: reads well, answers wrong input in one line, and works on the real model."""

from __future__ import annotations

import argparse
import json
import os
from functools import partial

import numpy as np
import pytest
from made_profile import made_profile
from tiny import as_text, random_tokens, tiny_model, tiny_tokenizer

import mspgt_lens as ml
from mspgt_lens.cli import analyze as analyze_command
from mspgt_lens.cli import command as cli
from mspgt_lens.cli import options as options_module
from mspgt_lens.cli import patch as patch_command
from mspgt_lens.cli import placing
from mspgt_lens.cli import profile as profile_command
from mspgt_lens.cli import scales as scales_command


@pytest.fixture
def tiny_by_name(monkeypatch):
    """``tiny`` as a model name that the command knows."""
    model = tiny_model("llama")
    model.tokenizer = tiny_tokenizer()

    def load(name, device=None):
        if name != "tiny":
            raise OSError(f"{name} is no model here")
        return model

    monkeypatch.setattr(placing, "load_model", load)
    return model


@pytest.fixture
def deep_by_name(monkeypatch):
    """``deep``, with enough blocks for boundaries."""
    model = tiny_model("llama", n_layers=8)
    model.tokenizer = tiny_tokenizer()
    monkeypatch.setattr(placing, "load_model", lambda name: model)
    return model


@pytest.fixture
def texts():
    return [as_text(row) for row in random_tokens(30, 140)]


def refused(arguments, capsys):
    """What the parser says of arguments that it does not take."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def parsers():
    """Every command's own parser."""
    (commands,) = (a for a in cli._parser()._actions if a.dest == "command")
    return commands.choices


@pytest.mark.parametrize("name", parsers())
def test_help_says_what_every_option_is_and_what_it_is_without(name):
    for action in parsers()[name]._actions:
        assert action.help, action.dest
        if action.default not in (None, False, argparse.SUPPRESS):
            shown = action.help % vars(action)
            default = action.default
            if isinstance(default, tuple):
                default = ",".join(f"{x:g}" for x in default)
            assert f"default: {default}" in shown, action.dest
    assert f"mspgt-lens {name} " in parsers()[name].epilog


def test_help_reads_well(capsys):
    for arguments in (["--help"], ["profile", "--help"], ["scales", "--help"], ["patch", "--help"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for word in (
        "profile",
        "scales",
        "--method",
        "--control",
        "--task",
        "MODEL",
        "--prompts",
        "--out",
        "--save",
        "demo",
        "example:",
    ):
        assert word in shown


def test_profile_writes_report_and_profile(tiny_by_name, texts, tmp_path, capsys):
    prompts = tmp_path / "texts.jsonl"
    prompts.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    out, saved = tmp_path / "out" / "report.html", tmp_path / "kept"
    files = ["--prompts", str(prompts), "--out", str(out), "--save", str(saved)]
    code = cli.main(["profile", "tiny", *files, "--max-length", "140", "--no-progress"])
    shown = capsys.readouterr().out
    assert code == 0
    assert str(out) in shown
    assert "predicted global" in shown
    assert out.read_text().startswith("<!DOCTYPE html>")
    profile = ml.results.LayerProfile.load(saved)
    assert (profile.n_groups, profile.n_layers) == (30, 4)


def test_the_scale_map_comes_from_the_same_pass(tiny_by_name, texts, tmp_path, monkeypatch):
    passes, shown = [], []

    def profiled(*args, **kwargs):
        passes.append(ml.profile_layers(*args, **kwargs))
        return passes[-1]

    def written(path, *results, scale_map):
        shown.extend([*results, scale_map])
        return path

    monkeypatch.setattr(profile_command, "profile_layers", profiled)
    monkeypatch.setattr(profile_command, "write_report", written)
    prompts = tmp_path / "texts.txt"
    prompts.write_text("\n".join(texts))
    options = ["--prompts", str(prompts), "--max-length", "140", "--no-progress", "--scale-map"]
    assert cli.main(["profile", "tiny", *options]) == 0
    (whole,), (profile, scale_map) = passes, shown
    assert list(profile.scales) == ["local", "intermediate", "global"]
    assert dict(scale_map.bands) == dict(ml.OFFSET_BANDS)
    for one in (profile, scale_map):
        assert set(one.correlations) == set(one.scales) == set(one.retained)
        for quantity, scale, curve in one.curves():
            assert curve == {(q, s): c for q, s, c in whole.curves()}[quantity, scale]


def test_some_documents_are_evenly_spaced(tiny_by_name, texts, tmp_path, capsys):
    prompts = tmp_path / "texts.txt"
    prompts.write_text("\n".join(texts))
    saved = tmp_path / "kept"
    options = ["--prompts", str(prompts), "--max-length", "140", "--no-progress"]
    out = ["--out", str(tmp_path / "r.html"), "--save", str(saved)]
    assert cli.main(["profile", "tiny", *options, *out, "--n-documents", "15"]) == 0
    own = ml.profile_layers(
        tiny_by_name,
        ml.PromptDataset.from_texts(tiny_by_name, texts[::2], max_length=140),
        progress=False,
    )
    found = ml.results.LayerProfile.load(saved)
    assert found.n_groups == 15
    assert found.n_tokens == own.n_tokens
    assert "--n-documents: must be a whole number, at least 5, got '4'" in refused(
        ["profile", "tiny", *options, "--n-documents", "4"], capsys
    )


@pytest.mark.parametrize("wanted", [3, 7, 10, 12])
def test_documents_that_are_kept_are_as_many_as_wanted(wanted):
    kept = options_module._spaced(range(10), 10, wanted)
    assert len(kept) == len(set(kept)) == min(wanted, 10)
    gaps = np.diff(kept)
    assert gaps.max() - gaps.min() <= 1


def test_scales_prints_the_partition_and_writes_its_figures(tmp_path, capsys):
    saved = made_profile(n_layers=10).save(tmp_path / "kept")
    out, found = tmp_path / "scales.html", tmp_path / "found"
    files = ["--profile", str(saved), "--out", str(out), "--save", str(found)]
    assert cli.main(["scales", "made/up", *files, "--method", "thirds"]) == 0
    shown = capsys.readouterr().out
    for words in (
        "beyond gradual change",
        "intermediate  4       3      6",
        "by thirds, which the data do not support as such: block 3",
        "attention_span",
        str(out),
    ):
        assert words in shown
    assert "Scale boundaries" in out.read_text()
    assert ml.results.ScalePartition.load(found).boundaries == (3, 7)
    assert cli.main(["scales", "made/up", *files, "--control", "random_weights"]) == 2
    assert "leave out --control" in capsys.readouterr().err


def test_a_saved_profile_needs_no_model_and_takes_no_option_of_a_pass(tmp_path, capsys):
    saved = made_profile(n_layers=10).save(tmp_path / "kept")
    given = ["scales", "--profile", str(saved), "--out", str(tmp_path / "scales.html")]
    assert cli.main(given) == 0
    assert "made/up-1B" in capsys.readouterr().out
    wrong = ["--device", "cpu", "--dtype", "bfloat16", "--max-length", "64"]
    assert cli.main([*given, *wrong]) == 2
    assert "leave out --max-length, --device, --dtype" in capsys.readouterr().err


def test_a_model_too_shallow_for_boundaries_is_refused_before_the_pass(
    tiny_by_name, texts, tmp_path, monkeypatch, capsys
):
    for module in (profile_command, scales_command):
        monkeypatch.setattr(module, "profile_layers", None)
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    files = ["--prompts", str(tmp_path / "texts.txt"), "--no-progress"]
    for arguments in (["profile", "tiny", "--scales"], ["scales", "tiny"]):
        assert cli.main([*arguments, *files]) == 2
        assert "model must have at least 6 blocks, got 4" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["attention_distance", "published_fusion"])
def test_a_pass_gathers_what_the_method_reads(method, deep_by_name, texts, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    files = ["--prompts", str(tmp_path / "texts.txt"), "--out", str(tmp_path / "scales.html")]
    given = [*files, "--max-length", "140", "--no-progress", "--method", method]
    assert cli.main(["scales", "deep", *given]) == 0
    assert f"{method:20}" in capsys.readouterr().out


def test_what_a_pass_found_is_saved_though_there_is_nothing_to_segment(
    deep_by_name, texts, tmp_path, monkeypatch, capsys
):
    def flat(**given):
        raise ml.CannotMeasure("no signal changes with depth")

    monkeypatch.setattr(profile_command, "detect_scales", flat)
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    files = ["--prompts", str(tmp_path / "texts.txt"), "--save", str(tmp_path / "kept")]
    given = [*files, "--max-length", "140", "--no-progress", "--scales"]
    assert cli.main(["profile", "deep", *given]) == 2
    assert "no signal changes" in capsys.readouterr().err
    assert ml.results.LayerProfile.load(tmp_path / "kept").n_layers == 8


def test_nothing_is_written_over_what_is_read(tmp_path, capsys):
    prompts = tmp_path / "texts.txt"
    prompts.write_text("one\ntwo")
    same = str(tmp_path / "." / "texts.txt")
    assert cli.main(["profile", "tiny", "--prompts", str(prompts), "--out", same]) == 2
    assert "--out would be written over --prompts" in capsys.readouterr().err
    assert prompts.read_text() == "one\ntwo"
    saved = made_profile(n_layers=10).save(tmp_path / "kept")
    kept = str(tmp_path / "kept")
    assert cli.main(["scales", "--profile", kept, "--save", kept]) == 2
    assert "--save would be written over --profile" in capsys.readouterr().err
    assert cli.main(["profile", "tiny", "--save", kept, "--out", str(saved)]) == 2
    assert "--save would be written over --out" in capsys.readouterr().err
    assert ml.results.LayerProfile.load(saved).n_layers == 10


def test_what_is_no_file_is_seen_before_the_run(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    assert cli.main(["profile", "tiny", "--prompts", str(tmp_path / "pipe")]) == 2
    assert "is no file that can be read twice" in capsys.readouterr().err
    (tmp_path / "kept.safetensors").mkdir()
    for flag, path in (
        ("--out", tmp_path / "pipe"),
        ("--save", tmp_path / "kept"),
        ("--out", tmp_path / ("x" * 300)),
        ("--checkpoint", tmp_path / ("x" * 300)),
    ):
        assert f"argument {flag}: " in refused(["profile", "tiny", flag, str(path)], capsys)


def test_an_error_without_words_is_named(monkeypatch, capsys):
    for error in (MemoryError(), NotImplementedError()):

        def load(name, error=error):
            raise error

        monkeypatch.setattr(placing, "load_model", load)
        assert cli.main(["profile", "tiny"]) == 2
        assert capsys.readouterr().err == f"mspgt-lens: {type(error).__name__}\n"


def test_patch_writes_a_report_with_the_strongest_cells(tiny_by_name, tmp_path, capsys):
    rows = random_tokens(10, 5)
    records = [
        {
            "clean": as_text(row),
            "corrupted": as_text(row.clone().index_fill_(0, row.new_tensor([2]), 9)),
            "answer": "w7",
            "foil": "w8",
        }
        for row in rows
    ]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(json.dumps(record) for record in records))
    out, saved = tmp_path / "patch.html", tmp_path / "sweep"
    files = ["--pairs", str(pairs), "--out", str(out), "--save", str(saved), "--no-progress"]
    assert cli.main(["patch", "tiny", *files, "--place", "z"]) == 0
    shown = capsys.readouterr().out
    for words in ("logit_difference", "10 pairs", "p (Holm)", "95% interval", str(out)):
        assert words in shown
    assert "Patching one attention head" in out.read_text()
    assert ml.results.PatchSweep.load(saved).place == "z"
    assert cli.main(["patch", "tiny", "--task", "induction", "--no-progress", *files[2:4]]) == 0
    assert "--n-pairs: must be a whole number, at least 1" in refused(
        ["patch", "tiny", "--task", "induction", "--n-pairs", "0"], capsys
    )
    assert cli.main(["patch", "tiny", *files, "--n-pairs", "4"]) == 2
    assert "leave it out with --pairs" in capsys.readouterr().err


def test_a_partition_of_another_model_is_seen_before_the_sweep(
    tiny_by_name, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(patch_command, "patch_layers", None)
    partition = ml.detect_scales(profile=made_profile(n_layers=10))
    given = ["patch", "tiny", "--task", "induction", "--partition"]
    assert cli.main([*given, str(partition.save(tmp_path / "kept"))]) == 2
    assert "partition is of 10 blocks, but the model has 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"clean": "a"}', "lacks corrupted, answer, foil"), ("{", "line 1"), ("", "no pair")],
)
def test_bad_pairs_get_one_line(tmp_path, capsys, content, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(content)
    assert cli.main(["patch", "tiny", "--pairs", str(path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"text": "a"}\nnot json', "line 2"), ('{"words": "a"}', "'text' field"), ("", "no prompt")],
)
def test_bad_files_get_one_line(tiny_by_name, tmp_path, capsys, content, message):
    path = tmp_path / "texts.jsonl"
    path.write_text(content)
    assert cli.main(["profile", "tiny", "--prompts", str(path), "--no-progress"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_what_was_read_is_said_before_the_model_is_loaded(tmp_path, capsys, monkeypatch):
    def load(name, device=None):
        raise OSError("not loaded")

    monkeypatch.setattr(placing, "load_model", load)
    path = tmp_path / "texts.NDJSON"
    path.write_text("\n".join(json.dumps({"text": f"text {i}"}) for i in range(24)))
    assert cli.main(["profile", "tiny", "--prompts", str(path)]) == 2
    shown = capsys.readouterr()
    assert f"{path}: 24 documents, one JSON record per line" in shown.out
    path.write_text('{"text": "a", "group": null}')
    assert cli.main(["profile", "tiny", "--prompts", str(path)]) == 2
    error = capsys.readouterr().err
    assert "line 1 of" in error
    assert "the group None" in error


def test_missing_files_and_models_get_one_line(tiny_by_name, tmp_path, capsys):
    assert cli.main(["profile", "tiny", "--prompts", str(tmp_path / "none.txt")]) == 2
    assert "no file at" in capsys.readouterr().err
    assert cli.main(["profile", "nobody/has-this"]) == 2
    assert "nobody/has-this" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["profile", "scales", "brittleness", "rate-distortion", "patch", "analyze"]
)
def test_every_command_hands_devices_and_precision_on(command, monkeypatch, capsys):
    asked = []

    def load(name, **given):
        asked.append((name, given))
        raise OSError("not loaded")

    monkeypatch.setattr(placing, "load_model", load)
    more = {"brittleness": ["--blocks", "1,3"], "patch": ["--task", "indirect_objects"]}
    spread = ["--device-map", "auto", "--max-memory", "0=20GiB,cpu=1GiB", "--dtype", "bfloat16"]
    for arguments in (spread, ["--n-devices", "2"], ["--device", "cpu"], []):
        assert cli.main([command, "some/name", *more.get(command, []), *arguments]) == 2
    memory = {0: "20GiB", "cpu": "1GiB"}
    assert asked == [
        ("some/name", {"dtype": "bfloat16", "device_map": "auto", "max_memory": memory}),
        ("some/name", {"n_devices": 2}),
        ("some/name", {"device": "cpu"}),
        ("some/name", {}),
    ]
    with pytest.raises(SystemExit):
        cli.main([command, "some/name", *more.get(command, []), "--max-memory", "20GiB"])
    assert "devices with sizes, such as 0=20GiB" in capsys.readouterr().err


def test_brittleness_prints_slopes_and_writes_its_figures(tiny_by_name, texts, tmp_path, capsys):
    prompts, out = tmp_path / "texts.txt", tmp_path / "brittleness.html"
    prompts.write_text("\n".join(texts))
    files = ["--prompts", str(prompts), "--out", str(out), "--save", str(tmp_path / "kept")]
    sizes = ["--blocks", "1,3", "--levels", "0.05,0.1", "--n-documents", "5", "--max-length", "12"]
    assert cli.main(["brittleness", "tiny", *files, *sizes, "--no-progress"]) == 0
    shown = capsys.readouterr().out
    for words in ("tiny-llama: 5 documents", "equal energy", "local / global", str(out)):
        assert words in shown
    assert "Slopes and half levels" in out.read_text()
    kept = ml.results.Brittleness.load(tmp_path / "kept")
    assert (kept.levels, kept.settings["n_groups"]) == ((0.05, 0.1), 5)
    assert kept.settings["n_positions"] == 5 * (12 - 4)
    # Every sixth document, its first window.
    own = [
        [tiny_by_name.tokenizer.bos_token_id, *row[:11].tolist()] for row in random_tokens(30, 140)
    ]
    assert kept == ml.measure_brittleness(
        tiny_by_name,
        ml.PromptDataset.from_tokens(own[::6]),
        (1, 3),
        levels=(0.05, 0.1),
        progress=False,
    )
    assert cli.main(["brittleness", "tiny", *files, "--blocks", "3,1", "--no-progress"]) == 2
    assert "rise from 1 to 3" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["brittleness", "tiny", *files])
    assert "--partition --blocks" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:only .* were measured on")
def test_rate_distortion_prints_rates_and_writes_its_figure(tiny_by_name, texts, tmp_path, capsys):
    prompts, out = tmp_path / "texts.txt", tmp_path / "rates.html"
    prompts.write_text("\n".join(texts))
    files = ["--prompts", str(prompts), "--out", str(out), "--save", str(tmp_path / "kept")]
    sizes = ["--sites", "0,4", "--distortions", "0.05,0.5", "--n-targets", "4"]
    sizes += ["--n-documents", "15", "--max-length", "60", "--seed", "3", "--no-progress"]
    assert cli.main(["rate-distortion", "tiny", *files, *sizes]) == 0
    shown = capsys.readouterr().out
    for words in ("tiny-llama: 2 sites, 3 scales", "nats at D = 0.05", "Needed most", str(out)):
        assert words in shown
    assert "The rate that predictions need" in out.read_text()
    kept = ml.results.RateDistortion.load(tmp_path / "kept")
    assert (kept.sites, kept.distortions) == ((0, 4), (0.05, 0.5))
    # Every second document, its first window, which begins with a token of its own.
    own = [
        [tiny_by_name.tokenizer.bos_token_id, *row[:59].tolist()] for row in random_tokens(30, 140)
    ]
    assert kept == ml.rate_distortion(
        tiny_by_name,
        ml.PromptDataset.from_tokens(own[::2]),
        sites=(0, 4),
        distortions=(0.05, 0.5),
        n_targets=4,
        seed=3,
        progress=False,
    )
    for wrong, message in (
        (["--sites", "4,0"], "sites must be different sites in rising order, got (4, 0)"),
        (["--sites", "0,5"], "sites must lie in 0 ... 4"),
        (["--distortions", "0.1,0"], "distortions must be at least one KL above 0"),
    ):
        assert cli.main(["rate-distortion", "tiny", *files, "--no-progress", *wrong]) == 2
        assert message in capsys.readouterr().err
    for wrong, message in (
        (["--n-documents", "11"], "--n-documents: must be a whole number, at least 12"),
        (["--max-length", "51"], "--max-length: must be a whole number, at least 52"),
        (["--n-targets", "0"], "--n-targets: must be a whole number, at least 1"),
        (["--sites", "0,a"], "--sites: must be whole numbers separated by commas, such as 0,10"),
        (["--distortions", "0.1,"], "--distortions: must be numbers separated by commas, such as"),
    ):
        assert message in refused(["rate-distortion", "tiny", *files, *wrong], capsys)


def test_analyze_takes_models_one_after_the_other_and_compares_them(
    texts, tmp_path, capsys, monkeypatch
):
    def load(name, device=None):
        if name not in ("one", "two"):
            raise OSError(f"{name} is no model here")
        model = tiny_model("llama", n_layers=6, seed=len(name))
        model.tokenizer, model.cfg.model_name = tiny_tokenizer(), name
        return model

    monkeypatch.setattr(placing, "load_model", load)
    fewer = partial(ml.analyze, n_control_documents=12, n_tokens=100)
    monkeypatch.setattr(analyze_command, "analyze", fewer)
    prompts, out = tmp_path / "texts.txt", tmp_path / "out"
    prompts.write_text("\n".join(texts))
    files = ["--prompts", str(prompts), "--out", str(out), "--no-progress"]
    sizes = ["--n-documents", "3", "--max-length", "140"]
    families = ["--family", "A", "--family", "B"]
    assert cli.main(["analyze", "one", "two", *files, *sizes, *families]) == 0
    shown = capsys.readouterr().out
    for words in (
        "P1 existence",
        "inconclusive",
        "by chance",
        "one: 6 blocks",
        str(out / "report.html"),
    ):
        assert words in shown
    for path in ("one/report.html", "two/report.html", "report.html"):
        assert (out / path).read_text().startswith("<!DOCTYPE html>")
    assert ml.results.Analysis.load(out / "two").family == "B"
    assert ml.results.Verdicts.load(out / "verdicts").models == ("one", "two")
    # What is there is not measured again, and one model that fails does not take the others along.
    assert cli.main(["analyze", "one", "two", "three", *files, *sizes]) == 2
    shown = capsys.readouterr()
    assert "three is no model here" in shown.err
    assert "1 of 3 models failed" in shown.err
    assert str(out / "report.html") in shown.out
    assert cli.main(["analyze", "three", *files]) == 2
    assert cli.main(["analyze", "one", "two", *files, "--family", "A"]) == 2
    assert "--family must be given once per model (2)" in capsys.readouterr().err
    for twice in (["one", "one"], ["a/one", "a-one"]):
        assert cli.main(["analyze", *twice, *files]) == 2
        assert "one model given twice is no second witness" in capsys.readouterr().err
