"""The text of `memplan same-update`: the equation, what was measured and why, the weights of tokens, the advice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.report.ansi import Line
from memplan.report.layout import plural, wrap
from memplan.report.text import paragraphs, table, title

if TYPE_CHECKING:
    from collections.abc import Iterator

    Document = dict[str, Any]

WINDOWS = {"own": "right", "full": "too small"}
"""By whose number of micro-batches a short last step is divided -> what that makes of it."""

WEIGHT_COLUMNS = ("batches of", "n_i", "least", "5 %", "median", "95 %", "most", "spread", "share")
LABEL_BY_BATCHING = {"rows": "sequences", "grouped": "sequences, grouped"}
WORDS_BY_BATCHING = {
    "rows": "in random order, padded or end to end",
    "grouped": "those of about the same length come together, as transformers sorts them",
}
MANY_TIMES = 100
"""From here on the weight of a token has no decimals."""

ADVICE = "Learning rate (advice; nothing is applied)"
EQUATION = (
    "whole batch    gradient of  (sum of all losses) / N,   N tokens with a loss",
    "accumulated    gradient of  sum over micro-batches of  L_i / N       the same",
    "naive average  gradient of  mean over micro-batches of L_i / n_i     a token",
    "               weighs mean(n) / n_i: more in a micro-batch of few tokens",
)


def render_update(document: Document, *, quiet: bool = False) -> list[Line]:
    """The text of a document; `quiet`: the verdict alone."""
    if quiet:
        return list(_verdict(document))
    return [
        *_about(document),
        *_verdict(document),
        *_equation(),
        *_steps(document),
        *_weights(document),
        *_advice(document["advice"]),
        *_worth_knowing(document),
    ]


def _about(document: Document) -> Iterator[Line]:
    return paragraphs(about(document))


def about(document: Document) -> Iterator[tuple[str, str]]:
    """What was measured, as labels and texts."""
    model, setup, measured = document["model"], document["setup"], document["measured"]
    what = "a small one of its family" if model["is_small"] else "as the factory makes it"
    text = f"{model['name']}: {what}, {plural(model['num_parameters'], 'parameter')}, its loss a mean over "
    yield "model", f"{text}{model['mean_over']}"
    if model["origin"] not in {"", "as asked for"}:
        yield "", f"None was named: this is {model['origin']}."
    yield "setup", f"{_split(setup)} = {plural(setup['global_batch_size'], 'sequence')} per step"
    smaller = "" if _split(setup) == _split(measured) else f"{_split(measured)}, "
    yield "measured", f"{smaller}{measured['seq_len']} tokens a sequence, fp32 on the CPU, without dropout"


def _split(setup: Document) -> str:
    return (
        f"micro {setup['micro_batch_size']:,} x accumulation {setup['gradient_accumulation_steps']:,} x "
        f"{plural(setup['data_parallel_size'], 'rank')}"
    )


def _verdict(document: Document) -> Iterator[Line]:
    headline, *causes = verdict(document)
    yield from title(headline, "good" if document["is_same"] else "bad")
    for cause in causes:
        yield from _item(cause)


def verdict(document: Document) -> list[str]:
    """Whether it is the same update, and each cause where it is not."""
    judged = document["steps"][-1]
    if document["is_same"]:
        error = max(one["error"] for one in judged["windows"])
        return [f"The same update: {judged['title']} is off by {error:.0e}, which is rounding"]
    causes = [*document["subject"]["causes"], *judged["causes"]]
    return [f"Not the same update: {', '.join(one['kind'] for one in causes)}", *(cause["says"] for cause in causes)]


def _item(text: str) -> Iterator[Line]:
    for line in wrap(text, first="  - "):
        yield Line(line)


def _equation() -> Iterator[Line]:
    yield from title("The mathematics")
    for line in EQUATION:
        yield Line(f"  {line}")


def _steps(document: Document) -> Iterator[Line]:
    yield from title("Relative error of the gradient")
    yield from table(step_rows(document), left=(0, 4), shrink=4, keep_end=False)
    for note in step_notes(document):
        yield from _item(note)


def step_rows(document: Document) -> list[tuple[str, ...]]:
    """How far each way to step is from the whole batch, the names of the columns first."""
    rows: list[tuple[str, ...]] = [("step", "full steps", "short one", "scale", "what it is")]
    subject = document["subject"]
    rows.append(("(the model, cut)", _error(subject["error"]), "", "", _what(subject)))
    for step in document["steps"]:
        full = step["windows"][:2]
        last = step["windows"][2:]
        ratio = full[0]["ratio"]
        rows.append(
            (
                step["title"],
                _error(max((one["error"] for one in full if one["error"] is not None), default=None)),
                _error(last[0]["error"]) if last else "",
                "" if ratio is None else f"x {ratio:.3g}",
                _what(step),
            )
        )
    return rows


def step_notes(document: Document) -> Iterator[str]:
    """Why the steps differ that are not judged, and what else there is to say of each."""
    for step in document["steps"][:-1]:
        yield from (f"{step['title']}: {cause['says']}" for cause in step["causes"])
    for step in document["steps"]:
        yield from (f"{step['title']}: {note}" for note in step["notes"])


def _error(error: float | None) -> str:
    return "nan" if error is None else f"{error:.1e}"


def _what(of: Document) -> str:
    if of["is_same"]:
        return "the same"
    kinds = [one["kind"] for one in of["causes"]]
    more = f" and {len(kinds) - 1} more" if len(kinds) > 1 else ""
    return f"{kinds[0]}{more}"


def _weights(document: Document) -> Iterator[Line]:
    yield from title("What naive averaging would do to your data")
    if document["token_weights"] is not None:
        yield from table(weight_rows(document))
    first, *more = weight_words(document)
    yield from (Line(line) for line in wrap(first, first="  "))
    for sentence in more:
        yield from _item(sentence)


def weight_rows(document: Document) -> list[tuple[str, ...]]:
    """How much a token weighs for each way to make batches, the names of the columns first."""
    return [WEIGHT_COLUMNS, *map(_weight_row, document["token_weights"])]


def _weight_row(one: Document) -> tuple[str, ...]:
    weights, label = one["weights"], _label(one["batching"])
    if weights is None:
        return (label, *("-" for _ in WEIGHT_COLUMNS[1:]))
    numbers = (_weight(weights[key]) for key in ("smallest", "p5", "p50", "p95", "largest", "spread"))
    return (label, f"{weights['mean_tokens']:,.0f}", *numbers, f"{100 * weights['effective_share']:.0f} %")


def _weight(number: float) -> str:
    return f"{number:.2f}" if number < MANY_TIMES else f"{number:,.0f}"


def weight_words(document: Document) -> Iterator[str]:
    """The same in sentences."""
    ways = document["token_weights"]
    if ways is None:
        yield (
            "No data was given. Where all micro-batches have as many tokens with a loss, as packed rows of text "
            "without prompts nearly have, every token weighs 1; --data FILE says what yours do."
        )
        return
    yield (
        f"With {_split(document['setup'])}. n_i: tokens with a loss in a micro-batch, on average. Spread: how many "
        "times as much the 95th percentile of the tokens weighs as the 5th. Share: a step has the noise of one on so "
        "much of its tokens."
    )
    yield from (_about_batching(one) for one in ways)


def _label(batching: str) -> str:
    return LABEL_BY_BATCHING.get(batching, f"packed, {batching}")


def _about_batching(one: Document) -> str:
    """What there is to say of one way beside its numbers."""
    weights = one["weights"]
    how = WORDS_BY_BATCHING.get(one["batching"]) or f"rows of {one['row_tokens']:,} tokens"
    said = f"{_label(one['batching'])}: {how}"
    if weights is None:
        return f"{said}; {one['why_not']}."
    said = f"{said} ({plural(weights['num_steps'], 'step')} drawn)"
    if not weights["empty_share"]:
        return f"{said}."
    share = f"{100 * weights['empty_share']:.2g} % of the micro-batches have no token with a loss"
    return f"{said}. {share}: their mean is 0 / 0, and with it the step."


def _advice(advice: Document | None) -> Iterator[Line]:
    if advice is not None:
        yield from title(ADVICE)
        for sentence in advice_words(advice):
            yield from _item(sentence)


def advice_words(advice: Document) -> Iterator[str]:
    """What becomes of the learning rate where the batch changes, sentence by sentence."""
    if advice["ratio"] == 1:
        yield "The batch is as large as before: no change."
        return
    factor, ratio = advice["factor"], advice["ratio"]
    linear = f"linear x {advice['linear_factor']:.3g} (SGD; {advice['sources']['linear']})"
    root = f"square root x {advice['square_root_factor']:.3g} (Adam; {advice['sources']['square root']})"
    yield f"The batch is {ratio:.3g} times as large: {linear}, {root}."
    if factor is None:
        yield f"For {advice['optimizer']} {advice['source']}: try both, and what lies between."
    else:
        rate = advice["learning_rate"]
        new = "" if rate is None else f": {advice['previous_learning_rate']:.3g} becomes {rate:.3g}"
        yield f"For {advice['optimizer']} the {advice['rule']} rule, x {factor:.3g}{new}."
    if advice["betas"] is not None:
        betas = ", ".join(f"{beta:.4g}" for beta in advice["betas"])
        root_of = f"eps x {advice['square_root_factor'] ** -1:.3g}"
        yield f"The whole of that rule also has betas {betas} (of 0.9, 0.999) and {root_of}."
    steps = [f"{name.replace('_', ' ')} {advice[name]:,}" for name in ("warmup_steps", "total_steps") if advice[name]]
    if steps:
        yield f"For the same data: {', '.join(steps)}."
    yield f"Rules hold below the critical batch ({advice['limit']}); memplan.GradientNoise measures it while you train."


def _worth_knowing(document: Document) -> Iterator[Line]:
    if document["warning"]:
        yield from title("Worth knowing")
        yield from _item(f"{document['warning']}.")
    installed = [one for one in document["trainers"] if one["installed"]]
    if installed:
        yield from title("Your trainers (all: --trainer)")
        yield from _trainer_table(installed)


def render_trainers(document: Document) -> list[Line]:
    """The table of all trainers, with what else there is to know of each."""
    trainers = document["trainers"]
    lines = [*title("What trainers do by default"), *_trainer_table(trainers)]
    for one in trainers:
        lines += title(", ".join(filter(None, (one["trainer"], one["versions"]))))
        lines += [Line(line) for line in wrap(one["says"], first="  ")]
        read = "its source was not read" if one["checked"] == "not read" else f"read: {one['checked']}"
        lines += [Line(line, "faint") for line in wrap(f"{one['source']} ({read})", first="  ")]
    return lines[1:]


def _trainer_table(trainers: list[Document]) -> Iterator[Line]:
    yield from table(trainer_rows(trainers), left=(0, 1, 2, 3, 4))


def trainer_rows(trainers: list[Document]) -> list[tuple[str, ...]]:
    """What trainers do by default, the names of the columns first."""
    rows: list[tuple[str, ...]] = [("trainer", "installed", "a token weighs", "over ranks", "last step")]
    rows += [
        (one["trainer"], one["installed"] or "-", one["tokens"], one["ranks"], WINDOWS[one["window"]])
        for one in trainers
    ]
    return rows
