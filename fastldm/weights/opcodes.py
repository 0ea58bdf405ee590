"""Pickles followed opcode by opcode, with inert values in the place of what they would build. Nothing is run.

Only what a state dict of dense tensors needs is understood; nothing else is skipped or guessed.
"""

from __future__ import annotations

import io
import pickletools
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch

from fastldm.errors import FileError
from fastldm.weights.header import MAX_RANK
from fastldm.weights.strict import MAX_INTEGER, MAX_TENSORS, shown

MAX_OPCODES = 48 * MAX_TENSORS  # torch writes about 40 for a tensor
ADVICE = "where you trust the file, save its tensors as safetensors"
STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
_DICT, _TENSOR, _PARAMETER = (
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
)
GLOBALS = {_DICT, _TENSOR, _PARAMETER, *STORAGES}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}
_KEYS = (str, int, float, bool, type(None))  # a tuple's hash descends without bound


@dataclass(frozen=True)
class Global:
    name: str


@dataclass(frozen=True)
class Storage:
    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True, eq=False)
class Dense:
    """A tensor to come: a view of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Program:
    """Pickles in a row, followed with inert values. `storages`: what they ask for, by key."""

    def __init__(self, data: bytes, where: str) -> None:
        self.storages: dict[str, Storage] = {}
        self._data, self._where, self._stream = data, where, io.BytesIO(data)

    @property
    def position(self) -> int:
        return self._stream.tell()

    def run(self) -> object:
        """What the next pickle would build: constants, lists, dicts, tuples, and `Global`, `Storage`, `Dense`.

        Raises `FileError` naming the first forbidden global, or else what is wrong with the pickle.
        """
        start = self.position
        try:
            return self._run()
        except (ValueError, LookupError) as error:
            forbidden = next((name for name in _globals(self._data[start:]) if name not in GLOBALS), None)
            if forbidden is not None:
                reason = f"its pickle names {shown(forbidden)}, which may run code and is never loaded"
            else:
                cause = shown(str(error)) if isinstance(error, ValueError) else "it asks for what it has not made"
                reason = f"its pickle is not one of tensors, or damaged: {cause}"
            raise FileError(f"{self._where}: {reason}; {ADVICE}") from None

    def _run(self) -> object:
        stack: list[Any] = []
        marks: list[list[Any]] = []
        memo: dict[int, Any] = {}
        for opcode, arg, at in islice(_opcodes(self._stream), MAX_OPCODES):
            match opcode.name:
                case "BINPUT" | "LONG_BINPUT":
                    memo[arg] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[arg])
                case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                    stack.append(arg)
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append(_CONSTANTS[opcode.name])
                case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                    stack.append(_EMPTY[opcode.name]())
                case "MARK":
                    marks.append(stack)
                    stack = []
                case "TUPLE":
                    items, stack = stack, marks.pop()
                    stack.append(tuple(items))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    stack.append(tuple(_popped(stack, int(opcode.name[-1]))))
                case "APPEND" | "APPENDS":
                    items, stack = (stack, marks.pop()) if opcode.name == "APPENDS" else (_popped(stack, 1), stack)
                    _extend(stack[-1], items)
                case "SETITEM" | "SETITEMS":
                    items, stack = (stack, marks.pop()) if opcode.name == "SETITEMS" else (_popped(stack, 2), stack)
                    _update(stack[-1], items)
                case "GLOBAL":
                    stack.append(self._global(arg, at))
                case "BINPERSID":
                    stack.append(self._storage(stack.pop()))
                case "REDUCE":
                    function, args = _popped(stack, 2)
                    stack.append(_call(function, args))
                case "BUILD":
                    state = stack.pop()
                    _check_state(stack[-1], state)
                case "PROTO":
                    if arg != 2:
                        raise ValueError(f"of protocol {arg}, where torch writes 2")
                case "STOP":
                    return stack.pop()
                case _:
                    raise ValueError(f"opcode {opcode.name} at {at}")
        raise ValueError(f"more than {MAX_OPCODES} opcodes")

    def _global(self, arg: str, at: int) -> Global:
        name = arg.replace(" ", ".", 1)
        as_torch_reads_it = b"c%s\n" % arg.replace(" ", "\n", 1).encode()  # pickletools resolves escapes
        if name not in GLOBALS or not self._data.startswith(as_torch_reads_it, at):
            raise ValueError(f"global {name} at {at}")
        return Global(name)

    def _storage(self, identity: object) -> Storage:
        match identity:
            case ("storage", Global(name), str(key), str(), int(numel), *view) if isinstance(identity, tuple):
                if name not in STORAGES or view not in ([], [None]) or not 0 <= numel <= MAX_INTEGER:
                    raise ValueError(f"storage {key} is of another form")
                storage = Storage(key, STORAGES[name], numel)
                if self.storages.setdefault(key, storage) != storage:
                    raise ValueError(f"storage {key} is described twice, and differently")
                return storage
        raise ValueError("something other than a storage is asked for")


def _opcodes(stream: io.BytesIO) -> Iterator[tuple[pickletools.OpcodeInfo, Any, int]]:
    """Opcode, argument and place of each step of the pickle in `stream`."""
    return cast("Iterator[tuple[pickletools.OpcodeInfo, Any, int]]", pickletools.genops(stream))


def _popped(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise ValueError("the stack is empty")
    items = stack[-count:]
    del stack[-count:]
    return items


def _extend(target: object, items: Iterable[Any]) -> None:
    if type(target) is not list:
        raise ValueError("something other than a list is appended to")
    target.extend(items)


def _update(target: object, items: Sequence[Any]) -> None:
    keys, values = items[::2], items[1::2]
    if not isinstance(target, dict) or len(keys) != len(values):
        raise ValueError("something other than a dict is filled")
    if any(type(key) not in _KEYS for key in keys):
        raise ValueError("a key is neither text nor a number")
    target.update(zip(keys, values, strict=True))


def _call(function: object, args: object) -> object:
    """What a call that rebuilds a part of a state dict gives."""
    match function, args if isinstance(args, tuple) else None:
        case Global(name), () if name == _DICT:
            return OrderedDict()
        case Global(name), (Dense() as data, bool(), OrderedDict()) if name == _PARAMETER:
            return data
        case Global(name), (Storage() as storage, offset, shape, stride, bool(), OrderedDict() as hooks) if (
            name == _TENSOR and not hooks and _naturals((offset,)) and _naturals(shape) and _naturals(stride)
        ):
            if len(shape) == len(stride) <= MAX_RANK:
                return Dense(storage, offset, shape, stride)
    raise ValueError("something is called otherwise than a state dict needs it")


def _naturals(value: object) -> bool:
    return type(value) is tuple and all(type(v) is int and 0 <= v <= MAX_INTEGER for v in value)


def _check_state(target: object, state: object) -> None:
    """Only what torch.nn.Module.state_dict notes beside its tensors."""
    if type(target) is not OrderedDict or type(state) is not dict or not state.keys() <= {"_metadata"}:
        raise ValueError("the state of an object is set")


def _globals(data: bytes) -> Iterator[str]:
    """The globals that pickles of any protocol name, as far as they can be read: for a message only."""
    stream = io.BytesIO(data)
    try:
        for _ in range(5):  # an old checkpoint has so many
            yield from _named(stream)
    except (ValueError, IndexError):
        return


def _named(stream: io.BytesIO) -> Iterator[str]:
    """The globals of one pickle. The stack is followed, as newer protocols take the names from there."""
    stack: list[object] = []
    memo: dict[int, object] = {}
    for opcode, arg, _ in islice(_opcodes(stream), MAX_OPCODES // 8):
        name, before = opcode.name, opcode.stack_before
        if name in ("GLOBAL", "INST"):
            yield arg.replace(" ", ".", 1)
        elif name == "STACK_GLOBAL":
            yield ".".join(part if isinstance(part, str) else "?" for part in stack[-2:])
        elif name.startswith("EXT"):
            yield f"extension {arg}"
        if "PUT" in name or name == "MEMOIZE":
            memo[len(memo) if arg is None else arg] = stack[-1]
        elif "GET" in name:
            stack.append(memo.get(arg))
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "MARK":
            stack.append(pickletools.markobject)
        else:
            if pickletools.stackslice in before:
                while stack.pop() is not pickletools.markobject:
                    pass
                before = before[: before.index(pickletools.markobject)]
            del stack[len(stack) - len(before) :]
            stack += [arg] * len(opcode.stack_after)
