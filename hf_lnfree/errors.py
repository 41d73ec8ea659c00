"""What users are told is wrong: what was given, what is allowed, what to do. Anything else that is raised is a defect.

Models raise `hf_lnfree.models.errors.ConfigurationError`, which travels with them, and a file or folder that cannot be
read or written is an OSError. All are ValueErrors but for that one.
"""

from collections.abc import Collection

SHOWN = 4


def listed(names: Collection[str]) -> str:
    """Names for an error or a warning: the first four, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(list(names)[:SHOWN]) + more


class LNFreeError(ValueError):
    """The base of the errors below."""


class SettingsError(LNFreeError):
    """An argument, a flag, or a field of a file has a value that is not allowed, or two do not go together."""


class DataError(LNFreeError):
    """A corpus, a tokenizer or tokenised windows cannot be used."""


class ModelError(LNFreeError):
    """A model or checkpoint is damaged, not of the kind that is needed, or cannot become what is asked for."""


class AttentionError(LNFreeError):
    """An attention call, its mask or its map cannot be read."""


class RunError(LNFreeError):
    """The folder of a run, a study or a report holds something else than what is needed."""
