import enum
from dataclasses import dataclass, field


class Mode(enum.Enum):
    ADD = "add"
    MUL = "mul"


@dataclass
class Settings:
    width: int = 8
    scale: float = 0.5
    mode: Mode = Mode.ADD
    sizes: tuple = (1, 2)
    extras: dict = field(default_factory=lambda: {"shift": 3, "gain": 2.0})


FACTOR = 2.0
TABLE = {"a": 1.0, "b": 2.0}
SHARED = Settings()
