"""What a module may have that does not let a batch be cut, and how it is switched off for an experiment.

BatchNorm is told to use its running statistics.  A balance loss is found by a coefficient: a number among the
attributes of a module, or of its config, whose name says so, and which is set to 0.  A name alone accuses nobody: the
error has to go.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.nn.modules.batchnorm import _BatchNorm

from memplan.equivalence.diagnosis import BALANCE_LOSS, BATCH_NORM

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn

COEFFICIENT = re.compile(
    r"(aux|balanc).*(coef|weight|alpha|scale|lambda|factor)|(coef|weight|alpha|lambda).*(aux|balanc)"
)


def suspects_of(module: nn.Module) -> list[str]:
    """Those that the module has."""
    found = [BATCH_NORM] if _norms(module) else []
    return [*found, BALANCE_LOSS] if _coefficients(module) else found


def _norms(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]


def _coefficients(module: nn.Module) -> list[tuple[Any, str]]:
    """(owner, name) of every coefficient of a balance loss that is not 0."""
    owners: list[Any] = [*module.modules()]
    owners += [part.config for part in owners if hasattr(getattr(part, "config", None), "__dict__")]
    owners += [one.text_config for one in owners if hasattr(getattr(one, "text_config", None), "__dict__")]
    unique = {id(owner): owner for owner in owners}
    return [
        (owner, name)
        for owner in unique.values()
        for name, value in vars(owner).items()
        if isinstance(value, float) and value and COEFFICIENT.search(name.lower())
    ]


@contextmanager
def switched_off(module: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """The module without some of its suspects."""
    names = set(names)
    norms = [part for part in _norms(module) if part.training] if BATCH_NORM in names else []
    coefficients = [(*one, getattr(*one)) for one in _coefficients(module)] if BALANCE_LOSS in names else []
    for norm in norms:
        norm.eval()
    for owner, name, _ in coefficients:
        setattr(owner, name, 0.0)
    try:
        yield
    finally:
        for norm in norms:
            norm.train()
        for owner, name, value in coefficients:
            setattr(owner, name, value)
