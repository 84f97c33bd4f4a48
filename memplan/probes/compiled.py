"""What does a module keep for the backward pass under ``torch.compile``?

The module runs once on tensors without numbers while AOTAutograd writes down forward and backward pass as one graph of
ATen operators, in the decompositions that inductor uses; inductor's partitioner cuts the graph in two
(``torch/_functorch/partitioners.py``, ``min_cut_rematerialization_partition``, with the settings of the installed
torch).  What the forward half hands to the backward half is what is kept; no kernel is generated, so that neither
inductor's order of the operators nor its buffers are known.

The tensors are fake ones on the CPU: autograd has no fake CUDA without a GPU, and on the meta device the operators of
the loss lose their gradients.  Inside, operators are CUDA's (see `semantics`), and transformers is told that it is
compiled: it then asks no questions about data, and makes an attention mask in place of ``is_causal``.

Left out: graph breaks (the module is one graph here), inductor's passes over the joint graph, strides that it pads.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from typing import TYPE_CHECKING, Any
from unittest import mock

from memplan.errors import MemplanError, UsageError
from memplan.estimation.compiled import UNMODELLED, Range, least_peak, range_of
from memplan.operators.sizes import allocated
from memplan.probes.faults import TraceError, explain, require
from memplan.specs.training import PRECISIONS
from memplan.specs.values import NamedTuple, replace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch

    from memplan.estimation.estimate import Estimate
    from memplan.probes.autocast import CudaAutocast
    from memplan.probes.events import Trace
    from memplan.probes.models import Built, TracedModel
    from memplan.specs.training import Setup

ASKED = ("is_torchdynamo_compiling", "is_torchdynamo_exporting", "is_tracing")
"""What transformers asks; torch before 2.14 says under ``torch.compile`` that it exports, too."""

GRAPH_BREAKS = ("graph breaks", "the module was written down as one graph; Dynamo may cut it, and keep more")

RESIDENT = ("parameter", "buffer", "input", "optimizer_state")
"""Categories of what is there all the time."""


class Saved(NamedTuple):
    """A tensor that the compiled forward hands to the compiled backward."""

    operator: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int


def compiled_activations(
    model: TracedModel | Mapping[str, Any],
    setup: Setup,
    *,
    sdpa_kernel: str | None = None,
    compute_capability: tuple[int, int] | None = None,
) -> tuple[Saved, ...]:
    """The tensors that the module keeps under ``torch.compile``, parameters and inputs not.

    Args:
        model: As for `memplan.probes.trace.trace_training`.
        setup: The configuration.
        sdpa_kernel: Overrules the kernel that CUDA would choose.
        compute_capability: Of the GPU whose choice that is; (8, 0) if None.

    Raises:
        MissingLibraryError: torch or transformers is not installed.
        TraceError: the module cannot be written down as one graph.
    """
    require("torch")
    from collections.abc import Mapping as AnyMapping

    from memplan.probes.models import transformers_model

    chosen = transformers_model(model) if isinstance(model, AnyMapping) else model
    try:
        return _partitioned(chosen, setup, sdpa_kernel, compute_capability)
    except MemplanError:
        raise
    except (Exception, SystemExit) as error:
        fault = explain(error, "", "")
        raise TraceError(
            f"AOTAutograd cannot write {chosen.name} down as one graph: {fault.cause}",
            "Leave --compile out to trace it as it runs without a compiler.",
        ) from error


def check(setup: Setup) -> None:
    """Raise `UsageError` for what cannot be traced together with ``torch.compile``."""
    if setup.activation_checkpointing != "none":
        raise UsageError(
            "What a compiler makes of checkpointed layers is not traced.",
            "Leave --checkpointing out, or ask memplan estimate.",
        )
    if setup.gradient_accumulation_steps > 1 or setup.evaluation is not None:
        raise UsageError(
            "Under torch.compile one micro-step is traced.",
            "Leave --accumulation and --eval-... out, or ask memplan estimate.",
        )


def compiled_estimate(answer: Estimate, trace: Trace, saved: Sequence[Saved]) -> Estimate:
    """What a trace without the compiler says, with what the compiler keeps: peaks become the upper end of a range."""
    kept = sum(allocated(one.num_bytes) for one in saved)
    low = least_peak(
        sum(trace.category_bytes(kind) for kind in RESIDENT),
        trace.category_bytes("gradient"),
        kept,
        {one.name: one.allocated_bytes for one in answer.instants},
        accumulates=False,
    )
    return replace(
        answer,
        kept_activation_bytes=kept,
        kept_activation_bytes_per_layer=0,
        compiled=range_of(Range(kept, kept), low, answer.memory, is_traced=True),
        unmodelled=(*answer.unmodelled, *UNMODELLED, GRAPH_BREAKS),
    )


def _partitioned(
    model: TracedModel, setup: Setup, sdpa_kernel: str | None, compute_capability: tuple[int, int] | None
) -> tuple[Saved, ...]:
    import torch
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._pytree import tree_map_only

    from memplan.probes.autocast import CudaAutocast
    from memplan.probes.models import PARAMETER_DTYPES
    from memplan.probes.semantics import cuda_semantics

    lower = PRECISIONS[setup.precision][1]
    autocast = CudaAutocast(PARAMETER_DTYPES[lower]) if lower else None
    found: list[Saved] = []

    def partition(graph: Any, inputs: Sequence[Any], *, num_fwd_outputs: int, **settings: Any) -> Any:
        halves = min_cut_rematerialization_partition(
            graph, inputs, compiler="inductor", num_fwd_outputs=num_fwd_outputs, **settings
        )
        found.extend(_saved(halves[0], num_fwd_outputs))
        return halves

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = model.build(setup)
    module = built.module.train()
    fake = FakeTensorMode(allow_non_fake_inputs=True)  # of constants in the code of a module
    with fake, torch.device("cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        named = (*module.named_parameters(), *module.named_buffers())
        tensors = {name: _on_cpu(tensor) for name, tensor in named}
        inputs = tree_map_only(torch.Tensor, _on_cpu, _inputs(built, setup))
        compiled = aot_function(
            _forward(built, autocast),
            fw_compiler=_as_it_is,
            bw_compiler=_as_it_is,
            partition_fn=partition,
            decompositions=select_decomp_table(),
        )
        cuda = cuda_semantics(autocast=autocast, sdpa_kernel=sdpa_kernel, compute_capability=compute_capability)
        with cuda, _told_it_is_compiled():
            compiled(tensors, inputs)
    return tuple(found)


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor like one of the meta device."""
    import torch

    like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return like.requires_grad_(tensor.requires_grad)


def _as_it_is(gm: Any, example_inputs: Sequence[Any]) -> Any:
    """A graph runs as AOTAutograd wrote it down."""
    from torch._functorch._aot_autograd.utils import make_boxed_func

    return make_boxed_func(gm)


def _inputs(built: Built, setup: Setup) -> dict[str, Any]:
    """What the Trainer gives the module."""
    import torch

    from memplan.probes.training import accepts_num_items, padding_mask

    inputs = built.make_inputs(setup.micro_batch_size, setup.seq_len)
    if not isinstance(inputs, dict):
        inputs = {"": inputs}
    if setup.padding and "attention_mask" not in inputs:
        inputs["attention_mask"] = padding_mask(inputs["input_ids"])
    if accepts_num_items(built.module):
        inputs["num_items_in_batch"] = torch.full((), setup.tokens_per_micro_batch)
    return inputs


def _forward(built: Built, autocast: CudaAutocast | None) -> Callable[[Any, Any], Any]:
    """The forward pass as a function of all its tensors; its outputs, the loss first."""
    import torch
    from torch.func import functional_call

    from memplan.probes.training import find_loss

    def forward(tensors: dict[str, Any], inputs: dict[str, Any]) -> Any:
        given = inputs.get("")
        with autocast.region() if autocast else contextlib.nullcontext():
            if given is None:
                outputs = functional_call(built.module, tensors, kwargs=inputs)
            else:
                outputs = functional_call(built.module, tensors, given)
        loss = find_loss(outputs, built.loss_of)
        handed = list(outputs.values()) if isinstance(outputs, dict) else [outputs]
        return (loss, *(x for x in handed if isinstance(x, torch.Tensor) and x is not loss))

    return forward


@contextlib.contextmanager
def _told_it_is_compiled() -> Iterator[None]:
    """Inside, transformers takes the paths that it takes under ``torch.compile``."""
    with contextlib.ExitStack() as stack:
        for path, module in list(sys.modules.items()):
            for name in ASKED:
                if path.startswith("transformers.") and name in getattr(module, "__dict__", {}):
                    stack.enter_context(mock.patch.object(module, name, lambda *_: True))
        yield


def _saved(forward: Any, num_outputs: int) -> Iterator[Saved]:
    """What a forward graph returns beside its own outputs, each storage once, those of its inputs not."""
    import torch

    from memplan.probes.recorder import dtype_name

    seen = set()
    for node in forward.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, torch.Tensor):
            seen.add(value.untyped_storage()._cdata)
    (outputs,) = forward.graph.output_node().args
    for node in outputs[num_outputs:]:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.untyped_storage()._cdata not in seen:
            storage = value.untyped_storage()
            seen.add(storage._cdata)
            name = getattr(node.target, "__name__", str(node.target))
            yield Saved(name, tuple(value.shape), dtype_name(value.dtype), storage.nbytes())
