"""The same layers under different names: recognised, and given one name.

A newer transformers moves layers (``model.layers`` to ``model.language_model.layers``), a wrapper
puts a segment before all of them. What differs lies before the layer's index; the index, what
follows it and the shapes are the same. By that alone, an encoder and a decoder are the same too.
So two spellings are joined only where no client has both, and where a configuration says that its
model had no module of the other name (it selects them, and adapted none), or where one spelling is
the other with segments more or moved. Where neither is known, the clients are refused.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from ..errors import Refusal
from .modules import PREFIX, saved_by
from .read import TENSORS_NAME, Adapter

__all__ = ["align_names"]

#: Words for parts that one model has side by side, which no version renames into one another.
PARTS = (
    {"encoder"}, {"decoder"}, {"text", "language", "lm", "llm"}, {"audio", "speech"}, {"video"},
    {"vision", "visual", "image", "vit"}, {"down"}, {"up"}, {"mid", "middle"}, {"single"},
    {"double"}, {"actor"}, {"critic"}, {"student"}, {"teacher"}, {"generator"}, {"discriminator"},
    {"unet"}, {"input"}, {"output"}, {"query"}, {"passage"},
)  # fmt: skip
#: Segments that a training run puts around a model, under which nobody else finds a module.
WRAPPERS = {
    "base_model",
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
}
#: Segments under which models with a head keep the layers of those without one.
ROOTS = {
    "model", "transformer", "backbone", "bert", "roberta", "distilbert", "albert", "electra",
    "deberta", "vit", "gpt_neox",
}  # fmt: skip
MAX_STEMS = 128  # that some client lacks; why: pairs of them are compared
_WORD = re.compile("[A-Z]?[a-z]+|[A-Z]+|[0-9]+")

Segments = tuple[str, ...]


@dataclass(frozen=True)
class Stem:
    """What stands before the layer's index; of a name without one, before its last segment."""

    segments: Segments
    indexed: bool

    def __str__(self) -> str:
        return ".".join((*self.segments, "…"))


Parts = dict[str, Hashable]  # what follows a stem, and its kind and shape


def align_names(
    adapters: Sequence[Adapter], base: str | None
) -> tuple[list[Adapter], list[tuple[int, Refusal]]]:
    """Give modules that clients name differently one name, that of most (`_common_names`).

    Parameters
    ----------
    adapters : sequence of Adapter
    base : str, optional
        Vouches that all names are those of one model: what is not known to be the same is not.

    Returns
    -------
    adapters : list of Adapter
        Whose remarks say what was taken for what.
    problems : list of (int, Refusal)
        Clients whose layers may or may not be those of others.
    """
    alike: dict[tuple[int, int], dict[Stem, Parts]] = {}  # clients of one layout share it
    for adapter in adapters:
        if (id(adapter.modules), id(adapter.dense)) not in alike:
            alike[id(adapter.modules), id(adapter.dense)] = _held(adapter)
    held = [alike[id(adapter.modules), id(adapter.dense)] for adapter in adapters]
    holders: dict[Stem, list[int]] = defaultdict(list)
    for i, stems in enumerate(held):
        for stem in stems:
            holders[stem].append(i)
    holders = {stem: having for stem, having in holders.items() if len(having) < len(adapters)}
    if not 2 <= len(holders) <= MAX_STEMS:
        return list(adapters), []
    joined, doubtful = _pairs(adapters, held, holders)
    problems = [] if base is not None else [*_doubts(adapters, holders, doubtful)]
    aligned = list(adapters)
    names = _common_names(joined, holders)
    for i, adapter in enumerate(adapters):
        renamed = {stem: names[stem] for stem in held[i] if names.get(stem, stem) != stem}
        if renamed:
            remarks = [
                f"{stem} is taken for {name}, the name in {adapters[holders[name][0]].name}: "
                "layers, shapes and what follows are the same"
                for stem, name in renamed.items()
            ]
            aligned[i] = replace(_renamed(adapter, renamed), remarks=(*adapter.remarks, *remarks))
    return aligned, problems


def _split(path: str) -> tuple[Stem, str]:
    segments = path.split(".")
    at = next((i for i, s in enumerate(segments) if s.isdecimal()), None)
    cut = len(segments) - 1 if at is None else at
    return Stem(tuple(segments[:cut]), at is not None), ".".join(segments[cut:])


def _held(adapter: Adapter) -> dict[Stem, Parts]:
    found: dict[Stem, Parts] = defaultdict(dict)
    for m in adapter.modules.values():
        stem, rest = _split(m.parameter)
        found[stem][rest] = (m.kind, m.d_out, m.d_in, m.kernel, m.expert[1])
    for tensor in adapter.dense.values():
        owner, _, last = tensor.name.rpartition(".")
        stem, rest = _split(owner)
        found[stem][f"{rest}.{last}"] = tensor.shape
    return dict(found)


def _pairs(
    adapters: Sequence[Adapter], held: Sequence[dict[Stem, Parts]], holders: dict[Stem, list[int]]
) -> tuple[list[tuple[Stem, Stem]], list[tuple[Stem, Stem]]]:
    """Spellings of the same layers, and those that may be."""
    parts: dict[Stem, Parts] = {
        stem: {rest: s for i in having for rest, s in held[i][stem].items()}
        for stem, having in holders.items()
    }
    scores: dict[tuple[Stem, Stem], tuple[bool, bool]] = {}
    doubtful = []
    loose = []
    for one, other in combinations(holders, 2):
        common = parts[one].keys() & parts[other].keys()
        if (
            one.indexed != other.indexed
            or set(holders[one]) & set(holders[other])
            or not common
            or any(parts[one][rest] != parts[other][rest] for rest in common)
            or _apart(one.segments, other.segments)
        ):
            continue
        told = {
            _selects(adapter, there, rest)
            for here, there in ((one, other), (other, one))
            for adapter in _configured(adapters[i] for i in holders[here])
            for rest in common
        }
        within = len(common) == min(len(parts[one]), len(parts[other]))
        wrapped = _wrapped(one.segments, other.segments)
        score = parts[one].keys() == parts[other].keys(), wrapped
        if "excluded" in told:
            continue
        if not one.indexed and not wrapped:
            continue
        if "selected" in told or (one.indexed and within and wrapped and told == {"left out"}):
            scores[one, other] = score
        elif one.indexed and within and not _qualified(one.segments, other.segments):
            doubtful.append((one, other))
        elif not one.indexed:
            loose.append((one, other))
    joined, ambiguous = _best(scores, holders)
    together = {frozenset((i, j)) for a, b in joined for i in holders[a] for j in holders[b]}
    joined += [
        pair
        for pair in loose
        if {frozenset((i, j)) for i in holders[pair[0]] for j in holders[pair[1]]} <= together
    ]
    return joined, doubtful + ambiguous


def _configured(adapters: Iterable[Adapter]) -> Iterable[Adapter]:
    """One adapter of each configuration, as far as it chooses modules."""
    return {(a.targets, a.modules_to_save): a for a in adapters}.values()


def _selects(adapter: Adapter, stem: Stem, rest: str) -> str:
    """What a client's configuration says of a module that it does not hold."""
    name = ".".join((*stem.segments, rest))
    told = adapter.targets.selects(name)
    if told or saved_by(name, adapter.modules_to_save):
        return "selected"
    if told is None:
        return "not told"
    return "excluded" if adapter.targets.excludes(name) else "left out"


def _wrapped(one: Segments, other: Segments) -> bool:
    """Whether one is the other with more segments, or with the same in another order."""
    shorter, longer = sorted((one, other), key=len)
    left = iter(longer)
    return Counter(one) == Counter(other) or all(segment in left for segment in shorter)


def _apart(one: Segments, other: Segments) -> bool:
    """Whether the segments that differ name different parts of a model, or numbered ones."""
    words = _differing(one, other)
    parts = [_parts(found) for found in words]
    differing = words[0] ^ words[1]
    numbered = bool(words[0] & words[1]) and all(len(w) == 1 or w.isdecimal() for w in differing)
    return (bool(parts[0]) and bool(parts[1]) and parts[0] != parts[1]) or numbered


def _qualified(one: Segments, other: Segments) -> bool:
    """Whether a segment has a word more in one of them: ``blocks`` and ``single_blocks``."""
    words = _differing(one, other)
    return all(words) and (words[0] < words[1] or words[1] < words[0])


def _differing(one: Segments, other: Segments) -> list[set[str]]:
    """Words of the segments that are not in both."""
    return [_words(Counter(a) - Counter(b)) for a, b in ((one, other), (other, one))]


def _words(segments: Iterable[str]) -> set[str]:
    return {word.lower() for segment in segments for word in _WORD.findall(segment)}


def _parts(words: set[str]) -> set[int]:
    return {i for i, part in enumerate(PARTS) if part & words}


def _best(
    scores: Mapping[tuple[Stem, Stem], tuple[bool, bool]], holders: Mapping[Stem, Sequence[int]]
) -> tuple[list[tuple[Stem, Stem]], list[tuple[Stem, Stem]]]:
    """The pairs that are the best of both sides in every client; and those that tie for it."""
    rivals: dict[tuple[Stem, int], list[tuple[Stem, Stem]]] = defaultdict(list)
    for pair in scores:
        for here, there in (pair, pair[::-1]):
            for i in holders[there]:
                rivals[here, i].append(pair)
    beaten, tied = set(), set()
    for pairs in rivals.values():
        top = max(scores[pair] for pair in pairs)
        first = [pair for pair in pairs if scores[pair] == top]
        beaten |= set(pairs) - set(first)
        tied |= set(first) if len(first) > 1 else set()
    return (
        [pair for pair in scores if pair not in beaten | tied],
        [pair for pair in scores if pair in tied - beaten],
    )


def _common_names(
    joined: Sequence[tuple[Stem, Stem]], holders: Mapping[Stem, Sequence[int]]
) -> dict[Stem, Stem]:
    """The one name of every stem that has several, as far as possible one client's all through.

    A client counts more that has no wrappers, then one whose names most have, one whose names say
    more of the model's parts (as newer libraries do), one whose names begin as those of models with
    a head do, and one with fewer other segments.
    """
    circles: list[set[Stem]] = []
    for pair in joined:
        kin = [circle for circle in circles if circle & set(pair)]
        circles = [c for c in circles if c not in kin] + [set(pair).union(*kin)]
    spelt: dict[int, list[Stem]] = defaultdict(list)
    for stem in {stem for circle in circles for stem in circle}:
        for i in holders[stem]:
            spelt[i].append(stem)

    def standing(i: int) -> tuple[int, ...]:
        segments = [segment for stem in spelt[i] for segment in stem.segments]
        parts = sum(bool(_parts(_words([segment]))) for segment in segments)
        followed = sum(len(holders[stem]) for stem in spelt[i])
        rooted = sum(not ROOTS.isdisjoint(stem.segments[:1]) for stem in spelt[i])
        return -len(WRAPPERS & set(segments)), followed, parts, rooted, parts - len(segments), -i

    names: dict[Stem, Stem] = {}
    for i in sorted(spelt, key=standing):  # the best last
        for stem in spelt[i]:
            circle = next(circle for circle in circles if stem in circle)
            names |= dict.fromkeys(circle, stem)
    return names


def _renamed(adapter: Adapter, stems: Mapping[Stem, Stem]) -> Adapter:
    def moved(path: str) -> str:
        stem, rest = _split(path)
        return ".".join((*stems.get(stem, stem).segments, rest))

    def of_tensor(name: str) -> str:
        owner, dot, last = name.rpartition(".")
        owner, wrapped, copied = owner.partition(".base_layer")
        return moved(owner) + wrapped + copied + dot + last

    names = {
        m.name: moved(m.parameter) + m.name[len(m.parameter) :] for m in adapter.modules.values()
    }
    full = {name: of_tensor(name) for name in (*adapter.dense, *adapter.base_copies)}
    both = names | full
    owned = {name.rpartition(".")[0] for name in adapter.dense}
    return replace(
        adapter,
        modules={names[n]: replace(m, name=names[n]) for n, m in adapter.modules.items()},
        dense={full[n]: replace(t, name=full[n]) for n, t in adapter.dense.items()},
        base_copies={full[n]: replace(t, name=full[n]) for n, t in adapter.base_copies.items()},
        tied={both[copy]: both[one] for copy, one in adapter.tied.items()},
        modules_to_save=tuple(
            moved(entry) if entry in owned else entry for entry in adapter.modules_to_save
        ),
    )


def _doubts(
    adapters: Sequence[Adapter],
    holders: Mapping[Stem, Sequence[int]],
    doubtful: Sequence[tuple[Stem, Stem]],
) -> Iterator[tuple[int, Refusal]]:
    for pair in doubtful:
        expected, found = sorted(pair, key=lambda s: (-len(holders[s]), holders[s][0]))
        i, j = holders[found][0], holders[expected][0]
        yield (
            i,
            Refusal(
                "the same layers may stand under two names",
                adapters[i].name,
                TENSORS_NAME,
                PREFIX + ".".join(found.segments),
                f"{found}",
                f"{expected} as in client {adapters[j].name!r}, or layers of other shapes",
                "if they are the same, save both with one version of the library; if they are "
                "different parts of one model, vouch for it with base=NAME (--base NAME)",
            ),
        )
