"""A policy is kept as written, survives JSON, agrees with its schema, and refuses nonsense by name."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import balanced_offload.offload.policy as policy_module
from balanced_offload.offload.policy import OffloadMode, OffloadPolicy

SCHEMA_FILE = Path(policy_module.__file__).parent / "schemas" / "offload-policy-1.json"
SCHEMA = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

GOOD: list[dict[str, Any]] = [
    {},
    {"mode": "none"},
    {"mode": "balanced", "high": "60%", "low": "20%"},
    {"high": 0.6, "low": 0.2},
    {"high": 0.6, "low": 0.6},
    {"high": "9.5GiB", "low": "512MiB"},
    {"high": 4_000_000_000, "low": 0},
    {"high": 4e9},
    {"high": "0.6", "low": "20%"},
    {"high": "100%"},
    {"high": "99.5%"},
    {"high": "050%"},
    {"high": "1.0"},
    {"high": ".5"},
    {"high": "4GiB", "low": "60%"},  # only a card can say which is larger
    {"high": None, "low": "auto"},
    {"never": ["clip-l", "CLIPTextModel"], "always": ["t5"]},
    {"never": "clip-l, clip-g; vae"},
    {"vae_tiling": "on", "before_decode": "free_all", "on_oom": "stop", "use_core_dynamic": "bypass"},
    {"headroom": "2GiB", "reserve": "1.5GB", "pinned_ram": 0.25, "prefetch": "512MiB"},
    {"reserve": "10%", "prefetch": 0},
    {"prefetch": "auto"},
    {"gc_threshold": 0},
    {"gc_threshold": 1},
    {"gc_threshold": 0.7},
    {"gc_threshold": "70%"},
    {"gc_threshold": "0.7"},
    {"gc_threshold": "profile"},
    {"gc_threshold": None},
    {"fit_aware": False},
]

# field, value, words the message must carry (besides the field and the value as given)
BAD: list[tuple[str, Any, str]] = [
    ("mode", "ballanced", "balanced"),
    ("mode", "group", "auto, none, balanced, model, sequential"),
    ("mode", "", "auto, none, balanced, model, sequential"),
    ("mode", None, "auto, none, balanced, model, sequential"),
    ("mode", 1, "auto, none, balanced, model, sequential"),
    ("high", "110%", "at most 100%"),
    ("high", -1, "negative"),
    ("high", -0.5, "negative"),
    ("high", "-2GiB", "negative"),
    ("high", 1.5, "at most 1.0"),
    ("high", True, "not sizes"),
    ("high", [1], "not a size"),
    ("high", "plenty", "9.5GiB"),
    ("high", "8", "without a unit"),
    ("high", "8G", "8GiB"),
    ("high", 1 << 63, "no size of memory"),
    ("low", "110%", "at most 100%"),
    ("low", -1, "negative"),
    ("low", {}, "not a size"),
    ("headroom", "100.5%", "at most 100%"),
    ("headroom", False, "not sizes"),
    ("reserve", "auto", "no automatic value"),
    ("reserve", None, "no automatic value"),
    ("reserve", -1, "negative"),
    ("pinned_ram", "200%", "at most 100%"),
    ("prefetch", "60%", "write bytes"),
    ("prefetch", 0.5, "write bytes"),
    ("prefetch", -1, "negative"),
    ("never", 3, "names"),
    ("never", None, "names"),
    ("never", {"a": 1}, "names"),
    ("never", ["vae", 3], "every entry is text"),
    ("always", [None], "every entry is text"),
    ("vae_tiling", "yes", "auto, on, off"),
    ("vae_tiling", True, "auto, on, off"),
    ("before_decode", "freeall", "free_all"),
    ("on_oom", "stepdown", "step_down"),
    ("use_core_dynamic", "folow", "follow"),
    ("gc_threshold", 70, "from 0 to 1"),
    ("gc_threshold", 1.1, "from 0 to 1"),
    ("gc_threshold", -0.1, "from 0 to 1"),
    ("gc_threshold", "110%", "from 0 to 1"),
    ("gc_threshold", "2GiB", "from 0 to 1"),
    ("gc_threshold", True, "from 0 to 1"),
    ("fit_aware", 1, "true or false"),
    ("fit_aware", "true", "true or false"),
    ("fit_aware", None, "true or false"),
]


def test_defaults_and_order_are_those_of_the_interface() -> None:
    assert [(f.name, f.default) for f in dataclasses.fields(OffloadPolicy)] == [
        ("mode", OffloadMode.AUTO),
        ("high", "auto"),
        ("low", "auto"),
        ("never", ()),
        ("always", ()),
        ("vae_tiling", "auto"),
        ("before_decode", "fit"),
        ("on_oom", "step_down"),
        ("headroom", "auto"),
        ("reserve", 0),
        ("pinned_ram", "auto"),
        ("gc_threshold", "profile"),
        ("prefetch", "auto"),
        ("fit_aware", True),
        ("use_core_dynamic", "auto"),
    ]


def test_it_is_frozen_and_hashable() -> None:
    policy = OffloadPolicy(never=("vae",))
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.high = "1GiB"  # type: ignore[misc]
    assert hash(policy) == hash(OffloadPolicy(never=("vae",)))


@pytest.mark.parametrize("written", ["60%", 0.6, "9.5 GiB", 4_000_000_000, None, "AUTO"])
def test_sizes_stay_as_written(written: Any) -> None:
    policy = OffloadPolicy(high=written)
    assert policy.high == written and type(policy.high) is type(written)


@pytest.mark.parametrize(
    ("written", "stored"),
    [
        (["clip-l", "vae"], ("clip-l", "vae")),
        (("clip-l", "vae"), ("clip-l", "vae")),
        ("clip-l,vae", ("clip-l", "vae")),
        ("clip-l; vae", ("clip-l", "vae")),
        (" clip-l  vae ", ("clip-l", "vae")),
        ("clip-l\nvae,,", ("clip-l", "vae")),
        ("T5", ("T5",)),  # two letters are a name too
        ("", ()),
        ([], ()),
        (["vae", " vae ", "", "VAE"], ("vae", "VAE")),
    ],
)
def test_lists_in_every_writing(written: Any, stored: tuple[str, ...]) -> None:
    assert OffloadPolicy(never=written).never == stored
    assert OffloadPolicy(always=written).always == stored


@pytest.mark.parametrize("written", ["balanced", "Balanced", " BALANCED ", OffloadMode.BALANCED])
def test_mode_in_any_case(written: Any) -> None:
    assert OffloadPolicy(mode=written).mode is OffloadMode.BALANCED


@pytest.mark.parametrize("fields", GOOD, ids=json.dumps)
def test_json_round_trip_is_equal_and_fits_the_schema(fields: dict[str, Any]) -> None:
    policy = OffloadPolicy(**fields)
    document = policy.to_json()
    assert document["schema"] == "offload-policy/1"
    VALIDATOR.validate(document)
    VALIDATOR.validate({"schema": "offload-policy/1", **fields})
    text = json.dumps(document, allow_nan=False)
    assert OffloadPolicy.from_json(text) == policy
    assert OffloadPolicy.from_json(document) == policy
    # As written, to the letter: 0.6 does not come back as "60%", nor 0 as 0.0.
    assert json.dumps(OffloadPolicy.from_json(text).to_json()) == text


@pytest.mark.parametrize(("field", "value", "says"), BAD, ids=repr)
def test_bad_values_name_field_value_and_what_is_allowed(field: str, value: Any, says: str) -> None:
    with pytest.raises(ValueError) as caught:
        OffloadPolicy(**{field: value})
    text = str(caught.value)
    assert text.startswith(f"{field}: got ")
    culprit = value[-1] if isinstance(value, list) and field in ("never", "always") else value
    assert repr(culprit) in text
    assert "allowed:" in text
    assert says in text


@pytest.mark.parametrize(("field", "value", "says"), BAD, ids=repr)
def test_the_schema_refuses_what_the_class_refuses(field: str, value: Any, says: str) -> None:
    assert not VALIDATOR.is_valid({"schema": "offload-policy/1", field: value})


@pytest.mark.parametrize("field", ["high", "low", "headroom", "reserve", "pinned_ram", "prefetch", "gc_threshold"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_field_takes_nan_or_infinity(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: got {value!r}; allowed: "):
        OffloadPolicy(**{field: value})
    # Python's JSON reader lets them through, so the policy has to stop them.
    with pytest.raises(ValueError, match=rf"^{field}: got {value!r}; allowed: "):
        OffloadPolicy.from_json(json.dumps({"schema": "offload-policy/1", field: value}))


@pytest.mark.parametrize(
    ("low", "high"),
    [("60%", "20%"), (0.7, "60%"), ("8GiB", "4GiB"), (5_000_000_000, "4GiB"), ("0.61", 0.6), (1, 0)],
)
def test_low_over_high_is_refused_where_they_compare(low: Any, high: Any) -> None:
    with pytest.raises(ValueError) as caught:
        OffloadPolicy(low=low, high=high)
    text = str(caught.value)
    assert text.startswith(f"low: got {low!r}; allowed: at most high, which is {high!r}")


def test_unknown_json_field_names_near_ones() -> None:
    with pytest.raises(ValueError, match=r"^policy field: got 'hihg'; allowed: mode, high, .*did you mean high"):
        OffloadPolicy.from_json({"schema": "offload-policy/1", "hihg": "60%"})
    with pytest.raises(ValueError, match=r"^policy field: got 'colour'; .*remove it"):
        OffloadPolicy.from_json({"schema": "offload-policy/1", "colour": "red"})
    assert not VALIDATOR.is_valid({"schema": "offload-policy/1", "hihg": "60%"})


@pytest.mark.parametrize("schema", [None, "offload-policy/2", 1])
def test_another_schema_is_refused(schema: Any) -> None:
    with pytest.raises(ValueError, match=r"^schema: got .*'offload-policy/1'"):
        OffloadPolicy.from_json({"schema": schema, "mode": "none"})
    assert not VALIDATOR.is_valid({"schema": schema, "mode": "none"})


def test_a_missing_schema_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^schema: got None"):
        OffloadPolicy.from_json({"mode": "none"})


@pytest.mark.parametrize(
    "text", ["", "{", "mode: none", '{"schema": }', "[" * 100_000, '{"never": ' * 100_000], ids=lambda text: text[:12]
)
def test_text_that_is_no_json(text: str) -> None:
    with pytest.raises(ValueError, match=r"^policy: not JSON .*offload-policy/1"):
        OffloadPolicy.from_json(text)


@pytest.mark.parametrize("document", ["[]", "3", "null", '"auto"', []])
def test_json_that_is_no_object(document: Any) -> None:
    with pytest.raises(ValueError, match=r"^policy: got "):
        OffloadPolicy.from_json(document)


def test_the_schema_is_a_schema_and_knows_exactly_the_fields() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    names = [f.name for f in dataclasses.fields(OffloadPolicy)]
    assert list(SCHEMA["properties"]) == ["schema", *names]
    written = OffloadPolicy().to_json()
    for name in names:
        assert SCHEMA["properties"][name]["default"] == written[name]
