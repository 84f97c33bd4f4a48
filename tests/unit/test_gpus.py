"""The GPU catalogue: its facts, its names, and what `--gpu` understands."""

import pytest

from memplan.catalog import gpus, profiles
from memplan.catalog.gpus import parse_gpu, read_gpu, read_gpus, read_index
from memplan.catalog.profiles import profiles_dir, read_profile
from memplan.errors import MemplanError, UsageError
from memplan.specs.gpu import FLOPS_DTYPES, GpuSpec
from memplan.units import MIB

CARDS = [
    "a10",
    "a100-40gb",
    "a100-40gb-pcie",
    "a100-80gb",
    "a100-80gb-pcie",
    "a10g",
    "a30",
    "a40",
    "a5000",
    "a6000",
    "b200",
    "gh200",
    "h100",
    "h100-nvl",
    "h100-pcie",
    "h20",
    "h200",
    "l20",
    "l4",
    "l40s",
    "mi250x-gcd",
    "mi300x",
    "p100",
    "rtx3060",
    "rtx3080",
    "rtx3090",
    "rtx4060ti-16gb",
    "rtx4070",
    "rtx4080",
    "rtx4090",
    "rtx5090",
    "rtx6000-ada",
    "t4",
    "v100-16gb",
    "v100-16gb-pcie",
    "v100-32gb",
    "v100-32gb-pcie",
]

QUANTITIES = [
    "physical_bytes",
    "torch_bytes",
    "context_bytes",
    "memory_bandwidth_bytes_per_s",
    "link_bytes_per_s",
    "compute_capability",
]


def read_raw(name):
    return read_profile("gpus", f"{name}.toml")


# ---------------------------------------------------------------------------------------------------- the profiles


def test_the_catalogue_has_every_card():
    """The catalogue is these cards, and the index lists the same ones."""
    assert list(read_gpus()) == CARDS
    assert sorted(read_profile("gpus", "index.toml")) == CARDS


@pytest.mark.parametrize("name", CARDS)
def test_every_number_has_a_source_beside_it(name):
    """A number is a value with somebody who says so."""
    profile = read_raw(name)
    rates = profile.get("flops_per_s", {})
    numbers = {key: profile[key] for key in (*QUANTITIES, "label_bytes") if key in profile} | rates
    for entry in numbers.values():
        assert sorted(entry) == ["source", "value"]
        assert len(entry["source"]) >= 5


@pytest.mark.parametrize("name", CARDS)
def test_every_number_is_given_or_listed_as_missing(name):
    """What nobody was found to say is named as missing, never guessed; what the chip cannot do is neither."""
    profile = read_raw(name)
    rates = profile.get("flops_per_s", {})
    unknown = [key for key in QUANTITIES if key not in profile]
    unknown += [
        f"flops_per_s.{dtype}"
        for dtype in FLOPS_DTYPES
        if dtype not in rates and dtype not in profile["unsupported_dtypes"]
    ]
    assert profile["missing"] == unknown


@pytest.mark.parametrize("name", CARDS)
def test_a_profile_is_what_its_file_name_says(name):
    """The file's name is the id, so that one look-up opens one file."""
    assert read_gpu(name).name == name


@pytest.mark.parametrize("name", CARDS)
def test_the_index_agrees_with_the_profile(name):
    """The index repeats aliases and label so that a look-up need not open every profile; it must not drift."""
    card = read_profile("gpus", "index.toml")[name]
    spec = read_gpu(name)
    assert tuple(card["aliases"]) == spec.aliases
    assert card["label_gb"] * 10**9 == spec.label_bytes
    assert card["usable_bytes"] == spec.usable_bytes


def test_no_two_cards_share_a_name():
    """An id or alias stands for one card, however it is spelt."""
    names = [gpus._fold(name) for card in read_gpus().values() for name in (card.name, *card.aliases)]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("name", CARDS)
def test_the_numbers_of_a_card_are_of_one_order(name):
    """A slipped power of ten or a swapped unit shows against the label and among the rates.

    Most labels are binary in truth (12 GB = 12 GiB), which is 7.4 % above; ECC and the driver take up to 8 % off.
    """
    card = read_gpu(name)
    for size_bytes in (card.physical_bytes, card.torch_bytes):
        assert size_bytes is None or 0.92 <= size_bytes / card.label_bytes <= 1.10
    rates = [card.flops_per_s[dtype] for dtype in ("fp32", "tf32", "bf16", "fp8") if dtype in card.flops_per_s]
    assert rates == sorted(rates)
    assert all(5e12 < rate < 5e15 for rate in rates)
    assert card.memory_bandwidth_bytes_per_s is None or 1e11 < card.memory_bandwidth_bytes_per_s < 1e13
    assert card.link_bytes_per_s is None or 1e10 < card.link_bytes_per_s < 1e12
    assert card.context_bytes is None or 100 * MIB < card.context_bytes < 1000 * MIB


@pytest.mark.parametrize("name", CARDS)
def test_torch_sees_less_than_nvidia_smi_shows(name):
    """The driver keeps a part for itself.  The P100's two totals are of different drivers, 4 MiB apart."""
    card = read_gpu(name)
    if card.torch_bytes is not None and card.physical_bytes is not None:
        assert card.torch_bytes <= card.physical_bytes + (4 * MIB if name == "p100" else 0)


@pytest.mark.parametrize(
    ("name", "usable_bytes"),
    [
        ("rtx4090", 24_080 * MIB),
        ("rtx3090", 24_121 * MIB),
        ("rtx5090", 33_677_180_928),
        ("rtx6000-ada", 50_865_307_648),
        ("a100-40gb", 42_298_834_944),
        ("a10g", 23_686_744_637),  # 22.06 x 2^30 = 23,686,744,637.44
        ("h100", 81_081 * MIB),
        ("h200", 150_001_732_812),  # 139.7 x 2^30 = 150,001,732,812.8
        ("a30", 24_576 * MIB),  # torch's total is not known
    ],
)
def test_usable_bytes_are_the_published_ones(name, usable_bytes):
    """Usable is what torch sees, the least over drivers, and nvidia-smi's total where that is not known."""
    assert read_gpu(name).usable_bytes == usable_bytes


def test_the_rates_are_dense_ones():
    """Datasheets lead with sparse rates, twice these."""
    assert read_gpu("a100-80gb").flops_per_s == {"fp32": 19.5e12, "tf32": 156e12, "bf16": 312e12, "fp16": 312e12}
    assert read_gpu("h100").flops_per_s["bf16"] == 989e12
    assert read_gpu("rtx4090").flops_per_s["bf16"] == 165.15e12


def test_contexts_are_given_only_where_they_were_measured():
    """The bytes of a CUDA context are a measurement, so most cards have none."""
    contexts = {name: card.context_bytes for name, card in read_gpus().items() if card.context_bytes is not None}
    a100 = 504_658_657  # 0.47 x 2^30 = 504,658,657.28
    assert contexts == {
        "a100-40gb": a100,
        "a100-40gb-pcie": a100,
        "a100-80gb": a100,
        "a100-80gb-pcie": a100,
        "rtx4090": 392 * MIB,
        "rtx6000-ada": 426 * MIB,
        "t4": 147_718_144,  # 140.875 MiB
    }


# ---------------------------------------------------------------------------------------------------- the value


def test_usable_bytes_fall_back_from_torch_to_nvidia_smi_to_the_label():
    """The most telling size that is known counts, and the basis says which one it was."""
    sizes = {"torch_bytes": 22, "physical_bytes": 23, "label_bytes": 24}
    everything = GpuSpec(name="x", label="x", **sizes)
    assert (everything.usable_bytes, everything.total_bytes) == (22, 23)
    assert everything.usable_basis == "what torch sees as the card's total memory"
    del sizes["torch_bytes"]
    driver = GpuSpec(name="x", label="x", **sizes)
    assert (driver.usable_bytes, driver.total_bytes) == (23, 23)
    assert driver.usable_basis.startswith("the total nvidia-smi shows; what torch sees is not known")
    del sizes["physical_bytes"]
    box = GpuSpec(name="x", label="x", **sizes)
    assert (box.usable_bytes, box.total_bytes) == (24, 24)
    assert box.usable_basis == "the size on the card's label"


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({}, "has no size"),
        ({"label_bytes": 0}, "not positive"),
        ({"label_bytes": 24, "torch_bytes": -1}, "not positive"),
        ({"label_bytes": 24, "link_bytes_per_s": float("nan")}, "not positive"),
        ({"label_bytes": 24, "flops_per_s": {"bf16": 0.0}}, "not positive"),
        ({"label_bytes": 24, "flops_per_s": {"bfloat16": 1e12}}, "a rate for bfloat16"),
        ({"label_bytes": 24, "flops_per_s": {"fp8": 1e12}, "unsupported_dtypes": ("fp8",)}, "does not support it"),
    ],
)
def test_a_card_that_contradicts_itself_cannot_be_made(fields, why):
    """The laws of a card are checked where it is made."""
    with pytest.raises(MemplanError, match=why):
        GpuSpec(name="x", label="x", **fields)


def test_a_card_is_frozen_and_hashable():
    """A card is a value: it can be a key and cannot be changed."""
    card = read_gpu("t4")
    assert {card: 1}[read_gpu("t4")] == 1
    with pytest.raises(AttributeError):
        card.torch_bytes = 1


# ---------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("rtx4090", "rtx4090"),
        ("RTX4090", "rtx4090"),
        ("rtx-4090", "rtx4090"),
        ("RTX 4090", "rtx4090"),
        ("geforce rtx 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("4090", "rtx4090"),
        (" 4090 ", "rtx4090"),
        ("rtx4060ti-16gb", "rtx4060ti-16gb"),
        ("4060ti 16gb", "rtx4060ti-16gb"),
        ("Tesla T4", "t4"),
        ("tesla-t4", "t4"),
        ("Tesla V100-SXM2-16GB", "v100-16gb"),
        ("Tesla V100-PCIE-32GB", "v100-32gb-pcie"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000-ada"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb-pcie"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("h100-80gb", "h100"),
        ("h100_sxm", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("mi250x", "mi250x-gcd"),
        ("AMD Instinct MI300X VF", "mi300x"),
    ],
)
def test_a_card_is_found_by_any_of_its_names(text, name):
    """Id, alias and the driver's own name find the same card; case, blanks, hyphens and the brand do not matter."""
    assert read_gpu(text).name == name
    assert parse_gpu(text)[0] == 1
    assert parse_gpu(text)[1].name == name


def test_a_look_up_reads_no_more_files_than_it_must(monkeypatch):
    """An id opens its own profile; an alias the index and one profile; a size the index alone."""
    opened = []

    def read_and_note(*parts):
        opened.append(parts[-1])
        return read_profile(*parts)

    def read_index_and_note():
        opened.append("index.toml")
        return read_index()

    monkeypatch.setattr(gpus, "read_profile", read_and_note)
    monkeypatch.setattr(gpus, "read_index", read_index_and_note)
    for text, files in [
        ("rtx4090", ["rtx4090.toml"]),
        ("2xt4", ["t4.toml"]),
        ("rtx-4090", ["index.toml", "rtx4090.toml"]),
        ("24GB", ["index.toml"]),
    ]:
        opened.clear()
        parse_gpu(text)
        assert opened == files


# ---------------------------------------------------------------------------------------------------- --gpu


@pytest.mark.parametrize(
    ("text", "num_gpus", "name"),
    [
        ("2xa100-80gb", 2, "a100-80gb"),
        ("8 x H100", 8, "h100"),
        ("8XH100", 8, "h100"),
        ("1x4090", 1, "rtx4090"),
        ("4x24GB", 4, "24GB"),
        ("2xmi250x", 2, "mi250x-gcd"),
    ],
)
def test_a_leading_count_says_how_many(text, num_gpus, name):
    """`2xNAME` is two of them; the x inside a name is no count."""
    assert (parse_gpu(text)[0], parse_gpu(text)[1].name) == (num_gpus, name)


@pytest.mark.parametrize(
    ("text", "name", "usable_bytes", "basis"),
    [
        ("24GB", "24GB", 24_000_000_000, "24 x 10^9 bytes as typed"),
        ("24gib", "24GiB", 25_769_803_776, "24 x 2^30 bytes as typed"),
        ("1.5 GiB", "1.5GiB", 1_610_612_736, "1.5 x 2^30 bytes as typed"),
    ],
)
def test_a_size_is_a_card_of_which_only_the_size_is_known(text, name, usable_bytes, basis):
    """The bytes are those typed, no rate is made up, and the answer can say how the size was understood."""
    _, card = parse_gpu(text)
    assert (card.name, card.label, card.usable_bytes, card.usable_basis) == (name, name, usable_bytes, basis)
    assert (card.physical_bytes, card.torch_bytes, card.context_bytes, card.flops_per_s) == (None, None, None, {})


def test_a_size_names_the_cards_it_may_mean():
    """24 x 10^9 bytes is no card's exact size; the notes name those that are sold under it."""
    assert parse_gpu("24GB")[1].notes == (
        "Cards of about that size: rtx3090, rtx4090, a10, a30, a5000. "
        "Sold as about that size, with less than it to use: l4, a10g."
    )
    assert parse_gpu("3GB")[1].notes == ""


@pytest.mark.parametrize("text", ["24", "24G"])
def test_a_bare_number_is_refused_with_sizes_and_cards(text):
    """`--gpu 24` is answered with the two sizes it may mean and the cards that are sold as that."""
    with pytest.raises(UsageError) as caught:
        parse_gpu(text)
    assert caught.value.cure == (
        "Say 24GB (24 x 10^9 bytes) or 24GiB (24 x 2^30 bytes). "
        "Cards of about that size: rtx3090, rtx4090, l4, a10g, a10, a30, a5000."
    )


@pytest.mark.parametrize(
    ("text", "cause", "cure"),
    [
        ("banana", "No GPU is known by the name 'banana'", "Say a card that `memplan gpus` lists"),
        ("", "No GPU is known by the name ''", "Say a card"),
        ("nan", "No GPU is known", "Say a card"),
        ("index", "No GPU is known", "Say a card"),
        ("../gpus/t4", "No GPU is known", "Say a card"),
        ("t4.toml", "No GPU is known", "Say a card"),
        ("rtx4900", "No GPU is known by the name 'rtx4900'", "Did you mean rtx4090 or "),
        ("a100", "No GPU", "Did you mean a100-40gb or a100-40gb-pcie or a100-80gb or a100-80gb-pcie?"),
        ("rtx4060ti", "No GPU", "Did you mean rtx4060ti-16gb? Any other card can be given as a size"),
        (
            "2080ti",
            "No GPU is known by the name '2080ti'",
            "Any other card can be given as a size such as 24GB or 24GiB.",
        ),
        ("3060-8gb", "No GPU is known by the name '3060-8gb'", "as a size"),
        ("2x2xt4", "No GPU is known by the name '2xt4'", "t4"),
        ("0xrtx4090", "The number of GPUs in '0xrtx4090' is 0", "Say a whole number from 1 to 1048576"),
        ("-1x24GB", "The number of GPUs in '-1x24GB' is -1", "Say a whole number from 1 to 1048576"),
        ("1.5xt4", "The number of GPUs in '1.5xt4' is 1.5", "Say a whole number from 1 to 1048576"),
        ("99999999xt4", "The number of GPUs", "Say a whole number from 1 to 1048576"),
        ("2x", "'2x' does not say which GPU", "Say a card"),
        ("2x24", "The size '24' does not say", "Say 24GB"),
        ("-24GB", "The size '-24GB' is negative", "Say a positive size"),
        ("0GB", "The size '0GB' is zero", "Say a positive size"),
        ("2000000TiB", "more than 2^60 bytes", "Say a size"),
        ("24bananas", "no unit that is known", "Say 24GB"),
    ],
)
def test_what_is_no_gpu_is_a_usage_error_with_a_cure(text, cause, cure):
    """Whatever cannot be a GPU ends with exit status 2, a sentence of cause and one of cure."""
    with pytest.raises(UsageError) as caught:
        parse_gpu(text)
    assert cause in caught.value.cause
    assert cure in caught.value.cure
    assert caught.value.exit_status == 2


# ---------------------------------------------------------------------------------------------------- auto


def pretend_nvidia_smi_prints(monkeypatch, text):
    monkeypatch.setattr(gpus, "_read_nvidia_smi", lambda: text)


def test_auto_is_the_card_the_driver_names(monkeypatch):
    """A card of the catalogue keeps its facts and takes this machine's own total."""
    pretend_nvidia_smi_prints(monkeypatch, "NVIDIA A10G, 23028\n")
    num_gpus, card = parse_gpu("auto")
    assert (num_gpus, card.name, card.physical_bytes) == (1, "a10g", 23_028 * MIB)
    assert card.sources["physical_bytes"] == "nvidia-smi, this machine"
    assert card.usable_bytes == read_gpu("a10g").usable_bytes


def test_auto_tells_apart_cards_that_share_a_name(monkeypatch):
    """The driver calls the 8 GB and the 16 GB RTX 4060 Ti the same; the total says which it is."""
    pretend_nvidia_smi_prints(monkeypatch, "NVIDIA GeForce RTX 4060 Ti, 16380\n")
    assert parse_gpu("auto")[1].name == "rtx4060ti-16gb"
    pretend_nvidia_smi_prints(monkeypatch, "NVIDIA GeForce RTX 4060 Ti, 8188\n")
    assert parse_gpu("auto")[1].name == "nvidia-geforce-rtx-4060-ti"


@pytest.mark.parametrize(
    "line", ["NVIDIA RTX A6000, 49140", "NVIDIA GeForce RTX 3080, 12288", "NVIDIA Imaginary 1, 9999"]
)
def test_auto_trusts_the_driver_over_the_catalogue(monkeypatch, line):
    """A known name with another total (ECC off, another variant) or an unknown name: the driver's bytes, no rates."""
    pretend_nvidia_smi_prints(monkeypatch, line)
    _, card = parse_gpu("auto")
    assert card.usable_bytes == int(line.split(", ")[1]) * MIB
    assert (card.label, card.flops_per_s) == (line.split(", ")[0], {})
    assert card.usable_basis.startswith("the total nvidia-smi shows")


def test_auto_counts_gpus_that_are_alike(monkeypatch):
    """`2xauto` is the first two GPUs of the machine; they must exist and be the same."""
    pretend_nvidia_smi_prints(monkeypatch, "Tesla T4, 15360\nTesla T4, 15360\nNVIDIA L4, 23034\n")
    assert parse_gpu("2xauto")[0] == 2
    assert parse_gpu("2xAUTO")[1].name == "t4"
    with pytest.raises(MemplanError, match=r"differ: Tesla T4 \(15360 MiB\), Tesla T4 \(15360 MiB\), NVIDIA L4"):
        parse_gpu("3xauto")
    with pytest.raises(MemplanError, match="4 GPUs were asked for and nvidia-smi lists 3"):
        parse_gpu("4xauto")


def test_auto_says_so_when_the_driver_gives_no_total(monkeypatch):
    """Boards that share the CPU's memory print `[N/A]`."""
    pretend_nvidia_smi_prints(monkeypatch, "NVIDIA GB10, [N/A]\n")
    with pytest.raises(MemplanError, match=r"does not say how much memory this GPU has: 'NVIDIA GB10, \[N/A\]'"):
        parse_gpu("auto")


def test_auto_without_a_driver_is_a_fault_and_not_a_usage_error(monkeypatch, tmp_path):
    """The words were right and the machine has no GPU: exit status 1, with the other ways to name one."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MemplanError, match="there is no nvidia-smi on the PATH") as caught:
        parse_gpu("auto")
    assert caught.value.exit_status == 1
    assert caught.value.cure == "Name the card, as in --gpu rtx4090, or give its size, as in --gpu 24GB."


def test_auto_repeats_what_a_failing_driver_says(monkeypatch, tmp_path):
    """An nvidia-smi that cannot reach its driver explains itself; its words are passed on."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'Driver/library version mismatch'\nexit 18\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MemplanError, match="nvidia-smi says 'Driver/library version mismatch'"):
        parse_gpu("auto")


# ---------------------------------------------------------------------------------------------------- the folder


def test_an_installed_package_carries_its_profiles(monkeypatch, tmp_path):
    """`memplan/profiles` counts where it exists, else `profiles` beside the package."""
    package = tmp_path / "site" / "memplan"
    package.mkdir(parents=True)
    monkeypatch.setattr(profiles, "PACKAGE_FOLDER", str(package))
    assert profiles_dir() == tmp_path / "site" / "profiles"
    (package / "profiles").mkdir()
    assert profiles_dir() == package / "profiles"


def test_a_broken_profile_is_named(monkeypatch, tmp_path):
    """A file that is not TOML is a fault with its path, not a traceback."""
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "bad.toml").write_text("name = ", encoding="utf-8")
    monkeypatch.setattr(profiles, "PACKAGE_FOLDER", str(tmp_path))
    with pytest.raises(MemplanError, match=r"bad\.toml is not valid TOML"):
        read_profile("bad.toml")
