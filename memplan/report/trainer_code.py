"""A plan as Python to be pasted: how the model is loaded, and the arguments of its trainer.

The same facts as in the line of `memplan.report.plan.trainer_line`, a line an argument.  Left out: data, output folders
and whatever does not change the memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.report.trainer import CONFIG_BY_OBJECTIVE, CONFIG_OF_SFT, OF_TRANSFORMERS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

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
    return "\n".join([*_imports(plan), "", *_model(plan), *_arguments("args", trainer["config"], trainer["arguments"])])


def _imports(plan: Document) -> Iterator[str]:
    trainer = plan["trainer"]
    config = trainer["config"]
    names = [_model_class(plan)]
    names += ["BitsAndBytesConfig"] if trainer["quantization"] else []
    names += [config] if config in OF_TRANSFORMERS else []
    if trainer["lora"]:
        functions = ["LoraConfig"]
        functions += ["get_peft_model"] if trainer["adapters_as_base"] else []
        functions += ["prepare_model_for_kbit_training"] if trainer["upcast"] else []
        yield f"from peft import {', '.join(functions)}"
    yield f"from transformers import {', '.join(sorted(names))}"
    if config not in OF_TRANSFORMERS:
        versions = f"  # {trainer['versions']}" if config == CONFIG_OF_SFT and trainer["versions"] else ""
        yield f"from {EXPERIMENTAL.get(config, 'trl')} import {config}{versions}"


def _model_class(plan: Document) -> str:
    objective = plan["best"]["setup"]["objective"]
    return CLASS_BY_OBJECTIVE.get(objective) or CLASS_BY_TASK.get(plan["model"]["task"], "AutoModel")


def _model(plan: Document) -> Iterator[str]:
    trainer, objective = plan["trainer"], plan["best"]["setup"]["objective"]
    loaded: dict[str, Any] = {"dtype": trainer["dtype"], "attn_implementation": trainer["attn_implementation"]}
    loaded |= {"num_labels": 1} if objective == "reward" else {}
    if trainer["quantization"]:
        yield from _arguments("quantization", "BitsAndBytesConfig", trainer["quantization"])
    given = [f"    {plan['model']['name']!r},", *_lines(loaded)]
    given += ["    quantization_config=quantization,"] if trainer["quantization"] else []
    yield from (f"model = {_model_class(plan)}.from_pretrained(", *given, ")")
    if trainer["dropout"] is not None:
        yield f"# every dropout of its config at {trainer['dropout']:g}"
    if trainer["upcast"]:
        yield "model = prepare_model_for_kbit_training(model)"
    if trainer["lora"]:
        yield from _arguments("adapters", "LoraConfig", trainer["lora"])
        if trainer["adapters_as_base"]:
            yield "model = get_peft_model(model, adapters, autocast_adapter_dtype=False)"
        else:
            yield "# for the trainer's peft_config, or get_peft_model(model, adapters)"


def _arguments(name: str, of: str, given: Document) -> Iterator[str]:
    yield from (f"{name} = {of}(", *_lines(given), ")")


def _lines(given: Document) -> list[str]:
    return [f"    {name}={value!r}," for name, value in given.items()]
