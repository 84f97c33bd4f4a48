"""What can go wrong with a real module, as faults with a cause and a cure."""

from __future__ import annotations

import logging
from importlib import import_module

from memplan.errors import MemplanError


class FactoryError(MemplanError):
    """``package.module:factory`` cannot be imported, raises, or does not return what it should."""


class TraceError(MemplanError):
    """The module cannot be followed without its data or without a GPU; the message names operator and module."""


class MissingLibraryError(MemplanError):
    """A library that only some questions need is not installed."""


MOST_OF_A_MESSAGE = 300
"""Characters of an error of another library that are repeated."""


def clipped(text: str) -> str:
    """`text`, cut where it is long."""
    return text if len(text) <= MOST_OF_A_MESSAGE else f"{text[:MOST_OF_A_MESSAGE].rstrip()} ..."


EXIT_CURE = "Nothing in it may end the process: guard a script with if __name__ == '__main__'."
"""Of code that calls ``sys.exit``."""

EXTRA_BY_LIBRARY = {"torch": "torch", "transformers": "hf", "peft": "hf"}
"""Library -> the optional dependency of memplan that brings it."""


def require(library: str) -> None:
    """Raise `MissingLibraryError` unless `library` can be imported."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # others import it, and it speaks of kernels for CPUs
    try:
        import_module(library)
    except ImportError as error:
        raise MissingLibraryError(
            f"This needs {library}, which cannot be imported ({error}).",
            f"Install it with: pip install {_requirement(library)}",
        ) from error


def _requirement(library: str) -> str:
    extra = EXTRA_BY_LIBRARY.get(library)
    return f"'memplan[{extra}]'" if extra else library


def explain(error: BaseException, op: str, module: str) -> TraceError:
    """The fault behind an exception that a step raised in operator `op` of `module` (either may be unknown)."""
    text = " ".join(str(error).split())
    place = " of ".join(x for x in (op, repr(module) if module else "") if x)
    cause = f"{type(error).__name__}{f' in {place}' if place else ''}: {text[:400]}"
    return TraceError(cause if cause.endswith((".", "!", "?")) else f"{cause}.", _cure(error, text))


def _cure(error: BaseException, text: str) -> str:
    if isinstance(error, SystemExit):
        return EXIT_CURE
    if "no fake impl or Meta kernel" in text or "meta kernel" in text.lower():
        return "Register how the operator shapes its result: torch.library.register_fake(...)."
    if "CUDA" in text or "NVIDIA" in text:
        return "Leave the device to memplan: no .cuda() or .to('cuda') in the module, take it from a parameter."
    if "meta tensor" in text.lower() or "data-independent" in text:
        return "A trace has shapes but no numbers: keep data-dependent Python out of the training step."
    if isinstance(error, TypeError) and ("input_ids" in text or "labels" in text):
        return "A module alone is called with input_ids and labels: return (module, inputs, loss) for other inputs."
    if isinstance(error, TypeError):
        return "Check that the inputs have the names and the number that forward() takes."
    if any(word in text for word in ("shape", "size", "dtype", "dim")):
        return "Check that the shapes and dtypes of the inputs are those that the module takes."
    return "Check that a training step of the module runs with real numbers, on a CPU with small sizes."
