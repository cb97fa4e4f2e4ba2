"""What replace_towers tells: the towers that it replaced, and what it left alone."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Replacement:
    """One tower that an IFRHead took the place of.

    path: where the IFRHead is now (`model.get_submodule(path)`); the first, if the module holding it has several.
    layers: paths of the modules that were there. convolutions: how many 3×3 convolutions they held.
    parameters_before, parameters_after: scalars in those modules and in the IFRHead.
    """

    path: str
    channels: int
    convolutions: int
    layers: tuple[str, ...]
    parameters_before: int
    parameters_after: int

    def __str__(self) -> str:
        share = self.parameters_after / self.parameters_before
        return (
            f"{self.path}: {self.convolutions} convolutions of {self.channels} channels, "
            f"{self.parameters_before:,} → {self.parameters_after:,} parameters ({share:.0%})"
        )


@dataclass(frozen=True)
class Skipped:
    """Something that looked like a tower and was left as it was, and why."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path or 'the model itself'}: left alone, {self.reason}"


class Report(list[Replacement]):
    """What was replaced, in the model's order; `skipped` lists what was considered and left alone."""

    def __init__(self, replaced: Sequence[Replacement], skipped: Sequence[Skipped]) -> None:
        super().__init__(replaced)
        self.skipped = list(skipped)

    def __str__(self) -> str:
        return "\n".join(map(str, [*self, *self.skipped]))
