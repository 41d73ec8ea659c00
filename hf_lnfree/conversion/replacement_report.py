"""What became of every norm and activation of a model whose norms were replaced."""

from dataclasses import dataclass

from ..tables import Table


@dataclass(frozen=True)
class ReplacementRow:
    """A module, what it is or was, what stands there now, and why if that is the same."""

    path: str
    was: str
    became: str
    why: str


@dataclass(frozen=True)
class ReplacementReport:
    """
    What `replace_norms` did to a model; `print` shows it as a table.

    Args:
        model: the name of its class.
        rows: one for every norm of the model and every activation of its blocks.
        notes: what follows for the model.
    """

    model: str
    rows: tuple[ReplacementRow, ...]
    notes: tuple[str, ...] = ()

    @property
    def replaced(self) -> dict[str, str]:
        """Path -> what stands there now."""
        return {row.path: row.became for row in self.rows if not row.why}

    @property
    def left(self) -> dict[str, str]:
        """Path -> why the module stays."""
        return {row.path: row.why for row in self.rows if row.why}

    def __str__(self) -> str:
        kinds: dict[tuple[str, str, str, str], int] = {}
        for row in self.rows:
            path = ".".join("*" if part.isdigit() else part for part in row.path.split("."))
            kind = (path, row.was, row.became if not row.why else "left", row.why)
            kinds[kind] = kinds.get(kind, 0) + 1
        lines = [(path, str(count), was, became, why) for (path, was, became, why), count in kinds.items()]
        table = Table(("module", "count", "was", "is now", "why"), lines, "\n".join(self.notes))
        return f"{self.model}: {len(self.replaced)} modules replaced, {len(self.left)} left\n{table!r}"
