"""The state of a reader of pickles: a stack, marks, a memo, and the budget that bounds them.

A pickle is a program for a small stack machine whose instructions may import and call anything.
This machine runs the instructions that build data (`opcodes`); names are looked up in a
fixed table of handlers written here, and whatever is not in the table is refused by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Final, TypeAlias

from merge_rl.errors import CheckpointError
from merge_rl.storage.pickles.spans import Cursor, Span
from merge_rl.storage.pickles.values import (
    MAX_DEPTH,
    MAX_MARKS,
    MAX_NODES,
    Budget,
    Global,
    kind_of,
    shown,
)

Handler: TypeAlias = "Callable[[tuple[object, ...], Machine], object]"
"""(arguments, machine) -> what a call of the permitted name stands for."""
Permitted: TypeAlias = "Mapping[str, Handler | None]"
"""Full name -> handler; None where the name may be mentioned, but not called."""
Persistent: TypeAlias = "Callable[[object, Machine], object]"
"""(persistent id, machine) -> the object it stands for."""

_NOT_READ: Final[Mapping[str, str]] = {  # what the name begins with -> what the file holds
    "__torch__.": "a TorchScript program",
    "torch._utils._rebuild_meta": "tensors without content (of the meta device)",
    "torch._utils._rebuild_nested": "nested tensors",
    "torch._utils._rebuild_qtensor": "quantized tensors",
    "torch._utils._rebuild_sparse": "sparse tensors",
    "torch._tensor._rebuild_from_type": "tensors of a class of its own",
    "torch.distributed.tensor.": "parts of tensors that are spread over processes",
    "torch.ComplexDouble": "complex numbers of double precision",
    "torch.nn.modules.": "a network, not its weights alone (torch.save(model.state_dict(), FILE))",
}
MEMO_COST: Final = 120  # bytes of one entry of a dict with a number as key, generously
OPCODE_COST: Final = 32


class Machine:
    """Reads one pickle from a cursor, which is left behind its last byte."""

    def __init__(
        self,
        cursor: Cursor,
        permitted: Permitted,
        budget: Budget,
        persistent: Persistent | None = None,
    ) -> None:
        self.cursor, self.permitted, self.budget = cursor, permitted, budget
        self._persistent = persistent
        self.stack: list[object] = []
        self._marks: list[int] = []
        self._floor = 0  # values below belong to an enclosing mark
        self._memo: dict[int, object] = {}

    def refuse(self, why: str) -> CheckpointError:
        """The error for a pickle that cannot be read, with the place."""
        where = f"{self.budget.name}: not readable as data"
        return CheckpointError(f"{where}: {why} (before byte {self.cursor.position})")

    # ------------------------------------------------------------------------------- the stack

    def push(self, value: object, cost: int = 0) -> None:
        """Put a value on the stack; `cost` is what it takes beyond its opcode."""
        if cost:
            self.budget.spend(cost)
        self.stack.append(value)

    def pop(self) -> object:
        """Take the topmost value above the last mark."""
        if len(self.stack) <= self._floor:
            raise self.refuse("an instruction takes a value from an empty stack")
        return self.stack.pop()

    def pop_last(self, count: int) -> list[object]:
        """Take the topmost values above the last mark, the lowest of them first."""
        begin = len(self.stack) - count
        if begin < self._floor:
            raise self.refuse("an instruction takes a value from an empty stack")
        values = self.stack[begin:]
        del self.stack[begin:]
        return values

    def top(self) -> object:
        """The topmost value, which stays."""
        if len(self.stack) <= self._floor:
            raise self.refuse("an instruction looks at the top of an empty stack")
        return self.stack[-1]

    def push_mark(self) -> None:
        """Begin a group of values."""
        if len(self._marks) >= MAX_MARKS:
            raise self.refuse(f"more than {MAX_MARKS} groups are open at once")
        self._floor = len(self.stack)
        self._marks.append(self._floor)

    def pop_mark(self) -> list[object]:
        """The values since the last mark."""
        if not self._marks:
            raise self.refuse("an instruction ends a group that was never begun")
        begin = self._marks.pop()
        values = self.stack[begin:]
        del self.stack[begin:]
        self._floor = self._marks[-1] if self._marks else 0
        self.budget.spend(8 * len(values))
        return values

    def pop_or_mark(self) -> None:
        """Drop the topmost value, or the last mark if no value is above it."""
        if len(self.stack) > self._floor:
            self.stack.pop()
        else:
            self.pop_mark()

    # -------------------------------------------------------------------------------- the memo

    def put(self, key: int | None = None) -> None:
        """Remember the topmost value, by the next number where none is given."""
        value, memo, budget = self.top(), self._memo, self.budget
        budget.left -= MEMO_COST  # `spend` in place: most instructions are this one
        if budget.left < 0:
            budget.spend(0)
        memo[len(memo) if key is None else key] = value
        if isinstance(value, Unbuilt):
            value.memo_keys.append(len(memo) - 1 if key is None else key)

    def get(self, key: int) -> None:
        """Put a remembered value on the stack."""
        if key not in self._memo:
            raise self.refuse(f"value {key} is used before it was made")
        self.stack.append(self._memo[key])

    # ------------------------------------------------------------------------ names and objects

    def find(self, module: object, name: object) -> None:
        """Put a permitted name on the stack; any other is refused."""
        if not (isinstance(module, str) and isinstance(name, str)):
            raise self.refuse(f"a name is given as {kind_of(module)} and {kind_of(name)}")
        full = f"{module}.{name}"
        if full not in self.permitted:
            known = next((words for part, words in _NOT_READ.items() if full.startswith(part)), "")
            raise CheckpointError(
                f"{self.budget.name}: holds {known}, expected tensors of plain numbers"
                if known
                else f"{self.budget.name}: refers to '{shown(full, 120)}', which is not among the "
                "names that a checkpoint needs; nothing was executed (a state dict alone has none "
                "of its own: torch.save(model.state_dict(), FILE))"
            )
        self.push(Global(full), 200)

    def call(self, target: object, args: object) -> object:
        """What a call of a permitted name stands for; nothing is called but our own handler."""
        if not isinstance(target, Global) or not isinstance(args, tuple):
            raise self.refuse(f"{kind_of(target)} is called with {kind_of(args)}")
        handler = self.permitted.get(target.name)
        if handler is None:
            raise self.refuse(f"{target.name} is called, which no checkpoint does")
        self.budget.spend(400)
        return handler(args, self)

    def build(self) -> None:
        """Give a value its state: opcode BUILD."""
        state, value = self.pop(), self.top()
        if isinstance(value, dict):
            # Attributes of a subclass, such as the version numbers torch adds to a state dict.
            if not (isinstance(state, dict) or state is None):
                raise self.refuse(f"a mapping is given {kind_of(state)} as its state")
            return
        if not isinstance(value, Unbuilt):
            raise self.refuse(f"{kind_of(value)} is given a state")
        built = value.build(state, self)
        self.stack[-1] = built
        for key in value.memo_keys:
            if self._memo.get(key) is value:
                self._memo[key] = built

    def resolve_persistent(self, pid: object) -> None:
        """Put what a persistent id stands for on the stack."""
        if self._persistent is None:
            raise self.refuse("it refers to an object stored elsewhere")
        self.push(self._persistent(pid, self), 200)

    def take_span(self, length: int) -> Span:
        """The next `length` bytes of the file, left where they are."""
        self.budget.spend(200)
        return self.cursor.skip(length)


class Unbuilt:
    """A value whose content arrives after it was made (opcode BUILD)."""

    def __init__(self) -> None:
        self.memo_keys: list[int] = []

    def build(self, state: object, machine: Machine) -> object:
        """The finished value, which takes this one's place."""
        raise NotImplementedError


class Record(Unbuilt):
    """An object of a known class as inert data: its class's name, its arguments and its state.

    `kind` is the full name of the class; that of an object that carries its own source text is
    "persistent:" and the name of its class. The source text itself is dropped unread.
    """

    def __init__(self, kind: str, args: tuple[object, ...] = (), state: object = None) -> None:
        super().__init__()
        self.kind, self.args, self.state = kind, args, state

    def __repr__(self) -> str:
        return f"<record {self.kind}>"

    def build(self, state: object, machine: Machine) -> object:
        """The record with its state; refuses a second one."""
        if self.state is not None:
            raise machine.refuse(f"the state of a {self.kind} is given twice")
        self.state = state
        return self


def require_tree(root: object, name: str) -> None:
    """Refuse values that would be endless, too deep or too many when walked.

    What passes can be walked by plain recursion: no cycles, at most MAX_DEPTH levels, and at most
    MAX_NODES values even where several containers share one.
    """
    known: dict[int, tuple[int, int] | None] = {}  # None while a container is being walked

    def walk(value: object, level: int) -> tuple[int, int]:
        """(values in a container, levels of it), both with itself."""
        children = _children(value)
        if isinstance(value, Unbuilt) and not isinstance(value, Record):
            raise CheckpointError(f"{name}: an array or type was announced, but not described")
        size, depth, key = 1 + len(children), 0, id(value)
        known[key] = None
        for child in children:
            if not isinstance(child, _INNER):
                continue
            found = known.get(id(child), ()) if level < MAX_DEPTH else (0, MAX_DEPTH)
            if found is None:
                raise CheckpointError(f"{name}: a value contains itself")
            inside, below = found or walk(child, level + 1)
            size, depth = size + inside - 1, max(depth, below)
        if size > MAX_NODES or depth >= MAX_DEPTH:
            raise CheckpointError(f"{name}: nested beyond {MAX_DEPTH} levels or {MAX_NODES} values")
        known[key] = size, depth + 1
        return size, depth + 1

    if isinstance(root, _INNER):
        walk(root, 1)


def _children(value: object) -> Collection[object]:
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, Record):
        return value.args, value.state
    return value if isinstance(value, (list, tuple)) else ()


_INNER: Final = (dict, list, tuple, Unbuilt)
