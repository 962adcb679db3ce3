"""Damaged, foreign and hostile checkpoints are read, or refused in one sentence; no code in them runs."""

import argparse
import os
import pickle
import resource
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import main
from runs.training_state import TrainingState
from tests.tiny_run import built, options, run_script, settled, tiny_options
from tests.trust.mutations import FUZZ, VALUES, damaged_bytes, damaged_value
from tests.trust.test_fuzz_text import value_or_sentence
from util.checkpoint import load_weights
from util.errors import UserError
from weights.checkpoint_file import read_checkpoint
from weights.strip_optimizer import strip_optimizer

ODD_KEYS = ["transformer.encoder.layers.999999999999.x", "transformer.encoder.layers.9999.linear2.weight", "module.",
            "", 7, None, "a" * 5000, "\n", "\ud800"]  # fmt: skip
HEAD, TAIL = 30_000, 12_000  # bytes of a file of torch.save that hold its pickle, and its directory
MEMORY = 3 << 30  # bytes that a damaged file may not exceed


@pytest.fixture(scope="module")
def trained(coco, tmp_path_factory) -> Path:
    """A checkpoint of one of two epochs, with averaged weights."""
    out = tmp_path_factory.mktemp("trained")
    main.main(*tiny_options("--coco_path", coco, "--output_dir", out, "--epochs 1 --ema_decay 0.9"))
    return out / "checkpoint.pth"


@pytest.fixture(scope="module")
def content(trained) -> dict:
    """What is in it; not to be changed."""
    return torch.load(trained, weights_only=True)


@pytest.fixture(scope="module")
def halved(trained, tmp_path_factory) -> Path:
    """Its weights alone, in half precision."""
    path = tmp_path_factory.mktemp("halved") / "a.pth"
    strip_optimizer(trained, path, half=True)
    return path


@pytest.fixture(autouse=True, scope="module")
def little_memory():
    """No more than `MEMORY` beyond what the process has: a file that asks for more fails the test."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def use(path, coco, *words):
    """What main.py makes of a checkpoint before it trains or evaluates."""
    training = "" if any("--eval" in text for text in words) else "--epochs 2"
    args, typed = options("--coco_path", coco, "--device cpu --num_workers 0", training, "--resume", path, *words)
    settings, checkpoint, continuing = settled(args, typed)
    model = built(settings, checkpoint)[0]
    assert all(value.isfinite().all() for value in model.state_dict().values() if value.is_floating_point())
    if continuing:
        state = TrainingState(model, settings.training, 2)
        state.load(checkpoint.training, state.best_model.state_dict(), str(checkpoint.path))
        assert type(state.epoch) is int and state.best_ap == state.best_ap
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        state.optimizer.step()  # what was loaded is of use
    return model


def odd_tensors(shape=(4,)):
    """Tensors that are no weights, or claim to be more than they are."""
    ones = torch.ones(shape)
    return [
        ones.long(), ones.bool(), ones.to(torch.complex64), ones.double() * 1e300, ones / 0, ones * float("nan"),
        ones.to(torch.uint16), ones.to_sparse(), torch.ones(1).expand(10**12), torch.empty(10**12, device="meta"),
        torch.ones(()), torch.ones(0), torch.ones(2, 0, 3), ones.half(), ones.to(torch.float8_e4m3fn),
        torch.quantize_per_tensor(ones, 0.1, 0, torch.qint8), torch.nested.nested_tensor([ones]), ones[::2],
        torch.nn.Parameter(ones), torch.zeros(1).as_strided((1000, 1000), (0, 0)), torch.arange(3, -1, -1),
    ]  # fmt: skip


def damaged_content(content):
    """`content` with one of its entries damaged, missing or of another kind."""
    replacements = st.one_of(VALUES, st.sampled_from(odd_tensors()))

    @st.composite
    def damage(draw):
        key = draw(st.sampled_from(sorted(content)))
        how = draw(st.sampled_from(["inside", "inside", "inside", "replaced", "missing"]))
        rest = {name: value for name, value in content.items() if name != key}
        if how == "missing":
            return rest
        if how == "inside" and isinstance(content[key], dict | list):
            return rest | {key: draw(damaged_value(content[key], replacements))}
        return rest | {key: draw(replacements)}

    return damage()


@FUZZ
@given(data=st.data())
def test_checkpoints_of_other_values(coco, content, tmp_path, data):
    torch.save(data.draw(damaged_content(content)), tmp_path / "a.pth")
    value_or_sentence(lambda: use(tmp_path / "a.pth", coco, data.draw(st.sampled_from(["", "--eval"]))))


@FUZZ
@given(data=st.data())
def test_options_of_a_checkpoint(coco, content, tmp_path, data):
    """The architecture comes out of these, so each is damaged apart."""
    name = data.draw(st.sampled_from(sorted(content["args"])))
    value = data.draw(st.one_of(VALUES, st.sampled_from([10**9, 10**12, 10**18, 2, 7, 1e18])))
    torch.save({**content, "args": {**content["args"], name: value}}, tmp_path / "a.pth")
    value_or_sentence(lambda: use(tmp_path / "a.pth", coco, data.draw(st.sampled_from(["", "--eval"]))))


@FUZZ
@given(data=st.data())
def test_search_outputs_of_other_values(coco, content, tmp_path, data):
    kept = {"encoder.0.ffn": {"hidden": torch.arange(20)}, "encoder.0.attention": {
        "query": torch.arange(0, 32, 2), "value": torch.arange(1, 32, 2)}}  # fmt: skip
    found = {key: content[key] for key in ("format", "version", "model", "args", "num_classes", "full_widths")}
    found |= {"widths": [[[16, 20]], [[32, 32, 32], [32, 32, 32]]], "trace": [{"module": "encoder.0.ffn"}]}
    for part in data.draw(
        st.lists(st.sampled_from(["kept", "widths", "full_widths", "trace"]), min_size=1, max_size=2)
    ):
        replacements = st.one_of(VALUES, st.sampled_from(odd_tensors()), st.just(torch.tensor([0, 10**9])))
        value = data.draw(damaged_value({"kept": kept, **found}[part], replacements))
        found |= {"kept": kept} | {part: value}
    torch.save(found, tmp_path / "a.pth")
    value_or_sentence(lambda: use(tmp_path / "a.pth", coco, "--eval"))


@FUZZ
@given(data=st.data())
def test_foreign_checkpoints_of_other_values(coco, content, tmp_path, data):
    told = {key: content["args"][key] for key in ("backbone", "return_layer", "hidden_dim", "nheads", "enc_layers",
                                                  "dec_layers", "dim_feedforward", "num_queries")}  # fmt: skip
    weights = dict(content["model"])
    name = data.draw(st.sampled_from(sorted(weights)))
    mask = "transformer.decoder.layers.1.select3.prune_a"
    change = data.draw(st.sampled_from(["tensor", "value", "name", "arguments", "mask"]))
    if change in ("tensor", "mask"):
        name = mask if change == "mask" else name
        weights[name] = data.draw(
            st.sampled_from([*odd_tensors(), *odd_tensors(content["model"]["class_embed.bias"].shape)])
        )
    elif change == "value":
        weights[name] = data.draw(VALUES)
    elif change == "name":
        new = data.draw(st.sampled_from(ODD_KEYS))
        weights[new] = weights.pop(name)
    else:
        told = data.draw(damaged_value(told))
    torch.save(
        {"model": weights, "args": argparse.Namespace(**{str(k): v for k, v in told.items()})}, tmp_path / "a.pth"
    )
    value_or_sentence(lambda: use(tmp_path / "a.pth", coco, "--eval --return_layer layer3"))


@FUZZ
@given(data=st.data())
def test_checkpoints_of_damaged_bytes(coco, halved, tmp_path, data):
    whole, at_end = halved.read_bytes(), data.draw(st.booleans())
    part = whole[-TAIL:] if at_end else whole[:HEAD]
    damaged = data.draw(damaged_bytes(part))
    (tmp_path / "a.pth").write_bytes(whole[:-TAIL] + damaged if at_end else damaged + whole[HEAD:])
    value_or_sentence(lambda: use(tmp_path / "a.pth", coco, "--eval"))


@FUZZ
@given(st.one_of(st.binary(max_size=300), VALUES.map(lambda value: pickle.dumps(value, 2)), VALUES.map(pickle.dumps)))
def test_other_files_and_pickles(tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(UserError):
        read_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("length", [0, 1, 3, 100, 1000, 0.3, 0.9, -30, -1])
def test_truncated_checkpoints(halved, tmp_path, length):
    whole = halved.read_bytes()
    (tmp_path / "a.pth").write_bytes(whole[: int(len(whole) * length) if 0 < length < 1 else length])
    with pytest.raises(UserError, match=r"a\.pth: cannot be read as a checkpoint"):
        read_checkpoint(tmp_path / "a.pth")


class Hostile:
    """Unpickles to a call."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


CALLS = {
    "os.system": lambda marker: Hostile(os.system, f"touch {marker}"),
    "open": lambda marker: Hostile(open, str(marker), "w"),
    "exec": lambda marker: Hostile(exec, f"open({str(marker)!r}, 'w')"),
    "eval": lambda marker: Hostile(eval, f"open({str(marker)!r}, 'w')"),
    "Popen": lambda marker: Hostile(subprocess.Popen, ["touch", str(marker)]),
    "copyfile": lambda marker: Hostile(shutil.copyfile, __file__, str(marker)),
    "getattr": lambda marker: Hostile(getattr, Path(marker), "touch"),
    "torch.save": lambda marker: Hostile(torch.save, 1, str(marker)),
    "torch.load": lambda marker: Hostile(torch.load, str(marker)),
}
PLACES = {
    "the file": lambda content, bad: bad,
    "a weight": lambda content, bad: {**content, "model": {**content["model"], "class_embed.bias": bad}},
    "the options": lambda content, bad: {**content, "args": {**content["args"], "lr": bad}},
    "a namespace": lambda content, bad: {"model": content["model"], "args": argparse.Namespace(lr=bad)},
    "the optimizer": lambda content, bad: {**content, "optimizer": {"state": {}, "param_groups": [bad]}},
    "nowhere that is read": lambda content, bad: {**content, "more": [{"deep": (bad,)}]},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("call", CALLS)
def test_no_code_in_a_checkpoint_runs(content, tmp_path, call, place):
    marker, path = tmp_path / "it_ran", tmp_path / "a.pth"
    small = {**content, "model": {"class_embed.bias": content["model"]["class_embed.bias"]}, "optimizer": {}}
    small = {key: value for key, value in small.items() if key != "raw_model"}
    hostile = PLACES[place](small, CALLS[call](marker))
    for zipped in (True, False):
        torch.save(hostile, path, _use_new_zipfile_serialization=zipped)
        for read in (lambda: read_checkpoint(path), lambda: strip_optimizer(path, tmp_path / "b.pth")):
            with pytest.raises(UserError, match=r"a\.pth: cannot be read as a checkpoint"):
                read()
    path.write_bytes(pickle.dumps(CALLS[call](marker)))
    with pytest.raises(UserError):
        read_checkpoint(path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.parametrize(
    ("dtype", "is_read"),
    [
        (torch.float16, True), (torch.bfloat16, True), (torch.float64, True), (torch.float8_e4m3fn, True),
        (torch.int64, False), (torch.int8, False), (torch.bool, False), (torch.complex64, False),
    ],
)  # fmt: skip
def test_floating_point_weights_of_any_size_are_read_and_no_others(coco, content, tmp_path, dtype, is_read):
    weights = {**content["model"], "class_embed.weight": content["model"]["class_embed.weight"].to(dtype)}
    torch.save({**content, "model": weights}, tmp_path / "a.pth")
    if is_read:
        assert use(tmp_path / "a.pth", coco, "--eval").class_embed.weight.dtype == torch.float32
    else:
        with pytest.raises(UserError, match=rf"a\.pth: .*{dtype}.*, expected .*(floating point|real) numbers"):
            use(tmp_path / "a.pth", coco, "--eval")


@pytest.mark.parametrize("table", ["model", "raw_model"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_not_finite_are_refused_with_their_name(coco, content, tmp_path, value, table):
    weight = content[table]["class_embed.weight"].double()
    weight[1, 2:4] = value
    torch.save({**content, table: {**content[table], "class_embed.weight": weight}}, tmp_path / "a.pth")
    told = rf"a\.pth: found 2 of {weight.numel()} values under `{table}\.class_embed\.weight`"
    for words in ("--eval", ""):
        with pytest.raises(UserError, match=told):
            use(tmp_path / "a.pth", coco, words)


@pytest.mark.parametrize("size", [(10**12,), (10**6, 10**6), (5, 10**11)])
def test_a_tensor_that_claims_more_than_there_is_takes_no_memory(coco, content, tmp_path, size):
    for claimed in (torch.ones(1).expand(size), torch.empty(size, device="meta")):
        for table in ("model", "raw_model"):
            torch.save({**content, table: {**content[table], "class_embed.weight": claimed}}, tmp_path / "a.pth")
            with pytest.raises(UserError, match=r"under `(raw_)?model\.class_embed\.weight`, expected a dense tensor"):
                read_checkpoint(tmp_path / "a.pth")


def test_an_archive_that_unpacks_to_more_than_it_is_is_refused(tmp_path):
    torch.save({"model": {"x": torch.zeros(10_000_000)}}, tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as stored,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    assert (tmp_path / "b.pth").stat().st_size < 100_000
    with pytest.raises(UserError, match=r"b\.pth: found an archive of \d+ bytes that unpacks to 40\d+"):
        read_checkpoint(tmp_path / "b.pth")


HARD = {
    "classes": lambda c: {**c, "num_classes": 10**12},
    "width": lambda c: {**c, "widths": [[[32, 10**12]], [[32, 32, 32]] * 2]},
    "huge network": lambda c: {**c, "args": {**c["args"], "hidden_dim": 2**40}},
    "many layers": lambda c: {**c, "args": {**c["args"], "enc_layers": 10**12}},
    "many queries": lambda c: {**c, "args": {**c["args"], "num_queries": 10**12}},
    "many levels": lambda c: {**c, "args": {**c["args"], "num_feature_levels": 10**12}},
    "a long number": lambda c: {**c, "args": {**c["args"], "nheads": 10**5000}},
    "a long version": lambda c: {**c, "version": 10**5000},
    "another class": lambda c: {**c, "args": {**c["args"], "__class__": "x", "enc_layers": "x"}},
    "no name": lambda c: {**c, "args": {**c["args"], 5: 1}},
    "a trace of nothing": lambda c: {**c, "trace": [None]},
    "an epoch of words": lambda c: {**c, "epoch": "last"},
    "an AP that is none": lambda c: {**c, "best_ap": float("nan")},
    "moments of another shape": lambda c: {**c, "optimizer": {**c["optimizer"], "state": {
        **c["optimizer"]["state"], 0: {**c["optimizer"]["state"][0], "exp_avg": torch.zeros(3, 3)}}}},
}  # fmt: skip


@pytest.mark.parametrize("name", HARD)
def test_hard_checkpoints(coco, content, tmp_path, name):
    torch.save(HARD[name](content), tmp_path / "a.pth")
    with pytest.raises(UserError) as error:
        use(tmp_path / "a.pth", coco, "")
    assert "a.pth" in str(error.value) and "\n" not in str(error.value)


def test_the_optimizers_own_options_are_not_taken_from_a_file(coco, content, tmp_path):
    """A file that says `maximize` would turn training round without a word."""
    groups = [{**group, "maximize": True, "betas": ("a", "b"), "amsgrad": True, "eps": float("nan")}
              for group in content["optimizer"]["param_groups"]]  # fmt: skip
    torch.save({**content, "optimizer": {**content["optimizer"], "param_groups": groups}}, tmp_path / "a.pth")
    args, typed = options("--coco_path", coco, "--device cpu --epochs 2 --resume", tmp_path / "a.pth")
    settings, checkpoint, _ = settled(args, typed)
    model = built(settings, checkpoint)[0]
    state = TrainingState(model, settings.training, 2)
    state.load(checkpoint.training, state.best_model.state_dict(), "a.pth")
    for group in state.optimizer.param_groups:
        assert (group["maximize"], group["betas"], group["amsgrad"], group["eps"]) == (False, (0.9, 0.999), False, 1e-8)


def test_what_is_no_regular_file_is_an_error(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(UserError, match="expected a checkpoint"):
            read_checkpoint(path)


def test_weights_are_held_against_a_model_without_memory(content):
    with torch.device("meta"):
        model = torch.nn.Linear(10**6, 10**6)
    with pytest.raises(UserError, match="has the shape 2 x 2, expected 1000000 x 1000000"):
        load_weights(model, {"weight": torch.ones(2, 2), "bias": torch.ones(10**6)})


@pytest.mark.parametrize("case", ["hostile", "not finite", "damaged annotations"])
def test_the_scripts_end_with_one_line_and_leave_the_folder_as_it_was(coco, trained, content, tmp_path, case):
    out, marker, root, path = tmp_path / "out", tmp_path / "it_ran", coco, tmp_path / "a.pth"
    out.mkdir()
    before = ("checkpoint.pth", "search.jsonl")
    for name in before:
        (out / name).write_text("older")
    script = "main.py"
    if case == "hostile":
        torch.save({**content, "model": {"x": CALLS["os.system"](marker)}}, path)
    elif case == "not finite":
        script = "prune_greedy_ad.py"
        weights = {**content["model"], "class_embed.bias": content["model"]["class_embed.bias"] / 0}
        torch.save({**content, "model": weights}, path)
    else:
        root = shutil.copytree(coco, tmp_path / "coco")
        (root / "annotations" / "instances_val2017.json").write_bytes(b'{"images": ' * 50_000)
        shutil.copy(trained, path)
    words = f"--device cpu --coco_path {root} --output_dir {out} --resume {path}"
    code, said = run_script(script, words)
    assert code == 2, said
    assert said.startswith("error: ") and said.count("\n") == 1
    assert {file.name: file.read_text() for file in out.iterdir()} == {
        "checkpoint.pth": "older",
        "search.jsonl": "older",
    }
    assert not marker.exists()
