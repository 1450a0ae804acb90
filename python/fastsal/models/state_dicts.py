"""State dicts in the files that training writes: which one, and under which names.

A file has a state dict, or a dict of state dicts and other things: the weights, an average of them,
the optimizer. Averages (exponential, or stochastic weight averaging) are preferred, as timm does.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor

from fastsal.errors import FileFormatError, InvalidArgument
from fastsal.models.wrappers import plain_name, renamed
from fastsal.utils.suggestions import did_you_mean, listed

State = dict[str, Tensor]

# Keys of averages: those of timm and torchvision first, then others by their words.
_AVERAGES = ("state_dict_ema", "model_ema")
_IS_AVERAGE = re.compile(r"(?:^|[._])(?:ema|swa|avg|averaged?)(?:[._]|$)")
_PLAIN = (
    "state_dict", "model", "model_state_dict", "model_state", "module", "net", "network", "weights",
    "params",
)  # fmt: skip
# Parts of keys of what is no model.
_OTHERS = ("optim", "sched", "scaler")
# Of pairs of networks, the one that the method evaluates, the other, and how a name must begin:
# DINO and iBOT, BYOL.
_PAIRS = (
    ("teacher", "student", "backbone."),
    ("online_network_state_dict", "target_network_state_dict", ""),
)
_DEEPEST = 3
# What averages of PyTorch store beside their weights.
_COUNTERS = frozenset({"n_averaged"})


def choose_state(loaded: Any, key: str | None, path: object) -> tuple[State, str]:
    """Return a state dict of a file, and a note on the choice, which may be empty.

    Args:
        loaded: What the file contains.
        key: Key of the state dict, with dots between those of nested dicts, or the prefix of the
            names to use; None for an average if there is one, else the weights.
        path: Path of the file, for messages.

    Raises:
        InvalidArgument: There is no state dict under `key`.
        FileFormatError: There is no state dict, or `key` must decide between several.
    """
    found = dict(_states(loaded))
    if key is not None:
        return _under(found, key, path), ""
    if "" in found:
        return found[""], ""
    for chosen, other, begin in _PAIRS:
        is_there = chosen in found and other in found
        if is_there and any(plain_name(name).startswith(begin) for name in found[chosen]):
            return found[chosen], (
                f"{chosen!r} is loaded, not {other!r}; weights_key chooses another"
            )
    others = [name for name in _PLAIN if name in found]
    others = others or [name for name in found if not _IS_AVERAGE.search(name)]
    plain = others[0] if others and (others[0] in _PLAIN or len(others) == 1) else None
    averages = [name for name in _AVERAGES if name in found] or [
        name
        for name in found
        if _IS_AVERAGE.search(name) and (plain is None or _share_names(found[name], found[plain]))
    ]
    if averages and (averages[0] in _AVERAGES or len(averages) == 1):
        instead = f", not {plain!r}; weights_key chooses another" if plain else ""
        return found[averages[0]], f"the average {averages[0]!r} is loaded{instead}"
    if not averages and plain is not None:
        return found[plain], ""
    if found:
        raise FileFormatError(
            f"weights: {path} contains several state dicts; weights_key must be one of "
            f"{listed(sorted(found), 10)}"
        )
    keys = f" (its keys are {listed(list(map(str, loaded)), 10)})" if _is_mapping(loaded) else ""
    raise FileFormatError(
        f"weights: {path} contains no state dict: a dict from names to tensors, bare or under a "
        f"key such as 'state_dict' or 'model'{keys}"
    )


def _under(found: Mapping[str, State], key: str, path: object) -> State:
    if key and key in found:
        return found[key]
    # A prefix of names, in a state dict that the key begins with, or in the only one.
    inside = [(key.removeprefix(f"{k}."), s) for k, s in found.items() if key.startswith(f"{k}.")]
    inside += [(key, s) for k, s in found.items() if not k or len(found) == 1]
    for rest, state in inside:
        prefix = rest.rstrip(".") + "."
        for bare in (str, plain_name):  # with the segments of wrappers, or without them
            named = {
                bare(n)[len(prefix) :]: v for n, v in state.items() if bare(n).startswith(prefix)
            }
            if named:
                return named
    keys = sorted(each for each in found if each)
    prefixes = sorted({name.split(".")[0] for name in found.get("", {}) if "." in name})
    known = keys or prefixes
    what = f"one of {listed(known, 10)}" if known else "None for a file without such keys"
    raise InvalidArgument(
        f"weights_key must be {what} for {path}, got {key!r}{did_you_mean(key, known)}"
    )


def _states(value: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, State]]:
    """Yield the state dicts in nested dicts, with their keys."""
    if not _is_mapping(value) or not value:
        return
    tensors = {name: part for name, part in value.items() if isinstance(part, Tensor)}
    others = [name for name in value if name not in tensors]
    # The model keeps its own state of layers that is not tensors (of `get_extra_state`).
    if tensors and all(isinstance(name, str) for name in value) and all(map(_is_extra, others)):
        yield key, tensors
    elif depth < _DEEPEST:
        for name, part in value.items():
            if isinstance(name, str) and not any(other in name.lower() for other in _OTHERS):
                yield from _states(part, f"{key}.{name}" if key else name, depth + 1)


def _is_extra(name: str) -> bool:
    return name.rpartition(".")[2] == "_extra_state"


def _share_names(average: State, state: State) -> bool:
    """Whether a state dict may be an average of another; other things are averaged too."""
    return not set(map(plain_name, average)).isdisjoint(map(plain_name, state))


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def fitted(state: Mapping[str, Tensor], known: Collection[str], path: object) -> tuple[State, str]:
    """Return a state dict with the names of a model, and a note on them, which may be empty.

    Names that the model does not have are changed, see `wrappers.renamed`. If it has fewer of them
    than of those under a prefix, such as `model.` of a Lightning module, these are used.

    Args:
        state: The state dict.
        known: Names of the model.
        path: Path of the file, for messages.

    Raises:
        FileFormatError: Several prefixes fit equally well.
    """
    names = renamed(state, known)
    best, prefixes = len(names), [""]
    for prefix in _prefixes(state) if best < len(known) else ():
        count = len(renamed([n[len(prefix) :] for n in state if n.startswith(prefix)], known))
        if count > best:
            best, prefixes = count, [prefix]
        elif count == best and prefixes != [""] and not prefix.startswith(tuple(prefixes)):
            prefixes.append(prefix)
    averages = [prefix for prefix in prefixes if _IS_AVERAGE.search(prefix)]
    chosen = averages if len(averages) == 1 else prefixes
    if len(chosen) > 1:
        keys = listed([prefix[:-1] for prefix in chosen], 10)
        raise FileFormatError(
            f"weights: {path} contains several sets of weights; weights_key must be one of {keys}"
        )
    prefix, note = chosen[0], ""
    if prefix:
        rest = [name for name in state if not name.startswith(prefix)]
        state = {n[len(prefix) :]: v for n, v in state.items() if n.startswith(prefix)}
        names = renamed(state, known)
        if rest:
            note = (
                f"weights under {prefix!r} are loaded, the others are not ({listed(sorted(rest))})"
            )
    twice = [name for name in state if name not in names and name in set(names.values())]
    if twice:
        raise FileFormatError(
            f"weights: {path} contains {twice[0]!r} twice, with and without the prefix of a wrapper"
        )
    found = {names.get(name, name): value for name, value in state.items()}
    return {n: v for n, v in found.items() if n in known or n not in _COUNTERS}, note


def _prefixes(names: Collection[str]) -> list[str]:
    """Return what names begin with, of up to three segments, in order of appearance."""
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")[:-1][:_DEEPEST]
        for depth in range(1, len(parts) + 1):
            found[".".join(parts[:depth]) + "."] = None
    return list(found)
