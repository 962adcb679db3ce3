"""Errors are one line of bounded length, whatever a file contains."""

import json

import pytest
import torch

from datasets.annotations import load_annotations
from util.errors import NonFiniteLossError, UserError, one_line, reason_of, run_cli, shorten

HOSTILE = [
    torch.nn.Parameter(torch.ones(4)), torch.ones(3, 3), "a\nb", "a\r\nb", "\x1b[31mred\x1b[0m", "\0", "\u2028", "\x85",
    "\ud800", "x" * 5000, ["\n"] * 5000, 10**5000, [10**5000], {"\n": torch.ones(2, 2)}, b"\n",
]  # fmt: skip


@pytest.mark.parametrize("value", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("length", [40, 80])
def test_a_quoted_value_is_one_short_line_without_control_characters(value, length):
    text = shorten(value, length)
    assert text and len(text) <= length + len("...")
    assert len(text.splitlines()) == 1
    assert all(character.isprintable() for character in text)
    text.encode()  # no lone surrogates


def test_short_values_are_quoted_whole_and_cut_ones_end_in_dots():
    assert shorten(7) == "7" and shorten("a 'b'") == "\"a 'b'\""
    assert shorten("ab\n") == r"'ab\n'"
    assert shorten("x" * 50, 10) == "'" + "x" * 9 + "..."
    assert shorten(torch.ones(2, 2)) == "tensor([[1., 1.], [1., 1.]])"
    assert shorten(10**5000) == "a int"


def test_a_line_keeps_letters_of_every_script():
    text = "Łódź 環 می\u200cشود 👩\u200d🚀"
    assert one_line(text) == text
    assert one_line(" ring \r\n\n two\t") == "ring two" and one_line("a\tb") == r"a\tb"
    assert one_line("\n") == ""


def test_a_reason_is_the_first_line_of_an_exception_or_its_type():
    assert reason_of(ValueError("one\ntwo")) == "one"
    assert reason_of(ValueError()) == "ValueError"
    assert reason_of(ValueError("x" * 500)) == "x" * 120 + "..."


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("a\nb.json: \x1b[2J"), 2),
        (NonFiniteLossError("a\nb.json: \x1b[2J"), 1),
        (PermissionError(13, "no", "a\nb.json"), 2),
    ],
)
def test_a_script_prints_one_line_even_if_the_error_has_more(error, code, capsys):
    def fail():
        raise error

    with pytest.raises(SystemExit) as end:
        run_cli(fail)
    message = capsys.readouterr().err or f"{end.value.code}\n"
    assert message.startswith("error: a b.json: ") and message.count("\n") == 1 and "\x1b" not in message
    assert end.value.code in (code, message.rstrip("\n"))  # a text given to sys.exit is printed, and is code 1


LONG = "\n\x1b[2J" * 2000
TABLES = {
    "images": [{"id": 1, "file_name": "a.jpg"}],
    "categories": [{"id": 1, "name": "cat"}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "area": 1, "iscrowd": 0}],
}


@pytest.mark.parametrize(
    ("table", "key"),
    [
        *((table, key) for table in TABLES for key in TABLES[table][0] if key not in ("name", "file_name")),
        *((table, None) for table in TABLES),
    ],
)
@pytest.mark.parametrize("value", [LONG, [LONG], {LONG: LONG}, 10**400, [None] * 5000])
def test_hostile_values_in_annotations_give_one_short_line(tmp_path, table, key, value):
    entry = value if key is None else {**TABLES[table][0], key: value}
    if isinstance(entry, dict) and key is None:
        entry = [entry]
    path = tmp_path / "a.json"
    path.write_text(json.dumps({**TABLES, table: [entry]}))
    with pytest.raises(UserError) as caught:
        load_annotations(path)
    message = str(caught.value).replace(str(path), "")
    assert len(message) < 300 and all(character.isprintable() for character in message)
