from typing import Final

NUMBERS: Final[dict[str, int]]

def install(name: str) -> None: ...
