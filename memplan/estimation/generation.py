"""How many bytes does it take to generate tokens behind a batch of prompts, during an evaluation?

As ``generate`` of transformers 5.23 does it, greedily (generation/utils.py: ``_prefill``, ``_sample``), with a
``DynamicCache`` (cache_utils.py): the prompts go through the model once and fill the cache, then one token after the
other does.  There is no graph, and the logits are those of the last token alone.

    prefill     layers so far: 2 b kv d s e bytes of keys and values each, and what a layer needs for s tokens
    decoding    2 b kv d e bytes a token and layer; the old keys of one layer are there until the new ones are

A layer with a window of w keeps the last w - 1 tokens as a view of the tensor that attention was given: of all s
tokens after the prefill, of w after a step.  The highest point is in the prefill, in the first step (where such layers
still hold the prompt) or in the last.

Left out: sampling, which sorts probabilities of (b, V), beams, prompts of varying length, and static caches; under
autocast the fp32 copies of the logits of (b, V), which come when autocast's copies of weights are gone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.errors import UsageError
from memplan.memory.events import Row, Sizes
from memplan.memory.lifetimes import PieceLifetimes
from memplan.memory.model_states import Tensors
from memplan.operators.sizes import Size, bind, num_bytes
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memplan.architectures.architecture import Architecture
    from memplan.estimation.step import Layout
    from memplan.specs.training import Setup

PREFILL = "prefill"
DECODING = "decoding"


def check_generation(architecture: Architecture, name: str, setup: Setup, new_tokens: int) -> None:
    """Raise `UsageError` where the model, known to the user as `name`, does not generate so many tokens."""
    prompt = setup.seq_len
    if architecture.task != "causal-lm":
        raise UsageError(
            f"{architecture.model_type} does not generate: it is trained on another task ({architecture.task}).",
            "Leave --eval-generate out.",
        )
    if architecture.cache_windows is None:
        raise UsageError(
            f"Generation is not modelled for {architecture.model_type}.",
            "Leave --eval-generate out; memplan trace runs it.",
        )
    if setup.objective != "lm":
        raise UsageError(
            f"Generation is not modelled beside --objective {setup.objective}.", "Leave --eval-generate out."
        )
    if setup.is_flattened:
        raise UsageError(
            "Generation is not modelled where sequences lie end to end.", "Leave --eval-generate out of this run."
        )
    if setup.padding:
        raise UsageError("Generation from padded prompts is not modelled.", "Leave --padding or --eval-generate out.")
    most = architecture.max_positions
    if most is not None and prompt + new_tokens > most:
        raise UsageError(
            f"{name} has positions for {most} tokens, not for {prompt} and {new_tokens} generated ones.",
            f"Use --seq-len {most - new_tokens} or fewer tokens." if most > new_tokens else "Generate fewer tokens.",
        )


class Stage(NamedTuple):
    """A forward pass of generation."""

    name: str
    layout: Layout
    sizes: Sizes
    variables: Tensors
    """What is there beside parameters, states, the cache and what the evaluation holds."""
    cache: Tensors
    """What the cache holds before it."""

    @property
    def held(self) -> Tensors:
        """All of it."""
        return Tensors((*self.variables.rows, *self.cache.rows))


class Generation:
    """The forward passes of a generation that can be the highest."""

    def __init__(self, layouts: dict[str, Layout], setup: Setup, new_tokens: int) -> None:
        """`layouts`: of the prefill and of a step, which differ where the tokens outgrow a window."""
        self.layouts = layouts
        self.setup = setup
        self.new_tokens = new_tokens

    def stages(self, batch: int) -> Iterator[Stage]:
        """Prefill, first step and last step, of a batch of so many prompts."""
        prompt = self.setup.seq_len
        yield self._stage(PREFILL, batch, prompt)
        steps = {prompt + 1, prompt + self.new_tokens - 1} if self.new_tokens > 1 else set()
        for length in sorted(steps):
            yield self._stage(DECODING, batch, length)

    def _stage(self, name: str, batch: int, length: int) -> Stage:
        layout = self.layouts[name]
        sizes = Sizes(bind_generation(layout.recording.architecture, batch, self.setup.seq_len, length))
        if name == PREFILL:
            return Stage(name, layout, sizes, Tensors(_ids()), Tensors(()))
        return Stage(name, layout, sizes, Tensors(_ids() + _last_token(layout)), Tensors(_cache(layout)))


def bind_generation(architecture: Architecture, batch: int, prompt: int, length: int) -> dict[str, int]:
    """The dimensions of the forward pass after which there are `length` tokens: the prefill, or a step.

    ``s`` are the tokens that go through it, ``l`` those that attention sees, ``l-1`` those that the cache had before;
    ``in w`` and ``before w`` the same of a layer with the window w; ``p`` is the prompt; ``[prefill]`` is 1 in the
    prefill and 0 in a step, ``[decoding]`` the other way round.
    """
    prefill = length == prompt
    new = prompt if prefill else 1
    env = bind(batch, new)
    env |= {"p": prompt, "l": length, "l-1": length - new}
    env |= {"[prefill]": int(prefill), "[decoding]": int(not prefill), "l[prefill]": length * prefill}
    for window in set(architecture.cache_windows or ()) - {None}:
        assert window is not None
        env[f"in {window}"] = length if prefill else min(length, window)
        env[f"before {window}"] = 0 if prefill else prompt if length == prompt + 1 else min(length - 1, window)
    for unused in {w + 1 for w in architecture.windows} - set(architecture.cache_windows or ()):
        env[f"in {unused}"] = length  # of a mask that no layer uses
    for name in [name for name in env if name == "l" or name.startswith("in ")]:
        rounded = -(-env[name] // 16) * 16
        env |= {f"{name} to 16": rounded, f"{name}[not 16s]": env[name] * (rounded != env[name])}
    return env


def _row(name: str, shape: tuple[str | int, ...], dtype: str, reason: str) -> tuple[Row, Size, int]:
    return Row("generate", name, "temporary", shape, dtype, reason), num_bytes(shape, dtype), 1


def _ids() -> tuple[tuple[Row, Size, int], ...]:
    """Ids and positions of all tokens so far, those that go through the model, and which sequences are unfinished."""
    source = "variables of _sample (transformers/generation/utils.py)"
    return (
        _row("input_ids", ("b", "l"), "int64", source),
        _row("position_ids", ("b", "l"), "int64", source),
        _row("unfinished_sequences", ("b",), "int64", source),
        _row("whether prompts end in padding", ("[b>1]",), "bool", "a variable of generate"),
    )


def _cache(layout: Layout) -> tuple[tuple[Row, Size, int], ...]:
    """What the cache holds before a step."""
    recording = layout.recording
    return tuple(
        (PieceLifetimes(piece).row(s), s.size, recording.order.count(kind))
        for kind, piece in enumerate(recording.kinds)
        for s in piece.tape.storages
        if s.role == "cache"
    )


def _last_token(layout: Layout) -> tuple[tuple[Row, Size, int], ...]:
    """What variables hold of the step before: the logits that the token was chosen from, and the token."""
    vocab_size = layout.recording.architecture.vocab_size
    return (
        _row("next_token_logits", ("b", vocab_size), "fp32", "a variable of _sample until the next logits are there"),
        _row("next_tokens", ("b",), "int64", "a variable of _sample"),
        _row("input_ids of the step", ("b",), "int64", "an argument of the model"),
        _row("position_ids of the step", ("b",), "int64", "an argument of the model"),
        _row("position_ids of the prompt", ("b", "p"), "int64", "a variable of generate"),
    )
