"""Tensors and plain values out of a torch pickle, by a machine that runs nothing.

A pickle is a program: it names functions and calls them. Here its opcodes are only taken apart
(:mod:`pickletools`); a name stays a name, an object of a foreign class becomes an inert
:class:`Made` with the state it was given, and the few calls that a checkpoint needs (tensors,
ordered dicts, devices, paths) are done by this module. Any other call is refused by name.
"""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from manifold_unlearn.dictionary.formats.errors import DictionaryFormatError

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_MARK = object()
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE"),
    *("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,
}


@dataclass(frozen=True)
class Named:
    """A name that a pickle refers to; never looked up."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(eq=False)
class Made:
    """An object of a foreign class: the name of the class and the state it was given."""

    kind: str
    state: dict[str, Any] = field(default_factory=dict)


def read_inert(archive: zipfile.ZipFile) -> Any:
    """Value of a checkpoint in torch's zip format, without running anything of it.

    Parameters
    ----------
    archive : zipfile.ZipFile

    Raises
    ------
    DictionaryFormatError
        The pickle calls something, or the archive is not torch's.
    """
    roots = [n.removesuffix("data.pkl") for n in archive.namelist() if n.endswith("data.pkl")]
    if len(roots) != 1:
        raise DictionaryFormatError(f"{archive.filename} holds {len(roots)} data.pkl, not one.")
    root = roots[0]
    order = f"{root}byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise DictionaryFormatError(f"{archive.filename} is big-endian; write it again elsewhere.")
    return _Machine(archive, root).run(archive.read(f"{root}data.pkl"))


class _Machine:
    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        self.archive, self.root = archive, root
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Tensor] = {}

    def run(self, program: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name == "STOP":
                return self.stack.pop()
            self.step(opcode.name, argument)
        raise self.refused("has no end")

    def refused(self, why: str) -> DictionaryFormatError:
        return DictionaryFormatError(
            f"{self.archive.filename}: its pickle {why}; nothing of it was run. Take the file "
            "from a source you trust, as safetensors where there are such."
        )

    def step(self, name: str, argument: Any) -> None:
        if name in _VALUES:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name == "MARK":
            self.stack.append(_MARK)
        elif (done := getattr(self, f"on_{name.lower()}", None)) is not None:
            done(argument)
        elif name not in ("PROTO", "FRAME"):
            raise self.refused(f"uses the opcode {name}")

    def marked(self) -> list[Any]:
        at = max(i for i, value in enumerate(self.stack) if value is _MARK)
        found = self.stack[at + 1 :]
        del self.stack[at:]
        return found

    def on_pop(self, _: Any) -> None:
        self.stack.pop()

    def on_pop_mark(self, _: Any) -> None:
        self.marked()

    def on_dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def on_memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def on_put(self, at: Any) -> None:
        self.memo[int(at)] = self.stack[-1]

    on_binput = on_long_binput = on_put

    def on_get(self, at: Any) -> None:
        self.stack.append(self.memo[int(at)])

    on_binget = on_long_binget = on_get

    def on_tuple(self, _: Any) -> None:
        self.stack.append(tuple(self.marked()))

    def on_tuple1(self, _: Any) -> None:
        self.stack[-1:] = [tuple(self.stack[-1:])]

    def on_tuple2(self, _: Any) -> None:
        self.stack[-2:] = [tuple(self.stack[-2:])]

    def on_tuple3(self, _: Any) -> None:
        self.stack[-3:] = [tuple(self.stack[-3:])]

    def on_list(self, _: Any) -> None:
        self.stack.append(self.marked())

    on_frozenset = on_list

    def on_append(self, _: Any) -> None:
        value = self.stack.pop()
        self.stack[-1].append(value)

    def on_appends(self, _: Any) -> None:
        values = self.marked()
        self.stack[-1].extend(values)

    on_additems = on_appends

    def on_dict(self, _: Any) -> None:
        values = self.marked()
        self.stack.append({})
        self.assigned(values)

    def on_setitem(self, _: Any) -> None:
        values = self.stack[-2:]
        del self.stack[-2:]
        self.assigned(values)

    def on_setitems(self, _: Any) -> None:
        self.assigned(self.marked())

    def assigned(self, values: list[Any]) -> None:
        for key in values[::2]:
            if not isinstance(key, str | int | float | Named | None):
                raise self.refused(f"names a field by a {type(key).__name__}")
        self.stack[-1].update(zip(values[::2], values[1::2], strict=True))

    def on_global(self, argument: str) -> None:
        self.stack.append(Named(argument.replace(" ", ".")))

    def on_stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(Named(f"{module}.{name}"))

    def on_reduce(self, _: Any) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        self.stack.append(self.called(called, arguments))

    def on_newobj(self, _: Any) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        self.stack.append(self.made(kind, arguments))

    def on_newobj_ex(self, _: Any) -> None:
        named, arguments, kind = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.stack.append(self.made(kind, (*arguments, *named)))

    def on_inst(self, argument: str) -> None:
        self.stack.append(self.made(Named(argument.replace(" ", ".")), self.marked()))

    def on_obj(self, _: Any) -> None:
        kind, *arguments = self.marked()
        self.stack.append(self.made(kind, arguments))

    def on_build(self, _: Any) -> None:
        state = self.stack.pop()
        given = state[0] if isinstance(state, tuple) and state else state
        if isinstance(self.stack[-1], Made) and isinstance(given, dict):
            self.stack[-1].state.update(given)
        elif not isinstance(self.stack[-1], dict):  # what hangs on an ordered dict is its own
            raise self.refused("sets the state of what has none")

    def on_persid(self, _: Any) -> None:
        raise self.refused("refers to what is not in it")

    def on_binpersid(self, _: Any) -> None:
        word, kind, key, _place, size = self.stack.pop()
        if word != "storage" or not isinstance(kind, Named):
            raise self.refused(f"refers to a {word!r}")
        dtype = _DTYPES.get(kind.name.removeprefix("torch."))
        if dtype is None:
            raise self.refused(f"holds a {kind}, which is not read")
        if key not in self.storages:
            raw = bytearray(self.archive.read(f"{self.root}data/{key}"))
            empty = torch.empty(0, dtype=dtype)
            self.storages[key] = torch.frombuffer(raw, dtype=dtype) if raw else empty
        found = self.storages[key]
        if found.dtype != dtype or len(found) != size:
            raise self.refused(f"says that storage {key} has {size} values; it has {len(found)}")
        self.stack.append(found)

    def made(self, kind: Any, arguments: Any) -> Any:
        if kind == Named("collections.OrderedDict") and not arguments:
            return {}
        if not isinstance(kind, Named) or arguments:
            raise self.refused(f"calls {kind}")
        return Made(kind.name)

    def called(self, function: Any, arguments: Any) -> Any:
        name = str(function) if isinstance(function, Named) else "what is no name"
        if name == "torch._utils._rebuild_tensor_v2":
            return self.tensor(*arguments[:4])
        if name == "torch._utils._rebuild_parameter" and isinstance(arguments[0], Tensor):
            return arguments[0]
        if name == "collections.OrderedDict" and not arguments:
            return {}
        if name == "torch.device":
            return ":".join(map(str, arguments))
        if name in ("pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.Path"):
            return "/".join(map(str, arguments))
        if name == "copyreg._reconstructor" and isinstance(arguments[0], Named):
            return Made(arguments[0].name)
        raise self.refused(f"calls {name}")

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any) -> Tensor:
        numbers = [offset, *size, *stride]
        if not isinstance(storage, Tensor) or len(size) != len(stride):
            raise self.refused("rebuilds a tensor of no storage")
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise self.refused("rebuilds a tensor of odd shape")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if 0 not in size and last >= len(storage):
            raise self.refused("rebuilds a tensor that reaches beyond its storage")
        return storage.as_strided(size, stride, offset)
