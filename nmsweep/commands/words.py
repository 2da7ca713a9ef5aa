"""The words of a subcommand."""

from collections.abc import Sequence

from nmsweep.errors import InputError


def key_values(words: Sequence[str], allowed: Sequence[str]) -> dict[str, str]:
    """``key=value`` words of a subcommand."""
    found = {}
    for word in words:
        key, separator, value = (
            word.lstrip("-").replace("-", "_").partition("=") if "=" not in word else word.partition("=")
        )
        if not separator or key not in allowed:
            raise InputError(f"{word!r}: is not understood here; allowed: {', '.join(f'{name}=…' for name in allowed)}")
        found[key] = value
    return found
