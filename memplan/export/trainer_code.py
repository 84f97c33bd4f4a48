"""A plan as Python to be pasted: how the model is loaded, and the arguments of its trainer.

The same facts as in the line of `memplan.report.plan.trainer_line`, a line an argument.  Left out: data, output folders
and whatever does not change the memory.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from memplan.export.trainer import CONFIG_BY_OBJECTIVE, CONFIG_OF_SFT, OF_TRANSFORMERS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    Document = Mapping[str, Any]

CLASS_BY_TASK = {"causal-lm": "AutoModelForCausalLM", "masked-lm": "AutoModelForMaskedLM"}
CLASS_BY_OBJECTIVE = {
    "reward": "AutoModelForSequenceClassification",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
}
OF_SENTENCES = CONFIG_BY_OBJECTIVE["contrastive"]
EXPERIMENTAL = {"ORPOConfig": "trl.experimental.orpo", "GKDConfig": "trl.experimental.gkd"}
"""Where TRL 1.16 keeps the arguments that are not in its main module."""


def trainer_code(plan: Document) -> str:
    """The Python of the best plan; empty where no trainer takes it, or how it is loaded is the user's."""
    trainer = plan["trainer"]
    if not plan["best"] or not trainer or not plan["model"]["attentions"] or trainer["config"] == OF_SENTENCES:
        return ""
    arguments = _call("args", trainer["config"], trainer["arguments"])
    return "\n".join([*_imports(plan), "", *_model(plan), *arguments])


def _imports(plan: Document) -> Iterator[str]:
    trainer = plan["trainer"]
    config = trainer["config"]
    yield from model_imports(
        plan, adapts=trainer["adapters_as_base"], names=[config] if config in OF_TRANSFORMERS else []
    )
    if config not in OF_TRANSFORMERS:
        versions = f"  # {trainer['versions']}" if config == CONFIG_OF_SFT and trainer["versions"] else ""
        yield f"from {EXPERIMENTAL.get(config, 'trl')} import {config}{versions}"


def model_imports(plan: Document, *, adapts: bool, names: Sequence[str] = ()) -> Iterator[str]:
    """What `loading` and adapters need; `adapts`: they are put into the model here; `names`: more of transformers."""
    trainer = plan["trainer"]
    if trainer["lora"]:
        functions = ["LoraConfig"]
        functions += ["get_peft_model"] if adapts else []
        functions += ["prepare_model_for_kbit_training"] if trainer["upcast"] else []
        yield f"from peft import {', '.join(functions)}"
    known = [_model_class(plan), *names, *(["BitsAndBytesConfig"] if trainer["quantization"] else [])]
    yield f"from transformers import {', '.join(sorted(known))}"


def _model_class(plan: Document) -> str:
    objective = plan["best"]["setup"]["objective"]
    return CLASS_BY_OBJECTIVE.get(objective) or CLASS_BY_TASK.get(plan["model"]["task"], "AutoModel")


def _model(plan: Document) -> Iterator[str]:
    trainer = plan["trainer"]
    yield from loading(plan)
    if trainer["dropout"] is not None:
        yield f"# every dropout of its config at {trainer['dropout']:g}"
    if trainer["upcast"]:
        yield "model = prepare_model_for_kbit_training(model)"
    if trainer["lora"]:
        yield from _call("adapters", "LoraConfig", trainer["lora"])
        if trainer["adapters_as_base"]:
            yield "model = get_peft_model(model, adapters, autocast_adapter_dtype=False)"
        else:
            yield "# for the trainer's peft_config, or get_peft_model(model, adapters)"


def loading(plan: Document, **given: str) -> Iterator[str]:
    """The lines that load the model; `given`: more arguments, by the names of variables."""
    trainer, objective = plan["trainer"], plan["best"]["setup"]["objective"]
    loaded: dict[str, Any] = {"dtype": trainer["dtype"], "attn_implementation": trainer["attn_implementation"]}
    loaded |= {"num_labels": 1} if objective == "reward" else {}
    if trainer["quantization"]:
        yield from _call("quantization", "BitsAndBytesConfig", trainer["quantization"])
        given = {**given, "quantization_config": "quantization"}
    lines = [f"    {pretrained(plan)!r},", *_lines(loaded), *(f"    {name}={of}," for name, of in given.items())]
    yield from (f"model = {_model_class(plan)}.from_pretrained(", *lines, ")")


def pretrained(plan: Document) -> str:
    """What from_pretrained is told: a hub id, or the folder of a config.json."""
    name = str(plan["model"]["name"])
    folder, file = os.path.split(name)
    return (folder or ".") if file == "config.json" else name


def adapting(plan: Document) -> Iterator[str]:
    """The lines that put adapters into the model; none where it has none."""
    trainer = plan["trainer"]
    if trainer["upcast"]:
        yield "model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)"
    if trainer["lora"]:
        yield from _call("adapters", "LoraConfig", trainer["lora"])
        as_base = ", autocast_adapter_dtype=False" if trainer["adapters_as_base"] else ""
        yield f"model = get_peft_model(model, adapters{as_base})"


def _call(name: str, of: str, given: Document) -> Iterator[str]:
    yield from (f"{name} = {of}(", *_lines(given), ")")


def _lines(given: Document) -> list[str]:
    return [f"    {name}={value!r}," for name, value in given.items()]
