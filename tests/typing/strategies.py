"""Mistakes of users with strategies that a type checker must report, and code that it must
accept.
"""

from typing import reveal_type

from perdure.strategies import EWC, Combine, Replay, find, names
from perdure.strategies import EWCC as MISSPELT  # E[attr-defined]: has no attribute "EWCC"

replay = Replay(memory_size=200, selection="class-balanced")
combined = Combine(EWC(strength=1.0), replay)
size: int | str = replay.memory_size
Replay(memory_size="abc", nonsense=3)  # E[call-arg]: "nonsense"
Replay(memory_size=2.5)  # E[arg-type]: "memory_size"
Replay(memory_size=200, selection="best")  # E[arg-type]: "selection"
Replay()  # E[call-arg]: "memory_size"
EWC(strength="1")  # E[arg-type]: "strength"
EWC(1.0)  # E[call-arg]: Too many positional arguments
MISSPELT(strength=1.0)

reveal_type(find("ewc"))  # N: type[perdure.contract.strategy.Strategy]
reveal_type(names())  # N: tuple[
find(EWC)  # E[arg-type]: expected "str"
