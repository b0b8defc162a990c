"""Arrays of a pickle without running what it says: its opcodes are read as data, the few that arrays need.

CIFAR-10's Python version is six such files. Whatever a pickle names is a name here, never looked up or called.
"""

import pickletools
from typing import Any, NamedTuple

import numpy as np

BYTES_MAKERS = ("_codecs encode",)  # how Python 3 spells bytes for older readers
ARRAY_MAKERS = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
IGNORED = ("PROTO", "FRAME", "STOP")
EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "NEWTRUE": lambda: True}
EMPTY |= {"NEWFALSE": lambda: False, "NONE": lambda: None}
MARK = object()


class Name(NamedTuple):
    """Name that a GLOBAL holds, as text."""

    text: str


class Made:
    """An object that the pickle would have made by calling `maker`, with the state it would have set."""

    def __init__(self, maker: Any, arguments: tuple) -> None:
        self.maker, self.arguments, self.state = maker, arguments, None


def read_arrays(content: bytes) -> dict[str, Any]:
    """A pickled dict with keys as str and arrays of uint8 as such. Raises ValueError for whatever else is in it."""
    result = _Machine().run(content)
    if not isinstance(result, dict):
        raise ValueError(f"holds a {type(result).__name__}, expected a dict")
    return {_text(key): _plain(value) for key, value in result.items()}


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, content: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(content):
            self._step(opcode.name, argument)
        [result] = self.stack
        return result

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in EMPTY:
            stack.append(EMPTY[name]())
        elif name == "MARK":
            stack.append(MARK)
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("SHORT_BINSTRING", "BINSTRING", "STRING"):  # bytes in Python 2
            stack.append(argument.encode("latin-1"))
        elif name == "GLOBAL":
            stack.append(Name(argument))
        elif argument is not None and name.startswith(("BININT", "LONG", "INT", "BINUNICODE", "SHORT_BIN", "BINBYTES")):
            stack.append(argument)
        elif name not in IGNORED:
            self._combine(name)

    def _combine(self, name: str) -> None:
        """Opcodes that take their operands from the stack."""
        stack = self.stack
        if name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(Name(f"{module} {attribute}"))
        elif name == "REDUCE":
            arguments, maker = stack.pop(), stack.pop()
            stack.append(_made(maker, arguments))
        elif name == "BUILD":
            state = stack.pop()
            stack[-1].state = state
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack[-int(name[-1]) :] = [tuple(stack[-int(name[-1]) :])]
        elif name == "TUPLE":
            stack.append(tuple(self._marked()))
        elif name == "APPEND":
            value = stack.pop()
            stack[-1].append(value)
        elif name == "APPENDS":
            values = self._marked()
            stack[-1].extend(values)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            stack[-1][key] = value
        elif name == "SETITEMS":
            values = self._marked()
            stack[-1].update(zip(values[::2], values[1::2], strict=True))
        else:
            raise ValueError(f"opcode {name}, which no array needs")

    def _marked(self) -> list[Any]:
        """What lies above the topmost mark, taken off the stack with it."""
        place = next(i for i in range(len(self.stack) - 1, -1, -1) if self.stack[i] is MARK)
        values = self.stack[place + 1 :]
        del self.stack[place:]
        return values


def _made(maker: Any, arguments: tuple) -> Any:
    if isinstance(maker, Name) and maker.text in BYTES_MAKERS and arguments[1:] == ("latin1",):
        return arguments[0].encode("latin-1")
    return Made(maker, arguments)


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, Made):
        return _array(value)
    if isinstance(value, (str, bytes)):
        return _text(value)
    if value is None or isinstance(value, int):
        return value
    raise ValueError(f"a {type(value).__name__}, expected arrays, numbers and texts")


def _array(made: Made) -> np.ndarray:
    if not isinstance(made.maker, Name) or made.maker.text not in ARRAY_MAKERS:
        raise ValueError(f"it would call {getattr(made.maker, 'text', made.maker)}, expected arrays only")
    _, shape, dtype, by_columns, values = made.state
    if not isinstance(dtype, Made) or _text(dtype.arguments[0]) != "u1":
        raise ValueError("an array of another type, expected uint8")
    return np.frombuffer(values, dtype=np.uint8).reshape(shape, order="F" if by_columns else "C")


def _text(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)
