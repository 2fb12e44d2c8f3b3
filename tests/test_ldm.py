"""Tables of names: one to one, invertible, and strict."""

import re

import pytest

from depthdiff import CheckpointError
from depthdiff.checkpoint.ldm import TABLES, Table, nest

TOY = Table(
    {
        **nest("blocks.{i}", "levels.{i}", {"attn.to_out.0": "attn.out", "norm": "norm"}),
        "token": "token",
    },
    aliases={"blocks.{i}.attn.proj": "blocks.{i}.attn.to_out.0"},
    ignored={"ids": "constants"},
    reshaped=("levels.{i}.attn.out",),
)
FILE = {"blocks.0.attn.to_out.0.weight": (3, 3), "blocks.0.norm.bias": (3,), "token": (1, 3)}
WANTED = {"levels.0.attn.out.weight": (3, 3), "levels.0.norm.bias": (3,), "token": (1, 3)}


def test_keys_go_there_and_back():
    for published, ours in zip(FILE, WANTED, strict=True):
        assert TOY.ours(published) == ours
        assert TOY.published(ours) == published
    assert TOY.ours("blocks.17.attn.proj.weight") == "levels.17.attn.out.weight"
    assert TOY.ours("ids") is None
    assert TOY.assign("file", {**FILE, "ids": (7,)}, WANTED) == dict(zip(WANTED, FILE, strict=True))


def test_a_convolution_may_stand_for_a_linear_layer():
    published = {**FILE, "blocks.0.attn.to_out.0.weight": (3, 3, 1, 1)}
    assert TOY.assign("file", published, WANTED)
    with pytest.raises(CheckpointError, match=r"'token' is \(1, 3, 1, 1\) instead of \(1, 3\)"):
        TOY.assign("file", {**FILE, "token": (1, 3, 1, 1)}, WANTED)
    for shape in ((3, 3, 3, 3), (3, 3, 1), (1, 1, 3, 3), (9,)):
        with pytest.raises(CheckpointError, match="1 weights have a wrong shape"):
            TOY.assign("file", {**FILE, "blocks.0.attn.to_out.0.weight": shape}, WANTED)


def without(mapping, key):
    return {name: value for name, value in mapping.items() if name != key}


FAULTS = {
    "dropped": (without(FILE, "token"), "1 of 3 weights missing, first: 'token'"),
    "extra": ({**FILE, "blocks.0.foo.weight": (2,)}, "1 of 4 keys match no layer, first: 'blocks.0.foo.weight'"),
    "of another network": ({**FILE, "blocks.1.norm.bias": (3,)}, "match no layer, first: 'blocks.1.norm.bias'"),
    "reshaped": ({**FILE, "token": (3, 1)}, r"'token' is \(3, 1\) instead of \(1, 3\)"),
    "named twice": ({**FILE, "blocks.0.attn.proj.weight": (3, 3)}, "are the same layer"),
    "number that is none": ({**FILE, "blocks.x.norm.bias": (3,)}, "match no layer"),
    "longer path": ({**FILE, "model.token": (1, 3)}, "match no layer, first: 'model.token'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(fault):
    published, message = FAULTS[fault]
    with pytest.raises(CheckpointError, match=message):
        TOY.assign("file", published, WANTED)


def test_a_key_that_two_rows_match_is_refused():
    table = Table({"a.{i}": "b.{i}", "a.0": "c"})
    with pytest.raises(ValueError, match="matches 2 rows"):
        table.ours("a.0.weight")
    assert table.ours("a.1.weight") == "b.1.weight"


def test_templates_are_read_without_doubt():
    """Each number has a name of its own, and nothing but other signs beside it."""
    for table in TABLES.values():
        for template in [*table.rows, *table.rows.values(), *table.aliases, *table.ignored, *table.reshaped]:
            names = re.findall(r"\{(\w)\}", template)
            assert len(set(names)) == len(names), template
            assert not re.search(r"\d\{|\}\d|\}\{|#", template), template


def test_every_ignored_key_has_a_reason_and_rows_are_few():
    """At most 200 rows in all; the networks have 1720 tensors."""
    for table in TABLES.values():
        assert all(len(reason) > 10 for reason in table.ignored.values())
        assert len(set(table.rows.values())) == len(table.rows)
    assert sum(len(table.rows) for table in TABLES.values()) <= 200
