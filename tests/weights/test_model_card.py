"""What a model card shows of texts that come from files: names as they are, commands without folders of the machine."""

import shutil

import pytest

from tests.weights.test_save_pretrained import NETWORKS, share, write_checkpoint, write_run
from util.files import write_json

NAMES = [
    "*a* **b** a*b", "_x_ a_b __c__ d_", "`code` ``", "[text](http://x.org)", "![i](j.png)", "~~gone~~", "a|b",
    "<b>c</b>", "&amp; &", "back\\slash \\* \\", "# 1 #2", "@user", ":smile: a: b", "$x^2$", "- 1. >", "https://x.org/a_b_",
]  # fmt: skip


def shown_texts(card: str) -> list[str]:
    """The texts of each paragraph and cell, as a reader sees them; nothing but bold and breaks may be in them."""
    found = []
    markdown = pytest.importorskip("markdown_it").MarkdownIt().enable(["table", "strikethrough"])
    for token in markdown.parse(card.split("---", 2)[2]):
        if token.type == "inline":
            kinds = {child.type for child in token.children}
            assert kinds <= {"text", "softbreak", "strong_open", "strong_close"}, token.content
            found.append("".join(child.content or " " * (child.type == "softbreak") for child in token.children))
    return found


def test_texts_of_files_are_shown_as_they_are(tmp_path):
    model = write_checkpoint(tmp_path / "checkpoint_best.pth", categories=dict(enumerate(NAMES)))
    write_run(tmp_path, model, epoch=None)
    rows = [
        {"name": name, "ap": 0.5, "params": 7, "epoch": None, "detector_gmacs": 1, "milliseconds": 2} for name in NAMES
    ]
    params = sum(parameter.numel() for parameter in model.parameters())
    write_json(tmp_path / "comparison.json", [*rows, {**rows[0], "name": "fine-tuned", "params": params}])
    card = share(tmp_path / "checkpoint_best.pth", tmp_path / "a_ *new* [one]")
    texts = shown_texts(card)
    assert texts[-1] == ", ".join(f"{number} {name}" for number, name in enumerate(NAMES))
    assert "a_ *new* [one]" in texts and set(NAMES) <= set(texts) and "fine-tuned" in texts


def test_names_of_modules_and_files_are_not_escaped(tmp_path):
    model = write_checkpoint(
        tmp_path / "checkpoint_best.pth", NETWORKS["slim"][0], [[[16, 20]], [[8, 16, 16], [32, 4, 32]]]
    )
    write_run(tmp_path, model)
    card = share(tmp_path / "checkpoint_best.pth", tmp_path / "shared")
    assert "| decoder.0.cross_attention | 32 | 16 |" in card and "| **fine-tuned, epoch 3** |" in card
    assert "\\" not in card.partition("## Categories")[0]


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("--resume out/pruned.pth", "--resume out/pruned.pth"),
        ("--resume=out/pruned.pth", "--resume=out/pruned.pth"),
        ("--resume ./out/pruned.pth", "--resume ./out/pruned.pth"),
        ("--resume /home/bob/pruned.pth", "--resume pruned.pth"),
        ("--resume ../bob/pruned.pth", "--resume pruned.pth"),
        ("--resume=out/../../bob/pruned.pth", "--resume=pruned.pth"),
        ("--resume ~/pruned.pth", "--resume pruned.pth"),
        (r"--resume 'C:\bob\pruned.pth'", "--resume pruned.pth"),
        (r"--resume '\bob\pruned.pth'", "--resume pruned.pth"),
        ("--resume https://bob:secret@host.org/a/pruned.pth?token=1#x", "--resume pruned.pth"),
        ("--resume=https://bob:secret@host.org", "--resume="),
        ("--resume file:///home/bob/pruned.pth", "--resume pruned.pth"),
        ("--cfgs '[[[16, 20]], [[8, 32, 16]]]' -m dn_dab_detr", "--cfgs '[[[16, 20]], [[8, 32, 16]]]' -m dn_dab_detr"),
    ],
)
def test_a_command_has_no_folder_of_the_machine(tmp_path, typed, shown):
    model = write_checkpoint(tmp_path / "checkpoint_best.pth")
    write_run(tmp_path, model)
    write_json(tmp_path / "args.json", {"runs": [{"command": f"python /home/bob/main.py {typed} --epochs 3"}]})
    card = share(tmp_path / "checkpoint_best.pth", tmp_path / "shared")
    assert f"    python main.py {shown} --epochs 3\n" in card
    shutil.rmtree(tmp_path / "shared")
