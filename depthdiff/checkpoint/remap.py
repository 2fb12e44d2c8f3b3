"""Names as data: a table of published names beside ours, which a program can apply, invert and check.

A row pairs two module paths, with `{i}`, `{j}`, `{k}` for numbers; the last segment of a key, `weight` or `bias`,
stays. A bare parameter, such as `cls_token`, has its whole key in the table. Every key must match exactly one row.

Some layouts stack layers along the first axis, such as query, key and value. Their rows name the parts: `[0]qkv`,
`[1]qkv` and so on are equal parts of the tensor `qkv`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from depthdiff.config import CheckpointError

Shape = tuple[int, ...]

NUMBER, PLACE = re.compile(r"\d+"), re.compile(r"\{(\w)\}|(\d+)")
"""A number in a key, and in a template: `{i}` or a number."""

PART = re.compile(r"\[(\d)\](.*)", re.DOTALL)
"""The name of a part of a stacked tensor: its number, and the tensor's name."""


def split_part(key: str) -> tuple[int | None, str]:
    """Read the name of a part: its number, or None for a whole tensor, and the tensor's name."""
    found = PART.fullmatch(key)
    return (None, key) if found is None else (int(found[1]), found[2])


def nest(published: str, ours: str, rows: Mapping[str, str]) -> dict[str, str]:
    """Put a prefix before both columns of some rows."""
    return {f"{published}.{left}": f"{ours}.{right}" for left, right in rows.items()}


class Rows:
    """Templates on the left and on the right; the left ones are found by what remains of a key without its numbers.

    Args:
        rows: left template -> right template.
    """

    def __init__(self, rows: Mapping[str, str]) -> None:
        self.rows = rows

    @cached_property
    def index(self) -> dict[str, list[tuple[list[tuple[str, str]], str]]]:
        """A left template without numbers -> what stands in their places, `{i}` or a number, and the right template."""
        index: dict[str, list[tuple[list[tuple[str, str]], str]]] = {}
        for left, right in self.rows.items():
            index.setdefault(PLACE.sub("#", left), []).append((PLACE.findall(left), right))
        return index

    def find(self, key: str) -> Iterator[tuple[str, dict[str, str], str]]:
        """Find the rows that a key matches: the right template, the numbers for it, and the last segment, kept."""
        stem, dot, leaf = key.rpartition(".")
        for name, end in [(key, ""), (stem, dot + leaf)][: 2 if leaf in ("weight", "bias") else 1]:
            numbers = NUMBER.findall(name)
            for places, right in self.index.get(NUMBER.sub("#", name), ()):
                if len(places) != len(numbers):  # where a key has the sign that stands for numbers
                    continue
                pairs = list(zip(places, numbers, strict=True))
                if all(fixed in ("", number) for (_, fixed), number in pairs):
                    yield right, {letter: number for (letter, _), number in pairs if letter}, end

    def matches(self, key: str) -> list[str]:
        """Rewrite a key by every row that it matches."""
        return [right.format(**numbers) + end for right, numbers, end in self.find(key)]


@dataclass(frozen=True)
class Table:
    """The published names of one network beside ours.

    Attributes:
        rows: published template -> our template.
        aliases: another published template of a layer -> the template in `rows`.
        ignored: template of a key that no layer of ours reads -> the reason.
        reshaped: our templates whose weights may also come as 1x1 convolutions.
        identity: keys without a row are the same in both layouts.
    """

    rows: Mapping[str, str]
    aliases: Mapping[str, str] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    reshaped: tuple[str, ...] = ()
    identity: bool = False

    def __post_init__(self) -> None:
        counts = Counter(template for index, template in map(split_part, self.rows) if index is not None)
        for name, rows in (
            ("_rows", self.rows),
            ("_back", {right: left for left, right in self.rows.items()}),
            ("_aliases", self.aliases),
            ("_ignored", {template: "" for template in self.ignored}),
            ("_reshaped", {template: "" for template in self.reshaped}),
            ("_stacked", {template: str(count) for template, count in counts.items()}),
        ):
            object.__setattr__(self, name, Rows(rows))

    def ours(self, key: str) -> str | None:
        """Translate a published key; None for one that is ignored.

        Raises:
            KeyError: no row matches.
            ValueError: several rows match.
        """
        if self._ignored.matches(key):  # type: ignore[attr-defined]
            return None
        [key] = self._aliases.matches(key) or [key]  # type: ignore[attr-defined]
        if self.identity and not self._rows.matches(key):  # type: ignore[attr-defined]
            return key
        return _only(self._rows.matches(key), key)  # type: ignore[attr-defined]

    def published(self, key: str) -> str:
        """Translate one of our keys. Errors as in `ours`."""
        if self.identity and not self._back.matches(key):  # type: ignore[attr-defined]
            return key
        return _only(self._back.matches(key), key)  # type: ignore[attr-defined]

    def is_reshaped(self, key: str) -> bool:
        """Return whether the weights behind one of our keys may also come as a 1x1 convolution."""
        return bool(self._reshaped.matches(key))  # type: ignore[attr-defined]

    def parts(self, key: str) -> int:
        """Count the layers that a published key stacks; 1 for an ordinary one."""
        return next((int(count) for count, _, _ in self._stacked.find(key)), 1)  # type: ignore[attr-defined]

    def cut(self, published: Mapping[str, Shape]) -> dict[str, Shape]:
        """Put the parts of stacked tensors in the place of the whole, key -> shape, where they divide it."""
        cut: dict[str, Shape] = {}
        for key, shape in published.items():
            count = self.parts(key)
            if count == 1 or not shape or shape[0] % count:
                cut[key] = shape
            else:
                cut |= {f"[{i}]{key}": (shape[0] // count, *shape[1:]) for i in range(count)}
        return cut

    def compare(self, published: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> Comparison:
        """Pair the tensors of a file, key -> shape, with those of the network, and list what does not fit."""
        found = Comparison()
        for key in published:
            try:
                name = self.ours(key)
            except KeyError:
                found.unknown.append(key)
                continue
            if name is None:
                found.ignored.append(key)
            elif name in found.pairs:
                found.twice.append((key, found.pairs[name]))
            else:
                found.pairs[name] = key
        found.unknown += [found.pairs[name] for name in found.pairs.keys() - wanted.keys()]
        found.missing = [self.published(name) for name in wanted if name not in found.pairs]
        for name in found.pairs.keys() & wanted.keys():
            key = found.pairs[name]
            squeezed = self.is_reshaped(name) and published[key] == (*wanted[name], 1, 1)
            if published[key] != wanted[name] and not squeezed:
                found.wrong.append(f"{key!r} is {published[key]} instead of {wanted[name]}")
        return found

    def assign(self, source: str, published: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> dict[str, str]:
        """Pair every tensor of a file with a tensor of the network.

        Args:
            source: name of the file, for errors.
            published: key -> shape in the file; stacked ones cut.
            wanted: key -> shape in the network.

        Returns:
            Our key -> published key, one for each of `wanted`.

        Raises:
            CheckpointError: keys without a row, two keys for one tensor, tensors missing or of a wrong shape.
        """
        found = self.compare(published, wanted)
        faults = found.faults(len(published), len(wanted))
        if faults:
            raise CheckpointError(f"{source}: {faults[0]}")
        return found.pairs


@dataclass
class Comparison:
    """How the keys of a file fit a network.

    Attributes:
        pairs: our key -> published key.
        ignored: published keys that no layer reads.
        unknown: published keys that match no layer.
        twice: published keys of one layer, in pairs.
        missing: published keys that are not there.
        wrong: what is said of keys with a wrong shape.
    """

    pairs: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    twice: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def faults(self, published: int, wanted: int) -> list[str]:
        """Say what does not fit, the plainest first; `published` and `wanted` are the numbers of keys."""
        faults = [f"{first!r} and {second!r} are the same layer; keep one of them" for first, second in self.twice[:1]]
        if self.unknown:
            faults.append(
                f"{len(self.unknown)} of {published} keys match no layer, first: {_first(self.unknown)}; "
                "wrong file, a config that does not fit it, or an unknown layout"
            )
        if self.missing:
            faults.append(f"{len(self.missing)} of {wanted} weights missing, first: {_first(self.missing)}")
        if self.wrong:
            faults.append(f"{len(self.wrong)} weights have a wrong shape, first: {', '.join(sorted(self.wrong)[:3])}")
        return faults


def _only(matches: list[str], key: str) -> str:
    if not matches:
        raise KeyError(key)
    if len(matches) > 1:
        raise ValueError(f"{key!r} matches {len(matches)} rows: {_first(matches)}")
    return matches[0]


def _first(names: Iterable[str]) -> str:
    return ", ".join(repr(split_part(name)[1][:100]) for name in sorted(names)[:3])
