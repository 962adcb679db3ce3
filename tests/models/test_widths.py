"""The --cfgs grammar: accepted forms and errors."""

import json
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.widths import Widths
from util.errors import UserError

FULL = Widths.dense(2, 1, 64, 128)
GOOD = [[[8, 16], [64, 128]], [[8, 16, 24]]]


@given(st.lists(st.tuples(st.integers(1, 99), st.integers(1, 99)), max_size=3))
def test_words_quoted_text_lists_and_print_agree(encoder):
    nested = [[list(layer) for layer in encoder], [[1, 2, 3]]]
    text = json.dumps(nested)
    expected = Widths.parse(nested)
    assert Widths.parse(text) == Widths.parse([text]) == Widths.parse(shlex.split(text)) == expected
    assert Widths.parse(str(expected)) == expected
    assert expected.to_list() == nested


def test_a_file_holds_widths(tmp_path):
    path = tmp_path / "widths.json"
    path.write_text(json.dumps(GOOD))
    assert Widths.parse([str(path)]).to_list() == GOOD


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_file_of_widths_may_be_utf16_or_have_a_byte_order_mark(tmp_path, monkeypatch, encoding):
    (tmp_path / "widths.json").write_text(json.dumps(GOOD) + "\r\n", encoding=encoding)
    assert Widths.parse([str(tmp_path / "widths.json")]).to_list() == GOOD
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Widths.parse("~/widths.json").to_list() == GOOD


def test_an_undecodable_file_is_a_one_line_error(tmp_path):
    (tmp_path / "widths.json").write_bytes(b"\xff[[[8, 16]]]")
    with pytest.raises(UserError, match=r"widths\.json: found no JSON \(.*\), expected"):
        Widths.parse(str(tmp_path / "widths.json"))


@given(st.text(max_size=40) | st.lists(st.recursive(st.integers() | st.text(), lambda s: st.lists(s, max_size=3))))
def test_invalid_widths_are_a_one_line_error(given_value):
    try:
        Widths.parse(given_value)
    except UserError as error:
        assert "--cfgs" in str(error)
        assert "expected" in str(error)


def test_a_file_nested_too_deep_is_a_one_line_error(tmp_path):
    path = tmp_path / "widths.json"
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match="found no JSON"):
        Widths.parse([str(path)])


@pytest.mark.parametrize(
    ("nested", "words"),
    [
        ([[[8, 16]], [[8, 16, 24]]], "1 encoder layers, expected 2"),
        ([[[8, 16], [64, 128]], []], "0 decoder layers, expected 1"),
        ([[[-8, 16], [64, 128]], [[8, 16, 24]]], "width -8 for encoder.0.attention"),
        ([[[8, 16], [64, -3]], [[8, 16, 24]]], "width -3 for encoder.1.ffn"),
        ([[[8, 16], [64, 129]], [[8, 16, 24]]], "width 129 for encoder.1.ffn, expected 0 to 128"),
        ([[[8, 16], [64, 128]], [[8, 12, 24]]], "width 12 for decoder.0.cross_attention, expected a multiple"),
    ],
)
def test_widths_that_do_not_fit_are_named(nested, words):
    with pytest.raises(UserError, match=words):
        Widths.parse(nested).check(nheads=8, full=FULL)


def test_good_widths_pass():
    Widths.parse(GOOD).check(nheads=8, full=FULL)


def test_one_module_is_read_and_replaced_by_name():
    widths = Widths.parse(GOOD).replace("decoder.0.ffn", 40)
    assert widths.of("decoder.0.ffn") == 40
    assert widths.of("encoder.0.attention") == 8
    assert [name for name, _ in widths.items()][-1] == "decoder.0.ffn"


BLOCKS = ((8, 8), (16, 16, 16))
BACKBONE = [[8, 3], [16, 1, 16]]


def test_a_third_list_gives_the_backbones_widths():
    widths = Widths.parse([*GOOD, BACKBONE])
    assert widths.check(nheads=8, full=FULL, blocks=BLOCKS) == widths
    assert widths.to_list() == [*GOOD, BACKBONE]
    assert Widths.parse(str(widths)) == widths
    assert list(widths.items())[:3] == [("backbone.layer1.0", 8), ("backbone.layer1.1", 3), ("backbone.layer2.0", 16)]
    assert widths.of("backbone.layer1.1") == 3
    assert widths.replace("backbone.layer2.1", 5).to_list()[2] == [[8, 3], [16, 5, 16]]


def test_a_whole_backbone_is_omitted():
    whole = Widths.parse([*GOOD, BLOCKS]).check(nheads=8, full=FULL, blocks=BLOCKS)
    assert whole == Widths.parse(GOOD)
    assert whole.to_list() == GOOD


@pytest.mark.parametrize(
    ("backbone", "words"),
    [
        (7, "found 7 for the backbone, expected a list of stages, each a list"),
        ([[8, 8], 16], "found 16 for layer2 of the backbone, expected a list of stages"),
        ([[8, 8], [16, 16, 1.5]], r"found \[16, 16, 1\.5\] for layer2 of the backbone"),
        ([[8, 8]], "found 1 stages of the backbone, expected 2, layer1 to --return_layer"),
        ([[8, 8], [16, 16, 16], [4], [4], [4]], "found 5 stages of the backbone, expected 2"),
        ([[8, 8], [16, 16]], "found 2 blocks in layer2 of the backbone, expected 3"),
        ([[8, -1], [16, 16, 16]], r"width -1 for backbone\.layer1\.1, expected 0 to 8"),
        ([[8, 8], [16, 17, 16]], r"width 17 for backbone\.layer2\.1, expected 0 to 16"),
    ],
)
def test_invalid_backbone_widths_are_named(backbone, words):
    with pytest.raises(UserError, match=f"^--cfgs: .*{words}"):
        Widths.parse([*GOOD, backbone]).check(nheads=8, full=FULL, blocks=BLOCKS)


def test_a_module_that_the_widths_lack_is_named():
    """Without the backbone's list, its blocks have no widths."""
    for name in ("backbone.layer1.0", "encoder.2.ffn", "encoder.0.cross_attention", "decoder.-1.ffn", "ffn"):
        for use in (FULL.of, lambda name: FULL.replace(name, 8)):
            with pytest.raises(ValueError, match=rf"^found no width of '{name}' in \[\[\["):
                use(name)
    with pytest.raises(ValueError, match=", expected a third list, with the backbone's"):
        FULL.of("backbone.layer1.0")


def test_errors_show_all_three_lists():
    with pytest.raises(UserError, match=r"attention, ffn.*self_attention, cross_attention, ffn.*third list.*block"):
        Widths.parse("[[1")
