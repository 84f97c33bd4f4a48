"""From the logits of a student and of its teacher to the loss of distillation.

    JSD = beta KL(teacher || m) + (1 - beta) KL(student || m)      m = (1 - beta) student + beta teacher,  beta = 1/2

Each line of the formula is a tensor of all tokens by all words, and so is each intermediate of it: variables hold
eleven of them until the loss is there, seven of which are kept for the backward pass (two of those are one ``stack``).

Source: ``GKDTrainer.compute_loss`` and ``generalized_jsd_loss`` of TRL 1.16 (experimental/gkd/gkd_trainer.py) with the
sequences of the data (``lmbda=0``), its default ``beta`` and the temperature of 1 that ``compute_loss`` leaves as it is
(that of the config is the one of sampling).  The student runs, then the teacher without a graph, then the loss is
taken.  ``logsumexp`` is that of aten/src/ATen/native/ReduceOps.cpp.  Left out: what the kernels of sorting and indexing
need for a moment, a few numbers a token; the prompts, which the data collator hands out a second time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.errors import UsageError
from memplan.operators.elementwise import add, keeps_result, mul, neg, scale, sub
from memplan.operators.layout import take
from memplan.operators.losses import PREDICTING, divide, log_softmax
from memplan.operators.sizes import num_bytes
from memplan.operators.tape import Gradient, elements

if TYPE_CHECKING:
    from memplan.operators.tape import Tape, Tensor

TOKENS = ("b", "s")


def handed_out(t: Tape, logits: Tensor) -> Tensor:
    """Logits as accelerate hands them out: under autocast in fp32 (``convert_outputs_to_fp32``)."""
    return logits if t.numerics.autocast is None else t.cast(logits, "fp32")


def distillation_loss(t: Tape, logits: Tensor, labels: Tensor, num_items: Tensor) -> Tensor:
    """The loss of the student, which pauses for the teacher.

    `logits`: what it hands out; `labels`: whose tokens count; `num_items`: how many of them the whole step has.
    """
    if t.numerics.autocast is None and logits.dtype != t.numerics.parameters:
        raise UsageError(
            f"Logits of two dtypes are not modelled: the student's are in {logits.dtype}.",
            "Use a --precision with autocast.",
        )
    given = [] if t.batch.padded else [t.external("attention_mask", TOKENS, "int64", role="input")]
    t.pause()
    teacher = t.external("logits of the teacher", logits.shape, logits.dtype, role="buffer")
    before = (*PREDICTING, logits.shape[-1])
    student = scale(t, take(t, logits, before))
    scaled = scale(t, take(t, teacher, before))
    divergence, variables = _divergence(t, log_softmax(t, student), log_softmax(t, scaled))
    mask = t.op("ne", (labels,), PREDICTING, dtype="bool")
    labelled = masked(t, divergence, mask)
    loss = divide(t, t.op("sum", (labelled,), (), gradients=[Gradient(labelled, alias=True)]), num_items)
    t.keep_alive(logits, student, scaled, *variables, labelled, *given)
    return loss


def _divergence(t: Tape, student: Tensor, teacher: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The generalised Jensen-Shannon divergence of log-probabilities, and what variables hold to the end."""
    beta = t.op("tensor", (), (), dtype=student.dtype)
    mixture = logsumexp_of_two(
        t, add(t, student, _number(t, "log1p", neg(t, beta))), add(t, teacher, _number(t, "log", beta))
    )
    from_teacher, from_student = kl_div(t, mixture, teacher), kl_div(t, mixture, student)
    weighted = mul(t, beta, from_teacher), mul(t, _number(t, "rsub", beta), from_student)
    return add(t, *weighted), (beta, student, teacher, mixture, from_teacher, from_student)


def _number(t: Tape, name: str, x: Tensor) -> Tensor:
    """A function of a single number that needs no gradient."""
    return t.op(name, (x,), ())


def logsumexp_of_two(t: Tape, a: Tensor, b: Tensor) -> Tensor:
    """``torch.logsumexp(torch.stack([a, b]), dim=0)``: keeps the stack and its result.

    For a moment it holds the larger of both and the differences to it; its backward (logsumexp_backward in
    torch/csrc/autograd/FunctionsManual.cpp) the differences to its result and their exponentials.
    """
    stack = t.op("stack", (a, b), (2, *a.shape), gradients=[Gradient(a, alias=True), Gradient(b, alias=True)])
    return t.op(
        "logsumexp",
        (stack,),
        a.shape,
        keeps=(stack,),
        keeps_output=True,
        scratch=(a.bytes, stack.bytes),
        gradients=[Gradient(stack, scratch=(stack.bytes, stack.bytes))],
        flops=elements(stack).times(5),
        reason="the derivative of log-sum-exp needs its input and its result",
    )


def kl_div(t: Tape, x: Tensor, target: Tensor) -> Tensor:
    """``F.kl_div(x, target, reduction="none", log_target=True)``: ``exp(target) * (target - x)``."""
    difference = sub(t, target, x)
    return mul(t, keeps_result(t, "exp", target), difference)


def masked(t: Tape, x: Tensor, mask: Tensor) -> Tensor:
    """``x[mask]`` of a mask over the tokens: keeps the mask.

    Its backward writes a contiguous copy of the gradient, which ``sum`` shows from one number, into zeros
    (index_put_with_sort_kernel in aten/src/ATen/native/cuda/Indexing.cu).
    """
    shape = ("n", x.shape[-1])
    copied = num_bytes(shape, x.dtype)
    return t.op(
        "index",
        (x, mask),
        shape,
        keeps=(mask,),
        gradients=[Gradient(x)],
        backward_scratch=(copied,),
        reason="gradients go back to where the rows came from",
    )
