"""A clock that tests set by hand."""

from dataclasses import dataclass


@dataclass
class FakeClock:
    """Wall and boot time as the test wants them."""

    wall: int = 1_800_000_000_000
    boot: int = 1_000_000
    boot_name: str = "boot-1"

    def wall_ms(self) -> int:
        return self.wall

    def boot_ms(self) -> int:
        return self.boot

    def boot_id(self) -> str:
        return self.boot_name

    def advance(self, ms: int) -> None:
        """Let both clocks go on."""
        self.wall += ms
        self.boot += ms
