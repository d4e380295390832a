"""The card's total alone chooses the profile; the rounding serves the choice and never the bytes."""

import pytest

from balanced_offload.offload.policy import ComponentInfo as C
from balanced_offload.offload.policy import Machine, OffloadMode, OffloadPolicy, WorkingSet
from balanced_offload.offload.profiles import PROFILES, profile_for
from balanced_offload.offload.sizes import GIB


@pytest.mark.parametrize(
    ("gib", "name"),
    [
        (2, "up_to_4_gib"),
        (3.81, "up_to_4_gib"),  # what a "4 GB" card reports
        (4, "up_to_4_gib"),
        (4.49, "up_to_4_gib"),
        (4.5, "up_to_12_gib"),  # halves go up: no banker's rounding
        (6, "up_to_12_gib"),
        (7.75, "up_to_12_gib"),
        (11.75, "up_to_12_gib"),  # "12 GB"
        (12, "up_to_12_gib"),
        (12.49, "up_to_12_gib"),
        (12.5, "default"),
        (15.7, "default"),  # "16 GB"
        (20, "default"),
        (22.5, "default"),  # 24 GB cards that keep 1.5 GiB for ECC: their bytes are too few for the next profile
        (23.49, "default"),
        (23.5, "from_24_gib"),
        (23.6, "from_24_gib"),  # "24 GB"
        (24, "from_24_gib"),
        (31.8, "from_24_gib"),
        (139.8, "from_24_gib"),
    ],
)
def test_profile_by_what_the_card_reports(gib: float, name: str) -> None:
    assert profile_for(int(gib * GIB)).name == name


def test_the_profiles_of_the_interface() -> None:
    assert [(p.name, p.mode.value, p.low, p.high, p.gc_threshold, p.never) for p in PROFILES] == [
        ("up_to_4_gib", "sequential", 0.0, 0.6, 0.0, ()),
        ("up_to_12_gib", "balanced", 0.0, 0.6, 0.7, ()),
        ("default", "balanced", 0.2, 0.6, 0.7, ()),
        ("from_24_gib", "balanced", 0.2, 0.8, 0.7, ("clip-l", "clip-g", "vae")),
    ]
    assert {p.vae_tiling for p in PROFILES} == {"auto"}


def test_bytes_come_from_the_true_total() -> None:
    total = 25_340_000_000  # 23.6 GiB: chosen as 24 GiB
    big = WorkingSet((C("transformer", "T", "denoiser", 40 * GIB),), 0)
    resolved = OffloadPolicy().resolve(Machine("card", "cuda", total, others=0, ram_total=64 * GIB), big)
    assert resolved.profile == "from_24_gib"
    assert resolved.mode is OffloadMode.BALANCED
    # 0.8 * 25340000000 = 20272000000; 0.8 * 24 GiB would be 20615843020, of which 343843020 do not exist
    assert resolved.high == 20_272_000_000
    assert resolved.low == 5_068_000_000
