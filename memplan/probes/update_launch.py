"""Starts the processes in which updates are compared: one, or with several ranks torchrun and one for each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, Any

from memplan.errors import MemplanError
from memplan.probes.faults import FactoryError, require

if TYPE_CHECKING:
    from collections.abc import Mapping

CHILD = "memplan.probes.updates"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--max-restarts", "0", "--nproc-per-node")
DEFAULT_LIMIT_S = 600.0


def compare_updates(
    *,
    name: str,
    config: Mapping[str, Any] | None,
    shape: Mapping[str, int],
    step: str | None = None,
    time_limit_s: float = DEFAULT_LIMIT_S,
) -> dict[str, Any]:
    """What `memplan.equivalence.runner.measuring.measure` found, in processes of their own.

    Args:
        name: Of the model, or ``package.module:factory``.
        config: Its config, of which a small model is made; None: `name` is a factory.
        shape: ``micro_batch_size``, ``accumulation``, ``ranks`` and ``seq_len``.
        step: The user's step function, ``package.module:function``.
        time_limit_s: After which the processes are ended.

    Raises:
        MemplanError: torch is not there, the module or the function raise, or the time is up.
    """
    require("torch")
    if config is not None:
        require("transformers")
    order = {"name": name, "config": None if config is None else dict(config), "shape": dict(shape), "step": step}
    with tempfile.TemporaryDirectory(prefix="memplan-") as folder:
        order_path, answer_path = os.path.join(folder, "order.json"), os.path.join(folder, "answer.json")
        with open(order_path, "w", encoding="utf-8") as file:
            json.dump(order, file)
        said = _run((CHILD, order_path, answer_path), shape["ranks"], time_limit_s)
        if not os.path.exists(answer_path):
            last = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "nothing was said")
            raise MemplanError(f"The processes ended without an answer: {last[:300]}.", "Try --gpus 1.")
        with open(answer_path, encoding="utf-8") as file:
            answer = json.load(file)
    if "fault" in answer:
        raise FactoryError(answer["fault"]["cause"], answer["fault"]["cure"])
    found: dict[str, Any] = answer["found"]
    return found


def _run(args: tuple[str, ...], ranks: int, time_limit_s: float) -> str:
    """What the processes said on stderr."""
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    prefix = (*TORCHRUN, str(ranks)) if ranks > 1 else ()
    command = (sys.executable, *prefix, "-m", *args)
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=environment,
    ) as process:
        try:
            return process.communicate(timeout=time_limit_s)[1]
        except subprocess.TimeoutExpired:
            raise MemplanError(
                f"The measurement was not done after {time_limit_s:g} s.",
                "Use a smaller module, or fewer micro-batches.",
            ) from None
        finally:
            if process.poll() is None:  # torchrun ends its ranks when it is told to end
                process.terminate()
