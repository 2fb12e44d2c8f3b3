"""Names as data: a table of published names beside ours, which a program can apply, invert and check.

A row pairs two module paths, with `{i}`, `{j}`, `{k}` for numbers; the last segment of a key, `weight` or `bias`,
stays. A bare parameter, such as `cls_token`, has its whole key in the table. Every key must match exactly one row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from depthdiff.config import CheckpointError

Shape = tuple[int, ...]


def nest(published: str, ours: str, rows: Mapping[str, str]) -> dict[str, str]:
    """Put a prefix before both columns of some rows."""
    return {f"{published}.{left}": f"{ours}.{right}" for left, right in rows.items()}


@dataclass(frozen=True)
class Pattern:
    """A template with `{i}` for numbers, ready to be matched against whole keys."""

    template: str

    def __post_init__(self) -> None:
        parts = re.split(r"\{(\w)\}", self.template)
        expression = "".join(rf"(?P<{part}>\d+)" if odd else re.escape(part) for part, odd in _with_oddness(parts))
        object.__setattr__(self, "_match", re.compile(rf"{expression}(?P<_leaf>\.weight|\.bias|)").fullmatch)

    def rewrite(self, key: str, template: str) -> str | None:
        """Return `template` with the numbers and the last segment that `key` has, or None where it does not match."""
        found = self._match(key)  # type: ignore[attr-defined]
        if found is None:
            return None
        values = found.groupdict()
        leaf: str = values.pop("_leaf")
        return template.format(**values) + leaf


def _with_oddness(parts: list[str]) -> Iterable[tuple[str, bool]]:
    return ((part, bool(position % 2)) for position, part in enumerate(parts))


@dataclass(frozen=True)
class Table:
    """The published names of one network beside ours.

    Attributes:
        rows: published template -> our template.
        aliases: another published template of a layer -> the template in `rows`.
        ignored: template of a key that no layer of ours reads -> the reason.
        reshaped: our templates whose weights may also come as 1x1 convolutions.
    """

    rows: Mapping[str, str]
    aliases: Mapping[str, str] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    reshaped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, rows in (
            ("_rows", self.rows),
            ("_back", {right: left for left, right in self.rows.items()}),
            ("_aliases", self.aliases),
            ("_ignored", {template: "" for template in self.ignored}),
        ):
            object.__setattr__(self, name, [(Pattern(left), right) for left, right in rows.items()])
        object.__setattr__(self, "_reshaped", [Pattern(template) for template in self.reshaped])

    def ours(self, key: str) -> str | None:
        """Translate a published key; None for one that is ignored.

        Raises:
            KeyError: no row matches.
            ValueError: several rows match.
        """
        if _matches(self._ignored, key):  # type: ignore[attr-defined]
            return None
        [key] = _matches(self._aliases, key) or [key]  # type: ignore[attr-defined]
        return _only(_matches(self._rows, key), key)  # type: ignore[attr-defined]

    def published(self, key: str) -> str:
        """Translate one of our keys. Errors as in `ours`."""
        return _only(_matches(self._back, key), key)  # type: ignore[attr-defined]

    def is_reshaped(self, key: str) -> bool:
        """Tell whether the weights behind one of our keys may also come as a 1x1 convolution."""
        return any(pattern.rewrite(key, "") is not None for pattern in self._reshaped)  # type: ignore[attr-defined]

    def assign(self, source: str, published: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> dict[str, str]:
        """Pair every tensor of a file with a tensor of the network.

        Args:
            source: name of the file, for errors.
            published: key -> shape in the file.
            wanted: key -> shape in the network.

        Returns:
            Our key -> published key, one for each of `wanted`.

        Raises:
            CheckpointError: keys without a row, two keys for one tensor, tensors missing or of a wrong shape.
        """
        pairs: dict[str, str] = {}
        unknown = []
        for key in published:
            try:
                name = self.ours(key)
            except KeyError:
                unknown.append(key)
                continue
            if name is None:
                continue
            if name in pairs:
                raise CheckpointError(f"{source}: {key!r} and {pairs[name]!r} are the same layer; keep one of them")
            pairs[name] = key
        unknown += [pairs[name] for name in pairs.keys() - wanted.keys()]
        if unknown:
            raise CheckpointError(
                f"{source}: {len(unknown)} of {len(published)} keys match no layer, first: {_first(unknown)}; "
                "wrong file, a config that does not fit it, or an unknown layout"
            )
        missing = [self.published(name) for name in wanted if name not in pairs]
        if missing:
            raise CheckpointError(
                f"{source}: {len(missing)} of {len(wanted)} weights missing, first: {_first(missing)}"
            )
        wrong = [
            f"{key!r} is {published[key]} instead of {wanted[name]}"
            for name, key in pairs.items()
            if published[key] != wanted[name]
            and not (self.is_reshaped(name) and published[key] == (*wanted[name], 1, 1))
        ]
        if wrong:
            raise CheckpointError(f"{source}: {len(wrong)} weights have a wrong shape, first: {', '.join(wrong[:3])}")
        return pairs


def _matches(rows: Iterable[tuple[Pattern, str]], key: str) -> list[str]:
    results = (pattern.rewrite(key, template) for pattern, template in rows)
    return [result for result in results if result is not None]


def _only(matches: list[str], key: str) -> str:
    if not matches:
        raise KeyError(key)
    if len(matches) > 1:
        raise ValueError(f"{key!r} matches {len(matches)} rows: {_first(matches)}")
    return matches[0]


def _first(names: Iterable[str]) -> str:
    return ", ".join(repr(name[:100]) for name in sorted(names)[:3])
