"""Which layers get adapters, and of which ranks: as they are said, worked out by hand, and refused."""

from __future__ import annotations

from typing import Any

import pytest

from memplan.architectures.registry import read_architecture
from memplan.errors import UsageError
from memplan.estimation.estimate import Estimator
from memplan.export.trainer import trainer_arguments
from memplan.specs.adapter import Lora, lora_record
from memplan.specs.choices import setup_fields
from memplan.specs.conversions import converted
from memplan.specs.ranks import as_layers, as_ranks, in_ranges
from memplan.specs.recipe import Recipe
from memplan.specs.training import Setup

WIDTH, INNER, NUM = 64, 128, 3
LLAMA = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "num_hidden_layers": NUM,
    "num_attention_heads": 2,
    "intermediate_size": INNER,
    "vocab_size": 100,
}
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 4}


def num_trained(config: dict[str, Any], **lora: Any) -> int:
    """Parameters of the adapters."""
    estimator = Estimator(read_architecture(config, "config"), "model")
    return estimator.program(Setup(seq_len=8, lora=Lora(**lora))).states.num_trained


@pytest.mark.parametrize(
    ("said", "numbers"),
    [("0", (0,)), ("3, 1", (1, 3)), ("0,2-4", (0, 2, 3, 4)), (" 1 - 2 ", (1, 2)), (2, (2,)), ([2, 0, 2], (0, 2))],
)
def test_layers(said: Any, numbers: tuple[int, ...]) -> None:
    assert as_layers("lora_layers", said) == numbers
    assert as_layers("lora_layers", in_ranges(numbers)) == numbers


@pytest.mark.parametrize("said", ["", "a", "1,", "-1", "3-1", "1--2", "1.5", "10000", True, -1, [], [True], [0.5], {}])
def test_what_are_no_layers(said: Any) -> None:
    with pytest.raises(UsageError, match="not numbers of layers"):
        as_layers("--lora-layers", said)


def test_ranks() -> None:
    found = (("down_proj", 8), (r"layers\.0\..*", 64))
    assert as_ranks("lora_ranks", r"down_proj=8, layers\.0\..*=64") == found
    assert as_ranks("lora_ranks", dict(found)) == found
    assert as_ranks("lora_ranks", found) == found
    assert as_ranks("lora_ranks", "a=b=8") == (("a=b", 8),)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("", "not names and ranks"),
        ("8", "not names and ranks"),
        ("=8", "not names and ranks"),
        ("(=8", "not names and ranks"),
        (["q_proj"], "not names and ranks"),
        ("q_proj", "not names and ranks"),
        ("q_proj=", "rank of LoRA is ''"),
        ("q_proj=0", "rank of LoRA is 0"),
        ({"q_proj": True}, "rank of LoRA is True"),
    ],
)
def test_what_are_no_ranks(said: Any, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        as_ranks("--lora-ranks", said)


def test_parameters_by_hand() -> None:
    """A and B have (in + out) numbers a rank; the first pattern that fits counts."""
    query, down = 2 * WIDTH, INNER + WIDTH
    both = {"targets": ("q_proj", "down_proj")}
    assert num_trained(LLAMA, rank=4, **both) == NUM * 4 * (query + down)
    assert num_trained(LLAMA, rank=4, layers=(0, 2), **both) == 2 * 4 * (query + down)
    assert num_trained(LLAMA, rank=4, ranks=(("down_proj", 7),), **both) == NUM * (4 * query + 7 * down)
    first = ((r"layers\.1\..*", 1), ("q_proj", 2))
    assert num_trained(LLAMA, rank=4, ranks=first, **both) == 2 * (2 * query + 4 * down) + query + down


def test_a_whole_path_stands_for_itself() -> None:
    """As with peft, it gets its adapter whatever layers are named."""
    path = "model.layers.0.self_attn.q_proj"
    assert num_trained(LLAMA, rank=4, targets=(path, "v_proj"), layers=(2,)) == 2 * 4 * 2 * WIDTH


def test_experts_by_hand() -> None:
    """All of them, and twice the rank for gate and up, which are one parameter; the router is a matrix."""
    of_expert = 8 * (WIDTH + 2 * INNER) + 4 * (INNER + WIDTH)
    of_attention = 4 * 4 * 2 * WIDTH
    router = 4 * (WIDTH + 4)
    assert num_trained(MIXTRAL, rank=4) == NUM * (4 * of_expert + of_attention + router)
    assert num_trained(MIXTRAL, rank=4, targets=("w2",), layers=(1,)) == NUM * 4 * 4 * (INNER + WIDTH)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"targets": ("w1",)}, "w1 and w3 are one parameter"),
        ({"dropout": 0.1}, "neither DoRA nor dropout"),
        ({"dora": True}, "neither DoRA nor dropout"),
    ],
)
def test_experts_that_peft_cannot_adapt(lora: dict[str, Any], said: str) -> None:
    recipe = Recipe(lora=Lora(rank=4, **lora))
    with pytest.raises(UsageError, match=said):
        converted(recipe, "mixtral")
    assert converted(recipe, "llama") == recipe


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"layers": (NUM,), "targets": ("q_proj",)}, r"--lora-layers 3: the model has no such layer. Known: 0-2."),
        ({"layers": (0,), "targets": ("embed_tokens",)}, "No layer of --lora-layers 0 has any embed_tokens"),
        ({"ranks": (("nope", 4),)}, "--lora-ranks nope: the model has nothing"),
        ({"targets": ("q_proj",), "ranks": (("v_proj", 4),)}, "--lora-ranks v_proj: the model has nothing"),
        ({"ranks": (("lm_head", 4),)}, "--lora-ranks lm_head: the model has nothing"),
    ],
)
def test_what_means_nothing(lora: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        num_trained(LLAMA, rank=4, **lora)


def test_a_name_of_a_layer_that_is_like_others() -> None:
    """GIVEN a rank that changes nothing, of a layer that is recorded as another one, THEN it is known all the same."""
    assert num_trained(LLAMA, rank=4, ranks=((r"layers\.2\..*", 4),)) == num_trained(LLAMA, rank=4)


def test_layers_do_not_go_with_all_linear() -> None:
    with pytest.raises(UsageError, match="layers_to_transform does not go with all-linear"):
        Lora(rank=4, layers=(0,))


def test_what_peft_is_told() -> None:
    fields = setup_fields({"lora_rank": 8, "lora_targets": "q_proj", "lora_layers": "0-1", "lora_ranks": "q_proj=4"})
    lora = fields["lora"]
    assert lora_record(lora)["layers"] == [0, 1]
    assert lora_record(lora)["ranks"] == {"q_proj": 4}
    found = trainer_arguments(Setup(seq_len=8, lora=lora))
    assert found is not None
    assert found["lora"]["layers_to_transform"] == [0, 1]
    assert found["lora"]["rank_pattern"] == {"q_proj": 4}
